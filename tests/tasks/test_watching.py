"""The watcher: what it does and in which order, what it keeps, and that it goes on where it was, however it ended."""
from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.lib.training import watching
from tasks.lib.training.watching import Going, Plan, is_whole, read_record, verified
from tests.fixtures.watching import Hands, summary, watcher
from tests.training.runs import archive, checkpoint, write_run
from training import checkpoints, curve, machine
from training.folder import RunFolder
from training.lease import Lost
from training.retention import Rules

ROOT = Path(__file__).resolve().parents[2]
DEMO = Plan("demo")
KEEP_TWO = Rules(keep_last=2, keep_every=0, keep_best=0, keep_optimizer=1)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run1")
    runs(folder, step=100)
    return folder


def runs(run: RunFolder, step: int, **changes: object) -> None:
    """Let the run be one that is at `step`."""
    write_run(run.path, **{"attempts": [{"number": 1, "ended": None, "resumed_from": None}], **changes})
    run.write_state(state="running", step=step, **machine.identity(os.getpid()))


def ended(run: RunFolder, state: str = "finished", **changes: object) -> None:
    write_run(run.path, attempts=[{"number": 1, "ended": 1.0, "state": state}], **changes)
    run.write_state(state=state, step=None)


def raw(run: RunFolder) -> list[int]:
    return checkpoints.numbers(run.path)


def merged(run: RunFolder) -> list[int]:
    return checkpoints.numbers(run.merged)


def said_of(run: RunFolder, event: str) -> list[dict[str, object]]:
    return [one for one in run.read_events() if one["event"] == event]


def test_whole_checkpoints_are_merged_evaluated_drawn_and_pruned(run):
    for step in (2, 4, 6, 8):
        checkpoint(run.path, step)
    hands, said = Hands(score=lambda step: {2: 0.1, 4: 0.9}.get(step, 0.5)), []
    made = watcher(run, hands, Rules(2, 0, 1, 1), [DEMO, Plan("maze")], said=said)
    assert made.once()
    assert hands.done == [
        "merge 2", "merge 4", "merge 6", "merge 8",
        *(f"{env} {step}" for step in (2, 4, 6, 8) for env in ("demo", "maze"))
    ]
    assert raw(run) == [4, 6, 8] and merged(run) == [2, 4, 6, 8]
    assert [len(list((run.checkpoint(step) / "actor").glob("optim*"))) for step in (4, 6, 8)] == [0, 0, 2]
    points = json.loads((run.eval / "curve.json").read_text())["points"]
    assert [(point["environment"], point["step"], point["success"]["mean"])
            for point in points][:4] == [("demo", 2, 0.1), ("demo", 4, 0.9), ("demo", 6, 0.5), ("demo", 8, 0.5)]
    assert len((run.eval / "report.html").read_text().splitlines()) == 8
    assert [event["step"] for event in said_of(run, "merged")] == [2, 4, 6, 8] and len(said_of(run, "evaluated")) == 8
    assert [(event["step"], event["what"]) for event in said_of(run, "pruned")] == [(2, "optimizer"), (4, "optimizer"),
                                                                                    (6, "optimizer"), (2, "checkpoint")]
    assert "step 4: demo: success 90.0%, reward 0.500 in 0 s" in said
    hands.done.clear()
    (run.eval / "curve.json").write_text("of a watcher that was killed before it drew the last point")
    assert made.once() and hands.done == []  # nothing is left to do
    assert json.loads((run.eval / "curve.json").read_text())["points"] == points


def test_a_half_one_waits_and_is_named_once_a_later_one_is_whole(run):
    checkpoint(run.path, 2)
    for path in checkpoint(run.path, 4, track=False).glob("data.pt"):
        path.unlink()
    hands, said = Hands(), []
    made = watcher(run, hands, KEEP_TWO, said=said)
    made.once()
    assert hands.done == ["merge 2"] and not any("not whole" in line for line in said)  # somebody may be writing it
    checkpoint(run.path, 6)
    (run.checkpoint(4) / "actor" / "model_world_size_2_rank_0.pt").unlink()
    made.once()
    made.once()
    assert hands.done == ["merge 2", "merge 6"] and raw(run) == [2, 4, 6]
    assert [line for line in said if "not whole" in line
            ] == ["step 4: not whole, so it is kept and passed over: actor: the model file of rank 0 is missing"]


