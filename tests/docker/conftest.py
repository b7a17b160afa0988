"""The engine, one copy of the project and one build of its images, for all tests of this folder."""
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.workbench import Workbench, engine_answers
from tests.fixtures.needs import missing


@pytest.fixture(scope="session")
def engine() -> None:
    """Ask for a Docker engine: a failure under CI, a skip on a laptop without one."""
    if engine_answers():
        return
    missing("docker", "no Docker engine with Compose v2")


@pytest.fixture(scope="session")
def bench(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """Return a copy of the project, without images."""
    copy = Workbench.create(tmp_path_factory.mktemp("project"))
    yield copy
    copy.remove()


@pytest.fixture(scope="session")
def build(bench: Workbench) -> subprocess.CompletedProcess[str]:
    """Build all four images with `invoke build.all` and return what it said."""
    done = bench.invoke("build.all", timeout=850)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@pytest.fixture
def built(bench: Workbench, build: subprocess.CompletedProcess[str]) -> Iterator[Workbench]:
    """Return the copy with its images; containers that a test leaves are removed."""
    yield bench
    for container in bench.containers():
        bench.run("docker", "rm", "-f", container)


@pytest.fixture(scope="session")
def checkpoint(bench: Workbench, build: None) -> Path:
    """Return a folder with four FSDP ranks, written in the container; `reference.safetensors` lies beside it.

    What writes it is mounted: the image ships no such program.
    """
    done = bench.compose("--profile",
                         "scripts",
                         "run",
                         "--rm",
                         "-T",
                         "--volume",
                         f"{bench.root / 'samples'}:/opt/workbench/samples:ro",
                         "scripts",
                         "python",
                         "/opt/workbench/samples/sample_checkpoint.py",
                         "--save-dir",
                         "saves/x/actor",
                         "--strategy",
                         "fsdp1",
                         "--world-size",
                         "4",
                         "--reference",
                         "saves/x/reference.safetensors",
                         env={
                             "HOST_UID": str(os.getuid()),
                             "HOST_GID": str(os.getgid())
                         })
    assert done.returncode == 0, done.stderr
    folder = bench.root / "saves" / "x" / "actor"
    assert len(list(folder.glob("model_world_size_4_rank_*.pt"))) == 4
    return folder
