"""What a run is configured with: read from the command line and the environment, checked before anything starts."""
import argparse
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from evaluation import foreign
from evaluation.endpoint import NO_KEY, ChatModel, redacted_url
from evaluation.episodes import Limits
from evaluation.items import Item, choose, read_map
from evaluation.model import Model, Sampling
from evaluation.pace import MOST
from evaluation.players import NAMES, ScriptedModel
from evaluation.problems import Misuse, reason
from evaluation.prompts import Prompt, find
from evaluation.records import growth, identity, read_run
from evaluation.rows import BESIDE, Row, read_row, results_depend_on, rows_file
from evaluation.secrets import OWN

DEFAULT_MODEL = "gpt-4o-mini"
AUTO = "auto"  # of --concurrency
OPENAI = "https://api.openai.com/v1"
# The request's fields that are ours, and what sets them: --extra-body would change them behind the configuration's back.
OURS = {
    "model": "use --model",
    "messages": "use --prompt",
    "stream": "use --stream",
    "stream_options": "use --stream",
    "n": "use --samples",
    "seed": "use --seed",
    "temperature": "use --temperature, or add --temperature none",
    "top_p": "use --top-p",
    "max_tokens": "use --max-tokens, or add --max-tokens 0",
    "max_completion_tokens": "use --max-tokens, or add --max-tokens 0",
}

# Headers that say how a request is carried: with another value it is none.
CLIENTS = frozenset(("accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect",
                     "te", "trailer", "transfer-encoding", "upgrade"))


@dataclass(frozen=True)
class Settings:
    """A run, decided.

    Attributes:
        row, prompt, items, origin: what is played; `origin` tells where the items come from.
        server: the environment server's address.
        model: name of the model or of a scripted player.
        concurrency: episodes at once; the most of them where `auto` finds out how many.
        config: all that the results depend on; a run is resumed only with the same.
        out: the run's folder.
    """
    row: Row
    prompt: Prompt
    items: list[Item]
    origin: str
    server: str
    model: str
    base_url: str
    sampling: Sampling
    seed: int | None
    samples: int
    limits: Limits
    concurrency: int
    auto: bool
    env_timeout: float
    request_timeout: float
    model_tries: int
    max_error_rate: float
    config: dict[str, Any]
    out: Path
    root: Path
    headers: dict[str, str]
    api_version: str
    max_answer: int

    def make_model(self, say: Callable[[str], None] = lambda line: None) -> Model:
        """Return the model.

        Raises:
            Misuse: there is no key, no such player, or a proxy that cannot be used.
        """
        if self.model in NAMES:
            return ScriptedModel(self.model, self.row, self.root)
        return ChatModel(self.model, api_key(self.base_url), self.base_url, self.sampling, self.request_timeout,
                         self.model_tries, self.concurrency, self.limits.seconds, self.headers, self.api_version,
                         self.max_answer, say)


def api_key(base_url: str, environ: Mapping[str, str] | None = None) -> str:
    """Return OPENAI_API_KEY, or what the file OPENAI_API_KEY_FILE holds; an endpoint of one's own may need none.

    Raises:
        Misuse: OpenAI's endpoint does; or it is no key. The key is not in the message.
    """
    environ = os.environ if environ is None else environ
    key, file = environ.get("OPENAI_API_KEY", "").strip(), environ.get("OPENAI_API_KEY_FILE", "")
    if not key and file:
        try:
            key = foreign.read_text(Path(file)).strip()
        except (OSError, ValueError) as error:
            raise Misuse(f"OPENAI_API_KEY_FILE {file} cannot be read: {reason(error)}; correct or unset it") from None
    if not key and (not base_url or "api.openai.com" in base_url):
        raise Misuse("no OPENAI_API_KEY in the environment; set it there or in .env, or name another endpoint with "
                     "--base-url (or --model expert, where the environment has one)")
    # A header cannot carry such a key, and the client's error would show it.
    if not (key.isascii() and key.isprintable()) or " " in key:
        name = "OPENAI_API_KEY" if environ.get("OPENAI_API_KEY", "").strip() else f"OPENAI_API_KEY_FILE {file}"
        raise Misuse(f"{name} has characters that no key has (white space, control or accented ones); copy it again")
    OWN.add(key)
    return key or NO_KEY


