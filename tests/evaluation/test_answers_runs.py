"""Whole runs over real HTTP: which answers are the model's words, and what is learnt from those that are not."""
import json
import re
import ssl
import subprocess
import threading
import time
from http.server import ThreadingHTTPServer

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaluation.answers import (
    FINISHED,
    FULL,
    completion_of,
    failure_in,
    room_in,
    said_in,
    streamed,
    unsupported,
    usage_of,
)
from evaluation.endpoint import ChatModel
from evaluation.model import Usage
from evaluation.numbers import cost
from evaluation.thoughts import split_thought
from tests.evaluation.whole import attempts, outcomes, run, summary
from tests.fixtures.servers import FIXTURE_ROWS
from tests.fixtures.standins import Answer, completion, counter_player, endpoint, environment, failure, serving

ONCE = ("--model-tries", "1", "--concurrency", "1", "--max-error-rate", "1")
WORDS = st.text(max_size=8)
KEYS = st.sampled_from(["error", "error", "errors", "Error", "error_message", "errorMessage", "error_msg", "error-code", "error_info"])
STATES = st.sampled_from([{"object": "error"}, {"type": "error", "code": 503}, {"status": "failed"}, {"success": False}, {"status": "Cancelled"}])
ERRORS = st.sampled_from(["overloaded", {"message": "Provider returned error", "code": 502}, {"message": "no"}, ["x"], {"code": "insufficient_system_resource"}, True, 500])
NOTHING = st.sampled_from([None, "", {}, [], False, 0])
REASONS = st.sampled_from(["insufficient_system_resource", "error", "abort", "timeout", "cancelled", "server_error", "preempted", "unknown", "network_error"]) | st.text(min_size=1).filter(
    lambda text: text.strip() and text.strip().lower() not in FINISHED | FULL) | st.integers() | st.booleans() | st.lists(WORDS)


@st.composite
def failed_answers(draw):
    """An answer with status 200 that says somewhere that it failed, or ends as no whole answer does; with or without words."""
    body = completion(draw(st.sampled_from(["win", "", None, "Action: win"])))
    choice, where = body["choices"][0], draw(st.integers(1, 31))
    parts = (body, choice, choice["message"])
    if where & 1:
        choice["finish_reason"] = draw(REASONS)
    for bit, part in zip((2, 4, 8), parts, strict=True):
        if where & bit:
            part[draw(KEYS)] = draw(ERRORS)
    if where & 16:
        draw(st.sampled_from(parts)).update(draw(STATES))
    for part in parts:
        part.setdefault("error", draw(NOTHING))
    return body


def in_pieces(body: dict, ends: int) -> bytes:
    """The same answer as a stream: what choice and message say of themselves comes in the first piece, a whole answer's end after it."""
    choice = body["choices"][0]
    first = {**body, "choices": [{**{key: value for key, value in choice.items() if key != "message"}, "index": 0, "delta": choice["message"]}]}
    last = {"choices": [{"index": 0, "delta": {"content": "win", "error": ""}, "finish_reason": "stop", "error": None}]}
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in (first, last)[:ends]) + b"data: [DONE]\n\n"


@given(body=failed_answers(), kind=st.sampled_from(["application/json", "text/html", "text/plain", "text/event-stream", ""]), ends=st.sampled_from([0, 0, 1, 2]))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_failed_answer_is_ever_scored(body, kind, ends, tmp_path_factory):
    out = tmp_path_factory.mktemp("failed")
    said = in_pieces(body, ends) if ends else body
    with environment() as env, endpoint(lambda messages, _: Answer(said, 200, {"content-type": kind})) as model:
        run(out / "out", env.url, model.base_url, "--items", "0", *(["--stream"] if ends else []), *ONCE)
        assert not env.stepped
    for record in attempts(out / "out") if (out / "out" / "attempts.jsonl").exists() else []:
        assert (record["outcome"], record["reward"]) == ("model_error", None)


@given(failed_answers(), st.sampled_from([0, 1, 2]))
@settings(max_examples=500)
def test_no_failed_answer_is_ever_taken_for_a_whole_one(body, ends):
    try:
        answer = streamed(in_pieces(body, ends).decode()) if ends else body
    except ValueError:
        return
    if failure_in(answer) is None:
        with pytest.raises(ValueError):
            completion_of(answer)


@given(st.sampled_from(sorted(FINISHED)), NOTHING | st.sampled_from([{"code": 0, "message": ""}, "0", "none", [None]]), st.sampled_from(["error", "errors", "error_code", "error_msg"]))
def test_a_whole_answer_is_one_whatever_its_reason_is_called(reason, nothing, key):
    body = {**completion("win"), key: nothing, "status": "completed", "success": True}
    body["choices"][0].update(finish_reason=reason, **{key: nothing})
    assert failure_in(body) is None and completion_of(body).text == "win"
    body["choices"][0]["message"] = {"role": "assistant", "content": "", key: nothing}
    told = streamed(in_pieces(body, 2).decode())
    assert failure_in(told) is None and completion_of(told).text == "win"


