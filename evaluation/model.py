"""The model: an OpenAI-compatible chat endpoint, or a scripted player that needs none."""
import asyncio
import ipaddress
import math
import os
import random
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from evaluation import surrogates
from evaluation.problems import ContextOverflow, Misuse, ModelFault, Unreachable

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletion

RETRIED = (408, 409, 429)
HOPELESS = {
    401: "the key is not accepted; check OPENAI_API_KEY",
    402: "the account has nothing left to pay with; fill it up, or check OPENAI_API_KEY",
    403: "the key may not use this model; check OPENAI_API_KEY and MODEL",
    404: "there is no such model or address; check MODEL and OPENAI_BASE_URL",
}
BROKE = "insufficient_quota"  # OpenAI says it with a 429
LONGEST_WAIT = 60.0
REFUSALS = 3  # attempts refused before any was answered: then it is the configuration, and no longer the items
LOST = 3  # attempts in a row that reached nobody: then the model's endpoint, or the environment server, has gone
EMPTY = "(empty)"
NO_KEY = "none"  # sent to an endpoint that needs none
# What OpenAI, vLLM, llama.cpp, TGI, Anthropic's, LiteLLM's and others' endpoints say of a conversation that is too long.
_OVERFLOW = re.compile(
    r"context[_ -]?(length|window|size|limit)|maximum (context|model|sequence|input|prompt)|"
    r"(prompt|input|message)s? (is |are )?too long|reduce the length|too many (input |prompt )?tokens|input token count|"
    r"max_model_len|max_new_tokens`? must be|`?inputs`? must have less|range of input length|"
    r"exceed(s|ed)? (the )?(model|max(imum)?)( message| model)? (token|length)", re.IGNORECASE)
_MODERATION = re.compile(r"moderat|flagged|content.?(filter|policy|management)", re.IGNORECASE)

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        temperature: None leaves the field out, for models that refuse it.
        max_tokens: of one completion; 0 leaves the field out.
        extra: further fields of the request's body.
        context: tokens that prompt and completion may have together, for endpoints that do not watch it; 0 is no limit.
    """
    temperature: float | None = 1.0
    top_p: float | None = None
    max_tokens: int = 4096
    extra: Mapping[str, Any] = field(default_factory=dict)
    context: int = 0


@dataclass
class Usage:
    """Tokens of one or more completions; `unknown` counts completions whose server did not say."""
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    unknown: int = 0

    def add(self, other: "Usage") -> None:
        """Add `other` to this."""
        self.prompt += other.prompt
        self.completion += other.completion
        self.cached += other.cached
        self.reasoning += other.reasoning
        self.unknown += other.unknown


@dataclass(frozen=True)
class Completion:
    """What the model said.

    Attributes:
        text: empty where the content was null.
        reasoning: what the server gave apart from the content; it is kept and never sent back.
        finish: stop, length, content_filter, …
        seconds: how long the answer took, without the failed tries before it.
        retries: how often the request was sent again.
    """
    text: str
    reasoning: str = ""
    finish: str = ""
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0
    retries: int = 0


class Player(Protocol):
    """Whatever answers for the model in one attempt."""

    async def reply(self, messages: Sequence[Message]) -> Completion:
        """Return the completion of the conversation."""


class Model(Protocol):
    """Makes a player for each attempt.

    Attributes:
        answered: whether it ever gave a completion, in this run or in what the run resumes: what it refuses after
            that is the item's trouble, and before that the configuration's.
    """
    answered: bool

    @property
    def refused(self) -> Collection[tuple[int, int]]:
        """The attempts, item and sample, that it refused, or was not there for, before it ever gave a completion."""

    def player(self, item: int, sample: int, seed: int | None) -> Player:
        """Return the player of one attempt; `seed` makes its draws repeatable."""

    async def aclose(self) -> None:
        """Close connections."""


def overflowed(status: int, message: str, code: str = "") -> bool:
    """Tell whether an answer with an error means that the conversation is too long for the model.

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


