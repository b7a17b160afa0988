"""Play the environment demo with its own players, over HTTP: what `invoke quickstart` shows of an environment."""
import sys
from collections.abc import Callable

from servers.protocol import Client
from tasks.lib.environments import Environment
from tasks.lib.settings import ROOT


def play(row: Environment, client: Client, item: int, player: Callable[[str], str]) -> float:
    """Play one item to its end and return the last reward."""
    session = client.create()
    try:
        observation, reward, done = client.reset(session, item), 0.0, False
        while not done:
            observation, reward, done = client.step(session, player(observation))
    finally:
        client.close(session)
    return reward


def play_both(row: Environment, url: str) -> str:
    """Play every item with the expert and with a random player; return one line with their mean rewards."""
    # The demo is a package of its own, as AgentGym's are: it is imported from its folder, not from this project.
    sys.path.insert(0, str(ROOT / row.folder))
    try:
        from agentenv_demo.players import expert, random_player
    finally:
        sys.path.pop(0)
    client = Client(url, row.protocol.model_dump())
    items = range(row.items.first, (row.items.last or 0) + 1)
    means = []
    for player in (expert, random_player(0)):
        rewards = [play(row, client, item, player) for item in items]
        means.append(sum(rewards) / len(rewards))
    return f"demo, {len(items)} items: expert {means[0]:.2f}, random {means[1]:.2f} mean reward"
