"""Several checkouts and users on one engine: everybody sees, joins and stops only their own."""
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.workbench import Workbench

IMAGE = os.environ.get("EVAL_BASE_IMAGE", "python:3.12-slim")


@pytest.fixture
def checkout(engine: None, tmp_path: Path) -> Iterator[Workbench]:
    """A copy of the project, without images."""
    copy = Workbench.create(tmp_path)
    yield copy
    for container in copy.containers():
        copy.run("docker", "rm", "-f", container)


def start(bench: Workbench, folder: Path, service: str, uid: int, project: str = "", **labels: str) -> str:
    """Start a container as Compose would for the checkout in `folder`; return its id."""
    named = {
        "com.docker.compose.project": project or bench.name,
        "com.docker.compose.project.working_dir": str(folder),
        "com.docker.compose.service": service,
        "org.agentgym-rl.uid": str(uid),
        **labels,
    }
    words = [word for name, value in named.items() for word in ("--label", f"{name}={value}")]
    return bench.docker("run", "--detach", "--init", *words, IMAGE, "sleep", "300")


def runs(bench: Workbench, container: str) -> bool:
    return bench.run("docker", "inspect", "--format", "{{.State.Running}}", container).stdout.strip() == "true"


@pytest.mark.parametrize("whose", ["another checkout's", "another user's"])
def test_a_strangers_container_is_shown_and_left_alone(checkout, tmp_path, whose):
    other = tmp_path / "elsewhere"
    folder, uid = (other, os.getuid()) if whose == "another checkout's" else (checkout.root, 4321)
    theirs, ours = start(checkout, folder, "train", uid), start(checkout, checkout.root, "scripts", os.getuid())
    told = checkout.invoke("status")
    assert re.search(rf"^\S+ +running +{re.escape(str(folder))} +{uid}$", told.stdout, re.M), told.stdout + told.stderr
    facts = json.loads(checkout.invoke("status", "--json").stdout)
    others = [one for one in facts["of_others"] if one["project"] == checkout.name]  # other tests have some on this engine
    assert [one["id"] for one in facts["containers"]] == [ours] and [one["id"] for one in others] == [theirs]
    assert others[0]["owner"] == {"folder": str(folder), "uid": str(uid)}
    shell = checkout.invoke("train.shell")
    assert "not joining" in shell.stderr and f"of {folder}, user id {uid}" in shell.stderr
    done = checkout.invoke("down")
    assert done.returncode == 0 and f"which is of {folder}, user id {uid}" in done.stderr, done.stderr
    assert runs(checkout, theirs) and checkout.run("docker", "inspect", ours).returncode != 0
    cleaned = checkout.invoke("clean.containers", "--yes")
    assert cleaned.returncode == 0 and runs(checkout, theirs)


def test_a_strangers_environment_is_not_replaced(checkout, tmp_path):
    label = {"org.agentgym-rl.env": "demo", "org.agentgym-rl.env.port": "36016"}
    theirs = start(checkout, tmp_path / "elsewhere", "env-demo", os.getuid(), **label)
    assert "36016" not in re.sub(r"\(36016\)", "", checkout.invoke("env.list").stdout)
    stopped = checkout.invoke("env.down", "--env", "demo")
    assert (stopped.returncode, stopped.stdout) == (0, "demo was not up\n") and runs(checkout, theirs)
    up = checkout.invoke("env.up", "--env", "demo", "--runner", "docker")
    assert up.returncode == 2 and "set COMPOSE_PROJECT_NAME" in up.stderr and runs(checkout, theirs), up.stderr


def test_what_an_earlier_project_name_has_is_still_ours(checkout):
    earlier = start(checkout, checkout.root, "train", os.getuid(), project=f"{checkout.name}-old")
    assert checkout.docker("inspect", "--format", "{{.Name}}", earlier).lstrip("/") in checkout.invoke("status").stdout
    assert checkout.invoke("down").returncode == 0
    assert checkout.run("docker", "inspect", earlier).returncode != 0


def test_two_checkouts_have_names_of_their_own(checkout, tmp_path):
    """Where nobody set a name, folder and user make it."""
    names = set()
    for root in (checkout.root, Path(Workbench.create(tmp_path / "second").root)):
        env = {name: value for name, value in checkout.environment().items() if name != "COMPOSE_PROJECT_NAME"}
        said = subprocess.run(["python3", "-m", "invoke", "--dry", "down"], cwd=root, env=env, capture_output=True, text=True, check=True)
        found = re.search(r"COMPOSE_PROJECT_NAME=(agentgym-rl-[0-9a-f]{6}) ", said.stdout)
        assert found, said.stdout
        names.add(found[1])
    assert len(names) == 2


