"""Text for messages of one line."""
import json
from typing import Any


def short(value: Any, width: int = 200) -> str:
    """Return `value` as JSON, cut to `width` characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= width else text[:width - 1] + "…"
