"""An OpenAI-compatible chat endpoint: requests, tries, and what its refusals teach."""
import asyncio
import ipaddress
import os
import random
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from evaluation import foreign
from evaluation.answers import (
    BROKE,
    RETRIED,
    ContextFull,
    Room,
    code_in,
    completion_of,
    describe,
    failure_in,
    overflowed,
    retry_after,
    room_in,
    said_in,
    streamed,
    unsupported,
)
from evaluation.breaker import Breaker
from evaluation.model import Completion, Message, Sampling
from evaluation.problems import ContextOverflow, Misuse, ModelFault, Unreachable
from evaluation.secrets import hide, hide_in
from evaluation.text import one_line, short

if TYPE_CHECKING:
    import httpx2
    import openai

HOPELESS = {
    401: "the key is not accepted; check OPENAI_API_KEY",
    402: "the account has nothing left to pay with; fill it up, or check OPENAI_API_KEY",
    403: "the key may not use this model; check OPENAI_API_KEY and MODEL",
    404: "there is no such model or address; check MODEL and OPENAI_BASE_URL",
    407: "the proxy asks for a login; put it into HTTPS_PROXY, as in http://USER:PASSWORD@HOST:PORT",
}
LONGEST_WAIT = 60.0
TOO_MANY = 429
EMPTY = "(empty)"
AS_OPENAI = Sampling()
NO_KEY = "none"  # sent to an endpoint that needs none
LESSONS = 8  # how often one request is changed and asked again
_STREAM = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:data|event|id|retry)?:")
_MODERATION = re.compile(r"moderat|flagged|content.?(filter|policy|management)", re.IGNORECASE)
_CERTIFICATE = re.compile(r"certificate|CERT_|SSL", re.IGNORECASE)


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

    Attributes:
        adjusted: what the endpoint refused and what is sent in its place, in words; in the order it was learnt.
        on_limit: is called at each 429 after which the request is sent again.
    """

    def __init__(self,
                 name: str,
                 key: str,
                 base_url: str = "",
                 sampling: Sampling = AS_OPENAI,
                 timeout: float = 600.0,
                 tries: int = 8,
                 concurrency: int = 64,
                 patience: float = 3600.0,
                 headers: Mapping[str, str] | None = None,
                 api_version: str = "",
                 limit: int = foreign.LARGEST_BODY,
                 say: Callable[[str], None] = lambda line: None) -> None:
        import openai
        self.name, self.sampling, self.tries, self.key = name, sampling, tries, key
        self.timeout, self.patience = timeout, patience
        self.breaker = Breaker()
        self.adjusted: list[str] = []
        self.on_limit: Callable[[], None] = lambda: None
        self.say = say
        self._replaced: dict[str, str] = {}  # parameters that were refused, and what is sent in their place
        # base_url="" must not reach the client: it would take OPENAI_BASE_URL, which may be set but empty.
        base_url = base_url or "https://api.openai.com/v1"
        self.client = openai.AsyncOpenAI(api_key=key,
                                         base_url=base_url,
                                         max_retries=0,
                                         timeout=timeout,
                                         default_headers=headers,
                                         default_query={"api-version": api_version} if api_version else None,
                                         http_client=_client(base_url, concurrency, limit))

    @property
    def answered(self) -> bool:
        """Return True if it ever gave a completion, in this run or in what the run resumes."""
        return self.breaker.answered

    @answered.setter
    def answered(self, value: bool) -> None:
        self.breaker.answered = value

    @property
    def refused(self) -> Collection[tuple[int, int]]:
        """The attempts that got no completion before there was any."""
        return self.breaker.useless

    def player(self, item: int, sample: int, seed: int | None) -> "ChatPlayer":
        """Return a player; what the item is, the conversation tells."""
        return ChatPlayer(self, (item, sample), seed)

    async def aclose(self) -> None:
        """Close the connections."""
        await self.client.close()

    def fields(self, seed: int | None, max_tokens: int, replaced: Mapping[str, str]) -> dict[str, Any]:
        """Return the request's fields beside model and messages.

        Args:
            max_tokens: fewer than the sampling's; 0 is as many as that says.
            replaced: names to send in place of others; an empty one leaves the field out.
        """
        sampling = self.sampling
        wanted = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": max_tokens or sampling.max_tokens or None,
            "seed": seed,
        }
        sent: dict[str, Any] = {replaced.get(key, key): value for key, value in wanted.items() if value is not None}
        sent.pop("", None)
        if sampling.stream:
            sent["stream"] = True
            sent.update({} if "stream_options" in replaced else {"stream_options": {"include_usage": True}})
        if sampling.extra:
            sent["extra_body"] = dict(sampling.extra)
        return sent

    async def complete(self, messages: Sequence[Message], seed: int | None, of: tuple[int, int] = (0, 0)) -> Completion:
        """Return the completion; tries again what may pass, and otherwise what is refused in a way that can be mended.

        An empty message is sent as it is; to endpoints that refuse one, as EMPTY. A parameter that the endpoint does not
        know is left out, or sent under the name that it asks for. Where prompt and answer do not fit into the context
        together, a shorter answer is asked for.

        Args:
            of: the attempt, item and sample.

        Raises:
            ContextOverflow: the conversation is too long.
            ModelFault: the tries are used up, or the request is refused for good.
            Misuse: every further request would be refused: the key, the model's name; or REFUSALS attempts got nothing
                of use and none was ever answered.
            Unreachable: it answered once, and LOST attempts in a row did not reach it.
        """
        import openai
        sent, cut, retries = list(messages), 0, 0
        for lesson in range(LESSONS):
            replaced = dict(self._replaced)
            try:
                completion = await self._tried(sent, self.fields(seed, cut, replaced), cut, retries)
                break
            except ContextFull as full:
                self.breaker.success()
                raise ContextOverflow(str(full), full.usage) from None
            except openai.APIStatusError as error:
                self.breaker.reached()
                retries += getattr(error, "retries", 0)
                message = said_in(error.body) or error.message
                room = self._room(error, message, cut)
                if lesson < LESSONS - 1:
                    if error.status_code in (400, 422) and self._learn(message, error, replaced):
                        continue
                    if room and 0 < room.left < (cut or self.sampling.max_tokens):
                        cut = room.left
                        continue
                    filled = [{**one, "content": one["content"] if one["content"].strip() else EMPTY} for one in sent]
                    if error.status_code in (400, 422) and filled != sent and not self._overflowed(error):
                        sent = filled
                        continue
                raise self._refused(error, retries, of, room) from None
            except (openai.APIError, TimeoutError, ValueError, AttributeError) as error:
                retries += getattr(error, "retries", 0)
                raise self._useless(error, retries, of) from None
        self.breaker.success()
        used = completion.usage.prompt + completion.usage.completion
        if self.sampling.context and used > self.sampling.context:
            raise ContextOverflow(f"{used} tokens, and the model's context has {self.sampling.context}",
                                  completion.usage)
        return completion

    async def _tried(self, messages: Sequence[Message], fields: Mapping[str, Any], cut: int, before: int) -> Completion:
        """Return the completion, trying again what may pass; an error that is raised knows its `retries`."""
        import tenacity
        retries = 0

        def count(state: tenacity.RetryCallState) -> None:
            nonlocal retries
            retries += 1
            if getattr(state.outcome.exception() if state.outcome else None, "status_code", 0) == TOO_MANY:
                self.on_limit()

        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.tries),
            wait=_wait,
            retry=tenacity.retry_if_exception(lambda error: may_pass(error, self.patience)),
            before_sleep=count,
            reraise=True)
        try:
            return await retrying(self._once, messages, fields, cut, lambda: before + retries)
        except Exception as error:
            error.retries = retries  # type: ignore[attr-defined]
            raise

    async def _once(self, messages: Sequence[Message], fields: Mapping[str, Any], cut: int,
                    retries: Callable[[], int]) -> Completion:
        begun = time.perf_counter()
        async with asyncio.timeout(self.timeout):  # the client's own is of each read, and a body may drip
            raw = await self.client.chat.completions.with_raw_response.create(
                model=self.name,
                messages=list(messages),  # type: ignore[arg-type]
                **fields)
        response: httpx2.Response = raw.http_response
        body = response.content
        try:
            packed = "event-stream" in response.headers.get("content-type", "").lower() or _STREAM.match(body)
            answer = streamed(body.decode(errors="replace")) if packed else foreign.loads(body)
        except ValueError as error:
            raise ValueError(f"{error} ({describe(response.headers, body)})") from None
        failed = failure_in(answer)
        if failed is not None:
            raise _status_error(failed.status, failed.body)
        try:
            found = completion_of(answer,
                                  time.perf_counter() - begun, retries(), self.sampling.keep_think,
                                  self.sampling.finished)
        except ContextFull:
            raise
        except ValueError as error:
            raise ValueError(f"{error} ({describe(response.headers, body)})") from None
        return _without_secrets(found, cut)

    def _room(self, error: "openai.APIStatusError", message: str, cut: int) -> Room | None:
        return room_in(message, cut or self.sampling.max_tokens) if self._overflowed(error) else None

    def _learn(self, message: str, error: "openai.APIStatusError", replaced: Mapping[str, str]) -> bool:
        """Note that a parameter is not to be sent so; return True if there is one, and so something new to try.

        Args:
            replaced: what was sent in place of what, in the request that was refused.
        """
        param = error.body.get("param") if isinstance(error.body, dict) else None
        names = [
            name for name, value in (("temperature", self.sampling.temperature), ("top_p", self.sampling.top_p),
                                     ("max_tokens", self.sampling.max_tokens or None), ("seed", 0)) if value is not None
        ]
        if self.sampling.stream:
            names.append("stream_options")
        sent = {replaced.get(name, name): name for name in names}
        sent.pop("", None)
        found = unsupported(message, param if isinstance(param, str) else "", sent)
        if found is None:
            return False
        name = sent[found[0]]
        if self._replaced.get(name) != replaced.get(name):
            return True  # another request has learnt it meanwhile
        self._replaced[name] = found[1]
        line = f"the endpoint refuses {found[0]}: {f'{found[1]} is sent' if found[1] else 'it is left out'}"
        self.adjusted.append(line)
        self.say(f"{line} ({short(self._clean(message), 120)})")
        return True

    def _overflowed(self, error: "openai.APIStatusError") -> bool:
        return overflowed(error.status_code, said_in(error.body) or error.message, code_in(error.body))

    def _refused(self, error: "openai.APIStatusError", retries: int, of: tuple[int, int],
                 room: Room | None) -> Exception:
        status = error.status_code
        message = self._clean(said_in(error.body) or error.message)
        line = message[:300]
        if 300 <= status < 400:
            target = redacted_url(error.response.headers.get("location", ""))
            line = f"it redirects to {self._clean(target)[:200] or 'nowhere'}, which is not followed"
        hopeless = HOPELESS.get(402 if code_in(error.body) == BROKE else status)
        if hopeless and not (status == 403 and (self.answered or _MODERATION.search(message))):
            return Misuse(f"model {self.name}: HTTP {status}, {hopeless} ({line})")
        too_long = self._overflowed(error)
        if too_long and self.answered:
            return ContextOverflow(message, room=room)
        if too_long:
            # No conversation has grown yet, so what is asked for is too much: a score of 0 would be ours, not the model's.
            line += ("; the first request does not fit into the model's context: lower --max-tokens "
                     f"({self.sampling.max_tokens} now, 0 leaves it out)")
        elif not self.answered:
            line += f"; {cure(status, str(self.client.base_url))}"
        # One item may be refused for what is in it; if several are and nothing has worked yet, it is the request.
        if self.breaker.failed(of):
            return Misuse(f"model {self.name}: HTTP {status}: {line}")
        refused = self.answered and 400 <= status < 500 and status not in RETRIED
        return ModelFault(f"HTTP {status}: {line} (after {retries + 1} tries)", retries, refused)

    def _useless(self, error: Exception, retries: int, of: tuple[int, int]) -> Exception:
        """Return what to raise for a request that got no answer, or one that is none."""
        import openai
        cause = error.__cause__ or error
        # What the body's reader raises comes wrapped; a timeout is no sign that nobody is there.
        if isinstance(cause, ValueError) and not isinstance(cause, UnicodeError):
            error = cause
        if isinstance(error, openai.APIConnectionError) and not isinstance(error, openai.APITimeoutError):
            return self._unreached(error, retries, of)
        self.breaker.reached()
        said = f"the answer is no chat completion: {error}"
        if isinstance(error, openai.APIError | TimeoutError):
            said = str(error) or f"no answer within {self.timeout:g} s"
        elif isinstance(error, foreign.TooLarge):
            said = f"{error}, unpacked; see --max-answer"
        said = self._clean(said)
        if self.breaker.failed(of):
            return Misuse(f"model {self.name}: {said}; {cure(200, str(self.client.base_url))}")
        return ModelFault(f"{said} (after {retries + 1} tries)", retries)

    def _unreached(self, error: "openai.APIConnectionError", retries: int, of: tuple[int, int]) -> Exception:
        reason = str(error.__cause__ or error)
        said = self._clean(f"cannot reach {redacted_url(str(self.client.base_url))}: {reason}")
        remedy = "start the endpoint, or name its address with --base-url"
        if _CERTIFICATE.search(reason):
            remedy = "if its certificate is signed by an authority of your own, name that in SSL_CERT_FILE"
        elif re.search(r"\b407\b", reason):
            return Misuse(f"model {self.name}: {said}: {HOPELESS[407]}")
        answered = self.answered
        if self.breaker.unreached(of):
            return Unreachable(f"model {self.name}: {said}; start the endpoint again") if answered else Misuse(
                f"model {self.name}: {said}; {remedy}")
        return ModelFault(f"{said} (after {retries + 1} tries)", retries)

    def _clean(self, text: str) -> str:
        """Return `text` in one line that can be printed, without the key, which some endpoints repeat."""
        text = hide(one_line(foreign.replaced(text)))
        return text.replace(self.key, "***") if self.key != NO_KEY and len(self.key) > 3 else text


def cure(status: int, base_url: str) -> str:
    """Return what is likely to mend an endpoint that has never given a completion."""
    if 300 <= status < 400:
        return "name the address after the redirect with --base-url"
    if status == 429:
        return "its limit of requests is used up; wait until it allows more, or lower --concurrency"
    if status >= 500:
        return "the endpoint is up and fails; look at its log, or wait until the model is loaded"
    if status >= 400:
        return "change what is sent (--temperature none, --max-tokens 0, --extra-body)"
    if not re.search(r"/v\d", urlsplit(base_url).path):
        return f"is /v1 missing at the end of --base-url {redacted_url(base_url).rstrip('/')}?"
    return "is that the address of an OpenAI-compatible API? See --base-url, and --stream for one that only streams"


def _without_secrets(found: Completion, cut: int) -> Completion:
    """Return a completion in which no secret of ours is, should the endpoint have put one there."""
    return Completion(hide(found.text), hide(found.reasoning), hide(found.finish), found.usage, found.seconds,
                      found.retries, hide(found.refusal), hide_in(found.extras), cut)


def _status_error(status: int, body: Any) -> "openai.APIStatusError":
    import httpx2
    import openai
    response = httpx2.Response(status, request=httpx2.Request("POST", "http://endpoint"))
    return openai.APIStatusError(said_in(body) or "an error without a message", response=response, body=body)


def _client(base_url: str, concurrency: int, limit: int) -> Any:
    """Return the HTTP client: no redirect is followed, and no body is read past `limit` bytes, unpacked."""
    import httpx2
    import openai

    class Bounded(openai.DefaultAsyncHttpxClient):  # type: ignore[misc, valid-type]
        """Reads each answer whole, as far as the limit."""

        async def send(self, request: "httpx2.Request", **options: Any) -> "httpx2.Response":
            options["stream"] = True
            answer = await super().send(request, **options)
            try:
                body = foreign.Body(answer.headers.get("content-encoding", ""), limit)
                async for piece in answer.aiter_raw():
                    body.feed(piece)
                whole = body.whole()
            finally:
                await answer.aclose()
            kept = [(name, value) for name, value in answer.headers.multi_items()
                    if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")]
            return httpx2.Response(answer.status_code, headers=kept, content=whole, request=request)

    here = loopback(base_url)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency)
    options: dict[str, Any] = {
        "limits": limits,
        "follow_redirects": False,
        "headers": {
            "accept-encoding": "gzip"
        },
        "cookies": CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # of nobody: they could be sent without end
    }
    if here:  # a proxy cannot reach this machine as we do, and would be shown the key; SSL_CERT_FILE counts all the same
        options.update(trust_env=False)
        if base_url.startswith("https:"):
            options["verify"] = httpx2.create_ssl_context(trust_env=True)
    try:
        return Bounded(**options)
    except OSError as error:  # SSL_CERT_FILE that is none
        raise Misuse(f"SSL_CERT_FILE cannot be read: {error.strerror or error}; correct or unset it") from None
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
    if isinstance(error, ContextFull) or isinstance(error.__cause__ or error, foreign.TooLarge):
        return False
    if isinstance(error, openai.APIStatusError):
        passes = error.status_code in RETRIED or error.status_code >= 500
        asked = retry_after(error.response.headers, time.time()) or 0.0
        return passes and code_in(error.body) != BROKE and asked <= patience
    if isinstance(error, openai.APIConnectionError) and _CERTIFICATE.search(str(error.__cause__ or "")):
        return False
    # A malformed answer is a fault of the server's, like a 500.
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
