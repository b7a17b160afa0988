"""Checkpoints that real FSDP wrote, merged and compared bit for bit with the unsharded model."""
import json
import shutil
import stat
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.merger.fsdp_samples import SAMPLES
from tests.merger.merging import (
    Sample,
    cast,
    differences,
    edit_rank,
    edit_ranks,
    listing,
    merge,
    rewrite_pickle,
    run_program,
    same_bits,
    untouched,
    weights,
)

DTYPES = ("bfloat16", "float16", "float32", "keep")
WHOLE = [name for name in SAMPLES if not name.startswith("LoRA")]


def expected(sample: Sample, dtype: str) -> dict[str, Any]:
    """Return what a merge should write: the reference, cast by torch, a tied head left out."""
    tensors = sample.tensors()
    if sample.config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    return {name: cast(tensor, dtype) for name, tensor in tensors.items()}


def flags(name: str) -> list[str]:
    """The buffers of some samples are in no class of transformers; others' references have the names in memory."""
    if name.startswith(("vision", "mixture of experts")):
        return ["--names", "memory"]
    return ["--allow", "keys"] if name.startswith("buffers") else []


@pytest.mark.parametrize("name", WHOLE)
def test_every_tensor_is_the_unsharded_model_s(name: str, samples: dict[str, Sample], tmp_path: Path) -> None:
    sample = samples[name]
    record = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--verify", "--json",
                   *flags(name)).record()
    assert differences(weights(tmp_path / "out"), expected(sample, "bfloat16")) == []
    assert record["verified"] and record["world_size"] == sample.world_size
    assert record["tensors"] == len(expected(sample, "bfloat16"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["FSDP1, 4 ranks", "FSDP2 and TP, 2 x 2 ranks", "FSDP2, bfloat16 shards", "FSDP1, float16 shards",
             "buffers, FSDP1", "buffers, FSDP2", "vision, ShardedTensor"])  # yapf: disable
def test_every_output_type_is_torch_s_cast(name: str, dtype: str, samples: dict[str, Sample], tmp_path: Path) -> None:
    sample = samples[name]
    merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--dtype", dtype, "--json",
          *flags(name)).record()
    assert differences(weights(tmp_path / "out"), expected(sample, dtype)) == []
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == (sample.config["torch_dtype"] if dtype == "keep" else dtype)


@pytest.mark.parametrize("name", ["buffers, FSDP1", "buffers, FSDP2"])
def test_buffers_are_written_once_and_integers_keep_their_type(name: str, samples: dict[str, Sample],
                                                               tmp_path: Path) -> None:
    merge("--local-dir", samples[name].actor, "--save-dir", tmp_path / "out", "--allow", "keys", "--json").record()
    found = weights(tmp_path / "out")
    assert found["model.steps_seen"].dtype == torch.int64 and found["model.steps_seen"].item() == 2**53 + 1
    assert found["model.frozen_rows"].dtype == torch.bool and found["model.frozen_rows"].shape == (7, )
    assert found["model.running_mean"].shape == (5, )


