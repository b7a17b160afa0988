"""Look at a run from another terminal while it goes on: nothing but its files is read, and nothing of it is locked."""
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from evaluation import compared, foreign, report, show
from evaluation.attempts import ERRORS, SCORED, Outcome
from evaluation.cli import FAILED
from evaluation.problems import Misuse
from evaluation.records import LIVE, LOCK, REPORT, RUN, read_attempts, read_run
from evaluation.text import one_line

FRESH = 5.0  # seconds; the run writes its file every second
SHOWN = 20  # sessions in a terminal
PATIENCE = 10  # times the seconds that a report takes, between two


def goes_on(folder: Path) -> bool:
    """Return True if a process works on the run: it has just written what it does, or has the folder's lock.

    The lock is asked for only where the run is silent, since for that moment the run could not begin.
    """
    try:
        if time.time() - (folder / LIVE).stat().st_mtime < FRESH:
            return True
    except OSError:
        pass
    try:
        descriptor = foreign.open_file(folder / LOCK)
    except (OSError, ValueError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def look(folder: Path) -> dict[str, Any]:
    """Return what a run does, or has come to.

    Raises:
        Misuse: no run in `folder`, or a damaged one.
    """
    config = read_run(folder)["config"]
    going, live = goes_on(folder), {}
    if going:
        try:
            live = foreign.read_json(folder / LIVE)
        except (OSError, ValueError):  # it begins, or ends just now
            live = {}
    if not isinstance(live, dict) or not {"done", "total", "outcomes", "sessions"} <= live.keys():
        records = read_attempts(folder)
        live = {
            "done": len(records),
            "total": len(config["items"]) * config["samples"],
            "outcomes": dict(Counter(str(one["outcome"]) for one in records)),
            "tokens": sum(one["usage"]["prompt"] + one["usage"]["completion"] for one in records),
            "per_minute": None,
            "seconds_left": None,
            "at_once": None,
            "auto": None,
            "sessions": [],
        }
    outcomes: Counter[str] = Counter(live["outcomes"])
    scored = sum(outcomes[name] for name in SCORED)
    return {
        "folder": str(folder),
        "env": config["env"],
        "model": config["model"],
        "running": going,
        "success": outcomes[Outcome.SUCCESS] / scored if scored else None,
        "errors": sum(outcomes[name] for name in ERRORS),
        **live,
    }


def headline(seen: Mapping[str, Any]) -> str:
    """Return the line that says how far the run is."""
    rate = "-" if seen["success"] is None else show.percent(seen["success"])
    parts = [
        f"{seen['done']} of {seen['total']}", f"success so far {rate}", f"{seen['errors']} errors",
        f"{seen['tokens']:,} tokens"
    ]
    if seen["per_minute"] is not None:
        parts.append(f"{seen['per_minute']:g} attempts a minute")
        parts.append(f"{seen['at_once']} at once{' (auto)' if seen['auto'] else ''}")
    if seen["seconds_left"] is not None:
        parts.append(f"{seen['seconds_left']:.0f} s left")
    return ", ".join(parts)


def table(seen: Mapping[str, Any]) -> Table:
    """Return what each session does, the oldest first."""
    shown = show.columns("item", "sample", "session", "turn", "seconds", "waits for")
    for one in seen["sessions"][:SHOWN]:
        session = "" if one["session"] is None else str(one["session"])
        show.add_row(shown, one["item"], str(one["sample"]), session, str(one["turn"]), f"{one['seconds']:.0f}",
                     one["waits_for"])
    if len(seen["sessions"]) > SHOWN:
        show.add_row(shown, f"and {len(seen['sessions']) - SHOWN} more", "", "", "", "", "")
    return shown


class Page:
    """The run's report, written again as attempts come."""

    def __init__(self, folder: Path, every: float) -> None:
        self.folder, self.every = folder, every
        self.written = 0  # attempts in it
        self._next = 0.0

    def follow(self, seen: Mapping[str, Any]) -> None:
        """Write it where it is time and there is more to show; at the end once more, without the mark of a run that
        goes on: the run's own may have come before ours."""
        now = time.monotonic()
        if seen["running"]:
            if not self.every or now < self._next or seen["done"] <= self.written:
                return
        elif not self.written:
            return
        runs = compared.load([self.folder])
        if not runs[0].records:
            return
        # Of a name of its own until it is whole: the run may be writing its report at this moment.
        beside = self.folder / f".report-{os.getpid()}.html"
        try:
            report.write(beside, runs, again=int(max(1, self.every)) if seen["running"] else 0)
            beside.replace(self.folder / REPORT)
        finally:
            beside.unlink(missing_ok=True)
        self.written = seen["done"]
        self._next = time.monotonic() + max(self.every, PATIENCE * (time.monotonic() - now))


def follow(folder: Path, every: float, report_every: float, as_json: bool, once: bool) -> int:
    """Show the run every `every` seconds until it ends; return the exit code: 0 where it is whole.

    Raises:
        Misuse: no run in `folder`.
    """
    if not (folder / RUN).is_file():
        raise Misuse(f"no run in {folder}; `python -m evaluation list` shows the runs")
    console = show.console()
    redraws = console.is_terminal and not console.is_dumb_terminal and not as_json and not once
    page = Page(folder, report_every)
    live = Live(console=console, auto_refresh=False) if redraws else None
    with live or nullcontext():
        while True:
            seen = look(folder)
            if not once:
                page.follow(seen)
            _show(seen, console, live, as_json, once)
            if once or not seen["running"]:
                break
            time.sleep(every)
    if once:
        return 0
    whole = seen["done"] >= seen["total"]
    if not as_json:
        end = "the run has ended" if whole else "nobody works on the run; the command that began it goes on with it"
        console.print(f"{end}: {folder}", highlight=False, markup=False, soft_wrap=True)
    return 0 if whole else FAILED


def _show(seen: Mapping[str, Any], console: Console, live: Live | None, as_json: bool, once: bool) -> None:
    line = f"{seen['env']}, {seen['model']}: {headline(seen)}"
    if as_json:
        print(json.dumps(seen), flush=True)
    elif live:
        live.update(Group(Text(one_line(line)), table(seen)), refresh=True)
    else:
        console.print(one_line(line), highlight=False, markup=False, soft_wrap=True)
        if once and seen["sessions"]:
            console.print(table(seen))
