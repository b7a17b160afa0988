"""`--dry` is the truth: what it prints of Docker is what a recorded real run executes, word for word."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.lib.training.rules import RULES
from tests.fixtures.project import ROOT, copy_project
from tests.fixtures.servers import free_port
from tests.training import places

# In docker's place: notes each command line and what Compose reads of the environment, and answers as an engine does that has
# every image and runs nothing.
RECORDER = """#!/bin/sh
printf '%s\\0' "$#" "$@" >>"$ANSWERS/argv"
env >>"$ANSWERS/environment"
case "$*" in
    *"image inspect"*) echo '[{"Id": "sha256:1", "Size": 5, "Created": "2026-01-01T00:00:00Z", "RepoTags": ["agentgym/env-demo:latest"]}]' ;;
    *"image list"*) echo sha256:1 ;;
    *"container list"*) cat "$ANSWERS/up-ids" 2>/dev/null; exit 0 ;;
    *"container inspect"*) cat "$ANSWERS/up" ;;
    *"network ls"*) echo n1 ;;
    *"network inspect"*) echo '[{"Id": "n1", "Name": "x_default"}]' ;;
    *" config "*) echo '{"name": "x"}' ;;
    *"system info"*) echo '{"Runtimes": {}}' ;;
    version*) echo '{"Client": {"Version": "26.1.5"}, "Server": {"Version": "26.1.5"}}' ;;
esac
"""
# What only asks. `--dry` asks nothing, and prints no question but those that are all that a task does.
QUESTION = re.compile(r"version |system info |(.* )?version$|(.*)(buildx inspect|container (list|inspect)|image (inspect|list)|network (ls|inspect)|exists) |compose .* config ")
GPUS = ["--gpus", "none"]
# Of the tasks that have Docker do something, words with which they get that far. The others have Docker do nothing.
DRIVING = {
    "build.all": [["--push"], ["--no-cache", "--pull", "--cpu", "--tag", "v1"]],
    "build.base": [[]],
    "build.train": [[]],
    "build.scripts": [["--push"]],
    "build.serve": [[]],
    "build.eval": [["--tag", "x y"], []],
    "build.env": [["--env", "demo"], ["--env", "demo", "--no-cache", "--tag", "v2"]],
    "train.shell": [[*GPUS, "--user", "root"], [*GPUS, "--shm-size", "2g"]],
    "train.run": [[*GPUS, "--", "echo", "a b", "$X", "it's", ""]],
    "merge": [["--runner", "docker", "--local-dir", "saves", "--verify", *GPUS], ["--runner", "docker", "--local-dir", "saves/x y", *GPUS]],
    "merge.inspect": [["--runner", "docker", "--local-dir", "saves"]],
    "merge.verify": [["--runner", "docker", "--local-dir", "saves", "--save-dir", "models/x"]],
    "merge.shell": [GPUS],
    "format": [[], ["--check"]],
    "eval": [["--runner", "docker", "--env", "demo", "--model", "expert", "--server", "http://x:1", "--limit", "3"],
             ["--runner", "docker", "--env", "demo", "--model", "expert", "--server", "http://x:1", "--check"]],
    "env.up": [["--env", "demo", "--runner", "docker", "--wait", "1", "--build"]],
    "down": [[]],
    "clean.containers": [["--yes"]],
    "clean.images": [["--yes"]],
    "clean.cache": [["--yes"], ["--yes", "--older-than", "72h"]],
    "clean.all": [["--yes"]],
    "status": [[], ["--json"]],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry")
    (folder / "docker").mkdir()
    (folder / "docker/docker").write_text(RECORDER)
    (folder / "docker/docker").chmod(0o755)
    (copy_project(folder / "project") / "saves/x y").mkdir(parents=True)
    return folder


def invoke(place: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run `invoke`; return what it said, and docker's command lines."""
    record = place / "docker/argv"
    record.unlink(missing_ok=True)
    environ = {**os.environ, "ANSWERS": str(place / "docker"), "AGENTGYM_RL_SRC": str(ROOT / "tests/fixtures/sources/AgentGym-RL"), "PATH": f"{place / 'docker'}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-m", "invoke", *words], cwd=place / "project", env=environ, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, check=False)
    words_left = iter(record.read_text().split("\0")[:-1] if record.exists() else [])
    return done, [[next(words_left) for _ in range(int(count))] for count in words_left]


