"""Deleting: out of sight in one step, finished later, and nothing that must not go."""
from __future__ import annotations

import shutil

import pytest

from training import checkpoints, pruning


@pytest.fixture
def step(tmp_path):
    actor = tmp_path / "global_step_4" / "actor"
    critic = tmp_path / "global_step_4" / "critic"
    for folder in (actor, critic):
        folder.mkdir(parents=True)
        for kind in ("model", "optim", "extra_state"):
            for rank in range(2):
                (folder / f"{kind}_world_size_2_rank_{rank}.pt").write_bytes(b"x" * 10)
    return tmp_path / "global_step_4"


def test_what_goes_is_out_of_sight_before_it_is_deleted(step, monkeypatch):
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: seen.append((path, step.exists())))
    assert pruning.remove(step) == 120
    (aside, there), = seen
    assert not there and aside.parent == step.parent and aside.exists()
    assert checkpoints.numbers(step.parent) == []  # nobody takes what is left for a checkpoint
    monkeypatch.undo()
    assert pruning.finish(step.parent) == [] and list(step.parent.iterdir()) == []


def test_nothing_else_is_finished(step):
    (step.parent / ".pruned-notes").mkdir()
    (step.parent / "global_step_6").mkdir()
    pruning.finish(step.parent)
    assert sorted(path.name for path in step.parent.iterdir()) == [".pruned-notes", "global_step_4", "global_step_6"]
    assert pruning.finish(step.parent / "none") == []


def test_a_check_that_says_no_changes_nothing(step):

    def no() -> None:
        raise OSError(0, "was written again", "x")

    for remove in (pruning.remove, pruning.remove_optimizer):
        with pytest.raises(OSError, match="written again"):
            remove(step, no)
    assert len(list(step.rglob("*.pt"))) == 12 and len(list(step.parent.iterdir())) == 1


def test_a_link_is_left_alone(step):
    there = step.rename(step.with_name("elsewhere"))
    step.symlink_to(there)
    for remove in (pruning.remove, pruning.remove_optimizer):
        with pytest.raises(OSError, match="link"):
            remove(step)
    assert len(list(there.rglob("*.pt"))) == 12 and step.is_symlink()


def test_the_optimizers_files_of_actor_and_critic_go(step):
    assert len(pruning.optimizer_files(step)) == 4
    assert pruning.remove_optimizer(step) == 40
    assert pruning.optimizer_files(step) == [] and len(list(step.rglob("*.pt"))) == 8
