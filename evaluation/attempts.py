"""One attempt at an item as it is kept: the only place that says which fields a record has, and what may be in them."""
import json
from enum import StrEnum
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic's demand below Python 3.12

from evaluation.text import short

Key = tuple[str, int]
MOST_REWARD = 1e9  # so that no sum over a run overflows; AgentGym's environments give at most 100
MOST_TOKENS = 10**9  # of one answer
MOST_TOTAL = 10**15  # of one attempt


class Outcome(StrEnum):
    """How an attempt ended."""
    SUCCESS = "success"
    FAILURE = "failure"
    MAX_ROUNDS = "max_rounds"
    TOKEN_LIMIT = "token_limit"
    CONTEXT_OVERFLOW = "context_overflow"
    ENV_ERROR = "env_error"
    MODEL_ERROR = "model_error"
    TIMEOUT = "timeout"
    REFUSED = "refused"


SCORED = (Outcome.SUCCESS, Outcome.FAILURE, Outcome.MAX_ROUNDS, Outcome.TOKEN_LIMIT, Outcome.CONTEXT_OVERFLOW)
# The infrastructure's own: they say nothing of the model and never enter a score.
ERRORS = (Outcome.ENV_ERROR, Outcome.MODEL_ERROR, Outcome.TIMEOUT)
# The endpoint's last word on an item: neither a score nor an error that another try could mend.
SETTLED = (Outcome.REFUSED, )

_KEPT = with_config(ConfigDict(strict=True, extra="allow"))  # a later version may keep more
AnyOutcome = Annotated[Outcome, Field(strict=False)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Tokens = Annotated[int, Field(ge=0, le=MOST_TOTAL)]
Seconds = Annotated[float, Field(ge=0, le=1e10)]
Reward = Annotated[float, Field(ge=-MOST_REWARD, le=MOST_REWARD, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


@_KEPT
class UsageCounts(TypedDict):
    """Tokens; `unknown` counts answers whose server did not say."""
    prompt: Tokens
    completion: Tokens
    cached: Tokens
    reasoning: Tokens
    unknown: Tokens


@_KEPT
class Turn(TypedDict):
    """One round: what the model said, the action in it (None: refused unsent), and what the environment answered."""
    completion: str
    action: str | None
    observation: NotRequired[str]  # absent where the environment failed then
    reward: NotRequired[Reward]
    reasoning: NotRequired[str]
    finish: NotRequired[str]
    invalid: NotRequired[bool]
    refusal: NotRequired[str]  # said in place of an answer
    extras: NotRequired[dict[str, Any]]  # what else the message had, such as tool_calls
    cut: NotRequired[Count]  # tokens that the answer was limited to, since the context had no more
    seconds: NotRequired[Seconds]  # of the answer
    tokens: NotRequired[Annotated[list[Tokens], Field(min_length=2, max_length=2)]]  # of prompt and completion


@_KEPT
class Try(TypedDict):
    """A try that the infrastructure spoilt and that was played again."""
    outcome: AnyOutcome
    error: str
    usage: NotRequired[UsageCounts]


@_KEPT
class Attempt(TypedDict):
    """One attempt at an item.

    Attributes:
        success, reward, scaled, upstream_reward: None where the infrastructure spoilt it. `scaled` is `reward` as a
            share of the row's range; `upstream_reward` what AgentGym's own client would have taken.
        seconds: of the whole attempt, tries and waits included; model_seconds, env_seconds: of the last try.
        task: a digest of the first observation, `first`.
        room: where the context overflowed, tokens of it that the prompt had left, as far as the endpoint said so.
    """
    item: str
    index: int
    category: str
    sample: Count
    seed: int | None
    outcome: AnyOutcome
    success: bool | None
    reward: Reward | None
    scaled: Share | None
    upstream_reward: Reward | None
    rounds: Count
    invalid_actions: Count
    usage: UsageCounts
    seconds: Seconds
    model_seconds: Seconds
    env_seconds: Seconds
    model_retries: Count
    error: str
    tries_before: list[Try]
    started: str
    task: str
    first: str
    turns: list[Turn]
    room: NotRequired[Count]


FIELDS = tuple(Attempt.__required_keys__)
ADAPTER: TypeAdapter[Attempt] = TypeAdapter(Attempt)


def key_of(record: Attempt) -> Key:
    """Return what an attempt is known by: item and sample."""
    return record["item"], record["sample"]


def read_attempt(value: Any) -> Attempt:
    """Return a JSON value as an attempt.

    Raises:
        ValueError: it is none; which field, and what it has.
    """
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")
    try:
        record = ADAPTER.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        found = json.dumps(first["input"], default=repr)
        raise ValueError(f"has no {place}" if first["type"] ==
                         "missing" else f"has {place} {short(found, 60)}") from None
    empty = [name for name in ("success", "reward", "scaled", "upstream_reward") if record[name] is None]
    if record["outcome"] in SCORED and empty:
        raise ValueError(f"has outcome {record['outcome']} and no {empty[0]}")
    return record
