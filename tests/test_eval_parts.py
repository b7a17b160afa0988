"""The pure parts of the evaluation: actions, items, prompts, numbers, records, settings."""
import itertools
import json
import math
import random
import re
from contextlib import suppress
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import numbers, prompts, records, surrogates
from evaluation.__main__ import main
from evaluation.actions import parse, phrase
from evaluation.episodes import derived_seed, first_message, judge, opening
from evaluation.items import COLLECTED, category_of, check_owner, choose, item_of, read_list, trial_numbers
from evaluation.model import loopback, overflowed, redacted_url, retry_after, said_in
from evaluation.problems import EnvironmentFault, Misuse, Stopped
from evaluation.prompts import Prompt
from evaluation.protocol import First, first_in, session_in, step_in
from evaluation.rows import Protocol, read_row, rows_file
from evaluation.settings import api_key, check_url, extra_body
from tasks.lib.environments.rows import environments
from tests.fixtures.servers import ROOT

ROWS = ROOT / "environments.toml"


def row(name):
    return read_row(name, ROWS)


# Actions


@pytest.mark.parametrize("rule,completion,text,found", [
    ("one_action_line", "Thought:\nx\n\nAction:\nget 2 oak log!\nmore", "get 2 oak log", True),
    ("one_action_line", "Action: a\nAction: b", None, False),
    ("one_action_line", "no mark", "", False),
    ("one_action_line", "Action: Action: a", "Action a", True),
    ("after_last_action", "Action: a\nAction:\n go to desk 1 ", "go to desk 1", True),
    ("after_last_action", "I will search[red shoe]", "I will search[red shoe]", True),
    ("after_last_action", "look around", "", False),
    ("after_last_action", "Action: look</s>", "look", True),
    ("after_first_action", "Thought: t\nAction: s h i r e\nAction: x", "s h i r e", True),
    ("after_first_action", "move up", "move up", False),
    ("sql_block", "Thought: t\nAction: ```sql\nSELECT 1;\n```\nbye", "SELECT 1;", True),
    ("sql_block", "SELECT 1", "SELECT 1", False),
    ("backticks", "so ```click [3]``` it is", "so ```click [3]``` it is", True),
    ("backticks", "click [3]", None, False),
    ("raw", "<search>x</search>", "<search>x</search>", True),
    ("raw", " \n", " \n", False),
    ("whole_line", "I think\n\n  take \n\n", "take", True),
    ("whole_line", "", "", False),
])
def test_a_completion_means_this_action(rule, completion, text, found):
    assert parse(rule, completion) == (text, found)


@pytest.mark.parametrize("rule", ["raw", "one_action_line", "after_first_action", "after_last_action", "sql_block", "whole_line"])
@given(action=st.text("abc 019,", min_size=1).map(lambda text: " ".join(text.split())).filter(bool))
def test_a_scripted_action_is_read_as_it_was_meant(rule, action):
    assert parse(rule, phrase(rule, action)).text == action


@given(st.sampled_from(["raw", "one_action_line", "after_first_action", "after_last_action", "sql_block", "backticks", "whole_line"]),
       st.text())
def test_no_completion_breaks_the_parser(rule, text):
    action = parse(rule, text)
    assert action.text is not None or not action.found


def test_every_rule_of_the_rows_is_known():
    for name, known in environments(ROWS).items():
        mine = row(name)
        parse(mine.action, "x")
        # The tasks read the file on their own: the two must not drift apart.
        assert mine.protocol.model_dump() == known.protocol.model_dump()
        assert mine.success.model_dump() == known.success.model_dump() and mine.reward_range == known.reward_range


# Items


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


# Prompts

SOURCE = '''
class Plain(Base):
    conversation_start = (
        Message({"from": "human", "loss": None, "value": "Do " "this.\\n"}),
        Message({"from": "gpt", "loss": False, "value": "Yes."}),
    )
    _fully_first_observation = """
      Before. """.strip()
    first_observation = "Words: {{vocab}}"
    def step(self, action):
        # StepOutput(state="a comment")
        return StepOutput(state="One only.", reward=0, done=False)

class Adapter(Base):
    conversation_start_dict = {
        Format.CODE: (Message({"value": f"x {y}"}), Message({"value": "no"})),
        Format.REACT: (Message({"value": "React."}), Message({"value": "Fine."})),
    }

class Client(Base):
    def observe(self):
        return f"{self.info['observation']}\\nYOU CAN: {','.join(self.info['available_actions'])}"

class Computed(Base):
    conversation_start = (Message({"value": make()}), Message({"value": "no"}))
'''


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


