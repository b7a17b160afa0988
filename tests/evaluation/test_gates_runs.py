"""Whole runs whose environment or endpoint sends too much, leads elsewhere, or puts into its words what must not get out."""
import asyncio
import gzip
import json
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaluation.__main__ import main
from evaluation.protocol import Server
from evaluation.rows import read_row
from tests.evaluation.whole import KEY, attempts, outcomes, run, summary
from tests.fixtures.dripping import DRIPS, dripping, within
from tests.fixtures.servers import FIXTURE_ROWS
from tests.fixtures.standins import Answer, completion, counter_player, endpoint, environment, failure, serving

SMALL = ("--max-answer", "0.1", "--model-tries", "1", "--tries", "1", "--max-error-rate", "1")
LARGE = 200_000


@pytest.mark.parametrize("headers,body", [({}, b'"' + b"x" * LARGE + b'"'), ({"content-encoding": "gzip"}, gzip.compress(b'"' + b"x" * 10 * LARGE + b'"'))], ids=["plain", "packed"])
def test_an_answer_that_is_too_large_is_that_requests_fault_alone(headers, body, tmp_path):
    answer = Answer(body, 200, headers)
    fault = lambda path, number, said: answer if path == "/step" and number == 0 else None  # noqa: E731
    say = lambda messages, said: answer if messages[2]["content"] == "count 3" else counter_player(messages, said)  # noqa: E731
    with environment(fault) as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-3", "--concurrency", "1", *SMALL) == 0
    assert outcomes(tmp_path / "out") == {"0": "env_error", "1": "failure", "2": "success", "3": "model_error"}
    for record in attempts(tmp_path / "out"):
        assert not record["error"] or ("--max-answer" in record["error"] and len(record["error"]) < 400)


