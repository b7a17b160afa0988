"""Start, stop and look at environment servers."""
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.errors import INTERRUPTED, DockerError, UserError
from tasks.lib.notices import note, put, say

if TYPE_CHECKING:
    from servers.protocol import Client
    from tasks.lib.environments.plan import Options
    from tasks.lib.environments.rows import Environment
    from tasks.lib.environments.running import Running

# The rows need pydantic and Docker's door needs python-on-whales: both are imported when a task runs.

ENV_HELP = "Environment, a table of environments.toml (default: $ENV, then searchqa)."
WAIT_HELP = "Seconds until the server must be ready (default: 120)."
RUNNER_HELP = (
    "auto (default: docker where an engine answers, else local), docker, or local (a process of this machine in "
    "a virtual environment).")
CONSENT_HELP = "Agree to what the environment does to real accounts; it says what when this is missing."


@task(
    positional=[],
    auto_shortflags=False,
    help={
        "env": ENV_HELP,
        "port":
        "Port on this machine (default: $ENV_PORT, then the environment's own; where that is taken, the next free one).",
        "replicas": "Servers behind the one URL (default: 1); a server is one process on one core.",
        "session_ttl": "Seconds after which an idle session is closed, 0 for never (default: 3600).",
        "build": "Build the image first, even where there is one.",
        "wait": WAIT_HELP,
        "runner": RUNNER_HELP,
        "i_understand": CONSENT_HELP,
        "device": "cpu or cuda, for an environment that uses a GPU (default: cuda).",
    })
def up(c: Context,
       env: str = "",
       port: str = "",
       replicas: str = "1",
       session_ttl: str = "3600",
       build: bool = False,
       wait: str = "120",
       runner: str = "auto",
       i_understand: bool = False,
       device: str = "") -> None:
    """Start an environment server and wait until ready."""
    from tasks.lib.environments import lease
    from tasks.lib.environments.lookup import find_row
    from tasks.lib.environments.plan import Options
    from tasks.lib.environments.running import servers_up
    from tasks.lib.environments.start_stop import choose_device, choose_server_runner, pick_port, start_server
    from tasks.lib.flags import port_number, whole_number
    from tasks.lib.interrupts import as_ctrl_c
    from tasks.lib.settings import resolve
    row = find_row(env)
    device = choose_device(row, device)
    count = whole_number("replicas", replicas, 1)
    ttl = whole_number("session-ttl", session_ttl, 0)
    seconds = whole_number("wait", wait, 1)
    if port:
        port_number("--port", port)
    chosen = choose_server_runner(runner)
    with as_ctrl_c(), nullcontext() if c.config.run.dry else lease.exclusive_lock(row.name):
        others = servers_up()
        if row.name in others:
            if not c.config.run.dry:
                lease.detach_owner(row.name)  # also where an evaluation started it
            url = f"{others[row.name].url}{row.protocol.prefix}"
            note(environment=row.name, url=url, runner=others[row.name].runner, started=False)
            put(f"{row.name} is up already: {others[row.name].url} (`invoke env.restart --env {row.name}` starts anew)")
            elsewhere = runner not in ("auto", others[row.name].runner)
            if port or device or elsewhere or (replicas, session_ttl, build) != ("1", "3600", False):
                put(f"its flags are those that it was started with; for others `invoke env.down --env {row.name}` first"
                    )
            return
        bind = resolve("ENV_BIND")
        options = Options(port=pick_port(row, port, bind),
                          replicas=count,
                          session_ttl=ttl,
                          bind=bind,
                          understood=i_understand,
                          aliases=not others,
                          device=device)
        url = start_server(c, row, options, chosen, build, seconds)
        if not c.config.run.dry:
            announce(row, options, chosen, url)


def dry(c: Context, what: str) -> bool:
    """Print `what` under `--dry`, and tell whether that is all there is to do."""
    if c.config.run.dry:
        put(f"would {what}")
    return bool(c.config.run.dry)


