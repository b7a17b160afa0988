"""What is done to an application that is not ours."""
import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest

from servers import foreign
from tests.fixtures.servers import ROOT


def test_listings_are_sorted(tmp_path):
    for name in ("c", "a", "b"):
        (tmp_path / name).touch()
    code = f"import os\nfrom servers import foreign\nforeign.sort_listings(); print(os.listdir({str(tmp_path)!r}))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    assert shown == "['a', 'b', 'c']\n"


@pytest.fixture
def limited(monkeypatch):
    monkeypatch.setattr(sqlite3, "connect", sqlite3.connect)
    foreign.limit_queries(0.3)


def test_a_runaway_query_is_stopped_and_the_connection_lives_on(limited):
    connection = sqlite3.connect(":memory:")
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    begun = time.monotonic()
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        connection.cursor().execute(endless).fetchall()
    assert time.monotonic() - begun < 5
    time.sleep(0.4)
    assert connection.cursor().execute("SELECT 1").fetchall() == [(1, )]


def test_attach_is_refused(limited, tmp_path):
    connection = sqlite3.connect(":memory:")
    with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
        connection.cursor().execute(f"ATTACH '{tmp_path / 'new.db'}' AS other")
    assert list(tmp_path.iterdir()) == []


def test_the_callers_variables_survive_an_import_that_sets_them(tmp_path, monkeypatch):
    (tmp_path / "setter.py").write_text("import os\nos.environ['SITE'] = 'theirs'\nos.environ['OTHER'] = 'theirs'\n"
                                        "app = os.environ['SITE']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SITE", "mine")
    monkeypatch.setenv("OTHER", "mine")
    assert foreign.load("setter:app", ["SITE"]) == "mine"
    assert (os.environ["SITE"], os.environ["OTHER"]) == ("mine", "theirs")
    os.environ["SITE"] = "free again"
    assert os.environ["SITE"] == "free again"


@pytest.mark.parametrize("mine,found", [("http://mine/v1", "http://mine/v1"), ("", None), (None, None)])
def test_an_optional_variable_that_an_import_empties_is_the_callers_or_absent(mine, found, tmp_path, monkeypatch):
    (tmp_path / "emptier.py").write_text("import os\nos.environ['JUDGE_URL'] = ''\napp = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "emptier", raising=False)
    monkeypatch.setenv("JUDGE_URL", mine or "")
    if mine is None:
        monkeypatch.delenv("JUDGE_URL")
    foreign.load("emptier:app", ["JUDGE_URL"], ["JUDGE_URL"])
    assert os.environ.get("JUDGE_URL") == found
    os.environ.pop("JUDGE_URL", None)


def test_a_package_that_is_imported_and_never_used_need_not_be_there(tmp_path, monkeypatch):
    (tmp_path / "user.py").write_text("import absent\nimport absent.nn.functional as F\n"
                                      "from absent.models.detection import Thing\nimport json\napp = Thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, foreign.Unused(["absent", "json"])])
    app = foreign.load("user:app", [])
    with pytest.raises(RuntimeError, match=r"absent\.models\.detection is not installed"):
        app()
    assert json.loads("1") == 1  # what is installed comes first
    with pytest.raises(ModuleNotFoundError):
        __import__("absent_too")
