"""The report: one HTML file that needs no network, of one run or of several side by side."""
import base64
import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation import charts, show, surrogates
from evaluation.episodes import ERRORS, SCORED
from evaluation.numbers import compare, summarize, wall

PAGE = Path(__file__).parent / "page"
CHUNK = 64  # attempts whose turns are packed together: unpacking one takes a few milliseconds
REWARD_BINS = 10
# Whole words, for there are models called two-step-7b; a plain step stands at the end, for there are step2-mini too.
STEP = re.compile(r"(?:^|[^a-zA-Z0-9])(?:global_step_?(\d+)(?![a-zA-Z0-9])|step[-_]?(\d+)(?=(?:-actor)?$))")
DIGEST = re.compile(r"-[0-9a-f]{8}$")  # of a checkpoint's files, at the end of the name that it is served by


@dataclass(frozen=True)
class Run:
    """A run that is reported.

    Attributes:
        name: what it is called in the report, another for each.
        told: its run.json.
    """
    name: str
    told: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
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


def load(folders: Sequence[Path], price_of: Any = lambda model: None) -> list[Run]:
    """Return the runs in `folders`, called as `names` says."""
    from evaluation.rescoring import read_scored, read_told
    told = [read_told(folder) for folder in folders]
    called = names([(one["config"]["model"], folder) for one, folder in zip(told, folders, strict=True)])
    runs = []
    for name, one, folder in zip(called, told, folders, strict=True):
        config, records = one["config"], read_scored(folder)
        numbers = summarize(records, config["samples"],
                            len(config["items"]) * config["samples"], price_of(config["model"]),
                            wall(one["work"], records))
        runs.append(Run(name, one, records, numbers))
    return runs


def pack(value: Any) -> str:
    """Return `value` as JSON, deflated, in base 64: a browser unpacks it with DecompressionStream."""
    return base64.b64encode(zlib.compress(json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace"),
                                          6)).decode()


def inert(value: Any) -> str:
    """Return `value` as JSON that can stand in a script element, whatever is in it."""
    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table_rows(runs: Sequence[Run]) -> tuple[list[list[Any]], list[list[Any]]]:
    """Return the attempts table's rows and, in the same order, what the viewer shows of each attempt."""
    rows, details = [], []
    for number, run in enumerate(runs):
        for record in sorted(run.records, key=lambda one: (one["index"], one["item"], one["sample"])):
            usage = record["usage"]
            rows.append([
                number, record["item"], record["category"], record["sample"], record["outcome"], record["scaled"],
                record["rounds"], record["invalid_actions"], usage["prompt"] + usage["completion"], record["seconds"]
            ])
            details.append([
                record["first"], record["turns"], record["error"], record["tries_before"], record["reward"],
                record["seed"], record["task"], record["started"]
            ])
    return rows, details


