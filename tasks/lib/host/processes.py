"""Background processes of this machine: told from later ones with the same id, and stopped with their children."""
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tasks.lib.atomic import open_private

STOP_SECONDS = 10
PRIVATE, CALLERS = 0o077, -1  # umasks: files for their owner alone, or as the caller's own are


def _born(pid: int) -> str:
    """Return when the process began, on a clock that nobody sets: ticks since this machine's start, and which start.

    Raises:
        psutil.Error: there is no such process.
    """
    import psutil
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{ticks}@{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    except OSError:  # gone, or not Linux
        return f"{psutil.Process(pid).create_time():.1f}"


def identity(pid: int) -> dict[str, Any]:
    """Return what tells this process from any later one with the same id."""
    return {"pid": pid, "born": _born(pid)}


def is_running(entry: Mapping[str, Any]) -> bool:
    """Tell whether the process of a state entry still runs, and is not another one with its id."""
    import psutil
    try:
        return _born(entry["pid"]) == entry["born"] and psutil.Process(entry["pid"]).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def is_orphaned(entry: Mapping[str, Any]) -> bool:
    """Tell whether the process of a state entry ended and left children in its session, as a server's JVM is.

    No process gets an id that a session still has, so the session is that of the entry's process.
    """
    import psutil
    if psutil.pid_exists(entry["pid"]) or _born(os.getpid()).partition("@")[2] != entry["born"].partition("@")[2]:
        return False  # or of another start of this machine
    for pid in psutil.pids():
        with suppress(OSError):
            if os.getsid(pid) == os.getpgid(pid) == entry["pid"]:
                return True
    return False


def launch(argv: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path, umask: int = PRIVATE) -> subprocess.Popen:
    """Start `argv` as the leader of a session of its own, out of Ctrl-C's reach, its output in `log`.

    Args:
        umask: what nobody may do with the files that it makes; CALLERS for what holds of the caller's own.
    """
    with os.fdopen(open_private(log), "w") as output:
        return subprocess.Popen(list(argv),
                                cwd=cwd,
                                env=dict(env),
                                stdin=subprocess.DEVNULL,
                                stdout=output,
                                stderr=subprocess.STDOUT,
                                umask=umask,
                                start_new_session=True)


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def stop(entries: Sequence[Mapping[str, Any]]) -> None:
    """Stop those of the processes that still run, with their groups, and the groups of those that ended."""
    alive = [entry for entry in entries if is_running(entry) or is_orphaned(entry)]
    for entry in alive:  # every process was started as the leader of its own group
        with suppress(ProcessLookupError):
            os.killpg(entry["pid"], signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS
    while any(is_running(entry) for entry in alive) and time.monotonic() < end:
        time.sleep(0.05)
    for entry in alive:  # what ignored the signal, and children (JVMs, browsers) that outlived their parent
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(entry["pid"], signal.SIGKILL)
