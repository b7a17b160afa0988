"""The trainer's lines: split, without colours, with their speaker, and the figures in them."""
from __future__ import annotations

import math
import random

import pytest

from training.console import LONGEST, Lines, Steps, number, pairs, speaker
from training.text import clipped, plain, shown

REAL = ("step:2 - max_rounds:3.000 - global_seqlen/min:4949.000 - actor/pg_loss:-0.354 - actor/lr:0.000 - "
        "critic/score/mean:0.502 - critic/task_score/mean:0.502 - timing_s/step:11.013 - timing_per_token_ms/gen:0.257")
FIGURES = {
    "max_rounds": 3.0,
    "global_seqlen/min": 4949.0,
    "actor/pg_loss": -0.354,
    "actor/lr": 0.0,
    "critic/score/mean": 0.502,
    "critic/task_score/mean": 0.502,
    "timing_s/step": 11.013,
    "timing_per_token_ms/gen": 0.257
}


def read(*lines: str) -> list[tuple[int, dict[str, float]]]:
    steps, found = Steps(), []
    for line in lines:
        who, said, _ = speaker(line)
        found += steps.feed(who, said)
    return [(one.step, one.metrics) for one in found + steps.flush()]


def test_a_line_of_the_real_trainer():
    data = f"\x1b[36m(main_task pid=24257)\x1b[0m {REAL}\n".encode()
    (line, ) = Lines().feed(data)
    assert read(line) == [(2, FIGURES)]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_pieces_of_any_size_give_the_same_lines(size):
    data = "ä\x1b[31mred\x1b[0m\n\nlast ☃ line\nno end".encode()
    lines, found = Lines(), []
    for place in range(0, len(data), size):
        found += lines.feed(data[place:place + size])
    assert found + lines.feed(b"") == ["äred", "", "last ☃ line", "no end"]


def test_bytes_that_are_no_text_are_kept_as_escapes():
    assert Lines().feed(b"a\xffb\n") == ["a\\xffb"]


def test_of_a_progress_bar_the_last_state_is_kept_and_other_text_all():
    assert Lines().feed(b"Run:  0%|   | 0/3\rRun: 33%|#  | 1/3\rRun: 66%|## | 2/3\r\n") == ["Run: 66%|## | 2/3"]
    assert Lines().feed(b"an error\rmore of it\r\n") == ["an error", "more of it"]


def test_a_line_without_end_is_cut_into_pieces():
    lines = Lines()
    found = lines.feed(b"x" * (3 * LONGEST + 5)) + lines.feed(b"")
    assert [len(line) for line in found] == [LONGEST] * 3 + [5]


@pytest.mark.parametrize("line, expected", [
    ("(main_task pid=24257) words", ("main_task", "words", 1)),
    ("(WorkerDict pid=7, ip=10.0.0.2) words", ("WorkerDict", "words", 1)),
    ("(raylet) words", ("raylet", "words", 1)),
    ("(pid=gcs_server) words", ("worker", "words", 1)),
    ("(autoscaler +5s) words", ("autoscaler +5s", "words", 1)),
    ("(WorkerDict pid=7) norm 0.1 [repeated 2x across cluster]", ("WorkerDict", "norm 0.1", 2)),
    ("(WorkerDict pid=7) no [repeated 31x across cluster] (Ray deduplicates logs by default.)",
     ("WorkerDict", "no", 31)),
    ("words (of 3)", ("", "words (of 3)", 1)),
    ("(a pair) of words", ("", "(a pair) of words", 1)),
])
def test_who_says_a_line(line, expected):
    assert speaker(line) == expected


@pytest.mark.parametrize("text, value", [("0.183", 0.183), ("-1", -1.0), ("1e-06", 1e-6), (".5", 0.5),
                                         ("inf", math.inf), ("np.float64(0.25)", 0.25), ("numpy.float32(2)", 2.0),
                                         ("float32(2)", 2.0), ("tensor(0.5, device='cuda:0')", 0.5), ("1_0", None),
                                         ("0x1", None), ("", None), ("None", None), ("١", None)])
def test_what_is_a_number(text, value):
    assert number(text) == value


def test_a_nan_is_a_figure():
    assert math.isnan(pairs("a/b:nan")[0]["a/b"])


def test_a_line_torn_anywhere_is_put_together():
    for place in range(len("step:2 - max_"), len(REAL)):
        found = read(f"(main_task pid=1) {REAL[:place]}", "(WorkerDict pid=2) [rank-0]: Saving model to /x - y:1",
                     f"(main_task pid=1) {REAL[place:]}")
        assert found[-1] == (2, FIGURES) and len(found) <= 2, place


@pytest.mark.parametrize("cut", range(len("step:2 - max_rounds:3.000 - g"), len(REAL)))
def test_a_line_whose_end_is_lost_keeps_whole_figures_only(cut):
    (_, figures), = read(REAL[:cut])
    assert figures == dict(list(FIGURES.items())[:len(figures)])


def test_a_line_behind_a_progress_bar_counts():
    assert read("100%|###| 3/3 [00:01<00:00, 2.5it/s]" + REAL)[0][0] == 2


def test_what_workers_print_is_no_step():
    assert read(f"(WorkerDict pid=2) {REAL}") == []
    assert read("the next step:3 - is a word") == []
    assert read("Total step:3 - 4") == []


def test_an_unfinished_line_gives_way_to_the_next_step():
    found = read("step:1 - a/b:1.000 - a/c:2.0", *["(WorkerDict pid=2) words"] * 3, "step:2 - a/b:1.500")
    assert found == [(1, {"a/b": 1.0}), (2, {"a/b": 1.5})]


def test_any_text_is_survived():
    chance = random.Random(7)
    letters = "step:1234 - /.()=[]|%\r\x1b[m\x00é☃\udc80nan"
    for _ in range(300):
        text = "".join(chance.choice(letters) for _ in range(chance.randrange(400)))
        lines = Lines()
        for line in lines.feed(text.encode("utf-8", "surrogateescape")) + lines.feed(b""):
            assert "\n" not in line
            read(line)


def test_nothing_reaches_a_terminal_raw():
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u2066\u200b\x00\x7f\r\n\u2028\udc80ok"
    assert shown(evil).isprintable() and shown(evil).endswith("ok") and "\\x1b" in shown(evil)
    assert shown("Grüße, 世界 ☃") == "Grüße, 世界 ☃"
    assert plain("\x1b[1;36ma\x1b[0m\x1b]8;;http://x\x1b\\b") == "ab"
    assert plain("a\tb \x1b]0;never ends") == "a\tb \\x1b]0;never ends"
    assert plain("\x00\x07\x08\x9d") == "\\x00\\x07\\x08\\x9d"
    assert clipped("abc", 3) == "abc" and clipped("abcd", 3) == "ab…"
