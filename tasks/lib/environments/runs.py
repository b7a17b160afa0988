"""Start, find and stop environment servers, whichever runner they use."""
from __future__ import annotations

import ipaddress
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.context import Context
from invoke.exceptions import Exit

from servers.protocol import Client, ServerError
from tasks.lib.engine import client as docker
from tasks.lib.engine import gpus
from tasks.lib.engine.sources import GYM, choose_sources, is_url
from tasks.lib.environments import docker as env_docker
from tasks.lib.environments import lease as env_users
from tasks.lib.environments import local as env_local
from tasks.lib.environments.data import leading_out
from tasks.lib.environments.plan import Options, choose_port, refusal
from tasks.lib.environments.rows import Environment, environment, environments
from tasks.lib.host.programs import RUNNERS
from tasks.lib.settings import ROOT, SETTINGS, read_dotenv, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping

# Of the caller's shell, for other programs: they would hide an environment's own packages.
CALLERS = {"PYTHONHOME", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONSTARTUP"}
MOST = 2_000_000  # poll(2) counts milliseconds in 31 bits


@dataclass(frozen=True)
class Running:
    """An environment that was started and not stopped.

    Attributes:
        runner: docker or local.
        url: its address for programs on this machine.
        port: where its entry listens.
        servers: how many server processes or containers run.
        replicas: how many were started.
        state: running, or what Docker says of what does not run, where it does not serve.
        up: whether it serves: its entry runs, and a server behind it.
        service: its name for containers of this project; empty for a process of this machine.
    """
    runner: str
    url: str
    port: int
    servers: int
    replicas: int
    state: str
    up: bool
    service: str = ""


def rows_path() -> Path:
    """Return the file with the rows: environments.toml, unless ENVIRONMENTS names another."""
    return ROOT / resolve("ENVIRONMENTS")


def find_row(task: str, name: str) -> Environment:
    """Return the row called `name`, or `$ENV` where it is empty.

    Raises:
        Exit: there is none, with near names; or the rows do not fit.
    """
    try:
        return environment(resolve("ENV", name), rows_path())
    except ValueError as error:
        raise Exit(f"{task}: {error}", code=2) from None


def all_rows(task: str) -> dict[str, Environment]:
    """Return every row.

    Raises:
        Exit: the rows do not fit.
    """
    try:
        return environments(rows_path())
    except ValueError as error:
        raise Exit(f"{task}: {error}", code=2) from None


def whole_number(task: str, flag: str, value: str, least: int) -> int:
    """Return the number that the user typed.

    Raises:
        Exit: it is none, below `least`, or above MOST, which no clock of the system takes as seconds.
    """
    if not value.isdecimal() or int(value[:20]) < least:
        raise Exit(f"{task}: --{flag} {value} is no whole number of at least {least}", code=2)
    if int(value[:20]) > MOST:
        raise Exit(f"{task}: --{flag} {value} is more than {MOST}; give less", code=2)
    return int(value)


def port_number(task: str, name: str, value: str) -> int:
    """Return the port that the user typed.

    Raises:
        Exit: it is none.
    """
    if not value.isdecimal() or not 1 <= int(value[:20]) <= 65535:
        raise Exit(f"{task}: {name} {value} is no port; choose one from 1 to 65535", code=2)
    return int(value)


def require_address(task: str, bind: str) -> None:
    """Stop with one line where nothing can listen on `bind`.

    Raises:
        Exit: it is no IPv4 address, or none of this machine's.
    """
    try:
        ipaddress.IPv4Address(bind)
    except ValueError:
        raise Exit(f"{task}: ENV_BIND={bind} is no IPv4 address; use 127.0.0.1, or 0.0.0.0 for all of this machine's",
                   code=2) from None
    if not env_local.port_is_free(0, bind):  # port 0 is any port
        raise Exit(f"{task}: ENV_BIND={bind} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all of them",
                   code=2)


def settings() -> dict[str, str]:
    """Return the environment, with `.env` below it."""
    return {**read_dotenv(), **os.environ}


def variables(row: Environment) -> dict[str, str]:
    """Return the environment of the row's server: without secrets of ours, keys of other rows and Python's own variables.

    Raises:
        ValueError: the rows do not fit.
    """
    own = {key.name for key in row.keys}
    secret = {name for name, setting in SETTINGS.items() if setting.secret}
    secret |= {key.name for other in environments(rows_path()).values() for key in other.keys if not key.public}
    return {name: value for name, value in settings().items() if name in own or name not in secret | CALLERS}


def choose_runner(task: str, runner: str) -> str:
    """Return docker or local for `runner`; auto is docker where an engine answers.

    Raises:
        Exit: there is no such runner.
    """
    if runner not in RUNNERS:
        raise Exit(f"{task}: unknown runner {runner!r}; choose one of {', '.join(RUNNERS)}", code=2)
    if runner != "auto":
        return runner
    try:
        docker.engine_version()
    except Exit:
        return "local"
    return "docker"


def data_folder(row: Environment) -> Path:
    """Return the folder for the row's data."""
    return ROOT / "data" / row.name


def gym_source(task: str) -> str:
    """Return AgentGym's folder, or its pinned URL where no checkout is near.

    Raises:
        Exit: the setting names something else.
    """
    try:
        return choose_sources(ROOT, settings()).get(GYM) or resolve(GYM)
    except ValueError as error:
        raise Exit(f"{task}: {error}", code=2) from None


def local_source(task: str, row: Environment) -> Path:
    """Return the folder that the row's package folder lies in, on this machine.

    Raises:
        Exit: AgentGym is known by URL only.
    """
    if row.source == "project":
        return ROOT
    source = gym_source(task)
    if is_url(source):
        raise Exit(f"{task}: --runner local needs an AgentGym checkout; set AGENTGYM_SRC to its folder", code=2)
    return Path(source)


def running() -> dict[str, list[Running]]:
    """Return what was started and not stopped, by environment; without an engine, the local servers only."""
    found: dict[str, list[Running]] = {}
    for name, state in env_local.states().items():
        alive = [entry for entry in state["processes"] if env_local.is_running(entry)]
        if alive:
            count = sum(entry["role"] != "proxy" for entry in alive)
            up = count > 0 and any(entry["port"] == state["port"] for entry in alive)
            replicas = sum(entry["role"] != "proxy" for entry in state["processes"])
            found.setdefault(name,
                             []).append(Running("local", state["url"], state["port"], count, replicas, "running", up))
    try:
        containers = env_docker.servers()
    except Exit:
        return found
    for name in sorted({server.environment for server in containers}):
        mine = [server for server in containers if server.environment == name]
        count = sum(server.role != "proxy" and server.state == "running" for server in mine)
        entry = next((server for server in mine if server.role == "proxy"), mine[0])
        url = env_local.url(Options(port=entry.port, bind=entry.bind))
        up = count > 0 and entry.state == "running"
        shown = "running" if up else next((server.state for server in mine if server.state != "running"), "running")
        replicas = sum(server.role != "proxy" for server in mine)
        found.setdefault(name, []).append(Running("docker", url, entry.port, count, replicas, shown, up, entry.service))
    return found


def serving() -> dict[str, Running]:
    """Return the environments that are up, by name."""
    return {name: one for name, found in running().items() for one in reversed(found) if one.up}


def local_url(row: Environment) -> str | None:
    """Return the address of the row's local server, where one is up."""
    state = env_local.states().get(row.name)
    return state["url"] if state and all(env_local.is_running(entry) for entry in state["processes"]) else None


def pick_port(task: str, row: Environment, flag: str, bind: str) -> int:
    """Return the port to serve on: --port, else ENV_PORT, else the row's; only a port asked for by flag is a must.

    Raises:
        Exit: the port asked for is taken, or none is free.
    """
    require_address(task, bind)
    if flag:
        port = port_number(task, "--port", flag)
        if not env_local.port_is_free(port, bind):
            raise Exit(f"{task}: port {port} is taken; leave --port out, or choose another", code=1)
        return port
    wanted = settings().get("ENV_PORT") or str(row.port)
    try:
        port = choose_port(port_number(task, "ENV_PORT", wanted), lambda port: env_local.port_is_free(port, bind))
    except ValueError as error:
        raise Exit(f"{task}: {error}", code=1) from None
    if port != int(wanted):
        print(f"{task}: port {wanted} is taken; {row.name} gets {port}", flush=True)
    return port


def start(c: Context, task: str, row: Environment, options: Options, runner: str, build: bool, wait: float) -> str:
    """Start the row's server and return its URL; says what it does on the way.

    Raises:
        Exit: one line; nothing is left running.
    """
    require_startable(c, task, row, options, runner)
    if not c.config.run.dry:
        if row.name in running():  # what is left of a server that ended
            stop(c, row.name)
        for old in logs(row.name):
            old.unlink()
        env_users.keep(row.name)  # a mark of an evaluation whose server ended by other means
        remember(row, options, runner)
    if runner == "local":
        if c.config.run.dry:
            print(f"{task}: would start {row.name} as a process of this machine on port {options.port}")
            return env_local.url(options)
        try:
            return env_local.up(row, options, local_source(task, row), data_folder(row), variables(row), wait)
        except env_local.LocalError as error:
            raise Exit(f"{task}: {error}", code=1) from None
    from tasks.build import build_variables
    given = build_variables("")
    file = model(c, task, row, options, "compose.json")
    if build or not images_exist(row, options):
        env_docker.build(c, row, options, file, given)
    return env_docker.up(c, row, options, file, wait, given)


def require_startable(c: Context, task: str, row: Environment, options: Options, runner: str) -> None:
    """Stop with one line where the row's server could not start, before anything is changed.

    Raises:
        Exit: data, keys, consent, the source, the engine or a GPU is missing.
    """
    reason = refusal(row, data_folder(row), settings(), options.understood)
    if reason:
        raise Exit(f"{task}: {reason}", code=2)
    if row.consent and options.replicas > 1:
        raise Exit(
            f"{task}: {row.name} plays on one real account; --replicas {options.replicas} would let several "
            "sessions at it; leave it out",
            code=2)
    if runner == "docker":
        link = leading_out(row, data_folder(row))
        if link:
            raise Exit(
                f"{task}: {link} is a link out of the data's folder, where a container cannot follow; copy the data "
                "with `cp -rL`, or use --runner local",
                code=2)
        docker.require_engine(c, docker.ENGINE_AT_LEAST_FOR_ENVIRONMENTS)
        require_gpu(c, task, row)
    elif not c.config.run.dry:
        local_source(task, row)


def require_gpu(c: Context, task: str, row: Environment) -> None:
    """Stop with one line where `row` needs a GPU that the engine cannot give. `--dry` asks the engine nothing.

    Raises:
        Exit: see above; also where GPUS is no choice.
    """
    if not row.gpu:
        return
    try:
        reason = gpus.refusal(row.name, resolve("GPUS"), c.config.run.dry or docker.has_nvidia_runtime())
    except ValueError as error:
        raise Exit(f"{task}: {error}", code=2) from None
    if reason:
        raise Exit(f"{task}: {reason}", code=2)


def images_exist(row: Environment, options: Options) -> bool:
    """Tell whether all images that `row` needs are built; without an engine, which `--dry` does without, none is."""
    needed = [env_docker.image_name(row), *([env_docker.proxy_image()] if options.replicas > 1 else [])]
    try:
        return all(map(docker.image_exists, needed))
    except Exit:
        return False


def model(c: Context, task: str, row: Environment, options: Options, name: str, tag: str = "") -> Path:
    """Write the row's Compose file, `name` in its run folder, and return its path; under `--dry` write nothing."""
    path = env_local.RUN / row.name / name
    gym = gym_source(task) if row.source == "agentgym" else ""
    if not c.config.run.dry:
        build = env_docker.build_section(row, ROOT, gym, resolve("ENVIRONMENTS"))
        env_docker.write_model(path, row, options, data_folder(row), build, tag)
    return path


def remember(row: Environment, options: Options, runner: str) -> None:
    """Note how the row was started, for `env.restart`."""
    path = env_local.RUN / row.name / "options.json"
    env_docker.write_private(path, json.dumps({"runner": runner, **asdict(options)}))


def recall(row: Environment) -> tuple[Options, str] | None:
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


def logs(name: str) -> list[Path]:
    """Return the logs in the environment's run folder: those of its local server, or of the last start that failed."""
    state = env_local.states().get(name)
    home = env_local.RUN / name
    return [home / f"{entry['role']}.log" for entry in state["processes"]] if state else sorted(home.glob("*.log"))


def stop(c: Context, name: str) -> bool:
    """Stop the environment's server, whichever runner it has; False where none was up."""
    if not c.config.run.dry:
        env_users.keep(name)
    local = stop_local(c, name)
    try:
        return env_docker.down(c, name) or local
    except Exit as error:
        if local or error.code == docker.COMMAND_NOT_FOUND:  # no engine, so no container of ours either
            return local
        raise


def stop_local(c: Context, name: str) -> bool:
    """Stop the environment's local server; under `--dry`, print the commands that would."""
    if not c.config.run.dry:
        return env_local.down(name)
    alive = [one for one in env_local.states().get(name, {}).get("processes", []) if env_local.is_running(one)]
    for entry in alive:
        print(f"kill -TERM -- -{entry['pid']}")
    return bool(alive)


def sessions(found: Running) -> Mapping[str, Any] | None:
    """Return what a server says of its sessions, summed over the replicas that answer; None where none does."""
    client = Client(found.url, {}, timeout=2)
    total: dict[str, Any] | None = None
    for number in range(found.replicas):
        with suppress(ServerError, KeyError, TypeError):
            told = client.sessions(number)
            before = total or {"live": 0, "pooled": 0, "memory_mb": 0.0}
            total = {key: value + told[key] for key, value in before.items()}
    return total


def container_url(service: str, port: int) -> str:
    """Return the address of a Compose service for containers of this project."""
    return f"http://{service}:{port}"
