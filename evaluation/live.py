"""What a run does while it goes on, in a file for who looks on; who does is nothing to the run.

    live.json   written every second, and gone when the run ends
"""
import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from evaluation.attempts import Attempt, Key, Outcome, key_of
from evaluation.episodes import Place
from evaluation.pace import Pace
from evaluation.secrets import hide_in

EVERY = 1.0  # seconds
RECENT = 60.0  # seconds of which the rate is


def seconds_left(missing: int, played: int, took: float, wall: float, at_once: int) -> float:
    """Return the seconds that `missing` attempts will take, after `played` that took `took` seconds together.

    At first by what an attempt takes, since the others at once are under way too; once each place has had its second
    one, by how fast they came.

    Args:
        wall: seconds since the first began.
        at_once: how many are played at once.
    """
    each = took / played / min(at_once, max(1, missing))
    return missing * (each if played < 2 * at_once else wall / played)


class Board:
    """The attempts that are played now, and what came of the others."""

    def __init__(self, path: Path, total: int, before: Mapping[Key, Outcome], pace: Pace) -> None:
        self.path, self.total, self.pace = path, total, pace
        self.outcomes = dict(before)
        self.places: dict[Key, Place] = {}
        self.played, self.took, self.tokens = 0, 0.0, 0
        self.begun = time.monotonic()
        self._ends: deque[float] = deque()

    @contextmanager
    def place(self, item: str, sample: int) -> Iterator[Place]:
        """Give an attempt its place while it is played."""
        place = self.places[item, sample] = Place()
        try:
            yield place
        finally:
            del self.places[item, sample]

    def note(self, record: Attempt) -> None:
        """Take note of an attempt that ended."""
        self.outcomes[key_of(record)] = record["outcome"]
        self.played += 1
        self.took += record["seconds"]
        self.tokens += record["usage"]["prompt"] + record["usage"]["completion"]
        self._ends.append(time.monotonic())

    def now(self) -> dict[str, Any]:
        """Return what there is to see."""
        now = time.monotonic()
        while self._ends and self._ends[0] < now - RECENT:
            self._ends.popleft()
        done = len(self.outcomes)
        sessions = []
        for (item, sample), place in self.places.items():
            episode = place.episode
            waits = "a session" if episode is None or episode.session is None else \
                "the environment" if episode.in_doubt else "the model"
            sessions.append({
                "item": item,
                "sample": sample,
                "session": episode.session if episode else None,
                "turn": len(episode.turns) if episode else 0,
                "seconds": round(now - place.begun, 1),
                "waits_for": waits
            })
        span = min(RECENT, max(now - self.begun, 1e-3))
        return {
            "done":
            done,
            "total":
            self.total,
            "outcomes":
            dict(Counter(self.outcomes.values())),
            "tokens":
            self.tokens,
            "per_minute":
            round(60 * len(self._ends) / span, 2),
            "seconds_left":
            round(seconds_left(self.total - done, self.played, self.took, now -
                               self.begun, self.pace.limit), 1) if self.played else None,
            "at_once":
            self.pace.limit,
            "auto":
            self.pace.auto,
            "sessions":
            sorted(sessions, key=lambda one: -float(str(one["seconds"]))),
        }

    def write(self) -> None:
        """Write the file, as before or whole; where that cannot be, nobody looks on."""
        new = self.path.with_name(self.path.name + ".new")
        with suppress(OSError):
            new.unlink(missing_ok=True)  # a link must not be followed
            new.write_text(json.dumps(hide_in(self.now())), encoding="utf-8")
            new.replace(self.path)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Write the file every second until the end, and take it away then."""

        async def write_on() -> None:
            while True:
                self.write()
                await asyncio.sleep(EVERY)

        task = asyncio.create_task(write_on())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
