"""Work on foreign data in a process of its own, whose time and memory are limited.

A pickle of 120 bytes can keep Python's hashing busy for years, deaf to every signal; a damaged one asks for 64 GB. The
child ends by its limits, and the parent can be interrupted all the while.
"""
import os
import pickle
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from merger import MergeError

A = TypeVar("A")
R = TypeVar("R")

SECONDS = 4  # of processor time for each piece of work, and more for each MB of it
SECONDS_A_MB = 1
MEMORY = 512 << 20  # bytes above what the process has, and more for each byte of the work
MEMORY_A_BYTE = 16

_limited = False  # whether this process is a child of `each`


def each(work: Callable[[A], R], items: Iterable[A], what: Callable[[A], str] = str) -> Iterator[R]:
    """Yield `work(item)` of each item, done in one process beside this one, in order.

    `work` says with `allow` how much data it is about to read. `what` names an item in a refusal.

    Raises:
        MergeError: `work` raised it, or came to a limit.
    """
    items = list(items)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _serve(work, items, writer)
    os.close(writer)
    ended = False
    try:
        with os.fdopen(reader, "rb") as stream:
            for item in items:
                size = int.from_bytes(stream.read(8), "little")
                answer = stream.read(size) if size else b""
                if not size or len(answer) < size:
                    _, status = os.waitpid(pid, 0)
                    ended = True
                    raise MergeError(f"{what(item)}: {_reason(status)}")
                value, refusal = pickle.loads(answer)  # from our own process
                if refusal:
                    raise MergeError(refusal)
                yield value
    finally:
        if not ended:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _serve(work: Callable[[A], Any], items: Iterable[A], writer: int) -> NoReturn:
    """Write the answers, each a length of 8 bytes and a pickle, and end."""
    global _limited
    _limited = True
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXCPU):
            signal.signal(number, signal.SIG_DFL)
        with os.fdopen(writer, "wb") as stream:
            for item in items:
                allow(0)
                try:
                    answer: tuple[Any, str] = (work(item), "")
                except MergeError as error:
                    answer = (None, str(error))
                data = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
                stream.write(len(data).to_bytes(8, "little") + data)
                stream.flush()
    except BaseException:
        os._exit(1)
    os._exit(0)


def allow(nbytes: int) -> None:
    """Let a child use the time and memory that `nbytes` bytes of foreign data may take, from now on; else do nothing."""
    if not _limited:
        return
    with suppress(OSError, ValueError):
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 1 + SECONDS + SECONDS_A_MB * (nbytes >> 20)
        _lower(resource.RLIMIT_CPU, seconds)
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])  # not on macOS
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY + MEMORY_A_BYTE * nbytes)


def confine(seconds: int, nbytes: int) -> None:
    """Let this process use so much more processor time and memory, from now on; then a `TimeoutError` or `MemoryError`."""

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGXCPU, stop)
    with suppress(OSError, ValueError):
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))  # where code that cannot be stopped goes on
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[5])  # data, in which threads' reserves do not count
        _lower(resource.RLIMIT_DATA, pages * resource.getpagesize() + nbytes)


def _lower(which: int, limit: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (limit if hard < 0 else min(limit, hard), hard))


def _reason(status: int) -> str:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return f"reading it takes more than {SECONDS} s; no torch writes such a file"
    ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "an error"
    return f"reading it ended the process ({ended}), or takes more memory than any checkpoint; no torch writes such a file"
