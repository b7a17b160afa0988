"""Evaluate several models on several environments: what `eval.suite` does."""
from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.context import Context
from invoke.tasks import task

from tasks.evaluate import (
    CHECKPOINT,
    Prepared,
    prepare_checkpoint,
    program_words,
    run_evaluation,
    runner_for,
    served,
    served_checkpoint,
    typed_for,
)
from tasks.lib.errors import INTERRUPTED, UserError
from tasks.lib.evaluation import suites
from tasks.lib.evaluation.plan import Endpoint, endpoint_flags
from tasks.lib.evaluation.suites import SUITE, OfASuite, Pair
from tasks.lib.flags import Value, as_words, helps, repeatable, takes, values, whole_number
from tasks.lib.host.programs import GPUS_HERE
from tasks.lib.interrupts import as_ctrl_c
from tasks.lib.notices import put, say, tell
from tasks.lib.settings import ROOT

if TYPE_CHECKING:
    from tasks.lib.environments.rows import Environment

UNKNOWN = "http://127.0.0.1:9"  # where a checkpoint will be served; no configuration has it


@dataclass
class Part:
    """A pair as it is played.

    Attributes:
        typed, variables: the runner's flags and variables.
        failed: why it was not played to its end.
    """
    pair: Pair
    row: Environment
    typed: dict[str, Value]
    variables: dict[str, str]
    failed: str = ""

    @property
    def called(self) -> str:
        """What it is called where it is spoken of."""
        return f"{self.pair.model} on {self.pair.env}"


@task(positional=[], auto_shortflags=False, iterable=repeatable(SUITE), help=helps(SUITE))
@takes(SUITE)
def suite(c: Context, asked: OfASuite) -> None:
    """Evaluate models on environments, and average them."""
    from tasks.lib.atomic import RUN
    from tasks.lib.environments.lookup import find_row
    from tasks.lib.host.locks import exclusive
    name, pairs = suites.decide(asked, ROOT)
    runner = runner_for(pairs[0].asked.runner, next((one.asked.checkpoint for one in pairs if one.asked.checkpoint),
                                                    ""))
    if runner == "local" and any(one.asked.gpus for one in pairs):
        raise UserError(GPUS_HERE)
    parts = []
    for pair in suites.order(pairs):
        row = find_row(pair.env)
        whole_number("wait", pair.asked.wait, 1)
        own = replace(pair, env=row.name, asked=replace(pair.asked, env=row.name, check=asked.check))
        parts.append(Part(own, row, *typed_for(own.asked, row, runner)))
    if lacking := suites.missing_list(pairs, ROOT):
        raise UserError(lacking)
    folder = Path(asked.out) if asked.out else ROOT / suites.RUNS / name
    if c.config.run.dry:
        play(c, runner, parts, prepare(c, runner, parts))
        return
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    with as_ctrl_c(), elsewhere(asked.json), exclusive(RUN / "suites" / digest,
                                                       f"waiting for another suite in {folder}"):
        state = check(c, runner, write_plan(folder, name, runner, parts), parts)
        prepared = prepare(c, runner, parts)
        if prepared:  # their names were not known, so neither were the runs
            state = check(c, runner, write_plan(folder, name, runner, parts), parts)
        if not asked.check:
            missing = [
                part for part, one in zip(parts, state["pairs"], strict=True)
                if one["done"] < one["expected"] or part.typed.get("fresh")
            ]
            for part in parts:
                if part not in missing:
                    tell(f"{part.called} is whole already")
            play(c, runner, missing, prepared)
            plan = write_plan(folder, name, runner, parts)
    if asked.check:
        show_state(asked.json, parts, state)
        return
    shown = {key: value for key, value in values(asked).items() if key in ("prices", "upstream_compat", "json")}
    run_evaluation(c, runner, ["suite", inside(runner, plan), *as_words(shown)], all_variables(parts))


