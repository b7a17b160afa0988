"""The rows of environments.toml, as far as playing the environments needs them."""
import difflib
import math
import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from evaluation.problems import Misuse

BESIDE = Path(__file__).resolve().parents[1] / "environments.toml"


class Table(BaseModel):
    """A table of the file. Keys that only servers need are ignored: whoever starts servers checks them."""
    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class Protocol(Table):
    """How a server speaks HTTP; the head of environments.toml says what each key means."""
    prefix: str = ""
    create: dict[str, Any] | None = None
    id_reply: str
    id: str
    item: str
    reset: dict[str, Any] = {}
    observation: Literal["reply", "list", "get"]
    observation_keys: tuple[str, ...] = ("observation", )
    state: str = "observation"
    reward: str = "reward"
    done: str = "done"
    reward_when_done: bool = False
    reset_fault: dict[str, Any] = {}
    faults: tuple[str, ...] = ()
    fault_starts: tuple[str, ...] = ()
    close: bool


class Success(Table):
    """The reward with which an episode counts as solved."""
    at_least: float | None = None
    above: float | None = None
    best: bool = False

    def counts(self, before: float, reward: float) -> float:
        """Return the episode's reward after a step that gave `reward`, where it was `before` until then."""
        return max(before, reward) if self.best else reward

    def holds(self, reward: float) -> bool:
        """Return True if `reward`, as the server gives it, solves the item."""
        return reward >= self.at_least if self.at_least is not None else reward > (self.above or 0.0)


class Items(Table):
    """The item ids that exist; no last one means that there is no end."""
    first: int = 0
    last: int | None = None
    eval_size: int | None = None
    splits: dict[str, tuple[int, int]] = {}


class PromptPlace(Table):
    """Where the prompt is: a class in a file of AgentGym's agentenv/agentenv/envs, or a text of our own."""
    file: str = ""
    class_: str = Field(default="", alias="class")
    text: str = ""


# What a run's configuration has of a row.
RESULTS_DEPEND_ON = {"action", "reward_range", "protocol", "success"}


class Row(Table):
    """One environment."""
    name: str
    title: str = ""
    source: str = "agentgym"
    folder: str = ""
    app: str = ""
    port: int
    concurrency: int = Field(ge=1)
    rounds: int = Field(ge=1)
    action: Literal["raw", "one_action_line", "after_first_action", "after_last_action", "sql_block", "backticks",
                    "whole_line"]
    reward_range: tuple[float, float]
    item_maps: tuple[str, ...] = ()
    prompt: PromptPlace = PromptPlace()
    protocol: Protocol
    success: Success
    items: Items

    @field_validator("reward_range")
    @classmethod
    def rises(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if not -math.inf < ends[0] < ends[1] < math.inf:
            raise ValueError("give the least reward and a greater one, both finite")
        return ends

    def scaled(self, reward: float) -> float:
        """Return `reward` as a share of the row's range, 0 to 1; what lies outside the range counts as its end."""
        low, high = self.reward_range
        return min(max((reward - low) / (high - low), 0.0), 1.0)


def rows_file(flag: str = "") -> Path:
    """Return the file with the rows: --environments, $ENVIRONMENTS, the current folder's, the one beside us."""
    for name in (flag, os.environ.get("ENVIRONMENTS", "")):
        if name:
            path = Path(name)
            return path if path.exists() or path.is_absolute() else BESIDE.parent / path
    here = Path("environments.toml")
    return here if here.exists() else BESIDE


def tables(path: Path) -> dict[str, Any]:
    """Return the file's tables, a row each, by name.

    Raises:
        Misuse: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise Misuse(f"no rows in {path}: {error.strerror}; name the file with --environments") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misuse(f"{path}: {error}") from None


def read_row(name: str, path: Path) -> Row:
    """Return the row called `name` of the file `path`.

    Raises:
        Misuse: no such file or row, or one that does not fit.
    """
    known = tables(path)
    # AgentGym's item lists say lmrlgym_maze where the row is called maze.
    table = known.get(name) or known.get(name.removeprefix("lmrlgym_"))
    if table is None:
        near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
        raise Misuse(f"no environment {name!r} in {path.name}; {hint}")
    if not isinstance(table, dict):
        raise Misuse(f"{path.name}: {name} is no table; a row begins with [{name}]")
    if "name" in table:
        raise Misuse(f"{path.name}: {name}.name: the table's own name is the row's; leave the key out")
    try:
        return Row(name=name if name in known else name.removeprefix("lmrlgym_"), **table)
    except ValidationError as error:
        first = error.errors()[0]
        raise Misuse(f"{path.name}: {'.'.join(map(str, (name, *first['loc'])))}: {first['msg']}") from None
