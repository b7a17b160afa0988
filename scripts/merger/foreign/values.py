"""What a foreign pickle or header calls a shape, a name or a mesh: checked before anything is made of it."""
import math
from typing import Any

from merger import MergeError
from merger.foreign.text import printable

MAX_DIMENSIONS = 64  # numpy's; torch writes no more either
LIMIT = 1 << 63  # torch's and safetensors' numbers are signed 64-bit ones
MAX_NAME = 4096


def as_count(value: Any, what: str = "a number") -> int:
    """Return a plain whole number from 0 to 2^63 - 1; a boolean is none.

    Raises:
        MergeError: it is something else.
    """
    if type(value) is not int or not 0 <= value < LIMIT:
        raise MergeError(f"has {shown(value)} for {what}")
    return value


def as_list(value: Any, what: str) -> list[Any]:
    """Return the parts of a list or tuple of at most 64.

    Raises:
        MergeError: it is something else.
    """
    if type(value) not in (tuple, list) or len(value) > MAX_DIMENSIONS:
        raise MergeError(f"has {shown(value)} for {what}")
    return list(value)


def as_shape(value: Any, what: str = "a shape") -> tuple[int, ...]:
    """Return a shape: at most 64 whole numbers, whose product without zeros is below 2^63.

    Raises:
        MergeError: it is something else.
    """
    shape = tuple(as_count(extent, f"an extent of {what}") for extent in as_list(value, what))
    if math.prod(extent for extent in shape if extent) >= LIMIT:
        raise MergeError(f"has {shown(shape)} for {what}, more elements than there can be")
    return shape


def as_name(value: Any) -> str:
    """Return a tensor's name: text that safetensors can hold.

    Raises:
        MergeError: it is something else.
    """
    if type(value) is not str:
        raise MergeError(f"a key of the state dict is a {type(value).__name__}, not a name")
    if value == "__metadata__" or any("\ud800" <= letter <= "\udfff" for letter in value):  # taken, and no UTF-8
        raise MergeError(f"a tensor is named {printable(ascii(value), 80)}, which safetensors cannot hold; rename it")
    if len(value) > MAX_NAME:
        raise MergeError(f"a tensor's name has {len(value)} characters, more than {MAX_NAME}")
    return value


def as_mesh(names: Any, shape: tuple[int, ...], coordinate: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the names of a device mesh's dimensions (none, or one each) and a place on it.

    Raises:
        MergeError: they do not fit `shape`.
    """
    known = [] if names is None else as_list(names, "names of a mesh")
    if known and (len(known) != len(shape) or not all(type(name) is str for name in known)):
        raise MergeError(f"its mesh of shape {shape} has {shown(names)} for names")
    place = as_shape(coordinate, "a place on the mesh")
    if len(place) != len(shape) or not all(c < n for c, n in zip(place, shape, strict=True)):
        raise MergeError(f"its mesh of shape {shape} has no coordinate {place}")
    return tuple(as_name(name) for name in known), place


def shown(value: Any) -> str:
    """Return how a value is named in a message: a short one as it is written, all others by their kind."""
    if type(value) in (bool, float, type(None)) or (type(value) is int and abs(value) < LIMIT):
        return repr(value)
    if type(value) is str:
        return printable(repr(value[:40]), 60)
    if type(value) in (tuple, list):
        return f"a {type(value).__name__} of {len(value)}" if len(value) > 8 else "(" + ", ".join(
            shown(part) if not isinstance(part, (tuple, list)) else f"a {type(part).__name__}" for part in value) + ")"
    return "a number too large" if type(value) is int else f"a {type(value).__name__}"
