"""DOCKER.md's tables row by row, each as it is typed; a row that has no test here, nor one that is named here, fails.

The engine here is a docker that records, which takes seconds. What a real one does is in tests/docker: every block, task and
profile of the guide as typed (test_guide.py), operations, mounts and faults (test_running.py), images (test_images.py), other
people's containers (test_ownership.py, test_two_users.py), environment servers (test_environments.py), evaluation (test_eval.py).
"""
import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.lib.settings import FOLDERS, SETTINGS
from tests.fixtures import needs
from tests.fixtures.invoking import invoke as run_invoke
from tests.fixtures.project import ROOT, copy_project
from tests.tasks.test_dry import RECORDER, is_question

GUIDE = (ROOT / "DOCKER.md").read_text()
# Fails as told where a command line has the words told.
FAILING = '#!/bin/sh\nwhen=$(cat "$ANSWERS/when" 2>/dev/null) && case "$*" in *"$when"*) cat "$ANSWERS/said" >&2; exit 1 ;; esac\n'


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading of the guide, without its head."""
    lines = GUIDE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines()
    found = [[cell.strip() for cell in line.strip("| ").replace("| |", "|  |").split(" | ")] for line in lines if line.startswith("|")]
    assert len(found) > 2, heading
    return found[2:]


def deed(argv: list[str]) -> str:
    """Return docker's words without the files, the profile and the random name."""
    words = list(argv)
    if words[0] == "compose":
        words = words[1:]
        while words[0].startswith("--"):
            words = words[2:]
    return re.sub(r"--name \S+ ", "", " ".join(words))


