"""Where a run goes on, and with which overrides it plays what it would have played without the interruption."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training import checkpoints
from training.checkpoints import Step
from training.folder import RunFolder

SCALING = "scaling_inter_stepwise"
# What resuming brings along besides the model; said at each resume.
LOADER = ("data.pt brings the data loader of the first start: batch size, item file, tokenizer and the environment's "
          "address stay as they were then, and the place in the epoch is lost (it is shuffled anew)")


@dataclass(frozen=True)
class Plan:
    """What a further attempt starts from.

    Attributes:
        step: the checkpoint; None for a start from the model.
        passed_over: newer checkpoints that will not do, each with the reason.
    """
    step: Step | None
    passed_over: tuple[str, ...]


def plan(folder: RunFolder, run: Mapping[str, Any]) -> Plan:
    """Return where the run goes on.

    Raises:
        ValueError: the checkpoint was written by another number of GPUs than the run has, with the remedy.
    """
    first_bad, passed_over = limit(run), []
    for number in reversed(checkpoints.numbers(folder.path)):
        if first_bad is not None and number >= first_bad:
            passed_over.append(f"global_step_{number}: step {first_bad} was poisoned")
            continue
        step = checkpoints.read(folder.path, number)
        if step.whole:
            _check_world(step, run)
            return Plan(step, tuple(passed_over))
        passed_over.append(f"global_step_{number}: {'; '.join(step.faults)}")
    return Plan(None, tuple(passed_over))


def _check_world(step: Step, run: Mapping[str, Any]) -> None:
    world = run.get("world_size")
    if isinstance(world, int) and world != step.world_size:
        raise ValueError(
            f"global_step_{step.number} was written by {step.world_size} GPUs, and the run has {world}: the "
            f"trainer loads a checkpoint with as many GPUs as wrote it; resume with {step.world_size}")


def limit(run: Mapping[str, Any]) -> int | None:
    """Return the first step whose checkpoint is none to go on from, nor any after it; None where all are good.

    What was learnt while the environment was away counts unless the user wants to go on with it, a NaN always.
    """
    bad = _numbers(run.get("nan_steps"))
    if (run.get("options") or {}).get("on_env_loss") != "continue":
        bad += _numbers(run.get("poisoned"))
    return min(bad, default=None)


def _numbers(found: Any) -> tuple[int, ...]:
    return tuple(number for number in found or () if isinstance(number, int) and not isinstance(number, bool))


def resume_overrides(run: Mapping[str, Any], step: Step | None) -> list[str]:
    """Return the overrides that go behind the run's own: where to load from, and ScalingInter's stages put right.

    Without a checkpoint the trainer is told to load none: by itself it would take what its tracker file names.
    """
    if step is None:
        return ["trainer.resume_mode=disable"]
    folder = run.get("folder") or str(step.path.parent)
    path = f"{str(folder).rstrip('/')}/{step.path.name}"
    found = [f"trainer.resume_mode={quoted(path)}", "trainer.resume_from_path=False"]
    stages = scaling_stages(run)
    if stages:
        rounds, every = stages
        found += [
            "algorithm.rounds_ctrl.steps_scaling_inter=1", f"algorithm.rounds_ctrl.rounds=[{_list(rounds, every)}]"
        ]
    return found


def _list(rounds: Sequence[int], every: int) -> str:
    return ",".join(map(str, rounds_by_step(rounds, every)))


def rounds_by_step(rounds: Sequence[int], every: int) -> list[int]:
    """Return ScalingInter's rounds as one entry a step, the first step first, up to the first of the last stage.

    An unbroken run plays step s in stage (s - 1) // every. A resumed one counts one step less than it plays: it begins
    in stage N // every after checkpoint N and moves on after each step s with (s - 1) % every == 0, so that stages
    begin a step late, and after a checkpoint at a stage's edge a whole stage early. With `steps_scaling_inter` = 1
    that reads: step s plays entry s - 1. So this list, with 1, gives any resume the rounds of the unbroken run.
    (verl/agent_trainer/ppo/ray_trainer.py, StepRoundsScheduler.)
    """
    return [number for number in rounds[:-1] for _ in range(every)] + [rounds[-1]]


def scaling_stages(run: Mapping[str, Any]) -> tuple[list[int], int] | None:
    """Return the rounds of ScalingInter's stages and the steps of a stage; None where the run has fixed rounds."""
    settings = rounds_settings(run)
    if settings.get("type") != SCALING:
        return None
    rounds, every = settings.get("rounds"), settings.get("steps_scaling_inter")
    if isinstance(rounds, str):
        text = rounds.strip()
        rounds = [part.strip() for part in text[1:-1].split(",")] if re.fullmatch(r"\[[\d,\s]*\]", text) else None
    try:
        found = [int(value) for value in rounds or ()]
        every = 100 if every is None else int(every)  # the trainer's own default
    except (TypeError, ValueError):
        return None
    return (found, every) if found and every > 0 else None


def rounds_settings(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return algorithm.rounds_ctrl of the run: Hydra's, or from the overrides, of which the last counts."""
    found: dict[str, Any] = {}
    place: Any = run.get("resolved") or {}
    for part in ("algorithm", "rounds_ctrl"):
        place = place.get(part) if isinstance(place, dict) else None
    if isinstance(place, dict):
        found.update(place)
        return found
    for override in run.get("overrides") or ():
        key, equals, value = str(override).partition("=")
        name = key.lstrip("+").removeprefix("algorithm.rounds_ctrl.")
        if equals and name != key.lstrip("+"):
            value = value.strip()
            found[name] = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
    return found


def quoted(value: str) -> str:
    """Return `value` as Hydra's grammar reads it on its command line: as it is, or in quotes.

    https://hydra.cc/docs/advanced/override_grammar/basic/
    """
    if re.fullmatch(r"[\w./@:+-]+", value, re.ASCII):
        return value
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", value)
    escaped = re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped)
    return f"'{escaped}'"


def steps_to_train(run: Mapping[str, Any], step: Step | None) -> int | None:
    """Return how many steps are left after the checkpoint; None where the run does not say how many it has."""
    steps = run.get("steps")
    if not isinstance(steps, int):
        return None
    return max(0, steps - (step.number if step is not None else 0))


def is_finished(folder: RunFolder, run: Mapping[str, Any]) -> bool:
    """Tell whether the run has trained all its steps and kept what it learnt.

    The last checkpoint is named by the number of the steps, or by one more: where the last step is none to save at,
    the trainer saves after it has counted on.
    """
    attempts = run.get("attempts") or []
    steps = run.get("steps")
    if attempts and attempts[-1].get("state") == "finished":
        last = attempts[-1].get("last_step")
        return not (isinstance(steps, int) and isinstance(last, int) and last < steps)  # more were asked for since
    if not isinstance(steps, int) or not attempts:
        return False
    first_bad = limit(run)
    newest = checkpoints.newest_whole(folder.path, () if first_bad is None else (first_bad, ))
    return newest is not None and newest.number >= steps
