"""Run one command in a service's container, with the checks and choices that all such tasks share."""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING

from invoke.context import Context

from tasks.lib.engine.client import (
    ask,
    drive,
    execute,
    has_nvidia_hook,
    has_nvidia_runtime,
    interactive,
    require_engine,
)
from tasks.lib.engine.gpus import GpuChoice, choose_gpus
from tasks.lib.engine.images import image_name, image_of, require_image
from tasks.lib.engine.mounts import ensure_folders
from tasks.lib.errors import INTERRUPTED, DockerError, UserError
from tasks.lib.interrupts import as_ctrl_c
from tasks.lib.notices import say
from tasks.lib.settings import ROOT, read_dotenv, resolve

if TYPE_CHECKING:
    from python_on_whales import Container

if TYPE_CHECKING:
    from python_on_whales import Container

# Services that run another service's image.
IMAGE_FROM = {"model-merger": "scripts", "formatter": "scripts"}
TIDY_SECONDS = 30  # for a command that was interrupted
GPU_SERVICES = ("train", "scripts", "model-merger", "serve")


def gpus_for(c: Context, service: str, flag: str) -> GpuChoice:
    """Decide on the GPUs of `service` and say so where it gets none unasked.

    `--dry` asks the engine nothing: it assumes GPUs where the NVIDIA container toolkit is installed on this host.

    Raises:
        UserError: the flag is wrong, or asks for what the engine cannot give.
    """
    if service not in GPU_SERVICES:
        return GpuChoice(cpu=False, variables={})
    setting = resolve("GPUS")
    choose_gpus(flag, setting, nvidia=True)  # a wrong word is a wrong word with and without GPUs
    nvidia = has_nvidia_hook() if c.config.run.dry else has_nvidia_runtime()
    choice = choose_gpus(flag, setting, nvidia)
    if choice.notice:
        say(choice.notice)
    return choice


def run(c: Context,
        service: str,
        command: Sequence[str],
        gpus: str = "",
        user: str = "",
        volumes: Mapping[str, str] | None = None,
        variables: Mapping[str, str] | None = None) -> None:
    """Run `command` in a new container of `service`, removed afterwards; on this terminal where there is one.

    Args:
        c: the task's context.
        service: a Compose service.
        command: the words, untouched.
        gpus: the flag `--gpus`.
        user: the flag `--user`; empty means the caller.
        volumes: host folder to container folder, for this run only.
        variables: what Compose interpolates.

    Raises:
        UserError: Docker's exit code or the command's; one clear line where engine or image are missing.
    """
    source = image_of(IMAGE_FROM.get(service, service))
    profile = service if service in IMAGE_FROM else source.profile
    require_engine(c)
    choice = gpus_for(c, service, gpus)
    require_image(c, image_name(source.name), source.task)
    if not c.config.run.dry:
        for folder in ensure_folders(ROOT, {**read_dotenv(), **os.environ}):
            say(f"created {folder}")
    tty = interactive()
    # A name that tells this run's container from every other's; under `--dry` Compose's own will do.
    name = f"{resolve('COMPOSE_PROJECT_NAME')}-{service}-run-{token_hex(6)}"
    try:
        with as_ctrl_c():
            drive(c,
                  lambda client: client.compose.run(service,
                                                    list(command),
                                                    name=None if c.config.run.dry else name,
                                                    tty=tty,
                                                    stream=not tty,
                                                    remove=True,
                                                    user=user or None,
                                                    volumes=list((volumes or {}).items())),
                  profiles=[profile],
                  cpu=choice.cpu,
                  variables={
                      **choice.variables,
                      **(variables or {})
                  })
    except (UserError, OSError) as error:  # the reader of a pipe may have left
        if isinstance(error, OSError) or error.code == INTERRUPTED:
            stop_left(name)
        raise


def stop_left(name: str) -> None:
    """Stop the container `name`, which an interrupt may leave running: without a terminal, Compose does not stop it.

    Its command gets SIGINT as on a terminal, and TIDY_SECONDS to tidy up.
    """
    with suppress(DockerError):
        if not ask(lambda client: client.container.exists(name)):
            return
        print(f"interrupted; stopping the container {name}", file=sys.stderr, flush=True)
        ask(lambda client: client.container.kill(name, signal="SIGINT"))
        end = time.monotonic() + TIDY_SECONDS
        while time.monotonic() < end:
            if not ask(lambda client: client.container.exists(name)):
                return
            time.sleep(0.2)
        ask(lambda client: client.container.remove(name, force=True))


@dataclass(frozen=True)
class Found:
    """A container of the project.

    Attributes:
        id, name, service: which one.
        state: running, exited (3), created, ...
        health: healthy, unhealthy, starting, or empty without a health check.
        ports: published ports, 127.0.0.1:36001->36001/tcp.
    """
    id: str
    name: str
    service: str
    state: str
    health: str
    ports: str


def of_project() -> list[Found]:
    """Return the project's containers, running or not, with those of `compose run`, the latest first."""
    # By label: `compose ps` leaves out what `compose run` started.
    filters = _of_project()
    return ask(lambda client: [describe(found) for found in client.container.list(all=True, filters=filters)])


def networks_of_project() -> list[str]:
    """Return the names of the project's networks."""
    filters = _of_project()
    return ask(lambda client: [network.name for network in client.network.list(filters=filters)])


def _of_project() -> dict[str, str]:
    project = ask(lambda client: client.compose.config(return_json=True), profiles=["*"])["name"]
    return {"label": f"com.docker.compose.project={project}"}


def describe(container: Container) -> Found:
    """Return what the tasks show of a container."""
    state = container.state
    said = f"{state.status} ({state.exit_code})" if state.status == "exited" else state.status or ""
    ports = [
        f"{place['HostIp']}:{place['HostPort']}->{inner}"
        for inner, places in (container.network_settings.ports or {}).items() for place in places or []
    ]
    labels = container.config.labels or {}
    return Found(container.id, container.name, labels.get("com.docker.compose.service", ""), said,
                 state.health.status if state.health and state.health.status else "", ", ".join(ports))


def running(c: Context, service: str) -> str:
    """Return the id of a running container of `service`, the latest; empty where none runs, and under `--dry`."""
    require_engine(c)
    if c.config.run.dry:
        return ""
    return next((found.id for found in of_project() if found.service == service and found.state == "running"), "")


def join(c: Context, container: str, command: Sequence[str], user: str) -> None:
    """Run `command` in the running `container`, on this terminal where there is one.

    Raises:
        UserError: Docker's exit code or the command's.
    """
    drive(c, lambda client: execute(client, container, command, user))


def last_line(container: str) -> str:
    """Return the last line of a container's log that says something."""
    said = ask(lambda client: client.container.logs(container, tail=30))
    lines = [line for line in str(said).splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"
