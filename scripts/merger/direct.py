"""Read and write around the page cache (O_DIRECT, open(2)), where a file lies on a local disk.

Fresh pages of the cache can cost more time than the disk does, and nobody reads a merge's gigabytes from it soon.
O_DIRECT takes whole blocks of the file and of memory only; what does not fit, or is refused, goes through the cache.
While a merge waits for something else than the disk, the disk can fill the cache: that is what `ReadAhead` is for.
"""
import contextlib
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

PAGE = mmap.PAGESIZE  # at least the block of any disk; the cache and direct writes never share one
FLUSH_BYTES = 64 << 20
AHEAD_BYTES = 128 << 10  # asked for at a time: Linux cuts what is more than the device's read-ahead, without a word


def open_direct(path: Path, flags: int) -> int | None:
    """Open `path` around the page cache; None where its file system refuses, or is not one of a local disk.

    Network, overlay and copy-on-write file systems, whose devices have no major number, are left to the cache.
    """
    if not hasattr(os, "O_DIRECT") or os.major(os.stat(path).st_dev) == 0:
        return None
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError:
        return None


def page_buffer(nbytes: int) -> np.ndarray:
    """Return bytes that begin at a page, with room for the whole pages around `nbytes` bytes of a file."""
    memory = np.empty(nbytes + 3 * PAGE, np.uint8)
    return memory[-memory.ctypes.data % PAGE:]


def read_pages(fd: int, offset: int, nbytes: int, buffer: np.ndarray) -> int:
    """Read the pages that hold `nbytes` bytes from `offset` on into `buffer`; return how many of the bytes came."""
    lead = offset % PAGE
    pages = -(-(lead + nbytes) // PAGE) * PAGE
    try:
        count = os.preadv(fd, [buffer[:pages].data], offset - lead)
    except OSError:  # reading through the cache may do, or says what is wrong
        return 0
    return min(max(count - lead, 0), nbytes)


def is_cached(fd: int, size: int) -> bool:
    """Tell whether most of a file of `size` bytes is in the page cache, by a few reads that do not wait for the disk."""
    samples, hits = 8, 0
    for number in range(samples):
        try:
            hits += os.preadv(fd, [bytearray(1)], size * number // samples, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except (OSError, AttributeError):  # a file system or a system that cannot tell
            return False
    return hits > samples // 2


class ReadAhead:
    """Brings `paths` into the page cache while something else is waited for, and gives that memory back at the end.

    Only files that are not in it, and only as many as fit into the memory that nothing uses.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = list(paths)
        self._brought: list[Path] = []

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._brought:
            with contextlib.suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @contextlib.contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Read as long as the block lasts."""
        stop = threading.Event()
        reader = threading.Thread(target=self._read, args=(stop, ), daemon=True)
        reader.start()
        try:
            yield
        finally:
            stop.set()
            reader.join()

    def _read(self, stop: threading.Event) -> None:
        room = free_memory()
        for path in self._paths:
            with contextlib.suppress(OSError), path.open("rb") as file:  # the copying says what is wrong with it
                size = os.fstat(file.fileno()).st_size
                # Looking makes the kernel read around the place, so only what is then read is looked at.
                if size > room or stop.is_set() or is_cached(file.fileno(), size):
                    continue
                room -= size
                self._brought.append(path)
                for offset in range(0, size, AHEAD_BYTES):
                    if stop.is_set():
                        return
                    os.posix_fadvise(file.fileno(), offset, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def free_memory() -> int:
    """Return the bytes of memory that nothing uses, neither as a cache; 0 where the system cannot tell, or cannot read ahead."""
    if not hasattr(os, "posix_fadvise"):
        return 0
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * PAGE
    except (ValueError, OSError):
        return 0


class OutputStream:
    """A new file of `size` bytes that threads write at any place: its whole pages around the page cache.

    Raises:
        OSError: the file exists, or cannot be made.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct = open_direct(path, os.O_WRONLY)
        self._cached = 0
        os.ftruncate(self._fd, size)

    def __enter__(self) -> "OutputStream":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        if self._direct is not None:
            os.close(self._direct)

    def write(self, data: np.ndarray, offset: int) -> None:
        """Write all of `data` from byte `offset` on.

        Pages of the file that are pages of the memory too take the direct way, so `data` should begin at the same
        place of a page as `offset` does.
        """
        view = data.view(np.uint8).data
        head = min(-offset % PAGE, len(view))
        done = head + self._write_pages(view[head:head + (len(view) - head) // PAGE * PAGE], offset + head)
        self._write_cached(view[:head], offset)
        self._write_cached(view[done:], offset + done)

    def _write_pages(self, view: memoryview, offset: int) -> int:
        if self._direct is None or not view:
            return 0
        try:
            return os.pwrite(self._direct, view, offset)
        except OSError:  # writing through the cache may do, or says what is wrong
            return 0

    def _write_cached(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)
        self._cached += done  # a sum that two threads spoil only flushes later
        if self._cached >= FLUSH_BYTES:
            self._cached = 0
            self._drop_cache()

    def _drop_cache(self) -> None:
        """Queue dirty pages for writing and drop clean ones.

        Otherwise the cache takes gigabytes of fresh memory, and the last flush waits for all of it.
        """
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Flush the file to disk."""
        os.fsync(self._fd)
        self._drop_cache()
