"""train.check, train.start and train.resume as a user types them, with a trainer that trains nothing."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fixtures.invoking import invoke as run_invoke
from tests.fixtures.project import copy_project
from tests.fixtures.standins import serving
from tests.training import places

FAST = [
    "data.train_batch_size=4", "actor_rollout_ref.rollout.n=2", "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "data.max_prompt_length=1024", "trainer.save_freq=2", "trainer.logger=[console]"
]


@dataclass
class Bench:
    """A copy of the project, sources, a model and an environment's address."""
    root: Path
    env: dict[str, str]
    words: list[str]
    url: str

    def invoke(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `invoke`."""
        return run_invoke(*words, cwd=self.root, env={**self.env, **variables})

    def train(self, task: str, *words: str, typed: tuple[str, ...] = (),
              **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a task of training with flags that make a good run, `words` over them."""
        flags = dict(zip(self.words[::2], self.words[1::2], strict=True))
        flags.update(zip(words[::2], words[1::2], strict=True))
        return self.invoke(task, *(word for pair in flags.items() for word in pair if pair[1]), "--", *FAST, *typed,
                           **variables)

    def run_json(self, name: str) -> dict:
        """Return a run's run.json."""
        return json.loads((self.root / "saves" / name / "run.json").read_text())

    def wait(self, name: str) -> dict:
        """Return run.json when the run's last attempt has ended."""
        end = time.monotonic() + 90
        while time.monotonic() < end:
            run = self.run_json(name)
            if run["attempts"] and run["attempts"][-1]["ended"]:
                return run
            time.sleep(0.2)
        raise AssertionError(self.run_json(name))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("train")
    root = copy_project(folder / "project")
    places.items(root / "AgentItemId" / "babyai_train.json")
    model = places.model(folder / "tiny")
    environ = {
        name: value
        for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_", "CUDA_VISIBLE"))
    }
    environ |= places.sources(folder) | {"RAY_OVERRIDE_RESOURCES": '{"CPU": 8, "GPU": 2}'}
    with serving(places.babyai) as url:
        yield Bench(root, environ, [
            "--runner", "local", "--python", sys.executable, "--env", "babyai", "--model",
            str(model), "--server", url, "--rounds", "3", "--steps", "4", "--name", "run1"
        ], url)


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what a task said of what is wrong."""
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if ": not checked: " not in line]


def test_a_good_run_is_checked_started_and_told_when_it_is_done(bench: Bench) -> None:
    checked = bench.train("train.check")
    assert checked.returncode == 0 and "checks passed" in checked.stdout, checked.stderr
    assert not (bench.root / "saves" / "run1").exists(), "a check writes nothing"
    started = bench.train("train.start")
    assert started.returncode == 0, started.stderr
    assert "run1 runs in the background, 4 steps: `invoke train.status --name run1`" in started.stdout
    run = bench.wait("run1")
    assert [one["state"] for one in run["attempts"]] == ["finished"] and run["attempts"][0]["last_step"] == 4
    folder = str(bench.root / "saves" / "run1")
    assert run["folder"] == run["cwd"] == folder and run["command"][1:] == ["-u", "-m", "verl.agent_trainer.main_ppo"]
    assert {
        "trainer.total_training_steps=5", "trainer.n_gpus_per_node=2", f"hydra.run.dir={folder}/hydra",
        f"actor_rollout_ref.agentgym.env_addr={bench.url}"
    } <= set(run["overrides"])
    assert (run["world_size"], run["steps"], run["save_freq"], run["algorithm"]) == (2, 4, 2, "grpo")
    assert run["environment"] == {
        "name": "babyai",
        "url": bench.url,
        "prefix": "",
        "replicas": 1,
        "started_by_run": False
    }
    assert run["resolved"]["trainer"]["n_gpus_per_node"] == 2 and run["resolved"]["actor_rollout_ref"]["rollout"][
        "prompt_length"] == 1024
    assert run["presets"] == ["babyai.fixed"] and run["variables"]["WANDB_DIR"] == folder and not run["secrets"]
    again = bench.train("train.start")
    assert again.returncode == 0 and "run1 is finished after 4 steps; nothing is trained" in again.stdout
    assert "is finished after 4 steps" in bench.invoke("train.resume", "--name", "run1").stdout
    other = bench.train("train.start", "--rounds", "5", typed=("data.seed=7", ))
    assert other.returncode == 2 and lines(other) == [
        "train.start: run1 is there, finished, with another configuration (algorithm.rounds_ctrl.rounds: 3, now 5; data.seed: not "
        "set, now 7); choose another --name"
    ]
    assert len(bench.run_json("run1")["attempts"]) == 1


def test_a_finished_run_goes_on_to_more_steps(bench: Bench) -> None:
    started = bench.train("train.start", "--name", "longer")
    assert started.returncode == 0, started.stderr
    bench.wait("longer")
    again = bench.train("train.start", "--name", "longer", "--steps", "6")
    assert again.returncode == 2 and lines(again) == [
        "train.start: longer is there with another number of steps (trainer.total_training_steps: 5, now 7); to go on to 6, "
        "`invoke train.resume --name longer --steps 6`"
    ]
    less = bench.invoke("train.resume", "--name", "longer", "--steps", "4")
    assert less.returncode == 2 and lines(less) == ["train.resume: --steps 4: longer has trained 4 steps; name more"]
    more = bench.invoke("train.resume", "--name", "longer", "--steps", "6")
    assert more.returncode == 0 and "longer runs in the background, 6 steps" in more.stdout, more.stderr
    end = time.monotonic() + 90
    while len(bench.run_json("longer")["attempts"]) < 2 and time.monotonic() < end:
        time.sleep(0.2)
    run = bench.wait("longer")
    assert [(one["state"], one["last_step"]) for one in run["attempts"]] == [("finished", 4), ("finished", 6)]
    assert run["steps"] == 6 and "trainer.total_training_steps=7" in run["overrides"]
    assert run["resolved"]["trainer"]["total_training_steps"] == 7


def test_a_run_that_died_goes_on_from_its_newest_checkpoint(bench: Bench) -> None:
    once = bench.root / "once"
    started = bench.train("train.start",
                          "--name",
                          "dies",
                          "--steps",
                          "6",
                          typed=("+fake.do=unknown", "+fake.at=5", f"+fake.once={once}"))
    assert started.returncode == 0, started.stderr
    assert bench.wait("dies")["attempts"][0]["state"] == "died"
    resumed = bench.invoke("train.resume", "--name", "dies")
    assert resumed.returncode == 0, resumed.stderr
    assert "goes on from global_step_4; its data.pt brings that attempt's data loader along" in resumed.stdout
    end = time.monotonic() + 90
    while len(bench.run_json("dies")["attempts"]) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    run = bench.wait("dies")
    assert [(one["state"], one["resumed_from"]) for one in run["attempts"]] == [("died", None), ("finished", 4)]


def test_attached_it_shows_the_log_until_the_end(bench: Bench) -> None:
    done = bench.invoke("train.start", *bench.words[:-1], "attached", "--attach", "--", *FAST)
    assert done.returncode == 0 and "step:4 - " in done.stdout, done.stdout + done.stderr
    assert done.stdout.endswith("train.start: attached is finished after 4 steps\n")


def test_attached_it_tells_that_the_run_died(bench: Bench) -> None:
    done = bench.invoke("train.start", *bench.words[:-1], "falls", "--attach", "--", *FAST, "+fake.do=unknown",
                        "+fake.at=3")
    assert done.returncode == 1 and "step:2 - " in done.stdout, done.stdout + done.stderr
    assert lines(done) == [
        "train.start: falls: died of unknown; exit code 3: RuntimeError: something nobody has seen before; the last lines may "
        "tell; `invoke train.resume --name falls` goes on"
    ]


def test_whoever_stops_following_is_told_that_the_run_goes_on(bench: Bench) -> None:
    words = ["train.start", *bench.words[:-1], "goes-on", "--attach", "--", *FAST, "+fake.seconds=1"]
    follower = subprocess.Popen([sys.executable, "-m", "invoke", *words],
                                cwd=bench.root,
                                env=bench.env,
                                stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE,
                                text=True)
    assert follower.stdout is not None
    assert any("Training from scratch" in line for line in follower.stdout)
    follower.send_signal(signal.SIGINT)
    _, said = follower.communicate(timeout=60)
    assert follower.returncode == 130 and said.splitlines()[-2:] == [
        "train.start: goes-on goes on; `invoke train.stop --name goes-on` ends it", "train.start: interrupted"
    ]
    assert bench.wait("goes-on")["attempts"][0]["state"] == "finished"


TWELVE = {
    "algorithm": ("algorithm.adv_estimator=rloo", ),
    "batch": ("data.train_batch_size=5", ),
    "mini_batch": ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", ),
    "fsdp_size": ("actor_rollout_ref.actor.fsdp_config.fsdp_size=2", ),
    "rounds": ("algorithm.rounds_ctrl.rounds=[1,2]", ),
    "logger": ("trainer.logger=[console,tensorboard]", ),
    "saving": ("trainer.save_freq=0", ),
    "folder": ("trainer.default_local_dir=saves/other", ),
    "prompt_length": ("data.max_prompt_length=16", ),
    "dtype": ("actor_rollout_ref.rollout.dtype=int4", ),
    "rollout": ("data.return_raw_chat=False", ),
    "environment": (),
}


def test_twelve_faults_at_once_are_twelve_lines(bench: Bench) -> None:
    typed = [word for words in TWELVE.values() for word in words]
    kept = [word for word in FAST if word.split("=")[0] not in {one.split("=")[0] for one in typed}]
    flags = [*bench.words[:-4], "--name", "x"]
    flags[flags.index("--server") + 1] = "http://127.0.0.1:9"
    done = bench.invoke("train.check", *flags, "--", *kept, *typed)
    said = lines(done)
    assert done.returncode == 2 and sorted(line.split(": ")[1] for line in said) == sorted(TWELVE), done.stderr
    assert all("; expected " in line for line in said)
    told = bench.invoke("train.check", "--json", *flags, "--", *kept, *typed)
    report = json.loads(told.stdout)
    assert told.returncode == 2 and not report["ok"] and not told.stderr.strip(), told.stderr
    assert sorted(one["id"] for one in report["findings"]) == sorted(TWELVE)
    assert all(set(one) == {"id", "expected", "actual", "remedy"} and all(one.values()) for one in report["findings"])
    skipped = bench.invoke("train.check", "--skip", ",".join(TWELVE), *flags, "--", *kept, *typed)
    assert skipped.returncode == 0 and "left out: " in skipped.stderr, skipped.stderr


@pytest.mark.parametrize(("words", "typed", "line"), [
    (("--gpus", "none"), (), "--gpus none: training needs GPUs"),
    (("--gpus", "two"), (), "--gpus 'two' is no choice"),
    (("--runner", "podman"), (), "--runner podman is none"),
    (("--shm-size", "8g"), (), "--shm-size is for --runner docker"),
    (("--python", "/nowhere/python"), (), "--python /nowhere/python is no program"),
    (("--skip", "gpu"), (), "--skip gpu: there is no such check"),
    (("--name", "a/b"), (), "--name 'a/b' is no name"),
    (("--env", "babyia"), (), "no environment 'babyia'"),
    (("--replicas", "0"), (), "--replicas 0 is no whole number"),
    (("--server", "babyai:36003"), (), "environment: "),
    (("--script", "nowhere.sh"), (), "--script nowhere.sh: No such file"),
    (("--model", "models/none"), (), "model: "),
    ((), ("train_batch_size", ), "is no override"),
    ((), ("data.nothing=1", ), "hydra: "),
    ((), ("data.train_file=nowhere.json", ), "items: "),
])
def test_misuse_is_one_line_with_exit_code_2(bench: Bench, words: tuple[str, ...], typed: tuple[str, ...],
                                             line: str) -> None:
    done = bench.train("train.check", *words, typed=typed)
    said = lines(done)
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith(
        "train.check: ") and line in said[0], done.stderr


@pytest.mark.parametrize(("words", "line"), [
    (("train.resume", ), "which run?"),
    (("train.resume", "--name", "nowhere"), "no run 'nowhere'"),
    (("train.resume", "--name", "x", "--wait", "soon"), "--wait soon is no whole number"),
    (("train.resume", "--name", "x", "--steps", "9" * 14), f"--steps {'9' * 14} is more than 1000000000; give less"),
    (("train.start", "--env", "babyai", "--runner", "docker", "--shm-size", "big"), "--shm-size 'big' is no size; write it as 512m or 32g"),
    (("train.watch", "--name", "x"), "no run 'x'"),
    (("data.fetch", "--env", "nope"), "no environment 'nope'"),
    (("train.resume", "--name", "x", "--steps", "0"), "--steps 0 is no whole number"),
    (("train.start", "--env", "babyai", "--retries", "-1"), "--retries -1 is no whole number"),
    (("train.start", "--env", "babyai", "--on-env-loss", "pray"), "--on-env-loss pray is no choice"),
    (("train.start", "--env", "babyai", "--stop-seconds", "0"), "--stop-seconds 0 is no whole number"),
])
def test_misuse_of_start_and_resume(bench: Bench, words: tuple[str, ...], line: str) -> None:
    done = bench.invoke(*words)
    assert done.returncode == 2 and len(lines(done)) == 1 and line in done.stderr, done.stderr


def test_a_run_that_loads_its_model_is_left_alone(bench: Bench) -> None:
    """Minutes go by before the first step: it is started, and neither a second start nor a resume touches it."""
    started = bench.train("train.start", "--name", "loads", typed=("+fake.seconds=30", ))
    assert started.returncode == 0, started.stderr
    try:
        assert json.loads(bench.invoke("train.status", "--name", "loads", "--json").stdout)["state"] == "starting"
        again = bench.train("train.start", "--name", "loads", typed=("+fake.seconds=30", ))
        assert again.returncode == 0 and "loads runs already" in again.stdout, again.stderr
        resumed = bench.invoke("train.resume", "--name", "loads")
        assert resumed.returncode == 0 and "loads runs already" in resumed.stdout, resumed.stderr
        other = bench.train("train.start", "--name", "loads", typed=("+fake.seconds=31", ))
        assert other.returncode == 2 and "or see it: `invoke train.status --name loads`" in other.stderr
        assert len(bench.run_json("loads")["attempts"]) == 1
    finally:
        assert bench.invoke("train.stop", "--name", "loads", "--now").returncode == 0


def test_replicas_count_as_the_user_says_where_the_user_gives_the_address(bench: Bench) -> None:
    """The remedy of the rule about sessions works when it is typed."""
    words = [{"babyai": "sciworld"}.get(word, word) for word in bench.words]
    sizes = [word for word in FAST if "batch_size=4" not in word] + ["data.train_batch_size=20"]
    short = bench.invoke("train.check", *words, "--", *sizes)
    assert "sessions: 16 with 1 replica; expected room for 41 sessions" in short.stderr
    assert "use --replicas 3, where so many are behind --server" in short.stderr
    assert "sessions:" not in bench.invoke("train.check", *words, "--replicas", "3", "--", *sizes).stderr


def test_dry_prints_what_would_run_and_writes_nothing(bench: Bench) -> None:
    before = sorted((bench.root / "saves").iterdir())
    done = bench.invoke("--dry", "train.start", *bench.words[:-1], "dry", "--", *FAST)
    trainer, supervisor = done.stdout.splitlines()
    assert done.returncode == 0 and trainer.startswith(
        f"{sys.executable} -u -m verl.agent_trainer.main_ppo algorithm.adv_estimator=grpo ")
    assert "'trainer.logger=[console]'" in trainer and f"trainer.default_local_dir={bench.root}/saves/dry" in trainer
    assert supervisor == f"{sys.executable} -m training run {bench.root}/saves/dry"
    watched = bench.invoke("--dry", "train.start", *bench.words[:-1], "dry", "--watch", "--watch-flags=--keep-last=3",
                           "--", *FAST)
    assert watched.stdout.splitlines()[:2] == [trainer, supervisor]
    assert watched.stdout.splitlines()[2:] == [f"{sys.executable} -m invoke train.watch --name=dry --keep-last=3"]
    assert sorted((bench.root / "saves").iterdir()) == before


def test_a_script_is_taken_with_what_a_run_puts_right(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "mine.sh").write_text(
        "export WANDB_BASE_URL=https://x.example\nconda activate y\nwandb login secretkey\n"
        "WANDB_MODE=online python3 -m verl.agent_trainer.main_ppo data.train_batch_size=6 "
        "actor_rollout_ref.agentgym.task_name=babyai actor_rollout_ref.model.path=models/none "
        "trainer.default_local_dir=saves/test trainer.experiment_name=test trainer.project_name=xxx\n")
    done = bench.invoke("--dry", "train.start", "--runner", "local", "--python", sys.executable, "--name", "s",
                        "--server", bench.url, "--script", str(tmp_path / "mine.sh"))
    assert done.returncode == 0, done.stderr
    assert "mine.sh: left out conda, wandb login; not taken WANDB_BASE_URL, WANDB_MODE" in done.stderr
    assert "secretkey" not in done.stdout + done.stderr
    sent = done.stdout.splitlines()[0].split("main_ppo ")[1].split()
    assert sent[:2] == ["data.train_batch_size=6", "actor_rollout_ref.agentgym.task_name=babyai"]
    assert {
        f"trainer.default_local_dir={bench.root}/saves/s", "trainer.experiment_name=s",
        "trainer.project_name=agentgym-rl-babyai", f"actor_rollout_ref.model.path={bench.root}/models/none"
    } <= set(sent)


def test_the_log_and_the_list_have_no_key_and_the_trainer_gets_ours_alone(bench: Bench) -> None:
    secret = {"WANDB_API_KEY": "wandb-key-1234", "HF_TOKEN": "hf_key_1234", "OPENAI_API_KEY": "sk-key-1234"}
    done = bench.train("train.start", "--name", "keys", **secret)
    assert done.returncode == 0, done.stderr
    bench.wait("keys")
    written = "".join(
        path.read_text(errors="replace") for path in (bench.root / "saves" / "keys").rglob("*") if path.is_file())
    assert not any(value in written + done.stdout + done.stderr for value in secret.values())


def test_a_watcher_beside_a_run(bench: Bench) -> None:
    words = ["train.start", *bench.words[:-1], "watched", "--watch"]
    for flags, said in (("--keep-last=0", "--keep-last 0 is no whole number of at least 1"), ("--evil", "No idea what '--evil' is!"),
                        ("--once", "--once has no place beside a run that is started"), ("--eval=chess", "--eval chess: no such environment"),
                        ("--eval='x", "No closing quotation"), ("--dtype=int3", "--dtype int3 is none; choose one of bfloat16"),
                        ("--eval=demo --limit=abc", "--limit: abc is no whole number"), ("--gpus=0", "--gpus is about evaluations"),
                        ("--eval=demo --engine=foo", "unknown engine 'foo'"), ("--runner=nope", "unknown runner 'nope'")):  # yapf: disable
        refused = bench.invoke(*words, f"--watch-flags={flags}", "--", *FAST)
        assert refused.returncode == 2 and len(lines(refused)) == 1 and said in refused.stderr
    beside = bench.root / "bin" / "nvidia-smi"  # a machine with GPUs
    beside.parent.mkdir()
    beside.write_text("#!/bin/sh\n")
    beside.chmod(0o755)
    for gpus, said in (("", "the run trains on the GPUs all"), (" --gpus=0",
                                                                "--gpus 0: the run trains on the GPUs all")):
        refused = bench.invoke(*words,
                               f"--watch-flags=--eval=demo{gpus}",
                               "--",
                               *FAST,
                               PATH=f"{beside.parent}:{bench.env['PATH']}")
        assert refused.returncode == 2 and f"--watch-flags: {said}" in refused.stderr and len(lines(refused)) == 1
    assert not (bench.root / "saves" / "watched").exists()
    started = bench.invoke(*words, "--watch-flags=--runner=local --keep-all", "--", *FAST)
    assert started.returncode == 0 and "its checkpoints are watched" in started.stdout, started.stderr
    try:
        bench.wait("watched")
        events, end = bench.root / "saves" / "watched" / "events.jsonl", time.monotonic() + 90
        while '"event": "failed"' not in events.read_text():  # the stand-in's shards hold no weights
            assert time.monotonic() < end, (bench.root / "saves" / "watched" / "log" / "watch.log").read_text()
            time.sleep(0.2)
        again = bench.invoke("train.watch", "--name", "watched")
        assert again.returncode == 2 and "watched is followed already" in again.stderr
    finally:
        stopped = bench.invoke("train.watch", "--name", "watched", "--stop")
    assert "to stop; it goes on where it was" in stopped.stdout
