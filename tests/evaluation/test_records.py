"""The files of a run's folder."""
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import records
from evaluation.problems import Stopped


@given(st.lists(st.dictionaries(st.text(), st.text()), min_size=1), st.data())
def test_whatever_is_cut_off_only_the_last_line_is_lost(values, data):
    text = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    cut = data.draw(st.integers(0, len(text)))
    read, damaged, size = records.whole_lines(io.BytesIO(text[:cut]), records.read_object)
    assert not damaged
    assert read == values[:len(read)] and size <= cut
    assert len(read) >= text[:cut].count(b"\n") and text[:size].count(b"\n") == len(read)


def test_differences_are_named():
    assert records.differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == [
        "a.b: was 1, is 3", "c: was 2, is null", "d: was null, is 4"
    ]


def test_sessions_that_were_not_closed_are_known():
    lines = [{"open": 1, "server": "s"}, {"open": 2, "server": "s"}, {"close": 1, "server": "s"}, {"open": 3, "server": "t"},
             {"close": 3, "server": "t"}]
    assert records.open_sessions(lines) == {"s": [2]}


def test_a_lone_surrogate_does_not_spoil_a_record(tmp_path):
    lines = records.Lines(tmp_path / "x")
    lines.add({"a": "\ud800"})
    lines.add({"a": "b"})
    assert len(records.read_lines(tmp_path / "x", records.read_object).values) == 2


def test_a_write_that_fails_is_taken_back(tmp_path):
    lines = records.Lines(tmp_path / "x")
    lines.add({"a": 1})
    whole = lines.file

    class Full:

        def fileno(self):
            return whole.fileno()

        def write(self, data):
            if len(data) > 5:
                return whole.write(data[:5])
            raise OSError(28, "No space left on device")

    lines.file = Full()
    with pytest.raises(Stopped, match="No space left on device"):
        lines.add({"a": "long enough"})
    assert (tmp_path / "x").read_text() == '{"a":1}\n'


def test_a_file_that_cannot_be_put_in_place_leaves_no_other(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError):
        records.write_whole(tmp_path / "out", "text")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
