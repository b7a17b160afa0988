"""What the machine's disk can do at best: reading, writing, both at once, with two streams each.

A merger cannot end before its shards are read and its output is written; these are those two, with nothing between.
"""
from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

BLOCK = 8 << 20  # bytes a call
STREAMS = 2


def read_seconds(files: Sequence[Path]) -> float:
    """Seconds to read all bytes of `files`, each stream every second file, the page cache dropped behind.

    Dropping behind is the fastest way found (2.0-2.4 GB/s beside 1.4 without, and direct reads no faster): the kernel
    then reuses the same few pages.
    """
    return _in_parallel(_readers(files))


def write_seconds(folder: Path, total: int, direct: bool) -> float:
    """Seconds to write `total` bytes into STREAMS files and fsync them; `direct`: around the page cache."""
    return _removing(folder, lambda paths: _in_parallel(_writers(paths, total, direct)))


def both_seconds(files: Sequence[Path], folder: Path, total: int, direct: bool) -> float:
    """Seconds for `read_seconds` and `write_seconds` at the same time, to the end of the later one."""
    return _removing(folder, lambda paths: _in_parallel([*_readers(files), *_writers(paths, total, direct)]))


def can_write_directly(folder: Path) -> bool:
    """Whether the file system takes O_DIRECT (tmpfs and some overlays do not)."""
    try:
        return bool(_removing(folder, lambda paths: _in_parallel(_writers(paths, 2 * BLOCK, True))))
    except OSError:
        return False


def evict(files: Sequence[Path]) -> None:
    """Ask the kernel to forget the cached pages of `files`; only clean pages go, so they are written out first."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(files: Sequence[Path]) -> None:
    """Bring `files` into the page cache."""
    buffer = mmap.mmap(-1, BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cached_share(files: Sequence[Path]) -> float:
    """The share (0 to 1) of the pages of `files` that are in the page cache, by mincore(2)."""
    cached = pages = 0
    for path in files:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                continue
            flags = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            # A private, writable mapping is the one that ctypes can take the address of; nothing is written to it.
            with mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapping:
                first = ctypes.c_char.from_buffer(mapping)
                address = ctypes.c_void_p(ctypes.addressof(first))
                failed = ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), flags)
                del first
            if failed:
                raise OSError(ctypes.get_errno(), f"mincore of {path}")
            cached += sum(bytes(flags).translate(_ODD))
            pages += len(flags)
    return cached / pages if pages else 0.0


_ODD = bytes(value & 1 for value in range(256))


def _in_parallel(jobs: Sequence[Callable[[], None]]) -> float:
    """Run each job in a thread of its own; seconds to the end of the last, or the first error."""
    errors: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # handed to the caller's thread below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job, )) for job in jobs]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - begin


def _read(files: Sequence[Path]) -> None:
    buffer = mmap.mmap(-1, BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            at = 0
            while count := file.readinto(buffer):
                os.posix_fadvise(file.fileno(), at, count, os.POSIX_FADV_DONTNEED)
                at += count


def _readers(files: Sequence[Path]) -> list[Callable[[], None]]:
    return [partial(_read, files[index::STREAMS]) for index in range(STREAMS)]


def _writers(paths: Sequence[Path], total: int, direct: bool) -> list[Callable[[], None]]:
    share = -(-total // len(paths))
    return [partial(_write, path, share, direct) for path in paths]


def _write(path: Path, total: int, direct: bool) -> None:
    """Write `total` bytes, rounded up to a page, of a random block (zeros might be compressed away), and fsync."""
    block = mmap.mmap(-1, BLOCK)
    block[:] = os.urandom(BLOCK)
    total = -(-total // mmap.PAGESIZE) * mmap.PAGESIZE
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0), 0o600)
    try:
        done = 0
        with memoryview(block) as view:
            while done < total:
                done += os.write(descriptor, view[:min(BLOCK, total - done)])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _removing(folder: Path, job: Callable[[Sequence[Path]], float]) -> float:
    paths = [folder / f"limit-{index}" for index in range(STREAMS)]
    try:
        return job(paths)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