def config_hash(config: Mapping[str, Any]) -> str:
    """Return a digest of a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def can_become(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return True if `folder` has no run, or one that becomes one of `config` by adding to it."""
    try:
        return not growth(read_run(folder)["config"], config)
    except Misuse:  # none, or one that is damaged, which is said when it is taken up
        return True


def slug(text: str) -> str:
    """Return `text` as a part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text.strip("/").rsplit("/", 1)[-1]).strip("-.") or "model"


def extra_body(text: str, left_out: Collection[str] = ()) -> dict[str, Any]:
    """Return --extra-body as a mapping.

    Args:
        left_out: fields of OURS that are not sent, so that it may have them.

    Raises:
        Misuse: it is no JSON object, has NaN or an infinite number, which no request can carry, or a field of OURS.
    """
    try:
        value = foreign.loads(text or "{}")
    except ValueError as error:
        raise Misuse(f"--extra-body {text!r} is no JSON ({error}); write it like '{{\"top_k\": 20}}'") from None
    if not isinstance(value, dict):
        raise Misuse(f"--extra-body {text!r} is no JSON object; write it like '{{\"top_k\": 20}}'")
    for field in value:
        if field in OURS and field not in left_out:
            raise Misuse(f"--extra-body has {field}, which the runner sets itself; leave it out: {OURS[field]}")
    return value


def _temperature(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 5.0:
        raise Misuse(f"--temperature {text} is no number from 0 to 5, nor none, which leaves it out")
    return value


def read_headers(flags: Collection[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of --header, whose values are in the environment.

    Raises:
        Misuse: a flag is not NAME=VARIABLE, the variable is not set, or no header can carry what it holds.
    """
    found: dict[str, str] = {}
    for flag in flags:
        name, _, variable = flag.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or not re.fullmatch(r"[A-Za-z_]\w*", variable):
            raise Misuse("--header is no NAME=VARIABLE; write it like api-key=AZURE_KEY, where AZURE_KEY is an "
                         "environment variable that holds the value")
        if name.lower() in CLIENTS or name.lower() in map(str.lower, found):
            said = "is the client's own" if name.lower() in CLIENTS else "is there twice"
            raise Misuse(f"--header {name}={variable}: {name} {said}; leave it out")
        value = environ.get(variable, "").strip()
        if not value or not value.isascii() or not value.isprintable():
            raise Misuse(f"--header {name}={variable}: the environment variable {variable} "
                         f"{'has characters that no header has' if value else 'is not set'}; set it")
        found[name] = value
    return found


def max_round(flag: int, environ: Mapping[str, str], row: Row) -> int:
    """Return the rounds of an episode: --max-round, $MAX_ROUND, the row's.

    Raises:
        Misuse: it is no whole number above 0.
    """
    said = str(flag) if flag else environ.get("MAX_ROUND", "")
    if not said:
        return row.rounds
    if not said.isdecimal() or int(said) < 1:
        raise Misuse(f"MAX_ROUND={said} is no whole number above 0")
    return int(said)