@pytest.mark.parametrize("events", [
    'data: {"choices": [{"delta": {"content": "win"}}]}\n\ndata: [DONE]\n\n',
    'data: {"choices": [{"delta": {"content": "win"}}]}\n\nevent: error\ndata: {"message": "overloaded"}\n\ndata: [DONE]\n\n',
    'data: {"choices": [{"delta": {"content": "win"}, "finish_reason": "stop"}]}\n\nevent: error\ndata: overloaded\n\n',
    'data: {"choices": [{"delta": {"content": "win"}}]}\n\ndata: {"object": "error", "message": "engine died", "code": 500}\n\ndata: [DONE]\n\n',
    'data: {"choices": [{"delta": {"content": "wi"}, "finish_reason": "abort"}]}\n\ndata: {"choices": [{"delta": {"content": "n"}, "finish_reason": "stop"}]}\n\n',
    'data: {"choices": [{"delta": {"content": "win"}, "error": {"message": "x"}}]}\n\ndata: {"choices": [{"delta": {}, "error": {}, "finish_reason": "stop"}]}\n\n',
], ids=["done without a reason", "an event named error", "an error after the end", "vLLM's error", "an abort and a stop", "an error that a later piece hides"])
def test_a_stream_that_fails_in_the_middle_is_no_answer(events, tmp_path):
    with environment() as env, endpoint(lambda messages, _: Answer(events.encode(), 200, {"content-type": "text/event-stream"}) if len(messages) > 3 else
                                        Answer(pieces("add", {}), 200, {"content-type": "text/event-stream"})) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--stream", "--model-tries", "1") == 1
    record, = attempts(tmp_path / "out")
    assert record["outcome"] == "model_error" and len(record["turns"]) == 1


@pytest.mark.parametrize("content,text,reasoning,refusal", [
    ([{"type": "thinking", "thinking": [{"type": "text", "text": "lose"}]}, {"type": "text", "text": "win"}], "win", "lose", ""),
    ([{"type": "reasoning", "text": "lose"}, {"type": "output_text", "text": "w"}, {"text": "in"}], "win", "lose", ""),
    ([{"type": "refusal", "refusal": "I cannot"}], "", "", "I cannot"),
    ([], "", "", ""),
])
def test_parts_of_a_content_are_told_apart(content, text, reasoning, refusal):
    found = completion_of(completion(content))
    assert (found.text, found.reasoning, found.refusal) == (text, reasoning, refusal)


@pytest.mark.parametrize("message", [None, {}, [], "win", 0], ids=repr)
def test_a_choice_without_a_message_is_no_empty_answer(message):
    body = completion("win")
    body["choices"][0]["message"] = message
    with pytest.raises(ValueError, match="it has no message"):
        completion_of(body)


@pytest.mark.parametrize("content", [5, {"text": "win"}, ["win"], [{"type": "error", "text": "win"}], [{"type": "image_url", "image_url": {}}], [{"type": ["text"], "text": "win"}], [{"type": "text", "text": None}]], ids=repr)
def test_a_content_of_another_form_is_no_answer(content):
    with pytest.raises(ValueError, match="its content is no text"):
        completion_of(completion(content))


def test_a_choices_error_is_kept_in_its_own_words_and_tried_again(tmp_path):
    body = completion("wi")
    body["choices"][0].update(finish_reason="error", error={"message": "the provider went away", "code": 502})
    with environment() as env, endpoint(lambda messages, _: Answer(body) if len(messages) > 3 else "add") as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--model-tries", "2") == 1
        assert len(model.requests) == 3
    record, = attempts(tmp_path / "out")
    assert record["outcome"] == "model_error" and "the provider went away" in record["error"] and record["model_retries"] == 1


@pytest.mark.parametrize("reason", ["model_length", "model_context_window_exceeded"])
def test_an_answer_that_fills_the_context_is_an_overflow(reason, tmp_path):
    full = completion("win")
    full["choices"][0]["finish_reason"] = reason
    with environment() as env, endpoint(lambda messages, _: full if len(messages) > 3 else "add") as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
    record, = attempts(tmp_path / "out")
    assert record["outcome"] == "context_overflow" and record["usage"]["prompt"] == 20


def test_a_finish_reason_of_ones_own_endpoint_can_be_named(tmp_path):
    def say(messages, body):
        found = completion(counter_player(messages, body))
        found["choices"][0]["finish_reason"] = "fertig"
        return found

    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "a", env.url, model.base_url, "--items", "0", *ONCE) == 0
        assert run(tmp_path / "b", env.url, model.base_url, "--items", "0", "--finish-reason", "fertig", *ONCE) == 0
    assert "--finish-reason fertig" in attempts(tmp_path / "a")[0]["error"] and outcomes(tmp_path / "b") == {"0": "success"}


