"""The tasks' printing gate: lines that a terminal shows as they are, whoever chose the names and words in them."""
import sys
from contextvars import ContextVar
from typing import Any, TextIO

from tasks.lib.errors import printable

# The task that runs, which its edge sets: whoever says something below it need not be told.
TASK: ContextVar[str] = ContextVar("TASK", default="invoke")

# What the task has to report, for `--json`; None where nobody asked for it.
FACTS: ContextVar[dict[str, Any] | None] = ContextVar("FACTS", default=None)


def note(**facts: Any) -> None:
    """Add `facts`, which JSON can hold, to the object that `--json` prints."""
    found = FACTS.get()
    if found is not None:
        found.update(facts)


def note_one(name: str, fact: Any) -> None:
    """Add `fact` to the list `name` of that object."""
    found = FACTS.get()
    if found is not None:
        found.setdefault(name, []).append(fact)


def reporting() -> bool:
    """Tell whether standard output is for one JSON object, and for nothing else."""
    return FACTS.get() is not None


def put(line: str, file: TextIO | None = None) -> None:
    """Print one line, of standard output where no `file` is given: what was asked for."""
    print(printable(line), file=file, flush=True)


def say(text: str) -> None:
    """Print a line on standard error: what the user must know, whoever reads standard output."""
    put(f"{TASK.get()}: {text}", sys.stderr)


def tell(text: str) -> None:
    """Print a line on standard output: how it goes on, where standard output is for people."""
    put(f"{TASK.get()}: {text}", sys.stderr if reporting() else sys.stdout)
