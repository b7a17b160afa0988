"""An OpenAI-compatible chat endpoint: requests, tries, and when it is of no use to go on."""
import asyncio
import ipaddress
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from evaluation import surrogates
from evaluation.answers import BROKE, RETRIED, code_in, completion_of, failure_in, overflowed, retry_after, said_in
from evaluation.model import LOST, Completion, Message, Sampling
from evaluation.problems import ContextOverflow, Misuse, ModelFault, Unreachable

if TYPE_CHECKING:
    import openai

HOPELESS = {
    401: "the key is not accepted; check OPENAI_API_KEY",
    402: "the account has nothing left to pay with; fill it up, or check OPENAI_API_KEY",
    403: "the key may not use this model; check OPENAI_API_KEY and MODEL",
    404: "there is no such model or address; check MODEL and OPENAI_BASE_URL",
}
REFUSALS = 3  # attempts refused before any was answered: then it is the configuration, and no longer the items
LONGEST_WAIT = 60.0
EMPTY = "(empty)"
AS_OPENAI = Sampling()
NO_KEY = "none"  # sent to an endpoint that needs none
_MODERATION = re.compile(r"moderat|flagged|content.?(filter|policy|management)", re.IGNORECASE)


def loopback(url: str) -> bool:
    """Return True if `url` leads to this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def redacted_url(url: str) -> str:
    """Return `url` without a login in it."""
    return re.sub(r"(\w+://)[^/\s]*@", r"\1***@", url)


class ChatModel:
    """An OpenAI-compatible endpoint.

    The client's own retries are off: tenacity does them, so that they can be counted and Retry-After is honoured up
    to `patience`, seconds; who asks for more than that is not waited for.
    """

    def __init__(self,
                 name: str,
                 key: str,
                 base_url: str = "",
                 sampling: Sampling = AS_OPENAI,
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
    """Return True if the same request may succeed later, and within the `patience` seconds that one can wait."""
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


class ChatPlayer:
    """One attempt at a chat endpoint."""

    def __init__(self, model: ChatModel, of: tuple[int, int], seed: int | None) -> None:
        self.model, self.of, self.seed = model, of, seed

    async def reply(self, messages: Sequence[Message]) -> Completion:
        """Return the completion of the conversation."""
        return await self.model.complete(messages, self.seed, self.of)
