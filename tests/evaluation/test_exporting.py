"""Runs as tables."""
import csv
import json
import os
import subprocess
import sys

import pytest

from evaluation.__main__ import main
from tests.evaluation.whole import KEY, attempts, run
from tests.fixtures.servers import ROOT
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


WILD = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "a\r\nb,\"c\"", "half \ud83d", "\u2028\x00", " =1", "1" * 400, "-", ""]


def hostile(folder):
    """The run's first attempt with answers that a table may stumble over, and fields of a later version."""
    lines = attempts(folder)
    lines[0]["turns"] = [{"completion": text, "action": text, "observation": text, "reward": -1.5} for text in WILD]
    lines[0].update(later={"a": [1, "=x"]}, huge=10**30)
    (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines[0]["index"]


def test_no_text_in_a_csv_is_a_formula_and_none_is_lost_elsewhere(played, tmp_path):
    first = hostile(played)
    for kind in ("csv", "jsonl"):
        assert main(["export", str(played), "--rows", "turns", "--format", kind, "--out", str(tmp_path / f"x.{kind}")]) == 0
        assert main(["export", str(played), "--format", kind, "--out", str(tmp_path / f"y.{kind}")]) == 0
    whole = [text.replace("\ud83d", "\ufffd") for text in WILD]
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["item"].endswith(str(first))]
    assert not any(value.startswith(("=", "+", "@", "\t", "\r")) for row in rows for value in row.values())
    assert [row["completion"].removeprefix("'") for row in rows] == whole and {row["reward"] for row in rows} == {"-1.5"}
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_bytes().split(b"\n") if line]
    assert [line["completion"] for line in lines if line["item"] == rows[0]["item"]] == whole
    with (tmp_path / "y.csv").open(newline="", encoding="utf-8") as file:
        later = next(row for row in csv.DictReader(file) if row["later"])
    assert json.loads(later["later"]) == {"a": [1, "=x"]} and later["huge"] == "1" + "0" * 30


@pytest.mark.slow  # it gets pyarrow, which nothing else here needs
@pytest.mark.timeout(900)
def test_parquet_has_the_rows_of_the_other_formats(played, tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path / "site"), "pyarrow"], check=True, capture_output=True, timeout=600)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "site")])}

    def python(*words):
        return subprocess.run([sys.executable, *words], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)

    def exported(rows, kind):
        return python("-m", "evaluation", "export", str(played), "--rows", rows, "--format", kind, "--out", f"{rows}.{kind}")

    hostile(played)
    for kind in ("parquet", "jsonl"):
        assert exported("turns", kind).returncode == 0
    read = python("-c", "import json, pyarrow.parquet as all; print(json.dumps(all.read_table('turns.parquet').to_pylist()))")
    lines = [json.loads(line) for line in (tmp_path / "turns.jsonl").read_bytes().split(b"\n") if line]
    assert json.loads(read.stdout) == lines and len(lines) == len(WILD) + 6
    done = exported("attempts", "parquet")
    assert done.returncode == 2 and "cannot hold the column huge" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "attempts.parquet").exists()


def test_parquet_without_its_library_is_one_line(played, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert main(["export", str(played), "--format", "parquet", "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "pip install pyarrow" in error and error.count("\n") == 1 and not (tmp_path / "x").exists()
    assert "pyarrow" not in sys.modules


def test_no_run_is_one_line(tmp_path, capsys):
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "x")]) == 2 and "no run in" in capsys.readouterr().err


def test_figures_go_to_wandb_by_its_own_client(played, tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    seen = {}
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    log = wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", lambda self, data, *rest, **named: (seen.update(data, of=(self.project, self.name)), log(self, data, *rest, **named)))
    assert main(["export", str(played), "--to", "wandb", "--project", "mine"]) == 0
    assert seen["success"] == pytest.approx(2 / 3) and seen["success/low"] < 2 / 3 < seen["success/high"] and seen["attempts"] == 3.0
    assert list(tmp_path.glob("wandb/offline-run-*")) and "out: figures to wandb, project mine" in capsys.readouterr().out
    assert KEY not in "".join(path.read_text(errors="replace") for path in tmp_path.rglob("offline-run-*/**/*") if path.is_file())


@pytest.mark.parametrize("kind", ["trackio", "mlflow"])
def test_figures_go_where_the_tracker_s_own_client_is(kind, played, tmp_path, monkeypatch):
    """A stand-in for the client; what the real ones take was tried by hand."""
    said = tmp_path / "said"
    body = f"import json\ndef note(*rest, **named):\n    open({str(said)!r}, 'a').write(json.dumps([rest, named], default=str) + '\\n')\n"
    names = ("init", "log", "finish") if kind == "trackio" else ("set_experiment", "log_params", "log_metrics")
    body += "".join(f"{name} = note\n" for name in names)
    body += "import contextlib\n@contextlib.contextmanager\ndef start_run(**named):\n    note('run', **named)\n    yield\n"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / f"{kind}.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, kind, raising=False)
    assert main(["export", str(played), "--to", kind]) == 0
    told = said.read_text()
    assert "agentgym-eval" in told and '"success": 0.6666' in told and '"outcomes/success": 2.0' in told and "stand-in" in told
    monkeypatch.delitem(sys.modules, kind, raising=False)


def test_a_tracker_that_is_not_installed_or_fails_is_one_line(played, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert main(["export", str(played), "--to", "mlflow"]) == 2
    assert "`pip install mlflow`" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "trackio.py").write_text("def init(**named):\n    raise OSError('no\\nnetwork')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    assert main(["export", str(played), "--to", "trackio"]) == 1
    said = capsys.readouterr().err
    assert "trackio failed with out: no network" in said and said.count("\n") == 1
    assert main(["export", str(played), "--to", "trackio", "--out", "x"]) == 2
    assert main(["export", str(played)]) == 2
