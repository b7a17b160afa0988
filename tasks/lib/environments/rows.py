"""The rows of environments.toml, typed and checked.

Pydantic takes 0.1 s to import: tasks import this module inside their functions.
"""
import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tasks.lib.errors import UserError
from tasks.lib.settings import ROOT

ROWS = ROOT / "environments.toml"
NAME = r"[a-z0-9]+([-_][a-z0-9]+)*"


class Row(BaseModel):
    """A table whose keys are all known: a mistyped key is an error, not a silent default."""
    model_config = ConfigDict(extra="forbid", frozen=True)


class Protocol(Row):
    """How a server speaks HTTP; environments.toml says what each key means."""
    prefix: str = ""
    create: dict[str, Any] | None = None
    id_reply: str
    id: Literal["id", "env_idx"]
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


class Success(Row):
    """The reward with which an episode counts as solved."""
    at_least: float | None = None
    above: float | None = None
    best: bool = False

    @model_validator(mode="after")
    def exactly_one(self) -> "Success":
        if (self.at_least is None) == (self.above is None):
            raise ValueError("give either at_least or above")
        return self

    def holds(self, reward: float) -> bool:
        """Tell whether `reward` solves the item."""
        return reward >= self.at_least if self.at_least is not None else reward > (self.above or 0.0)


class Items(Row):
    """The item ids that exist; no last one means that there is no end."""
    first: int
    last: int | None = None
    eval_size: int | None = None
    wraps: bool = False
    splits: dict[str, tuple[int, int]] = {}
    note: str = ""


class Check(Row):
    """What `env.check` plays: an action that every item understands, and two items that differ."""
    action: str
    items: tuple[int, int]
    same_start: bool = False


class Data(Row):
    """A file or folder that must lie in the environment's data folder."""
    path: str
    url: str = ""
    hub: str = ""
    files: tuple[str, ...] = ()
    then: Literal["", "join", "gunzip", "unzip"] = ""
    inner: tuple[str, ...] = ()
    how: str = ""

    @model_validator(mode="after")
    def obtainable(self) -> "Data":
        if not (self.url or self.hub or self.how):
            raise ValueError("give url, hub or how")
        return self


class Key(Row):
    """A variable without which the server refuses to start, unless `optional`; secret unless `public`."""
    name: str
    how: str
    public: bool = False
    optional: bool = False


class Prompt(Row):
    """Where AgentGym keeps its prompt, a file of agentenv/agentenv/envs and the class in it; or the words themselves."""
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    file: str = ""
    class_: str = Field(default="", alias="class")
    text: str = ""


class Environment(Row):
    """One environment: where its server is, what it needs, how it speaks."""
    name: str
    title: str
    source: Literal["agentgym", "project"]
    folder: str
    stage: str = ""
    app: str = Field(pattern=r"^[\w.]+:\w+$")
    command: str = ""
    workdir: str = "."
    pythonpath: tuple[str, ...] = ()
    python: str = Field(pattern=r"^3\.\d+$")
    constraints: str
    unused: tuple[str, ...] = ()
    system: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    port: int = Field(ge=1024, le=65535)
    memory_mb: int = Field(ge=1)
    gpu: bool = False
    session_mb: float | None = None
    max_sessions: int | None = Field(default=None, ge=1)
    concurrency: int = Field(ge=1)
    rounds: int = Field(ge=1)
    action: Literal["raw", "one_action_line", "after_first_action", "after_last_action", "sql_block", "backticks",
                    "whole_line"]
    reward_range: tuple[float, float]
    request_seconds: float | None = Field(default=None, gt=0)
    sqlite_seconds: float | None = Field(default=None, gt=0)
    serial_reset: bool = False
    read_only: bool = True
    tmpfs: tuple[str, ...] = ()
    before: tuple[tuple[str, ...], ...] = ()
    env: dict[str, str] = {}
    item_maps: tuple[str, ...] = ()
    prompt: Prompt | None = None
    consent: str = ""
    notes: tuple[str, ...] = ()
    protocol: Protocol
    success: Success
    items: Items
    check: Check
    data: tuple[Data, ...] = ()
    keys: tuple[Key, ...] = ()
    links: dict[str, str] = {}

    @field_validator("reward_range")
    @classmethod
    def rises(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if not -math.inf < ends[0] < ends[1] < math.inf:
            raise ValueError("give the least reward and a greater one, both finite")
        return ends

    def served(self) -> dict[str, Any]:
        """Return this row as plain JSON values, for the programs in `servers/`."""
        return self.model_dump(mode="json", exclude_defaults=True, by_alias=True)

    def missing_data(self, folder: Path) -> list[Data]:
        """Return the data that is not in `folder`."""
        return [data for data in self.data if not (folder / data.path).exists()]

    def missing_keys(self, environ: Mapping[str, str]) -> list[Key]:
        """Return the keys that are a must and that `environ` does not set."""
        return [key for key in self.keys if not (key.optional or environ.get(key.name))]


def parse(tables: Mapping[str, Any], file: str = ROWS.name) -> dict[str, Environment]:
    """Return the environments of parsed TOML `tables`, by name; `file` is what messages call them.

    Raises:
        UserError: a row does not fit; the message names row, key and fault in one line.
    """
    found = {}
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise UserError(f"{file}: {name} is no table; a row begins with [{name}]")
        if not re.fullmatch(NAME, name):
            raise UserError(
                f"{file}: {name!r} names an image, a service and folders: lower-case letters and digits, with "
                "single - or _ between them")
        if "name" in table:
            raise UserError(f"{file}: {name}.name: the table's own name is the row's; leave the key out")
        try:
            found[name] = Environment(name=name, **table)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (name, *first["loc"])))
            raise UserError(f"{file}: {where}: {first['msg']}") from None
    ports: dict[int, str] = {}
    for row in found.values():
        if row.port in ports:
            raise UserError(f"{file}: {row.name}.port: {row.port} is the port of {ports[row.port]} too")
        ports[row.port] = row.name
    return found


@cache
def environments(path: Path = ROWS) -> dict[str, Environment]:
    """Return every row of `path`.

    Raises:
        UserError: it cannot be read, is no TOML, or a row does not fit.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; ENVIRONMENTS must name a file with rows") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name}: {error}") from None
    return parse(tables, path.name)


def environment(name: str, path: Path = ROWS) -> Environment:
    """Return the row called `name`.

    Raises:
        UserError: there is none; the message suggests near names.
    """
    rows = environments(path)
    if name in rows:
        return rows[name]
    near = difflib.get_close_matches(name.lower(), rows, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(rows)}"
    raise UserError(f"no environment {name!r} in {path.name}; {hint}")
