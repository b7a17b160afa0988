"""What was started and not stopped, whichever runner it has."""
from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servers.protocol import Client, ServerError
from tasks.lib.environments import docker as env_docker
from tasks.lib.environments import local as env_local
from tasks.lib.environments.plan import Options
from tasks.lib.environments.rows import Environment
from tasks.lib.errors import DockerError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Running:
    """An environment that was started and not stopped.

    Attributes:
        runner: docker or local.
        url: its address for programs on this machine.
        port: where its entry listens.
        servers: how many server processes or containers run.
        replicas: how many were started.
        state: running, or what Docker says of what does not run, where it does not serve.
        up: whether it serves: its entry runs, and a server behind it.
        service: its name for containers of this project; empty for a process of this machine.
        image: id of the image that serves, a digest; empty for a process of this machine.
    """
    runner: str
    url: str
    port: int
    servers: int
    replicas: int
    state: str
    up: bool
    service: str = ""
    image: str = ""


def running_servers() -> dict[str, list[Running]]:
    """Return what was started and not stopped, by environment; without an engine, the local servers only."""
    found: dict[str, list[Running]] = {}
    for name, state in env_local.states().items():
        alive = [entry for entry in state["processes"] if env_local.is_running(entry)]
        if alive:
            count = sum(entry["role"] != "proxy" for entry in alive)
            up = count > 0 and any(entry["port"] == state["port"] for entry in alive)
            replicas = sum(entry["role"] != "proxy" for entry in state["processes"])
            found.setdefault(name,
                             []).append(Running("local", state["url"], state["port"], count, replicas, "running", up))
    try:
        containers = env_docker.servers()
    except DockerError:
        return found
    for name in sorted({server.environment for server in containers}):
        mine = [server for server in containers if server.environment == name]
        count = sum(server.role != "proxy" and server.state == "running" for server in mine)
        entry = next((server for server in mine if server.role == "proxy"), mine[0])
        url = env_local.url(Options(port=entry.port, bind=entry.bind))
        up = count > 0 and entry.state == "running"
        shown = "running" if up else next((server.state for server in mine if server.state != "running"), "running")
        replicas = sum(server.role != "proxy" for server in mine)
        image = next((server.image for server in mine if server.role != "proxy"), "")
        found.setdefault(name,
                         []).append(Running("docker", url, entry.port, count, replicas, shown, up, entry.service,
                                            image))
    return found


def servers_up() -> dict[str, Running]:
    """Return the environments that are up, by name."""
    return {name: one for name, found in running_servers().items() for one in reversed(found) if one.up}


def local_url(row: Environment) -> str | None:
    """Return the address of the row's local server, where one is up."""
    state = env_local.states().get(row.name)
    return state["url"] if state and all(env_local.is_running(entry) for entry in state["processes"]) else None


def log_files(name: str) -> list[Path]:
    """Return the logs in the environment's run folder: those of its local server, or of the last start that failed."""
    state = env_local.states().get(name)
    home = env_local.RUN / name
    return [home / f"{entry['role']}.log" for entry in state["processes"]] if state else sorted(home.glob("*.log"))


def session_totals(found: Running) -> Mapping[str, Any] | None:
    """Return what a server says of its sessions, summed over the replicas that answer; None where none does."""
    client = Client(found.url, timeout=2)
    total: dict[str, Any] | None = None
    for number in range(found.replicas):
        with suppress(ServerError, KeyError, TypeError):
            counted = client.sessions(number)
            before = total or {"live": 0, "pooled": 0, "memory_mb": 0.0}
            total = {key: value + counted[key] for key, value in before.items()}
    return total


def container_url(service: str, port: int) -> str:
    """Return the address of a Compose service for containers of this project."""
    return f"http://{service}:{port}"