def masked(argv: list[str]) -> list[str]:
    """Return the words with one name for the containers of `run`, which have a random one each time."""
    return [re.sub(r"-run-[0-9a-f]{12}$", "-run-RANDOM", word) for word in argv]


def printed(out: str) -> tuple[list[list[str]], dict[str, str]]:
    """Return docker's command lines that `--dry` printed, and the variables before them."""
    lines, variables = [], {}
    for line in out.splitlines():
        words = shlex.split(line)
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words[:1] == ["docker"]:
            lines.append(masked(words[1:]))
    return lines, variables


def is_question(argv: list[str]) -> bool:
    return QUESTION.match(" ".join(argv) + " ") is not None


@pytest.mark.parametrize("task, words", [("env.down", ["--env", "demo"]), ("env.down", []), ("env.logs", ["--env", "demo"]), ("env.logs", ["--env", "demo", "--follow"]),
                                         ("env.shell", ["--env", "demo"]), ("env.shell", ["--env", "demo", "--user", "root"]), ("env.up", ["--env", "demo"])],
                         ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_of_a_server_that_is_up_too(task: str, words: list[str], place: Path) -> None:
    root, label = place / "project", "com.docker.compose.project"
    labels = {label: "x", f"{label}.working_dir": str(root), "com.docker.compose.service": "env-demo", "org.agentgym-rl.uid": str(os.getuid()),
              "org.agentgym-rl.env": "demo", "org.agentgym-rl.env.port": "26016"}
    (place / "docker/up-ids").write_text("c1\n")
    (place / "docker/up").write_text(json.dumps([{"Id": "c1", "Name": "/x-env-demo-1", "Image": "sha256:1", "State": {"Status": "running", "Running": True},
                                                  "Config": {"Labels": labels}, "HostConfig": {"PortBindings": {}}, "NetworkSettings": {"Ports": {}}}]))
    try:
        dry, asked = invoke(place, "--dry", task, *words)
        assert not [argv for argv in asked if not is_question(argv)], "under --dry docker did something"
        real, recorded = invoke(place, task, *words)
    finally:
        (place / "docker/up-ids").unlink()
    assert [masked(argv) for argv in recorded if not is_question(argv)] == printed(dry.stdout)[0], (dry.stderr, real.stderr)
    assert real.returncode == dry.returncode == 0, (dry.stderr, real.stderr)
    assert printed(dry.stdout)[0] or "is up already" in dry.stdout


@pytest.mark.parametrize("task, words", [(task, words) for task, several in DRIVING.items() for words in several],
                         ids=lambda value: " ".join(value) if isinstance(value, list) else value)
def test_what_dry_prints_is_what_a_real_run_executes(task: str, words: list[str], place: Path) -> None:
    typed = [task, *(word for word in words if word != "--json")]
    dry, asked = invoke(place, "--dry", *typed)
    lines, variables = printed(dry.stdout)
    assert not [argv for argv in asked if not is_question(argv)], "under --dry docker did something"
    (place / "docker/environment").unlink(missing_ok=True)
    real, recorded = invoke(place, task, *words)
    if task == "status":  # which is nothing but questions; the same one is not printed twice, and an image's ids are not known
        whole = [argv for argv in recorded if argv[0] != "version" and argv[-1] not in ("sha256:1", "agentgym/env-demo:latest")]
        assert [argv for number, argv in enumerate(whole) if argv not in whole[:number]] == lines
        return
    assert [masked(argv) for argv in recorded if not is_question(argv)] == lines, (dry.stderr, real.stderr)
    assert lines or real.returncode == dry.returncode == 2, (real.stdout, real.stderr)
    seen = (place / "docker/environment").read_text() if lines else ""
    assert all(f"{name}={value}\n" in seen for name, value in variables.items())


# For what has states: the server goes where it is removed, and a run's container has ended as soon as it was started.
STATEFUL = RECORDER.replace('case "$*" in\n', """case "$*" in
    *"container inspect"*) test -f "$ANSWERS/up" || { echo "Error: No such container: x" >&2; exit 1; } ;;
    *"container rm"*) rm -f "$ANSWERS/up" "$ANSWERS/up-ids"; exit ;;
    *"image inspect"*) cat "$ANSWERS/image"; exit ;;
    *"system info"*) echo '{"Runtimes": {"nvidia": {}}}'; exit ;;
    *"compose version"*) exit ;;
    *training.probe*) echo 'training.probe: {"gpus": 2}'; exit ;;
    *--detach*train*) cp "$ANSWERS/ended" "$ANSWERS/up"; echo c9; exit ;;
esac
case "$*" in
""", 1)
IMAGE = [{"Id": "sha256:1", "Size": 5, "Created": "2026-01-01T00:00:00Z", "RepoTags": ["x:latest"], "Config": {"Labels": {}}}]


@pytest.fixture
def stateful(tmp_path: Path) -> Path:
    """A place of its own, whose engine has GPUs and a container's states."""
    (tmp_path / "docker").mkdir()
    for name, text in (("docker", STATEFUL), ("nvidia-container-runtime-hook", "#!/bin/sh\n")):
        (tmp_path / "docker" / name).write_text(text)
        (tmp_path / "docker" / name).chmod(0o755)
    (tmp_path / "docker/image").write_text(json.dumps(IMAGE))
    copy_project(tmp_path / "project")
    return tmp_path


def container(place: Path, service: str, state: dict[str, object], **labels: str) -> str:
    """Return what the engine says of a container of ours."""
    project = "com.docker.compose.project"
    ours = {project: "x", f"{project}.working_dir": str(place / "project"), "com.docker.compose.service": service, "org.agentgym-rl.uid": str(os.getuid()), **labels}
    return json.dumps([{"Id": "c1", "Name": f"/x-{service}-1", "Image": "sha256:1", "State": state, "Config": {"Labels": ours},
                        "HostConfig": {"PortBindings": {}}, "NetworkSettings": {"Ports": {}}}])


def compared(place: Path, task: str, *words: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run the task under `--dry` and for real; return what the real one said, and Docker's lines, which are the same."""
    dry, asked = invoke(place, "--dry", task, *words)
    assert not [argv for argv in asked if not is_question(argv)], "under --dry docker did something"
    real, recorded = invoke(place, task, *words)
    lines = printed(dry.stdout)[0]
    # How a container ended is asked of its log.
    assert [masked(argv) for argv in recorded if not is_question(argv) and "--tail" not in argv] == lines, (dry.stderr, real.stderr)
    assert dry.returncode == 0, dry.stderr
    return real, lines


def test_of_a_restart(stateful: Path) -> None:
    labels = {"org.agentgym-rl.env": "demo", "org.agentgym-rl.env.port": "26016"}
    (stateful / "docker/up-ids").write_text("c1\n")
    (stateful / "docker/up").write_text(container(stateful, "env-demo", {"Status": "running", "Running": True}, **labels))
    options = stateful / "project/.run/env/demo/options.json"
    options.parent.mkdir(parents=True)
    options.write_text(json.dumps({"runner": "docker", "port": free_port()}))
    real, lines = compared(stateful, "env.restart", "--env", "demo", "--wait", "1")
    assert real.returncode == 1 and "was not ready after 1 s" in real.stderr, real.stderr
    assert [line[:2] for line in lines] == [["container", "stop"], ["container", "rm"], ["compose", "--file"]]


def test_of_a_training_run_that_is_started_and_resumed(stateful: Path) -> None:
    places.items(stateful / "project/AgentItemId/babyai_train.json")
    places.model(stateful / "project/models/tiny")
    (stateful / "docker/ended").write_text(container(stateful, "train", {"Status": "exited", "Running": False, "ExitCode": 0}))
    words = ["--runner", "docker", "--env", "babyai", "--model", "tiny", "--server", "http://env-server:1", "--gpus", "0,1", "--name", "r", "--skip", ",".join(RULES)]
    real, lines = compared(stateful, "train.start", *words)
    assert real.returncode == 0 and "r runs in the background" in real.stdout, real.stderr
    looks, starts = lines
    assert looks[-3:-1] == ["-m", "training.probe"] and starts[-5:] == ["python", "-m", "training", "run", "/workspace/saves/r"]
    told = stateful / "project/saves/r/run.json"
    told.write_text(json.dumps({**json.loads(told.read_text()), "created": 1.0}))  # it has not begun since
    real, lines = compared(stateful, "train.resume", "--name", "r")
    assert real.returncode == 0 and "there is no whole checkpoint" in real.stdout, real.stderr
    looks, removes, again = lines
    assert removes[:2] == ["container", "rm"] and again == starts
