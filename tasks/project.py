"""Look at the project's containers and images, and stop them."""
import json as json_format
from dataclasses import asdict
from datetime import datetime, timezone

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.doctor import checks
from tasks.lib.engine import containers
from tasks.lib.engine.client import drive, require_engine
from tasks.lib.engine.images import EVERY, environment_filter, environment_images, image_facts, image_name
from tasks.lib.engine.ownership import PROJECT, Owner, is_ours
from tasks.lib.errors import UserError
from tasks.lib.tables import human_age, human_size, print_table


def print_inspection(c: Context, name: str) -> None:
    """Print the command that asks about the image `name`, under `--dry`."""
    drive(c, lambda client: client.image.inspect(name))


@task(positional=[], auto_shortflags=False, help={"json": "Print one JSON object in place of the tables."})
def status(c: Context, json: bool = False) -> None:
    """Show containers, ports, health and images."""
    require_engine(c)
    if c.config.run.dry:
        # What it asks; which containers and environments' images there are to ask about is known then.
        drive(c, lambda client: client.image.list(filters=environment_filter()))
        drive(c, lambda client: client.compose.config(return_json=True), profiles=["*"])
        drive(c, lambda client: client.container.list(all=True, filters={"label": PROJECT}))
        for image in EVERY:
            print_inspection(c, image_name(image.name))
        return
    now = datetime.now(timezone.utc)
    names = [*(image_name(image.name) for image in EVERY), *environment_images()]
    around = containers.around()
    if json:
        mine, theirs = ([asdict(found) for found in group] for group in (around.ours, around.others))
        facts_of = {name: image_facts(name) for name in names}
        print(
            json_format.dumps({
                "containers":
                mine,
                "of_others":
                theirs,
                "images": [{
                    "name": name,
                    "id": fact.id if fact else None,
                    "bytes": fact.size if fact else None,
                    "created": fact.created.isoformat() if fact else None,
                    "built_by": asdict(fact.built_by) if fact else None
                } for name, fact in facts_of.items()]
            }))
        return
    rows = [(found.name, found.state, found.health, found.ports) for found in around.ours]
    print_table(("container", "state", "health", "ports"), rows or [("none", "", "", "")])
    print()
    others = [(found.name, found.state, found.owner.folder, found.owner.uid) for found in around.others]
    if others:  # shown, and left alone
        print_table(("of others", "state", "folder", "user id"), others)
        print()
    facts = [(name, image_facts(name)) for name in names]
    print_table(("image", "size", "age", "built by"),
                [(name, human_size(fact.size), human_age(now - fact.created), told_builder(fact.built_by)) if fact else
                 (name, "not built", "", "") for name, fact in facts])


def told_builder(owner: Owner) -> str:
    """Return what `status` shows of who built an image."""
    if not owner.folder:
        return "not told"
    return "this checkout" if is_ours(owner) else f"{owner.folder}, user id {owner.uid}"


@task(positional=[], auto_shortflags=False, help={"any_": "Ask about each container of others on this engine, too."})
def down(c: Context, any_: bool = False) -> None:
    """Stop and remove this checkout's containers."""
    require_engine(c)
    containers.remove_ours(c, any_)


@task(positional=[], auto_shortflags=False, help={"json": "Print one JSON object in place of the lines."})
def doctor(c: Context, json: bool = False) -> None:
    """Check engine, plugins, GPUs, disk, settings, sources."""
    from tasks.lib.environments.lookup import key_names
    found = list(checks.all_checks(key_names))
    if json:
        print(json_format.dumps({"checks": [check.as_dict() for check in found]}, indent=2))
    else:
        print_table(("", "what", "found", "remedy"),
                    [(check.level, check.name, check.found, check.remedy) for check in found])
    if any(check.level == checks.MISSING for check in found):
        raise UserError(code=1)
