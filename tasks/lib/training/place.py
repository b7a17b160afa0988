"""Where a run would train: the training image, or a Python of this machine; and what is there (training/probe.py)."""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from tasks.lib.engine import client as docker
from tasks.lib.engine import containers
from tasks.lib.engine.gpus import GpuChoice
from tasks.lib.engine.images import image_exists, image_name, image_of
from tasks.lib.engine.mounts import WORKSPACE, Translation, ensure_folders
from tasks.lib.engine.sources import GYM, RL, choose_sources, is_url
from tasks.lib.errors import MISUSE, UserError
from tasks.lib.flags import size_bytes
from tasks.lib.settings import ROOT, SETTINGS, effective_environment, resolve
from training import probe

if TYPE_CHECKING:
    from python_on_whales import DockerClient

PROBE_SECONDS = 60
KEYS = ("HF_TOKEN", "WANDB_API_KEY")  # the only ones of our secrets that a trainer uses
# What the workbench's own Python can tell of a run without a place to train: all but what belongs to that place.
ELSEWHERE = ("resolved", "hydra_error", "tokenizer_error", "markers", "prompt_tokens", "architectures", "clients")
# What AgentGym-RL's README and scripts set; the training image has the same.
VARIABLES = {
    "HYDRA_FULL_ERROR": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_ATTENTION_BACKEND": "XFORMERS",
    "VLLM_USE_MODELSCOPE": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


@dataclass
class Place:
    """Somewhere to train.

    Attributes:
        runner: docker or local.
        python: of this machine, for the local one.
        missing: why there is none, and the remedy.
        gpus: what the container gets; None for the local one.
        translation: of this machine's paths into the container's; None for the local one.
        shm_size: of the container, as typed.
        chosen: indices of --gpus; empty for all.
        told: what the probe told.
    """
    runner: str
    python: str = ""
    missing: tuple[str, str] = ("", "")
    gpus: GpuChoice | None = None
    translation: Translation | None = None
    shm_size: str = ""
    chosen: tuple[str, ...] = ()
    told: dict[str, Any] = field(default_factory=dict)

    def inside(self, path: Path, mount: bool = True) -> str:
        """Return the trainer's name of a file or folder of this machine.

        Raises:
            UserError: Docker cannot mount it.
        """
        if self.translation is None:
            return os.path.abspath(path)
        try:
            if path.is_dir() or not path.parent.is_dir():
                return self.translation.path(path)
            return f"{self.translation.path(path.parent)}/{path.name}"
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def variables(self) -> dict[str, str]:
        """What Compose interpolates for the container."""
        size = {"SHM_SIZE": self.shm_size} if self.shm_size else {}
        return {**(self.gpus.variables if self.gpus else {}), **size}


def message(error: Exception) -> tuple[str, str]:
    """Return what an error of the engine says, and the remedy in it."""
    said = str(getattr(error, "message", "") or error).removeprefix("docker: ")
    what, _, remedy = said.partition("; ")
    return what, remedy or "see `invoke doctor`"


def choose(c: Context, runner: str, python: str, gpus: str, shm_size: str) -> Place:
    """Return the place that the user wants: auto is the training image where an engine answers, else this machine.

    Raises:
        UserError: no such runner, or flags that are for the other one.
    """
    if runner not in ("auto", "docker", "local"):
        raise UserError(f"--runner {runner} is none; use auto, docker or local")
    if runner == "auto":
        runner = "local" if python or not shutil.which("docker") else "docker"
    if runner == "local":
        if shm_size:
            raise UserError("--shm-size is for --runner docker; on this machine it is the size of /dev/shm")
        return Place("local", python=_python(python), chosen=_indices(gpus))
    if python:
        raise UserError("--python is for --runner local; the training image has its own")
    check_size(shm_size)
    place = Place("docker", translation=Translation(ROOT), shm_size=shm_size)
    try:
        place.gpus = containers.gpus_for(c, "train", gpus)
        place.chosen = _indices(gpus)
        docker.require_engine(c)
    except UserError as error:
        if error.code == MISUSE:  # going without GPUs is no way out here
            raise UserError(error.message.removesuffix(", or pass --gpus none")) from None
        place.missing = message(error)
        return place
    name = image_name(image_of("train").name)
    if not c.config.run.dry and not image_exists(name):
        place.missing = (f"no image {name} yet", "build it with `invoke build.all`")
    return place


def _indices(flag: str) -> tuple[str, ...]:
    """Return the GPUs that --gpus, or GPUS without it, names; () for all."""
    from tasks.lib.engine.gpus import choose_gpus
    setting = resolve("GPUS")
    choose_gpus(flag, setting, nvidia=True)
    wanted = flag or setting
    if wanted == "none":
        raise UserError(
            f"{'--gpus ' if flag else 'GPUS='}none: training needs GPUs; use --gpus all, or indices such as 0,1")
    return () if wanted == "all" else tuple(wanted.split(","))


def _python(flag: str) -> str:
    found = os.path.expanduser(flag) if flag else resolve("TRAIN_PYTHON")
    if not found:
        return sys.executable
    place = shutil.which(found)
    if not place:
        raise UserError(
            f"{'--python' if flag else 'TRAIN_PYTHON'} {found} is no program; name a Python with AgentGym-RL's packages"
        )
    return os.path.abspath(place)


def sources() -> list[str]:
    """Return the folders of this machine's checkouts that hold the packages verl and agentenv."""
    try:
        found = choose_sources(ROOT, effective_environment())
    except ValueError as error:
        raise UserError(str(error)) from None
    inner = {RL: "AgentGym-RL", GYM: "agentenv"}
    return [str(Path(found[name]) / inner[name]) for name in (RL, GYM) if name in found and not is_url(found[name])]


def again(c: Context, run: Mapping[str, Any]) -> Place:
    """Return the place of a run that is there, from its run.json."""
    choice = str((run.get("gpus") or {}).get("choice") or "all")
    if run["runner"] == "local":
        return Place("local", python=run["command"][0], chosen=() if choice == "all" else tuple(choice.split(",")))
    place = choose(c, "docker", "", "" if choice == "all" else choice, str(run.get("shm_size") or ""))
    if place.translation:
        place.translation.volumes.update(run.get("volumes") or {})
    return place


def outside(place: Place, inside: str) -> str:
    """Return this machine's name of a path as the trainer sees it."""
    if place.translation is None:
        return inside
    for host, mount in place.translation.volumes.items():
        if inside == mount or inside.startswith(mount + "/"):
            return host + inside[len(mount):]
    return str(ROOT / inside.removeprefix(f"{WORKSPACE}/")) if inside.startswith(f"{WORKSPACE}/") else inside


def look(c: Context, place: Place, asked: Mapping[str, Any]) -> None:
    """Ask the place, and put what it tells into `place.told`. Without one, the workbench tells what it can.

    Under `--dry`, print the command of the container that would be asked.
    """
    asked = {**asked, "path": sources() if place.runner == "local" else []}
    words = ["-m", "training.probe", json.dumps(asked)]
    if c.config.run.dry:
        if place.runner == "docker" and not place.missing[0]:
            docker.drive(c, *_probing(place, words))
        return
    if not place.missing[0]:
        said = _ask_container(place, words) if place.runner == "docker" else _ask_python(place, words)
        line = next((one for one in reversed(said.splitlines()) if one.startswith(probe.MARK)), None)
        if line:
            place.told = json.loads(line.removeprefix(probe.MARK))
            return
        if not place.missing[0]:
            place.missing = (
                f"{place.python or 'the training image'} cannot be asked: {(said.strip().splitlines() or ['it said nothing'])[-1][:200]}",
                "build the image again (`invoke build.train`)"
                if place.runner == "docker" else "name another with --python")
    host = {key: value for key, value in asked.items() if key not in ("model", "url")}
    told = probe.look({**host, "model": asked.get("host_model"), "path": sources()})
    place.told = {key: told[key] for key in ELSEWHERE}


def _ask_python(place: Place, words: Sequence[str]) -> str:
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(place.chosen)} if place.chosen else {}
    environ = {
        **os.environ,
        **seen, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    }
    try:
        done = subprocess.run([place.python, *words],
                              capture_output=True,
                              text=True,
                              timeout=PROBE_SECONDS,
                              check=False,
                              env=environ)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout if probe.MARK in done.stdout else done.stderr


