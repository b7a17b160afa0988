"""What `invoke doctor` looks at: each check gives one line, with the remedy where something is wrong."""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path

from tasks.lib.doctor import surroundings
from tasks.lib.doctor.check import MISSING, NOTE, OK, Check
from tasks.lib.engine import containers
from tasks.lib.engine.client import (
    COMMAND_NOT_FOUND,
    ENGINE_AT_LEAST,
    ENGINE_AT_LEAST_FOR_ENVIRONMENTS,
    ask,
    elsewhere,
    engine_version,
    has_nvidia_runtime,
)
from tasks.lib.engine.images import IMAGES, image_facts, image_name
from tasks.lib.engine.sources import GYM, RL, choose_sources, revision
from tasks.lib.errors import BadSetting, DockerError, UserError
from tasks.lib.flags import size_bytes
from tasks.lib.redaction import hide_logins
from tasks.lib.settings import FOLDERS, ROOT, SETTINGS, read_dotenv, resolve

DISK_GB = 32
# What may stand in .env and is no setting: Compose's own, and the consent that plain Compose passes on.
NO_SETTINGS = {"COMPOSE_FILE", "COMPOSE_PROFILES", "COMPOSE_IGNORE_ORPHANS", "DOCKER_DEFAULT_PLATFORM", "I_UNDERSTAND"}
FILES = ("docker-compose.yml", "docker-compose.cpu.yml", "docker-compose.gpu-env.yml", "docker/base.Dockerfile",
         "docker/train.Dockerfile", "docker/scripts.Dockerfile", "docker/serve.Dockerfile", "docker/env.Dockerfile",
         "Dockerfile.eval", "environments.toml", "training.toml")


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


def check_disk(free_bytes: int, place: str, built_bytes: int = 0) -> Check:
    """Judge the room for the images that are planned: all of ours, less `built_bytes` that are there."""
    free, planned = free_bytes / 1e9, max(0, DISK_GB - built_bytes / 1e9)
    if free >= planned:
        return Check("disk", OK, f"{free:.0f} GB free in {place}, {planned:.0f} GB of images not built yet")
    return Check("disk", MISSING, f"{free:.0f} GB free in {place}",
                 f"the images that are not built yet need {planned:.0f} GB; free some, or run `invoke clean.cache`")


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
            name, OK, f"{hide_logins(chosen[name])}, commit {revision(chosen[name])}"
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


def all_checks(keys: Callable[[], Collection[str]], data: Callable[[], tuple[list[str], list[str]]],
               taken: Callable[[], Mapping[int, str]]) -> Iterator[Check]:
    """Look at everything that the project needs, Docker first.

    Args:
        keys: gives the variables that environments ask for.
        data: gives the names of environments that lack their data, and of those that have it.
        taken: gives the ports that are taken, and what would listen there.
    """
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
    yield surroundings.check_shared(shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None)
    yield _asked("ports", lambda: surroundings.check_ports(taken()))
    yield _asked("data", lambda: surroundings.check_data(*data()))
    yield surroundings.check_models(surroundings.models_in(ROOT / "models"), ROOT / "models")
    environ = {**dotenv, **os.environ}
    yield surroundings.check_keys(environ)
    yield surroundings.check_differences(dotenv, os.environ)


def _asked(name: str, judge: Callable[[], Check]) -> Check:
    """Return what `judge` says, or what keeps it from saying anything."""
    try:
        return judge()
    except UserError as error:
        found, _, remedy = error.message.partition("; ")
        return Check(name, MISSING, found or "docker gives no reason", remedy or "compare with .env.example")


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
        yield surroundings.check_gpus(surroundings.gpus_here(), "")
        import psutil  # not for `invoke --list`
        yield _memory(psutil.virtual_memory().total)
        yield _clock(None)
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
    said, host = ask(lambda client: client.system.info()), elsewhere()
    yield surroundings.check_gpus(None if host else surroundings.gpus_here(), host)
    yield check_nvidia(has_nvidia_runtime())
    facts = {image.name: image_facts(image_name(image.name)) for image in IMAGES}
    place = Path(said.docker_root_dir or "/")
    if host:
        yield Check("disk", NOTE, f"the engine's is on {host}, in {place}", "docker system df")
    else:  # Docker Desktop's folder is in its own machine
        here = place if place.exists() else ROOT
        yield check_disk(
            shutil.disk_usage(here).free, str(here), max([fact.size for fact in facts.values() if fact], default=0))
    if said.mem_total:
        yield _memory(said.mem_total)
    yield _clock(datetime.fromisoformat(said.system_time) if said.system_time else None)
    now = datetime.now(timezone.utc)
    yield surroundings.check_images({name: now - fact.created if fact else None for name, fact in facts.items()})
    yield _asked("others", lambda: surroundings.check_others([str(one.owner) for one in containers.around().others]))


def _memory(total: int) -> Check:
    shared = resolve("SHM_SIZE")
    return surroundings.check_memory(total, shared, size_bytes(shared))


def _clock(engine: datetime | None) -> Check:
    written = [(ROOT / name).stat().st_mtime for name in FILES if (ROOT / name).is_file()]
    newest = datetime.fromtimestamp(max(written), timezone.utc) if written else None
    return surroundings.check_clock(engine, datetime.now(timezone.utc), newest)
