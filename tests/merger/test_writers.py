"""Checkpoints by the programs that write them in the field: accelerate's and PEFT's own functions, over real FSDP.

On the CPU accelerate's `prepare` wraps a model in DDP, whatever its FSDP plugin says (it knows FSDP on accelerators alone). So the model is
wrapped by torch, as accelerate would, and its own `save_fsdp_model` writes it.
"""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.merger.dcp_samples import SAMPLES as DCP_SAMPLES
from tests.merger.dcp_samples import write_dcp
from tests.merger.fsdp_samples import SAMPLES as RANK_SAMPLES
from tests.merger.fsdp_samples import write_samples
from tests.merger.merging import SAMPLE_PROGRAMS, Sample, differences, edit_ranks, merge, untouched, weights

WRITTEN = "pytorch_model_fsdp_0"
# The sample's flags, and what else `save_fsdp_model` is asked for.
BY_ACCELERATE: dict[str, tuple[str, dict[str, bool]]] = {
    "FSDP1": ("--strategy fsdp1 --world-size 2", {}),
    "FSDP1 without a mesh": ("--strategy sharded-tensor --world-size 2", {}),
    "FSDP2": ("--strategy fsdp2 --world-size 2", {}),
    "FSDP2, tied": ("--strategy fsdp2 --world-size 2 --model qwen2-tied", {}),
    "FSDP2, bfloat16": ("--strategy fsdp2 --world-size 3 --dtype bfloat16", {}),
    "FSDP2, LoRA": ("--strategy fsdp2 --world-size 2 --model lora", {}),
    "FSDP2, a file a rank": ("--strategy fsdp2 --world-size 2", {"use_dcp": False}),
}  # yapf: disable
WHOLE = [name for name in BY_ACCELERATE if name not in ("FSDP2, LoRA", "FSDP2, a file a rank")]

ACCELERATE = """
import json, os, sys, warnings
sys.path.insert(0, sys.argv[1])
import sample_checkpoint as samples

def save_rank(rank, sample, store, options):
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(sample.world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    with samples.rank_group(rank, sample, store) as mesh:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.utils.fsdp_utils import save_fsdp_model
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2 if sample.strategy.startswith("fsdp2") else 1,
                                                state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False)
        model = samples.shard(samples.build_model(sample), sample, mesh)
        save_fsdp_model(plugin, Accelerator(cpu=True), model, str(sample.save_dir), **options)

def write(arguments, options):
    sample = samples.parse(arguments)
    def program():
        samples.prepare_ranks()
        import torch.distributed.checkpoint
        model = samples.build_model(sample)
        sample.save_dir.mkdir(parents=True)
        samples.write_reference(model.state_dict(), sample.reference)
        samples.write_huggingface(model, sample)
        samples.run_ranks(save_rank, sample, options)
    return samples.run_offline(program, "accelerate", sample.save_dir)

for request in json.load(sys.stdin):
    if code := write(*request):
        sys.exit(code)
"""


@pytest.fixture(scope="module")
def by_accelerate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    """Folders as `Accelerator.save_state` leaves them, the config in a folder beside."""
    folder = tmp_path_factory.mktemp("accelerate")
    found = {name: Sample(folder / str(i) / "checkpoint-9", folder / str(i) / "reference.safetensors")
             for i, name in enumerate(BY_ACCELERATE)}  # yapf: disable
    requests = [[["--save-dir", str(sample.actor), "--reference", str(sample.reference), *BY_ACCELERATE[name][0].split()],
                 BY_ACCELERATE[name][1]] for name, sample in found.items()]  # yapf: disable
    done = subprocess.run([sys.executable, "-c", ACCELERATE, str(SAMPLE_PROGRAMS)], input=json.dumps(requests), text=True,
                          capture_output=True, timeout=600)  # yapf: disable
    assert done.returncode == 0, done.stderr
    for sample in found.values():
        shutil.move(sample.huggingface, sample.actor.parent / "base")
    return found


@pytest.mark.parametrize("named", ["the folder", "the folder above it"])
@pytest.mark.parametrize("name", WHOLE)
def test_what_accelerate_wrote_is_merged_bit_for_bit(name: str, named: str, by_accelerate: dict[str, Sample],
                                                     tmp_path: Path) -> None:
    sample = by_accelerate[name]
    place = sample.actor / WRITTEN if named == "the folder" else sample.actor
    record = merge("--local-dir", place, "--config-dir", sample.actor.parent / "base", "--save-dir", tmp_path / "out", "--dtype", "keep",
                   "--verify", "--json").record()  # yapf: disable
    wanted = sample.tensors()
    if "tied" in name:
        del wanted["lm_head.weight"]
    assert record["verified"] and differences(weights(tmp_path / "out"), wanted) == []
    assert any(WRITTEN in note for note in record["notes"]) == (named == "the folder above it")


