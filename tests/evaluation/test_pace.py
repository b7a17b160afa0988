"""`--concurrency auto`: in virtual time against fixed numbers, at endpoints that nobody listed; then over real HTTP."""
import asyncio
import json
import random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import runner
from evaluation.items import Item
from evaluation.live import Board
from evaluation.model import Completion
from evaluation.pace import MOST, START, Pace
from tests.evaluation.whole import attempts, run
from tests.fixtures.standins import Answer, completion, counter_player, endpoint, environment, failure


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        select = self._selector.select

        def jump(timeout):
            if timeout:
                self.now += timeout
            return select(0)

        self._selector.select = jump

    def time(self):
        return self.now


class Simulated:
    """An endpoint with `slots`; who finds none waits or, `strict`, gets a 429; beyond `crowd` at once all are slower."""
    answered, refused, adjusted = True, (), ()

    def __init__(self, latency, slots=10_000, strict=False, crowd=10_000, spread=0.0, seed=0):
        self.latency, self.strict, self.crowd, self.spread = latency, strict, crowd, spread
        self.slots, self.at_once, self.limited, self.rng = asyncio.Semaphore(slots), 0, 0, random.Random(seed)
        self.on_limit = lambda: None

    def player(self, item, sample, seed):
        return self

    async def reply(self, messages):
        while self.strict and self.slots.locked():
            self.limited += 1
            self.on_limit()
            await asyncio.sleep(self.rng.uniform(0.25, 0.5))
        async with self.slots:
            self.at_once += 1
            await asyncio.sleep(self.latency * self.rng.uniform(1 - self.spread, 1 + self.spread) * max(1.0, self.at_once / self.crowd)**2)
            self.at_once -= 1
        for _ in range(self.rng.randrange(5)):  # answers that arrive together are not all read in one turn of the loop
            await asyncio.sleep(0)
        return Completion("add")


async def fake_attempt(server, make, row, prompt, item, sample, seed, limits, before, place):
    player = make(item.number, sample, seed)
    for _ in range(limits):
        await player.reply([])
    return {"item": item.id, "sample": sample, "outcome": "success", "seconds": 1.0, "usage": {"prompt": 0, "completion": 0}}


def played(at_once, tmp_path, count=500, rounds=10, server=None, **kind):
    """Return answers a second and the pace; `at_once` 0 is auto."""
    loop = VirtualLoop()

    async def play():
        model, pace = Simulated(**kind), Pace(at_once or MOST, not at_once, loop.time)
        model.on_limit = pace.refused
        told = SimpleNamespace(items=[Item(f"x_{n}", n) for n in range(count)], samples=1, seed=None, row=None, prompt=None, limits=rounds)
        folder = SimpleNamespace(records={}, earlier={}, add=lambda record: None)
        stage = runner.Stage(told, folder, server, model, lambda record: None, pace, Board(tmp_path / "live.json", count, {}, pace))
        await stage.play_all()
        return count * rounds / loop.now, pace, model

    before = runner.attempt
    runner.attempt = fake_attempt
    try:
        return loop.run_until_complete(play())
    finally:
        runner.attempt = before
        loop.close()


@settings(max_examples=4, deadline=None)
@given(latency=st.sampled_from([0.02, 0.3, 2.0]), slots=st.integers(2, 300), crowd=st.integers(8, 400), spread=st.sampled_from([0.0, 0.5]))
def test_auto_is_never_much_worse_than_the_best_fixed_number(tmp_path_factory, latency, slots, crowd, spread):
    # A run of some minutes: the way up from START costs a dozen answers of each, which a shorter one does not win back.
    kind = {"latency": latency, "slots": slots, "crowd": crowd, "spread": spread}
    folder = tmp_path_factory.mktemp("pace")
    best = max(played(at_once, folder, 3000, **kind)[0] for at_once in (16, 64, 256))
    assert played(0, folder, 3000, **kind)[0] >= 0.9 * best


