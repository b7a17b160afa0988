"""How many threads copy, where nobody says: as many as the storage and the cores make use of, by what the first blocks show.

A thread waits for the storage, casts on a core, and waits again. So more threads pay until the cores are busy, or the
storage gives no more: on a local disk early, on one that answers late (a network's, an object store's) only when
many requests are under way.
"""
import os
import time
from collections.abc import Mapping

from merger.plan import BLOCK_BYTES

START, MOST = 4, 32  # threads
PAYS = 1.25  # times as fast is what more threads must be to stay
BUSY = 0.85  # of the cores' time, from which on more threads only take turns
IN_FLIGHT = 32 << 20  # bytes of all threads' blocks: memory does not grow with the threads
REQUEST = 256 << 10  # bytes that one more read counts as, so that a phase of small tensors compares with one of large
TURNS, SECONDS = 2, 0.2  # blocks a thread, and s, that a measurement takes at least


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first(cores: int) -> int:
    """Return with how many threads to begin on so many cores."""
    return min(max(START, cores), MOST)


def following(rates: Mapping[int, float], now: int, busy: float) -> int:
    """Return how many threads to go on with; `now` where they are settled.

    Args:
        rates: work in a second by the number of threads that did it, `now` among them.
        busy: share of the cores' time that this process took meanwhile.

    >>> following({4: 100.0}, 4, busy=0.3), following({4: 100.0}, 4, busy=0.1)
    (8, 16)
    >>> following({4: 100.0, 8: 190.0}, 8, busy=0.4)
    16
    >>> following({4: 100.0, 8: 110.0}, 8, busy=0.4)
    4
    >>> following({4: 100.0}, 4, busy=0.95)
    4
    """
    fewer = max((number for number in rates if number < now), default=None)
    if fewer is not None and rates[now] < PAYS * rates[fewer]:
        return fewer
    return min((4 if busy < BUSY / 4 else 2) * now, MOST) if busy < BUSY else now


def block_bytes(threads: int) -> int:
    """Return the source bytes that a block may have with so many threads.

    >>> [block_bytes(number) >> 20 for number in (1, 4, 8, 32)]
    [8, 8, 4, 1]
    """
    return min(BLOCK_BYTES, IN_FLIGHT // threads)


class Crew:
    """The number of threads of one copying, `size`: given, or found.

    Not safe for threads: they tell it of their blocks one at a time.
    """

    def __init__(self, threads: int = 0) -> None:
        self._cores = cores()
        self.size = threads or first(self._cores)
        self.settled = bool(threads)
        self.block_bytes = BLOCK_BYTES if threads else block_bytes(self.size)
        self._rates: dict[int, float] = {}
        self._begin()

    def _begin(self, skipped: int = 0) -> None:
        self._blocks, self._work, self._skip = 0, 0, skipped
        self._since, self._cpu = time.perf_counter(), time.process_time()

    def count(self, nbytes: int, reads: int) -> None:
        """Note a block of `nbytes` that took `reads` reads; change `size` where a measurement is complete."""
        if self.settled:
            return
        if self._skip:  # begun under the number before
            self._skip -= 1
            if not self._skip:
                self._begin()
            return
        self._blocks += 1
        self._work += nbytes + REQUEST * reads
        seconds = time.perf_counter() - self._since
        if self._blocks < TURNS * self.size or seconds < SECONDS:
            return
        self._rates[self.size] = self._work / seconds
        busy = (time.process_time() - self._cpu) / seconds / self._cores
        before, wanted = self.size, following(self._rates, self.size, busy)
        if wanted <= before:
            return self.settle(wanted)
        self.size, self.block_bytes = wanted, block_bytes(wanted)
        self._begin(before)

    def settle(self, threads: int) -> None:
        """Stay with so many threads."""
        self.size, self.block_bytes, self.settled = threads, block_bytes(threads), True
