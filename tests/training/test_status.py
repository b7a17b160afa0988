"""What status says of a folder, and which states there are."""
from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from tests.training.runs import checkpoint, write_run
from training import machine, plot
from training.folder import RunFolder
from training.status import bytes_text, last_lines, seconds_text, sparkline, state_of, status

OPEN = {"number": 1, "ended": None, "state": "running"}


def heartbeat(**changes):
    return {**machine.identity(os.getpid()), "state": "running", "updated": 1000.0, "step": 3, **changes}


@pytest.mark.parametrize("attempt, state, expected", [
    ({}, {}, "starting"),
    (OPEN, {}, "vanished"),
    (OPEN, heartbeat(), "running"),
    (OPEN, heartbeat(updated=1.0), "running"),
    (OPEN, heartbeat(pid=2**22 - 1), "vanished"),
    (OPEN, heartbeat(start_time=1), "vanished"),
    (OPEN, heartbeat(boot_id="another"), "vanished"),
    (OPEN, heartbeat(boot_id="another", host="elsewhere"), "running"),
    (OPEN, heartbeat(boot_id="another", host="elsewhere", updated=900.0), "vanished"),
    (OPEN, heartbeat(pid_namespace="pid:[1]", host="container"), "running"),
    (OPEN, heartbeat(pid_namespace="pid:[1]", host="container", updated=900.0), "vanished"),
    ({
        "number": 1,
        "ended": 5.0,
        "state": "died"
    }, heartbeat(), "died"),
    ({
        "number": 1,
        "ended": 5.0,
        "state": "died"
    }, heartbeat(note="retry 1 of 2 begins soon"), "running"),
    ({
        "number": 1,
        "ended": 5.0,
        "state": "finished"
    }, {}, "finished"),
],
                         ids=range(14))
def test_the_state_of_a_run(attempt, state, expected):
    """A run runs where the heartbeat is fresh, or the very process lives."""
    assert state_of(attempt, state, 1005.0) == expected


@pytest.mark.parametrize("created, expected", [(None, "starting"), (900.0, "starting"), (100.0, "vanished")])
def test_a_run_without_an_attempt_starts_for_a_while(created, expected):
    assert state_of({}, {}, 1005.0, created) == expected


def test_a_machine_whose_clock_is_wrong_still_runs(tmp_path):
    write_run(tmp_path, attempts=[OPEN])
    run = RunFolder(tmp_path)

    def beat(number):
        state = heartbeat(boot_id="another", host="elsewhere", updated=500.0 + number)
        (tmp_path / "state.json").write_text(json.dumps(state))

    beat(0)
    assert status(run).state == status(run, patient=True).state == "vanished"
    threading.Timer(0.5, beat, [1]).start()
    assert status(run, patient=True).state == "running"


def test_figures_of_a_running_run(tmp_path):
    write_run(tmp_path, attempts=[OPEN])
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics(step, 1, {"critic/task_score/mean": step / 10, "timing_s/step": 10.0 * step})
    checkpoint(tmp_path, 2)
    run.write_state(**heartbeat())
    found = status(run)
    assert (found.state, found.step, found.reward, found.best) == ("running", 3, 0.3, (3, 0.3))
    assert (found.step_seconds, found.eta_seconds, found.checkpoint) == (20.0, 120.0, 2)
    assert found.disk_free and found.json()["trend"] == [0.1, 0.2, 0.3]


def test_after_a_resume_what_was_undone_does_not_count(tmp_path):
    write_run(tmp_path, attempts=[{"number": 1, "ended": 1.0}, {**OPEN, "number": 2, "resumed_from": 2}])
    run = RunFolder(tmp_path)
    for step in (1, 2, 3):
        run.append_metrics(step, 1, {"critic/task_score/mean": step / 10})
    run.write_state(**heartbeat(step=None, resumed_from=2))
    found = status(run)
    assert (found.state, found.step, found.trend) == ("starting", 2, [0.1, 0.2])


def test_a_death_with_an_unknown_cause_shows_the_last_lines(tmp_path):
    write_run(tmp_path,
              attempts=[{
                  "number": 1,
                  "ended": 2.0,
                  "state": "died",
                  "cause": "unknown",
                  "reason": "exit code 3"
              }])
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "attempt-1.log").write_text("\n".join(f"line {number}" for number in range(50)) + "\n\n")
    found = status(tmp_path)
    assert found.cause == "unknown" and found.last_lines[-1] == "line 49" and len(found.last_lines) == 20


