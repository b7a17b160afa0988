"""Thoughts in a completion: the marks that models put around them, and what is left without them."""
import re
from collections.abc import Sequence
from itertools import islice

MOST = 10_000  # marks of one completion
_NAMES = "think(?:ing)?|thoughts?|reasoning|reflection|analysis|scratchpad"
# Ways of marking, each with an end of its own: tags with whatever attributes, the marks of Mistral, Kimi, Cohere and
# OpenThinker, and gpt-oss's channels where no parser has taken them away.
_MARKS = re.compile(
    rf"(?P<void><(?:seed:|ant:)?(?:{_NAMES})\s*/>)|(?P<tag><(?:seed:|ant:)?(?:{_NAMES})(?:\s[^<>]*)?>)|"
    rf"(?P<tag_end></(?:seed:|ant:)?(?:{_NAMES})\s*>)|(?P<bracket>\[THINK\])|(?P<bracket_end>\[/THINK\])|"
    r"(?P<diamond>◁think▷)|(?P<diamond_end>◁/think▷)|(?P<word><\|(?:begin_of_thought|START_THINKING)\|>)|"
    r"(?P<word_end><\|(?:end_of_thought|END_THINKING)\|>)|"
    r"(?P<channel>(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)[^<]{0,80}<\|message\|>)|"
    r"(?P<channel_end><\|end\|>)", re.IGNORECASE)
_FINAL = re.compile(r"^\s*(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>|<\|(?:return|end)\|>\s*$")
_ORPHANS = ("tag_end", "bracket_end", "diamond_end", "word_end")  # and no <|end|>, which ends other things too
_BLANK = " \t\r\n\f\v\ufeff\u200b\u200c\u200d\u2060"  # a byte order mark and what has no width too


def split_thought(text: str) -> tuple[str, str]:
    """Return the thoughts in a completion, and what is left of it.

    A completion begins with thoughts: blocks of `<think>`, `<reasoning>` and the like, which may hold each other. One
    that is never closed is all thought, and one that a chat template has opened before the completion has only an end.
    Closed blocks of `<think>`, and of marks that nothing else uses, are thoughts further on too.
    """
    marks = list(islice(_MARKS.finditer(text), MOST))
    thoughts: list[str] = []
    kept, at, number, leads = "", 0, 0, True
    while number < len(marks) and marks[number].lastgroup in _ORPHANS:
        number += 1
    if number:
        thoughts, at = [text[:marks[number - 1].start()]], marks[number - 1].end()
    endless: set[str] = set()  # ways that have no end further on
    while number < len(marks):
        mark, way = marks[number], marks[number].lastgroup or ""
        leads = leads and not text[at:mark.start()].strip(_BLANK)
        number += 1
        if way.endswith("_end") or way in endless or not (leads or (way != "void" and
                                                                    (way != "tag" or "think" in mark[0].lower()[:12]))):
            continue
        closed = number - 1 if way == "void" else _end(marks, number, way)
        if closed < 0 and not leads:
            endless.add(way)
            continue
        kept += "" if leads else text[at:mark.start()]
        thoughts.append("" if way == "void" else text[mark.end():marks[closed].start() if closed >= 0 else None])
        at, number = (marks[closed].end(), closed + 1) if closed >= 0 else (len(text), len(marks))
    if not thoughts:
        return "", text
    rest = kept + text[at:] if kept else text[at:].lstrip()
    if any(mark.lastgroup == "channel" for mark in marks):
        rest = _FINAL.sub("", rest)
    return "\n".join(filter(None, map(str.strip, thoughts))), rest


def _end(marks: Sequence[re.Match[str]], begin: int, way: str) -> int:
    """Return which of `marks` closes a block of that way; -1 where none does.

    A thought that speaks of its own mark opens more than it closes: its end is the last that there is.
    """
    depth, last = 1, -1
    for number in range(begin, len(marks)):
        if marks[number].lastgroup == way and way != "channel":
            depth += 1
        elif marks[number].lastgroup == f"{way}_end":
            depth, last = depth - 1, number
            if not depth:
                break
    return last
