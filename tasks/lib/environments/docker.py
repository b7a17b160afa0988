"""Environment servers as containers: what `env.up`, `env.down` and `build.env` do with Docker.

The services come from .run/env/<name>/compose.json, written for each start (for each build: build.json), beside the
project's own Compose file and in the same project: other containers reach them by name, and `invoke down` stops them
too.
"""
from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from tasks.lib.atomic import write_private
from tasks.lib.engine import containers
from tasks.lib.engine.client import ask, drive
from tasks.lib.engine.compose_files import QUIET
from tasks.lib.engine.containers import last_line, look
from tasks.lib.engine.images import image_name
from tasks.lib.engine.ownership import CHECKOUT, PROJECT, is_ours, owner_of, project_name
from tasks.lib.environments.compose_model import (
    LABEL,
    PORT_LABEL,
    REPLICA_PORT,
    ROLE_LABEL,
    Variable,
    compose_model,
    escaped,
    service_name,
)
from tasks.lib.environments.haproxy import proxy_config
from tasks.lib.environments.local import RUN, Reasons, probe, url
from tasks.lib.environments.plan import Options
from tasks.lib.environments.rows import Environment
from tasks.lib.errors import DockerError, UserError
from tasks.lib.settings import SETTINGS, effective_environment

if TYPE_CHECKING:
    from python_on_whales import Container, DockerClient

DIED = ("exited", "dead", "restarting", "removing")
CONTEXT = "agentgym"


@dataclass(frozen=True)
class Server:
    """One container of an environment; `image` is the id of what it runs, a digest."""
    id: str
    environment: str
    service: str
    role: str
    port: int
    bind: str
    state: str
    image: str = ""


def servers(name: str = "") -> list[Server]:
    """Return this project's environment containers, of one environment or of all, stopped ones included."""
    found = look(f"{LABEL}={name}" if name else LABEL, lambda one: (is_ours(owner_of(one)), describe(one)))
    return [server for ours, server in found if ours]


def refuse_strangers(row: Environment) -> None:
    """Stop where another checkout or user runs `row` under our project's name: Compose would replace their containers.

    Raises:
        UserError: exit code 2.
    """
    for name, owner, project in look(f"{LABEL}={row.name}", lambda one: (one.name, owner_of(one),
                                                                         (one.config.labels or {}).get(PROJECT))):
        if project == project_name() and not is_ours(owner):
            raise UserError(f"{name} is {owner}, under the project's name {project}, which is yours too; set "
                            "COMPOSE_PROJECT_NAME to another one in .env")


def remove_others(c: Context, row: Environment | None) -> None:
    """Ask about the server containers that others have on this engine, of `row` or of all, and remove those agreed to.

    Raises:
        UserError: nobody is there to answer.
    """
    found = look(f"{LABEL}={row.name}" if row else LABEL, containers.describe)
    ids = [one.id for one in containers.agreed(c, "Stop and remove", [one for one in found if not is_ours(one.owner)])]
    if ids:
        drive(c, lambda client: client.container.stop(ids, time=10))
        drive(c, lambda client: client.container.remove(ids, force=True, volumes=True))


def describe(container: Container) -> Server:
    """Return what the tasks want to know of a container."""
    labels = container.config.labels or {}
    published = (container.host_config.port_bindings or {}).values()
    bind = next((place.host_ip for places in published for place in places or [] if place.host_ip), "")
    return Server(container.id, labels[LABEL], labels.get("com.docker.compose.service", ""),
                  labels.get(ROLE_LABEL, "server"), int(labels[PORT_LABEL]), bind, container.state.status or "",
                  container.image or "")


def build_section(row: Environment, root: Path, gym: str, rows_file: str) -> dict[str, Any]:
    """Return Compose's `build` of the row's image; `gym` is AgentGym's folder or pinned URL."""
    arguments = {
        "ENV": row.name,
        "STAGE": row.stage or row.name,
        "ENVIRONMENTS": rows_file,
        # No colon: set but empty means to do without.
        "SPACY_MODEL": Variable("${SPACY_MODEL-" + SETTINGS["SPACY_MODEL"].default + "}"),
        "REVISION": Variable("${REVISION:-unknown}"),
        "SOURCE_URL": Variable("${SOURCE_URL:-unknown}"),
        "AGENTGYM_REVISION": Variable("${AGENTGYM_REVISION:-unknown}"),
    }
    if row.source == "project":
        arguments["FOLDER"] = row.folder
    section: dict[str, Any] = {
        "context": str(root),
        "dockerfile": "docker/env.Dockerfile",
        "target": "server",
        "args": arguments,
        "secrets": ["package_index", "ca_bundle"],
        "labels": {
            CHECKOUT: Variable("${CHECKOUT:-}")
        },
    }
    if row.source == "agentgym":
        section["additional_contexts"] = {CONTEXT: gym}
    return section


