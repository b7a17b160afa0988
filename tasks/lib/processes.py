"""Background processes of this machine: told from later ones with the same id, and stopped with their children."""
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

STOP_SECONDS = 10


def port_is_free(port: int, bind: str = "127.0.0.1") -> bool:
    """Tell whether nobody listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens, another each time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def identity(pid: int) -> dict[str, Any]:
    """Return what tells this process from any later one with the same id."""
    import psutil
    return {"pid": pid, "born": psutil.Process(pid).create_time()}


def is_running(entry: Mapping[str, Any]) -> bool:
    """Tell whether the process of a state entry still runs, and is not another one with its id."""
    import psutil
    try:
        process = psutil.Process(entry["pid"])
        return abs(process.create_time() - entry["born"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def launch(argv: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path) -> subprocess.Popen:
    """Start `argv` as the leader of a session of its own, out of Ctrl-C's reach, its output in `log`."""
    with log.open("w") as output:
        return subprocess.Popen(list(argv),
                                cwd=cwd,
                                env=dict(env),
                                stdin=subprocess.DEVNULL,
                                stdout=output,
                                stderr=subprocess.STDOUT,
                                start_new_session=True)


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def stop(entries: Sequence[Mapping[str, Any]]) -> None:
    """Stop those of the processes that still run, with their groups."""
    alive = [entry for entry in entries if is_running(entry)]
    for entry in alive:  # every process was started as the leader of its own group
        with suppress(ProcessLookupError):
            os.killpg(entry["pid"], signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS
    while any(is_running(entry) for entry in alive) and time.monotonic() < end:
        time.sleep(0.05)
    for entry in alive:  # what ignored the signal, and children (JVMs, browsers) that outlived their parent
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(entry["pid"], signal.SIGKILL)
