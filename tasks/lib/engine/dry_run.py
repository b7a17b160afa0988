"""What `--dry` prints: the command lines that would run, as a user would type them."""
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from tasks.lib.notices import put
from tasks.lib.redaction import redact, secret_values

# Runs in docker's place: notes how many arguments there are, then each, and does nothing else.
RECORDER = ("sh", "-c", 'printf "%s\\0" "$#" "$@" >>"$DRY_RECORD"', "docker")


def command_line(argv: Sequence[str], variables: Mapping[str, str], secrets: Sequence[str] = ()) -> str:
    """Return `argv` as a user would type it in a shell, with the variables that it needs before it, redacted."""

    def word(text: str) -> str:  # redacted before it is quoted, which changes a secret that has a quote in it
        hidden = redact(text, secrets)
        return hidden if hidden == "***" else shlex.quote(hidden)

    return " ".join([*(f"{name}={word(value)}" for name, value in variables.items()), *map(word, argv)])


def print_commands(action: Callable[[Mapping[str, str]], None], variables: Mapping[str, str]) -> None:
    """Print the command lines of `action`, which calls RECORDER in place of docker, with the variables it is given.

    Args:
        action: what would run; it is handed what RECORDER needs in its environment.
        variables: what Compose interpolates; shown before each of its commands.
    """
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "argv"
        record.touch()
        # A call whose answer python-on-whales reads gets none, and is noted all the same.
        with suppress(json.JSONDecodeError):
            action({"DRY_RECORD": str(record)})
        words = map(os.fsdecode, record.read_bytes().split(b"\0")[:-1])
    for count in words:
        argv = ["docker", *islice(words, int(count))]
        put(command_line(argv, variables if "compose" in argv[:2] else {}, secret_values()))
