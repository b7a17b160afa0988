"""The curve of a run: what its checkpoints' evaluations came to, by training step.

Each evaluation is a folder `eval/<environment>-global_step_<N>-<plan>` that the evaluation's runner fills; `plan` stands
for how it was evaluated (which items, how many, how often), for only like may be compared with like. `eval/curve.json`
is made from these folders, as often as one wants:

    {"schema": 1, "points": [{"step": 4, "environment": "textcraft", "plan": "1a2b3c", "folder": "textcraft-global_step_4-1a2b3c",
      "model": …, "success": {"mean": 0.5, "low": 0.3, "high": 0.7}, "reward": {…}, "attempts": 100, "errors": 0, "ended": unix}, …]}

`success` is the share of the items that were solved, `reward` is scaled to 0 to 1; low and high are the ends of a 95 %
interval, null where there is none.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.foreign import is_count, is_number, is_text, misfit, read_object
from training.retention import Score

SCHEMA = 1
FOLDER = re.compile(r"(?P<environment>[\w.]+(?:-[\w.]+)*?)-global_step_(?P<step>\d+)-(?P<plan>[0-9a-f]{6})")
FIGURE = {"mean": is_number, "low": is_number, "high": is_number}
SUMMARY = {
    "attempts": is_count,
    "expected": is_count,
    "errors": is_count,
    "error_rate": is_number,
    "success": FIGURE,
    "reward": FIGURE
}
MOST_ERRORS = 0.02  # share of attempts that the infrastructure may spoil, as the evaluation's runner has it


@dataclass(frozen=True)
class Point:
    """A complete evaluation of a step; see above."""
    step: int
    environment: str
    plan: str
    folder: str
    model: str
    success: dict[str, Any]
    reward: dict[str, Any]
    attempts: int
    errors: int
    ended: float


def folder_name(environment: str, step: int, plan: str) -> str:
    """Return the name of an evaluation's folder."""
    return f"{environment}-global_step_{step}-{plan}"


def read_point(folder: Path) -> Point | None:
    """Return what the evaluation in `folder` came to; None where it is none, is not complete or too much of it failed.

    What the infrastructure spoilt counts for nobody, so an evaluation of which it spoilt much says nothing of the step.
    """
    named = FOLDER.fullmatch(folder.name)
    if not named:
        return None
    path = folder / "summary.json"
    try:
        summary, model = read_object(path), read_object(folder / "run.json")["config"]["model"]
        if misfit(summary, SUMMARY) or not is_text(model):
            return None
        if summary["attempts"] < summary["expected"] or summary["error_rate"] > MOST_ERRORS:
            return None
        success, reward = ({
            end: summary[name][end]
            for end in ("mean", "low", "high")
        } for name in ("success", "reward"))
        return Point(int(named["step"]), named["environment"], named["plan"], folder.name, model, success, reward,
                     summary["attempts"], summary["errors"],
                     path.stat().st_mtime)
    except (OSError, ValueError, KeyError, TypeError):  # TypeError: no attempt has a score
        return None


def points(evaluations: Path) -> list[Point]:
    """Return the complete evaluations in a run's folder `eval`, by environment, plan and step."""
    found = [point for folder in sorted(evaluations.glob("*-global_step_*-*")) if (point := read_point(folder))]
    return sorted(found, key=lambda point: (point.environment, point.plan, point.step))


def text(found: Iterable[Point]) -> str:
    """Return curve.json's text."""
    return json.dumps({"schema": SCHEMA, "points": [asdict(point) for point in found]}, indent=1) + "\n"


def score(found: Iterable[Point], step: int, plans: Sequence[tuple[str, str]]) -> Score | None:
    """Return what a step is ranked by: mean success rate over the environments, then mean reward.

    Args:
        found: evaluations, of other steps and plans too.
        plans: (environment, plan) of the evaluations that count.

    Returns:
        None where one of them is missing, or nothing counts: such a step cannot be compared.
    """
    there = {(point.environment, point.plan): point for point in found if point.step == step}
    if not plans or any(plan not in there for plan in plans):
        return None
    counted = [there[plan] for plan in plans]
    return tuple(
        round(sum(figure) / len(counted), 9)
        for figure in ([point.success["mean"] for point in counted], [point.reward["mean"] for point in counted]))
