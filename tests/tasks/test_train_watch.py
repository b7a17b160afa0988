"""`invoke train.watch`: its flags, and the whole loop with real shards, the real merger, a served model and the real runner."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tasks.lib.errors import UserError
from tasks.lib.training import follow, hands, runs
from tasks.lib.training.hands import InvokeHands, gpu_clash
from tasks.lib.training.watching import Failed, Going, Plan
from tests.fixtures.dripping import dripping, within
from tests.fixtures.invoking import invoke as run_invoke
from tests.fixtures.project import copy_project
from tests.fixtures.standins import Answer, completion, serving
from tests.merger.fsdp_samples import write_samples
from tests.training.runs import archive, checkpoint, write_run
from training import checkpoints, curve, machine
from training.folder import RunFolder
from training.lease import Lease
from training.retention import Rules

KNOWN = ("demo", "textcraft", "babyai")
RUNNING, ENDED = Going(False, "running", 3, ()), Going(True, "finished", None, ())

# --- what was asked for ---


def test_the_rules_of_the_flags():
    assert follow.rules_of("", "", "", "", False) == Rules(2, 100, 1, 2, False)
    assert follow.rules_of("", "", "", "", False, evaluated=False) == Rules(2, 100, 0, 2, False)
    assert follow.rules_of("3", "0", "0", "1", True) == Rules(3, 0, 0, 1, True)
    assert follow.rules_of("3", "", "", "", False).keep_optimizer == 3


@pytest.mark.parametrize("flags, said", [
    (("0", "", "", ""), "--keep-last 0 is no whole number of at least 1"),
    (("x", "", "", ""), "--keep-last x is no whole number of at least 1"),
    (("", "-1", "", ""), "--keep-every -1 is no whole number of at least 0"),
    (("", "", "1.5", ""), "--keep-best 1.5 is no whole number of at least 0"),
    (("", "", "", "0"), "--keep-optimizer 0 is no whole number of at least 1"),
])
def test_a_number_that_is_none(flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        follow.rules_of(*flags, False)


def test_the_best_of_what_is_not_evaluated_is_refused():
    with pytest.raises(UserError, match="--keep-best 2 needs evaluations; say of what with --eval"):
        follow.rules_of("", "", "2", "", False, evaluated=False)
    assert follow.rules_of("", "", "0", "", False, evaluated=False).keep_best == 0


def test_the_plans_of_the_flags():
    plans = follow.plans_of("textcraft, babyai", KNOWN, {"limit": "20", "seed": "", "items": "0-9"})
    assert plans == (Plan("textcraft", ("--limit=20", "--items=0-9")), Plan("babyai", ("--limit=20", "--items=0-9")))
    assert plans[0].digest == plans[1].digest != Plan("textcraft").digest and re.fullmatch("[0-9a-f]{6}", plans[0].digest)
    assert follow.plans_of("", KNOWN, {"limit": ""}) == ()


@pytest.mark.parametrize("environments, flags, said", [
    ("textcarft", {}, "--eval textcarft: no such environment; choose of demo, textcraft, babyai"),
    ("demo,demo", {}, "--eval names demo twice"),
    ("", {"max_tokens": "5"}, "--max-tokens is about evaluations; say of what with --eval"),
])  # yapf: disable
def test_plans_that_cannot_be(environments, flags, said):
    with pytest.raises(UserError, match=said):
        follow.plans_of(environments, KNOWN, flags)


def test_the_servers_of_the_flag():
    assert follow.servers_of("", ["demo"]) == {}
    assert follow.servers_of("http://h:1", ["demo"]) == {"demo": "http://h:1"}
    assert follow.servers_of("demo=http://h:1,babyai=http://h:2", ["babyai", "demo"]) == {"demo": "http://h:1", "babyai": "http://h:2"}
    for text, names, said in (("http://h:1", ["demo", "babyai"], "write demo=http://…,babyai=http://…"), ("http://h:1", [], "--eval, too"),
                              ("maze=http://h:1", ["demo"], "'maze=http://h:1'"), ("demo=h:1", ["demo"], "ENV=http://HOST:PORT")):
        with pytest.raises(UserError, match=re.escape(said)):
            follow.servers_of(text, names)


@pytest.mark.parametrize("endpoint, name, said", [
    ("", "x-{step}", "give --endpoint too"),
    ("h:1", "", "is no address"),
    ("http://h:1/v1", "checkpoint", "the same at each step"),
    ("http://h:1/v1", "{stop}", "neither {run} nor {step}"),
    ("http://h:1/v1", "{step", "neither {run} nor {step}"),
])
def test_an_endpoint_that_cannot_be(endpoint, name, said):
    with pytest.raises(UserError, match=re.escape(said)):
        follow.check_endpoint(endpoint, name, "run1")


def test_a_run_is_found_by_its_name_whoever_started_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "saves", lambda: tmp_path)
    write_run(tmp_path / "run1")
    checkpoint(tmp_path / "by-hand", 25)
    (tmp_path / "empty").mkdir()
    for name in ("run1", "by-hand"):
        assert follow.run_folder(name).path == tmp_path / name
    assert follow.run_folder("").name == "run1"
    for name in ("run2", "empty", "../run1", "a" * 65):
        with pytest.raises(UserError, match=f"no run '{name}' in .*; there are run1"):
            follow.run_folder(name)


@pytest.mark.parametrize("wanted, endpoint, used, going, here, nvidia, clash", [
    ("", "", "all", RUNNING, True, True, "the run trains on the GPUs all"),
    ("", "", "0,1", RUNNING, True, True, "the run trains on the GPUs 0,1"),
    ("1,2", "", "0,1", RUNNING, True, True, "--gpus 1,2: the run trains on the GPUs 0,1"),
    ("7", "", "all", RUNNING, True, True, "--gpus 7: the run trains on the GPUs all"),
    ("all", "", "0", RUNNING, True, True, "--gpus all: the run trains"),
    ("2,3", "", "0,1", RUNNING, True, True, ""),
    ("none", "", "all", RUNNING, True, True, ""),
    ("", "http://h/v1", "all", RUNNING, True, True, ""),
    ("", "", "all", ENDED, True, True, ""),
    ("", "", "all", RUNNING, False, True, ""),
    ("", "", "all", RUNNING, True, False, ""),
    ("", "", "none", RUNNING, True, True, ""),
])
def test_an_evaluation_takes_no_gpu_from_the_trainer(wanted, endpoint, used, going, here, nvidia, clash):
    said = gpu_clash(wanted, endpoint, used, going, here, nvidia)
    assert said.startswith(clash) and bool(said) == bool(clash)
    assert not said or "--gpus none" in said


def test_the_command_lines():
    plan = Plan("demo", ("--limit=2", ))
    local = InvokeHands("run1", "local", "local", gpus="6,7", words=("--engine=vllm", ), servers={"demo": "http://h:1"})
    assert local.merge_words(Path("/s/actor"), Path("/t")) == ["merge", "--local-dir=/s/actor", "--save-dir=/t", "--verify", "--force", "--runner=local"]
    assert local.eval_words(Path("/t"), 4, plan, Path("/o")) == [
        "eval", "--env=demo", "--out=/o", "--runner=local", "--limit=2", "--checkpoint=/t", "--server=http://h:1", "--engine=vllm"
    ]
    assert local.check_words(plan) == [
        "eval", "--env=demo", "--check", "--runner=local", "--limit=2", "--model=checkpoint", "--base-url=http://checkpoint/v1", "--server=http://h:1", "--json"
    ]
    assert local.environment()["CUDA_VISIBLE_DEVICES"] == "6,7"
    docker = InvokeHands("run1", "docker", "docker", gpus="6,7", dtype="float32")
    assert docker.merge_words(Path("/s"), Path("/t"))[-3:] == ["--runner=docker", "--gpus=none", "--dtype=float32"]
    assert docker.eval_words(Path("/t"), 4, plan, Path("/o"))[-2:] == ["--checkpoint=/t", "--gpus=6,7"]
    assert docker.environment() == dict(os.environ)
    given = InvokeHands("run1", "local", "docker", endpoint="http://h/v1")
    assert given.eval_words(Path("/t"), 4, plan, Path("/o"))[-2:] == ["--model=run1-global_step_4", "--base-url=http://h/v1"]


@pytest.mark.parametrize("flags, said", [
    ("--limit=x", "--limit: x is no whole number"),
    ("--samples=0", "--samples: 0 is not at least 1"),
    ("--temperature=9", "--temperature 9 is no number from 0 to 5, nor none, which leaves it out"),
    ("--items=nope", "items of --items: 'nope' has no number at its end"),
    ("--concurrency=-1", "--concurrency: -1 is below 0"),
    ("--runner=docker --endpoint=http://127.0.0.1:9/v1",
     "127.0.0.1, the host of --base-url, would be the container itself; give an address that it can reach, or use --runner local"),
])  # yapf: disable
def test_a_wrong_flag_of_the_evaluation_is_told_before_anything_starts_and_by_the_task_that_was_typed(project, run, flags, said):
    flags = flags if "--runner" in flags else f"--runner=local {flags}"
    refused = invoke(project, "train.watch", "--name=run1", "--eval=demo", *flags.split())
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", f"train.watch: {said}\n")
    assert not (run.path / "watch.lock").exists() and not run.watch_json.exists()
    beside = invoke(project, "train.start", "--env=babyai", "--watch", f"--watch-flags=--eval=demo {flags}")
    assert (beside.returncode, beside.stdout, beside.stderr) == (2, "", f"train.start: --watch-flags: {said}\n")


def test_nothing_goes_to_wandb_unasked(tmp_path, monkeypatch):
    called = []

    def invoke(self, words, log, env, nice=0):
        called.append(words)
        log.write_text("train.sync: 1 uploaded to https://api.wandb.ai\nfigures of 2 checkpoints are in wandb's run x\n")

    monkeypatch.setattr(InvokeHands, "_invoke", invoke)
    assert InvokeHands("run1", "local", "local").publish(tmp_path / "log") == "" and called == []
    told = InvokeHands("run1", "local", "local", wandb_runner="auto").publish(tmp_path / "log")
    assert told == "figures of 2 checkpoints are in wandb's run x" and called == [["train.sync", "--name=run1", "--runner=auto", "--figures"]]


def test_why_a_program_failed_is_its_own_line(tmp_path):
    log = tmp_path / "log"
    log.write_text("Loading\nmerge: x is NaN\n\nsome warning\n")
    assert hands.reason(log, 2) == f"merge: x is NaN (exit code 2; {log})"
    log.write_text("Loading\nand so on\n")
    assert hands.reason(log, -9) == f"and so on (killed by SIGKILL; {log})"
    assert hands.reason(tmp_path / "none", 1).startswith("it said nothing (exit code 1")


def test_a_program_dies_with_its_watcher(tmp_path):
    driver = "import sys; from pathlib import Path; from tasks.lib.training.hands import run_tethered; run_tethered(['-c', sys.argv[2]], Path(sys.argv[1]))"
    inner = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", driver, str(tmp_path / "log"), inner], cwd=Path(__file__).parents[2])
    while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text().endswith("\n"):
        time.sleep(0.05)
    pid = int((tmp_path / "log").read_text())
    assert psutil.pid_exists(pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("body, said", [
    ({"data": [{"id": "base"}]}, "serves base and no run1-global_step_4; serve the merged model under that name"),
    ({"data": []}, "serves nothing and no run1-global_step_4"),
    ({}, "/models cannot be read"),
    (b"[" * 200_000, "/models cannot be read"),
    ({"data": [{"id": "a\x1b[2J\n"}]}, r"serves a\\x1b\[2J\\n and no"),
    (b"no JSON", "/models cannot be read"),
])
def test_an_endpoint_that_has_not_the_model_evaluates_nothing(body, said):
    with serving(lambda method, path, headers, sent: Answer(body)) as url, pytest.raises(Failed, match=said):
        hands.check_served(url + "/v1", "run1-global_step_4")
    with serving(lambda method, path, headers, sent: Answer({"data": [{"id": "run1-global_step_4"}]})) as url:
        hands.check_served(url + "/v1/", "run1-global_step_4")


@pytest.mark.parametrize("kind", ["header", "continue", "body", "error"])
def test_an_endpoint_that_drips_holds_nobody_up(kind, monkeypatch):
    monkeypatch.setattr(hands, "ASK_SECONDS", 1.0)
    with dripping(kind) as url, within(10), pytest.raises(Failed, match="/models cannot be read"):
        hands.check_served(url + "/v1", "run1-global_step_4")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_goes_to_no_host_that_an_endpoint_names(status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    asked: list[str] = []

    def elsewhere(method, path, headers, sent):
        asked.append(path)
        return Answer({"data": [{"id": "run1-global_step_4"}]})

    there = lambda *_: Answer({}, status, {"location": f"{other}/models"})  # noqa: E731
    with serving(elsewhere) as other, serving(there) as url, pytest.raises(Failed, match="cannot be read"):
        hands.check_served(url + "/v1", "run1-global_step_4")
    assert not asked


def test_a_watcher_that_follows_the_run_already_goes_on(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run1")
    write_run(run.path)
    started: list[list[str]] = []

    def launch(run: RunFolder, words: list[str]) -> tuple[int, Path]:
        started.append(words)
        (tmp_path / "log").write_text("train.watch: the run trains on the GPUs all\n")
        return 2**22 + 1, tmp_path / "log"

    monkeypatch.setattr(follow, "launch", launch)
    held = Lease(run.path / follow.LOCK)
    held.take()
    assert "watches its checkpoints already" in follow.launch_beside(run, ["--eval=demo"]) and not started
    held.release()
    with pytest.raises(UserError, match=r"run1 is started, but its watcher is not: the run trains on the GPUs all; mended, `invoke train.watch --name run1`"):
        follow.launch_beside(run, ["--eval=demo"])


# --- the whole loop ---


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """An actor's folder that real FSDP wrote."""
    return write_samples(tmp_path_factory.mktemp("sample"), {"one": "--strategy fsdp1 --world-size 2"})["one"].actor


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return copy_project(tmp_path_factory.mktemp("watch") / "project")


