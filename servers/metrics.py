"""What a server counts of its requests, in Prometheus's text format: GET /metrics."""
from bisect import bisect_left
from typing import Dict, List, Mapping, Tuple

TYPE = b"text/plain; version=0.0.4; charset=utf-8"
# Upper ends in seconds: from a step of textcraft (0.5 ms) to a page of webarena.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROUTES = ("create", "reset", "step", "close", "observation")


class Requests:
    """Counts requests by route: how many, with which status, and how long they took."""

    def __init__(self) -> None:
        self.counts: Dict[Tuple[str, int], int] = {}
        self.times: Dict[str, List[int]] = {}
        self.seconds: Dict[str, float] = {}

    def add(self, route: str, status: int, seconds: float) -> None:
        """Count one request; a route that is none of the protocol's counts as `other`."""
        route = route if route in ROUTES else "other"  # a stranger's paths must not fill the memory
        self.counts[route, status] = self.counts.get((route, status), 0) + 1
        if route not in self.times:
            self.times[route], self.seconds[route] = [0] * (len(BUCKETS) + 1), 0.0
        self.times[route][bisect_left(BUCKETS, seconds)] += 1
        self.seconds[route] += seconds

    def lines(self) -> List[str]:
        """Return the lines that tell of the requests."""
        found = [
            "# HELP agentgym_requests_total Requests that were answered.",
            "# TYPE agentgym_requests_total counter",
        ]
        for (route, status), count in sorted(self.counts.items()):
            found.append(f'agentgym_requests_total{{route="{route}",status="{status}"}} {count}')
        found += [
            "# HELP agentgym_request_seconds Time from a request's arrival to its answer.",
            "# TYPE agentgym_request_seconds histogram",
        ]
        for route, times in sorted(self.times.items()):
            total = 0
            for end, count in zip([*map(str, BUCKETS), "+Inf"], times):
                total += count
                found.append(f'agentgym_request_seconds_bucket{{route="{route}",le="{end}"}} {total}')
            found.append(f'agentgym_request_seconds_sum{{route="{route}"}} {self.seconds[route]:.6f}')
            found.append(f'agentgym_request_seconds_count{{route="{route}"}} {total}')
        return found


def gauges(values: Mapping[str, Tuple[str, float]]) -> List[str]:
    """Return the lines of single values: name to (what it is, value)."""
    found = []
    for name, (what, value) in values.items():
        found += [f"# HELP {name} {what}", f"# TYPE {name} gauge", f"{name} {value:.17g}"]
    return found
