"""Which checkpoints are whole."""
from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.training.runs import archive, checkpoint, set_time
from training.checkpoints import archive_fault, newest_whole, numbers, read, steps, tracked


def cut(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * keep)])


def test_a_whole_checkpoint(tmp_path):
    folder = checkpoint(tmp_path, 10)
    step = read(tmp_path, 10)
    assert step.whole and step.model_whole and step.faults == () and step.world_size == 2 and step.has_optimizer
    assert step.bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_numbers_are_sorted_as_numbers_and_other_names_are_none(tmp_path):
    for step in (100, 9, 25):
        checkpoint(tmp_path, step)
    for name in ("global_step_x", "global_step_007", ".global_step_3", "global_step_4.tmp", "global_step_-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "global_step_5").write_text("a file")
    assert numbers(tmp_path) == [9, 25, 100] == [step.number for step in steps(tmp_path)]
    assert numbers(tmp_path / "absent") == []


@pytest.mark.parametrize("name, fault, mergeable", [
    ("actor/model_world_size_2_rank_1.pt", "the model file of rank 1 is missing", False),
    ("actor/optim_world_size_2_rank_0.pt", "the optim file of rank 0 is missing", True),
    ("actor/extra_state_world_size_2_rank_1.pt", "the extra_state file of rank 1 is missing", True),
    ("actor/huggingface/config.json", "config.json is missing", False),
    ("data.pt", "data.pt is missing", True),
    ("critic/optim_world_size_2_rank_1.pt", "critic: the optim file of rank 1 is missing", True),
])
def test_a_file_that_is_missing(tmp_path, name, fault, mergeable):
    (checkpoint(tmp_path, 4, critic=True) / name).unlink()
    step = read(tmp_path, 4)
    assert not step.whole and fault in step.faults[0] and len(step.faults) == 1
    assert step.model_whole == mergeable


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name, mergeable", [
    ("actor/model_world_size_2_rank_0.pt", False),
    ("actor/optim_world_size_2_rank_1.pt", True),
    ("data.pt", True),
])
def test_a_file_that_is_cut_off(tmp_path, name, mergeable, keep):
    cut(checkpoint(tmp_path, 4) / name, keep)
    step = read(tmp_path, 4)
    assert not step.whole and name in step.faults[0] and step.model_whole == mergeable


def test_a_file_with_a_hole_at_its_end_is_no_archive(tmp_path):
    archive(tmp_path / "x.pt")
    size = (tmp_path / "x.pt").stat().st_size
    with open(tmp_path / "x.pt", "r+b") as file:
        file.truncate(size - 60)
        file.truncate(size)
    assert archive_fault(tmp_path / "x.pt")


def test_every_moment_of_a_save_is_half_until_its_end(tmp_path):
    whole = checkpoint(tmp_path / "whole", 8)
    files = [path for path in whole.rglob("*.pt") if path.parent.name == "actor"]
    files += [whole / "actor" / "huggingface" / "config.json", whole / "data.pt"]
    run = tmp_path / "run"
    (run / "global_step_8").mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text("6")
    for count, file in enumerate(files):
        assert not read(run, 8).whole, file
        assert not read(run, 8).model_whole, file
        target = run / "global_step_8" / file.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        cut(target)
        assert not read(run, 8).whole, file
        shutil.copyfile(file, target)
        assert read(run, 8).whole == (count == len(files) - 1)


def test_a_save_over_an_older_one_is_half_until_data_pt_is_new(tmp_path):
    folder = checkpoint(tmp_path, 8)
    now = time.time()
    for path in folder.rglob("*"):
        set_time(path, now - 3600)
    assert read(tmp_path, 8).whole
    archive(folder / "actor" / "model_world_size_2_rank_0.pt")
    step = read(tmp_path, 8)
    assert not step.whole and not step.model_whole and "newer than data.pt" in step.faults[0]
    assert f"touch {folder / 'data.pt'}" in step.faults[0]
    archive(folder / "data.pt")
    assert read(tmp_path, 8).whole


def test_a_save_whose_data_pt_is_cut_off_did_not_end(tmp_path):
    cut(checkpoint(tmp_path, 8, track=False) / "data.pt")
    assert not read(tmp_path, 8).model_whole


def test_two_world_sizes_are_told(tmp_path):
    checkpoint(tmp_path, 8, world=4)
    checkpoint(tmp_path / "other", 8, world=2)
    for path in (tmp_path / "other" / "global_step_8" / "actor").glob("*.pt"):
        shutil.copy(path, tmp_path / "global_step_8" / "actor")
    step = read(tmp_path, 8)
    assert not step.whole and not step.model_whole and "2 and 4 ranks" in step.faults[0]


def test_a_name_that_promises_a_billion_ranks_costs_nothing(tmp_path):
    folder = checkpoint(tmp_path, 8)
    archive(folder / "actor" / "model_world_size_1000000000_rank_0.pt")
    archive(folder / "actor" / "model_world_size_2_rank_7.pt")
    assert "999999999 of 1000000000 ranks" in " ".join(read(tmp_path, 8).faults)


def test_without_the_optimizer_a_model_is_left(tmp_path):
    folder = checkpoint(tmp_path, 8)
    for path in folder.glob("actor/optim*"):
        path.unlink()
    step = read(tmp_path, 8)
    assert not step.whole and step.model_whole and not step.has_optimizer


def test_the_newest_whole_is_before_halves_and_poison(tmp_path):
    for number in (2, 4, 6, 8):
        checkpoint(tmp_path, number)
    cut(tmp_path / "global_step_8" / "actor" / "optim_world_size_2_rank_0.pt")
    assert newest_whole(tmp_path).number == 6
    assert newest_whole(tmp_path, poisoned=[5]).number == 4
    assert newest_whole(tmp_path, poisoned=[4, 9]).number == 2
    assert newest_whole(tmp_path, poisoned=[1]) is None
    assert newest_whole(tmp_path / "absent") is None


@pytest.mark.parametrize("text, number", [("8", 8), ("8\n", 8), ("8.0", None), ("", None), ("-1", None),
                                          ("9" * 40, None)])
def test_the_tracker_is_a_bare_number(tmp_path, text, number):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert tracked(tmp_path) == number
    assert tracked(tmp_path / "absent") is None
