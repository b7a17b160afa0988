"""The evaluation image on a real engine: `invoke eval --runner docker`, and the profile as typed."""
import json
import os
import shlex
import sys
from collections.abc import Iterator

import pytest
from workbench import Workbench

from tests.fixtures.servers import ROOT
from tests.fixtures.standins import Endpoint, completion, endpoint

pytestmark = pytest.mark.docker
KEY = "sk-of-the-docker-test"
# Plain Compose does not know who calls; the tasks tell it.
CALLER = {"HOST_UID": str(os.getuid()), "HOST_GID": str(os.getgid())}


@pytest.fixture(scope="module")
def ready(bench: Workbench) -> Workbench:
    """Return the copy with the images of the evaluation and of demo."""
    for words in (["build.eval"], ["build.env", "--env", "demo"]):
        done = bench.invoke(*words, timeout=850)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return bench


@pytest.fixture
def model(ready: Workbench) -> Iterator[Endpoint]:
    """Serve a stand-in for the model on this machine, where containers reach it: demo's expert, in a sentence."""
    sys.path.insert(0, str(ROOT / "demo"))
    from agentenv_demo.players import expert
    gateway = ready.docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}")
    with endpoint(lambda messages, body: completion("So:\n" + expert(messages[-1]["content"])), host="0.0.0.0") as made:
        made.base_url = made.base_url.replace("127.0.0.1", gateway)  # type: ignore[attr-defined]
        yield made


def test_the_expert_solves_the_demo_in_containers(ready: Workbench) -> None:
    done = ready.invoke("eval", "--env", "demo", "--model", "expert", "--runner", "docker")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder, = (ready.root / "saves" / "eval").glob("demo-expert-*")
    assert json.loads((folder / "summary.json").read_text())["success"]["mean"] == 1.0
    assert (folder / "report.html").stat().st_size > 10_000
    assert ready.containers() == []  # what it started, it stopped


def test_a_model_over_http_and_no_key_in_any_container(ready: Workbench, model: Endpoint) -> None:
    done = ready.invoke("eval", "--env", "demo", "--model", "stand-in", "--base-url", model.base_url, "--limit", "6", "--runner",
                        "docker", env={"OPENAI_API_KEY": KEY})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "100.0 %" in done.stdout and KEY not in done.stdout + done.stderr
    assert model.requests[0][0]["authorization"] == f"Bearer {KEY}"
    folder, = (ready.root / "saves" / "eval").glob("demo-stand-in-*")
    assert all(KEY not in path.read_text() for path in folder.iterdir())


def test_the_profile_works_as_typed(ready: Workbench, model: Endpoint) -> None:
    assert ready.invoke("env.up", "--env", "demo", "--runner", "docker").returncode == 0
    try:
        port = ready.invoke("env.list").stdout
        port = next(line.split() for line in port.splitlines() if line.startswith("demo "))[4]
        done = ready.compose(*shlex.split("--profile eval up --exit-code-from eval-runner eval-runner"),
                             env={"ENV": "demo", "ENV_PORT": port, "MODEL": "stand-in", "MAX_ROUND": "3", "OPENAI_API_KEY": KEY, **CALLER,
                                  "OPENAI_BASE_URL": model.base_url})
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "3 rounds" in done.stdout and "max_rounds" in done.stdout
    finally:
        ready.compose("--profile", "eval", "rm", "-fs", "eval-runner")
        ready.invoke("env.down", "--env", "demo")


def test_misuse_in_the_container_is_one_line(ready: Workbench) -> None:
    done = ready.compose("--profile", "eval", "run", "--rm", "-T", "eval-runner", env={"ENV": "demo", "OPENAI_API_KEY": "", **CALLER})
    assert done.returncode == 2 and "no OPENAI_API_KEY" in done.stderr and "Traceback" not in done.stderr
