"""What the tasks say: text of others in it does nothing to a terminal."""
import ast
import io
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invoke.exceptions import Exit

from tasks.edge import guarded
from tasks.lib.errors import BadSetting, DockerError, UserError
from tasks.lib.notices import put, say, tell
from tasks.lib.tables import print_table
from tests.fixtures.servers import ROOT


@pytest.mark.parametrize("error", [
    UserError("no run /tmp/a\x1b[31mb\u202e"),
    UserError("the server says \x9b2J\r"),
    FileNotFoundError(2, "No such file", "/tmp/\x1b]0;x\x07"),
])
def test_nothing_that_moves_a_cursor_reaches_a_terminal(error, capsys):

    def fails():
        raise error

    with pytest.raises(Exit) as left:
        guarded("env.up", fails)()
    say("a\x1b[2J")
    tell("b\u202e")
    for text in (left.value.message, *capsys.readouterr()):
        assert text and text.rstrip("\n").isprintable()


HOSTILE = st.text(st.sampled_from("\x1b[2J\r\n\x9b\u202e\u2066\u2028\x00\x85ab ") | st.characters(), max_size=40)


@given(HOSTILE)
@settings(max_examples=200, deadline=None)
def test_whatever_words_others_chose_a_message_is_one_line(words):
    for error in (UserError(f"{words} is wrong"), DockerError(words + "x"), BadSetting(f"{words}x=1")):
        assert error.said("merge").isprintable()
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        say(words)
        tell(words)
        put(words)
        print_table(("name", "what"), [(words, "x"), ("y", words)])
    assert err.getvalue().count("\n") == 1 and out.getvalue().count("\n") == 5
    assert all(line.isprintable() for line in (out.getvalue() + err.getvalue()).split("\n"))


@given(HOSTILE, st.sampled_from([UserError, OSError, ModuleNotFoundError]))
@settings(max_examples=100, deadline=None)
def test_the_edge_of_every_task_says_one_line(words, kind):

    def body():
        raise kind(2, words, words) if kind is OSError else kind(words, name=words) if kind is ModuleNotFoundError else kind(words + "x")

    with pytest.raises(Exit) as caught:
        guarded("x.y", body)()
    assert caught.value.message.isprintable()


def test_tasks_print_by_the_gate_alone():
    """Names of files, words of servers and of logs go to the terminal in tasks/ through `notices`; what else is printed is JSON."""
    raw = []
    for path in sorted((ROOT / "tasks").rglob("*.py")):
        if path.name in ("completing.py", "completion.py"):  # programs for a shell, which reads what they print
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print" and node.args:
                first = node.args[0]
                made = isinstance(first, ast.Call) and ast.unparse(first.func).endswith("dumps")
                gated = isinstance(first, ast.Call) and ast.unparse(first.func) == "printable"
                if not (made or gated):
                    raw.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert raw == []
