"""Runs as tables: a row an attempt, or a row a turn, for whatever reads CSV, JSON lines or Parquet."""
import csv
import importlib.util
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.problems import Misuse, reason
from evaluation.records import read_run
from evaluation.rescoring import read_scored
from evaluation.text import json_line

ROWS = ("attempts", "turns")
FORMATS = ("csv", "jsonl", "parquet")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what begins a formula in a spreadsheet (OWASP, CSV injection)
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


def _plain(value: Any) -> Any:
    """Return a cell of a table: a number or a text; what a later version nests is its JSON."""
    return value if value is None or isinstance(value, str | int | float) else json_line(value)


def _quoted(value: Any) -> Any:
    """Return a cell of CSV. Spreadsheets run a text that begins as a formula does, and models and servers say what they like."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def table(rows: Sequence[Mapping[str, Any]], kind: str) -> bytes:
    """Return rows as a file of the format `kind`; a column that some rows lack is empty in them.

    Raises:
        Misuse: Parquet, and there is no pyarrow, or a column that it cannot hold.
    """
    if kind == "jsonl":
        return "".join(json_line(row) + "\n" for row in rows).encode("utf-8", "backslashreplace")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [{key: _plain(value) for key, value in row.items()} for row in rows]
    if kind == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, columns, restval="")
        writer.writeheader()
        writer.writerows({key: _quoted(value) for key, value in row.items()} for row in cells)
        return out.getvalue().encode("utf-8", "backslashreplace")
    if importlib.util.find_spec("pyarrow") is None:
        raise Misuse("export: Parquet needs pyarrow, which this Python has not; `pip install pyarrow`, or --format csv")
    import pyarrow
    import pyarrow.parquet
    file = io.BytesIO()
    for key in columns:  # each by itself, so that the line can name it
        try:
            pyarrow.array([row.get(key) for row in cells])
        except (pyarrow.ArrowException, OverflowError) as error:
            raise Misuse(
                f"export: Parquet cannot hold the column {key} ({reason(error)}); take --format jsonl") from None
    pyarrow.parquet.write_table(pyarrow.table({key: [row.get(key) for row in cells] for key in columns}), file)
    return file.getvalue()
