"""Look at the project's containers and images, and stop them."""
import json as json_format
from datetime import datetime, timezone

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from tasks.lib.doctor import checks
from tasks.lib.engine import client as docker
from tasks.lib.engine import containers
from tasks.lib.engine.images import EVERY, human_age, human_size


def print_inspection(c: Context, name: str) -> None:
    """Print the command that asks about the image `name`, under `--dry`."""
    docker.drive(c, lambda client: client.image.inspect(name))


@task(positional=[], auto_shortflags=False)
def status(c: Context) -> None:
    """Show containers, ports, health and images."""
    docker.require_engine(c)
    if c.config.run.dry:
        docker.drive(c, lambda client: client.compose.ps(all=True), profiles=["*"])
        for image in EVERY:
            print_inspection(c, docker.image_name(image.name))
        return
    now = datetime.now(timezone.utc)
    rows = [(found.name, found.state, found.health, found.ports) for found in containers.of_project()]
    docker.print_table(("container", "state", "health", "ports"), rows or [("none", "", "", "")])
    print()
    names = [*(docker.image_name(image.name) for image in EVERY), *docker.environment_images()]
    facts = [(name, docker.image_facts(name)) for name in names]
    docker.print_table(("image", "size", "age"),
                       [(name, human_size(fact.size), human_age(now - fact.created)) if fact else
                        (name, "not built", "") for name, fact in facts])


@task(positional=[], auto_shortflags=False)
def down(c: Context) -> None:
    """Stop and remove this project's containers."""
    docker.require_engine(c)
    # Orphans are containers of this project that the file no longer names, and those of `compose run`.
    docker.drive(c, lambda client: client.compose.down(remove_orphans=True), profiles=["*"])


@task(positional=[], auto_shortflags=False, help={"json": "Print one JSON object in place of the lines."})
def doctor(c: Context, json: bool = False) -> None:
    """Check engine, plugins, GPUs, disk, settings, sources."""
    found = list(checks.all_checks())
    if json:
        print(json_format.dumps({"checks": [check.as_dict() for check in found]}, indent=2))
    else:
        docker.print_table(("", "what", "found", "remedy"),
                           [(check.level, check.name, check.found, check.remedy) for check in found])
    if any(check.level == checks.MISSING for check in found):
        raise Exit(code=1)
