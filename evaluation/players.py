"""Scripted players, for environments that bring some: they need no model, key or network.

An environment of this repository may have a module `players` in its package, with `expert(observation) -> action` and
`random_player(seed) -> (observation -> action)`; `--model expert` and `--model random` play with them. `--model check` plays
the row's own action of `env.check` in any environment: it shows that an evaluation works there.
"""
import importlib
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation.actions import phrase
from evaluation.model import Completion, Message
from evaluation.problems import Misuse
from evaluation.rows import Row

NAMES = ("expert", "random", "check")


def load(row: Row, root: Path) -> types.ModuleType:
    """Return the players' module of `row`, whose package folder lies under `root`.

    Raises:
        Misuse: the environment has none.
    """
    package = root / row.folder / row.app.partition(":")[0]
    if row.source != "project" or not (package / "players.py").is_file():
        raise Misuse(f"{row.name} has no scripted players (expert, random); name a model of an endpoint with --model")
    # The package's own __init__ imports its server, which needs a web framework: the players do not.
    name = f"players_of_{row.name.replace('-', '_')}"
    parent = types.ModuleType(name)
    parent.__path__ = [str(package)]
    sys.modules[name] = parent
    return importlib.import_module(f"{name}.players")


class Script:
    """One attempt of a scripted player."""

    def __init__(self, act: Callable[[str], str], rule: str) -> None:
        self.act, self.rule = act, rule

    async def reply(self, messages: Sequence[Message]) -> Completion:
        """Return the script's action for the last observation, in the form that the row's rule reads."""
        return Completion(phrase(self.rule, self.act(messages[-1]["content"])), finish="stop")


class ScriptedModel:
    """`expert`, `random` or `check`."""
    answered = True  # a script refuses nothing
    refused = ()
    adjusted: Sequence[str] = ()

    def __init__(self, name: str, row: Row, root: Path) -> None:
        self.name, self.rule = name, row.action
        if name == "check":
            if row.check is None:
                raise Misuse(
                    f"{row.name} has no check.action in its row, which --model check plays; name another model")
            self.action = row.check.action
        else:
            self.module = load(row, root)

    def player(self, item: int, sample: int, seed: int | None) -> Script:
        """Return the attempt's player; random ones differ by item and sample."""
        if self.name == "check":
            return Script(lambda _: self.action, self.rule)
        if self.name == "expert":
            return Script(self.module.expert, self.rule)
        return Script(self.module.random_player(seed if seed is not None else item * 1000003 + sample), self.rule)

    async def aclose(self) -> None:
        """Nothing to close."""