def test_the_first_observation_is_dressed_as_the_client_does():
    prompt = Prompt(source="agentgym", user="u", before_first="Before.\n", actions_label="\nCAN: ")
    assert first_message(prompt, First("o", ["a", "b"]), "") == "Before.\no\nCAN: a,b"
    words = Prompt(source="agentgym", user="u", first="W {{vocab}}")
    assert first_message(words, First("o", []), "x\ny") == "W x\ny"
    assert [message["role"] for message in opening(prompt, "o")] == ["user", "assistant", "user"]
    assert opening(Prompt(source="file", user="u", assistant=""), "o") == [{"role": "user", "content": "u\n\no"}]


# Protocol and judgement


@pytest.mark.parametrize("name,reward,done,outcome,scaled", [
    ("babyai", 0.8875, True, "success", 0.8875), ("babyai", 0.0, True, "failure", 0.0),
    ("sciworld", 100.0, True, "success", 1.0), ("sciworld", 75.0, True, "failure", 0.75), ("sciworld", -100.0, True, "failure", 0.0),
    ("textcraft", 1, True, "success", 1.0), ("textcraft", 0, False, "max_rounds", 0.0), ("webshop", 0.66, True, "failure", 0.66),
], ids=str)
def test_success_is_what_the_row_says(name, reward, done, outcome, scaled):
    assert judge(row(name), reward, done) == outcome and row(name).scaled(reward) == pytest.approx(scaled)


def test_babyais_score_is_not_its_reward_but_is_kept_for_comparison():
    step = step_in({"observation": "o", "reward": 0.27, "score": 3.22, "done": True}, row("babyai").protocol)
    assert (step.reward, step.upstream) == (0.27, 3.22)


def test_a_reward_before_the_end_counts_nothing_where_the_row_says_so():
    protocol = row("webarena").protocol
    assert step_in({"observation": "o", "reward": 1, "terminated": False}, protocol).reward == 0.0
    assert step_in({"observation": "o", "reward": 1, "terminated": True}, protocol).reward == 1.0


@pytest.mark.parametrize("done", ["false", "true", "", None, 2, [], {}], ids=repr)
def test_an_end_that_is_neither_true_nor_false_is_the_environments_fault(done):
    reply = {"observation": "o", "reward": 1, "done": done}
    with pytest.raises(EnvironmentFault, match="POST /step: no observation, reward and end in"):
        step_in(reply, row("textcraft").protocol)
    assert [step_in({**reply, "done": end}, row("textcraft").protocol).done for end in (False, True, 0, 1)] == [False, True, False, True]


@pytest.mark.parametrize("name", ["weather", "movie", "todo", "sheet"])
def test_a_step_that_could_not_reach_the_internet_is_the_environments_fault(name):
    text = "Observation: ERROR | ConnectionError(HTTPSConnectionPool(host='api.example', port=443): Max retries exceeded"
    reply = {"observation": text, "reward": 0.0, "done": False}
    with pytest.raises(EnvironmentFault, match="POST /step: Observation: ERROR"):
        step_in(reply, row(name).protocol)
    assert step_in(reply, row("textcraft").protocol).observation == text


ABORTED = "('Connection aborted.', RemoteDisconnected('Remote end closed connection without response'))"
GATEWAY = "<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>"


