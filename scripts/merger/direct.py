"""Read and write around the page cache (O_DIRECT, open(2)), where a file lies on a local disk.

Fresh pages of the cache can cost more time than the disk does, and nobody reads a merge's gigabytes from it soon.
O_DIRECT takes whole blocks of the file and of memory only; what does not fit, or is refused, goes through the cache.
"""
import mmap
import os
from pathlib import Path

import numpy as np

PAGE = mmap.PAGESIZE  # at least the block of any disk; the cache and direct writes never share one
FLUSH_BYTES = 64 << 20


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
