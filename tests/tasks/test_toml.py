"""The files that somebody writes by hand and another reads: rows, suites, presets, prices, a script, `.env`; none hangs, none is read half."""
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from environment_rows import read_toml, toml_tables
from environment_rows.tables import TOML_BYTES, TOML_DEPTH
from evaluation.prices import read_price
from evaluation.problems import Misuse
from evaluation.rows import tables
from tasks.lib.environments import rows
from tasks.lib.errors import UserError
from tasks.lib.evaluation import suites
from tasks.lib.settings import read_dotenv
from tasks.lib.training import presets, scripts

READERS = {
    "rows": rows.environments,
    "rows of the evaluation": tables,
    "suite": suites.read,
    "preset": lambda path: presets._read(path, str(path)),
    "prices": lambda path: read_price(str(path), "m"),
}
OTHERS = {"script": lambda path: scripts.load(path, {}), ".env": read_dotenv}
MANY = 80_000
DEEP = {
    "lists": "a = " + "[" * 5000 + "]" * 5000,
    "tables": "a = " + "{a=" * 500 + "1" + "}" * 500,
    "parts of a key": ".".join(["a"] * MANY) + " = 1",
    "parts with spaces": " . ".join(["a"] * MANY) + " = 1",
    "quoted parts": ".".join(['"a b"'] * MANY) + " = 1",
    "literal parts": ".".join(["'a=b'"] * MANY) + " = 1",
    "mixed parts": ".".join(["a", '"b"', "'c'"] * MANY) + " = 1",
    "parts of a table": "[" + ".".join(["a"] * MANY) + "]",
    "parts of a list": "[[" + ".".join(["a"] * MANY) + "]]",
    "parts inside": "x = {" + ".".join(["a"] * MANY) + " = 1}",
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_what_is_nested_too_deeply_is_refused_at_once(text):  # tomllib alone does not end in a test's time
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        toml_tables(text)


@pytest.mark.parametrize("text", ["a = ", "[a]\n[a]", "a = 1\na = 2", "a = " + "9" * 5000, "\0", "#" + "x" * TOML_BYTES, "a = '\x1b[2J'"])
def test_what_is_no_toml_is_refused_in_a_line(text):
    with pytest.raises(ValueError) as caught:
        toml_tables(text)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)



@settings(deadline=None)
@given(parts=st.lists(st.from_regex(r"\A[a-zA-Z0-9_-]{1,4}\Z"), min_size=1, max_size=TOML_DEPTH), dot=st.sampled_from([".", " . ", "\t."]))
def test_a_key_within_the_limit_is_read(parts, dot):
    tables = toml_tables(f"{dot.join(parts)} = 1")
    for part in parts:
        tables = tables[part]
    assert tables == 1


def test_text_with_many_dots_is_no_key():
    text = "see " + "... " * 500 + "and 1.2.3.4.5 " * 500
    assert toml_tables(f'a = "{text}"  # {text}')["a"] == text


@pytest.mark.parametrize("read", [*READERS.values(), *OTHERS.values()], ids=[*READERS, *OTHERS])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a pipe", "larger"])
def test_no_reader_hangs_or_fills_the_memory(read, kind, tmp_path: Path):
    path = tmp_path / "file.toml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises((UserError, Misuse)) as caught:
        read(path)
    assert "\n" not in str(caught.value) and any(why in str(caught.value) for why in ("no regular file", "more than", "Is a directory"))


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("content", ["a." * MANY + "a = 1", "a = " + "[" * 5000 + "]" * 5000, b"\xff\xfea\0", "= 1", '["\u202e"'], ids=["parts", "lists", "utf-16", "none", "bidi"])
def test_each_reader_says_in_a_line_what_it_cannot_read(read, content, tmp_path: Path):
    path = tmp_path / "file.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((UserError, Misuse)) as caught:
        read(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_no_settings_are_no_fault(tmp_path: Path):
    assert read_dotenv(tmp_path / ".env") == {}
    (tmp_path / ".env").symlink_to(os.devnull)
    assert read_dotenv(tmp_path / ".env") == {}


def test_a_mark_of_the_byte_order_is_no_key(tmp_path: Path):
    (tmp_path / "rows.toml").write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert read_toml(tmp_path / "rows.toml") == {"a": 1}
