"""Ports of this machine."""
import socket
from collections.abc import Callable

from tasks.lib.errors import UserError

SEARCHED_PORTS = 100


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


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nobody listens, another each time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
