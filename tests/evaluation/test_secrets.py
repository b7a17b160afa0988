"""Secrets of ours, however those who repeat them write them."""
import html
import json
import time
import urllib.parse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.problems import EnvironmentFault
from evaluation.secrets import OWN, Secrets
from evaluation.text import json_line, short

MARKS = "\\%&"  # as its last character one leaves a part of its spelling, and nothing of the secret
SECRET = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=8,
                 max_size=30).filter(lambda text: text[-1] not in MARKS)
WRITTEN = {
    "plain": str,
    "json": lambda value: json.dumps(value)[1:-1],
    "json twice": lambda value: json.dumps(json.dumps(value))[3:-3],
    "json's numbers": lambda value: "".join(f"\\u{ord(one):04x}" if ord(one) < 0x10000 else one for one in value),
    "slashes": lambda value: value.replace("/", "\\/"),
    "url": lambda value: urllib.parse.quote(value, safe=""),
    "path": urllib.parse.quote,
    "url twice": lambda value: urllib.parse.quote(urllib.parse.quote(value, safe=""), safe=""),
    "bytes": lambda value: "".join(f"%{byte:02x}" for byte in value.encode()),
    "html": html.escape,
    "entities": lambda value: "".join(f"&#x{ord(one):X};" for one in value),
    "decimals": lambda value: "".join(f"&#{ord(one)};" for one in value),
    "python": lambda value: ascii(value)[1:-1] if ascii(value).isascii() and "\\U" not in ascii(value) else value,
}


@given(secret=SECRET | st.sampled_from(["sk-abc/def+ghi=", "nvapi-12345678", "p@ss w&rd<>\"'\\a"]),
       way=st.sampled_from(sorted(WRITTEN)),
       before=st.sampled_from(["", "Bearer ", "\n", "key="]))
@settings(max_examples=400, deadline=None)
def test_a_secret_is_hidden_however_it_is_written(secret, way, before):
    own = Secrets()
    own.add(secret)
    found = own.hide(f"{before}{WRITTEN[way](secret)} is no key")
    assert found == f"{before}*** is no key"


@pytest.mark.parametrize(
    "text", ["\\" * 2_000_000, "%" * 2_000_000, "&#" + "0" * 2_000_000, "sk-" * 700_000 + "%", "a\\u0062 " * 300_000])
def test_a_text_of_half_spellings_takes_no_long(text):
    own = Secrets()
    own.add("sk-abcdefghijklmnopqrstuvwxyz")
    begun = time.process_time()
    assert own.hide(text) == text and time.process_time() - begun < 10


def test_a_record_stays_json_whatever_the_secret_begins_with():
    own = Secrets()
    own.add("nvapi-12345678")
    for text in ("\nvapi-12345678", "\\" * 9 + "nvapi-12345678", "a\nnvapi-12345678"):
        assert json.loads(json_line(own.hide_in({"text": [text]})))["text"]


@pytest.mark.parametrize("lead", range(150, 210, 7))
def test_no_half_of_a_secret_is_left_where_a_message_is_cut(lead, monkeypatch):
    monkeypatch.setattr(OWN, "_values", [])
    OWN.add("sk-0123456789abcdefghijklmnopqrstuvwxyz")
    said = "x" * lead + "sk-0123456789abcdefghijklmnopqrstuvwxyz"
    assert "sk-0" not in short(said) and "sk-0" not in short({"error": said}) and "sk-0" not in str(
        EnvironmentFault(short(said)))
