"""The training runs in saves/: which there are, which one a name means, and what the engine knows of its container."""
from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.lib.engine import client as docker
from tasks.lib.errors import UserError
from tasks.lib.settings import ROOT
from training import diagnosis
from training.folder import NAME, RunFolder
from training.status import Status, seconds_text, status
from training.text import shown


def saves() -> Path:
    """Return the folder of all runs."""
    return ROOT / "saves"


def all_runs() -> list[RunFolder]:
    """Return all runs, the one that was made last at the end."""
    try:
        names = sorted(os.listdir(saves()))
    except FileNotFoundError:
        return []
    found = [RunFolder(saves() / name) for name in names if (saves() / name / "run.json").is_file()]
    return sorted(found, key=_created)


def _created(run: RunFolder) -> float:
    with suppress(OSError):
        return min(run.run_json.stat().st_mtime, run.path.stat().st_ctime, *_recorded(run))
    return 0.0


def _recorded(run: RunFolder) -> list[float]:
    with suppress(OSError, ValueError):
        created = run.read().get("created")
        if isinstance(created, (int, float)) and not isinstance(created, bool):
            return [float(created)]
    return []


def find(name: str = "") -> RunFolder:
    """Return the run with that name, or whose folder that is; without one the run that runs, of several the one made
    last, else the last made.

    Raises:
        UserError: there is none.
    """
    runs = all_runs()
    if name:
        run = folder_of(name)
        if run and run.exists():
            return run
        known = ", ".join(run.name for run in runs[-5:])
        raise UserError(f"no run {shown(name)!r} in {saves()}" +
                        (f"; there are {known}" if known else "; `invoke train.start` makes one"))
    if not runs:
        raise UserError(f"no run in {saves()}; `invoke train.start --env babyai --model models/…` makes one")
    going = []
    for run in runs:
        with suppress(OSError, ValueError):
            if status(run).state in ("running", "starting"):
                going.append(run)
    return going[-1] if going else runs[-1]


def folder_of(name: str) -> RunFolder | None:
    """Return the folder in saves/ that a run's name means, or the folder's own path as a shell completes it; None for others."""
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if not NAME.fullmatch(name) and os.path.realpath(path.parent) == os.path.realpath(saves()):
        name = path.name
    return RunFolder(saves() / name) if NAME.fullmatch(name) else None


def now(run: RunFolder) -> Status:
    """Return what its folder tells of a run.

    Raises:
        UserError: its run.json cannot be read.
    """
    try:
        return status(run)
    except (OSError, ValueError) as error:
        raise UserError(f"{error}; move the folder away, or put its run.json right") from None


def read(run: RunFolder) -> tuple[Status, dict[str, Any]]:
    """Return what is known of a run, from its folder and, where it has a container, from the engine; and its run.json.

    Raises:
        UserError: its run.json cannot be read.
    """
    try:
        found, record = status(run, patient=True), run.read()
    except (OSError, ValueError) as error:
        raise UserError(f"{error}; move the folder away, or put its run.json right") from None
    doubtful = found.state in ("vanished", "starting") or found.cause in (diagnosis.KILLED, diagnosis.UNKNOWN)
    if record.get("container") and record.get("runner") == "docker" and doubtful:
        found = with_container(found, container(str(record["container"])))
    return found, record


def all_statuses() -> list[Status]:
    """Return what is known of all runs, from their folders; one whose run.json cannot be read is `unreadable`."""
    found = []
    for run in all_runs():
        try:
            found.append(status(run))
        except (OSError, ValueError) as error:
            found.append(Status(run.name, str(run.path), "unreadable", reason=str(error)))
    return found


@dataclass(frozen=True)
class ContainerState:
    """What the engine knows of a run's container.

    Attributes:
        there: whether it is there.
        running: whether it runs.
        exit_code: of one that ended.
        oom_killed: whether the kernel killed in it for want of memory.
        error: what the engine says of one that it could not start.
    """
    there: bool
    running: bool = False
    exit_code: int | None = None
    oom_killed: bool = False
    error: str = ""


def container(name: str) -> ContainerState | None:
    """Return what the engine knows of a container; None where no engine answers."""
    try:
        if not docker.ask(lambda client: client.container.exists(name)):
            return ContainerState(False)
        state = docker.ask(lambda client: client.container.inspect(name).state)
    except UserError:
        return None
    return ContainerState(True, bool(state.running), state.exit_code, bool(state.oom_killed), str(state.error or ""))


def with_container(found: Status, state: ContainerState | None) -> Status:
    """Return a run's status put right by what the engine knows."""
    if state is None:
        return found
    if state.running:
        found.supervised = True
        if found.state == "vanished" and found.updated is None:
            found.state, found.cause, found.reason, found.remedy = "starting", None, "", ""
        elif found.state == "vanished":
            found.state, found.cause, found.remedy = "running", None, ""
            found.note, found.reason = f"its container runs; {found.reason}", ""
        return found
    if state.oom_killed:
        found.cause = diagnosis.HOST_OOM
        found.reason = "the kernel killed in its container for want of memory (Docker: OOMKilled)"
        found.remedy = diagnosis.remedy(diagnosis.HOST_OOM, found.name)
    elif found.state == "vanished" and (found.updated is not None or not state.there):
        found.reason = ("its container is gone" if not state.there else f"its container ended with exit code "
                        f"{state.exit_code}") + f"; {found.reason}"
    elif found.state in ("starting", "vanished") and state.there:
        found.state, found.cause = "died", diagnosis.UNKNOWN
        found.reason = f"its container ended with exit code {state.exit_code} before the supervisor began" + (
            f" ({state.error})" if state.error else "")
        found.remedy = f"`docker logs` of its container may tell; `invoke train.resume --name {found.name}` tries again"
    return found


def age(seconds: float) -> str:
    """Return how long ago something was."""
    return f"{seconds_text(max(0.0, seconds))} ago"


def environment_text(place: Mapping[str, Any], now: float) -> str:
    """Return what is known of the environment's server, in words."""
    if not place.get("url"):
        return "unknown"
    told = f"{place.get('name') or ''} {place['url']}".strip()
    if place.get("reachable") is None:
        return told
    if not place["reachable"]:
        how = "does not answer" if place.get("why") == "unanswered" else "is gone"
        return f"{told} {how} since {seconds_text(max(0.0, now - float(place.get('since') or now)))}"
    sessions = place.get("sessions")
    return f"{told} answers" + (f", {sessions} sessions" if sessions is not None else "")
