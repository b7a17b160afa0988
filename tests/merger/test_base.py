"""LoRA weights alone, fused with a base model's folder."""
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.merger.merging import differences, merge
from tests.merger.test_lora import IDS, causal, critic, train, trained_critic

BASE_KEPT = ["init True", "init False", "init gaussian", "init orthogonal", "some layers",
             "modules by a regular expression"]  # yapf: disable


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def alone(kind: str, folder: Path, ranks: int = 1, shard_size: str = "5GB") -> tuple[Path, Path, Path, Any]:
    """Return (full shards, shards of LoRA weights alone, the base model's folder, PEFT's model)."""
    full, model = train(kind, folder)
    causal().save_pretrained(folder / "base", max_shard_size=shard_size)
    (folder / "base/tokenizer.json").write_text("{}")
    only = folder / "only"
    only.mkdir()
    shutil.copytree(full / "lora_adapter", only / "lora_adapter")
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    for rank in range(ranks):
        torch.save(state, only / f"model_world_size_{ranks}_rank_{rank}.pt")
    return full, only, folder / "base", model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "keep"])
@pytest.mark.parametrize("kind", BASE_KEPT)
def test_the_model_is_that_of_full_shards_and_peft_s(kind: str, dtype: str, tmp_path: Path) -> None:
    full, only, base, model = alone(kind, tmp_path, ranks=2, shard_size="5KB")
    assert (base / "model.safetensors.index.json").is_file()
    args = ["--lora", "fuse", "--dtype", dtype, "--verify", "--json"]
    merge("--local-dir", full, "--save-dir", tmp_path / "whole", *args).record()
    record = merge("--local-dir", only, "--save-dir", tmp_path / "out", "--base-model", base, *args).record()
    assert record["fused"] and record["verified"] and record["model_check"].startswith("keys and shapes as")
    assert differences(weights(tmp_path / "out"), weights(tmp_path / "whole")) == []
    assert (tmp_path / "out/tokenizer.json").is_file()
    told = {source["file"]: source for source in record["base_sources"]}
    assert {source["file"] for source in record["sources"]} == {path.name for path in only.glob("*.pt")}
    assert all(told[path.name]["bytes"] == path.stat().st_size for path in base.glob("*.safetensors"))
    if dtype == "float32":
        fused = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.allclose(fused(IDS).logits, model.merge_and_unload()(IDS).logits, atol=1e-5)
        assert not torch.allclose(fused(IDS).logits, causal()(IDS).logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["init pissa", "init olora"])
def test_a_training_that_began_with_another_base_is_refused(kind: str, tmp_path: Path) -> None:
    _, only, base, _ = alone(kind, tmp_path)
    refusal = merge("--local-dir", only, "--save-dir", tmp_path / "out", "--base-model", base, "--lora", "fuse").refusal
    assert "init_lora_weights" in refusal and not (tmp_path / "out").exists()


def test_lora_weights_alone_ask_for_the_base_with_or_without_a_config(tmp_path: Path) -> None:
    _, only, base, _ = alone("init True", tmp_path)
    args = ["--local-dir", only, "--save-dir", tmp_path / "out", "--lora", "fuse"]
    assert "--base-model DIR" in merge(*args).refusal
    assert "--base-model DIR" in merge(*args, "--config-dir", base).refusal


def test_a_changed_base_is_noticed_and_one_elsewhere_is_taken(tmp_path: Path) -> None:
    _, only, base, _ = alone("init True", tmp_path)
    args = ["--local-dir", only, "--save-dir", tmp_path / "out"]
    merge(*args, "--lora", "fuse", "--base-model", base, "--json").record()
    assert merge(*args, "--verify-only", "--json").record()["verified"]
    base.rename(tmp_path / "moved")
    assert "--base-model" in merge(*args, "--verify-only").refusal
    assert merge(*args, "--verify-only", "--base-model", tmp_path / "moved", "--json").record()["verified"]
    tensors = weights(tmp_path / "moved")
    tensors["model.norm.weight"][3] = 7
    save_file(tensors, tmp_path / "moved/model.safetensors")
    refusal = merge(*args, "--verify-only", "--base-model", tmp_path / "moved").refusal
    assert "model.norm.weight" in refusal and "the base's in" in refusal


def test_the_record_that_goes_to_the_hub_names_no_folder_of_the_base(tmp_path: Path) -> None:
    from merger.hub import public_record
    _, only, base, _ = alone("init True", tmp_path)
    record = merge("--local-dir", only, "--save-dir", tmp_path / "out", "--lora", "fuse", "--base-model", base,
                   "--json").record()  # yapf: disable
    public = {key: value for key, value in public_record(record).items() if key != "folder"}
    assert str(tmp_path) not in json.dumps(public) and public["base_sources"][0]["folder"] == "base"


def test_the_same_merge_is_one_of_the_same_base(tmp_path: Path) -> None:
    from merger.discover import find_checkpoint
    from merger.job import Options
    from merger.record import same_merge
    _, only, base, _ = alone("init True", tmp_path)
    merge("--local-dir", only, "--save-dir", tmp_path / "out", "--lora", "fuse", "--base-model", base,
          "--json").record()
    options = Options((str(only), ), lora="fuse", base_model=str(base))

    def same() -> bool:
        return same_merge(options, find_checkpoint([str(only)]), tmp_path / "out") is not None

    assert same()
    os.utime(base / "model.safetensors", (1, 1))
    assert not same()


