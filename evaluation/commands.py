"""What each command does."""
import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from evaluation import foreign
from evaluation.attempts import ERRORS, Attempt
from evaluation.cli import FAILED, INTERRUPTED, MISUSE
from evaluation.output import FACTS, complain
from evaluation.problems import Misuse, Stopped, Unreachable
from evaluation.records import differences
from evaluation.text import one_line, short

if TYPE_CHECKING:
    from rich.console import Console

    from evaluation.settings import Settings
    from evaluation.suites import Plan

COMPARED = "saves/eval/compare.html"


def price_of(file: str, model: str) -> dict[str, float] | None:
    """Return the price of `model` in the file of --prices; say so where the file has none.

    Raises:
        Misuse: the file cannot be read.
    """
    from evaluation.prices import read_price
    price = read_price(file, model)
    if file and price is None:
        complain(f"--prices {file} has no price for {model}, so its cost is not shown; add a table [\"{model}\"]")
    return price


def decided(options: argparse.Namespace) -> "Settings":
    """Return the run that the words ask for, whose items are of its environment.

    Raises:
        Misuse: in one line.
    """
    from evaluation.items import check_owner
    from evaluation.rows import rows_file, tables
    from evaluation.settings import decide
    settings = decide(options)
    check_owner(settings.items, settings.row.name, tables(rows_file(options.environments)))
    return settings


def run_command(options: argparse.Namespace) -> int:
    """Play what is missing of a run; show its numbers.

    Raises:
        Misuse, Stopped: in one line.
    """
    from evaluation import compared, report, show
    from evaluation.pace import START
    from evaluation.records import REPORT, RUN, RunFolder, read_run
    from evaluation.runner import evaluate, facts
    settings = decided(options)
    price = price_of(options.prices, settings.model)
    if options.fresh and options.resume:
        raise Misuse("--fresh and --resume contradict each other; give one")
    if options.resume and not (settings.out / RUN).exists():
        raise Misuse(f"--resume: no run in {settings.out}; leave --resume out, or name the run's folder with --out")
    console = show.console()

    def say(line: str) -> None:
        console.print(one_line(f"{settings.row.name}: {line}"), highlight=False, markup=False, soft_wrap=True)

    model = settings.make_model(say)
    if options.check:
        return 0

    def tell(line: str) -> None:
        if not options.quiet:
            say(line)

    with RunFolder(settings.out) as folder:
        if options.fresh:
            folder.clear()
        resumed = folder.begin(settings.config, facts(settings))
        total = len(settings.items) * settings.samples
        if resumed:
            tell(f"resuming {settings.out}: {len(folder.records)} of {total} attempts are done"
                 f"{f', {len(folder.earlier)} failed by infrastructure are played again' if folder.earlier else ''}")
        for one in folder.damaged:
            say(f"{settings.out}/attempts.jsonl: {one.reason}; it is set aside in damaged.jsonl and played again")
        tell(
            f"{len(settings.items)} items ({settings.origin}) x {settings.samples}, model {settings.model}, "
            f"{settings.limits.rounds} rounds, {'auto' if settings.auto else settings.concurrency} at once, prompt {settings.prompt.source}"
        )
        code = 0
        stopped: Misuse | Unreachable | None = None
        try:
            at_once = START if settings.auto else settings.concurrency
            with show.Watch(total, folder.records.values(), console, at_once) as watch:
                asyncio.run(evaluate(settings, folder, model, watch, say))
        except (KeyboardInterrupt, asyncio.CancelledError):
            code = INTERRUPTED
        except (Misuse, Unreachable) as problem:  # such as an account that ran out: what was played until then counts
            if not folder.answered():
                raise
            stopped = problem
        records = folder.latest()
        summary = conclude(settings.out, records, settings.samples, total, price, read_run(settings.out)["work"])
    if options.quiet:
        say(f"{settings.model}: {show.summary_line(summary)}")
    else:
        show_numbers(console, {settings.model: summary}, settings.out, options.upstream_compat,
                     [settings.prompt.source])
    if records:
        path = settings.out / REPORT
        report.write(path, [compared.Run(settings.model, read_run(settings.out), records, summary)],
                     options.upstream_compat)
        FACTS["report"] = str(path)
        tell(f"report: {path}")
    for line in notes(summary, settings):
        say(line)
    if stopped:
        raise type(stopped)(f"{stopped}; mended, the same command goes on with {settings.out}")
    if code == INTERRUPTED:
        say(f"interrupted; the same command goes on with {settings.out}")
    elif summary["error_rate"] > settings.max_error_rate:
        first = next(record for record in records if record["outcome"] in ERRORS)
        say(f"{summary['errors']} of {summary['attempts']} attempts failed by infrastructure, more than --max-error-rate "
            f"{settings.max_error_rate:g}; the first: {first['item']} {first['outcome']}: {first['error']}; "
            "the same command plays them again")
        code = FAILED
    return code


