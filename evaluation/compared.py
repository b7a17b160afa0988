"""The runs that a report or a comparison is of: their names, their differences, the trainings that they belong to."""
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation import show
from evaluation.attempts import Attempt
from evaluation.numbers import compare, lost_sessions, summarize, wall
from evaluation.problems import Misuse
from evaluation.records import told

# Whole words, for there are models called two-step-7b; a plain step stands at the end, for there are step2-mini too.
STEP = re.compile(r"(?:^|[^a-zA-Z0-9])(?:global_step_?(\d+)(?![a-zA-Z0-9])|step[-_]?(\d+)(?=(?:-actor)?$))")
DIGEST = re.compile(r"-[0-9a-f]{8}$")  # of a checkpoint's files, at the end of the name that it is served by


@dataclass(frozen=True)
class Run:
    """A run that is reported.

    Attributes:
        name: what it is called in the report, another for each.
        manifest: its run.json.
    """
    name: str
    manifest: Mapping[str, Any]
    records: Sequence[Attempt]
    summary: Mapping[str, Any]


def names(labels: Sequence[tuple[str, Path]]) -> list[str]:
    """Return a name of its own for each run, given model and folder.

    The models; where these repeat, with the folders' names, then with their paths, then with a number.
    """
    called = [model for model, _ in labels]
    for longer in ([f"{model} ({folder.name})"
                    for model, folder in labels], [f"{model} ({folder})" for model, folder in labels]):
        if len(set(called)) == len(called):
            return called
        called = longer
    return called if len(set(called)) == len(called) else [f"{n}: {name}" for n, name in enumerate(called, 1)]


def load(folders: Sequence[Path],
         price_of: Any = lambda model: None,
         complain: Callable[[str], None] | None = None) -> list[Run]:
    """Return the runs in `folders`, called as `names` says.

    Args:
        complain: is told of each run that cannot be read, which is then left out.

    Raises:
        Misuse: a run cannot be read, and nobody is told so; or none can.
    """
    from evaluation.rescoring import read_manifest, read_scored
    read = []
    for folder in folders:
        try:
            read.append((folder, read_manifest(folder), read_scored(folder)))
        except Misuse as problem:
            if complain is None or len(folders) == 1:
                raise
            complain(str(problem))
    if not read:
        raise Misuse(f"none of {', '.join(map(str, folders))} can be read; name others")
    called = names([(manifest["config"]["model"], folder) for folder, manifest, _ in read])
    if any(manifest.get("about") for _, manifest, _ in read):  # never compared unsaid
        called = [
            f"{name} [{told(manifest.get('about', {}))}]" for name, (_, manifest, _) in zip(called, read, strict=True)
        ]
    runs = []
    for name, (_, manifest, records) in zip(called, read, strict=True):
        config = manifest["config"]
        numbers = summarize(records, config["samples"],
                            len(config["items"]) * config["samples"], price_of(config["model"]),
                            wall(manifest["work"], records), lost_sessions(manifest["work"]))
        runs.append(Run(name, manifest, records, numbers))
    return runs


def step_of(model: str) -> int | None:
    """Return the training step that a model's name tells; None where it tells none."""
    match = STEP.search(DIGEST.sub("", model))
    return int(match[1] or match[2]) if match else None


def by_training(runs: Sequence[Run]) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """Return (step, mean reward) of each training of which several steps were evaluated.

    Of one training are runs in one environment whose models differ in the step alone, and in the files' digest.
    """
    found: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    several = len({run.manifest["config"]["env"] for run in runs}) > 1
    for run in runs:
        model = DIGEST.sub("", run.manifest["config"]["model"])
        match = STEP.search(model)
        if match and run.summary["reward"]:
            name = f"{model[:match.start()]}{model[match.end():]}".strip("-_ ") or "step"
            name = f"{run.manifest['config']['env']}: {name}" if several else name
            found.setdefault(name, []).append((int(match[1] or match[2]), run.summary["reward"]))
    # As a dictionary, points of one step are one.
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items() if len(dict(points)) > 1}


def dress(run: Run) -> list[str]:
    """Return the words of the prompt that stand around or in place of the first observation."""
    return [run.manifest["prompt"].get(key, "") for key in ("before_first", "first", "actions_label")]


def difference_lines(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return how each run differs from the first of its environment, on the items that both have."""
    lines = []
    firsts: dict[str, int] = {}
    for number, run in enumerate(runs):
        place = firsts.setdefault(run.manifest["config"]["env"], number)
        if place == number:
            continue
        first = runs[place]
        found = compare(first.records, run.records, same_words=dress(run) == dress(first))
        apart = [(found["other_task"], "more were another task and are left out"),
                 (found["only_one"], "only in the first"), (found["only_other"], "only in the other")]
        said = ", ".join(f"{count} {words}" for count, words in apart if count)
        lines.append({
            "name": f"{run.name} − {first.name}",
            "items": f"{found['items']} ({said})" if said else str(found["items"]),
            "success": show.with_interval(found["success"]),
            "reward": show.with_interval(found["reward"]),
            "gained": found["gained"],
            "lost": found["lost"],
        })
    return lines


def differing(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the numbers of `difference_lines`, with the runs' names."""
    return [{
        "name": run.name,
        "than": runs[0].name,
        **compare(runs[0].records, run.records, same_words=dress(run) == dress(runs[0]))
    } for run in runs[1:]]
