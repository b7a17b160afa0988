"""Which checkpoints of a run stay, and which go: all rules in one place.

A step stays where at least one rule keeps it; only what no rule keeps goes.

What the user chooses:
    keep_last N       the N verified steps with the highest numbers; at least 1
    keep_every N      verified steps whose number is a multiple of N; 0 for none
    keep_best N       the N steps with the best evaluation, the later one where two are equal; 0 for none
    keep_optimizer N  of what stays, the N verified steps with the highest numbers keep their optimizer's files
    merged_too        whether a merged model goes with its checkpoint, or stays

What always holds, for a checkpoint and for its optimizer's files:
    newest            the step with the highest number stays
    resume            a step that a resume may begin with, or that the running attempt began with, stays
    writing           a step that is not whole stays: somebody may just be writing it
    ahead             a step above the one that the running attempt is at stays: the run is about to write it again
    unverified        a step stays that was not merged and compared with its very files
    pending           a step whose evaluation is still to come stays: with keep_best its checkpoint, for it may be the
                      best; its merged model in any case; its optimizer's files go

What a resume moved out of the trainer's way (aside/attempt-N/global_step_M: half or poisoned, see `training/resume.py`) is
counted by no rule above. It goes with the run's own, but for
    newest aside      the whole one that was moved last, of the highest step
    unverified        a whole one whose model was not merged and compared with its very files
    no other          all of it, while the run has no verified checkpoint of its own

keep_last counts verified steps only. Counting all of them, two new ones that are damaged would cost every good one.
A step without an evaluation that is no longer to come has no score: it is never among the best, and no other rule minds.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Score = tuple[float, ...]


@dataclass(frozen=True)
class Rules:
    """What the user chooses; see above."""
    keep_last: int = 2
    keep_every: int = 0
    keep_best: int = 0
    keep_optimizer: int = 2
    merged_too: bool = False


@dataclass(frozen=True)
class Candidate:
    """A step and what is known of it.

    Attributes:
        number: of the step.
        raw: its folder global_step_N is there.
        whole: nothing is missing that the model needs; where it is not, somebody may be writing it.
        optimizer: there are optimizer's files.
        merged: there is a merged model.
        verified: the merged model was compared with the files that the folder holds now.
        score: of its evaluations, the higher the better, compared from left to right; None where one is missing.
        pending: an evaluation is still to come.
    """
    number: int
    raw: bool = True
    whole: bool = True
    optimizer: bool = True
    merged: bool = True
    verified: bool = True
    score: Score | None = None
    pending: bool = False


@dataclass(frozen=True)
class Decision:
    """What goes, and why the rest stays.

    Attributes:
        optimizer: steps that lose their optimizer's files and stay otherwise.
        checkpoints: steps whose folders go.
        merged: steps whose merged models go.
        kept: the rules that keep a step's checkpoint, by step.
    """
    optimizer: tuple[int, ...] = ()
    checkpoints: tuple[int, ...] = ()
    merged: tuple[int, ...] = ()
    kept: dict[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Aside:
    """A checkpoint that a resume moved away.

    Attributes:
        attempt: the one that moved it.
        number: of its step.
        whole: nothing is missing that the model needs.
        verified: a merged model was compared with its files.
    """
    attempt: int
    number: int
    whole: bool
    verified: bool


def decide_aside(found: Sequence[Aside], candidates: Iterable[Candidate]) -> dict[Aside, str]:
    """Return what of the checkpoints aside stays, each with its rule; the others go.

    Args:
        candidates: every step of the run.
    """
    if not any(one.raw and one.whole and one.verified for one in candidates):
        return dict.fromkeys(found, "no other")
    whole = [one for one in found if one.whole]
    newest = max(whole, key=lambda one: (one.attempt, one.number), default=None)
    return {
        one: "newest aside" if one is newest else "unverified"
        for one in whole if one is newest or not one.verified
    }


def best(candidates: Iterable[Candidate], count: int) -> list[int]:
    """Return the numbers of the `count` steps with the highest scores, the best first; of equals the later one."""
    scored = [(one.score, one.number) for one in candidates if one.score is not None]
    return [number for _, number in sorted(scored, reverse=True)[:count]]


def _highest(candidates: Iterable[Candidate], count: int) -> set[int]:
    return set(sorted((one.number for one in candidates), reverse=True)[:count])


def decide(candidates: Sequence[Candidate],
           rules: Rules,
           resumed: Iterable[int] = (),
           reached: int | None = None) -> Decision:
    """Apply the rules.

    Args:
        candidates: every step of the run, in any order.
        rules: the user's.
        resumed: steps that a resume may begin with, or that the running attempt began with.
        reached: the step that the running attempt is at; None where none runs.
    """
    resumed = set(resumed)
    raw = [one for one in candidates if one.raw]
    verified = [one for one in raw if one.whole and one.verified]
    newest = max((one.number for one in raw), default=-1)
    left = [one for one in candidates if one.verified and (one.raw or one.merged)]
    # Of the checkpoints, and of all models: these may have outlived their checkpoints before a rule was chosen.
    last = _highest(verified, max(1, rules.keep_last)) | _highest(left, max(1, rules.keep_last))
    top = set(best(raw, rules.keep_best)) | set(best(left, rules.keep_best))
    optimizers = _highest(verified, max(1, rules.keep_optimizer))
    kept: dict[int, tuple[str, ...]] = {}
    optimizer, checkpoints, merged = [], [], []
    for one in sorted(candidates, key=lambda candidate: candidate.number):
        chosen = {
            "last": one.number in last,
            "every": rules.keep_every > 0 and one.number % rules.keep_every == 0,
            "best": one.number in top,
            "pending": rules.keep_best > 0 and one.pending,
        }
        always = {
            "newest": one.number == newest,
            "resume": one.number in resumed,
            "writing": not one.whole,
            "ahead": reached is not None and one.number > reached,
            "unverified": not one.verified,
        } if one.raw else {}
        reasons = tuple(name for name, holds in {**chosen, **always}.items() if holds)
        if one.raw and reasons:
            kept[one.number] = reasons
            if one.optimizer and not any(always.values()) and one.number not in optimizers:
                optimizer.append(one.number)
        elif one.raw:
            checkpoints.append(one.number)
        if one.merged and rules.merged_too and not reasons and not one.pending:
            merged.append(one.number)
    return Decision(tuple(optimizer), tuple(checkpoints), tuple(merged), kept)
