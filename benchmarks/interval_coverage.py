"""How often intervals cover the truth, by simulation: the evaluation's own beside a bootstrap over items.

    python benchmarks/interval_coverage.py [--runs 2000] [--json]

Items of which each sample is solved with the same chance, or with a chance of their own (a beta distribution of the same
mean); the figure is Pass@k of the items. And the mean over environments of a suite, each with items and a chance of its
own. 0.95 is right, less claims too much.
"""
import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluation.numbers import bootstrap, figure, macro, pass_at_k

# Items and chance of each environment.
SUITES = {
    "five alike, rare success": [(20, 0.02)] * 5,
    "five alike, seldom": [(50, 0.1)] * 5,
    "five alike, often": [(200, 0.5)] * 5,
    "two alike, rare success": [(20, 0.02)] * 2,
    "two alike, often": [(20, 0.5)] * 2,
    "as many items as AgentGym's lists have": [(100, 0.6), (90, 0.8), (200, 0.1), (20, 0.05), (400, 0.35)],
    "few items seldom, many rarely": [(20, 0.1), (200, 0.02), (400, 0.02)],
    "one never, one always": [(100, 0.0), (100, 1.0), (100, 0.5)],
    "at both ends": [(20, 0.02), (20, 0.98)],
}


def coverage(items: int,
             chance: float,
             samples: int,
             k: int,
             own: bool,
             runs: int,
             seed: int = 0) -> tuple[float, float]:
    """Return the share of simulated runs whose interval holds the truth: of `figure`, and of a bootstrap."""
    rng = np.random.default_rng(seed)
    values = [pass_at_k(samples, solved, k) for solved in range(samples + 1)]
    draws = rng.beta(chance, 1 - chance, 400_000) if own else np.array([chance])
    truth = float((1 - (1 - draws)**k).mean())
    ours = theirs = 0
    for number in range(runs):
        chances = rng.beta(chance, 1 - chance, items) if own else chance
        drawn = [values[solved] for solved in rng.binomial(samples, chances, items)]
        found = figure(drawn, binary=k == samples)
        assert found is not None
        low, high = bootstrap(drawn, seed=number)
        ours += found["low"] <= truth <= found["high"]
        theirs += low <= truth <= high
    return ours / runs, theirs / runs


def macro_coverage(environments: Sequence[tuple[int, float]], samples: int, runs: int, seed: int = 0) -> float:
    """Return the share of simulated suites whose interval of the macro average holds the truth."""
    rng = np.random.default_rng(seed)
    truth = float(np.mean([chance for _, chance in environments]))
    held = 0
    for _ in range(runs):
        drawn = [rng.binomial(samples, chance, items) / samples for items, chance in environments]
        found = macro([one for one in (figure(list(values), binary=samples == 1) for values in drawn) if one])
        assert found is not None
        held += bool(found["low"] <= truth <= found["high"])
    return held / runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="simulated runs of each (default: 2000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    lines = []
    for own in (False, True):
        for items in (20, 50, 200):
            for chance in (0.02, 0.1, 0.5):
                ours, theirs = coverage(items, chance, 4, 2, own, options.runs)
                lines.append({"own chances": own, "items": items, "chance": chance, "ours": ours, "bootstrap": theirs})
    suites = [{
        "suite": name,
        "samples": samples,
        "coverage": macro_coverage(environments, samples, options.runs)
    } for name, environments in SUITES.items() for samples in (1, 4)]
    if options.json:
        print(json.dumps({"pass": lines, "macro": suites}))
        return
    print(f"Pass@2 of 4 samples, {options.runs} runs of each")
    for line in lines:
        print(
            f"{'each its own' if line['own chances'] else 'the same'} chance {line['chance']:g}, {line['items']} items: "
            f"ours {line['ours']:.3f}, bootstrap {line['bootstrap']:.3f}")
    print(f"Macro average over environments, {options.runs} suites of each")
    for suite in suites:
        print(f"{suite['suite']}, samples {suite['samples']}: {suite['coverage']:.3f}")


if __name__ == "__main__":
    main()