def test_modules_that_were_trained_whole_stand_for_the_base_s(tmp_path: Path) -> None:
    model = trained_critic()
    critic().save_pretrained(tmp_path / "base")
    only = tmp_path / "only"
    model.save_pretrained(only / "lora_adapter")
    held = {
        name: tensor
        for name, tensor in model.state_dict().items() if ".lora_" in name or ".modules_to_save." in name
    }
    torch.save(held, only / "model_world_size_1_rank_0.pt")
    args = ["--local-dir", only, "--save-dir", tmp_path / "out", "--lora", "fuse", "--base-model", tmp_path / "base"]
    merge(*args, "--dtype", "float32", "--verify", "--json").record()
    fused = transformers.Qwen2ForTokenClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(fused(IDS).logits, model.eval()(IDS).logits, atol=1e-5)
    torch.save({
        name: tensor
        for name, tensor in held.items() if ".lora_" in name
    }, only / "model_world_size_1_rank_0.pt")
    assert "score" in merge(*args, "--force").refusal


def test_tied_weights_and_the_config_are_the_base_s(tmp_path: Path) -> None:
    _, only, base, _ = alone("init True", tmp_path)
    tensors = weights(base)
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    (only / "huggingface").mkdir()
    (only / "huggingface/config.json").write_text(json.dumps({**config, "hidden_size": 8}))
    (only / "huggingface/tokenizer.json").write_text('{"of": "the checkpoint"}')
    merge("--local-dir", only, "--lora", "fuse", "--base-model", base, "--verify", "--json").record()
    out = only / "huggingface"
    told = json.loads((out / "config.json").read_text())
    assert (told["tie_word_embeddings"], told["hidden_size"]) == (True, 16)
    assert "lm_head.weight" not in weights(out) and "checkpoint" in (out / "tokenizer.json").read_text()


def lacking(base: Path) -> None:
    save_file({
        n: t
        for n, t in weights(base).items() if "layers.1.self_attn.v_proj" not in n
    }, base / "model.safetensors")


def reshaped(base: Path) -> None:
    tensors = weights(base)
    name = "model.layers.1.self_attn.v_proj.weight"
    save_file({**tensors, name: tensors[name][:, :8].contiguous()}, base / "model.safetensors")


def quantized(base: Path) -> None:
    tensors = weights(base)
    name = "model.layers.1.self_attn.v_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, base / "model.safetensors")


def pickled(base: Path) -> None:
    torch.save(weights(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def truncated(base: Path) -> None:
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-10])


def linked_out(base: Path) -> None:
    (base / "model.safetensors").rename(base.parent / "elsewhere.safetensors")
    (base / "model.safetensors").symlink_to(base.parent / "elsewhere.safetensors")


def dangling(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to("gone")


def a_pipe(base: Path) -> None:
    (base / "model.safetensors").unlink()
    os.mkfifo(base / "model.safetensors")


def escaping(base: Path) -> None:
    (base / "model.safetensors").rename(base.parent / "model.safetensors")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')


def lost_file(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


def odd_index(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text('{"weight_map": [1]}')


def no_config(base: Path) -> None:
    (base / "config.json").unlink()


def garbage(base: Path) -> None:
    (base / "model.safetensors").write_bytes((20).to_bytes(8, "little") + b'{"a": {"dtype": 3}} ' + b"\0" * 100)


@pytest.mark.parametrize(("spoil", "culprit"), [
    (lacking, "layers.1.self_attn.v_proj"), (reshaped, "does not fit"), (quantized, "is quantized"),
    (pickled, "pytorch_model.bin"), (truncated, "not a whole safetensors"), (linked_out, "leads out"),
    (dangling, "which is not there"), (a_pipe, "is a pipe"), (escaping, "no file of weights"), (lost_file, "is not there"),
    (odd_index, "no weight_map"), (no_config, "config.json"), (garbage, "header")])  # yapf: disable
def test_a_base_that_does_not_do_is_refused(spoil: Callable[[Path], None], culprit: str, tmp_path: Path) -> None:
    _, only, base, _ = alone("init True", tmp_path)
    spoil(base)
    refusal = merge("--local-dir", only, "--save-dir", tmp_path / "out", "--lora", "fuse", "--base-model", base).refusal
    assert culprit in refusal and "with --force" not in refusal and not (tmp_path / "out").exists()


def test_a_base_model_where_none_belongs_is_refused(tmp_path: Path) -> None:
    full, only, base, _ = alone("init True", tmp_path)
    out = ["--save-dir", tmp_path / "out", "--base-model", base]
    assert "leave --base-model out" in merge("--local-dir", full, *out, "--lora", "fuse").refusal
    for more in ([], ["--lora", "adapter"]):
        assert "--lora fuse" in merge("--local-dir", only, *out, *more).refusal
    assert "--save-dir" in merge("--local-dir", only, "--lora", "fuse", "--base-model", base, "--save-dir", base,
                                 "--force").refusal  # yapf: disable
    assert "no folder" in merge("--local-dir", only, "--lora", "fuse", "--base-model", "Qwen/Tiny").refusal
    plain = tmp_path / "plain"
    plain.mkdir()
    torch.save(dict(causal().state_dict()), plain / "model_world_size_1_rank_0.pt")
    assert "no LoRA weights" in merge("--local-dir", plain, *out, "--lora", "fuse").refusal


def test_a_base_that_is_replaced_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merger import merging
    _, only, base, _ = alone("init True", tmp_path)
    write = merging.write_files

    def replaced(*args: Any, **kwargs: Any) -> Any:
        done = write(*args, **kwargs)
        save_file({name: tensor + 1 for name, tensor in weights(base).items()}, base / "model.safetensors")
        return done

    monkeypatch.setattr(merging, "write_files", replaced)
    refusal = merge("--local-dir", only, "--save-dir", tmp_path / "out", "--lora", "fuse", "--base-model", base).refusal
    assert "changed while it was read" in refusal and not (tmp_path / "out").exists()
