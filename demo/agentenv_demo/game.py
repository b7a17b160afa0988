"""The game: carry things to their boxes on a small grid.

Everything about an item follows from its number, on every machine. The first 48 items are for evaluation, twelve a level;
the 192 after them are for training, one of each level in turn. The levels:

    level 1   one thing on 3 by 3 rooms; the observation tells the direction: `find cup: east`
    level 2   two things on 4 by 4 rooms, directions told
    level 3   one thing on 5 by 5 rooms; only places are told: `find cup at 4,1 from 2,3`
    level 4   two things on 5 by 5 rooms, places told

Every thing taken and every thing put is worth an equal share of a total reward of 1.
"""
import random
from typing import NamedTuple, Optional

ITEMS = 240
EVALUATION = 48
ROUNDS = 30
ACTIONS = ("north", "south", "east", "west", "take", "put", "look")
MOVES = {"north": (0, -1), "south": (0, 1), "east": (1, 0), "west": (-1, 0)}
THINGS = ("cup", "key", "pen", "hat")

Place = tuple[int, int]


class Level(NamedTuple):
    """How large and how explicit an item is."""
    size: int
    things: int
    directions: bool


LEVELS = (Level(3, 1, True), Level(4, 2, True), Level(5, 1, False), Level(5, 2, False))


class Errand(NamedTuple):
    """One thing, the room in which it lies, and the room of its box."""
    thing: str
    lies: Place
    box: Place


def distance(one: Place, other: Place) -> int:
    """Return the number of moves between two rooms."""
    return abs(one[0] - other[0]) + abs(one[1] - other[1])


def layout(item: int) -> tuple[Level, Place, list[Errand]]:
    """Return level, first room and errands of `item`.

    Raises:
        ValueError: there is no such item.
    """
    if not 0 <= item < ITEMS:
        raise ValueError(f"no item {item}; items are 0 to {ITEMS - 1}")
    level = LEVELS[item * len(LEVELS) // EVALUATION if item < EVALUATION else item % len(LEVELS)]
    rng = random.Random(item)

    def room() -> Place:
        return rng.randrange(level.size), rng.randrange(level.size)

    while True:
        start = room()
        things = rng.sample(THINGS, level.things)
        errands = [Errand(thing, room(), room()) for thing in things]
        legs, here = [], start
        for errand in errands:
            legs += [distance(here, errand.lies), distance(errand.lies, errand.box)]
            here = errand.box
        # Each leg is a walk, and a player who never errs has rounds to spare.
        if min(legs) >= 1 and sum(legs) + 2 * len(errands) <= ROUNDS - 4:
            return level, start, errands


class Game:
    """One episode of one item."""

    def __init__(self, item: int) -> None:
        self.item = item
        self.level, self.here, self.errands = layout(item)
        self.achieved = 0  # takes and puts so far
        self.rounds = 0

    @property
    def reward(self) -> float:
        """The share of the work that is done, 0 to 1."""
        return self.achieved / (2 * len(self.errands))

    @property
    def done(self) -> bool:
        """Whether all is delivered, or the rounds are used up."""
        return self.achieved == 2 * len(self.errands) or self.rounds >= ROUNDS

    def _target(self) -> Optional[tuple[str, Place]]:
        if self.achieved == 2 * len(self.errands):
            return None
        errand = self.errands[self.achieved // 2]
        if self.achieved % 2 == 0:
            return "find " + errand.thing, errand.lies
        return "bring " + errand.thing, errand.box

    def observation(self) -> str:
        """Say what to do next and where."""
        target = self._target()
        if target is None:
            return "all done"
        words, place = target
        if not self.level.directions:
            return f"{words} at {place[0]},{place[1]} from {self.here[0]},{self.here[1]}"
        dx, dy = place[0] - self.here[0], place[1] - self.here[1]
        if dx:
            return words + (": east" if dx > 0 else ": west")
        if dy:
            return words + (": south" if dy > 0 else ": north")
        return words + ": here"

    def step(self, action: str) -> str:
        """Take `action` and return the observation; what is no action or does nothing is marked by a `?`.

        Raises:
            ValueError: the episode is over.
        """
        if self.done:
            raise ValueError("the episode is over")
        self.rounds += 1
        target = self._target()
        assert target is not None  # otherwise the episode were over
        action = action.strip().lower()
        if action in MOVES:
            x, y = self.here[0] + MOVES[action][0], self.here[1] + MOVES[action][1]
            if 0 <= x < self.level.size and 0 <= y < self.level.size:
                self.here = (x, y)
                return self.observation()
        elif action == "look":
            return self.observation()
        elif action == ("take" if self.achieved % 2 == 0 else "put") and self.here == target[1]:
            self.achieved += 1
            return self.observation()
        return "? " + self.observation()
