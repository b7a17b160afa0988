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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SCHEMA = 1
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)  # of a run: it names a folder, a container and a label
FULL = (errno.ENOSPC, errno.EDQUOT)
# run.json's kinds of value; a key may be absent, or null where that means that nobody knows.
TABLES = ("environment", "gpus", "options", "variables", "secrets", "commits", "versions", "volumes")
LISTS = {"attempts": dict, "overrides": str, "command": str, "presets": str, "poisoned": int, "nan_steps": int}
NUMBERS, TEXTS = ("world_size", "steps", "save_freq"), ("name", "folder", "runner")
ATTEMPT: dict[str, tuple[type, ...]] = {
    "number": (int, ),
    "started": (int, float),
    "ended": (int, float),
    "resumed_from": (int, ),
    "last_step": (int, ),
    "state": (str, ),
}
KINDS = {dict: "table", list: "list", str: "text", int: "number"}
# Given up when the disk is full, so that what ended the run can still be written down.
RESERVE_BYTES = 1 << 20


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
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object, in one line.
    """
    try:
        found = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def shape_fault(run: dict[str, Any]) -> str:
    """Return what in a run.json is of another kind than its readers take it for; empty where all is right."""
    kinds_of: tuple[tuple[Iterable[str], type], ...] = ((TABLES, dict), (LISTS, list), (NUMBERS, int), (TEXTS, str))
    for keys, kind in kinds_of:
        for key in keys:
            if run.get(key) is not None and (not isinstance(run[key], kind) or isinstance(run[key], bool)):
                return f"{key} is no {KINDS[kind]}"
    for key, kind in LISTS.items():
        if not all(isinstance(one, kind) and not isinstance(one, bool) for one in run.get(key) or ()):
            return f"{key} is no list of {KINDS[kind]}s"
    place = run.get("environment") or {}
    for key in ("name", "url"):
        if place.get(key) is not None and not isinstance(place[key], str):
            return f"{key} of environment is no text"
    for attempt in run.get("attempts") or ():
        for key, kinds in ATTEMPT.items():
            value = attempt.get(key)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                return f"{key} of an attempt is no {KINDS[kinds[0]]}"
    return ""


def read_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Return the JSON objects of a file with one a line; [] where there is no file.

    A line that is no object is left out: the last one may be half written, and a crash leaves others.

    Args:
        last_bytes: look at the end of the file only.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 0 if last_bytes is None else max(0, size - last_bytes)
            file.seek(start)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    if start:
        del lines[0]  # it began before
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def append_line(path: Path, fields: dict[str, Any]) -> None:
    """Append `fields` to `path` as one line, in one write: lines of several programs do not mix."""
    line = json.dumps(fields, allow_nan=True).encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
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
        run = read_object(self.run_json)
        if run.get("schema") != SCHEMA:
            raise ValueError(f"{self.run_json} has the schema {run.get('schema')!r}, and this version reads {SCHEMA}")
        fault = shape_fault(run)
        if fault:
            raise ValueError(f"{self.run_json}: {fault}")
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of run.json; it goes with the process."""
        handle = os.open(self.path / ".run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
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

    def read_events(self, last_bytes: int | None = None) -> list[dict[str, Any]]:
        """Return the events, the first one first."""
        return [event for event in read_lines(self.events, last_bytes) if isinstance(event.get("event"), str)]

    def append_metrics(self, step: int, attempt: int, metrics: dict[str, float]) -> None:
        """Append a step's figures to metrics.jsonl."""
        line = {"step": step, "attempt": attempt, "time": round(time.time(), 3), "metrics": metrics}
        append_line(self.metrics, line)

    def read_metrics(self, last_bytes: int | None = None) -> dict[int, dict[str, Any]]:
        """Return the lines of metrics.jsonl by step, in order of the steps; of a step seen again the last counts.

        What a resume left behind it is left out: after a line of step N no higher step from before it counts.
        """
        found: dict[int, dict[str, Any]] = {}
        for line in read_lines(self.metrics, last_bytes):
            step = line.get("step")
            if isinstance(step, int) and not isinstance(step, bool) and isinstance(line.get("metrics"), dict):
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
            return read_object(self.state_json)
        except (OSError, ValueError):
            return None

    def reserve(self) -> None:
        """Put a little of the disk by: what ended a run that filled it must go into run.json."""
        place = self.path / ".reserve"
        with suppress(OSError):
            if not place.exists() or place.stat().st_size < RESERVE_BYTES:
                place.write_bytes(os.urandom(RESERVE_BYTES))  # some file systems keep no block of zeros
