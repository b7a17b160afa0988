"""Whole runs whose endpoint fails or answers oddly."""
import json
import socket
import threading
import time
from contextlib import suppress

import pytest

from evaluation.__main__ import main
from tests.evaluation.whole import KEY, attempts, outcomes, run, summary
from tests.fixtures.servers import free_port
from tests.fixtures.standins import Answer, completion, counter_player, endpoint, environment, failure, serving


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
    lost = "context_overflow" if "context" in answer.body["error"]["message"] else "refused"
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
        out, error = capsys.readouterr()
        assert "3 of 10 attempts have a score; while a run is not whole its numbers are biased" in out
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


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_asks_for_a_login_is_one_line_that_says_where_it_goes(scheme, tmp_path, monkeypatch, capsys):
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse():
        with suppress(OSError):
            while True:
                line, _ = listener.accept()
                with line:
                    line.recv(65536)
                    line.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nproxy-authenticate: Basic\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")

    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
    threading.Thread(target=refuse, daemon=True).start()
    with environment() as env, listener:
        assert run(tmp_path / "out", env.url, f"{scheme}://model.example/v1", "--items", "0-9", "--concurrency", "1", "--model-tries", "1") == 2
    error = capsys.readouterr().err
    assert "407" in error and "the proxy asks for a login; put it into HTTPS_PROXY" in error and error.count("\n") == 1


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
