"""What an endpoint's answers and errors mean."""
import pytest

from evaluation.answers import overflowed, retry_after, said_in


@pytest.mark.parametrize("status,message,code,is_one", [
    (400, "This model's maximum context length is 8192 tokens.", "", True), (400, "x", "context_length_exceeded", True),
    (400, "Input is too long for requested model", "", True), (413, "", "", False), (413, "prompt is too long: 9 tokens > 8", "", True),
    (413, "Request too large on tokens per minute (TPM): Limit 6000, Requested 7000", "rate_limit_exceeded", False),
    (400, "input length and `max_tokens` exceed context limit: 9 + 9 > 8", "", True), (400, "exceeded model token limit: 8192", "", True),
    (400, "Range of input length should be [1, 30720]", "", True), (400, "Prompt exceeds max length", "", True),
    (400, "total tokens of image and text exceed max message tokens", "", True), (400, "litellm.ContextWindowExceededError: no", "", True),
    (422, "Input validation error: `inputs` must have less than 1024 tokens. Given: 2000", "", True),
    (429, "maximum context length", "", False), (400, "temperature must be 1", "", False),
    (400, "temperature exceeds the maximum of 1", "", False), (400, "max_tokens 4096 exceeds the maximum output tokens of 2048", "", False),
    (400, "The input token count (9) exceeds the maximum number of tokens allowed (8).", "", True),
    (400, "the request exceeds the available context size", "", True), (400, "This model's maximum prompt length is 9", "", True),
    (400, "Input length (5000 tokens) exceeds the maximum allowed length (4090 tokens). Use a shorter input or enable --allow-auto-truncate.", "", True),
    (400, "The input (5000 tokens) is longer than the model's context length (4096 tokens).", "", True), (400, "zu lang", "exceed_context_size_error", True),
    (400, "The decoder prompt (length 5951) is longer than the maximum model length of 4096.", "", True), (400, "max_tokens must be at least 1, got -904.", "", True),
    (400, "The sum of prompt length (4000) and query length (0) max_tokens (2048) should not exceed max_seq_len (4096)", "", True),
    (400, "Prompt contains 65673 tokens and 0 draft tokens, too large for model with 32768 maximum context length", "", True),
    (400, "prompt token count of 130000 exceeds the limit of 128000", "", True), (400, "Requested input length 9000 exceeds maximum input length 8000", "", True),
    (413, "Request too large for model on input tokens per minute (ITPM): Limit 6000, Requested 7000, please reduce the length", "", False),
    (400, "the tokens of your prompts exceed the rate limit of your plan", "", False), (400, "max_tokens: Input should be greater than or equal to 1", "", False),
    (400, "max_tokens must be at least 1, got 0", "", False), (400, "user: String should have at most 64 characters", "", False),
    (500, "maximum context length", "", False), (422, "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens", "", True),
])
def test_an_overflow_is_told_from_other_refusals(status, message, code, is_one):
    assert overflowed(status, message, code) is is_one


@pytest.mark.parametrize("headers,seconds", [({"retry-after": "2"}, 2.0), ({"retry-after-ms": "1500"}, 1.5), ({}, None),
                                             ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0), ({"retry-after": "soon"}, None),
                                             ({"retry-after": "-3"}, 0.0), ({"retry-after": "inf"}, None),
                                             ({"retry-after-ms": "nan"}, None),
                                             ({"retry-after": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}, None)])
def test_retry_after_is_read_in_all_its_forms(headers, seconds):
    assert retry_after(headers, now=60.0) == seconds


@pytest.mark.parametrize("body", [
    {"message": "no room"}, {"detail": "no room"}, {"error": "no room"}, {"error": {"message": "no room"}}, "no room ", ["no room"],
    {"detail": [{"loc": ["body"], "msg": "no room", "type": "x"}]}, {"message": "", "error": {"detail": "no room"}},
])
def test_an_errors_text_is_found_wherever_it_stands(body):
    assert said_in(body) == "no room"


@pytest.mark.parametrize("body", [None, 5, {}, {"error": None}, {"error": {"code": 7}}, []])
def test_an_error_that_says_nothing_has_no_text(body):
    assert said_in(body) == ""
