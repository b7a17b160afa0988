"""Look at the project's containers and images, and stop them."""
import json as json_format
from dataclasses import asdict
from datetime import datetime, timezone

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.doctor import checks
from tasks.lib.doctor.check import MISSING
from tasks.lib.engine import containers
from tasks.lib.engine.client import drive, require_engine
from tasks.lib.engine.images import EVERY, environment_filter, environment_images, image_facts, image_name
from tasks.lib.engine.ownership import PROJECT, Owner, is_ours
from tasks.lib.errors import UserError
from tasks.lib.flags import port_number
from tasks.lib.host.ports import port_is_free
from tasks.lib.settings import resolve
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


def environments_data() -> tuple[list[str], list[str]]:
    """Return the names of the environments that lack data, and of those that have it."""
    from tasks.lib.environments.lookup import all_rows, data_folder
    lacking = {row.name: bool(row.missing_data(data_folder(row))) for row in all_rows().values() if row.data}
    return [name for name, lacks in lacking.items() if lacks], [name for name, lacks in lacking.items() if not lacks]


def taken_ports() -> dict[int, str]:
    """Return the ports that environments and plain Compose's services would take and another program has."""
    from tasks.lib.environments.lookup import all_rows
    from tasks.lib.environments.running import running_servers
    ours = {one.port for found in running_servers().values() for one in found}
    wanted = {row.port: row.name for row in all_rows().values()}
    wanted[port_number("SERVE_PORT", resolve("SERVE_PORT"))] = "SERVE_PORT"
    return {port: name for port, name in wanted.items() if port not in ours and not port_is_free(port)}


@task(positional=[], auto_shortflags=False, help={"json": "Print one JSON object in place of the lines."})
def doctor(c: Context, json: bool = False) -> None:
    """Check this host, its engine, images, data, settings."""
    from tasks.lib.environments.lookup import key_names
    found = list(checks.all_checks(key_names, environments_data, taken_ports))
    if json:
        print(json_format.dumps({"checks": [check.as_dict() for check in found]}, indent=2))
    else:
        print_table(("", "what", "found", "remedy"),
                    [(check.level, check.name, check.found, check.remedy) for check in found])
    if any(check.level == MISSING for check in found):
        raise UserError(code=1)