def announce(row: "Environment", options: "Options", runner: str, url: str) -> None:
    """Print where the server is."""
    from environment_rows import about
    from tasks.lib.environments.compose_model import service_name
    from tasks.lib.environments.lookup import data_folder
    from tasks.lib.environments.running import container_url
    prefix = row.protocol.prefix
    inside = ""
    if runner == "docker":
        inside = f"; in containers {container_url(service_name(row), options.port)}{prefix}"
    note(environment=row.name, url=f"{url}{prefix}", runner=runner, started=True)
    put(f"{row.name} is ready: {url}{prefix}{inside}")
    told = {**about(data_folder(row)), **({"device": options.device} if options.device == "cpu" else {})}
    if told:
        put(f"{row.name} plays on {', '.join(f'{key} {value}' for key, value in told.items())}; evaluations record it")


@task(positional=[],
      auto_shortflags=False,
      help={
          "env": "Environment to stop (default: all of them).",
          "any_": "Ask about each server container of others on this engine, too."
      })
def down(c: Context, env: str = "", any_: bool = False) -> None:
    """Stop one environment server, or all."""
    from tasks.lib.environments.lookup import find_row
    from tasks.lib.environments.running import running_servers
    from tasks.lib.environments.start_stop import stop_server
    names = [find_row(env).name] if env else sorted(running_servers())
    stopped: list[str] = []
    note(stopped=stopped)
    if any_ and not c.config.run.dry:
        from tasks.lib.environments.docker import remove_others
        remove_others(c, find_row(env) if env else None)
    for name in names:
        if not stop_server(c, name):
            put(f"{name} was not up")
        elif not c.config.run.dry:
            stopped.append(name)
            put(f"{name} is down")
    if not names:
        put("no environment is up")


@task(positional=[], auto_shortflags=False, help={"env": ENV_HELP, "wait": WAIT_HELP})
def restart(c: Context, env: str = "", wait: str = "120") -> None:
    """Stop a server and start it as it was."""
    from tasks.lib.environments import lease
    from tasks.lib.environments.lookup import find_row
    from tasks.lib.environments.running import servers_up
    from tasks.lib.environments.start_stop import recall_options, require_startable, start_server, stop_server
    from tasks.lib.flags import whole_number
    from tasks.lib.interrupts import as_ctrl_c
    row = find_row(env)
    seconds = whole_number("wait", wait, 1)
    noted = recall_options(row)
    if noted is None:
        if dry(c, f"stop {row.name} and start it as it was, but it was never started here"):
            return
        raise UserError(f"{row.name} was never started here; `invoke env.up --env {row.name}`")
    options, runner = noted
    with as_ctrl_c(), nullcontext() if c.config.run.dry else lease.exclusive_lock(row.name):
        require_startable(c, row, options, runner)
        stop_server(c, row.name)
        options = replace(options, aliases=not servers_up())
        url = start_server(c, row, options, runner, False, seconds)
        if not c.config.run.dry:
            announce(row, options, runner, url)


@task(name="list", positional=[], auto_shortflags=False, help={"json": "Print one JSON object in place of the table."})
def list_(c: Context, json: bool = False) -> None:
    """Show every environment: image, port, data, keys."""
    from tasks.lib.engine.images import image_exists
    from tasks.lib.environments import docker as env_docker
    from tasks.lib.environments.lookup import all_rows, data_folder
    from tasks.lib.environments.running import running_servers, session_totals
    from tasks.lib.settings import effective_environment
    from tasks.lib.tables import print_table
    rows, up_now, environ = all_rows(), running_servers(), effective_environment()
    try:
        built = {name for name, row in rows.items() if image_exists(env_docker.server_image(row))}
    except DockerError:
        built = set()
    if json:
        print(
            dumps({
                "environments": [{
                    "name":
                    name,
                    "title":
                    row.title,
                    "port":
                    row.port,
                    "image":
                    name in built,
                    "running": [{
                        **asdict(one), "sessions": session_totals(one)
                    } for one in up_now.get(name, [])],
                    "data_missing": [one.path for one in row.missing_data(data_folder(row))],
                    "keys_missing": [one.name for one in row.missing_keys(environ)]
                } for name, row in rows.items()]
            }))
        return
    lines = []
    for name, row in rows.items():
        found = up_now.get(name, [])
        told = session_totals(found[0]) if found else None
        lines.append((
            name,
            "yes" if name in built else "no",
            " ".join(servers_of(one) for one in found) or "-",
            " ".join(str(one.port) for one in found) or f"({row.port})",
            "-" if not row.data else "no" if row.missing_data(data_folder(row)) else "yes",
            "-" if not row.keys else "no" if row.missing_keys(environ) else "yes",
            f"{told['live']}, {told['memory_mb']:.0f} MB" if told else "-",
            row.title,
        ))
    print_table(("environment", "image", "running", "port", "data", "keys", "sessions", ""), lines)


