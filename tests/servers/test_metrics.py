"""GET /metrics: what a server counts, as Prometheus reads it."""
import asyncio
import re
import subprocess
import time
import urllib.request

import pytest

from servers.metrics import Requests
from servers.protocol import Client, ServerError
from tasks.lib.environments.haproxy import proxy_config
from tasks.lib.host.ports import free_port, port_is_free
from tests.fixtures import needs
from tests.fixtures.servers import rows, running
from tests.servers.requests import sessions

LINE = re.compile(r'([a-z_]+)(?:\{([^}]*)\})? ([-+0-9.e]+)')


def read(text):
    """Return the samples by name and labels; every line is one, or a comment."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("# "):
            name, labels, value = LINE.fullmatch(line).groups()
            assert (name, labels) not in found, "one sample twice"
            found[name, labels] = float(value)
    return found


def metrics_of(client):
    with urllib.request.urlopen(client.root + "/metrics", timeout=10) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return read(reply.read().decode())


@pytest.mark.parametrize("name", ["form-textcraft", "form-maze", "form-sqlgym"])
def test_requests_are_counted_by_route_and_status(name, tmp_path):
    with running(rows()[name], tmp_path) as client:
        before = metrics_of(client)
        session = client.create()
        client.reset(session, 1)
        for _ in range(3):
            client.step(session, "add")
        with pytest.raises(ServerError):
            client.step(session + 1, "add")
        found = metrics_of(client)
        assert found["agentgym_requests_total", 'route="step",status="200"'] == 3
        assert found["agentgym_requests_total", 'route="step",status="404"'] == 1
        assert found["agentgym_requests_total",
                     'route="create",status="200"'] == before["agentgym_requests_total",
                                                              'route="create",status="200"'] + 1
        assert found["agentgym_sessions", None] == 1 and found["agentgym_memory_bytes", None] > 1e6
        assert found["agentgym_request_seconds_count", 'route="step"'] == 4
        assert found["agentgym_request_seconds_bucket", 'route="step",le="+Inf"'] == 4
        assert found["agentgym_request_seconds_bucket", 'route="step",le="60.0"'] == 4


def test_the_proxy_tells_of_itself_and_each_replica_of_itself(tmp_path):
    haproxy = needs.haproxy()
    row = rows()["form-textcraft"]
    with running(row, tmp_path, True, "--replica", "0", "--replicas",
                 "2") as one, running(row, tmp_path, True, "--replica", "1", "--replicas", "2") as two:
        port, config = free_port(), tmp_path / "haproxy.cfg"
        config.write_text(proxy_config(row, port, [client.root.removeprefix("http://") for client in (one, two)]))
        with subprocess.Popen([haproxy, "-db", "-f", config]) as process:
            try:
                front = Client(f"http://127.0.0.1:{port}", row.protocol, timeout=10)
                end = time.monotonic() + 30
                while port_is_free(port):
                    assert time.monotonic() < end
                    time.sleep(0.05)
                two.create()
                for number, live in ((0, 0), (1, 1)):
                    with urllib.request.urlopen(f"{front.root}/metrics?replica={number}", timeout=10) as reply:
                        assert read(reply.read().decode())["agentgym_sessions", None] == live
                with urllib.request.urlopen(front.root + "/metrics", timeout=10) as reply:
                    assert b"haproxy_frontend_http_requests_total" in reply.read()
            finally:
                process.kill()


def test_a_time_counts_in_every_bucket_that_it_fits_into():
    requests = Requests()
    for seconds in (0.001, 0.0011, 100.0):
        requests.add("step", 200, seconds)
    found = read("\n".join(requests.lines()))
    assert [
        found["agentgym_request_seconds_bucket", f'route="step",le="{end}"']
        for end in ("0.001", "0.0025", "60.0", "+Inf")
    ] == [1, 2, 2, 3]


def test_strangers_paths_are_one_route_and_a_failing_application_is_a_500():
    server = sessions()

    async def ask(path):

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            pass

        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
        await server(scope, receive, send)

    async def all_of_them():
        for number in range(50):
            await ask(f"/wp-admin/{number}\"}} 1")

    asyncio.run(all_of_them())
    assert len(server.requests.counts) == 1 and next(iter(server.requests.counts))[0] == "other"
    read("\n".join(server.requests.lines()))

    async def raises(*_):
        raise RuntimeError("it broke")

    server.app = raises
    with pytest.raises(RuntimeError):
        asyncio.run(ask("/observation"))
    assert server.requests.counts["observation", 500] == 1