def server_image(row: Environment, tag: str = "") -> str:
    """Return the full name of the row's image."""
    return image_name(f"agentgym/env-{row.name}", tag)


def proxy_image(tag: str = "") -> str:
    """Return the full name of the image of the proxy before replicas."""
    return image_name("agentgym/env-proxy", tag)


def write_model(path: Path, row: Environment, options: Options, data: Path, build: dict[str, Any], tag: str) -> None:
    """Write the Compose file for `row` to `path`, and the proxy's rules beside it where there are replicas."""
    home = path.parent
    write_private(
        path,
        json.dumps(escaped(compose_model(row, options, server_image(row, tag), proxy_image(tag), home, data, build)),
                   indent=2))
    if options.replicas > 1:
        addresses = [f"{service_name(row, number)}:{REPLICA_PORT}" for number in range(options.replicas)]
        rules = home / "haproxy.cfg"
        write_private(rules, proxy_config(row, options.port, addresses, dns=True))
        own, wanted = os.geteuid(), int(effective_environment().get("HOST_UID") or os.getuid())
        if wanted != own:  # HAProxy reads it in its container as that user
            if own == 0:
                os.chown(rules, wanted, -1)
            else:
                rules.chmod(0o644)  # it has no secret, and its folder is closed


def services(row: Environment, options: Options) -> list[str]:
    """Return the names of the Compose services that make up the environment."""
    replicas = [service_name(row, number) for number in range(options.replicas)] if options.replicas > 1 else []
    return [*replicas, service_name(row)]


def build(c: Context, row: Environment, options: Options, file: Path, variables: dict[str, str], **flags: Any) -> None:
    """Build the row's image, and the proxy's where there are replicas."""
    # The replicas share one image: the first one's service builds it.
    wanted = [services(row, options)[0]] + ([service_name(row)] if options.replicas > 1 else [])
    drive(c,
          lambda client: client.compose.build(wanted, stream_logs=True, **flags),
          variables={
              **QUIET,
              **variables
          },
          files=[file])


def up(c: Context, row: Environment, options: Options, file: Path, wait: float, variables: dict[str, str]) -> str:
    """Start the row's containers; return the URL once a session can be played.

    Raises:
        UserError: they could not start, or were not ready in time; none is left.
    """
    wanted = services(row, options)
    if not c.config.run.dry:
        refuse_strangers(row)
    started = False
    try:
        # quiet: a failure is one line, and a start says nothing of its own
        drive(c,
              lambda client: client.compose.up(wanted, detach=True, quiet=True, force_recreate=True),
              variables={
                  **QUIET,
                  **variables
              },
              files=[file])
        if not c.config.run.dry:
            wait_until_ready(row, options, wait)
        started = True
    finally:
        if not started:
            with suppress(DockerError):
                keep_logs(row.name)
            down(c, row.name)
    return url(options)


def wait_until_ready(row: Environment, options: Options, wait: float) -> None:
    """Return when a session could be played through the published port, on every replica.

    Raises:
        UserError: a container ended, or the time is up.
    """
    end, reasons = time.monotonic() + wait, Reasons()
    seen: set[int] = set()
    while True:
        for server in servers(row.name):
            if server.state in DIED:  # not while it starts again and prints the reason once more
                raise UserError(f"{row.name} ended: {reasons.answered or last_line(server.id)}", code=1)
        left = end - time.monotonic()
        if left <= 0:
            raise UserError(
                f"{row.name} was not ready after {wait:g} s: {reasons.answered or reasons.last}; see `invoke env.logs --env {row.name}`, "
                "or give it longer with --wait",
                code=1)
        reasons.note(probe(row, url(options), options.replicas, seen, left))
        if len(seen) == options.replicas:
            return
        time.sleep(0.2)


def printing(container: str, follow: bool) -> Callable[[DockerClient], Any]:
    """Return the action that prints a container's log.

    python-on-whales' own call reads an inspection first, whose answer `--dry` does not give.
    """
    from python_on_whales.utils import stream_stdout_and_stderr
    flags = ["--follow"] if follow else []
    return lambda client: stream_stdout_and_stderr(
        [*client.client_config.docker_cmd, "container", "logs", *flags, container])


def keep_logs(name: str) -> None:
    """Write what the environment's containers printed to its run folder, for `env.logs` after they are gone."""
    for server in servers(name):
        said = ask(lambda client, found=server: client.container.logs(found.id))  # type: ignore[misc]
        write_private(RUN / name / f"{server.service}.log", said)


def down(c: Context, name: str) -> bool:
    """Stop and remove the environment's containers; False where there was none."""
    found = servers(name)
    if not found:
        return False
    # The proxy first: a client then sees a refused connection, not a replica that is down.
    ids = [server.id for server in sorted(found, key=lambda server: server.role != "proxy")]
    drive(c, lambda client: client.container.stop(ids, time=10))
    drive(c, lambda client: client.container.remove(ids, force=True, volumes=True))
    return True
