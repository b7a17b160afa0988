"""Remove what the tasks made: never saves, models or data."""
import shutil

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.asking import agrees, require_somebody
from tasks.lib.engine import containers
from tasks.lib.engine.client import drive, require_engine
from tasks.lib.engine.images import EVERY, environment_images, image_exists, image_facts, image_name
from tasks.lib.engine.ownership import is_ours
from tasks.lib.errors import DockerError
from tasks.lib.host.leftovers import bytecode_folders
from tasks.lib.notices import note, put, say
from tasks.lib.settings import ROOT

YES = {"yes": "Do not ask."}
CACHE = {**YES, "older_than": "Only what was last used before that time, such as 72h (default: everything unused)."}
ALL = {**YES, "older_than": "Of the build cache, only what was last used before that time; the rest goes at any age."}


def confirm(c: Context, what: list[str], yes: bool) -> bool:
    """Say `what` will be removed and ask; return whether to go on.

    Raises:
        UserError: nobody is there to answer.
    """
    if c.config.run.dry:
        return True
    if not what:
        put("clean: nothing to remove")
        return False
    put("This removes:")
    for one in what:
        put(f"  {one}")
    note(removes=what)
    if yes:
        return True
    require_somebody("add --yes")
    return agrees("Go on?")


def remove_images(c: Context, names: list[str]) -> None:
    """Remove the images `names`."""
    note(images=names)
    if names:
        drive(c, lambda client: client.image.remove(names))


def remove_cache(c: Context, older_than: str) -> None:
    """Remove the engine's unused build cache."""
    filters = {"until": older_than} if older_than else {}
    drive(c, lambda client: client.buildx.prune(filters=filters, stream_logs=True))


def remove_bytecode(c: Context) -> None:
    """Remove what Python and its tools cached in this folder."""
    for folder in bytecode_folders(ROOT):
        if c.config.run.dry:
            put(f"rm -r {folder}")
        elif folder.is_symlink():  # the cache of somebody else's folder stays
            folder.unlink()
        else:
            shutil.rmtree(folder)


def container_lines(c: Context) -> list[str]:
    """Return a line for each of the project's containers and networks."""
    if c.config.run.dry:
        return []
    around = containers.around()
    networks = [] if around.strangers else containers.networks(around.project)  # in which theirs are
    return [
        *(f"container {found.name} ({found.state})" for found in around.ours), *(f"network {name}" for name in networks)
    ]


def image_names(c: Context, any_: bool = False) -> list[str]:
    """Return the names of the project's images that exist; under `--dry` without an engine, of all that might.

    What another checkout built under the same name is left out, which is said, or asked about with `any_`.

    Raises:
        UserError: nobody is there to answer.
    """
    names = [image_name(image.name) for image in EVERY]
    try:
        found = [*filter(image_exists, names), *environment_images()]
        builders = {} if c.config.run.dry else {name: facts.built_by for name in found if (facts := image_facts(name))}
    except DockerError:
        if c.config.run.dry:
            return names
        raise
    theirs = {name: owner for name, owner in builders.items() if owner.folder and not is_ours(owner)}
    if any_ and theirs:
        require_somebody("--any asks about each")
    for name, owner in theirs.items():
        if not (any_ and agrees(f"Remove {name}, which is {owner}?")):
            say(f"left {name} alone, which is {owner}")
            found.remove(name)
    return found


def cache_lines(older_than: str) -> list[str]:
    """Return the line for the build cache."""
    return [
        "the engine's unused build cache, of other projects too" +
        (f", last used over {older_than} ago" if older_than else "")
    ]


def bytecode_lines() -> list[str]:
    """Return a line for each cache folder."""
    return [str(folder.relative_to(ROOT)) for folder in bytecode_folders(ROOT)]


@task(name="containers",
      positional=[],
      auto_shortflags=False,
      help={
          **YES, "any_": "Ask about each container of others on this engine, too."
      })
def clean_containers(c: Context, yes: bool = False, any_: bool = False) -> None:
    """Remove this project's containers and network."""
    require_engine(c)
    if any_ and not c.config.run.dry:
        require_somebody(containers.ONLY_BY_ASKING)
    if confirm(c, container_lines(c), yes) or any_:
        containers.remove_ours(c, any_)


@task(name="images",
      positional=[],
      auto_shortflags=False,
      help={
          **YES, "any_": "Ask about each image that another checkout built, too."
      })
def clean_images(c: Context, yes: bool = False, any_: bool = False) -> None:
    """Remove the images that the tasks built."""
    require_engine(c)
    names = image_names(c, any_)
    if confirm(c, [f"image {name}" for name in names], yes):
        remove_images(c, names)


@task(name="cache", positional=[], auto_shortflags=False, help=CACHE)
def clean_cache(c: Context, yes: bool = False, older_than: str = "") -> None:
    """Remove the engine's unused build cache."""
    require_engine(c)
    if confirm(c, cache_lines(older_than), yes):
        remove_cache(c, older_than)


@task(name="pycache", positional=[], auto_shortflags=False, help=YES)
def clean_pycache(c: Context, yes: bool = False) -> None:
    """Remove Python's caches in this folder."""
    if confirm(c, bytecode_lines(), yes):
        remove_bytecode(c)


@task(name="all", positional=[], auto_shortflags=False, help=ALL)
def clean_all(c: Context, yes: bool = False, older_than: str = "") -> None:
    """Remove containers, images, build cache and pycache."""
    require_engine(c)
    names = image_names(c)
    lines = [*container_lines(c), *(f"image {name}" for name in names), *cache_lines(older_than), *bytecode_lines()]
    if confirm(c, lines, yes):
        containers.remove_ours(c)
        remove_images(c, names)
        remove_cache(c, older_than)
        remove_bytecode(c)
