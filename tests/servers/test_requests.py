"""Requests that nobody listed: whatever a client sends is that request's fault alone, and costs nobody else."""
import asyncio
import itertools
import json
import os
import resource
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servers import gates
from servers.protocol import Client, ServerError, reason
from servers.sessions import QUERY_BYTES, REQUEST_BYTES, Sessions
from tasks.lib.environments.haproxy import proxy_config
from tests.fixtures import needs
from tests.fixtures.servers import ROOT, free_port, rows, running
from tests.servers import requests

LIMITS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=300, **LIMITS)
@given(st.lists(requests.anything(), max_size=6))
def test_whatever_is_sent_is_answered_and_leaves_a_neighbours_session_alone(drawn):
    requests.play(drawn)


@pytest.mark.slow
@settings(max_examples=1500, **LIMITS)
@given(st.lists(requests.anything(), max_size=6))
def test_whatever_is_sent_for_half_a_minute(drawn):
    requests.play(drawn)


@settings(max_examples=300, **LIMITS)
@given(requests.json_bytes())
def test_json_passes_the_gate_as_json_reads_it_or_not_at_all(body):
    try:
        mine = gates.loads(body)
    except ValueError:
        return
    assert json.dumps(mine) == json.dumps(json.loads(body)) and gates.depth(body) <= gates.DEPTH


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_a_body_means_to_the_gate_what_it_means_to_the_application(encoding):
    """Or a session's number inside the application could be sent past the gate."""

    async def both():
        server = requests.sessions()
        _, mine = await requests.ask(server, "POST", "/create", b"{}")
        inside = json.dumps({"id": 0, "action": "x"}).encode(encoding)
        status, reply = await requests.ask(server, "POST", "/step", inside)
        assert status == 404 and "no session 0" in reply["error"]
        own = json.dumps({"id": mine["id"], "data_idx": 0}).encode(encoding)
        assert (await requests.ask(server, "POST", "/reset", own))[0] == 200

    asyncio.run(both())


@settings(max_examples=300, **LIMITS)
@given(st.text() | st.text(alphabet="\x1b\x9b\u202e\u2066\n\r\t\x00\x7f\ud800a[31m"), st.integers(2, 300))
def test_foreign_text_is_one_line_that_does_nothing_to_a_terminal(text, width):
    seen = gates.shown(text, width)
    assert seen.isprintable() and len(seen) <= width
    if text.isprintable() and len(text) <= width:
        assert seen == text


@pytest.mark.parametrize("body,reason", [
    (b'{"id": ' + b"9" * 1_000_000 + b"}", "more than 400 digits"),
    (b"[" * 200_000, "levels deep"),
    (b'{"id": 1, "id": 2}', "one key is there twice"),
    (b'{"id": NaN}', "NaN is no number"),
    (b'{"id": 1e999}', "too large"),
])
def test_json_that_is_not_read_costs_its_sender_an_answer_and_nobody_time(body, reason, tmp_path):
    with running(rows()["form-textcraft"], tmp_path, REQUEST_BYTES=str(2 << 20)) as client:
        begun = time.monotonic()
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(client.base + "/step", data=body), timeout=30)
        assert caught.value.code == 400 and reason in json.loads(caught.value.read())["error"]
        assert time.monotonic() - begun < 2 and client.create()


