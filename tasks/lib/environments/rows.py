"""The file of environments that is in use, and its rows by name; environment_rows/ says what a row is."""
from functools import cache
from pathlib import Path

import environment_rows
from environment_rows import Data, Environment
from tasks.lib.errors import UserError
from tasks.lib.settings import ROOT

__all__ = ["ROWS", "Data", "Environment", "environment", "environments"]

ROWS = ROOT / "environments.toml"


@cache
def environments(path: Path = ROWS) -> dict[str, Environment]:
    """Return every row of `path`.

    Raises:
        UserError: it cannot be read, is no TOML, or a row does not fit; one line.
    """
    try:
        return environment_rows.environments(environment_rows.read_toml(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; ENVIRONMENTS must name a file with rows") from None
    except ValueError as error:
        raise UserError(f"{path.name}: {error}") from None


def environment(name: str, path: Path = ROWS) -> Environment:
    """Return the row called `name`.

    Raises:
        UserError: there is none; the message suggests near names.
    """
    rows = environments(path)
    if name not in rows:
        raise UserError(f"no environment {name!r} in {path.name}; {environment_rows.near(name, rows)}")
    return rows[name]
