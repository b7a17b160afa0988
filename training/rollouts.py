"""What the trainer wrote of a step's trajectories, and whether the environment's server was away in it.

`rollouts/stepN/RANK.json` is a list of {item_id, conversations, reward}. Where a request fails, whatever the reason,
the trainer gives the trajectory 0 and goes on: then nothing follows the model's last words. Where the environment
answered, its words are last. (verl/workers/rollout/agent_vllm_rollout/vllm_rollout.py, agent_step.)
"""
from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.foreign import LARGEST_LIST, read_json

FOLDER, RANK_FILE = re.compile(r"step(\d+)"), re.compile(r"\d+\.json")
# The trainer prints this for each trajectory whose step failed, and this where a reset took too long.
STEP_ERROR = re.compile(
    r"Rollou(?:t)? step Error: (?P<what>.*?) ?item id = (?P<item>-?\d+)|Reset Timeout: (?P<reset>.*)")
# What an HTTP client says when nobody answers.
AWAY = re.compile(r"Connection refused|Connection aborted|Connection reset|RemoteDisconnected|Max retries exceeded|"
                  r"NewConnectionError|Read timed out|ConnectTimeout|Name or service not known|No route to host|"
                  r"Temporary failure in name resolution|Network is unreachable|Broken pipe|IncompleteRead|"
                  r"Reset Timeout|ConnectionError|Remote end closed")
# What a client raises of an answer that is an error: an assertion without words, a field that is not there.
ANSWERED = re.compile(r"|'[^']*'")
# So many of a step's trajectories may fail at a server that is there, before the step counts as poisoned.
TOLERATED = 0.2


@dataclass(frozen=True)
class Played:
    """A step's trajectories.

    Attributes:
        trajectories: how many there are.
        cut: how many got 0 since a request to the environment failed.
        files: of how many ranks they are.
    """
    trajectories: int
    cut: int
    files: int


def is_cut(trajectory: Any) -> bool:
    """Tell whether the environment failed in a trajectory: it has 0, and the model's words are the last."""
    if not isinstance(trajectory, dict) or trajectory.get("reward") not in (0, None):
        return False
    said = trajectory.get("conversations")
    return isinstance(said, list) and bool(said) and isinstance(said[-1], dict) and said[-1].get("role") == "assistant"


def read(folder: Path, step: int) -> Played | None:
    """Return what the ranks' files of a step tell; None where there is none, or one is not finished."""
    trajectories = cut = files = 0
    try:
        places = [place for place in (folder / f"step{step}").iterdir() if RANK_FILE.fullmatch(place.name)]
        for place in places:
            found = read_json(place, LARGEST_LIST)
            if not isinstance(found, list):
                return None
            files += 1
            trajectories += len(found)
            cut += sum(is_cut(trajectory) for trajectory in found)
    except (OSError, ValueError):
        return None
    return Played(trajectories, cut, files) if files else None


def count_files(folder: Path, step: int) -> int:
    """Return how many ranks have written their file of a step."""
    try:
        return sum(bool(RANK_FILE.fullmatch(name)) for name in os.listdir(folder / f"step{step}"))
    except OSError:
        return 0


def later(folder: Path, step: int) -> list[str]:
    """Return the names of the folders of steps after `step`, which a run that goes on from there plays again."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [name for name in names if (found := FOLDER.fullmatch(name)) and int(found[1]) > step]


def last(folder: Path, count: int) -> list[tuple[int, Played]]:
    """Return the last `count` steps that are written, the latest first, and their trajectories."""
    numbers = sorted((int(name.removeprefix("step")) for name in later(folder, 0)), reverse=True)[:count]
    return [(number, played) for number in numbers if (played := read(folder, number)) is not None]


@dataclass(frozen=True)
class Window:
    """A time in which the environment's server was away, or lost its sessions.

    Attributes:
        begin, end: seconds since 1970; `end` is None while it lasts.
        why: "refused", "unanswered", "restarted".
    """
    begin: float
    end: float | None
    why: str

    def meets(self, begin: float, end: float) -> bool:
        """Tell whether it has a moment in common with a stretch of time."""
        return self.begin <= end and (self.end is None or self.end >= begin)


@dataclass
class Errors:
    """How many trajectories of a step failed, by what the trainer said of it.

    Attributes:
        away: nobody answered.
        answered: the environment answered with an error.
        other: anything else, such as words of the model that a client cannot read.
    """
    away: int = 0
    answered: int = 0
    other: int = 0

    def feed(self, line: str, times: int = 1) -> bool:
        """Take note of a line; return whether it tells of a failure."""
        match = STEP_ERROR.search(line)
        if not match:
            return False
        what = match["what"] if match["what"] is not None else "Reset Timeout"
        if AWAY.search(what):
            self.away += times
        elif ANSWERED.fullmatch(what.strip()):
            self.answered += times
        else:
            self.other += times
        return True

    def plus(self, more: Errors) -> Errors:
        """Return the sums."""
        return Errors(self.away + more.away, self.answered + more.answered, self.other + more.other)


def verdict(played: Played,
            windows: Sequence[Window],
            begin: float,
            end: float,
            errors: Errors,
            all_said: bool = True) -> str:
    """Return why a step is poisoned, a clause; "" where it is not.

    Args:
        windows: when the server was away.
        begin, end: the time in which the step was played.
        errors: what the trainer said of it.
        all_said: whether it has had time to; its lines come later than its files.
    """
    if not played.cut:
        return ""
    share = f"{played.cut} of {played.trajectories} trajectories scored 0"
    met = next((window for window in windows if window.meets(begin, end)), None)
    if met is not None:
        how = {"restarted": "was restarted and lost its sessions", "unanswered": "did not answer"}
        return f"{share} because the environment's server {how.get(met.why, 'was away')}"
    if errors.away:
        return f"{share} because the environment's server did not answer"
    if played.cut > TOLERATED * played.trajectories and errors.other <= errors.answered and (errors.answered
                                                                                             or all_said):
        return f"{share} because the environment's server answered with errors"
    return ""
