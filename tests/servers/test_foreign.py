"""What is done to an application that is not ours."""
import json
import os
import sqlite3
import subprocess
import sys
import time
import types

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


@pytest.fixture
def planners(monkeypatch):
    """Share the planners of a stand-in for fast_downward; return it, and the libraries that it loaded."""
    loaded: list[types.SimpleNamespace] = []

    def load_lib():
        loaded.append(types.SimpleNamespace(number=len(loaded)))
        return loaded[-1]

    library = types.ModuleType("fast_downward")
    library.load_lib = load_lib  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fast_downward", library)
    foreign.share_planners()
    return library, loaded


def test_a_thousand_games_one_after_the_other_load_two_planners(planners):
    library, loaded = planners
    game = library.load_lib()
    for _ in range(1000):  # as a reset does: the new game is there before the old one goes
        game = library.load_lib()
    assert len(loaded) == 2 and game.number in (0, 1)


def test_a_game_that_textworld_registered_goes_with_its_last_player(planners, monkeypatch):
    _, loaded = planners
    gym, utils = types.ModuleType("textworld.gym"), types.ModuleType("textworld.gym.utils")
    registry: dict[str, dict] = {}

    def make(name):
        game = types.SimpleNamespace(planner=sys.modules["fast_downward"].load_lib())
        registry[name]["wrapper"].game = game  # as alfworld's demangler
        return game

    gym.make, utils.registry = make, registry  # type: ignore[attr-defined]
    for module in (gym, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    foreign.release_games()
    game = None
    for number in range(100):
        registry[f"tw-{number}"] = {"wrapper": types.SimpleNamespace()}
        game = gym.make(f"tw-{number}")
    assert len(loaded) <= 2 and registry == {} and game is not None


def test_games_at_once_have_a_planner_each(planners):
    library, loaded = planners
    games = [library.load_lib() for _ in range(5)]
    assert len({game.number for game in games}) == 5
    state = [games.pop(2)]  # a game's state holds its planner too
    assert library.load_lib().number == 5
    state.clear()
    assert library.load_lib().number in (2, 5) and len(loaded) == 6


@pytest.mark.parametrize("device,answered", [("cpu", True), ("", False), ("cuda", False)])
def test_cuda_is_answered_where_the_server_does_without_a_gpu(device, answered, monkeypatch):

    class Tensor:

        def cuda(self, *_, **__):
            raise AssertionError("no GPU")

    class Module(Tensor):
        pass

    torch = types.SimpleNamespace(Tensor=Tensor, nn=types.SimpleNamespace(Module=Module))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setenv("DEVICE", device)
    foreign.answer_cuda()
    for kind in (Tensor, Module):
        one = kind()
        if answered:
            assert one.cuda() is one and one.cuda(0, non_blocking=True) is one
        else:
            with pytest.raises(AssertionError, match="no GPU"):
                one.cuda()