def _ask_container(place: Place, words: Sequence[str]) -> str:
    ensure_folders(ROOT, effective_environment())
    run, profiles, cpu, variables = _probing(place, words)
    try:
        return str(docker.ask(run, profiles=profiles, cpu=cpu, variables=variables))
    except UserError as error:
        place.missing = message(error)
        return ""


def _probing(place: Place,
             words: Sequence[str]) -> tuple[Callable[[DockerClient], object], list[str], bool, dict[str, str]]:
    """Return the action that asks the image, its profiles, whether it goes without GPUs, and the variables."""
    volumes = list(place.translation.volumes.items()) if place.translation else []
    return (lambda client: client.compose.run("train", ["python", *words], tty=False, remove=True, volumes=volumes),
            ["train"], bool(place.gpus and place.gpus.cpu), place.variables)


def gpu_count(place: Place) -> int | None:
    """Return how many GPUs a run would get; None where nobody can tell."""
    there = place.told.get("gpus")
    if there is None or not place.chosen:
        return there
    return min(there, len(place.chosen))


def shared_memory(place: Place) -> int | None:
    """Return the bytes of shared memory that a run would get."""
    told = place.told.get("shm")
    if told is not None or place.runner == "local":
        return told
    return size_bytes(place.shm_size or resolve("SHM_SIZE"))


def check_size(flag: str) -> None:
    """Refuse a size of shared memory that Docker does not read, of --shm-size or else of SHM_SIZE.

    Raises:
        UserError: naming it.
    """
    size = flag or resolve("SHM_SIZE")
    if not re.fullmatch(r"\d+(\.\d+)?[bkmg]b?", size, re.ASCII | re.IGNORECASE):
        raise UserError(f"{'--shm-size ' if flag else 'SHM_SIZE='}{size!r} is no size; write it as 512m or 32g")


def python_path(place: Place) -> str:
    """Return PYTHONPATH for a local trainer: the caller's, then the checkouts where the packages are not installed."""
    used = [place.told.get("verl"), place.told.get("agentenv")]
    from_sources = [folder for folder in sources() if any(one and one.startswith(folder + os.sep) for one in used)]
    return os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH", ""), *from_sources)))


def surroundings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a local supervisor: the caller's, without those of our keys that no trainer uses."""
    secret = {name for name, setting in SETTINGS.items() if setting.secret}
    kept = {name: value for name, value in environ.items() if name not in secret}
    return {**kept, **{name: value for name in KEYS if (value := resolve(name, environ=environ))}}


def data_path(text: str, bases: Sequence[Path]) -> Path:
    """Return the file or folder that a relative name of an override means: the first of `bases` that has it, else the first."""
    path = Path(os.path.expanduser(text))
    if path.is_absolute():
        return path
    return next((base / path for base in bases if (base / path).exists()), bases[0] / path)


def model_path(flag: str) -> Path:
    """Return the folder that --model names: from where the user stands, from the project's root, or in models/."""
    path = Path(os.path.abspath(os.path.expanduser(flag)))
    return next((place for place in (path, ROOT / flag, ROOT / "models" / flag) if place.is_dir()), path)
