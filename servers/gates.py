"""What passes of what strangers send: JSON within bounds, and text that may be printed.

One gate for both directions: requests to a server (servers/sessions.py), and answers of one (servers/protocol.py). A
request that does not pass is that request's fault alone.
"""
import json
import math
import os
import re
from typing import Any, Dict, List, Tuple

DEPTH = 100  # levels of lists and tables; the deepest answer of AgentGym's servers has three
DIGITS = 400  # of an integer; a float has at most 309 before its point
VALUES = 2_000_000  # in one document, by its marks; a value of three bytes may take 200 in memory
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def limit(name: str, default: int) -> int:
    """Return the number of the variable `name`, or `default` where it is unset.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"[1-9][0-9]{0,14}", text, re.ASCII):
        raise ValueError(f"{name}={text[:60]!a} is no whole number of at least 1; leave it out for {default}")
    return int(text)


class Refused(ValueError):
    """JSON that is valid, or may be, and is not read: too deep, too many digits, one key twice, no number."""


def _table(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Refused("one key is there twice")
    return found


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise Refused(f"a number has more than {DIGITS} digits")
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise Refused("a number is too large")
    return number


def _constant(name: str) -> Any:
    raise Refused(f"{name} is no number")


# Made once: making one costs as much as reading a step. What is short has no number of too many digits.
_SHORT = json.JSONDecoder(object_pairs_hook=_table, parse_float=_float, parse_constant=_constant)
_LONG = json.JSONDecoder(object_pairs_hook=_table, parse_int=_integer, parse_float=_float, parse_constant=_constant)


def depth(body: bytes) -> int:
    """Return how many levels of lists and tables `body` opens at most, whether or not it is JSON."""
    if body.count(b"[") + body.count(b"{") <= DEPTH:  # the usual case: without a look at each
        return min(body.count(b"[") + body.count(b"{"), DEPTH)
    level = deepest = 0
    for mark in re.findall(rb"[\[\]{}]", _STRINGS.sub(b"", body)):
        level += 1 if mark in b"[{" else -1
        deepest = max(deepest, level)
    return deepest


def loads(body: bytes) -> Any:
    """Return the JSON value of `body`.

    Raises:
        Refused: it is not read, whether or not it is JSON.
        ValueError: it is no JSON.
    """
    if len(body) > VALUES and sum(map(body.count, (b"[", b"{", b",", b":"))) > VALUES:
        raise Refused(f"more than {VALUES} values")
    if depth(body) > DEPTH:
        raise Refused(f"more than {DEPTH} levels deep")
    # As json.loads reads bytes, which is how the applications read theirs: one reading, not two.
    text = body.decode(json.detect_encoding(body), "surrogatepass")
    try:
        return (_SHORT if len(text) <= DIGITS else _LONG).decode(text)
    except RecursionError:
        raise Refused("nested too deep") from None


def shown(value: Any, width: int = 200) -> str:
    """Return foreign text, or a JSON value, on one line of at most `width` characters that only shows itself.

    Control, escape and bidirectional characters, line ends and lone surrogates are escaped as JSON escapes them.
    """
    if not isinstance(value, str):
        try:
            value = json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            value = repr(type(value))
    text = value[:width + 1]
    if not text.isprintable():
        text = "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in text)
    return text if len(text) <= width else text[:width - 1] + "…"
