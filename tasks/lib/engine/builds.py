"""Build our images, in the order in which they need each other."""
import os
import re
import time
from collections.abc import Sequence

from invoke.context import Context

from tasks.lib.engine.client import ask, drive, require_engine
from tasks.lib.engine.images import TAG, Image, ImageFacts, image_facts, image_name, image_of, require_image
from tasks.lib.engine.ownership import builder
from tasks.lib.engine.sources import GYM, RL, choose_sources, origin, revision
from tasks.lib.errors import DockerError, UserError
from tasks.lib.notices import note, note_one
from tasks.lib.settings import ROOT, SETTINGS, read_dotenv, resolve
from tasks.lib.tables import human_size, print_table


def build_variables(tag: str, push: bool = False) -> dict[str, str]:
    """Return what Compose interpolates into a build: the sources, their commits, the tag, who builds.

    An image that is pushed does not name a folder of this machine.

    Raises:
        UserError: a tag or a source that cannot be.
    """
    if tag and not re.fullmatch(TAG, tag, re.ASCII):
        raise UserError(f"--tag {tag!r} is no image tag; use letters, digits, dot, dash, underscore")
    settings = {**read_dotenv(), **os.environ}
    sources = choose_sources(ROOT, settings)
    variables = {
        **sources, "REVISION": revision(str(ROOT)),
        "SOURCE_URL": origin(ROOT),
        "CHECKOUT": "" if push else builder()
    }
    for name, label in ((RL, "AGENTGYM_RL_REVISION"), (GYM, "AGENTGYM_REVISION")):
        variables[label] = revision(sources.get(name) or SETTINGS[name].default)
    if tag:
        variables["IMAGE_TAG"] = tag
    return variables


def require_builder(images: Sequence[Image]) -> None:
    """Stop where one of `images` starts from another of ours and the builder cannot see the engine's images.

    Such a builder would ask a public registry for a name that is anybody's.

    Raises:
        UserError: see above.
    """
    if resolve("REGISTRY") or not any(image.needs for image in images):
        return
    try:
        builder = ask(lambda client: client.buildx.inspect())
        driver = builder.driver
    except (DockerError, ValueError, IndexError) as error:
        if isinstance(error, DockerError) and os.environ.get("BUILDX_BUILDER"):
            raise
        return  # an older Buildx, which tells otherwise; the build says what it lacks
    if driver != "docker":
        said = f"BUILDX_BUILDER={name}; unset it" if (name := os.environ.get("BUILDX_BUILDER")) else (
            f"the builder is {builder.name}; run `docker buildx use default`")
        raise UserError(f"{said}: its driver {driver} does not see this engine's images, from which "
                        f"{next(image.name for image in images if image.needs)} starts (or push them, with REGISTRY)")


def build_image(c: Context, image: Image, variables: dict[str, str], no_cache: bool, pull: bool,
                cpu: bool) -> tuple[str, ...] | None:
    """Build `image`; return its line of the summary, or None under `--dry`."""
    name = image_name(image.name, variables.get("IMAGE_TAG", ""))
    before = None if c.config.run.dry else image_facts(name)
    start = time.monotonic()
    drive(
        c,
        # An image that needs another of ours starts from what was just built: no registry has a newer one.
        lambda client: client.compose.build(
            [image.service], cache=not no_cache, pull=pull and not image.needs, stream_logs=True),
        profiles=[image.profile],
        cpu=cpu,
        variables=variables)
    after = None if c.config.run.dry else image_facts(name)
    if after is None:
        return None
    return built(name, before, after, time.monotonic() - start)


def built(name: str, before: ImageFacts | None, after: ImageFacts, seconds: float) -> tuple[str, ...]:
    """Return an image's line of the summary, and note it."""
    state = "cached" if before is not None and before.id == after.id else "built"
    note_one("images", {
        "name": name,
        "id": after.id,
        "bytes": after.size,
        "seconds": round(seconds, 1),
        "state": state
    })
    return name, human_size(after.size), f"{seconds:.1f}", state


def push_image(c: Context, image: Image, variables: dict[str, str], cpu: bool) -> None:
    """Push `image` to the registry that its name says."""
    drive(c,
          lambda client: client.compose.push([image.service]),
          profiles=[image.profile],
          cpu=cpu,
          variables=variables)


def build_images(c: Context, images: tuple[Image, ...], no_cache: bool, pull: bool, cpu: bool, push: bool,
                 tag: str) -> None:
    """Build `images` in this order, then push them if asked; print size, seconds and whether anything changed."""
    variables = build_variables(tag, push)
    require_engine(c)
    if not c.config.run.dry:
        require_builder(images)
    note(images=[])
    rows = []
    for image in images:
        for need in map(image_of, image.needs):
            if need not in images:
                require_image(c, image_name(need.name, tag), need.task)
        rows.append(build_image(c, image, variables, no_cache, pull, cpu))
    if push:
        for image in images:
            push_image(c, image, variables, cpu)
    print_table(("image", "size", "seconds", "state"), [row for row in rows if row])