def test_one_that_fails_is_named_kept_tried_again_and_stops_nobody(run):
    for step in (2, 4, 6, 8, 10):
        checkpoint(run.path, step)
    hands, said = Hands(), []
    hands.fails["merge 4"] = "merge: x.weight has 3 NaN (exit code 2; log)"
    made = watcher(run, hands, Rules(1, 0, 0, 1), said=said)
    assert not made.once()
    assert hands.done == ["merge 2", "merge 6", "merge 8", "merge 10"] and raw(run) == [4, 10]
    assert said.count("step 4: not merged, so it is kept: merge: x.weight has 3 NaN (exit code 2; log)") == 1
    assert json.loads(run.watch_json.read_text())["failures"] == {
        "merge 4": {
            "reason": hands.fails["merge 4"],
            "tries": 1
        }
    }
    assert not made.once() and len(said_of(run, "failed")) == 1  # not yet
    made.failures["merge 4"].again = 0
    assert not made.once() and made.failures["merge 4"].tries == 2 and len(said_of(run, "failed")) == 1
    del hands.fails["merge 4"]
    archive(run.checkpoint(4) / "actor" / "model_world_size_2_rank_0.pt",
            "other weights" * 9)  # at once: it was written again
    archive(run.checkpoint(4) / "data.pt")
    assert made.once() and raw(run) == [10] and made.failures == {}


def test_two_new_ones_that_are_damaged_cost_no_good_one(run):
    for step in (2, 4, 6, 8):
        checkpoint(run.path, step)
    hands = Hands()
    hands.fails = {"merge 6": "NaN", "merge 8": "NaN"}
    watcher(run, hands, KEEP_TWO).once()
    assert raw(run) == [2, 4, 6, 8]


def test_an_evaluation_that_fails_waits_behind_the_others_and_holds_the_step_for_the_best(run):
    for step in (2, 4, 6, 8):
        checkpoint(run.path, step)
    hands, said = Hands(score=lambda step: 0.5), []
    hands.fails["demo 2"] = "eval: the server is away"
    made = watcher(run, hands, Rules(1, 0, 1, 1), [DEMO], said=said)
    assert not made.once() and raw(run) == [2, 8] and hands.done[-3:] == ["demo 4", "demo 6", "demo 8"]
    for _ in range(watching.EVALUATION_TRIES):
        made.failures["demo 2"].again = 0
        made.once()
    assert made.failures["demo 2"].tries == watching.EVALUATION_TRIES and "given up after 6 tries" in said[-2] + said[-1]
    assert raw(run) == [8] and merged(run) == [2, 4, 6, 8]
    assert watcher_again(run, made, Hands(), Rules(1, 0, 1, 1),
                         [DEMO]).once()  # a new one tries again, the model is still there
    assert {point.step for point in curve.points(run.eval)} == {2, 4, 6, 8}


def watcher_again(run: RunFolder, before: watching.Watcher, *words: object) -> watching.Watcher:
    before.lease.release()
    return watcher(run, *words)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"attempts": 3}, {"errors": 2, "error_rate": 0.5}])
def test_an_evaluation_without_its_numbers_is_a_failure(run, changes, monkeypatch):
    checkpoint(run.path, 2)
    hands = Hands()
    monkeypatch.setattr(
        hands, "evaluate", lambda model, step, plan, out, log:
        ((out / "run.json").write_text('{"config": {"model": "m"}}'),
         (out / "summary.json").write_text(summary(0.5, **changes))))
    made = watcher(run, hands, plans=[DEMO])
    assert not made.once() and "has no numbers, or too many attempts failed" in made.failures["demo 2"].reason
    assert not (run.eval / "curve.json").exists()


def test_a_step_that_is_written_again_is_merged_and_evaluated_again(run):
    checkpoint(run.path, 2)
    hands = Hands()
    made = watcher(run, hands, plans=[DEMO])
    assert made.once()
    archive(run.checkpoint(2) / "actor" / "model_world_size_2_rank_0.pt", "trained otherwise" * 5)
    archive(run.checkpoint(2) / "data.pt")
    (run.eval / curve.folder_name("demo", 2, DEMO.digest) / "old").write_text("of the first")
    assert made.once() and hands.done == ["merge 2", "demo 2", "merge 2", "demo 2"]
    assert not (run.eval / curve.folder_name("demo", 2, DEMO.digest) / "old").exists()


