"""The files of a run's folder: written whole, appended in one piece, read whatever is in them."""
from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from tests.training.runs import write_run
from training import folder as folder_module
from training.folder import RunFolder, append_line, atomic_write
from training.foreign import read_lines


def test_a_write_that_fails_leaves_the_old_text_and_nothing_else(tmp_path, monkeypatch):
    place = tmp_path / "x.json"
    atomic_write(place, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        atomic_write(place, "new")
    assert place.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


def test_a_write_that_fails_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "none" / "x.json", tmp_path / "folder"):
        with pytest.raises(OSError) as raised:
            atomic_write(place, "new")
        assert (raised.value.filename, raised.value.filename2) == (str(place), None)


@pytest.mark.parametrize("changes, fault", [
    ({"attempts": 5}, "attempts is no list"),
    ({"attempts": [3]}, r"attempts\[0\] is no table"),
    ({"attempts": [{"number": 1, "ended": "soon"}]}, r"attempts\[0\].ended is 'soon', no time"),
    ({"attempts": [{"number": True}]}, r"attempts\[0\].number is True, no whole number from 0 on"),
    ({"overrides": "x"}, "overrides is no list"),
    ({"overrides": [1]}, r"overrides\[0\] is 1, no text"),
    ({"environment": []}, "environment is no table"),
    ({"gpus": 3}, "gpus is no table"),
    ({"options": "none"}, "options is 'none', no table"),
    ({"steps": "9"}, "steps is '9', no whole number from 0 on"),
    ({"poisoned": ["3"]}, r"poisoned\[0\] is '3', no whole number from 0 on"),
    ({"folder": 3}, "folder is 3, no text"),
    ({"environment": {"url": 3}}, r"environment.url is 3, no text"),
])  # yapf: disable
def test_a_run_json_of_other_kinds_is_refused_where_it_is_read(tmp_path, changes, fault):
    """Everybody reads it there, so nobody meets a number where it takes a table for granted."""
    write_run(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"^{tmp_path}/run.json: {fault}$"):
        RunFolder(tmp_path).read()


def test_what_nobody_knows_may_be_absent_or_null(tmp_path):
    write_run(tmp_path, steps=None, resolved=None, attempts=[{"number": 1, "ended": None, "resumed_from": None}])
    assert RunFolder(tmp_path).read()["steps"] is None
    (tmp_path / "run.json").write_text('{"schema": 1}')
    assert RunFolder(tmp_path).read() == {"schema": 1}


def test_update_changes_in_place_or_takes_what_is_returned(tmp_path):
    write_run(tmp_path / "r")
    run = RunFolder(tmp_path / "r")
    assert run.update(lambda now: now["poisoned"].append(3))["poisoned"] == [3]
    assert run.update(lambda now: {**now, "poisoned": [4]})["poisoned"] == [4]
    assert run.read()["poisoned"] == [4]


def add_attempts(path: Path, times: int) -> None:
    for _ in range(times):
        RunFolder(path).update(lambda run: run["attempts"].append({"number": os.getpid()}))


def test_updates_of_several_programs_lose_nothing(tmp_path):
    write_run(tmp_path)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add_attempts, args=(tmp_path, 25)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(RunFolder(tmp_path).read()["attempts"]) == 100


def test_a_lock_goes_with_its_process(tmp_path):
    write_run(tmp_path)

    def die(run):
        os.kill(os.getpid(), signal.SIGKILL)

    writer = multiprocessing.get_context("fork").Process(target=RunFolder(tmp_path).update, args=(die, ))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    RunFolder(tmp_path).update(lambda run: run["poisoned"].append(1))
    assert RunFolder(tmp_path).read()["poisoned"] == [1]


@pytest.mark.parametrize("text, fault", [
    ("", "no JSON"),
    ("[1]", "no JSON object"),
    ('{"schema": 2}', "schema 2"),
    ("{}", "schema None"),
    ("[" * 100_000, "no JSON"),
    ("\udcff", "no JSON"),
])
def test_a_run_json_that_cannot_be_read_is_said_in_one_line(tmp_path, text, fault):
    (tmp_path / "run.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=fault) as caught:
        RunFolder(tmp_path).read()
    assert "\n" not in str(caught.value)


def test_create_refuses_to_replace(tmp_path):
    run = RunFolder(tmp_path / "new")
    run.create({"name": "new"})
    assert run.read() == {"schema": 1, "name": "new"}
    with pytest.raises(FileExistsError):
        run.create({"name": "other"})
    assert run.read()["name"] == "new"


def test_events_survive_a_line_that_a_crash_cut_off(tmp_path):
    run = RunFolder(tmp_path)
    run.append_event("started", attempt=1)
    with open(run.events, "a") as file:
        file.write('{"time": 1, "event": "st')
    run.append_event("died", attempt=1, cause="killed")
    assert [event["event"] for event in run.read_events()] == ["started", "died"]


def test_lines_that_are_no_objects_are_left_out(tmp_path):
    place = tmp_path / "x.jsonl"
    place.write_bytes(b'{"a": 1}\n[2]\n\xff\xfe\n\n{"a": NaN}\n' + b"[" * 100_000 + b'\n{"a": 2}')
    assert [line["a"] for line in read_lines(place)][::2] == [1, 2]


def test_the_end_of_a_file_begins_with_a_whole_line(tmp_path):
    place = tmp_path / "x.jsonl"
    for number in range(100):
        append_line(place, {"n": number})
    found = read_lines(place, last_bytes=95)
    assert [line["n"] for line in found] == list(range(91, 100))
    assert len(read_lines(place, last_bytes=10**9)) == 100
    assert read_lines(tmp_path / "absent") == []


def test_of_a_step_seen_again_the_last_line_counts_and_what_it_undid_does_not(tmp_path):
    run = RunFolder(tmp_path)
    for step, attempt in ((1, 1), (2, 1), (3, 1), (4, 1), (3, 2)):
        run.append_metrics(step, attempt, {"critic/score/mean": step / 10})
    found = run.read_metrics()
    assert list(found) == [1, 2, 3] and found[3]["attempt"] == 2


def test_metrics_keep_nan(tmp_path):
    run = RunFolder(tmp_path)
    run.append_metrics(1, 1, {"actor/grad_norm": float("nan")})
    assert str(run.read_metrics()[1]["metrics"]["actor/grad_norm"]) == "nan"


def test_a_full_disk_costs_the_reserve_before_a_record(tmp_path, monkeypatch):
    write_run(tmp_path)
    run = RunFolder(tmp_path)
    run.reserve()
    real = folder_module.atomic_write

    def full(path, text, durable=True):
        if (tmp_path / ".reserve").exists():
            raise OSError(errno.ENOSPC, "full")
        real(path, text)

    monkeypatch.setattr(folder_module, "atomic_write", full)
    run.update(lambda now: now["poisoned"].append(1))
    assert json.loads((tmp_path / "run.json").read_text())["poisoned"] == [1]
    assert not (tmp_path / ".reserve").exists()


def test_a_state_that_cannot_be_read_is_none(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_state() is None
    run.write_state(pid=1)
    assert run.read_state()["pid"] == 1
    run.state_json.write_text("{")
    assert run.read_state() is None
