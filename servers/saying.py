"""What a server's own log says."""
import sys


def say(line: str) -> None:
    """Print one line to the log."""
    print("serve: " + line, file=sys.stderr, flush=True)
