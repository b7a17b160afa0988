"""Sessions around an environment's own application: whose they are, how many there are, and when they end."""
import asyncio
import json
import os
import secrets
import time
from typing import Any, Callable, Dict, List, Optional, Set, Tuple
from urllib.parse import parse_qsl, urlencode

from environment_rows import Environment
from servers import gates, metrics
from servers.asgi import (
    Message,
    Receive,
    Scope,
    Send,
    TooLong,
    answer,
    collect,
    is_gone,
    parsed,
    posting,
    read,
    relay,
    replay,
    succeeded,
    told_length,
    with_length,
)
from servers.foreign import INTERRUPTED, note_stopped_queries
from servers.memory import memory_mb
from servers.saying import say

# Ids are drawn below this, where JSON readers do not round yet: of 2**53 nobody guesses one that is live, and a run
# does not meet one of a run before.
IDS = 2**53
QUERY_BYTES = 8192
REQUEST_BYTES = 1 << 20  # a model's longest completion as an action, several times over
BODY_SECONDS = 60  # for a request's body to come
# The proxy before replicas sends it with a create: after a 503 it asks the next one, and says 429 where none has room.
ASKS_ANOTHER = (b"x-asks-another", b"1")


class Session:
    """One live session: its id inside the server, when it was last used, and by how many requests it is in use."""
    __slots__ = ("busy", "closed", "dirty", "local", "used")

    def __init__(self, local: int, dirty: bool = False) -> None:
        self.local = local
        self.used = time.monotonic()
        self.busy = 0
        self.closed = False
        # True for a pooled session until its first reset: it still holds what its last user left.
        self.dirty = dirty


