"""What a terminal shows."""
import io

import pytest
from rich.console import Console

from evaluation import numbers, show
from evaluation.show import Watch
from tests.evaluation.samples import attempt


def test_pass_at_k_says_of_how_many_items_it_is():
    found = numbers.summarize([attempt("a", 0), attempt("a", 1), attempt("b", 0), attempt("b", 1, "model_error")], 2)
    assert show.pass_text(found["pass_at"]["2"], found["items"]).endswith("] of 1 of 2 items")
    whole = numbers.summarize([attempt("a", 0), attempt("a", 1)], 2)
    assert show.pass_text(whole["pass_at"]["2"], whole["items"]).endswith("]")


def test_progress_counts_what_a_resumed_run_had_and_each_attempt_once():
    lines = [{**attempt(str(n), 0, outcome), "usage": {"prompt": 1, "completion": 1}}
             for n, outcome in enumerate(("success", "failure", "model_error"))]
    watch = Watch(4, lines[:2], Console(file=io.StringIO()))
    assert watch.facts().startswith("success 50.0 %") and watch.done == 2
    watch(lines[2])
    watch({**lines[2], "outcome": "success"})
    assert watch.facts() == "success 66.7 %, 4 tokens, 0 errors" and watch.done == 3


def watch(total, concurrency, **options):
    return Watch(total, [], Console(file=io.StringIO(), **options), concurrency)


def test_the_time_left_is_that_of_the_attempts_and_not_of_the_first_to_end():
    one = watch(10_000, 100)
    one({**attempt("0"), "usage": {"prompt": 1, "completion": 1}, "seconds": 60.0})
    assert one.left(one.begun + 60) == pytest.approx(9_999 * 60 / 100)
    for n in range(1, 400):
        one({**attempt(str(n)), "usage": {"prompt": 1, "completion": 1}, "seconds": 60.0})
    assert one.left(one.begun + 240) == pytest.approx(9_600 * 240 / 400)


@pytest.mark.parametrize("options,bar", [({"force_terminal": True, "width": 120}, True), ({"force_terminal": True, "width": 40}, False), ({"force_terminal": False}, False),
                                         ({"force_terminal": True, "width": 120, "_environ": {"TERM": "dumb"}}, False)])
def test_a_terminal_that_cannot_show_a_bar_has_lines(options, bar):
    one = watch(2, 1, **options)
    assert one.bar is bar
    one.last -= show.PLAIN_EVERY
    one({**attempt("0"), "usage": {"prompt": 1, "completion": 1}, "seconds": 1.0})
    assert ("1 of 2: success 100.0 %" in one.console.file.getvalue()) is not bar


def test_a_cost_of_which_a_part_is_unknown_is_shown_as_the_least():
    usage = {"prompt": 100, "completion": 10, "cached": 0, "reasoning": 0, "unknown": 1}
    found = numbers.summarize([{**attempt("a"), "usage": usage, "turns": [{"completion": "x"}] * 22}], 1, price={"input": 1e4, "output": 0.0})
    assert show.cost_text(found) == "at least 1.0000 (1 of 22 answers unknown)"


LONG = f"saves/eval/{'p' * 200}", "m" * 150


def test_in_a_pipe_no_value_is_cut_and_no_row_broken(capsys):
    found = numbers.summarize([attempt("a", 0), attempt("b", 0, "model_error")], 1)
    show.print_table(show.console(), show.table(LONG[0], {LONG[1]: found, "other": found}, ["of a prompt " * 30, "short"]))
    table = show.columns("folder", "model", "errors")
    show.add_row(table, *LONG, "1")
    show.print_table(show.console(), table)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == LONG[0] and any(LONG[1] in line and "other" in line for line in lines)
    assert any(("of a prompt " * 30).strip() in line for line in lines)
    assert any(LONG[0] in line and LONG[1] in line and " 1 " in line for line in lines)


def test_on_a_narrow_terminal_a_value_goes_on_in_the_next_line():
    screen = io.StringIO()
    table = show.columns("folder", "model", "errors")
    show.add_row(table, *LONG, "1")
    show.print_table(Console(file=screen, width=60), table)
    assert "…" not in screen.getvalue() and screen.getvalue().count("m") == len(LONG[1]) + len("m") and screen.getvalue().count("p") == 200
