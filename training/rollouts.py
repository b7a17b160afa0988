"""What the trainer wrote of a step's trajectories, and whether the environment's server was away in it.

`rollouts/stepN/RANK.json` is a list of {item_id, conversations, reward}. Where a request fails, whatever the reason,
the trainer gives the trajectory 0 and goes on: then nothing follows the model's last words. Where the environment
answered, its words are last. (verl/workers/rollout/agent_vllm_rollout/vllm_rollout.py, agent_step.)
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER, RANK_FILE = re.compile(r"step(\d+)"), re.compile(r"\d+\.json")
# The trainer prints this for each trajectory whose step failed, and this where a reset took too long.
STEP_ERROR = re.compile(
    r"Rollou(?:t)? step Error: (?P<what>.*?) ?item id = (?P<item>-?\d+)|Reset Timeout: (?P<reset>.*)")
# What an HTTP client says when nobody answers.
AWAY = re.compile(r"Connection refused|Connection aborted|Connection reset|RemoteDisconnected|Max retries exceeded|"
                  r"NewConnectionError|Read timed out|ConnectTimeout|Name or service not known|No route to host|"
                  r"Temporary failure in name resolution|Network is unreachable|Broken pipe|IncompleteRead|"
                  r"Reset Timeout|ConnectionError|Remote end closed")
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
            found = json.loads(place.read_bytes())
            if not isinstance(found, list):
                return None
            files += 1
            trajectories += len(found)
            cut += sum(is_cut(trajectory) for trajectory in found)
    except (OSError, ValueError, RecursionError):
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


def verdict(played: Played, windows: Sequence[Window], begin: float, end: float, away_lines: int = 0) -> str:
    """Return why a step is poisoned, a clause; "" where it is not.

    Args:
        windows: when the server was away.
        begin, end: the time in which the step was played.
        away_lines: how often the trainer said meanwhile that nobody answered.
    """
    if not played.cut:
        return ""
    share = f"{played.cut} of {played.trajectories} trajectories scored 0"
    met = next((window for window in windows if window.meets(begin, end)), None)
    if met is not None:
        how = {"restarted": "was restarted and lost its sessions", "unanswered": "did not answer"}
        return f"{share} because the environment's server {how.get(met.why, 'was away')}"
    if away_lines:
        return f"{share} because the environment's server did not answer"
    if played.cut > TOLERATED * played.trajectories:
        return f"{share} because the environment's server answered with errors"
    return ""
