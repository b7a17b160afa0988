"""The words that a model is given before the first observation.

AgentGym keeps them as literals in its client classes (agentenv/agentenv/envs/*.py). They are read from its source tree
with `ast`, because importing it needs torch: so a result can be compared with upstream's word for word, and nothing of
upstream is kept here. Where there is no source, our own plain prompt is used, and the result says so.
"""
import ast
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from evaluation import foreign
from evaluation.problems import Misuse, reason
from evaluation.rows import Row

ENVS = Path("agentenv") / "agentenv" / "envs"
COLLECTED = Path(__file__).resolve().parents[1] / "prompts.json"  # written when the image is built
VOCABULARY = "{{vocab}}"

FORMATS = {
    "raw": "Reply in the form that the task asks for.",
    "one_action_line": "Think first, then write one line that begins with `Action:` and holds exactly one action.",
    "after_first_action": "Think first, then write `Action:` and after it exactly one action, and nothing more.",
    "after_last_action": "Think first, then write `Action:` and after it exactly one action, and nothing more.",
    "sql_block": "Think first, then write one SQL statement in a block that begins with ```sql and ends with ```.",
    "backticks": "Think first, then write exactly one action between triple backticks (```).",
    "whole_line": "Write exactly one action, alone on the last line of your reply.",
}


class Prompt(BaseModel):
    """What surrounds the observations of one environment.

    Attributes:
        source: agentgym (read from its source), row (the row's own text), file (--prompt) or plain (ours).
        place: where in the source.
        revision: the source's commit, or unknown.
        user, assistant: the two messages before the first observation; no assistant message where it is empty.
        before_first: put before the first observation.
        first: stands in place of the first observation; `{{vocab}}` in it is the server's vocabulary.
        refusal: what a model is told when its completion is refused without asking the server.
        actions_label: put between the first observation and the actions that the server lists with it.
    """
    model_config = ConfigDict(frozen=True)
    source: Literal["agentgym", "row", "file", "plain"]
    place: str = ""
    revision: str = ""
    user: str
    assistant: str = "OK."
    before_first: str = ""
    first: str = ""
    refusal: str = "No single action was found in your reply. Give exactly one."
    actions_label: str = "\nAvailable actions: "

    def sha256(self) -> str:
        """Return a digest of all words; the same words have the same one wherever they were read."""
        words = self.model_dump(exclude={"source", "place", "revision"})
        return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def literal(node: ast.expr | None) -> str | None:
    """Return the text of a string literal, `.strip()` applied to it or not; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func,
                                                 ast.Attribute) and node.func.attr == "strip" and not node.args:
        text = literal(node.func.value)
        return None if text is None else text.strip()
    return None


def _assigned(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for statement in body:
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if isinstance(target, ast.Name):
                yield target.id, statement.value


def _messages(node: ast.expr) -> list[str] | None:
    """Return the two texts of a conversation's start, a tuple of calls that take one dictionary each."""
    if isinstance(node, ast.Dict):  # by action format; the benchmark's own is the thought followed by the action
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Attribute) and key.attr == "REACT":
                return _messages(value)
        return None
    if not isinstance(node, ast.Tuple):
        return None
    texts = []
    for call in node.elts:
        if not (isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Dict)):
            return None
        fields = {literal(key): value for key, value in zip(call.args[0].keys, call.args[0].values, strict=True)}
        text = literal(fields.get("value"))
        if text is None:
            return None
        texts.append(text)
    return texts if len(texts) == 2 else None


def _refusal(owner: ast.ClassDef) -> str | None:
    """Return the text with which the client's `step` answers in the server's place."""
    for node in ast.walk(owner):
        if isinstance(node, ast.FunctionDef) and node.name == "step":
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "StepOutput":
                    for keyword in call.keywords:
                        text = literal(keyword.value)
                        if keyword.arg == "state" and text is not None:
                            return text
    return None