@pytest.mark.parametrize("told", [True, False], ids=["length told", "in chunks"])
def test_a_request_that_is_too_long_is_refused_before_it_is_read(told, tmp_path):
    with running(rows()["form-textcraft"], tmp_path) as client:
        session = client.create()
        host, _, port = client.root.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=20) as sent:
            head = b"Content-Length: 400000000" if told else b"Transfer-Encoding: chunked"
            sent.sendall(b"POST /step HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
            if not told:
                for _ in range(3 * REQUEST_BYTES // (1 << 16)):
                    try:
                        sent.sendall(b"10000\r\n" + b"x" * (1 << 16) + b"\r\n")
                    except OSError:
                        break
            assert sent.recv(65536).startswith(b"HTTP/1.1 413 ")
        client.reset(session, 0)


def test_a_limit_that_is_none_is_told(tmp_path):
    with (pytest.raises(AssertionError, match="REQUEST_BYTES='lots' is no whole number"),
          running(rows()["form-textcraft"], tmp_path, REQUEST_BYTES="lots")):
        pass


def test_a_query_that_is_too_long_is_refused():
    status, reply = asyncio.run(
        requests.ask(requests.sessions(), "GET", "/observation", b"", b"id=" + b"9" * (QUERY_BYTES + 1)))
    assert status == 414 and "query" in reply["error"]


@pytest.mark.parametrize("counted", [False, True])
def test_ids_are_drawn_or_where_the_row_says_so_counted(counted, tmp_path):
    row = rows()["form-textcraft"].replaced(session_ids="counted" if counted else "random")
    for replicas in (1, 2, 7):
        server = Sessions(requests.Application(), row, replica=replicas - 1, replicas=replicas)
        ids = [asyncio.run(requests.ask(server, "POST", "/create", b"{}"))[1]["id"] for _ in range(200)]
        assert {one % replicas for one in ids} == {replicas - 1} and max(ids) < 2**53 and len(set(ids)) == 200
        if counted:
            assert ids == [number * replicas + replicas - 1 for number in range(1, 201)]
        else:  # neither near each other nor in order
            gaps = sorted(abs(one - other) for one, other in itertools.pairwise(ids))
            assert gaps[0] > 10**6 and ids != sorted(ids) and max(ids) > 2**51


def test_half_sent_requests_by_the_thousand_keep_nobody_out(tmp_path):
    with running(rows()["form-textcraft"], tmp_path) as client:
        host, _, port = client.root.removeprefix("http://").partition(":")
        half = []
        try:
            for number in range(3000):
                half.append(socket.create_connection((host, int(port)), timeout=10))
                half[-1].sendall(b"POST /step HTTP/1.1\r\nHost: x\r\nContent-Length: 40\r\n\r\n{"[:60 - 20 * (number % 3)])
            with ThreadPoolExecutor(4) as pool:
                sessions = list(pool.map(lambda _: client.create(), range(8)))
            assert len(set(sessions)) == 8
        finally:
            for one in half:
                one.close()


@pytest.mark.slow
def test_half_sent_requests_by_the_thousand_keep_nobody_out_of_the_proxy(tmp_path):
    haproxy = needs.haproxy()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 20000:
        pytest.skip(f"this machine lets a process open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    row, port = rows()["form-textcraft"], free_port()
    half = []
    with running(row, tmp_path) as client:
        config = tmp_path / "haproxy.cfg"
        config.write_text(proxy_config(row, port, [client.root.removeprefix("http://")]))
        proxy = subprocess.Popen([haproxy, "-db", "-f", config])
        try:
            behind = Client(f"http://127.0.0.1:{port}", row.protocol, timeout=20)
            while True:
                try:
                    behind.create()
                    break
                except ServerError:
                    time.sleep(0.1)
            for _ in range(5000):
                half.append(socket.create_connection(("127.0.0.1", port), timeout=10))
                half[-1].sendall(b"POST /step HTTP/1.1\r\nHost: x\r\nContent-Length: 4000\r\n\r\n" + b"x" * 1000)
            begun = time.monotonic()
            behind.create()
            assert time.monotonic() - begun < 2
        finally:
            for one in half:
                one.close()
            proxy.terminate()
            proxy.wait()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("answer,message", [
    (requests.endless(b"Content-Length: 99999999999\r\n"), "the answer has more than 64 MiB"),
    (requests.endless(b""), "the answer has more than 64 MiB"),
    (requests.whole(b"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:9/\r\n\r\n"), "HTTP 307"),
    (requests.whole(b"HTTP/1.1 500 No\r\n\r\n\x1b[2J\nsuccess rate 100 %\xe2\x80\xae"), r"HTTP 500 \\u001b\[2J\\nsuccess"),
    (requests.whole(b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000), "levels deep"),
    (requests.whole(b'HTTP/1.1 200 OK\r\n\r\n{"error": "\\u001b[2J\\nall is well\\u202e"}'), r"\\u001b\[2J\\nall is well\\u202e$"),
    (requests.whole(b'HTTP/1.1 200 OK\r\n\r\n{"error": ""}'), "POST /create: an error without a word"),
])
def test_an_answer_out_of_bounds_is_one_line(answer, message):
    with requests.answering(answer) as url:
        begun = time.monotonic()
        with pytest.raises(ServerError, match=message) as caught:
            Client(url, rows()["form-textcraft"].protocol, timeout=20).create()
        assert str(caught.value).isprintable() and len(str(caught.value)) < 300 and time.monotonic() - begun < 15


def test_an_answer_that_never_ends_ends_with_the_time():
    with requests.answering(requests.dripping) as url:
        begun = time.monotonic()
        with pytest.raises(ServerError, match="did not end within 2 s"):
            Client(url, rows()["form-textcraft"].protocol, timeout=2).create()
        assert time.monotonic() - begun < 8


def test_an_exception_that_says_nothing_is_called_by_its_type():
    assert reason(ConnectionResetError()) == "ConnectionResetError"
    assert reason(urllib.error.URLError(TimeoutError())) == "TimeoutError"
    assert os.strerror(111) in reason(urllib.error.URLError(ConnectionRefusedError(111, os.strerror(111))))


@pytest.mark.parametrize("flood", [b"x: y\r\n" * 200_000, b"x: " + b"a" * 2_000_000, b"a" * 2_000_000], ids=["many", "long", "name"])
@pytest.mark.parametrize("installed", [False, True], ids=["h11", "httptools too"])
def test_headers_without_end_are_refused_whatever_parsers_are_installed(installed, flood, tmp_path):
    """uvicorn prefers httptools, which has no limit for headers and keeps them all."""
    row = rows()["form-textcraft"]
    if installed:
        (tmp_path / "httptools.py").write_text("def HttpRequestParser(*_):\n    raise SystemExit('httptools was taken')\n"
                                               "class HttpParserError(Exception): pass\nclass HttpParserUpgrade(Exception): pass\n")
    with running(row, tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT / row.folder}") as client:
        address = urlsplit(client.base)
        with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
            with suppress(OSError):  # it may be closed before all is sent
                connection.sendall(b"POST /step HTTP/1.1\r\nhost: x\r\n" + flood)
            answer = b""
            with suppress(OSError):  # nor has the answer to come through then
                while piece := connection.recv(1000):
                    answer += piece
        assert not answer or answer.startswith(b"HTTP/1.1 400")
        session = client.create()
        assert client.reset(session, 3) == "count 3"


def test_a_connection_without_a_request_ends_and_a_slow_answer_does_not():
    """Headers that never come, or drip; between requests too."""
    import uvicorn

    from servers.connections import patient

    async def slow(scope, receive, send):
        await asyncio.sleep(2.5)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(slow, port=port, http=patient(0.5), lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    whole = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    try:
        for before, drip in ((b"", b""), (b"", b"G"), (b"GET / HTTP/1.1\r\nx: ", b"y"), (whole, b"G"), (whole, b"")):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                connection.sendall(before)
                if before == whole:
                    assert connection.recv(1000).startswith(b"HTTP/1.1 200")
                connection.settimeout(0.2)
                end, answer = time.monotonic() + 15, None
                while answer is None or answer == b"ok":
                    assert time.monotonic() < end, (before, drip)
                    try:
                        connection.sendall(drip)
                        answer = connection.recv(1000)
                    except TimeoutError:
                        continue
                    except OSError:
                        answer = b""
                assert answer == b""
    finally:
        server.should_exit = True
        thread.join(10)
