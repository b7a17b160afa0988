"""Locks that end with the process that holds them, however it ends."""
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.lib.atomic import open_private
from tasks.lib.notices import put


@contextmanager
def exclusive(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock `path`, which one process has at a time; print `waiting` where another one has it now."""
    with os.fdopen(open_private(path), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            put(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
