"""Fixtures that several test modules share."""
from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

# A shell that starts a program in its background, and nohup, have it ignore these; children inherit it.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub reads it: no test needs a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: see scripts/serve_transformers.py

# What the merger remembers between runs (`model_check`) is neither read from the user's home nor left there.
os.environ.setdefault("UV_CACHE_DIR", str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uv"))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="merger-tests-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

from tests.fixtures.project import copy_project  # noqa: E402
from tests.fixtures.story import Story  # noqa: E402
from tests.merger.fsdp_samples import SAMPLES, laid_out, write_samples  # noqa: E402
from tests.merger.merging import Sample  # noqa: E402

# They start servers from this checkout, whose state is one.
DEMO_OF_THIS_CHECKOUT = tuple(f"tests/tasks/test_{name}.py" for name in ("evaluate", "evaluate_checkpoint", "evaluate_suite", "quickstart"))
DOCKER = Path(__file__).parent / "docker"
MOST_WORKERS = 4


class ByFile(LoadScopeScheduling):
    """Give each worker whole files: their fixtures are made once, and their tests meet only each other."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "demo of this checkout" if file in DEMO_OF_THIS_CHECKOUT else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile:
    return ByFile(config, log)  # type: ignore[arg-type]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return three workers for two cores: tests wait for others, too. None, so that tests run in this process, where a start is not worth it.

    That is for one file, a part by `-k` or `--lf`, `--trace`, and output that is to be seen (`-s`); with `--pdb` it is xdist's own rule.
    """
    option = config.option
    asked = {argument.split("::")[0] for argument in config.args}
    one_file = len(asked) == 1 and asked.pop().endswith(".py")
    if one_file or option.keyword or getattr(option, "lf", False) or option.trace or option.capture == "no":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min((3 * cores + 1) // 2, MOST_WORKERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest starts first, so that no worker is left alone with it; containers have more time."""
    items.sort(key=lambda item: not item.path.is_relative_to(DOCKER))
    for item in items:
        if item.path.is_relative_to(DOCKER) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    """Checkpoints that real FSDP wrote, by name; not to be changed. Processes of pytest-xdist share them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "samples"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            write_samples(folder, SAMPLES)
            (folder / "complete").touch()
    return laid_out(folder, SAMPLES)


@pytest.fixture
def spoil(samples: dict[str, Sample], tmp_path: Path) -> Callable[[str], Sample]:
    """A function that returns a copy of a sample, for the test to change."""
    return lambda name="FSDP1, 4 ranks": samples[name].copy(tmp_path)


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """`invoke quickstart` in a copy of the project: it trains, merges, serves and evaluates. Not to be changed."""
    root = copy_project(tmp_path_factory.mktemp("story") / "project")
    done = subprocess.run([sys.executable, "-m", "invoke", "quickstart"],
                          cwd=root,
                          capture_output=True,
                          text=True,
                          timeout=1200,
                          check=False)
    return Story(root, done)
