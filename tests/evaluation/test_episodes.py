"""Parts of an episode: judgement, seeds, the first message."""
import pytest

from evaluation.episodes import derived_seed, first_message, judge, opening
from evaluation.prompts import Prompt
from evaluation.protocol import First
from evaluation.rows import read_row
from tests.fixtures.servers import ROOT

ROWS = ROOT / "environments.toml"

def row(name):
    return read_row(name, ROWS)


def test_the_first_observation_is_dressed_as_the_client_does():
    prompt = Prompt(source="agentgym", user="u", before_first="Before.\n", actions_label="\nCAN: ")
    assert first_message(prompt, First("o", ["a", "b"]), "") == "Before.\no\nCAN: a,b"
    words = Prompt(source="agentgym", user="u", first="W {{vocab}}")
    assert first_message(words, First("o", []), "x\ny") == "W x\ny"
    assert [message["role"] for message in opening(prompt, "o")] == ["user", "assistant", "user"]
    assert opening(Prompt(source="file", user="u", assistant=""), "o") == [{"role": "user", "content": "u\n\no"}]


@pytest.mark.parametrize("name,reward,done,outcome,scaled", [
    ("babyai", 0.8875, True, "success", 0.8875), ("babyai", 0.0, True, "failure", 0.0),
    ("sciworld", 100.0, True, "success", 1.0), ("sciworld", 75.0, True, "failure", 0.75), ("sciworld", -100.0, True, "failure", 0.0),
    ("textcraft", 1, True, "success", 1.0), ("textcraft", 0, False, "max_rounds", 0.0), ("webshop", 0.66, True, "failure", 0.66),
], ids=str)
def test_success_is_what_the_row_says(name, reward, done, outcome, scaled):
    assert judge(row(name), reward, done) == outcome and row(name).scaled(reward) == pytest.approx(scaled)


def test_seeds_differ_by_item_and_sample_and_fit_an_int32():
    seeds = {derived_seed(1, item, sample) for item in range(50) for sample in range(8)}
    assert len(seeds) == 400 and max(seeds) < 2**31 and derived_seed(1, 2, 3) == derived_seed(1, 2, 3) != derived_seed(2, 2, 3)
