"""Whole runs whose environment server fails: what costs a try, an error, and never a score."""
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.evaluation.whole import attempts, outcomes, run, summary
from tests.fixtures.servers import ROOT, free_port, rows
from tests.fixtures.standins import Answer, completion, counter_player, endpoint, environment


@pytest.mark.parametrize("answer", [
    Answer({"error": "it broke"}),
    Answer({"detail": "it broke"}, 500),
    Answer(b'{"observation": "count 1", "rew'),
    Answer({"observation": "count 1"}),
    Answer(drop=True),
], ids=["a 200 with an error", "a 500", "torn JSON", "a reply without reward", "a connection that ends"])
@pytest.mark.parametrize("route", ["/create", "/reset", "/step"])
def test_a_passing_fault_costs_a_try_and_no_score(answer, route, tmp_path):
    if route != "/step" and answer.body == {"observation": "count 1"}:
        answer = Answer({"id": "none"})
    with environment(lambda path, number, body: answer if path == route and number == 2 else None) as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-3", "--concurrency", "1") == 0
        assert env.sessions == {} and env.after_done == 0
    assert outcomes(tmp_path / "out") == {"0": "success", "1": "failure", "2": "success", "3": "failure"}
    tries = [record["tries_before"] for record in attempts(tmp_path / "out")]
    assert sum(map(len, tries)) == 1
    assert [one["outcome"] for group in tries for one in group] == ["env_error"]


def test_a_lasting_fault_is_an_error_and_never_a_score(tmp_path, capsys):
    def fault(path, number, body):
        return Answer({"error": "item 2 is broken"}) if path == "/reset" and body["data_idx"] == 2 else None

    with environment(fault) as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-3") == 1
        assert env.sessions == {} and env.seen["/reset"] == 3 + 3
    found = summary(tmp_path / "out")
    assert outcomes(tmp_path / "out")["2"] == "env_error"
    assert (found["errors"], found["attempts"], found["items"], found["success"]["mean"]) == (1, 4, 3, pytest.approx(1 / 3))
    broken = next(record for record in attempts(tmp_path / "out") if record["outcome"] == "env_error")
    assert broken["reward"] is None and broken["success"] is None and "item 2 is broken" in broken["error"]
    out = capsys.readouterr().out
    assert "4 of 4 (4 x 1)" in out and "1 of 4 attempts failed by infrastructure" in out and "item 2 is broken" in out


def test_a_hanging_step_is_given_up_and_its_session_closed(tmp_path):
    with environment(lambda path, number, body: Answer(delay=30) if path == "/step" and number == 1 else None) as env, \
            endpoint(counter_player) as model:
        begun = time.monotonic()
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--env-timeout", "0.5") == 0
        assert time.monotonic() - begun < 10 and env.sessions == {}
    record, = attempts(tmp_path / "out")
    assert record["outcome"] == "success" and "no answer within 0.5 s" in record["tries_before"][0]["error"]


def test_a_time_without_an_end_is_no_limit(tmp_path):
    flags = [word for name in ("env-timeout", "env-wait", "time-limit", "request-timeout") for word in (f"--{name}", "inf")]
    with environment() as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", *flags) == 0
    assert outcomes(tmp_path / "out") == {"0": "success"}


def test_a_create_without_an_answer_is_not_sent_again_at_once(tmp_path):
    with environment(lambda path, number, body: Answer(drop=True) if path == "/create" and number < 9 else None) as env, \
            endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 1
        assert env.seen["/create"] == 3  # one a try
    assert outcomes(tmp_path / "out") == {"0": "env_error"}


def test_a_full_server_is_waited_for(tmp_path):
    busy = Answer({"error": "all 2 sessions are in use"}, 429)
    with environment(lambda path, number, body: busy if path == "/create" and number < 4 else None) as env, \
            endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
    record, = attempts(tmp_path / "out")
    assert record["outcome"] == "success" and record["tries_before"] == []


def test_our_own_sessions_are_waited_for_as_long_as_they_take(tmp_path):
    busy = Answer({"error": "all 2 sessions are in use"}, 429)
    with environment() as env, endpoint(lambda messages, body: Answer(completion(counter_player(messages, body)), delay=0.3)) as model:
        env.fault = lambda path, number, body: busy if path == "/create" and len(env.sessions) >= 2 else None
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-5", "--concurrency", "6", "--env-wait", "0.5") == 0
    assert all(record["tries_before"] == [] for record in attempts(tmp_path / "out"))


