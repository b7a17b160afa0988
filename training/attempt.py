"""One run of the trainer: its process, what it says, and what is known of it from that."""
from __future__ import annotations

import math
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from training import checkpoints, machine
from training.console import Lines, Steps, speaker
from training.diagnosis import RAY, WAITS, Evidence
from training.folder import RunFolder
from training.foreign import WRITE
from training.rollouts import Errors, Played

SHOWN_LINES = 20
LINE_WIDTH = 2000  # characters of a line in state.json
# Words by which the training loop tells that it begins: from then on trajectories may be open.
BEGINS = ("Training from scratch", "Setting global step to", "Running rounds")
PREPARES = "Total training steps:"  # the loop says it once, before its workers start
# Ray runs a task again whose process was killed; the new one waits for good for what the first one's workers hold.
LOST_LOOP = "the training loop's process was killed, and Ray started another, which waits for the first one's GPUs"
# What the trainer learns from.
SCORES = ("critic/score/mean", "critic/rewards/mean", "critic/advantages/mean", "critic/task_score/mean")


class Attempt:
    """One run of the trainer: the process, what it says, and what is known of it."""

    def __init__(self, folder: RunFolder, run: Mapping[str, Any], number: int, resumed_from: int | None) -> None:
        self.folder, self.run, self.number, self.resumed_from = folder, run, number, resumed_from
        self.steps: int | None = run.get("steps")
        world = run.get("world_size")
        self.ranks = world if isinstance(world, int) and world > 0 else 1  # each writes trajectories
        self.started = time.time()
        self.began: dict[int, float] = {}  # when the last steps did
        self.noted_step: int | None = None
        self.tracked = checkpoints.tracked(folder.path)
        self.judged = 0  # the last step whose trajectories were looked at
        self.last_step: int | None = None
        self.step_ended = self.started
        self.begun = False
        self.loops = 0  # times that the training loop got ready
        self.nan: tuple[int, tuple[str, ...]] | None = None
        self.evidence = Evidence()
        self.heard = time.monotonic()
        self.last_lines: deque[str] = deque(maxlen=SHOWN_LINES)
        self.log_bytes = 0
        self.log_lost = 0
        self.errors = Errors()  # said since the last step ended
        self.errors_before = Errors()  # and before that: lines of different processes come in no order
        self.doubtful: dict[int, tuple[Played, float]] = {}  # steps with trajectories that were cut off, and since when
        self.process: subprocess.Popen[bytes] | None = None
        self._lines, self._steps = Lines(), Steps()
        self._lock = threading.Lock()
        self._log = -1
        self._reader: threading.Thread | None = None

    @property
    def step(self) -> int:
        """The number of the step that is played or will be."""
        return (self.last_step if self.last_step is not None else self.resumed_from or 0) + 1

    def start(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the trainer.

        Raises:
            OSError: it cannot be.
        """
        self.folder.logs.mkdir(exist_ok=True)
        self._log = os.open(self.folder.log(self.number), os.O_WRONLY | os.O_APPEND | WRITE, 0o666)
        self.process = subprocess.Popen(list(argv),
                                        stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT,
                                        cwd=self.run.get("cwd") or str(self.folder.path),
                                        env=dict(environment),
                                        start_new_session=True,
                                        preexec_fn=machine.die_with_parent)
        self._reader = threading.Thread(target=self._read, name="reader", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        handle = self.process.stdout.fileno()
        while True:
            try:
                data = os.read(handle, 1 << 16)
            except OSError:
                data = b""
            self.take(data)
            if not data:
                return

    def take(self, data: bytes) -> None:
        """Take what the trainer wrote; b"" is its end."""
        with self._lock:
            lines = self._lines.feed(data)
            if lines:
                self._write("".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))
            # Ray says again and again that it waits for what is not there: that is no sign of life.
            works = [self._line(line) for line in lines]
            if any(works) or not works:
                self.heard = time.monotonic()
            if not data:
                self._note(self._steps.flush())

    def idle(self) -> None:
        """Take it that a step's line that lacks its end gets no more."""
        with self._lock:
            if self._steps.waits and time.monotonic() - self.heard > 2:
                self._note(self._steps.flush())

    def _write(self, data: bytes) -> None:
        if self._log < 0:
            return
        try:
            self.log_bytes += os.write(self._log, data)
        except OSError as error:  # the disk is full: the run is judged by the trainer's own fate
            self.log_lost += len(data)
            self.evidence.feed(f"OSError: [Errno {error.errno}] {error.strerror}: {self.folder.log(self.number)}")

    def _line(self, line: str) -> bool:
        """Take a line; return whether it is one of a trainer that works."""
        if line.strip():
            self.last_lines.append(line[:LINE_WIDTH])
        who, said, times = speaker(line)
        if not self.begun and said.startswith(BEGINS):
            self.begun = True
        if self.errors.feed(said, times):
            return True  # it is survived, so it is no evidence for a death
        if who == "main_task" and said.startswith(PREPARES):
            self.loops += 1
            if self.loops > 1:
                self.evidence.first.setdefault(RAY, LOST_LOOP)
        self.evidence.feed(said)
        self._note(self._steps.feed(who, said))
        return not (who.startswith("autoscaler") or WAITS.search(said))

    def _note(self, found: list[Any]) -> None:
        for line in found:
            known = self.last_step if self.last_step is not None else self.resumed_from or 0
            if line.step == self.last_step:  # more of it
                with suppress(OSError):
                    self.folder.append_metrics(line.step, self.number, line.metrics)
                continue
            if line.step <= known or (line.step != known + 1 and self.steps is not None and line.step > self.steps):
                continue  # no line of the training loop's
            self.last_step, self.step_ended, self.begun = line.step, time.time(), True
            self.began = {**dict(list(self.began.items())[-2:]), line.step + 1: self.step_ended}
            self.evidence.step_done()
            self.errors_before, self.errors = self.errors, Errors()
            bad = tuple(key for key, value in line.metrics.items()
                        if not math.isfinite(value) and (key.startswith("actor/") or key in SCORES))
            if bad and self.nan is None:
                self.nan = (line.step, bad)
            with suppress(OSError):
                self.folder.append_metrics(line.step, self.number, line.metrics)

    def drain(self) -> None:
        """Wait for the rest of what the trainer wrote; another process may hold its pipe open."""
        if self._reader is not None:
            self._reader.join(2)
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
        if self.process is not None and self.process.stdout is not None and not self.reading:
            self.process.stdout.close()

    @property
    def reading(self) -> bool:
        """Whether the pipe is open."""
        return self._reader is not None and self._reader.is_alive()
