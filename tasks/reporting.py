"""`--json` on every task that reports: one object on standard output and nothing else there, errors included.

The object has `task`, `code` (the exit code), with a failure `error` (`code`, `message`), under `--dry` `would` (the lines
that it prints), and what the task reports; `tasks.schema.json` says what that is.
"""
from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from invoke.exceptions import Exit

from tasks.lib.errors import PIPE_CLOSED
from tasks.lib.notices import FACTS

HELP = "Print one JSON object, and nothing else on standard output."
# They hand over the terminal, or show what another program prints for as long as one looks.
SILENT = ("train.shell", "train.run", "train.logs", "train.watch", "eval.watch", "merge.shell", "env.shell", "env.logs",
          "completion")
# Their programs print the object; what comes before it is for people.
BY_PROGRAM = ("eval", "merge")
# What they say last is why they failed, where the task has no words of its own.
SAID_BY_PROGRAM = (*BY_PROGRAM, "build")


class _Told(io.TextIOBase):
    """Standard output that is for people: it goes to standard error, and is kept."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        """Show `text` and keep it."""
        self.text += text
        sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Show what was written."""
        sys.stderr.flush()


@contextmanager
def _output_to(number: int, stream: TextIO) -> Iterator[None]:
    """Send this process's standard output to `stream`, and that of the programs it starts to the file `number`."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(number, 1)
    try:
        with redirect_stdout(stream):
            yield
            stream.flush()
    finally:
        os.dup2(kept, 1)
        os.close(kept)


class _Listener:
    """Standard error goes on to where it went, and the end of it is kept, whoever writes it."""

    def __init__(self) -> None:
        self.tail = b""
        self._kept = os.dup(2)
        self._read, write = os.pipe()
        os.dup2(write, 2)
        os.close(write)
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        while piece := os.read(self._read, 65536):
            self.tail = (self.tail + piece)[-10_000:]
            os.write(self._kept, piece)

    def last_line(self) -> str:
        """Stop listening, and return the last line that says something."""
        sys.stderr.flush()
        os.dup2(self._kept, 2)
        self._thread.join(timeout=1)  # a program that goes on may hold the other end
        lines = [line.strip() for line in self.tail.decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""


def as_object(name: str, own: bool, dry: bool, call: Callable[[], Any]) -> None:
    """Carry out the task `name`, and print what it reports.

    Args:
        own: the task, or a program that it runs, prints the object itself.
        dry: it prints what it would do.

    Raises:
        Exit: as the task does.
    """
    facts: dict[str, Any] = {}
    token = FACTS.set(facts)
    left: Exit | None = None
    told = _Told()
    listener = _Listener() if name.partition(".")[0] in SAID_BY_PROGRAM else None
    try:
        with tempfile.TemporaryFile("w+") as file:
            printed = own or dry
            with _output_to(file.fileno() if printed else 2, file if printed else told):  # type: ignore[arg-type]
                try:
                    call()
                except Exit as error:
                    left = error
            file.seek(0)
            said = file.read()
    finally:
        FACTS.reset(token)
        last = listener.last_line() if listener else ""
    if printed:
        found, rest = _object_in(said) if own else ({}, said)
        facts = {**facts, **found}
        if dry and not found:  # what only looks does so under --dry too
            facts["would"] = rest.splitlines()
        else:
            sys.stderr.write(rest)
    elif not facts and told.text.strip():
        facts["lines"] = told.text.splitlines()
    code = left.code if left else 0
    answer = {"task": name, "code": code, **facts}
    if code and "error" not in facts:
        answer["error"] = {"code": code, "message": (left.message if left else "") or last or "see what it reports"}
    try:
        print(json.dumps(answer), flush=True)
    except BrokenPipeError:  # whoever reads it wanted no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise Exit(code=PIPE_CLOSED) from None
    if left:
        raise left


def _object_in(said: str) -> tuple[dict[str, Any], str]:
    """Return the JSON object that `said` is, or that its last such line is, and what else it says."""
    lines = said.splitlines(keepends=True)
    for first, last in ((0, len(lines)), *((number, number + 1) for number in reversed(range(len(lines))))):
        try:
            found = json.loads("".join(lines[first:last]))
        except ValueError:
            continue
        if isinstance(found, dict):
            return found, "".join(lines[:first] + lines[last:])
    return {}, said
