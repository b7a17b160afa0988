"""The environment's server that a training run plays on: found, started where none is up, stopped after the run.

Of those that use a server (evaluations, runs) the last one to leave stops it, where it was started for them alone
(`tasks/lib/environments/lease.py`). A run may outlive its command and may be a container, so a process of its own, the keeper, uses
the server for it until it has ended.
"""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from tasks.lib.errors import UserError
from tasks.lib.notices import put, say
from tasks.lib.settings import ROOT, effective_environment, resolve

if TYPE_CHECKING:
    from tasks.lib.environments.rows import Environment
    from tasks.lib.training.facts import Server
    from tasks.lib.training.launch import Decided
    from tasks.lib.training.place import Place
    from training.folder import RunFolder

LOG = "environment.log"
KEEPING = "keeping"
KEEPER_SECONDS = 60.0  # for the keeper to begin
POLL = 2.0
LINGER = 60.0  # seconds that a run must be dead: a container that starts again has a gap


def find_server(c: Context, row: Environment, place: Place, address: str, replicas: int, understood: bool) -> Server:
    """Return what is known of the environment's server: the one at `address`, the one that is up, or one to be started."""
    from servers.protocol import Client, ServerError, check_ready
    from tasks.lib.environments.compose_model import service_name
    from tasks.lib.environments.plan import Options
    from tasks.lib.environments.running import container_url, servers_up, session_totals
    from tasks.lib.environments.start_stop import require_startable
    from tasks.lib.evaluation.plan import loopback_host
    from tasks.lib.host.ports import port_is_free
    from tasks.lib.training.facts import Server
    limits: dict[str, Any] = {
        "first": row.items.first,
        "last": row.items.last,
        "wraps": row.items.wraps,
        "max_sessions": row.max_sessions
    }
    prefix = row.protocol.prefix

    def ready(url: str) -> tuple[str, str]:
        try:
            check_ready(Client(url, row.protocol, timeout=4), row.check.items[0])
        except ServerError as error:
            return f"{url}: {error}", f"see `invoke env.logs --env {row.name}`, or start it anew: `invoke env.restart --env {row.name}`"
        return "ready", ""

    if address:
        url = address.rstrip("/").removesuffix(prefix)
        host = loopback_host(url) if place.runner == "docker" else ""
        if host:
            return Server(row.name,
                          state=f"{host} in {address} would be the container itself",
                          remedy=f"`invoke env.up --env {row.name}` and leave --server out",
                          url=url + prefix,
                          replicas=replicas,
                          given=True,
                          **limits)
        state, remedy = ("ready", "") if c.config.run.dry else ready(url)
        if state != "ready":
            remedy = f"see what serves there, or `invoke env.up --env {row.name}` and leave --server out"
        if state != "ready" and place.runner == "docker":
            state, remedy = "unknown", ""  # a name of the containers' network, or of another machine: not to be told from here
        return Server(row.name, state=state, remedy=remedy, url=url + prefix, replicas=replicas, given=True, **limits)
    up = servers_up().get(row.name)
    if up:
        if place.runner == "docker" and up.runner == "local":
            return Server(row.name,
                          state="it is up as a process of this machine, which a container cannot reach",
                          remedy=f"`invoke env.down --env {row.name}`, then start again",
                          **limits)
        url = container_url(up.service, up.port) if place.runner == "docker" else up.url
        state, remedy = ("ready", "") if c.config.run.dry else ready(up.url)
        told = None if c.config.run.dry or state != "ready" else session_totals(up)
        return Server(row.name,
                      state=state,
                      remedy=remedy,
                      url=url + prefix,
                      replicas=up.replicas,
                      live=told["live"] if told else None,
                      **limits)
    bind, settings = resolve("ENV_BIND"), effective_environment()
    runner = _server_runner(place)
    port = settings.get("ENV_PORT") or str(row.port)
    options = Options(port=int(port) if port.isdecimal() else row.port,
                      replicas=replicas,
                      bind=bind,
                      understood=understood)
    try:
        require_startable(c, row, options, runner)
    except UserError as error:
        said = str(error.message or "")
        what, _, remedy = said.partition("; ") if "; " in said else said.partition(": ")
        return Server(row.name,
                      state=what,
                      remedy=remedy or "see DOCKER.md, Environment servers",
                      replicas=replicas,
                      **limits)
    taken = options.port if settings.get("ENV_PORT") and not port_is_free(options.port, bind) else None
    url = container_url(service_name(row),
                        options.port) if place.runner == "docker" else f"http://127.0.0.1:{options.port}"
    return Server(row.name, state="absent", url=url + prefix, replicas=replicas, port_taken=taken, **limits)


def _server_runner(place: Place) -> str:
    from tasks.lib.environments.start_stop import choose_server_runner
    return "docker" if place.runner == "docker" else choose_server_runner("auto")


