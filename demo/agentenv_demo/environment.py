"""The sessions of one server."""
from typing import Any

from .game import Game


class Environment:
    """Sessions by id; every answer is AgentGym's payload, errors included."""

    def __init__(self) -> None:
        self._next = 0
        self._games: dict[int, Game] = {}

    def create(self) -> dict[str, Any]:
        """Open a session; it plays item 0 until its first reset."""
        session = self._next
        self._next += 1
        self._games[session] = Game(0)
        return {"id": session, **self._payload(session)}

    def reset(self, session: int, item: int) -> dict[str, Any]:
        """Start `item` in the session."""
        if session not in self._games:
            return {"error": f"no session {session}"}
        try:
            self._games[session] = Game(item)
        except ValueError as error:
            return {"error": str(error)}
        return {"id": session, **self._payload(session)}

    def step(self, session: int, action: str) -> dict[str, Any]:
        """Take an action in the session."""
        if session not in self._games:
            return {"error": f"no session {session}"}
        game = self._games[session]
        try:
            observation = game.step(action)
        except ValueError as error:
            return {"error": str(error)}
        return {"observation": observation, "reward": game.reward, "done": game.done}

    def observe(self, session: int) -> Any:
        """Return the current observation of the session."""
        if session not in self._games:
            return {"error": f"no session {session}"}
        return self._games[session].observation()

    def close(self, session: int) -> bool:
        """Forget the session; False where there was none."""
        return self._games.pop(session, None) is not None

    def _payload(self, session: int) -> dict[str, Any]:
        game = self._games[session]
        return {"observation": game.observation(), "reward": game.reward, "done": game.done}
