"""What an endpoint's answers and errors mean.

The rule is an allow-list: an answer counts as the model's words only where nothing in it says that it failed and its
finish_reason is one that whole answers have. All else is the endpoint's fault and has no score.
"""
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from evaluation.attempts import MOST_TOKENS
from evaluation.foreign import events, loads
from evaluation.model import Completion, Usage
from evaluation.text import short
from evaluation.thoughts import split_thought

RETRIED = (408, 409, 429)
BROKE = "insufficient_quota"  # OpenAI says it with a 429
# Reasons of whole answers, in the words of OpenAI, Anthropic, Google, Cohere, Mistral, TGI, SGLang, llama.cpp, Ollama.
FINISHED = frozenset(("stop", "length", "tool_calls", "tool_call", "tool_use", "function_call", "content_filter",
                      "refusal", "safety", "end_turn", "max_tokens", "max_output_tokens", "stop_sequence", "stop_token",
                      "eos", "eos_token", "eos_id", "end", "complete", "completed", "limit", "done"))
# The conversation and the answer fill the model's context: it is no failure, and no whole answer.
FULL = frozenset(("model_length", "model_context_window_exceeded", "context_length_exceeded", "context_length",
                  "max_context_length", "context_window_exceeded", "context_limit"))
# What OpenAI, vLLM, llama.cpp, TGI, Anthropic's, LiteLLM's and others' endpoints say of a conversation that is too long.
_OVERFLOW = re.compile(
    r"context[_ -]?(length|window|size|limit)|maximum (context|model|sequence|input|prompt)|"
    r"(prompt|input|message)s? (is |are )?too long|reduce the length|too many (input |prompt )?tokens|"
    r"(input|prompt) token count|max_(model|seq|input)_len|max_new_tokens`? must be|`?inputs`? must have less|"
    r"range of input length|tokens must be at least 1, got -|"  # what a prompt that is too long leaves of a default
    r"(input|prompt|messages?|conversation)\b[^.;]{0,60}?(exceed|longer than|too large)[^.;]{0,60}?(length|limit|token)|"
    r"exceed(s|ed)? (the )?(model|max(imum)?)( message| model)? (token|length)",
    re.IGNORECASE)
_RATE = re.compile(r"\bper (?:second|minute|hour|day)\b|rate.?limit|quota|\bTPM\b", re.IGNORECASE)  # no context's limit
LOOKED_AT = 4096  # characters of a message; a body of megabytes would be searched for minutes
_TOO_LONG = frozenset(("context_length_exceeded", "context_window_exceeded", "exceed_context_size_error"))
_ERROR = re.compile(r"errors?(?:[_-]?(?:codes?|types?|messages?|msgs?|info|details?|reasons?|descriptions?))?",
                    re.IGNORECASE)
_FAILED = re.compile(r"(?:error|fail(?:ed|ure)?|cancel(?:l?ed)?|abort(?:ed)?|time(?:d[ _-]?)?out|expired)",
                     re.IGNORECASE)
_CONTEXT = re.compile(
    r"(?:(?:context|model|sequence)[ _](?:length|window|size|limit)(?: limit)?|maximum allowed (?:input )?length)"
    r"(?: (?:is|of|only|of \S+ is)|:)* \(?(\d[\d,]*)|(?:must be|limit is) <= (\d[\d,]*)|"
    r"(\d[\d,]*) (?:tokens )?max(?:imum)? (?:context|model) length|max_(?:model|seq)_len\W{1,3}(\d[\d,]*)",
    re.IGNORECASE)
_SUM = re.compile(r"(\d[\d,]*) \+ \d[\d,]* > (\d[\d,]*)")  # Anthropic's: prompt, answer and context
_PROMPT = re.compile(
    r"(\d[\d,]*) (?:tokens )?(?:in the messages|in (?:your|the) prompt|(?:input|prompt|message) tokens|`?inputs`? tokens|"
    r"(?:tokens )?from the input|of text input)|(?<!maximum )(?<!max )\b(?:prompt|input|request|messages)"
    r"(?: (?:is|too|long|token|tokens|count|contains|has|length|of|resulted|in))*:? \(?(?:length )?(\d[\d,]*)|"
    r"keep the first (\d[\d,]*) tokens", re.IGNORECASE)
