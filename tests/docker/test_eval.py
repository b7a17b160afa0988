"""The evaluation image on a real engine: `invoke eval --runner docker`, and the profile as typed."""
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.lib.serving import docker as serve_docker
from tasks.lib.settings import SETTINGS
from tests.docker.workbench import Terminal, Workbench
from tests.fixtures.servers import ROOT, free_port
from tests.fixtures.standins import Endpoint, completion, endpoint
from tests.fixtures.story import SAMPLING, Story, success

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
    runs: list[subprocess.CompletedProcess[str]] = []
    words = ["eval", "--env", "demo", "--model", "stand-in", "--base-url", model.base_url, "--limit", "6", "--runner", "docker"]
    thread = threading.Thread(target=lambda: runs.append(ready.invoke(*words, env={"OPENAI_API_KEY": KEY})))
    thread.start()
    told = ""
    while thread.is_alive():
        for container in ready.containers(service="eval-runner"):
            told += ready.run("docker", "inspect", container).stdout
        thread.join(0.05)
    assert "OPENAI_API_KEY_FILE" in told and KEY not in told  # the container was seen, the key was not
    done, = runs
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


@pytest.fixture(scope="module")
def shards(ready: Workbench, checkpoint: Path) -> Path:
    """Return a step's folder with a copy of the checkpoint that nobody has merged."""
    step = ready.root / "saves" / "served" / "global_step_7"
    shutil.copytree(checkpoint, step / "actor", ignore=shutil.ignore_patterns("*.safetensors", "merge.json"))
    return step


@pytest.mark.timeout(1800)  # the first run builds an image
def test_a_checkpoint_is_merged_served_evaluated_and_gone(ready: Workbench, shards: Path) -> None:
    """Run twice: the first builds the server's image and merges; the second resumes under the same name."""
    words = ["eval", "--checkpoint", "saves/served/global_step_7", "--env", "demo", "--runner", "docker", "--max-round", "2", "--max-tokens", "8"]
    secrets = {name: f"sentinel-{name}" for name, setting in SETTINGS.items() if setting.secret and name != "PACKAGE_INDEX_URL"}
    seen: list[str] = []
    done: list[subprocess.CompletedProcess[str]] = []
    thread = threading.Thread(target=lambda: done.append(ready.invoke(*words, "--limit", "2", env=secrets, timeout=850)))
    thread.start()
    while thread.is_alive():
        seen = seen or ready.docker("ps", "-q", "--filter", f"label={serve_docker.OWNER}", "--filter",
                                    f"label=com.docker.compose.project={ready.name}").split()
        if seen:
            told = ready.docker("inspect", *ready.containers(), ready.image("agentgym-rl/serve"))
            assert "sentinel" not in told
            break
        thread.join(0.2)
    thread.join()
    assert seen and done[0].returncode == 0, done[0].stdout[-3000:] + done[0].stderr[-3000:]
    assert "building it" in done[0].stdout and "eval: merging" in done[0].stdout and "sentinel" not in done[0].stdout + done[0].stderr
    host = json.loads(told)[0]["HostConfig"]
    assert host["CapDrop"] == ["ALL"] and not host["PortBindings"] and "no-new-privileges:true" in host["SecurityOpt"]
    again = ready.invoke(*words, "--limit", "2", timeout=300)
    assert again.returncode == 0 and "resuming" in again.stdout and "merged from these shards already" in again.stdout
    folder, = (ready.root / "saves" / "eval").glob("demo-served-global_step_7-actor-*")
    assert len((folder / "attempts.jsonl").read_text().splitlines()) == 2
    assert "sentinel" not in "".join(path.read_text() for path in folder.iterdir())
    assert ready.containers() == []


@pytest.mark.timeout(1800)
def test_what_was_trained_is_what_is_measured_in_containers(ready: Workbench, story: Story) -> None:
    """The whole loop: shards that real FSDP trained are merged, served and evaluated, all in containers."""
    found = {}
    for name, shards in (("untrained", "untrained/actor"), ("trained", "actor")):
        folder = story.copy_actor(shards, ready.root / "saves" / "story" / name / "actor")
        done = ready.invoke("eval", "--checkpoint", str(folder), "--env", "demo", "--runner", "docker", "--items",
                            "2,5,8,11,14,17,20,23", *SAMPLING, timeout=850)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        run, = (ready.root / "saves" / "eval").glob(f"demo-story-{name}-actor-*")
        found[name] = success(run)
    assert found["untrained"] == 0.0 and found["trained"] >= 0.5 > story.success("random") + 0.2, found
    assert ready.containers() == []


def test_a_server_that_dies_is_one_line_and_leaves_nothing(ready: Workbench, shards: Path) -> None:
    broken = shards.parent / "broken"
    shutil.copytree(shards / "actor" / "huggingface", broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    done = ready.invoke("eval", "--checkpoint", str(broken), "--env", "demo", "--runner", "docker", timeout=300)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("eval: the model's server ended: ")
    assert "Traceback" not in done.stderr and ready.containers() == []


def test_ctrl_c_removes_the_server(ready: Workbench, shards: Path) -> None:
    terminal = Terminal(ready, sys.executable, "-m", "invoke", "eval", "--checkpoint", str(shards), "--env", "demo", "--runner", "docker")
    terminal.wait_for("started demo")
    while not ready.containers(service="serve"):
        pass
    terminal.type("\x03")
    assert terminal.exit_code() == 130 and "Traceback" not in terminal.seen
    assert ready.containers() == []


def test_a_checkpoint_outside_the_mounts_is_served(ready: Workbench, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards / "actor" / "huggingface", tmp_path / "elsewhere")
    done = ready.invoke("eval", "--checkpoint", str(tmp_path / "elsewhere"), "--env", "demo", "--runner", "docker", "--max-round", "1",
                        "--max-tokens", "8", "--limit", "1", timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ready.containers() == []


def test_the_serve_profile_works_as_typed(ready: Workbench, shards: Path) -> None:
    if not (shards / "actor" / "huggingface" / "model.safetensors").exists():  # where this test runs alone
        assert ready.invoke("merge", "--local-dir", "saves/served/global_step_7/actor").returncode == 0
    port = free_port()
    env = {"SERVE_MODEL": "saves/served/global_step_7/actor/huggingface", "SERVED_NAME": "seven", "SERVE_PORT": str(port), **CALLER}
    try:
        done = ready.compose("--profile", "serve", "up", "--detach", "--wait", env=env)
        assert done.returncode == 0, done.stderr
        container, = ready.containers(service="serve")
        assert ready.docker("port", container) == f"8000/tcp -> 127.0.0.1:{port}"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as reply:
            assert reply.status == 200
        assert ready.invoke("env.up", "--env", "demo", "--runner", "docker").returncode == 0
        played = ready.invoke("eval", "--env", "demo", "--model", "seven", "--base-url", "http://serve:8000/v1", "--limit", "1", "--max-round",
                              "1", "--max-tokens", "8", "--runner", "docker", env={"OPENAI_API_KEY": ""})
        assert played.returncode == 0, played.stdout[-3000:] + played.stderr[-3000:]
    finally:
        ready.invoke("env.down", "--env", "demo")
        ready.compose("--profile", "serve", "rm", "-fs", "serve", env=env)