class Sessions:
    """ASGI application that maps session ids and tends idle sessions around an environment's own application."""

    def __init__(self,
                 app: Callable,
                 row: Environment,
                 ttl: float = 0.0,
                 replica: int = 0,
                 replicas: int = 1,
                 about: Optional[Dict[str, str]] = None,
                 after_reaping: Optional[Callable[[], None]] = None) -> None:
        protocol = row.protocol
        self.app = app
        self.state, self.prefix, self.key = protocol.state, protocol.prefix, protocol.id
        self.id_reply, self.has_close = protocol.id_reply, protocol.close
        self.first_reset = {protocol.item: row.check.items[0], **protocol.reset}
        self.limit, self.serial_reset, self.limits_queries = row.max_sessions, row.serial_reset, bool(
            row.sqlite_seconds)
        self.ttl, self.replica, self.replicas = ttl, replica, replicas
        self.after_reaping = after_reaping
        self.turn: Optional[asyncio.Lock] = None  # made in the loop that runs: Python 3.8 ties a lock to its loop
        self.live: Dict[int, Session] = {}
        self.leaving: Set[Session] = set()  # closed while a request was in them
        self.in_use: Set[int] = set()
        self.pool: List[int] = []
        self.opening = 0
        self.started: Dict[object, float] = {}
        self.about = about or {}
        self.requests = metrics.Requests()
        self.begun = time.time()  # in containers every start of a server has the same process id
        self.body_bytes = gates.limit("REQUEST_BYTES", REQUEST_BYTES)
        self.counts_ids, self.next = row.session_ids == "counted", 1

    def is_idle(self) -> bool:
        """Return True if no session is live, being opened or being closed."""
        return not (self.live or self.leaving or self.opening)

    def longest_request(self) -> float:
        """Return the seconds since the oldest request began that is being answered; any thread may ask."""
        begun = min(list(self.started.values()), default=None)
        return 0.0 if begun is None else time.monotonic() - begun

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            asyncio.get_running_loop().create_task(self._reap_idle())
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, posted = scope["path"], scope["method"] == "POST"
        if path == "/_sessions":
            return await answer(
                send, 200, {
                    "live": len(self.live),
                    "pooled": len(self.pool),
                    "memory_mb": memory_mb(),
                    "pid": os.getpid(),
                    "started": self.begun,
                    "about": self.about
                })
        if path == "/metrics" and scope["method"] == "GET":
            lines = self.requests.lines() + metrics.gauges({
                "agentgym_sessions": ("Live sessions.", len(self.live)),
                "agentgym_sessions_pooled": ("Sessions that wait for the next create.", len(self.pool)),
                "agentgym_requests_running": ("Requests that are being answered.", len(self.started)),
                "agentgym_memory_bytes": ("Memory of the server and its children.", memory_mb() * 1e6),
                "process_start_time_seconds": ("When the server started, since 1970.", self.begun),
            })
            body = ("\n".join(lines) + "\n").encode()
            return await relay(send, 200, with_length([(b"content-type", metrics.TYPE)], len(body)), body)
        if len(scope["query_string"]) > QUERY_BYTES:
            return await answer(send, 414, {"error": f"the query has more than {QUERY_BYTES} bytes"})
        request: Any = None
        if scope["method"] not in ("GET", "HEAD"):  # before the clock starts: a client that stalls is no stuck server
            try:
                if told_length(scope["headers"]) > self.body_bytes:
                    raise TooLong()
                body = await asyncio.wait_for(read(receive, self.body_bytes), BODY_SECONDS)
                request = gates.loads(body)
            except asyncio.TimeoutError:
                return await answer(send, 408, {"error": f"the request's body did not come within {BODY_SECONDS} s"})
            except TooLong:
                return await answer(
                    send, 413,
                    {"error": f"the request has more than {self.body_bytes} bytes "
                     "(REQUEST_BYTES sets the limit)"})
            except gates.Refused as refused:
                return await answer(send, 400, {"error": f"the request's JSON is not read: {refused}"})
            except ValueError:
                pass  # no JSON: what that means is the application's to say
            receive = replay(body, receive)
        token = object()
        begun = self.started[token] = time.monotonic()
        status = 500  # an application that raises before it answers

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send_on(message)

        send, send_on = counted, send
        try:
            if posted and path == self.prefix + "/create":
                return await self._create(scope, receive, send)
            if posted:
                return await self._post(request, scope, receive, send)
            return await self._get(scope, receive, send)
        finally:
            del self.started[token]
            self.requests.add(path[len(self.prefix) + 1:], status, time.monotonic() - begun)

    async def _create(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.limit is not None and len(self.live) + len(self.leaving) + self.opening >= self.limit:
            status = 503 if ASKS_ANOTHER in scope["headers"] else 429
            return await answer(send, status, {"error": f"all {self.limit} sessions of this server are in use"})
        if self.pool:
            public = self._register(Session(self.pool.pop(), dirty=True))
            return await answer(send, 200, {self.id_reply: public} if self.id_reply else public)
        self.opening += 1
        try:
            status, headers, body = await self._in_turn(scope, receive)
        finally:
            self.opening -= 1
        reply = parsed(body)
        local = (reply.get(self.id_reply) if isinstance(reply, dict) else None) if self.id_reply else reply
        if status == 200 and isinstance(local, int) and not isinstance(local, bool):
            if local in self.in_use:
                return await answer(send, 500, {"error": "the server handed out a session that is in use"})
            public = self._register(Session(local))
            if await is_gone(receive):  # or nobody would ever close it
                return await self._close(public)
            reply = {**reply, self.id_reply: public} if self.id_reply else public
            return await answer(send, status, reply, headers)
        await relay(send, status, headers, body)

    async def _post(self, request: Any, scope: Scope, receive: Receive, send: Send) -> None:
        if not isinstance(request, dict) or self.key not in request:
            return await self.app(scope, receive, send)
        await receive()  # the body, in whose place comes one with the application's own id
        path = scope["path"]
        resets, closes = path == self.prefix + "/reset", path == self.prefix + "/close"
        session = self._find(request[self.key])
        if session is None:
            return await answer(send, 404, {"error": f"no session {gates.shown(request[self.key], 60)} here"})
        if session.dirty and not (resets or closes):
            return await answer(send, 409, {"error": f"session {request[self.key]} was not reset yet"})
        if closes and not self.has_close:
            self._forget(request[self.key])
            return await answer(send, 200, True)
        public, request[self.key] = request[self.key], session.local
        body = json.dumps(request).encode()
        scope = {**scope, "headers": with_length(scope["headers"], len(body))}
        session.busy += 1
        try:
            if resets:
                status, headers, body = await self._in_turn(scope, replay(body, receive))
                reply = parsed(body)
                session.dirty = session.dirty and not succeeded(status, reply)
                if isinstance(reply, dict) and self.id_reply in reply:
                    body = json.dumps({**reply, self.id_reply: public}).encode()
                await relay(send, status, with_length(headers, len(body)), body)
            elif closes:
                status, headers, body = await collect(self.app, scope, replay(body, receive))
                if status == 200 and public in self.live:
                    self._drop(public)
                await relay(send, status, headers, body)
            elif self.limits_queries and path == self.prefix + "/step":
                await self._step_with_queries(scope, replay(body, receive), send)
            else:
                await self.app(scope, replay(body, receive), send)
        finally:
            self._release(session)

    async def _get(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        if self.key not in query:
            return await self.app(scope, receive, send)
        asked = query[self.key]
        session = self._find(parsed(asked.encode()))
        if session is None:
            return await answer(send, 404, {"error": f"no session {gates.shown(asked, 60)} here"})
        query[self.key] = str(session.local)
        session.busy += 1
        try:
            if session.dirty:
                status, body = await self._post_inside("/reset", {self.key: session.local, **self.first_reset})
                if not succeeded(status, parsed(body)):
                    return await answer(send, 409, {"error": f"session {asked} was not reset yet"})
            await self.app({**scope, "query_string": urlencode(query).encode()}, receive, send)
        finally:
            self._release(session)

    async def _in_turn(self, scope: Scope, receive: Receive) -> Tuple[int, list, bytes]:
        """Collect the answer to a create or a reset; where the row asks for it, one at a time."""
        if not self.serial_reset:
            return await collect(self.app, scope, receive)
        self.turn = self.turn or asyncio.Lock()
        async with self.turn:
            return await collect(self.app, scope, receive)

    async def _step_with_queries(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a step, but with an error where a query other than the action's own was stopped.

        sqlgym takes the stopped reference query's error for its result, and the right answer for a wrong one.
        """
        found = note_stopped_queries()
        status, headers, body = await collect(self.app, scope, receive)
        reply = parsed(body)
        if found and not (isinstance(reply, dict) and reply.get(self.state) == INTERRUPTED):
            return await answer(send, 500, {"error": f"the reference query took longer than {found[0]:g} s"})
        await relay(send, status, headers, body)

    def _register(self, session: Session) -> int:
        public = self._draw_id() * self.replicas + self.replica
        self.live[public] = session
        self.in_use.add(session.local)
        return public

    def _draw_id(self) -> int:
        if self.counts_ids:
            self.next += 1
            return self.next - 1
        while True:  # once, but for an accident
            drawn = secrets.randbelow(IDS // self.replicas - 1)
            if drawn * self.replicas + self.replica not in self.live:
                return drawn

    def _drop(self, public: int) -> Session:
        session = self.live.pop(public)
        self.in_use.discard(session.local)
        if session.busy:
            self.leaving.add(session)
        return session

    def _find(self, public: Any) -> Optional[Session]:
        session = self.live.get(public) if isinstance(public, int) and not isinstance(public, bool) else None
        if session is not None:
            session.used = time.monotonic()
        return session

    def _release(self, session: Session) -> None:
        session.used = time.monotonic()
        session.busy -= 1
        if session.busy:
            return
        self.leaving.discard(session)
        if session.closed:
            self.pool.append(session.local)

    def _forget(self, public: int) -> None:
        """Take a session of a server without close out of use; the pool gets it once no request is in it."""
        session = self._drop(public)
        session.closed = True
        if not session.busy:
            self.pool.append(session.local)

    async def _reap_idle(self) -> None:
        while True:
            await asyncio.sleep(min(max(self.ttl / 4, 0.25), 30.0) if self.ttl else 30.0)
            try:
                await self.close_idle()
            except Exception as error:  # a server whose close fails must not stop the reaping of the others
                say(f"closing idle sessions: {error!r}")
            if self.after_reaping is not None:
                self.after_reaping()

    async def close_idle(self) -> int:
        """Close the sessions that nobody used for the time to live; return how many."""
        if not self.ttl:
            return 0
        oldest = time.monotonic() - self.ttl
        idle = [public for public, session in self.live.items() if not session.busy and session.used < oldest]
        for public in idle:
            session = self.live.get(public)
            if session is None or session.busy or session.used >= oldest:  # used while we closed others
                continue
            await self._close(public)
        return len(idle)

    async def _close(self, public: int) -> None:
        if self.has_close:
            await self._post_inside("/close", {self.key: self._drop(public).local})
        else:
            self._forget(public)

    async def _post_inside(self, route: str, request: Dict[str, Any]) -> Tuple[int, bytes]:
        """Send the environment's own application a request of ours; return status and body of its answer."""
        body = json.dumps(request).encode()
        scope = posting(self.prefix + route, len(body))

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        if route == "/reset":
            status, _, reply = await self._in_turn(scope, replay(body, receive))
        else:
            status, _, reply = await collect(self.app, scope, replay(body, receive))
        return status, reply