def test_a_log_of_any_size_is_read_at_its_end(tmp_path):
    write_run(tmp_path)
    (tmp_path / "log").mkdir()
    with open(tmp_path / "log" / "attempt-1.log", "wb") as file:
        file.truncate(50 << 30)
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe end\n")
    begun = time.process_time()
    assert last_lines(RunFolder(tmp_path), 1)[-1] == "the end"
    assert time.process_time() - begun < 5


def test_nothing_that_is_there_is_no_traceback(tmp_path):
    write_run(tmp_path, steps=None, environment=None, gpus=None, options=None, attempts=None, created=None)
    (tmp_path / "state.json").write_text("[]")
    (tmp_path /
     "metrics.jsonl").write_text('{"step": 1, "metrics": {"critic/task_score/mean": null}}\nx\n{"step": true}')
    found = status(tmp_path)
    assert found.state == "starting" and found.reward is None


@pytest.mark.parametrize("seconds, text", [(5, "5 s"), (89, "89 s"), (120, "2 min"), (3600, "1 h"),
                                           (11040, "3 h 4 min"), (190800, "2 d 5 h")])
def test_times_in_words(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize("count, text", [(5, "5 B"), (1500, "1.5 kB"), (91_000_000_000, "91.0 GB"), (2e12, "2.0 TB")])
def test_sizes_in_words(count, text):
    assert bytes_text(count) == text


def test_the_sparkline():
    assert sparkline([0, 1]) == "▁█" and sparkline([2, 2]) == "▄▄" and sparkline([]) == ""
    assert len(sparkline(list(range(1000)))) == 40 and sparkline([1, float("nan"), 2]) == "▁█"


def test_identity_tells_a_process_from_a_later_one_with_its_number():
    child = subprocess.Popen(["sleep", "60"])
    known = machine.identity(child.pid)
    assert machine.lives(known) is True
    child.kill()
    child.wait()
    assert machine.lives(known) is False
    assert machine.lives({"pid": True}) is None and machine.lives({}) is None


@pytest.mark.parametrize("own, place, expected", [
    ("0::/\n", "memory.events", 3),
    ("0::/user.slice/x\n", "user.slice/x/memory.events", 3),
    ("5:memory:/docker/1\n1:cpu:/\n", "memory/docker/1/memory.oom_control", 3),
    ("0::/\n", "other", None),
])
def test_the_kernels_count_of_oom_kills(tmp_path, own, place, expected):
    (tmp_path / "own").write_text(own)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("low 0\noom 5\noom_kill 3\noom_group_kill 0\n")
    assert machine.oom_kills(tmp_path, tmp_path / "own") == expected


def test_the_page_holds_the_curves_and_nothing_of_others_as_markup(tmp_path):
    evil = "<script>alert(1)</script>\x1b[2J"
    run = write_run(tmp_path / "r",
                    environment={
                        "name": evil,
                        "url": ""
                    },
                    poisoned=[4],
                    attempts=[{
                        "number": 1,
                        "ended": 1.0,
                        "state": "died",
                        "cause": "unknown",
                        "reason": evil
                    }, {
                        "number": 2,
                        "resumed_from": 2,
                        "ended": 2.0,
                        "state": "finished"
                    }])
    folder = RunFolder(tmp_path / "r")
    for step in range(1, 10):
        folder.append_metrics(
            step, 1, {
                "critic/task_score/mean": step / 10,
                "actor/kl_loss": float("nan") if step == 4 else 0.1,
                "response_length/mean": 100.0,
                "timing_s/step": 2.0
            })
    figure = {"mean": 0.5, "low": 0.4, "high": 0.6}
    point = SimpleNamespace(step=4,
                            environment="textcraft",
                            plan="1a2b3c",
                            success=figure,
                            reward={
                                **figure, "low": None
                            })
    text = plot.page(status(folder), run, folder.read_metrics(), [point])
    assert "<script" not in text and "\x1b" not in text and "&lt;script&gt;" in text
    for title in ("Reward", "Response length", "KL", "Seconds a step", "Evaluations: solved"):
        assert f"<figcaption>{title}</figcaption>" in text
    assert text.count("<svg") == text.count("</svg>") == 6 and "step 4 is poisoned" in text and "nan" not in text.split(
        "All steps")[0]
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text


def test_a_page_without_a_step_says_so(tmp_path):
    run = write_run(tmp_path / "r")
    assert "No step is finished yet" in plot.page(status(tmp_path / "r"), run, {})


@pytest.mark.parametrize("low, high", [(0, 1), (0, 1e-9), (-5, 3e8), (0.1, 0.11), (1e-30, 2e-30)])
def test_ticks_are_inside(low, high):
    found = plot.ticks(low, high)
    assert 2 <= len(found) <= 12 or high < 1e-9
    assert all(low - 1e-9 * abs(low) <= value <= high * (1 + 1e-9) for value in found)
