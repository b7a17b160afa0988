"""What a terminal shows of a run: its status, the list of all, its log. Nothing of others reaches it unescaped."""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tasks.lib.errors import UserError
from tasks.lib.notices import put, say
from tasks.lib.training import runs
from training.folder import RunFolder
from training.status import Status, bytes_text, seconds_text, sparkline
from training.text import clipped, shown

EVERY = 2.0  # seconds
QUIET = 300.0  # seconds without a line that are worth a word
LINES_SHOWN = 8
BLOCK = 1 << 20


def lines(found: Status, now: float | None = None, width: int = 160) -> list[str]:
    """Return a run's status in lines of at most `width` characters.

    Args:
        now: seconds since 1970.
    """
    now = time.time() if now is None else now
    head = f"{found.name}: {found.state}" + (f" of {found.cause}" if found.state == "died" else "")
    if found.attempts > 1:
        head += f", attempt {found.attempt}"
    rows: list[tuple[str, str]] = []
    steps = f"{found.step} of {found.steps}" if found.steps is not None else str(found.step)
    if found.step_seconds is not None:
        steps += f", {found.step_seconds:.1f} s a step"
    if found.eta_seconds:
        steps += f", {seconds_text(found.eta_seconds)} left ({time.strftime('%a %H:%M', time.localtime(now + found.eta_seconds))})"
    rows.append(("step", steps))
    if found.reward is not None:
        best = f"  best {found.best[1]:.3f} at step {found.best[0]}" if found.best is not None else ""
        rows.append(("reward", f"{found.reward:.3f}  {sparkline(found.trend)}{best}"))
    else:
        rows.append(("reward", "none yet"))
    if found.checkpoint is not None:
        when = f", {runs.age(now - found.checkpoint_time)}" if found.checkpoint_time is not None else ""
        rows.append(("saved", f"global_step_{found.checkpoint} is whole, {bytes_text(found.checkpoint_bytes)}{when}"))
    else:
        rows.append(("saved", "no whole checkpoint"))
    rows += [("half" if "poisoned" not in half else "poisoned", half) for half in found.half[:3]]
    rows.append(("environment", runs.environment_text(found.environment, now)))
    if found.gpus:
        rows += [("GPU", f"{gpu.get('index')}: {_gb(gpu.get('used_mb'))} of {_gb(gpu.get('total_mb'))} GB, "
                  f"{gpu.get('busy_percent')} % busy") for gpu in found.gpus[:16]]
    elif found.gpu_count:
        rows.append(("GPUs", str(found.gpu_count)))
    if found.disk_free is not None:
        room = found.disk_free // found.checkpoint_bytes if found.checkpoint_bytes else None
        more = "" if room is None or room > 99 else f", room for {room} more checkpoints"
        rows.append(("disk", f"{bytes_text(found.disk_free)} left{more}"))
    if found.poisoned:
        rows.append(("poisoned", f"step {', '.join(map(str, found.poisoned))}: learnt, or was about to, from what the "
                     "environment did not say"))
    if found.evaluated is not None and found.evaluated.get("step") is not None:
        rows.append(
            ("evaluated",
             f"global_step_{found.evaluated['step']}, {runs.age(now - float(found.evaluated.get('time') or now))}"))
    if found.silent_seconds is not None and found.silent_seconds > QUIET:
        rows.append(
            ("quiet", f"no line for {seconds_text(found.silent_seconds)} (a step's requests wait up to 2400 s for "
             "the environment)"))
    if found.note:
        rows.append(("note", found.note))
    if found.reason:
        rows.append(("reason", found.reason))
    if found.remedy:
        rows.append(("then", found.remedy))
    told = [head, *(f"  {name:<12}{clipped(text, width - 14)}" for name, text in rows)]
    if found.cause == "unknown" or (found.state in ("died", "vanished") and found.cause in ("killed", "hang", None)):
        told.append(f"  last lines of {clipped(found.log, width - 16)}:")
        told += [f"    {clipped(line, width - 4)}" for line in found.last_lines[-LINES_SHOWN:]]
    return [clipped(line, width) for line in told]


def _gb(megabytes: Any) -> str:
    return f"{megabytes / 1024:.0f}" if isinstance(megabytes, (int, float)) else "?"


