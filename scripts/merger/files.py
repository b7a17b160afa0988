"""Write a file, whole or not at all."""
import os
from contextlib import suppress
from pathlib import Path


def atomic_write(path: Path, data: bytes) -> None:
    """Make `path` a file of `data` in one step; a link there is replaced, never written through.

    Raises:
        OSError: `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
