"""Try environments as a user would: data, start, protocol, an evaluation, stop; each step is a task as it is typed."""
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.lib.environments import data as env_data
from tasks.lib.environments.lookup import data_folder
from tasks.lib.environments.rows import Environment
from tasks.lib.settings import ROOT

ITEMS, ROUNDS = 2, 3


@dataclass
class Tried:
    """What came of one environment.

    Attributes:
        data: toy, own (what was there) or none.
        steps: up, check and eval, as far as they were tried: "yes", or why not.
        untried: why it was not tried at all: what only the user can give.
        seconds: how long it took.
    """
    environment: str
    data: str = ""
    steps: dict[str, str] = field(default_factory=dict)
    untried: str = ""
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        """Whether every step was tried, and none failed."""
        return not self.untried and list(self.steps.values()) == ["yes"] * 3

    def facts(self) -> dict[str, Any]:
        """Return what `--json` tells of it."""
        return {
            "name": self.environment,
            "works": self.works,
            "data": self.data,
            "steps": self.steps,
            "untried": self.untried,
            "seconds": self.seconds
        }

    def cells(self) -> tuple[str, ...]:
        """Return its line of the table."""
        steps = [self.steps.get(step, "-") for step in ("up", "check", "eval")]
        return self.environment, self.data or "-", *steps, f"{self.seconds:.0f}", self.untried


def invoked(words: list[str]) -> str:
    """Run `invoke` with `words`; return "yes", or the last line that it said."""
    done = subprocess.run([sys.executable, "-m", "invoke", *words],
                          cwd=ROOT,
                          capture_output=True,
                          text=True,
                          check=False)
    if done.returncode == 0:
        return "yes"
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}"


def untried(row: Environment, environ: Mapping[str, str], folder: Path) -> str:
    """Return why `row` cannot be tried without something that only the user has; empty where it can."""
    missing = row.missing_keys(environ)
    if missing:
        return f"needs {', '.join(one.name for one in missing)}"
    if row.consent:
        return "changes a real account"
    lacking = row.missing_data(folder)
    if lacking and not row.toy:
        return f"needs {lacking[0].path}"
    return ""


def attempt(row: Environment, runner: str, wait: int, environ: Mapping[str, str], call: Callable[[list[str]],
                                                                                                 str]) -> Tried:
    """Try one environment and leave it as it was found; one that is up already stays up.

    Args:
        call: runs a task as it is typed, see `invoked`.
    """
    tried, folder, begun = Tried(row.name), data_folder(row), time.monotonic()
    tried.untried = untried(row, environ, folder)
    if tried.untried:
        return tried
    own = ["--env", row.name]
    made = bool(row.missing_data(folder))
    tried.data = "toy" if made or env_data.is_toy(folder) else "own" if row.data else "none"
    try:
        if made:
            said = call(["env.data", *own, "--toy", "--runner", runner])
            if said != "yes":
                tried.steps["up"] = said
                return tried
        device = ["--device", "cpu"] if "cuda" in row.answers else []
        tried.steps["up"] = call(["env.up", *own, *device, "--runner", runner, "--wait", str(wait)])
        if tried.steps["up"] == "yes":
            try:
                tried.steps["check"] = call(["env.check", *own])
                with tempfile.TemporaryDirectory() as out:
                    tried.steps["eval"] = call([
                        "eval", *own, "--model", "check", "--limit",
                        str(ITEMS), "--max-round",
                        str(ROUNDS), "--runner", "local", "--plain-prompt", "--out", out + "/run"
                    ])
            finally:
                call(["env.down", *own])
    finally:
        if made:
            env_data.remove_toy(folder)
        tried.seconds = round(time.monotonic() - begun, 1)
    return tried
