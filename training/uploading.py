"""Upload what the trainer left for wandb, by wandb's own command and client, which alone need the package `wandb`.

    python -m training upload FOLDER…        one `wandb sync` a folder of an offline run; what arrived gets wandb's own mark
    python -m training figures RUN           what the run's checkpoints came to, to the wandb run of its last attempt

Two things of wandb 0.26.1 decide how (seen in its source and against a stand-in of its service):

- `wandb sync` marks a run as uploaded where the run ended by itself, though the service refused it, and never where it was
  killed, though it uploads what was written. Its exit code is 0 whatever arrives. What it says tells: an address with
  the owner in it, `done.`, and no error.
- A second offline run of the same id is uploaded from line 0 of the history on, over the first one's lines. A client
  that resumes an online run asks the service how many lines there are, and writes behind them. So the figures are sent
  as a resumed run, never as an offline one, when the trainer writes no more; and nothing is sent where the service has
  fewer steps of the trainer than were written.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from training import curve
from training.folder import RunFolder, atomic_write
from training.foreign import read_object
from training.status import Status, status
from training.text import shown

WANDB_FOLDER = re.compile(r"(?:offline-)?run-(?P<time>\d{8}_\d{6})-(?P<id>[^/]+)")
SENT = "figures.json"  # in the run's wandb/: {id: {"step": the last of ours, "figures": {checkpoint: {name: value}}}}
ARRIVED = re.compile(r"Syncing: https?://[^/]+/[^/]+/[^/]+/runs/\S+ \.\.\.")  # with an owner: the service made the run
ERROR = re.compile(r"wandb: ERROR|Traceback")
LOOKS, PAUSE = 6, 10.0  # the service may take in a history a while after it was uploaded
AXIS = "checkpoint"
START, FINISH = 120.0, 600.0  # s until wandb's client has the run (its own limit of 90 s does not always hold), and sent


class Failed(Exception):
    """Nothing was sent; the message is one line."""


# -- offline runs


def data_of(folder: Path) -> Path | None:
    """Return the file that wandb wrote into the folder of a run; None where there is none."""
    return next(iter(sorted(folder.glob("run-*.wandb"))), None)


def mark_of(data: Path) -> Path:
    """Return wandb's own mark that `data` was uploaded."""
    return data.with_name(data.name + ".synced")


def upload(program: str, folders: Sequence[Path], flags: Sequence[str]) -> int:
    """Upload each folder, and put right which are marked as uploaded; return wandb's exit code, the first that is not 0."""
    for folder in folders:
        process = subprocess.Popen([program, "sync", *flags, str(folder)],
                                   stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT,
                                   text=True,
                                   errors="backslashreplace")
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            print(line, end="", flush=True)
        code, data = process.wait(), data_of(folder)
        if code:
            return code if code > 0 else 128 - code
        if data is None:
            continue
        ended = not any(ERROR.search(line) for line in lines) and any(line.endswith("done.") for line in lines)
        if ended and any(ARRIVED.match(line) for line in lines):
            mark_of(data).touch()
        elif ended and not any(line.startswith("Syncing: ") for line in lines):
            print(f"{folder.name} holds nothing that could be uploaded: its trainer was killed before", flush=True)
            mark_of(data).touch()
        else:
            mark_of(data).unlink(missing_ok=True)
    return 0


# -- figures


def wandb_id(run: RunFolder) -> str:
    """Return the id of the wandb run that the last attempt wrote; empty where none wrote any."""
    found = [match for folder in run.wandb.glob("*run-*") if (match := WANDB_FOLDER.fullmatch(folder.name))]
    return max(found, key=lambda match: match["time"])["id"] if found else ""


def rows(run: RunFolder) -> dict[int, dict[str, float]]:
    """Return what the run's checkpoints came to, by step: seconds of the merge, success and reward of each evaluation.

    An evaluation is named by environment and plan: only like may be compared with like, in wandb too.
    """
    found: dict[int, dict[str, float]] = {}
    for event in run.read_events():
        seconds = event.get("seconds")
        if event["event"] == "merged" and isinstance(event.get("step"), int) and isinstance(seconds, (int, float)):
            found.setdefault(event["step"], {})["merge/seconds"] = float(seconds)
    for point in curve.points(run.eval):
        row, named = found.setdefault(point.step, {}), f"eval/{point.environment}-{point.plan}"
        for what, figure in (("success", point.success), ("reward", point.reward)):
            ends = {"": figure["mean"], "_low": figure["low"], "_high": figure["high"]}
            row.update({f"{named}/{what}{end}": float(value) for end, value in ends.items() if value is not None})
        row[f"{named}/attempts"] = float(point.attempts)
    return dict(sorted(found.items()))


