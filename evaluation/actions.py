"""What a completion means as an action, by the rule of the environment's row.

The rules are those of AgentGym's clients (agentenv/agentenv/envs/*.py), so that the same completion leads to the same
request; `whole_line` is our own, for environments of one's own.
"""
import re
from typing import NamedTuple

_ACTION_LINE = re.compile(r"Action:\s*([^\n]*)")
_NOT_IN_ACTION = re.compile(r"[^A-Za-z0-9, ]+")
_BACKTICKS = re.compile(r"```.*?```", re.DOTALL)
_SHOP_CALL = re.compile(r"search\[|click\[")
# Some servers leave the model's end mark in the text. AgentGym cuts five characters for these four, and so the last one
# of an action; here the mark is all that goes.
END_OF_TEXT = "</s>"


class Action(NamedTuple):
    """What to do with a completion.

    Attributes:
        text: the action to send; None where the completion is refused without asking the server.
        found: whether there was an action in the completion.
    """
    text: str | None
    found: bool


def parse(rule: str, completion: str) -> Action:
    """Return the action in `completion` by the row's `rule`."""
    if rule == "one_action_line":
        lines = _ACTION_LINE.findall(completion)
        if len(lines) > 1:
            return Action(None, False)
        line = " ".join(_NOT_IN_ACTION.sub("", lines[0]).split()) if lines else ""
        return Action(line, bool(line))
    if rule == "backticks":
        found = _BACKTICKS.search(completion) is not None
        return Action(completion if found else None, found)
    if rule == "sql_block":
        text = completion.split("```sql")[-1].split("```")[0].strip()
        return Action(text, bool(text) and "```sql" in completion)
    if rule == "whole_line":
        lines = [line.strip() for line in completion.splitlines() if line.strip()]
        return Action(lines[-1] if lines else "", bool(lines))
    if rule == "after_first_action":
        pieces = completion.removesuffix(END_OF_TEXT).split("Action:")
        text = pieces[1 if len(pieces) > 1 else 0].strip()
        return Action(text, bool(text) and len(pieces) > 1)
    if rule == "after_last_action":
        text = completion.removesuffix(END_OF_TEXT)
        _, mark, action = text.rpartition("Action:")
        if not mark:
            action = text if _SHOP_CALL.search(text) else ""
        return Action(action.strip(), bool(action.strip()))
    if rule == "raw":
        return Action(completion, bool(completion.strip()))
    raise ValueError(f"no rule {rule!r}")


def phrase(rule: str, action: str) -> str:
    """Return a completion that `parse` reads as `action`: what a scripted player says."""
    if rule in ("raw", "whole_line"):
        return action
    if rule == "sql_block":
        return f"```sql\n{action}\n```"
    if rule == "backticks":
        return f"```{action}```"
    return f"Thought:\nscripted\n\nAction:\n{action}"
