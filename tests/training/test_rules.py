"""The rules of a run: each broken once, each with its remedy."""
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.lib.training.facts import Facts, Items, Model, Server
from tasks.lib.training.rules import RULES, Case, check, saves, stored
from training.retention import Rules

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "torch_dtype": "bfloat16"
}
MODEL = Model(Path("/models/m"), "", CONFIG, 7_615_616_512, "<|im_start|>…<|im_end|>", True)
ITEMS = Items(Path("/i.json"), "", tuple(f"babyai_{number}" for number in range(160)))
SERVER = Server("babyai", 0, None, False, "ready", "", "http://x:1", 1, None, 0)
PLACE = {
    "verl": "/verl",
    "flash_attn": True,
    "closed_cache": "",
    "closed_model": "",
    "resolved": {},
    "hydra_error": None,
    "cpus": 32,
    "tokenizer_error": None,
    "markers": [1, 1],
    "prompt_tokens": 300,
    "unreachable": "",
    "architectures": ["Qwen2ForCausalLM"],
    "clients": ["babyai", "sciworld"]
}
FACTS = Facts(model=MODEL,
              items=ITEMS,
              server=SERVER,
              place=PLACE,
              gpus=8,
              shm=32 << 30,
              folder=Path("/saves/x"),
              free_bytes=10**13)
SETTINGS: dict[str, Any] = {
    "data.train_batch_size": 16,
    "data.max_prompt_length": 1024,
    "data.max_response_length": 4096,
    "actor_rollout_ref.agentgym.task_name": "babyai",
    "actor_rollout_ref.model.path": "/models/m",
    "actor_rollout_ref.rollout.n": 8,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 8,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 1,
    "algorithm.adv_estimator": "grpo",
    "algorithm.rounds_ctrl.rounds": 20,
    "trainer.save_freq": 25,
    "trainer.total_epochs": 10,
}


def case(settings: dict[str, Any] | None = None, typed: tuple[str, ...] = (), **facts: Any) -> Case:
    """Return a good run with changes."""
    return Case({**SETTINGS, **(settings or {})}, replace(FACTS, **facts), typed)


def place(**changes: Any) -> dict[str, Any]:
    """Return the facts of a place with changes."""
    return {"place": {**PLACE, **changes}}