_REQUESTED = re.compile(
    r"requested (?:a total of |about )?(\d[\d,]*) tokens|will take (\d[\d,]*) tokens|output tokens \((\d[\d,]*)\)",
    re.IGNORECASE)
_UNSUPPORTED = re.compile(
    r"unsupported|not (?:be )?supported|(?:does|do|is|are) not (?:support|allowed|permitted|recogni[sz]ed)|only the default|"
    r"unknown|unrecogni[sz]ed|unexpected|extra (?:inputs|fields)|deprecated|not available|not (?:a )?(?:valid|accepted)|"
    r"only \S+ (?:is|are) (?:allowed|supported|permitted)|(?:only|must) be set to|cannot (?:both )?be (?:used|set|specified)",
    re.IGNORECASE)


def overflowed(status: int, message: str, code: str = "") -> bool:
    """Return True if an answer with an error means that the conversation is too long for the model.

    A 413 alone does not: it may be a proxy's limit, or one of tokens a minute.
    """
    message = message[:LOOKED_AT]
    return code in _TOO_LONG or (status in (400, 413, 422) and code != "rate_limit_exceeded"
                                 and bool(_OVERFLOW.search(message)) and not _RATE.search(message))


class Room(NamedTuple):
    """What an endpoint says of a request that does not fit: tokens of its context, and of the prompt where known."""
    context: int
    prompt: int | None

    @property
    def left(self) -> int:
        """Return the tokens that the prompt leaves; 0 where that is unknown."""
        return max(0, self.context - self.prompt) if self.prompt is not None else 0


def room_in(message: str, max_tokens: int) -> Room | None:
    """Return what an overflow's message says of context and prompt, or None.

    Args:
        max_tokens: tokens that were asked for beside the prompt.
    """

    def first(match: re.Match[str] | None) -> int | None:
        found = next((group for group in match.groups() if group), None) if match else None
        return None if found is None or len(found) > 12 else int(found.replace(",", ""))

    message = message[:LOOKED_AT]
    context, prompt = first(_CONTEXT.search(message)), first(_PROMPT.search(message))
    if summed := _SUM.search(message):
        prompt, context = (None if len(group) > 12 else int(group.replace(",", "")) for group in summed.groups())
    if context is None:
        return None
    requested = first(_REQUESTED.search(message))
    if prompt is None and requested is not None and requested > max_tokens:
        prompt = requested - max_tokens
    return Room(context, prompt)


def unsupported(message: str, param: str, sent: Collection[str]) -> tuple[str, str] | None:
    """Return the parameter of those `sent` that a refusal is about, and what to send in its place ("" is nothing).

    Args:
        param: the parameter that the error's body names.
    """
    if "max_tokens" in sent and "max_completion_tokens" in message and "max_tokens" in message:
        return "max_tokens", "max_completion_tokens"
    if not _UNSUPPORTED.search(message):
        return None
    if param in sent:
        return param, ""
    return next(((name, "") for name in sent if re.search(rf"(?<![a-z_]){name}(?![a-z_])", message)), None)


def said_in(body: Any) -> str:
    """Return what the body of an error says, which endpoints put at different places; empty where it says nothing."""
    if isinstance(body, str):
        return body.strip()
    if isinstance(body, list):
        return "; ".join(filter(None, map(said_in, body)))
    if isinstance(body, dict):
        said = next(filter(None, (said_in(body.get(key)) for key in ("message", "error", "detail", "msg"))), "")
        place = body.get("loc")  # FastAPI's: which field is meant is said nowhere else
        named = ".".join(str(part) for part in place if part != "body") if isinstance(place, list) else ""
        return f"{named}: {said}" if said and named else said
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


class Said(NamedTuple):
    """What a message's content holds."""
    text: str
    reasoning: str = ""
    refusal: str = ""


def content_of(content: Any) -> Said:
    """Return what a message's content holds: null, a text, or a list of parts, of which each has a type.

    Raises:
        ValueError: it is something else. It must not pass for an empty answer, which has a score.
    """
    if content is None or isinstance(content, str):
        return Said(content or "")
    found: dict[str, list[str]] = {"text": [], "reasoning": [], "refusal": []}
    for one in content if isinstance(content, list) else [None]:
        part: dict[str, Any] = one if isinstance(one, dict) else {"type": "nothing"}
        kind = part.get("type") or "text"
        place = {"output_text": "text", "thinking": "reasoning"}.get(kind, kind) if isinstance(kind, str) else ""
        value = part.get(kind, part.get("text")) if place in found else None
        if isinstance(value, list) and place == "reasoning":  # Mistral's thought has parts of its own
            value = content_of(value).text
        if not isinstance(value, str):
            raise ValueError("its content is no text")
        found[place].append(value)
    return Said("".join(found["text"]), "\n".join(found["reasoning"]), "".join(found["refusal"]))


