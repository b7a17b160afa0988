"""Start an environment server of AgentGym's kind so that it can be trusted with many sessions.

    python serve.py ROW.json --source DIR [--data DIR] [--host 127.0.0.1] [--port 8000] [--session-ttl 3600]

ROW.json is the environment's table of environments.toml, DIR of --source the folder that its package folder lies in.
The process exits with 2 and one line where data, keys or consent are missing. The server's own application runs
unchanged; upstream's start commands only call uvicorn with an access log that costs a line for every step. Around it:

- `os.listdir` is sorted, so that an item id is the same task on every machine (with PYTHONHASHSEED=0, which must be
  set before Python starts).
- Every session gets an id that no other replica and no earlier run of this server gave out: id % replicas is the
  replica, so a proxy routes by arithmetic, and a client that outlives a restart gets an error, never another
  session's state.
- A session that nobody used for --session-ttl seconds is closed. Where the server has no close, the session goes to
  a pool: the next create takes it. Its first step must follow a reset; whoever looks at it before that (AgentGym's
  client of wordle reads the vocabulary first) sees it as a reset to the row's first item leaves it.
- Where the row says serial_reset, creates and resets run one at a time: textcraft's draw from Python's one random
  generator in several threads, and an item would differ from one time to the next.
- GET /_sessions tells how many sessions are live, how much memory the server has, and its process id.

It runs with every environment's own Python and uvicorn, so: Python 3.8, no other dependency.
"""
import argparse
import asyncio
import contextvars
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
import types
from typing import Any, Awaitable, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Set, Tuple
from urllib.parse import parse_qsl, urlencode

Scope = Dict[str, Any]
Message = Dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Ids start at the milliseconds since this moment: one more session a millisecond than any server opens would have to
# be created before two runs could meet, and the numbers stay below 2**53, where JSON readers begin to round.
ID_EPOCH = 1_600_000_000
RECYCLE_AT = 0.8  # of the memory limit
MISUSE, RECYCLED, STUCK = 2, 75, 70  # exit codes
ATTACH = 24  # SQLITE_ATTACH
BODY_SECONDS = 60  # for a request's body to come
# The proxy before replicas sends it with a create: after a 503 it asks the next one, and says 429 where none has room.
ASKS_ANOTHER = (b"x-asks-another", b"1")
INTERRUPTED = "interrupted"  # what SQLite says of a query that was stopped

# The queries that were stopped in the request that runs now; threads that work for the request see it too.
stopped: "contextvars.ContextVar[Optional[List[float]]]" = contextvars.ContextVar("stopped", default=None)


class Session:
    """One live session: its id inside the server, when it was last used, and by how many requests it is in use."""
    __slots__ = ("busy", "closed", "local", "pristine", "used")

    def __init__(self, local: int, pristine: bool = True) -> None:
        self.local = local
        self.used = time.monotonic()
        self.busy = 0
        self.closed = False
        # False for a pooled session until its first reset: it still holds what its last user left.
        self.pristine = pristine