@pytest.mark.parametrize("name,text", [
    ("weather", '{"error":true,"reason":"Minutely API request limit exceeded. Please try again in one minute."}'),
    ("weather", '{"reason":"Daily API request limit exceeded. Please try again tomorrow.","error":true}'),
    ("movie", '{"status_code":7,"status_message":"Invalid API key: You must be granted a valid key.","success":false}'),
    ("movie", '{"success":false,"status_code":25,"status_message":"Your request count (41) is over the allowed limit of 40."}'),
    ("todo", "Forbidden"),
    ("todo", '{"error":"Too many requests. Limits reached. Try again later","error_code":35,"http_code":429}'),
    *((name, said) for name in ("weather", "movie", "todo") for said in (GATEWAY, f"ERROR | ConnectionError({ABORTED})")),
    ("sheet", "APIError({'code': 429, 'message': \"Quota exceeded for quota metric 'Read requests'\", 'status': 'RESOURCE_EXHAUSTED'})"),
    ("sheet", "ERROR | APIError({'code': 429, 'message': 'Quota exceeded', 'status': 'RESOURCE_EXHAUSTED'})"),
    ("sheet", f"ConnectionError(ProtocolError{ABORTED})"),
], ids=lambda value: value[:40])
def test_what_a_service_says_of_itself_is_the_environments_fault(name, text):
    with pytest.raises(EnvironmentFault, match="POST /step: Observation: "):
        step_in({"observation": f"Observation: {text}\nGive me one action.", "reward": 0.0, "done": False}, row(name).protocol)


@pytest.mark.parametrize("name,text", [
    ("weather", '{"error":true,"reason":"Latitude must be in range of -90 to 90"}'), ("weather", "Error: start_date should be earlier than current_date"),
    ("movie", '{"success":false,"status_code":34,"status_message":"The resource you requested could not be found."}'),
    ("movie", "{'id': 1, 'overview': 'Invalid API key: a film', 'title': '502 Bad Gateway'}"), ("movie", "ERROR | KeyError('movie_name')"),
    ("todo", "[{'id': '1', 'content': 'Forbidden', 'priority': 1}]"), ("todo", "Forbidden City"), ("todo", "Task 3 is not exists."),
    ("sheet", "APIError({'code': 400, 'message': 'Unable to parse range', 'status': 'INVALID_ARGUMENT'})"), ("sheet", "[['APIError', '429'], ['ConnectionError(', '']]"),
], ids=lambda value: value[:40])
def test_what_a_service_says_of_the_action_is_a_step(name, text):
    said = f"Observation: {text}\nGive me one action."
    assert step_in({"observation": said, "reward": 0.0, "done": False}, row(name).protocol).observation == said


@pytest.mark.parametrize("rows,message", [
    (b"demo = 1", r"rows.toml: demo is no table; a row begins with \[demo\]"),
    (b"[demo]\nname = 'mine'", r"rows.toml: demo.name: the table's own name is the row's; leave the key out"),
    (b"[demo]\xff", "rows.toml: 'utf-8' codec can't decode"),
])
def test_what_is_no_row_is_named_in_one_line(rows, message, tmp_path):
    (tmp_path / "rows.toml").write_bytes(rows)
    with pytest.raises(Misuse, match=message):
        read_row("demo", tmp_path / "rows.toml")


@pytest.mark.parametrize("ends", ["[1.0, 1.0]", "[1.0, 0.0]", "[0.0, nan]", "[-inf, 1.0]"])
def test_a_reward_range_that_does_not_rise_is_refused(ends, tmp_path):
    (tmp_path / "rows.toml").write_text(ROWS.read_text().replace("reward_range = [0.0, 1.0]", f"reward_range = {ends}"))
    with pytest.raises(Misuse, match=r"rows\.toml: demo\.reward_range: Value error, give the least reward and a greater one"):
        read_row("demo", tmp_path / "rows.toml")


@pytest.mark.parametrize("text", [
    "Error: Env 3 is dead", "Target crashed", "Timeout 30000ms exceeded.", "Error code: 401 - {'error': 'no such key'}",
    "Connection error.", "net::ERR_CONNECTION_REFUSED at http://shop.example"
])
def test_a_browser_or_a_judge_that_fails_is_the_environments_fault_and_a_page_about_one_is_not(text):
    protocol = row("webarena").protocol
    reply = {"observation": text, "reward": 0, "terminated": False, "truncated": False, "info": None}
    with pytest.raises(EnvironmentFault, match="POST /step: "):
        step_in(reply, protocol)
    page = f"OBSERVATION:\n[1] StaticText '{text}'\nURL: http://forum.example"
    assert step_in({**reply, "observation": page}, protocol).observation == page
    refused = "Cannot parse action from response click [3]"  # the model's own
    assert step_in({**reply, "observation": refused}, protocol).observation == refused