def test_a_session_that_is_handed_out_twice_scores_for_nobody(tmp_path):
    def twice(path, number, body):
        if path == "/create" and number in (3, 5) and env.sessions:
            return Answer({"id": max(env.sessions)})  # as AgentGym's sqlgym does under load
        return None

    with environment() as env, endpoint(lambda messages, body: Answer(completion(counter_player(messages, body)), delay=0.05)) as model:
        env.fault = twice
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-9", "--concurrency", "4") == 0
        assert env.after_done == 0
    assert outcomes(tmp_path / "out") == {str(n): "failure" if n % 2 else "success" for n in range(10)}
    errors = [one["error"] for record in attempts(tmp_path / "out") for one in record["tries_before"]]
    assert any("which is in use" in error for error in errors) and any("a second time" in error for error in errors)


def test_an_episode_that_takes_too_long_is_a_timeout_and_no_score(tmp_path):
    with environment() as env, endpoint(lambda messages, body: Answer(completion("add"), delay=0.2)) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--time-limit", "0.5", "--max-round", "50") == 1
        assert env.sessions == {}
    record, = attempts(tmp_path / "out")
    assert (record["outcome"], record["reward"]) == ("timeout", None) and summary(tmp_path / "out")["success"] is None


def start_server(port: int, folder: Path) -> subprocess.Popen:
    row_file = folder / "row.json"
    row_file.write_text(json.dumps(rows()["form-textcraft"].to_json(defaults=False)))
    return subprocess.Popen(
        [sys.executable, str(ROOT / "servers/serve.py"), str(row_file), "--source", str(ROOT), "--port", str(port)],
        cwd=ROOT / "tests/fixtures/envserver", env={**os.environ, "FORM": "textcraft"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_server_that_is_killed_and_comes_back_costs_no_score(tmp_path):
    port = free_port()
    server = start_server(port, tmp_path)
    killed = []

    def say(messages, body):
        if len(model.requests) == 20:  # in the middle of several episodes
            server.kill()
            server.wait()
            killed.append(start_server(port, tmp_path))
        return counter_player(messages, body)

    try:
        with endpoint(say) as model:
            assert run(tmp_path / "out", f"http://127.0.0.1:{port}", model.base_url, "--items", "0-9") == 0
        found = attempts(tmp_path / "out")
    finally:
        for process in (server, *killed):
            process.kill()
            process.wait()
    assert killed and outcomes(tmp_path / "out") == {str(n): "success" if n % 2 == 0 else "failure" for n in range(10)}
    assert sum(len(record["tries_before"]) for record in found) >= 1


@pytest.mark.parametrize("how", ["killed", "never up again"])
def test_a_server_that_goes_midway_stops_the_run_which_keeps_its_numbers(how, tmp_path, capsys):
    port, gone = free_port(), []
    server = start_server(port, tmp_path)

    def say(messages, body):
        if len(model.requests) == 8 and not gone:  # in the middle of the third episode
            gone.append(server.kill())
            server.wait()
        return counter_player(messages, body)

    def fault(path, number, body):
        return Answer({"error": "no replica is up"}, 503) if path == "/create" and number >= 2 and not gone else None

    try:
        with endpoint(say) as model, environment(fault) as env:
            url = f"http://127.0.0.1:{port}" if how == "killed" else env.url
            end = time.monotonic() + 60
            while time.monotonic() < end:  # longer than --env-wait
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                time.sleep(0.05)
            args = (tmp_path / "out", url, model.base_url, "--items", "0-9", "--concurrency", "1", "--env-wait", "0.5")
            assert run(*args) == 1
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and f"environment server {url}" in error and f"the same command goes on with {tmp_path / 'out'}" in error
            found = summary(tmp_path / "out")
            assert (found["attempts"], found["items"], found["errors"]) == (4, 2, 2) and (tmp_path / "out/report.html").is_file()
            # The wait for the server is used up once an attempt.
            assert [len(one["tries_before"]) for one in attempts(tmp_path / "out")] == [0, 0, int(how == "killed"), 0]
            gone.append("is back")
            if how == "killed":
                server = start_server(port, tmp_path)
            assert run(*args, "--env-wait", "60") == 0
    finally:
        server.kill()
        server.wait()
    assert summary(tmp_path / "out")["items"] == 10


def test_attempts_that_wait_in_vain_now_and_then_stop_no_run(tmp_path):
    away = Answer({"error": "no replica is up"}, 503)
    with environment() as env, endpoint(counter_player) as model:
        until = [time.monotonic()]

        def fault(path, number, body):
            if path == "/close":  # after each episode it is away for two attempts
                until[0] = time.monotonic() + 0.3
            return away if path == "/create" and time.monotonic() < until[0] else None

        env.fault = fault
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-9", "--concurrency", "1", "--env-wait", "0.15", "--max-error-rate", "1") == 0
    assert len(attempts(tmp_path / "out")) == 10 and summary(tmp_path / "out")["errors"] >= 3


def test_no_server_is_one_line(tmp_path, capsys):
    assert run(tmp_path / "out", f"http://127.0.0.1:{free_port()}", "http://127.0.0.1:9/v1", "--env-wait", "0.5") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "invoke env.up --env form-textcraft" in error
