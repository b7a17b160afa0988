"""Conversations out of a run's records: what a model can be trained on."""
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evaluation.attempts import Attempt
from evaluation.episodes import opening
from evaluation.problems import Misuse
from evaluation.prompts import Prompt
from evaluation.records import RUN, read_run
from evaluation.rescoring import read_scored
from evaluation.text import json_line


def conversation(prompt: Prompt, record: Attempt) -> list[dict[str, Any]]:
    """Return what was said in an attempt, up to the model's last answer.

    What the prompt lays into the model's mouth has the weight 0, as fine-tuning services take it.
    """
    messages: list[dict[str, Any]] = [{
        **message, "weight": 0
    } if message["role"] == "assistant" else message for message in opening(prompt, record["first"])]
    for turn in record["turns"]:
        messages += [{"role": "assistant", "content": turn["completion"]}]
        messages += [{"role": "user", "content": turn["observation"]}]
    return messages[:-1]


def lines(folder: Path, every: bool = False) -> Iterable[str]:
    """Return a JSON object for each attempt that was played to success, or for each that has a score.

    Its `messages` are the whole conversation, the form in which chat models are fine-tuned.

    Raises:
        Misuse: no run in `folder`, or a damaged one.
    """
    try:
        prompt = Prompt(**read_run(folder)["prompt"])
    except ValidationError as error:
        raise Misuse(f"{folder / RUN}: the prompt's {error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}; "
                     "restore the file") from None
    # By item: the order in which attempts end differs from run to run.
    for record in sorted(read_scored(folder), key=lambda one: (one["index"], one["sample"])):
        if record["turns"] and (record["success"] or (every and record["reward"] is not None)):
            told = {key: record[key] for key in ("item", "sample", "reward", "success")}
            yield json_line({"messages": conversation(prompt, record), **told})
