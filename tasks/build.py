"""Build the images."""
import os
import re
import sys
import time

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from tasks.lib.engine import client as docker
from tasks.lib.engine.images import IMAGES, Image, human_size, image_of
from tasks.lib.engine.sources import GYM, RL, choose_sources, origin, revision
from tasks.lib.errors import INTERRUPTED
from tasks.lib.settings import ROOT, SETTINGS, read_dotenv

FLAGS = {
    "no_cache": "Build every layer again.",
    "pull": "Ask the registry for newer base images first.",
    "cpu": "Start from Ubuntu with torch's CPU build: for hosts without an NVIDIA GPU.",
    "push": "Push the images when they are built; see REGISTRY in .env.example.",
    "tag": "Tag of the images (default: $IMAGE_TAG, then latest).",
}
ON_BASE = {**FLAGS, "cpu": "No effect of its own: base decides (build.base --cpu)."}
WITHOUT_TORCH = {**FLAGS, "cpu": "No effect: this image has no torch."}


def build_variables(tag: str) -> dict[str, str]:
    """Return what Compose interpolates into a build: the sources, their commits, the tag.

    Raises:
        Exit: a tag or a source that cannot be.
    """
    if tag and not re.fullmatch(r"[\w][\w.-]{0,127}", tag, re.ASCII):
        raise Exit(f"build: --tag {tag!r} is no image tag; use letters, digits, dot, dash, underscore", code=2)
    settings = {**read_dotenv(), **os.environ}
    try:
        sources = choose_sources(ROOT, settings)
    except ValueError as error:
        raise Exit(f"build: {error}", code=2) from None
    variables = {**sources, "REVISION": revision(str(ROOT)), "SOURCE_URL": origin(ROOT)}
    for name, label in ((RL, "AGENTGYM_RL_REVISION"), (GYM, "AGENTGYM_REVISION")):
        variables[label] = revision(sources.get(name) or SETTINGS[name].default)
    if tag:
        variables["IMAGE_TAG"] = tag
    return variables


def build_image(c: Context, image: Image, variables: dict[str, str], no_cache: bool, pull: bool,
                cpu: bool) -> tuple[str, ...] | None:
    """Build `image`; return its line of the summary, or None under `--dry`."""
    name = docker.image_name(image.name, variables.get("IMAGE_TAG", ""))
    before = None if c.config.run.dry else docker.image_facts(name)
    start = time.monotonic()
    docker.drive(
        c,
        # An image that needs another of ours starts from what was just built: no registry has a newer one.
        lambda client: client.compose.build(
            [image.service], cache=not no_cache, pull=pull and not image.needs, stream_logs=True),
        profiles=[image.profile],
        cpu=cpu,
        variables=variables)
    after = None if c.config.run.dry else docker.image_facts(name)
    if after is None:
        return None
    unchanged = before is not None and before.id == after.id
    return name, human_size(after.size), f"{time.monotonic() - start:.1f}", "cached" if unchanged else "built"


def push_image(c: Context, image: Image, variables: dict[str, str], cpu: bool) -> None:
    """Push `image` to the registry that its name says."""
    docker.drive(c,
                 lambda client: client.compose.push([image.service]),
                 profiles=[image.profile],
                 cpu=cpu,
                 variables=variables)


def build_images(c: Context, images: tuple[Image, ...], no_cache: bool, pull: bool, cpu: bool, push: bool,
                 tag: str) -> None:
    """Build `images` in this order, then push them if asked; print size, seconds and whether anything changed."""
    variables = build_variables(tag)
    docker.require_engine(c)
    rows = []
    for image in images:
        for need in map(image_of, image.needs):
            if need not in images:
                docker.require_image(c, docker.image_name(need.name, tag), need.task)
        rows.append(build_image(c, image, variables, no_cache, pull, cpu))
    if push:
        for image in images:
            push_image(c, image, variables, cpu)
    docker.print_table(("image", "size", "seconds", "state"), [row for row in rows if row])


