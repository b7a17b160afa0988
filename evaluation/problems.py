"""What can go wrong, told apart by who can mend it."""
from typing import TYPE_CHECKING

from evaluation.secrets import hide
from evaluation.text import one_line

if TYPE_CHECKING:
    from evaluation.answers import Room
    from evaluation.model import Usage


class Problem(Exception):
    """What is said of it is one line that can be printed, whoever wrote the words, and has no secret of ours."""

    def __init__(self, message: str) -> None:
        if "Too many open files" in message:
            message += " (raise `ulimit -n`, or lower --concurrency)"
        super().__init__(hide(one_line(message)))


class Misuse(Problem):
    """The user can mend it: one line with what failed, the value and the remedy; exit code 2."""


class Stopped(Problem):
    """The run cannot go on, through no fault in its configuration (disk full): one line, exit code 1."""


class Unreachable(Stopped):
    """The model's endpoint or the environment server has gone: what was played until then counts."""


def reason(error: Exception) -> str:
    """Return why a file cannot be read, without its name, which an OSError repeats."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]


class EnvironmentFault(Problem):
    """The environment server answered with an error, in whatever form, or did not answer.

    Attributes:
        status: the HTTP status; 200 for an error inside a 200; None where no answer came.
        sent: False where the request surely never reached the server, so that it may be sent again.
        waited: whether all the time was used up that one waits for the server.
    """

    def __init__(self, message: str, status: int | None = None, sent: bool = True) -> None:
        super().__init__(message)
        self.status = status
        self.sent = sent
        self.waited = False


class ModelFault(Problem):
    """The model gave no completion; the attempt has no result.

    Attributes:
        retries: how often the request was sent again before.
        refused: whether the endpoint, which answers others, refuses this very conversation.
    """

    def __init__(self, message: str, retries: int = 0, refused: bool = False) -> None:
        super().__init__(message)
        self.retries = retries
        self.refused = refused


class ContextOverflow(Problem):
    """The conversation no longer fits into the model's context.

    Attributes:
        usage: tokens of the answer that was too long, where there was one.
        room: what the endpoint says of its context and the prompt.
    """

    def __init__(self, message: str, usage: "Usage | None" = None, room: "Room | None" = None) -> None:
        super().__init__(message)
        self.usage = usage
        self.room = room
