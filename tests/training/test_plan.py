"""The list that is sent: of the ten scripts and presets, with what a run puts right and nothing else."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tasks.lib.errors import UserError
from tasks.lib.training import plan
from tasks.lib.training.overrides import layer, read, settings
from tasks.lib.training.plan import Chosen, Wanted, choose
from tests.training.test_presets import LISTS, names
from tests.training.test_scripts import shell_form

# The named corrections: address, folders, names, the number of GPUs, and absolute paths.
PUT_RIGHT = {
    "actor_rollout_ref.agentgym.env_addr": "http://env-x:36003",
    "actor_rollout_ref.model.path": "/workspace/models/Qwen2.5-7B-Instruct",
    "actor_rollout_ref.rollout.rollout_log_dir": "/workspace/saves/run1/rollouts",
    "trainer.default_local_dir": "/workspace/saves/run1",
    "trainer.experiment_name": "run1",
    "trainer.n_gpus_per_node": 4,
    "hydra.run.dir": "/workspace/saves/run1/hydra",
}


def sent(chosen: Chosen) -> dict[str, Any]:
    """Return what is sent, with what a run has of its own."""
    before = settings(layer(chosen.base, chosen.flags, chosen.typed), {})
    own = plan.own(chosen.environment, "http://env-x:36003", "/workspace/saves/run1", "run1", 4,
                   "/workspace/models/Qwen2.5-7B-Instruct", f"/workspace/{before['data.train_file']}", before)
    return {
        one.key: one.value
        for one in plan.final(chosen, own, plan.stepping(chosen.steps, before["trainer.total_epochs"], 10))
    }


@pytest.mark.parametrize("script", LISTS)
@pytest.mark.parametrize("how", ["preset", "script"])
def test_a_list_is_the_scripts_own_but_for_the_named_corrections(script: str, how: str, tmp_path: Path) -> None:
    environment, kind = names(script)
    if how == "script":
        (tmp_path / "x.sh").write_text(shell_form(script))
        chosen = choose(Wanted(script=str(tmp_path / "x.sh")), {})
    else:
        chosen = choose(Wanted(environment, presets=(kind, )), {})
    want = {key: read(text) for key, text in LISTS[script].items()}
    want |= PUT_RIGHT | {
        "data.train_file": f"/workspace/AgentItemId/{environment}_train.json",
        "trainer.project_name": f"agentgym-rl-{environment}",
    }
    assert sent(chosen) == want


def test_layers_come_one_over_the_other(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("data.train_batch_size = 64\ntrainer.save_freq = 5\n"
                                     'algorithm.adv_estimator = "gae"\n')
    (tmp_path / "q.toml").write_text("trainer.save_freq = 6\n")
    found = sent(
        choose(
            Wanted("babyai",
                   algorithm="reinforce++",
                   rounds="7",
                   steps="200",
                   presets=(str(tmp_path / "p.toml"), str(tmp_path / "q.toml")),
                   typed=("trainer.total_training_steps=50", "data.seed=3", "trainer.project_name=mine")), {}))
    assert (found["data.train_batch_size"], found["trainer.save_freq"],
            found["algorithm.adv_estimator"]) == (64, 6, "reinforce_plus_plus")
    assert (found["algorithm.rounds_ctrl.type"], found["algorithm.rounds_ctrl.rounds"]) == ("fixed", 7)
    assert (found["trainer.total_training_steps"],
            found["trainer.total_epochs"]) == (50, 20), "what is typed rules over --steps"
    assert (found["data.seed"], found["trainer.project_name"]) == (3, "mine")


def test_scaling_inter_takes_the_scaling_preset_and_its_own_stages() -> None:
    found = sent(choose(Wanted("babyai", scaling_inter="2,4", every="5"), {}))
    assert found["algorithm.rounds_ctrl.type"] == "scaling_inter_stepwise"
    assert (found["algorithm.rounds_ctrl.rounds"], found["algorithm.rounds_ctrl.steps_scaling_inter"]) == ([2, 4], 5)
    assert found["data.max_response_length"] == 8192


@pytest.mark.parametrize(("steps", "epochs", "batches", "want"), [
    (None, 10, 10, {}),
    (50, 10, 10, {
        "trainer.total_training_steps": 51
    }),
    (100, 10, 10, {
        "trainer.total_training_steps": 101
    }),
    (101, 10, 10, {
        "trainer.total_training_steps": 102,
        "trainer.total_epochs": 11
    }),
    (7, 10, None, {
        "trainer.total_training_steps": 8
    }),
])
def test_the_total_is_one_more_than_the_steps_and_the_epochs_do(steps: int | None, epochs: int, batches: int | None,
                                                                want: dict[str, int]) -> None:
    assert {one.key: one.value for one in plan.stepping(steps, epochs, batches)} == want


@pytest.mark.parametrize(("wanted", "line"), [
    (Wanted(), "which environment"),
    (Wanted("babyai", algorithm="dpo"), "--algorithm dpo is none"),
    (Wanted("babyai", rounds="many"), "--rounds many is no whole number"),
    (Wanted("babyai", rounds="-1"), "--rounds -1 is no whole number"),
    (Wanted("babyai", rounds="5", scaling_inter="1,2"), "contradict one another"),
    (Wanted("babyai", scaling_inter="6;13"), "is no list of rounds"),
    (Wanted("babyai", scaling_inter="6,0"), "is no list of rounds"),
    (Wanted("babyai", every="5"), "--every is about the stages"),
    (Wanted("babyai", scaling_inter="1,2", every="0"), "--every 0"),
    (Wanted("babyai", steps="0"), "--steps 0 is no whole number of at least 1"),
    (Wanted("babyai", steps="٣"), "is no whole number"),
    (Wanted("babyai", presets=("fixed", "scaling")), "take one of the two"),
    (Wanted("babyai", presets=("nowhere.toml", )), "--preset nowhere.toml: No such file"),
    (Wanted("alfworld"), "has no preset fixed for alfworld"),
    (Wanted("babyai", script="nowhere.sh"), "--script nowhere.sh: No such file"),
    (Wanted("babyai", typed=("a=1", "a=2")), "a stands twice after --"),
    (Wanted("babyai", typed=("batch 8", )), "is no override"),
    (Wanted("babyai", typed=("actor_rollout_ref.agentgym.task_name=sciworld", )), "name one environment"),
])
def test_what_contradicts_itself_is_refused_in_one_line(wanted: Wanted, line: str) -> None:
    with pytest.raises(UserError) as said:
        choose(wanted, os.environ)
    assert line in said.value.message and "\n" not in said.value.message and said.value.code == 2


@pytest.mark.parametrize("name", ["", "-x", ".x", "a/b", "a b", "ä", "x" * 65, "../x", "x\n"])
def test_what_cannot_name_a_folder_and_a_container_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no name"):
        plan.check_name(name)


def test_a_default_name_can_name_a_run() -> None:
    name = plan.default_name("babyai", {
        "algorithm.adv_estimator": "reinforce_plus_plus",
        "algorithm.rounds_ctrl.type": "x"
    }, "20260102-030405")
    assert plan.check_name(name) == "babyai-reinforcepp-scaling-20260102-030405"


def test_differences_of_two_lists_are_named_and_an_address_is_none() -> None:
    before = ["a=1", "b=[1,2]", "actor_rollout_ref.agentgym.env_addr=http://x:1", "c=1e-6", "+data.seed=1"]
    now = ["a=2", "b=[1, 2]", "actor_rollout_ref.agentgym.env_addr=http://y:2", "c=0.000001", "d=5"]
    assert plan.differences(before, now) == ["a: 1, now 2", "data.seed: 1, now not set", "d: not set, now 5"]
    assert not plan.differences(before, before)


def test_reserved_keys_are_told_even_where_a_run_puts_them_right() -> None:
    chosen = choose(Wanted("babyai", typed=("hydra.run.dir=/x", )), {})
    assert chosen.reserved() == ["hydra.run.dir"] and sent(chosen)["hydra.run.dir"] == "/workspace/saves/run1/hydra"
