"""Torch's distributed checkpoints, by its own writers: merged, compared with torch's own loading, or refused by name."""
from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.merger.dcp_samples import SAMPLES, write_dcp
from tests.merger.merging import Sample, cast, differences, flip, merge, untouched, weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    """Checkpoints that torch's writers wrote, by name; not to be changed."""
    return write_dcp(tmp_path_factory.mktemp("dcp"), SAMPLES)


@pytest.fixture
def copied(saved: dict[str, Sample], tmp_path: Path) -> Callable[[str], Sample]:
    """A function that returns a copy of a checkpoint, for the test to change."""
    return lambda name="FSDP2": saved[name].copy(tmp_path)


def expected(sample: Sample, dtype: str) -> dict[str, Any]:
    wanted = {name: cast(tensor, dtype) for name, tensor in sample.tensors().items()}
    if sample.config.get("tie_word_embeddings"):
        wanted.pop("lm_head.weight", None)
    return wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "keep"])
@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "LoRA"])
def test_it_is_merged_bit_for_bit(name: str, dtype: str, saved: dict[str, Sample], tmp_path: Path) -> None:
    sample = saved[name]
    allow = ["--allow", "keys"] if name == "buffers" else []
    run = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--dtype", dtype, "--verify", "--json",
                *allow)
    assert run.record()["verified"]
    assert differences(weights(tmp_path / "out"), expected(sample, dtype)) == []