MODELS = {
    "FSDP1, 4 ranks": transformers.AutoModelForCausalLM,
    "FSDP1, 4 ranks, tied": transformers.AutoModelForCausalLM,
    "critic, FSDP1": transformers.AutoModelForTokenClassification,
    "mixture of experts, HSDP": transformers.AutoModelForCausalLM,
    "vision, FSDP2": transformers.AutoModelForImageTextToText,
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_merged_model(name: str, samples: dict[str, Sample], tmp_path: Path) -> None:
    sample, ids = samples[name], torch.arange(40, 56).reshape(2, 8)
    merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--dtype", "float32", "--json").record()
    model, info = MODELS[name].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    model.load_state_dict(sample.tensors(), strict=False)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        found = MODELS[name].from_pretrained(tmp_path / "out")(input_ids=ids).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", ["critic, FSDP1", "critic, FSDP2"])
def test_a_critic_s_config_names_a_critic_whatever_the_training_left_there(name: str, spoil: Callable[..., Sample],
                                                                           tmp_path: Path) -> None:
    sample = spoil(name)
    assert sample.config["architectures"] == ["Qwen2ForCausalLM"]  # as verl leaves it
    run = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--verify")
    assert run.code == 0 and "config.json names Qwen2ForTokenClassification, not Qwen2ForCausalLM" in run.err
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["Qwen2ForTokenClassification"]
    sample.configure(architectures=["Qwen2ForTokenClassification"])
    assert "Qwen2ForCausalLM" not in merge("--local-dir", sample.actor, "--save-dir", tmp_path / "again").err
    assert differences(weights(tmp_path / "again"), weights(tmp_path / "out")) == []


def test_a_tokenizer_of_the_checkpoint_works_in_the_merged_model(samples: dict[str, Sample], tmp_path: Path) -> None:
    merge("--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "out", "--json").record()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("merge")["input_ids"]) == "merge"


@pytest.mark.parametrize("name", ["FSDP2, 4 ranks", "FSDP2 and TP, 2 x 2 ranks", "HSDP, 2 x 3 ranks, tied"])
def test_a_small_shard_size_gives_several_files_and_an_index(name: str, samples: dict[str, Sample],
                                                             tmp_path: Path) -> None:
    sample, out = samples[name], tmp_path / "out"
    record = merge("--local-dir", sample.actor, "--save-dir", out, "--max-shard-size", "100KB", "--json").record()
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert sorted(file["name"] for file in record["files"]) == names
    assert differences(weights(out), expected(sample, "bfloat16")) == []
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in weights(out).values())
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_ranks_may_be_spread_over_two_folders(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample, other = spoil("FSDP2, 4 ranks"), tmp_path / "node1/actor"
    other.mkdir(parents=True)
    for rank in (2, 3):
        shutil.move(sample.rank(rank), other)
    refusal = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal
    assert "missing: rank 2, 3" in refusal and "--local-dir" in refusal
    merge("--local-dir", sample.actor, "--local_dir", other, "--save-dir", tmp_path / "out", "--json").record()
    assert differences(weights(tmp_path / "out"), expected(sample, "bfloat16")) == []


@pytest.mark.parametrize("lost", [(0, ), (1, ), (3, ), (0, 1), (2, 3), (0, 3)], ids=lambda lost: f"without {lost}")
def test_one_complete_replica_of_hsdp_suffices(lost: tuple[int, ...], spoil: Callable[..., Sample],
                                               tmp_path: Path) -> None:
    sample = spoil("HSDP, 2 x 2 ranks")
    for rank in lost:
        sample.rank(rank).unlink()
    run = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--verify")
    assert run.code == 0 and f"without rank {', '.join(map(str, lost))}" in run.err
    assert differences(weights(tmp_path / "out"), expected(sample, "bfloat16")) == []


@pytest.mark.parametrize("lost", [(0, 2), (1, 3), (0, 1, 2)], ids=lambda lost: f"without {lost}")
def test_a_shard_of_which_no_replica_is_left_is_refused(lost: tuple[int, ...], spoil: Callable[..., Sample],
                                                        tmp_path: Path) -> None:
    sample = spoil("HSDP, 2 x 2 ranks")
    for rank in lost:
        sample.rank(rank).unlink()
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor).refusal
    assert f"missing: rank {', '.join(map(str, lost))}" in refusal


def test_replicas_that_differ_are_refused(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("HSDP, 2 x 2 ranks")

    def nudge(state: dict[str, Any]) -> None:
        state["model.norm.weight"]._local_tensor[0] += 1

    edit_rank(sample.rank(3), nudge)
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor, "--verify").refusal
    assert "model.norm.weight" in refusal and "rank 3" in refusal


def test_a_shard_whose_replicas_differ_is_refused_unread(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample, name = spoil("HSDP, 2 x 2 ranks"), "model.layers.0.mlp.up_proj.weight"

    def nudge(state: dict[str, Any]) -> None:
        state[name]._local_tensor[0] += 1

    for rank in range(4):
        edit_rank(sample.rank(rank), nudge if rank == 3 else lambda state: None)
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal
    assert name in refusal and "rank 3 and rank 1 hold the same piece" in refusal
    sample.rank(3).unlink()  # the remedy
    assert merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--verify").code == 0
    assert differences(weights(tmp_path / "out"), expected(sample, "bfloat16")) == []


@pytest.fixture
def expert_parallel(tmp_path: Path) -> Path:
    """A checkpoint of 4 ranks, 2 x 2, whose tensors cover the experts of a rank's own group only."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    (tmp_path / "actor/huggingface").mkdir(parents=True)
    (tmp_path / "actor/huggingface/config.json").write_text('{"architectures": ["VeOmniMoe"], "model_type": "veomni"}')
    experts = torch.arange(8 * 6.0).reshape(8, 2, 3)
    for rank in range(4):
        distributed.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "ep_fsdp"))["ep_fsdp"]
        own = DTensor.from_local(experts[2 * rank:2 * rank + 2].clone(), mesh, [Shard(0)], run_check=False)
        torch.save({"experts.gate_proj": own}, tmp_path / f"actor/model_world_size_4_rank_{rank}.pt")
        distributed.destroy_process_group()
    return tmp_path / "actor"


def test_experts_of_which_each_group_has_others_are_not_taken_for_replicas(expert_parallel: Path,
                                                                           tmp_path: Path) -> None:
    with untouched(tmp_path):
        refusal = merge("--local-dir", expert_parallel, "--save-dir", tmp_path / "out").refusal
    assert "experts.gate_proj" in refusal and "rank 2 and rank 0" in refusal and "expert-parallel" in refusal


def test_the_folder_above_means_its_actor_and_names_the_critic(samples: dict[str, Sample], tmp_path: Path) -> None:
    step = tmp_path / "global_step_20"
    shutil.copytree(samples["FSDP1, 4 ranks"].actor, step / "actor")
    shutil.copytree(samples["critic, FSDP1"].actor, step / "critic")
    run = merge("--local-dir", step)
    assert run.code == 0 and f"for the critic pass {step / 'critic'}" in run.err
    assert differences(weights(step / "actor/huggingface"), expected(samples["FSDP1, 4 ranks"], "bfloat16")) == []
    assert merge("--local-dir", step / "critic").code == 0
    assert differences(weights(step / "critic/huggingface"), expected(samples["critic, FSDP1"], "bfloat16")) == []


def test_the_last_of_several_steps_is_taken_and_named(samples: dict[str, Sample], tmp_path: Path) -> None:
    shutil.copytree(samples["FSDP1, 4 ranks"].actor, tmp_path / "run/global_step_9/actor")
    shutil.copytree(samples["FSDP2, 4 ranks"].actor, tmp_path / "run/global_step_100/actor")
    run = merge("--local-dir", tmp_path / "run")
    assert run.code == 0 and "took the last of the steps 9, 100" in run.err
    assert (tmp_path / "run/global_step_100/actor/huggingface/model.safetensors").is_file()
    assert not (tmp_path / "run/global_step_9/actor/huggingface/model.safetensors").exists()


def test_a_checkpoint_stamped_cuda_is_read_without_a_gpu(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP2, 4 ranks")
    for rank in range(4):
        # The location tag of a storage is the string "cpu" in its persistent id: BINUNICODE, length, text.
        def stamp(data: bytes, rank: int = rank) -> bytes:
            tag = f"cuda:{rank}".encode()
            assert b"X\x03\x00\x00\x00cpu" in data
            return data.replace(b"X\x03\x00\x00\x00cpu", b"X" + len(tag).to_bytes(4, "little") + tag)

        rewrite_pickle(sample.rank(rank), stamp)
    merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--json").record()
    assert differences(weights(tmp_path / "out"), expected(sample, "bfloat16")) == []


def test_names_of_wrapping_modules_are_removed(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP2, 4 ranks")

    def wrap(state: dict[str, Any]) -> None:
        for key in list(state):
            state["_orig_mod." + key.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")] = state.pop(key)

    edit_ranks(sample, wrap)
    merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--json").record()
    assert differences(weights(tmp_path / "out"), expected(sample, "bfloat16")) == []


@pytest.mark.parametrize("name", ["LoRA, FSDP1", "LoRA, FSDP2"])
def test_lora_weights_need_a_decision(name: str, samples: dict[str, Sample], tmp_path: Path) -> None:
    with untouched(tmp_path):
        refusal = merge("--local-dir", samples[name].actor, "--save-dir", tmp_path / "out").refusal
    assert "r = 8" in refusal and "--lora adapter" in refusal and "--lora fuse" in refusal


def base_and_adapted(sample: Sample) -> tuple[Any, Any]:
    """Return the sample's base model and its PEFT model, both unsharded, in float32."""
    from peft import LoraConfig, TaskType, get_peft_model
    config = transformers.AutoConfig.from_pretrained(sample.huggingface)

    def build() -> Any:
        return transformers.Qwen2ForCausalLM(config).float()

    plain = {name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
             for name, tensor in sample.tensors().items() if ".lora_" not in name}  # yapf: disable
    base = build()
    base.load_state_dict(plain)
    adapted = get_peft_model(
        build(), LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    adapted.load_state_dict(sample.tensors())
    return base, adapted


@pytest.mark.parametrize("name", ["LoRA, FSDP1", "LoRA, FSDP2"])
def test_a_lora_adapter_is_the_one_that_peft_would_save(name: str, samples: dict[str, Sample], tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    sample, out = samples[name], tmp_path / "out"
    merge("--local-dir", sample.actor, "--save-dir", out, "--lora", "adapter", "--dtype", "keep", "--json").record()
    base, adapted = base_and_adapted(sample)
    adapted.save_pretrained(tmp_path / "peft")
    assert differences(load_file(out / "adapter_model.safetensors"),
                       load_file(tmp_path / "peft/adapter_model.safetensors")) == []
    ids = torch.arange(40, 56).reshape(2, 8)
    with torch.no_grad():
        unadapted = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, out)
        assert loaded.peft_config["default"].r == 8 and loaded.peft_config["default"].lora_alpha == 16
        found, wanted = loaded(input_ids=ids).logits, adapted(input_ids=ids).logits
    assert torch.equal(found, wanted) and not torch.allclose(found, unadapted)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("name", ["LoRA, FSDP1", "LoRA, FSDP2"])
def test_fused_lora_is_peft_s_merge(name: str, dtype: str, tolerance: float, samples: dict[str, Sample],
                                    tmp_path: Path) -> None:
    sample, out = samples[name], tmp_path / "out"
    merge("--local-dir", sample.actor, "--save-dir", out, "--lora", "fuse", "--dtype", dtype, "--verify",
          "--json").record()
    base, adapted = base_and_adapted(sample)
    base_weights, wanted = base.state_dict(), adapted.merge_and_unload().state_dict()
    found = weights(out)
    assert set(found) == set(wanted)
    for key, tensor in found.items():
        fused = key.endswith(("q_proj.weight", "v_proj.weight"))
        assert torch.allclose(tensor.float(), wanted[key], rtol=tolerance, atol=1e-7), key
        assert fused != same_bits(tensor, cast(base_weights[key], dtype)), key
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize(("dtype", "damage"), [
    ("float32", "the two low bytes of every element"),
    ("float32", "bit 8 of one element"),
    ("bfloat16", "the lowest bit of one element"),
    ("float16", "the lowest bit of one element"),
])
def test_damage_to_fused_lora_is_found(dtype: str, damage: str, samples: dict[str, Sample], tmp_path: Path) -> None:
    args = ["--local-dir", samples["LoRA, FSDP1"].actor, "--save-dir", tmp_path / "out", "--lora", "fuse"]
    merge(*args, "--dtype", dtype, "--json").record()
    shown = merge(*args, "--verify-only")
    assert shown.code == 0 and "4 fused tensors within the rounding" in shown.out
    path, name = tmp_path / "out/model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin, end = (8 + length + place for place in json.loads(data[8:8 + length])[name]["data_offsets"])
    if damage == "the two low bytes of every element":
        data[begin:end] = b"".join(b"\x55\xaa" + data[at + 2:at + 4] for at in range(begin, end, 4))
    elif damage == "bit 8 of one element":
        data[begin + 1] ^= 1
    else:
        data[begin] ^= 1
    path.write_bytes(data)
    refusal = merge(*args, "--verify-only").refusal
    assert name in refusal and "differs from rank" in refusal


@pytest.mark.parametrize(("meta", "args", "culprit"), [
    ({"r": 8, "lora_alpha": 0}, [], "lora_alpha is recorded as 0"),
    (None, [], "lora_alpha is not recorded"),
    ({"r": 4, "lora_alpha": 16}, [], "r = 4"),
], ids=["alpha 0", "no record", "another r"])  # yapf: disable
@pytest.mark.parametrize("mode", ["adapter", "fuse"])
def test_lora_hyperparameters_that_would_spoil_the_merge_are_refused(mode: str, meta: dict[str, int] | None,
                                                                     args: list[str], culprit: str,
                                                                     spoil: Callable[...,
                                                                                     Sample], tmp_path: Path) -> None:
    sample = spoil("LoRA, FSDP1")
    path = sample.actor / "lora_train_meta.json"
    path.unlink() if meta is None else path.write_text(json.dumps(meta))
    with untouched(tmp_path):
        assert culprit in merge("--local-dir", sample.actor, "--lora", mode, "--save-dir", tmp_path / "o",
                                *args).refusal


def test_a_lora_adapter_is_found_again_to_be_compared(spoil: Callable[..., Sample]) -> None:
    sample = spoil("LoRA, FSDP1")
    assert "huggingface/merge.json" in merge("--local-dir", sample.actor, "--verify-only").refusal
    merge("--local-dir", sample.actor, "--lora", "adapter", "--json").record()
    result = merge("--local-dir", sample.actor, "--verify-only", "--json").record()
    assert result["folder"] == str(sample.actor / "lora_adapter") and result["tensors"] == 8


def peft_s_record(sample: Sample, **changes: object) -> None:
    """Leave PEFT's own record where verl leaves it, and not AgentGym-RL's."""
    (sample.actor / "lora_train_meta.json").unlink(missing_ok=True)
    (sample.actor / "lora_adapter").mkdir(exist_ok=True)
    told = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", "alpha_pattern": {}, "use_dora": False, **changes}
    (sample.actor / "lora_adapter/adapter_config.json").write_text(json.dumps(told))


@pytest.mark.parametrize("stabilized", [False, True])
def test_alpha_and_scale_come_from_peft_s_own_record(stabilized: bool, spoil: Callable[..., Sample], tmp_path: Path) -> None:
    import peft
    sample = spoil("LoRA, FSDP1")
    base, adapted = base_and_adapted(sample)
    if stabilized:
        config = peft.LoraConfig(task_type=peft.TaskType.CAUSAL_LM, r=8, lora_alpha=16, use_rslora=True,
                                 target_modules=["q_proj", "v_proj"])  # yapf: disable
        state = adapted.state_dict()
        adapted = peft.get_peft_model(base, config)
        adapted.load_state_dict(state)
    wanted = adapted.merge_and_unload().state_dict()
    peft_s_record(sample, use_rslora=stabilized)
    args = ["--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--dtype", "float32", "--verify", "--json"]
    merge(*args, "--lora", "fuse").record()
    found = weights(tmp_path / "out")
    assert all(torch.allclose(found[key], wanted[key], rtol=1e-6, atol=1e-7) for key in found)
    merge(*args[:3], tmp_path / "adapter", "--lora", "adapter", "--json").record()
    told = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (told["use_rslora"], told["lora_alpha"], told["task_type"]) == (stabilized, 16, "CAUSAL_LM")


@pytest.mark.parametrize(("changes", "culprit"), [
    ({"alpha_pattern": {"q_proj": 4}}, 'alpha_pattern {"q_proj": 4}'),
    ({"use_dora": True}, "use_dora true"),
    ({"r": 4}, "adapter_config.json says r = 4"),
])
@pytest.mark.parametrize("alpha", [[], ["--lora-alpha", "16"]])
def test_what_peft_s_record_says_and_we_cannot_is_refused(changes: dict[str, object], culprit: str, alpha: list[str],
                                                          spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("LoRA, FSDP1")
    peft_s_record(sample, **changes)
    with untouched(tmp_path):
        assert culprit in merge("--local-dir", sample.actor, "--lora", "fuse", "--save-dir", tmp_path / "o", *alpha).refusal


@pytest.mark.parametrize("changes", [{"bias": "all"}, {"trainable_token_indices": [1, 2]}])
def test_an_adapter_that_would_lack_what_was_trained_is_refused(changes: dict[str, object], spoil: Callable[..., Sample],
                                                                tmp_path: Path) -> None:
    sample = spoil("LoRA, FSDP1")
    peft_s_record(sample, **changes)
    args = ["--local-dir", sample.actor, "--save-dir", tmp_path / "o", "--lora"]
    with untouched(tmp_path):
        assert f"has {next(iter(changes))} " in merge(*args, "adapter").refusal
    assert (merge(*args, "fuse").code == 0) == ("bias" in changes)  # biases lie whole beside the factors, tokens do not


def test_alpha_may_come_from_the_flag(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("LoRA, FSDP1")
    merge("--local-dir", sample.actor, "--lora", "fuse", "--save-dir", tmp_path / "recorded", "--json").record()
    (sample.actor / "lora_train_meta.json").unlink()
    merge("--local-dir", sample.actor, "--lora", "fuse", "--save-dir", tmp_path / "given", "--lora-alpha", "16",
          "--json").record()
    merge("--local-dir", sample.actor, "--lora", "fuse", "--save-dir", tmp_path / "other", "--lora-alpha", "32",
          "--json").record()
    assert differences(weights(tmp_path / "given"), weights(tmp_path / "recorded")) == []
    assert differences(weights(tmp_path / "other"), weights(tmp_path / "recorded")) != []


def test_lora_flags_without_lora_weights_are_refused(samples: dict[str, Sample], tmp_path: Path) -> None:
    for mode in ("adapter", "fuse"):
        refusal = merge("--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "o", "--lora",
                        mode).refusal
        assert "no LoRA weights" in refusal


def test_companion_files_are_copied_byte_for_byte(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    extras = {"merges.txt": b"a b\n", "modeling_custom.py": b"raise SystemExit('run')\n", "vocab.bin.txt": b"\xff\x00"}
    for name, data in extras.items():
        (sample.huggingface / name).write_bytes(data)
    (sample.huggingface / "assets").mkdir()
    (sample.huggingface / "assets/chat.jinja").write_bytes(b"{{ x }}\r\n")
    source = listing(sample.huggingface)
    merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--json").record()
    result = listing(tmp_path / "out")
    assert {name for name in source if name != "config.json" and result[name] != source[name]} == set()
    assert set(result) - set(source) == {"model.safetensors", "merge.json"}


def test_no_tokenizer_is_invented(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    for path in sample.huggingface.iterdir():
        if path.name != "config.json":
            path.unlink()
    merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--json").record()
    assert sorted(listing(tmp_path / "out")) == ["config.json", "merge.json", "model.safetensors"]


def test_the_default_target_is_the_checkpoint_s_huggingface_folder(spoil: Callable[..., Sample]) -> None:
    sample = spoil("FSDP2, 4 ranks")
    before = listing(sample.huggingface)
    merge("--local-dir", sample.actor, "--json").record()
    assert set(listing(sample.huggingface)) - set(before) == {"model.safetensors", "merge.json"}
    assert differences(weights(sample.huggingface), expected(sample, "bfloat16")) == []


def test_other_users_can_read_the_model(samples: dict[str, Sample], tmp_path: Path) -> None:
    run = run_program("--local-dir",
                      samples["FSDP1, 4 ranks"].actor,
                      "--save-dir",
                      tmp_path / "out",
                      "--json",
                      umask=0o22)
    assert run.code == 0, run.err
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o644}, modes
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def test_the_record_names_sources_mesh_and_versions(samples: dict[str, Sample], tmp_path: Path) -> None:
    sample = samples["HSDP, 2 x 3 ranks, tied"]
    merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--json").record()
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert record["meshes"] == [{"ddp": 2, "fsdp": 3}] and record["world_size"] == 6 and record["dtype"] == "bfloat16"
    assert [(source["rank"], source["bytes"]) for source in record["sources"]] == [
        (rank, sample.rank(rank).stat().st_size) for rank in range(6)]  # yapf: disable
    assert record["versions"]["torch"] == version("torch")  # without the build, such as +cu130, of torch.__version__
    assert (record["nan"], record["inf"], record["tied_dropped"]) == (0, 0, ["lm_head.weight"])
    assert record["seconds"] >= 0 and record["tensors"] == len(weights(tmp_path / "out"))


def test_a_dry_run_writes_nothing_and_tells_the_true_sizes(samples: dict[str, Sample], tmp_path: Path) -> None:
    args = ["--local-dir", samples["FSDP2 and TP, 3 x 2 ranks"].actor, "--save-dir", tmp_path / "out",
            "--max-shard-size", "200KB", "--json"]  # yapf: disable
    with untouched(tmp_path, samples["FSDP2 and TP, 3 x 2 ranks"].actor):
        plan = merge(*args, "--dry-run").record()
    merge(*args).record()
    assert {file["name"]: file["bytes"] for file in plan["files"]} == {
        path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}  # yapf: disable


def test_inspect_shows_mesh_ranks_and_no_problems(samples: dict[str, Sample]) -> None:
    sample = samples["FSDP2 and TP, 3 x 2 ranks"]
    with untouched(sample.actor):
        facts = merge("--local-dir", sample.actor, "--inspect", "--json").record()
    assert {"fsdp": 3, "tp": 2} in facts["meshes"] and facts["ranks"] == list(range(6)) and facts["problems"] == []
    run = merge("--local-dir", sample.actor, "--inspect")
    assert run.code == 0 and "StridedShard(0, 2), Shard(0)" in run.out


def test_verify_only_accepts_what_was_merged_and_refuses_one_changed_bit(samples: dict[str, Sample],
                                                                         tmp_path: Path) -> None:
    args = ["--local-dir", samples["FSDP2 and TP, 2 x 2 ranks"].actor, "--save-dir", tmp_path / "out"]
    merge(*args, "--json").record()
    assert merge(*args, "--verify-only", "--json").record()["verified"]
    path = tmp_path / "out/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "differs" in merge(*args, "--verify-only").refusal
    record = json.loads((tmp_path / "out/merge.json").read_text())
    for changes in ({"allow": 5}, {"allow": [[1]]}, {"dtype": "foo"}, {"dtype": []}, {"lora": 1}, {"lora_alpha": "x"}):
        spoilt = {**record, "requested": {**record["requested"], **changes}}
        (tmp_path / "out/merge.json").write_text(json.dumps(spoilt))
        assert "merge.json: it is of another version, or damaged" in merge(*args, "--verify-only").refusal


@pytest.mark.parametrize("name", ["FSDP1, 4 ranks", "FSDP2 and TP, 3 x 2 ranks", "HSDP, 2 x 3 ranks, tied"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_torch_s_converter_writes_the_host_s_bytes(device: str, name: str, samples: dict[str, Sample], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from merger import merging
    from merger.gpu import TorchConverter
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    used = []

    class Watched(TorchConverter):

        def convert(self, block: Any) -> Any:
            used.append(block)
            return super().convert(block)

    args = ["--local-dir", samples[name].actor, "--max-shard-size", "300KB", "--json"]
    for dtype in DTYPES:
        merge(*args, "--dtype", dtype, "--save-dir", tmp_path / f"host-{dtype}", "--device", "cpu").record()
    monkeypatch.setattr(merging, "HostConverter", lambda sources: Watched(sources, device="cpu"))
    monkeypatch.setattr(merging, "TorchConverter", Watched)
    for dtype in DTYPES:
        merge(*args, "--dtype", dtype, "--save-dir", tmp_path / f"torch-{dtype}", "--device", device).record()
        host, other = listing(tmp_path / f"host-{dtype}"), listing(tmp_path / f"torch-{dtype}")
        del host["merge.json"], other["merge.json"]
        assert host == other
    assert used


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "tpu", "cuda:x"])
def test_a_device_that_is_not_here_is_refused(device: str, samples: dict[str, Sample], tmp_path: Path) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with untouched(tmp_path):
        refusal = merge("--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "out", "--device",
                        device).refusal
    assert f"--device {device}" in refusal


# What each rank keeps whole


@pytest.fixture
def buffered(spoil: Callable[..., Sample]) -> Sample:
    """A checkpoint with a buffer of 2 MiB that rank 2 has other values of; without checksums."""
    sample = spoil("buffers, FSDP2")
    torch.serialization.set_crc32_options(False)
    try:
        for rank in range(4):
            edit_rank(sample.rank(rank), lambda state, rank=rank: state.update({  # type: ignore[misc]
                "model.large": torch.arange(1 << 19, dtype=torch.float32) + (rank == 2) * (torch.arange(1 << 19) > 1 << 18)}))  # yapf: disable
    finally:
        torch.serialization.set_crc32_options(True)
    return sample


def test_a_large_buffer_that_differs_is_not_taken_unasked(buffered: Sample, tmp_path: Path) -> None:
    args = ["--local-dir", buffered.actor, "--save-dir", tmp_path / "out", "--allow", "keys"]
    with untouched(tmp_path):
        refusal = merge(*args).refusal
    assert "model.large is kept whole by 4 ranks, but rank 2 has other values than rank 0" in refusal
    assert refusal.endswith("pass --allow buffers")
    run = merge(*args, "--allow", "buffers", "--dtype", "keep", "--verify", "--json")
    record = run.record()
    assert record["taken_from_rank"] == {"model.large": 0} and any("model.large" in note for note in record["notes"])
    assert torch.equal(weights(tmp_path / "out")["model.large"], torch.arange(1 << 19, dtype=torch.float32))
    assert merge(*args[:4], "--verify-only", "--json").record()["verified"]


@pytest.mark.parametrize("crc", [True, False], ids=["checksums", "no checksums"])
def test_shards_whose_replicas_differ_are_refused_with_a_remedy_that_works(crc: bool, spoil: Callable[..., Sample],
                                                                           tmp_path: Path) -> None:
    sample, name = spoil("HSDP, 2 x 2 ranks"), "model.layers.0.mlp.up_proj.weight"

    def nudge(state: dict[str, Any]) -> None:
        state[name]._local_tensor[0] += 1

    torch.serialization.set_crc32_options(crc)
    try:
        for rank in range(4):
            edit_rank(sample.rank(rank), nudge if rank == 3 else lambda state: None)
    finally:
        torch.serialization.set_crc32_options(True)
    args = ["--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--allow", "buffers"]
    refusal = merge(*args).refusal
    assert "rank 3 and rank 1 hold the same piece" in refusal and "the files of rank 0, 1 alone" in refusal
    sample.rank(2).unlink()
    sample.rank(3).unlink()
    assert merge(*args, "--verify").code == 0
