"""DOCKER.md's commands do what it says: its blocks run, its tables name tasks and profiles that work."""
import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.docker.workbench import ROOT, Workbench

GUIDE = (ROOT / "DOCKER.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", GUIDE, re.M | re.S)
# A command that is cut short (…) is none to run.
SPANS = sorted(span for span in set(re.findall(r"`(invoke [^`]+)`", GUIDE)) - {"invoke --dry TASK"} if "…" not in span)
PROFILES = re.findall(r"^\| .* \| `(docker compose [^`]+)` \|$", GUIDE, re.M)


def guide_environment(bench: Workbench) -> dict[str, str]:
    """Return what the guide asks of a host without a GPU whose user is not number 1000."""
    return {
        "COMPOSE_FILE": "docker-compose.yml:docker-compose.cpu.yml",
        "HOST_UID": str(os.getuid()),
        "HOST_GID": str(os.getgid()),
        "AGENTGYM_RL_SRC": str(bench.sources)
    }


def allowed_codes(line: str) -> tuple[int, ...]:
    """Return the exit codes that are right: the doctor's is about this machine, which may lack disk."""
    return (0, 1) if line == "invoke doctor" else (0, )


@pytest.mark.docker
@pytest.mark.parametrize("block", BLOCKS)
def test_block(built: Workbench, checkpoint: Path, block: str) -> None:
    assert checkpoint == built.root / "saves/x/actor"
    for line in block.splitlines():
        done = built.run("sh", "-c", line, env=guide_environment(built) | {"PATH": built.path_with_invoke()})
        assert done.returncode in allowed_codes(line), done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    for weights in (checkpoint / "huggingface").glob("model*.safetensors*"):  # other tests merge the same shards
        weights.unlink()


@pytest.mark.docker
@pytest.mark.parametrize("line", SPANS)
def test_task_in_the_text(built: Workbench, line: str) -> None:
    command = line.replace("invoke ", "invoke --dry ", 1).replace("NAME", "demo")
    done = built.run("sh", "-c", command, env={"PATH": built.path_with_invoke(), "ENV": "demo"})
    assert done.returncode in allowed_codes(line), done.stdout + done.stderr
    assert done.stdout or "pycache" in line, "the copy has no caches, so there is nothing to remove"


@pytest.mark.docker
@pytest.mark.parametrize("line", PROFILES)
def test_profile_in_the_table(built: Workbench, line: str) -> None:
    # Plain Compose knows no commit for the labels: not over the image that other tests look at.
    tag = {"IMAGE_TAG": f"{built.name}-raw"} if " build " in line else {}
    done = built.run("sh", "-c", line, env=guide_environment(built) | tag)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.docker
def test_ci_s_steps_need_only_the_packages_that_they_install(built: Workbench, tmp_path: Path) -> None:
    steps = re.findall(r"^      - run: (.*)$", GUIDE, re.M)
    assert len(steps) == 3
    for step in steps:
        step = step.replace(".venv", f"{tmp_path}/venv").replace("invoke build", "invoke --dry build")
        done = built.run("sh", "-c", step, env=guide_environment(built))
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_profile_and_every_old_target_is_in_the_guide() -> None:
    profiles = set(re.findall(r"profiles: \[([\w-]+)\]", (ROOT / "docker-compose.yml").read_text()))
    assert set(re.findall(r"--profile ([\w-]+)", "\n".join(PROFILES))) == profiles
    old = {
        "docker-build", "docker-build-base", "docker-train-shell", "docker-merge", "docker-scripts-shell",
        "docker-format", "docker-status", "docker-down", "test-docker", "docker-clean", "clean", "setup-env", "start-env", "stop-env"
    }
    assert set(re.findall(r"`make ([\w-]+)`", GUIDE)) == old


def test_variables_in_the_guide_are_settings() -> None:
    from tasks.lib.settings import SETTINGS
    named = set(re.findall(r"`([A-Z][A-Z_]{3,})[=`]", GUIDE)) - {
        "BUILDX_BUILDER", "COMPOSE_FILE", "COMPOSE_IGNORE_ORPHANS", "CUDA_VISIBLE_DEVICES", "DOCKER_HOST", "SSL_CERT_FILE"
    }  # not ours
    assert named and named <= set(SETTINGS)


@pytest.mark.docker
def test_a_script_that_reads_nothing_but_objects(bench: Workbench, tmp_path: Path) -> None:
    """It builds, starts, evaluates, compares and stops; and says why where it cannot."""
    script, = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.M | re.S)
    assert not re.search(r"\bsplit|\bimport re\b", script), "no table is read"
    (tmp_path / "script.py").write_text(script)
    done = bench.run(sys.executable, str(tmp_path / "script.py"), env={"PATH": bench.path_with_invoke()})
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["image"] == bench.image("agentgym/env-demo") and told["stopped"] == ["demo"] and told["attempts"] == [6, 6]
    assert 0 < told["better by"] <= 1, "the expert plays better than a random player"
    assert bench.containers(service="env-demo") == []
    refused = bench.run(sys.executable, str(tmp_path / "script.py"), env={"PATH": bench.path_with_invoke(), "IMAGE_TAG": "a b"})
    assert refused.returncode == 1 and re.search(r"^build\.env: .*IMAGE_TAG='a b'", refused.stderr, re.M), refused.stderr
