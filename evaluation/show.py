"""What a terminal shows: progress while a run goes on, and its numbers at the end."""
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from evaluation.attempts import ERRORS, SCORED, Attempt, Outcome, key_of
from evaluation.live import seconds_left
from evaluation.text import one_line

PLAIN_EVERY = 10.0  # seconds between lines where there is no bar
NARROW = 72  # columns
UNBROKEN = 10_000  # columns, where nobody looks: whoever reads lines gets each value whole


def percent(value: float) -> str:
    """Return a share as percent."""
    return f"{100 * value:.1f} %"


def with_interval(figure: Mapping[str, Any] | None, share: bool = True) -> str:
    """Return mean and interval: 50.0 % [28.0, 72.0]."""
    if figure is None:
        return "-"

    def number(value: float) -> str:
        return f"{100 * value:.1f}" if share else f"{value:.2f}"

    mean = number(figure["mean"]) + (" %" if share else "")
    return mean if figure["low"] is None else f"{mean} [{number(figure['low'])}, {number(figure['high'])}]"


def pass_text(figure: Mapping[str, Any] | None, items: int) -> str:
    """Return Pass@k, with the number of items where some of `items` have too few samples for it."""
    few = f" of {figure['items']} of {items} items" if figure and figure["items"] < items else ""
    return with_interval(figure) + few


class Watch:
    """Progress: done, success rate so far, tokens, errors, time left.

    A bar where the terminal has room for one and can redraw it, else a line now and then.
    """

    def __init__(self, total: int, records: Iterable[Attempt], console: Console, concurrency: int = 1) -> None:
        self.total, self.console, self.played = total, console, 0
        self.outcomes = {key_of(record): record["outcome"] for record in records}
        self.tokens, self.seconds, self.concurrency = 0, 0.0, max(1, concurrency)
        self.bar = console.is_terminal and not console.is_dumb_terminal and console.width >= NARROW
        self.last = self.begun = time.monotonic()
        self.live = Progress(TextColumn("{task.description}"),
                             BarColumn(),
                             MofNCompleteColumn(),
                             TextColumn("{task.fields[facts]}"),
                             TextColumn("{task.fields[left]}"),
                             console=console,
                             disable=not self.bar)
        self.task = self.live.add_task("playing", total=total, completed=self.done, facts="", left="")

    def __enter__(self) -> "Watch":
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    @property
    def done(self) -> int:
        """How many attempts have ended, one that is played again counting once."""
        return len(self.outcomes)

    def facts(self) -> str:
        """Return what has come of the attempts so far, those of a run that is resumed included."""
        counts = Counter(self.outcomes.values())
        scored = sum(counts[name] for name in SCORED)
        errors = sum(counts[name] for name in ERRORS)
        rate = percent(counts[Outcome.SUCCESS] / scored) if scored else "-"
        return f"success {rate}, {self.tokens:,} tokens, {errors} errors"

    def __call__(self, record: Attempt) -> None:
        """Take note of an attempt that ended."""
        self.played += 1
        self.outcomes[key_of(record)] = record["outcome"]
        self.tokens += record["usage"]["prompt"] + record["usage"]["completion"]
        self.seconds += record["seconds"]
        now = time.monotonic()
        left = f"{self.left(now):.0f} s left"
        self.live.update(self.task, completed=self.done, facts=self.facts(), left=left)
        if not self.bar and now - self.last >= PLAIN_EVERY:
            self.last = now
            self.console.print(f"{self.done} of {self.total}: {self.facts()}, {left}", highlight=False)

    def left(self, now: float) -> float:
        """Return the seconds that the rest will take."""
        return seconds_left(self.total - self.done, self.played, self.seconds, now - self.begun, self.concurrency)


def columns(*names: str) -> Table:
    """Return a table with these columns, in which a value that is too long for its cell goes on in the next line."""
    shown = Table()
    for name in names:
        shown.add_column(name, overflow="fold")
    return shown


def print_table(console: Console, shown: Table) -> None:
    """Print a table, its title as a line before it, which the table's width does not break."""
    title, shown.title = shown.title, None
    if title:
        console.print(title, soft_wrap=True)
    console.print(shown)


def add_row(shown: Table, *cells: str) -> None:
    """Add a row in which a cell's brackets are what they are, and never markup; what cannot be printed is escaped."""
    shown.add_row(*(Text(one_line(cell)) for cell in cells))


