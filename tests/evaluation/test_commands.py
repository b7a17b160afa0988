"""What is shown of runs afterwards."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from evaluation.__main__ import main
from tests.evaluation.whole import attempts, run, summary
from tests.fixtures.servers import FIXTURE_ROWS, ROOT
from tests.fixtures.standins import counter_player, endpoint, environment


def test_brackets_in_names_are_shown_as_they_are(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        for name in ("a[/b]", "[red]a"):
            assert run(tmp_path / "x[/y]" / name.replace("/", "-"), env.url, model.base_url, "--items", "0-1", "--model", name) == 0
    folders = sorted(map(str, (tmp_path / "x[/y]").iterdir()))
    assert main(["list", str(tmp_path / "x[/y]")]) == 0 and main(["compare", *folders, "--out", str(tmp_path / "both.html")]) == 0
    shown = capsys.readouterr().out
    assert "x[/y]" in shown and shown.count("a[/b]") >= 3 and shown.count("[red]a") >= 3


def test_a_list_that_is_piped_has_every_folder_and_model_whole(tmp_path, capsys):
    folder, model_name = "f" * 120, "organisation/" + "m" * 100
    with environment() as env, endpoint(counter_player) as model:
        assert run(tmp_path / folder, env.url, model.base_url, "--items", "0-1", "--model", model_name) == 0
    capsys.readouterr()
    assert main(["list", str(tmp_path)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if folder in line and model_name in line and "2 of 2" in line]


def test_a_comparison_of_checkpoints_draws_the_curve_over_their_steps(tmp_path):
    from tasks.lib.checkpoints import served_name
    with environment() as env, endpoint(counter_player) as model:
        for step in (100, 200):
            folder = tmp_path / f"saves/x/global_step_{step}/actor/huggingface"
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(b"x" * step)
            assert run(tmp_path / str(step), env.url, model.base_url, "--items", "0-1", "--model", served_name(folder)) == 0
    assert main(["compare", str(tmp_path / "200"), str(tmp_path / "100"), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert 'aria-label="Reward by training step: step 100: 50.0 %' in page and ", step 200: 50.0 %" in page and "training step</text>" in page


def test_a_rescored_run_is_shown_so_everywhere(tmp_path, capsys):
    folder = tmp_path / "runs" / "one"
    with environment() as env, endpoint(counter_player) as model:
        assert run(folder, env.url, model.base_url, "--items", "0-1") == 0
    easy = FIXTURE_ROWS.read_text().replace("success = { at_least = 1.0 }", "success = { at_least = 0.0 }")
    (tmp_path / "easy.toml").write_text(easy)
    assert main(["rescore", str(folder), "--environments", str(tmp_path / "easy.toml")]) == 0
    assert summary(folder)["success"]["mean"] == 1.0 and "100.0 %" in (folder / "report.html").read_text()
    capsys.readouterr()
    assert main(["list", str(tmp_path / "runs")]) == 0 and "100.0 %" in capsys.readouterr().out
    assert main(["conversations", str(folder), "--out", str(tmp_path / "talks")]) == 0
    assert len((tmp_path / "talks").read_text().splitlines()) == 2
    assert main(["report", str(folder)]) == 0 and "100.0 %" in (folder / "report.html").read_text()
    shutil.copytree(folder, tmp_path / "runs" / "two")
    capsys.readouterr()
    assert main(["compare", str(folder), str(tmp_path / "runs" / "two"), "--out", str(tmp_path / "both.html")]) == 0
    assert capsys.readouterr().out.count("100.0 %") >= 2
    assert main(["rescore", str(tmp_path / "runs" / "two")]) == 0
    capsys.readouterr()
    assert main(["compare", str(folder), str(tmp_path / "runs" / "two"), "--out", str(tmp_path / "both.html")]) == 0
    assert "row.success.at_least: was 0.0, is 1.0" in capsys.readouterr().out  # two rules are no small print
    told = json.loads((folder / "run.json").read_text())["config"]["base_url"]
    (folder / "attempts.jsonl").write_text("".join((folder / "attempts.jsonl").read_text().splitlines(True)[:1]))
    with environment() as env, endpoint(counter_player) as model:  # played on, it goes by its own rule
        assert run(folder, env.url, model.base_url, "--items", "0-1", "--base-url-as", told) == 0
    assert summary(folder)["success"]["mean"] == 0.5


def test_a_damaged_run_is_named_and_hides_no_other(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        assert run(tmp_path / "good", env.url, model.base_url, "--items", "0") == 0
    for name in ("torn", "odd", "empty"):
        shutil.copytree(tmp_path / "good", tmp_path / name)
    (tmp_path / "torn" / "run.json").write_text("{")
    (tmp_path / "odd" / "run.json").write_text('{"config": {}}')
    (tmp_path / "empty" / "summary.json").unlink()
    (tmp_path / "empty" / "attempts.jsonl").write_text("{}\n")
    capsys.readouterr()
    assert main(["list", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "good" in said.out and said.err.count("\n") == 3
    assert all(str(tmp_path / name) in said.err for name in ("torn", "odd", "empty"))


def test_files_go_into_new_folders_and_a_place_that_cannot_be_is_one_line(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0") == 0
    shown = capsys.readouterr().out
    assert re.search(r"prompt +│ (row|plain)", shown)
    assert main(["conversations", str(tmp_path / "out"), "--out", str(tmp_path / "new" / "talks.jsonl")]) == 0
    assert (tmp_path / "new" / "talks.jsonl").read_text().count("\n") == 1
    assert main(["conversations", str(tmp_path / "out"), "--out", str(tmp_path / "new" / "talks.jsonl" / "x")]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and error.count("\n") == 1
    before = sorted(tmp_path.iterdir())
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "is a folder" in error and error.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("where,code,told", [("| head -1", 0, ""), (">/dev/full", 0, "No space left on device"), (">&-", 0, "")])
def test_a_run_goes_on_when_nobody_reads_what_it_says(where, code, told, tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        words = f"run --env form-textcraft --environments {FIXTURE_ROWS} --server {env.url} --base-url {model.base_url} --items 0-7 --concurrency 1"
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} -m evaluation {words} --out {tmp_path / 'out'} {where}"],
                              env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=120)
        assert env.sessions == {}
    assert done.returncode == code and len(attempts(tmp_path / "out")) == 8 and (tmp_path / "out" / "report.html").exists()
    assert done.stderr.count("\n") == bool(told) and told in done.stderr


@pytest.mark.parametrize("where,code,told", [("| true", 1, ""), (">/dev/full", 1, "No space left on device"), (">&-", 0, "")])
def test_a_list_that_cannot_be_shown_is_no_traceback(where, code, told, tmp_path):
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} -m evaluation list {tmp_path} {where}"],
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code and done.stderr.count("\n") == bool(told) and told in done.stderr