def test_other_items_are_another_evaluation_and_the_best_is_chosen_among_like(run):
    for step in (2, 4, 6):
        checkpoint(run.path, step)
    first = watcher(run, Hands(score=lambda step: {2: 1.0}.get(step, 0.2)), Rules(3, 0, 1, 3), [DEMO])
    assert first.once()
    few = Plan("demo", ("--limit=2", ))
    second = watcher_again(run, first, Hands(score=lambda step: {4: 0.9}.get(step, 0.1)), Rules(1, 0, 1, 1), [few])
    assert second.once() and raw(run) == [4, 6]
    assert [few.digest in line for line in (run.eval / "report.html").read_text().splitlines()] == [True] * 3
    assert {(point.plan, point.step)
            for point in curve.points(run.eval)} == {(plan.digest, step)
                                                     for plan in (DEMO, few)
                                                     for step in (2, 4, 6)}


def test_what_a_resume_needs_and_what_the_run_writes_next_stays(run):
    for step in (2, 4, 6, 8, 10):
        checkpoint(run.path, step)
    runs(run, 5, attempts=[{"number": 2, "ended": None, "resumed_from": 4}], poisoned=[7])
    made = watcher(run, Hands(), Rules(1, 0, 0, 1))
    assert made.once() and raw(run) == [4, 6, 8, 10]  # begun with 4; 6 is before the poison; 8 and 10 lie ahead
    assert len(list((run.checkpoint(4) / "actor").glob("optim*"))) == 2
    ended(run, "stopped", poisoned=[7])
    made.once()
    assert raw(run) == [6, 10]


def test_a_run_that_has_just_resumed_has_reached_what_it_began_with(run):
    runs(run, 0, attempts=[{"number": 2, "ended": None, "resumed_from": 4}])
    run.write_state(state="running", step=None, **machine.identity(os.getpid()))
    assert watching.going(run) == Going(False, "running", 4, (4, ))
    run.write_state(state="running", step=7)  # by a supervisor that is gone
    os.utime(run.state_json, (1, 1))
    run.state_json.write_text(run.state_json.read_text().replace('"updated": 1', '"updated": 0'))
    assert watching.going(run).ended and watching.going(run).state == "vanished"


def test_the_trackers_own_step_stays(run):
    for step in (2, 4, 6):
        checkpoint(run.path, step)
    run.tracker.write_text("2")  # upstream's `auto` reads that alone, and begins anew where its folder is gone
    watcher(run, Hands(), Rules(1, 0, 0, 1)).once()
    assert raw(run) == [2, 6]


def test_a_checkpoint_that_changes_just_before_it_goes_stays(run, monkeypatch):
    for step in (2, 4, 6):
        checkpoint(run.path, step)
    said: list[str] = []
    made = watcher(run, Hands(), Rules(3, 0, 0, 3), said=said)
    assert made.once()
    made.rules = Rules(1, 0, 0, 1)
    steps = watching.look(run, [])
    archive(run.checkpoint(2) / "actor" / "model_world_size_2_rank_0.pt", "a trainer writes here" * 3)
    made._prune(steps)
    assert raw(run) == [2, 6] and any(
        line.startswith("step 2: its checkpoint stays: ") and "written again" in line for line in said)


def test_another_watcher_that_took_over_ends_this_one_before_it_touches_anything(run):
    for step in (2, 4, 6):
        checkpoint(run.path, step)
    hands = Hands()
    made = watcher(run, hands, Rules(1, 0, 0, 1))
    lock = run.path / "watch.lock"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "token": "another", "host": "node7", "pid": 9}))
    with pytest.raises(Lost, match="process 9 on node7"):
        made.once()
    assert hands.done == [] and raw(run) == [2, 4, 6]
    made.lease.release()
    assert lock.exists()


def test_what_a_killed_one_left_half_deleted_is_finished(run):
    checkpoint(run.path, 2)
    run.merged.mkdir()
    for folder in (run.path, run.merged):
        (folder / f".pruned-global_step_1-{'0' * 32}").mkdir()
    watcher(run, Hands()).once()
    assert not list(run.path.rglob(".pruned-*"))