def row(found: Status, now: float | None = None) -> list[str]:
    """Return a run's line of the table of all."""
    now = time.time() if now is None else now
    state = found.state + (f" ({found.cause})" if found.state == "died" else "")
    cells = (found.name, state, f"{found.step}/{found.steps if found.steps is not None else '?'}",
             "" if found.reward is None else f"{found.reward:.3f}",
             "" if found.checkpoint is None else f"global_step_{found.checkpoint}",
             str(found.environment.get("name")
                 or ""), found.algorithm, runs.age(now - found.started) if found.started else "")
    return [clipped(cell, 64) for cell in cells]


HEAD = ["run", "state", "step", "reward", "checkpoint", "environment", "algorithm", "begun"]


def width_of_terminal() -> int:
    """Return how many characters a line may have."""
    if not sys.stdout.isatty():
        return 400
    return max(60, os.get_terminal_size().columns)


def watch(run: RunFolder, show: Callable[[], list[str]], state: Callable[[], str]) -> None:
    """Show a run again and again until it has ended."""
    before: list[str] = []
    while True:
        told = [shown(line) for line in show()]
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[H\x1b[2J" + "\n".join(told) + "\n")
            sys.stdout.flush()
        elif told[:3] != before[:3]:  # a file gets a block a step
            for line in told:
                put(line)
            before = told
        if state() not in ("running", "starting"):
            return
        time.sleep(EVERY)


def tail(path: Path, count: int) -> Iterator[bytes]:
    """Yield the last `count` lines of a file, all where it is 0; a last line without end too."""
    with open(path, "rb") as file:
        if count:
            file.seek(_begin_of_last(file, count))
        yield from file


def _begin_of_last(file: Any, count: int) -> int:
    place = file.seek(0, os.SEEK_END)
    wanted = count + 1  # the last line's own end counts
    if place:
        file.seek(place - 1)
        wanted -= file.read(1) != b"\n"
    while place > 0:
        size = min(BLOCK, place)
        place -= size
        file.seek(place)
        data = file.read(size)
        ends = data.count(b"\n")
        if ends >= wanted:
            cut = len(data)
            for _ in range(wanted):
                cut = data.rindex(b"\n", 0, cut)
            return place + cut + 1
        wanted -= ends
    return 0


def print_line(line: bytes) -> None:
    """Print a line of a log as a terminal can bear it."""
    text = line.decode("utf-8", "backslashreplace").rstrip("\n")
    sys.stdout.write(shown(text) + "\n")


def logs(run: RunFolder, count: int, follow: bool, attempt: int | None = None) -> None:
    """Print the last `count` lines of a run's log (0: all); then, with `follow`, what comes, until the run has ended.

    Raises:
        UserError: there is no such attempt, or no run.json that can be read.
    """
    last = runs.now(run).attempt
    if attempt is not None and not run.log(attempt).is_file() and not (follow and attempt == last):
        there = f"its attempts are 1 to {last}" if last else "it has no attempt yet"
        raise UserError(f"{run.name} has no log of attempt {attempt}; {there}")
    number = attempt or last
    while follow and number is None:
        if runs.now(run).state not in ("running", "starting"):
            break
        time.sleep(0.3)
        number = runs.now(run).attempt
    if number is None:
        say(f"{run.name} has printed nothing: it has no attempt yet")
        return
    place, rest = run.log(number), b""
    if place.is_file():
        for line in tail(place, count):
            if follow and not line.endswith(b"\n"):
                rest = line
            else:
                print_line(line)
        sys.stdout.flush()
    if not follow:
        return
    read = place.stat().st_size if place.is_file() else 0
    while True:
        found = runs.now(run)
        rest, read = _more(run.log(number), read, rest)
        if found.attempt is not None and found.attempt != number and attempt is None:
            if rest:
                print_line(rest)
            put(f"-- attempt {found.attempt}")
            number, read, rest = found.attempt, 0, b""
            continue
        if found.state not in ("running", "starting"):
            rest, read = _more(run.log(number), read, rest)
            if rest:
                print_line(rest)
            sys.stdout.flush()
            return
        time.sleep(0.3)


def _more(place: Path, read: int, rest: bytes) -> tuple[bytes, int]:
    try:
        with open(place, "rb") as file:
            file.seek(read)
            while data := file.read(BLOCK):
                read += len(data)
                *whole, rest = (rest + data).split(b"\n")
                for line in whole:
                    print_line(line)
    except FileNotFoundError:
        pass
    sys.stdout.flush()
    return rest, read
