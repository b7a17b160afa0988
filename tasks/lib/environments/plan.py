"""What to start for an environment, decided from its row: ports, variables, Compose services, the proxy's rules."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.lib.environments.rows import Environment


@dataclass(frozen=True)
class Options:
    """What the user chose for `env.up`."""
    port: int
    replicas: int = 1
    session_ttl: int = 3600
    bind: str = "127.0.0.1"
    understood: bool = False
    aliases: bool = True


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
