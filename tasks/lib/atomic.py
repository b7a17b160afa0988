"""Files that are whole or as before, and nobody else's to read: what the tasks note in .run."""
import os
from pathlib import Path
from uuid import uuid4

from tasks.lib.settings import ROOT

RUN = ROOT / ".run"
FOLDER, FILE = 0o700, 0o600


def make_private(folder: Path) -> Path:
    """Make `folder` and what is missing above it, for their owner only, and close all of .run above; return `folder`."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(FOLDER, exist_ok=True)
    for place in (folder, *folder.parents):
        if place.is_relative_to(RUN) and place.stat().st_mode & 0o077:  # from an earlier version, or a looser mask
            place.chmod(FOLDER)
    return folder


def open_private(path: Path, flags: int = os.O_WRONLY | os.O_CREAT | os.O_TRUNC) -> int:
    """Open a file that only its owner can read, and return the descriptor; its folder is made as by `make_private`."""
    make_private(path.parent)
    descriptor = os.open(path, flags, FILE)
    if os.fstat(descriptor).st_mode & 0o077:
        os.fchmod(descriptor, FILE)
    return descriptor


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, at once: whoever reads it finds the one before or this one."""
    new = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(open_private(new), "w") as file:
            file.write(text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def close_to_others(folder: Path) -> None:
    """Take from others what `folder` was copied with; links are left as they are."""
    for place, folders, files in os.walk(folder):
        for path in (Path(place), *(Path(place) / name for name in (*folders, *files))):
            if not path.is_symlink():
                path.chmod(path.stat().st_mode & 0o700)
