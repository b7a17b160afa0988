"""Which files of which folder are merged: steps, roles, ranks in several places, the config's own folder."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from merger.cli import plain_words
from merger.discover import find_checkpoint

from tests.merger.merging import Sample, differences, edit_ranks, merge, weights


@pytest.fixture
def steps(samples: dict[str, Sample], tmp_path: Path) -> Path:
    """A run with steps 9 and 10, each with an actor of four ranks."""
    for step in (9, 10):
        samples["FSDP1, 4 ranks"].copy(tmp_path / f"run/global_step_{step}")
    return tmp_path / "run"


HALVES: dict[str, Callable[[Path], object]] = {
    "a rank is missing": lambda actor: (actor / "model_world_size_4_rank_3.pt").unlink(),
    "a rank is cut short": lambda actor: os.truncate(actor / "model_world_size_4_rank_3.pt", 5000),
    "a rank is empty": lambda actor: (actor / "model_world_size_4_rank_2.pt").write_bytes(b""),
}


def test_the_last_step_is_the_one_of_the_largest_number(steps: Path, tmp_path: Path) -> None:
    found = find_checkpoint([str(steps)])
    assert found.folders == (steps / "global_step_10/actor", )
    (tmp_path / "above").mkdir()
    steps.rename(tmp_path / "above/run")
    assert "did you mean" in (told := merge("--local-dir", tmp_path / "above").refusal) or "no model_world" in told


def test_deep_steps_are_suggested_by_number(steps: Path) -> None:
    for step in (9, 10):
        shutil.move(steps / f"global_step_{step}/actor", steps / f"step{step}")
        (steps / f"global_step_{step}").rmdir()
    assert f"did you mean {steps / 'step10'}?" in merge("--local-dir", steps).refusal


@pytest.mark.parametrize("how", HALVES)
def test_where_the_last_step_is_half_the_whole_one_is_named(how: str, steps: Path, tmp_path: Path) -> None:
    HALVES[how](steps / "global_step_10/actor")
    (steps / "latest_checkpointed_iteration.txt").write_text("9")
    refusal = merge("--local-dir", steps, "--save-dir", tmp_path / "out").refusal
    assert "is not whole" in refusal and "(latest_checkpointed_iteration.txt names 9)" in refusal
    assert f"{steps / 'global_step_9/actor'} is whole" in refusal
    for folder in (steps / "global_step_10", steps / "global_step_10/actor"):
        refusal = merge("--local-dir", folder, "--save-dir", tmp_path / "out").refusal
        assert refusal.endswith(f"the step in {steps / 'global_step_9/actor'} is whole")
    assert merge("--local-dir", steps / "global_step_9/actor", "--save-dir", tmp_path / "out").code == 0


def test_where_no_step_is_whole_the_missing_rank_is_named(steps: Path, tmp_path: Path) -> None:
    for step in (9, 10):
        (steps / f"global_step_{step}/actor/model_world_size_4_rank_3.pt").unlink()
    assert "missing: rank 3" in merge("--local-dir", steps, "--save-dir", tmp_path / "out").refusal


def test_a_later_node_s_ranks_alone_are_told_before_the_config_is_asked_for(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    shutil.rmtree(sample.huggingface)
    for rank in (0, 1):
        sample.rank(rank).unlink()
    assert "missing: rank 0, 1" in merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal


# The config's folder


@pytest.mark.parametrize("way", ["--config-dir", "--hf_model_path", "one more --local-dir", "one more --local-dir, first",
                                 "the save folder"])  # yapf: disable
def test_a_config_elsewhere_is_found(way: str, spoil: Callable[..., Sample], samples: dict[str, Sample], tmp_path: Path) -> None:
    sample, base, out = spoil("FSDP1, 4 ranks"), tmp_path / "base", tmp_path / "out"
    sample.huggingface.rename(out if way == "the save folder" else base)
    folders = {"one more --local-dir": [sample.actor, base], "one more --local-dir, first": [base, sample.actor]}
    words = [word for folder in folders.get(way, [sample.actor]) for word in ("--local-dir", folder)]
    given = [way, base] if way.startswith("--") else []
    run = merge(*words, "--save-dir", out, *given, "--verify", "--json")
    assert run.record()["model_check"].startswith("keys and shapes as")
    assert (out / "tokenizer.json").is_file()
    merge("--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "usual", "--json").record()
    assert differences(weights(out), weights(tmp_path / "usual")) == []


def test_a_config_dir_without_a_config_is_refused(samples: dict[str, Sample], tmp_path: Path) -> None:
    args = ["--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "out", "--config-dir", tmp_path]
    assert f"--config-dir {tmp_path} has no config.json" in merge(*args).refusal


def test_a_config_dir_may_be_a_link_that_the_user_named(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    sample.huggingface.rename(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    args = ["--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--config-dir", tmp_path / "link"]
    assert merge(*args).code == 0


# verl's own command line


def test_verl_s_command_line_is_understood(samples: dict[str, Sample], tmp_path: Path) -> None:
    run = merge("merge", "--backend", "fsdp", "--local_dir", samples["FSDP2, 4 ranks"].actor, "--target_dir", tmp_path / "out_x",
                "--trust_remote_code", "--max_shard_size=1GB")  # yapf: disable
    assert run.code == 0, run.err
    assert json.loads((tmp_path / "out_x/merge.json").read_text())["tensors"] == len(weights(tmp_path / "out_x"))


def test_what_verl_merges_and_we_do_not_is_refused(samples: dict[str, Sample]) -> None:
    refusal = merge("merge", "--backend", "megatron", "--local_dir", samples["FSDP2, 4 ranks"].actor).refusal
    assert "--backend" in refusal and "`python -m verl.model_merger merge --backend megatron" in refusal


def test_verl_s_test_compares_a_merged_folder(samples: dict[str, Sample], tmp_path: Path) -> None:
    actor = samples["FSDP2, 4 ranks"].actor
    flags = ["--use_cpu_initialization", "--tie-word-embedding", "--is-value-model"]  # of Megatron's; verl ignores them here
    assert merge("merge", "--backend", "fsdp", "--local_dir", actor, "--target_dir", tmp_path / "out", *flags).code == 0
    run = merge("test", "--backend", "fsdp", "--local_dir", actor, "--test_hf_dir", tmp_path / "out")
    assert run.code == 0 and "equal to the shards" in run.out, run.err


@pytest.mark.parametrize(("words", "plain"), [
    (["merge", "--local_dir", "merge"], ["--local-dir", "merge"]),
    (["test", "--test_hf_dir", "test"], ["--verify-only", "--test-hf-dir", "test"]),
    (["--local_dir=a_b=c_d", "x_y"], ["--local-dir=a_b=c_d", "x_y"]),
    ([], []),
])
def test_words_become_ours(words: list[str], plain: list[str]) -> None:
    assert plain_words(words) == plain


def test_a_size_without_a_unit_asks_whether_gigabytes_are_meant(samples: dict[str, Sample]) -> None:
    assert "is 5GB meant?" in merge("--local-dir", samples["FSDP2, 4 ranks"].actor, "--max-shard-size", "5").refusal


# What is told apart


@pytest.mark.parametrize("where", ["the step", "the actor", "huggingface"])
def test_a_whole_model_needs_no_merging(where: str, samples: dict[str, Sample], tmp_path: Path) -> None:
    actor = tmp_path / "global_step_5/actor"
    merge("--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", actor / "huggingface", "--json").record()
    folder = {"the step": actor.parent, "the actor": actor, "huggingface": actor / "huggingface"}[where]
    refusal = merge("--local-dir", folder, "--save-dir", tmp_path / "out").refusal
    assert f"{actor / 'huggingface'} holds a whole model" in refusal and f"--checkpoint {actor / 'huggingface'}" in refusal


@pytest.mark.parametrize("where", ["the step", "the actor", "model"])
@pytest.mark.parametrize("holds", ["weights", "Megatron's shards", "nothing"])
def test_verl_s_megatron_layout_is_followed(holds: str, where: str, tmp_path: Path) -> None:
    """Its manifest says where the weights are."""
    actor = tmp_path / "global_step_1/actor"
    (actor / "model/huggingface").mkdir(parents=True)  # there in either case
    (actor / "model/dist_ckpt").mkdir()
    path = "model/huggingface" if holds == "weights" else "model/dist_ckpt"
    (actor / "ckpt_contents.json").write_text(json.dumps({"contents": {"model": {"path": path}}}))
    if holds == "weights":
        for name in ("config.json", "model-00001-of-00001.safetensors"):
            (actor / path / name).write_text("{}")
    elif holds == "Megatron's shards":
        for name in (".metadata", "common.pt", "__0_0.distcp"):
            (actor / path / name).write_text("x")
    folder = {"the step": actor.parent, "the actor": actor, "model": actor / "model"}[where]
    refusal = merge("--local-dir", folder, "--save-dir", tmp_path / "out").refusal
    wanted = {"weights": f"{actor / path} holds a whole model", "Megatron's shards": "--backend megatron",
              "nothing": "--backend megatron"}[holds]
    assert wanted in refusal


@pytest.mark.parametrize(("name", "culprit"), [
    ("dist_ckpt/common.pt", "--backend megatron"),
    ("zero_to_fp32.py", "zero_to_fp32.py"),
    ("__0_0.distcp", "did not finish"),
    ("model_world_size_4_rank_0.pt.gz", "unpack or rename"),
], ids=["Megatron", "DeepSpeed", "DCP", "packed"])
def test_another_kind_of_checkpoint_is_called_one(name: str, culprit: str, tmp_path: Path) -> None:
    path = tmp_path / "actor" / name
    path.parent.mkdir(parents=True)
    path.write_text("x")
    for folder in (tmp_path, tmp_path / "actor"):
        assert culprit in merge("--local-dir", folder, "--save-dir", tmp_path / "out").refusal


@pytest.mark.parametrize(("head", "culprit"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git lfs pull"),
    (b"\x1f\x8b\x08" + b"x" * 100, "gzip"),
    (b"\x28\xb5\x2f\xfd" + b"x" * 100, "zstd"),
], ids=["Git LFS", "gzip", "zstd"])
def test_a_rank_s_file_that_is_something_else_is_called_that(head: bytes, culprit: str, spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    sample.rank(2).write_bytes(head)
    refusal = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal
    assert culprit in refusal and "rank_2.pt" in refusal


@pytest.mark.parametrize("address", ["s3://bucket/global_step_5/actor", "oss://b/x", "hf://u/m", "file:///x", "dbfs:/x"])
@pytest.mark.parametrize("flag", ["--local-dir", "--save-dir", "--config-dir", "--base-model"])
def test_an_address_is_no_folder(flag: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {"--local-dir": "x", "--save-dir": "out", flag: address}
    refusal = merge(*(word for pair in folders.items() for word in pair)).refusal
    assert f"{flag}" in refusal and f"{address} is an address" in refusal and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model", "modeling_x.py"])
def test_a_pointer_of_git_lfs_beside_the_shards_is_called_that(name: str, spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    (sample.huggingface / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    refusal = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal
    assert "git lfs pull" in refusal and name in refusal and not (tmp_path / "out").exists()


def test_a_folder_called_huggingface_may_hold_the_ranks_or_the_steps(samples: dict[str, Sample], tmp_path: Path) -> None:
    samples["FSDP1, 4 ranks"].copy(tmp_path / "huggingface/global_step_3")
    assert merge("--local-dir", tmp_path / "huggingface", "--save-dir", tmp_path / "out").code == 0
    actor = tmp_path / "huggingface/global_step_3/actor"
    actor.rename(tmp_path / "other")
    (tmp_path / "other/huggingface").rename(tmp_path / "config")
    (tmp_path / "other").rename(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "huggingface/global_step_3/huggingface")
    args = ["--local-dir", tmp_path / "huggingface/global_step_3/huggingface", "--save-dir", tmp_path / "out2"]
    assert merge(*args, "--config-dir", tmp_path / "config").code == 0


def test_skyrl_s_policy_is_found(samples: dict[str, Sample], tmp_path: Path) -> None:
    samples["FSDP2, 4 ranks"].copy(tmp_path / "step").actor.rename(tmp_path / "step/policy")
    assert merge("--local-dir", tmp_path / "step", "--save-dir", tmp_path / "out").code == 0


@pytest.mark.parametrize("outer", ["module.", "_forward_module."])
def test_a_wrapper_s_prefix_of_all_names_is_taken_off(outer: str, spoil: Callable[..., Sample], samples: dict[str, Sample],
                                                     tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")

    def wrap(state: dict[str, Any]) -> None:
        for name in list(state):
            state[outer + name] = state.pop(name)

    edit_ranks(sample, wrap)
    record = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--json").record()
    assert record["model_check"].startswith("keys and shapes as")


# What the user is told of it


def test_a_model_without_a_tokenizer_is_noted(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    for path in sample.huggingface.glob("tokenizer*"):
        path.unlink()
    args = ["--local-dir", sample.actor, "--save-dir", tmp_path / "out"]
    assert any("no tokenizer" in note for note in merge(*args, "--json").record()["notes"])
    (sample.huggingface / "tokenizer.model").touch()
    assert not any("no tokenizer" in note for note in merge(*args, "--force", "--json").record()["notes"])


def test_inspect_says_whether_a_training_can_go_on(samples: dict[str, Sample], tmp_path: Path) -> None:
    actor = tmp_path / "global_step_3/actor"
    shutil.copytree(samples["FSDP1, 4 ranks"].actor, actor)
    facts = json.loads(merge("--local-dir", actor, "--inspect", "--json").out)["resume"]
    assert facts == {"possible": True, "model": 4, "optim": 4, "extra_state": 4, "data": False, "tracker": False}
    (actor.parent / "data.pt").touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    (actor / "optim_world_size_4_rank_2.pt").unlink()
    facts = json.loads(merge("--local-dir", actor, "--inspect", "--json").out)["resume"]
    assert facts == {"possible": False, "model": 4, "optim": 3, "extra_state": 4, "data": True, "tracker": True}
    assert "optim of 1 ranks" in merge("--local-dir", actor, "--inspect").out
