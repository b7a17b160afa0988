"""The rules of the proxy before replicas."""
from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.lib.environments.rows import Environment

# Well above any action and below any attack: a request whose body is longer gets no id out of it and is refused.
BODY_BYTES = 131072


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
        # Half-sent requests each hold a connection, and a buffer once something of them came, until they time out.
        "    maxconn 16384",
        "    tune.buffers.limit 6144",
        "    no strict-limits",  # fewer connections, not none, where few files may be open
        f"    tune.bufsize {BODY_BYTES}",
        "defaults",
        "    mode http",
        "    option http-buffer-request",
        "    http-reuse always",
        "    retries 0",  # a step or a create that was sent twice would be worse than an error
        "    timeout connect 5s",
        "    timeout http-request 10s",
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
        "    http-request set-var(txn.id) url_param(replica) if { path /_sessions /metrics }",
        "    http-request use-service prometheus-exporter if METH_GET { path /metrics } !{ var(txn.id) -m found }",
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
