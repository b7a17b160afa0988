"""The folder of a training run: where everything is, and how several programs write there without losing anything.

    run.json       what was asked for, and the attempts so far; read with `read`, changed with `update`
    state.json     the supervisor's heartbeat
    events.jsonl   what happened, a line each
    metrics.jsonl  a line a step
    log/           a file an attempt
    rollouts/ hydra/ wandb/ global_step_N/ latest_checkpointed_iteration.txt   the trainer's own
    merged/ eval/ watch.json                                                   the watcher's
"""
from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from training.foreign import (
    LARGEST_LINES,
    WRITE,
    is_count,
    is_every,
    is_number,
    is_table,
    is_text,
    misfit,
    read_lines,
    read_object,
)

SCHEMA = 1
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)  # of a run: it names a folder, a container and a label
FULL = (errno.ENOSPC, errno.EDQUOT)
# Given up when the disk is full, so that what ended the run can still be written down.
RESERVE_BYTES = 1 << 20
# What the fields are, where they are there; what is not named here is looked at by whoever uses it.
RUN = {
    "name":
    is_text,
    "created":
    is_number,
    "environment": {
        "name": is_text,
        "url": is_text,
        "prefix": is_text,
        "replicas": is_count
    },
    "algorithm":
    is_text,
    "runner":
    is_text,
    "container":
    is_text,
    "folder":
    is_text,
    "cwd":
    is_text,
    "shm_size":
    is_text,
    "gpus": {
        "choice": is_text,
        "count": is_count
    },
    "presets": [is_text],
    "overrides": [is_text],
    "command": [is_text],
    "secrets":
    is_table,
    "commits":
    is_table,
    "versions":
    is_table,
    "volumes":
    is_table,
    "variables":
    is_table,
    "world_size":
    is_count,
    "steps":
    is_count,
    "save_freq":
    is_every,
    "options":
    is_table,
    "poisoned": [is_count],
    "nan_steps": [is_count],
    "attempts": [{
        "number": is_count,
        "started": is_number,
        "ended": is_number,
        "resumed_from": is_count,
        "last_step": is_count,
        "state": is_text,
        "cause": is_text,
        "reason": is_text
    }]
}
STATE = {
    "pid": is_count,
    "host": is_text,
    "boot_id": is_text,
    "state": is_text,
    "note": is_text,
    "updated": is_number,
    "started": is_number,
    "silent_seconds": is_number,
    "step": is_count,
    "resumed_from": is_count,
    "environment": {
        "since": is_number,
        "sessions": is_count,
        "why": is_text
    },
    "gpus": [is_table]
}


def atomic_write(path: Path, text: str, durable: bool = True) -> None:
    """Write `text` to `path`: a reader, and whoever comes after a crash, sees the old text or the new one.

    Args:
        durable: wait until it is on the disk, which a save of a checkpoint may keep busy for a minute.
    """
    path = Path(path)
    staged = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(staged, "x", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException as error:
        with suppress(OSError):
            staged.unlink()
        if isinstance(error, OSError) and error.filename == str(staged):
            error.filename, error.filename2 = str(path), None  # the file that the user knows
        raise


def append_line(path: Path, fields: dict[str, Any]) -> None:
    """Append `fields` to `path` as one line, in one write: lines of several programs do not mix."""
    line = json.dumps(fields, allow_nan=True).encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | WRITE, 0o666)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":  # somebody died in the middle of a line
            line = b"\n" + line
        written = os.write(handle, line)
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(handle)


