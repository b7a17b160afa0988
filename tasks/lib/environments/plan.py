"""What to start for an environment, decided from its row: ports, variables, Compose services, the proxy's rules."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from environment_rows import about

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
    device: str = ""


# Of the data that a server holds in memory: index, corpus and what loading them takes, as searchqa's whole 65 GB do.
MEMORY_OF_DATA = 2.5


def memory_mb(row: Environment, data: Path) -> int:
    """Return the memory limit of the row's server, in MB; with another search index than the row's, what that one takes."""
    index = row.index(data)
    if index is None or not about(data):
        return row.memory_mb
    wanted = [one.path for one in row.data if not one.index or one is index]
    held = sum(path.stat().st_size for name in wanted for path in ((data / name), *(data / name).rglob("*"))
               if path.is_file())
    return min(row.memory_mb, 4096 + round(MEMORY_OF_DATA * held / 1e6))


def server_variables(row: Environment, options: Options, replica: int) -> dict[str, str]:
    """Return the variables of one server process that are no secrets."""
    return {
        "SESSION_TTL": str(options.session_ttl),
        "REPLICA": str(replica),
        "REPLICAS": str(options.replicas),
        "PYTHONHASHSEED": "0",
        **({
            "DEVICE": options.device
        } if options.device else {}),
        **({
            "I_UNDERSTAND": row.name
        } if options.understood else {}),
    }