@pytest.mark.parametrize("reply", [None, True, "3", {}, {"id": "3"}, [1]])
def test_what_is_no_session_is_a_fault(reply):
    with pytest.raises(EnvironmentFault, match="no session id"):
        session_in(reply, "id")


@pytest.mark.parametrize("reply", [None, [], {}, {"observation": "o", "done": True}, {"observation": "o", "reward": None, "done": True}, {
    "observation": "o",
    "reward": math.nan,
    "done": True
}, {"observation": "o", "reward": math.inf, "done": True}, {"observation": "o", "reward": 10**400, "done": True},
                                   {"observation": None, "reward": 0, "done": False}])
def test_what_is_no_step_is_a_fault(reply):
    with pytest.raises(EnvironmentFault):
        step_in(reply, row("textcraft").protocol)


def test_the_first_observation_is_found_in_each_form():
    form = {"id_reply": "id", "id": "id", "item": "x", "close": True}
    assert first_in(["o", None], Protocol(observation="list", **form)) == ("o", [])
    assert first_in({"observation": "o", "available_actions": ["a"]}, Protocol(observation="reply", **form)) == ("o", ["a"])
    assert first_in({"task_description": "t", "observation": "o"}, row("sciworld").protocol).observation == "t\no"
    for reply in ({}, {"observation": None}):
        with pytest.raises(EnvironmentFault):
            first_in(reply, Protocol(observation="reply", **form))


def test_what_is_nested_too_deeply_is_no_json():
    with pytest.raises(ValueError, match="nested"):
        surrogates.loads(b"[" * 200_000)


# The model's answers


@pytest.mark.parametrize("status,message,code,is_one", [
    (400, "This model's maximum context length is 8192 tokens.", "", True), (400, "x", "context_length_exceeded", True),
    (400, "Input is too long for requested model", "", True), (413, "", "", False), (413, "prompt is too long: 9 tokens > 8", "", True),
    (413, "Request too large on tokens per minute (TPM): Limit 6000, Requested 7000", "rate_limit_exceeded", False),
    (400, "input length and `max_tokens` exceed context limit: 9 + 9 > 8", "", True), (400, "exceeded model token limit: 8192", "", True),
    (400, "Range of input length should be [1, 30720]", "", True), (400, "Prompt exceeds max length", "", True),
    (400, "total tokens of image and text exceed max message tokens", "", True), (400, "litellm.ContextWindowExceededError: no", "", True),
    (422, "Input validation error: `inputs` must have less than 1024 tokens. Given: 2000", "", True),
    (429, "maximum context length", "", False), (400, "temperature must be 1", "", False),
    (400, "temperature exceeds the maximum of 1", "", False), (400, "max_tokens 4096 exceeds the maximum output tokens of 2048", "", False),
    (400, "The input token count (9) exceeds the maximum number of tokens allowed (8).", "", True),
    (400, "the request exceeds the available context size", "", True), (400, "This model's maximum prompt length is 9", "", True),
    (500, "maximum context length", "", False), (422, "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens", "", True),
])
def test_an_overflow_is_told_from_other_refusals(status, message, code, is_one):
    assert overflowed(status, message, code) is is_one


@pytest.mark.parametrize("url,is_one", [("http://127.0.0.1:8/v1", True), ("http://127.9.9.9/v1", True), ("http://[::1]:8/v1", True),
                                        ("http://LOCALHOST:8", True), ("http://user:pw@localhost/v1", True), ("https://api.openai.com/v1", False),
                                        ("http://10.0.0.1", False), ("http://127.0.0.1.example", False)])
def test_addresses_of_this_machine_are_known(url, is_one):
    assert loopback(url) is is_one


@pytest.mark.parametrize("headers,seconds", [({"retry-after": "2"}, 2.0), ({"retry-after-ms": "1500"}, 1.5), ({}, None),
                                             ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0), ({"retry-after": "soon"}, None),
                                             ({"retry-after": "-3"}, 0.0), ({"retry-after": "inf"}, None),
                                             ({"retry-after-ms": "nan"}, None),
                                             ({"retry-after": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}, None)])
def test_retry_after_is_read_in_all_its_forms(headers, seconds):
    assert retry_after(headers, now=60.0) == seconds


