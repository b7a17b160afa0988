"""A run's folder that somebody handed on: nothing outside it is written, nothing in it hangs whoever reads it or fills the memory."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.__main__ import main
from tests.evaluation.whole import run
from tests.fixtures.standins import counter_player, endpoint, environment

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = [".lock", "attempts.jsonl", "sessions.jsonl", "run.json.new", "summary.json.new", "report.html.new", "live.json.new"]
KEPT = "a file\nof mine"


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A run of four items, and how to go on with a copy of it."""
    folder = tmp_path_factory.mktemp("run") / "out"
    with environment() as env, endpoint(counter_player) as model:
        go_on = lambda folder, items: run(folder, env.url, model.base_url, "--items", items)  # noqa: E731
        assert go_on(folder, "0-3") == 0
        yield folder, go_on


def handed_on(played, tmp_path):
    folder = tmp_path / "runs" / "out"
    shutil.copytree(played[0], folder)
    return folder


@pytest.mark.parametrize("name", WRITTEN)
def test_a_link_in_the_folder_is_not_written_through(played, name, tmp_path, capsys):
    folder, outside = handed_on(played, tmp_path), tmp_path / "outside"
    outside.write_text(KEPT)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    status = played[1](folder, "0-5")
    told = capsys.readouterr().err
    assert outside.read_text() == KEPT
    if name.endswith(".new"):
        assert status == 0 and not (folder / name).exists()
    else:
        assert status == 2 and f"{folder / name} " in told and "it is a link" in told and ("remove it" in told or "restore the file" in told), told


@pytest.mark.parametrize("items", ["0-5", "0-1"], ids=["which goes on", "which is refused"])
def test_a_folder_put_aside_that_is_a_link_keeps_what_it_leads_to(played, items, tmp_path, capsys):
    folder, outside = handed_on(played, tmp_path), tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text(KEPT)
    (folder / ".before").symlink_to(outside)
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir() if path.is_file())
    assert played[1](folder, items) == 2
    assert f"{folder / '.before'} is a link; remove it" in capsys.readouterr().err
    assert [path.name for path in outside.iterdir()] == ["mine"]
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir() if path.is_file()) == before


@pytest.mark.parametrize("name", ["summary.json.new", "report.html.new"])
def test_nor_when_it_is_counted_again(played, name, tmp_path):
    folder, outside = handed_on(played, tmp_path), tmp_path / "outside"
    outside.write_text(KEPT)
    (folder / name).symlink_to(outside)
    assert main(["rescore", str(folder)]) == 0 and outside.read_text() == KEPT


@pytest.mark.parametrize("name", ["attempts.jsonl", "sessions.jsonl", ".lock"])
def test_a_pipe_does_not_hang_a_run_that_is_taken_up(played, name, tmp_path, capsys):
    folder = handed_on(played, tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert played[1](folder, "0-5") == 2
    assert "no regular file" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["list", ".."], ["report", "."], ["rescore", "."], ["watch", ".", "--once"], ["conversations", ".", "--out", "x.jsonl"], ["export", ".", "--out", "x.csv"],
                                   ["compare", ".", "."], ["merge", ".", "../whole", "--out", "m"]], ids=lambda words: words[0])
@pytest.mark.parametrize("name,kind", [("attempts.jsonl", "a terabyte"), ("attempts.jsonl", "a pipe"), (".lock", "a pipe"), ("run.json", "a terabyte"), ("summary.json", "a terabyte")])
def test_no_reader_hangs_or_fills_the_memory(played, name, kind, words, tmp_path):
    folder = handed_on(played, tmp_path)
    if words[0] == "merge":
        shutil.copytree(folder, folder.with_name("whole"))
    (folder / name).unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(folder / name)
    else:
        with (folder / name).open("wb") as file:
            file.truncate(1 << 40)
    limited = ["prlimit", f"--as={3 << 30}", sys.executable, "-m", "evaluation", *words]
    asked = subprocess.run(limited, cwd=folder, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=120)
    assert asked.returncode in (0, 1, 2) and "Traceback" not in asked.stderr and "MemoryError" not in asked.stderr, asked.stderr
    if name == "attempts.jsonl":
        assert "attempts.jsonl" in asked.stdout + asked.stderr, (asked.stdout, asked.stderr)
