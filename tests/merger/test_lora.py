"""LoRA weights beside modules that were trained whole, such as a critic's head."""
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.merger.merging import differences, merge

IDS = torch.arange(10)[None]


def critic() -> Any:
    """Return a tiny token classifier, the same at each call."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, num_key_value_heads=2, num_labels=1)  # yapf: disable
    return transformers.Qwen2ForTokenClassification(config).eval()


def trained_critic() -> Any:
    """Return PEFT's model of a critic whose adapter and head are trained: at random."""
    from peft import LoraConfig, TaskType, get_peft_model
    model = get_peft_model(
        critic(), LoraConfig(task_type=TaskType.TOKEN_CLS, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or ".modules_to_save." in name:
                parameter.normal_(std=0.5)
    return model


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Any]:
    """A LoRA critic as verl saves it on one rank, whose head differs from the base model's, and PEFT's model of it."""
    model = trained_critic()
    actor = tmp_path / "actor"
    (actor / "huggingface").mkdir(parents=True)
    config = model.config.to_dict() | {"architectures": ["Qwen2ForCausalLM"]}  # verl saves the causal model's
    (actor / "huggingface/config.json").write_text(json.dumps(config))
    (actor / "lora_train_meta.json").write_text('{"r": 4, "lora_alpha": 8, "task_type": "TOKEN_CLS"}')
    torch.save(dict(model.state_dict()), actor / "model_world_size_1_rank_0.pt")
    return actor, model.eval()


def test_a_critic_s_trained_head_is_fused_with_its_lora_weights(trained: tuple[Path, Any], tmp_path: Path) -> None:
    actor, model = trained
    record = merge("--local-dir", actor, "--save-dir", tmp_path / "out", "--lora", "fuse", "--dtype", "float32",
                   "--verify", "--json").record()
    assert record["model_check"].startswith("keys and shapes as")
    fused = transformers.Qwen2ForTokenClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(fused.score.weight, model.state_dict()["base_model.model.score.modules_to_save.default.weight"])
    assert torch.allclose(fused(IDS).logits, model(IDS).logits, atol=1e-5)


def test_a_critic_s_adapter_with_its_head_is_the_one_that_peft_would_save(trained: tuple[Path, Any],
                                                                          tmp_path: Path) -> None:
    from peft import PeftModel
    actor, model = trained
    merge("--local-dir", actor, "--save-dir", tmp_path / "out", "--lora", "adapter", "--dtype", "keep", "--verify",
          "--json").record()
    model.save_pretrained(tmp_path / "peft")
    assert differences(load_file(tmp_path / "out/adapter_model.safetensors"),
                       load_file(tmp_path / "peft/adapter_model.safetensors")) == []
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] == ["score"]
    loaded = PeftModel.from_pretrained(critic(), str(tmp_path / "out")).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


# PEFT's own record


