"""Start and stop environment servers, whichever runner they use."""
from __future__ import annotations

import ipaddress
import json
from dataclasses import asdict
from pathlib import Path

from invoke.context import Context

from environment_rows import refusal
from tasks.lib.atomic import write_private
from tasks.lib.engine import gpus
from tasks.lib.engine.builds import build_variables
from tasks.lib.engine.client import (
    ENGINE_AT_LEAST_FOR_ENVIRONMENTS,
    engine_version,
    has_nvidia_runtime,
    require_engine,
)
from tasks.lib.engine.images import image_exists, require_platform
from tasks.lib.environments import docker as env_docker
from tasks.lib.environments import lease
from tasks.lib.environments import local as env_local
from tasks.lib.environments.data import leading_out
from tasks.lib.environments.lookup import data_folder, gym_source, local_source, server_environment
from tasks.lib.environments.plan import Options
from tasks.lib.environments.rows import Environment
from tasks.lib.environments.running import log_files, running_servers
from tasks.lib.errors import DockerError, NoEngine, UserError
from tasks.lib.flags import port_number
from tasks.lib.host.ports import choose_port, port_is_free, take_port
from tasks.lib.host.programs import RUNNERS
from tasks.lib.notices import put, tell
from tasks.lib.settings import ROOT, effective_environment, resolve


def require_address(bind: str) -> None:
    """Stop with one line where nothing can listen on `bind`.

    Raises:
        UserError: it is no IPv4 address, or none of this machine's.
    """
    try:
        ipaddress.IPv4Address(bind)
    except ValueError:
        raise UserError(
            f"ENV_BIND={bind} is no IPv4 address; use 127.0.0.1, or 0.0.0.0 for all of this machine's") from None
    if not port_is_free(0, bind):  # port 0 is any port
        raise UserError(f"ENV_BIND={bind} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all of them")


def choose_server_runner(runner: str) -> str:
    """Return docker or local for `runner`; auto is docker where an engine answers.

    Raises:
        UserError: there is no such runner.
    """
    if runner not in RUNNERS:
        raise UserError(f"unknown runner {runner!r}; choose one of {', '.join(RUNNERS)}")
    if runner != "auto":
        return runner
    try:
        engine_version()
    except DockerError:
        return "local"
    return "docker"


def pick_port(row: Environment, flag: str, bind: str) -> int:
    """Return the port to serve on: --port, else ENV_PORT, else the row's; only a port asked for by flag is a must.

    Raises:
        UserError: the port asked for is taken, or none is free.
    """
    require_address(bind)
    if flag:
        port = port_number("--port", flag)
        if not port_is_free(port, bind):
            raise UserError(f"port {port} is taken; leave --port out, or choose another", code=1)
        return port
    wanted = effective_environment().get("ENV_PORT") or str(row.port)
    port = choose_port(port_number("ENV_PORT", wanted), lambda port: take_port(port, bind))
    if port != int(wanted):
        tell(f"port {wanted} is taken; {row.name} gets {port}")
    return port


def start_server(c: Context, row: Environment, options: Options, runner: str, build: bool, wait: float) -> str:
    """Start the row's server and return its URL; says what it does on the way.

    Raises:
        UserError: one line; nothing is left running.
    """
    require_startable(c, row, options, runner)
    if not c.config.run.dry:
        if row.name in running_servers():  # what is left of a server that ended
            stop_server(c, row.name)
        for old in log_files(row.name):
            old.unlink()
        lease.detach_owner(row.name)  # a mark of an evaluation whose server ended by other means
        remember_options(row, options, runner)
    if runner == "local":
        if c.config.run.dry:
            for line in env_local.would_run(row, options, data_folder(row), server_environment(row)):
                put(line)
            return env_local.url(options)
        return env_local.up(row, options, local_source(row), data_folder(row), server_environment(row), wait)
    given = build_variables("")
    file = write_compose_file(c, row, options, "compose.json")
    if build or not images_exist(row, options):
        env_docker.build(c, row, options, file, given)
    elif not c.config.run.dry:
        require_platform(env_docker.server_image(row), f"build.env --env {row.name}")
    return env_docker.up(c, row, options, file, wait, given)


