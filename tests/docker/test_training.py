"""Training in containers, as a plain user: a stand-in trainer with real Hydra, Ray and FSDP plays a real server."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.docker.workbench import ROOT, SOCKET, Terminal, Workbench
from tests.fixtures.servers import free_port
from tests.fixtures.standins import Answer, completion, serving

pytestmark = pytest.mark.docker
FIXTURES = "tests/fixtures/training"
ROWS = {"ENVIRONMENTS": f"{FIXTURES}/environments.toml"}
PLAIN = 4321  # a user id that neither the images nor the host know
# Ray takes the resources that it is told of: GPUs that are not there, and a core for the loop beside the workers'.
CLAIMS = """
  train:
    deploy: !reset null
    environment: {RAY_OVERRIDE_RESOURCES: '{"CPU": 4, "GPU": 2}'}
"""
BY_HAND = [
    "data.train_file=AgentItemId/textcraft_train.json", "data.train_batch_size=4", "data.max_prompt_length=1024",
    "data.max_response_length=512", "actor_rollout_ref.agentgym.task_name=textcraft",
    "actor_rollout_ref.model.path=models/tiny", "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1", "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1", "trainer.n_gpus_per_node=2", "trainer.save_freq=2"
]

# Small enough for two claimed GPUs and a second a step.
SMALL = [
    "data.train_batch_size=4", "data.max_prompt_length=1024", "data.max_response_length=512",
    "actor_rollout_ref.rollout.n=2", "actor_rollout_ref.actor.ppo_mini_batch_size=4", "trainer.n_gpus_per_node=2",
    "trainer.save_freq=2"
]


def plain_words(*words: str) -> list[str]:
    """Return the command line of `invoke` for a plain user of this machine, who may use Docker."""
    argv = [sys.executable, "-m", "invoke", *words]
    if os.getuid() == 0:
        # Reading is for everybody: this Python, and the folders of the tests, may lie where only root can look.
        argv = [
            "setpriv", "--reuid",
            str(PLAIN), "--regid",
            str(PLAIN), "--groups",
            str(SOCKET.stat().st_gid), "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search", *argv
        ]
    return argv


def plain_variables(bench: Workbench) -> dict[str, str]:
    """Return what that user's environment has more."""
    return {
        "HOME": str(bench.root.parent / "home"),
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "safe.directory",
        "GIT_CONFIG_VALUE_0": "*",
        **ROWS
    }


