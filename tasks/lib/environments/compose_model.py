"""The Compose services of an environment."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.lib.environments.rows import Environment
from tasks.lib.engine.ownership import UID
from tasks.lib.environments.plan import Options, memory_mb, server_variables

LABEL = "org.agentgym-rl.env"

PORT_LABEL = "org.agentgym-rl.env.port"

ROLE_LABEL = "org.agentgym-rl.env.role"

# Names under which the one environment server that runs is known to other containers (the guide's URLs).
ALIASES = ("env-server", "host.docker.internal")

REPLICA_PORT = 8000

SCRATCH = "/scratch"  # where the image has a folder that everybody may write to


class Variable(str):
    """A text in which Compose is to fill in variables."""
    __slots__ = ()


USER_ID = Variable("${HOST_UID:+$HOST_UID}")


def escaped(value: Any) -> Any:
    """Return a Compose file's `value` in which Compose fills in nothing but what is a `Variable`.

    Paths, names and words of others may have a $, which Compose would take for a variable: with it the value of a
    secret would come into a path or a label.
    """
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(inner) for inner in value]
    return value.replace("$", "$$") if isinstance(value, str) and not isinstance(value, Variable) else value


def service_name(row: Environment, replica: int | None = None) -> str:
    """Return the Compose service of the environment's entry, or of one replica behind it."""
    return f"env-{row.name}" if replica is None else f"env-{row.name}-{replica}"


def compose_model(row: Environment, options: Options, image: str, proxy_image: str, home: Path, data: Path,
                  build: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Compose file that runs `row`: one server, or replicas behind a proxy.

    Args:
        row: the environment.
        options: what the user chose.
        image: full name of the environment's image.
        proxy_image: full name of the proxy's.
        home: folder that has the proxy's haproxy.cfg.
        data: the environment's data folder on the host; mounted read-only where it exists.
        build: how the image is built (`build` of the service).
    """
    hardened = {
        "init": True,
        "security_opt": ["no-new-privileges:true"],
        "cap_drop": ["ALL"],
        "logging": {
            "driver": "json-file",
            "options": {
                "max-size": "10m",
                "max-file": "3"
            }
        },
        "user": Variable("${HOST_UID:-1000}:${HOST_GID:-1000}"),
    }

    def server(replica: int, port: int) -> dict[str, Any]:
        service: dict[str, Any] = {
            **hardened,
            "image": image,
            "build": dict(build),
            "pull_policy": "never",
            "labels": {
                LABEL: row.name,
                PORT_LABEL: str(options.port),
                ROLE_LABEL: "server",
                UID: USER_ID,
            },
            # Five times: a server that cannot start must not start for ever. Recycling exits with a failure too,
            # and a container that ran for ten seconds begins to count anew.
            "restart": "on-failure:5",
            "mem_limit": f"{memory_mb(row, data)}m",
            "memswap_limit": f"{memory_mb(row, data)}m",
            "pids_limit": row.processes,
            "read_only": row.read_only,
            "tmpfs": [f"{folder}:mode=1777" for folder in row.tmpfs],
            "environment": {
                "ENV_PORT": str(port),
                "REQUEST_BYTES": None,
                **server_variables(row, options, replica),
                # By name: Compose takes the value from its own environment, and it lands in no argument.
                **{
                    key.name: None
                    for key in row.keys
                }
            },
        }
        if row.gpu and options.device != "cpu":  # as x-gpus of docker-compose.yml: device_ids and not count, so that GPUS says "all" or "0,1"
            device = {"driver": "nvidia", "device_ids": [Variable("${GPUS:-all}")], "capabilities": ["gpu"]}
            service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
        volumes: list[dict[str, Any]] = []
        if data.is_dir():
            volumes.append({
                "type": "bind",
                "source": str(data.resolve()),
                "target": f"/data/{row.name}",
                "read_only": True
            })
        if row.scratch:  # anonymous: it goes with its container
            volumes.append({"type": "volume", "target": SCRATCH})
        if volumes:
            service["volumes"] = volumes
        return service

    published = [f"{options.bind}:{options.port}:{options.port}"]
    network = {"default": {"aliases": list(ALIASES) if options.aliases else []}}
    entry = service_name(row)
    if options.replicas == 1:
        return {"services": {entry: {**server(0, options.port), "ports": published, "networks": network}}}
    replicas = {service_name(row, number): server(number, REPLICA_PORT) for number in range(options.replicas)}
    proxy = {
        **hardened,
        "image":
        proxy_image,
        "build": {
            **build, "target": "proxy"
        },
        "pull_policy":
        "never",
        "labels": {
            LABEL: row.name,
            PORT_LABEL: str(options.port),
            ROLE_LABEL: "proxy",
            UID: USER_ID,
        },
        "restart":
        "on-failure:5",
        "mem_limit":
        "1g",
        "pids_limit":
        256,
        "read_only":
        True,
        "ports":
        published,
        "networks":
        network,
        "depends_on":
        list(replicas),
        # A file and not `configs: content`, which Compose copies in and so fails on a read-only root.
        "volumes": [{
            "type": "bind",
            "source": str(home / "haproxy.cfg"),
            "target": "/etc/haproxy/haproxy.cfg",
            "read_only": True
        }],
    }
    return {"services": {**replicas, entry: proxy}}
