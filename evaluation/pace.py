"""How many episodes are played at once; with --concurrency auto that is found while they are played.

By Little's law, answers a second are the episodes at once over the seconds that one takes from answer to answer: while
those hold, twice the episodes give twice the answers. So the number is doubled as long as answers a second rise, and
goes back to the best where they do not. An endpoint's 429 takes a part of it away at once, and it comes back step by
step (AIMD: Chiu and Jain 1989); the sessions that the server has are its bound.
"""
import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

START, MOST = 16, 512
GAIN = 1.05  # of answers a second, for which more at once are worth it
CUT = 0.85
PROBE = 8  # measurements without a change, after which more is tried
PROBED = 1.25
SHORTEST = 0.25  # seconds of a measurement
BOUND_SECONDS = 60.0  # after which a server that was full is asked for more


class Change(NamedTuple):
    """A change of the number, as the run's record keeps it; `rate` is of answers a second before it."""
    seconds: float
    limit: int
    rate: float
    why: str


class Pace:
    """The number of episodes at once.

    Attributes:
        limit: it, now.
        changes: how it came to be.
    """

    def __init__(self, limit: int, auto: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.auto, self.most, self._clock = auto, limit, clock
        self.limit = min(START, limit) if auto else limit
        self.changes: list[Change] = []
        self.wake = asyncio.Event()  # an attempt ended, or more may be played
        self.playing = 0
        self.queued = 0  # attempts that nobody has begun
        self._asking = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._begun = clock()
        self._best, self._best_rate = self.limit, 0.0
        self._rising, self._factor = True, 2.0
        self._bound, self._bound_until = 0, 0.0
        self._still = self._refused_at = 0
        self._deaf_until = 0.0
        self._measure()

    def _measure(self) -> None:
        """Begin a measurement, which leaves out the answers of before."""
        self._skipped = self._counted = 0
        self._since: float | None = None

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Ask the model: as many do so at once as are to be played, should that have become fewer."""
        while self._asking >= self.limit:
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            try:
                await waiting
            except asyncio.CancelledError:
                if waiting.done() and not waiting.cancelled():
                    self._let_on()
                raise
        self._asking += 1
        try:
            yield
            self._answered()
        finally:
            self._asking -= 1
            self._let_on()

    def _let_on(self) -> None:
        free = self.limit - self._asking
        while free > 0 and self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                free -= 1

    def _set(self, limit: int, rate: float, why: str) -> None:
        now = self._clock()
        highest = min(self.most, self._bound) if now < self._bound_until else self.most
        limit = max(1, min(limit, highest))
        if limit != self.limit:
            self.limit = limit
            self.changes.append(Change(round(now - self._begun, 3), limit, round(rate, 2), why))
            self._let_on()
            self.wake.set()
        self._measure()

    def _answered(self) -> None:
        if not self.auto:
            return
        # The last attempts: fewer ask than might. One that has ended a moment ago and has no successor yet says nothing.
        if not self.queued and self.playing < self.limit:
            self._measure()
            return
        now = self._clock()
        if self._since is None:
            self._skipped += 1
            if self._skipped >= self.limit:
                self._since = now
            return
        self._counted += 1
        if self._counted >= max(self.limit, min(3 * self.limit, 48)) and now - self._since >= SHORTEST:
            self._judge(self._counted / (now - self._since))

    def _judge(self, rate: float) -> None:
        """Go on from a measurement of answers a second."""
        better = rate >= GAIN * self._best_rate
        if self._rising:
            if better:
                self._best, self._best_rate = self.limit, rate
                higher = self._higher(self._factor)
                if higher > self.limit:
                    self._set(higher, rate, "more answers a second")
                    return
            self._rising, self._still = False, 0
            if rate > self._best_rate:
                self._best, self._best_rate = self.limit, rate
            self._set(self._best, rate, "no more answers a second")
            return
        self._best, self._best_rate = self.limit, rate  # as they are now: endpoints have better and worse hours
        self._still += 1
        if self._still < PROBE:
            self._measure()
            return
        self._rising, self._factor, self._still = True, PROBED, 0
        higher = self._higher(PROBED)
        if higher == self.limit:  # the endpoint may give more by now
            self._refused_at = 0
        self._set(higher, rate, "to see")

    def _higher(self, factor: float) -> int:
        """Return the next number upwards: half of the way to the one at which a 429 came, where one did."""
        higher = max(self.limit + 1, int(factor * self.limit))
        if self._refused_at:
            middle = max(self.limit + 1, (self.limit + self._refused_at) // 2)
            higher = max(self.limit, min(middle, self._refused_at - 1))
        return min(higher, self.most)

    def refused(self) -> None:
        """Note that the endpoint answered 429."""
        now = self._clock()
        if not self.auto or now < self._deaf_until:
            return
        # What was asked before the cut is answered after it: that says nothing of the smaller number.
        self._deaf_until = now + 1.0
        lower = int(CUT * self.limit)
        if self._rising:  # back to what went well, or down where nobody knows yet how far beyond it is
            lower = self._best if self._best < self.limit else self.limit // 2
        self._refused_at, self._still = self.limit, PROBE - 2
        self._rising, self._factor = self._rising and not self._best_rate, PROBED
        self._best = min(self._best, lower)
        self._set(lower, 0.0, "429")

    def full(self, held: int) -> None:
        """Note that the server has no session beyond the `held` that are ours."""
        if self.auto and held:
            self._bound, self._bound_until = held, self._clock() + BOUND_SECONDS
            self._rising, self._still = False, 0
            self._set(min(self.limit, held), 0.0, "the server's sessions")
