"""One watcher a run, whichever machine it is on: a file that names its owner and shows that it lives.

The owner counts a number up in the file every few seconds. Another one that finds the file asks the system whether the
owner runs, where both see the same processes; elsewhere (another machine, another container) it looks whether the number
changes: clocks of two machines differ, so no time in the file is compared with one's own. Locks of the file system are
not used: not every network file system has them.

An owner that was taken for dead (a machine that slept) finds another's name in the file before it deletes anything, and
gives up.
"""
from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from training import machine
from training.foreign import read_json

BEAT = 5.0  # seconds between two counts
SILENCE = 60.0  # seconds without a count after which an owner that cannot be asked about is dead


class Taken(Exception):
    """Another owner lives; the message says which."""


class Lost(Exception):
    """The lease is another's by now."""


def lives(owner: dict[str, Any]) -> bool | None:
    """Tell whether the owner's process runs; None where that cannot be seen from here."""
    return machine.lives(owner) if machine.boot_id() else None


def described(owner: dict[str, Any]) -> str:
    """Return the owner in words."""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def _told(path: Path) -> dict[str, Any]:
    found = read_json(path)
    return found if isinstance(found, dict) else {}


class Lease:
    """The file `path`, this process's own between `take` and `release`."""

    def __init__(self, path: Path, beat: float = BEAT, silence: float = SILENCE) -> None:
        self.path, self.beat, self.silence = path, beat, silence
        self._own = {**machine.identity(os.getpid()), "token": uuid4().hex}
        self._count = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()

    def take(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Take the lease, and count from here on; waits `silence` seconds where the owner cannot be asked about.

        Raises:
            Taken: its owner lives.
        """
        while not self._create():
            owner = self.read()
            if owner is None:  # gone meanwhile, or being written
                time.sleep(0.05)
                continue
            alive = lives(owner)
            if alive is None:
                say(f"{described(owner)} has {self.path}; looking for {self.silence:g} s whether it lives")
                alive = self._counts(owner)
            if alive:
                raise Taken(described(owner))
            self._remove(owner)
        self._thread = threading.Thread(target=self._keep_counting, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Do nothing where the lease is this process's.

        Raises:
            Lost: it is not.
        """
        owner = self.read()
        if owner is None or owner.get("token") != self._own["token"]:
            raise Lost(described(owner) if owner else "nobody")

    def release(self) -> None:
        """Give the lease back."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        with self._turn:
            owner = self.read()
            if owner and owner.get("token") == self._own["token"]:
                self.path.unlink(missing_ok=True)

    def read(self) -> dict[str, Any] | None:
        """Return what the file says of its owner; None where there is no file, {} where it says nothing for a while."""
        for _ in range(10):
            try:
                return _told(self.path)
            except FileNotFoundError:
                return None
            except (OSError, ValueError):  # just being written
                time.sleep(0.02)
        return {}

    def _create(self) -> bool:
        try:
            fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(fd, "w") as file:
            file.write(self._text())
        return True

    def _text(self) -> str:
        return json.dumps({**self._own, "count": f"{self._count:012}", "seen": f"{time.time():.0f}"}) + "\n"

    def _counts(self, owner: dict[str, Any]) -> bool:
        end = time.monotonic() + self.silence
        while time.monotonic() < end:
            now = self.read()
            if now is None:
                return False
            if (now.get("token"), now.get("count")) != (owner.get("token"), owner.get("count")):
                return True
            time.sleep(min(1.0, self.beat))
        return False

    def _remove(self, owner: dict[str, Any]) -> None:
        """Remove the file of a dead owner; what turns out to be another's is put back."""
        aside = self.path.with_name(f"{self.path.name}.{self._own['token']}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        try:
            moved = _told(aside)
        except (OSError, ValueError):
            moved = {}
        if moved.get("token") != owner.get("token") and not self.path.exists():
            os.rename(aside, self.path)
        else:
            aside.unlink(missing_ok=True)

    def _keep_counting(self) -> None:
        while not self._stop.wait(self.beat):
            with self._turn:
                self._count += 1
                try:
                    self.check()
                    with self.path.open("r+") as file:  # in place: a new file could hide another owner's
                        file.write(self._text())
                except (Lost, OSError):
                    continue  # whoever deletes asks again
