"""Runs as tables."""
import csv
import json
import sys

import pytest

from evaluation.__main__ import main
from tests.evaluation.whole import KEY, attempts, run
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
