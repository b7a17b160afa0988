"""Speak an environment server's HTTP as its row says, for many sessions at once.

aiohttp and not httpx: a step of a text game costs its server half a millisecond, and a client must not cost more.
"""
import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import aiohttp

from evaluation import foreign
from evaluation.attempts import MOST_REWARD
from evaluation.endpoint import redacted_url
from evaluation.problems import EnvironmentFault, Stopped
from evaluation.rows import Protocol
from evaluation.secrets import hide
from evaluation.text import short

# Below uvicorn's five seconds: a connection that the server closes just as we send leaves us in doubt about the step.
KEEP_ALIVE = 4.0
CLOSE_SECONDS = 10.0
# Answers that say that nothing was created: every session is in use (429), or no replica is up (503).
FULL = 429
NOT_CREATED = (FULL, 503)
UNCHANGED = (404, 405)


class First(NamedTuple):
    """What a reset leads to: the observation, and the actions that the server lists with it."""
    observation: str
    actions: list[str]


class Step(NamedTuple):
    """What an action leads to.

    Attributes:
        upstream: the number that AgentGym's own client takes for the reward where it is not the row's: `score`.
    """
    observation: str
    reward: float
    done: bool
    upstream: float | None


def error_in(reply: Any) -> str | None:
    """Return the error that a reply carries although its status is 200."""
    if isinstance(reply, dict) and reply.get("error") is not None:
        return str(reply["error"])
    return None


def text_of(observation: Any) -> str:
    """Return an observation as text.

    Raises:
        TypeError: it is null: a server that has none to give. The word None must not reach the model.
    """
    if observation is None:
        raise TypeError("null")
    return hide(str(observation))


def session_in(reply: Any, key: str) -> int:
    """Return the session's id in a reply of POST /create.

    Raises:
        EnvironmentFault: there is none.
    """
    session = (reply.get(key) if isinstance(reply, dict) else None) if key else reply
    if isinstance(session, bool) or not isinstance(session, int) or abs(session) >= 2**63:
        raise EnvironmentFault(f"POST /create: no session id in {short(reply)}", 200)
    return session


def first_in(reply: Any, protocol: Protocol) -> First:
    """Return the first observation in a reply of POST /reset.

    Raises:
        EnvironmentFault: there is none.
    """
    try:
        if protocol.observation == "list":
            return First(text_of(reply[0]), [])
        actions = reply.get("available_actions")
        text = "\n".join(text_of(reply[key]) for key in protocol.observation_keys)
        return First(text, [hide(str(action)) for action in actions] if isinstance(actions, list) else [])
    except (KeyError, IndexError, TypeError, AttributeError):
        raise EnvironmentFault(f"POST /reset: no observation in {short(reply)}", 200) from None


def step_in(reply: Any, protocol: Protocol) -> Step:
    """Return what a reply of POST /step says.

    Raises:
        EnvironmentFault: observation, reward or end are missing or no such, or the server could not reach what it asks.
    """
    try:
        done = reply[protocol.done]
        if done not in (0, 1):  # of which "false" is neither
            raise TypeError
        reward = float(reply[protocol.reward])
        observation = text_of(reply[protocol.state])
        upstream = float(reply["score"]) if protocol.reward != "score" and "score" in reply else None
    except (KeyError, TypeError, ValueError, OverflowError):
        raise EnvironmentFault(f"POST /step: no observation, reward and end in {short(reply)}", 200) from None
    for number in (reward, upstream or 0.0):
        if not abs(number) <= MOST_REWARD:  # nor is NaN
            raise EnvironmentFault(f"POST /step: the reward is no number of at most {MOST_REWARD:g} ({number:g})", 200)
    if any(mark in observation for mark in protocol.faults) or observation.startswith(protocol.fault_starts):
        raise EnvironmentFault(f"POST /step: {short(observation)}", 200)
    return Step(observation, 0.0 if protocol.reward_when_done and not done else reward, bool(done), upstream)


