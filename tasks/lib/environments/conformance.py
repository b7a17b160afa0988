"""Whether a running server keeps the protocol of its row: what `env.check` shows."""
from collections.abc import Callable
from dataclasses import dataclass

from servers.protocol import Client, ServerError, Step, shown
from tasks.lib.environments.rows import Environment

# No environment's vocabulary holds it, and no JSON reader stumbles over it.
BAD_ACTION = "\u2603 no such action"
SAME_ITEM, APART = "same item twice the same", "two sessions apart"
# How many sessions a check holds at once, where it is more than one.
SESSIONS = {SAME_ITEM: 2, APART: 3}


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        holds: None where the row says that the server has no such thing, or too few sessions for it.
    """
    check: str
    holds: bool | None
    detail: str


def short(text: str, width: int = 60) -> str:
    """Return `text` on one line of at most `width` characters, none of which does anything to a terminal."""
    return shown(" ".join(text.split()), width)


def outcome(call: Callable[[], object]) -> tuple[str, ServerError | None]:
    """Return what `call` answers, and the error where it answers one."""
    try:
        return str(call()), None
    except ServerError as error:
        return str(error), error


class Conformance:
    """The checks, in order; each works on sessions of its own and closes them."""

    def __init__(self, row: Environment, client: Client) -> None:
        self.row, self.client = row, client
        self.opened: list[int] = []

    def _session(self, item: int) -> tuple[int, str]:
        session = self.client.create()
        self.opened.append(session)
        return session, self.client.reset(session, item)

    def _step(self, session: int) -> Step:
        return self.client.step(session, self.row.check.action)

    def create(self) -> str:
        session = self.client.create()
        self.opened.append(session)
        return f"session {session}"

    def reset(self) -> str:
        _, observation = self._session(self.row.check.items[0])
        if not observation.strip():
            raise ServerError("the first observation is empty")
        return short(observation)

    def step(self) -> str:
        session, _ = self._session(self.row.check.items[0])
        step = self._step(session)
        low, high = self.row.reward_range
        if not low <= step.reward <= high:
            raise ServerError(f"reward {step.reward} is outside {low} to {high}")
        return f"{short(step.observation, 40)}, reward {step.reward:g}, done {step.done}"

    def same_item(self) -> str:
        item, other = self.row.check.items
        session, first = self._session(item)
        self._step(session)
        again = self.client.reset(session, item)
        _, elsewhere = self._session(item)
        if not first == again == elsewhere:
            raise ServerError(
                f"item {item} began as {short(first, 30)!r}, {short(again, 30)!r}, {short(elsewhere, 30)!r}")
        differs = self.client.reset(session, other) != first
        if not differs and not self.row.check.same_start:
            raise ServerError(f"items {item} and {other} begin alike")
        return f"item {item} three times" + (f", item {other} differs" if differs else "")

    def sessions_apart(self) -> str:
        item, other = self.row.check.items
        alone, _ = self._session(other)
        expected = self._step(alone)
        one, _ = self._session(item)
        two, _ = self._session(other)
        if one == two:
            raise ServerError(f"two sessions have the id {one}")
        self._step(one)
        found = self._step(two)
        if found != expected:
            raise ServerError(f"a session beside another answered {short(str(found))}, alone {short(str(expected))}")
        return f"sessions {one} and {two}"

    def bad_id(self) -> str:
        session, _ = self._session(self.row.check.items[0])
        text, error = outcome(lambda: self._step(max(self.opened) + 10**6))
        if error is None:
            raise ServerError(f"a session that nobody opened answered {short(text)}")
        self._step(session)
        return short(text)

    def bad_action(self) -> str:
        session, _ = self._session(self.row.check.items[0])
        text, error = outcome(lambda: self.client.step(session, BAD_ACTION).observation)
        if error is not None and error.status is None:
            raise error
        self.client.reset(session, self.row.check.items[0])
        return short(text)

    def close(self) -> str:
        session, _ = self._session(self.row.check.items[0])
        if not self.client.close(session):
            raise ServerError("close answered false for an open session")
        text, error = outcome(lambda: self._step(session))
        if error is None:
            raise ServerError(f"the closed session answered {short(text)}")
        return short(text)

    def run(self) -> list[Finding]:
        """Return a finding for every check."""
        checks: list[tuple[str, Callable[[], str]]] = [
            ("create", self.create),
            ("reset", self.reset),
            ("step", self.step),
            (SAME_ITEM, self.same_item),
            (APART, self.sessions_apart),
            ("bad id is an error", self.bad_id),
            ("bad action leaves the session usable", self.bad_action),
            ("close", self.close),
        ]
        findings = []
        for name, check in checks:
            needed, allowed = SESSIONS.get(name, 1), self.row.max_sessions
            if allowed is not None and needed > allowed:
                findings.append(Finding(name, None, f"needs {needed} sessions, the server allows {allowed}"))
                continue
            try:
                findings.append(Finding(name, True, check()))
            except ServerError as error:
                without = check == self.close and not self.row.protocol.close
                findings.append(Finding(name, None if without else False, short(str(error), 160)))
            for session in self.opened:  # between checks: some servers hold no more than eight sessions
                outcome(lambda session=session: self.client.close(session))  # type: ignore[misc]
            self.opened.clear()
        return findings
