"""What a run's folder tells of the run, read at once however long its log is."""
from __future__ import annotations

import itertools
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training import checkpoints, diagnosis, machine, resume
from training.folder import RunFolder
from training.foreign import open_file

FRESH = 20.0  # seconds; the supervisor writes each second, and a busy disk may keep it
BEGIN_SECONDS = 300.0  # from run.json to the first heartbeat, at most: a container starts in between
BEAT = 1.5  # in which a supervisor that is there writes
TAIL = 256 << 10  # bytes of a log that are looked at
METRICS_BYTES = 8 << 20  # of metrics.jsonl: about 4000 steps
LAST_LINES = 20
TREND = 40  # steps
LARGEST = 1e9  # of a reward, and of a step's seconds: no more is one
REWARDS = ("critic/task_score/mean", "critic/score/mean", "critic/rewards/mean")
SECONDS = ("timing_s/step", "perf/time_per_step")
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass
class Status:
    """A run, now. Text of others (reason, last_lines) is as it was written: show it escaped.

    Attributes:
        state: starting, running, finished, stopped, died, vanished.
        supervised: whether a supervisor is there, which runs it, starts it or waits for another attempt.
        step, steps: the last finished one, of how many.
        best: step and value of the highest reward; None where the run is too long to tell at once.
        trend: the rewards of the last steps.
        step_seconds, eta_seconds: a step's time (median of the last ten), until the end; None where unknown.
        checkpoint: number of the newest whole one; None where there is none.
        half: newer ones that are not whole, with the reason.
        environment: name, url, reachable, sessions, since; None for what is unknown.
        disk_free: bytes.
        cause, reason, remedy: of a run that died.
        updated: when the supervisor wrote last, seconds since 1970.
        silent_seconds: since the trainer's last line.
    """
    name: str
    folder: str
    state: str
    supervised: bool = False
    attempt: int | None = None
    attempts: int = 0
    step: int = 0
    steps: int | None = None
    reward: float | None = None
    reward_of: str = ""
    best: tuple[int, float] | None = None
    trend: list[float] = field(default_factory=list)
    step_seconds: float | None = None
    eta_seconds: float | None = None
    checkpoint: int | None = None
    checkpoint_time: float | None = None
    checkpoint_bytes: int = 0
    half: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    gpus: list[dict[str, Any]] | None = None
    gpu_count: int | None = None
    disk_free: int | None = None
    cause: str | None = None
    reason: str = ""
    remedy: str = ""
    note: str = ""
    poisoned: list[int] = field(default_factory=list)
    evaluated: dict[str, Any] | None = None
    updated: float | None = None
    started: float | None = None
    ended: float | None = None
    silent_seconds: float | None = None
    algorithm: str = ""
    runner: str = ""
    host: str = ""
    log: str = ""
    last_lines: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """Return it for a program."""
        return asdict(self)


def status(folder: RunFolder | str | Path, now: float | None = None, patient: bool = False) -> Status:
    """Return what is known of a run.

    Args:
        patient: where the heartbeat of another machine or container is old, look whether it still changes, which takes
            a moment: clocks differ.

    Raises:
        FileNotFoundError, ValueError: there is no run.json, or none that can be read.
    """
    folder = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    now = time.time() if now is None else now
    run = folder.read()
    state = folder.read_state() or {}
    attempts = [found for found in run.get("attempts") or [] if isinstance(found, dict)]
    last = attempts[-1] if attempts else {}
    created = run.get("created")
    if patient and state_of(last, state, now, created) == "vanished" and state and machine.lives(state) is None:
        time.sleep(BEAT)
        later = folder.read_state() or {}
        if later.get("updated") != state.get("updated"):
            state, now = later, float(later.get("updated") or now)
    found = Status(name=folder.name,
                   folder=str(folder.path),
                   state=state_of(last, state, now, created),
                   attempt=last.get("number"),
                   attempts=len(attempts),
                   steps=run.get("steps"),
                   poisoned=list(run.get("poisoned") or []),
                   algorithm=str(run.get("algorithm") or ""),
                   runner=str(run.get("runner") or ""),
                   host=str(state.get("host") or ""),
                   gpu_count=(run.get("gpus") or {}).get("count"),
                   updated=state.get("updated"),
                   started=last.get("started"),
                   ended=last.get("ended"))
    found.supervised = found.state == "running"
    is_now = found.state in ("starting", "running")
    _add_figures(found, folder, last, state if is_now else {})
    if found.state == "running" and last.get("ended") is None and state.get("step") is None:
        found.state = "starting"
    _add_checkpoints(found, folder, run)
    place = run.get("environment") or {}
    seen = (state.get("environment") if is_now else None) or {}
    found.environment = {
        "name": place.get("name"),
        "url": place.get("url"),
        "reachable": seen.get("reachable"),
        "sessions": seen.get("sessions"),
        "since": seen.get("since"),
        "why": seen.get("why")
    }
    if is_now:
        found.gpus = state.get("gpus")
        found.note = str(state.get("note") or "")
        if state.get("silent_seconds") is not None and found.updated is not None:
            found.silent_seconds = state["silent_seconds"] + max(0.0, now - found.updated)
    with suppress(OSError):
        found.disk_free = shutil.disk_usage(folder.path).free
    if found.attempt is not None:
        found.log = str(folder.log(found.attempt))
        found.last_lines = last_lines(folder, found.attempt)
    if found.state == "died":
        found.cause = str(last.get("cause") or diagnosis.UNKNOWN)
        found.reason = str(last.get("reason") or "")
        found.remedy = diagnosis.remedy(found.cause, found.name, str(place.get("name") or ""))
    elif found.state == "vanished":
        found.cause = diagnosis.KILLED
        found.reason = _why_vanished(state, now)
        found.remedy = f"`invoke train.resume --name {found.name}` goes on from " + (
            f"global_step_{found.checkpoint}" if found.checkpoint is not None else "the beginning")
    elif found.state == "stopped":
        found.reason = str(last.get("reason") or "")
        found.remedy = f"`invoke train.resume --name {found.name}` goes on"
    events = [event for event in folder.read_events(64 << 10) if event["event"] == "evaluated"]
    found.evaluated = events[-1] if events else None
    return found