def test_a_merged_model_that_lost_a_file_or_was_not_verified_is_made_again(run):
    checkpoint(run.path, 2)
    hands = Hands()
    made = watcher(run, hands)
    made.once()
    target = run.merged / "global_step_2"
    (target / "model.safetensors").unlink()
    assert made.once() and hands.done == ["merge 2", "merge 2"]
    record = read_record(target)
    (target / "merge.json").write_text(json.dumps({**record, "verified": False}))
    assert made.once() and hands.done == ["merge 2"] * 3


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"verified": true}', '{"verified": true, "files": [], "sources": []}',
                                  '{"verified": true, "files": [{"name": "merge.json"}]}'])  # yapf: disable
def test_a_damaged_record_verifies_nothing(run, text):
    checkpoint(run.path, 2)
    target = run.merged / "global_step_2"
    target.mkdir(parents=True)
    (target / "merge.json").write_text(text)
    assert not verified(target, run.checkpoint(2) / "actor")
    watcher(run, Hands()).once()
    assert verified(target, run.checkpoint(2) / "actor")


def test_it_follows_until_the_run_has_ended(run):
    states = iter([Going(False, "running", 1, ())] * 3 + [Going(True, "died", None, ())] +
                  [Going(False, "running", 1, ())] * 4)

    def state(folder: RunFolder) -> Going:
        found = next(states, None)
        if found is None:
            return Going(True, "stopped", None, (2, ))
        if len(list(folder.path.glob("global_step_*"))) < 3:
            checkpoint(folder.path, 2 * len(list(folder.path.glob("global_step_*"))) + 2)
        return found

    hands, said = Hands(), []
    assert watcher(run, hands, KEEP_TWO, state=state, said=said).follow()
    assert hands.done == ["merge 2", "merge 4", "merge 6", "publish"]
    assert said[-1] == "the run is stopped; nothing more will come until `invoke train.resume --name run1`"
    assert json.loads(run.watch_json.read_text())["doing"] == "ended"


@pytest.mark.parametrize("busy, pause", [(0.0, 5.0), (0.04, 5.0), (0.3, 30.0), (9.0, 60.0)])
def test_looks_that_cost_more_come_rarer(busy, pause, run, monkeypatch):
    spent, paused = iter([0.0, busy, 10.0, 10.0, 20.0, 20.0]), []
    monkeypatch.setattr(watching.time, "process_time", lambda: next(spent))
    monkeypatch.setattr(watching.time, "sleep", paused.append)
    states = iter([Going(False, "running", 1, ())] * 3)
    made = watcher(run, Hands(), KEEP_TWO, state=lambda _: next(states, Going(True, "stopped", None, ())))
    made.poll, made.linger = watching.POLL, 0.0
    made.follow()
    assert paused[0] == pytest.approx(pause)


def test_what_failed_is_tried_once_more_at_the_end_and_then_told(run):
    checkpoint(run.path, 2)
    hands = Hands()
    hands.fails["merge 2"] = "the engine is away"
    ended(run)
    made = watcher(run, hands, KEEP_TWO)
    assert not made.follow() and made.failures["merge 2"].tries == 2


def test_checkpoints_of_a_run_that_nobody_here_started(tmp_path):
    run = RunFolder(tmp_path / "by-hand")
    for step in (25, 50, 75):
        checkpoint(run.path, step)
    assert watching.going(run) == Going(None, "unknown", None, (75, 75))
    run.run_json.write_text("{")  # which steps were poisoned cannot be told, so none goes
    assert watching.going(run) == Going(None, "unreadable", None, tuple(checkpoints.numbers(run.path)))
    follower = watcher(run, Hands(), Rules(1, 0, 0, 1))
    assert follower.once() and raw(run) == [25, 50, 75]
    run.run_json.unlink()
    assert follower.once() and raw(run) == [75]


# --- killed at any moment ---


