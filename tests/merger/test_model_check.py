"""The question to transformers: its answer is remembered for the same question, and for no other."""
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from merger import model_check
from merger.model_check import Verdict, ask, complaint
from merger.modelconfig import without_quantization

from tests.merger.merging import Sample, merge, run_program

SHAPES = {"a.weight": (2, 3)}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The questions that reach the process with transformers, which answers that all is well."""
    questions: list[Any] = []

    def answer(place: Path, request: Any) -> tuple[int, str, str]:
        questions.append(request)
        return 0, json.dumps({"transformers": "5.0", "torch": "2.4"}), ""

    monkeypatch.setattr(model_check, "_run_child", answer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return questions


def test_the_same_question_is_asked_once(asked: list[Any], tmp_path: Path) -> None:
    first = ask(tmp_path / "model", SHAPES, False)
    assert ask(tmp_path / "model", SHAPES, False) == first == Verdict(transformers="5.0", torch="2.4")
    assert len(asked) == 1


@pytest.mark.parametrize("change", ["the config", "a shape", "a name", "custom code", "trust", "a version"])
def test_another_question_is_asked_again(change: str, asked: list[Any], tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    trust = change == "custom code"  # without it none runs
    ask(tmp_path / "model", SHAPES, trust)
    shapes, trust = dict(SHAPES), trust or change == "trust"
    if change == "the config":
        (tmp_path / "model/config.json").write_text('{"vocab_size": 4}')
    elif change == "a shape":
        shapes["a.weight"] = (2, 4)
    elif change == "a name":
        shapes["b.weight"] = (2, 3)
    elif change == "custom code":
        (tmp_path / "model/modeling.py").write_text("x = 1")
    elif change == "a version":
        monkeypatch.setattr(model_check, "_version", lambda package: "99")
    ask(tmp_path / "model", shapes, trust)
    assert len(asked) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"nonsense": 1}', "\x00"], ids=repr)
def test_a_damaged_memory_is_asked_anew(text: str, asked: list[Any], tmp_path: Path) -> None:
    ask(tmp_path / "model", SHAPES, False)
    (memory, ) = (tmp_path / "cache").rglob("*.json")
    memory.write_text(text)
    assert ask(tmp_path / "model", SHAPES, False).transformers == "5.0" and len(asked) == 2


def test_a_process_that_died_is_not_remembered(asked: list[Any], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    died = (1, "", "Traceback\nImportError: no transformers\n")
    with monkeypatch.context() as context:
        context.setattr(model_check, "_run_child", lambda *_: died)
        assert ask(tmp_path / "model", SHAPES, False).unknown == "ImportError: no transformers"
    assert not ask(tmp_path / "model", SHAPES, False).unknown


def test_a_merge_works_without_transformers(samples: dict[str, Sample], tmp_path: Path) -> None:
    (tmp_path / "blocked/transformers").mkdir(parents=True)
    (tmp_path / "blocked/transformers/__init__.py").write_text("raise ImportError('blocked by the test')")
    run = run_program("--local-dir",
                      samples["FSDP1, 4 ranks, tied"].actor,
                      "--save-dir",
                      tmp_path / "out",
                      "--json",
                      env={
                          "PYTHONPATH": str(tmp_path / "blocked"),
                          "XDG_CACHE_HOME": str(tmp_path / "cache")
                      })
    assert "blocked by the test" in run.record()["model_check"]
    assert run.record()["tied_dropped"] == ["lm_head.weight"]


def test_the_real_process_answers_as_the_function_does(samples: dict[str, Sample], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sample = samples["FSDP1, 4 ranks, tied"]
    shapes: dict[str, Any] = {name: list(tensor.shape) for name, tensor in sample.tensors().items()}
    del shapes["model.norm.weight"]
    shapes["model.layers.0.mlp.up_proj.weight"][0] += 1
    shapes["surplus"] = [3]
    verdict = ask(sample.huggingface, shapes, False)
    assert verdict == Verdict(**json.loads(json.dumps(model_check.check(sample.huggingface, shapes, False))))
    assert (verdict.missing, verdict.unexpected) == (["model.norm.weight"], ["surplus"])
    assert verdict.mismatched == [["model.layers.0.mlp.up_proj.weight", [129, 64], [128, 64]]]
    assert sorted(verdict.tied[0]) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.parametrize(("verdict", "text"), [
    (Verdict(), None),
    (Verdict(missing=["x"]), "lacks x, by"),
    (Verdict(missing=["x", "y", "z"]), "lacks x and 2 more"),
    (Verdict(unexpected=["x"]), "has the unexpected x"),
    (Verdict(missing=["a.x", "b"], unexpected=["critic.a.x", "critic.b", "critic.head"]), "begin with 'critic.' in the checkpoint"),
    (Verdict(missing=["a.x", "b"], unexpected=["critic.a.x", "other.b"]), "lacks a.x and 1 more"),
    (Verdict(mismatched=[["emb", [5, 2], [7, 2]]], missing=["x"]), "emb has 5 rows, but c.json says vocab_size 7"),
    (Verdict(mismatched=[["w", [5, 2], [5, 3]]]), r"w is of shape \[5, 2\], but c.json makes it \[5, 3\]"),
],
                         ids=["all is well", "one missing", "three missing", "unexpected", "a prefix", "two prefixes", "vocabulary", "shape"])
@pytest.mark.parametrize("config", [{"vocab_size": 7}, {"text_config": {"vocab_size": 7}}], ids=["flat", "nested"])
def test_the_complaint_names_the_culprit(config: dict[str, Any], verdict: Verdict, text: str | None) -> None:
    import re
    found = complaint(verdict, config, Path("c.json"))
    assert found is None if text is None else re.search(text, found or "")


def test_without_a_home_nothing_is_remembered(asked: list[Any], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def no_entry(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for _ in range(2):
        assert ask(tmp_path / "model", SHAPES, False).transformers == "5.0"
    assert len(asked) == 2


def test_custom_code_runs_only_when_trusted(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    """The checkpoint brings a class of its own; trusted, it is built and its keys are checked."""
    sample, trace = spoil("FSDP1, 4 ranks"), tmp_path / "trace"
    (sample.huggingface / "modeling_own.py").write_text(
        f"import os, pathlib\npathlib.Path({str(trace)!r}).touch()\n"
        "print('hello')\nos.write(1, b'hello')\nos.system('echo hello')\n"
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "class OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
        "class OwnForCausalLM(Qwen2ForCausalLM):\n    config_class = OwnConfig\n")
    sample.configure(model_type="own", architectures=["OwnForCausalLM"],
                     auto_map={"AutoConfig": "modeling_own.OwnConfig",
                               "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})  # yapf: disable
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    args = ["--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--json"]
    run = run_program(*args, env=env)
    assert run.record()["model_check"].startswith("not made") and not trace.exists()
    run = run_program(*args, "--force", "--trust-remote-code", env=env)
    assert run.record()["model_check"].startswith("keys and shapes as") and trace.exists()


@pytest.mark.parametrize(("tied", "names", "wanted"), [
    ([["m.embed_tokens.weight", "lm_head.weight"]], ["m.embed_tokens.weight", "lm_head.weight"],
     [["m.embed_tokens.weight", "lm_head.weight"]]),
    ([["m.l.embed_tokens.weight", "lm_head.weight"]], ["m.embed_tokens.weight", "lm_head.weight"],
     [["m.embed_tokens.weight", "lm_head.weight"]]),
    ([["m.l.embed_tokens.weight", "lm_head.weight"]], ["l.m.embed_tokens.weight", "l.lm_head.weight"],
     [["l.m.embed_tokens.weight", "l.lm_head.weight"]]),
    ([["m.embed_tokens.weight", "lm_head.weight"]], ["lm_head.weight"], [["m.embed_tokens.weight", "lm_head.weight"]]),
    ([["lm_head.weight", "m.embed_tokens.weight"], ["x", "y"]], ["m.embed_tokens.weight", "lm_head.weight", "x"],
     [["lm_head.weight", "m.embed_tokens.weight"], ["x", "y"]]),
    ([], ["m.embed_tokens.weight", "lm_head.weight"], []),
], ids=["its names", "one renamed", "both renamed", "one absent", "two groups", "not tied"])  # yapf: disable
def test_tied_weights_are_found_by_the_checkpoint_s_names(tied: list[list[str]], names: list[str],
                                                          wanted: list[list[str]]) -> None:
    from merger.job import _tied_groups
    named: Any = dict.fromkeys(names)
    assert _tied_groups({"tie_word_embeddings": True}, named, Verdict(tied=tied)) == wanted


@pytest.mark.parametrize("moe", [False, True], ids=["renamed", "fused"])
def test_a_wrong_shape_of_a_tensor_that_transformers_renames_is_one_line(moe: bool, tmp_path: Path) -> None:
    import torch
    import transformers
    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("transformers 4 renames nothing here")
    text: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                            "num_attention_heads": 2, "num_key_value_heads": 2}  # yapf: disable
    if moe:
        config: Any = transformers.Qwen3MoeConfig(**text, moe_intermediate_size=8, num_experts=2, head_dim=8)
        config.architectures = ["Qwen3MoeForCausalLM"]
        state = {f"model.layers.0.mlp.experts.{i}.{name}_proj.weight": torch.ones(9, 16)
                 for i in range(2) for name in ("gate", "up")}  # yapf: disable
    else:
        vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # yapf: disable
        config = transformers.LlavaConfig(vision_config=vision, text_config={"model_type": "llama", **text})
        config.architectures = ["LlavaForConditionalGeneration"]
        state = {"language_model.model.embed_tokens.weight": torch.ones(33, 16)}
    (tmp_path / "actor/huggingface").mkdir(parents=True)
    config.save_pretrained(tmp_path / "actor/huggingface")
    torch.save(state, tmp_path / "actor/model_world_size_1_rank_0.pt")
    refusal = merge("--local-dir", tmp_path / "actor", "--save-dir", tmp_path / "out").refusal
    wanted = "gate_up_proj is of shape [2, 18, 16], but" if moe else "embed_tokens.weight has 33 rows, but"
    assert wanted in refusal and "mend the config" in refusal


def save_whole(model: Any, actor: Path) -> None:
    """Write `model` as a checkpoint of one rank."""
    import torch
    (actor / "huggingface").mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(actor / "huggingface")
    torch.save(dict(model.state_dict()), actor / "model_world_size_1_rank_0.pt")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_a_model_keeps_in_float32_is_not_rounded(dtype: str, tmp_path: Path) -> None:
    """A rounded routing bias sends tokens to other experts: DeepSeek-V3's differ in the third digit."""
    import torch
    import transformers
    from safetensors.torch import load_file
    config = transformers.DeepseekV3Config(vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
                                           num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8,
                                           n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=8,
                                           kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)  # yapf: disable
    model = transformers.DeepseekV3ForCausalLM(config)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = model.state_dict()[name]
    with torch.no_grad():
        bias.copy_(5 + 0.01 * torch.randn(bias.shape))
    save_whole(model, tmp_path / "actor")
    run = merge("--local-dir", tmp_path / "actor", "--save-dir", tmp_path / "out", "--dtype", dtype, "--verify")
    assert ("keep their type" in run.err) == (dtype != "float32")
    assert run.code == 0
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(found.pop(name), bias) and {str(value.dtype) for value in found.values()} == {f"torch.{dtype}"}
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert (told.get("dtype") or told.get("torch_dtype")) == dtype
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert torch.equal(loaded.state_dict()[name], bias)


