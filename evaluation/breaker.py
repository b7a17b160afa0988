"""When it is of no use to go on: a count of attempts that an endpoint answered uselessly, or not at all.

Until it has answered once, what is wrong is the configuration, and REFUSALS attempts show it; afterwards only an
endpoint that LOST attempts in a row did not reach has gone.
"""
from evaluation.model import LOST

REFUSALS = 3


class Breaker:
    """What has come of the requests to one endpoint.

    Attributes:
        answered: whether it ever gave a completion.
        useless: attempts that got none, while no other had got one.
    """

    def __init__(self) -> None:
        self.answered = False
        self.useless: set[tuple[int, int]] = set()
        self._lost = 0

    def success(self) -> None:
        """Note a completion."""
        self.answered, self._lost = True, 0

    def reached(self) -> None:
        """Note that somebody is there, whatever the answer was."""
        self._lost = 0

    def failed(self, attempt: tuple[int, int]) -> bool:
        """Note that an attempt got no completion; return True if it is of no use to go on."""
        if self.answered:
            return False
        self.useless.add(attempt)
        return len(self.useless) >= REFUSALS

    def unreached(self, attempt: tuple[int, int]) -> bool:
        """Note that an attempt did not reach the endpoint; return True if it is of no use to go on."""
        self._lost += 1
        return self.failed(attempt) or (self.answered and self._lost >= LOST)
