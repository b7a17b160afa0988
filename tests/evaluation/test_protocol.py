"""What a server's replies mean, and what of them is the environment's fault."""
import math

import pytest

from evaluation.problems import EnvironmentFault
from evaluation.protocol import first_in, session_in, step_in
from evaluation.rows import Protocol, read_row
from tests.fixtures.servers import ROOT

ROWS = ROOT / "environments.toml"

def row(name):
    return read_row(name, ROWS)


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