def summary(now: Status) -> dict[str, Any]:
    """Return what the run's status tells, as wandb's summary has it."""
    told = {
        "state": now.state,
        "step": now.step,
        "attempts": now.attempts,
        "checkpoint": now.checkpoint,
        "died_of": now.cause,
        "poisoned_steps": len(now.poisoned)
    }
    return {f"run/{name}": value for name, value in told.items() if value is not None}


def unsent(found: Mapping[int, Mapping[str, float]], sent: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """Return the figures that were not sent, or were sent with another value."""
    left = {}
    for step, row in found.items():
        before = sent.get(str(step))
        before = before if isinstance(before, dict) else {}
        new = {name: value for name, value in row.items() if before.get(name) != value}
        if new:
            left[step] = new
    return left


def read_sent(run: RunFolder) -> dict[str, Any]:
    """Return what was sent before; {} where that cannot be read: a row that comes twice does no harm."""
    with suppress(OSError, ValueError):
        return read_object(run.wandb / SENT)
    return {}


def last_step_written(run: RunFolder, id: str) -> int | None:
    """Return the last step in what the trainer wrote for wandb; None where wandb has no reader for it, or it has none."""
    try:
        from wandb.proto import wandb_internal_pb2
        from wandb.sdk.internal.datastore import DataStore
    except ImportError:
        return None
    last = None
    for folder in run.wandb.glob(f"*run-*-{id}"):
        data = data_of(folder)
        if data is None:
            continue
        store = DataStore()
        with suppress(AssertionError, OSError):  # cut off: what comes before is what was uploaded
            store.open_for_scan(str(data))
            while (read := store.scan_data()) is not None:
                record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
                record.ParseFromString(read)
                if record.WhichOneof("record_type") == "history":
                    steps = [json.loads(item.value_json) for item in record.history.item if _key(item) == "_step"]
                    last = max([last or 0, *(step for step in steps if isinstance(step, int))])
    return last


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def send(path: str, project: str, entity: str, sleep: Callable[[float], object] = time.sleep) -> str:
    """Send the figures that were not sent yet to the wandb run of the last attempt; return what to say.

    Raises:
        Failed: there is no such run, wandb refused, or the service has not all of the trainer's steps.
    """
    run = RunFolder(path)
    now = status(run)
    if now.state in ("running", "starting"):
        raise Failed(f"{now.name} still writes to its wandb run, and two writers would lose lines; "
                     "send the figures when it has ended")
    id, sent = wandb_id(run), read_sent(run)
    if not id:
        raise Failed(f"{run.wandb} holds no wandb run to send the figures to")
    told = sent.get(id)
    before: dict[str, Any] = told if isinstance(told, dict) else {}
    figures = before.get("figures") if isinstance(before.get("figures"), dict) else {}
    left = unsent(rows(run), figures or {})
    if not left and before.get("summary") == summary(now):
        return f"all figures are in wandb's run {id} already"
    ours = before.get("step") if isinstance(before.get("step"), int) else 0
    least = max(last_step_written(run, id) or 0, ours or 0)
    with tempfile.TemporaryDirectory(prefix="wandb-") as scratch:
        for look in range(LOOKS):
            asked = (run, id, project, entity, scratch, least, left, now)
            step, reached = _send_apart(*asked) or _send_apart(*asked) or _never(id)
            if reached:
                break
            if look + 1 < LOOKS:
                sleep(PAUSE)
        else:
            raise Failed(f"wandb's run {id} has step {step} of {least} that were written, so nothing was sent; "
                         f"{_rest(run, id)}")
    for number, row in left.items():
        figures = {**(figures or {}), str(number): {**(figures or {}).get(str(number), {}), **row}}
    told = {**sent, id: {"step": step, "figures": figures, "summary": summary(now)}}
    atomic_write(run.wandb / SENT, json.dumps(told, indent=1) + "\n")
    checkpoints = f"{len(left)} checkpoint{'' if len(left) == 1 else 's'}"
    return f"figures of {checkpoints} are in wandb's run {id}"


def _rest(run: RunFolder, id: str) -> str:
    """Return how what the service lacks gets there."""
    left = [folder for folder in sorted(run.wandb.glob(f"run-*-{id}")) if folder.is_dir()]
    if left:  # of an online run that was killed, or had no network
        return f"upload the rest with `wandb sync {left[-1]}`"
    return "upload the rest with `invoke train.sync`, or try again in a minute"


def _never(id: str) -> NoReturn:
    raise Failed(f"wandb's run {id}: its client did not start within {START:.0f} s, twice; nothing was sent; try again")


def _send_apart(run: RunFolder, id: str, *args: Any) -> tuple[int, bool] | None:
    """Do `_send_once` in a process of its own; None where wandb's client hung before it sent anything."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_send_once, args=(theirs, id, *args))
    process.start()
    theirs.close()
    try:
        if not ours.poll(START):
            return None
        what, found = ours.recv()
        if what == "began":
            if not ours.poll(FINISH):
                raise Failed(f"wandb's run {id}: its client did not end within {FINISH:.0f} s; the run's page shows "
                             "whether the figures have arrived, and another call sends them again")
            what, found = ours.recv()
    except EOFError:
        process.join()
        raise Failed(f"wandb's run {id}: its client ended with code {process.exitcode}; try again") from None
    finally:
        process.kill()
        process.join()
    if what == "absent":
        raise Failed(f"the service has no run {id}: nothing of it was uploaded; {_rest(run, id)}")
    if what == "failed":
        raise Failed(f"wandb's run {id}: {shown(found)}")
    step, reached = found
    return step, reached


def _send_once(tell: Connection, id: str, project: str, entity: str, scratch: str, least: int,
               left: Mapping[int, Mapping[str, float]], now: Status) -> None:
    """Resume the wandb run, tell that it began, and send; tell its last step and whether it had `least` before.

    Nothing is sent without those.
    """
    os.environ["WANDB_SILENT"] = "true"  # its settings silence it only from init on
    import wandb
    settings = wandb.Settings(
        mode="online",
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
        # The files about the trainer's machine stay as they are.
        x_disable_meta=True,
        x_primary=False)
    try:
        sent = wandb.init(id=id,
                          resume="must",
                          project=project or None,
                          entity=entity or None,
                          dir=scratch,
                          settings=settings)
        tell.send(("began", None))
        reached = sent.starting_step > least or not least
        if reached:
            sent.define_metric(AXIS)
            for name in ("merge/*", "eval/*"):
                sent.define_metric(name, step_metric=AXIS)
            for number, row in left.items():
                sent.log({AXIS: number, **row})
            sent.summary.update(summary(now))
        step = sent.step - 1
        sent.finish(exit_code=0 if now.state == "finished" else 1)
    except (wandb.errors.Error, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        tell.send(("absent" if "has not been initialized" in lines[0] else "failed", lines[0]))
    else:
        tell.send(("sent", (step, reached)))


def main(argv: Sequence[str]) -> int:
    """Do what the words say; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training", description="Upload what was left for wandb.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("upload", "figures"):
        command = commands.add_parser(name)
        command.add_argument("--project", default="")
        command.add_argument("--entity", default="")
        if name == "upload":
            command.add_argument("--wandb", default="wandb", help="wandb's program")
        command.add_argument("folder", nargs="+" if name == "upload" else 1)
    asked = parser.parse_args(argv)
    if asked.command == "upload":
        flags = [*(["--project", asked.project] if asked.project else []),
                 *(["--entity", asked.entity] if asked.entity else [])]  # yapf: disable
        return upload(asked.wandb, [Path(folder) for folder in asked.folder], flags)
    try:
        print(send(os.path.abspath(asked.folder[0]), asked.project, asked.entity), flush=True)
    except (Failed, OSError, ValueError) as error:
        print(f"training: {shown(str(error))}", file=sys.stderr, flush=True)
        return 1
    return 0
