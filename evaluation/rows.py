"""The rows of environments.toml, as far as playing the environments needs them; environment_rows/ says what they are."""
import os
from pathlib import Path
from typing import Any

import environment_rows
from environment_rows import Protocol, Row, Success
from evaluation.problems import Misuse

__all__ = [
    "BESIDE", "RESULTS_DEPEND_ON", "Protocol", "Row", "Success", "read_row", "results_depend_on", "rows_file", "tables"
]

# In a checkout and in the image the project's own file; where the package is installed, its copy.
BESIDE = Path(__file__).resolve().parents[1] / "environments.toml"
if not BESIDE.is_file():
    BESIDE = Path(environment_rows.__file__).with_name("environments.toml")

# What a run's configuration has of a row.
RESULTS_DEPEND_ON = {"action", "reward_range", "protocol", "success"}


def results_depend_on(row: Row) -> dict[str, Any]:
    """Return what a run's configuration has of `row`, as JSON."""
    return {key: value for key, value in row.to_json().items() if key in RESULTS_DEPEND_ON}


def rows_file(flag: str = "") -> Path:
    """Return the file with the rows: --environments, $ENVIRONMENTS, the current folder's, the one beside us."""
    for name in (flag, os.environ.get("ENVIRONMENTS", "")):
        if name:
            path = Path(name)
            return path if path.exists() or path.is_absolute() else BESIDE.parent / path
    here = Path("environments.toml")
    return here if here.exists() else BESIDE


def tables(path: Path) -> dict[str, Any]:
    """Return the file's tables, a row each, by name.

    Raises:
        Misuse: it cannot be read.
    """
    try:
        return environment_rows.read_toml(path)
    except OSError as error:
        raise Misuse(f"no rows in {path}: {error.strerror}; name the file with --environments") from None
    except ValueError as error:
        raise Misuse(f"{path}: {error}") from None


def read_row(name: str, path: Path) -> Row:
    """Return the row called `name` of the file `path`.

    Raises:
        Misuse: no such file or row, or one that does not fit.
    """
    known = tables(path)
    # AgentGym's item lists say lmrlgym_maze where the row is called maze.
    name = name if name in known else name.removeprefix("lmrlgym_")
    if name not in known:
        raise Misuse(f"no environment {name!r} in {path.name}; {environment_rows.near(name, known)}")
    try:
        return environment_rows.row(name, known[name])
    except environment_rows.Misfit as error:
        raise Misuse(f"{path.name}: {error}") from None