def test_auto_goes_up_while_answers_come_faster_and_no_further(tmp_path):
    rate, pace, _ = played(0, tmp_path, 1000, latency=0.5, slots=24)
    assert 24 <= pace.limit <= 64 and pace.changes[0].limit == 2 * START and rate > 0.9 * 24 / 0.5
    assert all(change.why in ("more answers a second", "no more answers a second", "to see") for change in pace.changes)


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_attempts_of_few_rounds_are_measured_too(tmp_path, rounds, spread):
    # Each answer, or nearly each, ends an attempt, whose successor begins a moment later.
    rate, pace, _ = played(0, tmp_path, 3000 // rounds, rounds=rounds, latency=0.5, slots=128, spread=spread)
    assert pace.limit >= 64 and rate > 0.6 * 128 / 0.5


def test_a_429_takes_auto_down_to_what_the_endpoint_gives(tmp_path):
    rate, pace, model = played(0, tmp_path, 400, latency=0.5, slots=24, strict=True)
    _, _, hard = played(256, tmp_path, 400, latency=0.5, slots=24, strict=True)
    best, _, none = played(24, tmp_path, 400, latency=0.5, slots=24, strict=True)
    assert pace.limit <= 40 and rate >= 0.9 * best and none.limited == 0
    assert model.limited < hard.limited / 50 and any(change.why == "429" for change in pace.changes)


def test_a_fixed_number_is_kept_whatever_happens():
    pace = Pace(7)
    pace.refused()
    pace.full(3)
    assert (pace.limit, pace.changes) == (7, [])


def test_who_waits_for_a_turn_and_is_cancelled_takes_none_with_it():
    async def play():
        pace = Pace(1)
        async with pace.turn():
            waiting = [asyncio.create_task(take(pace)) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
        waiting[1].cancel()  # it may have been let on just now
        await asyncio.wait_for(waiting[2], 5)

    async def take(pace):
        async with pace.turn():
            pass

    asyncio.run(play())


def work(out):
    return json.loads((out / "run.json").read_text())["work"]


def test_auto_is_in_the_record_and_no_part_of_the_configuration(tmp_path):
    slowly = lambda messages, body: Answer(completion(counter_player(messages, body)), delay=0.05)  # noqa: E731
    with environment() as env, endpoint(slowly) as model:  # enough answers for a measurement, on a fast machine too
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-9", "--samples", "12", "--concurrency", "auto") == 0
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-9", "--samples", "13", "--concurrency", "3") == 0
    first, second = work(tmp_path / "out")
    assert (first["concurrency"], second["concurrency"]) == ("auto", 3) and "pace" not in second
    assert first["pace"][0]["limit"] == 2 * START and first["pace"][0]["why"] == "more answers a second"
    assert len(attempts(tmp_path / "out")) == 130


def test_the_servers_sessions_bound_it(tmp_path):
    most = 3

    def full(path, number, body):
        return Answer({"detail": "every session is in use"}, 429) if path == "/create" and len(env.sessions) >= most else None

    with environment(full) as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-9", "--samples", "3", "--concurrency", "auto") == 0
    [told] = work(tmp_path / "out")
    assert next(change["limit"] for change in told["pace"] if change["why"] == "the server's sessions") <= most
    assert {one["outcome"] for one in attempts(tmp_path / "out")} == {"success", "failure"}


def test_a_429_of_the_endpoint_is_heard(tmp_path):
    seen = []

    def limited(messages, body):
        seen.append(body)
        return failure(429, "slow down", retry_after="0.1") if len(seen) in (5, 6, 7) else counter_player(messages, body)

    with environment() as env, endpoint(limited) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-9", "--samples", "2", "--concurrency", "auto") == 0
    [told] = work(tmp_path / "out")
    assert [change["limit"] < START for change in told["pace"] if change["why"] == "429"][:1] == [True]
    assert sum(one["model_retries"] for one in attempts(tmp_path / "out")) == 3


@pytest.mark.parametrize("value", ["automatic", "-1", "1.5", ""])
def test_what_is_no_number_is_refused(value, tmp_path, capsys):
    assert run(tmp_path / "out", "http://127.0.0.1:9", "http://127.0.0.1:9/v1", f"--concurrency={value}") == 2
    assert capsys.readouterr().err.count("\n") == 1
