"""Text that others wrote: without colour codes in a log, and harmless on a terminal."""
from __future__ import annotations

import re

# ECMA-48: control sequences, strings for the terminal (titles, links), and the two-character escapes.
ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x9b[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")


def plain(text: str) -> str:
    """Return `text` without colours and other sequences for a terminal."""
    return ESCAPES.sub("", text) if "\x1b" in text or "\x9b" in text else text


def shown(text: str) -> str:
    r"""Return `text` as one line that a terminal shows as it is: what is not printable is written as an escape.

    So are characters that turn the direction of writing, or take no room.

    >>> shown("a\x1b[31mb\u202ec\nd")
    'a\\x1b[31mb\\u202ec\\nd'
    """
    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if character in "\t\xa0\u3000":
        return " "
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def clipped(text: str, width: int) -> str:
    """Return `text` as `shown`, at most `width` characters of it."""
    text = shown(text[:width + 1])
    return text if len(text) <= width else text[:width - 1] + "…"