# Tokens


@given(*[st.integers(0, 10**6)] * 3, st.booleans(), st.booleans())
def test_tokens_of_reasoning_count_once_wherever_they_stand(prompt, completion_tokens, reasoning, beside, detailed):
    reasoning = reasoning if beside else min(reasoning, completion_tokens)
    used = {"prompt_tokens": prompt, "completion_tokens": completion_tokens, "total_tokens": prompt + completion_tokens + (reasoning if beside else 0)}
    if detailed or not beside:
        used["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    found = usage_of(used)
    assert (found.prompt, found.completion, found.reasoning, found.unknown) == (prompt, completion_tokens + (reasoning if beside else 0), reasoning, 0)


@pytest.mark.parametrize("tokens", [10**400, 10**10, 10**300, -1])
def test_more_tokens_than_any_answer_has_are_unknown(tokens):
    assert usage_of({"prompt_tokens": tokens, "completion_tokens": 1}) == Usage(unknown=1)


def test_reasoning_beside_the_completion_is_paid_for_and_limited(tmp_path):
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 112, "completion_tokens_details": {"reasoning_tokens": 100}}
    with environment() as env, endpoint(lambda messages, _: {**completion("add"), "usage": usage}) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--token-limit", "200") == 0
    record, = attempts(tmp_path / "out")
    assert (record["outcome"], record["rounds"], record["usage"]["completion"]) == ("token_limit", 2, 204)
    assert cost(record["usage"], {"input": 0.0, "output": 1e6}) == 204


def usage_last(text: str, used: object) -> Answer:
    return Answer(pieces(text, used), 200, {"content-type": "text/event-stream"})


