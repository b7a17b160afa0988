"""The environment's server of a run: who stops it, and when."""
from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from invoke.context import Context

from tasks import train_environment
from tasks.lib.environments import lease, start_stop
from tests.training.runs import write_run
from training.folder import RunFolder

ENDED = {"number": 1, "started": 1.0, "ended": 2.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that is being played, in a project of its own."""
    monkeypatch.setattr(lease, "RUN", tmp_path / "env")
    (tmp_path / "env").mkdir()
    monkeypatch.setattr(train_environment, "POLL", 0.02)
    monkeypatch.setattr(train_environment, "LINGER", 0.2)
    write_run(tmp_path / "run1", created=time.time(), attempts=[])
    return RunFolder(tmp_path / "run1")


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(start_stop, "stop_server", lambda c, name: found.append(name))
    return found


def keep(run: RunFolder, before: int = 0) -> tuple[threading.Thread, list[str]]:
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(train_environment.keep(Context(), run, "babyai", before)))
    thread.start()
    time.sleep(0.1)
    return thread, said


def started_for_its_users() -> None:
    user = lease.User("babyai")
    user.started()
    user.leave()


@pytest.mark.parametrize("state", ["finished", "stopped", "died"])
def test_a_server_that_was_started_for_the_run_goes_with_it(state, run, stopped):
    started_for_its_users()
    thread, said = keep(run)
    time.sleep(0.3)  # longer than a dead run is waited for: it is only starting
    assert thread.is_alive() and stopped == []
    write_run(run.path, attempts=[{**ENDED, "state": state}])
    thread.join(5)
    assert said == ["stopped babyai"] and stopped == ["babyai"]
    assert json.loads(run.events.read_text())["event"] == "environment_stopped"


def test_an_attempt_of_before_is_not_the_end_of_this_one(run, stopped):
    started_for_its_users()
    write_run(run.path, attempts=[{**ENDED, "state": "stopped"}])
    thread, _ = keep(run, before=1)
    time.sleep(0.3)
    assert thread.is_alive() and stopped == []
    write_run(run.path, attempts=[{**ENDED, "state": "stopped"}, {**ENDED, "number": 2, "state": "finished"}])
    thread.join(5)
    assert stopped == ["babyai"]


def test_who_else_uses_it_keeps_it_and_stops_it(run, stopped):
    started_for_its_users()
    evaluation = lease.User("babyai")
    thread, said = keep(run)
    write_run(run.path, attempts=[{**ENDED, "state": "finished"}])
    thread.join(5)
    assert said == ["left babyai up, an evaluation or another run uses it"] and stopped == []
    assert evaluation.leave() == (True, False)  # the last one, which stops what was started for its users


def test_while_the_run_uses_it_an_evaluation_that_started_it_does_not_stop_it(run, stopped):
    evaluation = lease.User("babyai")
    evaluation.started()
    thread, _ = keep(run)
    assert evaluation.leave() == (True, True)
    write_run(run.path, attempts=[{**ENDED, "state": "finished"}])
    thread.join(5)
    assert stopped == ["babyai"]


def test_a_server_that_the_user_wants_up_stays(run, stopped):
    started_for_its_users()
    thread, said = keep(run)
    lease.detach_owner("babyai")  # as env.up does
    write_run(run.path, attempts=[{**ENDED, "state": "finished"}])
    thread.join(5)
    assert said == ["left babyai up, as it was before the run"] and stopped == []
