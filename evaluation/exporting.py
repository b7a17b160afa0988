"""Runs as tables: a row an attempt, or a row a turn, for whatever reads CSV, JSON lines or Parquet."""
import csv
import importlib.util
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.problems import Misuse
from evaluation.records import read_run
from evaluation.rescoring import read_scored
from evaluation.text import json_line

ROWS = ("attempts", "turns")
FORMATS = ("csv", "jsonl", "parquet")
OF_A_TURN = ("completion", "action", "observation", "reward", "reasoning", "finish", "refusal", "invalid", "seconds")


def attempts(folder: Path) -> Iterator[dict[str, Any]]:
    """Return a row for each attempt of a run: what it is of, how it ended, tokens and seconds; no words.

    Raises:
        Misuse: no run in `folder`, or a damaged one.
    """
    config = read_run(folder)["config"]
    for record in sorted(read_scored(folder), key=lambda one: (one["index"], one["sample"])):
        usage: Mapping[str, Any] = record["usage"]
        yield {
            "run": folder.name,
            "env": config["env"],
            "model": config["model"],
            **{
                key: value
                for key, value in record.items() if key not in ("usage", "turns", "tries_before", "first")
            },
            "outcome": str(record["outcome"]),
            **{
                f"tokens_{key}": usage[key]
                for key in ("prompt", "completion", "cached", "reasoning", "unknown")
            },
            "tries_before": len(record["tries_before"]),
        }


def turns(folder: Path) -> Iterator[dict[str, Any]]:
    """Return a row for each turn of a run.

    Raises:
        Misuse: no run in `folder`, or a damaged one.
    """
    config = read_run(folder)["config"]
    for record in sorted(read_scored(folder), key=lambda one: (one["index"], one["sample"])):
        for number, one in enumerate(record["turns"], 1):
            turn: Mapping[str, Any] = one
            known = turn.get("tokens") or (None, None)
            yield {
                "run": folder.name,
                "env": config["env"],
                "model": config["model"],
                "item": record["item"],
                "sample": record["sample"],
                "turn": number,
                **{
                    key: turn.get(key)
                    for key in OF_A_TURN
                },
                "tokens_prompt": known[0],
                "tokens_completion": known[1],
            }


def table(rows: Sequence[Mapping[str, Any]], kind: str) -> bytes:
    """Return rows as a file of the format `kind`; a column that some rows lack is empty in them.

    Raises:
        Misuse: Parquet, and there is no pyarrow.
    """
    if kind == "jsonl":
        return "".join(json_line(row) + "\n" for row in rows).encode("utf-8", "backslashreplace")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if kind == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode("utf-8", "backslashreplace")
    if importlib.util.find_spec("pyarrow") is None:
        raise Misuse("export: Parquet needs pyarrow, which this Python has not; `pip install pyarrow`, or --format csv")
    import pyarrow
    import pyarrow.parquet
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({key: [row.get(key) for row in rows] for key in columns}), file)
    return file.getvalue()
