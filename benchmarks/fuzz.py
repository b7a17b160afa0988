"""Draw inputs that nobody listed, for as long as asked.

    python benchmarks/fuzz.py TARGET [--seconds 600]

Ends with 1 and the smallest input found where a reader crashes, takes long, or lets a stranger's input through.
"""
import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def server_requests() -> tuple[st.SearchStrategy, Callable]:
    """Requests to an environment server, between the steps of a neighbour."""
    from tests.servers import requests
    return st.lists(requests.anything(), max_size=6), requests.play


TARGETS = {"server-requests": server_requests}


def main() -> None:
    """Run one target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=600.0)
    options = parser.parse_args()
    strategy, play = TARGETS[options.target]()
    end, played, slowest = time.monotonic() + options.seconds, 0, 0.0

    @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def attack(drawn: object) -> None:
        nonlocal played, slowest
        if time.monotonic() > end:
            return
        begun = time.monotonic()
        play(drawn)
        played, slowest = played + 1, max(slowest, time.monotonic() - begun)

    while time.monotonic() < end:
        attack()
    print(f"{options.target}: {played} inputs in {options.seconds:.0f} s, the slowest {slowest:.2f} s; nothing found")


if __name__ == "__main__":
    main()
