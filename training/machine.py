"""What Linux knows of processes, memory and disks; the reasons why a process is gone are there."""
from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def host() -> str:
    """Return this machine's (or container's) name."""
    return socket.gethostname()


def boot_id() -> str:
    """Return what tells this start of the machine from every other; "" where nothing does."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """Return the name of the namespace that this process's number belongs to: a container has its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since the machine did; None where there is no such process.

    A number is given out again, but not with the same start. (proc(5), field 22 of stat.)
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        fields = text[text.rindex(")") + 2:].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def identity(pid: int) -> dict[str, Any]:
    """Return what tells a process from all others, for a file that outlives it."""
    return {
        "pid": pid,
        "start_time": start_time(pid),
        "boot_id": boot_id(),
        "pid_namespace": pid_namespace(),
        "host": host()
    }


def lives(process: dict[str, Any]) -> bool | None:
    """Tell whether the process of an `identity` lives; None where that cannot be seen from here."""
    pid, started = process.get("pid"), process.get("start_time")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return None
    if process.get("boot_id") != boot_id() or not boot_id():
        # Another start of this machine, or another machine.
        return False if process.get("host") == host() else None
    if process.get("pid_namespace") != pid_namespace():
        return None
    return started is not None and start_time(pid) == started


def adopt_orphans() -> None:
    """Become the parent of what the trainer leaves behind, so that it can be found and ended."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def lower_priority(nice: int) -> None:
    """Let others on this machine come first, by `nice` as of `os.nice`; where that is 0, nothing changes.

    Linux shares the processors between sessions before it looks at a process's own value (sched_autogroup), so a session
    that is the caller's or its parent's alone is lowered as a whole.
    """
    if not nice:
        return
    os.nice(nice)
    if os.getsid(0) in (os.getpid(), os.getppid()):
        with suppress(OSError):  # no such grouping in this kernel, or not in this container
            Path("/proc/self/autogroup").write_text(str(nice))


def die_with_parent() -> None:
    """In a child before it becomes another program: get SIGTERM when the parent is gone, however that ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


try:
    _LIBC: Any = ctypes.CDLL(None, use_errno=True)
except OSError:
    _LIBC = None


def _prctl(option: int, value: int) -> None:
    if _LIBC is not None and hasattr(_LIBC, "prctl"):
        _LIBC.prctl(option, value, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Return the numbers of all processes below `pid`."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                text = Path(f"/proc/{name}/stat").read_text(errors="replace")
                fields = text[text.rindex(")") + 2:].split()
            except (OSError, ValueError):
                continue
            if fields[0] not in "ZX":
                children.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def kill(pids: Iterable[int], number: int) -> None:
    """Send a signal to those of the processes that are there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def oom_kills(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Return how many processes of this control group (and those in it) the kernel killed for want of memory.

    None where the kernel does not say. (Documentation/admin-guide/cgroup-v2.rst, memory.events; cgroup-v1/memory.rst.)
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    places = []
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:  # version 2
            places += [root / path.lstrip("/") / "memory.events", root / "memory.events"]
        elif "memory" in controllers.split(","):
            places += [
                root / "memory" / path.lstrip("/") / "memory.oom_control", root / "memory" / "memory.oom_control"
            ]
    for place in places:
        try:
            for line in place.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
        except (OSError, ValueError):
            continue
    return None


def gpus(timeout: float = 10.0) -> list[dict[str, Any]] | None:
    """Return what nvidia-smi says of the GPUs: index, used and total memory in MiB, percent busy; None without it."""
    query = "index,memory.used,memory.total,utilization.gpu"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
                              capture_output=True,
                              text=True,
                              timeout=timeout,
                              check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = []
    for line in done.stdout.splitlines():
        try:
            index, used, total, busy = (int(value) for value in line.split(","))
        except ValueError:
            continue
        found.append({"index": index, "used_mb": used, "total_mb": total, "busy_percent": busy})
    return found
