"""Scripted players."""
import re
from contextlib import suppress

from evaluation.__main__ import main
from evaluation.rows import read_row
from tests.fixtures.servers import ROOT

ROWS = ROOT / "environments.toml"

def row(name):
    return read_row(name, ROWS)


def test_the_players_of_an_environment_in_a_file_of_its_own_are_found(tmp_path, monkeypatch):
    own = ROOT / "environments" / "own-of-the-test.toml"
    monkeypatch.chdir(ROOT)
    own.parent.mkdir(exist_ok=True)
    demo = re.search(r"\[demo\].*?(?=\n\[(?!demo)|\Z)", ROWS.read_text(), re.DOTALL)[0]
    own.write_text(demo.replace("[demo", "[mine"))
    try:
        monkeypatch.setenv("ENVIRONMENTS", str(own))
        assert main(["run", "--env", "mine", "--model", "expert", "--check"]) == 0
    finally:
        own.unlink()
        with suppress(OSError):  # it holds somebody's own
            own.parent.rmdir()
