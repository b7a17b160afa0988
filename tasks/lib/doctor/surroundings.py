"""What the doctor tells before the first hour of work: GPUs, room, clock, ports, what is here, and who else is.

The judgements take values; `all_checks` of `checks` asks for them.
"""
from __future__ import annotations

import subprocess
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from tasks.lib.doctor.check import NOTE, OK, Check
from tasks.lib.settings import SETTINGS
from tasks.lib.tables import human_age, human_size

# NVIDIA's release notes of CUDA 12.4: the driver that it came with, and the first that runs any CUDA 12.
DRIVER, DRIVER_FOR_12 = (550, 54, 14), (525, 60, 13)
CLOCK_SECONDS = 60
SHARED_AT_LEAST = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """A GPU, as nvidia-smi tells of it; memory in MiB."""
    name: str
    memory: int
    used: int
    driver: str


def gpus_here() -> list[Gpu] | None:
    """Return this machine's GPUs; None where nvidia-smi is not here or gives no answer."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, subprocess.TimeoutExpired):
        said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [[word.strip() for word in line.split(",")] for line in said.splitlines() if line.strip()]
        return [Gpu(name, int(memory), int(used), driver) for name, memory, used, driver in rows]
    return None


def check_gpus(gpus: Sequence[Gpu] | None, elsewhere: str) -> Check:
    """Judge the GPUs and their driver; of an engine `elsewhere` this machine's say nothing."""
    if elsewhere:
        return Check("gpus", NOTE, f"the engine is on {elsewhere}, whose GPUs are not asked from here",
                     "invoke train.run -- nvidia-smi")
    if not gpus:
        return Check("gpus", NOTE, "nvidia-smi finds none" if gpus is not None else "no nvidia-smi that answers",
                     "to train, install NVIDIA's driver; `invoke build.all --cpu` does without")
    shown = ", ".join(f"{number}: {gpu.name}, {gpu.used} of {gpu.memory} MiB used" for number, gpu in enumerate(gpus))
    driver = gpus[0].driver
    version = tuple(int(part) if part.isdecimal() else 0 for part in driver.split("."))
    found = f"{shown}; driver {driver}"
    if version >= DRIVER:
        return Check("gpus", OK, found)
    wanted = ".".join(map(str, DRIVER))
    if version >= DRIVER_FOR_12:
        return Check("gpus", NOTE, f"{found} is older than CUDA 12.4's own",
                     f"if a kernel fails, install driver {wanted} or newer")
    return Check("gpus", NOTE, f"{found} is too old for CUDA 12.4", f"install driver {wanted} or newer to train")


def check_memory(total: int, shared: str, shared_bytes: int | None) -> Check:
    """Judge the engine's memory, in bytes, against the training container's SHM_SIZE, which is `shared`."""
    found = f"{human_size(total)}; SHM_SIZE={shared}"
    if shared_bytes is None or shared_bytes <= total:
        return Check("memory", OK, found)
    return Check("memory", NOTE, f"{found} is more than there is",
                 f"write SHM_SIZE={max(1, total // 2 >> 30)}g into .env, or give --shm-size")


def check_shared(size: int | None) -> Check:
    """Judge this machine's /dev/shm, which `--runner local` and IPC_MODE=host use; None where there is none."""
    if size is None:
        return Check("/dev/shm", NOTE, "there is none", "train in a container: --runner docker")
    if size >= SHARED_AT_LEAST:
        return Check("/dev/shm", OK, human_size(size))
    return Check("/dev/shm", NOTE, f"{human_size(size)}: little for --runner local",
                 "sudo mount -o remount,size=32g /dev/shm")


def check_ports(taken: Mapping[int, str]) -> Check:
    """Judge the ports that environments and the model's server would take; `taken` says for which each is wanted."""
    if not taken:
        return Check("ports", OK, "the environments' own are free")
    shown = ", ".join(f"{port} ({name})" for port, name in sorted(taken.items()))
    return Check("ports", NOTE, f"taken: {shown}",
                 "env.up takes the next free one, or --port; SERVE_PORT is plain Compose's")


