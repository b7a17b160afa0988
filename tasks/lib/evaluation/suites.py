"""Suites: models on environments, from flags and TOML files to the pairs that are played."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import environment_rows
from environment_rows import near
from tasks.lib.errors import UserError
from tasks.lib.evaluation.asked import Asked
from tasks.lib.flags import Value, flag, marked, values

FOLDER = Path("suites")
RUNS = Path("saves") / "eval" / "suites"
# What of `invoke eval` a suite says in its own way, or has no use for.
NOT_OF_A_SUITE = ("env", "model", "checkpoint", "out", "resume", "check", "base_url_as")


@dataclass(frozen=True)
class OfASuite:
    """The flags of `invoke eval.suite` that are its own."""
    suite: str = flag("Name of a suite in suites/ (agentgym-rl), or a TOML file (default: none; --env says which).")
    env: tuple[str, ...] = flag("Environments, with commas between them; with --suite only these of it. Repeatable.",
                                ())
    model: tuple[str, ...] = flag("Model of the endpoint; with --suite beside those in it. Repeatable.", ())
    checkpoint: tuple[str, ...] = flag(
        "Folder with shards, or a Hugging Face model, which is merged if need be and served. Repeatable.", ())
    out: str = flag("Folder of table and report (default: saves/eval/suites/NAME; the runs are in saves/eval).")
    check: bool = flag("Start and play nothing, and show the pairs, where they are played and what is missing.", False)
    json: bool = flag("Print the pairs, figures and averages as one JSON object, and nothing else.", False)


OF_CHECKPOINTS = ("engine", "serve_wait", "gpus")

# Every other flag of `invoke eval` is for all pairs.
SUITE: type[OfASuite] = make_dataclass("Suite", [(one.name, one.type, field(default=one.default, metadata=one.metadata))
                                                 for one in fields(Asked) if one.name not in NOT_OF_A_SUITE],
                                       bases=(OfASuite, ),
                                       frozen=True)
FOR_ALL = {one.name: one for one in fields(Asked) if one.name not in NOT_OF_A_SUITE}


@dataclass(frozen=True)
class Pair:
    """A model on an environment.

    Attributes:
        model: what it is called in the suite.
        asked: the flags of `invoke eval` that play it.
        source: where rounds and items are from.
        count: how many items the suite means; 0 where it does not say.
        own_list: play AgentEval's list, and no other in its place.
    """
    env: str
    model: str
    asked: Asked
    source: str = ""
    count: int = 0
    own_list: bool = False


@dataclass(frozen=True)
class Side:
    """One environment or one model of a suite, with its flags."""
    name: str
    flags: Mapping[str, Value]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class File:
    """What a suite's file says."""
    name: str
    flags: Mapping[str, Value]
    environments: Sequence[Side]
    models: Sequence[Side]


def find(name: str, root: Path) -> Path:
    """Return the file of the suite called `name`: a TOML file, or one of the project's.

    Raises:
        UserError: there is none.
    """
    own = root / FOLDER / f"{name}.toml"
    if name.endswith(".toml") or "/" in name:
        if Path(name).is_file():
            return Path(name)
        raise UserError(f"no file {name}; give a TOML file, or one of {', '.join(_known(root))}")
    if own.is_file():
        return own
    raise UserError(f"no suite {name!r}; {near(name, _known(root))} (or a TOML file of your own)")


def _known(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / FOLDER).glob("*.toml"))


