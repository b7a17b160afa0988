"""Play one attempt at one item: rounds, limits, and how it ended."""
import asyncio
import hashlib
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from evaluation.actions import parse
from evaluation.attempts import SCORED, Attempt, Outcome, Try, Turn
from evaluation.items import Item
from evaluation.model import LOST, Message, Player, Usage
from evaluation.problems import ContextOverflow, EnvironmentFault, ModelFault, Unreachable
from evaluation.prompts import VOCABULARY, Prompt
from evaluation.protocol import CLOSE_SECONDS, FULL, NOT_CREATED, First, Server
from evaluation.rows import Row


@dataclass(frozen=True)
class Limits:
    """How far an attempt may go.

    Attributes:
        rounds: completions of one episode.
        tokens: of one episode, prompts and completions of all rounds together; 0 is no limit.
        seconds: of one episode.
        tries: how often an item is started when the environment fails.
        wait: seconds to wait for a server that is away, or whose sessions are all in use.
    """
    rounds: int
    tokens: int = 0
    seconds: float = 3600.0
    tries: int = 3
    wait: float = 120.0


def judge(row: Row, reward: float, done: bool) -> Outcome:
    """Return the outcome of an episode that was played: success, failure, or max_rounds where it never ended."""
    return ended(row, reward, Outcome.FAILURE if done else Outcome.MAX_ROUNDS)


def ended(row: Row, reward: float, how: Outcome) -> Outcome:
    """Return the outcome of an episode that ended as `how` says: what was won before that stays won."""
    return Outcome.SUCCESS if row.success.holds(reward) else how