def choose_device(row: Environment, flag: str) -> str:
    """Return what --device says; empty is the row's own.

    Raises:
        UserError: there is no such device, or the row has no choice.
    """
    if flag not in ("", "cpu", "cuda"):
        raise UserError(f"--device {flag} is neither cpu nor cuda")
    if flag == "cuda" and not row.gpu:
        raise UserError(f"{row.name} uses no GPU; leave --device out")
    if flag == "cpu" and row.gpu and "cuda" not in row.answers:
        raise UserError(f"{row.name} needs an NVIDIA GPU; leave --device out")
    return flag if row.gpu else ""


def require_startable(c: Context, row: Environment, options: Options, runner: str) -> None:
    """Stop with one line where the row's server could not start, before anything is changed.

    Raises:
        UserError: data, keys, consent, the source, the engine or a GPU is missing.
    """
    reason = refusal(row, data_folder(row), effective_environment(), options.understood, f"data/{row.name}")
    if reason:
        raise UserError(reason)
    if row.consent and options.replicas > 1:
        raise UserError(f"{row.name} plays on one real account; --replicas {options.replicas} would let several "
                        "sessions at it; leave it out")
    if runner == "docker":
        link = leading_out(row, data_folder(row))
        if link:
            raise UserError(
                f"{link} is a link out of the data's folder, where a container cannot follow; copy the data "
                "with `cp -rL`, or use --runner local")
        require_engine(c, ENGINE_AT_LEAST_FOR_ENVIRONMENTS)
        require_gpu(c, row, options.device)
    elif not c.config.run.dry:
        local_source(row)


def require_gpu(c: Context, row: Environment, device: str) -> None:
    """Stop with one line where `row` needs a GPU that the engine cannot give. `--dry` asks the engine nothing.

    Raises:
        UserError: see above; also where GPUS is no choice.
    """
    if not row.gpu or device == "cpu":
        return
    reason = gpus.refusal(row.name, resolve("GPUS"), c.config.run.dry or has_nvidia_runtime())
    if reason:
        raise UserError(
            reason + (f"; without one: `invoke env.up --env {row.name} --device cpu`" if "cuda" in row.answers else ""))


def images_exist(row: Environment, options: Options) -> bool:
    """Tell whether all images that `row` needs are built; without an engine, which `--dry` does without, none is."""
    needed = [env_docker.server_image(row), *([env_docker.proxy_image()] if options.replicas > 1 else [])]
    try:
        return all(map(image_exists, needed))
    except DockerError:
        return False


def write_compose_file(c: Context, row: Environment, options: Options, name: str, tag: str = "") -> Path:
    """Write the row's Compose file, `name` in its run folder, and return its path; under `--dry` write nothing."""
    path = env_local.RUN / row.name / name
    gym = gym_source() if row.source == "agentgym" else ""
    if not c.config.run.dry:
        build = env_docker.build_section(row, ROOT, gym, resolve("ENVIRONMENTS"))
        env_docker.write_model(path, row, options, data_folder(row), build, tag)
    return path


def remember_options(row: Environment, options: Options, runner: str) -> None:
    """Note how the row was started, for `env.restart`."""
    path = env_local.RUN / row.name / "options.json"
    write_private(path, json.dumps({"runner": runner, **asdict(options)}))


def recall_options(row: Environment) -> tuple[Options, str] | None:
    """Return how the row was last started, and with which runner; None where that was not noted, or is torn."""
    path = env_local.RUN / row.name / "options.json"
    if not path.is_file():
        return None
    try:
        noted = json.loads(path.read_text())
        runner = noted.pop("runner")
        return Options(**noted), runner
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def stop_server(c: Context, name: str) -> bool:
    """Stop the environment's server, whichever runner it has; False where none was up."""
    if not c.config.run.dry:
        lease.detach_owner(name)
    local = stop_local(c, name)
    try:
        return env_docker.down(c, name) or local
    except NoEngine:  # so no container of ours either
        return local
    except DockerError:
        if local:
            return local
        raise


def stop_local(c: Context, name: str) -> bool:
    """Stop the environment's local server; under `--dry`, print the commands that would."""
    if not c.config.run.dry:
        return env_local.down(name)
    alive = [one for one in env_local.states().get(name, {}).get("processes", []) if env_local.is_running(one)]
    for entry in alive:
        put(f"kill -TERM -- -{entry['pid']}")
    return bool(alive)
