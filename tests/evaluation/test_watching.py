"""`watch`: what a run that goes on does, from another process, until it ends."""
import json
import signal
import threading
import time

import pytest

from evaluation import report, watching
from evaluation.__main__ import main
from evaluation.episodes import Episode
from evaluation.live import Board
from evaluation.pace import Pace
from evaluation.records import LIVE, REPORT
from tests.evaluation.test_resume import process, words
from tests.fixtures.standins import Answer, completion, counter_player, endpoint, environment


def slowly(seconds):
    return lambda messages, body: Answer(completion(counter_player(messages, body)), delay=seconds)


def begun(out):
    end = time.monotonic() + 120
    while not (out / LIVE).exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def looks(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_a_run_is_watched_until_it_ends_and_its_report_follows(tmp_path, capsys, monkeypatch):
    out, marks = tmp_path / "out", []
    write = report.write
    monkeypatch.setattr(report, "write", lambda *given, **named: (write(*given, **named), marks.append("refresh" in given[0].read_text())))
    with environment() as env, endpoint(slowly(0.25)) as model:
        run = process(*words(out, env.url, model.base_url, "--items", "0-5", "--samples", "2", "--concurrency", "3"))
        begun(out)
        capsys.readouterr()
        assert main(["watch", str(out), "--json", "--every", "0.3", "--report-every", "0.3"]) == 0
        assert run.wait(60) == 0
    found = looks(capsys)
    assert [one["running"] for one in found[-2:]] == [True, False] and found[-1]["done"] == found[-1]["total"] == 12
    assert [one["done"] for one in found] == sorted(one["done"] for one in found) and found[0]["done"] < 12
    played = [one for look in found for one in look["sessions"]]
    assert {one["waits_for"] for one in played} <= {"the model", "the environment", "a session"} and "the model" in {one["waits_for"] for one in played}
    assert max(one["turn"] for one in played) >= 1 and all(0 <= one["seconds"] < 60 for one in played)
    assert max(len(look["sessions"]) for look in found) <= 3 and {look["at_once"] for look in found} >= {3}
    assert all(look["seconds_left"] > 0 and look["per_minute"] > 0 for look in found if look["running"] and look["per_minute"] and look["done"] < 12)
    assert found[-1]["success"] == 0.5 and found[-1]["errors"] == 0
    # While it goes on the browser reads the page again; at the end no more.
    assert marks[0] is True and marks[-1] is False and "refresh" not in (out / REPORT).read_text()
    assert not (out / LIVE).exists()


def test_what_a_board_tells_of_rate_time_left_and_sessions(tmp_path):
    board = Board(tmp_path / LIVE, 10, {("a", 0): "success"}, Pace(2))
    board.begun -= 30
    with board.place("c", 1) as place:
        place.episode = Episode(session=7, turns=[{}, {}])
        for item in "bdef":
            board.note({"item": item, "sample": 0, "outcome": "failure", "seconds": 10.0, "usage": {"prompt": 5, "completion": 1}})
        seen = board.now()
    # Four in 30 seconds; five are missing.
    assert (seen["done"], seen["total"], seen["tokens"], seen["outcomes"]) == (5, 10, 24, {"success": 1, "failure": 4})
    assert seen["per_minute"] == pytest.approx(8, rel=0.05) and seen["seconds_left"] == pytest.approx(37.5, rel=0.05)
    [one] = seen["sessions"]
    assert (one["item"], one["sample"], one["session"], one["turn"], one["waits_for"]) == ("c", 1, 7, 2, "the model")
    assert board.now()["sessions"] == []


def test_a_run_that_was_killed_is_told_from_one_that_goes_on(tmp_path, capsys):
    out = tmp_path / "out"
    with environment() as env, endpoint(slowly(0.2)) as model:
        run = process(*words(out, env.url, model.base_url, "--items", "0-5", "--samples", "2", "--concurrency", "2"))
        begun(out)
        while not (out / "attempts.jsonl").read_bytes():
            time.sleep(0.02)
        assert main(["watch", str(out), "--once", "--json"]) == 0 and looks(capsys)[0]["running"]
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert (out / LIVE).exists()
        begin = time.monotonic()
        assert main(["watch", str(out), "--every", "0.2", "--report-every", "0"]) == 1
        assert time.monotonic() - begin < watching.FRESH + 30
        said = capsys.readouterr().out
        assert "nobody works on the run; the command that began it goes on with it" in said and "of 12, success so far" in said
        assert main(words(out, env.url, model.base_url, "--items", "0-5", "--samples", "2")) == 0  # the watcher left no lock behind
    assert main(["watch", str(out)]) == 0 and "12 of 12, success so far 50.0 %" in capsys.readouterr().out


def test_a_watcher_keeps_no_run_from_beginning(tmp_path):
    out, over = tmp_path / "out", threading.Event()
    with environment() as env, endpoint(counter_player) as model:
        argv = words(out, env.url, model.base_url, "--items", "0-3")
        assert main(argv) == 0

        def watch():
            while not over.is_set():
                watching.goes_on(out)
                time.sleep(0.002)

        threading.Thread(target=watch, daemon=True).start()
        try:
            assert [main([*argv, "--quiet"]) for _ in range(5)] == [0] * 5
        finally:
            over.set()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"done": 1}', '"x"'])
def test_a_damaged_file_of_a_run_that_goes_on_is_no_traceback(text, tmp_path, capsys):
    out = tmp_path / "out"
    with environment() as env, endpoint(counter_player) as model:
        assert main(words(out, env.url, model.base_url, "--items", "0-3")) == 0
    (out / LIVE).write_text(text)
    capsys.readouterr()
    assert main(["watch", str(out), "--once", "--json"]) == 0
    [seen] = looks(capsys)
    assert (seen["done"], seen["total"], seen["sessions"]) == (4, 4, [])


def test_no_run_is_one_line(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
