"""The demo environment: deterministic, rising in difficulty, solvable from observations, hard to hit by chance."""
import subprocess
import sys

import pytest

from tasks.lib.environments.rows import environment
from tests.fixtures.servers import ROOT, running

sys.path.insert(0, str(ROOT / "demo"))
from agentenv_demo.game import ACTIONS, EVALUATION, ITEMS, LEVELS, ROUNDS, Game, distance, layout
from agentenv_demo.players import expert, random_player


def play(item, player):
    game = Game(item)
    observation = game.observation()
    while not game.done:
        observation = game.step(player(observation))
    return game


@pytest.mark.parametrize("item", range(ITEMS))
def test_the_expert_solves_the_item_in_the_fewest_rounds(item):
    _, here, errands = layout(item)
    fewest = 0
    for errand in errands:
        fewest += distance(here, errand.lies) + distance(errand.lies, errand.box) + 2
        here = errand.box
    game = play(item, expert)
    assert game.reward == 1.0 and game.rounds == fewest < ROUNDS


def test_a_random_player_is_clearly_below():
    rewards = [play(item, random_player(seed)).reward for seed in range(20) for item in range(ITEMS)]
    assert 0.0 < sum(rewards) / len(rewards) < 0.2


def test_later_levels_take_more():
    rounds = [play(item, expert).rounds for item in range(EVALUATION)]
    per_level = [sum(rounds[first:first + 12]) / 12 for first in range(0, EVALUATION, EVALUATION // len(LEVELS))]
    assert per_level[0] < per_level[1] and per_level[2] < per_level[3]


def test_every_level_has_items_for_evaluation_and_for_training():
    for items in (range(EVALUATION), range(EVALUATION, ITEMS)):
        levels = [layout(item)[0] for item in items]
        assert [levels.count(level) for level in LEVELS] == [len(items) // len(LEVELS)] * len(LEVELS)


def test_items_differ_and_are_the_same_in_every_process():
    layouts = [str(layout(item)) for item in range(ITEMS)]
    held_out = set(layouts[:EVALUATION])
    assert len(held_out) == EVALUATION and not held_out & set(layouts[EVALUATION:])
    code = "from agentenv_demo.game import *; print([str(layout(item)) for item in range(ITEMS)])"
    fresh = subprocess.run([sys.executable, "-c", code],
                           cwd=ROOT / "demo",
                           capture_output=True,
                           text=True,
                           env={"PYTHONHASHSEED": "7"})
    assert fresh.stdout.strip() == str(layouts)


def test_observations_and_actions_are_short():
    seen = set()
    for item in range(ITEMS):
        game = Game(item)
        observation = game.observation()
        while not game.done:
            seen.add(observation)
            observation = game.step(expert(observation))
    assert max(map(len, seen)) <= 32 and max(map(len, ACTIONS)) <= 8


def test_half_the_work_is_half_the_reward():
    game = Game(0)
    while game.reward == 0:
        game.step(expert(game.observation()))
    assert game.reward == 0.5 and not game.done


def test_the_rounds_end_an_episode():
    game = play(0, lambda observation: "look")
    assert (game.rounds, game.reward, game.done) == (ROUNDS, 0.0, True)
    with pytest.raises(ValueError, match="over"):
        game.step("look")


def test_what_is_no_action_is_marked_and_changes_nothing():
    game = Game(0)
    before = game.observation()
    assert game.step("fly") == "? " + before == game.step("put")


@pytest.mark.parametrize("item", [-1, ITEMS])
def test_an_item_that_does_not_exist_is_an_error(item):
    with pytest.raises(ValueError, match=f"no item {item}"):
        Game(item)


def test_the_row_tells_the_truth(tmp_path):
    row = environment("demo")
    assert (row.items.last, row.rounds, row.items.eval_size) == (ITEMS - 1, ROUNDS, EVALUATION)
    with running(row, tmp_path) as client:
        session = client.create()
        observation = client.reset(session, ITEMS - 1)
        step = client.step(session, "look")
        while not step.done:
            step = client.step(session, expert(step.observation))
        assert row.success.holds(step.reward) and observation.startswith("find")
