"""What can go wrong, told apart by who can mend it."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluation.model import Usage


class Misuse(Exception):
    """The user can mend it: one line with what failed, the value and the remedy; exit code 2."""


class Stopped(Exception):
    """The run cannot go on, through no fault in its configuration (disk full): one line, exit code 1."""


class Unreachable(Stopped):
    """The model's endpoint or the environment server has gone: what was played until then counts."""


def reason(error: Exception) -> str:
    """Return why a file cannot be read, without its name, which an OSError repeats."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class EnvironmentFault(Exception):
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


class ModelFault(Exception):
    """The model gave no completion; the attempt has no result.

    Attributes:
        retries: how often the request was sent again before.
    """

    def __init__(self, message: str, retries: int = 0) -> None:
        super().__init__(message)
        self.retries = retries


class ContextOverflow(Exception):
    """The conversation no longer fits into the model's context.

    Attributes:
        usage: tokens of the answer that was too long, where there was one.
    """

    def __init__(self, message: str, usage: "Usage | None" = None) -> None:
        super().__init__(message)
        self.usage = usage
