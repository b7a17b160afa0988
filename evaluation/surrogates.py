"""Halves of characters: JSON can spell a lone surrogate (`"\\ud83d"`), which no UTF-8 and so no request and no file can."""
import json
import re
from typing import Any

LONE = re.compile("[\ud800-\udfff]")  # json joins pairs, so what is left of them is alone


def replaced(value: Any) -> Any:
    """Return `value`, of JSON, with U+FFFD for each lone surrogate in its texts."""
    if isinstance(value, str):
        return LONE.sub("\ufffd", value)
    if isinstance(value, list):
        return [replaced(one) for one in value]
    if isinstance(value, dict):
        return {replaced(key): replaced(one) for key, one in value.items()}
    return value


def loads(data: bytes) -> Any:
    r"""Return the JSON value in `data` without lone surrogates.

    Only a `\ud` in it can spell one, so that what has none is not looked through.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        value = json.loads(data)
        return replaced(value) if b"\\ud" in data or b"\\uD" in data else value
    except RecursionError:
        raise ValueError("nested too deeply") from None
