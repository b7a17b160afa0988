"""What an endpoint's answers and errors mean."""
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from evaluation import surrogates
from evaluation.model import Completion, Usage

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletion

RETRIED = (408, 409, 429)
BROKE = "insufficient_quota"  # OpenAI says it with a 429
# What OpenAI, vLLM, llama.cpp, TGI, Anthropic's, LiteLLM's and others' endpoints say of a conversation that is too long.
_OVERFLOW = re.compile(
    r"context[_ -]?(length|window|size|limit)|maximum (context|model|sequence|input|prompt)|"
    r"(prompt|input|message)s? (is |are )?too long|reduce the length|too many (input |prompt )?tokens|input token count|"
    r"max_model_len|max_new_tokens`? must be|`?inputs`? must have less|range of input length|"
    r"exceed(s|ed)? (the )?(model|max(imum)?)( message| model)? (token|length)", re.IGNORECASE)


def overflowed(status: int, message: str, code: str = "") -> bool:
    """Return True if an answer with an error means that the conversation is too long for the model.

    A 413 alone does not: it may be a proxy's limit, or one of tokens a minute.
    """
    return code == "context_length_exceeded" or (status in (400, 413, 422) and code != "rate_limit_exceeded"
                                                 and bool(_OVERFLOW.search(message)))


def said_in(body: Any) -> str:
    """Return what the body of an error says, which endpoints put at different places; empty where it says nothing."""
    if isinstance(body, str):
        return body.strip()
    if isinstance(body, list):
        return "; ".join(filter(None, map(said_in, body)))
    if isinstance(body, dict):
        return next(filter(None, (said_in(body.get(key)) for key in ("message", "error", "detail", "msg"))), "")
    return ""


def code_in(body: Any) -> str:
    """Return the word for the error that its body has, or nothing."""
    return next((str(body[key])
                 for key in ("code", "type") if isinstance(body.get(key), str)), "") if isinstance(body, dict) else ""


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that the headers ask to wait; None where they do not."""
    from email.utils import parsedate_to_datetime
    milliseconds, said = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        seconds = float(said or "") if milliseconds is None else float(milliseconds) / 1000
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(said or "").timestamp() - now)
    except (ValueError, OverflowError):
        return None


def content_text(content: Any) -> str:
    """Return the text of a message's content: null, a text, or a list of parts, of which thoughts are no text.

    Raises:
        ValueError: it is something else. It must not pass for an empty answer, which has a score.
    """
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) and all(isinstance(part, dict) for part in content) else [{}]
    texts = [part.get("text") for part in parts if part.get("type") not in ("thinking", "reasoning")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its content is no text")
    return "".join(texts)


def usage_of(used: Any) -> Usage:
    """Return the tokens that an answer's `usage` tells."""

    def count(group: Any, key: str) -> int | None:
        value = getattr(group, key, None)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

    prompt, completion = count(used, "prompt_tokens"), count(used, "completion_tokens")
    if prompt is None or completion is None:
        return Usage(unknown=1)
    # Cached tokens are some of the prompt's: more of them would make its cost negative.
    return Usage(prompt, completion,
                 min(prompt,
                     count(getattr(used, "prompt_tokens_details", None), "cached_tokens") or 0),
                 count(getattr(used, "completion_tokens_details", None), "reasoning_tokens") or 0)


def failure_in(answer: "ChatCompletion") -> "openai.APIStatusError | None":
    """Return the error that an answer with status 200 carries, as if it had come with a status of its own.

    Routers such as OpenRouter send the headers before the provider has failed. Without a number in it, it may pass.
    """
    import httpx2
    import openai
    body = (getattr(answer, "model_extra", None) or {}).get("error")
    if not body or getattr(answer, "choices", None):
        return None
    said, code = said_in(body), body.get("code") if isinstance(body, dict) else None
    status = 400 if overflowed(400, said, code_in(body)) else 500
    if isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600:
        status = code
    response = httpx2.Response(status, request=httpx2.Request("POST", "http://endpoint"))
    return openai.APIStatusError(said or "an error without a message", response=response, body=body)


def completion_of(answer: "ChatCompletion", seconds: float, retries: int) -> Completion:
    """Return what a well-formed answer says.

    Raises:
        ValueError: it has no choice, no message or no text, or says itself that it failed.
    """
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        raise ValueError("it has no choices")
    message, finish = choices[0].message, choices[0].finish_reason or ""
    # OpenRouter's word for a provider that failed half-way; vLLM's and SGLang's for a request that was dropped.
    if finish in ("error", "abort"):
        raise ValueError(f"its finish_reason is {finish}")
    extra = message.model_extra or {}
    reasoning = extra.get("reasoning_content") or extra.get("reasoning") or ""
    return Completion(surrogates.replaced(content_text(message.content)),
                      surrogates.replaced(reasoning) if isinstance(reasoning, str) else "", surrogates.replaced(finish),
                      usage_of(answer.usage), seconds, retries)
