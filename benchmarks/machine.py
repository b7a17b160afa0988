"""Describes the machine that figures were taken on: processor, memory, disk, kernel, interpreters."""
from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def describe(folder: Path, pythons: dict[str, str]) -> dict[str, str]:
    """Facts by name, in the order to print them; `pythons` maps a label to an interpreter, `folder` is on the disk."""
    facts = {
        "CPU": f"{_cpu()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable",
        "memory": f"{meminfo('MemTotal') / 2**30:.1f} GiB",
        "disk": _disk(folder),
        "kernel": platform.release(),
    }
    for label, python in pythons.items():
        facts[label] = versions(python)
    return facts


def versions(python: str) -> str:
    """Version of an interpreter and of the packages that matter, in one line; ValueError if it does not run."""
    code = ("import importlib.metadata as m, json, platform\n"
            "found = {d.metadata['Name'].lower(): d.version for d in m.distributions() if d.metadata['Name']}\n"
            "print(json.dumps([platform.python_version(), found]))")
    try:
        run = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        version, found = json.loads(run.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{python} is no working Python interpreter ({error}); name one that is") from None
    return ", ".join([f"Python {version}", *(f"{name} {found[name]}" for name in PACKAGES if name in found)])


def meminfo(name: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/meminfo has no {name}; this benchmark needs Linux")


def memory_available() -> int:
    """Bytes a new process can use: MemAvailable, or less where a cgroup (a container) allows less."""
    available = meminfo("MemAvailable")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            available = min(available, int(limit))
    return available


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _disk(folder: Path) -> str:
    """Device, file system and mount options of the mount that `folder` is on, and the device's model if it says."""
    path, best = str(folder.resolve()), ("", "", "", "")
    for line in Path("/proc/mounts").read_text().splitlines():
        device, mount, kind, options = line.split()[:4]
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best[1]):
            best = (device, mount, kind, options)
    device, mount, kind, options = best
    number = folder.stat().st_dev
    model = _read(Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/device/model"))
    return f"{device}{f' ({model})' if model else ''}, {kind} at {mount} ({options})"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
