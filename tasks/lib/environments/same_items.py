"""Whether an item is the same task every time: what `env.check --items` and `--all` play.

Every replica gets two sessions. In each an item is reset twice, and after each reset the same script is played; all of
these trajectories must be equal, and equal to those after a restart.
"""
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from environment_rows import Environment
from servers.protocol import Client, ServerError
from tasks.lib.environments.conformance import BAD_ACTION, short
from tasks.lib.errors import UserError

STEPS = 3  # of the row's action, then one that is none
CREATES = 8  # tries for each replica until a session on it is had

# First observation, then observation, reward and end of each step, as text; or the error that a reset gave.
Trajectory = tuple[str, ...]


def chosen_items(row: Environment, asked: str) -> list[int]:
    """Return the items of `asked`: numbers and ranges such as 0-50,100.

    Raises:
        UserError: it is no such list, or the row has no such item.
    """
    found: dict[int, None] = {}
    for piece in asked.split(","):
        ends = re.fullmatch(r"\s*(\d{1,12})(?:-(\d{1,12}))?\s*", piece, re.ASCII)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if first > last:
            raise UserError(f"--items {asked} is no list of items; give numbers and ranges such as 0-50,100")
        end = row.items.last
        if first < row.items.first or (end is not None and last > end):
            raise UserError(f"--items {asked}: {row.name} has the items {row.items.first} to "
                            f"{'…' if end is None else end}")
        if last - first > 1_000_000:
            raise UserError(f"--items {asked} are more than a million items; give fewer")
        found.update(dict.fromkeys(range(first, last + 1)))
    return list(found)


def all_items(row: Environment) -> list[int]:
    """Return every item of the row.

    Raises:
        UserError: they have no end.
    """
    if row.items.last is None:
        raise UserError(f"the items of {row.name} have no end; give some with --items 0-999")
    return list(range(row.items.first, row.items.last + 1))


@dataclass
class SameItems:
    """The trajectories of items on a server, compared as they come.

    Attributes:
        expected: the first trajectory of each item.
        differing: items that were not the same twice, with where they parted.
        failing: items whose reset was an error, with its words.
        played: how many trajectories.
    """
    row: Environment
    script: Sequence[str]
    expected: dict[int, Trajectory] = field(default_factory=dict)
    differing: dict[int, str] = field(default_factory=dict)
    failing: dict[int, str] = field(default_factory=dict)
    played: int = 0

    def play(self, client: Client, items: Iterable[int], replicas: int, tell: Callable[[str], None]) -> None:
        """Play `items` twice in two sessions of every replica.

        Raises:
            ServerError: no session could be had.
        """
        opened: list[int] = []
        try:
            sessions = self._sessions(client, replicas, opened)
            for number, item in enumerate(items):
                for session in sessions:
                    for _ in range(2):
                        self._compare(item, self._trajectory(client, session, item))
                if number % 100 == 99:
                    tell(f"{number + 1} items, {len(self.differing)} differ, {len(self.failing)} fail")
        finally:
            for session in opened:
                with suppress(ServerError):  # it is gone, and so is what it held
                    client.close(session)

    def reset_all(self, client: Client, items: Iterable[int], tell: Callable[[str], None]) -> None:
        """Reset every item once in one session, and note those that cannot be.

        Raises:
            ServerError: no session could be had.
        """
        session = client.create()
        try:
            for number, item in enumerate(items):
                try:
                    self.expected[item] = (client.reset(session, item), )
                except ServerError as error:
                    self.failing[item] = str(error)
                self.played += 1
                if number % 500 == 499:
                    tell(f"{number + 1} items, {len(self.failing)} fail")
        finally:
            client.close(session)

    def _sessions(self, client: Client, replicas: int, opened: list[int]) -> list[int]:
        each = 2 if self.row.max_sessions is None or self.row.max_sessions > 1 else 1
        found: dict[int, list[int]] = {}
        for _ in range(CREATES * replicas):
            session = client.create()
            opened.append(session)
            mine = found.setdefault(session % replicas, [])
            if len(mine) < each:
                mine.append(session)
            else:
                opened.remove(session)
                client.close(session)
            if sum(map(len, found.values())) == each * replicas:
                break
        if len(found) < replicas:
            raise ServerError(
                f"no session on {replicas - len(found)} of {replicas} replicas in {CREATES * replicas} tries")
        return [session for mine in found.values() for session in mine]

    def _trajectory(self, client: Client, session: int, item: int) -> Trajectory:
        try:
            seen = [client.reset(session, item)]
        except ServerError as error:
            return (f"error: {error}", )
        for action in self.script:
            try:
                step = client.step(session, action)
            except ServerError as error:
                seen.append(f"error {error.status}")
                break
            seen.append(f"{step.observation}\n{step.reward!r} {step.done}")
            if step.done:
                break
        return tuple(seen)

    def _compare(self, item: int, found: Trajectory) -> None:
        self.played += 1
        if found[0].startswith("error: "):
            self.failing.setdefault(item, found[0].removeprefix("error: "))
            return
        expected = self.expected.setdefault(item, found)
        if found != expected and item not in self.differing:
            place = next(
                (number for number, (one, other) in enumerate(zip(expected, found, strict=False)) if one != other),
                min(len(expected), len(found)))
            one, other = (trajectory[place] if place < len(trajectory) else "" for trajectory in (expected, found))
            common = next((at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right),
                          min(len(one), len(other)))
            begin = max(0, common - 20)
            self.differing[item] = (f"{'the first observation' if place == 0 else f'step {place}'}: "
                                    f"…{short(one[begin:], 40)!r}, then …{short(other[begin:], 40)!r}")


def script_of(row: Environment) -> list[str]:
    """Return the actions that are played after each reset."""
    return [row.check.action] * STEPS + [BAD_ACTION]