def model(config: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return the facts of a model with changes."""
    return {"model": replace(MODEL, config={**CONFIG, **(config or {})}, **changes)}


def items(*ids: str) -> dict[str, Any]:
    """Return the facts of an item list, sixteen times the same ids."""
    return {"items": Items(Path("/i.json"), "", ids * 16)}


def test_a_good_run_passes_every_rule() -> None:
    report = check(case())
    assert not report.findings and not report.undecided and set(report.passed) == set(RULES)


A, R = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
BROKEN: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    ("place", "no image", {}, {
        "place_missing": ("no image x", "build it")
    }, "no image x"),
    ("verl", "no verl there", {}, place(verl=None), "no package verl"),
    ("flash_attn", "not installed", {}, place(flash_attn=False), "not installed"),
    ("model_files", "of another user", {}, place(closed_model="/m/model.safetensors"), "/m/model.safetensors cannot be read"),
    ("cache", "of another user", {}, place(closed_cache="/workspace/models"), "/workspace/models is closed to it"),
    ("hydra", "a key that there is not", {}, place(hydra_error="Could not override 'a'"), "Could not override"),
    ("numbers", "a batch of 0", {
        "data.train_batch_size": 0
    }, {}, "data.train_batch_size=0"),
    ("numbers", "a text", {
        f"{R}.n": "many"
    }, {}, "rollout.n=many"),
    ("numbers", "a truth value", {
        "trainer.nnodes": True
    }, {}, "trainer.nnodes=True"),
    ("algorithm", "rloo", {
        "algorithm.adv_estimator": "rloo"
    }, {}, "NotImplementedError"),
    ("algorithm", "gae", {
        "algorithm.adv_estimator": "gae"
    }, {}, "differ in size"),
    ("algorithm", "remax", {
        "algorithm.adv_estimator": "remax"
    }, {}, "reads a key"),
    ("batch", "8 GPUs do not divide it", {
        "data.train_batch_size": 20
    }, {}, "give data.train_batch_size=16"),
    ("batch", "though n makes it even", {
        "data.train_batch_size": 4
    }, {}, "give data.train_batch_size=8"),
    ("mini_batch", "becomes 0", {
        f"{A}.ppo_mini_batch_size": 1,
        f"{R}.n": 4
    }, {}, "1 x 4 // 8 = 0"),
    ("mini_batch", "below micro", {
        f"{A}.ppo_micro_batch_size_per_gpu": 16
    }, {}, "ppo_mini_batch_size=16"),
    ("micro_batch", "none", {
        f"{A}.ppo_micro_batch_size_per_gpu": None
    }, {}, "ppo_micro_batch_size_per_gpu=None"),
    ("micro_batch", "0", {
        f"{A}.ppo_micro_batch_size_per_gpu": 0
    }, {}, "give actor_rollout_ref.actor.ppo_micro"),
    ("micro_batch", "both", {
        f"{A}.ppo_micro_batch_size": 8
    }, {}, "is set as well"),
    ("tensor_parallel", "does not divide the ranks", {
        f"{R}.tensor_model_parallel_size": 7
    }, {}, "divides 8 GPUs"),
    ("tensor_parallel", "does not divide the heads", {
        f"{R}.tensor_model_parallel_size": 8
    }, {}, "28 attention heads"),
    ("fsdp_size", "HSDP", {
        f"{A}.fsdp_config.fsdp_size": 4
    }, {}, "fsdp_size=4"),
    ("strategy", "megatron", {
        f"{A}.strategy": "megatron"
    }, {}, "strategy=megatron"),
    ("strategy", "Ulysses with padding", {
        f"{A}.ulysses_sequence_parallel_size": 2
    }, {}, "use_remove_padding=True"),
    ("rounds", "a list for fixed", {
        "algorithm.rounds_ctrl.rounds": [6, 13]
    }, {}, "--scaling-inter"),
    ("rounds", "a number for ScalingInter", {
        "algorithm.rounds_ctrl.type": "scaling_inter_stepwise"
    }, {}, "rounds=20"),
    ("rounds", "another type", {
        "algorithm.rounds_ctrl.type": "adaptive"
    }, {}, "type=adaptive"),
    ("rounds", "stages of 0 steps", {
        "algorithm.rounds_ctrl.type": "scaling_inter_stepwise",
        "algorithm.rounds_ctrl.rounds": [1, 2],
        "algorithm.rounds_ctrl.steps_scaling_inter": 0
    }, {}, "steps_scaling_inter=0"),
    ("logger", "tensorboard", {
        "trainer.logger": ["console", "tensorboard"]
    }, {}, "tensorboard"),
    ("logger", "no console", {
        "trainer.logger": ["wandb"]
    }, {}, "console among the loggers"),
    ("logger", "a number", {
        "trainer.logger": 3
    }, {}, "trainer.logger=3"),
    ("wandb", "online without a key", {}, {
        "wandb_mode": "online"
    }, "WANDB_API_KEY is not set"),
    ("wandb", "another mode", {}, {
        "wandb_mode": "on"
    }, "WANDB_MODE=on"),
    ("rollout", "no eager mode", {
        f"{R}.enforce_eager": False
    }, {}, "free_cache_engine=False"),
    ("rollout", "no chat", {
        "data.return_raw_chat": False
    }, {}, "return_raw_chat"),
    ("steps", "a total that trains nothing", {
        "trainer.total_training_steps": 1
    }, {}, "--steps 1 or more"),
    ("saving", "never", {
        "trainer.save_freq": -1
    }, {}, "saves nothing"),
    ("saving", "the last one deleted first", {
        "trainer.remove_previous_ckpt_in_save": True
    }, {}, "--keep-last"),
    ("folder", "closed to the user", {}, {
        "unwritable": Path("/saves")
    }, "sudo chown"),
    ("model_path", "a / at its end", {
        "actor_rollout_ref.model.path": "/models/m/"
    }, {}, "model.path=/models/m"),
    ("model", "none", {}, {
        "model": None
    }, "none is named"),
    ("model", "not there", {}, {
        "model": Model(Path("/m"), "there is no such folder")
    }, "no such folder"),
    ("model", "quantized", {}, model({"quantization_config": {
        "bits": 4
    }}), "quantized"),
    ("architecture", "Qwen3", {}, model({"architectures": ["Qwen3ForCausalLM"]}), "Qwen3 came after vLLM 0.6.3"),
    ("architecture", "none", {}, model({"architectures": None}), "a model class"),
    ("dtype", "of the rollout", {
        f"{R}.dtype": "int8"
    }, {}, "dtype=int8"),
    ("dtype", "of the model", {}, model({"torch_dtype": "float8_e4m3fn"}), "float8"),
    ("context", "too short", {
        "data.max_response_length": 32768
    }, model({"max_position_embeddings": 4096}), "4096 positions"),
    ("tokenizer", "none", {}, model(tokenizer=False), "a tokenizer beside the weights"),
    ("tokenizer", "torn", {}, place(tokenizer_error="expected value at line 1"), "expected value"),
    ("chat_format", "Llama's", {}, model(chat_template="<|start_header_id|>"), "without <|im_start|>"),
    ("chat_format", "none", {}, model(chat_template=""), "no chat template"),
    ("chat_format", "markers that are cut up", {}, place(markers=[6, 5]), "6 and 5 tokens"),
    ("prompt_length", "too long", {
        "data.max_prompt_length": 299
    }, {}, "give data.max_prompt_length=300"),
    ("items", "no list", {}, {
        "items": None
    }, "train_file is not set"),
    ("items", "not there", {}, {
        "items": Items(Path("/i.json"), "there is no such file")
    }, "invoke data.fetch"),
    ("item_ids", "no number", {}, items("babyai_x"), "'babyai_x'"),
    ("item_ids", "trials", {}, items("alfworld_pick-3_trial_T2019_043461"), "would become item 43461"),
    ("item_ids", "of another environment", {}, items("sciworld_1"), "items of sciworld"),
    ("item_ids", "beyond the last", {}, {
        **items("babyai_7"), "server": replace(SERVER, last=5)
    }, "items 0 to 5"),
    ("full_batch", "fewer items than a batch", {}, {
        "items": Items(Path("/i"), "", ("babyai_1", ) * 9)
    }, "batch_size=8"),
    ("client", "demo", {
        "actor_rollout_ref.agentgym.task_name": "demo"
    }, {}, "a client for"),
    ("environment", "not ready", {}, {
        "server": replace(SERVER, state="no answer", remedy="do this")
    }, "do this"),
    ("environment", "out of the trainer's reach", {}, {
        **place(unreachable="refused"), "server": replace(SERVER, state="unknown")
    }, "refused"),
    ("sessions", "too few", {}, {
        "server": replace(SERVER, max_sessions=16)
    }, "use --replicas 9"),
    ("sessions", "some are open", {}, {
        "server": replace(SERVER, max_sessions=130, live=2)
    }, "2 of them open"),
    ("port", "taken", {}, {
        "server": replace(SERVER, state="absent", port_taken=36003)
    }, "36003 is taken"),
    ("gpus", "fewer than asked", {}, {
        "gpus": 4
    }, "wait for the others for ever"),
    ("gpus", "none", {}, {
        "gpus": 0
    }, "0 there"),
    ("cpus", "fewer than GPUs", {}, place(cpus=8), "9 CPUs"),
    ("shm", "too little", {}, {
        "shm": 64 << 20
    }, "0.0625 GB"),
    ("disk", "too small", {}, {
        "free_bytes": 10**11
    }, "91.4 GB"),
]


@pytest.mark.parametrize(("name", "settings", "facts", "said"), [(one[0], *one[2:]) for one in BROKEN],
                         ids=[f"{one[0]}: {one[1]}" for one in BROKEN])
def test_a_broken_rule_is_one_line_with_a_remedy(name: str, settings: dict[str, Any], facts: dict[str, Any],
                                                 said: str) -> None:
    report = check(case(settings, **facts))
    found = [one for one in report.findings if one.id == name]
    assert len(found) == 1 and said in str(found[0]) and "\n" not in str(found[0])
    assert all(found[0].as_dict().values()) and list(found[0].as_dict()) == ["id", "expected", "actual", "remedy"]


def test_every_rule_is_broken_above() -> None:
    assert {one[0] for one in BROKEN} == set(RULES)


def test_a_folder_key_of_the_users_is_refused() -> None:
    report = check(case({"trainer.default_local_dir": "saves/y"}, ("trainer.default_local_dir", )))
    assert [str(one) for one in report.findings] == [
        "folder: trainer.default_local_dir=saves/y; expected folders that the run's name decides; leave it out; use --name"
    ]


def test_all_that_is_wrong_is_listed_at_once() -> None:
    report = check(
        case(
            {
                "algorithm.adv_estimator": "rloo",
                "data.train_batch_size": 20,
                f"{A}.fsdp_config.fsdp_size": 2,
                "algorithm.rounds_ctrl.rounds": [1],
                "trainer.logger": ["tensorboard", "console"],
                "data.max_prompt_length": 10,
                "actor_rollout_ref.model.path": "/models/m/"
            },
            gpus=2,
            shm=1,
            free_bytes=1,
            **model({"architectures": ["Qwen3ForCausalLM"]}, chat_template="x")))
    assert [one.id for one in report.findings] == [
        "algorithm", "batch", "fsdp_size", "rounds", "logger", "model_path", "architecture", "chat_format",
        "prompt_length", "gpus", "shm", "disk"
    ]


def test_what_nobody_can_tell_is_neither_right_nor_wrong() -> None:
    report = check(case(gpus=None, shm=None, server=None, place={}))
    assert not report.findings
    assert {"gpus", "shm", "environment", "sessions", "verl", "hydra", "prompt_length", "cpus"} <= set(report.undecided)
    assert not set(report.undecided) & set(report.passed)


def test_a_running_cluster_decides_on_gpus() -> None:
    assert {"gpus", "cpus"} <= set(check(case(gpus=0, cluster="10.0.0.1:6379")).undecided)


def test_a_rule_that_the_user_leaves_out_is_listed_as_such() -> None:
    report = check(case(gpus=0), {"gpus"})
    assert report.skipped == ("gpus", ) and "gpus" not in report.passed and not report.findings


@pytest.mark.parametrize(
    ("total", "epochs", "batch", "steps"),
    [
        (None, 10, 16, 99),  # 160 items are 10 batches, 100 steps in all, of which the last is not trained
        (10, 10, 16, 9),
        (1, 10, 16, 1),  # the trainer looks only after it has trained a step
        (None, 1, 160, 1),
        (500, 10, 16, 100),  # the epochs end first
    ])
def test_steps_that_are_trained(total: int | None, epochs: int, batch: int, steps: int) -> None:
    assert case({
        "trainer.total_training_steps": total,
        "trainer.total_epochs": epochs,
        "data.train_batch_size": batch
    }).steps() == steps


def test_saves_of_a_run() -> None:
    assert [saves(steps, 25) for steps in (1, 24, 25, 26, 50, 99)] == [1, 1, 1, 2, 2, 4]


def test_what_lies_on_the_disk_at_once() -> None:
    assert stored(20, 25, None) == 240
    # Two whole ones and the one that is written; the best and five multiples of 100 without optimizer; all merged.
    assert stored(20, 25, Rules(2, 100, 1, 2)) == 3 * 12 + 6 * 4 + 20 * 2
    assert stored(20, 25, Rules(2, 100, 1, 2, merged_too=True)) == 3 * 12 + 6 * 4 + 8 * 2
    assert stored(1, 25, Rules(2, 100, 1, 2)) == 12 + 4 + 2


def test_a_watcher_needs_less_disk() -> None:
    long = {"trainer.total_epochs": 50, "trainer.total_training_steps": 501}
    small = {"free_bytes": 100 * 7_615_616_512}
    assert [one.id for one in check(case(long, **small)).findings] == ["disk"]
    assert not check(case(long, keep=Rules(2, 100, 1, 2), **small)).findings


def test_ids_name_rules_that_a_message_can_be_looked_up_by() -> None:
    assert all(re.fullmatch(r"[a-z_]+", name) and function.__doc__ for name, function in RULES.items())