def table(title: str, summaries: Mapping[str, Mapping[str, Any]], prompts: Sequence[str] = ()) -> Table:
    """Return the numbers of runs, a column each; `prompts` tells whose words each run's model was given."""
    shown = Table(title=Text(one_line(title), "table.title"), title_justify="left", show_header=len(summaries) > 1)
    shown.add_column("")
    for name in summaries:
        shown.add_column(Text(one_line(name)), overflow="fold")
    all_of = list(summaries.values())

    def line(name: str, cells: list[str]) -> None:
        if any(cell not in ("", "-") for cell in cells):
            add_row(shown, name, *cells)

    line("success rate", [with_interval(one["success"]) for one in all_of])
    line("mean reward", [with_interval(one["reward"]) for one in all_of])
    for k in sorted({k for one in all_of for k in one.get("pass_at", {})}, key=int):
        line(f"Pass@{k}", [pass_text(one.get("pass_at", {}).get(k), one["items"]) for one in all_of])
    for name in sorted({name for one in all_of for name in one["categories"]}):
        line(f"  {name}", [with_interval(one["categories"].get(name, {}).get("success")) for one in all_of])
    line("attempts", [
        f"{one['attempts']} of {one['expected']} ({one['expected'] // one['samples']} x {one['samples']})"
        for one in all_of
    ])
    line("outcomes", [", ".join(f"{count} {name}" for name, count in one["outcomes"].items()) for one in all_of])
    line("refused, not scored", [str(one["outcomes"].get(Outcome.REFUSED) or "") for one in all_of])
    line("errors, not scored", [f"{one['errors']} ({percent(one['error_rate'])})" for one in all_of])
    line("rounds", [with_interval(one["rounds"], share=False) for one in all_of])
    line("invalid actions", [str(one["invalid_actions"]) for one in all_of])
    line("empty answers",
         [f"{one['empty_answers']} of {one['answers']}" if one.get("empty_answers") else "" for one in all_of])
    line("tokens", [tokens(one["usage"]) for one in all_of])
    line("cost", [cost_text(one) for one in all_of])
    line("sessions lost", [str(one["sessions_lost"]) if one.get("sessions_lost") else "" for one in all_of])
    line("prompt", list(prompts))
    line("wall time", ["-" if one["seconds"]["wall"] is None else f"{one['seconds']['wall']:.1f} s" for one in all_of])
    return shown


def suite_table(name: str, models: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> Table:
    """Return a suite's table, a column each model."""
    shown = Table(title=Text(one_line(f"suite {name}"), "table.title"), title_justify="left")
    shown.add_column("")
    for model in models:
        shown.add_column(Text(one_line(model)), overflow="fold")
    for number, (title, cells) in enumerate(rows):
        if number and not title.startswith(" "):
            shown.add_section()
        indent = len(title) - len(title.lstrip())
        shown.add_row(Text(" " * indent + one_line(title.strip())), *(Text(one_line(cell)) for cell in cells))
    return shown


def summary_line(summary: Mapping[str, Any]) -> str:
    """Return the numbers that matter most."""
    return (f"success rate {with_interval(summary['success'])}, mean reward {with_interval(summary['reward'])}, "
            f"{summary['attempts']} of {summary['expected']} attempts, {summary['errors']} errors")


def tokens(usage: Mapping[str, int]) -> str:
    """Return the tokens, and of how many answers nobody knows."""
    if not usage["prompt"] and not usage["completion"]:
        return f"{usage['unknown']} answers unknown" if usage["unknown"] else "-"
    unknown = f", {usage['unknown']} answers unknown" if usage["unknown"] else ""
    return f"{usage['prompt']:,} in, {usage['completion']:,} out{unknown}"


def cost_text(summary: Mapping[str, Any]) -> str:
    """Return the cost, the least that it is where nobody knows the tokens of some answers."""
    if summary["cost"] is None:
        return "-"
    unknown = summary["usage"]["unknown"]
    of = f" of {max(summary['answers'], unknown)}" if summary.get("answers") else ""
    return f"at least {summary['cost']:.4f} ({unknown}{of} answers unknown)" if unknown else f"{summary['cost']:.4f}"


def upstream_line(summary: Mapping[str, Any]) -> str:
    """Return the figures as upstream would count them."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in summary["upstream"].items())
    return f"as upstream would count: {figures}"


def console() -> Console:
    """Return the console for results; wide where nobody looks, so that no line is broken."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else UNBROKEN)