@pytest.mark.parametrize("used,kept", [
    ({"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 112}, (10, 102, 100, 0)),
    ({"prompt_tokens": 10, "completion_tokens": 2, "completion_tokens_details": {"reasoning_tokens": 100}}, (10, 102, 100, 0)),
    ({"prompt_tokens": 10, "completion_tokens": 102, "total_tokens": 112, "completion_tokens_details": {"reasoning_tokens": 100}}, (10, 102, 100, 0)),
    ({"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 3, "completion_tokens_details": {"reasoning_tokens": None}}, (10, 2, 0, 0)),
    ({"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": "112", "completion_tokens_details": {"reasoning_tokens": "100"}}, (10, 2, 0, 0)),
    ({"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": None, "completion_tokens_details": None}, (10, 2, 0, 0)),
    ({"prompt_tokens": None, "completion_tokens": 2, "total_tokens": 12}, (0, 0, 0, 1)), (None, (0, 0, 0, 1)),
    ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, (0, 0, 0, 1)), ({"prompt_tokens": 10, "completion_tokens": 0, "total_tokens": 10}, (10, 0, 0, 1)),
], ids=json.dumps)
@pytest.mark.parametrize("stream", [True, False])
def test_the_tokens_of_an_answer_are_read_whole_or_said_to_be_unknown(used, kept, stream, tmp_path, capsys):
    (tmp_path / "prices.toml").write_text('["stand-in"]\ninput = 0\noutput = 1e6\n')
    say = lambda messages, body: usage_last("win", used) if stream else {**completion("win"), "usage": used}  # noqa: E731
    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--prices", str(tmp_path / "prices.toml"), "--token-limit", "300", *(["--stream"] if stream else [])) == 0
    record, shown = attempts(tmp_path / "out")[0], capsys.readouterr().out
    assert tuple(record["usage"][key] for key in ("prompt", "completion", "reasoning", "unknown")) == kept
    assert summary(tmp_path / "out")["cost"] == kept[1]
    assert ("at least" in shown, "did not say the tokens of 1 answers, which --token-limit 300 could not count" in shown) == (kept[3] == 1, kept[3] == 1)
    assert (f"{kept[0]} in, {kept[1]} out" if kept[0] else "1 answers unknown") in shown


# The context


@pytest.mark.parametrize("message,context,prompt", [
    ("This model's maximum context length is 2048 tokens. However, you requested 4176 tokens (80 in the messages, 4096 in the completion). Please reduce", 2048, 80),
    ("This model's maximum context length is 2048 tokens. However, you requested 4176 tokens", 2048, 80),
    ("'max_tokens' or 'max_completion_tokens' is too large: 4096. This model's maximum context length is 2048 tokens and your request has 80 input tokens (4096 > 2048 - 80).", 2048, 80),
    ("input length and `max_tokens` exceed context limit: 9000 + 4096 > 10000, decrease input length or `max_tokens` and try again", 10000, 9000),
    ("Requested token count exceeds the model's maximum context length of 4096 tokens. You requested a total of 5096 tokens: 1000 tokens from the input messages and 4096 tokens for the completion.", 4096, 1000),
    ("`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens and 4096 `max_new_tokens`", 4096, 4000),
    ("This model's maximum context length is 8192 tokens", 8192, None),
    ("You passed 80 input tokens and requested 4096 output tokens. However, the model's context length is only 2048 tokens, resulting in a maximum input length of 1024 tokens.", 2048, 80),
    ("The decoder prompt (length 5951) is longer than the maximum model length of 4096. Make sure that `max_model_len` is no smaller", 4096, 5951),
    ("Input length (5000) exceeds model's maximum context length (4096).", 4096, 5000),
    ("The input (691,793 tokens) is longer than the model's context length (540000 tokens).", 540000, 691793),
    ("Input length (5000 tokens) exceeds the maximum allowed length (4090 tokens). Use a shorter input", 4090, 5000),
    ("request (13392 tokens) exceeds the available context size (8192 tokens), try increasing it", 8192, 13392),
    ("inputs tokens + max_new_tokens must be <= 8193. Given: 4000 inputs tokens and 4096 max_new_tokens", 8193, 4000),
    ("This endpoint's maximum context length is 32768 tokens. However, you requested about 34096 tokens (30000 of text input, 4096 in the output).", 32768, 30000),
    ("This model's maximum context length is 4097 tokens, however you requested 4927 tokens (831 in your prompt; 4096 for the completion). Please reduce your prompt", 4097, 831),
    ("The prompt is too long: 40000, model maximum context length: 32767", 32767, 40000),
    ("Prompt contains 65673 tokens and 0 draft tokens, too large for model with 32768 maximum context length", 32768, 65673),
    ("The sum of prompt length (1000.0), query length (0) and max_tokens (4096) should not exceed max_seq_len (4096)", 4096, 1000),
    ("The estimated number of input and maximum output tokens (4352) exceeded this model context window limit (4096).", 4096, 256),
    ("The maximum context length of Meta-Llama-3 is 8192. However, answering your request will take 9096 tokens. Please reduce the length of the messages", 8192, 5000),
    ("Trying to keep the first 5000 tokens when context the overflows. However, the model is loaded with context length of only 4096 tokens", 4096, 5000),
])
def test_what_an_endpoint_says_of_its_context_is_read(message, context, prompt):
    assert room_in(message, 4096) == (context, prompt)


@given(st.text())
def test_nothing_that_is_said_of_a_context_breaks_the_reader(text):
    room_in(text, 4096), unsupported(text, text, {"temperature": 1, "max_tokens": 1})


def limited(context: int, named: bool = True):
    """An endpoint that refuses what does not fit into its context together; each message is 40 tokens."""

    def say(messages, body):
        prompt, wanted = 40 * len(messages), body.get("max_tokens", 0)
        if prompt + wanted > context:
            return failure(400, f"This model's maximum context length is {context} tokens." + (
                f" However, you requested {prompt + wanted} tokens ({prompt} in the messages, {wanted} in the completion)." if named else ""))
        return completion(counter_player(messages, body), prompt, 2)

    return say


def test_a_shorter_answer_is_asked_for_where_prompt_and_answer_do_not_fit_together(tmp_path):
    with environment() as env, endpoint(limited(400)) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--max-tokens", "250") == 0
    record, = attempts(tmp_path / "out")
    assert record["outcome"] == "success" and [turn.get("cut") for turn in record["turns"]] == [None, 200, 120]


SHORT = ["You passed {prompt} input tokens and requested {wanted} output tokens. However, the model's context length is only {context} tokens.",
         "`inputs` tokens + `max_new_tokens` must be <= {context}. Given: {prompt} `inputs` tokens and {wanted} `max_new_tokens`",
         "input length and `max_tokens` exceed context limit: {prompt} + {wanted} > {context}, decrease input length or `max_tokens` and try again",
         "The estimated number of input and maximum output tokens ({sum}) exceeded this model context window limit ({context}).",
         "This endpoint's maximum context length is {context} tokens. However, you requested about {sum} tokens ({prompt} of text input, {wanted} in the output)."]
LONG = ["The decoder prompt (length {prompt}) is longer than the maximum model length of {context}. Make sure that `max_model_len` is no smaller",
        "The input ({prompt} tokens) is longer than the model's context length ({context} tokens).", "Input length ({prompt} tokens) exceeds the maximum allowed length ({context} tokens).",
        "request ({prompt} tokens) exceeds the available context size ({context} tokens), try increasing it", "The prompt is too long: {prompt}, model maximum context length: {context}",
        "prompt token count of {prompt} exceeds the limit of {context}"]


@pytest.mark.parametrize("wording", SHORT)
def test_each_endpoints_words_for_a_full_context_are_read(wording, tmp_path):
    def say(messages, body):
        prompt, wanted = 40 * len(messages), body["max_tokens"]
        told = wording.format(prompt=prompt, wanted=wanted, context=400, sum=prompt + wanted)
        return failure(422, told) if prompt + wanted > 400 else completion(counter_player(messages, body), prompt, 2)

    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--max-tokens", "250") == 0
    record, = attempts(tmp_path / "out")
    assert record["outcome"] == "success" and [turn.get("cut") for turn in record["turns"]] == [None, 200, 120]


@pytest.mark.parametrize("wording", LONG)
def test_a_prompt_that_alone_is_too_long_leaves_no_room(wording, tmp_path, capsys):
    say = lambda messages, body: failure(400, wording.format(prompt=5000, context=4096)) if len(messages) > 3 else completion("add", 1000, 2)  # noqa: E731
    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-2") == 0
    assert set(outcomes(tmp_path / "out").values()) == {"context_overflow"} and summary(tmp_path / "out")["room_left"] == 0
    assert "room left" not in capsys.readouterr().out


def test_a_run_says_how_many_attempts_ended_with_room_left(tmp_path, capsys):
    with environment() as env, endpoint(limited(400, named=False)) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-2", "--max-tokens", "250") == 0
    assert set(outcomes(tmp_path / "out").values()) == {"context_overflow"} and summary(tmp_path / "out")["room_left"] == 3
    assert "3 attempts ended in context_overflow with room left in the context: lower --max-tokens (250 now)" in capsys.readouterr().out


# Thoughts, refusals, empty answers


@pytest.mark.parametrize("text,thought,rest", [
    ("<think>Action: lose</think>\nAction: win", "Action: lose", "Action: win"), ("<Thinking>\na\n</Thinking>win", "a", "win"), ("<reasoning>a</reasoning><think>b</think> win", "a\nb", "win"),
    ("<think>never closed", "never closed", ""), ("opened by the template</think>win", "opened by the template", "win"), ("[THINK]a[/THINK]win", "a", "win"), ("◁think▷a◁/think▷win", "a", "win"),
    ("<seed:think>a</seed:think>win", "a", "win"), ("<think></think>win", "", "win"), ("win", "", "win"), ("a <think>b", "", "a <think>b"), ("", "", ""), ("<search>x</search>", "", "<search>x</search>"),
    ("<think>a<think>b</think>c</think>win", "a<think>b</think>c", "win"), ("<think>no <think> tags</think>win", "no <think> tags", "win"), ("a</think>b</think>win", "a</think>b", "win"),
    ("<reasoning>a <think>b</think> c</reasoning>win", "a <think>b</think> c", "win"), ("<THINK budget='5'>a</Think >win", "a", "win"), ("<think depth=2>never closed", "never closed", ""),
    ("\ufeff <think>never closed", "never closed", ""), ("\u200b<think>a</think>win", "a", "win"), ("<thinking>a</think>win", "a", "win"), ("<think/>win", "", "win"),
    ("win <think>was it?</think>", "was it?", "win "), ("Sure. <think>Action: lose</think>Action: win", "Action: lose", "Sure. Action: win"), ("a</reasoning>win", "a", "win"),
    ("win <reasoning>why</reasoning>", "", "win <reasoning>why</reasoning>"), ("win<|end|>", "", "win<|end|>"), ("<|START_THINKING|>a<|END_THINKING|>win", "a", "win"),
    ("<|begin_of_thought|>a<|end_of_thought|>win", "a", "win"), ("<thinker>a</thinker>win", "", "<thinker>a</thinker>win"),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>win<|return|>", "a", "win"),
])
def test_a_thought_before_the_answer_is_apart(text, thought, rest):
    assert split_thought(text) == (thought, rest)


@given(st.text(), st.sampled_from(["think", "thinking", "reasoning", "THINK", "thought"]), st.text())
def test_what_follows_a_thought_is_the_answer(thought, tag, rest):
    if f"</{tag}" not in thought and not re.match(r"\s*[<\[◁]", rest) and "think" not in rest.lower():
        assert split_thought(f"<{tag}>{thought}</{tag}>{rest}") == (thought.strip(), rest.lstrip())


@pytest.mark.parametrize("text", ["<think>" * 10**6, "a" + "<think>" * 10**6, "a" + "<think>x</think>" * 10**6, "</think>" * 10**6, "<think " * 10**5, "[THINK]</think>" * 10**6],
                         ids=["opened", "opened later", "closed", "ends", "half", "mixed"])
def test_marks_without_number_are_read_in_one_go(text):  # reading them over and over takes longer than a test may
    thought, rest = split_thought(text)
    assert len(thought) + len(rest) <= len(text)


def test_an_action_in_a_thought_is_never_played_unless_it_is_kept(tmp_path):
    say = lambda messages, body: f"<think>\nlose</think>\n{counter_player(messages, body)}"  # noqa: E731
    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
        sent = [one["content"] for one in model.requests[-1][1]["messages"] if one["role"] == "assistant"]
        assert run(tmp_path / "kept", env.url, model.base_url, "--items", "0", "--keep-think") == 0
    record, = attempts(tmp_path / "out")
    assert record["outcome"] == "success" and record["turns"][0]["reasoning"] == "lose" and not any("<think>" in text for text in sent)
    assert attempts(tmp_path / "kept")[0]["turns"][0]["completion"].startswith("<think>")
    configs = [json.loads((tmp_path / name / "run.json").read_text())["config"]["sampling"]["keep_think"] for name in ("out", "kept")]
    assert configs == [False, True]


@pytest.mark.parametrize("rule,kept", [("after_first_action", "lose"), ("one_action_line", "win"), ("raw", "<think>"), ("after_last_action", "win"), ("whole_line", "win")])
def test_a_thought_is_no_action_by_any_rule(rule, kept, tmp_path):
    """`kept`: how the action that is played with --keep-think begins, or the refused turn's, whose answer is not played."""
    mark = "" if rule in ("raw", "whole_line") else "Action: "
    (tmp_path / "rows.toml").write_text(FIXTURE_ROWS.read_text().replace('action = "whole_line"', f'action = "{rule}"'))
    played = []
    fault = lambda path, number, body: played.append(body["action"]) if path == "/step" else None  # noqa: E731
    flags = ("--items", "0", "--environments", str(tmp_path / "rows.toml"), "--max-round", "1")
    with environment(fault) as env, endpoint(lambda messages, body: f"<think>{mark}lose</think>\n{mark}win") as model:
        assert run(tmp_path / "out", env.url, model.base_url, *flags) == 0
        assert played == ["win"] and outcomes(tmp_path / "out") == {"0": "success"}
        played.clear()
        assert run(tmp_path / "kept", env.url, model.base_url, *flags, "--keep-think") == 0
    assert (played[0].startswith(kept) if played else rule == "one_action_line") and attempts(tmp_path / "kept")[0]["turns"][0].get("invalid") == (True if rule == "one_action_line" else None)


def test_refusals_and_tool_calls_are_kept_and_empty_answers_are_said(tmp_path, capsys):
    calls = [{"id": "1", "type": "function", "function": {"name": "win", "arguments": "{}"}}]
    say = lambda messages, body: completion("", refusal="I cannot") if len(messages) == 3 else completion(None, tool_calls=calls)  # noqa: E731
    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--max-round", "2") == 0
    first, second = attempts(tmp_path / "out")[0]["turns"]
    assert (first["refusal"], second["extras"]) == ("I cannot", {"tool_calls": calls})
    shown = capsys.readouterr().out
    assert re.search(r"empty answers\W+2 of 2", shown) and "2 of 2 answers are empty" in shown
    assert "empty answers" in (tmp_path / "out" / "report.html").read_text()


# Answers that are of no use


@given(st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_three_useless_answers_stop_a_run_in_which_none_was_of_use(tmp_path_factory, data):
    answer = data.draw(st.sampled_from([
        Answer(b"<html>Welcome to nginx</html>", 200, {"content-type": "text/html"}), Answer({"choices": []}), Answer({"object": "list", "data": []}), Answer({"choices": [{"message": {}, "finish_reason": "stop"}]}),
        Answer({"object": "error", "message": "loading", "code": 503}), Answer(b"event: error\ndata: {}\n\n", 200, {"content-type": "text/event-stream"}), Answer(b"data: [DONE]\n\n"), failure(503, "loading"),
        failure(429, "daily limit", retry_after="86400"), Answer(b'{"choices": [{"mess'), Answer(drop=True), Answer(b""), failure(405, "no"), Answer({}, 301, {"location": "https://other.example/v1"}),
    ]) | st.builds(Answer, st.binary(max_size=30), st.sampled_from([200, 201, 204, 400, 500, 502]), st.just({"content-type": "text/plain"})))
    out = tmp_path_factory.mktemp("useless")
    with environment() as env, endpoint(lambda messages, body: answer) as model, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", error := __import__("io").StringIO())
        assert run(out / "out", env.url, model.base_url.removesuffix("/v1") if answer.status == 200 else model.base_url, "--items", "0-9", *ONCE) == 2
        assert len({json.dumps(body["messages"]) for _, body in model.requests}) <= 3
    assert error.getvalue().count("\n") == 1
    if answer.body == b"<html>Welcome to nginx</html>":
        assert "text/html" in error.getvalue() and "Welcome to nginx" in error.getvalue() and "is /v1 missing" in error.getvalue()
    if answer.status == 301:
        assert "https://other.example/v1" in error.getvalue()


# Parameters that are refused


def test_what_an_endpoint_does_not_know_is_learnt_said_and_kept(tmp_path, capsys):
    def say(messages, body):
        if "max_tokens" in body:
            return failure(400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", "unsupported_parameter")
        if body.get("temperature", 1) != 1:
            return failure(400, "Unsupported value: 'temperature' does not support 0.3 with this model. Only the default (1) value is supported.", "unsupported_value")
        return failure(422, "seed: Extra inputs are not permitted") if "seed" in body else counter_player(messages, body)

    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-7", "--temperature", "0.3", "--seed", "1", "--max-tokens", "77") == 0
        assert model.requests[-1][1]["max_completion_tokens"] == 77
        assert len(model.requests) <= 8 * 3 + 3 * 8
    said = capsys.readouterr().out
    kept = json.loads((tmp_path / "out" / "run.json").read_text())["work"][0]["adjusted"]
    assert len(kept) == 3 and all(said.count(line) == 1 for line in kept) and "the endpoint refuses max_tokens: max_completion_tokens is sent" in kept


REFUSALS = ["Unsupported parameter: '{}' is not supported with this model.", "Unrecognized request argument supplied: {}", "{}: Extra inputs are not permitted", "{} is not supported",
            "This model does not support the parameter `{}`.", "Unknown name \"{}\": Cannot find field.", "Unsupported value: '{}' does not support 0.3 with this model."]
PLACES = [lambda said, name: {"error": {"message": said, "param": name, "code": "unsupported_parameter"}}, lambda said, name: {"error": {"message": said}}, lambda said, name: {"error": said},
          lambda said, name: {"message": said}, lambda said, name: {"detail": said}, lambda said, name: {"object": "error", "message": said, "param": name}, lambda said, name: [{"error": {"message": said}}]]


@given(refused=st.sets(st.sampled_from(["temperature", "seed", "top_p"])), longer=st.booleans(), said=st.sampled_from(REFUSALS), place=st.sampled_from(PLACES), status=st.sampled_from([400, 422]),
       kind=st.sampled_from(["application/json", "application/problem+json", "text/plain", ""]), stream=st.booleans())
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_refused_and_however_it_is_said_the_run_goes_on_without_it(refused, longer, said, place, status, kind, stream, tmp_path_factory):
    out = tmp_path_factory.mktemp("refused") / "out"

    def say(messages, body):
        if longer and "max_tokens" in body:
            return Answer(place("'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", "max_tokens"), status, {"content-type": kind})
        for name in sorted(refused & body.keys()):
            return Answer(place(said.format(name), name), status, {"content-type": kind})
        return counter_player(messages, body)

    with environment() as env, endpoint(say) as model:
        words = ["--temperature", "0.3", "--seed", "1", "--top-p", "0.9", "--max-tokens", "77", "--concurrency", "1", *(["--stream"] if stream else [])]
        assert run(out, env.url, model.base_url, "--items", "0-1", *words) == 0
        last = model.requests[-1][1]
        assert not refused & last.keys() and {"temperature", "seed", "top_p"} - refused <= last.keys()
        assert last.get("max_completion_tokens" if longer else "max_tokens") == 77
    assert len(json.loads((out / "run.json").read_text())["work"][0].get("adjusted", [])) == len(refused) + longer
    assert {record["outcome"] for record in attempts(out)} <= {"success", "failure"}


def test_a_value_out_of_range_is_no_parameter_that_is_unknown():
    assert unsupported("temperature must be between 0 and 1", "temperature", ("temperature", )) is None


@pytest.mark.parametrize("body,found", [
    ({"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": 1}]}, ("seed", "")),
    ({"message": "invalid temperature: only 1 is allowed for this model"}, ("temperature", "")),
    ({"message": "`temperature` may only be set to 1 when thinking is enabled"}, ("temperature", "")),
    ({"message": "`temperature` and `top_p` cannot both be specified for this model"}, ("temperature", "")),
    ({"message": "Unrecognized request argument supplied: seed"}, ("seed", "")),
    ({"message": 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'}, ("seed", "")),
    ({"message": "max_tokens is too large: 100000. This model supports at most 16384 completion tokens"}, None),
    ({"message": "messages: at least one message is required"}, None),
])
def test_refusals_of_many_endpoints_name_the_parameter(body, found):
    assert unsupported(said_in(body), "", ("temperature", "top_p", "max_tokens", "seed")) == found


def test_azures_addresses_and_headers_are_sent_and_their_values_kept_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_AZURE", "azure-secret-value")
    paths = []

    def respond(method, path, headers, body):
        paths.append((path, headers.get("api-key")))
        return Answer(completion("win azure-secret-value"))

    with environment() as env, serving(respond) as url:
        assert run(tmp_path / "out", env.url, url + "/openai/deployments/x", "--items", "0", "--api-version", "2024-10-21", "--header", "api-key=MY_AZURE") == 0
    assert paths[0] == ("/openai/deployments/x/chat/completions?api-version=2024-10-21", "azure-secret-value")
    assert not any("azure-secret-value" in path.read_text() for path in (tmp_path / "out").iterdir())
    for flag, told in (("api-key", "NAME=VARIABLE"), ("api-key=NOT_SET_AT_ALL", "is not set"), ("a b=MY_AZURE", "NAME=VARIABLE"), ("Content-Length=MY_AZURE", "is the client's own"),
                       ("transfer-encoding=MY_AZURE", "is the client's own"), ("x-team=MY_AZURE", "X-TEAM is there twice")):
        assert run(tmp_path / "x", env.url, url, "--items", "0", "--header", flag, "--header", "X-TEAM=MY_AZURE") == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


@pytest.mark.parametrize("end,told", [
    ("/openai/deployments/x?api-version=2024-10-21", "a version goes into --api-version"), ("/openai/deployments/x/chat/completions", "leave /chat/completions out"),
    ("/openai/deployments/x/chat/completions?api-version=2024-10-21", "a version goes into --api-version, and /chat/completions, which is added"), ("/v1?key=hunter2", "leave that out"),
])
def test_an_address_with_more_than_the_base_is_one_line_that_says_where_the_rest_goes(end, told, tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url.removesuffix("/v1") + end, "--items", "0") == 2
        assert not model.requests and not env.created
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and "hunter2" not in error and not (tmp_path / "out").exists()


def test_what_follows_a_headers_scheme_is_a_secret_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_AUTH", "Bearer token-of-the-gateway")
    monkeypatch.setenv("MY_TITLE", "our evaluation")
    refuse = lambda messages, body: failure(400, "token-of-the-gateway may not") if len(messages) > 3 else "an evaluation: token-of-the-gateway"  # noqa: E731
    with environment() as env, endpoint(refuse) as model:
        run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--header", "Authorization=MY_AUTH", "--header", "X-Title=MY_TITLE", *ONCE)
        assert model.requests[0][0]["authorization"] == "Bearer token-of-the-gateway"
    kept = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "token-of-the-gateway" not in kept + "".join(capsys.readouterr()) and "an evaluation: ***" in kept


def pieces(text: str, usage: object) -> bytes:
    chunks = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}, *({"choices": [{"index": 0, "delta": {"content": one}}]} for one in text),
              {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": usage}]
    return b": a comment\r\n\r\n" + b"".join(b"data: " + json.dumps(chunk).encode() + b"\r\n\r\n" for chunk in chunks) + b"data: [DONE]\r\n\r\n"


def test_an_endpoint_that_only_streams_is_read_with_its_usage(tmp_path):
    def say(messages, body):
        if not body.get("stream"):
            return failure(400, "this model only supports stream mode")
        assert body["stream_options"] == {"include_usage": True}
        return Answer(pieces(counter_player(messages, body), {"prompt_tokens": 7, "completion_tokens": 3}), 200, {"content-type": "text/event-stream"})

    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0", "--stream") == 0
    record, = attempts(tmp_path / "out")
    assert record["outcome"] == "success" and (record["usage"]["prompt"], record["usage"]["completion"]) == (21, 9)


@given(st.integers(0, 400))
def test_a_stream_that_is_cut_anywhere_is_no_answer(cut):
    whole = pieces("win", {}).decode()
    text = whole[:cut]
    if '"finish_reason": "stop"' in text or cut >= len(whole):
        return
    with pytest.raises(ValueError):
        completion_of(streamed(text))


# Certificates


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate for 127.0.0.1 that no public authority signed."""
    folder = tmp_path_factory.mktemp("ca")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext",
                    "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("known", [True, False])
def test_an_authority_of_ones_own_works_on_this_machine(known, authority, tmp_path, monkeypatch, capsys):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "cert.pem", authority / "key.pem")
    wrapped = ThreadingHTTPServer.server_bind

    def bind(server):
        wrapped(server)
        server.socket = context.wrap_socket(server.socket, server_side=True)

    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    if known:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority / "cert.pem"))
    with environment() as env:
        monkeypatch.setattr(ThreadingHTTPServer, "server_bind", bind)
        with endpoint(counter_player) as model:
            begun = time.monotonic()
            code = run(tmp_path / "out", env.url, model.base_url.replace("http:", "https:"), "--items", "0-5", "--concurrency", "1")
    assert code == (0 if known else 2) and (known or time.monotonic() - begun < 20)
    error = capsys.readouterr().err
    assert known or ("SSL_CERT_FILE" in error and error.count("\n") == 1)


def test_a_lesson_is_learnt_once_by_requests_that_were_refused_together(tmp_path):
    import asyncio
    gate = threading.Barrier(4, timeout=20)

    def respond(method, path, headers, body):
        if "max_tokens" in body:
            gate.wait()
            return failure(400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", "unsupported_parameter")
        return Answer(completion("ok"))

    async def ask(url):
        model = ChatModel("m", "none", url + "/v1", tries=1)
        found = await asyncio.gather(*(model.complete([{"role": "user", "content": "x"}], None, (n, 0)) for n in range(4)))
        await model.aclose()
        return model, found

    with serving(respond) as url:
        model, found = asyncio.run(ask(url))
    assert [one.text for one in found] == ["ok"] * 4 and len(model.adjusted) == 1
