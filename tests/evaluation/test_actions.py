"""What a completion means as an action, by each rule."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.actions import parse, phrase


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