def address(c: Context, run: Decided, server: Server, row: Environment, replicas: int,
            wait: int) -> tuple[Decided, bool]:
    """Start the environment where it is not up; return the run with its address, and whether it was started.

    Raises:
        UserError: it did not get ready.
    """
    from tasks.lib.environments.compose_model import service_name
    from tasks.lib.environments.plan import Options
    from tasks.lib.environments.running import container_url, servers_up
    from tasks.lib.environments.start_stop import pick_port, start_server
    from tasks.lib.training.overrides import layer, make
    from tasks.lib.training.plan import ADDRESS
    runner, bind = _server_runner(run.place), resolve("ENV_BIND")
    up = {} if c.config.run.dry else servers_up()
    started = row.name not in up
    if started:
        port = pick_port(row, "", bind)
        options = Options(port=port, replicas=replicas, bind=bind, understood=bool(row.consent), aliases=not up)
        url = start_server(c, row, options, runner, False, wait)
        if not c.config.run.dry:
            say(f"started {row.name} at {url}")
    elif server.state != "absent":
        return run, False
    else:  # another command was faster
        port, url = up[row.name].port, up[row.name].url
    if run.place.runner == "docker":
        url = container_url(service_name(row), port)
    url += row.protocol.prefix
    environment = {**run.environment, "url": url, "replicas": replicas, "started_by_run": True}
    if run.resolved:
        run.resolved["actor_rollout_ref"]["agentgym"]["env_addr"] = url
    return replace(run, environment=environment, overrides=layer(run.overrides, [make(ADDRESS, url)])), started


@contextmanager
def served(c: Context, run: Decided, server: Server, row: Environment, replicas: int, wait: int,
           keep: bool) -> Iterator[Decided]:
    """Give the run with its environment's address; what starts the run goes inside.

    A server that was started for it is stopped when the run has ended, or did not begin.

    Args:
        keep: leave the server up whatever happens.

    Raises:
        UserError: the server did not get ready.
    """
    from tasks.lib.environments import lease
    from tasks.lib.environments.start_stop import stop_server
    from training.folder import RunFolder
    if server.given or c.config.run.dry:
        yield run if server.state != "absent" else address(c, run, server, row, replicas, wait)[0]
        return
    with lease.exclusive_lock(row.name):
        user = lease.User(row.name)
        run, started = address(c, run, server, row, replicas, wait)
        if keep:
            lease.detach_owner(row.name)
        elif started:
            user.started()
    before = attempts(RunFolder(run.folder))
    try:
        yield run
        if not keep:
            hand_over(run, row.name, before)
            if started:
                say(f"{row.name} is stopped when the run has ended; --keep-env leaves it up")
    except BaseException:
        with lease.exclusive_lock(row.name):
            ours, shared = user.leave()
            if ours and not shared and started:
                stop_server(c, row.name)
                say(f"stopped {row.name}")
        raise
    user.leave()


def attempts(run: RunFolder) -> int:
    """Return how many attempts the run has had."""
    try:
        return len(run.read().get("attempts") or ())
    except (OSError, ValueError):
        return 0


def hand_over(run: Decided, environment: str, before: int) -> None:
    """Start the keeper, and return when it uses the server.

    Args:
        before: how many attempts the run had before this one.
    """
    from tasks.lib.host import processes
    from training.folder import RunFolder
    log = RunFolder(run.folder).logs / LOG
    keeper = processes.launch([sys.executable, "-m", "tasks.train_environment", run.name, environment,
                               str(before)], log, os.environ, ROOT)
    end = time.monotonic() + KEEPER_SECONDS
    while time.monotonic() < end and KEEPING not in log.read_text(errors="replace"):
        if keeper.poll() is not None:
            say(f"{environment} stays up after the run: {processes.last_line(log)}")
            return
        time.sleep(0.05)


def keep(c: Context, run: RunFolder, environment: str, before: int) -> str:
    """Use the server until the run has ended; stop it where nobody else uses it. Return what was done."""
    from tasks.lib.environments import lease
    from tasks.lib.environments.start_stop import stop_server
    user = lease.User(environment)
    put(f"{KEEPING} {environment} for {run.name}")
    wait_for_end(run, before)
    with lease.exclusive_lock(environment):
        ours, shared = user.leave()
        if not ours:
            return f"left {environment} up, as it was before the run"
        if shared:
            return f"left {environment} up, an evaluation or another run uses it"
        stop_server(c, environment)
    with suppress(OSError):
        run.append_event("environment_stopped", environment=environment)
    return f"stopped {environment}"


def wait_for_end(run: RunFolder, before: int) -> None:
    """Return when the run has ended: at once where it finished or was stopped, else when nothing comes of it any more.

    Args:
        before: how many attempts it had before the one that is waited for.
    """
    from training.status import BEGIN_SECONDS, state_of
    begun = time.monotonic()
    dead: float | None = None
    while True:
        try:
            told = run.read()
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            told = {}
        had = told.get("attempts") or []
        state = "starting" if time.monotonic() - begun < BEGIN_SECONDS else "vanished"
        if len(had) > before:
            state = state_of(had[-1], run.read_state() or {}, time.time(), told.get("created"))
        if state in ("finished", "stopped"):
            return
        if state in ("running", "starting"):
            dead = None
        elif dead is None:
            dead = time.monotonic()
        elif time.monotonic() - dead > LINGER:
            return
        time.sleep(POLL)


def main(argv: list[str]) -> None:
    """Keep the server of the environment `argv[1]` for the run `argv[0]`, which had `argv[2]` attempts before."""
    from tasks.lib.training import runs
    put(keep(Context(), runs.find(argv[0]), argv[1], int(argv[2])))


if __name__ == "__main__":
    main(sys.argv[1:])