def loopback(url: str) -> bool:
    """Tell whether `url` leads to this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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


class ChatModel:
    """An OpenAI-compatible endpoint.

    The client's own retries are off: tenacity does them, so that they can be counted and Retry-After is honoured up
    to `patience`, seconds; who asks for more than that is not waited for.
    """

    def __init__(self,
                 name: str,
                 key: str,
                 base_url: str = "",
                 sampling: Sampling = Sampling(),
                 timeout: float = 600.0,
                 tries: int = 8,
                 concurrency: int = 64,
                 patience: float = 3600.0) -> None:
        import openai
        self.name, self.sampling, self.tries, self.key = name, sampling, tries, key
        self.timeout, self.patience = timeout, patience
        self.refused: set[tuple[int, int]] = set()  # attempts, while none has been answered
        self.lost = 0  # attempts in a row that did not reach the endpoint
        # base_url="" must not reach the client: it would take OPENAI_BASE_URL, which may be set but empty.
        base_url = base_url or "https://api.openai.com/v1"
        self.client = openai.AsyncOpenAI(api_key=key,
                                         base_url=base_url,
                                         max_retries=0,
                                         timeout=timeout,
                                         http_client=_client(base_url, concurrency))
        self.answered = False

    def player(self, item: int, sample: int, seed: int | None) -> "ChatPlayer":
        """Return a player; what the item is, the conversation tells."""
        return ChatPlayer(self, (item, sample), seed)

    async def aclose(self) -> None:
        """Close the connections."""
        await self.client.close()

    def fields(self, seed: int | None) -> dict[str, Any]:
        """Return the request's fields beside model and messages."""
        sampling = self.sampling
        wanted = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens or None,
            "seed": seed,
            "extra_body": dict(sampling.extra) or None,
        }
        return {key: value for key, value in wanted.items() if value is not None}

    async def complete(self, messages: Sequence[Message], seed: int | None, of: tuple[int, int] = (0, 0)) -> Completion:
        """Return the completion; tries again what may pass.

        An empty message is sent as it is; to endpoints that refuse one, as EMPTY.

        Args:
            of: the attempt, item and sample.

        Raises:
            ContextOverflow: the conversation is too long.
            ModelFault: the tries are used up, or the request is refused for good.
            Misuse: every further request would be refused: the key, the model's name; a parameter, a first request
                that is too long already, or an address where nobody is, once REFUSALS attempts were refused and none
                was answered.
            Unreachable: it answered once, and LOST attempts in a row did not reach it.
        """
        import openai
        import tenacity
        retries = 0

        def count(state: tenacity.RetryCallState) -> None:
            nonlocal retries
            retries += 1

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.tries),
            wait=_wait,
            retry=tenacity.retry_if_exception(lambda error: may_pass(error, self.patience)),
            before_sleep=count,
            reraise=True)

        async def once() -> Completion:
            begun = time.perf_counter()
            try:
                async with asyncio.timeout(self.timeout):  # the client's own is of each read, and a body may drip
                    answer = await self.client.chat.completions.create(
                        model=self.name,
                        messages=list(messages),  # type: ignore[arg-type]
                        **self.fields(seed))
            except RecursionError:
                raise ValueError("its JSON is nested too deeply") from None
            failed = failure_in(answer)
            if failed is not None:
                raise failed
            return completion_of(answer, time.perf_counter() - begun, retries)

        try:
            completion: Completion = await retrying(once)
        except openai.APIStatusError as error:
            self.lost = 0
            filled = [{**one, "content": one["content"] if one["content"].strip() else EMPTY} for one in messages]
            if error.status_code in (400, 422) and filled != list(messages) and not self._overflowed(error):
                return await self.complete(filled, seed, of)
            raise self._refused(error, retries, of) from None
        except (openai.APIError, TimeoutError, ValueError, AttributeError) as error:
            # A timeout is no sign that nobody is there: the endpoint may be slow.
            if isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError):
                raise self._unreached(error, retries, of) from None
            self.lost = 0
            said = f"the answer is no chat completion: {error}"
            if isinstance(error, openai.APIError | TimeoutError):
                said = str(error) or f"no answer within {self.timeout:g} s"
            raise ModelFault(self._clean(f"{said} (after {retries + 1} tries)"), retries) from None
        self.answered, self.lost = True, 0
        used = completion.usage.prompt + completion.usage.completion
        if self.sampling.context and used > self.sampling.context:
            raise ContextOverflow(f"{used} tokens, and the model's context has {self.sampling.context}",
                                  completion.usage)
        return completion

    def _overflowed(self, error: "openai.APIStatusError") -> bool:
        return overflowed(error.status_code, said_in(error.body) or error.message, code_in(error.body))

    def _refused(self, error: "openai.APIStatusError", retries: int, of: tuple[int, int]) -> Exception:
        status = error.status_code
        message = " ".join(self._clean(said_in(error.body) or error.message).split())
        line = message[:300]
        hopeless = HOPELESS.get(402 if code_in(error.body) == BROKE else status)
        if hopeless and not (status == 403 and (self.answered or _MODERATION.search(message))):
            return Misuse(f"model {self.name}: HTTP {status}, {hopeless} ({line})")
        too_long = self._overflowed(error)
        if too_long and self.answered:
            return ContextOverflow(message)
        if 400 <= status < 500 and status not in RETRIED and not self.answered:
            # No conversation has grown yet, so what is asked for is too much: a score of 0 would be ours, not the model's.
            line += ("; the first request does not fit into the model's context: lower --max-tokens "
                     f"({self.sampling.max_tokens} now, 0 leaves it out)"
                     if too_long else "; change what is sent (--temperature none, --max-tokens 0, --extra-body)")
            # One item may be refused for what is in it; if several are and nothing has worked yet, it is the request.
            self.refused.add(of)
            if len(self.refused) >= REFUSALS:
                return Misuse(f"model {self.name}: HTTP {status}: {line}")
        return ModelFault(f"HTTP {status}: {line} (after {retries + 1} tries)", retries)

    def _unreached(self, error: "openai.APIConnectionError", retries: int, of: tuple[int, int]) -> Exception:
        said = self._clean(f"cannot reach {redacted_url(str(self.client.base_url))}: {error.__cause__ or error}")
        self.lost += 1
        if not self.answered:
            self.refused.add(of)
            if len(self.refused) >= REFUSALS:
                return Misuse(f"model {self.name}: {said}; start the endpoint, or name its address with --base-url")
        elif self.lost >= LOST:
            return Unreachable(f"model {self.name}: {said}; start the endpoint again")
        return ModelFault(f"{said} (after {retries + 1} tries)", retries)

    def _clean(self, text: str) -> str:
        """Return `text` without the key, which some endpoints repeat in their errors."""
        text = surrogates.replaced(text)
        return text.replace(self.key, "***") if self.key != NO_KEY and len(self.key) > 3 else text