def servers_of(one: "Running") -> str:
    """Return what `env.list` shows of a server: its runner and how many of its replicas run, or its state."""
    dead = f" of {one.replicas}" if one.servers < one.replicas else ""
    return f"{one.runner} x{one.servers}{dead}" if one.state == "running" else one.state


def print_files(c: Context, files: Sequence[Path], follow: bool) -> None:
    """Print files, and with `follow` what comes to them; under `--dry` the command that does."""
    argv = ["tail", "-n", "+1", *(["-F"] if follow else []), *map(str, files)]
    if c.config.run.dry:
        put(shlex.join(argv))
        return
    process = subprocess.Popen(argv)
    try:
        process.wait()
    except KeyboardInterrupt:
        raise UserError(code=INTERRUPTED) from None


@task(positional=[], auto_shortflags=False, help={"env": ENV_HELP, "follow": "Go on until Ctrl-C."})
def logs(c: Context, env: str = "", follow: bool = False) -> None:
    """Show what an environment server printed."""
    from tasks.lib.engine.client import drive
    from tasks.lib.engine.compose_files import QUIET
    from tasks.lib.environments import docker as env_docker
    from tasks.lib.environments import local as env_local
    from tasks.lib.environments.lookup import find_row
    from tasks.lib.environments.running import log_files
    row = find_row(env)
    files = log_files(row.name)
    if row.name in env_local.states():
        print_files(c, files, follow)
        return
    try:
        containers = env_docker.servers(row.name)
    except DockerError:
        if not (files or c.config.run.dry):
            raise
        containers = []
    if not containers:
        if files:
            say(f"{row.name} is not up; this is what its last start printed")
            print_files(c, files, False)
        elif not dry(c, f"show the logs of {row.name}, but it is not up"):
            raise UserError(f"{row.name} is not up; `invoke env.up --env {row.name}`", code=1)
        return
    if follow and len(containers) > 1:
        file = env_local.RUN / row.name / "compose.json"
        names = [f"env-{row.name}", *(f"env-{row.name}-{number}" for number in range(len(containers) - 1))]
        drive(c, lambda client: client.compose.logs(names, follow=True, stream=True), variables=QUIET, files=[file])
        return
    for server in containers:
        drive(c, env_docker.printing(server.id, follow))


@task(positional=[], auto_shortflags=False, help={"env": ENV_HELP, "user": "User in the container (default: yours)."})
def shell(c: Context, env: str = "", user: str = "") -> None:
    """Open a shell in an environment's container."""
    from tasks.lib.engine import containers
    from tasks.lib.environments import docker as env_docker
    from tasks.lib.environments import local as env_local
    from tasks.lib.environments.lookup import find_row
    row = find_row(env)
    if row.name in env_local.states():
        home = env_local.RUN / row.name
        raise UserError(f"{row.name} is a local process; its Python is {home / 'venv' / 'bin' / 'python'}", code=1)
    try:
        found = [server for server in env_docker.servers(row.name) if server.role == "server"]
    except DockerError:
        if not c.config.run.dry:
            raise
        found = []
    if not found:
        if dry(c, f"open bash in the container of {row.name}, but it is not up"):
            return
        raise UserError(f"{row.name} is not up; `invoke env.up --env {row.name}`", code=1)
    containers.join(c, found[0].id, ["bash"], user)


