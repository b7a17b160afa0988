"""Suites: several models on several environments. Every pair is a run of its own; here is what comes of them together.

A plan names the pairs, each with the words of `run` that play it; who made the plan plays them, in whatever order.
"""
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from evaluation import foreign
from evaluation.attempts import ERRORS, Outcome
from evaluation.compared import Run
from evaluation.numbers import lost_sessions, macro, summarize, wall
from evaluation.problems import Misuse, reason
from evaluation.records import RUN, read_attempts
from evaluation.rescoring import read_manifest, read_scored
from evaluation.settings import Settings
from evaluation.show import percent, with_interval

WHOLE, PARTIAL, FAILED, ABSENT = "whole", "partial", "failed", "no run"
METRICS = {"success": "success rate", "reward": "mean reward"}


@with_config(ConfigDict(strict=True, extra="forbid"))
class Pair(TypedDict):
    """A model on an environment.

    Attributes:
        model: what it is called in the suite.
        words: of `run`, which play the pair.
        source: where rounds and items are from.
        count: of the items that the suite means.
        failed: why it was not played to its end.
    """
    env: str
    model: str
    words: list[str]
    source: NotRequired[str]
    count: NotRequired[Annotated[int, Field(ge=1)]]
    failed: NotRequired[str]


@with_config(ConfigDict(strict=True, extra="forbid"))
class Plan(TypedDict):
    """A suite."""
    name: str
    pairs: Annotated[list[Pair], Field(min_length=1)]


PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


