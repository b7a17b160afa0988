"""The command line's flags."""
import argparse
import re
from typing import Any

from evaluation import __version__
from evaluation.output import FACTS, complain
from evaluation.text import one_line

FAILED, MISUSE, INTERRUPTED = 1, 2, 130


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


def _not_negative(text: str) -> float:
    value = _number(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return value


def _at_once(text: str) -> int | str:
    return text if text == "auto" else _amount(text)


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
        said = one_line(message.removeprefix("argument "))
        FACTS["error"] = {"code": MISUSE, "message": said}
        complain(f"{said}; see --help")
        self.exit(MISUSE)


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
    add("--model",
        default="",
        help="model of the endpoint, or expert, random or check (default: $MODEL, then gpt-4o-mini)")
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
    add("--keep-think",
        action="store_true",
        help="leave a thought (<think>…</think>) before the answer in it, as upstream does (default: kept apart)")
    add("--finish-reason",
        action="append",
        default=[],
        help="a finish_reason of this endpoint's whole answers that is not known here; repeatable")
    add("--stream", action="store_true", help="ask for answers in pieces, for endpoints that give them in no other way")
    add("--api-version",
        default="",
        help="api-version in the address of each request, as Azure wants it (default: none)")
    add("--header",
        action="append",
        default=[],
        metavar="NAME=VARIABLE",
        help="send this header with what the environment variable holds, as in api-key=AZURE_KEY; repeatable")
    add("--max-answer",
        type=_positive,
        default=64.0,
        help="MB of one answer of the environment or the endpoint, unpacked; a larger one is that request's fault "
        "(default: 64)")
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
    add("--concurrency",
        type=_at_once,
        default=0,
        help="episodes at once, or auto: as many as bring more answers a second, fewer at a 429 (default: the row's)")
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

    merge = commands.add_parser("merge", help="join runs of one configuration, from several machines, into one")
    merge.add_argument("folders", nargs="+", help="folders of two or more runs")
    merge.add_argument("--out", required=True, help="folder of the run that they become; it must not hold one")
    _numbers_flags(merge)

    suite = commands.add_parser("suite", help="show runs of several models and environments together, with averages")
    suite.add_argument("plan", help="JSON file with name and pairs; each has env, model and the words of `run`")
    suite.add_argument("--check",
                       action="store_true",
                       help="only see that each pair could be played; write state.json beside the plan")
    suite.add_argument("--out", default="", help="the report's file (default: report.html beside the plan)")
    suite.add_argument("--json", action="store_true", help="print one JSON object")
    _numbers_flags(suite)

    watch = commands.add_parser("watch", help="show a run that goes on, until it ends")
    watch.add_argument("folder", help="folder of the run")
    watch.add_argument("--every",
                       type=_positive,
                       default=0.0,
                       help="seconds between looks (default: 2, and 10 where nobody looks)")
    watch.add_argument("--report-every",
                       type=_not_negative,
                       default=30.0,
                       help="seconds between reports of what there is, 0 for none before the end (default: 30)")
    watch.add_argument("--once", action="store_true", help="look once, and do not wait for the end")
    watch.add_argument("--json", action="store_true", help="print one JSON object a look, a line each")

    talks = commands.add_parser("conversations", help="write what was said in a run, one JSON object an attempt")
    talks.add_argument("folders", nargs="+", help="folders of runs")
    talks.add_argument("--out", required=True, help="the file to write, JSON lines with messages")
    talks.add_argument("--all", action="store_true", help="failures too (default: what ended in success)")

    export = commands.add_parser("export", help="write runs as a table, a row an attempt or a row a turn")
    export.add_argument("folders", nargs="+", help="folders of runs")
    export.add_argument("--format",
                        choices=("csv", "jsonl", "parquet"),
                        default="csv",
                        help="of the file; in csv an apostrophe is before a text that is a formula (default: csv)")
    export.add_argument("--rows",
                        choices=("attempts", "turns"),
                        default="attempts",
                        help="what a row is (default: attempts)")
    export.add_argument("--out", default="", help="the file to write")
    export.add_argument("--to",
                        choices=("wandb", "trackio", "mlflow"),
                        default="",
                        help="hand the runs' figures to this tracker's own client, and write no file")
    export.add_argument("--project", default="", help="with --to, its project or experiment (default: agentgym-eval)")

    lists = commands.add_parser("list", help="show the runs in a folder")
    lists.add_argument("folder", nargs="?", default="saves/eval", help="where to look (default: saves/eval)")

    prompts = commands.add_parser("prompts", help="read prompts and item maps out of an AgentGym checkout")
    prompts.add_argument("--agentgym", required=True, help="the checkout")
    prompts.add_argument("--out", default="", help="JSON file to write (default: show where each prompt is)")
    prompts.add_argument("--item-maps", default="", help="JSON file to write ALFWorld's item maps to (default: none)")
    prompts.add_argument("--environments",
                         default="",
                         help="file with the rows (default: $ENVIRONMENTS, then environments.toml)")
    for command in (run, rescore, report, compare, merge, talks, export, lists):
        command.add_argument("--json", action="store_true", help="print one JSON object, and nothing else there")
    return top


def _numbers_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prices",
                         default="",
                         help="TOML or JSON file: input and output of each model, a million tokens")
    command.add_argument("--upstream-compat", action="store_true", help="add the figures as upstream would count them")
