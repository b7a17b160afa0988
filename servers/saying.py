"""What a server's own log says."""
import sys

from servers.gates import shown

LONGEST = 2000  # characters of a line


def say(line: str) -> None:
    """Print one line to the log, whoever wrote the words in it."""
    print("serve: " + shown(line, LONGEST), file=sys.stderr, flush=True)