@pytest.mark.parametrize("body", [
    {"message": "no room"}, {"detail": "no room"}, {"error": "no room"}, {"error": {"message": "no room"}}, "no room ", ["no room"],
    {"detail": [{"loc": ["body"], "msg": "no room", "type": "x"}]}, {"message": "", "error": {"detail": "no room"}},
])
def test_an_errors_text_is_found_wherever_it_stands(body):
    assert said_in(body) == "no room"


@pytest.mark.parametrize("body", [None, 5, {}, {"error": None}, {"error": {"code": 7}}, []])
def test_an_error_that_says_nothing_has_no_text(body):
    assert said_in(body) == ""


def test_seeds_differ_by_item_and_sample_and_fit_an_int32():
    seeds = {derived_seed(1, item, sample) for item in range(50) for sample in range(8)}
    assert len(seeds) == 400 and max(seeds) < 2**31 and derived_seed(1, 2, 3) == derived_seed(1, 2, 3) != derived_seed(2, 2, 3)


# Numbers


def test_pass_at_k_is_the_share_of_draws_with_a_success():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert numbers.pass_at_k(n, c, k) == pytest.approx(fmean(map(any, draws)))
    with pytest.raises(ValueError, match="needs 3 samples"):
        numbers.pass_at_k(2, 1, 3)


@pytest.mark.parametrize("solved,count", [(0, 10), (10, 10), (3, 10), (81, 263), (1, 1)])
def test_wilsons_bounds_are_where_the_score_test_just_rejects(solved, count):
    share = solved / count
    for bound in numbers.wilson(share, count):
        if 0 < bound < 1:
            assert abs(share - bound) / math.sqrt(bound * (1 - bound) / count) == pytest.approx(1.959964, rel=1e-5)
        else:
            assert bound == pytest.approx(share)


def test_wilson_agrees_with_the_published_example():
    # Newcombe 1998, table I: 81 of 263 and 15 of 148.
    assert numbers.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert numbers.wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


def test_the_bootstraps_interval_is_about_the_normal_one_for_many_values():
    rng = random.Random(4)
    values = [rng.random() for _ in range(1000)]
    half = 1.96 * math.sqrt(sum((value - fmean(values))**2 for value in values) / 999 / 1000)
    low, high = numbers.bootstrap(values)
    assert (low, high) == pytest.approx((fmean(values) - half, fmean(values) + half), abs=0.002)
    assert numbers.bootstrap(values) == (low, high)  # the same for the same records


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = random.Random(5)
    hits = 0
    for number in range(200):
        values = [rng.betavariate(2, 5) for _ in range(40)]
        low, high = numbers.bootstrap(values, seed=number)
        hits += low <= 2 / 7 <= high
    assert 178 <= hits <= 199


def test_equal_rewards_do_not_claim_certainty():
    found = numbers.figure([1.0] * 10)
    assert found["low"] == pytest.approx(0.7225, abs=1e-4) and found["method"] == "Wilson"


def attempt(item, sample=0, outcome="success", reward=1.0, category="", upstream=None):
    scored = outcome in numbers.SCORED
    return {
        "item": item, "index": int(item.rsplit("_", 1)[-1]) if item[-1].isdigit() else ord(item[-1]), "sample": sample, "outcome": outcome, "category": category, "success": outcome == "success" if scored else None,
        "reward": reward if scored else None, "scaled": reward if scored else None,
        "upstream_reward": (reward if upstream is None else upstream) if scored else None, "rounds": 3, "invalid_actions": 1,
        "model_retries": 0, "tries_before": [], "model_seconds": 0.5, "env_seconds": 0.25,
        "usage": {"prompt": 100, "completion": 10, "cached": 40, "reasoning": 0, "unknown": 0}
    }


def test_infrastructure_never_enters_a_score_but_upstream_counts_it_as_zero():
    found = numbers.summarize([attempt("a"), attempt("b", outcome="failure", reward=0.5), attempt("c", outcome="env_error"),
                               attempt("d", outcome="timeout")], samples=1, expected=5)
    assert (found["success"]["mean"], found["reward"]["mean"], found["errors"], found["items"]) == (0.5, 0.75, 2, 2)
    assert (found["attempts"], found["expected"], found["error_rate"]) == (4, 5, 0.5)
    assert found["upstream"] == {"score": 0.375, "success": 0.25, "avg@1": 0.375, "pass@1": 0.5}


