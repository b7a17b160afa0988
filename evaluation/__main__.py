"""The command line of the evaluation runner."""
import argparse
import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation import __version__
from evaluation.output import Output
from evaluation.problems import Misuse, Stopped, Unreachable
from evaluation.records import differences

if TYPE_CHECKING:
    from rich.console import Console

FAILED, MISUSE, INTERRUPTED = 1, 2, 130
COMPARED = "saves/eval/compare.html"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no whole number") from None


def _positive(text: str) -> float:
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _amount(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to 1")
    return value


def _endpoint(text: str) -> str:
    if text and not re.match(r"https?://[^/\s]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no address; write it like http://127.0.0.1:8000/v1")
    return text


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> Any:  # type: ignore[override]
        """Leave with exit code 2."""
        self.exit(MISUSE, f"{self.prog}: {message}; see --help\n")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    top = Parser(prog="python -m evaluation", description="Evaluate language models on AgentGym's environment servers.")
    top.add_argument("--version", action="version", version=f"evaluation {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="play items and keep what came of them")
    add = run.add_argument
    add("--env", default="", help="environment, a table of environments.toml (default: $ENV, then searchqa)")
    add("--server",
        default="",
        help="address of its server (default: $ENV_SERVER, then this machine and the row's port)")
    add("--model", default="", help="model of the endpoint, or expert or random (default: $MODEL, then gpt-4o-mini)")
    add("--base-url",
        type=_endpoint,
        default="",
        help="OpenAI-compatible endpoint (default: $OPENAI_BASE_URL, then OpenAI's own)")
    add("--base-url-as",
        default="",
        help="what the configuration calls the endpoint, where its address differs from run to run")
    add("--context-length",
        type=_amount,
        default=0,
        help="tokens of the model's context, for an endpoint that does not watch it (default: the endpoint does)")
    add("--max-round", type=_count, default=0, help="completions an episode (default: $MAX_ROUND, then the row's)")
    add("--items",
        default="",
        help="FILE, 0-99 or textcraft_3,textcraft_5 (default: AgentGym's list, then the row's test split or first items)"
        )
    add("--limit", type=_count, default=None, help="play at most so many items (default: all)")
    add("--shuffle-seed",
        type=_whole,
        default=None,
        help="shuffle the items with this seed before --limit (default: no)")
    add("--samples", type=_count, default=1, help="attempts at each item, for Avg@k and Pass@k (default: 1)")
    add("--seed",
        type=_whole,
        default=None,
        help="make draws repeatable: sent to the endpoint, another for each attempt")
    add("--temperature", default="1.0", help="0 to 5, or none to leave it out (default: 1.0)")
    add("--top-p", type=_share, default=None, help="0 to 1 (default: left out)")
    add("--max-tokens", type=_amount, default=4096, help="of one completion, 0 to leave it out (default: 4096)")
    add("--extra-body", default="", help="JSON object with further fields of the request")
    add("--token-limit",
        type=_amount,
        default=0,
        help="tokens of an episode, prompts and completions (default: no limit)")
    add("--time-limit", type=_positive, default=3600.0, help="seconds of an episode (default: 3600)")
    add("--env-timeout",
        type=_positive,
        default=300.0,
        help="seconds for one request to the environment (default: 300)")
    add("--env-wait", type=_positive, default=60.0, help="seconds to wait for a server that is away (default: 60)")
    add("--tries", type=_count, default=3, help="starts of an item when the environment fails (default: 3)")
    add("--request-timeout", type=_positive, default=600.0, help="seconds for one completion (default: 600)")
    add("--model-tries", type=_count, default=8, help="tries for one completion (default: 8)")
    add("--concurrency", type=_amount, default=0, help="episodes at once (default: the row's)")
    add("--max-error-rate",
        type=_share,
        default=0.02,
        help="share of infrastructure errors that is still a success of "
        "the run; above it the exit code is 1 (default: 0.02)")
    add("--out", default="", help="the run's folder (default: saves/eval/ENV-MODEL-HASH)")
    add("--fresh",
        action="store_true",
        help="replace an earlier run in that folder, once the model answers (default: resume it)")
    add("--resume", action="store_true", help="go on with the run in --out, and fail where there is none")
    add("--agentgym", default="", help="AgentGym checkout with the prompts (default: $AGENTGYM_SRC, then the image's)")
    add("--prompt", default="", help="file with a prompt of your own")
    add("--plain-prompt", action="store_true", help="use our own plain prompt")
    add("--environments", default="", help="file with the rows (default: $ENVIRONMENTS, then environments.toml)")
    add("--root", default=".", help="folder with AgentEval, AgentItemId and saves (default: .)")
    add("--quiet", action="store_true", help="one line with the numbers, and faults")
    add("--check", action="store_true", help="play nothing, and only say what is wrong with these words")
    _numbers_flags(run)

    rescore = commands.add_parser("rescore", help="compute the numbers of runs again, from their records")
    rescore.add_argument("folders", nargs="+", help="folders of runs")
    rescore.add_argument("--environments",
                         default="",
                         help="take success rule and reward range from this file's rows (default: the run's own)")
    _numbers_flags(rescore)

    report = commands.add_parser("report", help="write a run's report again, or one of several runs side by side")
    report.add_argument("folders", nargs="+", help="folders of runs")
    report.add_argument("--out",
                        default="",
                        help="the file (default: report.html in the run's folder, or saves/eval/compare.html)")
    _numbers_flags(report)

    compare = commands.add_parser("compare", help="compare runs with the first of them, item by item")
    compare.add_argument("folders", nargs="+", help="folders of two or more runs")
    compare.add_argument("--out",
                         default="",
                         help="write the report side by side to this file (default: saves/eval/compare.html)")
    _numbers_flags(compare)

    talks = commands.add_parser("conversations", help="write what was said in a run, one JSON object an attempt")
    talks.add_argument("folders", nargs="+", help="folders of runs")
    talks.add_argument("--out", required=True, help="the file to write, JSON lines with messages")
    talks.add_argument("--all", action="store_true", help="failures too (default: what ended in success)")

    lists = commands.add_parser("list", help="show the runs in a folder")
    lists.add_argument("folder", nargs="?", default="saves/eval", help="where to look (default: saves/eval)")

    prompts = commands.add_parser("prompts", help="read prompts and item maps out of an AgentGym checkout")
    prompts.add_argument("--agentgym", required=True, help="the checkout")
    prompts.add_argument("--out", default="", help="JSON file to write (default: show where each prompt is)")
    prompts.add_argument("--item-maps", default="", help="JSON file to write ALFWorld's item maps to (default: none)")
    prompts.add_argument("--environments",
                         default="",
                         help="file with the rows (default: $ENVIRONMENTS, then environments.toml)")
    return top


def _numbers_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prices",
                         default="",
                         help="TOML or JSON file: input and output of each model, a million tokens")
    command.add_argument("--upstream-compat", action="store_true", help="add the figures as upstream would count them")


def price_of(file: str, model: str) -> dict[str, float] | None:
    """Return the price of `model` in the file of --prices; say so where the file has none.

    Raises:
        Misuse: the file cannot be read.
    """
    from evaluation.prices import read_price
    price = read_price(file, model)
    if file and price is None:
        print(f"eval: --prices {file} has no price for {model}, so its cost is not shown; add a table [\"{model}\"]",
              file=sys.stderr)
    return price


def run_command(options: argparse.Namespace) -> int:
    """Play what is missing of a run; show its numbers.

    Raises:
        Misuse, Stopped: in one line.
    """
    from evaluation import report, show
    from evaluation.items import check_owner
    from evaluation.numbers import wall
    from evaluation.records import REPORT, RUN, RunFolder, read_run
    from evaluation.rows import rows_file, tables
    from evaluation.runner import evaluate, facts
    from evaluation.settings import decide
    settings = decide(options)
    check_owner(settings.items, settings.row.name, tables(rows_file(options.environments)))
    price = price_of(options.prices, settings.model)
    if options.fresh and options.resume:
        raise Misuse("--fresh and --resume contradict each other; give one")
    if options.resume and not (settings.out / RUN).exists():
        raise Misuse(f"--resume: no run in {settings.out}; leave --resume out, or name the run's folder with --out")
    model = settings.make_model()
    if options.check:
        return 0
    console = show.console()

    def say(line: str) -> None:
        console.print(f"{settings.row.name}: {line}", highlight=False, markup=False, soft_wrap=True)

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
        tell(f"{len(settings.items)} items ({settings.origin}) x {settings.samples}, model {settings.model}, "
             f"{settings.limits.rounds} rounds, {settings.concurrency} at once, prompt {settings.prompt.source}")
        code = 0
        stopped: Misuse | Unreachable | None = None
        try:
            with show.Watch(total, folder.records.values(), console) as watch:
                asyncio.run(evaluate(settings, folder, model, watch, say))
        except (KeyboardInterrupt, asyncio.CancelledError):
            code = INTERRUPTED
        except (Misuse, Unreachable) as problem:  # such as an account that ran out: what was played until then counts
            if not folder.answered():
                raise
            stopped = problem
        records = folder.latest()
        summary = conclude(settings.out, records, settings.samples, total, price,
                           wall(read_run(settings.out)["work"], records))
    if options.quiet:
        say(f"{settings.model}: {show.one_line(summary)}")
    else:
        show_numbers(console, {settings.model: summary}, settings.out, options.upstream_compat,
                     [settings.prompt.source])
    if records:
        path = settings.out / REPORT
        report.write(path, [report.Run(settings.model, read_run(settings.out), records, summary)],
                     options.upstream_compat)
        tell(f"report: {path}")
    if stopped:
        raise type(stopped)(f"{stopped}; mended, the same command goes on with {settings.out}")
    if code == INTERRUPTED:
        say(f"interrupted; the same command goes on with {settings.out}")
    elif summary["error_rate"] > settings.max_error_rate:
        first = next(record for record in records if record["outcome"] in ("env_error", "model_error", "timeout"))
        say(f"{summary['errors']} of {summary['attempts']} attempts failed by infrastructure, more than --max-error-rate "
            f"{settings.max_error_rate:g}; the first: {first['item']} {first['outcome']}: {first['error']}; "
            "the same command plays them again")
        code = FAILED
    return code


def conclude(folder: Path, records: list[dict[str, Any]], samples: int, expected: int, price: dict[str, float] | None,
             seconds: float) -> dict[str, Any]:
    """Compute the numbers and write summary.json."""
    from evaluation.numbers import summarize
    from evaluation.records import SUMMARY, write_whole
    summary = summarize(records, samples, expected, price, seconds)
    try:
        write_whole(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        raise Stopped(f"{folder / SUMMARY} cannot be written: {error.strerror}; make room and run `rescore`") from None
    return summary


def show_numbers(console: "Console", summaries: Mapping[str, Mapping[str, Any]], folder: Path | None, compat: bool,
                 prompts: Sequence[str]) -> None:
    """Print the table."""
    from evaluation import show
    console.print(show.table(f"{folder}" if folder else "", summaries, prompts))
    if compat:
        for summary in summaries.values():
            console.print(show.upstream_line(summary), highlight=False)


def rescore_command(options: argparse.Namespace) -> int:
    """Compute numbers again, and write summary and report anew."""
    from evaluation import report, show
    from evaluation.numbers import wall
    from evaluation.records import REPORT, read_run
    from evaluation.rescoring import keep_rule, read_scored
    from evaluation.rows import read_row
    console = show.console()
    for name in options.folders:
        folder = Path(name)
        told = read_run(folder)
        config = told["config"]
        keep_rule(folder, read_row(config["env"], Path(options.environments)) if options.environments else None)
        records = read_scored(folder)
        summary = conclude(folder, records, config["samples"],
                           len(config["items"]) * config["samples"], price_of(options.prices, config["model"]),
                           wall(told["work"], records))
        show_numbers(console, {config["model"]: summary}, folder, options.upstream_compat, [told["prompt"]["source"]])
        report.write(folder / REPORT, [report.Run(config["model"], told, records, summary)], options.upstream_compat)
        print(f"report: {folder / REPORT}")
    return 0


def report_command(options: argparse.Namespace) -> int:
    """Write a report."""
    from evaluation import report
    from evaluation.records import REPORT
    folders = [Path(name) for name in options.folders]
    runs = report.load(folders, lambda model: price_of(options.prices, model))
    path = Path(options.out) if options.out else folders[0] / REPORT if len(folders) == 1 else Path(COMPARED)
    report.write(path, runs, options.upstream_compat)
    print(f"report: {path}")
    return 0


def compare_command(options: argparse.Namespace) -> int:
    """Compare runs."""
    from rich.table import Table

    from evaluation import report, show
    if len(options.folders) < 2:
        raise Misuse(f"compare {options.folders[0]}: one run only; name two or more folders")
    runs = report.load([Path(name) for name in options.folders], lambda model: price_of(options.prices, model))
    environments = sorted({run.told["config"]["env"] for run in runs})
    if len(environments) > 1:
        raise Misuse(f"compare: runs of different environments ({', '.join(environments)}); name runs of one")
    console = show.console()
    show_numbers(console, {run.name: run.summary
                           for run in runs}, None, options.upstream_compat,
                 [run.told["prompt"]["source"] for run in runs])
    table = Table("difference, item by item", "items", "success rate", "mean reward", "newly solved", "no longer")
    for line in report.difference_lines(runs):
        show.add_row(table, line["name"], line["items"], line["success"], line["reward"], str(len(line["gained"])),
                     str(len(line["lost"])))
    console.print(table)
    for run in runs[1:]:
        differing = differences({**runs[0].told["config"], "items": None}, {**run.told["config"], "items": None})
        console.print(f"{run.name}: {'; '.join(differing) or 'the same configuration'}",
                      highlight=False,
                      markup=False,
                      soft_wrap=True)
    path = Path(options.out or COMPARED)
    report.write(path, runs, options.upstream_compat)
    print(f"report: {path}")
    return 0


def write_file(path: Path, text: str) -> None:
    """Write a file and the folders above it.

    Raises:
        Misuse: it cannot be written.
    """
    from evaluation.records import write_whole
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise Misuse(f"{path} cannot be written: {error.strerror}; choose another place with --out") from None


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
    print(f"{len(found)} conversations: {options.out}")
    return 0


def summary_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a run: those in summary.json, which a `rescore` may have made, unless attempts came after.

    Raises:
        Misuse: the attempts are damaged.
    """
    from evaluation.numbers import summarize
    from evaluation.records import ATTEMPTS, SUMMARY
    from evaluation.rescoring import read_scored
    try:
        if (folder / SUMMARY).stat().st_mtime_ns >= (folder / ATTEMPTS).stat().st_mtime_ns:
            return json.loads((folder / SUMMARY).read_text())
    except (OSError, ValueError):
        pass
    return summarize(read_scored(folder), config["samples"], len(config["items"]) * config["samples"])


def list_command(options: argparse.Namespace) -> int:
    """Show the runs in a folder; a damaged one is named and hides no other."""
    from rich.table import Table

    from evaluation import show
    from evaluation.records import RUN, read_run
    found = sorted(Path(options.folder).glob(f"*/{RUN}"), key=lambda path: path.stat().st_mtime)
    if not found:
        print(f"no runs in {options.folder}")
        return 0
    table = Table("folder", "environment", "model", "attempts", "success rate", "errors")
    damaged = []
    for folder in (path.parent for path in found):
        try:
            config = read_run(folder)["config"]
            summary = summary_of(folder, config)
            show.add_row(table, folder.name, config["env"], config["model"],
                         f"{summary['attempts']} of {summary['expected']}", show.with_interval(summary["success"]),
                         str(summary["errors"]))
        except Misuse as problem:
            damaged.append(str(problem))
        except (KeyError, TypeError):  # JSON of another form
            damaged.append(f"{folder} holds no run that this version can read; remove it or look there with its own")
    show.console().print(table)
    for line in damaged:
        print(f"eval: {line}", file=sys.stderr)
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


COMMANDS = {
    "run": run_command,
    "rescore": rescore_command,
    "report": report_command,
    "compare": compare_command,
    "conversations": conversations_command,
    "list": list_command,
    "prompts": prompts_command
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    if sys.stdout is None:  # closed: the next file that is opened would take its number, and what is said with it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the program runs
    output = Output(sys.stdout)
    with redirect_stdout(output):
        code, command = _obey(argv)
        output.flush()
    if output.gone is None:
        return code
    if not isinstance(output.gone, BrokenPipeError):  # whose reader wanted no more
        print(f"eval: standard output cannot be written: {output.gone.strerror}; give it another place",
              file=sys.stderr)
    return code if command == "run" else code or FAILED  # a run has left everything in its folder


def _obey(argv: Sequence[str] | None) -> tuple[int, str]:
    try:
        options = parser().parse_args(argv)
    except SystemExit as left:
        return int(left.code or 0), ""
    try:
        return COMMANDS[options.command](options), options.command
    except Misuse as problem:
        print(f"eval: {problem}", file=sys.stderr)
        return MISUSE, options.command
    except Stopped as problem:
        print(f"eval: {problem}", file=sys.stderr)
        return FAILED, options.command
    except KeyboardInterrupt:
        return INTERRUPTED, options.command


if __name__ == "__main__":
    # SIGTERM, from a cluster's scheduler or `docker stop`, and SIGHUP, from a terminal that is closed, are answered like
    # Ctrl-C: sessions are closed, numbers written.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, lambda signum, frame: signal.raise_signal(signal.SIGINT))
    sys.exit(main())
