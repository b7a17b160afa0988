"""Figures and their intervals."""
import functools
import itertools
import math
import random
from collections import Counter
from statistics import fmean

import numpy as np
import pytest

from evaluation import numbers
from tests.evaluation.samples import attempt


def test_pass_at_k_is_the_share_of_draws_with_a_success():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert numbers.pass_at_k(n, c, k) == pytest.approx(fmean(map(any, draws)))
    with pytest.raises(ValueError, match="needs 3 samples"):
        numbers.pass_at_k(2, 1, 3)


@pytest.mark.parametrize("solved,count", [(0, 10), (10, 10), (3, 10), (81, 263), (1, 1)])
def test_wilsons_bounds_are_where_the_score_test_just_rejects(solved, count):
    share = solved / count
    for bound in numbers.wilson(share, count):
        if 0 < bound < 1:
            assert abs(share - bound) / math.sqrt(bound * (1 - bound) / count) == pytest.approx(1.959964, rel=1e-5)
        else:
            assert bound == pytest.approx(share)


def test_wilson_agrees_with_the_published_example():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148.
    assert numbers.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert numbers.wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_the_bootstraps_interval_is_about_the_normal_one_for_many_values():
    rng = random.Random(4)
    values = [rng.random() for _ in range(1000)]
    half = 1.96 * math.sqrt(sum((value - fmean(values))**2 for value in values) / 999 / 1000)
    low, high = numbers.bootstrap(values)
    assert (low, high) == pytest.approx((fmean(values) - half, fmean(values) + half), abs=0.002)
    assert numbers.bootstrap(values) == (low, high)  # the same for the same records


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = random.Random(5)
    hits = 0
    for number in range(200):
        values = [rng.betavariate(2, 5) for _ in range(40)]
        low, high = numbers.bootstrap(values, seed=number)
        hits += low <= 2 / 7 <= high
    assert 178 <= hits <= 199


def test_equal_rewards_do_not_claim_certainty():
    found = numbers.figure([1.0] * 10)
    assert found["low"] == pytest.approx(0.7225, abs=1e-4) and found["method"] == "Wilson"


def test_infrastructure_never_enters_a_score_but_upstream_counts_it_as_zero():
    found = numbers.summarize([attempt("a"), attempt("b", outcome="failure", reward=0.5), attempt("c", outcome="env_error"),
                               attempt("d", outcome="timeout")], samples=1, expected=5)
    assert (found["success"]["mean"], found["reward"]["mean"], found["errors"], found["items"]) == (0.5, 0.75, 2, 2)
    assert (found["attempts"], found["expected"], found["error_rate"]) == (4, 5, 0.5)
    assert found["upstream"] == {"score": 0.375, "success": 0.25, "avg@1": 0.375, "pass@1": 0.5}


def test_items_weigh_the_same_whatever_samples_they_lost():
    found = numbers.summarize([attempt("a", 0), attempt("a", 1), attempt("b", 0, "failure", 0.0), attempt("b", 1, "model_error")], 2)
    assert found["success"]["mean"] == 0.5 and found["pass_at"]["2"]["items"] == 1


def test_categories_are_scored_apart():
    found = numbers.summarize([attempt("a", category="x"), attempt("b", 0, "failure", 0.0, "y"), attempt("c", category="y")], 1)
    assert {name: one["success"]["mean"] for name, one in found["categories"].items()} == {"x": 1.0, "y": 0.5}


def test_a_killed_stretch_of_work_lasted_until_its_last_attempt_ended():
    played = [{"started": f"2026-01-01T00:00:{second}+00:00", "seconds": 4.5} for second in ("01.500", "02.000", "31.000")]
    first, second = {"started": "2026-01-01T00:00:01.000+00:00", "seconds": None}, {"started": "2026-01-01T00:00:30.000+00:00", "seconds": 7.0}
    assert numbers.wall([first, second], played) == 5.5 + 7.0 and numbers.wall([second], played) == 7.0
    assert numbers.wall([{**first, "seconds": 3.0}, {**second, "seconds": None}], played) == 3.0 + 5.5
    assert numbers.wall([first], []) == numbers.wall([], played) == 0.0


def test_cost_needs_a_price_and_all_tokens():
    usage = {"prompt": 100, "completion": 10, "cached": 40, "reasoning": 0, "unknown": 0}
    assert numbers.cost(usage, {"input": 2.0, "output": 10.0}) == pytest.approx((100 * 2 + 10 * 10) / 1e6)
    assert numbers.cost(usage, {"input": 2.0, "output": 10.0, "cached": 1.0}) == pytest.approx((60 * 2 + 40 + 100) / 1e6)
    assert numbers.cost(usage, None) is None and numbers.cost({**usage, "unknown": 1}, {"input": 2.0, "output": 10.0}) == pytest.approx((100 * 2 + 10 * 10) / 1e6)


