"""What the machine is asked to do for a process."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.project import ROOT


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel does not group processes by session")
@pytest.mark.parametrize("alone", [True, False], ids=["a session of its own", "a session of others"])
def test_a_lower_priority_is_that_of_the_session_too_where_it_is_nobody_elses(alone: bool) -> None:
    inner = "from training.machine import lower_priority; lower_priority(10); import os; print(os.nice(0), open('/proc/self/autogroup').read())"
    # The caller is a grandchild of the session's leader where that is another's.
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    code = inner if alone else f"import subprocess, sys; subprocess.run([sys.executable, '-c', {outer!r}])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, start_new_session=True, cwd=ROOT).stdout
    assert said.split()[0] == "10" and said.split()[-1] == ("10" if alone else "0")