def test_items_weigh_the_same_whatever_samples_they_lost():
    found = numbers.summarize([attempt("a", 0), attempt("a", 1), attempt("b", 0, "failure", 0.0), attempt("b", 1, "model_error")], 2)
    assert found["success"]["mean"] == 0.5 and found["pass_at"]["2"]["items"] == 1


def test_pass_at_k_says_of_how_many_items_it_is():
    from evaluation import show
    found = numbers.summarize([attempt("a", 0), attempt("a", 1), attempt("b", 0), attempt("b", 1, "model_error")], 2)
    assert show.pass_text(found["pass_at"]["2"], found["items"]).endswith("] of 1 of 2 items")
    whole = numbers.summarize([attempt("a", 0), attempt("a", 1)], 2)
    assert show.pass_text(whole["pass_at"]["2"], whole["items"]).endswith("]")


def test_progress_counts_what_a_resumed_run_had_and_each_attempt_once():
    import io

    from rich.console import Console

    from evaluation.show import Watch
    lines = [{**attempt(str(n), 0, outcome), "usage": {"prompt": 1, "completion": 1}}
             for n, outcome in enumerate(("success", "failure", "model_error"))]
    watch = Watch(4, lines[:2], Console(file=io.StringIO()))
    assert watch.facts().startswith("success 50.0 %") and watch.done == 2
    watch(lines[2])
    watch({**lines[2], "outcome": "success"})
    assert watch.facts() == "success 66.7 %, 4 tokens, 0 errors" and watch.done == 3


@pytest.mark.parametrize("price", ["input = nan\noutput = 1", "input = 1\noutput = -1", "input = 1\noutput = inf"])
def test_a_price_that_is_none_is_refused(price, tmp_path):
    from evaluation.prices import read_price
    (tmp_path / "p.toml").write_text(f"[m]\n{price}\n")
    with pytest.raises(Misuse, match="numbers of at least 0"):
        read_price(str(tmp_path / "p.toml"), "m")


def test_categories_are_scored_apart():
    found = numbers.summarize([attempt("a", category="x"), attempt("b", 0, "failure", 0.0, "y"), attempt("c", category="y")], 1)
    assert {name: one["success"]["mean"] for name, one in found["categories"].items()} == {"x": 1.0, "y": 0.5}


def test_a_killed_stretch_of_work_lasted_until_its_last_attempt_ended():
    played = [{"started": f"2026-01-01T00:00:{second}+00:00", "seconds": 4.5} for second in ("01.500", "02.000", "31.000")]
    first, second = {"started": "2026-01-01T00:00:01.000+00:00", "seconds": None}, {"started": "2026-01-01T00:00:30.000+00:00", "seconds": 7.0}
    assert numbers.wall([first, second], played) == 5.5 + 7.0 and numbers.wall([second], played) == 7.0
    assert numbers.wall([{**first, "seconds": 3.0}, {**second, "seconds": None}], played) == 3.0 + 5.5
    assert numbers.wall([first], []) == numbers.wall([], played) == 0.0


def test_cost_needs_a_price_and_all_tokens():
    usage = {"prompt": 100, "completion": 10, "cached": 40, "reasoning": 0, "unknown": 0}
    assert numbers.cost(usage, {"input": 2.0, "output": 10.0}) == pytest.approx((100 * 2 + 10 * 10) / 1e6)
    assert numbers.cost(usage, {"input": 2.0, "output": 10.0, "cached": 1.0}) == pytest.approx((60 * 2 + 40 + 100) / 1e6)
    assert numbers.cost(usage, None) is None and numbers.cost({**usage, "unknown": 1}, {"input": 2.0, "output": 1.0}) is None


def test_a_comparison_is_paired():
    one = [attempt(str(n), 0, "success" if n < 5 else "failure", float(n < 5)) for n in range(10)]
    other = [attempt(str(n), 0, "success" if n < 8 and n != 0 else "failure", float(n < 8 and n != 0)) for n in range(11)]
    found = numbers.compare(one, other)
    assert (found["items"], found["only_other"], found["gained"], found["lost"]) == (10, 1, ["5", "6", "7"], ["0"])
    assert found["success"]["mean"] == pytest.approx(0.2) and found["success"]["low"] < 0.2 < found["success"]["high"]


