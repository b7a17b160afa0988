"""Run one command in a service's container, with the checks and choices that all such tasks share."""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING, TypeVar

from invoke.context import Context

from tasks.lib.asking import agrees, require_somebody
from tasks.lib.engine.client import (
    ask,
    drive,
    execute,
    has_nvidia_hook,
    has_nvidia_runtime,
    interactive,
    require_engine,
)
from tasks.lib.engine.compose_files import QUIET
from tasks.lib.engine.gpus import GpuChoice, choose_gpus
from tasks.lib.engine.images import image_name, image_of, require_image
from tasks.lib.engine.mounts import ensure_folders
from tasks.lib.engine.ownership import PROJECT, SERVICE, UID, Owner, is_ours, owner_of, project_name
from tasks.lib.errors import INTERRUPTED, DockerError, UserError
from tasks.lib.interrupts import as_ctrl_c
from tasks.lib.notices import note, put, say
from tasks.lib.settings import ROOT, read_dotenv, resolve

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
                      **QUIET,
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


@dataclass(frozen=True)
class Around:
    """The containers on this engine that concern us, running or not, the latest first; `compose run`'s too.

    Attributes:
        project: our Compose project's name.
        ours: this checkout's and this caller's, under whichever project name.
        strangers: of our project's name, and another checkout's or user's.
        elsewhere: of the workbench's other checkouts and users, under names of their own.
    """
    project: str
    ours: list[Found]
    strangers: list[Found]
    elsewhere: list[Found]

    @property
    def others(self) -> list[Found]:
        """Return all that is not ours."""
        return [*self.strangers, *self.elsewhere]


def around() -> Around:
    """Look at the engine's containers."""
    project: str = ask(lambda client: client.compose.config(return_json=True), profiles=["*"])["name"]
    # By label: `compose ps` leaves out what `compose run` started.
    found = look(PROJECT, lambda one: (UID in (one.config.labels or {}), describe(one)))
    theirs = [(workbench, one) for workbench, one in found if not is_ours(one.owner)]
    return Around(project, [one for _, one in found if is_ours(one.owner)],
                  [one for _, one in theirs if one.project == project],
                  [one for workbench, one in theirs if workbench and one.project != project])


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


ONLY_BY_ASKING = "--any asks about each; `docker stop NAME` stops what is theirs without a question"


def agreed(c: Context, deed: str, found: Sequence[Found]) -> Iterator[Found]:
    """Give those of others' containers to which whoever sits here wants to do `deed`, one question each.

    Raises:
        UserError: nobody is there to answer.
    """
    if c.config.run.dry or not found:
        return
    require_somebody(ONLY_BY_ASKING)
    for one in found:
        if agrees(f"{deed} {one.name}, which is {one.owner}?"):
            yield one


def networks(project: str) -> list[str]:
    """Return the names of the networks of the Compose project `project`."""
    filters = {"label": f"{PROJECT}={project}"}
    return ask(lambda client: [network.name for network in client.network.list(filters=filters)])


def remove_ours(c: Context, any_: bool = False) -> None:
    """Stop and remove this checkout's containers and network; what a stranger has under our project's name stays.

    With `any_`, ask about each container that others have on this engine, before anything is removed.

    Raises:
        UserError: nobody is there to answer.
    """
    by_hand, left = [], []
    if not c.config.run.dry:
        found = around()
        more = list(agreed(c, "Stop and remove", found.others)) if any_ else []
        left = [one for one in found.strangers if one not in more]
        by_hand = [one.id for one in found.ours if left or one.project != found.project] + [one.id for one in more]
        for one in left:
            say(f"left {one.name} alone, which is {one.owner}")
        note(removed=[one.name for one in (*found.ours, *more)], left=[one.name for one in left])
    if by_hand:
        drive(c, lambda client: client.container.stop(by_hand, time=10))
        drive(c, lambda client: client.container.remove(by_hand, force=True, volumes=True))
    if not left:
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


def running(c: Context, service: str, any_: bool = False) -> str:
    """Return the id of our running container of `service`, the latest; empty where none runs, and under `--dry`.

    With `any_`, where none of ours runs, ask about each that a stranger has.

    Raises:
        UserError: nobody is there to answer.
    """
    require_engine(c)
    if c.config.run.dry:
        return ""
    found = around()
    mine, strangers, others = ([one for one in group if one.service == service and one.state == "running"]
                               for group in (found.ours, found.strangers, found.others))
    if mine:
        return mine[0].id
    wanted = next(agreed(c, "Join", others), None) if any_ else None
    if wanted:
        return wanted.id
    for one in strangers:
        say(f"not joining {one.name}, which is {one.owner}")
    return ""


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
