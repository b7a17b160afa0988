"""Flags as one table, and the numbers that a user types after them."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from functools import wraps
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any, TypeVar

from invoke.context import Context

from tasks.lib.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MOST = 2_000_000  # poll(2) counts milliseconds in 31 bits
Value = str | bool | tuple[str, ...]
Table = TypeVar("Table", bound="DataclassInstance")


def flag(help: str, default: Value = "", **marks: str | bool) -> Any:
    """Return a field of a table of flags, which is a dataclass: a bool is a switch, a tuple may be typed repeatedly.

    Args:
        help: what `--help` says.
        marks: what else is to be known of the flag, for `marked`.
    """
    return field(default=default, metadata={"help": help, **marks})


def helps(table: type[DataclassInstance]) -> dict[str, str]:
    """Return what `--help` says of each flag, as `@task(help=…)` takes it."""
    return {one.name: one.metadata["help"] for one in fields(table)}


def repeatable(table: type[DataclassInstance]) -> list[str]:
    """Return the flags that may be typed repeatedly, as `@task(iterable=…)` takes them."""
    return [one.name for one in fields(table) if isinstance(one.default, tuple)]


def marked(table: type[DataclassInstance], mark: str) -> dict[str, Any]:
    """Return the flags that have `mark`, each with what it says."""
    return {one.name: one.metadata[mark] for one in fields(table) if mark in one.metadata}


def values(table: DataclassInstance, of: type[DataclassInstance] | None = None) -> dict[str, Value]:
    """Return what was typed, by the flags' names; only the flags of `of` where it is given."""
    return {one.name: getattr(table, one.name) for one in fields(of or table)}


def takes(table: type[Table]) -> Callable[[Callable[[Context, Table], None]], Callable[..., None]]:
    """Give a task the flags of `table`, and hand it the table with what was typed.

    Invoke reads a task's flags out of its signature, so the task gets one.
    """

    def parameter(one: Field[Any]) -> Parameter:
        # Of an iterable, invoke makes a list itself; any other default would be its type.
        return Parameter(one.name,
                         Parameter.KEYWORD_ONLY,
                         default=None if isinstance(one.default, tuple) else one.default)

    def decorate(body: Callable[[Context, Table], None]) -> Callable[..., None]:

        @wraps(body)
        def task(c: Context, /, **typed: Any) -> None:
            body(c, table(**{name: tuple(one) if isinstance(one, list) else one for name, one in typed.items()}))

        first = Parameter("c", Parameter.POSITIONAL_ONLY)
        task.__signature__ = Signature([first, *map(parameter, fields(table))])  # type: ignore[attr-defined]
        return task

    return decorate


def as_words(values: Mapping[str, Value]) -> list[str]:
    """Return the flags that are set, as a program's command line has them."""
    found: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            found += [dashed(name)] if value else []
        else:  # with =, so that a value may begin with a dash
            several = value if isinstance(value, tuple) else filter(None, [value])
            found += [f"{dashed(name)}={one}" for one in several]
    return found


def dashed(name: str) -> str:
    """Return the flag as it is typed."""
    return "--" + name.replace("_", "-")


def whole_number(flag: str, value: str, least: int) -> int:
    """Return the number that the user typed.

    Raises:
        UserError: it is none, below `least`, or above MOST, which no clock of the system takes as seconds.
    """
    if not value.isdecimal() or int(value[:20]) < least:
        raise UserError(f"--{flag} {value} is no whole number of at least {least}")
    if int(value[:20]) > MOST:
        raise UserError(f"--{flag} {value} is more than {MOST}; give less")
    return int(value)


def port_number(name: str, value: str) -> int:
    """Return the port that the user typed.

    Raises:
        UserError: it is none.
    """
    if not value.isdecimal() or not 1 <= int(value[:20]) <= 65535:
        raise UserError(f"{name} {value} is no port; choose one from 1 to 65535")
    return int(value)


def size_bytes(text: str) -> int | None:
    """Return the bytes of a size as Docker writes it, 32g; None for another text."""
    number, unit = text.lower().rstrip("b"), 1
    if number and number[-1] in "kmg":
        unit, number = 1024**(" kmg".index(number[-1])), number[:-1]
    try:
        return int(float(number) * unit)
    except ValueError:
        return None