def draw(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return the charts: title, SVG and, for whoever cannot see it, a line of words."""
    found = []

    def add(title: str, picture: str, words: str) -> None:
        found.append({"title": title, "svg": picture, "words": words})

    kinds = [name for name in (*SCORED, *ERRORS) if any(run.summary["outcomes"].get(name) for run in runs)]
    outcomes = {run.name: [run.summary["outcomes"].get(name, 0) for name in kinds] for run in runs}
    if kinds:
        add(
            "Outcomes", charts.bars(kinds, outcomes, "outcomes", "attempts", lying=True),
            "; ".join(f"{run}: " + ", ".join(f"{count} {kind}" for kind, count in zip(kinds, counts, strict=True))
                      for run, counts in outcomes.items()))
    scored = {run.name: [one for one in run.records if one["outcome"] in SCORED] for run in runs}
    if any(scored.values()):
        bins = [0] * REWARD_BINS
        edges = [f"{n / REWARD_BINS:g}–{(n + 1) / REWARD_BINS:g}" for n in range(REWARD_BINS)]
        rewards = {}
        for name, records in scored.items():
            counts = bins.copy()
            for one in records:
                counts[min(REWARD_BINS - 1, int(one["scaled"] * REWARD_BINS + 1e-9))] += 1
            rewards[name] = counts
        add(
            "Rewards", charts.bars([edge.split("–")[0] for edge in edges], rewards, "rewards", "attempts"),
            "; ".join(f"{name}: " + ", ".join(f"{count} from {edge}"
                                              for count, edge in zip(counts, edges, strict=True) if count)
                      for name, counts in rewards.items()))
        most = max(one["rounds"] for records in scored.values() for one in records)
        wide = max(1, -(-(most + 1) // 30))
        starts = list(range(0, most + 1, wide))
        rounds = {
            name: [sum(start <= one["rounds"] < start + wide for one in records) for start in starts]
            for name, records in scored.items()
        }
        add(
            "Rounds", charts.bars([str(start) for start in starts], rounds, "rounds", "attempts"),
            "; ".join(f"{run.name}: {show.with_interval(run.summary['rounds'], share=False)} rounds on average"
                      for run in runs))
    categories = sorted({name for run in runs for name in run.summary["categories"]})[:40]
    if categories:
        values, errors = {}, {}
        for run in runs:
            figures = [
                run.summary["categories"].get(name, {}).get("success") or {
                    "mean": math.nan,  # no bar
                    "low": None,
                    "high": None
                } for name in categories
            ]
            values[run.name] = [figure["mean"] for figure in figures]
            errors[run.name] = [[
                0.0 if figure["low"] is None else figure["mean"] - figure["low"] for figure in figures
            ], [0.0 if figure["high"] is None else figure["high"] - figure["mean"] for figure in figures]]
        add("Success rate by category", charts.bars(categories,
                                                    values,
                                                    "categories",
                                                    "success rate",
                                                    errors,
                                                    lying=True), "the table above has the numbers")
    trainings = by_training(runs)
    if trainings:
        add(
            "Reward by training step", charts.curves(trainings, "curve"), "; ".join(
                (f"{name}: " if len(trainings) > 1 else "") + ", ".join(f"step {step}: {show.with_interval(figure)}"
                                                                        for step, figure in points)
                for name, points in trainings.items()))
    return found


def by_training(runs: Sequence[Run]) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """Return (step, mean reward) of each training of which several steps were evaluated.

    Of one training are runs in one environment whose models differ in the step alone, and in the files' digest.
    """
    found: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    several = len({run.told["config"]["env"] for run in runs}) > 1
    for run in runs:
        model = DIGEST.sub("", run.told["config"]["model"])
        match = STEP.search(model)
        if match and run.summary["reward"]:
            name = f"{model[:match.start()]}{model[match.end():]}".strip("-_ ") or "step"
            name = f"{run.told['config']['env']}: {name}" if several else name
            found.setdefault(name, []).append((int(match[1] or match[2]), run.summary["reward"]))
    # As a dictionary, points of one step are one.
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items() if len(dict(points)) > 1}


def headline(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the headline table: name, and a cell each run."""
    table = show.table("", {run.name: run.summary for run in runs})
    columns = [list(column.cells) for column in table.columns]
    return [(str(columns[0][line]), [str(column[line]) for column in columns[1:]]) for line in range(len(columns[0]))]


def methods(runs: Sequence[Run]) -> str:
    """Return how the intervals were made."""
    used = sorted(
        {figure["method"]
         for run in runs
         for figure in (run.summary["success"], run.summary["reward"]) if figure})
    return f"In brackets: 95 % intervals ({', '.join(used)})." if used else "No attempt has a score."


def dress(run: Run) -> list[str]:
    """Return the words of the prompt that stand around or in place of the first observation."""
    return [run.told["prompt"].get(key, "") for key in ("before_first", "first", "actions_label")]


def difference_lines(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return how each run of the first one's environment differs from the first, on the items that both have."""
    lines = []
    for run in runs[1:]:
        if run.told["config"]["env"] != runs[0].told["config"]["env"]:
            continue  # the same number is another item there
        found = compare(runs[0].records, run.records, same_words=dress(run) == dress(runs[0]))
        apart = [(found["other_task"], "more were another task and are left out"),
                 (found["only_one"], "only in the first"), (found["only_other"], "only in the other")]
        said = ", ".join(f"{count} {words}" for count, words in apart if count)
        lines.append({
            "name": f"{run.name} − {runs[0].name}",
            "items": f"{found['items']} ({said})" if said else str(found["items"]),
            "success": show.with_interval(found["success"]),
            "reward": show.with_interval(found["reward"]),
            "gained": found["gained"],
            "lost": found["lost"],
        })
    return lines


def render(runs: Sequence[Run], compat: bool = False) -> str:
    """Return the page."""
    import jinja2
    rows, details = table_rows(runs)
    script = (PAGE / "report.js").read_text()
    page = jinja2.Environment(loader=jinja2.FileSystemLoader(PAGE),
                              autoescape=True,
                              trim_blocks=True,
                              lstrip_blocks=True)
    configs = [{key: value for key, value in run.told["config"].items() if key not in ("row", "items")} for run in runs]
    return page.get_template("report.html").render(
        title=f"{', '.join(dict.fromkeys(run.told['config']['env'] for run in runs))}: "
        f"{', '.join(run.name for run in runs)}",
        runs=runs,
        configs=[json.dumps(config, indent=1) for config in configs],
        headline=headline(runs),
        methods=methods(runs),
        differences=difference_lines(runs),
        charts=draw(runs),
        upstream=[show.upstream_line(run.summary) for run in runs] if compat else [],
        style=(PAGE / "report.css").read_text(),
        script=script,
        # The policy names the one script that may run: nothing that a model or an environment said can become another.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=inert({
            "runs": [run.name for run in runs],
            "chunk": CHUNK,
            "rows": rows
        }),
        chunks=[pack(details[begin:begin + CHUNK]) for begin in range(0, len(details), CHUNK)])


def write(path: Path, runs: Sequence[Run], compat: bool = False) -> None:
    """Write the page to `path`.

    Raises:
        Misuse: `path` is a folder.
        Stopped: it cannot be written.
    """
    from evaluation.problems import Misuse, Stopped
    from evaluation.records import write_whole
    if path.is_dir():
        raise Misuse(f"{path} is a folder; name a file with --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, surrogates.replaced(render(runs, compat)))
    except OSError as error:
        raise Stopped(f"{path} cannot be written: {error.strerror}; choose another place with --out") from None