def usage_of(used: Any) -> Usage:
    """Return the tokens that an answer's `usage` tells.

    OpenAI counts the tokens of reasoning in completion_tokens; xAI and Gemini beside them, which total_tokens shows.
    A count that nothing could have used is none.
    """

    def count(group: Any, key: str) -> int | None:
        value = group.get(key) if isinstance(group, dict) else None
        known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS
        return value if known else None

    def detail(group: str, key: str) -> int:
        return count(used.get(group), key) or 0

    prompt, completion = count(used, "prompt_tokens"), count(used, "completion_tokens")
    if prompt is None or completion is None:
        return Usage(unknown=1)
    reasoning, total = detail("completion_tokens_details", "reasoning_tokens"), count(used, "total_tokens")
    beside = max(0, total - prompt - completion) if total else reasoning if reasoning > completion else 0
    # Cached tokens are some of the prompt's: more of them would make its cost negative.
    return Usage(prompt, completion + beside, min(prompt, detail("prompt_tokens_details", "cached_tokens")),
                 min(reasoning or beside, completion + beside))


class Failure(NamedTuple):
    """An error inside an answer with status 200.

    Attributes:
        status: as if it had come with a status of its own; without a number in it, it may pass.
    """
    status: int
    body: Any


def failure_in(answer: Any) -> Failure | None:
    """Return the error that an answer with status 200 carries: of itself, of its choice, or of the choice's message.

    Routers such as OpenRouter send the headers before the provider has failed.
    """
    choice = first_choice(answer)
    for part in (answer, choice, choice.get("message") if choice else None):
        body = complaint(part)
        if body is not None:
            said, code = said_in(body), body.get("code") if isinstance(body, dict) else None
            status = 400 if overflowed(400, said, code_in(body)) else 500
            if isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600:
                status = code
            return Failure(status, body)
    return None


def complaint(part: Any) -> Any:
    """Return what an answer, or a part of one, says of an error; None where it says nothing."""
    if not isinstance(part, dict):
        return None
    for key, value in part.items():
        if _ERROR.fullmatch(key) and not _nothing(value):
            return value
    failed = any(
        isinstance(part.get(key), str) and _FAILED.fullmatch(part[key]) for key in ("object", "type", "status"))
    return part if failed or part.get("success") is False else None


def _nothing(value: Any) -> bool:
    """Return True for what a field of errors holds where there is none, such as `{"code": 0, "message": ""}`."""
    if isinstance(value, dict):
        return all(map(_nothing, value.values()))
    if isinstance(value, list):
        return all(map(_nothing, value))
    return not value or (isinstance(value, str) and value.strip().lower() in ("", "0", "none", "null", "false"))


