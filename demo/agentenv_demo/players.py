"""Players of the game: an expert that reads nothing but the observation, and a random one."""
import random
import re
from typing import Callable

from .game import ACTIONS

Player = Callable[[str], str]

_PLACES = re.compile(r"at (\d+),(\d+) from (\d+),(\d+)")


def expert(observation: str) -> str:
    """Return the right action for `observation`."""
    at_target = "take" if "find" in observation else "put"
    places = _PLACES.search(observation)
    if places is None:
        direction = observation.rsplit(": ", 1)[-1]
        return at_target if direction == "here" else direction
    to_x, to_y, x, y = map(int, places.groups())
    if to_x != x:
        return "east" if to_x > x else "west"
    if to_y != y:
        return "south" if to_y > y else "north"
    return at_target


def random_player(seed: int) -> Player:
    """Return a player that takes any action, the same ones for the same seed."""
    rng = random.Random(seed)
    return lambda observation: rng.choice(ACTIONS)