def _actions_label(tree: ast.Module) -> str | None:
    """Return the text before the available actions in the client's first observation."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for before, after in zip(node.values, node.values[1:], strict=False):
                text = literal(before)
                if text is not None and isinstance(after,
                                                   ast.FormattedValue) and "available_actions" in ast.dump(after):
                    return text
    return None


def read_class(source: str, name: str) -> dict[str, str]:
    """Return the prompt's texts in the class `name` of Python source, by the names of `Prompt`.

    Raises:
        ValueError: there is no such class, or no conversation in it.
    """
    tree = ast.parse(source)
    owner = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if owner is None:
        raise ValueError(f"no class {name}")
    found = dict(_assigned(owner.body))
    start = found.get("conversation_start") or found.get("conversation_start_dict")
    messages = _messages(start) if start is not None else None
    if messages is None:
        raise ValueError(f"no conversation's start in class {name}")
    texts = {"user": messages[0], "assistant": messages[1]}
    before = literal(found.get("_fully_first_observation"))
    optional = {
        "before_first": None if before is None else before + "\n",
        "first": literal(found.get("first_observation")),
        "refusal": _refusal(owner),
        "actions_label": _actions_label(tree),
    }
    return {**texts, **{key: text for key, text in optional.items() if text is not None}}


def revision(checkout: Path) -> str:
    """Return the checkout's commit, or unknown."""
    try:
        said = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"],
                              capture_output=True,
                              text=True,
                              check=False)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"


def from_checkout(row: Row, checkout: Path) -> Prompt:
    """Return the prompt of `row` in an AgentGym checkout.

    Raises:
        Misuse: it is not there.
    """
    place = ENVS / row.prompt.file
    try:
        texts = read_class(foreign.read_text(checkout / place), row.prompt.class_)
    except (OSError, ValueError, RecursionError, MemoryError,
            SyntaxError) as error:  # the last where a merge left its marks
        why = reason(error).replace("<unknown>, ", "")
        raise Misuse(f"no prompt of {row.name} in {checkout / place}: {why}; "
                     "point --agentgym at the root of an AgentGym checkout, or pass --plain-prompt") from None
    return Prompt(source="agentgym", place=f"{place}:{row.prompt.class_}", revision=revision(checkout), **texts)


def plain(row: Row) -> Prompt:
    """Return our own prompt: the row's text where it has one, else what can be said of any environment."""
    about = row.prompt.text or f"You act in an environment: {row.title}."
    user = (f"{about}\nEvery round you are given an observation and reply with one action. {FORMATS[row.action]}")
    return Prompt(source="row" if row.prompt.text else "plain",
                  place="environments.toml" if row.prompt.text else "",
                  user=user)


def from_file(path: Path) -> Prompt:
    """Return the prompt that the user wrote.

    Raises:
        Misuse: it cannot be read.
    """
    try:
        text = foreign.read_text(path).strip()
    except (OSError, ValueError) as error:
        raise Misuse(f"--prompt {path} cannot be read: {reason(error)}; name a text file with the model's instructions"
                     ) from None
    if not text:
        raise Misuse(f"--prompt {path} is empty; write the model's instructions into it")
    return Prompt(source="file", place=path.name, user=text)


def collect(rows: list[Row], checkout: Path) -> dict[str, Any]:
    """Return the prompts of all `rows` that AgentGym has, by environment: what the image is built with.

    Raises:
        Misuse: one is missing.
    """
    return {row.name: from_checkout(row, checkout).model_dump() for row in rows if row.prompt.file}


def find(row: Row,
         checkout: str = "",
         file: str = "",
         force_plain: bool = False,
         collected: Path = COLLECTED) -> Prompt:
    """Return the prompt of `row`: --prompt, --plain-prompt, --agentgym or $AGENTGYM_SRC, the image's, then our own.

    Raises:
        Misuse: what was asked for by flag is not there.
    """
    if file:
        return from_file(Path(file))
    if force_plain or not row.prompt.file:
        return plain(row)
    if checkout:
        return from_checkout(row, Path(checkout))
    told = Path(os.environ.get("AGENTGYM_SRC") or ".")  # a URL, which it may also be, is no folder
    if (told / ENVS / row.prompt.file).is_file():
        return from_checkout(row, told)
    try:
        found = Prompt(**foreign.read_json(collected)[row.name])
        # The image's build knows the source's commit after the prompts are read, or the layer would never be reused.
        known = os.environ.get("AGENTGYM_REVISION", "")
        return found if found.revision != "unknown" or not known else found.model_copy(update={"revision": known})
    except (OSError, ValueError, KeyError, TypeError):
        return plain(row)
