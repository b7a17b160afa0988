"""What is said along the way: on standard error, since standard output may be for a machine."""
import sys
from contextvars import ContextVar

# The task that runs, which its edge sets: whoever says something below it need not be told.
TASK: ContextVar[str] = ContextVar("TASK", default="invoke")


def say(text: str) -> None:
    """Print one line that begins with the task's name."""
    print(f"{TASK.get()}: {text}", file=sys.stderr, flush=True)