@pytest.mark.parametrize("name", ["FSDP1", "FSDP1, ShardedTensor", "FSDP2 and TP", "HSDP", "FSDP2, with its optimizer"])
def test_it_is_what_torch_itself_loads(name: str, saved: dict[str, Sample], tmp_path: Path) -> None:
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    dcp_to_torch_save(saved[name].actor, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    whole = whole.get("app", whole).get("model", whole)
    merge("--local-dir", saved[name].actor, "--save-dir", tmp_path / "out", "--dtype", "keep", "--json").record()
    assert differences(weights(tmp_path / "out"), whole) == []


def test_lora_is_fused_from_it(saved: dict[str, Sample], tmp_path: Path) -> None:
    record = merge("--local-dir", saved["LoRA"].actor, "--save-dir", tmp_path / "out", "--lora", "fuse", "--verify",
                   "--json")
    assert record.record()["fused"]


def test_inspect_and_verify_know_it(copied: Callable[[str], Sample]) -> None:
    sample = copied("FSDP2, with its optimizer")
    facts = json.loads(merge("--local-dir", sample.actor, "--inspect", "--json").out)
    assert facts["form"] == "torch DCP" and facts["problems"] == [] and facts["resume"]["possible"]
    assert list(facts["resume"]["parts"]) == ["app.model", "app.optim"]
    assert "torch DCP" in merge("--local-dir", sample.actor, "--inspect").out
    assert merge("--local-dir", sample.actor).code == 0
    assert json.loads(merge("--local-dir", sample.actor, "--verify-only", "--json").out)["verified"]
    with (sample.huggingface / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    assert "differs" in merge("--local-dir", sample.actor, "--verify-only").refusal


# Which part is the model


def test_the_part_that_is_taken_is_told(saved: dict[str, Sample], tmp_path: Path) -> None:
    args = ["--save-dir", tmp_path / "out", "--dry-run", "--json"]
    notes = json.loads(merge("--local-dir", saved["FSDP2, with its optimizer"].actor, *args).out)["notes"]
    assert any(note.startswith("took app.model") and "app.optim" in note for note in notes)
    notes = json.loads(merge("--local-dir", saved["FSDP2, flattened optimizer"].actor, *args).out)["notes"]
    assert any(note.startswith("took the top") and "optimizer" in note and "train_state" in note for note in notes)
    assert not any(
        note.startswith("took") for note in json.loads(merge("--local-dir", saved["FSDP2"].actor, *args).out)["notes"])


def rewritten(sample: Sample, change: Callable[[Any], object]) -> None:
    """Change a checkpoint's `.metadata`, with torch's own classes."""
    path = sample.actor / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def two_models(metadata: Any) -> None:
    for index, (name, path) in enumerate(list(metadata.planner_data.items())):
        if path[0] == "model":
            metadata.planner_data[name] = (("left", "right")[index % 2], path[-1])


def test_of_several_models_none_is_taken_unasked(copied: Callable[[str], Sample], tmp_path: Path) -> None:
    sample = copied("FSDP2, threads")
    rewritten(sample, two_models)
    args = ["--local-dir", sample.actor, "--save-dir", tmp_path / "out"]
    refusal = merge(*args).refusal
    assert "left, right" in refusal and "--model-key" in refusal
    assert "lacks" in merge(*args, "--model-key", "left").refusal  # half of a model
    assert "left" in merge(*args, "--model-key", "middle").refusal


def test_an_optimizer_alone_is_no_model(copied: Callable[[str], Sample], tmp_path: Path) -> None:
    sample = copied("FSDP2, threads")
    rewritten(sample, lambda metadata: metadata.planner_data.update({
        name: ("optim", *path[1:]) for name, path in metadata.planner_data.items()}))  # yapf: disable
    assert "holds no model, but optim" in merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal


def test_model_key_is_for_these_checkpoints(samples: dict[str, Sample], tmp_path: Path) -> None:
    args = ["--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "out"]
    assert "--model-key is for" in merge(*args, "--model-key", "model").refusal


# What is not right is refused, and nothing is written


def no_place(metadata: Any) -> None:
    metadata.storage_data.pop(next(iter(metadata.storage_data)))


def change_info(**fields: Any) -> Callable[[Any], None]:

    def change(metadata: Any) -> None:
        for name, value in fields.items():
            setattr(next(iter(metadata.storage_data.values())), name, value)

    return change


def shrink(metadata: Any) -> None:
    import torch
    entry = metadata.state_dict_metadata["model.embed_tokens.weight"]
    entry.size = torch.Size([entry.size[0] + 1, entry.size[1]])


def other_type(metadata: Any) -> None:
    import torch
    metadata.state_dict_metadata["model.norm.weight"].properties.dtype = torch.float16


def overlap(metadata: Any) -> None:
    first, second = list(metadata.storage_data.values())[:2]
    second.offset, second.length = first.offset, first.length


def runs_code(metadata: Any) -> None:
    metadata.planner_data = Runs()


class Runs:

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/the-pickle-ran", )


FAULTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "a chunk without a place": (no_place, "names no place for"),
    "a path out": (change_info(relative_path="../__0_0.distcp"), "no name in its folder"),
    "an absolute path": (change_info(relative_path="/etc/passwd"), "no name in its folder"),
    "a hidden way out": (change_info(relative_path=".."), "no name in its folder"),
    "no such file": (change_info(relative_path="__9_0.distcp"), "missing: __9_0.distcp"),
    "an offset below 0": (change_info(offset=-1), "for a place in a file"),
    "an offset that is true": (change_info(offset=True), "for a place in a file"),
    "beyond the end": (change_info(length=10**9), "truncated"),
    "another tensor's place": (overlap, "__0_0.distcp"),
    "packed": (change_info(transform_descriptors=["stream.zstd"]), "packed"),
    "a larger tensor": (shrink, "cannot be put together"),
    "another type": (other_type, "should be float16"),
    "code": (runs_code, "it may run code"),
    "no tensors": (lambda metadata: metadata.state_dict_metadata.clear(), "holds no model"),
    "text for tensors": (lambda metadata: setattr(metadata, "state_dict_metadata", "x"), "names no tensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_that_is_not_right_is_refused(fault: str, copied: Callable[[str], Sample], tmp_path: Path) -> None:
    sample = copied("FSDP2")
    change, text = FAULTS[fault]
    rewritten(sample, change)
    with untouched(tmp_path):
        assert text in merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal
    assert not Path("/tmp/the-pickle-ran").exists()


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize(("spoiled", "text"), [(delete, "missing: __2_0.distcp"), (truncate, "truncated"),
                                               (lambda path: path.write_bytes(b""), "truncated")],
                         ids=["deleted", "truncated", "empty"])
def test_files_that_are_not_right_are_refused(spoiled: Callable[[Path], None], text: str,
                                              copied: Callable[[str], Sample], tmp_path: Path) -> None:
    sample = copied("FSDP2")
    spoiled(sample.actor / "__2_0.distcp")
    with untouched(tmp_path):
        assert text in merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal


def test_a_save_that_did_not_finish_is_called_that(copied: Callable[[str], Sample], tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    for step in (9, 10):
        shutil.copytree(copied("FSDP2").actor, steps / f"global_step_{step}/actor")
        shutil.rmtree(tmp_path / "actor")
    (steps / "global_step_10/actor/.metadata").unlink()
    assert "did not finish" in merge("--local-dir", steps / "global_step_10/actor", "--save-dir",
                                     tmp_path / "out").refusal
    refusal = merge("--local-dir", steps, "--save-dir", tmp_path / "out").refusal
    assert "no .metadata" in refusal and "global_step_9/actor is whole" in refusal
    record = merge("--local-dir", steps / "global_step_9", "--save-dir", tmp_path / "out", "--json").record()
    assert record["tensors"]


def test_flipped_bits_are_seen_by_verify(copied: Callable[[str], Sample], tmp_path: Path) -> None:
    sample = copied("FSDP2")
    metadata = pickle.loads((sample.actor / ".metadata").read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "model.embed_tokens.weight")
    flip(sample.actor / info.relative_path, info.offset + info.length // 2, 64)
    refusal = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--verify").refusal
    assert "model.embed_tokens.weight" in refusal and "CRC32" in refusal


def test_files_in_two_folders_are_one_checkpoint(copied: Callable[[str], Sample], tmp_path: Path) -> None:
    sample = copied("FSDP2")
    (tmp_path / "node1").mkdir()
    for rank in (2, 3):
        (sample.actor / f"__{rank}_0.distcp").rename(tmp_path / f"node1/__{rank}_0.distcp")
    assert "missing: __2_0.distcp" in merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal
    merge("--local-dir", sample.actor, "--local-dir", tmp_path / "node1", "--save-dir", tmp_path / "out", "--dtype",
          "keep", "--json").record()
    assert differences(weights(tmp_path / "out"), sample.tensors()) == []


# Sharded safetensors


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_rank_s_file_that_is_gone_is_missed(rank: int, copied: Callable[[str], Sample], tmp_path: Path) -> None:
    """torch's own `consolidate_safetensors_files` fills the hole with zeros, or forgets the end."""
    sample = copied("sharded safetensors")
    (path, ) = sample.actor.glob(f"shard-0000{rank}-*")
    path.unlink()
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal
    assert "cannot be put together" in refusal or "is of shape" in refusal or "rows, but" in refusal
    if rank == 2:
        assert "none begins with shard-00002" in refusal


def test_whole_shapes_are_known_by_a_config_alone(copied: Callable[[str], Sample], tmp_path: Path) -> None:
    sample = copied("sharded safetensors")
    (path, ) = sample.actor.glob("shard-00004-*")
    path.unlink()
    sample.configure(architectures=["NobodyKnows"], model_type="nobody_knows")
    args = ["--local-dir", sample.actor, "--save-dir", tmp_path / "out"]
    assert "does not say how large" in merge(*args).refusal
    assert merge(*args, "--allow", "keys").code == 0


@pytest.mark.parametrize("change", [
    lambda data: data[:-8], lambda data: data.replace(b"saved_offsets", b"saved_offzets"),
    lambda data: data[:8] + b"[" + data[9:], lambda data: b"\xff" * 8 + data[8:]
],
                         ids=["truncated", "no places", "no object", "a huge header"])
def test_a_header_that_is_not_right_is_refused(change: Callable[[bytes], bytes], copied: Callable[[str], Sample],
                                               tmp_path: Path) -> None:
    sample = copied("sharded safetensors")
    path = next(sample.actor.glob("shard-00002-*"))
    path.write_bytes(change(path.read_bytes()))
    assert path.name in merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal
