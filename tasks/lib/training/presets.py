"""Presets: tables of the trainer's keys, of training.toml or of a file of the user's own."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import environment_rows
from tasks.lib.errors import UserError
from tasks.lib.settings import ROOT
from tasks.lib.training.overrides import Override, flat, layer, make

FILE = ROOT / "training.toml"
KINDS = ("fixed", "scaling")
COMMON = "common"


def _read(path: Path, shown: str) -> dict[str, Any]:
    try:
        return environment_rows.read_toml(path)
    except OSError as error:
        raise UserError(
            f"{shown}: {error.strerror}; give a TOML file such as training.toml's tables, or fixed or scaling"
        ) from None
    except ValueError as error:
        raise UserError(f"{shown}: no TOML: {error}") from None


def overrides(table: Mapping[str, Any], origin: str) -> list[Override]:
    """Return the overrides of a table; its `source` is for readers.

    Raises:
        UserError: it has a value that no override can hold.
    """
    found = []
    for key, value in flat({name: one for name, one in table.items() if name != "source"}).items():
        if not isinstance(value, str | int | float | list | dict):
            raise UserError(f"{origin}: {key} = {value} is no number, text or list")
        found.append(make(key, value))
    return found


def environments(path: Path = FILE) -> dict[str, tuple[str, ...]]:
    """Return which presets there are: environment to fixed, scaling or both."""
    return {name: tuple(table) for name, table in _read(path, path.name).items() if name != COMMON}


def built_in(environment: str, kind: str, path: Path = FILE) -> list[Override]:
    """Return the preset `kind` (fixed or scaling) of an environment, over what all of them share.

    Raises:
        UserError: there is none.
    """
    tables = _read(path, path.name)
    table = tables.get(environment, {}).get(kind) if environment != COMMON else None
    if table is None:
        there = ", ".join(name for name in tables if name != COMMON)
        raise UserError(
            f"{path.name} has no preset {kind} for {environment} (it has {there}); give all keys with --preset FILE, "
            "or take a script with --script")
    return layer(overrides(tables[COMMON], path.name), overrides(table, path.name))


def common(path: Path = FILE) -> list[Override]:
    """Return what all presets share."""
    return overrides(_read(path, path.name)[COMMON], path.name)


def from_file(path: Path) -> list[Override]:
    """Return the overrides of a preset file of the user's own.

    Raises:
        UserError: it cannot be read, or holds what is no override.
    """
    shown = f"--preset {path}"
    return overrides(_read(path, shown), shown)
