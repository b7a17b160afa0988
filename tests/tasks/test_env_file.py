"""One `.env`, one meaning: the tasks read what Docker Compose reads, or refuse the line."""
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tasks.lib.engine.compose_files import caller_variables
from tasks.lib.env_file import parse
from tasks.lib.errors import BadSetting
from tasks.lib.redaction import secret_values
from tasks.lib.settings import read_dotenv
from tests.fixtures import needs

NAMES = ("A", "B", "C", "SET", "Q")
SHELL = {"SET": "from the shell", "PATH": os.environ["PATH"], "HOME": "/root", "USER": "me"}
ABSENT = "(not set)"

names = st.sampled_from([*NAMES, "A", "B", "C", "export A", "export  B", "A.b", "c-d", "1"])
signs = st.sampled_from(["=", "=", "=", " = ", "= ", ": ", ":", " :"])
# What a value is made of: ordinary words, and all that one parser or another gives a meaning.
pieces = st.sampled_from([
    "x", "hf_aB3", "1", " ", "  ", "\t", "é", "$$", "$A", "$B", "${A}", "${C}", "$SET", "${SET}", "$USER", "${Q-d}", "${Q:-d e}",
    "${SET-d}", "${SET:+y}", "${Q+y}", "${A:-z}", "${C:?no}", "$", "$1", "$(id)", "`id`", "${", "}", "{", "\\", "\\n", "\\t", "\\$",
    "\\\\", '\\"', "\\'", "\\q", "\\0", '"', "'", "#", " #", " # c", "=", ":", "-", "?", "\x0b", "\xa0", "\x1b", "\u2028"
])
plain = st.lists(pieces, max_size=6).map("".join)
values = st.one_of(plain, plain.map('"{}"'.format), plain.map("'{}'".format), plain.map('"{}" # c'.format), plain.map("'{}'#".format),
                   st.tuples(plain, plain).map("\n".join).map('"{}"'.format))
statements = st.one_of(st.tuples(names, signs, values).map("".join), st.tuples(names, signs, values).map("".join),
                       st.sampled_from(["", "  ", "# c", "\t# $c", "A", "export B", "=x", "A B", "export"]))
ends = st.sampled_from(["\n", "\n", "\r\n", "\n\n"])
contents = st.tuples(st.sampled_from(["", "", "\ufeff", "  "]), st.lists(st.tuples(statements, ends).map("".join), max_size=5).map("".join),
                     st.sampled_from(["", "A=x", "B=$A"])).map("".join)


def as_compose_reads(text: str, shell: dict[str, str]) -> dict[str, str]:
    """Return what the variables are in a Compose file beside a `.env` with `text`."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, ".env").write_bytes(text.encode())
        environment = {name: f"${{{name}-{ABSENT}}}" for name in NAMES}
        Path(folder, "compose.json").write_text(json.dumps({"name": "t", "services": {"s": {"image": "x", "environment": environment}}}))
        done = subprocess.run(["docker", "compose", "--file", "compose.json", "config", "--format", "json"],
                              cwd=folder, env=shell, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (text, done.stderr)
    assert "level=warning" not in done.stderr, (text, done.stderr)
    found = json.loads(done.stdout)["services"]["s"]["environment"]
    return {name: value.replace("$$", "$") for name, value in found.items() if value != ABSENT}


@pytest.mark.docker
@settings(max_examples=120, deadline=None)
@given(text=contents)
def test_what_is_read_is_what_compose_reads(text: str) -> None:
    needs.docker()
    try:
        ours = parse(text, SHELL)
    except BadSetting:
        assume(False)
    expected = {name: value for name, value in {**ours, **SHELL}.items() if name in NAMES}
    assert as_compose_reads(text, SHELL) == expected


@pytest.mark.parametrize("text, expected", [
    ("A=x\nB = y z # c\n", {"A": "x", "B": "y z"}),
    ("A='a$bcd'\n", {"A": "a$bcd"}),
    ("A=a$$b\n", {"A": "a$b"}),
    ("A=wb-$USER\n", {"A": "wb-me"}),
    ("A=${Q-d}${Q:-e}${USER:+f}${USER?}\n", {"A": "defme"}),
    ("A: v\nexport B=w\n", {"A": "v", "B": "w"}),
    ('A="a b" # c\nB=\'#\'\n', {"A": "a b", "B": "#"}),
    ('A="x\ny"\nB="\\$A\\"\\\\"\n', {"A": "x\ny", "B": '$A"\\'}),
    ("\ufeffA=1\r\nB=$A\r\n", {"A": "1", "B": "1"}),
    ("SET=of the file\nA=$SET\n", {"SET": "of the file", "A": "from the shell"}),
    ("A=https://h/p#x?a=b&c\nB=C:\\x\n", {"A": "https://h/p#x?a=b&c", "B": "C:\\x"}),
    ("A\n\n# c\n", {}),
    ("A=\nB=''", {"A": "", "B": ""}),
], ids=repr)
def test_what_people_write_is_read(text: str, expected: dict[str, str]) -> None:
    assert parse(text, SHELL) == expected
    if shutil.which("docker"):
        assert as_compose_reads(text, SHELL) == {name: value for name, value in {**expected, **SHELL}.items() if name in NAMES}


@pytest.mark.parametrize("text, line, said", [
    ("A=1\nHF_TOKEN=hf_a$bcd\n", 2, "HF_TOKEN has a $, and what follows is no variable that is set; set it above, or mind that in single"),
    ("HF_TOKEN=a${bcd\n", 1, "HF_TOKEN has a $ that Compose cannot read"),
    ("HF_TOKEN=${bcd:?hf_secret}\n", 1, "no variable that is set"),
    ("HF_TOKEN=hf_a\t# of me\n", 1, "has a tab before the #"),
    ("HF_TOKEN= # none\n", 1, "has a # where the value begins"),
    ('\n\nHF_TOKEN="hf_a"bcd\n', 3, "has no closing quote, or something after it"),
    ('HF_TOKEN="hf_a\nB=1\n', 1, "has no closing quote"),
    ("HF_TOKEN=hf_a\\$bcd\n", 1, "has a \\ before a $"),
    ('HF_TOKEN="hf\\abcd"\n', 1, "has a backslash"),
    ("HF_TOKEN=hf\xa0bcd\n", 1, "has a character that cannot be seen"),
    ("# c\nhf_abcd\n%\n", 3, "no NAME=value"),
    ("hf_abcd", 1, "no NAME=value"),
    ("hf_abcd = $bcd", 1, "what is set has a $"),
], ids=repr)
def test_what_is_odd_is_refused_with_its_line_and_without_its_value(text: str, line: int, said: str) -> None:
    with pytest.raises(BadSetting, match=re.escape(f".env line {line}: ")) as caught:
        parse(text, SHELL)
    assert said in caught.value.message
    assert not re.search("hf_|bcd", caught.value.message)


def test_a_token_with_a_dollar_is_hidden_as_it_reaches_the_containers(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MINE=me\nHF_TOKEN='hf_a$bcd'\nCOMPOSE_PROJECT_NAME=wb-$MINE\n")
    dotenv = read_dotenv(tmp_path / ".env")
    assert secret_values({}, dotenv) == ["hf_a$bcd"]
    assert dotenv["COMPOSE_PROJECT_NAME"] == "wb-me" and "COMPOSE_PROJECT_NAME" not in caller_variables({}, dotenv)