def read_plan(path: Path) -> Plan:
    """Return the plan in a file.

    Raises:
        Misuse: it cannot be read, is none, or has a pair twice.
    """
    try:
        plan = PLAN.validate_python(foreign.read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Misuse(f"{path} is no suite: {'.'.join(map(str, first['loc']))}: {first['msg']}; `invoke eval.suite` "
                     "writes one") from None
    except (OSError, ValueError) as error:
        raise Misuse(f"{path} cannot be read: {reason(error)}; `invoke eval.suite` writes one") from None
    named = [(pair["env"], pair["model"]) for pair in plan["pairs"]]
    for name in named:
        if named.count(name) > 1:
            raise Misuse(f"{path}: {' and '.join(name)} are there twice; give each model a name of its own")
    return plan


class Seen(NamedTuple):
    """What there is of a pair: its line in the suite's summary, and its run where it has one that can be read."""
    line: dict[str, Any]
    run: Run | None


def standing(settings: Settings) -> dict[str, Any]:
    """Return where a pair is played, how many attempts it has when it is whole, and how many of them have a result.

    Raises:
        Misuse: the run that is there is damaged.
    """
    expected = len(settings.items) * settings.samples
    wanted = {(item.id, sample) for item in settings.items for sample in range(settings.samples)}
    done = 0
    if (settings.out / RUN).exists():
        done = sum((one["item"], one["sample"]) in wanted and one["outcome"] not in ERRORS
                   for one in read_attempts(settings.out))
    return {"folder": str(settings.out), "items": len(settings.items), "expected": expected, "done": done}


def look(pair: Pair, settings: Settings, price: Mapping[str, float] | None) -> Seen:
    """Return what has come of a pair until now."""
    expected = len(settings.items) * settings.samples
    line: dict[str, Any] = {"env": pair["env"], "model": pair["model"], "folder": str(settings.out)}
    nothing = {"attempts": 0, "expected": expected, "errors": 0, "refused": 0, "success": None, "reward": None}
    if not (settings.out / RUN).exists():
        return Seen({**line, "state": ABSENT, "why": pair.get("failed", "it was not played"), **nothing}, None)
    try:
        manifest, records = read_manifest(settings.out), read_scored(settings.out)
    except Misuse as problem:
        return Seen({**line, "state": FAILED, "why": str(problem), **nothing}, None)
    wanted = {(item.id, sample) for item in settings.items for sample in range(settings.samples)}
    records = [one for one in records if (one["item"], one["sample"]) in wanted]
    summary = summarize(records, settings.samples, expected, price, wall(manifest["work"], records),
                        lost_sessions(manifest["work"]))
    state, why = WHOLE, ""
    if summary["attempts"] < expected:
        state, why = PARTIAL, f"{summary['attempts']} of {expected} attempts were played"
    elif summary["error_rate"] > settings.max_error_rate:
        first = next(one for one in records if one["outcome"] in ERRORS)
        state = FAILED
        why = (f"{summary['errors']} of {expected} attempts failed by infrastructure, more than --max-error-rate "
               f"{settings.max_error_rate:g}; the first: {first['item']} {first['outcome']}: {first['error']}")
    elif not summary["success"]:
        state, why = FAILED, f"none of {expected} attempts has a score"
    if state != WHOLE and "failed" in pair:
        why = f"{why}: {pair['failed']}"
    line.update(state=state, why=why, refused=summary["outcomes"].get(Outcome.REFUSED, 0))
    line.update({
        key: summary[key]
        for key in ("attempts", "expected", "errors", "success", "reward", "rounds", "usage", "cost", "seconds")
    })
    if "pass_at" in summary:
        line["pass_at"] = summary["pass_at"]
    return Seen(line, Run(f"{pair['env']}: {pair['model']}", manifest, records, summary))


def summary_of(plan: Plan, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the suite's summary: its pairs, each model's average over environments, and what must be known of them.

    A model has an average where all its pairs are whole, and none otherwise: fewer environments are another average.
    """
    models = list(dict.fromkeys(line["model"] for line in lines))
    averages = {}
    for model in models:
        own = [line for line in lines if line["model"] == model]
        lacking = [line["env"] for line in own if line["state"] != WHOLE]
        averages[model] = {
            **{
                metric: None if lacking else macro([line[metric] for line in own])
                for metric in METRICS
            },
            "environments": len(own),
            "lacking": lacking,
        }
    return {
        "suite": plan["name"],
        "environments": list(dict.fromkeys(line["env"] for line in lines)),
        "models": models,
        "whole": all(line["state"] == WHOLE for line in lines),
        "sources": {
            pair["env"]: pair["source"]
            for pair in plan["pairs"] if "source" in pair
        },
        "pairs": list(lines),
        "macro": averages,
        "notes": notes(plan, lines),
    }


def notes(plan: Plan, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what of the pairs must not be overlooked, a line each."""
    found = []
    for line in lines:
        name = f"{line['model']} on {line['env']}"
        if line["state"] != WHOLE:
            found.append(f"{name} is in no average ({line['state']}): {line['why']}")
            continue
        if line["errors"]:
            found.append(f"{name}: {line['errors']} of {line['expected']} attempts failed by infrastructure and are "
                         "in no score")
        if line["refused"]:
            found.append(f"{name}: {line['refused']} of {line['expected']} attempts were refused and are in no score")
    return found


def short_lists(plan: Plan, items: Mapping[str, int]) -> list[str]:
    """Return which environments are not played with as many items as the suite means, a line each.

    Args:
        items: how many are played, by environment.
    """
    meant = {pair["env"]: pair["count"] for pair in plan["pairs"] if "count" in pair}
    return [
        f"{env}: {items[env]} items are played, and the suite's list has {count}" for env, count in meant.items()
        if items.get(env, count) != count
    ]


def cell(line: Mapping[str, Any] | None, metric: str) -> str:
    """Return a pair's figure with its interval, and what it lacks."""
    if line is None:
        return ""
    if line["state"] == WHOLE:
        return with_interval(line[metric])
    shown = with_interval(line[metric]) if line[metric] else "-"
    return f"{shown} ({line['state']}, {line['attempts']} of {line['expected']})"


def cost_of(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return what a model's pairs cost together, the least where a pair's cost, or the tokens of an answer, are unknown."""
    known = [line for line in lines if line.get("cost") is not None]
    if not known:
        return "-"
    total, unknown = f"{sum(line['cost'] for line in known):.4f}", sum(line["usage"]["unknown"] for line in known)
    lacking = [f"{unknown} answers unknown"] if unknown else []
    if len(known) < len(lines):
        lacking.append(f"{len(lines) - len(known)} of {len(lines)} environments without a cost")
    return f"at least {total} ({', '.join(lacking)})" if lacking else total


def rows(summary: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the table's rows: what it is, and a cell each model."""
    at = {(line["env"], line["model"]): line for line in summary["pairs"]}
    models = summary["models"]
    found: list[tuple[str, list[str]]] = []
    for metric, title in METRICS.items():
        found.append((title, ["" for _ in models]))
        found += [(f"  {env}", [cell(at.get((env, model)), metric) for model in models])
                  for env in summary["environments"]]
        averages = []
        for model in models:
            one = summary["macro"][model]
            averages.append(f"- ({len(one['lacking'])} of {one['environments']} not whole)"
                            if one["lacking"] else f"{with_interval(one[metric])} of {one['environments']}")
        found.append(("  macro average", averages))
    most = [str(max(map(int, line.get("pass_at", {"0": None})))) for line in summary["pairs"]]
    for k in sorted(set(most) - {"0"}, key=int):
        found.append((f"Pass@{k}", ["" for _ in models]))
        found += [(f"  {env}", [
            with_interval(at[env, model].get("pass_at", {}).get(k)) if (env, model) in at else "" for model in models
        ]) for env in summary["environments"]]
    totals = [[line for line in summary["pairs"] if line["model"] == model] for model in models]
    found.append(("errors, not scored", [
        f"{sum(line['errors'] for line in own)} ({percent(sum(line['errors'] for line in own) / tried)})" if
        (tried := sum(line["attempts"] for line in own)) else "-" for own in totals
    ]))
    if any(line.get("cost") is not None for own in totals for line in own):
        found.append(("cost", [cost_of(own) for own in totals]))
    return found


def seen(plan: Plan, decided: Sequence[Settings], price_of: Callable[[str], dict[str, float] | None]) -> list[Seen]:
    """Return what there is of each pair."""
    prices = {settings.model: price_of(settings.model) for settings in decided}
    return [look(pair, settings, prices[settings.model]) for pair, settings in zip(plan["pairs"], decided, strict=True)]
