"""What goes to wandb: by its own command and client, against a stand-in of its service that loses what is written over."""
from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.project import ROOT
from tests.fixtures.wandb_service import Service, wandb_service
from tests.fixtures.watching import summary
from tests.training.runs import write_run
from training import uploading
from training.folder import RunFolder

KEY = "k" * 40
TRAINER = """
import os, signal, sys, time, wandb
steps, how = int(sys.argv[2]), sys.argv[3]
run = wandb.init(project='p', id=sys.argv[4], mode='offline', dir=sys.argv[1], settings=wandb.Settings(x_disable_stats=True))
for step in range(1, steps + 1):
    run.log({f'metric{k}': step * 1.1 + k for k in range(40)}, step=step)
if how == 'finish':
    run.finish()
else:
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with wandb_service() as found:
        yield found


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    write_run(tmp_path / "run1", attempts=[{"number": 1, "started": 1.0, "ended": 2.0, "state": "finished", "last_step": 5}])
    found = RunFolder(tmp_path / "run1")
    found.append_metrics(5, 1, {"critic/score/mean": 0.5})
    return found


def environment(service: Service, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "WANDB_BASE_URL": service.url, "WANDB_API_KEY": KEY, "HOME": str(home), "PYTHONPATH": str(ROOT)}


def train(run: RunFolder, steps: int, how: str, id: str) -> Path:
    subprocess.run([sys.executable, "-c", TRAINER, str(run.path), str(steps), how, id], capture_output=True, check=False, timeout=120)
    return next(run.wandb.glob(f"offline-run-*-{id}"))


def program(service: Service, run: RunFolder, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "training", *words], env=environment(service, run.path.parent), cwd=run.path, capture_output=True,
                          text=True, timeout=180, check=False)  # yapf: disable


def evaluated(run: RunFolder, step: int, success: float) -> None:
    folder = run.eval / f"demo-global_step_{step}-abc123"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"config": {"model": "m"}}))
    (folder / "summary.json").write_text(summary(success))


def test_figures_come_behind_the_trainers_history_and_cost_it_no_line(service, run):
    folder = train(run, 5, "finish", "first")
    assert program(service, run, "upload", "--wandb", str(Path(sys.executable).with_name("wandb")), str(folder)).returncode == 0
    before = service.history("first")
    assert [line["_step"] for line in before] == [1, 2, 3, 4, 5]
    announced = list(service.files)
    run.append_event("merged", step=2, seconds=3.5)
    evaluated(run, 2, 0.25)
    done = program(service, run, "figures", "--project=p", str(run.path))
    assert (done.returncode, done.stdout) == (0, "figures of 1 checkpoint are in wandb's run first\n"), done.stderr
    lines = service.history("first")
    assert lines[:5] == before and len(lines) == 6
    sent = {name: value for name, value in lines[5].items() if not name.startswith("_")}
    assert sent == {"checkpoint": 2, "merge/seconds": 3.5, "eval/demo-abc123/success": 0.25, "eval/demo-abc123/reward": 0.5,
                    "eval/demo-abc123/attempts": 4}  # yapf: disable
    assert lines[5]["_step"] == 6
    told = service.summary("first")
    assert (told["run/state"], told["run/step"], told["metric0"]) == ("finished", 5, before[4]["metric0"])
    assert service.files == announced  # nothing about another machine than the trainer's
    assert not list(run.wandb.glob("run-*"))  # and nothing of ours among the trainer's

    again = program(service, run, "figures", "--project=p", str(run.path))
    assert again.stdout == "all figures are in wandb's run first already\n" and service.history("first") == lines
    evaluated(run, 4, 0.5)
    assert program(service, run, "figures", str(run.path)).returncode == 0
    more = service.history("first")
    assert more[:6] == lines and len(more) == 7 and more[6]["checkpoint"] == 4 and more[6]["_step"] > 6


@pytest.mark.slow
def test_an_offline_run_of_the_same_id_would_write_over_it(service, run):
    """What the figures must not be: a fact about wandb's client, which a later version may change."""
    upload = ["upload", "--wandb", str(Path(sys.executable).with_name("wandb"))]
    program(service, run, *upload, str(train(run, 5, "finish", "twice")))
    other = RunFolder(run.path.parent / "other")
    other.path.mkdir()
    program(service, run, *upload, str(train(other, 2, "finish", "twice")))
    assert [line["_timestamp"] for line in service.history("twice")] == sorted(line["_timestamp"] for line in service.history("twice"))[3:] + sorted(
        line["_timestamp"] for line in service.history("twice"))[:3]


