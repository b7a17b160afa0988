"""Ports of this machine."""
import socket
import sys
from collections.abc import Callable

from tasks.lib.errors import UserError

SEARCHED_PORTS = 100
_taken: dict[int, socket.socket] = {}


def choose_port(wanted: int, free: Callable[[int], bool]) -> int:
    """Return `wanted` where it is free, else the next one that is.

    Raises:
        UserError: none of the next hundred is.
    """
    for port in range(wanted, min(wanted + SEARCHED_PORTS, 65536)):
        if free(port):
            return port
    last = min(wanted + SEARCHED_PORTS, 65536) - 1
    raise UserError(f"no port from {wanted} to {last} is free; choose one with --port", code=1)


def port_is_free(port: int, bind: str = "127.0.0.1") -> bool:
    """Tell whether nobody listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((bind, port))
        except OSError:
            return False
        return True


def take_port(port: int, bind: str = "127.0.0.1") -> bool:
    """Keep a free port from other tasks until this process ends; return False where it is not free or one keeps it.

    Seconds lie between the look for a port and the server's own bind: two tasks that start at once, in any checkout and
    as any user, would choose the same. Linux's abstract addresses leave no file; elsewhere nothing is kept.
    """
    if not port_is_free(port, bind):
        return False
    if sys.platform == "linux" and port not in _taken:
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0agentgym-rl-port-{port}")
        except OSError:
            mark.close()
            return False
        _taken[port] = mark
    return True


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens, another each time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