def _client(base_url: str, concurrency: int) -> Any:
    import httpx2
    import openai
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency)
    try:
        # A proxy cannot reach this machine as we do, and would be shown the key.
        return openai.DefaultAsyncHttpxClient(limits=limits, trust_env=not loopback(base_url))
    # SOCKS, another scheme, no address; their words may have the login.
    except (ImportError, ValueError, httpx2.InvalidURL):
        raise Misuse(f"no proxy that can be used: {proxies(os.environ)}; name one that begins with http:// or "
                     "https://, or unset the variable") from None


def proxies(environ: Mapping[str, str]) -> str:
    """Return the variables that name a proxy, without the logins in them."""
    names = [name for name in environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy") and environ[name]]
    # What a login is in a broken address is not sure, so all before the last @ is left out.
    shown = {name: re.sub(r"^(\w+://)?.*@", r"\1***@", environ[name], flags=re.DOTALL) for name in names}
    return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def may_pass(error: BaseException, patience: float) -> bool:
    """Tell whether the same request may succeed later, and within the `patience` seconds that one can wait."""
    import openai
    if isinstance(error, openai.APIStatusError):
        passes = error.status_code in RETRIED or error.status_code >= 500
        asked = retry_after(error.response.headers, time.time()) or 0.0
        return passes and code_in(error.body) != BROKE and asked <= patience
    # A malformed answer is a fault of the server's, like a 500: openai gives a ValueError or an object without choices.
    return isinstance(error, openai.APIError | ValueError | AttributeError | TimeoutError)


def _wait(state: Any) -> float:
    """Return the seconds before the next try: what the server asks for, at least 0.5, 1, 2, … up to 60, with jitter."""
    import openai
    backoff = min(LONGEST_WAIT, 0.5 * 2**(state.attempt_number - 1)) * random.uniform(0.5, 1.0)
    error = state.outcome.exception()
    if isinstance(error, openai.APIStatusError):
        asked = retry_after(error.response.headers, time.time())
        if asked is not None:
            # A little more than asked, each at another moment: all would come back at once otherwise. Who asks for less
            # each time than its trouble lasts must not use up the tries.
            return max(backoff, asked + random.uniform(0.0, min(1.0, 0.1 * asked + 0.05)))
    return backoff


def redacted_url(url: str) -> str:
    """Return `url` without a login in it."""
    return re.sub(r"(\w+://)[^/\s]*@", r"\1***@", url)


class ChatPlayer:
    """One attempt at a chat endpoint."""

    def __init__(self, model: ChatModel, of: tuple[int, int], seed: int | None) -> None:
        self.model, self.of, self.seed = model, of, seed

    async def reply(self, messages: Sequence[Message]) -> Completion:
        """Return the completion of the conversation."""
        return await self.model.complete(messages, self.seed, self.of)
