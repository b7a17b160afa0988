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


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Any]:
    """A LoRA critic as verl saves it on one rank, whose head differs from the base model's, and PEFT's model of it."""
    from peft import LoraConfig, TaskType, get_peft_model
    model = get_peft_model(
        critic(), LoraConfig(task_type=TaskType.TOKEN_CLS, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or ".modules_to_save." in name:
                parameter.normal_(std=0.5)
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
