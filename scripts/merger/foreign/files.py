"""Foreign files: regular ones only, and at every use the same as when they were first looked at.

A training that goes on may replace a file, or a whole step, while a merge reads it. Each file is known by device,
inode, size and times of change, taken from the descriptor that is read, or before; what differs later is refused.
"""
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from merger import MergeError

# Two writes within one tick of the kernel's clock leave the same times: a file is read when its last is older.
TICK = 50_000_000  # ns
HUB_REPOSITORY = ("models--", "datasets--", "spaces--")  # a cache's folders: huggingface_hub/file_download.py
LFS_POINTER = b"version https://git-lfs.github.com/"


def lfs_pointer(head: bytes) -> str:
    """Return what a file is that begins with `head`, and the remedy, where Git LFS left a pointer in its place; else nothing."""
    return "is a pointer of Git LFS, not the file; fetch it with `git lfs pull`" if head.startswith(LFS_POINTER) else ""


class Identity(NamedTuple):
    """What tells a file, and a state of it, from all others; times in ns since 1970."""
    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Identity":
        """Return the identity that a stat found."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def kind_of(mode: int) -> str:
    """Return what a file's mode says that it is.

    >>> kind_of(stat.S_IFIFO), kind_of(stat.S_IFREG | 0o644)
    ('a pipe', 'a file')
    """
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def check_regular(path: Path, found: os.stat_result) -> None:
    """Refuse what is no regular file: a pipe would be waited for, a device has no end.

    Raises:
        MergeError: naming it.
    """
    if not stat.S_ISREG(found.st_mode):
        raise MergeError(f"{path} is {kind_of(found.st_mode)}, not a file; put the file there")


class Seen:
    """The foreign files of one run, each with its identity when it was first looked at."""

    def __init__(self) -> None:
        self._known: dict[str, Identity] = {}
        self._used: dict[str, Path] = {}

    def survey(self, paths: Iterable[Path]) -> None:
        """Note what the files are now, before any is read, so that what comes later is known as such."""
        for path in paths:
            try:
                self._known.setdefault(os.path.abspath(path), Identity.of(os.stat(path)))
            except OSError:  # whoever reads it says so
                continue

    def identity(self, path: Path) -> Identity:
        """Return what `path` is, or was when it was first looked at.

        Raises:
            OSError: it is not there.
        """
        key = os.path.abspath(path)
        if key not in self._known:
            self._known[key] = Identity.of(os.stat(path))
        return self._known[key]

    def open(self, path: Path) -> int:
        """Return a descriptor to read `path` with.

        Raises:
            MergeError: it is no regular file, or another than it was.
            OSError: it is not there, or may not be read.
        """
        key = os.path.abspath(path)
        try:
            check_regular(path, os.stat(path))
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe that came since is not waited for
        except FileNotFoundError:
            if key in self._known:
                raise changed(path) from None
            raise
        try:
            found = os.fstat(fd)
            check_regular(path, found)
            if 0 <= time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < TICK:
                time.sleep(TICK / 1e9)
                found = os.fstat(fd)
            self._known.setdefault(key, Identity.of(found))
            self._used[key] = path
            self.compare(path, fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def compare(self, path: Path, fd: int) -> None:
        """Raise a `MergeError` unless the open file `fd` is what `path` was."""
        if Identity.of(os.fstat(fd)) != self._known[os.path.abspath(path)]:
            raise changed(path)

    def use(self, path: Path) -> None:
        """Note that another process read `path`, and compared it."""
        self.identity(path)
        self._used[os.path.abspath(path)] = path

    def read(self, path: Path, limit: int) -> bytes:
        """Return the bytes of a file of at most `limit` bytes.

        Raises:
            MergeError: it is no regular file, larger, or not what it was.
            OSError: it is not there, or may not be read.
        """
        with self.descriptor(path) as fd:
            size = os.fstat(fd).st_size
            if size > limit:
                raise MergeError(f"{path} has {size} bytes, more than the {limit} that such a file may have")
            data = b"".join(iter(lambda: os.read(fd, min(1 << 20, limit + 1)), b""))
            self.compare(path, fd)
            return data

    @contextmanager
    def descriptor(self, path: Path) -> Iterator[int]:
        """Open `path` for reading while the block runs."""
        fd = self.open(path)
        try:
            yield fd
        finally:
            os.close(fd)

    def linked(self, path: Path) -> None:
        """Note that we made one more link to `path`, which changes its inode's time and nothing else."""
        key = os.path.abspath(path)
        if key in self._known:
            now = Identity.of(os.stat(path))
            if now[:4] != self._known[key][:4]:
                raise changed(path)
            self._known[key] = now

    def check(self) -> None:
        """Look at all that was read once more.

        Raises:
            MergeError: naming a file that is not what it was when it was read.
        """
        for key, path in self._used.items():
            try:
                now = Identity.of(os.stat(path))
            except OSError:
                raise changed(path) from None
            if now != self._known[key]:
                raise changed(path)


def changed(path: Path) -> MergeError:
    """Return the refusal of a file that is no longer what it was."""
    return MergeError(f"{path} changed while it was read; merge when nothing writes there any more")


def check_link(path: Path) -> None:
    """Refuse a link that leads nowhere, such as that of a hub snapshot that was copied without its blobs.

    Raises:
        MergeError: naming it.
    """
    if path.is_symlink() and not path.exists():
        raise MergeError(f"{path} is a link to {os.readlink(path)}, which is not there; mend or remove the link")


def check_inside(path: Path, roots: Iterable[Path]) -> None:
    """Refuse a file that is read through a link out of `roots`: what a foreign folder names is not theirs to publish.

    A link may lead into one of the `roots`, or to a blob of a Hub cache, which snapshots are made of.

    Raises:
        MergeError: naming the link and where it leads; it leads nowhere; or it is neither file nor folder.
    """
    check_link(path)
    real = Path(os.path.realpath(path))
    if not real.is_dir():
        check_regular(path, os.stat(path))
    if any(root == real or root in real.parents for root in map(Path, map(os.path.realpath, roots))):
        return
    if not _is_hub_blob(real):
        raise MergeError(f"{path} leads out of its folder, to {real}; put a copy there, if it shall be read")


def _is_hub_blob(real: Path) -> bool:
    """Return True if a resolved path lies where a Hub cache keeps contents: models--…/blobs/HASH, or a snapshot."""
    parts = real.parts
    return any(
        part.startswith(HUB_REPOSITORY) and parts[i + 1] in ("blobs", "snapshots")
        for i, part in enumerate(parts[:-2]))  # yapf: disable
