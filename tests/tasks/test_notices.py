"""What the tasks say: text of others in it does nothing to a terminal."""
import pytest
from invoke.exceptions import Exit

from tasks.edge import guarded
from tasks.lib.errors import UserError
from tasks.lib.notices import say, tell


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