class Sessions:
    """ASGI application that maps session ids and tends idle sessions around an environment's own application."""

    def __init__(self,
                 app: Callable,
                 protocol: Dict[str, Any],
                 ttl: float = 0.0,
                 limit: Optional[int] = None,
                 replica: int = 0,
                 replicas: int = 1,
                 first_item: int = 0,
                 after_tending: Optional[Callable[[], None]] = None,
                 serial_reset: bool = False,
                 limits_queries: bool = False) -> None:
        self.app = app
        self.state = protocol.get("state", "observation")
        self.serial_reset, self.limits_queries = serial_reset, limits_queries
        self.turn: Optional[asyncio.Lock] = None  # made in the loop that runs: Python 3.8 ties a lock to its loop
        self.prefix = protocol.get("prefix", "")
        self.key = protocol["id"]
        self.id_reply = protocol["id_reply"]
        self.has_close = protocol["close"]
        self.first_reset = {protocol["item"]: first_item, **protocol.get("reset", {})}
        self.ttl, self.limit, self.replica, self.replicas = ttl, limit, replica, replicas
        self.after_tending = after_tending
        self.live: Dict[int, Session] = {}
        self.leaving: Set[Session] = set()  # closed while a request was in them
        self.in_use: Set[int] = set()
        self.pool: List[int] = []
        self.opening = 0
        self.started: Dict[object, float] = {}
        self.next = int((time.time() - ID_EPOCH) * 1000)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            asyncio.get_running_loop().create_task(self._tend())
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, posted = scope["path"], scope["method"] == "POST"
        if path == "/_sessions":
            return await answer(send, 200, {
                "live": len(self.live),
                "pooled": len(self.pool),
                "memory_mb": memory_mb(),
                "pid": os.getpid()
            })
        if posted:  # before the clock starts: a client that stalls is no server that is stuck
            try:
                receive = replay(await asyncio.wait_for(read(receive), BODY_SECONDS), receive)
            except asyncio.TimeoutError:
                return await answer(send, 408, {"error": f"the request's body did not come within {BODY_SECONDS} s"})
        token = object()
        self.started[token] = time.monotonic()
        try:
            if posted and path == self.prefix + "/create":
                return await self._create(scope, receive, send)
            if posted:
                return await self._post(scope, receive, send)
            return await self._get(scope, receive, send)
        finally:
            del self.started[token]

    async def _create(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.limit is not None and len(self.live) + len(self.leaving) + self.opening >= self.limit:
            status = 503 if ASKS_ANOTHER in scope["headers"] else 429
            return await answer(send, status, {"error": f"all {self.limit} sessions of this server are in use"})
        if self.pool:
            public = self._register(Session(self.pool.pop(), pristine=False))
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

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read(receive)
        request = parsed(body)
        if not isinstance(request, dict) or self.key not in request:
            return await self.app(scope, replay(body, receive), send)
        path = scope["path"]
        resets, closes = path == self.prefix + "/reset", path == self.prefix + "/close"
        session = self._find(request[self.key])
        if session is None:
            return await answer(send, 404, {"error": f"no session {json.dumps(request[self.key])} here"})
        if not (session.pristine or resets or closes):
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
                session.pristine = session.pristine or succeeded(status, reply)
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
            self._leave(session)

    async def _get(self, scope: Scope, receive: Receive, send: Send) -> None:
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        if self.key not in query:
            return await self.app(scope, receive, send)
        asked = query[self.key]
        session = self._find(parsed(asked.encode()))
        if session is None:
            return await answer(send, 404, {"error": f"no session {asked} here"})
        query[self.key] = str(session.local)
        session.busy += 1
        try:
            if not session.pristine:
                status, body = await self._post_inside("/reset", {self.key: session.local, **self.first_reset})
                if not succeeded(status, parsed(body)):
                    return await answer(send, 409, {"error": f"session {asked} was not reset yet"})
            await self.app({**scope, "query_string": urlencode(query).encode()}, receive, send)
        finally:
            self._leave(session)

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
        found: List[float] = []
        stopped.set(found)
        status, headers, body = await collect(self.app, scope, receive)
        reply = parsed(body)
        if found and not (isinstance(reply, dict) and reply.get(self.state) == INTERRUPTED):
            return await answer(send, 500, {"error": f"the reference query took longer than {found[0]:g} s"})
        await relay(send, status, headers, body)

    def _register(self, session: Session) -> int:
        public = self.next * self.replicas + self.replica
        self.next += 1
        self.live[public] = session
        self.in_use.add(session.local)
        return public

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

    def _leave(self, session: Session) -> None:
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

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(min(max(self.ttl / 4, 0.25), 30.0) if self.ttl else 30.0)
            try:
                await self.close_idle()
            except Exception as error:  # a server whose close fails must not stop the tending of the others
                _say(f"closing idle sessions: {error!r}")
            if self.after_tending is not None:
                self.after_tending()

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
        path = self.prefix + route
        scope = {
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
            "headers": with_length([(b"host", b"localhost"), (b"content-type", b"application/json")], len(body)),
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
        }

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        if route == "/reset":
            status, _, reply = await self._in_turn(scope, replay(body, receive))
        else:
            status, _, reply = await collect(self.app, scope, replay(body, receive))
        return status, reply


async def read(receive: Receive) -> bytes:
    """Return the request's whole body."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


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
    status, headers, body = 500, [], b""

    async def send(message: Message) -> None:
        nonlocal status, headers, body
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message.get("headers", []))
        elif message["type"] == "http.response.body":
            body += message.get("body", b"")

    await app(scope, receive, send)
    return status, headers, body


async def relay(send: Send, status: int, headers: list, body: bytes) -> None:
    """Send a collected answer on."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def answer(send: Send, status: int, value: Any, headers: Optional[list] = None) -> None:
    """Send `value` as JSON; `headers` are those of the answer it replaces."""
    body = json.dumps(value).encode()
    await relay(send, status, with_length(headers or [(b"content-type", b"application/json")], len(body)), body)


def with_length(headers: Any, length: int) -> list:
    """Return `headers` with this content-length."""
    return [header for header in headers if header[0].lower() != b"content-length"
            ] + [(b"content-length", str(length).encode())]


def parsed(body: bytes) -> Any:
    """Return the JSON value of `body`, or None."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def succeeded(status: int, reply: Any) -> bool:
    """Tell whether a reply is no error; some servers put theirs inside a 200."""
    return status == 200 and not (isinstance(reply, dict) and reply.get("error") is not None)


class Process(NamedTuple):
    """A line of the process table: parent, session, resident pages."""
    parent: int
    session: int
    pages: int


def processes() -> Dict[int, Process]:
    """Return the process table by id; empty where /proc is absent."""
    found = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()  # the name before it may hold anything
                found[int(entry)] = Process(int(fields[1]), int(fields[3]), int(fields[21]))
            except (OSError, IndexError):
                pass  # the process ended while we read
    return found


def own(table: Mapping[int, Process], pid: int) -> Set[int]:
    """Return the processes that belong to the server `pid`.

    In a container of its own, whose first process leads the server's session, that is all of them. On a machine that
    it shares: those of its session, and their children in sessions of their own (browsers).
    """
    session = table[pid].session
    if 1 in table and table[1].session == session:
        return set(table)
    found = {one for one, process in table.items() if process.session == session}
    while True:
        children = {one for one, process in table.items() if process.parent in found} - found
        if not children:
            return found
        found |= children


def memory_mb() -> float:
    """Return the resident memory of this server and its children, in MB; 0 where /proc is absent."""
    table = processes()
    pages = sum(table[one].pages for one in own(table, os.getpid())) if table else 0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def _say(line: str) -> None:
    print("serve: " + line, file=sys.stderr, flush=True)


def sort_listings() -> None:
    """Make `os.listdir` return names in order, whatever the file system does."""
    listdir = os.listdir

    def ordered(path: Any = ".") -> List[Any]:
        return sorted(listdir(path))

    os.listdir = ordered  # type: ignore[assignment]


def limit_queries(seconds: float) -> None:
    """Stop every SQLite query after `seconds`, and refuse ATTACH, which would write files."""
    connect = sqlite3.connect

    class Limited(sqlite3.Connection):

        def cursor(self, *args: Any, **kwargs: Any) -> Any:
            deadline = time.monotonic() + seconds

            def stops() -> bool:
                late = time.monotonic() > deadline
                found = stopped.get()
                if late and found is not None:
                    found.append(seconds)
                return late

            self.set_progress_handler(stops, 10_000)
            return super().cursor(*args, **kwargs)

    def limited(*args: Any, **kwargs: Any) -> Any:
        connection = connect(*args, **{"factory": Limited, **kwargs})
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action == ATTACH else sqlite3.SQLITE_OK)
        return connection

    sqlite3.connect = limited  # type: ignore[assignment]


class Unused(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that a server imports and never uses, where they are not installed."""

    def __init__(self, names: List[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Answer for the packages and all below them."""
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec: Any) -> types.ModuleType:
        """Return a module that has every name; what is called says that the package is missing."""

        def missing(*_: Any, **__: Any) -> None:
            raise RuntimeError(f"{spec.name} is not installed: this server was thought not to use it")

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return missing

        module = types.ModuleType(spec.name)
        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def load(app: str, keep: List[str], optional: Iterable[str] = ()) -> Callable:
    """Import `module:attribute`; variables named in `keep` stay as the caller set them, whatever the module does.

    Those of them that are `optional` are absent where they are empty: OpenAI's client takes an empty address for one.
    """
    kept = {name for name in keep if os.environ.get(name)}
    environ_class = type(os.environ)

    class CallersFirst(environ_class):  # type: ignore[misc,valid-type]

        def __setitem__(self, name: str, value: str) -> None:
            if name not in kept:
                super().__setitem__(name, value)

    os.environ.__class__ = CallersFirst  # agentenv_webarena sets its sites' addresses while it is imported
    try:
        module, attribute = app.split(":")
        return getattr(importlib.import_module(module), attribute)
    finally:
        os.environ.__class__ = environ_class
        for name in optional:
            if not os.environ.get(name):
                os.environ.pop(name, None)


def give_up_when_stuck(sessions: Sessions, seconds: float) -> None:
    """End the process when one request runs longer than `seconds`: a blocked event loop heals no other way."""

    def watch() -> None:
        while True:
            time.sleep(1.0)
            begun = min(list(sessions.started.values()), default=None)
            if begun is not None and time.monotonic() - begun > seconds:
                _say(f"a request runs for more than {seconds:g} s; giving up this server and its sessions")
                os._exit(STUCK)

    threading.Thread(target=watch, daemon=True).start()


def lacks(row: Dict[str, Any], data: str, environ: Mapping[str, str]) -> List[str]:
    """Return what keeps the row's server from starting, a sentence each."""
    found = []
    for item in row.get("data", []):
        if not os.path.exists(os.path.join(data, item["path"])):
            how = item.get("how") or f"run `invoke env.data --env {row['name']}`"
            found.append(f"no {item['path']} in {data}; {how}")
    for key in row.get("keys", []):
        if not (key.get("optional") or environ.get(key["name"])):
            found.append(f"{key['name']} is not set; it is: {key['how']}")
    if row.get("consent") and environ.get("I_UNDERSTAND") != row["name"]:
        found.append(f"{row['consent']}. To go on: --i-understand, or I_UNDERSTAND={row['name']}")
    return found


def prepare(row: Dict[str, Any], source: str, data: str) -> None:
    """Stand where the row's server must start, see its packages, and set its variables."""
    folder = os.path.join(os.path.abspath(source), row["folder"])
    places = {"folder": folder, "data": os.path.abspath(data)}
    for name, value in row.get("env", {}).items():
        os.environ[name] = value.format(**places)  # a caller's PYTHONPATH is meant for other programs
    os.chdir(os.path.join(folder, row.get("workdir", ".")))
    for command in row.get("before", []):
        done = subprocess.run(command)
        if done.returncode:
            _say(f"{row['name']}: `{command[-1]}` failed with {done.returncode}")
            sys.exit(1)
    # In place of this program's own folder, whose modules could hide the server's.
    sys.path[:1] = [folder] + [os.path.join(folder, extra) for extra in row.get("pythonpath", [])]
    sys.meta_path.append(Unused(row.get("unused", [])))  # last: what is installed comes first
    if row.get("sqlite_seconds"):
        limit_queries(row["sqlite_seconds"])
    sort_listings()
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)  # an action's many digits are the action's fault, and no server's


def main() -> None:
    """Serve the row's application until a signal comes."""
    setting = os.environ.get
    parser = argparse.ArgumentParser(description="Serve an environment of AgentGym's kind.")
    parser.add_argument("row", help="JSON file with the environment's row")
    parser.add_argument("--source", required=True, help="folder that the row's package folder lies in")
    parser.add_argument("--data", default="data", help="folder with the row's data")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=int(setting("ENV_PORT") or 8000))
    parser.add_argument("--session-ttl",
                        type=float,
                        default=float(setting("SESSION_TTL") or 3600),
                        help="seconds after which an idle session is closed; 0: never")
    parser.add_argument("--replica", type=int, default=int(setting("REPLICA") or 0))
    parser.add_argument("--replicas", type=int, default=int(setting("REPLICAS") or 1))
    parser.add_argument("--recycle", action="store_true", help="end when memory nears the limit and no session is live")
    options = parser.parse_args()
    with open(options.row) as file:
        row = json.load(file)
    missing = lacks(row, options.data, os.environ)
    if missing:
        _say(f"{row['name']}: {missing[0]}")
        sys.exit(MISUSE)
    prepare(row, options.source, options.data)
    keys = row.get("keys", [])
    app = load(row["app"], [key["name"] for key in keys], [key["name"] for key in keys if key.get("optional")])
    import uvicorn

    def recycle() -> None:
        used = sessions.live or sessions.leaving or sessions.opening
        if not used and memory_mb() > RECYCLE_AT * row["memory_mb"]:
            _say("memory is near its limit and no session is live; starting afresh")
            server.should_exit = recycled["now"] = True

    recycled = {"now": False}
    sessions = Sessions(app, row["protocol"], options.session_ttl, row.get("max_sessions"), options.replica,
                        options.replicas, row["check"]["items"][0], recycle if options.recycle else None,
                        row.get("serial_reset", False), bool(row.get("sqlite_seconds")))
    if row.get("request_seconds"):
        give_up_when_stuck(sessions, row["request_seconds"])
    # Idle connections outlive those that a proxy keeps, so that it never sends a request into a closing one.
    server = uvicorn.Server(
        uvicorn.Config(sessions,
                       host=options.host,
                       port=options.port,
                       access_log=False,
                       log_level="warning",
                       timeout_keep_alive=75,
                       timeout_graceful_shutdown=5))
    server.run()
    if recycled["now"]:
        sys.exit(RECYCLED)  # a failure to the engine, so that it starts the container again


if __name__ == "__main__":
    main()
