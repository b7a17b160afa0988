"""Hydra's overrides, `key=value`: read by Hydra's own grammar, quoted for it, and put over one another.

Hydra (hydra-core, the release that the training image pins) takes 0.2 s to import: tasks import it inside functions.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from tasks.lib.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.overrides_parser import OverridesParser

# What the trainer reads and its ppo_trainer.yaml does not have, so that Hydra asks for a + (utils/agent_dataset/rl_dataset.py,
# agent_trainer/ppo/ray_trainer.py).
ABSENT = ("data.seed", "data.truncation", "data.cache_dir", "data.filter_overlong_prompts",
          "data.filter_overlong_prompts_workers", "data.return_full_prompt", "data.chat_template_func",
          "data.need_tools_kwargs", "data.filter_prompts")


@dataclass(frozen=True)
class Override:
    """One override.

    Attributes:
        key: such as data.train_batch_size.
        text: its value as Hydra is to read it; None where the key is deleted.
        sign: "", "+", "++" or "~".
        value: what Hydra reads: a number, text, a list, …
    """
    key: str
    text: str | None
    sign: str = ""
    value: Any = None

    def __str__(self) -> str:
        return f"{self.sign}{self.key}" if self.text is None else f"{self.sign}{self.key}={self.text}"


@cache
def _parser() -> OverridesParser:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    return OverridesParser.create()


def read(text: str) -> Any:
    """Return what Hydra reads from the value `text`.

    Raises:
        ValueError: it refuses it, or would make several runs of it (a sweep).
    """
    from hydra.errors import HydraException
    try:
        found = _parser().parse_override(f"k={text}")
    except HydraException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    if found.is_sweep_override():
        raise ValueError("it stands for several values")
    return _plain(found.value())


def _plain(value: Any) -> Any:
    """Return `value` with text in place of Hydra's quoted strings."""
    from hydra.core.override_parser.types import QuotedString
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(one) for key, one in value.items()}
    return value


def quote(value: str) -> str:
    """Return the text from which Hydra reads the string `value`, as it is where that will do.

    In quotes a backslash matters before a quote, before `${` (an interpolation) and at the end alone.
    """
    try:
        if read(value) == value and isinstance(read(value), str) and "${" not in value and not value.startswith("'"):
            return value
    except ValueError:
        pass
    inner = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)
    inner = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", inner)
    inner = re.sub(r"(\\+)\Z", lambda found: found[1] * 2, inner)
    return f"'{inner}'"


def write(value: Any) -> str:
    """Return the text from which Hydra reads `value`: text, a number, a truth value, None, or a list of these."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, Sequence):
        return "[" + ",".join(map(write, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{quote(str(key))}:{write(one)}" for key, one in value.items()) + "}"
    return str(value)


def make(key: str, value: Any) -> Override:
    """Return the override that sets `key` to `value`."""
    text = write(value)
    return Override(key, text, "+" if key in ABSENT else "", value)


def parse(word: str, origin: str = "after --") -> Override:
    """Return the override that the user wrote as `word`; a value that Hydra would refuse is quoted.

    Args:
        word: such as data.train_batch_size=8, +data.seed=3 or ~critic.optim.
        origin: where it stands, for the message.

    Raises:
        UserError: it is no override.
    """
    found = re.fullmatch(r"(\+\+|\+|~)?([A-Za-z_][\w./@:-]*)(?:=(.*))?", word, re.DOTALL)
    if not found or (found[3] is None and found[1] != "~"):
        raise UserError(f"{word!r} {origin} is no override; write key=value, such as data.train_batch_size=8")
    sign, key, text = found[1] or "", found[2], found[3]
    if sign == "" and key in ABSENT:
        sign = "+"
    if text is None:
        return Override(key, None, sign)
    try:
        return Override(key, text, sign, read(text))
    except ValueError:
        quoted = quote(text)
    try:
        return Override(key, quoted, sign, read(quoted))
    except ValueError as error:
        raise UserError(f"{word!r} {origin}: Hydra cannot read its value: {error}") from None


def layer(*layers: Iterable[Override]) -> list[Override]:
    """Return the layers as one list: of a key the last override, at the place of the first.

    A later plain `key=` over a `+key=` keeps the plus, without which Hydra would not know the key.
    """
    found: dict[str, Override] = {}
    for override in (one for some in layers for one in some):
        before = found.get(override.key)
        if before and before.sign == "+" and override.sign == "":
            override = replace(override, sign="+")
        found[override.key] = override
    return list(found.values())


def settings(overrides: Iterable[Override], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the trainer would read, by dotted key, as far as `defaults` (its yaml's own) and `overrides` say."""
    found = dict(defaults)
    for one in overrides:
        if one.text is None:
            found.pop(one.key, None)
        else:
            found[one.key] = one.value
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration by dotted keys; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
