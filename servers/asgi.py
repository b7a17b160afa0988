"""ASGI, as far as a program between a server and its application needs it: bodies read, answers collected and made."""
import asyncio
import json
from typing import Any, Awaitable, Callable, Dict, Optional, Tuple

from servers import gates

Scope = Dict[str, Any]
Message = Dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TooLong(Exception):
    """A body above its limit."""


async def read(receive: Receive, limit: Optional[int] = None) -> bytes:
    """Return the request's whole body.

    Raises:
        TooLong: it has more than `limit` bytes; the rest is not read.
    """
    parts, length = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        length += len(part)
        if limit is not None and length > limit:
            raise TooLong()
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


def told_length(headers: Any) -> int:
    """Return the length that the headers tell; 0 where they tell none."""
    for name, value in headers:
        if name.lower() == b"content-length" and value.isdigit():
            return int(value[:19])
    return 0


async def is_gone(receive: Receive) -> bool:
    """Tell whether the client hung up; `receive` is the one of a request whose body may not have been read."""
    message = asyncio.ensure_future(receive())
    for _ in range(6):  # the loop has to see the end of the connection, and to tell the server of it
        await asyncio.sleep(0)
        if message.done():
            if message.result()["type"] == "http.disconnect":
                return True
            message = asyncio.ensure_future(receive())
    message.cancel()
    return False


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives `body` and then what the real one gives."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def collect(app: Callable, scope: Scope, receive: Receive) -> Tuple[int, list, bytes]:
    """Call `app` and return status, headers and body of its answer."""
    status, headers = 500, []
    parts = []

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message.get("headers", []))
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, headers, b"".join(parts)


async def relay(send: Send, status: int, headers: list, body: bytes) -> None:
    """Send a collected answer on."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def answer(send: Send, status: int, value: Any, headers: Optional[list] = None) -> None:
    """Send `value` as JSON; `headers` are those of the answer it replaces."""
    body = json.dumps(value).encode()
    await relay(send, status, with_length(headers or [(b"content-type", b"application/json")], len(body)), body)


def posting(path: str, length: int) -> Scope:
    """Return the scope of a POST of our own to `path`, whose body is JSON of `length` bytes."""
    return {
        "type": "http",
        "asgi": {
            "version": "3.0",
            "spec_version": "2.3"
        },
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": with_length([(b"host", b"localhost"), (b"content-type", b"application/json")], length),
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }


def with_length(headers: Any, length: int) -> list:
    """Return `headers` with this content-length."""
    return [header for header in headers if header[0].lower() != b"content-length"
            ] + [(b"content-length", str(length).encode())]


def parsed(body: bytes) -> Any:
    """Return the JSON value of `body`, or None where there is none that passes the gate."""
    try:
        return gates.loads(body)
    except ValueError:
        return None


def succeeded(status: int, reply: Any) -> bool:
    """Tell whether a reply is no error; some servers put theirs inside a 200."""
    return status == 200 and not (isinstance(reply, dict) and reply.get("error") is not None)