def test_a_comparison_is_paired():
    one = [attempt(str(n), 0, "success" if n < 5 else "failure", float(n < 5)) for n in range(10)]
    other = [attempt(str(n), 0, "success" if n < 8 and n != 0 else "failure", float(n < 8 and n != 0)) for n in range(11)]
    found = numbers.compare(one, other)
    assert (found["items"], found["only_other"], found["gained"], found["lost"]) == (10, 1, ["5", "6", "7"], ["0"])
    assert found["success"]["mean"] == pytest.approx(0.2) and found["success"]["low"] < 0.2 < found["success"]["high"]


def test_items_are_paired_however_their_lists_spell_them():
    one, other = [attempt(f"maze_{n}") for n in range(4)], [attempt(f"lmrlgym_maze_{n}", outcome="failure", reward=0.0) for n in range(5)]
    found = numbers.compare(one, other)
    assert (found["items"], found["only_one"], found["only_other"], found["lost"]) == (4, 0, 1, [f"maze_{n}" for n in range(4)])


def test_another_task_under_the_same_id_is_no_pair():
    one = [{**attempt(str(n)), "task": f"t{n}"} for n in range(4)]
    other = [{**attempt(str(n), outcome="failure", reward=0.0), "task": task} for n, task in enumerate(["t0", "tx", "", "t3"])]
    found = numbers.compare(one, other)
    assert (found["items"], found["other_task"], found["lost"], found["only_one"]) == (3, 1, ["0", "2", "3"], 0)
    assert numbers.compare(one, other, same_words=False)["items"] == 4


@functools.cache
def counted(solved, binary):
    """The figure of items, of which so many have so many of their samples solved."""
    samples = len(solved) - 1
    return numbers.figure([one / samples for one, count in enumerate(solved) for _ in range(count)], binary=binary)


def odds(samples, chance):
    return [math.comb(samples, solved) * chance**solved * (1 - chance)**(samples - solved) for solved in range(samples + 1)]


def drawn(rng, items, samples, chance, runs):
    """How many items have so many samples solved, of each of `runs` simulated runs."""
    return list(map(tuple, rng.multinomial(items, odds(samples, chance), runs).tolist()))


@pytest.mark.parametrize("items", [20, 50, 200])
@pytest.mark.parametrize("chance", [0.02, 0.1, 0.5])
def test_the_interval_of_pass_at_k_covers_as_often_as_it_says(items, chance):
    # Pass@4 of 4 samples is solved or not, so its coverage is known without simulation.
    solved, covered = 1 - (1 - chance)**4, 0.0
    for count, share in enumerate(odds(items, solved)):
        found = counted((items - count, count), True)
        covered += share * (found["low"] <= solved <= found["high"])
    assert 0.93 <= covered <= 0.97
    truth, runs, hits = 1 - (1 - chance)**2, 6000, 0  # of Pass@2; one of these runs' shares has an error of 0.003
    values = [numbers.pass_at_k(4, solved, 2) for solved in range(5)]
    for counts, times in Counter(drawn(np.random.default_rng(1), items, 4, chance, runs)).items():
        found = numbers.figure([value for value, count in zip(values, counts, strict=True) for _ in range(count)])
        hits += times * (found["low"] <= truth <= found["high"])
    assert 0.93 <= hits / runs <= 0.97


# Items and chance of each environment, and the most that may be covered: rare successes give few different averages, and
# what lies at both ends claims more doubt than it has.
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("suite, most", [
    ([(20, 0.02)] * 5, 0.99),
    ([(50, 0.1)] * 5, 0.975),
    ([(200, 0.5)] * 5, 0.975),
    ([(20, 0.5)] * 2, 0.98),
    ([(100, 0.6), (90, 0.8), (200, 0.1), (20, 0.05), (400, 0.35)], 0.98),
    ([(20, 0.1), (200, 0.02), (400, 0.02)], 0.985),
    ([(20, 0.02), (20, 0.98)], 1.0),
], ids=["rare", "seldom", "often", "two", "lists of a paper", "few seldom, many rarely", "both ends"])
def test_the_macro_averages_interval_covers_as_often_as_it_says(suite, most, samples):
    rng, runs = np.random.default_rng(2), 1500  # 0.006 of error
    truth = fmean(chance for _, chance in suite)
    found = [numbers.macro([counted(one, samples == 1) for one in each]) for each in zip(*(drawn(rng, items, samples, chance, runs) for items, chance in suite), strict=True)]
    assert 0.93 <= fmean(one["low"] <= truth <= one["high"] for one in found) <= most


