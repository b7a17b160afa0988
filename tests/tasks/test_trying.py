"""env.try: what it says of an environment, and that it leaves nothing behind."""
import pytest

from tasks.lib.environments import trying
from tasks.lib.environments.rows import environment


class Typed:
    """Answers tasks: `yes`, or what is given for the first word."""

    def __init__(self, folder, **answers):
        self.folder, self.answers, self.lines = folder, answers, []

    def __call__(self, words):
        self.lines.append(words)
        said = self.answers.get(words[0].replace(".", "_"), "yes")
        if words[0] == "env.data" and said == "yes":
            self.folder.mkdir()
            (self.folder / "about.json").write_text('{"data": "toy"}')
        return said


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(trying, "data_folder", lambda row: tmp_path / row.name)
    return tmp_path


def test_an_environment_without_data_is_tried_on_toy_data_that_goes_again(folder):
    typed = Typed(folder / "alfworld")
    tried = trying.attempt(environment("alfworld"), "local", 60, {}, typed)
    assert tried.works and tried.data == "toy" and list(folder.iterdir()) == []
    assert [line[0] for line in typed.lines] == ["env.data", "env.up", "env.check", "eval", "env.down"]
    assert "--device" not in typed.lines[1] and typed.lines[1][-2:] == ["--wait", "60"]


@pytest.mark.parametrize("fails,steps", [
    ("env_data", {
        "up": "no"
    }),
    ("env_up", {
        "up": "no"
    }),
    ("env_check", {
        "up": "yes",
        "check": "no",
        "eval": "yes"
    }),
    ("eval", {
        "up": "yes",
        "check": "yes",
        "eval": "no"
    }),
])
def test_a_step_that_fails_is_named_and_the_server_stopped(fails, steps, folder):
    typed = Typed(folder / "sqlgym", **{fails: "no"})
    tried = trying.attempt(environment("sqlgym"), "local", 60, {}, typed)
    assert not tried.works and tried.steps == steps and list(folder.iterdir()) == []
    assert (typed.lines[-1][0] == "env.down") == ("check" in steps)


def test_searchqa_is_tried_without_a_gpu(folder):
    typed = Typed(folder / "searchqa")
    trying.attempt(environment("searchqa"), "docker", 60, {}, typed)
    assert typed.lines[1][3:5] == ["--device", "cpu"]


@pytest.mark.parametrize("name,why", [("movie", "needs MOVIE_KEY"), ("todo", "needs TODO_KEY"),
                                      ("sheet", "needs SHEET_EMAIL"), ("webarena", "needs OPENAI_API_KEY, SHOPPING")])
def test_what_only_the_user_can_give_is_named_and_nothing_started(name, why, folder):
    typed = Typed(folder)
    tried = trying.attempt(environment(name), "local", 60, {}, typed)
    assert tried.untried.startswith(why) and not tried.works and typed.lines == []
    assert tried.facts()["works"] is False and len(tried.cells()) == 7


def test_an_account_is_not_changed_for_a_try(folder):
    assert trying.attempt(environment("todo"), "local", 60, {
        "TODO_KEY": "x"
    }, Typed(folder)).untried == "changes a real account"
