"""Serve a Hugging Face folder in a container of the service `serve`, for as long as a run needs it."""
from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.context import Context

from tasks.lib.engine import containers
from tasks.lib.engine.client import ask, drive, require_engine
from tasks.lib.engine.compose_files import QUIET
from tasks.lib.engine.containers import last_line, look
from tasks.lib.engine.gpus import GpuChoice
from tasks.lib.engine.images import SERVE, image_exists, image_name, image_of, require_image
from tasks.lib.engine.mounts import Translation, ensure_folders
from tasks.lib.engine.ownership import is_ours, owner_of, project_name
from tasks.lib.errors import INTERRUPTED, DockerError, UserError
from tasks.lib.host import processes
from tasks.lib.notices import say, tell
from tasks.lib.serving.local import ENGINES
from tasks.lib.settings import ROOT, read_dotenv

if TYPE_CHECKING:
    from python_on_whales import DockerClient

OWNER = "org.agentgym-rl.serve.owner"
PORT = 8000


def choose_engine(engine: str, cpu: bool) -> tuple[str, str]:
    """Return vllm or transformers, and why; `cpu` tells that the container gets no GPU.

    Raises:
        UserError: no such engine, or it cannot run there.
    """
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
    if engine == "vllm" and cpu:
        raise UserError("--engine vllm needs a GPU, and the container gets none; use --engine transformers")
    if engine == "transformers":
        return "transformers", "--engine says so; its image has no GPU"
    return ("transformers", "no GPU") if cpu else ("vllm", "a GPU, and the training image has it")


def container_name(name: str) -> str:
    """Return the name of the container that serves `name`, by which others of the project reach it too."""
    # The end of the name is the digest of the weights; a host name has at most 63 characters.
    return f"{project_name()[:40]}-serve-{name[-8:]}".lower()


def ensure_image(c: Context, engine: str) -> None:
    """Build the CPU server's image where there is none.

    Raises:
        UserError: the training image is missing, or the build failed.
    """
    if engine == "vllm":
        require_image(c, image_name(image_of("train").name), "build.train")
        return
    name = image_name(SERVE.name)
    if c.config.run.dry or image_exists(name):
        return
    from tasks.lib.engine.builds import build_images
    tell(f"no image {name} yet: building it")
    build_images(c, (SERVE, ), no_cache=False, pull=False, cpu=True, push=False, tag="")


def stop_leftovers() -> None:
    """Remove the servers whose run was killed."""
    for name, ours, owner in look(OWNER, lambda one: (one.name, is_ours(owner_of(one)),
                                                      (one.config.labels or {})[OWNER])):
        if not ours:
            continue
        with suppress(ValueError):
            if processes.is_running(json.loads(owner)):
                continue
        tell(f"removing {name}, which a killed run left behind")
        remove(name)


def has_owner(container: str, owner: Mapping[str, str]) -> bool | None:
    """Tell whether the container has the labels `owner`; None where there is no such container."""
    if not ask(lambda client: client.container.exists(container)):
        return None
    labels = ask(lambda client: client.container.inspect(container)).config.labels or {}
    return owner.items() <= labels.items()


def remove(container: str) -> None:
    """Stop and remove the container, if there is one."""
    if ask(lambda client: client.container.exists(container)):
        ask(lambda client: client.container.remove(container, force=True, volumes=True))


def wait_until_ready(container: str, wait: float) -> None:
    """Return when the container's health check passes.

    Raises:
        UserError: it ended, or the time is up.
    """
    end = time.monotonic() + wait
    while time.monotonic() < end:
        state = ask(lambda client: client.container.inspect(container)).state
        if state.status != "running":
            raise UserError(f"the model's server ended: {last_line(container)}", code=1)
        if state.health and state.health.status == "healthy":
            return
        time.sleep(0.5)
    raise UserError(
        f"the model's server was not ready after {wait:g} s: {last_line(container)}; give it longer with "
        "--serve-wait",
        code=1)


@contextmanager
def started(c: Context, model: Path, name: str, engine: str, gpus: GpuChoice, wait: float) -> Iterator[str]:
    """Serve `model` as `name` in a container, and give its address for other containers of the project.

    The container is removed whichever way the block is left. It publishes no port.

    Raises:
        UserError: one line; nothing is left running.
    """
    ensure_image(c, engine)
    translation, container, cpu = Translation(ROOT), container_name(name), engine == "transformers"
    variables = {**QUIET, **gpus.variables, "SERVE_MODEL": translation.path(model), "SERVED_NAME": name}

    owner = {} if c.config.run.dry else {OWNER: json.dumps(processes.identity(os.getpid()))}

    def start(client: DockerClient) -> object:
        return client.compose.run("serve",
                                  detach=True,
                                  tty=False,
                                  name=container,
                                  labels=owner,
                                  volumes=[(*pair, "ro") for pair in translation.volumes.items()])

    url = f"http://{container}:{PORT}/v1"
    if c.config.run.dry:
        drive(c, start, profiles=["serve"], cpu=cpu, variables=variables)
        yield url
        return
    stop_leftovers()
    taken = UserError(f"another run serves {name} just now; wait for it", code=1)
    if ask(lambda client: client.container.exists(container)):
        raise taken
    for folder in ensure_folders(ROOT, {**read_dotenv(), **os.environ}):
        say(f"created {folder}")
    try:
        try:
            try:
                ask(start, profiles=["serve"], variables=variables, cpu=cpu)
            except DockerError:
                if has_owner(container, owner) is False:  # it came between our look and our start
                    raise taken from None
                raise
            wait_until_ready(container, wait)
        except KeyboardInterrupt:
            raise UserError(code=INTERRUPTED) from None
        yield url
    finally:
        if has_owner(container, owner):
            remove(container)


def gpus_for(c: Context, flag: str) -> GpuChoice:
    """Return the GPUs of the container.

    Raises:
        UserError: the flag is wrong, or no engine answers.
    """
    require_engine(c)
    return containers.gpus_for(c, "serve", flag)
