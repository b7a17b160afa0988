"""Put a finished folder in place, whole or not at all.

The output is staged in a hidden folder beside the target. `renameat2(RENAME_EXCHANGE)` swaps the two in one step
(Linux 3.15; macOS has `renamex_np`); so whoever looks, also after a kill -9, sees the old folder or the new one.
Some file systems cannot (NFS): there the old folder is moved aside, and put back by the next merge after a kill.
A lock on the staging folder, which dies with its process, tells a merge that runs from the leftovers of one that died.
"""
import ctypes
import errno
import fcntl
import glob
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from merger import MergeError, show
from merger.companions import holds, is_folder, missing_companions

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # linux/fs.h
RENAME_SWAP = 2  # macOS stdio.h
# These end the name of a folder that makes room, until it is removed: one that was moved aside before the new one came,
# and one that changed places with it.
ASIDE, REPLACED = ".old", ".replaced"


class Staging:
    """A hidden folder beside `target` that becomes `target` on `publish`, and vanishes otherwise.

    Raises:
        MergeError: the parent cannot be written to, or another merge into the target runs.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target))  # a link keeps pointing at the folder that is replaced
        # In containers that share a disk the same process number comes again and again.
        self.folder = self.target.with_name(f"{_prefix(self.target)}{os.getpid()}.{os.urandom(4).hex()}")
        self._locks: list[int] = []
        self._parents: list[Path] = []

    def __enter__(self) -> "Staging":
        if self.target.is_dir() and not os.access(self.target, os.W_OK):  # its mode becomes the new folder's
            raise MergeError(
                f"cannot write in {self.target}: {os.strerror(errno.EACCES)}; mend its permissions or choose "
                "another --save-dir")
        try:
            self._parents = [parent for parent in self.target.parents if not parent.exists()]
            self.target.parent.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(self.target)
            while not self._claim():
                pass
            if self.target.is_dir():
                _copy_owner(self.target, self.folder)
                shutil.copymode(self.target, self.folder)  # after the owner, whose change clears bits of the mode
        except BaseException as error:
            self.__exit__()
            if not isinstance(error, OSError):
                raise
            raise MergeError(
                f"cannot write in {self.target.parent}: {error.strerror}; choose another --save-dir") from error
        return self

    def _claim(self) -> bool:
        """Make and lock the folder; False where a merge that starts beside this one took it for a leftover meanwhile."""
        os.mkdir(self.folder)
        lock = os.open(self.folder, os.O_RDONLY)
        if _lock(lock) is not False and self.folder.exists() and os.path.samestat(os.fstat(lock), self.folder.stat()):
            self._locks.append(lock)
            return True
        os.close(lock)
        shutil.rmtree(self.folder, ignore_errors=True)
        return False

    def __exit__(self, *_: object) -> None:
        try:
            for ending in (ASIDE, REPLACED):
                _retire(_ending(self.folder, ending), self.target)
            _remove(self.folder)
            for parent in self._parents:
                with suppress(OSError):  # it holds something: the target, where that was published
                    parent.rmdir()
        finally:
            for lock in self._locks:
                os.close(lock)

    def publish(self) -> None:
        """Make the staged folder the target, in one step where the system can, and flush that to disk."""
        sync_folder(self.folder)
        if self.target.is_dir():
            self._locks.append(os.open(self.target, os.O_RDONLY))
            _lock(self._locks[-1])  # a merge that starts now shall not take what is put aside for a leftover
            replace(self.folder, self.target)
        else:
            os.rename(self.folder, self.target)
        _sync_directory(self.target.parent)


def restore(target: Path) -> None:
    """Put `target` back where a merge died after moving it aside; for file systems that cannot exchange two folders."""
    target = Path(os.path.realpath(target))
    for path in _leftovers(target):
        if path.name.endswith(ASIDE) and not target.exists():
            with _locked(path) as locked:
                if locked is not False:  # where a merge without locks runs after all, it fails, and nothing is lost
                    os.rename(path, target)
                    show.say(f"put {target} back, which a merge that died had moved aside")


def _copy_owner(source: Path, place: Path) -> None:
    """Give `place` the owner and group of `source`, or the group alone, as far as this process may."""
    stat = source.stat()
    for owner in (stat.st_uid, -1):
        with suppress(OSError):  # some file systems and user namespaces refuse it as no lack of permission
            return os.chown(place, owner, stat.st_gid)


def _ending(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


def _prefix(target: Path) -> str:
    return f".{target.name}.merging-"


def _leftovers(target: Path) -> list[Path]:
    return sorted(path for path in target.parent.glob(f"{glob.escape(_prefix(target))}*") if path.is_dir())


def _clear_leftovers(target: Path) -> None:
    """Remove staging folders of merges that died; refuse where one lives."""
    restore(target)
    for path in _leftovers(target):
        try:
            with _locked(path) as locked:
                if locked is False:
                    process = path.name.removeprefix(_prefix(target)).partition(".")[0]
                    raise MergeError(f"another merge is writing {target} (process {process}); "
                                     "wait for it or choose another --save-dir")
                if path.name.endswith((ASIDE, REPLACED)):
                    _retire(path, target)
                elif locked:
                    _remove(path)
                else:
                    show.say(f"left {path}: this file system does not tell whether a merge still writes there; "
                             "remove it if none does")
        except FileNotFoundError:  # its merge has just ended
            continue


def _retire(aside: Path, target: Path) -> None:
    """Remove the folder that `target` replaced; what appeared in it while the merge ran moves to `target`."""
    if not os.path.isdir(aside) or not os.path.isdir(target):
        return
    try:
        for path, place in missing_companions(aside, target):
            os.rename(path, place)
    except OSError as error:
        show.say(f"left {aside}: {error.filename} came there while the merge ran and cannot be moved to {target} "
                 f"({error.strerror}); move it and remove the folder")
        return
    _remove(aside)


def _remove(folder: Path) -> None:
    """Remove `folder` with read-only folders in it, or say that it stays."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.isdir(folder):
        _make_writable(folder)
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.isdir(folder):
        show.say(f"left {folder}: something in it cannot be removed; mend the permissions and remove it")