def test_items_are_paired_however_their_lists_spell_them():
    one, other = [attempt(f"maze_{n}") for n in range(4)], [attempt(f"lmrlgym_maze_{n}", outcome="failure", reward=0.0) for n in range(5)]
    found = numbers.compare(one, other)
    assert (found["items"], found["only_one"], found["only_other"], found["lost"]) == (4, 0, 1, [f"maze_{n}" for n in range(4)])


def test_another_task_under_the_same_id_is_no_pair():
    one = [{**attempt(str(n)), "task": f"t{n}"} for n in range(4)]
    other = [{**attempt(str(n), outcome="failure", reward=0.0), "task": task} for n, task in enumerate(["t0", "tx", "", "t3"])]
    found = numbers.compare(one, other)
    assert (found["items"], found["other_task"], found["lost"], found["only_one"]) == (3, 1, ["0", "2", "3"], 0)
    assert numbers.compare(one, other, same_words=False)["items"] == 4


# Records


@given(st.lists(st.dictionaries(st.text(), st.text()), min_size=1), st.data())
def test_whatever_is_cut_off_only_the_last_line_is_lost(values, data):
    text = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    cut = data.draw(st.integers(0, len(text)))
    read, size = records.whole_lines(text[:cut])
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
    assert len(records.read_lines(tmp_path / "x")) == 2


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


# Settings and the command line


def test_a_key_is_asked_for_where_openais_endpoint_is_meant():
    assert api_key("http://127.0.0.1:8000/v1", {}) == "none" and api_key("", {"OPENAI_API_KEY": " k\n"}) == "k"
    for url in ("", "https://api.openai.com/v1"):
        with pytest.raises(Misuse, match="no OPENAI_API_KEY"):
            api_key(url, {})


def test_a_key_may_lie_in_a_file(tmp_path):
    file = tmp_path / "key"
    file.write_text("from-the-file\n")
    assert api_key("", {"OPENAI_API_KEY_FILE": str(file)}) == "from-the-file"
    assert api_key("", {"OPENAI_API_KEY": "k", "OPENAI_API_KEY_FILE": str(file)}) == "k"
    file.write_text("")  # what Compose makes of an empty variable
    assert api_key("http://127.0.0.1:8000/v1", {"OPENAI_API_KEY_FILE": str(file)}) == "none"
    with pytest.raises(Misuse, match="cannot be read"):
        api_key("", {"OPENAI_API_KEY_FILE": str(tmp_path / "none")})


@pytest.mark.parametrize("key", ["sk-secret\nsecond", "sk-secret second", "sk-sec\x01ret", "sk-secr\u00e9t", "sk-secret\x7f"], ids=ascii)
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key, tmp_path):
    file = tmp_path / "key"
    file.write_text(key + "\n")
    for name, value in (("OPENAI_API_KEY", key), ("OPENAI_API_KEY_FILE", str(file))):
        with pytest.raises(Misuse, match=name) as caught:
            api_key("", {name: value})
        assert "sk-" not in str(caught.value) and "second" not in str(caught.value)


@pytest.mark.parametrize("url,shown", [
    ("https://me:pw@host/v1", "https://***@host/v1"), ("http://user:p@ss@host:8/v1", "http://***@host:8/v1"),
    ("http://user@host", "http://***@host"), ("http://host/a@b", "http://host/a@b"), ("cannot reach http://a:b@c d@e", "cannot reach http://***@c d@e"),
])
def test_logins_in_addresses_are_hidden(url, shown):
    assert redacted_url(url) == shown


@pytest.mark.parametrize("text", ["{", "[1]", "3", '{"x": NaN}', '{"x": [-Infinity]}', '{"x": 1e999}', "[" * 100000], ids=lambda text: text[:20])
def test_an_extra_body_that_is_no_object_is_refused(text):
    with pytest.raises(Misuse, match="--extra-body"):
        extra_body(text)


@pytest.mark.parametrize("url", [
    "localhost:8000", "http://127.0.0.1:x/v1", "http://127.0.0.1:99999/v1", "http://[::1", "http://a..b:1", "http://:80", "http://",
    "http://joe:hunter2@127.0.0.1:x", "http://joe:hun/ter2@host", "http://joe:hunter2@a..b", "http://a b", "joe:hunter2@host",
])
def test_what_is_no_address_is_refused_without_its_login(url):
    with pytest.raises(Misuse, match="no address") as caught:
        check_url("--server", url)
    assert "joe" not in str(caught.value) and "ter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://host/v1?api_key=hunter2", "http://me:hunter2@host/v1#hunter2"])
