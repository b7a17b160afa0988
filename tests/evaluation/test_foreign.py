"""The gate for what others wrote: JSON, TOML, files and bodies."""
import gzip
import json
import math
import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import foreign

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(JSON)
def test_what_is_json_is_read_as_it_is(value):
    text = json.dumps(value)
    read = foreign.loads(text)
    assert read == foreign.loads(text.encode()) == json.loads(text)


@given(st.binary() | st.text().map(lambda text: text.encode(errors="surrogatepass")) | JSON.map(lambda value: json.dumps(value).encode()[:-1]))
def test_whatever_it_is_nothing_but_a_value_or_a_reason_of_one_line_comes_of_it(data):
    try:
        value = foreign.loads(data)
    except ValueError as error:
        assert len(str(error).splitlines()) <= 1
    else:
        json.dumps(value, allow_nan=False).encode()


@pytest.mark.parametrize("text,told", [
    ("[" * 200_000, "nested deeper"), ("[" * 101 + "]" * 101, "nested deeper"), ('{"a":' * 150 + "1" + "}" * 150, "nested deeper"), ("NaN", "NaN"), ("[-Infinity]", "Infinity"),
    ("1e999", "no finite number"), ("9" * 500, "500 digits"), ("9" * 5000, "digits"), ('{"a": 1, "a": 2}', "comes twice"), ("", "Expecting value"), (b"\xff", "codec"),
])
def test_what_is_no_json_or_too_much_of_it_is_refused(text, told):
    with pytest.raises(ValueError, match=told):
        foreign.loads(text)


def test_what_is_nested_within_reason_is_read():
    assert foreign.loads("[" * 99 + "]" * 99) is not None and foreign.loads('{"a": "' + "[" * 500 + '"}')["a"] == "[" * 500


def test_what_is_no_regular_file_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(ValueError, match="no regular file"):
            foreign.read_bytes(path)
    with pytest.raises(OSError):
        foreign.read_bytes(tmp_path)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(foreign.TooLarge):
        foreign.read_bytes(tmp_path / "large", 10)
    assert foreign.read_bytes(tmp_path / "large", 11) == b"x" * 11


def packed(data: bytes, encoding: str) -> bytes:
    return {"": data, "gzip": gzip.compress(data), "deflate": zlib.compress(data), "raw": zlib.compress(data, wbits=-15)}[encoding]


@given(st.binary(max_size=4000), st.sampled_from(["", "gzip", "deflate", "raw"]), st.integers(1, 500))
def test_a_body_is_what_was_packed_however_it_arrives(data, encoding, width):
    body, sent = foreign.Body(encoding.replace("raw", "deflate"), 4000), packed(data, encoding)
    for begin in range(0, len(sent), width):
        body.feed(sent[begin:begin + width])
    assert body.whole() == data


@given(st.integers(1, 10_000), st.sampled_from(["", "gzip", "deflate", "raw"]), st.integers(1, 500))
def test_a_body_is_counted_after_unpacking(limit, encoding, width):
    body, sent = foreign.Body(encoding.replace("raw", "deflate"), limit), packed(b"x" * (limit + 1), encoding)
    with pytest.raises(foreign.TooLarge):
        for begin in range(0, len(sent), width):
            body.feed(sent[begin:begin + width])


@given(st.binary(min_size=1), st.sampled_from(["gzip", "deflate", "br", "zstd", "x" * 100]))
def test_a_body_that_cannot_be_unpacked_is_a_value_error(data, encoding):
    try:
        body = foreign.Body(encoding, 1000)
        body.feed(data)
        body.whole()
    except ValueError:
        pass


def test_numbers_of_python_stay_numbers():
    assert foreign.loads(json.dumps([1, -0.0, 1e308, 10**399])) == [1, -0.0, 1e308, 10**399] and math.isfinite(foreign.loads("1e308"))


def test_what_follows_a_packed_bodys_end_is_counted_too():
    body = foreign.Body("gzip", 1 << 20)
    body.feed(gzip.compress(b"{}"))
    with pytest.raises(foreign.TooLarge):
        for _ in range(32):
            body.feed(bytes(1 << 16))