def notes(summary: Mapping[str, Any], settings: "Settings") -> list[str]:
    """Return what of a run's numbers must not be overlooked, a line each."""
    found = []
    if summary["room_left"]:
        found.append(f"{summary['room_left']} attempts ended in context_overflow with room left in the context: "
                     f"lower --max-tokens ({settings.sampling.max_tokens} now)")
    for flag, limit in (("--token-limit", settings.limits.tokens), ("--context-length", settings.sampling.context)):
        if limit and summary["usage"]["unknown"]:
            found.append(f"the endpoint did not say the tokens of {summary['usage']['unknown']} answers, which "
                         f"{flag} {limit} could not count")
    if summary["sessions_lost"]:
        found.append(f"{summary['sessions_lost']} sessions could not be closed; the server may keep them until it ends")
    if summary["answers"] and 2 * summary["empty_answers"] > summary["answers"]:
        found.append(
            f"{summary['empty_answers']} of {summary['answers']} answers are empty: does the model only think, "
            "refuse or call tools? See the report, and raise --max-tokens where it thinks")
    if summary["attempts"] < summary["expected"] or summary["errors"]:
        found.append(
            f"{summary['scored']} of {summary['expected']} attempts have a score; while a run is not whole its "
            "numbers are biased, as short episodes end first")
    return found