def state_of(attempt: Mapping[str, Any], state: Mapping[str, Any], now: float, created: Any = None) -> str:
    """Return a run's state from its last attempt and the heartbeat.

    It runs only where the heartbeat is fresh, or the very process that wrote it lives.

    Args:
        created: when the run was made, seconds since 1970: one without an attempt starts for a while, not for ever.
    """
    updated = state.get("updated")
    alive = machine.lives(dict(state))
    fresh = isinstance(updated, (int, float)) and abs(now - updated) < FRESH
    runs = alive is not False and (bool(alive) or fresh) and state.get("state") == "running"
    if not attempt:
        never = isinstance(created, (int, float)) and now - created > BEGIN_SECONDS
        return "running" if runs else "vanished" if never else "starting"
    if attempt.get("ended") is None:
        return "running" if runs else "vanished"
    if runs and state.get("note"):  # it waits for the next attempt
        return "running"
    return str(attempt.get("state") or "died")


def _why_vanished(state: Mapping[str, Any], now: float) -> str:
    if not state:
        return "it never began: there is no heartbeat of a supervisor"
    since = f"its last sign of life is {seconds_text(max(0.0, now - float(state.get('updated') or 0)))} old"
    if state.get("host") == machine.host() and state.get("boot_id") != machine.boot_id():
        return f"the machine was restarted; {since}"
    return f"the supervisor is gone (killed, or its container or machine went); {since}"


def _add_figures(found: Status, folder: RunFolder, attempt: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    metrics = folder.read_metrics(METRICS_BYTES)
    is_all = False
    with suppress(OSError):
        is_all = folder.metrics.stat().st_size <= METRICS_BYTES
    known = state.get("step") if state.get("step") is not None else state.get("resumed_from")
    if state and isinstance(known, int):
        metrics = {step: line for step, line in metrics.items() if step <= known}
    elif state and state.get("resumed_from") is None:
        metrics = {}
    last = max(metrics, default=None)
    found.step = known if isinstance(known, int) else last or attempt.get("resumed_from") or 0
    for key in REWARDS:
        rewards = {step: line["metrics"][key] for step, line in metrics.items() if _is_number(line["metrics"].get(key))}
        if rewards:
            found.reward_of = key
            found.trend = list(rewards.values())[-TREND:]
            found.reward = found.trend[-1]
            step = max(rewards, key=lambda step: rewards[step])
            found.best = (step, rewards[step]) if is_all else None
            break
    for key in SECONDS:
        times = [line["metrics"][key] for line in metrics.values() if _is_number(line["metrics"].get(key))][-10:]
        if times:
            found.step_seconds = statistics.median(times)
            break
    if found.step_seconds is not None and found.steps is not None and found.state in ("running", "starting"):
        found.eta_seconds = max(0, found.steps - found.step) * found.step_seconds


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST


def _add_checkpoints(found: Status, folder: RunFolder, run: Mapping[str, Any]) -> None:
    limit = resume.limit(run)
    for number in reversed(checkpoints.numbers(folder.path)):
        if limit is not None and number >= limit:
            found.half.append(f"global_step_{number}: step {limit} was poisoned")
            continue
        step = checkpoints.read(folder.path, number)
        if step.whole:
            found.checkpoint, found.checkpoint_bytes = number, step.bytes
            with suppress(OSError):
                found.checkpoint_time = (step.path / "data.pt").stat().st_mtime
            return
        found.half.append(f"global_step_{number}: {'; '.join(step.faults)}")


def last_lines(folder: RunFolder, attempt: int, count: int = LAST_LINES) -> list[str]:
    """Return the last lines of an attempt's log that are not empty."""
    try:
        with open(open_file(folder.log(attempt)), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL))
            lines = file.read(TAIL).decode("utf-8", "backslashreplace").split("\n")
    except (OSError, ValueError):
        return []
    return [line[:2000] for line in lines if line.strip()][-count:]


def sparkline(values: Sequence[float], width: int = TREND) -> str:
    """Return the values as a line of blocks, the lowest and the highest by what they are; means where there are many.

    >>> sparkline([0, 1, 2, 3])
    '▁▃▆█'
    """
    values = [value for value in values if _is_number(value)]
    if len(values) > width:
        edges = [round(place * len(values) / width) for place in range(width + 1)]
        values = [statistics.fmean(values[begin:end]) for begin, end in itertools.pairwise(edges)]
    if not values:
        return ""
    low, high = min(values), max(values)
    if high <= low:
        return BLOCKS[3] * len(values)
    return "".join(BLOCKS[round((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in values)


def seconds_text(seconds: float) -> str:
    """Return a time in words: 8 s, 12 min, 3 h 4 min, 2 d 5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def bytes_text(count: float) -> str:
    """Return a size in words, in powers of 1000: 512 B, 3.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