def check_clock(engine: datetime | None, now: datetime, newest: datetime | None) -> Check:
    """Judge this machine's clock by the engine's and by the checkout's newest file, which cannot be of the future."""
    if engine is not None and abs((engine - now).total_seconds()) > CLOCK_SECONDS:
        return Check("clock", NOTE, f"{now:%F %T} UTC here, {engine:%F %T} with the engine",
                     "sudo timedatectl set-ntp true")
    if newest is not None and newest - now > timedelta(seconds=CLOCK_SECONDS):
        return Check("clock", NOTE, f"{now:%F %T} UTC, and this checkout has files of {newest:%F %T}",
                     "sudo timedatectl set-ntp true")
    return Check("clock", OK, f"{now:%F %T} UTC")


def check_images(ages: Mapping[str, timedelta | None]) -> Check:
    """Judge which images there are and how old; None is one that is not built."""
    there = ", ".join(f"{name} ({human_age(age)})" for name, age in ages.items() if age is not None)
    lost = [name for name, age in ages.items() if age is None]
    if not lost:
        return Check("images", OK, there)
    return Check("images", NOTE, f"{there or 'none'}; not built: {', '.join(lost)}", "invoke build.all")


def check_data(lacking: Collection[str], having: Collection[str]) -> Check:
    """Judge the environments' data: names of those that lack it, and that have it."""
    if not lacking:
        return Check("data", OK, f"there: {', '.join(having)}")
    return Check("data", NOTE, f"there: {', '.join(having) or 'none'}; not: {', '.join(lacking)}",
                 f"invoke env.data --env {sorted(lacking)[0]}")


def check_models(models: Sequence[str], folder: Path) -> Check:
    """Judge which models lie in `folder`."""
    if models:
        return Check("models", OK, ", ".join(models))
    return Check("models", NOTE, f"none in {folder}", "invoke models.fetch Qwen/Qwen2.5-7B-Instruct")


def models_in(folder: Path) -> list[str]:
    """Return the folders below `folder` with a model's config, as paths relative to it, two levels deep."""
    found = {path.parent for pattern in ("*/config.json", "*/*/config.json") for path in folder.glob(pattern)}
    return sorted(
        str(path.relative_to(folder)) for path in found if not path.relative_to(folder).parts[0].startswith("."))


def check_keys(environ: Mapping[str, str]) -> Check:
    """Tell which keys are set, and no value."""
    names = [name for name, setting in SETTINGS.items() if setting.secret]
    there = [name for name in names if environ.get(name)]
    return Check(
        "keys", OK,
        f"set: {', '.join(there) or 'none'}; not set: {', '.join(name for name in names if name not in there)}")


def check_others(owners: Sequence[str]) -> Check:
    """Tell of the containers that others have on this engine; `owners` has one entry for each."""
    if not owners:
        return Check("others", OK, "no container of another checkout or user")
    shown = ", ".join(f"{owners.count(owner)} {owner}" for owner in sorted(set(owners)))
    return Check("others", NOTE, f"containers: {shown}", "invoke status")


def check_differences(dotenv: Mapping[str, str], environ: Mapping[str, str]) -> Check:
    """Tell which settings `.env` and the environment have other values of; no value is shown."""
    both = sorted(name for name in dotenv if name in environ and dotenv[name] != environ[name] and name in SETTINGS)
    own = sorted(name for name in dotenv if name in SETTINGS and dotenv[name] != SETTINGS[name].default)
    if both:
        return Check(".env and environment", NOTE, f"the environment goes before .env: {', '.join(both)}",
                     "unset " + " ".join(both))
    return Check(".env and environment", OK, f"other than the defaults: {', '.join(own) or 'nothing'}")
