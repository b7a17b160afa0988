"""Run one command in a service's container, with the checks and choices that all such tasks share."""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING, TypeVar

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
from tasks.lib.engine.ownership import PROJECT, SERVICE, Owner, is_ours, owner_of, project_name
from tasks.lib.errors import INTERRUPTED, DockerError, UserError
from tasks.lib.interrupts import as_ctrl_c
from tasks.lib.notices import note, put, say
from tasks.lib.settings import ROOT, read_dotenv, resolve

if TYPE_CHECKING:
    from python_on_whales import Container, DockerClient

if TYPE_CHECKING:
    from python_on_whales import Container, DockerClient

Answer = TypeVar("Answer")

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
    # A name that tells this run's container from every other's.
    name = f"{project_name()}-{service}-run-{token_hex(6)}"
    try:
        with as_ctrl_c():
            drive(c,
                  lambda client: client.compose.run(service,
                                                    list(command),
                                                    name=name,
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
        put(f"interrupted; stopping the container {name}", file=sys.stderr)
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
        id, name, service, project: which one.
        owner: whose it is.
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
    project: str
    owner: Owner


def every() -> list[Found]:
    """Return this checkout's containers and those of its project's name, whoever has them; the latest first."""
    # By label: `compose ps` leaves out what `compose run` started.
    project = _project()
    return [one for one in look(PROJECT, describe) if one.project == project or is_ours(one.owner)]


def look(label: str, describe: Callable[[Container], Answer]) -> list[Answer]:
    """Return what `describe` says of every container with the label `name` or `name=value`, the latest first.

    On a shared engine one may go between the list and the look at it: that one is left out.
    """
    from python_on_whales.exceptions import NoSuchContainer

    def seen(client: DockerClient) -> list[Answer]:
        found = []
        for container in client.container.list(all=True, filters={"label": label}):
            with suppress(NoSuchContainer):
                found.append(describe(container))
        return found

    return ask(seen)


def ours() -> list[Found]:
    """Return this checkout's containers, running or not, with those of `compose run` and of earlier project names."""
    return [one for one in every() if is_ours(one.owner)]


def strangers() -> list[Found]:
    """Return the containers of our project's name that another checkout or another user has."""
    return [one for one in every() if not is_ours(one.owner)]


def networks_of_project() -> list[str]:
    """Return the names of the project's networks."""
    filters = {"label": f"{PROJECT}={_project()}"}
    return ask(lambda client: [network.name for network in client.network.list(filters=filters)])


def _project() -> str:
    name: str = ask(lambda client: client.compose.config(return_json=True), profiles=["*"])["name"]
    return name


def remove_ours(c: Context) -> None:
    """Stop and remove this checkout's containers and network; what a stranger has under our project's name stays."""
    if c.config.run.dry:
        mine, others, project = [], [], ""
    else:
        project, found = _project(), every()
        mine = [one for one in found if is_ours(one.owner)]
        others = [one for one in found if not is_ours(one.owner)]
    for one in others:
        say(f"left {one.name} alone, which is {one.owner}")
    note(removed=[one.name for one in mine], left=[one.name for one in others])
    by_hand = [one.id for one in mine if others or one.project != project]
    if by_hand:
        drive(c, lambda client: client.container.stop(by_hand, time=10))
        drive(c, lambda client: client.container.remove(by_hand, force=True, volumes=True))
    if not others:
        # Orphans are containers of this project that the file no longer names, and those of `compose run`.
        drive(c, lambda client: client.compose.down(remove_orphans=True), profiles=["*"])


def describe(container: Container) -> Found:
    """Return what the tasks show of a container."""
    state = container.state
    said = f"{state.status} ({state.exit_code})" if state.status == "exited" else state.status or ""
    ports = [
        f"{place['HostIp']}:{place['HostPort']}->{inner}"
        for inner, places in (container.network_settings.ports or {}).items() for place in places or []
    ]
    labels = container.config.labels or {}
    return Found(id=container.id,
                 name=container.name,
                 service=labels.get(SERVICE, ""),
                 state=said,
                 health=state.health.status if state.health and state.health.status else "",
                 ports=", ".join(ports),
                 project=labels.get(PROJECT, ""),
                 owner=owner_of(container))


def running(c: Context, service: str) -> str:
    """Return the id of our running container of `service`, the latest; empty where none runs, and under `--dry`."""
    require_engine(c)
    if c.config.run.dry:
        return ""
    found = [one for one in every() if one.service == service and one.state == "running"]
    for one in found:
        if not is_ours(one.owner):
            say(f"not joining {one.name}, which is {one.owner}")
    return next((one.id for one in found if is_ours(one.owner)), "")


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
