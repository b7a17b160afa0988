"""Text that others wrote: without colour codes in a log, and harmless on a terminal."""
from __future__ import annotations

import re

# ECMA-48: control sequences, strings for the terminal (titles, links), and the two-character escapes.
ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x9b[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-OQ-WYZ\\]")

CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but the tab and the ends of lines


def plain(text: str) -> str:
    r"""Return `text` without colours and other sequences for a terminal; a control character that is left is written out.

    >>> plain("\x1b[31mred\x1b[0m \x07")
    'red \\x07'
    """
    if not CONTROLS.search(text):
        return text
    return CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", ESCAPES.sub("", text))


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
