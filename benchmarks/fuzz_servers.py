"""What of the servers is fuzzed: requests, between the steps of a neighbour."""
import random
import sys
from pathlib import Path

from fuzz import HERE, Target

sys.path.insert(0, str(HERE.parent))
EXAMPLES = 20  # of each input


def make(chance: random.Random) -> bytes:
    """Return a seed, of which `check` draws requests."""
    return str(chance.getrandbits(32)).encode()


def check(data: bytes, folder: Path) -> bool:
    """Play the requests that the seed draws; whatever is not answered as it should be is raised."""
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st

    from tests.servers import requests

    @seed(int(data))
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate, Phase.shrink])  # yapf: disable
    @given(st.lists(requests.anything(), max_size=6))
    def attack(drawn: "list[requests.Request]") -> None:
        requests.play(drawn)

    attack()
    return True


def targets() -> dict[str, Target]:
    """Return the servers' target."""
    return {"servers.requests": Target(make, check)}
