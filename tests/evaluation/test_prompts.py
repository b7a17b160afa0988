"""The words before the first observation, read from AgentGym's source."""
import json

import pytest

from evaluation import prompts
from evaluation.problems import Misuse
from evaluation.rows import read_row
from tests.evaluation.samples import SOURCE
from tests.fixtures.servers import ROOT

ROWS = ROOT / "environments.toml"

def row(name):
    return read_row(name, ROWS)


def test_the_words_are_read_without_importing():
    assert prompts.read_class(SOURCE, "Plain") == {
        "user": "Do this.\n", "assistant": "Yes.", "before_first": "Before.\n", "first": "Words: {{vocab}}",
        "refusal": "One only.", "actions_label": "\nYOU CAN: "
    }
    assert prompts.read_class(SOURCE, "Adapter")["user"] == "React."


@pytest.mark.parametrize("name,told", [("Absent", "no class Absent"), ("Computed", "no conversation"), ("Client", "no conversation")])
def test_what_is_no_literal_is_refused_and_not_guessed(name, told):
    with pytest.raises(ValueError, match=told):
        prompts.read_class(SOURCE, name)


def test_a_source_that_is_no_python_is_told_in_one_line(tmp_path):
    place = tmp_path / prompts.ENVS
    place.mkdir(parents=True)
    (place / "textcraft.py").write_text(f"<<<<<<< HEAD\n{SOURCE}=======\n>>>>>>> mine\n")
    with pytest.raises(Misuse, match=r"textcraft.py: .*\(line 1\); point --agentgym") as caught:
        prompts.find(row("textcraft"), checkout=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_result_says_whose_prompt_it_is(tmp_path, monkeypatch):
    monkeypatch.delenv("AGENTGYM_SRC", raising=False)
    tmp_path = tmp_path / "AgentGym"  # not the folder that one is in
    place = tmp_path / prompts.ENVS
    place.mkdir(parents=True)
    (place / "textcraft.py").write_text(SOURCE.replace("class Plain", "class TextCraftEnvClient"))
    mine = row("textcraft")
    absent = tmp_path / "none.json"
    assert prompts.find(mine, collected=absent).source == "plain"
    assert prompts.find(row("demo"), collected=absent).source == "row"
    read = prompts.find(mine, checkout=str(tmp_path), collected=absent)
    assert (read.source, read.user) == ("agentgym", "Do this.\n")
    collected = tmp_path / "prompts.json"
    collected.write_text(json.dumps(prompts.collect([mine], tmp_path)))
    assert prompts.find(mine, collected=collected).sha256() == read.sha256()
    monkeypatch.setenv("AGENTGYM_SRC", str(tmp_path))
    assert prompts.find(mine, collected=absent) == read
    assert prompts.find(mine, force_plain=True).source == "plain"
    with pytest.raises(Misuse, match="point --agentgym"):
        prompts.find(mine, checkout=str(tmp_path / "nowhere"))
