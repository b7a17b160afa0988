"""What may have been written by others: the one gate that files, JSON and fields pass before they are used.

A run's folder may come from a colleague, half copied, or from another version. One that is odd is refused in a line; it
neither hangs who asks, nor fills the memory, nor hides the other runs.
"""
from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training.text import shown

LARGEST_FILE = 16 << 20  # bytes of a record; Hydra's resolved configuration, the largest thing in one, has 50 kB
LARGEST_LIST = 256 << 20  # of a list of items, and of a rank's trajectories
LARGEST_LINES = 128 << 20  # of a file with a record a line; a step's figures have 2 kB
LARGEST_LINE = 1 << 20
# With which a file of a run's folder is opened to be written: never through a link, by which whoever handed the folder on
# would have us write elsewhere, and without waiting for the other end of a pipe.
WRITE = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
DEPTH = 100
DIGITS = 300  # of an integer: one that a float can hold
VALUES = 2_000_000  # in one document, by its marks; a value of three bytes may take 200 in memory


def open_file(path: str | Path) -> int:
    """Return a descriptor to read a regular file with.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is a pipe, which would hang, a device, which may never end, or a folder.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is no regular file")
    return handle


def read_bytes(path: str | Path, limit: int = LARGEST_FILE) -> bytes:
    """Return what a file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, or has more than `limit` bytes; in one line.
    """
    with open(open_file(path), "rb") as file:
        data = b"" if os.fstat(file.fileno()).st_size > limit else file.read(limit + 1)
        if len(data) > limit or os.fstat(file.fileno()).st_size > limit:
            raise ValueError(f"{path} has more than {limit >> 20} MiB")
    return data


def loads(data: bytes | str, nonfinite: bool = False) -> Any:
    """Return the JSON value in `data`.

    Args:
        nonfinite: let `NaN` and `Infinity` pass, which figures may be.

    Raises:
        ValueError: it is none, in one line; or deeper than DEPTH, has more than VALUES values, a key twice, a number of
            more than DIGITS digits, or one that is none.
    """
    text = data if isinstance(data, str) else data.decode("utf-8-sig")
    if len(text) > VALUES and sum(map(text.count, "[{,:")) > VALUES:
        raise ValueError(f"more than {VALUES} values")

    def constant(word: str) -> float:
        if not nonfinite:
            raise ValueError(f"the number {word}")
        return float(word)

    def fraction(word: str) -> float:
        return value if math.isfinite(value := float(word)) else constant(word[:40])

    try:
        value = json.loads(text,
                           object_pairs_hook=_once,
                           parse_int=_integer,
                           parse_float=fraction,
                           parse_constant=constant)
    except RecursionError:
        raise ValueError(f"more than {DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    level = [value]
    for _ in range(DEPTH + 1):
        level = [one for one in level if isinstance(one, (list, dict))]
        if not level:
            return value
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    raise ValueError(f"more than {DEPTH} levels")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key that is there twice")
    return found


def _integer(word: str) -> int:
    if len(word) > DIGITS:
        raise ValueError(f"a number of {len(word)} digits")
    return int(word)


def read_json(path: str | Path, limit: int = LARGEST_FILE, nonfinite: bool = False) -> Any:
    """Return the JSON value in a file.

    Args:
        nonfinite: let `NaN` and `Infinity` pass, which configurations have.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file, too large, or none that `loads` reads; in one line.
    """
    data = read_bytes(path, limit)
    try:
        return loads(data, nonfinite)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no JSON (no UTF-8)") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON that is read ({error})") from None


def read_object(path: str | Path, limit: int = LARGEST_FILE, nonfinite: bool = False) -> dict[str, Any]:
    """Return the JSON object in `path`; see `read_json`.

    Raises:
        ValueError: it is another value, too.
    """
    found = read_json(path, limit, nonfinite)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def read_lines(path: str | Path, last_bytes: int = LARGEST_LINES) -> list[dict[str, Any]]:
    """Return the JSON objects in the last bytes of a file with one a line; [] where there is no such file.

    A line that is no object is left out: the last one may be half written, and a crash leaves others.
    """
    try:
        handle = open_file(path)
    except (FileNotFoundError, ValueError):
        return []
    found = []
    with open(handle, "rb") as file:
        end = os.fstat(handle).st_size
        start = max(0, end - last_bytes)
        file.seek(start)
        whole = not start  # else the first line began before
        while file.tell() < end and (line := file.readline(LARGEST_LINE)):
            ends = line.endswith(b"\n")
            if whole and (ends or len(line) < LARGEST_LINE):
                try:
                    value = loads(line, nonfinite=True)
                except ValueError:
                    value = None
                if isinstance(value, dict):
                    found.append(value)
            whole = ends
    return found


Kind = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """Tell whether a field is text."""
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Tell whether a field is a number of steps, sessions, processes, bytes."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def is_every(value: Any) -> bool:
    """Tell whether a field is every how many steps something is done; -1 is never."""
    return is_count(value) or (type(value) is int and value == -1)


def is_number(value: Any) -> bool:
    """Tell whether a field is a time or a duration in seconds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e11


def is_table(value: Any) -> bool:
    """Tell whether a field is a table."""
    return isinstance(value, dict)


WORDS = {
    is_text: "no text",
    is_count: "no whole number from 0 on",
    is_every: "no number of steps",
    is_number: "no time",
    is_table: "no table"
}


def misfit(value: Any, kind: Any, where: str = "") -> str:
    """Return in a clause what of `value` is not of its kind; "" where all is. What is not there, or null, fits.

    Args:
        kind: one of the `is_…`; a table of kinds by key, for a table; a list of one kind, for a list of such.
        where: the keys on the way to it.
    """
    if value is None:
        return ""
    if isinstance(kind, Mapping):
        if not isinstance(value, dict):
            return f"{where} is no table"
        parts = ((value.get(key), inner, f"{where}.{key}".lstrip(".")) for key, inner in kind.items())
    elif isinstance(kind, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        if None in value:
            return f"{where}[{value.index(None)}] is null"
        parts = ((one, kind[0], f"{where}[{number}]") for number, one in enumerate(value))
    else:
        return "" if kind(value) else f"{where} is {shown(repr(value)[:60])}, {WORDS[kind]}"
    return next((fault for part in parts if (fault := misfit(*part))), "")