@pytest.mark.parametrize("encoding", [None, "gzip"])
def test_an_answer_within_the_limit_is_read_packed_or_not(encoding, tmp_path):
    def say(messages, body):
        said = json.dumps(completion(counter_player(messages, body))).encode()
        return Answer(gzip.compress(said), 200, {"content-encoding": "gzip"}) if encoding else Answer(said)

    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", *SMALL) == 0
    assert outcomes(tmp_path / "out") == {"0": "success"}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nothing_follows_a_redirect_to_another_host(status, tmp_path, capsys):
    seen = []

    def elsewhere(method, path, headers, body):
        seen.append((path, body))
        return Answer({"observation": "the text of an internal server", "reward": 1.0, "done": True, "id": 5})

    with serving(elsewhere) as url:
        there = Answer({}, status, {"location": url + "/step"})
        with environment(lambda path, number, body: there if path == "/step" else None) as env, endpoint(counter_player) as model:
            assert run(tmp_path / "env", env.url, model.base_url, "--items", "0", *SMALL) == 0
        with environment() as env, endpoint(lambda messages, body: there) as model:
            assert run(tmp_path / "model", env.url, model.base_url, "--items", "0-5", *SMALL) == 2
    assert seen == []
    record, = attempts(tmp_path / "env")
    assert record["outcome"] == "env_error" and f"HTTP {status} redirects to {url}/step, which is not followed" in record["error"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"redirects to {url}/step" in error and "--base-url" in error


def test_a_redirect_on_the_same_server_is_followed(tmp_path):
    fault = lambda path, number, body: Answer({}, 307, {"location": "/step"}) if path == "/step" and number == 0 else None  # noqa: E731
    with environment(fault) as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", *SMALL) == 0


@given(where=st.sampled_from(["completion", "reasoning", "refusal", "tool", "observation", "error"]), around=st.text(string.printable, max_size=10))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_secret_of_ours_is_kept_wherever_it_is_said(where, around, tmp_path_factory, capsys):
    out, word = tmp_path_factory.mktemp("secret"), around + KEY + around

    def say(messages, body):
        if where == "error":
            return failure(500, word)
        text = f"win {word}" if where == "completion" else "win"
        more = {"reasoning": {"reasoning_content": word}, "refusal": {"refusal": word}, "tool": {"tool_calls": [{"function": {"arguments": word, word: 1}}]}}
        return completion(text, **more.get(where, {}))

    def fault(path, number, body):
        return Answer({"observation": f"count 2 {word}", "reward": 1.0, "done": True}) if where == "observation" and path == "/step" else None

    with environment(fault) as env, endpoint(say) as model:
        run(out / "out", env.url, model.base_url, "--items", "0", *SMALL)
        main(["report", str(out / "out")])
        main(["conversations", str(out / "out"), "--all", "--out", str(out / "out" / "talks")])
    shown = "".join(capsys.readouterr())
    for text in (shown, *(path.read_text() for path in (out / "out").iterdir() if path.is_file())):
        assert KEY not in text
    assert (out / "out" / "attempts.jsonl").read_text().count("***")


@pytest.mark.parametrize("reward", [1e308, -1e308, 1e10, 10**300])
def test_a_reward_that_no_environment_gives_is_its_fault_and_no_score(reward, tmp_path):
    fault = lambda path, number, body: Answer({"observation": "o", "reward": reward, "done": True}) if path == "/step" and number == 0 else None  # noqa: E731
    with environment(fault) as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-1", "--concurrency", "1", *SMALL) == 0
    assert outcomes(tmp_path / "out") == {"0": "env_error", "1": "failure"} and summary(tmp_path / "out")["reward"]["mean"] == 0.0


def test_one_bad_run_hides_no_other(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        for name in ("good", "bad"):
            assert run(tmp_path / name, env.url, model.base_url, "--items", "0-1", *SMALL) == 0
    record = {**attempts(tmp_path / "bad")[0], "reward": 1e308, "usage": {"prompt": 10**300, "completion": 1, "cached": 0, "reasoning": 0, "unknown": 0}}
    with (tmp_path / "bad" / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n" + json.dumps({**record, "scaled": None}) + "\n")
    capsys.readouterr()
    assert main(["list", str(tmp_path)]) == 0
    out, error = capsys.readouterr()
    assert out.count("50.0 %") == 2 and error.count("\n") == 2 and "line 3 has reward" in error
    (tmp_path / "bad" / "summary.json").write_text(json.dumps({"attempts": 10**300, "expected": 1, "success": {"mean": 10**300}, "errors": 0}))
    assert main(["list", str(tmp_path)]) == 0 and capsys.readouterr().out.count("50.0 %") == 2
    (tmp_path / "bad" / "run.json").write_text("[" * 100_000)
    assert main(["list", str(tmp_path)]) == 2
    out, error = capsys.readouterr()
    assert "50.0 %" in out and error.count("\n") == 1 and "run.json is no JSON" in error
    assert main(["report", str(tmp_path / "good"), str(tmp_path / "bad"), "--out", str(tmp_path / "both.html")]) == 2
    assert (tmp_path / "both.html").exists() and "run.json is no JSON" in capsys.readouterr().err


def test_a_server_that_says_it_all_worked_is_not_believed_by_the_terminal(tmp_path, capsys):
    word = "\x1b[2K\rsuccess rate 100 %\n\u202e\x9b2J"
    with environment(lambda path, number, body: Answer({"error": word}) if path == "/reset" else None) as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-3", "--tries", "1") == 1
    shown = "".join(capsys.readouterr())
    assert not any(one in shown for one in "\x1b\r\x9b\u202e") and "\\x1b[2K" in shown
    assert "\nsuccess rate 100" not in shown and "\\u202e" in attempts(tmp_path / "out")[0]["error"]


def test_cookies_are_neither_kept_nor_sent_back(tmp_path):
    asked = []

    def say(messages, body):
        return Answer(completion(counter_player(messages, body)), 200, {"set-cookie": "user=another; Path=/"})

    def respond(method, path, headers, body):
        asked.append(headers)
        return Answer({"id": len(asked)}, 200, {"set-cookie": "session=of_another; Path=/"})

    async def opens(url):
        async with Server(url, read_row("form-textcraft", FIXTURE_ROWS).protocol, 5.0) as server:
            await server.create()
            await server.create()

    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", *SMALL) == 0
        asked += [headers for headers, _ in model.requests]
    with serving(respond) as url:
        asyncio.run(opens(url))
    assert len(asked) > 4 and not any("cookie" in headers for headers in asked)


@pytest.mark.parametrize("kind", DRIPS)
def test_who_drips_is_that_requests_fault_alone(kind, tmp_path):
    with dripping(kind) as url, environment() as env, within(60):
        code = run(tmp_path / "out", env.url, url + "/v1", "--items", "0", *SMALL, "--request-timeout", "1")
    assert code == 0 and outcomes(tmp_path / "out") == {"0": "model_error"}
    with dripping(kind) as url, endpoint(counter_player) as model, within(60):
        code = run(tmp_path / "env", url, model.base_url, "--items", "0", *SMALL, "--env-timeout", "1", "--env-wait", "1")
    assert code in (0, 1, 2) and not {*outcomes(tmp_path / "env").values()} & {"success", "failure"}