def test_an_address_that_no_route_can_follow_is_refused_without_its_secret(url):
    with pytest.raises(Misuse, match="has a query or fragment") as caught:
        check_url("--base-url", url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://[::1]:80/v1", "http://my_server:8000", "https://me:p@ss@host/v1", "http://bücher.example", "https://host/@me/v1"])
def test_an_address_is_taken_as_it_is(url):
    assert check_url("--server", url + "/") == url


@pytest.mark.parametrize("argv,told", [
    ([], "required"), (["fly"], "invalid choice"), (["run", "--samples", "0"], "--samples"), (["run", "--samples", "x"], "--samples"),
    (["run", "--env", "serchqa"], "did you mean searchqa"), (["run", "--temperature", "hot"], "--temperature hot"),
    (["run", "--env", "textcraft", "--items", "9999"], "no item 9999"), (["run", "--env", "textcraft", "--model", "expert"], "no scripted players"),
    (["run", "--env", "demo"], "no OPENAI_API_KEY"), (["run", "--env", "demo", "--environments", "/nowhere.toml"], "no rows in"),
    (["rescore", "/nowhere"], "no run in"), (["run", "--prompt", "/nowhere", "--env", "demo"], "--prompt /nowhere cannot be read: No such file or directory; name a text file"),
    (["run", "--prices", "/nowhere", "--env", "demo", "--model", "expert"], "--prices /nowhere cannot be read: No such file or directory; name a TOML or JSON file"), (["run", "--fresh", "--resume", "--env", "demo"], "contradict"),
    (["run", "--env", "demo", "--model", "expert", "--items", "textcraft_3"], "is one of textcraft"),
    (["run", "--env", "demo", "--base-url", "ftp"], "--base-url: 'ftp' is no address; write it like http://127.0.0.1:8000/v1"),
    (["run", "--env", "demo", "--model", "a\udcffb"], "--model 'a\\udcffb' has characters"),
    (["run", "--limit", "x"], "--limit: x is no whole number"), (["run", "--limit", "0"], "--limit: 0 is not at least 1"),
    (["run", "--time-limit", "soon"], "--time-limit: soon is no number"), (["run", "--seed", "x"], "--seed: x is no whole number"), (["run", "--env", "demo", "--max-error-rate", "7"], "--max-error-rate"),
    (["prompts", "--agentgym", "/nowhere"], "no prompt of"), (["run", "--env", "demo", "--resume", "--model", "expert"], "no run in"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_misuse_is_one_line_and_exit_code_2(argv, told, capsys, monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ENV", "MODEL", "ENVIRONMENTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_put_in_place_leaves_no_other(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError):
        records.write_whole(tmp_path / "out", "text")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_players_of_an_environment_in_a_file_of_its_own_are_found(tmp_path, monkeypatch):
    own = ROOT / "environments" / "own-of-the-test.toml"
    monkeypatch.chdir(ROOT)
    own.parent.mkdir(exist_ok=True)
    demo = re.search(r"\[demo\].*?(?=\n\[(?!demo)|\Z)", ROWS.read_text(), re.DOTALL)[0]
    own.write_text(demo.replace("[demo", "[mine"))
    try:
        monkeypatch.setenv("ENVIRONMENTS", str(own))
        assert main(["run", "--env", "mine", "--model", "expert", "--check"]) == 0
    finally:
        own.unlink()
        with suppress(OSError):  # it holds somebody's own
            own.parent.rmdir()


def test_the_rows_file_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.delenv("ENVIRONMENTS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert rows_file() == ROWS
    monkeypatch.setenv("ENVIRONMENTS", "tests/fixtures/environments.toml")
    assert rows_file() == ROOT / "tests/fixtures/environments.toml"


def test_the_evaluation_imports_nothing_of_the_other_wings():
    import ast
    for path in (ROOT / "evaluation").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"tasks", "scripts", "servers", "torch", "agentenv_demo"}, path
