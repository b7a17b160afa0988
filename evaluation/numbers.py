"""The numbers of a run, from its records: pure functions of values.

An item's value is the mean over its samples, and a figure is the mean over items, so an item of which a sample failed
weighs as much as any other. Samples of one item depend on each other: intervals come from resampling items, never
attempts.
"""
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from statistics import NormalDist, fmean
from typing import Any, Literal

import numpy as np

from evaluation.attempts import ERRORS, SCORED, SETTLED, Attempt, UsageCounts

CONFIDENCE = 0.95
RESAMPLES = 2000
PRIOR = 0.5  # items
COUNTS: tuple[Literal["prompt", "completion", "cached", "reasoning", "unknown"],
              ...] = ("prompt", "completion", "cached", "reasoning", "unknown")
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


def design_effect(values: Sequence[float]) -> float:
    """Return the variance of `values`, in 0 to 1, as a share of that of zeros and ones of the same mean; at most 1.

    With half an item of prior, so that few values that happen to lie close together do not claim certainty. An interval
    of Wilson's for the number of items divided by it (Kish 1965) covers in 0.93 to 0.98 of simulated runs, where a
    bootstrap over items covers in 0.53 to 0.97: benchmarks/interval_coverage.py.
    """
    mean, count = fmean(values), len(values)
    variance = (sum((value - mean)**2 for value in values) + PRIOR / 4) / (count + PRIOR - 1)
    smoothed = (mean * count + PRIOR / 2) / (count + PRIOR)
    return min(1.0, variance / (smoothed * (1 - smoothed)))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return the Wilson score interval of a share of `count` (Wilson 1927)."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)
    # The bounds of 0 and 1 are themselves; rounding would leave 1e-17.
    return max(0.0, centre - half) if share > 0 else 0.0, min(1.0, centre + half) if share < 1 else 1.0


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values`, from RESAMPLES resamples (Efron 1979)."""
    array, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    chunk = max(1, 2_000_000 // len(array))  # bounds the memory
    for begin in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - begin)
        means[begin:begin + size] = array[rng.integers(0, len(array), (size, len(array)))].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Return the chance that at least one of k samples solves the item, without bias (Chen et al. 2021, equation 1).

    Raises:
        ValueError: k is above the number of samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"Pass@{k} needs {k} samples, and there are {samples}")
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def figure(values: Sequence[float], binary: bool = False, bounded: bool = True) -> dict[str, Any] | None:
    """Return mean, interval and how the interval was made; None where there is no value.

    Args:
        values: one an item.
        binary: each is 0 or 1, so that Wilson's interval holds as it is; for others it is of as many items as their
            spread is worth.
        bounded: all lie in 0 to 1.
    """
    if not values:
        return None
    mean, count = fmean(values), len(values)
    equal = min(values) == max(values)
    if bounded:
        worth = count if binary or equal else count / design_effect(values)
        low, high = wilson(mean, worth)
        return {"mean": mean, "low": low, "high": high, "method": "Wilson", "items": count, "effective_items": worth}
    if count == 1 or equal:
        return {"mean": mean, "low": None, "high": None, "method": "none", "items": count}
    low, high = bootstrap(values)
    return {"mean": mean, "low": low, "high": high, "method": "bootstrap over items", "items": count}


def macro(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the mean of several environments' figures, each weighing the same, and its interval; None of none.

    The environments are these and no sample of others: what is uncertain is each one's figure. The interval is Wilson's
    again, for as many items as have the variance of that mean: a mean p over k environments with variances
    p_i (1 - p_i) / n_i has p (1 - p) k**2 / sum p_i (1 - p_i) / n_i of them, where each p_i is taken with an item
    solved and one not beside its own, so that an environment in which nothing is solved claims no certainty. By
    simulation it covers in 0.93 to 0.98, more where environments lie at both ends: benchmarks/interval_coverage.py.

    Args:
        figures: of `figure`, bounded.
    """
    if not figures:
        return None
    worth = [one["effective_items"] for one in figures]
    smooth = [(one["mean"] * count + 1) / (count + 2) for one, count in zip(figures, worth, strict=True)]
    variance = sum(share * (1 - share) / count for share, count in zip(smooth, worth, strict=True)) / len(figures)**2
    mean, centre = fmean(one["mean"] for one in figures), fmean(smooth)
    count = centre * (1 - centre) / variance
    low, high = wilson(mean, count)
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "method": "Wilson",
        "items": sum(one["items"] for one in figures),
        "effective_items": count
    }


def by_item(records: Sequence[Attempt]) -> dict[str, list[Attempt]]:
    """Return the scored records by item."""
    items: dict[str, list[Attempt]] = {}
    for record in records:
        if record["outcome"] in SCORED:
            items.setdefault(record["item"], []).append(record)
    return items


def by_number(records: Sequence[Attempt]) -> dict[int, list[Attempt]]:
    """Return the scored records by the number that the server knows the item by: lists spell its id in several ways."""
    return {group[0]["index"]: group for group in by_item(records).values()}


def scores(records: Sequence[Attempt], samples: int) -> dict[str, Any]:
    """Return reward, success and Pass@k of `records`, of which each item should have `samples`."""
    items = by_item(records)
    rewards = [fmean(one["scaled"] or 0.0 for one in group) for group in items.values()]
    solved = [fmean(float(bool(one["success"])) for one in group) for group in items.values()]
    found: dict[str, Any] = {
        "items": len(items),
        "scored": sum(map(len, items.values())),
        "reward": figure(rewards),
        "success": figure(solved, binary=samples == 1),
    }
    passes = {}
    for k in sorted({1, 2, 4, 8, 16, 32, 64, samples}):
        if 1 < k <= samples:
            values = [
                pass_at_k(len(group), sum(bool(one["success"]) for one in group), k) for group in items.values()
                if len(group) >= k
            ]
            if values:
                passes[str(k)] = figure(values, binary=k == samples)
    if passes:
        found["pass_at"] = passes
    return found


def usage_sum(usages: Iterable[UsageCounts]) -> dict[str, int]:
    """Return the sum of token counts."""
    counted = list(usages)
    return {key: sum(one[key] for one in counted) for key in COUNTS}


def cost(usage: Mapping[str, int], price: Mapping[str, float] | None) -> float | None:
    """Return the cost of `usage` in the price's currency, the least where tokens are unknown; None without a price."""
    if price is None:
        return None
    cached = usage["cached"] if "cached" in price else 0
    return ((usage["prompt"] - cached) * price["input"] + cached * price.get("cached", 0.0) +
            usage["completion"] * price["output"]) / 1e6


def upstream(records: Sequence[Attempt], samples: int) -> dict[str, Any]:
    """Return the figures as AgentGym's and AgentGym-RL's own evaluations would count them.

    Their rewards are raw, an attempt that the infrastructure spoilt counts as 0, success is a reward of exactly 1 or
    100 (Evaluator.eval), and Pass@n is any reward above 0 (main_generation).
    """
    items: dict[str, list[float]] = {}
    for record in records:
        items.setdefault(record["item"], []).append(float(record["upstream_reward"] or 0.0))
    rewards = [reward for group in items.values() for reward in group]
    if not rewards:
        return {}
    return {
        "score": fmean(rewards),
        "success": fmean(float(reward in (1.0, 100.0)) for reward in rewards),
        f"avg@{samples}": fmean(rewards),
        f"pass@{samples}": fmean(float(max(group) > 0) for group in items.values()),
    }


def histogram(values: Sequence[float]) -> dict[str, int]:
    """Return how often each value occurs, in order."""
    return {f"{value:g}": count for value, count in sorted(Counter(values).items())}


def summarize(records: Sequence[Attempt],
              samples: int,
              expected: int | None = None,
              price: Mapping[str, float] | None = None,
              wall: float | None = None,
              lost: int = 0) -> dict[str, Any]:
    """Return all numbers of a run.

    `usage` and `cost` are of all tries; `usage_before` is the part of tries that the infrastructure spoilt and that
    were played again.

    Args:
        records: its attempts.
        samples: a run's `--samples`.
        expected: how many attempts the run has when it is complete.
        price: of the model, for a million tokens: input, output and, where known, cached.
        wall: seconds that the run took.
        lost: sessions that could not be closed.
    """
    outcomes = Counter(record["outcome"] for record in records)
    errors = sum(outcomes[name] for name in ERRORS)
    # Tokens of tries that were played again are in no attempt's own usage, but they were paid for.
    before = usage_sum(one["usage"] for record in records for one in record["tries_before"] if "usage" in one)
    own = usage_sum(record["usage"] for record in records)
    usage = {key: own[key] + before[key] for key in own}
    scored = [record for record in records if record["outcome"] in SCORED]
    categories = sorted({record["category"] for record in records if record["category"]})
    return {
        "attempts": len(records),
        "expected": len(records) if expected is None else expected,
        "errors": errors,
        "error_rate": errors / len(records) if records else 0.0,
        "outcomes": {
            name: outcomes[name]
            for name in (*SCORED, *SETTLED, *ERRORS) if outcomes[name]
        },
        **scores(records, samples),
        "samples": samples,
        "confidence": CONFIDENCE,
        "categories": {
            name: scores([one for one in records if one["category"] == name], samples)
            for name in categories
        },
        "rounds": figure([fmean(one["rounds"] for one in group) for group in by_item(records).values()], bounded=False),
        "rounds_histogram": histogram([one["rounds"] for one in scored]),
        "invalid_actions": sum(record["invalid_actions"] for record in records),
        "answers": sum(len(record.get("turns", ())) for record in records),
        "empty_answers": sum(not turn["completion"].strip() for record in records for turn in record.get("turns", ())),
        "room_left": sum(bool(record.get("room")) for record in records),
        "sessions_lost": lost,
        "model_retries": sum(record["model_retries"] for record in records),
        "tries_before": sum(len(record["tries_before"]) for record in records),
        "usage": usage,
        "usage_before": before,
        "cost": cost(usage, price),
        "seconds": {
            "wall": wall,
            "model": sum(record["model_seconds"] for record in records),
            "environment": sum(record["env_seconds"] for record in records),
        },
        "upstream": upstream(records, samples),
    }


def lost_sessions(work: Sequence[Mapping[str, Any]]) -> int:
    """Return how many sessions could not be closed in all stretches of work on a run."""
    found = 0
    for one in work:
        sessions = one.get("sessions")
        lost = sessions.get("lost") if isinstance(sessions, dict) else None
        found += lost if isinstance(lost, int) and 0 <= lost <= 10**9 else 0
    return found


def wall(work: Sequence[Mapping[str, Any]], records: Sequence[Attempt]) -> float:
    """Return the seconds of all stretches of work on a run.

    One that was killed has none of its own: it is taken to have ended with the last of its attempts in `records`.
    """
    total = 0.0
    for one, following in zip(work, [*work[1:], {}], strict=False):
        if one["seconds"] is None:
            begun, next_begun = one["started"], following.get("started", "9")  # texts of ISO 8601, which sort
            total += max(((datetime.fromisoformat(record["started"]) - datetime.fromisoformat(begun)).total_seconds() +
                          record["seconds"] for record in records if begun <= record["started"] < next_begun),
                         default=0.0)
        else:
            total += one["seconds"]
    return total


def tasks(records: Sequence[Attempt]) -> set[str]:
    """Return the digests of the first observations in `records`, as far as they are known."""
    return {record["task"] for record in records if record.get("task")}


def compare(one: Sequence[Attempt], other: Sequence[Attempt], same_words: bool = True) -> dict[str, Any]:
    """Return the paired difference of two runs, other minus one, on the items that both have, whatever they call them.

    Items that flipped: solved in most samples of one run and not of the other. An item that began with another
    observation is another task under the same id (AgentGym's textcraft_3 depends on the server's files): it is left
    out and counted.

    Args:
        same_words: whether both prompts dress the first observation alike; if not, its digest tells nothing.
    """
    left, right = by_number(one), by_number(other)
    both = [item for item in left if item in right]
    known = {item: (tasks(left[item]), tasks(right[item])) for item in both} if same_words else {}
    strange = {item for item, (a, b) in known.items() if a and b and a != b}
    common = [item for item in both if item not in strange]

    def means(group: Mapping[int, list[Attempt]], key: Literal["success", "scaled"]) -> list[float]:
        return [fmean(float(record[key] or 0.0) for record in group[item]) for item in common]

    def difference(key: Literal["success", "scaled"]) -> dict[str, Any] | None:
        pairs = zip(means(left, key), means(right, key), strict=True)
        return figure([b - a for a, b in pairs], bounded=False)

    before, after = means(left, "success"), means(right, "success")
    called = [str(left[number][0]["item"]) for number in common]
    return {
        "items": len(common),
        "other_task": len(strange),
        "only_one": len(left) - len(both),
        "only_other": len(right) - len(both),
        "reward": difference("scaled"),
        "success": difference("success"),
        "gained": [item for item, a, b in zip(called, before, after, strict=True) if a < 0.5 <= b],
        "lost": [item for item, a, b in zip(called, before, after, strict=True) if b < 0.5 <= a],
    }
