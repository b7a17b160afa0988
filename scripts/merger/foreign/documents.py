"""Foreign JSON: of limited size, depth and numbers; no key twice, no lone surrogates, no NaN.

https://www.rfc-editor.org/rfc/rfc8259 leaves all of these to the reader, and Python's reader takes them.
"""
import json
import math
from pathlib import Path
from typing import Any

from merger import MergeError
from merger.foreign.files import Seen, lfs_pointer
from merger.foreign.limits import allow
from merger.foreign.text import printable

MAX_BYTES = 16 << 20  # of a config or a record
MAX_DEPTH = 64
MAX_VALUES = 2_000_000  # in one document, by its marks; a value of three bytes may take 200 in memory
MAX_LOADED_BYTES = 64 << 20  # of a vocabulary; the largest known has 33 MB
MAX_LOADED_VALUES = 8_000_000  # in one: half a million merges of two words each are two million
MAX_DIGITS = 64  # tokenizers write 1e30 as an integer


def read_json(path: Path, seen: Seen, limit: int = MAX_BYTES, nonfinite: bool = False) -> Any:
    """Return the JSON document in `path`.

    Args:
        limit: bytes that the file may have.
        nonfinite: let `Infinity` and `NaN` pass, which transformers writes into the configs of some models.

    Raises:
        MergeError: it is none, or goes beyond a limit.
        OSError: it is not there, or may not be read.
    """
    try:
        return parse(seen.read(path, limit), nonfinite)
    except ValueError as error:
        text = str(error)
        raise MergeError(text if str(path) in text else f"cannot read {path}: {text}") from None


def read_object(path: Path, seen: Seen, limit: int = MAX_BYTES, nonfinite: bool = False) -> dict[str, Any]:
    """Return the JSON object in `path`; see `read_json`.

    Raises:
        MergeError: it is another document, too.
    """
    found = read_json(path, seen, limit, nonfinite)
    if not isinstance(found, dict):
        raise MergeError(f"{path} holds a {type(found).__name__}, not a JSON object")
    return found


def check_loadable(path: Path, seen: Seen) -> None:
    """Refuse a file from which transformers, or tokenizers, would take no JSON object: they are less strict than `parse`.

    To be called where `limits` hold, which it sets for itself.

    Raises:
        MergeError: it is none, or goes beyond a limit.
        OSError: it is not there, or may not be read.
    """
    data = seen.read(path, MAX_LOADED_BYTES)
    if pointer := lfs_pointer(data):
        raise MergeError(f"{path} {pointer}")
    allow(len(data))
    try:
        text = data.decode()
        if len(text) > MAX_LOADED_VALUES and sum(map(text.count, "[{,:")) > MAX_LOADED_VALUES:
            raise ValueError(f"more than {MAX_LOADED_VALUES} values")
        document = json.loads(text)
        _check(document, False)
    except UnicodeDecodeError as error:
        raise MergeError(f"{path} is no UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise MergeError(f"{path} is nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise MergeError(f"{path} is no JSON that can be loaded ({error})") from None
    if not isinstance(document, dict):
        raise MergeError(f"{path} holds a {type(document).__name__}, not a JSON object")


def parse(data: bytes, nonfinite: bool = False) -> Any:
    """Return the document that `data` holds, in UTF-8.

    Raises:
        ValueError: in one line, why it is refused.
    """

    if pointer := lfs_pointer(data):
        raise ValueError(f"it {pointer}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for index, name in enumerate(names) if name in set(names[:index]))
            raise ValueError(f"the key {printable(repr(twice), 80)} is there twice")
        return found

    def whole(text: str) -> int:
        if len(text) > MAX_DIGITS:
            raise ValueError(f"a number of {len(text)} digits")
        return int(text)

    def fraction(text: str) -> float:
        if math.isinf(value := float(text)):
            raise ValueError(f"the number {text:.40}, which is none")
        return value

    def constant(text: str) -> float:
        if not nonfinite:
            raise ValueError(f"the number {text}")
        return float(text)

    try:
        text = data.decode("utf-8-sig")
        if len(text) > MAX_VALUES and sum(map(text.count, "[{,:")) > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        document = json.loads(text,
                              object_pairs_hook=unique,
                              parse_int=whole,
                              parse_float=fraction,
                              parse_constant=constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} at line {error.lineno}, column {error.colno})") from None
    _check(document, "\\u" in text)
    return document


def _check(document: Any, escapes: bool) -> None:
    """Raise a `ValueError` where `document` is nested too deeply, or a string of it is no text."""
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [
            part for value in level if isinstance(value, (dict, list))
            for part in ((*value, *value.values()) if isinstance(value, dict) else value)
        ]
        if escapes and any(isinstance(part, str) and not _is_text(part) for part in level):
            raise ValueError("a string with half of a surrogate pair, which is no text")
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