@pytest.mark.parametrize("hidden, sent", [
    pytest.param([2], True, id="taken in a moment later"),
    pytest.param([2] * 6, False, id="never taken in", marks=pytest.mark.slow),
])
def test_figures_wait_for_a_service_that_has_not_taken_in_the_history(hidden, sent, service, run, monkeypatch):
    id = f"late{len(hidden)}"
    program(service, run, "upload", "--wandb", str(Path(sys.executable).with_name("wandb")), str(train(run, 5, "finish", id)))
    evaluated(run, 2, 0.25)
    for name, value in environment(service, run.path.parent).items():
        monkeypatch.setenv(name, value)
    before, pauses = service.history(id), []
    service.hidden = list(hidden)
    if sent:
        assert uploading.send(str(run.path), "", "", pauses.append) == f"figures of 1 checkpoint are in wandb's run {id}"
    else:
        with pytest.raises(uploading.Failed, match="has step 3 of 5 that were written, so nothing was sent"):
            uploading.send(str(run.path), "", "", pauses.append)
    assert service.history(id)[:5] == before and len(service.history(id)) == 5 + sent and len(pauses) == (1 if sent else 5)


def test_a_client_that_hangs_is_one_line_and_gone(service, run, monkeypatch):
    for name, value in environment(service, run.path.parent).items():
        monkeypatch.setenv(name, value)
    (run.wandb / "offline-run-20260101_000000-slow").mkdir(parents=True)
    evaluated(run, 2, 0.25)
    monkeypatch.setattr(uploading, "START", 0.1)
    with pytest.raises(uploading.Failed, match="wandb's run slow: its client did not start within 0 s, twice; nothing was sent; try again"):
        uploading.send(str(run.path), "", "")
    assert not multiprocessing.active_children() and "slow" not in service.runs


def test_what_a_killed_trainer_wrote_is_uploaded_once(service, run):
    folder = train(run, 400, "killed", "killed")
    done = program(service, run, "upload", "--wandb", str(Path(sys.executable).with_name("wandb")), str(folder))
    assert done.returncode == 0 and 300 < len(service.history("killed")) < 400
    assert list(folder.glob("*.wandb.synced"))
    evaluated(run, 2, 0.25)
    lines = service.history("killed")
    assert program(service, run, "figures", str(run.path)).returncode == 0
    assert service.history("killed")[:len(lines)] == lines and len(service.history("killed")) == len(lines) + 1


def test_what_is_refused_is_not_marked_as_uploaded(service, run):
    folder = train(run, 2, "finish", "refused")
    service.refuses = True
    try:
        program(service, run, "upload", "--wandb", str(Path(sys.executable).with_name("wandb")), str(folder))
    finally:
        service.refuses = False
    assert not list(folder.glob("*.synced"))


def test_of_several_attempts_the_last_ones_wandb_run_gets_the_figures(run):
    for name in ("offline-run-20260101_000000-zz", "offline-run-20260103_000000-aa", "run-20260102_000000-mm", "latest-run"):
        (run.wandb / name).mkdir(parents=True)
    assert uploading.wandb_id(run) == "aa"


@pytest.mark.parametrize("attempt, id, said", [
    ({"ended": None}, "x", "still writes to its wandb run, and two writers would lose lines"),
    ({"ended": 2.0, "state": "died"}, "", "holds no wandb run to send the figures to"),
    ({"ended": 2.0, "state": "died"}, "unknown", "the service has no run unknown: nothing of it was uploaded; upload the rest with `wandb sync /"),
])
def test_figures_that_cannot_go_are_one_line(attempt, id, said, service, run):
    write_run(run.path, created=4e9, attempts=[{"number": 1, "started": 1.0, **attempt}])
    if attempt["ended"] is None:
        from training import machine
        run.write_state(state="running", step=1, **machine.identity(os.getpid()))
    if id:
        (run.wandb / f"run-20260101_000000-{id}").mkdir(parents=True)
    done = program(service, run, "figures", str(run.path))
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert id not in service.runs
