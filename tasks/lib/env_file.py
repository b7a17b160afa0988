r"""Read a `.env` as Docker Compose does, or refuse it with the line and what helps.

Compose's own rules (compose-go's `dotenv` and `template`) are neither python-dotenv's nor a shell's: `$NAME` is a
variable, `$$` a dollar, `NAME: value` counts, and what follows a closing quote is the next line. What is odd, or not
set, is refused and not guessed. No message shows a value or a part of one: it may be a secret's.
"""
from __future__ import annotations

import re
from collections.abc import Mapping

from tasks.lib.errors import BadSetting

SKIPPED = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
NAME = re.compile(r"(?:export[ \t]+)?(?P<name>[A-Za-z0-9_.-]+)[ \t]*(?:[=:][ \t]*|(?P<alone>\n))")
QUOTED = re.compile(r"""(?:'(?P<single>(?:[^'\\]|\\.)*)'|"(?P<double>(?:[^"\\]|\\.)*)")[ \t]*(?:#[^\n]*)?(?:\n|\Z)""",
                    re.DOTALL)
BARE = re.compile(r"[^\n]*")
VARIABLE = re.compile(
    r"""\$(?:(?P<dollar>\$)
                          |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
                          |\{(?P<braced>[A-Za-z_][A-Za-z0-9_]*)(?:(?P<how>:?[-+?])(?P<word>[^${}"'\\\n]*))?\}
                          |(?=[\x21-\x7e])(?!\{)|(?=\s|\Z)
                          |(?P<odd>))""", re.VERBOSE)
ESCAPE = re.compile(r"\\(.)", re.DOTALL)
# What a backslash makes in double quotes, before variables are looked for.
ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "$": "$$"}
LITERAL = "in single quotes a value is what it looks like"


class _Fault(Exception):
    """What is wrong with a line."""


def parse(text: str, environ: Mapping[str, str], place: str = ".env") -> dict[str, str]:
    """Return the variables of the `.env` file with the contents `text`.

    Args:
        environ: what a variable in a value means, before what the file says of it.
        place: the file's name, for messages.

    Raises:
        BadSetting: Compose refuses it, or few would expect what it reads.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    found: dict[str, str] = {}
    position = _after(SKIPPED, text, 0)
    while position < len(text):
        try:
            position = _after(SKIPPED, text, _statement(text, position, found, environ))
        except _Fault as fault:
            raise BadSetting(f"{place} line {1 + text.count(chr(10), 0, position)}: {fault}") from None
    return found


def _after(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _statement(text: str, position: int, found: dict[str, str], environ: Mapping[str, str]) -> int:
    """Note in `found` what the line at `position` sets, and return where the next one begins."""
    head = NAME.match(text, position)
    if head is None or head["name"] == "export":
        raise _Fault("no NAME=value; mend it, or put a # before it")
    if head["alone"]:  # the environment's own value, which comes before the file's anyway
        return head.end()
    known = {**found, **environ}
    name = head["name"] if re.fullmatch("[A-Z][A-Z0-9_]*", head["name"]) else "what is set"
    if text[head.end():head.end() + 1] in ("'", '"'):
        match = QUOTED.match(text, head.end())
        if match is None:
            raise _Fault(f"{name} has no closing quote, or something after it; put the whole value in quotes")
        value = match["single"].replace("\\'", "'") if match["double"] is None else _double(
            match["double"], name, known)
    else:
        match = BARE.match(text, head.end())
        assert match is not None  # it matches anything
        value = _bare(match[0], name, known)
    if not value.replace("\n", "").replace("\t", "").replace("\r", "").isprintable():
        raise _Fault(f"{name} has a character that cannot be seen; type the value anew")
    found[head["name"]] = value
    return match.end()


def _bare(text: str, name: str, known: Mapping[str, str]) -> str:
    value = text.partition(" #")[0].rstrip(" \t")
    if value.startswith("#"):
        raise _Fault(f"{name} has a # where the value begins, which is no comment there; put it in single quotes, or "
                     "remove it")
    if "\t#" in value:
        raise _Fault(f"{name} has a tab before the #, which makes no comment of it; put a space there")
    if "\\$" in value:
        raise _Fault(f"{name} has a \\ before a $, which changes nothing without quotes; {LITERAL}")
    return _expanded(value, name, known)


def _double(text: str, name: str, known: Mapping[str, str]) -> str:
    """Return what stands between double quotes, as it is meant."""

    def meaning(match: re.Match[str]) -> str:
        if match[1] not in ESCAPED:
            raise _Fault(f"{name} has a backslash before what needs none; {LITERAL}")
        return ESCAPED[match[1]]

    return _expanded(ESCAPE.sub(meaning, text), name, known)


def _expanded(value: str, name: str, known: Mapping[str, str]) -> str:
    """Return `value` with what its variables mean.

    Raises:
        _Fault: one is not set, or Compose would refuse it. Its name is not told: `hf_a$bcd` is no variable at all.
    """

    def meaning(match: re.Match[str]) -> str:
        variable = match["name"] or match["braced"]
        if match["dollar"]:
            return "$"
        if match["odd"] is not None:
            raise _Fault(f"{name} has a $ that Compose cannot read; {LITERAL}")
        if variable is None:
            return match[0]
        how, word = match["how"] or "", match["word"] or ""
        there = variable in known and (known[variable] or ":" not in how)
        if how[-1:] == "+":
            return word if there else ""
        if there:
            return known[variable]
        if how[-1:] == "-":
            return word
        raise _Fault(
            f"{name} has a $, and what follows is no variable that is set; set it above, or mind that {LITERAL}")

    return VARIABLE.sub(meaning, value)