def _make_writable(folder: Path) -> None:
    with suppress(OSError):  # another user's
        folder.chmod(0o700)
        for path in folder.iterdir():
            if is_folder(path):
                _make_writable(path)


def check_target(target: Path, sources: Sequence[Path]) -> None:
    """Refuse a target that is no folder, or that holds the checkpoint itself.

    Raises:
        MergeError: naming it.
    """
    if target.exists() and not target.is_dir():
        raise MergeError(f"--save-dir {target} is a file; name a folder")
    for source in sources:
        if holds(target, source):
            raise MergeError(
                f"--save-dir {target} holds the checkpoint itself; name a folder for the merged model, such "
                f"as {source / 'huggingface'}")


def check_replaceable(target: Path) -> None:
    """Refuse a target that another folder cannot take the place of.

    Raises:
        MergeError: it is a mount point or has one in it, or this process runs in it.
    """
    real = Path(os.path.realpath(target))
    for point in _mounts(real):
        if point == real:
            raise MergeError(f"--save-dir {target} is a mount point, which cannot be replaced in one step; "
                             "name a folder inside it")
        raise MergeError(f"--save-dir {target} has the mount point {point} in it, which cannot move to another folder; "
                         "unmount it or choose another --save-dir")
    with suppress(FileNotFoundError):  # the current folder is gone already
        if holds(target, Path.cwd()):
            raise MergeError(f"--save-dir {target} holds the current folder, which would be replaced by another; "
                             "change to a folder outside it first")


def _mounts(folder: Path) -> list[Path]:
    """Return the mount points at and below `folder`, in order."""
    try:
        table = Path("/proc/self/mountinfo").read_bytes()  # knows bind mounts too; see proc_pid_mountinfo(5)
    except OSError:  # macOS
        found = [folder, *(Path(parent, name) for parent, names, _ in os.walk(folder) for name in names)]
        return sorted(path for path in found if os.path.ismount(path))
    names = [line.split()[4] for line in table.splitlines()]
    points = [
        Path(os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), name))) for name in names
    ]
    return sorted(point for point in points if point == folder or folder in point.parents)


def _lock(fd: int) -> bool | None:
    """Lock a folder; return False where another process holds it, None where the file system does not tell.

    NFS does not: it locks only what is open for writing, which a folder never is (flock(2)).
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(fd)
    finally:
        os.close(fd)


def replace(staging: Path, target: Path) -> None:
    """Make `staging` the target, and put the target beside it.

    Raises:
        OSError: `staging` and `target` are as they were.
    """
    if exchange(staging, target):
        os.rename(staging, _ending(staging, REPLACED))
        return
    aside = _ending(staging, ASIDE)
    try:
        os.rename(target, aside)
        os.rename(staging, target)  # a process killed just here leaves no target; see `restore`
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise


def exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; return False where the system cannot.

    Raises:
        OSError: the swap failed; both folders are as they were.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            code = libc.renamex_np(os.fsencode(a), os.fsencode(b), RENAME_SWAP)
        else:
            code = libc.renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE)
    except (AttributeError, OSError):  # an older C library
        return False
    if code == 0:
        return True
    fault = ctypes.get_errno()
    if fault in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(fault, os.strerror(fault), str(b))


def sync_folder(folder: Path) -> None:
    """Flush the folder's files and the folder itself to disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_directory(path)
        elif path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        return  # some network file systems refuse to sync a folder
    finally:
        os.close(fd)