def check_url(name: str, url: str) -> str:
    """Return `url`.

    Raises:
        Misuse: it is no address of a server.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
        host.encode("idna")
        if parts.scheme not in ("http", "https") or not host or re.search(r"\s", url):
            raise ValueError
    except ValueError:
        # What a login is in such an address is not sure, so all before the last @ is left out.
        shown = "***@" + url.rpartition("@")[2] if "@" in url else url
        raise Misuse(f"{name} {shown!r} is no address; write it like http://127.0.0.1:36001") from None
    shown = redacted_url(url.partition("?")[0].partition("#")[0])  # what follows may hold a key
    route = re.search(r"(/chat)?/completions/*$", parts.path) if name == "--base-url" else None
    if parts.query or parts.fragment:
        raise Misuse(f"{name} {shown} has a query or fragment after it, to which no route can be added; leave that out"
                     f"{'; a version goes into --api-version' if 'api-version' in parts.query else ''}"
                     f"{f', and {route[0]}, which is added' if route else ''}")
    if route:
        raise Misuse(f"{name} {shown} has the route at its end that is added to it; leave {route[0]} out")
    return url.rstrip("/")


def item_maps(row: Row, checkout: str) -> list[Any]:
    """Return the row's item maps, as far as an AgentGym checkout is at hand.

    Raises:
        Misuse: one is damaged.
    """
    maps = []
    for place in (checkout, os.environ.get("AGENTGYM_SRC", "")):
        for name in row.item_maps:
            path = Path(place) / row.folder / name
            if place and path.is_file():
                maps.append(read_map(path))
    return maps


def decide(options: argparse.Namespace) -> Settings:
    """Return the run that the command line and the environment ask for.

    Raises:
        Misuse: what is wrong, in one line.
    """
    environ = os.environ
    path = rows_file(options.environments)
    row = read_row(options.env or environ.get("ENV") or "searchqa", path)
    prompt = find(row, options.agentgym, options.prompt, options.plain_prompt)
    items, origin = choose(row, options.items, options.limit, options.shuffle_seed, Path(options.root),
                           item_maps(row, options.agentgym))
    model = options.model or environ.get("MODEL") or DEFAULT_MODEL
    base_url = options.base_url or environ.get("OPENAI_BASE_URL") or ""
    if base_url:
        base_url = check_url("--base-url", base_url)
    if not model.isprintable():
        raise Misuse(f"--model {model!a} has characters that no name has; write it again")
    scripted = model in NAMES
    server = check_url("--server", options.server or environ.get("ENV_SERVER") or f"http://127.0.0.1:{row.port}")
    # An address with the row's own prefix at its end is one that `invoke env.up` prints.
    server = server.removesuffix(row.protocol.prefix) if row.protocol.prefix else server
    temperature = _temperature(options.temperature)
    left_out = [
        name for name, sent in (("temperature", temperature is not None), ("max_tokens", options.max_tokens),
                                ("max_completion_tokens", options.max_tokens)) if not sent
    ]
    sampling = Sampling(temperature, options.top_p, options.max_tokens, extra_body(options.extra_body, left_out),
                        options.context_length, options.keep_think, tuple(options.finish_reason), options.stream)
    auto = options.concurrency == AUTO
    rounds = max_round(options.max_round, environ, row)
    headers = read_headers(options.header, environ)
    config = {
        "env": row.name,
        "row": results_depend_on(row),
        "prompt": {
            "source": prompt.source,
            "sha256": prompt.sha256()
        },
        "model": model,
        "base_url": "" if scripted else options.base_url_as or redacted_url(base_url or OPENAI),
        "sampling": {} if scripted else {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "extra_body": dict(sampling.extra),
            "keep_think": sampling.keep_think
        },
        "seed": options.seed,
        "samples": options.samples,
        "max_round": rounds,
        "token_limit": options.token_limit,
        "time_limit": options.time_limit if math.isfinite(options.time_limit) else None,
        "items": [item.id for item in items],
    }
    if options.context_length:
        config["context_length"] = options.context_length
    if options.finish_reason:
        config["finish_reasons"] = sorted(options.finish_reason)
    # A server may repeat what follows the scheme, as in `Bearer TOKEN`, without it.
    schemes = [
        re.fullmatch(r"(?:bearer|basic|token|api-?key) +(\S+)", value, re.IGNORECASE) for value in headers.values()
    ]
    values = [*headers.values(), *(match[1] for match in schemes if match)]
    for secret in (*values, *filter(None, (urlsplit(url).password for url in (base_url, server)))):
        OWN.add(secret)
    folder = Path(options.root) / "saves" / "eval"
    # More items and samples go into the folder of the fewer; what is no more has one of its own.
    out = folder / f"{row.name}-{slug(model)}-{config_hash(identity(config))[:8]}"
    if not can_become(out, config):
        out = folder / f"{row.name}-{slug(model)}-{config_hash(config)[:8]}"
    return Settings(row=row,
                    prompt=prompt,
                    items=items,
                    origin=origin,
                    server=server,
                    model=model,
                    base_url=base_url,
                    sampling=sampling,
                    seed=options.seed,
                    samples=options.samples,
                    limits=Limits(rounds, options.token_limit, options.time_limit, options.tries, options.env_wait),
                    concurrency=MOST if auto else options.concurrency or row.concurrency,
                    auto=auto,
                    env_timeout=options.env_timeout,
                    request_timeout=options.request_timeout,
                    model_tries=options.model_tries,
                    max_error_rate=options.max_error_rate,
                    config=config,
                    out=Path(options.out) if options.out else out,
                    root=BESIDE.parent if path.resolve().is_relative_to(BESIDE.parent) else path.resolve().parent,
                    headers=headers,
                    api_version=options.api_version,
                    max_answer=int(options.max_answer * foreign.MEGABYTE))