class Server:
    """One environment server; sessions are the ids that `create` returns.

    Servers without a close keep every session for ever: their sessions go to a pool, and are reset for the next item.

    Attributes:
        shown: its address without a login, for messages and files.
        opened, closed: how many sessions were created, and closed.
        lost: sessions that could not be closed.
        awaited: how many attempts in a row waited for a session in vain.
        silence: why it last did not answer at all.
        on_full: is told how many sessions are ours where the server has no more.
    """

    def __init__(self,
                 url: str,
                 protocol: Protocol,
                 timeout: float = 300.0,
                 on_open: Callable[[int], None] = lambda session: None,
                 on_close: Callable[[int], None] = lambda session: None,
                 limit: int = foreign.LARGEST_BODY) -> None:
        self.root = url.rstrip("/")
        self.shown = redacted_url(self.root)
        self.base = self.root + protocol.prefix
        self.protocol = protocol
        self.timeout = timeout
        self.limit = limit  # bytes of an answer
        self.on_open, self.on_close = on_open, on_close
        self.on_full: Callable[[int], None] = lambda held: None
        self.opened = self.closed = self.lost = self.awaited = 0
        self._pool: list[int] = []
        self._held: set[int] = set()
        self._twice: set[int] = set()  # of those, what the server handed out again: whose state it has, nobody knows
        self.silence = "no answer"
        self._closes = True  # until the server says that it has no such route
        self._http: aiohttp.ClientSession | None = None

    @property
    def held(self) -> int:
        """How many sessions are in use by us."""
        return len(self._held)

    @property
    def pooled(self) -> int:
        """How many sessions wait in the pool; at the end they stay open, since the server cannot close them."""
        return len(self._pool)

    async def __aenter__(self) -> "Server":
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
        # No trust_env: the server is on this machine or on a container's network, and a proxy would be in the way.
        total = self.timeout if math.isfinite(self.timeout) else None  # aiohttp cannot count to infinity
        # No cookies: a server could send them without end, and the id is all that tells a session.
        self._http = aiohttp.ClientSession(connector=connector,
                                           cookie_jar=aiohttp.DummyCookieJar(),
                                           timeout=aiohttp.ClientTimeout(total=total),
                                           auto_decompress=False,
                                           headers={"Accept-Encoding": "gzip"})
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        assert self._http is not None
        await self._http.close()

    async def _call(self, method: str, url: str, what: str, hops: int = 0, **arguments: Any) -> Any:
        assert self._http is not None, "use `async with`"
        try:
            # No redirect is followed to another host: it would carry what is said here to whoever it names.
            async with self._http.request(method, url, allow_redirects=False, **arguments) as answer:
                body = await self._read(answer)
                status, target = answer.status, answer.headers.get("location", "")
        except aiohttp.ClientConnectorError as error:
            raise EnvironmentFault(f"{what}: cannot connect to {self.shown} ({error.os_error.strerror or error})",
                                   sent=False) from None
        except TimeoutError:
            raise EnvironmentFault(f"{what}: no answer within {self.timeout:g} s") from None
        except foreign.TooLarge as error:
            raise EnvironmentFault(f"{what}: {error}, unpacked; see --max-answer", 200) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise EnvironmentFault(redacted_url(f"{what}: {error or type(error).__name__}")) from None
        if 300 <= status < 400 and target:
            there = urljoin(url, target)
            if status in (307, 308) and hops < 3 and urlsplit(there)[:2] == urlsplit(url)[:2]:
                return await self._call(method, there, what, hops + 1, **arguments)
            raise EnvironmentFault(
                f"{what}: HTTP {status} redirects to {short(redacted_url(target))}, which is not followed; "
                "name that address with --server", status)
        if status != 200:
            raise EnvironmentFault(f"{what}: HTTP {status} {short(body.decode(errors='replace'))}", status)
        try:
            reply = foreign.loads(body)
        except ValueError as error:
            raise EnvironmentFault(f"{what}: the answer is no JSON: {short(body.decode(errors='replace'))} ({error})",
                                   200) from None
        fault = error_in(reply)
        if fault is not None:
            raise EnvironmentFault(f"{what}: {fault}", 200)
        return reply

    async def _read(self, answer: aiohttp.ClientResponse) -> bytes:
        """Return an answer's body, unpacked, as far as the limit."""
        encoding = answer.headers.get("content-encoding", "")
        if not encoding and answer.content_length is not None and answer.content_length <= self.limit:
            return await answer.read()
        body = foreign.Body(encoding, self.limit)
        async for piece in answer.content.iter_any():
            body.feed(piece)
        return body.whole()

    async def _post(self, route: str, body: Any) -> Any:
        return await self._call("POST", self.base + route, "POST " + route, json=body)

    async def _only_ours(self, session: int, call: Awaitable[Any]) -> Any:
        """Return the answer to a request in the session, unless somebody else has it too."""
        reply = await call
        if session in self._twice:
            raise EnvironmentFault(f"session {session}: the server handed it out a second time", 200)
        return reply

    async def create(self) -> int:
        """Open a session, or take one from the pool, and return its id.

        Raises:
            EnvironmentFault: the server did not create one, or gave an id that is in use: AgentGym's sqlgym does under
                load, and so does any server that was started again, whose ids begin anew.
            Stopped: it cannot be noted; it is closed again.
        """
        if self._pool:
            session = self._pool.pop()
            self._held.add(session)
            return session
        create = self.protocol.create
        arguments: dict[str, Any] = {} if create is None else {"json": create}
        reply = await self._call("POST", self.base + "/create", "POST /create", **arguments)
        session = session_in(reply, self.protocol.id_reply)
        if session in self._held:
            self._twice.add(session)
            raise EnvironmentFault(f"POST /create: the server handed out session {session}, which is in use", 200)
        self._held.add(session)
        self.opened += 1
        try:
            self.on_open(session)
        except Stopped:  # a session that nobody knows of would stay open
            await self.give_back(session, clean=True)
            raise
        return session

    async def reset(self, session: int, item: int) -> First:
        """Put the item with the number `item` before the session."""
        protocol = self.protocol
        reply = await self._only_ours(
            session, self._post("/reset", {
                protocol.id: session,
                protocol.item: item,
                **protocol.reset
            }))
        fault = protocol.reset_fault
        if fault and isinstance(reply, dict) and fault.items() <= reply.items():
            raise EnvironmentFault(f"POST /reset: {short(reply)}", 200)
        if protocol.observation == "get":
            reply = {key: await self.get("/observation", session) for key in protocol.observation_keys}
        return first_in(reply, protocol)

    async def get(self, route: str, session: int) -> Any:
        """Return the answer to a GET for the session."""
        return await self._only_ours(
            session, self._call("GET", self.base + route, "GET " + route, params={self.protocol.id: str(session)}))

    async def step(self, session: int, action: str) -> Step:
        """Take `action` in the session."""
        reply = await self._only_ours(session, self._post("/step", {self.protocol.id: session, "action": action}))
        return step_in(reply, self.protocol)

    async def give_back(self, session: int, clean: bool) -> None:
        """Close the session, or pool it where the server has no close; `clean` tells that its state is known.

        Never raises: a session that cannot be closed is counted as lost.
        """
        try:
            await self._end(session, clean and session not in self._twice)
        finally:
            self._held.discard(session)
            self._twice.discard(session)

    async def _end(self, session: int, clean: bool) -> None:
        if self._closes:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._post("/close", {self.protocol.id: session})
                self.closed += 1
                with suppress(Stopped):  # the record, which comes next, finds the disk full too
                    self.on_close(session)
                return
            except EnvironmentFault as fault:
                if fault.status not in UNCHANGED or self.protocol.close:
                    self.lost += 1
                    return
                # serve.py gives every server a close and answers 404 only for a session that is gone.
                self._closes = not await self._lacks_close()
            except TimeoutError:
                self.lost += 1
                return
        if self._closes:
            self.lost += 1
        elif clean:
            self._pool.append(session)
        else:
            self.lost += 1

    async def _lacks_close(self) -> bool:
        return await self.wrapper_status() is None

    async def wrapper_status(self) -> dict[str, Any] | None:
        """Return what this project's servers/serve.py says of its sessions; None where the server is bare."""
        try:
            reply = await self._call("GET", self.root + "/_sessions", "GET /_sessions")
        except EnvironmentFault:
            return None
        return reply if isinstance(reply, dict) and "live" in reply else None

    async def about(self) -> dict[str, str]:
        """Return what the server says that its scores depend on beside the row; empty for a bare one."""
        found = (await self.wrapper_status() or {}).get("about")
        return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}

    async def answers(self) -> bool:
        """Return True if anything answers at the address, whatever it says."""
        try:
            await self._call("GET", self.root + "/", "GET /")
        except EnvironmentFault as fault:
            self.silence = str(fault).removeprefix("GET /: ")
            return fault.status is not None
        return True