def test_a_file_a_rank_is_merged_once_the_remedy_was_typed(by_accelerate: dict[str, Sample], tmp_path: Path) -> None:
    sample = by_accelerate["FSDP2, a file a rank"]
    shutil.copytree(sample.actor, folder := tmp_path / "a checkpoint")
    args: list[str | Path] = [
        "--local-dir", folder, "--config-dir", sample.actor.parent / "base", "--save-dir", tmp_path / "out", "--dtype",
        "keep", "--json"
    ]
    refusal = merge(*args).refusal
    assert "as accelerate names them" in refusal
    subprocess.run(["sh", "-c", refusal.split("`")[1]], check=True)
    merge(*args).record()
    assert differences(weights(tmp_path / "out"), sample.tensors()) == []


def test_without_a_config_it_is_asked_for(by_accelerate: dict[str, Sample], tmp_path: Path) -> None:
    with untouched(tmp_path):
        refusal = merge("--local-dir", by_accelerate["FSDP2"].actor, "--save-dir", tmp_path / "out").refusal
    assert "config.json" in refusal and "--config-dir" in refusal


# PEFT's models, as DCP and as a file a rank


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, by_accelerate: dict[str, Sample]) -> dict[str, Sample]:
    """PEFT's model over FSDP2, saved in each form."""
    folder = tmp_path_factory.mktemp("peft")
    return {
        "DCP": write_dcp(folder / "dcp", {"LoRA": DCP_SAMPLES["LoRA"]})["LoRA"],
        "ranks": write_samples(folder / "ranks", {"LoRA": RANK_SAMPLES["LoRA, FSDP2"]})["LoRA"],
        "accelerate": by_accelerate["FSDP2, LoRA"],
    }


def peft_s(sample: Sample) -> Any:
    """Return PEFT's own model of a sample, whole."""
    sys.path.insert(0, str(SAMPLE_PROGRAMS))
    try:
        import sample_checkpoint
    finally:
        sys.path.remove(str(SAMPLE_PROGRAMS))
    model = sample_checkpoint.build_model.__wrapped__(
        sample_checkpoint.parse(["--save-dir", str(sample.reference.parent / "none"), "--reference", str(sample.reference), "--model",
                                 "lora"]))  # yapf: disable
    model.load_state_dict(sample.tensors())
    return model.eval()


def arguments(form: str, sample: Sample, out: Path) -> list[str | Path]:
    beside: list[str | Path] = ["--config-dir", sample.actor.parent / "base", "--lora-alpha", "16"] if form == "accelerate" else []
    return ["--local-dir", sample.actor, "--save-dir", out, *beside, "--verify", "--json"]


def logits(model: Any) -> Any:
    import torch
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


@pytest.mark.parametrize("form", ["DCP", "ranks", "accelerate"])
def test_an_adapter_loads_in_peft_and_acts_the_same(form: str, lora: dict[str, Sample], tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    merge(*arguments(form, lora[form], tmp_path / "out"), "--lora", "adapter", "--dtype", "keep").record()
    base = peft_s(lora[form]).unload()
    bare = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, str(tmp_path / "out")).eval())
    assert torch.equal(loaded, logits(peft_s(lora[form]))) and not torch.allclose(loaded, bare, atol=1e-4)


@pytest.mark.parametrize("form", ["DCP", "ranks", "accelerate"])
def test_fused_it_is_what_peft_merges_and_unloads(form: str, lora: dict[str, Sample], tmp_path: Path) -> None:
    import torch
    record = merge(*arguments(form, lora[form], tmp_path / "out"), "--lora", "fuse", "--dtype", "float32").record()
    found, wanted = weights(tmp_path / "out"), peft_s(lora[form]).merge_and_unload().state_dict()
    assert set(found) == set(wanted) and record["fused"]
    unlike = differences(found, wanted)
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in unlike)
    for name in unlike:  # sums in another order
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-7)
    changed = differences(found, peft_s(lora[form]).unload().state_dict())
    assert len(changed) == 4, "two projections of two layers"


@pytest.mark.parametrize("form", ["DCP", "ranks"])
def test_lora_weights_alone_are_fused_with_their_base(form: str, lora: dict[str, Sample], tmp_path: Path) -> None:
    """As PEFT over FSDP2 saves an adapter only, in both forms: equal to the fusion of all weights, bit by bit."""
    if form == "DCP":
        flags, _, writer = DCP_SAMPLES["LoRA"]
        sample = write_dcp(tmp_path / "dcp", {"LoRA": (flags, "adapter", writer)})["LoRA"]
        whole = lora["DCP"]
    else:
        whole, sample = lora["ranks"], lora["ranks"].copy(tmp_path / "ranks")
        edit_ranks(sample, lambda state: [state.pop(name) for name in [*state] if ".lora_" not in name])
    peft_s(whole).unload().save_pretrained(tmp_path / "base")
    arguments_ = ["--lora", "fuse", "--dtype", "float32", "--verify"]
    merge(*arguments(form, whole, tmp_path / "whole"), *arguments_).record()
    record = merge(*arguments(form, sample, tmp_path / "alone"), *arguments_, "--base-model", tmp_path / "base").record()
    assert record["fused"] and record["base_sources"]
    assert differences(weights(tmp_path / "alone"), weights(tmp_path / "whole")) == []
