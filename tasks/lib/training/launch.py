"""Start a run that was decided: its folder and run.json, and the supervisor in a container or as a process of its own."""
from __future__ import annotations

import hashlib
import os
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from tasks.lib import notices
from tasks.lib.engine import client as docker
from tasks.lib.engine.compose_files import QUIET
from tasks.lib.engine.images import image_facts, image_name, image_of
from tasks.lib.engine.mounts import ensure_folders
from tasks.lib.engine.ownership import is_ours, owner_of, project_name
from tasks.lib.engine.sources import GYM, RL, choose_sources, revision
from tasks.lib.errors import DockerError, UserError
from tasks.lib.host import processes
from tasks.lib.notices import say
from tasks.lib.settings import ROOT, effective_environment, resolve
from tasks.lib.training import place as places
from tasks.lib.training.overrides import Override
from tasks.lib.training.place import Place
from tasks.lib.training.scripts import MODULE
from training.folder import RunFolder
from training.text import shown

if TYPE_CHECKING:
    from python_on_whales import DockerClient

RUN_LABEL, FOLDER_LABEL = "org.agentgym-rl.run", "org.agentgym-rl.run.folder"
SECRETS = {"HF_TOKEN": "/run/secrets/hf_token", "WANDB_API_KEY": "/run/secrets/wandb_api_key"}
SAVES = ROOT / "saves"
START_SECONDS = 30


@dataclass(frozen=True)
class Decided:
    """A run, decided.

    Attributes:
        name, folder: its name, and its folder on this machine; inside: the folder as the trainer sees it.
        place: where it trains.
        environment: run.json's.
        overrides: as they are sent.
        resolved: the whole configuration; None where Hydra could not be asked.
        presets: names and files.
        variables: for the trainer.
        world_size, gpus, steps, save_freq: of the configuration; steps that are really trained, None where unknown.
        algorithm: the trainer's name of it.
        options: of the supervisor.
    """
    name: str
    folder: Path
    inside: str
    place: Place
    environment: dict[str, Any]
    overrides: list[Override]
    resolved: dict[str, Any] | None
    presets: list[str]
    variables: dict[str, str]
    world_size: int | None
    gpus: int | None
    steps: int | None
    save_freq: int | None
    algorithm: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        """The trainer's command line without its overrides."""
        return [self.place.python or "python", "-u", "-m", MODULE]

    @property
    def container(self) -> str:
        """The container's name."""
        return container_name(self.name)


def container_name(run: str) -> str:
    """Return the name of a run's container."""
    return f"{project_name()}-train-{run}"


def variables(place: Place, folder: str, script: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the trainer that are no secrets.

    Args:
        place: where it trains.
        folder: the run's, as the trainer sees it.
        script: what a script exports.
    """
    found = {
        **places.VARIABLES,
        **script, "WANDB_DIR": folder,
        "WANDB_MODE": resolve("WANDB_MODE"),
        "PYTHONUNBUFFERED": "1"
    }
    # A socket's path has at most 107 bytes, and Ray puts 60 of its own behind this one.
    found["RAY_TMPDIR"] = f"/tmp/ray-{hashlib.sha256(folder.encode()).hexdigest()[:8]}"
    if place.runner == "local":
        found["PYTHONPATH"] = places.python_path(place)
        found["PATH"] = os.pathsep.join((str(Path(place.python).parent), os.environ.get("PATH", os.defpath)))
        if place.chosen:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(place.chosen)
        for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
            if os.environ.get(name):
                found[name] = os.environ[name]
    return found


def record(run: Decided, now: float) -> dict[str, Any]:
    """Return run.json."""
    docker_run = run.place.runner == "docker"
    image = None
    if docker_run:
        name = image_name(image_of("train").name)
        facts = image_facts(name)
        image = {"name": name, "id": facts.id if facts else ""}
    return {
        "name": run.name,
        "created": now,
        "environment": run.environment,
        "algorithm": run.algorithm,
        "presets": run.presets,
        "overrides": list(map(str, run.overrides)),
        "resolved": run.resolved,
        "command": run.command,
        "variables": run.variables,
        "secrets": SECRETS if docker_run else {},
        "cwd": run.inside,
        "runner": run.place.runner,
        "container": run.container if docker_run else None,
        "image": image,
        "commits": commits(docker_run),
        "versions": {
            "python": run.place.told.get("python", ""),
            **run.place.told.get("versions", {})
        },
        "gpus": {
            "choice": ",".join(run.place.chosen) or "all",
            "count": run.gpus
        },
        "volumes": run.place.translation.volumes if run.place.translation else {},
        "shm_size": run.place.shm_size,
        "world_size": run.world_size,
        "steps": run.steps,
        "save_freq": run.save_freq,
        "options": run.options,
        "folder": run.inside,
        "attempts": [],
        "poisoned": [],
    }


def commits(docker_run: bool) -> dict[str, str]:
    """Return the commits of this workbench and of the sources that train: the image's labels, or the checkouts'."""
    found = {"workbench": revision(str(ROOT))}
    if docker_run:
        name = image_name(image_of("train").name)
        labels = docker.ask(lambda client: client.image.inspect(name)).config.labels or {}
        for key, label in (("agentgym-rl", "org.agentgym-rl.agentgym-rl.revision"),
                           ("agentgym", "org.agentgym-rl.agentgym.revision")):
            found[key] = labels.get(label, "unknown")
        return found
    with suppress(ValueError):
        chosen = choose_sources(ROOT, effective_environment())
        found.update({
            key: revision(chosen[name])
            for key, name in (("agentgym-rl", RL), ("agentgym", GYM)) if name in chosen
        })
    return found


def prepare_folder(run: Decided) -> None:
    """Make the run's folder and write run.json there; of a name that is taken meanwhile, nothing is touched.

    Raises:
        UserError: another command took the name just now.
    """
    folder = RunFolder(run.folder)
    for path in ensure_folders(ROOT, effective_environment()):
        say(f"created {path}")
    uid = int(resolve("HOST_UID")) if os.getuid() == 0 and effective_environment().get("HOST_UID") else None
    for path in (folder.path, folder.logs, folder.hydra):
        path.mkdir(parents=True, exist_ok=True)
        if uid is not None:
            os.chown(path, uid, int(resolve("HOST_GID")))
    try:
        folder.create(record(run, time.time()))
    except FileExistsError:
        raise UserError(
            f"{run.name}: another command took the name just now; `invoke train.status --name {run.name}`") from None
    if uid is not None:
        for path in folder.path.iterdir():
            os.chown(path, uid, int(resolve("HOST_GID")))


def supervisor_words(inside: str) -> list[str]:
    """Return the supervisor's command line behind its Python."""
    return ["-m", "training", "run", inside]


def show(run: Decided) -> None:
    """Print what would run: the trainer with its list, then what starts it."""
    notices.put(shlex.join([*run.command, *map(str, run.overrides)]))


def start(c: Context, run: Decided) -> None:
    """Start the supervisor of a folder that has its run.json, and return when it is up.

    Raises:
        UserError: it did not come up, with its last line.
    """
    try:
        launch(c, run.place, run.name, run.folder, run.inside)
    except UserError:
        forget(run.folder)
        raise


def forget(folder: Path) -> None:
    """Free the name of a run that never began: its run.json goes, its logs stay."""
    with suppress(OSError, ValueError):
        if not RunFolder(folder).read()["attempts"]:
            RunFolder(folder).run_json.unlink()


def launch(c: Context, place: Place, name: str, folder: Path, inside: str) -> None:
    """Start the supervisor in a container or as a process; see `start`."""
    if place.runner == "docker":
        _launch_container(c, place, name, folder, inside)
        return
    words = [sys.executable, *supervisor_words(inside)]
    if c.config.run.dry:
        notices.put(shlex.join(words))
        return
    environ = {**places.surroundings(os.environ), "PYTHONPATH": str(ROOT)}
    log = RunFolder(folder).logs / "supervisor.log"
    log.parent.mkdir(exist_ok=True)
    process = processes.launch(words, log, environ, folder, processes.CALLERS)
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if has_begun(folder, process.pid):
            return
        if process.poll() is not None:
            if process.returncode == 0:
                return
            raise UserError(f"{name} did not start: {shown(processes.last_line(log))}; see {log}", code=1)
        time.sleep(0.1)
    raise UserError(f"{name} did not start within {START_SECONDS} s: {shown(processes.last_line(log))}; see {log}",
                    code=1)


def has_begun(folder: Path, pid: int | None = None) -> bool:
    """Tell whether a supervisor wrote its heartbeat: this one, or any that is fresh."""
    state = RunFolder(folder).read_state() or {}
    if pid is not None:
        return state.get("pid") == pid
    return isinstance(state.get("updated"), float | int) and time.time() - float(state["updated"]) < 5


def _launch_container(c: Context, place: Place, name: str, folder: Path, inside: str) -> None:
    container = container_name(name)
    volumes = list(place.translation.volumes.items()) if place.translation else []

    def run(client: DockerClient) -> object:
        return client.compose.run("train", ["python", *supervisor_words(inside)],
                                  detach=True,
                                  tty=False,
                                  name=container,
                                  labels={
                                      RUN_LABEL: name,
                                      FOLDER_LABEL: inside
                                  },
                                  volumes=volumes)

    cpu = bool(place.gpus and place.gpus.cpu)
    remove_ended(c, container)
    if c.config.run.dry:
        docker.drive(c, run, profiles=["train"], cpu=cpu, variables={**QUIET, **place.variables})
        return
    docker.ask(run, profiles=["train"], cpu=cpu, variables={**QUIET, **place.variables})
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if has_begun(folder):
            return
        state = docker.ask(lambda client: client.container.inspect(container)).state
        if state.status not in ("running", "created"):
            said = str(docker.ask(lambda client: client.container.logs(container, tail=20))).strip().splitlines()
            if state.exit_code == 0:
                return
            raise UserError(
                f"{name} did not start: {shown((said or ['it said nothing'])[-1])}; see `docker logs {container}`",
                code=1)
        time.sleep(0.2)


def remove_ended(c: Context, container: str) -> None:
    """Remove the container of an earlier attempt.

    Raises:
        UserError: it runs.
    """
    try:
        if not docker.ask(lambda client: client.container.exists(container)):
            return
    except DockerError:
        if c.config.run.dry:  # which needs no engine
            return
        raise
    found = docker.ask(lambda client: client.container.inspect(container))
    if not is_ours(owner_of(found)):
        raise UserError(f"the container {container} is {owner_of(found)}; choose another --name, or set "
                        "COMPOSE_PROJECT_NAME to another one in .env")
    if found.state.running:
        raise UserError(f"the container {container} runs; `invoke train.stop` ends it")
    docker.drive(c, lambda client: client.container.remove(container, volumes=True))
