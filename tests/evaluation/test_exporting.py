"""Runs as tables."""
import csv
import json
import sys

import pytest

from evaluation.__main__ import main
from tests.evaluation.whole import attempts, run
from tests.fixtures.standins import completion, counter_player, endpoint, environment


@pytest.fixture
def played(tmp_path):
    say = lambda messages, body: completion(counter_player(messages, body), refusal="a,\"b\"\n\u2028c")  # noqa: E731
    with environment() as env, endpoint(say) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-2") == 0
    return tmp_path / "out"


@pytest.mark.parametrize("rows,count", [("attempts", 3), ("turns", 9)])
def test_every_attempt_and_every_turn_is_a_row(rows, count, played, tmp_path, capsys):
    for kind in ("csv", "jsonl"):
        assert main(["export", str(played), "--rows", rows, "--format", kind, "--out", str(tmp_path / "new" / f"x.{kind}")]) == 0
        assert f"{count} {rows}: " in capsys.readouterr().out
    with (tmp_path / "new" / "x.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "new" / "x.jsonl").read_text().splitlines()]
    assert len(table) == len(lines) == count and {row["model"] for row in table} == {"stand-in"}
    assert [row["item"] for row in table] == [line["item"] for line in lines]
    if rows == "attempts":
        records = {one["item"]: one for one in attempts(played)}
        for row, line in zip(table, lines, strict=True):
            record = records[row["item"]]
            assert (row["outcome"], float(row["reward"]), line["tokens_prompt"]) == (record["outcome"], record["reward"], record["usage"]["prompt"])
    else:
        assert [line["turn"] for line in lines] == [1, 2, 3] * 3 and {row["refusal"] for row in table} == {"a,\"b\"\n\u2028c"}
        assert lines[0]["tokens_prompt"] == 10 and lines[0]["completion"] == "add"


def test_parquet_without_its_library_is_one_line(played, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert main(["export", str(played), "--format", "parquet", "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "pip install pyarrow" in error and error.count("\n") == 1 and not (tmp_path / "x").exists()
    assert "pyarrow" not in sys.modules


def test_no_run_is_one_line(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "x")]) == 2 and "no run in" in capsys.readouterr().err
