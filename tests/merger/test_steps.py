"""Whether ranks' files are of one training step, as far as what lies beside them tells."""
from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from merger import MergeError
from merger.checkpoint import read_checkpoint
from merger.discover import find_checkpoint

from tests.merger.test_changes import RANKS, write_step


def write_extra(folder: Path, rank: int, step: int) -> Path:
    """Write what verl does: the scheduler's state, and the random generators'."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    scheduler.last_epoch = step
    rng = {"cpu": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}
    path = folder / f"extra_state_world_size_{RANKS}_rank_{rank}.pt"
    torch.save({"lr_scheduler": scheduler.state_dict(), "rng": rng}, path)
    return path


def notes(folder: Path) -> list[str]:
    return read_checkpoint(find_checkpoint([str(folder)])).notes


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return write_step(tmp_path / "global_step_20/actor", 20)


@pytest.mark.parametrize("seed", range(6))
def test_ranks_whose_extra_states_are_of_different_steps_are_refused(seed: int, step: Path) -> None:
    chance = random.Random(seed)
    one, two = chance.sample([0, 1, 19, 20, 40, 10**9], 2)
    for rank, number in enumerate((one, two)):
        write_extra(step, rank, number)
    with pytest.raises(MergeError, match=f"of rank 0 is of step {one}, that of rank 1 of step {two}: .* one step whole"):
        notes(step)
    write_extra(step, 0, two)
    assert notes(step) == []


@pytest.mark.parametrize("what", ["absent", "damaged", "no scheduler", "code", "text", "pipe", "torn"])
def test_an_extra_state_that_says_nothing_is_no_fault_of_the_model(what: str, step: Path) -> None:
    write_extra(step, 0, 20)
    other = write_extra(step, 1, 40)
    whole = other.read_bytes()
    other.unlink()
    match what:
        case "damaged":
            other.write_bytes(b"x" * 100)
        case "no scheduler":
            torch.save({"rng": 1}, other)
        case "code":
            torch.save({"lr_scheduler": {"last_epoch": os.getcwd}}, other)
        case "text":
            torch.save({"lr_scheduler": {"last_epoch": "40"}}, other)
        case "pipe":
            os.mkfifo(other)
        case "torn":
            other.write_bytes(whole[:len(whole) // 2])
    assert notes(step) == []


def test_a_step_that_the_tracker_does_not_name_yet_is_told(step: Path) -> None:
    tracker = step.parents[1] / "latest_checkpointed_iteration.txt"
    for text, told in (("10", True), ("20", False), ("30", False), ("x\x1b[2J", False), ("9" * 60, False)):
        tracker.write_text(text)
        assert [f"names step {text}: global_step_20 is being written" in note for note in notes(step)] == [True] * told


def test_a_rank_that_was_written_long_after_the_others_is_told_while_it_is_new(step: Path) -> None:
    old, new = (step / f"model_world_size_{RANKS}_rank_{rank}.pt" for rank in range(RANKS))
    os.utime(old, (time.time() - 7200, ) * 2)
    found, = notes(step)
    assert "rank 1 was written just now, rank 0 2.0 h before it" in found
    os.utime(new, (time.time() - 3600, ) * 2)  # as of a copy, or of a slow disk
    assert notes(step) == []
