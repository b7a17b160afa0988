"""Watch the environment's server beside the trainer: whether it answers, how many sessions live, whether it restarted.

The project's own servers tell at `/_sessions` how many sessions live, and which start of the server it is; of others it is known only
whether they answer.
"""
from __future__ import annotations

import http.client
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from typing import Any

from training.exchange import Stays, opener
from training.foreign import is_count, loads
from training.rollouts import Window

# The servers are on this machine or on a container's network: a proxy for the internet would only be in the way.
_OPENER = opener(urllib.request.ProxyHandler({}), Stays())
EVERY = 1.0  # seconds
ANSWER_SECONDS = 5.0
# A busy server may not answer for so long and lose nothing; a refused connection tells at once.
PATIENCE = 60.0


@dataclass(frozen=True)
class Answer:
    """What one look found.

    Attributes:
        why: "" where the server answers, else "refused" or "unanswered".
        sessions: how many live; None where the server does not say.
        processes: of each replica its process id and when it began; () where it does not say.
    """
    why: str
    sessions: int | None = None
    processes: tuple[tuple[Any, ...], ...] = ()


def ask(url: str, replicas: int = 1, timeout: float = ANSWER_SECONDS) -> Answer:
    """Look once; every answer counts, whatever its status."""
    root = url.rstrip("/")
    sessions, processes = 0, []
    for replica in range(max(1, replicas)):
        try:
            with _OPENER.open(f"{root}/_sessions?replica={replica}", timeout=timeout) as response:
                told = loads(response.read(1 << 16))
        except urllib.error.HTTPError as error:
            error.close()
            return Answer("refused") if error.code in (502, 503, 504) else Answer("")  # a proxy without its server
        except TimeoutError:
            return Answer("unanswered")
        except urllib.error.URLError as error:
            return Answer("unanswered" if isinstance(error.reason, TimeoutError) else "refused")
        except (OSError, http.client.HTTPException):
            return Answer("refused")
        except ValueError:
            return Answer("")  # no JSON: a server of another kind
        if not isinstance(told, dict) or not is_count(told.get("live")) or not is_count(told.get("pid")):
            return Answer("")
        sessions += told["live"]
        processes.append((told["pid"], told.get("started")))
    return Answer("", sessions, tuple(processes))


@dataclass(frozen=True)
class Seen:
    """What is known of the server now.

    Attributes:
        reachable: None before the first look.
        since: when that began.
        sessions: how many live; None where unknown.
        why: "" where it answers, else "refused" or "unanswered".
        processes: what tells this start of the server from others; () where unknown.
    """
    reachable: bool | None = None
    since: float = 0.0
    why: str = ""
    sessions: int | None = None
    processes: tuple[tuple[Any, ...], ...] = ()


class Monitor:
    """Looks every second, in a thread; `seen` is the last look, `windows` what went wrong so far."""

    def __init__(self, url: str, replicas: int = 1, every: float = EVERY, patience: float = PATIENCE) -> None:
        self.url, self.replicas, self.every, self.patience = url, replicas, every, patience
        self.seen = Seen()
        self.windows: list[Window] = []
        self._quiet_since: float | None = None
        self._turn = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look."""
        self._thread = threading.Thread(target=self._run, name="environment", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(ANSWER_SECONDS * max(1, self.replicas) + 1)

    def _run(self) -> None:
        while not self._ended.wait(self.every if self.seen.reachable is not None else 0):
            self.look()

    def look(self) -> None:
        """Look now."""
        began = time.time()
        answer = ask(self.url, self.replicas)
        with self._turn:
            self.note(answer, began)

    def note(self, answer: Answer, now: float) -> None:
        """Take note of an answer; `now` is when it was asked for, in seconds since 1970."""
        before = self.seen
        if answer.why == "unanswered":
            self._quiet_since = self._quiet_since if self._quiet_since is not None else now
            if now - self._quiet_since < self.patience:
                if before.reachable is None:
                    self.seen = Seen(True, now)
                return  # busy: as before
            now = self._quiet_since
        else:
            self._quiet_since = None
        if answer.why:
            if before.reachable is not False:
                self.windows.append(Window(now, None, answer.why))
                self.seen = replace(before, reachable=False, since=now, why=answer.why)
            return
        if before.reachable is False:
            self.windows[-1] = replace(self.windows[-1], end=now)
        restarted = bool(before.processes and answer.processes and before.processes != answer.processes)
        if restarted:
            self.windows.append(Window(before.since if before.reachable is False else now, now, "restarted"))
        self.seen = Seen(True, before.since if before.reachable else now, "", answer.sessions, answer.processes
                         or before.processes)

    def told(self) -> str:
        """Return what became of the server, where it is away now; "" where it answers."""
        seen = self.seen
        if seen.reachable is not False:
            return ""
        when = time.strftime("%H:%M:%S", time.localtime(seen.since))
        what = "does not answer" if seen.why == "unanswered" else "is gone (no connection)"
        return f"the environment's server at {self.url} {what} since {when}"