def save(run: RunFolder, step: int, sample: Path) -> None:
    """Write a checkpoint as the trainer does."""
    shutil.copytree(sample, run.checkpoint(step) / "actor", copy_function=shutil.copyfile,
                    ignore=shutil.ignore_patterns("*.safetensors", "merge.json"))  # yapf: disable
    archive(run.checkpoint(step) / "data.pt")
    run.tracker.write_text(str(step))


@pytest.fixture
def run(project) -> Iterator[RunFolder]:
    found = RunFolder(project / "saves" / "run1")
    write_run(found.path, attempts=[{"number": 1, "ended": 1.0, "state": "finished"}])
    yield found
    shutil.rmtree(found.path)


def invoke(project: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    ours = ("ENV", "ENV_PORT", "MODEL", "MAX_ROUND", "OPENAI_BASE_URL", "ENVIRONMENTS", "AGENTGYM_SRC")
    env = {**{name: value for name, value in os.environ.items() if name not in ours}, "OPENAI_API_KEY": "sk-of-the-test", **variables}
    return run_invoke(*words, cwd=project, env=env, timeout=400)


@pytest.mark.slow
def test_shards_become_models_a_curve_and_room(project, run, sample):
    for step in (2, 4, 6):
        save(run, step, sample)
    rank = run.checkpoint(4) / "actor" / "model_world_size_2_rank_1.pt"
    data = bytearray(rank.read_bytes())
    data[len(data) // 2] ^= 1  # as long as before: a bit of a weight, which its checksum tells
    rank.write_bytes(data)
    archive(run.checkpoint(4) / "data.pt")
    words = ["--name=run1", "--eval=demo", "--limit=2", "--max-round=2", "--max-tokens=8", "--runner=local", "--keep-last=1", "--keep-every=0"]
    dry = invoke(project, "--dry", "train.watch", *words)
    assert dry.returncode == 0 and dry.stdout.count(": merge ") == 3 and dry.stdout.count("evaluate on demo --limit=2") == 3, dry.stderr
    assert sorted(path.name for path in run.path.iterdir()) == ["global_step_2", "global_step_4", "global_step_6", "latest_checkpointed_iteration.txt",
                                                                "run.json"]  # yapf: disable
    done = invoke(project, "train.watch", *words, "--once")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("train.watch: merge 4: merge: "), done.stdout + done.stderr
    assert "step 4: not merged, so it is kept: merge: " in done.stdout and "step 2: merged and verified" in done.stdout
    assert checkpoints.numbers(run.merged) == [2, 6] and checkpoints.numbers(run.path) == [4, 6]  # of equals the later is the best
    points = json.loads((run.eval / "curve.json").read_text())["points"]
    assert [(point["step"], point["environment"], point["attempts"]) for point in points] == [(2, "demo", 2), (6, "demo", 2)]
    assert all(re.fullmatch(rf"run1-merged-global_step_{point['step']}-[0-9a-f]{{8}}", point["model"]) for point in points)
    report = (run.eval / "report.html").read_text()
    assert "Reward by training step" in report
    assert not (run.path / "watch.lock").exists() and "sk-of-the-test" not in "".join(path.read_text() for path in run.logs.iterdir())
    # The trainer writes step 4 again: it is merged, evaluated, and one of the others goes.
    shutil.rmtree(run.checkpoint(4))
    save(run, 4, sample)
    run.tracker.write_text("6")
    done = invoke(project, "train.watch", *words, "--once")
    assert done.returncode == 0, done.stdout + done.stderr
    assert checkpoints.numbers(run.merged) == [2, 4, 6] and checkpoints.numbers(run.path) == [6]
    again = invoke(project, "train.watch", *words, "--once")
    assert again.returncode == 0 and again.stdout == ""


def test_a_given_endpoint_evaluates_what_it_names(project, run, sample):
    for step in (2, 4):
        save(run, step, sample)

    def answer(method: str, path: str, headers: dict[str, str], body: dict[str, object]) -> Answer:
        if path.endswith("/models"):
            return Answer({"data": [{"id": "served-2"}]})
        return Answer(completion("east" if body["model"] == "served-2" else "north"))

    with serving(answer) as url:
        words = ["--name=run1", "--eval=demo", "--limit=2", "--max-round=2", "--runner=local", f"--endpoint={url}/v1", "--endpoint-model=served-{step}"]
        done = invoke(project, "train.watch", *words, "--once")
    assert done.returncode == 1 and f"demo 4: {url}/v1 serves served-2 and no served-4" in done.stderr, done.stdout + done.stderr
    point, = curve.points(run.eval)
    assert (point.step, point.model) == (2, "served-2")


def test_a_killed_merge_leaves_nothing_half_and_goes_on(project, run, sample):
    save(run, 2, sample)
    words = [sys.executable, "-m", "invoke", "train.watch", "--name=run1", "--runner=local", "--once"]
    target, cut = run.merged / "global_step_2", 0
    for moment in (0.0, 0.1, 0.4):
        process = subprocess.Popen(words, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and not list(run.merged.glob(".global_step_2.merging-*")):
            time.sleep(0.005)
        time.sleep(moment)
        cut += process.poll() is None
        process.kill()
        process.communicate()
        assert not target.exists() or (target / "merge.json").exists()
        end = time.monotonic() + 90  # the merger hears of it, and tidies up
        while list(run.merged.glob(".global_step_2.merging-*")):
            assert time.monotonic() < end
            time.sleep(0.05)
        shutil.rmtree(target, ignore_errors=True)
    assert cut >= 2
    done = invoke(project, "train.watch", "--name=run1", "--runner=local", "--once")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in run.merged.iterdir()] == ["global_step_2"]
    assert json.loads((run.merged / "global_step_2" / "merge.json").read_text())["verified"] is True


def test_one_watcher_at_a_time_and_it_can_be_stopped(project, run, sample):
    write_run(run.path, attempts=[{"number": 1, "ended": None}])
    run.write_state(state="running", step=1, **machine.identity(os.getpid()))
    process = subprocess.Popen([sys.executable, "-m", "invoke", "train.watch", "--name=run1", "--runner=local"], cwd=project,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # yapf: disable
    end = time.monotonic() + 30
    while not run.watch_json.exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    second = invoke(project, "train.watch", "--name=run1", "--runner=local")
    assert second.returncode == 2 and re.fullmatch(
        rf"train.watch: run1 is followed already, by process {process.pid} on \S+; `invoke train.watch --name run1 --stop` stops that one\n", second.stderr)
    stopped = invoke(project, "train.watch", "--name=run1", "--stop")
    assert stopped.returncode == 0 and f"told process {process.pid}" in stopped.stdout
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said == "train.watch: interrupted\n" and not (run.path / "watch.lock").exists()
    assert "no watcher runs" in invoke(project, "train.watch", "--name=run1", "--stop").stdout