@contextmanager
def elsewhere(wanted: bool) -> Iterator[None]:
    """Let all that is said on standard output be said on standard error, where that is for one JSON object."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def prepare(c: Context, runner: str, parts: Sequence[Part]) -> dict[str, Prepared]:
    """Merge the checkpoints, and let the parts name their models; return them by what the suite calls them.

    Raises:
        UserError: one line.
    """
    found: dict[str, Prepared] = {}
    for part in parts:
        if not part.pair.asked.checkpoint:
            continue
        one = found.get(part.pair.model)
        if one is None:
            one = found[part.pair.model] = prepare_checkpoint(c, part.pair.asked, runner)
        part.typed.update(endpoint_flags(Endpoint(one.name, UNKNOWN, one.engine, one.context), part.typed))
    return found


def write_plan(folder: Path, name: str, runner: str, parts: Sequence[Part]) -> Path:
    """Write the pairs, and the words that play them, for the evaluation program; return the file.

    Raises:
        OSError: it cannot be written.
    """
    pairs: list[dict[str, Any]] = []
    for part in parts:
        typed = {**part.typed, "check": False, "fresh": False, "quiet": False}
        if part.pair.asked.checkpoint and not typed.get("model"):
            typed["model"] = CHECKPOINT
        one = {"env": part.pair.env, "model": part.pair.model, "words": program_words(runner, typed)[1:]}
        found = {"source": part.pair.source, "count": part.pair.count, "failed": part.failed}
        pairs.append({**one, **{key: value for key, value in found.items() if value}})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan.json"
    new = path.with_name("plan.json.new")
    new.write_text(json.dumps({"name": name, "pairs": pairs}, indent=1) + "\n")
    new.replace(path)
    return path


def inside(runner: str, path: Path) -> str:
    """Return a file's name where the evaluation program runs.

    Raises:
        UserError: a container does not see it.
    """
    from tasks.lib.evaluation.asked import in_container
    return str(in_container({"out": str(path)}, ROOT)["out"]) if runner == "docker" else str(path)


def all_variables(parts: Sequence[Part]) -> dict[str, str]:
    """Return the variables of all pairs; each checkpoint's key is none of the user's."""
    found: dict[str, str] = {}
    for part in parts:
        found.update({key: value for key, value in part.variables.items() if key != "OPENAI_API_KEY"})
    if all(part.pair.asked.checkpoint for part in parts):
        found.update(parts[0].variables)
    return found


def check(c: Context, runner: str, plan: Path, parts: Sequence[Part]) -> dict[str, Any]:
    """Let the evaluation program see that each pair could be played; return where, and how many attempts are done.

    Raises:
        UserError: one could not; the program said why.
    """
    run_evaluation(c, runner, ["suite", inside(runner, plan), "--check"], all_variables(parts))
    state: dict[str, Any] = json.loads(plan.with_name("state.json").read_text())
    for line in state["notes"]:
        say(line)
    return state


def show_state(as_json: bool, parts: Sequence[Part], state: Mapping[str, Any]) -> None:
    """Show where the pairs are played and what is missing."""
    from tasks.lib.tables import print_table
    lines = []
    for part, one in zip(parts, state["pairs"], strict=True):
        known = part.typed.get("model") != CHECKPOINT
        lines.append({
            "env": part.pair.env,
            "model": part.pair.model,
            "source": part.pair.source,
            **one, "folder": one["folder"] if known else None
        })
    if as_json:
        print(json.dumps({"pairs": lines, "notes": state["notes"]}))
        return
    print_table(("environment", "model", "items", "rounds", "done", "folder"),
                [(one["env"], one["model"], str(one["items"]), str(one["rounds"]),
                  f"{one['done']} of {one['expected']}", one["folder"] or "(its name comes of the merged files)")
                 for one in lines])
    for env, source in {one["env"]: one["source"] for one in lines if one["source"]}.items():
        put(f"{env}: {source}")


def play(c: Context, runner: str, parts: Sequence[Part], prepared: Mapping[str, Prepared]) -> None:
    """Play the pairs one after the other, so that no endpoint is asked by two runs at once.

    A server is started with its first pair and stopped after its last; a pair that fails is noted and the others go on.

    Raises:
        UserError: it was interrupted.
    """
    left = Counter(part.pair.env for part in parts)
    servers: dict[str, tuple[ExitStack, str]] = {}
    broken: dict[tuple[str, str], str] = {}  # servers of environments and models that did not start, and why
    with ExitStack() as everything:
        for model, group in groupby(parts, lambda part: part.pair.model if part.pair.asked.checkpoint else ""):
            with ExitStack() as stack:
                endpoint: Endpoint | None = None
                for part in group:
                    asked, env = part.pair.asked, part.pair.env
                    place = "environment", env  # what is to blame where something does not start
                    try:
                        for name in (place, ("model", model)):
                            if name in broken:
                                raise UserError(broken[name])
                        tell(f"{part.called} ({len(parts) - left.total() + 1} of {len(parts)})")
                        url = asked.server
                        if not url and env not in servers:
                            own = everything.enter_context(ExitStack())
                            servers[env] = own, own.enter_context(
                                served(c, part.row, runner, asked.i_understand, int(asked.wait)))
                        url = url or servers[env][1]
                        place = "model", model
                        if model and endpoint is None:
                            endpoint = stack.enter_context(served_checkpoint(c, prepared[model]))
                        place = "", ""
                        run_evaluation(c, runner, program_words(runner, played(part, url, endpoint)), part.variables)
                    except UserError as error:
                        if error.code == INTERRUPTED:
                            raise
                        part.failed = error.said() or f"its run ended with exit code {error.code}"
                        if place[0]:
                            broken.setdefault(place, part.failed)
                        say(f"{part.called}: {part.failed}")
                    finally:
                        left[env] -= 1
                        if env in servers and not left[env]:
                            servers.pop(env)[0].close()


def played(part: Part, url: str, endpoint: Endpoint | None) -> dict[str, Value]:
    """Return the runner's flags with the addresses of what was started."""
    typed = {**part.typed, "server": url}
    if endpoint:
        typed.update(endpoint_flags(endpoint, part.typed))
    return typed
