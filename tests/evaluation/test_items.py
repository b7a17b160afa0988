"""Which items are played, and how they are called."""
import json
import re
from pathlib import Path

import pytest

from evaluation import prompts
from evaluation.__main__ import main
from evaluation.items import COLLECTED, category_of, check_owner, choose, item_of, read_list, trial_numbers
from evaluation.problems import Misuse
from evaluation.rows import read_row
from tests.evaluation.samples import SOURCE
from tests.fixtures.servers import ROOT

ROWS = ROOT / "environments.toml"

def row(name):
    return read_row(name, ROWS)


@pytest.mark.parametrize("name,number,shown", [(7, 7, "maze_7"), ("7", 7, "maze_7"), ("webshop_5238", 5238, "webshop_5238"),
                                               ("lmrlgym_maze_3", 3, "lmrlgym_maze_3")])
def test_an_item_id_of_this_form_is_understood(name, number, shown):
    assert item_of(name, "maze") == (shown, number, "")


def test_an_alfworld_trial_is_looked_up_and_not_read_as_a_number():
    told = [{"item_id": 12, "task_type": "look-Mug-1", "task_id": "trial_T20190907_174127_043461"}]
    trials = trial_numbers([told])
    name = "alfworld_look-Mug-1_trial_T20190907_174127_043461"
    assert item_of(name, "alfworld", trials=trials).number == 12
    assert choose(row("alfworld"), "look-Mug-1/trial_T20190907_174127_043461", maps=[told])[0][0].number == 12
    with pytest.raises(ValueError, match="no item map"):
        item_of(name, "alfworld")


def test_trials_are_known_from_the_maps_that_the_image_was_built_with(tmp_path, capsys):
    trial = "alfworld_look-Mug-1_trial_T20190907_174127_043461"
    mine, absent = row("alfworld"), tmp_path / "none.json"
    with pytest.raises(Misuse, match="set AGENTGYM_SRC to an AgentGym checkout"):
        choose(mine, trial, root=tmp_path, collected=absent)
    checkout = tmp_path / "AgentGym"
    (checkout / prompts.ENVS).mkdir(parents=True)
    (checkout / prompts.ENVS / mine.prompt.file).write_text(SOURCE.replace("class Plain", f"class {mine.prompt.class_}"))
    (checkout / mine.folder / "configs").mkdir(parents=True)
    told = [{"item_id": 12, "task_type": "look-Mug-1", "task_id": "trial_T20190907_174127_043461"}]
    (checkout / mine.folder / mine.item_maps[1]).write_text(json.dumps(told))
    (tmp_path / "rows.toml").write_text(re.search(r"\[alfworld\].*?(?=\n\[(?!alfworld))", ROWS.read_text(), re.DOTALL)[0])
    maps = tmp_path / "item_maps.json"
    assert main(["prompts", "--agentgym", str(checkout), "--environments", str(tmp_path / "rows.toml"), "--out", str(tmp_path / "prompts.json"),
                 "--item-maps", str(maps)]) == 0
    assert "item maps: alfworld" in capsys.readouterr().out
    assert choose(mine, trial, root=tmp_path, collected=maps)[0][0].number == 12
    file = (ROOT / "Dockerfile.eval").read_text()  # the image's build writes the file where the runner looks for it
    assert f"--item-maps /opt/workbench/{COLLECTED.name}" in file and COLLECTED.parent == ROOT


