"""Which Compose files and variables a command gets."""
from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tasks.lib.engine.ownership import project_name
from tasks.lib.settings import SETTINGS

OVERRIDES = ("compose.override.yml", "compose.override.yaml", "docker-compose.override.yml",
             "docker-compose.override.yaml")


def compose_files(root: Path, cpu: bool) -> list[Path]:
    """Return the Compose files to pass: the project's, the CPU override, and the user's own override last.

    Naming any file makes Compose forget the override, hence the third; of several names Compose takes the first.
    """
    files = [root / "docker-compose.yml"]
    if cpu:
        files.append(root / "docker-compose.cpu.yml")
    own = next((root / name for name in OVERRIDES if (root / name).is_file()), None)
    return [*files, own] if own else files


def caller_variables(environ: Mapping[str, str], dotenv: Mapping[str, str]) -> dict[str, str]:
    """Return the ids that containers run with and the project's name, as far as the user has not chosen them."""
    given = {**dotenv, **environ}
    ids = {"HOST_UID": str(os.getuid()), "HOST_GID": str(os.getgid()), "COMPOSE_PROJECT_NAME": project_name(given)}
    return {name: value for name, value in ids.items() if not (environ.get(name) or dotenv.get(name))}


def as_read(environ: Mapping[str, str], dotenv: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that `.env` has and the environment has not: as the tasks read them, Compose gets them."""
    return {name: value for name, value in dotenv.items() if name in SETTINGS and name not in environ}


# Other environments' services are in the same project but not in the files at hand; Compose need not say so.
QUIET = {"COMPOSE_IGNORE_ORPHANS": "true"}
