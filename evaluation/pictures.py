"""The charts of a report."""
import math
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation import charts, show
from evaluation.attempts import ERRORS, SCORED
from evaluation.compared import Run, by_training

REWARD_BINS = 10


def draw_suite(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the chart of a suite: success rate by environment, a bar each model; none where nothing has a score."""
    environments, models = summary["environments"], summary["models"]
    at = {(line["env"], line["model"]): line["success"] for line in summary["pairs"]}
    nothing: Mapping[str, Any] = {"mean": math.nan, "low": None, "high": None}  # no bar
    figures: dict[str, list[Mapping[str, Any]]] = {
        model: [at.get((env, model)) or nothing for env in environments]
        for model in models
    }
    if not any(at.values()):
        return []
    picture = charts.bars(environments, {
        model: [one["mean"] for one in own]
        for model, own in figures.items()
    },
                          "suite",
                          "success rate", {
                              model: lengths(own)
                              for model, own in figures.items()
                          },
                          lying=True)
    return [{"title": "Success rate by environment", "svg": picture, "words": "the table above has the numbers"}]


def lengths(figures: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return the lengths of the error bars, below and above."""
    below = [0.0 if one["low"] is None else float(one["mean"] - one["low"]) for one in figures]
    above = [0.0 if one["high"] is None else float(one["high"] - one["mean"]) for one in figures]
    return [below, above]


def draw(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return the charts: title, SVG and, for whoever cannot see it, a line of words."""
    found = []

    def add(title: str, picture: str, words: str) -> None:
        found.append({"title": title, "svg": picture, "words": words})

    kinds = [name for name in (*SCORED, *ERRORS) if any(run.summary["outcomes"].get(name) for run in runs)]
    outcomes = {run.name: [run.summary["outcomes"].get(name, 0) for name in kinds] for run in runs}
    if kinds:
        add(
            "Outcomes", charts.bars(kinds, outcomes, "outcomes", "attempts", lying=True),
            "; ".join(f"{run}: " + ", ".join(f"{count} {kind}" for kind, count in zip(kinds, counts, strict=True))
                      for run, counts in outcomes.items()))
    scored = {run.name: [one for one in run.records if one["outcome"] in SCORED] for run in runs}
    if any(scored.values()):
        bins = [0] * REWARD_BINS
        edges = [f"{n / REWARD_BINS:g}–{(n + 1) / REWARD_BINS:g}" for n in range(REWARD_BINS)]
        rewards = {}
        for name, records in scored.items():
            counts = bins.copy()
            for one in records:
                counts[min(REWARD_BINS - 1, int((one["scaled"] or 0.0) * REWARD_BINS + 1e-9))] += 1
            rewards[name] = counts
        add(
            "Rewards", charts.bars([edge.split("–")[0] for edge in edges], rewards, "rewards", "attempts"),
            "; ".join(f"{name}: " + ", ".join(f"{count} from {edge}"
                                              for count, edge in zip(counts, edges, strict=True) if count)
                      for name, counts in rewards.items()))
        most = max(one["rounds"] for records in scored.values() for one in records)
        wide = max(1, -(-(most + 1) // 30))
        starts = list(range(0, most + 1, wide))
        rounds = {
            name: [sum(start <= one["rounds"] < start + wide for one in records) for start in starts]
            for name, records in scored.items()
        }
        add(
            "Rounds", charts.bars([str(start) for start in starts], rounds, "rounds", "attempts"),
            "; ".join(f"{run.name}: {show.with_interval(run.summary['rounds'], share=False)} rounds on average"
                      for run in runs))
    categories = sorted({name for run in runs for name in run.summary["categories"]})[:40]
    if categories:
        values, errors = {}, {}
        for run in runs:
            figures = [
                run.summary["categories"].get(name, {}).get("success") or {
                    "mean": math.nan,  # no bar
                    "low": None,
                    "high": None
                } for name in categories
            ]
            values[run.name] = [figure["mean"] for figure in figures]
            errors[run.name] = lengths(figures)
        add("Success rate by category", charts.bars(categories,
                                                    values,
                                                    "categories",
                                                    "success rate",
                                                    errors,
                                                    lying=True), "the table above has the numbers")
    trainings = by_training(runs)
    if trainings:
        add(
            "Reward by training step", charts.curves(trainings, "curve"), "; ".join(
                (f"{name}: " if len(trainings) > 1 else "") + ", ".join(f"step {step}: {show.with_interval(figure)}"
                                                                        for step, figure in points)
                for name, points in trainings.items()))
    return found
