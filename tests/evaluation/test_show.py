"""What a terminal shows."""
from evaluation import numbers
from tests.evaluation.samples import attempt


def test_pass_at_k_says_of_how_many_items_it_is():
    from evaluation import show
    found = numbers.summarize([attempt("a", 0), attempt("a", 1), attempt("b", 0), attempt("b", 1, "model_error")], 2)
    assert show.pass_text(found["pass_at"]["2"], found["items"]).endswith("] of 1 of 2 items")
    whole = numbers.summarize([attempt("a", 0), attempt("a", 1)], 2)
    assert show.pass_text(whole["pass_at"]["2"], whole["items"]).endswith("]")


def test_progress_counts_what_a_resumed_run_had_and_each_attempt_once():
    import io

    from rich.console import Console

    from evaluation.show import Watch
    lines = [{**attempt(str(n), 0, outcome), "usage": {"prompt": 1, "completion": 1}}
             for n, outcome in enumerate(("success", "failure", "model_error"))]
    watch = Watch(4, lines[:2], Console(file=io.StringIO()))
    assert watch.facts().startswith("success 50.0 %") and watch.done == 2
    watch(lines[2])
    watch({**lines[2], "outcome": "success"})
    assert watch.facts() == "success 66.7 %, 4 tokens, 0 errors" and watch.done == 3