def conclude(folder: Path, records: list[Attempt], samples: int, expected: int, price: dict[str, float] | None,
             work: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute the numbers and write summary.json."""
    from evaluation.numbers import lost_sessions, summarize, wall
    from evaluation.records import SUMMARY, write_whole
    summary = summarize(records, samples, expected, price, wall(work, records), lost_sessions(work))
    try:
        write_whole(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        raise Stopped(f"{folder / SUMMARY} cannot be written: {error.strerror}; make room and run `rescore`") from None
    FACTS.setdefault("runs", []).append({"folder": str(folder), "summary": summary})
    return summary


def show_numbers(console: "Console", summaries: Mapping[str, Mapping[str, Any]], folder: Path | None, compat: bool,
                 prompts: Sequence[str]) -> None:
    """Print the table."""
    from evaluation import show
    show.print_table(console, show.table(f"{folder}" if folder else "", summaries, prompts))
    if compat:
        for summary in summaries.values():
            console.print(show.upstream_line(summary), highlight=False)


def rescore_command(options: argparse.Namespace) -> int:
    """Compute numbers again, and write summary and report anew."""
    from evaluation import compared, report, show
    from evaluation.records import REPORT, read_run
    from evaluation.rescoring import keep_rule, read_scored
    from evaluation.rows import read_row
    console = show.console()
    for name in options.folders:
        folder = Path(name)
        manifest = read_run(folder)
        config = manifest["config"]
        keep_rule(folder, read_row(config["env"], Path(options.environments)) if options.environments else None)
        records = read_scored(folder)
        summary = conclude(folder, records, config["samples"],
                           len(config["items"]) * config["samples"], price_of(options.prices, config["model"]),
                           manifest["work"])
        show_numbers(console, {config["model"]: summary}, folder, options.upstream_compat,
                     [str(manifest["prompt"].get("source", ""))])
        report.write(folder / REPORT, [compared.Run(config["model"], manifest, records, summary)],
                     options.upstream_compat)
        print(f"report: {folder / REPORT}")
    return 0


def report_command(options: argparse.Namespace) -> int:
    """Write a report."""
    from evaluation import compared, report
    from evaluation.records import REPORT
    folders = [Path(name) for name in options.folders]
    runs = compared.load(folders, lambda model: price_of(options.prices, model), complain)
    path = Path(options.out) if options.out else folders[0] / REPORT if len(folders) == 1 else Path(COMPARED)
    report.write(path, runs, options.upstream_compat)
    FACTS["report"] = str(path)
    print(f"report: {path}")
    return MISUSE if len(runs) < len(folders) else 0


def compare_command(options: argparse.Namespace) -> int:
    """Compare runs."""
    from evaluation import compared, report, show
    if len(options.folders) < 2:
        raise Misuse(f"compare {options.folders[0]}: one run only; name two or more folders")
    runs = compared.load([Path(name) for name in options.folders], lambda model: price_of(options.prices, model))
    environments = sorted({run.manifest["config"]["env"] for run in runs})
    if len(environments) > 1:
        raise Misuse(f"compare: runs of different environments ({', '.join(environments)}); name runs of one")
    console = show.console()
    show_numbers(console, {run.name: run.summary
                           for run in runs}, None, options.upstream_compat,
                 [str(run.manifest["prompt"].get("source", "")) for run in runs])
    table = show.columns("difference, item by item", "items", "success rate", "mean reward", "newly solved",
                         "no longer")
    for line in compared.difference_lines(runs):
        show.add_row(table, line["name"], line["items"], line["success"], line["reward"], str(len(line["gained"])),
                     str(len(line["lost"])))
    console.print(table)
    for run in runs[1:]:
        differing = differences({
            **runs[0].manifest["config"], "items": None
        }, {
            **run.manifest["config"], "items": None
        })
        console.print(f"{run.name}: {'; '.join(differing) or 'the same configuration'}",
                      highlight=False,
                      markup=False,
                      soft_wrap=True)
    path = Path(options.out or COMPARED)
    report.write(path, runs, options.upstream_compat)
    FACTS.update(report=str(path),
                 runs=[{
                     "folder": str(Path(name)),
                     "name": run.name,
                     "summary": run.summary
                 } for name, run in zip(options.folders, runs, strict=True)],
                 differences=compared.differing(runs))
    print(f"report: {path}")
    return 0


def merge_command(options: argparse.Namespace) -> int:
    """Join runs into one folder, which can be shown, compared and grown like any other.

    Raises:
        Misuse: there is one run only, they do not fit, or the folder is taken.
    """
    from evaluation import compared, report, show
    from evaluation.joining import join
    from evaluation.records import REPORT, RUN, RunFolder
    from evaluation.settings import config_hash
    if len(options.folders) < 2:
        raise Misuse(f"merge {options.folders[0]}: one run only; name two or more folders")
    out = Path(options.out)
    if (out / RUN).exists():
        raise Misuse(f"merge: {out} has a run already; choose another --out")
    joined = join([Path(name) for name in options.folders])
    manifest, config = joined.manifest, joined.manifest["config"]
    price = price_of(options.prices, config["model"])
    facts = {key: value for key, value in manifest.items() if key not in ("config", "work")}
    with RunFolder(out) as folder:
        folder.begin(config, {**facts, "hash": config_hash(config)})
        for record in joined.records:
            folder.add(record)
        for work in manifest["work"]:
            folder.note_work(work)
        summary = conclude(out, joined.records, config["samples"],
                           len(config["items"]) * config["samples"], price, manifest["work"])
    show_numbers(show.console(), {config["model"]: summary}, out, options.upstream_compat,
                 [str(manifest["prompt"].get("source", ""))])
    report.write(out / REPORT, [compared.Run(config["model"], manifest, joined.records, summary)],
                 options.upstream_compat)
    if joined.twice:
        complain(f"{joined.twice} attempts are in more than one of the runs; one of each stands (machines that share "
                 "items need other samples' numbers: give each its own items)")
    if len(joined.versions) > 1:
        complain(
            f"the runs were played by {len(joined.versions)} different versions, of which run.json keeps the first: "
            f"{'; '.join(short(one, 120) for one in joined.versions)}")
    FACTS["report"] = str(out / REPORT)
    print(f"report: {out / REPORT}")
    return 0


def suite_settings(plan: "Plan", check: bool) -> list["Settings"]:
    """Return the runs of a suite's pairs, in their order.

    Args:
        check: see also that each could begin.

    Raises:
        Misuse: one cannot be; which, in one line.
    """
    from evaluation.cli import parser
    found = []
    for pair in plan["pairs"]:
        try:
            settings = decided(parser().parse_args(["run", *pair["words"]]))
            if check:
                settings.make_model()
        except Misuse as problem:
            raise Misuse(f"{pair['model']} on {pair['env']}: {problem}") from None
        except SystemExit:  # the line before this one says why
            raise Misuse(f"{pair['model']} on {pair['env']}: that is in the words of this pair") from None
        found.append(settings)
    folders = [settings.out.resolve() for settings in found]
    for pair, folder in zip(plan["pairs"], folders, strict=True):
        if folders.count(folder) > 1:
            raise Misuse(f"{pair['model']} on {pair['env']}: another pair is the same run, {folder.name}; name each "
                         "model once")
    return found


def suite_command(options: argparse.Namespace) -> int:
    """Show what has come of a suite's pairs together; with --check only where they are played, and what is missing.

    Raises:
        Misuse: no such plan, or a pair of it cannot be.
    """
    from evaluation import report, show, suites
    from evaluation.records import write_whole
    place = Path(options.plan)
    plan = suites.read_plan(place)
    settings = suite_settings(plan, options.check)
    lacking = suites.short_lists(plan, {one.row.name: len(one.items) for one in settings})
    if options.check:
        states = [{**suites.standing(one), "rounds": one.limits.rounds, "origin": one.origin} for one in settings]
        write_file(place.with_name("state.json"), json.dumps({"pairs": states, "notes": lacking}, indent=1) + "\n")
        return 0
    seen = suites.seen(plan, settings, lambda model: price_of(options.prices, model))
    summary = suites.summary_of(plan, [one.line for one in seen])
    summary["notes"] += lacking
    runs = [one.run for one in seen if one.run is not None]
    page = Path(options.out) if options.out else place.with_name("report.html")
    if any(run.records for run in runs):
        report.write(page, runs, options.upstream_compat, summary)
        summary["report"] = str(page)
    try:
        write_whole(place.with_name("summary.json"), json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        raise Stopped(f"{place.with_name('summary.json')} cannot be written: {error.strerror}; make room") from None
    FACTS.update(summary)
    if not options.json:
        table = show.suite_table(summary["suite"], summary["models"], suites.rows(summary))
        show.print_table(show.console(), table)
        if options.upstream_compat:
            for run in runs:
                print(f"{one_line(run.name)}, {show.upstream_line(run.summary)}")
        for line in summary["notes"]:
            print(one_line(line))
        if "report" in summary:
            print(f"report: {page}")
    for one in seen if options.json else ():
        if one.line["state"] != suites.WHOLE:
            complain(f"{one.line['model']} on {one.line['env']} is in no average: {one.line['why']}")
    return 0 if summary["whole"] else FAILED


def watch_command(options: argparse.Namespace) -> int:
    """Show a run while it goes on, until it ends.

    Raises:
        Misuse: no run there.
    """
    from evaluation import show, watching
    every = options.every or (2.0 if options.json or show.console().is_terminal else 10.0)
    return watching.follow(Path(options.folder), every, options.report_every, options.json, options.once)


def write_file(path: Path, text: str) -> None:
    """Write a file and the folders above it.

    Raises:
        Misuse: it cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file of bytes likewise."""
    from evaluation.records import write_whole
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise Misuse(f"{path} cannot be written: {error.strerror}; choose another place with --out") from None


def export_command(options: argparse.Namespace) -> int:
    """Write a table.

    Raises:
        Misuse: a run cannot be read, the file cannot be written, or the format needs what is not there.
    """
    from evaluation import exporting
    from evaluation.secrets import hide
    if options.to:
        return _track(options)
    if not options.out:
        raise Misuse("export: no --out; name the file to write, or a tracker with --to")
    make = exporting.turns if options.rows == "turns" else exporting.attempts
    rows = [row for name in options.folders for row in make(Path(name))]
    data = exporting.table(rows, options.format)
    path = Path(options.out)
    if options.format == "parquet":
        write_bytes(path, data)
    else:
        write_file(path, hide(data.decode()))
    FACTS.update(file=options.out, count=len(rows))
    print(f"{len(rows)} {options.rows}: {options.out}")
    return 0


def _track(options: argparse.Namespace) -> int:
    from evaluation import compared, trackers
    if options.out:
        raise Misuse("export: --to writes no file; leave out --out")
    project = options.project or "agentgym-eval"
    folders = [Path(name) for name in options.folders]
    for folder, run in zip(folders, compared.load(folders), strict=True):
        trackers.send(options.to, project, folder, run)
        print(f"{folder.name}: figures to {options.to}, project {one_line(project)}")
    FACTS.update(file="", count=len(folders))
    return 0


def conversations_command(options: argparse.Namespace) -> int:
    """Write conversations.

    Raises:
        Misuse: there is none.
    """
    from evaluation.conversations import lines
    found = [line for name in options.folders for line in lines(Path(name), options.all)]
    if not found:
        raise Misuse(f"conversations: no attempt of {', '.join(options.folders)} ended in success; "
                     "take the others too with --all")
    write_file(Path(options.out), "\n".join(found) + "\n")
    FACTS.update(file=options.out, count=len(found))
    print(f"{len(found)} conversations: {options.out}")
    return 0


def summary_of(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the numbers of a run: those in summary.json, which a `rescore` may have made, unless attempts came after.

    Raises:
        Misuse: the attempts are damaged.
    """
    from evaluation.numbers import summarize
    from evaluation.records import ATTEMPTS, SUMMARY
    from evaluation.rescoring import read_scored
    try:
        if (folder / SUMMARY).stat().st_mtime_ns >= (folder / ATTEMPTS).stat().st_mtime_ns:
            return SUMMARY_SHOWN.validate_python(foreign.read_json(folder / SUMMARY))
    except (OSError, ValueError):  # of another form, too: pydantic's is one
        pass
    return summarize(read_scored(folder), config["samples"], len(config["items"]) * config["samples"])


def list_command(options: argparse.Namespace) -> int:
    """Show the runs in a folder; a damaged one is named and hides no other."""
    from evaluation import show
    from evaluation.records import RUN, read_run
    found = sorted(Path(options.folder).glob(f"*/{RUN}"), key=lambda path: path.stat().st_mtime)
    FACTS.update(runs=[], damaged=[])
    if not found:
        print(f"no runs in {options.folder}")
        return 0
    table = show.columns("folder", "environment", "model", "attempts", "success rate", "errors")
    damaged = []
    for folder in (path.parent for path in found):
        try:
            config = read_run(folder)["config"]
            summary = summary_of(folder, config)
            show.add_row(table, folder.name, config["env"], config["model"],
                         f"{summary['attempts']} of {summary['expected']}", show.with_interval(summary["success"]),
                         str(summary["errors"]))
            FACTS["runs"].append({
                "folder": str(folder),
                "environment": config["env"],
                "model": config["model"],
                "summary": summary
            })
        except Misuse as problem:
            damaged.append(str(problem))
        except (KeyError, TypeError):  # JSON of another form
            damaged.append(f"{folder} holds no run that this version can read; remove it or look there with its own")
    show.console().print(table)
    FACTS["damaged"] = damaged
    for line in damaged:
        complain(line)
    return MISUSE if damaged else 0


def prompts_command(options: argparse.Namespace) -> int:
    """Read prompts and item maps."""
    from evaluation.items import collect_maps
    from evaluation.prompts import collect
    from evaluation.rows import read_row, rows_file, tables
    path = rows_file(options.environments)
    rows = [read_row(name, path) for name in tables(path)] if path.exists() else []
    found = collect(rows, Path(options.agentgym))
    if options.out:
        write_file(Path(options.out), json.dumps(found, indent=1, ensure_ascii=False))
    if options.item_maps:
        maps = collect_maps(rows, Path(options.agentgym))
        write_file(Path(options.item_maps), json.dumps(maps))
        print(f"item maps: {', '.join(maps) or 'none in the checkout'}")
    for name, prompt in found.items():
        print(f"{name:12} {prompt['place']}  {len(prompt['user'])} characters")
    print(f"{len(found)} of {sum(bool(row.prompt.file) for row in rows)} prompts read")
    return 0


Number = Annotated[float, Field(ge=0, le=10**12)]


@with_config(ConfigDict(extra="allow"))
class Figure(TypedDict):
    """A mean with its interval."""
    mean: Number
    low: Number | None
    high: Number | None


@with_config(ConfigDict(extra="allow"))
class Shown(TypedDict):
    """What of a summary a list shows."""
    attempts: Annotated[int, Field(ge=0, le=10**12)]
    expected: Annotated[int, Field(ge=0, le=10**12)]
    errors: Annotated[int, Field(ge=0, le=10**12)]
    success: Figure | None


SUMMARY_SHOWN = TypeAdapter(Shown)
COMMANDS = {
    "run": run_command,
    "rescore": rescore_command,
    "report": report_command,
    "compare": compare_command,
    "merge": merge_command,
    "suite": suite_command,
    "watch": watch_command,
    "export": export_command,
    "conversations": conversations_command,
    "list": list_command,
    "prompts": prompts_command
}
