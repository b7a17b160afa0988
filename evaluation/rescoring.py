"""Another rule for a run that was played: success and scaled reward again, from the rewards of its steps.

    rule.json   in a run's folder: the row that `rescore --environments` took; report, compare, conversations and list
                go by it, until the run is played on or rescored by its own
"""
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evaluation import foreign
from evaluation.attempts import Attempt, Outcome
from evaluation.problems import Misuse, Stopped
from evaluation.records import RULE, read_attempts, read_run, write_whole
from evaluation.rows import Row, results_depend_on


def keep_rule(folder: Path, row: Row | None) -> None:
    """Let the run in `folder` be counted by `row`; None is by its own.

    Raises:
        Stopped: it cannot be noted.
    """
    path = folder / RULE
    try:
        if row is None:
            path.unlink(missing_ok=True)
        else:
            write_whole(path, json.dumps(row.to_json(), indent=1) + "\n")
    except OSError as error:
        raise Stopped(f"{path} cannot be written: {error.strerror}; make room and run `rescore` again") from None


def reward_of(record: Attempt, row: Row) -> float:
    """Return the episode's reward as `row` counts it: the last step's, or the best."""
    reward = 0.0
    for turn in record["turns"]:
        if "reward" in turn:
            reward = row.success.counts(reward, turn["reward"])
    return reward


def rescored(records: Iterable[Attempt], row: Row) -> list[Attempt]:
    """Return the records with reward, success and scaled reward as `row` says.

    A success that the rule undoes becomes a failure, also where the episode had reached its last round.
    """
    found = []
    for record in records:
        if record["reward"] is not None:
            reward = reward_of(record, row)
            success, outcome = row.success.holds(reward), record["outcome"]
            record = {
                **record, "reward": reward,
                "success": success,
                "scaled": row.scaled(reward),
                "outcome": Outcome.SUCCESS if success else Outcome.FAILURE if outcome == Outcome.SUCCESS else outcome
            }
        found.append(record)
    return found


def read_rule(folder: Path) -> Row | None:
    """Return the row that the run in `folder` was rescored by; None where that is its own.

    Raises:
        Misuse: the file is damaged.
    """
    path = folder / RULE
    try:
        return Row.read(foreign.read_json(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Misuse(f"{path} cannot be read ({str(error).splitlines()[0]}); run `rescore` again") from None


def read_scored(folder: Path) -> list[Attempt]:
    """Return the attempts of a run's folder, by the rule that it was rescored by, if it was.

    Raises:
        Misuse: a file is damaged.
    """
    records, row = read_attempts(folder), read_rule(folder)
    return records if row is None else rescored(records, row)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return run.json, with the rule that the run was rescored by in its configuration, so that a comparison shows it.

    Raises:
        Misuse: a file is damaged.
    """
    manifest, row = read_run(folder), read_rule(folder)
    if row is not None:
        manifest["config"]["row"] = results_depend_on(row)
    return manifest
