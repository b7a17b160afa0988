"""Build the images."""
import sys
import time

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.engine.builds import build_images, build_variables, built
from tasks.lib.engine.client import ENGINE_AT_LEAST_FOR_ENVIRONMENTS, require_engine
from tasks.lib.engine.images import IMAGES, image_facts, image_of
from tasks.lib.errors import INTERRUPTED, UserError
from tasks.lib.notices import note, put
from tasks.lib.tables import print_table

FLAGS = {
    "no_cache": "Build every layer again.",
    "pull": "Ask the registry for newer base images first.",
    "cpu": "Start from Ubuntu with torch's CPU build: for hosts without an NVIDIA GPU.",
    "push": "Push the images when they are built; see REGISTRY in .env.example.",
    "tag": "Tag of the images (default: $IMAGE_TAG, then latest).",
}
ON_BASE = {**FLAGS, "cpu": "No effect of its own: base decides (build.base --cpu)."}
WITHOUT_TORCH = {**FLAGS, "cpu": "No effect: this image has no torch."}


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
    from tasks.lib.environments.lookup import all_rows, find_row
    from tasks.lib.environments.plan import Options
    from tasks.lib.environments.start_stop import write_compose_file
    rows = list(all_rows().values()) if env == "all" else [find_row(env)]
    variables = build_variables(tag)
    require_engine(c, ENGINE_AT_LEAST_FOR_ENVIRONMENTS)
    note(images=[])
    lines, failed = [], []
    for row in rows:
        options = Options(port=row.port)
        start, name = time.monotonic(), env_docker.server_image(row, tag)
        before = None if c.config.run.dry else image_facts(name)
        try:
            env_docker.build(c,
                             row,
                             options,
                             write_compose_file(c, row, options, "build.json", tag),
                             variables,
                             cache=not no_cache,
                             pull=pull)
        except UserError as error:
            if len(rows) == 1 or error.code == INTERRUPTED:
                raise
            put(f"{row.name}: {error.said() or 'not built'}", file=sys.stderr)
            failed.append(row.name)  # one that cannot be built here must not keep the others from being built
            continue
        after = None if c.config.run.dry else image_facts(name)
        if after:
            lines.append(built(name, before, after, time.monotonic() - start))
    print_table(("image", "size", "seconds", "state"), lines)
    if failed:
        raise UserError(f"not built: {', '.join(failed)}; see above, or build one with --env", code=1)
