"""What to start for an environment, decided from its row: ports, variables, Compose services, the proxy's rules."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.lib.errors import UserError

if TYPE_CHECKING:
    from tasks.lib.environments.rows import Environment

SEARCHED_PORTS = 100


@dataclass(frozen=True)
class Options:
    """What the user chose for `env.up`."""
    port: int
    replicas: int = 1
    session_ttl: int = 3600
    bind: str = "127.0.0.1"
    understood: bool = False
    aliases: bool = True


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


def server_variables(row: Environment, options: Options, replica: int) -> dict[str, str]:
    """Return the variables of one server process that are no secrets."""
    return {
        "SESSION_TTL": str(options.session_ttl),
        "REPLICA": str(replica),
        "REPLICAS": str(options.replicas),
        "PYTHONHASHSEED": "0",
        **({
            "I_UNDERSTAND": row.name
        } if options.understood else {}),
    }
