"""Commands that start and stop one environment server take turns.

Of the evaluations and runs that use one, the first starts it, and the last to leave stops it.
"""
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from tasks.lib.atomic import open_private
from tasks.lib.environments.local import RUN
from tasks.lib.host.locks import exclusive

STARTED = "an evaluation started it"


def exclusive_lock(name: str) -> AbstractContextManager[None]:
    """Let one command at a time look whether the server is up, start it or stop it."""
    return exclusive(RUN / f"{name}.turn", f"waiting for another command that starts or stops {name}")


class User:
    """One evaluation's use of a server, from `exclusive_lock` on; it ends with the process, however that ends."""

    def __init__(self, name: str) -> None:
        self._file = os.fdopen(open_private(RUN / f"{name}.users", os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+")
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def started(self) -> None:
        """Note that an evaluation started the server, so that the last one stops it."""
        self._file.truncate(0)
        self._file.write(STARTED)
        self._file.flush()

    def leave(self) -> tuple[bool, bool]:
        """Tell whether an evaluation started the server, and whether another one still uses it."""
        with self._file:
            self._file.seek(0)
            ours = self._file.read() == STARTED
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return ours, True
            return ours, False


@contextmanager
def shared_server(name: str, find: Callable[[], str | None], start: Callable[[], str],
                  leave: Callable[[bool], None]) -> Iterator[str]:
    """Give a server's address while it is used: what `find` tells, or where none is up, what `start` returns.

    `leave` is called at the end where it was started for its users alone; it is told whether there still is another one.
    """
    with exclusive_lock(name):
        user = User(name)
        url = find()
        if url is None:
            url = start()
            user.started()
    try:
        yield url
    finally:
        with exclusive_lock(name):
            ours, shared = user.leave()
            if ours:
                leave(shared)


def detach_owner(name: str) -> None:
    """Forget that an evaluation started the server: it was stopped, or the user wants it up."""
    path = RUN / f"{name}.users"
    if path.exists():  # emptied, not removed: evaluations that use the server hold their locks on this very file
        path.write_text("")