@task(positional=[],
      auto_shortflags=False,
      help={
          "env": ENV_HELP,
          "url": "Address of a server that was started by other means (default: the one that is up).",
          "timeout": "Seconds for each request (default: 60).",
          "items": "Items to play several times and compare, such as 0-50,100: is each the same task every time?",
          "all_": "Reset every item of the environment once, and name those that fail.",
          "restart": "With --items: restart the server, which ends its sessions, and compare once more.",
          "json": "Print one JSON object in place of the table."
      })
def check(c: Context,
          env: str = "",
          url: str = "",
          timeout: str = "60",
          items: str = "",
          all_: bool = False,
          restart: bool = False,
          json: bool = False) -> None:
    """Check that a running server keeps its protocol."""
    from servers.protocol import Client
    from tasks.lib.environments.conformance import Conformance
    from tasks.lib.environments.lookup import find_row
    from tasks.lib.environments.running import servers_up
    from tasks.lib.flags import whole_number
    from tasks.lib.tables import print_table
    row = find_row(env)
    seconds = whole_number("timeout", timeout, 1)
    if dry(c, f"play sessions on the server of {row.name}"):
        return
    found = None if url else servers_up().get(row.name)
    if not url and not found:
        raise UserError(f"{row.name} is not up; `invoke env.up --env {row.name}`, or give --url", code=1)
    client = Client(url or (found.url if found else ""), row.protocol, timeout=seconds)
    if items or all_:
        if restart and (url or not items):
            raise UserError("--restart goes with --items and a server that `invoke env.up` started; leave it out")
        check_items(c, row, client, found.replicas if found else 1, items, restart)
        return
    findings = Conformance(row, client).run()
    if json:
        print(dumps({"environment": row.name, "checks": [asdict(one) for one in findings]}))
    says = {True: "yes", False: "NO", None: "has none"}
    table = [] if json else [(one.check, says[one.holds], one.detail) for one in findings]
    print_table(("check", "holds", "seen"), table)
    if any(one.holds is False for one in findings):
        raise UserError(code=1)


def check_items(c: Context, row: "Environment", client: "Client", replicas: int, items: str, again: bool) -> None:
    """Play items over and over, or reset all of them once where `items` is empty; print what differs.

    Raises:
        UserError: an item differs, or its reset fails.
    """
    from servers.protocol import Client, ServerError
    from tasks.lib.environments.running import servers_up
    from tasks.lib.environments.same_items import SameItems, all_items, chosen_items, script_of
    same = SameItems(row, script_of(row))

    def tell(line: str) -> None:
        put(f"{row.name}: {line}")

    try:
        if not items:
            same.reset_all(client, all_items(row), tell)
        else:
            numbers = chosen_items(row, items)
            same.play(client, numbers, replicas, tell)
            if again:
                restart(c, row.name)
                same.play(Client(servers_up()[row.name].url, row.protocol, client.timeout), numbers, replicas, tell)
    except ServerError as error:
        raise UserError(f"{row.name}: {error}", code=1) from None
    note(environment=row.name,
         items=sorted(same.expected.keys() | same.failing.keys()),
         differing=[{
             "item": item,
             "how": how
         } for item, how in sorted(same.differing.items())],
         failing=[{
             "item": item,
             "how": how
         } for item, how in sorted(same.failing.items())])
    for item, how in sorted({**same.failing, **same.differing}.items()):
        put(f"item {item}: {how}")
    count = len(same.expected.keys() | same.failing.keys())
    where = f"{replicas} replica{'s' if replicas > 1 else ''}{' and after a restart' if again else ''}"
    put(f"{row.name}: {count} items, {same.played} {'trajectories on ' + where if items else 'resets'}; "
        f"{len(same.differing)} differ, {len(same.failing)} fail")
    if same.differing or same.failing:
        raise UserError(code=1)


@task(positional=[],
      auto_shortflags=False,
      help={
          "env": ENV_HELP,
          "from_": "Folder that already has the data; data/<env> becomes a link to it (default: fetch it).",
          "toy": "Make small made-up data in place of the real: servers and prompts are tried on it, no model.",
          "split": "Fetch one split alone, such as dev (default: all).",
          "index": "Search index to make of the flat one and to serve: flat, hnsw, ivfpq (default: as it is, or flat).",
          "runner": RUNNER_HELP,
      })
