"""What a server says that its scores depend on beside the row is recorded, and never compared unsaid."""
import json
import shutil
from pathlib import Path

import pytest

from evaluation.__main__ import main
from tests.fixtures.servers import FIXTURE_ROWS, rows, running


def play(out: Path, url: str, *flags: str) -> int:
    return main([
        "run", "--env", "form-textcraft", "--environments",
        str(FIXTURE_ROWS), "--server", url, "--model", "check", "--max-round", "2", "--out",
        str(out), *flags
    ])


@pytest.fixture
def serving(tmp_path):
    """Return a context in which a server plays on data that says of itself what is given."""

    def serve(about):
        folder = tmp_path / "data"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "about.json").write_text(json.dumps(about))
        return running(rows()["form-textcraft"], tmp_path, True, "--data", str(folder))

    return serve


def test_what_a_run_was_played_on_is_recorded_and_another_is_refused(serving, tmp_path, capsys):
    out = tmp_path / "run"
    with serving({"data": "toy", "index": "hnsw"}) as client:
        assert client.sessions()["about"] == {"data": "toy", "index": "hnsw"}
        assert play(out, client.base, "--items", "0-1") == 0
    assert json.loads((out / "run.json").read_text())["about"] == {"data": "toy", "index": "hnsw"}
    assert "the server plays on data toy, index hnsw" in capsys.readouterr().out
    with serving({"index": "ivfpq"}) as client:
        assert play(out, client.base, "--items", "0-3") == 2
        said = capsys.readouterr()
        assert "was played on data toy, index hnsw, and the server now plays on index ivfpq; choose" in said.out + said.err
        assert len((out / "attempts.jsonl").read_text().splitlines()) == 2
        assert play(out, client.base, "--items", "0-3", "--fresh") == 0
    assert json.loads((out / "run.json").read_text())["about"] == {"index": "ivfpq"}


def test_runs_on_other_data_are_compared_by_names_that_say_so(serving, tmp_path, capsys):
    for name, about in (("real", {}), ("toy", {"data": "toy"})):
        with serving(about) as client:
            assert play(tmp_path / name, client.base, "--items", "0-1") == 0
    assert "about" not in json.loads((tmp_path / "real/run.json").read_text())
    capsys.readouterr()
    page = tmp_path / "compare.html"
    assert main(["compare", str(tmp_path / "real"), str(tmp_path / "toy"), "--out", str(page)]) == 0
    assert "[data toy]" in page.read_text() and "[the row's own data]" in page.read_text().replace("&#39;", "'")
