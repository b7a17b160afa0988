"""The printing gate."""
import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from evaluation import problems, report, show
from evaluation.output import complain
from evaluation.text import one_line, visible

ANYTHING = st.text() | st.lists(st.sampled_from(["\x1b[2K", "\r", "\n", "\x9b31m", "\u202e", "\u2066", "\u200f", "\x07", "\u2028", "ok", "\x00", "[red]", "\ud800"])).map("".join)
OBEYED = {"Cc", "Zl", "Zp", "Cs"}  # of Unicode's categories, those that a terminal or a reader of lines may obey
TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def harmless(text: str, kept: str = "") -> bool:
    return not any((unicodedata.category(one) in OBEYED or one in TURNING) and one not in kept for one in text)


@given(ANYTHING)
def test_no_character_that_a_terminal_obeys_is_in_a_line(text):
    assert harmless(one_line(text)) and harmless(visible(text), "\n\t")
    assert one_line(one_line(text)) == one_line(text)


@given(st.text(st.characters(categories=("L", "M", "N", "P", "S"))))
def test_words_of_all_scripts_stay_as_they_are(text):
    assert visible(text) == text


def test_what_is_not_shown_is_named():
    assert one_line("a\x1b[2Kb\u202ec\nd") == "a\\x1b[2Kb\\u202ec d"


@given(ANYTHING)
def test_what_is_wrong_is_said_in_one_line(text):
    for kind in (problems.Misuse, problems.Stopped, problems.EnvironmentFault, problems.ModelFault, problems.ContextOverflow):
        assert harmless(str(kind(text)))


@given(ANYTHING)
def test_no_table_prints_what_a_terminal_obeys(text):
    out = io.StringIO()
    shown = show.Table("x")
    show.add_row(shown, text)
    Console(file=out, width=200).print(shown)
    assert harmless(out.getvalue(), "\n")


@given(ANYTHING)
def test_standard_error_has_one_line(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", out := io.StringIO())
        complain(text)
    assert harmless(out.getvalue(), "\n") and out.getvalue().count("\n") == 1


@given(ANYTHING)
def test_the_page_shows_what_turns_the_direction_of_writing(text):
    page = report.template().from_string("{{ text }}").render(text=text)
    assert harmless(page, "\n\t")