def test_a_macro_average_of_one_environment_is_no_narrower_than_its_own():
    one = numbers.figure([0.0] * 19 + [1.0], binary=True)
    found = numbers.macro([one])
    assert found["mean"] == one["mean"] and found["low"] <= one["low"] and found["high"] >= one["high"]
    nothing = numbers.macro([numbers.figure([0.0] * 20, binary=True)] * 5)
    assert (nothing["mean"], nothing["low"]) == (0.0, 0.0) and 0.01 < nothing["high"] < 0.17 and nothing["items"] == 100


def test_one_method_is_in_one_table():
    found = numbers.summarize([attempt(str(n), s, *(("success", 1.0) if (n + s) % 3 else ("failure", 0.25))) for n in range(10) for s in range(4)], 4)
    assert {one["method"] for one in (found["success"], found["reward"], *found["pass_at"].values())} == {"Wilson"}


def test_a_bootstrap_interval_is_as_wide_as_it_says():
    error = math.sqrt((1000**2 - 1) / 12 / 1000)  # of the mean of as many draws of a uniform distribution
    widths = [high - low for low, high in (numbers.bootstrap(range(1000), seed) for seed in range(10))]
    assert fmean(widths) / 2 / error == pytest.approx(1.96, abs=0.05)  # one of 98 % would be 2.3


@pytest.mark.parametrize("values, effect", [
    ([0.5] * 10, 0.125 / 9.5 / 0.25),
    ([0.2] * 10, 0.125 / 9.5 / (2.25 / 10.5 * (1 - 2.25 / 10.5))),
    ([0.25, 0.75] * 5, (10 / 16 + 0.125) / 9.5 / 0.25),
    ([0.0, 1.0] * 5, 1.0),
], ids=["all half", "all a fifth", "two values", "zeros and ones"])
def test_the_design_effect_has_half_an_item_of_prior(values, effect):
    assert numbers.design_effect(values) == pytest.approx(effect, rel=1e-12)


@pytest.mark.parametrize("work, lost", [
    ([], 0),
    ([{"sessions": {"lost": 2}}, {}, {"sessions": {"lost": 3}}], 5),
    ([{"sessions": None}, {"sessions": {"lost": None}}, {"sessions": {"lost": -1}}, {"sessions": {"lost": 10**9 + 1}}], 0),
    ([{"sessions": {"lost": 10**9}}], 10**9),
], ids=["none", "of all stretches", "what is no number of sessions", "the most that is believed"])
def test_sessions_that_were_lost_are_counted(work, lost):
    assert numbers.lost_sessions(work) == lost


def test_answers_that_hold_nothing_are_counted():
    said = [{**attempt("x_1"), "turns": [{"completion": " \n"}, {"completion": "go"}, {"completion": ""}]}, attempt("x_2")]
    found = numbers.summarize(said, 1)
    assert (found["answers"], found["empty_answers"]) == (3, 2)


def test_half_of_the_samples_is_a_solved_item_and_less_is_none():
    def run(solved: dict[str, int]) -> list[dict]:
        return [attempt(item, sample, *(("success", 1.0) if sample < count else ("failure", 0.0))) for item, count in solved.items() for sample in range(4)]

    found = numbers.compare(run({"x_1": 2, "x_2": 1, "x_3": 2, "x_4": 1}), run({"x_1": 1, "x_2": 2, "x_3": 3, "x_4": 0}))
    assert (found["gained"], found["lost"]) == (["x_2"], ["x_1"])


def test_of_all_samples_an_item_is_solved_or_not_and_of_some_it_is_a_share():
    solved = [0, 1, 2, 3, 4, 2, 0]
    said = [attempt(f"x_{item}", sample, *(("success", 1.0) if sample < count else ("failure", 0.0))) for item, count in enumerate(solved)
            for sample in range(4)]  # yapf: disable
    found = numbers.summarize(said, 4)["pass_at"]
    some, all_of_them = ([numbers.pass_at_k(4, count, k) for count in solved] for k in (2, 4))
    assert found == {"2": numbers.figure(some), "4": numbers.figure(all_of_them, binary=True)}
    assert found["2"] != numbers.figure(some, binary=True)
