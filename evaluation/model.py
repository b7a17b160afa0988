"""What a model is to the runner: players that answer a conversation."""
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from evaluation.attempts import UsageCounts

LOST = 3  # attempts in a row that reached nobody: then the model's endpoint, or the environment server, has gone
Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        temperature: None leaves the field out, for models that refuse it.
        max_tokens: of one completion; 0 leaves the field out.
        extra: further fields of the request's body.
        context: tokens that prompt and completion may have together, for endpoints that do not watch it; 0 is no limit.
        keep_think: leave a thought before the answer in it, as upstream does.
        finished: finish reasons of whole answers, beside those that are known.
        stream: ask for the answer in pieces, for endpoints that give it in no other way.
    """
    temperature: float | None = 1.0
    top_p: float | None = None
    max_tokens: int = 4096
    extra: Mapping[str, Any] = field(default_factory=dict)
    context: int = 0
    keep_think: bool = False
    finished: tuple[str, ...] = ()
    stream: bool = False


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

    def counts(self) -> UsageCounts:
        """Return the counts as a record keeps them."""
        return UsageCounts(prompt=self.prompt,
                           completion=self.completion,
                           cached=self.cached,
                           reasoning=self.reasoning,
                           unknown=self.unknown)


@dataclass(frozen=True)
class Completion:
    """What the model said.

    Attributes:
        text: empty where the content was null.
        reasoning: what the server gave apart from the content; it is kept and never sent back.
        finish: stop, length, content_filter, …
        refusal: what was said in place of an answer.
        extras: what else the message has, such as tool_calls.
        cut: tokens that the answer was limited to because the context had no more; 0 is no such limit.
        seconds: how long the answer took, without the failed tries before it.
        retries: how often the request was sent again.
    """
    text: str
    reasoning: str = ""
    finish: str = ""
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0
    retries: int = 0
    refusal: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)
    cut: int = 0


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
    def adjusted(self) -> Sequence[str]:
        """What the endpoint refused in every request and what is sent in its place, in words."""

    @property
    def refused(self) -> Collection[tuple[int, int]]:
        """The attempts, item and sample, that it refused, or was not there for, before it ever gave a completion."""

    def player(self, item: int, sample: int, seed: int | None) -> Player:
        """Return the player of one attempt; `seed` makes its draws repeatable."""

    async def aclose(self) -> None:
        """Close connections."""
