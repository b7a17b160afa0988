"""Delete checkpoints so that a kill at any moment leaves each of them whole or out of sight.

What goes is first renamed, in one step, to a hidden name beside it, and then deleted. What a kill left under such a name
is deleted by the next `finish`.
"""
from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

HIDDEN = re.compile(r"\.pruned-.+-[0-9a-f]{32}")


def hidden(path: Path) -> Path:
    """Return a name for `path` while it is deleted: hidden, beside it, another each time."""
    return path.with_name(f".pruned-{path.name}-{uuid4().hex}")


def finish(folder: Path) -> list[Path]:
    """Delete what an earlier run left half deleted in `folder`; return what cannot be deleted."""
    if not folder.is_dir():
        return []
    for path in folder.iterdir():
        if HIDDEN.fullmatch(path.name):
            _delete(path)
    return [path for path in folder.iterdir() if HIDDEN.fullmatch(path.name)]


def remove(path: Path, check: Callable[[], None] = lambda: None) -> int:
    """Delete a folder or a file; return its bytes.

    Args:
        path: what goes; a link is left alone, whoever made it wants what it leads to.
        check: raises where it must not go after all; called just before.

    Raises:
        OSError: it cannot be renamed; nothing was changed.
    """
    if path.is_symlink():
        raise OSError(0, "is a link; remove it by hand", str(path))
    size = bytes_of(path)
    aside = hidden(path)
    check()
    os.rename(path, aside)
    _delete(aside)
    return size


def optimizer_files(step: Path) -> list[Path]:
    """Return the optimizer's files of a step's folder, the actor's and the critic's."""
    return sorted(step.glob("*/optim_world_size_*_rank_*.pt"))


def remove_optimizer(step: Path, check: Callable[[], None] = lambda: None) -> int:
    """Delete the optimizer's files of a step's folder; return their bytes.

    A step that has lost one of them is whole for its model and for no resume, so they need not go in one step.

    Raises:
        OSError: one cannot be deleted.
    """
    if step.is_symlink():
        raise OSError(0, "is a link; remove it by hand", str(step))
    size = 0
    for path in optimizer_files(step):
        check()
        size += path.lstat().st_size
        path.unlink()
    return size


def bytes_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum(one.lstat().st_size for one in path.rglob("*") if not one.is_dir() or one.is_symlink())


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
