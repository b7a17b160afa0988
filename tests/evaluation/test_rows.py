"""The rows of environments.toml."""
import pytest

from evaluation.actions import parse
from evaluation.problems import Misuse
from evaluation.rows import read_row, rows_file
from tasks.lib.environments.rows import environments
from tests.fixtures.servers import ROOT

ROWS = ROOT / "environments.toml"

def row(name):
    return read_row(name, ROWS)


def test_every_rule_of_the_rows_is_known():
    for name, known in environments(ROWS).items():
        mine = row(name)
        parse(mine.action, "x")
        # The tasks read the file on their own: the two must not drift apart.
        assert mine.protocol == known.protocol
        assert mine.success == known.success and mine.reward_range == known.reward_range


@pytest.mark.parametrize("rows,message", [
    (b"demo = 1", r"rows.toml: demo is no table; a row begins with \[demo\]"),
    (b"[demo]\nname = 'mine'", r"rows.toml: demo.name: the table's own name is the row's; leave the key out"),
    (b"[demo]\xff", "rows.toml: 'utf-8' codec can't decode"),
])
def test_what_is_no_row_is_named_in_one_line(rows, message, tmp_path):
    (tmp_path / "rows.toml").write_bytes(rows)
    with pytest.raises(Misuse, match=message):
        read_row("demo", tmp_path / "rows.toml")


@pytest.mark.parametrize("ends", ["[1.0, 1.0]", "[1.0, 0.0]", "[0.0, nan]", "[-inf, 1.0]"])
def test_a_reward_range_that_does_not_rise_is_refused(ends, tmp_path):
    (tmp_path / "rows.toml").write_text(ROWS.read_text().replace("[demo]", f"[demo]\nreward_range = {ends}"))
    with pytest.raises(Misuse, match=r"rows\.toml: demo\.reward_range(: give the least reward and a greater one|.*is no number that is used here)"):
        read_row("demo", tmp_path / "rows.toml")


def test_the_rows_file_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.delenv("ENVIRONMENTS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert rows_file() == ROWS
    monkeypatch.setenv("ENVIRONMENTS", "tests/fixtures/environments.toml")
    assert rows_file() == ROOT / "tests/fixtures/environments.toml"