def derived_seed(seed: int, index: int, sample: int) -> int:
    """Return the seed of one attempt: another one for each item and sample, below 2**31 as endpoints want it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{sample}".encode()).digest()[:4], "big") >> 1


def first_message(prompt: Prompt, first: First, vocabulary: str) -> str:
    """Return the first observation as the model is shown it."""
    text = prompt.first.replace(VOCABULARY, vocabulary) if prompt.first else prompt.before_first + first.observation
    return text + prompt.actions_label + ",".join(first.actions) if first.actions else text


def opening(prompt: Prompt, observation: str) -> list[Message]:
    """Return the conversation up to the first observation. No system message: AgentGym has none."""
    messages = [{"role": "user", "content": prompt.user}]
    if prompt.assistant:
        messages.append({"role": "assistant", "content": prompt.assistant})
    elif observation:
        return [{"role": "user", "content": f"{prompt.user}\n\n{observation}"}]
    return [*messages, {"role": "user", "content": observation}]


@dataclass
class Place:
    """Where an attempt is played, for who looks on; `episode` is None until its first try begins."""
    begun: float = field(default_factory=time.monotonic)
    episode: "Episode | None" = None


@dataclass
class Episode:
    """One try at an item: what has happened so far."""
    first: str = ""
    turns: list[Turn] = field(default_factory=list)
    reward: float = 0.0
    upstream: float = 0.0
    done: bool = False
    usage: Usage = field(default_factory=Usage)
    invalid: int = 0
    model_seconds: float = 0.0
    env_seconds: float = 0.0
    retries: int = 0
    session: int | None = None
    in_doubt: bool = False  # whether a request to the server is on its way
    waited: bool = False  # in vain for the server, as long as one does
    outcome: Outcome = Outcome.ENV_ERROR
    error: str = ""
    refused: bool = False  # by the endpoint, for what is in this conversation
    room: int = 0

    async def play(self, server: Server, session: int, row: Row, prompt: Prompt, item: Item, player: Any,
                   limits: Limits) -> None:
        """Play the item in the session, to its end or to a limit."""
        self.session, self.in_doubt = session, True
        begun = time.perf_counter()
        first = await server.reset(session, item.number)
        vocabulary = ""
        if VOCABULARY in prompt.first:
            words = await server.get("/filtered_vocab", session)
            vocabulary = "\n".join(words) if isinstance(words, list) else str(words)
        self.env_seconds += time.perf_counter() - begun
        self.in_doubt = False
        self.first = first_message(prompt, first, vocabulary)
        messages = opening(prompt, self.first)
        while not self.done and len(self.turns) < limits.rounds:
            if limits.tokens and self.usage.prompt + self.usage.completion >= limits.tokens:
                self.outcome = ended(row, self.reward, Outcome.TOKEN_LIMIT)
                return
            completion = await player.reply(messages)
            self.usage.add(completion.usage)
            self.retries += completion.retries
            self.model_seconds += completion.seconds
            action = parse(row.action, completion.text)
            self.invalid += not action.found
            turn: Turn = {"completion": completion.text, "action": action.text}
            if completion.reasoning:
                turn["reasoning"] = completion.reasoning
            if completion.finish not in ("stop", ""):
                turn["finish"] = completion.finish
            if completion.refusal:
                turn["refusal"] = completion.refusal
            if completion.extras:
                turn["extras"] = dict(completion.extras)
            if completion.cut:
                turn["cut"] = completion.cut
            if completion.seconds:
                turn["seconds"] = round(completion.seconds, 3)
            if not completion.usage.unknown and completion.usage.prompt:
                turn["tokens"] = [completion.usage.prompt, completion.usage.completion]
            if not action.found:
                turn["invalid"] = True
            self.turns.append(turn)
            if action.text is None:
                turn["observation"], self.upstream = prompt.refusal, 0.0
            else:
                self.in_doubt = True
                begun = time.perf_counter()
                step = await server.step(session, action.text)
                self.env_seconds += time.perf_counter() - begun
                self.in_doubt = False
                self.reward, self.done = row.success.counts(self.reward, step.reward), step.done
                self.upstream = step.reward if step.upstream is None else step.upstream
                turn["observation"], turn["reward"] = step.observation, step.reward
            messages += [{
                "role": "assistant",
                "content": completion.text
            }, {
                "role": "user",
                "content": turn["observation"]
            }]
        self.outcome = judge(row, self.reward, self.done)


async def open_session(server: Server, wait: float) -> int:
    """Create a session, waiting up to `wait` seconds for a server that is away or full.

    While it is our own sessions that fill it, their ends are waited for as long as it takes.
    Asks again only where nothing can have been created: a create that was sent is never sent twice.

    Raises:
        EnvironmentFault: it fails otherwise, or the time is up.
        Unreachable: the time was up for LOST attempts in a row.
    """
    end, delay = time.monotonic() + wait, 0.2
    while True:
        try:
            session = await _create(server)
            server.awaited = 0
            return session
        except EnvironmentFault as fault:
            now, refused = time.monotonic(), not fault.sent or fault.status in NOT_CREATED
            if fault.status == FULL and server.held:
                end = now + wait
                server.on_full(server.held)
            if not refused:
                server.awaited = 0
                raise
            if now >= end:
                server.awaited, fault.waited = server.awaited + 1, True
                if server.awaited >= LOST:
                    raise Unreachable(f"environment server {server.shown}: {fault}, for {wait:g} s; "
                                      "see that it is up and has room") from None
                raise
        await asyncio.sleep(min(delay, end - now) * random.uniform(0.5, 1.0))
        delay = min(5.0, 1.7 * delay)


async def _create(server: Server) -> int:
    """Create a session; where this task is cancelled meanwhile, wait for it a little and give it back."""
    creating = asyncio.ensure_future(server.create())
    try:
        return await asyncio.shield(creating)
    except asyncio.CancelledError:
        # No asyncio.timeout: up to Python 3.11.4 one that is entered after a cancellation raises no TimeoutError.
        await asyncio.wait([creating], timeout=CLOSE_SECONDS)
        if not creating.done():
            creating.cancel()
            server.lost += 1
        elif not creating.exception():
            await asyncio.wait([asyncio.ensure_future(server.give_back(creating.result(), clean=True))])
        raise


async def _give_back(server: Server, session: int, clean: bool) -> None:
    """Give the session back even while this task is being cancelled."""
    closing = asyncio.ensure_future(server.give_back(session, clean))
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await closing
        raise


async def _one_try(server: Server, row: Row, prompt: Prompt, item: Item, player: Any, limits: Limits,
                   place: Place) -> Episode:
    episode = place.episode = Episode()
    try:
        session = await open_session(server, limits.wait)
    except EnvironmentFault as fault:
        episode.outcome, episode.error, episode.waited = Outcome.ENV_ERROR, str(fault), fault.waited
        return episode
    try:
        async with asyncio.timeout(limits.seconds):
            await episode.play(server, session, row, prompt, item, player, limits)
    except EnvironmentFault as fault:
        episode.outcome, episode.error = Outcome.ENV_ERROR, str(fault)
    except ModelFault as fault:
        episode.outcome, episode.error = Outcome.MODEL_ERROR, str(fault)
        episode.retries += fault.retries
        episode.refused = fault.refused
    except ContextOverflow as overflow:
        episode.outcome, episode.error = ended(row, episode.reward, Outcome.CONTEXT_OVERFLOW), str(overflow)
        if overflow.usage is not None:
            episode.usage.add(overflow.usage)
        if overflow.room is not None:
            # Where the endpoint does not name the prompt, what the last answer knew of it is the least that it has.
            last = episode.turns[-1].get("tokens", [0, 0]) if episode.turns else [0, 0]
            known = overflow.room.prompt if overflow.room.prompt is not None else sum(last)
            episode.room = max(0, overflow.room.context - known) if known else 0
    except TimeoutError:
        episode.outcome, episode.error = Outcome.TIMEOUT, f"the episode took longer than {limits.seconds:g} s"
    finally:
        await _give_back(server, session, clean=not episode.in_doubt)
    return episode


def same_words(one: str, other: str) -> bool:
    """Return True if two messages differ at most in numbers and the ids of requests."""
    first, second = (re.sub(r"\b[0-9a-fA-F-]{8,}\b|\d+", "#", text) for text in (one, other))
    return first == second


async def attempt(server: Server, make: Callable[[int, int, int | None], Player], row: Row, prompt: Prompt, item: Item,
                  sample: int, seed: int | None, limits: Limits, before: Sequence[Try], place: Place) -> Attempt:
    """Play an item until it has a result, or the environment has failed too often; return its record.

    Args:
        make: gives the player of the attempt, from the item's number, sample and seed.
        before: earlier tries, of this run or of one that it resumes: outcome, error and usage of each.
        place: where the episode that goes on can be looked at.

    Raises:
        Misuse: the model's endpoint refuses every request.
        Unreachable: the endpoint or the environment server has gone.
    """
    started, begun, tries = datetime.now(UTC), time.perf_counter(), list(before)
    for number in range(limits.tries):
        if number:
            await asyncio.sleep(0.25 * 2**number * random.uniform(0.5, 1.0))
        episode = await _one_try(server, row, prompt, item, make(item.number, sample, seed), limits, place)
        if episode.refused and any(one["outcome"] == Outcome.MODEL_ERROR and same_words(one["error"], episode.error)
                                   for one in tries):
            episode.outcome = Outcome.REFUSED  # twice in the same words
            break
        if not (episode.refused
                or episode.outcome == Outcome.ENV_ERROR) or episode.waited or number == limits.tries - 1:
            break
        tries.append(Try(outcome=episode.outcome, error=episode.error, usage=episode.usage.counts()))
    scored = episode.outcome in SCORED
    record: Attempt = {
        "item": item.id,
        "index": item.number,
        "category": item.category,
        "sample": sample,
        "seed": seed,
        "outcome": episode.outcome,
        "success": row.success.holds(episode.reward) if scored else None,
        "reward": episode.reward if scored else None,
        "scaled": row.scaled(episode.reward) if scored else None,
        "upstream_reward": episode.upstream if scored else None,
        "rounds": len(episode.turns),
        "invalid_actions": episode.invalid,
        "usage": episode.usage.counts(),
        "seconds": round(time.perf_counter() - begun, 4),
        "model_seconds": round(episode.model_seconds, 4),
        "env_seconds": round(episode.env_seconds, 4),
        "model_retries": episode.retries,
        "error": episode.error,
        "tries_before": tries,
        "started": started.isoformat(timespec="milliseconds"),
        "task": hashlib.sha256(episode.first.encode()).hexdigest()[:16] if episode.first else "",
        "first": episode.first,
        "turns": episode.turns,
    }
    if episode.room:
        record["room"] = episode.room
    return record
