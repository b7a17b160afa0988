"""What to start for an environment, decided from its row: ports, variables, Compose services, the proxy's rules."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.lib.environments.rows import Environment

SEARCHED_PORTS = 100
# Well above any action and below any attack: a request whose body is longer gets no id out of it and is refused.
BODY_BYTES = 131072
LABEL = "org.agentgym-rl.env"
PORT_LABEL = "org.agentgym-rl.env.port"
ROLE_LABEL = "org.agentgym-rl.env.role"
# Names under which the one environment server that runs is known to other containers (the guide's URLs).
ALIASES = ("env-server", "host.docker.internal")
REPLICA_PORT = 8000


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
        ValueError: none of the next hundred is.
    """
    for port in range(wanted, min(wanted + SEARCHED_PORTS, 65536)):
        if free(port):
            return port
    last = min(wanted + SEARCHED_PORTS, 65536) - 1
    raise ValueError(f"no port from {wanted} to {last} is free; choose one with --port")


def refusal(row: Environment, data: Path, environ: Mapping[str, str], understood: bool) -> str | None:
    """Return why `row` must not start yet, and the remedy; None where nothing is missing."""
    missing_data = row.missing_data(data)
    if missing_data:
        first = missing_data[0]
        how = first.how or f"run `invoke env.data --env {row.name}`"
        return f"{row.name} needs {first.path} in data/{row.name}: {how}"
    missing_keys = row.missing_keys(environ)
    if missing_keys:
        names = ", ".join(key.name for key in missing_keys)
        return f"{row.name} needs {names} in the environment or in .env; {missing_keys[0].name} is: {missing_keys[0].how}"
    if row.consent and not understood:
        return f"{row.consent}; pass --i-understand to go on"
    return None


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


def proxy_config(row: Environment, port: int, servers: Sequence[str], dns: bool = False) -> str:
    """Return HAProxy's configuration for `servers` (host:port), behind `port`.

    An id tells its replica (servers/serve.py), so a request goes to the backend of its id's remainder. Each replica
    is a backend of its own: while it is down its sessions get a 503, and no other replica is asked.

    Args:
        row: the environment.
        port: where the proxy listens.
        servers: the replicas' addresses, in the order of their numbers.
        dns: names are Docker's and may change their address.
    """
    prefix, key = row.protocol.prefix, row.protocol.id
    seconds = int(row.request_seconds or 3600)
    replica_down = json.dumps({"error": "the replica of this session is down"})
    none_up = json.dumps({"error": "no replica is up"})
    no_id = json.dumps({"error": f"no {key} in the request, or the request is too long"})
    died = json.dumps({"error": "the replica died while it answered"})
    late = json.dumps({"error": f"no answer within {seconds} s"})

    def text(answer: str) -> str:
        return "'" + answer.replace("'", "") + "'"

    resolve = " resolvers docker init-addr last,libc,none" if dns else ""
    lines = [
        "global",
        "    maxconn 4096",
        "    no strict-limits",  # fewer connections, not none, where few files may be open
        f"    tune.bufsize {BODY_BYTES}",
        "defaults",
        "    mode http",
        "    option http-buffer-request",
        "    http-reuse always",
        "    retries 0",  # a step or a create that was sent twice would be worse than an error
        "    timeout connect 5s",
        "    timeout http-request 30s",
        f"    timeout client {seconds}s",
        f"    timeout server {seconds}s",
        "    timeout http-keep-alive 60s",
        f"    http-error status 502 content-type application/json string {text(died)}",
        f"    http-error status 503 content-type application/json string {text(replica_down)}",
        f"    http-error status 504 content-type application/json string {text(late)}",
    ]
    if dns:
        lines += ["resolvers docker", "    nameserver docker 127.0.0.11:53", "    hold valid 1s"]
    lines += [
        "frontend environment",
        f"    bind :{port}",
        f"    acl creates path {prefix}/create",
        f"    acl needs_id path {prefix}/reset {prefix}/step {prefix}/close {prefix}/observation",
        f"    http-request set-var(txn.id) req.body,json_query('$.{key}','int') if METH_POST !creates",
        f"    http-request set-var(txn.id) url_param({key}) if METH_GET",
        "    http-request set-var(txn.id) url_param(replica) if { path /_sessions }",
        f"    http-request return status 400 content-type application/json string {text(no_id)}"
        " if needs_id !{ var(txn.id) -m found }",
        f"    use_backend replica%[var(txn.id),mod({len(servers)})] if {{ var(txn.id) -m found }}",
        "    use_backend create if creates",
        "    default_backend any",
        "backend any",
        "    balance roundrobin",
        f"    http-error status 503 content-type application/json string {text(none_up)}",
        # By connecting alone: a replica whose one event loop computes is busy, not down, and one that died refuses.
        "    default-server check inter 1s fall 2 rise 1 pool-purge-delay 30s" + resolve,
        *(f"    server replica{number} {address}" for number, address in enumerate(servers)),
    ]
    tracked = [
        f"    server replica{number} {address} track any/replica{number} pool-purge-delay 30s" + resolve
        for number, address in enumerate(servers)
    ]
    # Creates take turns of their own. One that a full or dead replica refused changed nothing, so another is asked.
    lines += [
        "backend create",
        "    balance roundrobin",
        f"    retries {len(servers)}",
        "    option redispatch 1",
        "    retry-on conn-failure 503",
        "    http-request set-header X-Asks-Another 1",
        "    http-response set-status 429 reason \"Too Many Requests\" if { status 503 }",
        f"    http-error status 503 content-type application/json string {text(none_up)}",
        *tracked,
    ]
    for number, server in enumerate(tracked):
        lines += [f"backend replica{number}", server]
    return "\n".join(lines) + "\n"


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
        "user": "${HOST_UID:-1000}:${HOST_GID:-1000}",
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
                ROLE_LABEL: "server"
            },
            # Five times: a server that cannot start must not start for ever. Recycling exits with a failure too,
            # and a container that ran for ten seconds begins to count anew.
            "restart": "on-failure:5",
            "mem_limit": f"{row.memory_mb}m",
            "memswap_limit": f"{row.memory_mb}m",
            "read_only": row.read_only,
            "tmpfs": [f"{folder}:mode=1777" for folder in row.tmpfs],
            "environment": {
                "ENV_PORT": str(port),
                **server_variables(row, options, replica),
                # By name: Compose takes the value from its own environment, and it lands in no argument.
                **{
                    key.name: None
                    for key in row.keys
                }
            },
        }
        if row.gpu:  # as x-gpus of docker-compose.yml: device_ids and not count, so that GPUS says "all" or "0,1"
            device = {"driver": "nvidia", "device_ids": ["${GPUS:-all}"], "capabilities": ["gpu"]}
            service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
        if data.is_dir():
            service["volumes"] = [{
                "type": "bind",
                "source": str(data.resolve()),
                "target": f"/data/{row.name}",
                "read_only": True
            }]
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
            ROLE_LABEL: "proxy"
        },
        "restart":
        "on-failure:5",
        "mem_limit":
        "1g",
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