@task(positional=[], auto_shortflags=False, help=FLAGS)
def all(c: Context,
        no_cache: bool = False,
        pull: bool = False,
        cpu: bool = False,
        push: bool = False,
        tag: str = "") -> None:
    """Build base, train, scripts and eval, in this order."""
    build_images(c, IMAGES, no_cache, pull, cpu, push, tag)


@task(positional=[], auto_shortflags=False, help=FLAGS)
def base(c: Context,
         no_cache: bool = False,
         pull: bool = False,
         cpu: bool = False,
         push: bool = False,
         tag: str = "") -> None:
    """Build CUDA, Python, torch and flash-attn."""
    build_images(c, (image_of("base"), ), no_cache, pull, cpu, push, tag)


@task(positional=[], auto_shortflags=False, help=ON_BASE)
def train(c: Context,
          no_cache: bool = False,
          pull: bool = False,
          cpu: bool = False,
          push: bool = False,
          tag: str = "") -> None:
    """Build the training image on top of base."""
    build_images(c, (image_of("train"), ), no_cache, pull, cpu, push, tag)


@task(positional=[], auto_shortflags=False, help=ON_BASE)
def scripts(c: Context,
            no_cache: bool = False,
            pull: bool = False,
            cpu: bool = False,
            push: bool = False,
            tag: str = "") -> None:
    """Build the merger's and formatter's image on base."""
    build_images(c, (image_of("scripts"), ), no_cache, pull, cpu, push, tag)


@task(positional=[], auto_shortflags=False, help={name: text for name, text in FLAGS.items() if name != "cpu"})
def serve(c: Context, no_cache: bool = False, pull: bool = False, push: bool = False, tag: str = "") -> None:
    """Build the model's server for the CPU, on base."""
    build_images(c, (image_of("serve"), ), no_cache, pull, True, push, tag)


@task(positional=[], auto_shortflags=False, help=WITHOUT_TORCH)
def eval(c: Context,
         no_cache: bool = False,
         pull: bool = False,
         cpu: bool = False,
         push: bool = False,
         tag: str = "") -> None:
    """Build the light evaluation runner."""
    build_images(c, (image_of("eval-runner"), ), no_cache, pull, cpu, push, tag)


@task(positional=[],
      auto_shortflags=False,
      help={
          "env": "Environment, or all (default: $ENV, then searchqa).",
          "no_cache": FLAGS["no_cache"],
          "pull": FLAGS["pull"],
          "tag": FLAGS["tag"],
      })
def env(c: Context, env: str = "", no_cache: bool = False, pull: bool = False, tag: str = "") -> None:
    """Build an environment server's image, or all."""
    from tasks.lib.environments import docker as env_docker
    from tasks.lib.environments import runs as env_runs
    from tasks.lib.environments.plan import Options
    rows = list(env_runs.all_rows("build.env").values()) if env == "all" else [env_runs.find_row("build.env", env)]
    variables = build_variables(tag)
    docker.require_engine(c, docker.ENGINE_AT_LEAST_FOR_ENVIRONMENTS)
    built, failed = [], []
    for row in rows:
        options = Options(port=row.port)
        start, name = time.monotonic(), env_docker.image_name(row, tag)
        before = None if c.config.run.dry else docker.image_facts(name)
        try:
            env_docker.build(c,
                             row,
                             options,
                             env_runs.model(c, "build.env", row, options, "build.json", tag),
                             variables,
                             cache=not no_cache,
                             pull=pull)
        except Exit as error:
            if len(rows) == 1 or error.code == INTERRUPTED:
                raise
            print(f"{row.name}: {error.message or 'not built'}", file=sys.stderr, flush=True)
            failed.append(row.name)  # one that cannot be built here must not keep the others from being built
            continue
        after = None if c.config.run.dry else docker.image_facts(name)
        if after:
            unchanged = before is not None and before.id == after.id
            built.append(
                (name, human_size(after.size), f"{time.monotonic() - start:.1f} s", "cached" if unchanged else "built"))
    docker.print_table(("image", "size", "seconds", ""), built)
    if failed:
        raise Exit(f"build.env: not built: {', '.join(failed)}; see above, or build one with --env", code=1)
