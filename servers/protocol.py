"""Speak an environment server's HTTP as its row says; as a program, tell whether a server is ready.

    python protocol.py ROW.json [--url http://127.0.0.1:8000] [--timeout 55]

It is copied into every environment image and is the image's health check, so it needs nothing but the standard
library of the oldest Python there (3.8). `GET /` runs no environment code and answers even where no item can be
played; ready means that a session can be created, reset and closed.
"""
import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Dict, NamedTuple, Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for an isolated Python, too
from environment_rows import Environment, Protocol
from servers.exchange import Stays, opener
from servers.gates import Refused, loads, shown

REPLY_BYTES = 64 << 20

# For questions that every server answers alike.
ANY = Protocol(id_reply="id", id="id", item="item", observation="reply", close=False)
# The servers answer on this machine or on a container's network: a proxy for the internet would only be in the way.
_OPENER = opener(urllib.request.ProxyHandler({}), Stays())


class ServerError(Exception):
    """The server answered with an error, in whatever form, or did not answer.

    Attributes:
        status: the HTTP status; 200 for an error inside a 200; None where no answer came.
    """

    def __init__(self, message: str, status: Optional[int] = None) -> None:
        super().__init__(message)
        self.status = status


class Step(NamedTuple):
    """What one action led to."""
    observation: str
    reward: float
    done: bool


def reason(error: BaseException) -> str:
    """Return what an exception says; the name of its type where it says nothing."""
    inner = getattr(error, "reason", None)
    if isinstance(inner, BaseException):
        return reason(inner)
    return str(inner or error) or type(error).__name__


def error_in(reply: Any) -> Optional[str]:
    """Return the error that a reply carries although its status is 200."""
    if isinstance(reply, dict) and reply.get("error") is not None:
        return str(reply["error"]) or "an error without a word"
    return None


