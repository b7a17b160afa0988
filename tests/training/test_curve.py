"""The curve: which evaluations count, and what a step is ranked by."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from training import curve

FIGURE = {"mean": 0.5, "low": 0.3, "high": 0.7, "method": "x"}


def evaluation(folder: Path,
               environment: str,
               step: int,
               success: float = 0.5,
               reward: float = 0.5,
               plan: str = "aaaaaa",
               **changed: object) -> Path:
    place = folder / curve.folder_name(environment, step, plan)
    place.mkdir(parents=True)
    summary = {"attempts": 4, "expected": 4, "errors": 0, "error_rate": 0.0, "success": {**FIGURE, "mean": success},
               "reward": {**FIGURE, "mean": reward}, **changed}  # yapf: disable
    (place / "summary.json").write_text(json.dumps(summary))
    (place / "run.json").write_text(json.dumps({"config": {"model": f"m-{step}"}}))
    return place


def test_points_are_read_in_the_order_of_the_steps(tmp_path):
    for step in (10, 2):
        evaluation(tmp_path, "textcraft", step)
    evaluation(tmp_path, "my-env", 4)
    (tmp_path / "notes-global_step_4").mkdir()
    found = curve.points(tmp_path)
    assert [(point.environment, point.step, point.model) for point in found] == [("my-env", 4, "m-4"),
                                                                                 ("textcraft", 2, "m-2"),
                                                                                 ("textcraft", 10, "m-10")]
    told = json.loads(curve.text(found))["points"][1]
    assert told["success"] == {
        "mean": 0.5,
        "low": 0.3,
        "high": 0.7
    } and told["folder"] == "textcraft-global_step_2-aaaaaa"


@pytest.mark.parametrize("changed", [
    {
        "attempts": 3
    },
    {
        "error_rate": 0.25,
        "errors": 1
    },
    {
        "success": None
    },
    {
        "reward": "x"
    },
])
def test_what_is_not_complete_is_no_point(changed, tmp_path):
    place = evaluation(tmp_path, "textcraft", 2)
    assert curve.read_point(place)
    summary = json.loads((place / "summary.json").read_text())
    (place / "summary.json").write_text(json.dumps({**summary, **changed}))
    assert curve.read_point(place) is None


@pytest.mark.parametrize("name, text", [("summary.json", "{"), ("run.json", "{}"), ("summary.json", "[]")])
def test_a_damaged_file_is_no_point(name, text, tmp_path):
    place = evaluation(tmp_path, "textcraft", 2)
    (place / name).write_text(text)
    assert curve.read_point(place) is None


def test_a_step_is_ranked_by_success_then_reward_over_all_environments(tmp_path):
    evaluation(tmp_path, "a", 2, success=0.4, reward=0.1)
    evaluation(tmp_path, "b", 2, success=0.8, reward=0.3)
    evaluation(tmp_path, "a", 4, success=1.0)
    evaluation(tmp_path, "b", 4, plan="bbbbbb", success=1.0)  # of other items
    points = curve.points(tmp_path)
    plans = [("a", "aaaaaa"), ("b", "aaaaaa")]
    assert curve.score(points, 2, plans) == (0.6, 0.2)
    assert curve.score(points, 4, plans) is None and curve.score(points, 6, plans) is None
    assert curve.score(points, 2, []) is None