def start(run: RunFolder, seconds: float) -> subprocess.Popen[bytes]:
    """Start a watcher and wait until it has the lease."""
    process = subprocess.Popen([sys.executable, "-m", "tests.fixtures.watching", str(run.path), str(seconds)],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # yapf: disable
    assert process.stdout and process.stdout.readline() == b"ready\n"
    return process


def check(run: RunFolder, written: list[int]) -> None:
    """Check what holds at every moment, killed or not."""
    left = {step.number: step for step in checkpoints.steps(run.path)}
    for number in written:
        target = run.merged / f"global_step_{number}"
        record = read_record(target)
        if target.exists():  # a merged model is never half
            assert record["verified"] and is_whole(target, record), number
        if not target.exists():  # unverified, so it is there
            assert left[number].whole, number
        if number in left:
            assert left[number].model_whole, number
    assert left[written[-1]].whole, "the newest"
    assert run.tracker.read_text() == str(written[-1])


def kill_at_random(run: RunFolder, kills: int, seconds: float, seed: int) -> None:
    """Train, so to speak, and kill the watcher; end with a watcher that is left alone."""
    rng = random.Random(seed)
    written: list[int] = []

    def save() -> None:
        # A trainer whose saves lie further apart than a merge: it goes on when there is room.
        if len(raw(run)) <= 3 and all((run.merged / f"global_step_{number}").exists() for number in written):
            checkpoint(run.path, 2 * len(written) + 2)
            written.append(2 * len(written) + 2)

    def work(until: Callable[[], bool], while_at_it: bool) -> None:
        process = start(run, seconds)
        while not until():
            assert process.poll() is None, process.stdout.read().decode()  # type: ignore[union-attr]
            if while_at_it:
                save()
            assert len(raw(run)) <= 4, raw(run)  # what the rules keep, and one more
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        check(run, written)

    save()
    for number in range(kills):
        end = time.monotonic() + rng.random() * 6 * seconds
        work(lambda end=end: time.monotonic() > end, number % 2 == 0)  # type: ignore[misc]
        save()
    work(lambda: len(written) >= 6, True)
    ended(run)
    process = start(run, 0.0)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out.decode()
    check(run, written)
    assert not list(run.path.rglob(".pruned-*"))
    points = {point.step: point.success["mean"] for point in curve.points(run.eval)}
    assert set(points) == set(written) == set(merged(run))
    best = max(written, key=lambda step: (points[step], step))
    assert set(raw(run)) == {*written[-2:], best}
    assert json.loads((run.eval / "curve.json").read_text())["points"][-1]["step"] == written[-1]


def test_killed_at_a_handful_of_moments(run):
    kill_at_random(run, kills=6, seconds=0.1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_killed_at_thirty_moments(run, seed):
    kill_at_random(run, kills=30, seconds=0.3, seed=seed)


def test_two_watchers_at_once_one_works(run):
    checkpoint(run.path, 2)
    first = start(run, 0.2)
    second = subprocess.run([sys.executable, "-m", "tests.fixtures.watching",
                             str(run.path), "0"],
                            cwd=ROOT,
                            capture_output=True,
                            timeout=60,
                            check=False)
    assert second.returncode == 1 and b"Taken" in second.stderr
    ended(run)
    assert first.wait(timeout=60) == 0
    assert merged(run) == [2]


def test_what_a_resume_moved_away_goes_but_for_what_may_be_needed(run):
    checkpoint(run.path, 2)
    hands, said = Hands(), []
    made = watcher(run, hands, KEEP_TWO, said=said)
    assert made.once()
    checkpoint(run.path, 4)
    assert made.once()
    away = run.aside / "attempt-2"
    away.mkdir(parents=True)
    run.checkpoint(4).rename(away / "global_step_4")  # compared with its merged model, and the newest that is whole
    checkpoint(away, 3, track=False)  # never merged
    (checkpoint(away, 6, track=False) / "data.pt").unlink()
    (away / "rollouts" / "step5").mkdir(parents=True)
    assert made.once()
    assert sorted(path.name for path in away.iterdir()) == ["global_step_3", "global_step_4", "rollouts"]
    assert any(line.startswith("step 6: pruned its checkpoint aside") for line in said)
    assert len([line for line in said if f"{away}/global_step_3 was never merged and compared, so it stays" in line]) == 1
    again = run.aside / "attempt-3"
    checkpoint(again, 1, track=False)
    assert made.once()
    assert sorted(path.name for path in away.iterdir()) == ["global_step_3", "rollouts"] and (again / "global_step_1").is_dir()
    assert raw(run) == [2]


def test_the_run_writes_no_more_before_its_figures_go_elsewhere(run):
    checkpoint(run.path, 2)
    for ended, done in ((False, ["merge 2"]), (True, ["publish"]), (None, ["publish"])):
        hands = Hands()
        made = watcher(run, hands, KEEP_TWO, state=lambda run, ended=ended: Going(ended, "finished", None, ()))
        assert made.once() and made.publish() and hands.done == done
        made.lease.release()
    hands.fails["publish"] = "train.sync: no network (exit code 1; log)"
    made.lease.take()
    assert not made.publish() and made.failures["wandb"].reason == hands.fails["publish"]
