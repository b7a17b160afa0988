"""The printing gate: what text of others looks like in a terminal, a message of one line, or on the report's page.

Only what Unicode calls printable passes as it is. Control and escape characters, C1, and those that turn the direction
of writing are shown as what they are (`\\x1b`, `\\u202e`); a line break in a message is a space.
"""
import json
import re
from typing import Any

from evaluation.secrets import hide

_BLANK = re.compile(r"\s+")
_ENDS = re.compile("[\u0085\u2028\u2029]")
_KEPT = "\n\t"
_BEHIND = 1 << 14  # characters behind a cut, of which a secret may need some
# Joiners of scripts and emoji, variation selectors and the blanks of typography: no terminal obeys them.
_HARMLESS = frozenset("\u200c\u200d\ufeff\u00a0\u202f\u2009\u3000\u00ad")


def escaped(character: str) -> str:
    """Return a character as Python spells it in a literal."""
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def visible(text: str, kept: str = _KEPT) -> str:
    """Return `text` with each character that cannot be printed as an escape, but for those in `kept`."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in kept or one in _HARMLESS else escaped(one) for one in text)


def one_line(text: str) -> str:
    """Return `text` as one line that can be printed."""
    return visible(_BLANK.sub(" ", text).strip(), "") if not text.isprintable() else text


def json_line(value: Any) -> str:
    """Return `value` as JSON in one line for every reader: some take U+2028 and its like for the end of one."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text if text.isascii() else _ENDS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def short(value: Any, width: int = 200) -> str:
    """Return `value` as JSON, cut to `width` characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = hide(text[:width + _BEHIND])  # before it is cut: half a secret is one too
    return text if len(text) <= width else text[:width - 1] + "…"