@dataclass
class Place:
    """A copy of the project, and the folder of a docker that records."""
    root: Path
    docker: Path

    def invoke(self, *words: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str], dict[str, str]]:
        """Run `invoke` as nobody's terminal; return what it said, what docker was to do, and the last environment that Compose had."""
        for name in ("argv", "environment"):
            (self.docker / name).unlink(missing_ok=True)
        environ = {name: value for name, value in os.environ.items() if name not in SETTINGS and not name.startswith(("DOCKER", "BUILDX", "COMPOSE"))}
        environ |= {"ANSWERS": str(self.docker), "PATH": f"{self.docker}:{os.environ['PATH']}", "HOME": str(self.root.parent),
                    "AGENTGYM_RL_SRC": str(ROOT / "tests/fixtures/sources/AgentGym-RL"), **variables}
        done = run_invoke(*words, cwd=self.root, env=environ, input="")
        record = (self.docker / "argv").read_text().split("\0")[:-1] if (self.docker / "argv").exists() else []
        left = iter(record)
        asked = [[next(left) for _ in range(int(count))] for count in left]
        lines = (self.docker / "environment").read_text().splitlines() if record else []
        seen = dict(line.split("=", 1) for line in lines if "=" in line)
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        deeds = [deed(argv) for argv in asked if not is_question(argv)]
        return done, [words for words in deeds if not re.match(r"(buildx )?version$|context inspect", words)], seen

    def up(self, service: str, **labels: str) -> None:
        """Have the engine say that a container of ours runs."""
        ours = {"com.docker.compose.project": "x", "com.docker.compose.project.working_dir": str(self.root), "com.docker.compose.service": service,
                "org.agentgym-rl.uid": str(os.getuid()), **labels}
        (self.docker / "up-ids").write_text("c1\n")
        (self.docker / "up").write_text(json.dumps([{"Id": "c1", "Name": f"/x-{service}-1", "Image": "sha256:1", "State": {"Status": "running", "Running": True},
                                                     "Config": {"Labels": ours}, "HostConfig": {"PortBindings": {}}, "NetworkSettings": {"Ports": {}}}]))

    def fails(self, when: str, said: str) -> None:
        """Have docker fail and say so where its command line has `when`."""
        (self.docker / "when").write_text(when)
        (self.docker / "said").write_text(said + "\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "docker").mkdir()
    (folder / "docker/docker").write_text(FAILING + RECORDER.removeprefix("#!/bin/sh\n"))
    (folder / "docker/docker").chmod(0o755)
    root = copy_project(folder / "project")
    for name in FOLDERS:
        (root / name).mkdir(exist_ok=True)
    return Place(root, folder / "docker")


@pytest.fixture
def place(made: Place) -> Place:
    for name in ("up-ids", "when"):
        (made.docker / name).unlink(missing_ok=True)
    return made


# Operations: what is typed, what docker then does, what is printed. `make` targets stand beside the first of each.
OPERATIONS: list[tuple[str, list[str], str]] = [
    ("invoke build.all", [f"build {one}" for one in ("base", "train", "scripts", "eval-runner")], r"^image +size +seconds +state$"),
    *[(f"invoke build.{name}", [f"build {service}"], "^agentgym") for name, service in (
        ("base", "base"), ("train", "train"), ("scripts", "scripts"), ("eval", "eval-runner"), ("serve", "serve"))],
    ("invoke train.shell", ["run --no-TTY --rm train bash"], ""),
    ("invoke train.run -- nvidia-smi", ["run --no-TTY --rm train nvidia-smi"], ""),
    ("invoke merge --runner docker --local-dir saves",
     ["run --no-TTY --rm scripts python /opt/workbench/scripts/model_merger.py --local-dir /workspace/saves"], ""),
    ("invoke merge.shell", ["run --no-TTY --rm scripts bash"], ""),
    ("invoke format", ["run --no-TTY --rm formatter"], ""),
    ("invoke format --check", ["run --no-TTY --rm formatter --check"], ""),
    ("invoke status", [], r"^container +state +health +ports\n[\s\S]*^image +size +age +built by$"),
    ("invoke down", ["down --remove-orphans"], ""),
    ("invoke doctor", [], r"^ok +engine +26\.1\.5"),
    ("invoke doctor --json", [], r'"name": "engine"'),
    ("invoke clean.images --yes", ["image rm agentgym-rl/base:latest agentgym-rl/train:latest agentgym-rl/scripts:latest agentgym/eval:latest "
                                   "agentgym-rl/serve:latest agentgym/env-demo:latest"], "^  image agentgym-rl/base:latest$"),
    ("invoke clean.containers --yes", ["down --remove-orphans"], "^  network x_default$"),
    ("invoke clean.cache --yes", ["buildx prune --force"], "of other projects too"),
    ("invoke clean.cache --yes --older-than 72h", ["buildx prune --force --filter until=72h"], "over 72h ago"),
]


@pytest.mark.parametrize("typed, deeds, shown", OPERATIONS, ids=[row[0] for row in OPERATIONS])
def test_an_operation(typed: str, deeds: list[str], shown: str, place: Place) -> None:
    done, did, _ = place.invoke(*typed.split()[1:])
    assert did == deeds, done.stderr
    assert re.search(shown, done.stdout, re.M), done.stdout + done.stderr
    assert done.returncode == 0 or typed.startswith("invoke doctor"), done.stderr


@pytest.mark.parametrize("task", ["clean.images", "clean.containers", "clean.cache", "clean.pycache", "clean.all"])
def test_what_cleans_says_what_goes_and_asks(task: str, place: Place) -> None:
    cache = place.root / "tasks/__pycache__"
    cache.mkdir(exist_ok=True)
    done, did, _ = place.invoke(task)
    assert (done.returncode, did) == (2, []) and "clean: nobody is here to answer; add --yes" in done.stderr, done.stderr
    assert re.search(r"^This removes:\n  \S", done.stdout, re.M) and cache.is_dir()


def test_python_s_caches_go_and_what_is_the_user_s_stays(place: Place) -> None:
    kept = [place.root / name / "__pycache__" for name in ("saves", "models", "data", ".run")]
    gone = place.root / "tasks/lib/__pycache__"
    for folder in (*kept, gone):
        folder.mkdir(parents=True, exist_ok=True)
    done, did, _ = place.invoke("clean.pycache", "--yes", PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0 and not did and not gone.exists() and all(folder.is_dir() for folder in kept), done.stderr
    gone.mkdir(parents=True, exist_ok=True)
    done, did, _ = place.invoke("clean.all", "--yes", PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0 and not gone.exists() and all(folder.is_dir() for folder in kept), done.stderr
    assert [words.split()[0] for words in did] == ["down", "image", "buildx"]


def test_a_shell_joins_the_training_container_that_runs(place: Place) -> None:
    place.up("train")
    done, did, _ = place.invoke("train.shell", "--user", "root")
    assert did == ["exec --interactive --user root c1 bash"], done.stderr


def test_status_has_what_runs(place: Place) -> None:
    place.up("train")
    assert re.search(r"^x-train-1 +running$", place.invoke("status")[0].stdout, re.M)


ENVIRONMENT_ROWS: list[tuple[str, list[str], bool]] = [  # typed, deeds, whether the server is up before
    ("invoke build.env --env demo", ["build env-demo"], False),
    ("invoke --dry env.up --env demo", ["up --detach --force-recreate env-demo"], False),
    ("invoke env.down --env demo", ["container stop c1", "container rm --force --volumes c1"], True),
    ("invoke env.down", ["container stop c1", "container rm --force --volumes c1"], True),
    ("invoke env.logs --env demo", ["container logs c1"], True),
    ("invoke env.shell --env demo", ["exec --interactive c1 bash"], True),
]


@pytest.mark.parametrize("typed, deeds, is_up", ENVIRONMENT_ROWS, ids=[row[0] for row in ENVIRONMENT_ROWS])
def test_an_operation_of_environments(typed: str, deeds: list[str], is_up: bool, place: Place) -> None:
    if is_up:
        place.up("env-demo", **{"org.agentgym-rl.env": "demo", "org.agentgym-rl.env.port": "26016"})
    done, did, _ = place.invoke(*typed.split()[1:])
    assert done.returncode == 0, done.stderr
    if "--dry" in typed:  # what it prints is what runs: test_dry.py
        assert not did
        did = [deed(line.partition(" docker ")[2].split()) for line in done.stdout.splitlines() if " docker " in line]
    assert did[-len(deeds):] == deeds


# In that table, and played on a real engine or as real processes.
ENVIRONMENTS_ELSEWHERE = {
    "invoke env.restart --env demo": ("tests/docker/test_environments.py", "test_restart_starts_it_as_it_was"),
    "invoke env.up --env demo": ("tests/docker/test_environments.py", "test_a_server_of_this_form_comes_up_conforms_and_goes_down"),
    "invoke env.list": ("tests/tasks/test_json.py", "test_every_environment_is_in_the_object"),
    "invoke env.check --env demo": ("tests/tasks/test_json.py", "test_the_checks_of_a_server_are_in_the_object"),
    "invoke env.try --env demo": ("tests/tasks/test_trying.py", "def test_"),
    "invoke env.data --env searchqa": ("tests/tasks/test_env.py", "test_data_is_chosen_by_split_and_by_index"),
}


def test_every_operation_of_the_guide_has_a_row() -> None:
    """Both tables with a column *was*: every target's twin."""
    cells = [line.split(" | ")[1] for line in GUIDE.splitlines() if re.match(r"\|( `make|  ?\| `invoke env| \(by hand\))", line)]
    cells += re.findall(r"^\| \| (`invoke [^`]+`)", GUIDE, re.M)
    typed = {found for cell in cells for found in re.findall(r"`(invoke [^`]+)`", cell)}
    assert len(typed) == 22 and len(re.findall(r"`make [\w-]+`", GUIDE)) == 14
    tested = {row[0] for row in OPERATIONS} | {row[0] for row in ENVIRONMENT_ROWS} | {f"invoke clean.{name}" for name in ("images", "pycache")}
    assert typed <= tested | set(ENVIRONMENTS_ELSEWHERE)
    named(ENVIRONMENTS_ELSEWHERE)


def named(elsewhere: Mapping[str, tuple[str, str]]) -> None:
    """Check that the tests that are named are there."""
    assert not [(file, test) for file, test in elsewhere.values() if test not in (ROOT / file).read_text()]


# What plain Compose makes of the file


def configured(folder: Path, **variables: str) -> dict[str, Any]:
    """Return Compose's own reading of the project in `folder`, all profiles."""
    needs.docker()
    environ = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    done = subprocess.run(["docker", "compose", "--profile", "*", "config", "--format", "json"], cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def unset(made: Place) -> dict[str, Any]:
    """Compose's reading where nothing is set."""
    return configured(made.root)


def images_table() -> list[list[str]]:
    return [[cell.strip("`") for cell in row[:3]] for row in rows("Images") if row[0].startswith("`agentgym")]


@pytest.mark.parametrize("image, file, task", images_table(), ids=lambda value: value)
def test_an_image_is_built_from_that_file_by_that_task(image: str, file: str, task: str, unset: dict[str, Any], made: Place) -> None:
    _, (did, ), _ = made.invoke(*task.split()[1:])
    services = unset["services"]
    if image == "agentgym-rl/serve":  # of hosts without a GPU
        done = subprocess.run(["docker", "compose", "-f", "docker-compose.yml", "-f", "docker-compose.cpu.yml", "--profile", "*", "config", "--format", "json"], cwd=made.root,
                              capture_output=True, text=True, check=True)
        services = json.loads(done.stdout)["services"]
    service = services[did.split()[-1]]
    assert (service["image"], service["build"]["dockerfile"]) == (f"{image}:latest", file)


@pytest.mark.parametrize("profile, service", [(row[0].strip("`"), row[1]) for row in rows("Profiles")])
def test_a_profile_has_its_service_alone(profile: str, service: str, unset: dict[str, Any]) -> None:
    """Its command as typed: test_guide.py's test_profile_in_the_table, on a real engine."""
    assert [name for name, one in unset["services"].items() if profile in one["profiles"]] == [service]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_mounted_where_the_guide_says(folder: str, unset: dict[str, Any], made: Place) -> None:
    """That what a container writes there is the caller's: test_running.py's test_what_the_container_writes_belongs_to_the_caller."""
    assert f"`{folder}`" in GUIDE.partition("\n## Mounts and ownership\n")[2].partition("\n## ")[0]
    where = {
        service: (one["target"], one.get("read_only", False))
        for service, found in unset["services"].items() for one in found.get("volumes", []) if one.get("source") == str(made.root / folder)
    }
    usual = dict.fromkeys(("train", "scripts", "model-merger", "eval-runner"), (f"/workspace/{folder}", False))
    read = {"serve": (f"/workspace/{folder}", True)} if folder in ("models", "saves") else {"env-server": ("/data", True)} if folder == "data" else {}
    assert where == {**usual, **read}


# Variables: a value of one's own, and where Compose has it, as text.
def of(*path: str | int):  # type: ignore[no-untyped-def]
    """Return what gets the value at `path` of the services, or of the configs."""

    def get(found: dict[str, Any]) -> str:
        value: Any = found["configs" if path[0] == "configs" else "services"]
        for one in path[1:] if path[0] == "configs" else path:
            value = value[one]
        return "" if value is None else str(value).strip("\n")

    return get


VARIABLES = {
    "LOCAL_DIR": ("saves/x y", of("model-merger", "environment", "LOCAL_DIR")),
    "SAVE_DIR": ("models/out", of("model-merger", "environment", "SAVE_DIR")),
    "HF_UPLOAD_PATH": ("me/it", of("model-merger", "environment", "HF_UPLOAD_PATH")),
    "GPUS": ("0,1", of("train", "deploy", "resources", "reservations", "devices", 0, "device_ids", 0)),
    "SHM_SIZE": ("64g", lambda found: f"{int(found['services']['train']['shm_size']) >> 30}g"),
    "WANDB_API_KEY": ("key-1", of("configs", "wandb_api_key", "content")),
    "WANDB_MODE": ("online", of("train", "environment", "WANDB_MODE")),
    "ENV": ("demo", lambda found: re.search("env-(.*):latest", found["services"]["env-server"]["image"])[1]),  # type: ignore[index]
    "ENV_PORT": ("26016", of("env-server", "ports", 0, "published")),
    "ENV_BIND": ("127.0.0.2", of("env-server", "ports", 0, "host_ip")),
    "MODEL": ("mine", of("eval-runner", "environment", "MODEL")),
    "MAX_ROUND": ("7", of("eval-runner", "environment", "MAX_ROUND")),
    "OPENAI_API_KEY": ("key-2", of("configs", "openai_api_key", "content")),
    "OPENAI_BASE_URL": ("http://x/v1", of("eval-runner", "environment", "OPENAI_BASE_URL")),
    "SERVE_MODEL": ("saves/m", of("serve", "command", 2)),
    "SERVED_NAME": ("m", of("serve", "command", 4)),
    "SERVE_PORT": ("8001", of("serve", "ports", 0, "published")),
    "HF_TOKEN": ("key-3", of("configs", "hf_token", "content")),
    "HF_ENDPOINT": ("http://hub", of("train", "environment", "HF_ENDPOINT")),
}


@pytest.fixture(scope="module")
def exported(made: Place) -> dict[str, Any]:
    """Compose's reading with every variable in the environment."""
    return configured(made.root, **{name: value for name, (value, _) in VARIABLES.items()})


@pytest.fixture(scope="module")
def written(made: Place) -> dict[str, Any]:
    """Compose's reading with every variable in `.env`."""
    (made.root / ".env").write_text("".join(f"{name}={value}\n" for name, (value, _) in VARIABLES.items()))
    try:
        return configured(made.root)
    finally:
        (made.root / ".env").unlink()


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_has_its_default_and_is_read_in_both_places(name: str, unset: dict[str, Any], exported: dict[str, Any], written: dict[str, Any]) -> None:
    value, get = VARIABLES[name]
    cell, = (row[1] for row in rows("Variables") if f"`{name}`" in row[0])
    default = SETTINGS[name].default
    assert get(unset) == default and (not default or f"`{default}`" in cell)
    assert get(exported) == get(written) == value


def test_every_variable_of_the_table_has_a_row() -> None:
    assert {name for row in rows("Variables") for name in re.findall(r"`([A-Z_]+)`", row[0])} == set(VARIABLES)


@pytest.mark.parametrize("variables, typed, word", [
    ({"LOCAL_DIR": "saves/x", "SAVE_DIR": "models/out", "HF_UPLOAD_PATH": "me/it"}, "merge --runner docker --gpus none",
     "model_merger.py --local-dir /workspace/saves/x --save-dir /workspace/models/out --hf-upload-path me/it"),
    ({"LOCAL_DIR": "saves/none"}, "merge --runner docker --gpus none --local-dir saves", "--local-dir /workspace/saves"),
    ({"GPUS": "none"}, "train.run -- true", "docker-compose.cpu.yml"),
    ({"SHM_SIZE": "1g"}, "train.run --gpus none --shm-size 2g -- true", "SHM_SIZE=2g"),
    ({"ENV": "demo"}, "env.up --runner docker", ".run/env/demo/compose.json"),
    ({"ENV": "demo", "MAX_ROUND": "7"}, "eval --runner docker --server http://x:1 --model m", "--env=demo --model=m --server=http://x:1 --max-round=7"),
    ({"MODEL": "mine", "OPENAI_API_KEY": "key-2"}, "train.run --gpus none -- echo key-2", "train echo '***'"),
], ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_a_task_reads_variables_as_well(variables: dict[str, str], typed: str, word: str, place: Place) -> None:
    """Their order, a flag first: test_engine.py; ENV_PORT: test_env.py."""
    (place.root / "saves/x").mkdir(exist_ok=True)
    done, _, _ = place.invoke("--dry", *typed.split(), **variables)
    assert done.returncode == 0 and word.replace("'***'", "***") in done.stdout, done.stdout + done.stderr


# Troubleshooting: what one sees, where it comes from, and what helps, as typed.
DAEMON = "Error response from daemon: "
SEEN = {  # a command, where docker fails and what it says, and what the task says to that
    "`error setting rlimit`": ("train.run --gpus none -- true", " run ", f"{DAEMON}error setting rlimit type 8: operation not permitted", "set MEMLOCK to"),
    "`port is already allocated`": ("env.up --env demo --runner docker --wait 1", " up ", f"{DAEMON}driver failed: Bind for 127.0.0.1:1 failed: port is already allocated",
                                    "choose another with ENV_PORT"),
    "no space left on device": ("build.base", " build ", "#7 write /x: no space left on device\nfailed to solve", "`docker system df`, then `invoke clean.cache`"),
    "a download in a build fails": ("build.scripts", " build ", "#9 E: Failed to fetch http://deb.debian.org/x\nfailed to solve", "PACKAGE_INDEX_URL and CA_BUNDLE"),
}


@pytest.mark.parametrize("row", SEEN)
def test_a_fault_is_told_with_what_helps(row: str, place: Place) -> None:
    typed, when, said, helps = SEEN[row]
    place.fails(when, said)
    done, _, _ = place.invoke(*typed.split())
    assert done.returncode == 1 and helps in done.stderr.splitlines()[-1], done.stderr


def test_without_a_runtime_it_says_so_and_goes_on(place: Place) -> None:
    done, did, _ = place.invoke("train.run", "--", "true")
    assert "no NVIDIA runtime on this engine: running without GPUs" in done.stderr and did and done.returncode == 0, done.stderr


def test_a_driver_that_is_too_old_is_a_line_of_the_doctor(place: Place) -> None:
    smi = place.docker / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 10, 470.1.1'\n")
    smi.chmod(0o755)
    try:
        assert re.search(r"^note +gpus +.*driver 470\.1\.1 is too old for CUDA 12\.4 +install driver", place.invoke("doctor")[0].stdout, re.M)
    finally:
        smi.unlink()


@pytest.mark.parametrize("variables, get, value", [
    ({"MEMLOCK": "65536"}, of("train", "ulimits", "memlock"), "65536"),
    ({"FLASH_ATTN_WHEEL": ""}, of("base", "build", "args", "FLASH_ATTN_WHEEL"), ""),
    ({"FLASH_ATTN_WHEEL": "https://x/y.whl"}, of("base", "build", "args", "FLASH_ATTN_WHEEL"), "https://x/y.whl"),
    ({"HOST_UID": "1234", "HOST_GID": "1235"}, of("train", "user"), "1234:1235"),
    ({"CA_BUNDLE": "/etc/hosts"}, lambda found: found["secrets"]["ca_bundle"]["file"], "/etc/hosts"),
    ({"PACKAGE_INDEX_URL": "https://x"}, lambda found: found["secrets"]["package_index"]["environment"], "PACKAGE_INDEX_URL"),
], ids=lambda value: "" if callable(value) else str(value))
def test_what_helps_does_so_with_plain_compose(variables: dict[str, str], get: Any, value: str, made: Place) -> None:
    assert get(configured(made.root, **variables)) == value


def test_more_shared_memory_as_typed(place: Place) -> None:
    done, _, seen = place.invoke("train.run", "--gpus", "none", "--shm-size", "64g", "--", "true")
    assert done.returncode == 0 and seen["SHM_SIZE"] == "64g", done.stderr


TROUBLES_ELSEWHERE = {
    "out of memory on the GPU": ("tests/training/test_diagnosis.py", "test_a_line_is_evidence"),
    "`BUILDX_BUILDER=…; unset it: its driver … does not see this engine's images`":
    ("tests/docker/test_ownership.py", "test_a_builder_that_cannot_see_the_base_is_told_by_its_variable"),
    "permission denied in `saves/`": ("tests/docker/test_running.py", "test_another_user_of_the_host_owns_what_the_container_writes"),
    "`env.up: NAME was not ready after 120 s`": ("tests/docker/test_environments.py", "was not ready after 15 s"),
    "`eval: the model's server ended: …`": ("tests/docker/test_eval.py", "test_a_server_that_dies_is_one_line_and_leaves_nothing"),
}
TROUBLES_HERE = {  # by the tests above
    "`no NVIDIA runtime on this engine: running without GPUs`", "`torch.cuda.is_available()` is `False` with the runtime there",
    "`Bus error`, or a data loader that dies", "flash-attn does not install"
}


def test_every_trouble_of_the_table_has_a_row() -> None:
    assert {row[0] for row in rows("Troubleshooting")} == {*SEEN, *TROUBLES_ELSEWHERE, *TROUBLES_HERE}
    named(TROUBLES_ELSEWHERE)
