"""Where a run goes on, and that it plays the rounds of an unbroken run."""
from __future__ import annotations

import pytest

from tests.training.runs import checkpoint, record, write_run
from training.checkpoints import read
from training.folder import RunFolder
from training.resume import (
    is_finished,
    limit,
    plan,
    quoted,
    resume_overrides,
    rounds_by_step,
    rounds_settings,
    scaling_stages,
    steps_to_train,
)


def unbroken(rounds: list[int], every: int, step: int) -> int:
    """Return the rounds that a run without an interruption plays in a step."""
    return rounds[min((step - 1) // every, len(rounds) - 1)]


def resumed(rounds: list[int], every: int, after: int, last: int) -> list[int]:
    """Return the rounds that the trainer plays in the steps after the checkpoint `after`, with those settings.

    It sets its count to the checkpoint's number, and so counts one less than the step it plays.
    """
    stage, found = min(after // every, len(rounds) - 1), []
    for count in range(after, last):
        found.append(rounds[stage])
        if count % every == 0 and stage + 1 < len(rounds):
            stage += 1
    return found


def test_the_trainer_alone_is_a_stage_too_far_after_a_resume_at_an_edge():
    assert resumed([10, 20, 30], 100, after=100, last=103) == [20, 30, 30]  # as seen on the real one
    assert [unbroken([10, 20, 30], 100, step) for step in (101, 102, 103)] == [20, 20, 20]


@pytest.mark.parametrize("rounds", [[10, 20, 30], [6, 13, 20], [5], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_every_resume_plays_the_rounds_of_an_unbroken_run(rounds, every):
    last = len(rounds) * every + 5
    listed = rounds_by_step(rounds, every)
    for after in range(last):
        expected = [unbroken(rounds, every, step) for step in range(after + 1, last + 1)]
        assert resumed(listed, 1, after, last) == expected, after


def scaling(tmp_path, **changes):
    return record(tmp_path / "run",
                  overrides=[
                      "algorithm.rounds_ctrl.type=scaling_inter_stepwise", "algorithm.rounds_ctrl.rounds=[10,20,30]",
                      "algorithm.rounds_ctrl.steps_scaling_inter=2"
                  ],
                  **changes)


def test_the_overrides_of_a_resume(tmp_path):
    checkpoint(tmp_path / "run", 2)
    step = read(tmp_path / "run", 2)
    assert resume_overrides(scaling(tmp_path, folder="/workspace/saves/run"), step) == [
        "trainer.resume_mode=/workspace/saves/run/global_step_2", "trainer.resume_from_path=False",
        "algorithm.rounds_ctrl.steps_scaling_inter=1", "algorithm.rounds_ctrl.rounds=[10,10,20,20,30]"
    ]
    assert resume_overrides(record(tmp_path / "run"), step)[1:] == ["trainer.resume_from_path=False"]
    assert resume_overrides(record(tmp_path / "run"), None) == ["trainer.resume_mode=disable"]


def test_the_list_of_a_long_run_fits_an_argument():
    assert len(",".join(map(str, rounds_by_step([10, 20, 30], 10_000)))) < 128 << 10


@pytest.mark.parametrize("resolved", [
    None, {
        "algorithm": {
            "rounds_ctrl": {
                "type": "scaling_inter_stepwise",
                "rounds": [1, 2],
                "steps_scaling_inter": 5
            }
        }
    }
])
def test_hydras_own_values_come_first(tmp_path, resolved):
    run = scaling(tmp_path, resolved=resolved)
    assert scaling_stages(run) == (([1, 2], 5) if resolved else ([10, 20, 30], 2))


def test_of_overrides_the_last_counts_and_fixed_rounds_have_no_stages(tmp_path):
    run = scaling(tmp_path)
    run["overrides"].append("algorithm.rounds_ctrl.rounds='[1, 2]'")
    assert scaling_stages(run) == ([1, 2], 2)
    run["overrides"].append("++algorithm.rounds_ctrl.type=fixed")
    assert rounds_settings(run)["type"] == "fixed" and scaling_stages(run) is None
    assert scaling_stages(record(tmp_path)) is None


@pytest.mark.parametrize("text, expected", [
    ("/saves/x/global_step_2", "/saves/x/global_step_2"),
    ("/my runs/x", "'/my runs/x'"),
    ("/a=b", "'/a=b'"),
    ("/it's", "'/it\\'s'"),
    ("/läufe", "'/läufe'"),
])
def test_paths_are_quoted_for_hydra(text, expected):
    assert quoted(text) == expected


def test_halves_are_named_and_passed_over(tmp_path):
    write_run(tmp_path, poisoned=[7])
    for number in (2, 4, 6, 8):
        checkpoint(tmp_path, number)
    (tmp_path / "global_step_6" / "data.pt").unlink()
    run = RunFolder(tmp_path).read()
    found = plan(RunFolder(tmp_path), run)
    assert found.step is not None and found.step.number == 4
    assert found.passed_over == ("global_step_8: step 7 was poisoned", "global_step_6: data.pt is missing")
    assert steps_to_train(run, found.step) == 5 and steps_to_train(run, None) == 9


def test_what_counts_as_poison(tmp_path):
    assert limit(record(tmp_path, poisoned=[5, 3])) == 3
    assert limit(record(tmp_path, poisoned=[3], options={"on_env_loss": "continue"})) is None
    assert limit(record(tmp_path, poisoned=[3], nan_steps=[8], options={"on_env_loss": "continue"})) == 8
    assert limit(record(tmp_path)) is None


def test_another_world_size_is_refused_with_the_remedy(tmp_path):
    write_run(tmp_path, world_size=4)
    checkpoint(tmp_path, 2, world=2)
    with pytest.raises(ValueError, match=r"written by 2 GPUs, and the run has 4.*resume with 2"):
        plan(RunFolder(tmp_path), RunFolder(tmp_path).read())


@pytest.mark.parametrize("attempts, label, finished", [
    ([], None, False),
    ([], 10, False),
    ([{
        "state": "died"
    }], 8, False),
    ([{
        "state": "died"
    }], 9, True),
    ([{
        "state": "stopped"
    }], 10, True),
    ([{
        "state": "finished",
        "last_step": 9
    }], None, True),
    ([{
        "state": "finished",
        "last_step": 4
    }], 5, False),
])
def test_when_a_run_is_finished(tmp_path, attempts, label, finished):
    write_run(tmp_path, attempts=attempts)
    if label:
        checkpoint(tmp_path, label)
    assert is_finished(RunFolder(tmp_path), RunFolder(tmp_path).read()) is finished
