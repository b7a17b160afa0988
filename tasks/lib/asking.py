"""Questions to whoever sits at the terminal."""
import sys

from tasks.lib.errors import UserError


def require_somebody(remedy: str) -> None:
    """Stop where nobody is there to answer.

    Raises:
        UserError: exit code 2, with the `remedy`.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise UserError(f"nobody is here to answer; {remedy}")


def agrees(question: str) -> bool:
    """Ask `question`; no answer is a no."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False
