"""The images, built by `invoke build.*` from the fixture sources, with torch 2.4.0 itself in base."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.workbench import ROOT, Workbench

pytestmark = pytest.mark.docker
OURS = ["agentgym-rl/base", "agentgym-rl/train", "agentgym-rl/scripts", "agentgym/eval"]


def inspect(bench: Workbench, name: str) -> dict:
    return json.loads(bench.docker("image", "inspect", bench.image(name)))[0]


def python(bench: Workbench, name: str, code: str) -> str:
    return bench.docker("run", "--rm", "--entrypoint", "python", bench.image(name), "-c", code)


def said(done: subprocess.CompletedProcess[str]) -> str:
    """Return all that a command said: BuildKit's progress goes to one stream or the other, by Compose's version."""
    return done.stdout + done.stderr


def test_build_all_builds_four_images_and_sums_up(bench: Workbench, build: subprocess.CompletedProcess[str]) -> None:
    for name in OURS:
        assert re.search(rf"^{re.escape(bench.image(name))} +[\d.]+[MG]B +[\d.]+ +(built|cached)$", build.stdout, re.M)
    assert "#5 [" in said(build), "BuildKit's progress is not shown"


def test_an_empty_wheel_leaves_flash_attn_out(built: Workbench) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('flash_attn'))"
    assert python(built, "agentgym-rl/base", code).strip() == "None"


@pytest.mark.parametrize("name", ["agentgym-rl/base", "agentgym-rl/train", "agentgym-rl/scripts"])
def test_image_has_torch_2_4_0(built: Workbench, name: str) -> None:
    assert python(built, name, "import torch; print(torch.__version__, float(torch.ones(3).sum()))").startswith("2.4.0")


def test_train_image_has_verl_agentenv_and_the_pinned_transformers(built: Workbench) -> None:
    said = python(
        built, "agentgym-rl/train",
        "import agentenv, transformers, verl.agent_trainer.main_ppo as m; print(transformers.__version__, m.__file__, agentenv.__file__)"
    )
    assert said.split() == [
        "4.51.3", "/workspace/AgentGym-RL/verl/agent_trainer/main_ppo.py",
        "/workspace/AgentGym/agentenv/agentenv/__init__.py"
    ]


def test_train_image_has_the_run_time_variables(built: Workbench) -> None:
    env = inspect(built, "agentgym-rl/train")["Config"]["Env"]
    assert {
        "VLLM_USE_MODELSCOPE=0", "VLLM_WORKER_MULTIPROC_METHOD=spawn", "VLLM_ATTENTION_BACKEND=XFORMERS",
        "HYDRA_FULL_ERROR=1"
    } <= set(env)


def test_train_image_runs_the_example_scripts_from_the_workspace(built: Workbench) -> None:
    assert "torch 2.4.0" in built.docker("run", "--rm", built.image("agentgym-rl/train"), "bash",
                                         "examples/train/textcraft_train.sh")


def test_scripts_image_has_the_merger_and_yapf(built: Workbench) -> None:
    said = python(
        built, "agentgym-rl/scripts",
        "import accelerate, huggingface_hub, safetensors, transformers, yapf; print(transformers.__version__)")
    assert said == "4.51.3"
    assert "--local-dir" in built.docker("run", "--rm", built.image("agentgym-rl/scripts"), "python",
                                         "/opt/workbench/scripts/model_merger.py", "--help")


def test_eval_image_answers_help_without_torch_in_400_mb(built: Workbench) -> None:
    assert "usage: python -m evaluation" in built.docker("run", "--rm", built.image("agentgym/eval"), "--help")
    assert python(built, "agentgym/eval", "import importlib.util as u; print(u.find_spec('torch'))") == "None"
    base = json.loads(built.docker("image", "inspect", "python:3.12-slim"))[0]
    assert inspect(built, "agentgym/eval")["Size"] - base["Size"] < 400e6


@pytest.mark.parametrize("name", OURS)
def test_image_is_labelled_and_runs_as_a_plain_user(built: Workbench, name: str) -> None:
    config = inspect(built, name)["Config"]
    commit = built.run("git", "rev-parse", "HEAD").stdout.strip()
    assert config["Labels"]["org.opencontainers.image.revision"] == commit
    assert config["User"] == "1000"


def test_train_image_is_labelled_with_the_commits_of_its_sources(built: Workbench) -> None:
    labels = inspect(built, "agentgym-rl/train")["Config"]["Labels"]
    assert labels["org.agentgym-rl.agentgym-rl.revision"] == "unknown"  # the fixture is no git checkout
    assert labels["org.agentgym-rl.torch"] == "2.4.0"


def test_second_build_all_comes_from_the_cache(built: Workbench) -> None:
    again = built.invoke("build.all")
    assert again.returncode == 0, again.stderr
    lines = [line for line in again.stdout.splitlines() if line.startswith("agentgym")]
    assert [line.split()[-1] for line in lines] == ["cached"] * 4


def test_touched_source_is_in_the_image_and_reinstalls_nothing(built: Workbench) -> None:
    source = built.sources / "AgentGym-RL" / "verl" / "__init__.py"
    before = source.read_text()
    source.write_text(before + f'TOUCHED = "{built.name}"\n')
    try:
        again = built.invoke("build.train")
        assert again.returncode == 0, again.stderr
        installs = re.search(r"#(\d+) \[train [^\]]+\] RUN [^\n]*source=AgentGym-RL/pyproject.toml", said(again))
        assert installs
        assert f"#{installs[1]} CACHED" in said(again)
        assert python(built, "agentgym-rl/train", "import verl; print(verl.TOUCHED)") == built.name
    finally:
        source.write_text(before)
        built.invoke("build.train")


def test_new_commit_changes_labels_only(built: Workbench) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    built.run(*git, "commit", "-q", "--allow-empty", "-m", "Another")
    again = built.invoke("build.all")
    assert again.returncode == 0, again.stderr
    ran = [line for line in said(again).splitlines() if re.match(r"#\d+ [\d.]+ ", line)]
    assert ran == [], "a layer was built again"
    commit = built.run("git", "rev-parse", "HEAD").stdout.strip()
    assert inspect(built, "agentgym-rl/train")["Config"]["Labels"]["org.opencontainers.image.revision"] == commit


@pytest.mark.parametrize("task, service, profile", [("build.base", "base", "build"),
                                                    ("build.scripts", "scripts", "scripts"),
                                                    ("build.eval", "eval-runner", "eval")])
def test_one_image_builds_alone_under_another_tag(built: Workbench, task: str, service: str, profile: str) -> None:
    tag = f"{built.name}-other"
    name = {"base": "agentgym-rl/base", "scripts": "agentgym-rl/scripts", "eval-runner": "agentgym/eval"}[service]
    if service == "scripts":
        built.docker("tag", built.image("agentgym-rl/base"), f"agentgym-rl/base:{tag}")
    done = built.invoke(task, "--tag", tag)
    assert done.returncode == 0, done.stderr
    layers = json.loads(built.docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", f"{name}:{tag}"))
    assert layers == inspect(built, name)["RootFS"]["Layers"]
    sources = {"AGENTGYM_SRC": str(built.sources.parent / "AgentGym")}  # the default is a git URL
    raw = built.run("docker", "compose", "--profile", profile, "build", service, env={"IMAGE_TAG": tag, **sources})
    assert raw.returncode == 0, raw.stderr


def test_cpu_flavour_starts_from_ubuntu(built: Workbench) -> None:
    # TORCH_INDEX_URL stays as it is set (PyPI), so only the base image differs.
    done = built.invoke("build.base", "--cpu", "--tag", f"{built.name}-cpu", timeout=850)
    assert done.returncode == 0, done.stderr
    labels = json.loads(built.docker("image", "inspect", f"agentgym-rl/base:{built.name}-cpu"))[0]["Config"]["Labels"]
    assert labels["org.opencontainers.image.base.name"] == "ubuntu:22.04"


def test_no_cache_builds_every_layer_again(built: Workbench) -> None:
    done = built.invoke("build.eval", "--no-cache", "--tag", f"{built.name}-fresh")
    assert done.returncode == 0, done.stderr
    step = re.search(r"#(\d+) \[[^\]]+\] RUN python -m evaluation", said(done))
    assert step and f"#{step[1]} CACHED" not in said(done)


def test_push_reaches_the_registry(built: Workbench, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(
        "FROM debian:bookworm-slim\n"
        "RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends docker-registry\n"
        "RUN printf 'version: 0.1\\nstorage: {filesystem: {rootdirectory: /srv}}\\nhttp: {addr: \":5000\"}\\n' >/srv/config.yml\n"
        'CMD ["docker-registry", "serve", "/srv/config.yml"]\n')
    image = f"workbench/registry:{built.name}"
    built.docker("build", "-q", "-t", image, str(tmp_path))
    container = built.docker("run", "-d", "--rm", "--label", f"com.docker.compose.project={built.name}", "-p",
                             "127.0.0.1::5000", image)
    address = built.docker("port", container, "5000/tcp").splitlines()[0]
    done = built.invoke("build.eval", "--push", env={"REGISTRY": f"{address}/team/"})
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        name = f"{address}/team/agentgym/eval:{built.name}"
        built.docker("rmi", name)
        built.docker("pull", "-q", name)
    finally:
        built.run("docker", "rm", "-f", container)
        built.run("docker", "rmi", "-f", f"{address}/team/agentgym/eval:{built.name}")


def test_pull_asks_the_registry_for_the_public_base_only(built: Workbench) -> None:
    done = built.invoke("--dry", "build.all", "--pull")
    pulls = {line.split()[-1]: "--pull" in line for line in done.stdout.splitlines()}
    assert pulls == {"base": True, "train": False, "scripts": False, "eval-runner": True}


def test_compose_file_is_valid_with_every_profile(engine: None) -> None:
    overrides = ("docker-compose.cpu.yml", "docker-compose.gpu-env.yml")
    for files in ([], *(["-f", "docker-compose.yml", "-f", name] for name in overrides)):
        done = subprocess.run(["docker", "compose", *files, "--profile", "*", "config", "-q"],
                              cwd=ROOT,
                              capture_output=True,
                              text=True,
                              check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_dockerfiles_pass_hadolint() -> None:
    files = [str(path) for path in (*sorted((ROOT / "docker").glob("*.Dockerfile")), ROOT / "Dockerfile.eval")]
    assert len(files) == 6
    done = subprocess.run([str(Path(sys.executable).parent / "hadolint"), *files],
                          cwd=ROOT,
                          capture_output=True,
                          text=True,
                          check=False)
    assert done.returncode == 0, done.stdout
