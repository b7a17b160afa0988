"""Whole runs of the evaluation over real HTTP: every protocol row, numbers, faults of environment and model."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from statistics import fmean

import pytest

from evaluation.__main__ import main
from evaluation.problems import EnvironmentFault
from evaluation.protocol import Server
from tests.fixtures.servers import FIXTURE_ROWS, ROOT, free_port, rows, running
from tests.fixtures.standins import Answer, completion, counter_player, endpoint, environment, failure, serving

FORMS = sorted(name for name in rows() if name.startswith("form-"))
KEY = "sk-secret-of-the-test"


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch, tmp_path):
    for name in ("ENV", "ENV_SERVER", "MODEL", "MAX_ROUND", "OPENAI_BASE_URL", "AGENTGYM_SRC", "ENVIRONMENTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)


def run(out: Path, server: str, base_url: str, *flags: str, env: str = "form-textcraft") -> int:
    return main([
        "run", "--env", env, "--environments", str(FIXTURE_ROWS), "--server", server, "--base-url", base_url, "--model",
        "stand-in", "--model-tries", "4", "--out", str(out), *flags
    ])


def attempts(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def outcomes(out: Path) -> dict[str, str]:
    return {record["item"].rsplit("_", 1)[-1]: record["outcome"] for record in attempts(out)}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in serve.py"])
def test_a_server_of_this_form_is_played_through(name, wrapped, tmp_path):
    with running(rows()[name], tmp_path, wrapped) as client, endpoint(counter_player) as model:
        before = opened(client)
        assert run(tmp_path / "out", client.base.removesuffix("/maze"), model.base_url, "--items", "0-9", env=name) == 0
        after = opened(client)
        work = json.loads((tmp_path / "out" / "run.json").read_text())["work"][0]
    assert outcomes(tmp_path / "out") == {str(n): "success" if n % 2 == 0 else "failure" for n in range(10)}
    for record in attempts(tmp_path / "out"):
        assert record["rounds"] == 3 and record["scaled"] == float(record["success"])
        assert record["reward"] == record["scaled"] * rows()[name].reward_range[1]
        assert [turn["action"] for turn in record["turns"]][:2] == ["add", "add"]
    sessions, closes = work["sessions"], wrapped or rows()[name].protocol.close
    assert sessions["lost"] == 0 and 0 < sessions["opened"] == sessions["closed" if closes else "pooled"]
    assert sessions["pooled" if closes else "closed"] == 0 and (tmp_path / "out" / "sessions.jsonl").read_bytes() == b""
    if rows()[name].protocol.close:
        assert after == before
    else:  # no more sessions than were played at once: they are used again
        assert after - before <= rows()[name].concurrency


def opened(client) -> int:
    import urllib.request
    with urllib.request.urlopen(client.base.removesuffix("/maze") + "/opened") as answer:
        return json.loads(answer.read())


def test_the_expert_solves_the_demo_and_a_random_player_does_not(tmp_path, capsys):
    from tasks.lib.environments.rows import environment as row_of
    with running(row_of("demo"), tmp_path) as client:
        for player in ("expert", "random"):
            assert main(["run", "--env", "demo", "--server", client.base, "--model", player, "--out", str(tmp_path / player),
                         "--samples", "1" if player == "expert" else "2"]) == 0
    expert, chance = summary(tmp_path / "expert"), summary(tmp_path / "random")
    assert expert["success"]["mean"] == expert["reward"]["mean"] == 1.0 and expert["attempts"] == 48
    assert chance["reward"]["high"] < 0.3 and chance["success"]["high"] < expert["success"]["low"]
    # Computed here from the records, item by item.
    per_item: dict[str, list[float]] = {}
    for record in attempts(tmp_path / "random"):
        per_item.setdefault(record["item"], []).append(record["reward"])
    assert chance["reward"]["mean"] == pytest.approx(fmean(fmean(group) for group in per_item.values()))
    assert {len(group) for group in per_item.values()} == {2}
    assert "success rate" in capsys.readouterr().out


def test_what_the_endpoint_is_sent(tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "2", "--seed", "7", "--temperature", "0.3",
                   "--max-tokens", "64", "--extra-body", '{"top_k": 5}') == 0
    headers, body = model.requests[-1]
    assert headers["authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_tokens"], body["top_k"]) == ("stand-in", 0.3, 64, 5)
    assert not body.get("stream") and body["seed"] == attempts(tmp_path / "out")[0]["seed"]
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user", "assistant", "user"]
    assert [message["content"] for message in body["messages"][2:]] == ["count 2", "add", "count 3", "add", "count 4"]


@pytest.mark.parametrize("field,flag", [("model", "--model"), ("messages", "--prompt"), ("stream", "read whole"), ("n", "--samples"), ("seed", "--seed"),
                                        ("temperature", "--temperature"), ("top_p", "--top-p"), ("max_tokens", "--max-tokens")])
def test_an_extra_body_does_not_change_what_the_run_claims(field, flag, tmp_path, capsys):
    assert run(tmp_path / "out", "http://127.0.0.1:9", "http://127.0.0.1:9/v1", "--items", "0", "--env-wait", "0.1", "--extra-body", f'{{"{field}": 1}}') == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--extra-body has {field}," in error and flag in error and not (tmp_path / "out").exists()


def test_a_field_that_is_left_out_may_come_with_the_extra_body(tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--temperature", "none", "--max-tokens", "0",
                   "--extra-body", '{"temperature": "auto", "max_tokens": null}') == 0
    _, body = model.requests[0]
    assert body["temperature"] == "auto" and body["max_tokens"] is None


def test_no_file_and_no_output_has_the_key(tmp_path, capsys):
    def say(messages, body):
        return failure(400, f"Your key {KEY} sent something odd") if body["messages"][2]["content"] == "count 3" else counter_player(messages, body)

    with environment() as env, endpoint(say) as model:
        run(tmp_path / "out", env.url, model.base_url.replace("http://", "http://user:pass@"), "--items", "0-3", "--concurrency", "1")
    shown = "".join(capsys.readouterr())
    for text in (shown, *(path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file())):
        assert KEY not in text and "user:pass" not in text
    assert "***" in attempts(tmp_path / "out")[3]["error"]


def test_no_file_and_no_output_has_the_servers_login(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        server = env.url.replace("http://", "http://joe:hunter2@")
        assert run(tmp_path / "out", server, model.base_url, "--items", "0-1") == 0
        assert json.loads((tmp_path / "out" / "run.json").read_text())["work"][0]["server"] == env.url.replace("http://", "http://***@")
    assert run(tmp_path / "away", "http://joe:hunter2@127.0.0.1:9", model.base_url, "--items", "0", "--env-wait", "0.1") == 2
    shown = "".join(capsys.readouterr())
    assert "no environment server at http://***@127.0.0.1:9" in shown
    for text in (shown, *(path.read_text() for path in tmp_path.glob("*/*") if path.is_file())):
        assert "joe" not in text and "hunter2" not in text


def test_a_lost_servers_login_is_not_in_a_record(tmp_path):
    import asyncio

    async def create():
        async with Server("http://joe:hunter2@127.0.0.1:9", rows()["form-textcraft"].protocol) as server:
            await server.create()

    with pytest.raises(EnvironmentFault, match=r"http://\*\*\*@127.0.0.1:9"):
        asyncio.run(create())


def test_a_reset_that_says_in_its_reply_that_it_failed_is_the_environments_fault():
    """webarena's: the observation that a GET gives then is the last item's."""
    import asyncio

    async def reset(fault):
        protocol = rows()["form-textcraft"].protocol.model_copy(update={"reset_fault": fault})
        async with Server(env.url, protocol) as server:
            return await server.reset(await server.create(), 3)

    with environment() as env:
        assert asyncio.run(reset({"sites": "Error"})).observation == asyncio.run(reset({})).observation
    reply = Answer({"observation": "TimeoutError", "sites": "Error", "object": "Error"})
    with environment(lambda path, number, body: reply if path == "/reset" else None) as env, \
            pytest.raises(EnvironmentFault, match=r"POST /reset: .*TimeoutError"):
        asyncio.run(reset({"sites": "Error"}))


def test_samples_differ_in_seed_and_are_told_apart(tmp_path):
    import itertools
    draws = itertools.count()

    def say(messages, body):
        return "win" if next(draws) % 3 == 0 else "lose"

    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-4", "--samples", "3", "--seed", "1") == 0
    records = attempts(tmp_path / "out")
    assert len({(record["item"], record["sample"]) for record in records}) == 15 == len({record["seed"] for record in records})
    solved: dict[str, int] = {}
    for record in records:
        solved[record["item"]] = solved.get(record["item"], 0) + record["success"]
    found = summary(tmp_path / "out")
    assert found["pass_at"]["3"]["mean"] == pytest.approx(sum(count > 0 for count in solved.values()) / 5)
    # Pass@2 of 3 samples, by listing the pairs: a pair fails when both do.
    pairs = [1 - (3 - c) * (2 - c) / 6 if c < 2 else 1.0 for c in solved.values()]
    assert found["pass_at"]["2"]["mean"] == pytest.approx(fmean(pairs))


def test_rounds_end_an_episode_and_a_token_limit_does(tmp_path):
    with environment() as env, endpoint(lambda messages, body: "add") as model:
        assert run(tmp_path / "rounds", env.url, model.base_url, "--items", "1", "--max-round", "4") == 0
        assert run(tmp_path / "tokens", env.url, model.base_url, "--items", "1", "--token-limit", "20") == 0
        assert not env.sessions
    assert [(one["outcome"], one["rounds"], one["success"]) for one in attempts(tmp_path / "rounds")] == [("max_rounds", 4, False)]
    assert [(one["outcome"], one["rounds"]) for one in attempts(tmp_path / "tokens")] == [("token_limit", 2)]


@pytest.mark.parametrize("words, upstream", [
    (["late", "add", "add", "add"], 0.3),
    (["late", "jump", "add", "add"], 0.6),
    (["add", "late", "late", "add"], 0.6),
], ids=["then actions", "then an action that is none", "twice"])
def test_a_late_win_that_does_not_end_the_episode_counts_once(words, upstream, tmp_path):
    row = rows()["form-babyai"]
    with running(row, tmp_path) as client, endpoint(lambda messages, body: words[len(messages) // 2 - 1]) as model:
        assert run(tmp_path / "out", client.base, model.base_url, "--items", "3", "--max-round", "4", env=row.name) == 0
    record, = attempts(tmp_path / "out")
    assert (record["outcome"], record["success"], record["reward"], record["rounds"]) == ("success", True, 0.3, 4)
    # AgentGym's own client takes the last `score`, in which the same reward was added up.
    assert record["upstream_reward"] == pytest.approx(upstream)


@pytest.mark.parametrize("flags", [(), ("--token-limit", "24")], ids=["the context is full", "the tokens are used up"])
def test_an_item_that_was_won_is_a_success_however_it_ended(flags, tmp_path):
    def say(messages, body):
        if len(messages) > 6 and not flags:
            return failure(400, "maximum context length", "context_length_exceeded")
        return ["late", "add", "add", "add"][len(messages) // 2 - 1]

    row = rows()["form-babyai"]
    with running(row, tmp_path) as client, endpoint(say) as model:
        assert run(tmp_path / "out", client.base, model.base_url, "--items", "3", "--max-round", "4", *flags, env=row.name) == 0
    record, = attempts(tmp_path / "out")
    assert (record["outcome"], record["success"], record["reward"], record["rounds"]) == ("success", True, 0.3, 2)


def test_the_answer_that_overflowed_is_paid_for_too(tmp_path):
    with environment() as env, endpoint(lambda messages, body: completion("add", 95, 6)) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--context-length", "100") == 0
    record, = attempts(tmp_path / "out")
    assert record["outcome"] == "context_overflow" and (record["usage"]["prompt"], record["usage"]["completion"]) == (95, 6)


def test_half_a_character_is_replaced_wherever_it_comes_from(tmp_path, capsys):
    half = "\ud83d"

    def fault(path, number, body):
        if path == "/reset":
            return Answer({"error": half}) if number == 0 else Answer({"observation": f"count 2 {half}"})
        return Answer({"observation": f"count 2 {half}", "reward": 1.0, "done": True}) if path == "/step" else None

    def say(messages, body):
        return failure(503, half) if len(model.requests) == 1 else completion(f"win {half}", reasoning_content=half)

    with environment(fault) as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
        record, = attempts(tmp_path / "out")
        # A record of an older version, which has it still.
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "run.json").write_bytes((tmp_path / "out" / "run.json").read_bytes())
        (tmp_path / "old" / "attempts.jsonl").write_text(json.dumps({**record, "first": half, "outcome": "env_error", "started": half}) + "\n")
        assert main(["report", str(tmp_path / "old")]) == 0
        assert run(tmp_path / "old", env.url, model.base_url, "--items", "0") == 0
    turn, = record["turns"]
    assert (record["first"], turn["completion"], turn["reasoning"]) == ("count 2 \ufffd", "win \ufffd", "\ufffd")
    assert turn["observation"] == "count 2 \ufffd" and record["tries_before"][0]["error"].endswith("\ufffd")
    for name in ("out", "old"):
        assert attempts(tmp_path / name)[0]["outcome"] == "success"
        assert main(["conversations", str(tmp_path / name), "--out", str(tmp_path / "talks")]) == 0


# Faults of the environment.


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
    row_file.write_text(json.dumps(rows()["form-textcraft"].served()))
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


# Faults of the model.


def model_faults(first: Answer, times: int = 1):
    calls = []

    def say(messages, body):
        calls.append(time.monotonic())
        return first if len(calls) <= times else counter_player(messages, body)

    return say, calls


def test_a_429_is_waited_out_as_long_as_it_asks(tmp_path):
    say, calls = model_faults(failure(429, "slow down", retry_after="1"))
    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
    assert 1.0 <= calls[1] - calls[0] < 5
    record, = attempts(tmp_path / "out")
    assert (record["outcome"], record["model_retries"], record["rounds"]) == ("success", 1, 3)


@pytest.mark.parametrize("answer", [
    failure(500, "oops"),
    failure(408, "late"),
    failure(409, "again"),
    Answer(b'{"choices": [{"mess'),
    Answer({"choices": []}),
    Answer(b"<html>bad gateway</html>", 200, {"content-type": "text/html"}),
    Answer(drop=True),
], ids=["500", "408", "409", "torn JSON", "no choices", "a page", "a connection that ends"])
def test_a_passing_fault_of_the_endpoint_is_tried_again(answer, tmp_path):
    say, calls = model_faults(answer)
    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
    record, = attempts(tmp_path / "out")
    assert (record["outcome"], record["model_retries"], len(calls)) == ("success", 1, 4)
    assert env.stepped[1] == 3  # the environment noticed nothing


@pytest.mark.parametrize("answer", [failure(503, "down"), Answer(b"torn {"), Answer(delay=10)],
                         ids=["503", "malformed JSON", "a timeout"])
def test_a_lasting_fault_of_the_endpoint_is_a_model_error(answer, tmp_path):
    with environment() as env, endpoint(lambda messages, body: answer) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-1", "--model-tries", "2", "--request-timeout", "2") == 1
        assert env.sessions == {} and len(model.requests) == 4
    assert set(outcomes(tmp_path / "out").values()) == {"model_error"} and summary(tmp_path / "out")["items"] == 0


@pytest.mark.parametrize("status", [401, 402, 403, 404, 400])
def test_a_request_that_is_refused_for_good_ends_the_run_at_once(status, tmp_path, capsys):
    begun = time.monotonic()
    with environment() as env, endpoint(lambda messages, body: failure(status, "no, thank you")) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-9") == 2
        assert env.sessions == {}
    # One for each that plays at once; a refusal that may be the item's own ends the run with the third.
    assert time.monotonic() - begun < 60 and len(model.requests) <= (6 if status == 400 else 4)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"HTTP {status}" in error and "no, thank you" in error
    assert ("--temperature" in error) == (status == 400)  # nothing that is sent makes a key or an account valid


def test_a_context_that_is_full_is_an_outcome_of_its_own_and_counts(tmp_path):
    def say(messages, body):
        if messages[2]["content"] == "count 1" and len(messages) > 3:
            return failure(400, "This model's maximum context length is 8192 tokens", "context_length_exceeded")
        return counter_player(messages, body)

    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-2") == 0
        assert env.sessions == {}
    assert outcomes(tmp_path / "out") == {"0": "success", "1": "context_overflow", "2": "success"}
    assert summary(tmp_path / "out")["success"]["mean"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("message, told", [
    ("This model's maximum context length is 2048 tokens. However, you requested 4176 tokens", "--max-tokens (4096"),
    ("temperature exceeds the maximum of 1", "--temperature"),
], ids=["a context that the first request does not fit in", "a parameter"])
def test_a_first_request_that_does_not_fit_the_endpoint_is_misuse_and_no_score(message, told, tmp_path, capsys):
    with environment() as env, endpoint(lambda messages, body: failure(400, message)) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-9") == 2
        assert env.sessions == {}
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and told in error
    assert {one["outcome"] for one in attempts(tmp_path / "out")} <= {"model_error"}  # two, before it was clear


@pytest.mark.parametrize("body", [{"error": "TEXT"}, {"detail": "TEXT"}, {"message": "TEXT"}, b"TEXT"], ids=str)
def test_an_overflow_is_known_in_whatever_form_the_endpoint_says_it(body, tmp_path):
    text = "This model's maximum context length is 4096 tokens"
    body = text.encode() if isinstance(body, bytes) else dict.fromkeys(body, text)
    say = lambda messages, _: Answer(body, 400) if len(messages) > 3 else "add"  # noqa: E731
    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
    record, = attempts(tmp_path / "out")
    assert record["outcome"] == "context_overflow" and text in record["error"]


@pytest.mark.parametrize("answer", [failure(400, "This model's maximum context length is 9 tokens"), failure(403, "your input was flagged"),
                                    failure(400, "the content management policy")], ids=["too long", "moderation", "a filter"])
@pytest.mark.parametrize("item", [0, 3])
def test_an_item_that_is_refused_for_itself_stops_no_run(answer, item, tmp_path):
    say = lambda messages, body: answer if messages[2]["content"] == f"count {item}" else counter_player(messages, body)  # noqa: E731
    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-3", "--concurrency", "1", "--max-error-rate", "1") == 0
    found = outcomes(tmp_path / "out")
    # Once the endpoint has answered, a prompt that is too long for it is the model's: whichever came first.
    lost = "context_overflow" if "context" in answer.body["error"]["message"] else "model_error"
    assert found == {"0": "success", "1": "failure", "2": "success", "3": "failure", str(item): lost}


@pytest.mark.parametrize("again", [False, True])
def test_what_was_refused_before_the_first_answer_is_judged_as_what_came_after(again, tmp_path, capsys):
    too_long = failure(400, "This model's maximum context length is 9 tokens")
    say = lambda messages, body: too_long if messages[2]["content"] in ("count 0", "count 5") else counter_player(messages, body)  # noqa: E731
    with environment() as env, endpoint(say) as model:
        for _ in range(1 + again):
            assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-5", "--concurrency", "1") == 0
    found = outcomes(tmp_path / "out")
    assert (found["0"], found["5"]) == ("context_overflow", "context_overflow")
    assert summary(tmp_path / "out")["items"] == 6 and summary(tmp_path / "out")["errors"] == 0


def test_an_endpoint_that_is_not_there_is_misuse_after_three_attempts(tmp_path, capsys):
    url = f"http://127.0.0.1:{free_port()}/v1"
    with environment() as env:
        assert run(tmp_path / "out", env.url, url, "--items", "0-9", "--concurrency", "1", "--model-tries", "2") == 2
        assert env.created == 3 and env.sessions == {}
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"cannot reach {url}" in error and "--base-url" in error
    assert len(attempts(tmp_path / "out")) == 2


def test_an_endpoint_that_goes_midway_stops_the_run_which_keeps_its_numbers(tmp_path, capsys):
    gone = [True]

    def say(messages, body):
        # Gone for good from item 5 on; before, for two attempts in a row.
        return Answer(drop=True) if gone and messages[2]["content"] not in ("count 0", "count 3", "count 4") else counter_player(messages, body)

    with environment() as env, endpoint(say) as model:
        args = (tmp_path / "out", env.url, model.base_url, "--items", "0-9", "--concurrency", "1", "--model-tries", "2")
        assert run(*args) == 1 and env.sessions == {}
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "cannot reach" in error and f"the same command goes on with {tmp_path / 'out'}" in error
        found = summary(tmp_path / "out")
        assert (found["attempts"], found["items"], found["errors"]) == (7, 3, 4) and (tmp_path / "out/report.html").is_file()
        gone.clear()
        assert run(*args) == 0
    assert summary(tmp_path / "out")["items"] == 10


def test_an_endpoint_that_is_slow_stops_no_run(tmp_path):
    say = lambda messages, body: counter_player(messages, body) if messages[2]["content"] == "count 0" else Answer(delay=10)  # noqa: E731
    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-5", "--model-tries", "1", "--request-timeout", "1") == 1
    assert list(outcomes(tmp_path / "out").values()).count("model_error") == 5


def test_a_run_that_is_stopped_midway_keeps_its_numbers_and_goes_on(tmp_path, capsys):
    broke = [True]

    def say(messages, body):
        if broke[0] and messages[2]["content"] == "count 3":
            return failure(402, "nothing left")
        return counter_player(messages, body)

    with environment() as env, endpoint(say) as model:
        args = (tmp_path / "out", env.url, model.base_url, "--items", "0-5", "--concurrency", "1")
        assert run(*args) == 2 and env.sessions == {}
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "402" in error and f"the same command goes on with {tmp_path / 'out'}" in error
        assert summary(tmp_path / "out")["attempts"] == 3 and (tmp_path / "out/report.html").is_file()
        broke[0] = False
        assert run(*args) == 0
    assert summary(tmp_path / "out")["attempts"] == 6


@pytest.mark.parametrize("error, code, outcome", [
    ({"message": "No auth credentials found", "code": 401}, 2, None),
    ({"message": "maximum context length is 8192 tokens"}, 0, "context_overflow"),
    ({"message": "Provider returned error", "code": 502}, 1, "model_error"),
    ("overloaded", 1, "model_error"),
], ids=["a key", "too long", "a provider", "a text"])
def test_an_error_inside_a_200_is_what_it_says(error, code, outcome, tmp_path, capsys):
    say = lambda messages, body: Answer({"error": error}) if len(messages) > 3 else "add"  # noqa: E731
    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--model-tries", "2") == code
    shown = "".join(capsys.readouterr())
    assert (error if isinstance(error, str) else error["message"]) in shown + "".join(one["error"] for one in attempts(tmp_path / "out"))
    assert [one["outcome"] for one in attempts(tmp_path / "out")] == ([outcome] if outcome else [])


def test_an_endpoint_that_asks_for_no_wait_does_not_use_up_the_tries(tmp_path):
    begun = []

    def say(messages, body):
        begun.append(time.monotonic())
        return failure(429, "busy", retry_after="0") if begun[-1] < begun[0] + 2 else counter_player(messages, body)

    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
    assert outcomes(tmp_path / "out") == {"0": "success"}


def test_what_is_sent_for_no_key_is_not_taken_out_of_messages(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with environment() as env, endpoint(lambda messages, body: failure(422, "none of the tools") if len(messages) > 3 else "add") as model:
        run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--max-error-rate", "1")
    assert "none of the tools" in attempts(tmp_path / "out")[0]["error"]


@pytest.mark.parametrize("answer", [failure(429, "wait until tomorrow", retry_after="86400"), failure(429, "no credit", "insufficient_quota")],
                         ids=["a wait that is longer than the episode", "no money"])
def test_what_does_not_pass_soon_is_not_waited_for(answer, tmp_path, capsys):
    begun = time.monotonic()
    with environment() as env, endpoint(lambda messages, body: answer) as model:
        code = run(tmp_path / "out", env.url, model.base_url, "--items", "0")
        assert len(model.requests) == 1 and env.sessions == {}
    out, error = capsys.readouterr()
    assert time.monotonic() - begun < 60 and answer.body["error"]["message"] in out + error
    assert (code, "nothing left to pay" in error) == ((2, True) if answer.body["error"]["code"] else (1, False))


def test_an_endpoint_that_takes_no_empty_message_gets_a_word_for_it(tmp_path):
    def say(messages, body):
        if any(not one["content"] for one in messages):
            return failure(400, "assistant message must have content")
        return None if len(messages) == 3 else counter_player(messages, body)

    with environment() as env, endpoint(lambda *_: completion(say(*_)) if not isinstance(say(*_), Answer) else say(*_)) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
    record, = attempts(tmp_path / "out")
    assert (record["outcome"], record["invalid_actions"], record["turns"][0]["completion"]) == ("success", 1, "")


def test_a_body_that_drips_is_given_up_in_time(tmp_path):
    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        with suppress(OSError):
            while True:
                line, _ = listener.accept()
                line.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n")
                threading.Thread(target=trickle, args=(line, ), daemon=True).start()

    def trickle(line):
        with suppress(OSError):
            while True:
                line.sendall(b" ")
                time.sleep(0.1)

    threading.Thread(target=drip, daemon=True).start()
    begun = time.monotonic()
    with environment() as env, listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        assert run(tmp_path / "out", env.url, url, "--items", "0", "--request-timeout", "0.5", "--model-tries", "2") == 1
    record, = attempts(tmp_path / "out")
    assert time.monotonic() - begun < 10 and record["outcome"] == "model_error" and "no answer within 0.5 s" in record["error"]


def test_a_key_across_the_end_of_a_long_error_is_not_kept_in_part(tmp_path):
    with environment() as env, endpoint(lambda messages, body: failure(503, "x" * 290 + " " + KEY)) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--model-tries", "1") == 1
    assert KEY[:6] not in (tmp_path / "out" / "attempts.jsonl").read_text()


def test_an_address_with_a_stroke_at_its_end_is_the_same(tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        for base in (model.base_url, model.base_url + "/"):
            assert run(tmp_path / "out", env.url, base, "--items", "0") == 0
    assert len(model.requests) == 3


def said(content, finish="stop", **more):
    body = {**completion("x"), **more}
    body["choices"] = [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}]
    return body


def test_an_answer_in_parts_is_read_whole(tmp_path):
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "w"}, {"type": "text", "text": "in"}]
    with environment() as env, endpoint(lambda messages, body: said(parts)) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
    record, = attempts(tmp_path / "out")
    assert (record["outcome"], record["turns"][0]["completion"]) == ("success", "win")


@pytest.mark.parametrize("body", [
    said("", "error"), said(None, "error"), said("win", "abort"), said({"text": "win"}), said([{"type": "image_url"}]), said(["win"]), said(7),
    {"choices": {"a": 1}}, {"choices": [None]}, {"choices": ["x"]}, {"choices": [{"message": "hi"}]}, [1, 2], "str", None,
], ids=json.dumps)
def test_what_is_no_answer_is_the_endpoints_fault_and_never_a_score(body, tmp_path):
    with environment() as env, endpoint(lambda messages, _: Answer(body)) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--model-tries", "2") == 1
        assert len(model.requests) == 2
    record, = attempts(tmp_path / "out")
    assert (record["outcome"], record["reward"]) == ("model_error", None) and record["error"].count("\n") == 0


@pytest.mark.parametrize("usage", [None, [], "x", {"total_tokens": 5}, {"prompt_tokens": "12", "completion_tokens": "3"},
                                   {"prompt_tokens": 1.5, "completion_tokens": 2}, {"prompt_tokens": 5},
                                   {"prompt_tokens": -5, "completion_tokens": 1}, {"prompt_tokens": 5, "completion_tokens": -1}], ids=json.dumps)
def test_tokens_that_are_no_numbers_are_unknown(usage, tmp_path):
    with environment() as env, endpoint(lambda messages, _: said("win", usage=usage)) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
    record, = attempts(tmp_path / "out")
    assert record["usage"] == {"prompt": 0, "completion": 0, "cached": 0, "reasoning": 0, "unknown": 1}


@pytest.mark.parametrize("cached,kept", [(3, 3), (500, 5), (-500, 0)])
def test_no_more_tokens_are_cached_than_the_prompt_has(cached, kept, tmp_path):
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6, "prompt_tokens_details": {"cached_tokens": cached}}
    (tmp_path / "prices.toml").write_text('["stand-in"]\ninput = 1000\noutput = 0\ncached = 100\n')
    with environment() as env, endpoint(lambda messages, _: said("win", usage=usage)) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--prices", str(tmp_path / "prices.toml")) == 0
    assert attempts(tmp_path / "out")[0]["usage"]["cached"] == kept
    assert summary(tmp_path / "out")["cost"] == pytest.approx(((5 - kept) * 1000 + kept * 100) / 1e6)


def test_a_proxy_is_not_asked_for_an_endpoint_on_this_machine(tmp_path, monkeypatch):
    seen = []

    def proxy(method, path, headers, body):
        seen.append(path)
        return Answer({"error": "proxy"}, 502)

    with environment() as env, endpoint(counter_player) as model, serving(proxy) as url:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--model-tries", "1") == 0
    assert seen == []


@pytest.mark.parametrize("value,shown", [
    ("socks5://joe:hunter2@host:1080", "socks5://***@host:1080"), ("socks://host:1080", "socks://host:1080"), ("ftp://joe:hunter2@host", "ftp://***@host"),
    ("http://joe:hun/ter2@host:80", "http://***@host:80"), ("http://host:port", "http://host:port"),
])
def test_a_proxy_that_cannot_be_used_is_one_line_without_its_login(value, shown, tmp_path, monkeypatch, capsys):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", value)
    assert run(tmp_path / "out", "http://127.0.0.1:9", "https://model.example/v1", "--items", "0") == 2
    error = capsys.readouterr().err
    assert f"ALL_PROXY='{shown}'; name one that begins with http://" in error and error.count("\n") == 1
    assert "joe" not in error and "hun" not in error and not (tmp_path / "out").exists()


def test_empty_content_is_an_invalid_action_and_reasoning_is_kept_but_not_sent(tmp_path):
    def say(messages, body):
        if len(messages) == 3:
            return completion(None, reasoning_content="let me think")
        return counter_player(messages, body)

    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
    record, = attempts(tmp_path / "out")
    assert record["invalid_actions"] == 1 and record["turns"][0]["reasoning"] == "let me think"
    assert all("let me think" not in json.dumps(body) for _, body in model.requests)
    assert record["usage"] == {"prompt": 30, "completion": 6, "cached": 0, "reasoning": 0, "unknown": 0}


def test_tokens_cost_what_the_table_says(tmp_path, capsys):
    (tmp_path / "prices.toml").write_text('["stand-in"]\ninput = 1000.0\noutput = 5000.0\n')
    with environment() as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-1", "--prices", str(tmp_path / "prices.toml")) == 0
    assert summary(tmp_path / "out")["cost"] == pytest.approx((60 * 1000 + 12 * 5000) / 1e6)
    assert capsys.readouterr().err == ""
    (tmp_path / "prices.toml").write_text('["another"]\ninput = 1000.0\noutput = 5000.0\n')
    assert main(["rescore", str(tmp_path / "out"), "--prices", str(tmp_path / "prices.toml")]) == 0
    error = capsys.readouterr().err
    assert "prices.toml has no price for stand-in" in error and error.count("\n") == 1


# What is shown of runs afterwards.


def test_brackets_in_names_are_shown_as_they_are(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        for name in ("a[/b]", "[red]a"):
            assert run(tmp_path / "x[/y]" / name.replace("/", "-"), env.url, model.base_url, "--items", "0-1", "--model", name) == 0
    folders = sorted(map(str, (tmp_path / "x[/y]").iterdir()))
    assert main(["list", str(tmp_path / "x[/y]")]) == 0 and main(["compare", *folders, "--out", str(tmp_path / "both.html")]) == 0
    shown = capsys.readouterr().out
    assert "x[/y]" in shown and shown.count("a[/b]") >= 3 and shown.count("[red]a") >= 3


def test_a_comparison_of_checkpoints_draws_the_curve_over_their_steps(tmp_path):
    from tasks.lib.checkpoints import served_name
    with environment() as env, endpoint(counter_player) as model:
        for step in (100, 200):
            folder = tmp_path / f"saves/x/global_step_{step}/actor/huggingface"
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(b"x" * step)
            assert run(tmp_path / str(step), env.url, model.base_url, "--items", "0-1", "--model", served_name(folder)) == 0
    assert main(["compare", str(tmp_path / "200"), str(tmp_path / "100"), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert 'aria-label="Reward by training step: step 100: 50.0 %' in page and ", step 200: 50.0 %" in page and "training step</text>" in page


def test_a_rescored_run_is_shown_so_everywhere(tmp_path, capsys):
    folder = tmp_path / "runs" / "one"
    with environment() as env, endpoint(counter_player) as model:
        assert run(folder, env.url, model.base_url, "--items", "0-1") == 0
    easy = FIXTURE_ROWS.read_text().replace("success = { at_least = 1.0 }", "success = { at_least = 0.0 }")
    (tmp_path / "easy.toml").write_text(easy)
    assert main(["rescore", str(folder), "--environments", str(tmp_path / "easy.toml")]) == 0
    assert summary(folder)["success"]["mean"] == 1.0 and "100.0 %" in (folder / "report.html").read_text()
    capsys.readouterr()
    assert main(["list", str(tmp_path / "runs")]) == 0 and "100.0 %" in capsys.readouterr().out
    assert main(["conversations", str(folder), "--out", str(tmp_path / "talks")]) == 0
    assert len((tmp_path / "talks").read_text().splitlines()) == 2
    assert main(["report", str(folder)]) == 0 and "100.0 %" in (folder / "report.html").read_text()
    shutil.copytree(folder, tmp_path / "runs" / "two")
    capsys.readouterr()
    assert main(["compare", str(folder), str(tmp_path / "runs" / "two"), "--out", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out.count("100.0 %") >= 2
    assert main(["rescore", str(tmp_path / "runs" / "two")]) == 0
    capsys.readouterr()
    assert main(["compare", str(folder), str(tmp_path / "runs" / "two"), "--out", str(tmp_path / "both.html")]) == 0
    assert "row.success.at_least: was 0.0, is 1.0" in capsys.readouterr().out  # two rules are no small print
    told = json.loads((folder / "run.json").read_text())["config"]["base_url"]
    (folder / "attempts.jsonl").write_text("".join((folder / "attempts.jsonl").read_text().splitlines(True)[:1]))
    with environment() as env, endpoint(counter_player) as model:  # played on, it goes by its own rule
        assert run(folder, env.url, model.base_url, "--items", "0-1", "--base-url-as", told) == 0
    assert summary(folder)["success"]["mean"] == 0.5


def test_a_damaged_run_is_named_and_hides_no_other(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        assert run(tmp_path / "good", env.url, model.base_url, "--items", "0") == 0
    for name in ("torn", "odd", "empty"):
        shutil.copytree(tmp_path / "good", tmp_path / name)
    (tmp_path / "torn" / "run.json").write_text("{")
    (tmp_path / "odd" / "run.json").write_text('{"config": {}}')
    (tmp_path / "empty" / "summary.json").unlink()
    (tmp_path / "empty" / "attempts.jsonl").write_text("{}\n")
    capsys.readouterr()
    assert main(["list", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "good" in said.out and said.err.count("\n") == 3
    assert all(str(tmp_path / name) in said.err for name in ("torn", "odd", "empty"))


def test_files_go_into_new_folders_and_a_place_that_cannot_be_is_one_line(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
    shown = capsys.readouterr().out
    assert re.search(r"prompt +│ (row|plain)", shown)
    assert main(["conversations", str(tmp_path / "out"), "--out", str(tmp_path / "new" / "talks.jsonl")]) == 0
    assert (tmp_path / "new" / "talks.jsonl").read_text().count("\n") == 1
    assert main(["conversations", str(tmp_path / "out"), "--out", str(tmp_path / "new" / "talks.jsonl" / "x")]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and error.count("\n") == 1
    before = sorted(tmp_path.iterdir())
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "is a folder" in error and error.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("where,code,told", [("| head -1", 0, ""), (">/dev/full", 0, "No space left on device"), (">&-", 0, "")])
def test_a_run_goes_on_when_nobody_reads_what_it_says(where, code, told, tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        words = f"run --env form-textcraft --environments {FIXTURE_ROWS} --server {env.url} --base-url {model.base_url} --items 0-7 --concurrency 1"
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} -m evaluation {words} --out {tmp_path / 'out'} {where}"],
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=120)
        assert env.sessions == {}
    assert done.returncode == code and len(attempts(tmp_path / "out")) == 8 and (tmp_path / "out" / "report.html").exists()
    assert done.stderr.count("\n") == bool(told) and told in done.stderr


@pytest.mark.parametrize("where,code,told", [("| true", 1, ""), (">/dev/full", 1, "No space left on device"), (">&-", 0, "")])
def test_a_list_that_cannot_be_shown_is_no_traceback(where, code, told, tmp_path):
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} -m evaluation list {tmp_path} {where}"],
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code and done.stderr.count("\n") == bool(told) and told in done.stderr
