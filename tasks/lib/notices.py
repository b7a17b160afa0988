"""What is said along the way, each line with the task's name before it."""
import sys
from contextvars import ContextVar

from tasks.lib.errors import printable

# The task that runs, which its edge sets: whoever says something below it need not be told.
TASK: ContextVar[str] = ContextVar("TASK", default="invoke")


def say(text: str) -> None:
    """Print a line on standard error: what the user must know, whoever reads standard output."""
    print(printable(f"{TASK.get()}: {text}"), file=sys.stderr, flush=True)


def tell(text: str) -> None:
    """Print a line on standard output: how it goes on, where standard output is for people."""
    print(printable(f"{TASK.get()}: {text}"), flush=True)
