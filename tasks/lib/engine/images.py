"""Which images there are, what builds them, and in which order."""
from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch

from invoke.context import Context

from tasks.lib.engine.client import ask, require_engine
from tasks.lib.engine.ownership import Owner, builder_of
from tasks.lib.errors import DockerError, UserError
from tasks.lib.settings import effective_environment, resolve

TAG = r"[\w][\w.-]{0,127}"


@dataclass(frozen=True)
class Image:
    """One of the project's images.

    Attributes:
        name: repository, without registry and tag.
        service: the Compose service that builds it.
        profile: the Compose profile of that service.
        needs: services whose images must exist before.
    """
    name: str
    service: str
    profile: str
    needs: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        """The task that builds it."""
        return "build." + {"eval-runner": "eval"}.get(self.service, self.service)


# In dependency order; what `build.all` builds.
IMAGES = (
    Image("agentgym-rl/base", "base", "build"),
    Image("agentgym-rl/train", "train", "train", needs=("base", )),
    Image("agentgym-rl/scripts", "scripts", "scripts", needs=("base", )),
    Image("agentgym/eval", "eval-runner", "eval"),
)
# The model's server on hosts without a GPU; `eval --checkpoint` builds it where it is needed.
SERVE = Image("agentgym-rl/serve", "serve", "serve", needs=("base", ))
EVERY = (*IMAGES, SERVE)


def image_of(service: str) -> Image:
    """Return the image that `service` builds.

    Raises:
        KeyError: no image comes from that service.
    """
    return {image.service: image for image in EVERY}[service]


def image_exists(name: str) -> bool:
    """Return whether the engine has the image `name`."""
    return ask(lambda docker: docker.image.exists(name))


def require_image(c: Context, name: str, task: str) -> None:
    """Stop with one clear line where the engine has no image `name`; `task` builds it. `--dry` asks nothing.

    Raises:
        UserError: exit code 1.
    """
    require_engine(c)
    if c.config.run.dry:
        return
    if not image_exists(name):
        raise DockerError(
            f"no image {name} yet; build it with `invoke {task}` (IMAGE_TAG and REGISTRY choose the name)", code=1)
    require_platform(name, task)


def require_platform(name: str, task: str) -> None:
    """Stop where the image `name`, which `task` builds, is for another platform than the one asked for.

    Raises:
        UserError: exit code 2; Compose would build or pull another one.
    """
    asked = effective_environment().get("DOCKER_DEFAULT_PLATFORM", "")  # Compose reads it in .env, too
    if not asked:
        return
    image = ask(lambda docker: docker.image.inspect(name))
    if asked.split("/")[:2] != [image.os, image.architecture]:
        raise DockerError(
            f"image {name} is for {image.os}/{image.architecture}, and DOCKER_DEFAULT_PLATFORM={asked}; unset it, or "
            f"build it with `invoke {task}`",
            code=2)


def image_name(name: str, tag: str = "") -> str:
    """Return the full name of our image `name` (agentgym-rl/train), with registry and tag.

    Raises:
        UserError: one of the two cannot be.
    """
    registry, chosen = resolve("REGISTRY"), resolve("IMAGE_TAG", tag)
    if registry and not registry.endswith("/"):
        raise UserError(f"REGISTRY={registry} has no slash at its end; write {registry}/")
    if not re.fullmatch(TAG, chosen, re.ASCII):
        raise UserError(f"IMAGE_TAG={chosen!r} is no image tag; use letters, digits, dot, dash, underscore")
    return f"{registry}{name}:{chosen}"


def environment_images() -> list[str]:
    """Return the names of the environment servers' images that the engine has under our registry and tag."""
    pattern = image_name("agentgym/env-*")
    found = ask(lambda docker: docker.image.list(filters=environment_filter()))
    return sorted({tag for image in found for tag in image.repo_tags if fnmatch(tag, pattern)})


def environment_filter() -> dict[str, str]:
    """Return what the engine is asked for to find those."""
    return {"reference": image_name("agentgym/env-*")}


@dataclass(frozen=True)
class ImageFacts:
    """What the engine knows of an image: its id, its size in bytes, when it was created, which checkout built it."""
    id: str
    size: int
    created: datetime
    built_by: Owner


def image_facts(name: str) -> ImageFacts | None:
    """Return what the engine knows of the image `name`, or None where it has none of that name."""
    if not image_exists(name):
        return None
    image = ask(lambda docker: docker.image.inspect(name))
    return ImageFacts(image.id, image.size, image.created, builder_of((image.config and image.config.labels) or {}))