QUANTIZED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("machine", ["with a GPU", "without"])
def test_a_quantization_that_the_weights_have_not_leaves_the_config(machine: str, spoil: Callable[..., Sample],
                                                                    tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that computes in FP8, transformers would build layers with scales, which the weights have not."""
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine == "with a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    sample = spoil("FSDP1, 4 ranks")
    sample.configure(quantization_config=QUANTIZED)
    record = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--verify", "--json").record()
    assert record["notes"] == ["the weights are not quantized: config.json goes without the quantization_config (fp8)"]
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" in sample.config


@pytest.mark.parametrize(("dtypes", "stays"), [
    ({"a.weight": "bfloat16", "steps": "int64"}, False),
    ({"a.hc_scale": "float32", "logit_scale": "float32"}, False),
    ({"a.weight": "float8_e4m3fn"}, True),
    ({"a.weight": "uint8"}, True),
    ({"a.weight": "float32", "a.weight_scale_inv": "float32"}, True),
    ({"experts.gate_up_proj_scales": "float32"}, True),
], ids=["whole", "scales of the model's own", "8-bit floats", "packed", "scales", "fused scales"])  # yapf: disable
def test_a_quantization_stays_where_the_weights_are_of_it(dtypes: dict[str, str], stays: bool) -> None:
    for config in ({"quantization_config": QUANTIZED}, {"text_config": {"quantization_config": QUANTIZED}}):
        found, notes = without_quantization(config, dtypes)
        assert (found == config, not notes) == (stays, stays)
        assert stays or (QUANTIZED not in found.values() and found.get("text_config", {}) == {})
    assert without_quantization({"x": 1}, dtypes) == ({"x": 1}, [])


@pytest.mark.parametrize("saved", ["as trained", "as on the Hub"])
def test_experts_fused_in_memory_are_noted(saved: str, tmp_path: Path) -> None:
    """transformers 4 reads each expert's own matrices only; 5 fuses them when it loads."""
    import torch
    import transformers
    from safetensors.torch import load_file
    config = transformers.Qwen3MoeConfig(vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
                                         num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
                                         num_experts=2, num_experts_per_tok=1)  # yapf: disable
    model = transformers.Qwen3MoeForCausalLM(config)
    if not any(name.endswith("experts.gate_up_proj") for name in model.state_dict()):
        pytest.skip("this transformers fuses no experts")
    save_whole(model, tmp_path / "actor")
    if saved == "as on the Hub":
        model.save_pretrained(tmp_path / "hub")
        torch.save(load_file(tmp_path / "hub/model.safetensors"), tmp_path / "actor/model_world_size_1_rank_0.pt")
    run = merge("--local-dir", tmp_path / "actor", "--save-dir", tmp_path / "out", "--names", "memory")
    assert run.code == 0
    told = "2 tensors keep the names" in run.err and "experts.down_proj, which only transformers 5" in run.err
    assert told == (saved == "as trained")
    assert ("experts.0.down_proj.weight" in run.err) == told