def data(c: Context,
         env: str = "",
         from_: str = "",
         toy: bool = False,
         split: str = "",
         index: str = "",
         runner: str = "auto") -> None:
    """Fetch an environment's data into data/<env>."""
    from tasks.lib.environments import data as env_data
    from tasks.lib.environments.lookup import data_folder, find_row
    from tasks.lib.environments.making import Maker
    row = find_row(env)
    folder = data_folder(row)
    wanted = env_data.chosen(row, split, index)
    if not row.data:
        put(f"{row.name} needs no data")
        return
    if (toy or from_) and (split or index or (toy and from_)):
        raise UserError(f"--{'toy' if toy else 'from'} goes with none of the other flags; leave them out")
    if dry(c, f"put {', '.join(one.path for one in wanted)} into {folder}"):
        return
    begun = time.monotonic()
    missing = []

    def tell(line: str) -> None:
        put(line)

    if toy:
        env_data.make_toy(row, folder, Maker(c, row, runner))
        tell(f"{row.name}: toy data is in {folder} ({time.monotonic() - begun:.0f} s); evaluations say so")
        return
    if from_:
        env_data.adopt(row, folder, Path(from_).expanduser())
        link = env_data.leading_out(row, folder)
        if link:
            put(f"{row.name}: {link} is a link out of that folder, which --runner local can follow and a container "
                "cannot; for Docker copy the data with `cp -rL`")
    else:
        missing = env_data.fetch(row, folder, tell, wanted, Maker(c, row, runner))
    if missing:
        for one in missing:
            put(f"  {folder / one.path}: {one.how or one.url or 'hub ' + one.hub}", sys.stderr)
        raise UserError(f"{row.name} still needs, by hand, what stands above", code=1)
    if index:
        env_data.choose_index(row, folder, index)
    note(environment=row.name, folder=str(folder))
    put(f"{row.name}: all data is in {folder} ({time.monotonic() - begun:.0f} s)")


@task(name="try",
      positional=[],
      auto_shortflags=False,
      help={
          "env": "Environments, with commas between them (default: $ENV, then searchqa).",
          "all_": "Try every environment.",
          "runner": RUNNER_HELP,
          "wait": "Seconds until each server must be ready (default: 600).",
      })
def try_(c: Context, env: str = "", all_: bool = False, runner: str = "auto", wait: str = "600") -> None:
    """Try environments: data, start, check, evaluation."""
    from tasks.lib.environments import trying
    from tasks.lib.environments.lookup import all_rows, find_row
    from tasks.lib.environments.running import servers_up
    from tasks.lib.environments.start_stop import choose_server_runner
    from tasks.lib.flags import whole_number
    from tasks.lib.interrupts import as_ctrl_c
    from tasks.lib.settings import effective_environment
    from tasks.lib.tables import print_table
    if env and all_:
        raise UserError("--env and --all ask for different things; leave one out")
    rows = list(all_rows().values()) if all_ else [find_row(name.strip()) for name in env.split(",")]
    seconds, chosen = whole_number("wait", wait, 1), choose_server_runner(runner)
    if dry(c, f"start, check, evaluate and stop {', '.join(row.name for row in rows)} ({chosen})"):
        return
    found = []
    with as_ctrl_c():
        for row in rows:
            if row.name in servers_up():
                raise UserError(f"{row.name} is up, and would be stopped; `invoke env.down --env {row.name}` first")
            found.append(trying.attempt(row, chosen, seconds, effective_environment(), trying.invoked))
            say(f"{row.name}: " + ("works" if found[-1].works else found[-1].untried or "does not work"))
    note(environments=[one.facts() for one in found])
    print_table(("environment", "data", "up", "check", "eval", "s", "not tried"), [one.cells() for one in found])
    if any(not one.works and not (all_ and one.untried) for one in found):
        raise UserError(code=1)