@pytest.mark.parametrize("text,told", [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "cannot be read: Expecting value"), ('[{"item_id": 1}]', "has an entry without task_id"),
    ("[1]", "has an entry without task_id"), ("3", "has an entry without task_id"), ('[{"task_id": "a", "task_type": "b", "item_id": "c"}]', "cannot be read"),
    ("[" * 100000, "cannot be read"), (b"\xff", "cannot be read: 'utf-8' codec"),
], ids=lambda value: repr(value[:12]))
def test_a_damaged_item_map_is_told_in_one_line(text, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "AgentGym" / row("alfworld").folder / row("alfworld").item_maps[0]
    file.parent.mkdir(parents=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setenv("AGENTGYM_SRC", str(tmp_path / "AgentGym"))
    assert main(["run", "--env", "alfworld", "--items", "3", "--base-url", "http://127.0.0.1:9/v1", "--check"]) == 2
    error = capsys.readouterr().err
    assert f"item map {file} {told}" in error and "restore it in the checkout" in error and error.count("\n") == 1
    collected = tmp_path / "item_maps.json"
    collected.write_text('{"alfworld": [[{"item_id": 1}]]}')  # the image's is then of no use
    assert choose(row("alfworld"), "3", root=tmp_path, collected=collected)[0][0].number == 3


def test_ranges_names_and_limits(tmp_path):
    chosen, _ = choose(row("textcraft"), "3-5,textcraft_9", limit=3, root=tmp_path)
    assert [item.number for item in chosen] == [3, 4, 5]
    every = ",".join(map(str, range(400)))  # longer than a file's name may be
    assert [item.number for item in choose(row("textcraft"), every, root=tmp_path)[0]] == list(range(400))
    shuffled = [choose(row("textcraft"), "0-19", 5, seed, tmp_path)[0] for seed in (1, 1, 2)]
    assert shuffled[0] == shuffled[1] != shuffled[2]


@pytest.mark.parametrize("env,name,owner", [
    ("demo", "textcraft_3", "textcraft"), ("maze", "lmrlgym_wordle_3", "wordle"), ("demo", "demo-long_3", "demo-long"), ("maze", "lmrlgym_maze_3", ""),
    ("maze", "maze_3", ""), ("demo", "3", ""), ("searchqa", "nq_3", ""), ("demo-long", "demo-long_3", ""),
])
def test_an_item_of_another_environment_is_refused(env, name, owner):
    items, names = [item_of(name, env)], ["demo", "demo-long", "textcraft", "maze", "wordle", "searchqa"]
    if owner:
        with pytest.raises(Misuse, match=f"is one of {owner} and not of {env}"):
            check_owner(items, env, names)
    else:
        check_owner(items, env, names)


def test_agentgyms_lists_are_found_and_their_files_are_categories(tmp_path):
    folder = tmp_path / "AgentEval" / "searchqa"
    folder.mkdir(parents=True)
    (folder / "searchqa_test.json").write_text(json.dumps([{"item_id": f"searchqa_{n}", "conversations": None} for n in range(4)]))
    (folder / "nq.json").write_text(json.dumps([{"item_id": "searchqa_1"}]))
    (folder / "searchqa_hotpot_test.json").write_text(json.dumps([{"item_id": "searchqa_2"}, {"item_id": "searchqa_3"}]))
    chosen, origin = choose(row("searchqa"), root=tmp_path)
    assert [item.category for item in chosen] == ["", "nq", "hotpot", "hotpot"] and origin == "searchqa_test.json"


@pytest.mark.parametrize("name,category", [("latest", "latest"), ("searchqa_contest", "contest"), ("searchqa_nq_test", "nq"), ("nq_test", "nq"),
                                           ("lmrlgym_searchqa_hard", "hard"), ("searchqa", "searchqa")])
def test_a_category_is_called_as_its_list_is(name, category):
    assert category_of(Path(f"{name}.json"), "searchqa") == category


def test_a_categorys_list_may_name_its_items_in_another_form(tmp_path):
    folder = tmp_path / "AgentEval" / "searchqa"
    folder.mkdir(parents=True)
    (folder / "searchqa_test.json").write_text('[{"item_id": "searchqa_1"}, {"item_id": "searchqa_2"}]')
    (folder / "nq.json").write_text("[1]")
    (folder / "hotpot.json").write_text('["2"]')
    assert [item.category for item in choose(row("searchqa"), root=tmp_path)[0]] == ["nq", "hotpot"]
    (folder / "searchqa_test.json").unlink()
    assert sorted(item.id for item in choose(row("searchqa"), root=tmp_path)[0]) == ["searchqa_1", "searchqa_2"]
    (folder / "nq.json").write_text('["apple"]')
    with pytest.raises(Misuse, match=r"items of nq.json: 'apple' has no number"):
        choose(row("searchqa"), root=tmp_path)


def test_a_folder_without_lists_hides_none(tmp_path):
    (tmp_path / "AgentEval" / "textcraft").mkdir(parents=True)
    (tmp_path / "AgentItemId").mkdir()
    (tmp_path / "AgentItemId" / "textcraft_train.json").write_text('[{"item_id": "textcraft_40"}]')
    assert choose(row("textcraft"), root=tmp_path)[1] == "textcraft_train.json"


@pytest.mark.parametrize("name, first, size, split", [("alfworld", 2420, 200, "test"), ("sqlgym", 9428, 200, "dev"), ("searchqa", 0, 200, "test")])
def test_without_a_list_no_item_is_one_that_training_saw(name, first, size, split, tmp_path):
    chosen, origin = choose(row(name), root=tmp_path)
    assert [item.number for item in chosen] == list(range(first, first + size))
    assert origin == f"the first {size} of the row's {split} split"


def test_training_items_are_the_next_best_and_the_rows_first_the_last(tmp_path):
    assert len(choose(row("textcraft"), root=tmp_path)[0]) == 100
    (tmp_path / "AgentItemId").mkdir()
    (tmp_path / "AgentItemId" / "textcraft_train.json").write_text('[{"item_id": "textcraft_40"}]')
    assert [item.number for item in choose(row("textcraft"), root=tmp_path)[0]] == [40]


@pytest.mark.parametrize("items,told", [("9-3", "ends before it begins"), ("0-9999999", "more than a million"), ("x.json", "no item list"),
                                        ("apple", "no number"), ("544", "no item 544"), ("3,3", "comes twice"), (",", "there are none"),
                                        ("0-" + "9" * 5000, "more than a million"), ("9" * 5000, "digits")])
def test_items_that_cannot_be_are_refused(items, told, tmp_path):
    with pytest.raises(Misuse, match=told):
        choose(row("textcraft"), items, root=tmp_path)


@pytest.mark.parametrize("text,told", [('[{"id": 3}]', "without item_id"), ('[{"item_id": ', "is no JSON"), ("[true]", "without item_id"),
                                       ('{"a": 1}', "without item_id"), ("[" * 200_000, "is no JSON")])
def test_a_list_of_another_form_is_refused(text, told, tmp_path):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(Misuse, match=told):
        choose(row("textcraft"), str(tmp_path / "list.json"))


def test_a_list_that_cannot_be_read_is_told_with_a_remedy(tmp_path):
    with pytest.raises(Misuse, match="cannot be read: Is a directory; name a text or JSON file"):
        read_list(tmp_path)


@pytest.mark.parametrize("text,numbers_in", [("5", [5]), ("5\n6\n", [5, 6]), ("\ufeff5\n6", [5, 6]), ("\ufeff[5, 6]", [5, 6])])
def test_a_list_may_be_plain_lines(text, numbers_in, tmp_path):
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    assert [item.number for item in choose(row("textcraft"), str(tmp_path / "list.txt"))[0]] == numbers_in
