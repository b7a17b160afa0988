"""End a run: gracefully, then hard, and say what is left of it."""
from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import Any

from invoke.context import Context

from tasks.lib.engine import client as docker
from tasks.lib.engine import containers
from tasks.lib.engine.ownership import is_ours
from tasks.lib.errors import UserError
from tasks.lib.training import runs
from training import machine
from training.folder import RunFolder
from training.status import Status
from training.supervisor import ORPHAN_SECONDS, Options

SPARE_SECONDS = ORPHAN_SECONDS + 10  # for what the trainer leaves behind, and the records


def stop(c: Context, run: RunFolder, now: bool = False, any_: bool = False) -> str:
    """End a run; return what to tell the user.

    Args:
        now: SIGKILL at once to the trainer, which saves nothing on SIGTERM either.
        any_: ask where another checkout or user has the run's container.

    Raises:
        UserError: it runs where it cannot be reached from, or is not ours.
    """
    found, record = runs.read(run)
    if found.state not in ("running", "starting"):
        return f"{run.name} does not run: {_ended(found)}"
    options = Options(record.get("options") or {})
    seconds = options.stop_seconds + SPARE_SECONDS
    if record.get("runner") == "docker" and record.get("container"):
        name = str(record["container"])
        require_ours(c, name, any_)
        if now:
            docker.drive(c, lambda client: client.container.kill(name, signal="SIGTERM"))
            docker.drive(c, lambda client: client.container.kill(name, signal="SIGTERM"))
        docker.drive(c, lambda client: client.container.stop(name, time=round(seconds)))
        if c.config.run.dry:
            return ""
    else:
        state = run.read_state() or {}
        alive = machine.lives(state)
        if alive is None:
            raise UserError(f"{run.name} runs on {state.get('host') or 'another machine'}; stop it there")
        if c.config.run.dry:
            return f"{run.name}: would send SIGTERM to process {state['pid']}"
        if alive:
            try:
                _end(state, seconds, now)
            except PermissionError:
                raise UserError(
                    f"{run.name} runs as another user (process {state['pid']}); only they, or root, can stop it"
                ) from None
    return told(run)


def require_ours(c: Context, name: str, any_: bool) -> None:
    """Stop where the container `name` is another checkout's or user's, unless who sits here agrees (`any_`).

    Raises:
        UserError: see above.
    """
    if c.config.run.dry:
        return
    found = docker.ask(lambda client: containers.describe(client.container.inspect(name)))
    if is_ours(found.owner) or (any_ and any(containers.agreed(c, "Stop", [found]))):
        return
    raise UserError(f"left {name} alone, which is {found.owner}" + ("" if any_ else "; --any asks"))


def _end(state: dict[str, Any], seconds: float, now: bool) -> None:
    pid = int(state["pid"])
    for _ in range(2 if now else 1):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.3 if now else 0)
    end = time.monotonic() + seconds
    while machine.lives(state) and time.monotonic() < end:
        time.sleep(0.1)
    if machine.lives(state):
        left = [pid, *machine.descendants(pid)]
        machine.kill(left, signal.SIGKILL)


def told(run: RunFolder) -> str:
    """Return what is left of a run that was stopped."""
    found = runs.now(run)
    return f"{run.name}: {_ended(found)}"


def _ended(found: Status) -> str:
    steps = f"{found.step} of {found.steps} steps" if found.steps is not None else f"{found.step} steps"
    said = f"{found.state} after {steps}"
    if found.state == "finished":
        return said
    if found.checkpoint is None:
        return f"{said}; no whole checkpoint is left, so `invoke train.resume --name {found.name}` begins at step 1"
    lost = max(0, found.step - found.checkpoint)
    again = f" ({lost} steps are trained again)" if lost else ""
    return f"{said}; `invoke train.resume --name {found.name}` goes on from global_step_{found.checkpoint}{again}"
