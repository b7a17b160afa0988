"""Which environment is meant, and where its source, data and variables are."""
from __future__ import annotations

from pathlib import Path

from tasks.lib.engine.sources import GYM, choose_sources, is_url
from tasks.lib.environments.rows import Environment, environment, environments
from tasks.lib.errors import UserError
from tasks.lib.settings import ROOT, SETTINGS, effective_environment, resolve

# Of the caller's shell, for other programs: they would hide an environment's own packages.
CALLERS = {"PYTHONHOME", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONSTARTUP"}


def rows_path() -> Path:
    """Return the file with the rows: environments.toml, unless ENVIRONMENTS names another."""
    return ROOT / resolve("ENVIRONMENTS")


def find_row(name: str) -> Environment:
    """Return the row called `name`, or `$ENV` where it is empty.

    Raises:
        UserError: there is none, with near names; or the rows do not fit.
    """
    return environment(resolve("ENV", name), rows_path())


def all_rows() -> dict[str, Environment]:
    """Return every row.

    Raises:
        UserError: the rows do not fit.
    """
    return environments(rows_path())


def server_environment(row: Environment) -> dict[str, str]:
    """Return the environment of the row's server: without secrets of ours, keys of other rows and Python's own variables.

    Raises:
        UserError: the rows do not fit.
    """
    own = {key.name for key in row.keys}
    secret = {name for name, setting in SETTINGS.items() if setting.secret}
    secret |= {key.name for other in environments(rows_path()).values() for key in other.keys if not key.public}
    return {
        name: value
        for name, value in effective_environment().items() if name in own or name not in secret | CALLERS
    }


def key_names() -> set[str]:
    """Return the variables that the environments ask for; none where their rows cannot be read."""
    try:
        return {key.name for row in all_rows().values() for key in row.keys}
    except UserError:
        return set()


def data_folder(row: Environment) -> Path:
    """Return the folder for the row's data."""
    return ROOT / "data" / row.name


def gym_source() -> str:
    """Return AgentGym's folder, or its pinned URL where no checkout is near.

    Raises:
        UserError: the setting names something else.
    """
    return choose_sources(ROOT, effective_environment()).get(GYM) or resolve(GYM)


def local_source(row: Environment) -> Path:
    """Return the folder that the row's package folder lies in, on this machine.

    Raises:
        UserError: AgentGym is known by URL only.
    """
    if row.source == "project":
        return ROOT
    source = gym_source()
    if is_url(source):
        raise UserError("--runner local needs an AgentGym checkout; set AGENTGYM_SRC to its folder")
    return Path(source)