def first_choice(answer: Any) -> dict[str, Any] | None:
    """Return an answer's first choice, if it has one."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None


class ContextFull(ValueError):
    """An answer ended because the context is full."""

    def __init__(self, reason: str, usage: Usage) -> None:
        super().__init__(f"the answer's finish_reason is {reason}")
        self.usage = usage


def completion_of(answer: Any,
                  seconds: float = 0.0,
                  retries: int = 0,
                  keep_think: bool = False,
                  finished: Collection[str] = ()) -> Completion:
    """Return what a well-formed answer says.

    Args:
        keep_think: leave a thought at the beginning where it is.
        finished: further reasons of whole answers.

    Raises:
        ValueError: it has no choice, no message or no text, or says itself that it failed.
        ContextFull: it says that the context is full.
    """
    choice = first_choice(answer)
    message = choice.get("message") if choice else None
    if choice is None or not isinstance(message, dict) or not message:
        raise ValueError("it has no message" if choice else "it has no choices")
    reason = choice.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise ValueError(f"its finish_reason is {short(reason, 60)}")
    finish = (reason or "").strip()
    usage = usage_of(answer.get("usage"))
    if finish.lower() in FULL:
        raise ContextFull(finish, usage)
    if finish and finish.lower() not in FINISHED and finish not in finished:
        raise ValueError(f"its finish_reason is {finish[:60]}, which no whole answer has; if this endpoint's have, "
                         f"say so with --finish-reason {finish[:60]}")
    said = content_of(message.get("content"))
    text = said.text
    reasoning = message.get("reasoning_content") or message.get("reasoning") or said.reasoning
    reasoning = reasoning if isinstance(reasoning, str) else json.dumps(reasoning, ensure_ascii=False)
    # What else was said: a refusal, tool calls, audio, citations. Empty and null is nothing.
    known = ("role", "content", "reasoning_content", "reasoning", "refusal", "error")
    extras = {key: value for key, value in message.items() if key not in known and value}
    refusal = message.get("refusal")
    refusal = refusal if refusal and isinstance(refusal, str) else said.refusal
    if not finish and not (text.strip() or refusal or extras):
        raise ValueError("it has neither text nor finish_reason")
    if not keep_think:
        thought, text = split_thought(text)
        reasoning = "\n".join(filter(None, (reasoning, thought)))
    if not usage.prompt or (said.text and not usage.completion):  # a server that does not count says 0
        usage.unknown = 1
    return Completion(text, reasoning, finish, usage, seconds, retries, refusal, extras)


def streamed(text: str) -> Any:
    """Return the answer whose pieces are the events in `text`, in the form of an answer that came whole.

    Raises:
        ValueError: an event is no JSON, there is none, or the stream ends without a finish_reason.
    """
    answer: dict[str, Any] = {}
    message: dict[str, Any] = {"role": "assistant"}
    choice: dict[str, Any] = {"message": message}
    begun = False
    for kind, data in events(text):
        if kind == "error":
            return {"error": _json_or_text(data) or "an event named error"}
        if data.strip() == "[DONE]":
            continue
        chunk = loads(data)
        if not isinstance(chunk, dict):
            raise ValueError("an event is no object")
        if (body := complaint(chunk)) is not None:
            return {"error": body}
        answer["usage"] = chunk.get("usage") or answer.get("usage")
        part = first_choice(chunk)
        if part is None or part.get("index", 0) != 0:
            continue
        begun = True
        delta = part.get("delta") or part.get("message") or {}
        if not isinstance(delta, dict):
            raise ValueError("an event's delta is no object")
        if failure_in({"choices": [{**part, "message": delta}]}):  # a later piece could hide it
            return {"choices": [{**part, "message": delta}]}
        before = choice.get("finish_reason")
        choice.update({
            key: value
            for key, value in part.items() if key not in ("delta", "message") and value is not None
        })
        if before not in (None, "") and not (isinstance(before, str) and before.lower() in FINISHED):
            choice["finish_reason"] = before
        for key, value in delta.items():
            before = message.get(key)
            if key == "tool_calls" and isinstance(value, list):
                message[key] = _joined_calls(before if isinstance(before, list) else [], value)
            elif key != "role" and isinstance(before, str) and isinstance(value, str):
                message[key] = before + value
            elif isinstance(before, list) and isinstance(value, list):
                message[key] = [*before, *value]
            elif value is not None:
                message[key] = value
    if not begun:
        raise ValueError("it has no events with choices")
    if not choice.get("finish_reason"):  # [DONE] alone also ends what failed
        raise ValueError("the stream ends without a finish_reason")
    return {**answer, "choices": [choice]}


def _json_or_text(data: str) -> Any:
    try:
        return loads(data)
    except ValueError:
        return data


def _joined_calls(calls: list[Any], deltas: Sequence[Any]) -> list[Any]:
    """Return tool calls with the pieces in `deltas` added to those of the same index."""
    for delta in deltas:
        if not isinstance(delta, dict):
            continue
        same = next((one for one in calls if one.get("index") == delta.get("index")), None)
        if same is None:
            calls.append(delta)
            continue
        more = delta.get("function")
        if isinstance(same.get("function"), dict) and isinstance(more, dict):
            same["function"]["arguments"] = f"{same['function'].get('arguments') or ''}{more.get('arguments') or ''}"
    return calls


def describe(headers: Mapping[str, str], body: bytes) -> str:
    """Return content type and first characters of an answer that is none."""
    kind = headers.get("content-type", "").partition(";")[0].strip() or "no content type"
    return f"{kind[:60]}: {json.dumps(body[:80].decode(errors='replace'), ensure_ascii=False)}"
