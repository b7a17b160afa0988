"""Training in containers, as a plain user: a stand-in trainer with real Hydra, Ray and FSDP plays a real server."""
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tasks.lib.host.ports import free_port
from tests.docker.workbench import ROOT, SOCKET, Workbench

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
TRAIN = [
    "data.train_file=AgentItemId/textcraft_train.json", "data.train_batch_size=4", "data.max_prompt_length=1024",
    "data.max_response_length=512", "actor_rollout_ref.agentgym.task_name=textcraft",
    "actor_rollout_ref.model.path=models/tiny", "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1", "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1", "trainer.n_gpus_per_node=2", "trainer.save_freq=2"
]


def plainly(bench: Workbench, *words: str, **options: str) -> subprocess.CompletedProcess[str]:
    """Run `invoke` as a plain user of this machine, who may use Docker."""
    argv = [sys.executable, "-m", "invoke", *words]
    if os.getuid() == 0:
        # Reading is for everybody: this Python, and the folders of the tests, may lie where only root can look.
        argv = [
            "setpriv", "--reuid",
            str(PLAIN), "--regid",
            str(PLAIN), "--groups",
            str(SOCKET.stat().st_gid), "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search", *argv
        ]
    return bench.run(*argv,
                     env={
                         "HOME": str(bench.root.parent / "home"),
                         "GIT_CONFIG_COUNT": "1",
                         "GIT_CONFIG_KEY_0": "safe.directory",
                         "GIT_CONFIG_VALUE_0": "*",
                         **ROWS
                     },
                     **options)


@pytest.fixture(scope="module")
def server(bench: Workbench, build: None) -> Iterator[str]:
    """Return the address, for containers, of a server that the trainer can play with; model and items are there too."""
    shutil.copytree(ROOT / FIXTURES, bench.root / FIXTURES)
    cpu = bench.root / "docker-compose.cpu.yml"
    without = cpu.read_text()
    cpu.write_text(without.replace("\n  train:\n    deploy: !reset null\n", CLAIMS))
    assert cpu.read_text() != without
    folders = [bench.root / "saves", bench.root / "models", bench.root / "AgentItemId", bench.root.parent / "home"]
    folders[-1].mkdir()
    modes = [folder.stat().st_mode for folder in folders]
    for folder in folders:
        folder.chmod(0o777)
    done = plainly(bench, "train.run", "--", "python", "-c", (ROOT / FIXTURES / "tiny_model.py").read_text(),
                   "models/tiny")
    assert done.returncode == 0, done.stderr
    items = [{"item_id": f"textcraft_{number}", "conversations": None} for number in range(48, 96)]
    (bench.root / "AgentItemId" / "textcraft_train.json").write_text(json.dumps(items))
    for words in (["build.env", "--env", "textcraft"], ["env.up", "--env", "textcraft", "--port", str(free_port())]):
        done = bench.invoke(*words, env=ROWS)
        assert done.returncode == 0, done.stderr
    found = re.search(r"in containers (http://\S+)", done.stdout)
    assert found, done.stdout
    yield found[1]
    bench.invoke("env.down", "--env", "textcraft", env=ROWS)
    cpu.write_text(without)
    for folder, mode in zip(folders, modes, strict=True):
        folder.chmod(mode)


def test_a_plain_user_trains_by_hand_and_all_that_is_written_stays(bench: Workbench, server: str) -> None:
    """Upstream's own folder is root's: Hydra's folder there, wandb's offline run and Ray's logs go to saves/."""
    words = " ".join([
        *TRAIN, "algorithm.adv_estimator=grpo", "trainer.default_local_dir=saves/by-hand",
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