INITS: list[Any] = [True, False, "gaussian", "olora", "pissa", "orthogonal"]
KINDS: dict[str, dict[str, Any]] = {
    **{f"init {init}": {"init_lora_weights": init} for init in INITS},
    "DoRA": {"use_dora": True},
    "DoRA from PiSSA": {"use_dora": True, "init_lora_weights": "pissa"},
    "ranks by pattern": {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "alphas by pattern": {"alpha_pattern": {"v_proj": 32}},
    "a bias in B": {"lora_bias": True},
    "modules by a regular expression": {"target_modules": r".*\.(q|v)_proj"},
    "an embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "some layers": {"layers_to_transform": [0], "layers_pattern": "layers"},
}  # yapf: disable


def causal() -> Any:
    """Return a tiny causal model, the same at each call."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)  # yapf: disable
    return transformers.Qwen2ForCausalLM(config).eval()


def train(kind: str, folder: Path) -> tuple[Path, Any]:
    """Write a LoRA actor as verl does on one rank, PEFT's record beside it; return it and PEFT's model of it."""
    from peft import LoraConfig, TaskType, get_peft_model
    changes = {"target_modules": ["q_proj", "v_proj"], **KINDS[kind]}
    model = get_peft_model(causal(), LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    actor = folder / "actor"
    (actor / "huggingface").mkdir(parents=True)
    config = model.config.to_dict() | {"architectures": ["Qwen2ForCausalLM"], "_name_or_path": "Qwen/Tiny"}
    (actor / "huggingface/config.json").write_text(json.dumps(config))
    model.save_pretrained(actor / "lora_adapter")
    torch.save(dict(model.state_dict()), actor / "model_world_size_1_rank_0.pt")
    return actor, model.eval()


@pytest.mark.parametrize("where", ["elsewhere", "in place of PEFT's"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_acts_as_the_one_that_peft_saved(kind: str, where: str, tmp_path: Path) -> None:
    from peft import PeftModel
    actor, model = train(kind, tmp_path)
    saved = PeftModel.from_pretrained(causal(), str(actor / "lora_adapter")).eval()(IDS).logits
    told = json.loads((actor / "lora_adapter/adapter_config.json").read_text())
    out = tmp_path / "out" if where == "elsewhere" else actor / "lora_adapter"
    merge("--local-dir", actor, *(["--save-dir", out] if where == "elsewhere" else ["--force"]), "--lora", "adapter", "--dtype",
          "keep", "--verify", "--json").record()  # yapf: disable
    loaded = PeftModel.from_pretrained(causal(), str(out)).eval()(IDS).logits
    assert torch.equal(loaded, saved) and torch.allclose(loaded, model(IDS).logits, atol=1e-4)
    assert not torch.allclose(loaded, causal()(IDS).logits, atol=1e-3)
    found = json.loads((out / "adapter_config.json").read_text())
    assert found == {**told, "base_model_name_or_path": "Qwen/Tiny"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("init", "modules", "some"))])
def test_fused_weights_act_as_the_adapter_however_it_was_initialised(kind: str, tmp_path: Path) -> None:
    actor, model = train(kind, tmp_path)
    merge("--local-dir", actor, "--save-dir", tmp_path / "out", "--lora", "fuse", "--dtype", "float32", "--verify",
          "--json").record()  # yapf: disable
    fused = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(fused(IDS).logits, model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize(("kind", "culprit"), [("DoRA", "use_dora true"), ("ranks by pattern", "rank_pattern"),
                                               ("alphas by pattern", "alpha_pattern"), ("a bias in B", "lora_bias true"),
                                               ("an embedding", "lora_embedding_A")])  # yapf: disable
def test_what_cannot_be_fused_is_refused_by_name(kind: str, culprit: str, tmp_path: Path) -> None:
    actor, _ = train(kind, tmp_path)
    refusal = merge("--local-dir", actor, "--save-dir", tmp_path / "out", "--lora", "fuse").refusal
    assert culprit in refusal and "--lora adapter" in refusal


@pytest.mark.parametrize("entry", [{"use_qalora": True}, {"layer_replication": [[0, 2]]}, {"next_year_s": "scaling"},
                                   {"next_year_s": 2}, {"next_year_s": True}, {"next_year_s": {"a": 1}}, {"peft_type": "ADALORA"},
                                   {"megatron_core": "other"}, {"ensure_weight_tying": True}, {"fan_in_fan_out": True},
                                   {"trainable_token_indices": [1]}], ids=str)  # yapf: disable
def test_an_entry_that_is_not_known_to_be_harmless_is_not_fused(entry: dict[str, Any], tmp_path: Path) -> None:
    actor, _ = train("init True", tmp_path)
    path = actor / "lora_adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    assert next(iter(entry)) in merge("--local-dir", actor, "--save-dir", tmp_path / "out", "--lora", "fuse").refusal


def test_every_default_of_the_installed_peft_is_fused() -> None:
    from merger.lora import Lora, check_fusable
    from peft import LoraConfig
    record = json.loads(json.dumps(LoraConfig(r=4).to_dict(), default=list))
    check_fusable(Lora({}, {}, {}, 4, 8.0, None, record))


@pytest.mark.parametrize("entry", [{"bias": "all"}, {"trainable_token_indices": [1]}, {"peft_type": "LOHA"}], ids=str)
def test_an_adapter_that_would_lack_something_is_refused_by_name(entry: dict[str, Any], tmp_path: Path) -> None:
    actor, _ = train("init True", tmp_path)
    path = actor / "lora_adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    assert next(iter(entry)) in merge("--local-dir", actor, "--save-dir", tmp_path / "out", "--lora", "adapter").refusal


def test_two_records_that_disagree_need_the_flag(tmp_path: Path) -> None:
    actor, _ = train("init True", tmp_path)
    (actor / "lora_train_meta.json").write_text('{"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"}')
    args = ["--local-dir", actor, "--save-dir", tmp_path / "out", "--lora", "fuse"]
    assert "lora_alpha 8" in merge(*args).refusal and merge(*args, "--lora-alpha", "8").code == 0