class Client:
    """One environment server, spoken to as its protocol row says; sessions are ids that `create` returns."""

    def __init__(self, url: str, protocol: Optional[Protocol] = None, timeout: float = 30.0) -> None:
        self.protocol = protocol or ANY
        self.root = url.rstrip("/")
        self.base = self.root + self.protocol.prefix
        self.timeout = timeout

    def _call(self,
              route: str,
              body: Optional[Dict[str, Any]] = None,
              query: Optional[Dict[str, Any]] = None,
              base: str = "") -> Any:
        url = (base or self.base) + route + ("?" + urllib.parse.urlencode(query) if query else "")
        method = "GET" if query else "POST"
        what = method + " " + route
        try:
            request = urllib.request.Request(url, method=method)
            if body is not None:
                request.data = json.dumps(body).encode()
                request.add_header("Content-Type", "application/json")
            text = self._answer(request, what)
        except OSError as error:
            late = isinstance(getattr(error, "reason", error), TimeoutError)
            said = f"the answer did not end within {self.timeout:g} s" if late else shown(reason(error))
            raise ServerError(f"{what}: {said}") from None
        except (http.client.InvalidURL, ValueError) as error:  # no scheme, no such port
            raise ServerError(f"{what}: {error}; give an address like http://127.0.0.1:8000") from None
        except http.client.HTTPException as error:
            raise ServerError(f"{what}: {self.base} speaks no HTTP ({shown(repr(error), 80)})") from None
        try:
            reply = loads(text)
        except Refused as refused:
            raise ServerError(f"{what}: the answer's JSON is not read: {refused}", 200) from None
        except ValueError:
            raise ServerError(what + ": the answer is no JSON", 200) from None
        fault = error_in(reply)
        if fault is not None:
            raise ServerError(f"{what}: {shown(fault)}", 200)
        return reply

    def _answer(self, request: urllib.request.Request, what: str) -> bytes:
        """Return the body of an answer of at most `REPLY_BYTES`; all of it has as long as one request."""
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                text: bytes = response.read(REPLY_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = shown(error.read(1000).decode(errors="replace"))
            raise ServerError(f"{what}: HTTP {error.code} {said}", error.code) from None
        if len(text) > REPLY_BYTES:
            raise ServerError(f"{what}: the answer has more than {REPLY_BYTES >> 20} MiB", 200)
        return text

    def create(self) -> int:
        """Open a session and return its id."""
        reply = self._call("/create", self.protocol.create)
        key = self.protocol.id_reply
        session = (reply.get(key) if isinstance(reply, dict) else None) if key else reply
        if isinstance(session, bool) or not isinstance(session, int):
            raise ServerError(f"POST /create: no session id in {shown(reply)}", 200)
        return session

    def reset(self, session: int, item: int) -> str:
        """Put `item` before the session and return the first observation."""
        body = {self.protocol.id: session, self.protocol.item: item, **self.protocol.reset}
        reply = self._call("/reset", body)
        form, fault = self.protocol.observation, self.protocol.reset_fault
        if fault and isinstance(reply, dict) and fault.items() <= reply.items():
            raise ServerError(f"POST /reset: {shown(reply)}", 200)
        try:
            if form == "get":
                return str(self._call("/observation", query={self.protocol.id: session}))
            if form == "list":
                return str(reply[0])
            return "\n".join(str(reply[key]) for key in self.protocol.observation_keys)
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"POST /reset: no observation in {shown(reply)}", 200) from None

    def step(self, session: int, action: str) -> Step:
        """Take `action` in the session."""
        reply = self._call("/step", {self.protocol.id: session, "action": action})
        try:
            done = bool(reply[self.protocol.done])
            reward = float(reply[self.protocol.reward])
            observation = str(reply[self.protocol.state])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ServerError(f"POST /step: no observation, reward and end in {shown(reply)}", 200) from None
        if any(mark in observation
               for mark in self.protocol.faults) or observation.startswith(self.protocol.fault_starts):
            raise ServerError("POST /step: " + shown(observation), 200)
        return Step(observation, 0.0 if self.protocol.reward_when_done and not done else reward, done)

    def close(self, session: int) -> bool:
        """Close the session; False where the server has no close, or had no such session."""
        try:
            return self._call("/close", {self.protocol.id: session}) is not False
        except ServerError as error:
            if error.status in (404, 405):
                return False
            raise

    def sessions(self, replica: int = 0) -> Dict[str, Any]:
        """Return what servers/serve.py says of a replica: sessions live and pooled, memory_mb, pid, started."""
        reply = self._call("/_sessions", query={"replica": replica}, base=self.root)
        if not isinstance(reply, dict):
            raise ServerError("GET /_sessions: no table in " + shown(reply), 200)
        return reply


def check_ready(client: Client, item: int) -> int:
    """Create, reset and close one session; return its id.

    Raises:
        ServerError: one of them failed.
    """
    session = client.create()
    try:
        client.reset(session, item)
    finally:
        client.close(session)
    return session


def check_server(client: Client, row: Environment) -> None:
    """Raise a `ServerError` unless the row's server is ready.

    Where a session is what the user had to agree to, since it changes real accounts, none is opened: it is asked for
    its sessions only.
    """
    if row.consent:
        client.sessions()
    else:
        check_ready(client, row.check.items[0])


def main(argv: Optional[list] = None) -> int:
    """Return 0 when the server of the row is ready, 1 with one line when it is not."""
    parser = argparse.ArgumentParser(description="Tell whether an environment server is ready.")
    parser.add_argument("row", help="JSON file with the environment's row")
    parser.add_argument("--url", default="http://127.0.0.1:" + (os.environ.get("ENV_PORT") or "8000"))
    parser.add_argument("--timeout", type=float, default=55.0, help="seconds for each request")
    options = parser.parse_args(argv)
    with open(options.row) as file:
        row = Environment.read(json.load(file))
    try:
        check_server(Client(options.url, row.protocol, options.timeout), row)
    except ServerError as error:
        if error.status == 429:  # every session is in use, which no server manages that is not ready
            return 0
        print("not ready: " + shown(str(error), 2000))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
