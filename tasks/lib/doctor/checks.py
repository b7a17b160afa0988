"""What `invoke doctor` looks at: each check gives one line, with the remedy where something is wrong."""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.lib.engine.client import (
    COMMAND_NOT_FOUND,
    ENGINE_AT_LEAST,
    ENGINE_AT_LEAST_FOR_ENVIRONMENTS,
    ask,
    engine_version,
    has_nvidia_runtime,
)
from tasks.lib.engine.sources import GYM, RL, choose_sources
from tasks.lib.errors import BadSetting, DockerError, UserError
from tasks.lib.redaction import hide_logins
from tasks.lib.settings import FOLDERS, ROOT, SETTINGS, read_dotenv

OK, NOTE, MISSING = "ok", "note", "missing"
DISK_GB = 32
# What may stand in .env and is no setting: Compose's own, and the consent that plain Compose passes on.
NO_SETTINGS = {"COMPOSE_FILE", "COMPOSE_PROFILES", "COMPOSE_IGNORE_ORPHANS", "DOCKER_DEFAULT_PLATFORM", "I_UNDERSTAND"}
FILES = ("docker-compose.yml", "docker-compose.cpu.yml", "docker-compose.gpu-env.yml", "docker/base.Dockerfile",
         "docker/train.Dockerfile", "docker/scripts.Dockerfile", "docker/serve.Dockerfile", "docker/env.Dockerfile",
         "Dockerfile.eval", "environments.toml", "training.toml")


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    Attributes:
        name: what was looked at.
        level: ok, note (fine for some uses) or missing (needed).
        found: what is there.
        remedy: what to do about it; empty where nothing is to be done.
    """
    name: str
    level: str
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the check for `--json`."""
        return asdict(self)


def check_engine(version: str) -> Check:
    """Judge the engine's version, such as 26.1.5."""
    if int(version.split(".")[0]) >= ENGINE_AT_LEAST:
        return Check("engine", OK, version)
    return Check("engine", MISSING, version, f"install Docker Engine {ENGINE_AT_LEAST} or newer")


def check_engine_for_environments(version: str) -> Check:
    """Judge whether the engine can build environment servers, for which the other images' engine may be too old."""
    if int(version.split(".")[0]) >= ENGINE_AT_LEAST_FOR_ENVIRONMENTS:
        return Check("environments", OK, f"engine {version} builds environment servers")
    return Check("environments", NOTE, f"engine {version} builds no environment servers",
                 f"install Docker Engine {ENGINE_AT_LEAST_FOR_ENVIRONMENTS} or newer, or use --runner local")


def check_compose(version: str) -> Check:
    """Judge Compose's version, such as 2.26.1-4 or v2.39.0."""
    major = version.rpartition("version ")[2].lstrip("v").split(".")[0]
    if major.isdigit() and int(major) >= 2:
        return Check("compose", OK, version)
    return Check("compose", MISSING, version, "install the Compose v2 plugin (docker-compose-plugin)")


def check_disk(free_bytes: int, place: str) -> Check:
    """Judge the room for images."""
    free = free_bytes / 1e9
    if free >= DISK_GB:
        return Check("disk", OK, f"{free:.0f} GB free in {place}")
    return Check("disk", MISSING, f"{free:.0f} GB free in {place}",
                 f"the images need {DISK_GB} GB; free some, or run `invoke clean.cache`")


def check_dotenv(exists: bool, variables: Mapping[str, str], keys: Collection[str] = ()) -> Check:
    """Judge `.env`: it may be absent; a name that is no setting and none of the environments' `keys` is mistyped."""
    if not exists:
        return Check(".env", OK, "absent, so the defaults hold", "")
    unknown = sorted(set(variables) - set(SETTINGS) - set(keys) - NO_SETTINGS)
    if unknown:
        return Check(".env", NOTE, f"unknown: {', '.join(unknown)}", "compare with .env.example")
    return Check(".env", OK, f"{len(variables)} settings")


def check_sources(root: Path, settings: Mapping[str, str]) -> list[Check]:
    """Judge where AgentGym-RL and AgentGym come from."""
    try:
        chosen = choose_sources(root, settings)
    except UserError as error:
        return [Check("sources", MISSING, str(error), "see AGENTGYM_RL_SRC and AGENTGYM_SRC in .env.example")]
    return [
        Check(
            name, OK,
            hide_logins(chosen[name])
            if name in chosen else f"{SETTINGS[name].default} (fetched when an image is built)") for name in (RL, GYM)
    ]


def check_files(root: Path) -> Check:
    """Judge whether the project's own files are there and its folders writable."""
    lost = [name for name in FILES if not (root / name).is_file()]
    if lost:
        return Check("files", MISSING, f"not there: {', '.join(lost)}", "git checkout -- " + " ".join(lost))
    locked = [name for name in FOLDERS if (root / name).exists() and not os.access(root / name, os.W_OK)]
    if locked:
        return Check("files", MISSING, f"not writable: {', '.join(locked)}",
                     "sudo chown -R $(id -u):$(id -g) " + " ".join(locked))
    return Check("files", OK, f"{len(FILES)} files; the folders are writable")


def check_nvidia(runtime: bool) -> Check:
    """Judge the NVIDIA runtime: training needs it, merging, formatting and evaluation do not."""
    if runtime:
        return Check("nvidia", OK, "the engine hands out GPUs")
    return Check("nvidia", NOTE, "no NVIDIA runtime: no GPU in the containers",
                 "install nvidia-container-toolkit to train")


def all_checks(keys: Callable[[], Collection[str]]) -> Iterator[Check]:
    """Look at everything that the project needs, Docker first; `keys` are the variables that environments ask for."""
    try:
        dotenv = read_dotenv()
    except BadSetting as error:  # on which everything else depends
        yield Check(".env", MISSING, error.message.partition("; ")[0], error.message.partition("; ")[2])
        yield check_files(ROOT)
        return
    yield from _docker_checks()
    yield check_dotenv((ROOT / ".env").is_file(), dotenv, keys())
    yield from check_sources(ROOT, {**dotenv, **os.environ})
    yield check_files(ROOT)


def _compose_reads() -> Check:
    """Let Compose read its files and `.env`, in which it accepts less than we do."""
    try:
        ask(lambda client: client.compose.config(return_json=True), profiles=["*"])
    except DockerError as error:
        said = error.message or "Compose gives no reason"
        return Check("settings", MISSING, said, "mend what Compose names: .env, or docker-compose.override.yml")
    return Check("settings", OK, "Compose reads its files and .env")


def _docker_checks() -> Iterator[Check]:
    try:
        version = engine_version()
    except DockerError as error:
        yield Check("engine", MISSING, "none answers", error.message or "start Docker")
        if error.code != COMMAND_NOT_FOUND:  # Compose reads its files without an engine
            yield _compose_reads()
        return
    yield check_engine(version)
    yield check_engine_for_environments(version)
    for name, question, judge in (
        ("compose", lambda client: client.compose.version(), check_compose),
        ("buildx", lambda client: client.buildx.version(), lambda version: Check("buildx", OK, version)),
    ):
        try:
            yield judge(ask(question))
        except DockerError:
            yield Check(name, MISSING, "not installed", f"install the plugin docker-{name}-plugin")
    yield _compose_reads()
    yield check_nvidia(has_nvidia_runtime())
    place = Path(ask(lambda client: client.system.info().docker_root_dir) or "/")
    # The engine may run elsewhere (Docker Desktop, a remote host), with a folder that is not here.
    here = place if place.exists() else ROOT
    yield check_disk(shutil.disk_usage(here).free, str(here))
