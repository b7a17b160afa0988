"""Requests and answers out of bounds, for tests and for `benchmarks/fuzz.py`."""
import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from hypothesis import strategies as st

from servers.sessions import Sessions
from tests.fixtures.servers import rows


class Request(NamedTuple):
    """What a stranger sends."""
    method: str
    path: str
    body: bytes
    query: bytes


class Application:
    """An environment's application in short: sessions that count their steps."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        try:
            status, reply = (200, self.answer(scope["path"], body)) if scope["method"] == "POST" else (405, None)
        except Exception as error:  # as a server's own handler does
            status, reply = 500, {"detail": repr(error)[:100]}
        text = json.dumps(reply).encode()
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(text))]})
        await send({"type": "http.response.body", "body": text})

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/create":
            self.counts[len(self.counts)] = 0
            return {"id": len(self.counts) - 1}
        request = json.loads(body)
        if path == "/close":
            return self.counts.pop(request["id"], None) is not None
        self.counts[request["id"]] = 0 if path == "/reset" else self.counts[request["id"]] + 1
        return {"observation": f"count {self.counts[request['id']]}", "reward": 0.0, "done": False}


def sessions() -> Sessions:
    """Return a server of sessions around an application."""
    return Sessions(Application(), rows()["form-textcraft"])


async def ask(server: Sessions, method: str, path: str, body: bytes, query: bytes = b"") -> tuple[int, Any]:
    """Return status and JSON of the answer to a request, as uvicorn would hand it over: in pieces."""
    pieces = [body[at:at + 65536] for at in range(0, len(body), 65536)] or [b""]
    sent: list[dict] = []

    async def receive() -> dict:
        if not pieces:
            await asyncio.Event().wait()  # the client waits for its answer
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": query, "headers": [], "root_path": ""}
    await server(scope, receive, send)
    assert sent[0]["type"] == "http.response.start" and sent[-1]["type"] == "http.response.body"
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def json_values() -> st.SearchStrategy:
    """JSON of every kind, with the numbers and words that break readers."""
    numbers = st.integers() | st.integers(10**300, 10**500) | st.floats() | st.sampled_from([0, -1, 2**53, 2**63, 2**64])
    words = st.text(max_size=20) | st.sampled_from(["id", "data_idx", "action", "\ud800", "\x1b[2J", "__proto__"])
    return st.recursive(st.none() | st.booleans() | numbers | words,
                        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
                        max_leaves=12)


def json_bytes() -> st.SearchStrategy:
    """Bodies: JSON, JSON with a key twice, deep JSON, torn JSON, and bytes."""
    whole = json_values().map(lambda value: json.dumps(value).encode())
    twice = st.tuples(whole, whole).map(lambda two: b'{"id": %s, "id": %s}' % two)
    deep = st.tuples(st.sampled_from([b"[", b'{"a":', b"[{", b'["']), st.integers(1, 5000)).map(lambda two: two[0] * two[1])
    closed = st.integers(1, 300).map(lambda level: b"[" * level + b"]" * level)
    digits = st.integers(1, 3000).map(lambda count: b'{"id": ' + b"7" * count + b"}")
    torn = st.tuples(whole, st.integers(0, 40)).map(lambda two: two[0][:two[1]])
    return whole | twice | deep | closed | digits | torn | st.binary(max_size=60)


def anything() -> st.SearchStrategy:
    """Requests of every kind to the routes of a server, and beside them."""
    paths = st.sampled_from(["/create", "/reset", "/step", "/close", "/observation", "/_sessions", "/", "/nowhere"])
    ids = json_values().map(lambda value: json.dumps({"id": value, "data_idx": 0, "action": "x"}).encode())
    queries = st.binary(max_size=40) | st.text(max_size=20).map(lambda text: b"id=" + text.encode(errors="replace"))
    return st.builds(Request, st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "HEAD"]), paths, ids | json_bytes(),
                     queries)


def play(drawn: list[Request]) -> None:
    """Send `drawn` between the steps of a neighbour, whose session must not notice.

    Raises:
        AssertionError: an answer was none, took seconds, or the neighbour's session changed.
    """

    async def both() -> None:
        server = sessions()
        status, mine = await ask(server, "POST", "/create", b"{}")
        assert status == 200
        await ask(server, "POST", "/reset", json.dumps({"id": mine["id"], "data_idx": 0}).encode())
        for number, one in enumerate(drawn):
            begun = time.monotonic()
            status, _ = await ask(server, *one)
            assert 200 <= status < 600 and time.monotonic() - begun < 5, one
            step = await ask(server, "POST", "/step", json.dumps({"id": mine["id"], "action": "x"}).encode())
            assert step == (200, {"observation": f"count {number + 1}", "reward": 0.0, "done": False}), one

    asyncio.run(both())


def whole(answer: bytes) -> Callable[[socket.socket], None]:
    """Return what sends `answer` and no more."""

    def send(connection: socket.socket) -> None:
        connection.sendall(answer)
        # Closed with something unread, a connection is reset, and the answer may be lost with it.
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(10)
            while connection.recv(1 << 16):
                pass

    return send


def endless(header: bytes) -> Callable[[socket.socket], None]:
    """Return what sends an answer without end."""

    def send(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + header + b"\r\n")
        while True:
            connection.sendall(b"x" * (1 << 20))

    return send


def dripping(connection: socket.socket) -> None:
    """Send an answer a byte at a time, for ever."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.1)


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Give the address of a server that reads a request and then does `answer`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    try:
                        connection.recv(65536)
                        answer(connection)
                    except OSError:
                        pass  # the client hung up

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
