"""How many threads copy: chosen by what is measured of storage and cores; and merges in which the number changes."""
from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from merger import copying, crew
from merger.crew import IN_FLIGHT, MOST, Crew, block_bytes, first, following

from tests.merger.merging import Sample, listing, merge


def settled(rate: Any, cores: int, busy: float = 0.1) -> int:
    """Return with how many threads a copying ends on a storage that gives `rate(threads)` work in a second."""
    now, rates = first(cores), {}
    while True:
        rates[now] = rate(now)
        wanted = following(rates, now, min(busy * now, 1))
        if wanted <= now:
            return wanted
        now = wanted


@pytest.mark.parametrize(("storage", "cores", "busy", "threads"), [
    (lambda n: 1.0, 2, 0.1, 4),
    (lambda n: min(n, 4.9), 2, 0.05, 4),
    (lambda n: min(n, 8), 2, 0.06, 8),
    (lambda n: n, 2, 0.001, MOST),
    (lambda n: n, 2, 0.12, 8),
    (lambda n: n, 2, 0.3, 4),
    (lambda n: n, 16, 0.06, 16),
    (lambda n: 1.0, 64, 0.01, MOST),
], ids=["a storage at its end", "a quarter more is not enough", "twice as much and no more", "one that only waits",
        "the cores are busy with eight", "the cores are busy", "many cores", "very many cores"])  # yapf: disable
def test_the_number_follows_the_storage_and_the_cores(storage: Any, cores: int, busy: float, threads: int) -> None:
    assert settled(storage, cores, busy) == threads


@pytest.mark.parametrize("threads", [1, 4, 8, 16, MOST])
def test_memory_does_not_grow_with_the_threads(threads: int) -> None:
    assert threads * block_bytes(threads) <= IN_FLIGHT


def test_a_number_that_is_given_rules() -> None:
    told = Crew(3)
    for _ in range(1000):
        told.count(1 << 20, 1)
    assert told.size == 3 and told.settled


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.cpu = 0.0
        monkeypatch.setattr(crew.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(crew.time, "process_time", lambda: self.cpu)


@pytest.mark.parametrize(("latency", "bandwidth", "threads"), [(0.0001, 1.5e9, 4), (0.5, 1e12, MOST), (0.5, 2.7e8, 16)])
def test_blocks_are_counted_until_it_no_longer_pays(latency: float, bandwidth: float, threads: int,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread waits `latency` s for a block; together they get `bandwidth` bytes a second."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(crew, "cores", lambda: 2)
    copying_ = Crew()
    for _ in range(4000):
        nbytes = 8 << 20  # as if memory were no matter
        clock.now += max(latency / copying_.size, nbytes / bandwidth)
        copying_.count(nbytes, 1)
        if copying_.settled:
            break
    assert copying_.settled and copying_.size == threads


def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each read of a rank's file take its time, on two cores; blocks are small, and few of them a measurement."""
    for name, value in (("SECONDS", 0), ("TURNS", 1), ("IN_FLIGHT", 1 << 15), ("cores", lambda: 2)):
        monkeypatch.setattr(crew, name, value)
    read = copying.Sources.read

    def late(self: Any, *args: Any) -> Any:
        time.sleep(0.001)
        return read(self, *args)

    monkeypatch.setattr(copying.Sources, "read", late)


@pytest.mark.parametrize("rates", [{}, {
    4: 1.0,
    8: 2.0,
    16: 4.0,
    32: 8.0
}, {
    4: 1.0,
    8: 2.0,
    16: 0.1
}],
                         ids=["as measured", "it always pays", "sixteen were slower than eight"])
def test_a_merge_whose_threads_change_writes_the_same_bytes(rates: dict[int, float], samples: dict[str, Sample],
                                                            tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = samples["FSDP2 and TP, 3 x 2 ranks"]
    merge("--local-dir", sample.actor, "--save-dir", tmp_path / "four", "--json", "--threads", "4").record()
    slowly(monkeypatch)
    if rates:
        measured = crew.following
        monkeypatch.setattr(crew, "following", lambda _, now, busy: measured(rates, now, 0.0))
    record = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "found", "--json").record()
    written = [{name: data for name, data in listing(tmp_path / name).items() if name.endswith(".safetensors")}
               for name in ("four", "found")]  # yapf: disable
    assert written[0] and written[0] == written[1]
    if rates:
        assert record["threads"] == (8 if 0.1 in rates.values() else MOST)


def test_threads_that_the_system_refuses_are_done_without(samples: dict[str, Sample], tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch)
    monkeypatch.setattr(crew, "following", lambda rates, now, busy: 2 * now)
    start, main = threading.Thread.start, threading.current_thread()

    def refuse(self: threading.Thread) -> None:
        if threading.current_thread() is not main:  # a copying thread that asks for another
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    record = merge("--local-dir", samples["FSDP2 and TP, 3 x 2 ranks"].actor, "--save-dir", tmp_path / "out",
                   "--json").record()
    assert record["threads"] == 4
