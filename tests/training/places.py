"""A model, an item list, sources and an environment server for the tasks of training, all small and made here."""
from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.fixtures.standins import Answer

ROOT = Path(__file__).resolve().parents[2]
# The trainer's defaults of the keys that presets and rules use.
YAML = """
data: {tokenizer: null, train_file: x, prompt_key: item_id, max_prompt_length: 2048, max_response_length: 2048,
       train_batch_size: 1024, return_raw_chat: true, shuffle: true}
actor_rollout_ref:
  model: {path: x, use_remove_padding: false}
  actor: {strategy: fsdp, ppo_mini_batch_size: 256, ppo_micro_batch_size: null, ppo_micro_batch_size_per_gpu: null,
          use_dynamic_bsz: false, use_kl_loss: false, kl_loss_coef: 0.001, kl_loss_type: low_var_kl, ppo_epochs: 1,
          ulysses_sequence_parallel_size: 1, optim: {lr: 1e-6}, fsdp_config: {fsdp_size: -1}}
  ref: {log_prob_micro_batch_size: null, log_prob_micro_batch_size_per_gpu: 1}
  agentgym: {task_name: textcraft, env_addr: "http://localhost:5000", max_retries: 10, timeout: 300}
  rollout: {dtype: bfloat16, gpu_memory_utilization: 0.5, enforce_eager: true, free_cache_engine: true,
            tensor_model_parallel_size: 2, max_model_len: 32768, max_tokens: 1024, prompt_length: "${data.max_prompt_length}",
            log_prob_micro_batch_size: null, log_prob_micro_batch_size_per_gpu: 1, n: 1, rollout_log_dir: null}
algorithm:
  {adv_estimator: gae, rounds_ctrl: {type: fixed, rounds: 15, steps_scaling_inter: 100}, kl_ctrl: {kl_coef: 0.001}}
trainer: {total_epochs: 30, total_training_steps: null, project_name: p, experiment_name: e, logger: [console, wandb], nnodes: 1,
          n_gpus_per_node: 8, save_freq: -1, resume_mode: auto, resume_from_path: false,
          remove_previous_ckpt_in_save: false, default_local_dir: x}
fake: {}
"""
PROMPT = "You are in a room. " * 5


def sources(folder: Path) -> dict[str, str]:
    """Write sources that train nothing, and return the variables that name them."""
    verl = folder / "AgentGym-RL" / "AgentGym-RL" / "verl"
    (verl / "agent_trainer" / "config").mkdir(parents=True)
    (verl / "agent_trainer" / "config" / "ppo_trainer.yaml").write_text(YAML)
    (verl / "__init__.py").touch()
    (verl / "agent_trainer" / "__init__.py").touch()
    (verl / "agent_trainer" / "main_ppo.py").write_text(
        f"import runpy\nrunpy.run_path({str(ROOT / 'tests/training/fake_trainer.py')!r}, run_name='__main__')\n")
    (verl / "utils" / "agentgym").mkdir(parents=True)
    (verl / "utils" / "agentgym" / "client.py").write_text("CLIENTS = {'babyai': 1, 'sciworld': 2}\n")
    flash = folder / "packages" / "flash_attn"
    flash.mkdir(parents=True)
    (flash / "__init__.py").touch()
    envs = folder / "AgentGym" / "agentenv" / "agentenv" / "envs"
    envs.mkdir(parents=True)
    (envs.parent / "__init__.py").touch()
    (envs / "babyai.py").write_text(
        f"class BabyAIEnvClient:\n    conversation_start = (M({{'value': {PROMPT!r}}}), M({{'value': 'OK.'}}))\n")
    return {
        "AGENTGYM_RL_SRC": str(folder / "AgentGym-RL"),
        "AGENTGYM_SRC": str(folder / "AgentGym"),
        "PYTHONPATH": str(folder / "packages")
    }


def model(folder: Path, **config: Any) -> Path:
    """Write a model of 80 numbers with a byte-level tokenizer in Qwen's chat format; return its folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({
            "architectures": ["Qwen2ForCausalLM"],
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "torch_dtype": "bfloat16",
            **config
        }))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [8, 10], "data_offsets": [0, 160]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(160))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={one: number for number, one in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "<|im_start|>…<|im_end|>"}))
    return folder


def items(path: Path, count: int = 48, name: str = "babyai") -> Path:
    """Write an item list."""
    path.write_text(json.dumps([{"item_id": f"{name}_{number}", "conversations": None} for number in range(count)]))
    return path


def babyai(method: str, path: str, headers: dict, body: Any) -> Answer:
    """Answer as babyai's server does, for `standins.serving`."""
    return Answer({
        "/create": {
            "id": 1
        },
        "/reset": {
            "observation": "x",
            "reward": 0,
            "score": 0,
            "done": False
        },
        "/close": True
    }.get(path, {"error": "no such route"}))
