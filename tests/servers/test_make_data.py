"""Data made with an environment's own packages."""
import json
import sqlite3
import struct
import subprocess
import sys

import numpy
import pytest

from servers import make_data, toys
from tests.fixtures.servers import ROOT


def make(what, out, source=ROOT, data=ROOT):
    return subprocess.run([
        sys.executable,
        str(ROOT / "servers/make_data.py"), what,
        str(out), "--source",
        str(source), "--data",
        str(data)
    ],
                          capture_output=True,
                          text=True)


def test_toy_data_appears_whole_and_says_that_it_is_none_of_the_real(tmp_path):
    done = make("toy-sqlgym", tmp_path / "sqlgym")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "sqlgym/about.json").read_text()) == {"data": "toy"}
    for split in ("train", "dev"):
        folder = tmp_path / "sqlgym" / split
        asked, tables = (json.loads((folder / f"{split}{name}.json").read_text()) for name in ("", "_tables"))
        assert {one["db_id"] for one in asked} <= {one["db_id"] for one in tables}
        for one in asked:
            file = folder / f"{split}_databases" / one["db_id"] / f"{one['db_id']}.sqlite"
            assert sqlite3.connect(f"file:{file}?mode=ro", uri=True).execute(one["SQL"]).fetchall()
    assert [path.name for path in tmp_path.iterdir()] == ["sqlgym"]


def test_what_cannot_be_made_is_one_line_and_leaves_nothing(tmp_path):
    done = make("toy-alfworld", tmp_path / "alfworld")  # this Python has no such package
    assert done.returncode == 1 and done.stderr.startswith("toy-alfworld: ModuleNotFoundError: ")
    assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_the_houses_of_alfworld_differ_in_goal_or_furniture():
    assert len({toys.house(number)[0] for number in range(16)}) == 16
    for number in range(16):
        problem, goal = toys.house(number)
        assert problem.count("(") == problem.count(")") and goal.startswith("put a ")


def flat_index(path, vectors, kind=b"IxFI"):
    """Write what faiss.write_index writes of a flat index of inner products."""
    count, size = vectors.shape
    header = kind + struct.pack("<iqqq?i", size, count, 1 << 20, 1 << 20, True, 0) + struct.pack("<Q", count * size)
    path.write_bytes(header + vectors.tobytes())


def test_the_vectors_of_a_flat_index_are_read_where_they_lie(tmp_path):
    vectors = numpy.random.RandomState(0).randn(7, 5).astype("<f4")
    flat_index(tmp_path / "flat", vectors)
    found = make_data.flat_vectors(str(tmp_path / "flat"))
    assert isinstance(found, numpy.memmap) and numpy.array_equal(found, vectors)


@pytest.mark.parametrize("spoil", [
    lambda file: file[:-1],
    lambda file: file + b"x",
    lambda file: b"IwPQ" + file[4:],
    lambda file: file[:20],
    lambda file: b"",
],
                         ids=["cut off", "too long", "another kind", "cut in its header", "empty"])
def test_what_is_no_whole_flat_index_is_refused(spoil, tmp_path):
    flat_index(tmp_path / "flat", numpy.ones((3, 4), "<f4"))
    (tmp_path / "flat").write_bytes(spoil((tmp_path / "flat").read_bytes()))
    with pytest.raises(ValueError, match="no whole flat index"):
        make_data.flat_vectors(str(tmp_path / "flat"))
