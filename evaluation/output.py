"""Standard output that may go away: a pipe whose reader has left, a disk that is full."""
import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from evaluation.secrets import hide
from evaluation.text import one_line

# What the command found, for --json.
FACTS: dict[str, Any] = {}


def complain(line: str) -> None:
    """Say on standard error what is wrong, in one line that can be printed."""
    print(f"eval: {hide(one_line(line))}", file=sys.stderr)


class Output(io.TextIOBase):
    """Standard output; what is said after it has gone is lost, and nothing else.

    Attributes:
        gone: why it cannot be written; None while it can.
    """
    encoding: str = "utf-8"

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.encoding = file.encoding
        self.gone: OSError | None = None

    def write(self, text: str) -> int:
        """Write `text`, or lose it; what the file's encoding lacks is written as an escape."""
        if not self.gone:
            try:
                self.file.write(text)
            except UnicodeEncodeError:  # a folder's name that is no UTF-8
                self.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written, or lose it."""
        if not self.gone:
            try:
                self.file.flush()
            except OSError as error:
                self._lose(error)

    def isatty(self) -> bool:
        """Return True if somebody looks."""
        return not self.gone and self.file.isatty()

    def fileno(self) -> int:
        """Return the file's number."""
        return self.file.fileno()

    def close(self) -> None:
        """Leave the file open: it is the process's."""

    def _lose(self, error: OSError) -> None:
        self.gone = error
        # What is still buffered would fail again when Python ends, with words and an exit code of its own.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