def read(path: Path) -> File:
    """Return what a suite's file says.

    Raises:
        UserError: it cannot be read, or says what no suite has; where and what, in one line.
    """
    try:
        table = environment_rows.read_toml(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give another file") from None
    except ValueError as error:
        raise UserError(f"{path} is no TOML: {error}; see suites/agentgym-rl.toml") from None
    sides: dict[str, list[Side]] = {"environment": [], "model": []}
    for kind, found in sides.items():
        entries = table.pop(kind, [])
        if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
            raise UserError(f"{path}: {kind} is no list of tables; begin each with [[{kind}]]")
        for number, entry in enumerate(entries, 1):
            found.append(_side(kind, entry, f"{path}: {kind} {number}"))
    return File(path.stem, _flags(table, str(path), ("environment", "model")), sides["environment"], sides["model"])


def _side(kind: str, entry: dict[str, Any], where: str) -> Side:
    names = ("env", ) if kind == "environment" else ("model", "checkpoint")
    kinds: dict[str, type] = {"source": str, "count": int, "list": bool} if kind == "environment" else {"name": str}
    given = {name: entry.pop(name) for name in names if name in entry}
    if len(given) != 1 or not all(isinstance(one, str) and one for one in given.values()):
        raise UserError(f"{where}: give it {' or '.join(names)}, a text")
    facts: dict[str, Any] = {}
    for name, wanted in kinds.items():
        value = entry.pop(name, None)
        if value is not None and (type(value) is not wanted or
                                  (isinstance(value, int) and wanted is int and value < 1)):
            raise UserError(f"{where}: {name} = {value!r} is no {_kind(wanted)}")
        if value is not None:
            facts[name] = value
    [(how, called)] = given.items()
    flags = dict(_flags(entry, where, (*names, *kinds)))
    if kind == "model":
        flags[how] = called
        called = facts.get("name") or (called if how == "model" else "")
    return Side(called, flags, facts)


def _kind(wanted: type) -> str:
    return {str: "text", int: "whole number above 0", bool: "true or false"}[wanted]


def _flags(table: Mapping[str, Any], where: str, others: Iterable[str]) -> dict[str, Value]:
    """Return a table's flags as they would be typed."""
    found: dict[str, Value] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in FOR_ALL:
            raise UserError(f"{where}: no such key {key!r}; {near(key, [*others, *FOR_ALL])}")
        default = FOR_ALL[name].default
        if isinstance(default, bool):
            fits, wanted = isinstance(value, bool), "true or false"
        elif isinstance(default, tuple):
            fits, wanted = isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of texts"
        else:
            fits, wanted = isinstance(value, str | int | float) and not isinstance(value, bool), "a text or a number"
        if not fits:
            raise UserError(f"{where}: {key} = {value!r} is not {wanted}")
        found[name] = value if isinstance(value, bool) else tuple(value) if isinstance(value, list) else str(value)
    return found


def decide(asked: OfASuite, root: Path) -> tuple[str, list[Pair]]:
    """Return the suite's name and its pairs, those of one environment together.

    What is typed goes before a model's own flags, these before the environment's, and these before the file's. Of two
    numbers of episodes at once, one of the model and one of the environment, the smaller counts.

    Raises:
        UserError: no environment, no model, or one twice; or the file cannot be.
    """
    file = read(find(asked.suite, root)) if asked.suite else File("suite", {}, (), ())
    default = Asked()
    typed = {
        name: value
        for name, value in values(asked).items() if name in FOR_ALL and value != getattr(default, name)
    }
    named = [name.strip() for word in asked.env for name in word.split(",") if name.strip()]
    if file.environments:
        known = {one.name: one for one in file.environments}
        for name in named:
            if name not in known:
                raise UserError(f"--env {name} is not in the suite {file.name}; {near(name, known)}")
        environments = [known[name] for name in named] if named else list(file.environments)
    else:
        environments = [Side(name, {}, {}) for name in named]
    models = [
        *file.models, *(Side(name, {"model": name}, {}) for name in asked.model),
        *(Side("", {"checkpoint": folder}, {}) for folder in asked.checkpoint)
    ]
    if not environments:
        raise UserError("no environment; name them with --env textcraft,babyai, or take --suite agentgym-rl")
    if not models:
        raise UserError("no model; name them with --model or --checkpoint")
    models = [one if one.name else replace(one, name=_called(str(one.flags["checkpoint"]))) for one in models]
    for kind, sides in (("environment", environments), ("model", models)):
        several = [one.name for one in sides]
        if twice := [name for name in several if several.count(name) > 1]:
            raise UserError(f"the {kind} {twice[0]} is there twice; " +
                            ("name it once" if kind == "environment" else "give each a name of its own in a TOML file"))
    pairs = []
    for env in environments:
        for model in models:
            flags = {**file.flags, **env.flags, **model.flags, **typed}
            if "concurrency" not in typed and "concurrency" in env.flags and "concurrency" in model.flags:
                flags["concurrency"] = _fewer(str(env.flags["concurrency"]), str(model.flags["concurrency"]))
            # What is said of the models at endpoints is not said of checkpoints, and the other way round.
            others = OF_CHECKPOINTS if "model" in flags else tuple(marked(Asked, "endpoint"))
            flags = {key: value for key, value in flags.items() if key not in others or key in model.flags}
            pair = Asked(**{**flags, "env": env.name})  # type: ignore[arg-type]
            pair.check_checkpoint()
            pairs.append(
                Pair(env.name, model.name, pair, env.facts.get("source", ""), env.facts.get("count", 0),
                     env.facts.get("list", False) and not flags.get("items")))
    return file.name, pairs


def _called(checkpoint: str) -> str:
    """Return what a checkpoint's folder is called: saves/x/global_step_100/actor is x/global_step_100/actor."""
    parts = [part for part in Path(checkpoint).parts if part not in ("/", "..", ".")]
    return "/".join(parts[-3:]) or checkpoint


def _fewer(one: str, other: str) -> str:
    numbers = [int(each) for each in (one, other) if each.isdecimal()]
    return str(min(numbers)) if numbers else one


def order(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs in the order in which they are played: what is started for a pair serves its neighbours too.

    At endpoints, environment by environment; then checkpoint by checkpoint, since a model takes longer to load.
    """
    at_endpoints = [pair for pair in pairs if not pair.asked.checkpoint]
    served = [pair for pair in pairs if pair.asked.checkpoint]
    checkpoints = list(dict.fromkeys(pair.model for pair in served))
    return [*at_endpoints, *sorted(served, key=lambda pair: checkpoints.index(pair.model))]


def missing_list(pairs: Iterable[Pair], root: Path) -> str:
    """Return what to say of the first pair whose suite means AgentEval's list where that is not here; or nothing."""
    lacking = [
        env for env in dict.fromkeys(pair.env for pair in pairs if pair.own_list)
        if not any((root / "AgentEval" / env).glob("*.json"))
    ]
    if not lacking:
        return ""
    return (
        f"the suite plays AgentEval's list of {', '.join(lacking)}, which is not here; fetch it with `invoke data.fetch "
        f"--env {','.join(lacking)}`, or name other items with --items")