def plainly(bench: Workbench, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `invoke` as that user."""
    return bench.run(*plain_words(*words), env=plain_variables(bench))


@pytest.fixture(scope="module")
def server(bench: Workbench, build: None) -> Iterator[str]:
    """Return the address, for containers, of a server that the trainer can play with; model and items are there too."""
    shutil.copytree(ROOT / FIXTURES, bench.root / FIXTURES)
    cpu = bench.root / "docker-compose.cpu.yml"
    without = cpu.read_text()
    cpu.write_text(without.replace("\n  train:\n    deploy: !reset null\n", CLAIMS))
    assert cpu.read_text() != without
    folders = [
        bench.root / "saves", bench.root / "models", bench.root / "AgentItemId", bench.root, bench.root.parent / "home"
    ]
    folders[-1].mkdir()
    modes = [folder.stat().st_mode for folder in folders]
    for folder in folders:
        folder.chmod(0o777)
    servers = bench.root / ".run"  # what runs is noted there, for its owner alone
    if servers.exists():
        servers.rename(bench.root.parent / ".run")
    for folder in bench.root.parents:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    done = plainly(bench, "train.run", "--", "python", "-c", (ROOT / FIXTURES / "tiny_model.py").read_text(),
                   "models/tiny")
    assert done.returncode == 0, done.stderr
    items = [{"item_id": f"textcraft_{number}", "conversations": None} for number in range(48, 96)]
    (bench.root / "AgentItemId" / "textcraft_train.json").write_text(json.dumps(items))
    for words in (["build.env", "--env", "textcraft"], ["env.up", "--env", "textcraft", "--port", str(free_port())]):
        done = plainly(bench, *words)
        assert done.returncode == 0, done.stderr
    found = re.search(r"in containers (http://\S+)", done.stdout)
    assert found, done.stdout
    yield found[1]
    plainly(bench, "env.down", "--env", "textcraft")
    cpu.write_text(without)
    shutil.rmtree(servers, ignore_errors=True)
    if (bench.root.parent / ".run").exists():
        (bench.root.parent / ".run").rename(servers)
    for folder, mode in zip(folders, modes, strict=True):
        folder.chmod(mode)


def test_a_plain_user_trains_by_hand_and_all_that_is_written_stays(bench: Workbench, server: str) -> None:
    """Upstream's own folder is root's: Hydra's folder there, wandb's offline run and Ray's logs go to saves/."""
    words = " ".join([
        *BY_HAND, "algorithm.adv_estimator=grpo", "trainer.default_local_dir=saves/by-hand",
        "actor_rollout_ref.rollout.rollout_log_dir=saves/by-hand/rollouts", "trainer.total_training_steps=4",
        f"actor_rollout_ref.agentgym.env_addr={server}"
    ])
    done = plainly(bench, "train.run", "--", "bash", "-c",
                   f"cd AgentGym-RL; python -m verl.agent_trainer.main_ppo {words}")
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.findall(r" step:(\d) - ", done.stdout) == ["1", "2", "3"]
    saves = bench.root / "saves"
    # One step less than asked for, and the last checkpoint's number is one too high: as upstream's.
    assert {path.name for path in (saves / "by-hand").glob("global_step_*")} == {"global_step_2", "global_step_4"}
    assert (saves / "by-hand/latest_checkpointed_iteration.txt").read_text() == "4"
    assert len(list(saves.glob("20*-*-*/*/.hydra/overrides.yaml"))) == 1
    assert len(list(saves.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    assert list(saves.glob("ray/session_*/logs/raylet.out"))
    owner = (saves / "by-hand/global_step_2").stat().st_uid
    assert owner == (PLAIN if os.getuid() == 0 else os.getuid())


@dataclass
class Runs:
    """Training runs of a plain user."""
    bench: Workbench
    server: str

    def words(self, name: str, *overrides: str, steps: int = 4, flags: tuple[str, ...] = ()) -> list[str]:
        """Return the words of `train.start`."""
        return [
            "train.start", "--env", "textcraft", "--model", "models/tiny", "--name", name, "--steps",
            str(steps), "--skip", "flash_attn", *flags, "--", *SMALL, *overrides
        ]

    def start(self, name: str, *overrides: str, steps: int = 4, flags: tuple[str, ...] = ()) -> None:
        """Start a run, detached."""
        self.do(*self.words(name, *overrides, steps=steps, flags=flags))

    def do(self, *words: str) -> str:
        """Run `invoke`, which must succeed, and return what it said."""
        done = plainly(self.bench, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def status(self, name: str) -> dict[str, Any]:
        """Return what `train.status --json` tells."""
        done = plainly(self.bench, "train.status", "--name", name, "--json")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def wait(self, name: str, until: Callable[[dict[str, Any]], bool], seconds: float = 240) -> dict[str, Any]:
        """Return the status as soon as it is as wanted."""
        end = time.monotonic() + seconds
        while not until(found := self.status(name)):
            assert time.monotonic() < end, found
            time.sleep(0.3)
        return found

    def ended(self, name: str, seconds: float = 240) -> dict[str, Any]:
        """Return the status as soon as the run has ended."""
        return self.wait(name, lambda found: found["state"] in ("finished", "stopped", "died"), seconds)

    def reached(self, name: str, step: int) -> dict[str, Any]:
        """Return the status as soon as `step` is trained."""
        found = self.wait(name, lambda found: found["step"] >= step or found["state"] not in ("starting", "running"))
        assert found["step"] >= step, found
        return found

    def metrics(self, name: str) -> list[tuple[int, float]]:
        """Return the steps and their rounds as they count at the end: of a step seen again, the last."""
        lines = [json.loads(line) for line in (self.folder(name) / "metrics.jsonl").read_text().splitlines()]
        return sorted({line["step"]: line["metrics"]["max_rounds"] for line in lines}.items())

    def folder(self, name: str) -> Path:
        """Return the run's folder."""
        return self.bench.root / "saves" / name

    def run(self, name: str) -> dict[str, Any]:
        """Return run.json."""
        found: dict[str, Any] = json.loads((self.folder(name) / "run.json").read_text())
        return found

    def container(self, name: str) -> str:
        """Return the name of the run's container."""
        return f"{self.bench.name}-train-{name}"


@pytest.fixture
def runs(bench: Workbench, server: str) -> Iterator[Runs]:
    """Return the means to start runs; their containers are removed."""
    yield Runs(bench, server)
    for container in bench.docker("ps", "-aq", "--filter", f"name={bench.name}-train-").split():
        bench.run("docker", "rm", "-f", container)


def test_the_whole_loop_ends_in_merged_evaluated_and_pruned_checkpoints(runs: Runs) -> None:
    """Started, trained, watched, resumed when there is nothing to resume: each by one command."""
    memory = "/workspace/saves/loop/memory"
    runs.start("loop", f"+standin.memory={memory}", "actor_rollout_ref.actor.optim.lr=1e-3")
    found = runs.ended("loop")
    assert (found["state"], found["step"], found["checkpoint"]) == ("finished", 4, 4), found
    assert [step for step, _ in runs.metrics("loop")] == [1, 2, 3, 4]
    folder = runs.folder("loop")
    assert "\x1b" not in (folder / "log/attempt-1.log").read_text()
    assert list((folder / "rollouts").glob("step4/[01].json")) and list(folder.glob("wandb/offline-run-*"))
    gateway = runs.bench.docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}")

    def respond(method: str, path: str, headers: Any, body: Any) -> Answer:
        if method == "GET":
            return Answer({"object": "list", "data": [{"id": f"loop-global_step_{step}"} for step in (2, 4)]})
        return Answer(completion("look"))

    with serving(respond, host="0.0.0.0") as model:
        runs.do("train.watch", "--name", "loop", "--once", "--runner", "docker", "--keep-last", "1", "--keep-every",
                "0", "--keep-best", "0", "--eval", "textcraft", "--limit", "2", "--endpoint",
                model.replace("127.0.0.1", gateway) + "/v1")
    for step in (2, 4):
        merged = load_file(folder / f"merged/global_step_{step}/model.safetensors")
        saved = load_file(folder / f"memory/global_step_{step}.safetensors")
        assert merged.keys() == saved.keys()
        assert all(torch.equal(merged[name], saved[name].to(merged[name].dtype)) for name in merged), step
    assert {path.name
            for path in folder.glob("global_step_*/actor/model_*.pt")
            } == {f"model_world_size_2_rank_{rank}.pt"
                  for rank in (0, 1)}
    assert not (folder / "global_step_2").exists() and (folder / "global_step_4").is_dir()
    curve = json.loads((folder / "eval/curve.json").read_text())
    assert [point["step"] for point in curve["points"]] == [2, 4]
    runs.do("train.plot", "--name", "loop")
    assert "nothing" in plainly(runs.bench, "train.resume", "--name", "loop").stdout
    assert len(runs.run("loop")["attempts"]) == 1


def test_a_run_survives_its_terminal_a_stop_and_a_restart_of_its_container(runs: Runs) -> None:
    """ScalingInter plays the rounds of an unbroken run all the while."""
    words = runs.words("broken",
                       "+standin.step_seconds=2",
                       steps=14,
                       flags=("--scaling-inter", "2,4,6", "--every", "2", "--attach"))
    terminal = Terminal(runs.bench, *plain_words(*words), env=plain_variables(runs.bench))
    terminal.wait_for("step:1 ")
    os.close(terminal.fd)
    os.waitpid(terminal.pid, 0)
    runs.reached("broken", 3)
    runs.do("train.stop", "--name", "broken")
    found = runs.status("broken")
    assert found["state"] == "stopped" and found["checkpoint"] >= 2, found
    stopped_at = found["checkpoint"]
    runs.do("train.resume", "--name", "broken")
    runs.reached("broken", stopped_at + 2)
    runs.bench.docker("restart", runs.container("broken"))
    found = runs.ended("broken")
    assert (found["state"], found["step"]) == ("finished", 14), found
    attempts = runs.run("broken")["attempts"]
    assert [one["state"] for one in attempts][-1] == "finished" and len(attempts) == 3, attempts
    assert attempts[1]["resumed_from"] == stopped_at and attempts[2]["resumed_from"] > stopped_at
    assert runs.metrics("broken") == list(zip(range(1, 15), [2, 2, 4, 4] + [6] * 10, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("cause", ["host_oom", "nccl_timeout", "disk_full", "ray_worker", "nan"])
def test_an_injected_death_is_named_within_30_seconds(runs: Runs, cause: str) -> None:
    fault = {"ray_worker": "worker"}.get(cause, cause)
    runs.start(cause, f"+standin.fault={fault}@4", "+standin.step_seconds=1", steps=40)
    if cause == "host_oom":
        runs.bench.docker("update", "--memory", "4g", "--memory-swap", "4g", runs.container(cause))
    runs.reached(cause, 3)
    found = runs.ended(cause, seconds=30)
    assert (found["state"], found["cause"]) == ("died", cause), found
    assert found["reason"] and found["remedy"], found
    assert found["step"] <= 5


@pytest.mark.slow
def test_an_environment_that_goes_is_named_within_30_seconds_and_nothing_more_is_learnt(runs: Runs) -> None:
    runs.start("gone", "+standin.step_seconds=2", steps=40)
    trained = runs.reached("gone", 3)["step"]
    servers = runs.bench.docker("ps", "-q", "--filter", "label=org.agentgym-rl.env=textcraft", "--filter",
                                f"label=com.docker.compose.project={runs.bench.name}").split()
    assert len(servers) == 1
    runs.bench.docker("kill", servers[0])
    try:
        found = runs.ended("gone", seconds=30)
    finally:
        runs.bench.docker("start", servers[0])
    assert (found["state"], found["cause"]) == ("died", "environment"), found
    assert found["reason"] and found["remedy"], found
    run = runs.run("gone")
    assert found["step"] <= trained + 2
    assert all(found["checkpoint"] < bad for bad in run["poisoned"]), run
    rewards = {path.parent.name: path for path in (runs.folder("gone") / "rollouts").glob("step*/0.json")}
    assert f"step{trained + 4}" not in rewards