class RunFolder:
    """One training run's folder; the paths in it, and its files of JSON."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return Path(os.path.abspath(self.path)).name

    @property
    def run_json(self) -> Path:
        """What was asked for, and the attempts."""
        return self.path / "run.json"

    @property
    def state_json(self) -> Path:
        """The supervisor's heartbeat."""
        return self.path / "state.json"

    @property
    def events(self) -> Path:
        """What happened, a line each."""
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """The trainer's figures, a line a step."""
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        """The folder of the attempts' logs."""
        return self.path / "log"

    def log(self, attempt: int) -> Path:
        """Return the log of an attempt; the first is 1."""
        return self.logs / f"attempt-{attempt}.log"

    @property
    def rollouts(self) -> Path:
        """The trajectories: stepN/RANK.json."""
        return self.path / "rollouts"

    @property
    def hydra(self) -> Path:
        """Hydra's own folder (hydra.run.dir)."""
        return self.path / "hydra"

    @property
    def wandb(self) -> Path:
        """wandb's own folder (WANDB_DIR holds a `wandb` folder of its own)."""
        return self.path / "wandb"

    @property
    def tracker(self) -> Path:
        """The trainer's file with the number of the last checkpoint."""
        return self.path / "latest_checkpointed_iteration.txt"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint with the number `step`."""
        return self.path / f"global_step_{step}"

    @property
    def merged(self) -> Path:
        """The merged models: global_step_N."""
        return self.path / "merged"

    @property
    def eval(self) -> Path:
        """The evaluations of the merged models."""
        return self.path / "eval"

    @property
    def watch_json(self) -> Path:
        """The watcher's own state."""
        return self.path / "watch.json"

    @property
    def aside(self) -> Path:
        """Checkpoints that a resume began before, out of the trainer's way: attempt-N/global_step_M."""
        return self.path / "aside"

    def exists(self) -> bool:
        """Tell whether this is a run's folder."""
        return self.run_json.is_file()

    def read(self) -> dict[str, Any]:
        """Return run.json.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is none that this version reads, in one line.
        """
        run = read_object(self.run_json, nonfinite=True)
        if run.get("schema") != SCHEMA:
            raise ValueError(
                f"{self.run_json} has the schema {repr(run.get('schema'))[:40]}, and this version reads {SCHEMA}")
        if fault := misfit(run, RUN):
            raise ValueError(f"{self.run_json}: {fault}")
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of run.json; it goes with the process."""
        handle = os.open(self.path / ".run.lock", os.O_RDWR | WRITE, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def update(self, function: Callable[[dict[str, Any]], dict[str, Any] | None]) -> dict[str, Any]:
        """Change run.json: `function` gets what it holds, and changes it in place or returns another; return the new.

        Raises:
            FileNotFoundError: it is not there; `create` makes it.
            ValueError: it is none that this version reads.
        """
        with self.locked():
            run = self.read()
            run = function(run) or run
            self._write(run)
        return run

    def create(self, run: dict[str, Any]) -> None:
        """Write a new run.json, with its folder.

        Raises:
            FileExistsError: there is one already.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self.locked():
            if self.run_json.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.run_json))
            self._write({"schema": SCHEMA, **run})

    def _write(self, run: dict[str, Any]) -> None:
        text = json.dumps(run, indent=1) + "\n"
        try:
            atomic_write(self.run_json, text)
        except OSError as error:
            reserve = self.path / ".reserve"
            if error.errno not in FULL or not reserve.exists():
                raise
            reserve.unlink()
            atomic_write(self.run_json, text)

    def append_event(self, event: str, **fields: Any) -> None:
        """Append a line to events.jsonl: the time (seconds since 1970), what happened, and more."""
        append_line(self.events, {"time": round(time.time(), 3), "event": event, **fields})

    def read_events(self, last_bytes: int = LARGEST_LINES) -> list[dict[str, Any]]:
        """Return the events, the first one first."""
        kinds = {"event": is_text, "time": is_number, "step": is_count}
        return [event for event in read_lines(self.events, last_bytes) if "event" in event and not misfit(event, kinds)]

    def append_metrics(self, step: int, attempt: int, metrics: dict[str, float]) -> None:
        """Append a step's figures to metrics.jsonl."""
        line = {"step": step, "attempt": attempt, "time": round(time.time(), 3), "metrics": metrics}
        append_line(self.metrics, line)

    def read_metrics(self, last_bytes: int = LARGEST_LINES) -> dict[int, dict[str, Any]]:
        """Return the lines of metrics.jsonl by step, in order of the steps; of a step seen again the last counts.

        What a resume left behind it is left out: after a line of step N no higher step from before it counts.
        """
        found: dict[int, dict[str, Any]] = {}
        for line in read_lines(self.metrics, last_bytes):
            step = line.get("step")
            if isinstance(step, int) and is_count(step) and is_table(line.get("metrics")):
                while found and next(reversed(found)) >= step:
                    found.popitem()
                found[step] = line
        return found

    def write_state(self, **fields: Any) -> None:
        """Write state.json, with the time."""
        state = {"schema": SCHEMA, **fields, "updated": round(time.time(), 3)}
        atomic_write(self.state_json, json.dumps(state) + "\n", durable=False)

    def read_state(self) -> dict[str, Any] | None:
        """Return state.json; None where there is none that can be read."""
        try:
            state = read_object(self.state_json, nonfinite=True)
        except (OSError, ValueError):
            return None
        return None if misfit(state, STATE) else state

    def reserve(self) -> None:
        """Put a little of the disk by: what ended a run that filled it must go into run.json."""
        place = self.path / ".reserve"
        with suppress(OSError):
            if not place.exists() or place.stat().st_size < RESERVE_BYTES:
                place.write_bytes(os.urandom(RESERVE_BYTES))  # some file systems keep no block of zeros
