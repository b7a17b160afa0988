"""Inputs that nobody listed, for a run's records and for what the tasks print; `benchmarks/fuzz.py` throws more of them."""
import random
import subprocess
import sys

import pytest

from tests.fixtures.servers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import fuzz
import fuzz_training

TARGETS = fuzz_training.targets()


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_nobody_listed_find_nothing(name):
    target = TARGETS[name]
    accepted = 0
    for seed in range(20):
        took, finding, _ = fuzz.throw(target, target.make(random.Random(f"{name} {seed}")))
        assert not finding or "MiB" in finding, (seed, finding)  # the process holds other tests' too
        accepted += took
    assert accepted


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TARGETS)
def test_half_a_minute_of_them(name):
    done = subprocess.run([sys.executable, ROOT / "benchmarks/fuzz.py", name, "--seconds", "30", "--seed", "1000"],
                          capture_output=True,
                          text=True,
                          check=False)
    assert done.returncode == 0, done.stdout[-4000:]
