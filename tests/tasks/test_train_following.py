"""train.status, .list, .logs, .stop and .plot, as a user types them, on runs of a trainer that trains nothing."""
from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from invoke.context import Context

from tasks.lib.errors import UserError
from tasks.lib.training import follow, runs, showing, stopping
from tests.fixtures.invoking import invoke as run_invoke
from tests.fixtures.project import ROOT, copy_project
from tests.training.runs import checkpoint, write_run
from tests.training.test_supervisor import begin, make, supervise, until
from training import diagnosis, lease, machine
from training.folder import RunFolder
from training.status import Status


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("following") / "project")


@pytest.fixture
def saves(project: Path):
    """The project's saves/, which the test finds and leaves empty."""
    folder = project / "saves"
    yield folder
    for path in folder.iterdir():
        subprocess.run(["rm", "-rf", str(path)], check=True)


def invoke(project: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    return run_invoke(*words, cwd=project, env={**os.environ, "DOCKER_HOST": "unix:///nowhere", **variables})


def test_a_run_that_ended_well(project, saves):
    supervise(make(saves / "run1"))
    said = invoke(project, "train.status")
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert lines[0] == "run1: finished" and "9 of 9" in lines[1] and "▁" in lines[2] and "0.090" in lines[2]
    assert "global_step_10 is whole" in said.stdout and "left" in said.stdout
    found = json.loads(invoke(project, "train.status", "--name", "run1", "--json").stdout)
    assert (found["state"], found["step"], found["checkpoint"], len(found["trend"])) == ("finished", 9, 10, 9)


def test_a_run_that_died_says_why_and_what_to_do(project, saves):
    supervise(make(saves / "run1", "fake.do=gpu_oom", "fake.at=4"))
    said = invoke(project, "train.status").stdout
    assert said.startswith(
        "run1: died of gpu_oom") and "CUDA out of memory" in said and "gpu_memory_utilization" in said


def test_a_death_nobody_knows_shows_the_last_lines(project, saves):
    supervise(make(saves / "run1", "fake.do=unknown", "fake.at=4"))
    said = invoke(project, "train.status").stdout
    assert "died of unknown" in said and "last lines" in said and "something nobody has seen before" in said


def test_following_stopping_and_listing_a_run(project, saves):
    make(saves / "old", attempts=[{"number": 1, "ended": 2.0, "state": "stopped"}], created=1.0)
    folder = make(saves / "run1", "fake.seconds=0.4", steps=500, save_freq=1)
    supervisor = begin(folder)
    try:
        until(lambda: len(folder.read_metrics()) >= 2)
        follow = subprocess.Popen([sys.executable, "-m", "invoke", "train.logs", "-f", "--name", "run1"],
                                  cwd=project,
                                  stdout=subprocess.PIPE,
                                  text=True)
        watch = subprocess.Popen([sys.executable, "-m", "invoke", "train.status", "--watch"],
                                 cwd=project,
                                 stdout=subprocess.PIPE,
                                 text=True)
        listed = invoke(project, "train.list").stdout.splitlines()
        assert listed[0].split()[:3] == ["run", "state", "step"
                                         ] and listed[1].startswith("old") and "running" in listed[2]
        assert [one["name"] for one in json.loads(invoke(project, "train.list", "--json").stdout)["runs"]] == ["old", "run1"]
        assert invoke(project, "train.status").stdout.startswith("run1: running")  # of two, the one that runs
        said = invoke(project, "train.stop")
        assert said.returncode == 0 and "stopped after" in said.stdout and "train.resume --name run1" in said.stdout
        assert supervisor.wait(5) == 143
        assert "Setting" not in follow.communicate(timeout=30)[0]
        assert watch.communicate(timeout=30)[0].rstrip().splitlines()
    finally:
        supervisor.kill()
    assert "does not run" in invoke(project, "train.stop", "--name", "run1").stdout
    assert folder.read()["attempts"][0]["state"] == "stopped"


def test_a_follower_shows_every_line_of_every_attempt_once(project, saves):
    folder = make(
        saves / "run1",
        "fake.seconds=0.5",
        "fake.do=ray_worker",
        "fake.at=4",
        f"fake.once={saves}/once",
        options={
            "retries": 1,
            "retry_seconds": 10  # in which the follower is sure to have begun
        })
    supervisor = begin(folder)
    said = invoke(project, "train.logs", "-f", "--name", "run1", "--lines", "0").stdout.splitlines()
    assert supervisor.wait(60) == 0
    wanted = [*folder.log(1).read_text().splitlines(), "-- attempt 2", *folder.log(2).read_text().splitlines()]
    assert [line.replace("\\t", " ") for line in said] == [line.replace("\t", " ") for line in wanted]


def test_nothing_of_others_reaches_the_terminal_raw(project, saves):
    evil = "\x1b]0;owned\x07\x1b[2J\u202egnp\x00"
    write_run(saves / "run1",
              algorithm=evil,
              environment={
                  "name": evil,
                  "url": "http://x/" + evil
              },
              attempts=[{
                  "number": 1,
                  "ended": 2.0,
                  "state": "died",
                  "cause": "unknown",
                  "reason": evil
              }])
    (saves / "run1" / "log").mkdir()
    (saves / "run1" / "log" / "attempt-1.log").write_text(f"first\n{evil}\n")
    for words in (["train.status"], ["train.logs"], ["train.list"], ["train.plot"]):
        said = invoke(project, *words)
        assert said.returncode == 0, said.stderr
        for text in said.stdout.splitlines():
            assert text.isprintable(), words
    assert "\x1b" not in (saves / "run1" / "plot.html").read_text()


@pytest.mark.parametrize("count, expected", [(1, ["c"]), (2, ["b", "c"]), (9, ["a", "b", "c"]), (0, ["a", "b", "c"])])
@pytest.mark.parametrize("end", ["", "\n"])
def test_the_last_lines(tmp_path, count, expected, end):
    (tmp_path / "log").write_text("a\nb\nc" + end)
    assert [line.decode().strip() for line in showing.tail(tmp_path / "log", count)] == expected


def test_the_last_lines_of_a_long_log(tmp_path, monkeypatch):
    monkeypatch.setattr(showing, "BLOCK", 7)
    (tmp_path / "log").write_text("".join(f"line {number}\n" for number in range(1000)))
    for count in (1, 2, 3, 50):
        assert [line.decode() for line in showing.tail(tmp_path / "log", count)
                ] == [f"line {number}\n" for number in range(1000 - count, 1000)]
    assert next(iter(showing.tail(tmp_path / "log", 5000))) == b"line 0\n"
    (tmp_path / "log").write_text("")
    assert list(showing.tail(tmp_path / "log", 5)) == []


@pytest.mark.parametrize("words, complaint", [
    (["train.status", "--name", "nope"], "no run 'nope'"),
    (["train.status", "--name", "../etc"], "no run '../etc'"),
    (["train.logs", "--name", "\x1b[2J"], r"no run '\\x1b[2J'"),
    (["train.stop"], "no run in"),
    (["train.plot"], "no run in"),
])
def test_a_run_that_is_not_there_is_one_line(project, saves, words, complaint):
    said = invoke(project, *words)
    assert said.returncode == 2 and complaint in said.stderr and said.stderr.count("\n") == 1
    assert (words[0] in said.stderr and said.stderr.isprintable()) or said.stderr.count("\n") == 1


def test_a_run_json_that_is_broken_is_one_line_and_hides_no_other_run(project, saves):
    write_run(saves / "good", attempts=[{"number": 1, "ended": 2.0, "state": "stopped"}])
    (saves / "bad").mkdir()
    (saves / "bad" / "run.json").write_text("{")
    said = invoke(project, "train.status", "--name", "bad")
    assert said.returncode == 2 and "no JSON" in said.stderr and said.stderr.count("\n") == 1
    listed = invoke(project, "train.list").stdout
    assert "unreadable" in listed and "good" in listed


@pytest.mark.parametrize("text",
                         ['{"schema": 1, "na', "7", '{"schema": 1, "attempts": 5, "gpus": 3, "environment": []}'])
def test_a_run_json_of_any_kind_is_one_line_of_each_task(project, saves, text):
    write_run(saves / "good", attempts=[{"number": 1, "ended": 2.0, "state": "stopped"}])
    checkpoint(saves / "bad", 4)
    (saves / "bad" / "run.json").write_text(text)
    for words in (["train.status"], ["train.logs"], ["train.stop"], ["train.plot"], ["train.resume"], ["train.sync"],
                  ["train.watch", "--once"]):
        said = invoke(project, *words, "--name", "bad")
        assert said.returncode == 2 and said.stderr.count("\n") == 1 and not said.stdout, (words, said.stderr)
        assert said.stderr.startswith(f"{words[0]}: {saves}/bad/run.json"), said.stderr
    listed = invoke(project, "train.list")
    assert listed.returncode == 0 and "unreadable" in listed.stdout and "good" in listed.stdout
    assert (saves / "bad" / "global_step_4").is_dir()


def test_a_run_is_named_by_its_folder_too_by_every_task(project, saves):
    """As a shell completes it."""
    supervise(make(saves / "run1"))
    names = itertools.cycle(("saves/run1", "saves/run1/", str(saves / "run1")))
    for words in (["train.status"], ["train.logs"], ["train.stop"], ["train.plot"], ["train.resume"],
                  ["train.watch", "--stop"], ["train.sync"]):
        said = invoke(project, *words, "--name", next(names))
        assert said.returncode == 0 and "no run" not in said.stdout + said.stderr, (words, said.stderr)
    for name in ("../run1", "../saves/run1", "saves/run2"):
        with pytest.raises(UserError, match="no run"):
            runs.find(name)


@pytest.mark.parametrize("words, said", [
    (["--attempt", "7"], "run1 has no log of attempt 7; its attempts are 1 to 1"),
    (["--attempt", "7", "-f"], "run1 has no log of attempt 7; its attempts are 1 to 1"),
    (["--attempt", "0"], "--attempt 0 is no whole number of at least 1"),
    (["--lines", "abc"], "--lines abc is no whole number of at least 0"),
    (["--lines", "-5"], "--lines -5 is no whole number of at least 0"),
])
def test_a_log_that_is_not_there_is_said(project, saves, words, said):
    (make(saves / "run1", attempts=[{"number": 1, "ended": 2.0, "state": "stopped"}]).path / "log").mkdir()
    (saves / "run1" / "log" / "attempt-1.log").write_text("x\n")
    done = invoke(project, "train.logs", *words)
    assert done.returncode == 2 and done.stderr == f"train.logs: {said}\n"


def test_a_run_without_an_attempt_has_no_log(project, saves):
    make(saves / "run1")
    for words in ((), ("-f", )):
        said = invoke(project, "train.logs", *words)
        assert said.returncode == 0 and "has printed nothing: it has no attempt yet" in said.stderr


def test_a_run_that_never_began_does_not_start_for_ever(project, saves):
    make(saves / "run1", created=time.time())
    assert invoke(project, "train.status").stdout.startswith("run1: starting")
    write_run(saves / "run1", created=time.time() - 3600)
    said = invoke(project, "train.status").stdout
    assert said.startswith("run1: vanished") and "it never began" in said
    assert "`invoke train.resume --name run1` goes on from the beginning" in said


@pytest.mark.parametrize("cause", diagnosis.CAUSES)
def test_a_remedy_can_be_typed_as_it_stands(project, saves, cause):
    write_run(saves / "run1", attempts=[{"number": 1, "ended": 2.0, "state": "died", "cause": cause}])
    told = runs.status(saves / "run1").remedy
    for command in re.findall("`invoke ([^`]*)`", told):
        task, *flags = command.split()
        needs = {
            "train.resume": ["--name", "run1"],
            "train.watch": ["--name", "run1"],
            "env.check": ["--env", "babyai"]
        }
        assert flags == needs.get(task, []), command


def test_a_run_that_vanished_is_named_as_stopped_with_what_to_do(project, saves):
    write_run(saves / "run1", attempts=[{"number": 1, "started": 1.0, "ended": None, "state": "running"}])
    checkpoint(saves / "run1", 4)
    RunFolder(saves / "run1").write_state(**{**machine.identity(os.getpid()), "boot_id": "another"}, state="running")
    said = invoke(project, "train.status").stdout
    assert said.startswith("run1: vanished") and "restarted" in said
    assert "train.resume --name run1` goes on from global_step_4" in said
    assert "does not run" in invoke(project, "train.stop").stdout


def test_a_local_run_of_another_machine_is_stopped_there(project, saves):
    write_run(saves / "run1", attempts=[{"number": 1, "started": 1.0, "ended": None, "state": "running"}])
    RunFolder(saves / "run1").write_state(**{
        **machine.identity(os.getpid()), "boot_id": "another",
        "host": "gpu-box"
    },
                                          state="running")
    said = invoke(project, "train.stop")
    assert said.returncode == 2 and "runs on gpu-box; stop it there" in said.stderr


def test_what_runs_as_another_user_is_theirs_to_stop(project, saves, monkeypatch):
    run = make(saves / "run1", attempts=[{"number": 1, "started": 1.0, "ended": None, "state": "running"}])
    run.write_state(**machine.identity(os.getpid()), state="running")
    (saves / "run1" / "watch.lock").write_text(json.dumps({**machine.identity(os.getpid()), "count": 1}))

    def kill(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(
            UserError,
            match=rf"^run1 runs as another user \(process {os.getpid()}\); only they, or root, can stop it$"):
        stopping.stop(Context(), run)
    monkeypatch.setattr(lease, "lives", lambda owner: True)
    with pytest.raises(UserError, match=r"^the watcher is another user's, .*; only they, or root, can stop it$"):
        follow.stop(run)


def test_a_plot_goes_where_it_is_told(project, saves, tmp_path):
    supervise(make(saves / "run1"))
    said = invoke(project, "train.plot", "--output", str(tmp_path / "x.html"))
    assert said.returncode == 0 and str(tmp_path / "x.html") in said.stdout
    assert "<figcaption>Reward</figcaption>" in (tmp_path / "x.html").read_text()
    for place, why in ((tmp_path / "no" / "x.html",
                        f"there is no folder {tmp_path}/no; make it first, or choose another"),
                       (tmp_path, f"it is a folder; write {tmp_path}/plot.html")):
        said = invoke(project, "train.plot", "--output", str(place))
        assert said.returncode == 2 and said.stderr == f"train.plot: --output {place}: {why}\n"


def state(**changes) -> Status:
    return Status("run1",
                  "/saves/run1",
                  changes.pop("state", "vanished"),
                  reason="gone",
                  updated=time.time(),
                  **changes)


@pytest.mark.parametrize("before, container, expected", [
    ("vanished", None, ("vanished", None, "gone")),
    ("vanished", runs.ContainerState(True, running=True), ("running", None, "")),
    ("vanished", runs.ContainerState(True, exit_code=137, oom_killed=True), ("vanished", "host_oom", "OOMKilled")),
    ("vanished", runs.ContainerState(True, exit_code=137), ("vanished", None, "exit code 137")),
    ("vanished", runs.ContainerState(False), ("vanished", None, "container is gone")),
    ("starting", runs.ContainerState(True, exit_code=1), ("died", "unknown", "before the supervisor")),
    ("starting", runs.ContainerState(True, running=True), ("starting", None, "gone")),
    ("died", runs.ContainerState(True, exit_code=137, oom_killed=True), ("died", "host_oom", "OOMKilled")),
])
def test_what_the_engine_knows_puts_the_status_right(before, container, expected):
    found = runs.with_container(state(state=before), container)
    assert (found.state, found.cause) == expected[:2] and expected[2] in found.reason


def test_lines_fit_the_terminal():
    found = state(state="died",
                  cause="unknown",
                  last_lines=["x" * 5000, "\x1b[1m"],
                  log="/l",
                  half=["h" * 900],
                  note="n" * 900,
                  remedy="r" * 900)
    told = showing.lines(found, width=80)
    assert all(len(line) <= 80 and line.isprintable() for line in told)


def test_this_project_has_the_tasks():
    listed = run_invoke("--list", cwd=ROOT)
    for name in ("train.status", "train.list", "train.logs", "train.stop", "train.plot"):
        assert name in listed.stdout
