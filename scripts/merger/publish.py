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
from merger.discover import RANK_FILE, check_link

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # linux/fs.h
RENAME_SWAP = 2  # macOS stdio.h
RECORD_NAME = "merge.json"
# These end the name of a folder that makes room, until it is removed: one that was moved aside before the new one came,
# and one that changed places with it.
ASIDE, REPLACED = ".old", ".replaced"
# The names that transformers and PEFT load weights by, and those of Mistral's and Llama's own format, which vLLM loads;
# a merge replaces these and leaves every other file alone.
WEIGHT = re.compile(
    r"(model|pytorch_model|tf_model|flax_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin|h5|msgpack)"
    r"(\.index\.json)?|consolidated(-\d+-of-\d+|\.\d+)?\.(safetensors|pth)(\.index\.json)?")
GGUF = ".gguf"  # what somebody made of a model, under any name: neither taken along nor removed


def is_weight(name: str) -> bool:
    """Tell whether a file of a model folder holds weights, or is the index of files that do.

    >>> [is_weight(n) for n in ("model-00001-of-00002.safetensors", "pytorch_model.bin", "tokenizer.json", "merges.txt")]
    [True, True, False, False]
    """
    return WEIGHT.fullmatch(name) is not None


def is_replaced(name: str) -> bool:
    """Tell whether a merge replaces or removes a file of its target: weights, and what says how to load those."""
    return is_weight(name) or name in (RECORD_NAME, "adapter_config.json")


def weights_in(folder: Path) -> list[str]:
    """Return the names of the weight files in `folder`, which may be absent."""
    return sorted(path.name for path in folder.iterdir() if is_weight(path.name)) if folder.is_dir() else []


def check_free(target: Path, force: bool) -> None:
    """Refuse to replace weights unasked.

    Raises:
        MergeError: there are some in `target`, and not `force`.
    """
    present = weights_in(target)
    if present and not force:
        raise MergeError(f"{target} already holds weights ({present[0]}); pass --force to replace them, or another "
                         "--save-dir")


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
        for path, place in _missing_companions(aside, target):
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
            if _is_folder(path):
                _make_writable(path)


def check_target(target: Path, sources: Sequence[Path]) -> None:
    """Refuse a target that is no folder, or that holds the checkpoint itself.

    Raises:
        MergeError: naming it.
    """
    if target.exists() and not target.is_dir():
        raise MergeError(f"--save-dir {target} is a file; name a folder")
    for source in sources:
        if _holds(target, source):
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
        if _holds(target, Path.cwd()):
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


def keep_companions(target: Path, staging: Path) -> None:
    """Take over from `target` what `staging` lacks, but for weights, as hard links: subfolders may be large."""
    if target.is_dir():
        for path, place in _missing_companions(target, staging):
            _link(path, place)


def _missing_companions(old: Path, new: Path) -> Iterator[tuple[Path, Path]]:
    for path in sorted(old.iterdir()):
        if not is_replaced(path.name):
            yield from _missing(path, new / path.name)


def _missing(old: Path, new: Path) -> Iterator[tuple[Path, Path]]:
    """Yield `old` and its place `new` where nothing is there; a folder that is in both places is looked into."""
    if not os.path.lexists(new):
        yield old, new
    elif _is_folder(old) and _is_folder(new):
        for path in sorted(old.iterdir()):
            yield from _missing(path, new / path.name)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _link(source: Path, place: Path) -> None:
    """Make `place` a hard link to `source`; of a folder, a folder with links to its files."""
    if _is_folder(source):
        place.mkdir()
        for path in source.iterdir():
            _link(path, place / path.name)
        shutil.copystat(source, place)
        return
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, place, follow_symlinks=False)


def companions(source: Path, target: Path) -> Iterator[Path]:
    """Yield the files and folders of `source` that a model takes along: config, tokenizer, processor and custom code.

    Weights are not taken, and from beside the ranks' files only other files, and no `.pt`. The target, whose files are
    kept anyway, and folders that hold it are left out.
    """
    if not source.is_dir() or os.path.realpath(source) == os.path.realpath(target):
        return
    found = [
        path for path in sorted(source.iterdir())
        if not path.name.startswith(".") and path.suffix != GGUF and not is_replaced(path.name)
    ]
    if any(RANK_FILE.fullmatch(path.name) for path in found):
        found = [path for path in found if not path.is_dir() and path.suffix != ".pt"]
    for path in found:
        yield from _tree(path, target)


def _tree(path: Path, target: Path) -> Iterator[Path]:
    """Yield `path` and all below it, folders first; but not a link to a folder that it lies in, which has no end.

    Raises:
        MergeError: a link leads nowhere.
    """
    check_link(path)
    if not path.is_dir():
        yield path
    elif path.name != "__pycache__" and not _holds(path, target) and not _holds(path, path.parent):
        yield path
        for below in sorted(path.iterdir()):
            yield from _tree(below, target)


def _holds(folder: Path, path: Path) -> bool:
    """Tell whether `path` is `folder` or lies in it, links followed."""
    inner, outer = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return inner == outer or outer in inner.parents


def copy_companions(source: Path, staging: Path, target: Path) -> None:
    """Copy the companions of a model that goes to `target` from `source` to `staging`, an empty folder, byte for byte.

    Links are followed (hub snapshots are made of them); modes stay.
    """
    pairs = [(path, staging / path.relative_to(source)) for path in companions(source, target)]
    for path, place in pairs:
        if path.is_dir():
            place.mkdir()
        else:
            shutil.copyfile(path, place)
    for path, place in reversed(pairs):  # a folder's mode may forbid to write in it
        shutil.copystat(path, place)


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to a new file at `path`; a hard link there is replaced, never written through."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
