"""Suites: what comes of pairs that were played, over real HTTP; the tasks that play them have their own tests."""
import json

import pytest

from evaluation.__main__ import main
from evaluation.suites import cost_of
from tests.fixtures.servers import FIXTURE_ROWS
from tests.fixtures.standins import completion, counter_player, endpoint, environment


def line(cost, unknown=0):
    return {"cost": cost, "usage": {"unknown": unknown}}


@pytest.mark.parametrize("lines,shown", [
    ([line(1.0), line(2.0)], "3.0000"), ([line(1.0), line(2.0, 3)], "at least 3.0000 (3 answers unknown)"), ([line(None), line(2.0)], "at least 2.0000 (1 of 2 environments without a cost)"),
    ([line(None, 1), line(None)], "-"), ([{}, line(0.0, 1)], "at least 0.0000 (1 answers unknown, 1 of 2 environments without a cost)"),
])
def test_a_suites_cost_is_the_least_where_a_part_is_unknown(lines, shown):
    assert cost_of(lines) == shown


def test_a_suite_says_that_an_endpoint_did_not_tell_all_tokens(tmp_path, capsys):
    def say(messages, body):
        found = completion(counter_player(messages, body))
        return {**found, "usage": None} if messages[2]["content"] == "count 1" else found

    (tmp_path / "prices.toml").write_text('["stand-in"]\ninput = 1000.0\noutput = 5000.0\n')
    with environment() as env, endpoint(say) as model:
        words = ["--env", "form-textcraft", "--environments", str(FIXTURE_ROWS), "--server", env.url, "--base-url", model.base_url, "--model", "stand-in", "--items", "0-1", "--root", str(tmp_path)]
        assert main(["run", *words]) == 0
    plan = {"name": "s", "pairs": [{"env": "form-textcraft", "model": "stand-in", "words": words}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    capsys.readouterr()
    assert main(["suite", str(tmp_path / "plan.json"), "--prices", str(tmp_path / "prices.toml")]) == 0
    assert "at least 0.0600 (3 answers unknown)" in capsys.readouterr().out