@pytest.fixture
def with_image(checkout: Workbench) -> Iterator[Workbench]:
    """The copy, with an image that stands in for the trainer's."""
    checkout.docker("tag", IMAGE, checkout.image("agentgym-rl/train"))
    yield checkout
    checkout.run("docker", "rmi", checkout.image("agentgym-rl/train"))


def test_a_running_server_is_never_called_an_orphan(with_image):
    """Plain Compose advises to remove it: it is of the project and not in the file."""
    server = start(with_image, with_image.root, "env-demo", os.getuid(), **{
        "com.docker.compose.oneoff": "False", "com.docker.compose.config-hash": "x", "com.docker.compose.container-number": "1", "org.agentgym-rl.env": "demo",
        "org.agentgym-rl.env.port": "26016"
    })
    for folder in ("models", "saves", "data", "AgentItemId", "AgentEval"):
        (with_image.root / folder).mkdir(exist_ok=True)
    plain = with_image.compose("--profile", "train", "run", "--rm", "-T", "train", "true")
    assert plain.returncode == 0 and "orphan" in plain.stderr and "--remove-orphans" in plain.stderr, plain.stderr
    (with_image.root / ".env").write_text("COMPOSE_IGNORE_ORPHANS=true\n")  # what the guide says of it
    assert "orphan" not in with_image.compose("--profile", "train", "run", "--rm", "-T", "train", "true").stderr
    (with_image.root / ".env").unlink()
    for words in (["train.run", "--gpus", "none", "--", "true"], ["--dry", "train.run", "--gpus", "none", "--", "true"], ["train.shell", "--gpus", "none"],
                  ["status"]):
        said = with_image.invoke(*words)
        assert said.returncode == 0 and "orphan" not in said.stderr, said.stderr
    printed = with_image.invoke("--dry", "train.run", "--gpus", "none", "--", "true").stdout
    typed = with_image.run("sh", "-c", printed)
    assert typed.returncode == 0 and "orphan" not in typed.stderr, typed.stderr
    assert runs(with_image, server)


@pytest.mark.parametrize("where", ["environment", ".env"])
def test_another_platform_is_neither_pulled_nor_built(with_image, where):
    asked = {"DOCKER_DEFAULT_PLATFORM": "linux/s390x"}
    if where == ".env":
        (with_image.root / ".env").write_text("DOCKER_DEFAULT_PLATFORM=linux/s390x\n")
    done = with_image.invoke("train.run", "--gpus", "none", "--", "true", env=asked if where == "environment" else {})
    assert done.returncode == 2 and "DOCKER_DEFAULT_PLATFORM=linux/s390x; unset it" in done.stderr, done.stderr
    assert not re.search(r"Pulling|Building|load build definition", done.stdout + done.stderr)


def test_an_image_that_is_not_here_is_neither_pulled_nor_built(checkout):
    for words in (["train.run", "--", "true"], ["train.shell"], ["merge.shell"]):
        done = checkout.invoke(*words, "--gpus", "none") if "--" not in words else checkout.invoke("train.run", "--gpus", "none", "--", "true")
        assert done.returncode == 1 and "IMAGE_TAG and REGISTRY choose the name" in done.stderr, done.stderr
        assert not re.search(r"Pulling|Building|load build definition", done.stdout + done.stderr)


def test_a_builder_that_cannot_see_the_base_is_told_by_its_variable(checkout, tmp_path):
    own = {"BUILDX_CONFIG": str(tmp_path / "buildx")}
    assert checkout.run("docker", "buildx", "create", "--name", "elsewhere", "--driver", "docker-container", env=own).returncode == 0
    named = checkout.invoke("build.train", env={**own, "BUILDX_BUILDER": "elsewhere"})
    assert named.returncode == 2 and "BUILDX_BUILDER=elsewhere; unset it" in named.stderr and "agentgym-rl/train" in named.stderr, named.stderr
    absent = checkout.invoke("build.all", env={**own, "BUILDX_BUILDER": "nobody"})
    assert absent.returncode and "BUILDX_BUILDER names no builder" in absent.stderr, absent.stderr
    assert checkout.run("docker", "buildx", "use", "elsewhere", env=own).returncode == 0
    used = checkout.invoke("build.scripts", env=own)
    assert used.returncode == 2 and "run `docker buildx use default`" in used.stderr, used.stderr
    assert checkout.run("docker", "buildx", "use", "default", env=own).returncode == 0  # the remedy, as it is typed
    assert "invoke build.base" in checkout.invoke("build.scripts", env=own).stderr
    assert checkout.run("docker", "ps", "-q", "--filter", "name=buildx_buildkit_elsewhere").stdout == "", "nothing was built"
