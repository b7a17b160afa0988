"""What the tasks and the Compose profiles do on a real engine, row by row of DOCKER.md's tables."""
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docker.workbench import SOURCES, Terminal, Workbench

pytestmark = pytest.mark.docker
OTHER = 4321  # a user id that neither the images nor the tests have


@pytest.fixture
def environment_image(built: Workbench) -> str:
    """Return the name of the fixture environment, for which the image of a server is built."""
    built.docker("build", "-q", "-t", built.image("agentgym/env-echo"), str(SOURCES / "environment"))
    return "echo"


@pytest.fixture
def port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# train.run and train.shell


def test_train_run_passes_arguments_untouched(built: Workbench) -> None:
    words = ["a b", "$HOME", "--flag=x;y", "", "quo'te", "-x", "--"]
    done = built.invoke("train.run", "--", "python", "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == words


def test_train_run_gives_the_command_s_exit_code_and_both_streams(built: Workbench) -> None:
    done = built.invoke("train.run", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert done.returncode == 7
    assert done.stdout == "out\n"
    assert "err\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_run_feeds_standard_input(built: Workbench) -> None:
    assert built.invoke("train.run", "--", "wc", "-c", stdin="12345").stdout.strip() == "5"


def test_train_run_says_that_it_goes_without_gpus(built: Workbench) -> None:
    assert "running without GPUs (docker-compose.cpu.yml)" in built.invoke("train.run", "--", "true").stderr


def test_train_run_works_from_a_subfolder(built: Workbench) -> None:
    done = built.invoke("train.run", "--", "pwd", cwd=built.root / "docker")
    assert done.stdout == "/workspace\n", done.stderr


@pytest.mark.parametrize("folder", ["models", "saves", "data", "AgentItemId", "AgentEval"])
def test_what_the_container_writes_belongs_to_the_caller(built: Workbench, folder: str) -> None:
    done = built.invoke("train.run", "--", "touch", f"/workspace/{folder}/written")
    assert done.returncode == 0, done.stderr
    written = built.root / folder / "written"
    assert (written.stat().st_uid, written.stat().st_gid) == (os.getuid(), os.getgid())
    written.unlink()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_of_the_host_owns_what_the_container_writes(built: Workbench, tmp_path: Path) -> None:
    # That user types the line that --dry prints: this Python may lie where only root can read.
    line = built.invoke("--dry",
                        "train.run",
                        "--",
                        "sh",
                        "-c",
                        "id -u; python -c 'import getpass; getpass.getuser()'; touch saves/theirs ~/home",
                        env={
                            "HOST_UID": str(OTHER),
                            "HOST_GID": str(OTHER)
                        }).stdout
    saves = built.root / "saves"
    before = saves.stat()
    for folder in [built.root, *built.root.parents]:
        folder.chmod(folder.stat().st_mode | 0o055)
    os.chown(saves, OTHER, OTHER)
    try:
        done = built.run("sh",
                         "-c",
                         line,
                         user=OTHER,
                         env={
                             "HOME": str(built.root),
                             "HOST_UID": str(OTHER),
                             "HOST_GID": str(OTHER)
                         })
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(OTHER)
        assert (saves / "theirs").stat().st_uid == OTHER
    finally:
        (saves / "theirs").unlink(missing_ok=True)
        os.chown(saves, before.st_uid, before.st_gid)


def test_absent_folders_are_created_for_the_caller(built: Workbench) -> None:
    (built.root / "AgentEval" / ".gitkeep").unlink()
    (built.root / "AgentEval").rmdir()
    done = built.invoke("train.run", "--", "ls", "/workspace/AgentEval")
    assert done.returncode == 0, done.stderr
    assert (built.root / "AgentEval").stat().st_uid == os.getuid()


def test_train_shell_on_a_terminal_runs_what_is_typed_and_exits_with_its_code(built: Workbench) -> None:
    shell = Terminal(built, sys.executable, "-m", "invoke", "train.shell")
    shell.wait_for(r"[$#] $")
    shell.type("echo six times seven is $((6*7)); tty\n")
    assert "/dev/pts/" in shell.wait_for(r"six times seven is 42\s[\s\S]*[$#] $")
    shell.type("exit 3\n")
    assert shell.exit_code() == 3
    assert built.containers() == []


def test_train_shell_joins_the_running_container(built: Workbench) -> None:
    first = Terminal(built, sys.executable, "-m", "invoke", "train.shell")
    first.wait_for(r"[$#] $")
    first.type("echo hidden >/tmp/mark\n")
    first.wait_for(r"[$#] $")
    joined = built.invoke("train.shell", stdin="cat /tmp/mark; exit 5\n")
    assert (joined.returncode, joined.stdout) == (5, "hidden\n"), joined.stderr
    assert len(built.containers(service="train")) == 1
    first.type("exit 0\n")
    assert first.exit_code() == 0


def test_ctrl_c_stops_the_container_and_exits_130(built: Workbench) -> None:
    running = Terminal(built, sys.executable, "-m", "invoke", "train.run", "--", "sh", "-c", "echo started; exec sleep 300")
    running.wait_for("started")
    running.type("\x03")
    assert running.exit_code() == 130
    assert "Traceback" not in running.seen
    assert built.containers() == []


@pytest.mark.parametrize("pressed", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_without_a_terminal_stops_the_container_too(built: Workbench, pressed: signal.Signals) -> None:
    tidies = "import time\nprint('started', flush=True)\ntry:\n    time.sleep(300)\nfinally:\n    print('tidied', flush=True)\n"
    other = built.docker("run", "-d", "--label", f"com.docker.compose.project={built.name}", "--label",
                         "com.docker.compose.service=train", built.image("agentgym-rl/train"), "sleep", "300")
    words = [sys.executable, "-m", "invoke", "train.run", "--", "python", "-c", tidies]
    with subprocess.Popen(words,
                          cwd=built.root,
                          env=built.environment(),
                          stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE,
                          stdin=subprocess.DEVNULL,
                          text=True,
                          start_new_session=True) as running:
        assert running.stdout and running.stdout.readline() == "started\n"
        if pressed == signal.SIGINT:
            os.killpg(running.pid, pressed)  # as a terminal does
        else:
            running.send_signal(pressed)
        said = running.communicate(timeout=90)[1]
    assert running.returncode == 130 and "Traceback (most recent call last):\n  File \"/" not in said, said
    assert [one for one in built.containers() if not other.startswith(one)] == []
    built.docker("rm", "-f", other)


def test_what_lies_in_the_checkout_beside_the_code_is_not_in_the_image(built: Workbench) -> None:
    assert (built.sources / "AgentGym-RL/.env").is_file()
    listed = built.docker("run", "--rm", built.image("agentgym-rl/train"), "ls", "-A", "/workspace/AgentGym-RL").split()
    assert "verl" in listed and "pyproject.toml" in listed and ".env" not in listed
    assert built.docker("run", "--rm", built.image("agentgym-rl/train"), "readlink",
                        "/workspace/AgentGym-RL/saves") == "../saves"


def test_shm_size_reaches_the_container(built: Workbench) -> None:
    done = built.invoke("train.run", "--shm-size", "96m", "--", "df", "--output=size", "-BM", "/dev/shm")
    assert done.stdout.split()[-1] == "96M", done.stderr


def test_user_flag_reaches_the_container(built: Workbench) -> None:
    assert built.invoke("train.run", "--user", "1234:1234", "--", "id", "-u").stdout == "1234\n"


def test_root_in_a_shell_can_install_a_package_s_files(built: Workbench) -> None:
    done = built.invoke("train.run", "--user", "root", "--", "sh", "-c",
                        "touch /usr/x && chown 1000 /usr/x && stat -c %u /usr/x")
    assert done.stdout == "1000\n", done.stderr


@pytest.mark.parametrize("gpus, devices", [("all", ["all"]), ("0,1", ["0,1"])])
def test_gpus_are_reserved_where_the_override_is_absent(built: Workbench, gpus: str, devices: list[str]) -> None:
    for service in ("train", "scripts", "model-merger", "serve"):
        done = built.run("docker", "compose", "--profile", service, "create", service, env={"GPUS": gpus})
        assert done.returncode == 0, done.stderr
        requests = json.loads(
            built.docker("inspect", "--format", "{{json .HostConfig.DeviceRequests}}",
                         *built.containers(service=service)))
        assert [(one["Driver"], one["DeviceIDs"], one["Capabilities"])
                for one in requests] == [("nvidia", devices, [["gpu"]])]
        built.docker("rm", "-f", *built.containers())


def test_containers_are_hardened(built: Workbench) -> None:
    for service, added in (("train", 5), ("scripts", 0), ("model-merger", 0), ("eval-runner", 0), ("formatter", 0)):
        profile = {"eval-runner": "eval"}.get(service, service)
        done = built.compose("--profile", profile, "create", service, env={"AGENTGYM_RL_SRC": str(built.sources)})
        assert done.returncode == 0, done.stderr
        host = json.loads(
            built.docker("inspect", "--format", "{{json .HostConfig}}", *built.containers(service=service)))
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        assert host["CapDrop"] == ["ALL"] and len(host["CapAdd"] or []) == added
        assert host["Init"] is True
        assert host["LogConfig"]["Config"]["max-size"] == "10m"
        built.docker("rm", "-f", *built.containers())


def test_training_container_has_its_memory_settings(built: Workbench) -> None:
    assert built.compose("--profile", "train", "create", "train", env={"MEMLOCK": "-1"}).returncode == 0
    host = json.loads(built.docker("inspect", "--format", "{{json .HostConfig}}", *built.containers()))
    assert host["ShmSize"] == 32 * 2**30
    assert host["IpcMode"] == "private"
    assert {one["Name"]: one["Hard"] for one in host["Ulimits"]} == {"memlock": -1, "stack": 67108864}


# The profiles, without invoke


@pytest.mark.parametrize("command, expected", [
    ("--profile train run --rm -T train python -c 'import verl; print(verl.__doc__)'", "Stand-in for verl."),
    ("--profile scripts run --rm -T scripts yapf --version", "yapf"),
    ("--profile eval run --rm -T eval-runner --help", "python -m evaluation"),
    ("--profile formatter run --rm -T formatter --check", ""),
    ("--profile build build base", ""),
])
def test_profile_works_as_typed(built: Workbench, command: str, expected: str) -> None:
    done = built.compose(
        *shlex.split(command),
        env={
            "AGENTGYM_RL_SRC": str(built.sources),
            "HOST_UID": str(os.getuid()),
            "HOST_GID": str(os.getgid()),
            # Plain Compose knows no commit for the labels: not over the image that others look at.
            "IMAGE_TAG": f"{built.name}-raw" if "build base" in command else built.name
        })
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.parametrize("host", ["env-server", "host.docker.internal"])
def test_train_container_reaches_the_environment_server(built: Workbench, environment_image: str, port: int,
                                                        host: str) -> None:
    env = {"ENV": environment_image, "ENV_PORT": str(port)}
    up = built.compose("--profile", "env", "up", "-d", "env-server", env=env)
    assert up.returncode == 0, up.stderr
    program = ("import sys, time, urllib.request\n"
               "for _ in range(50):\n"
               "    try: sys.exit(urllib.request.urlopen(sys.argv[1]).status != 200)\n"
               "    except OSError as error: time.sleep(0.2)\n"
               "sys.exit(str(error))")
    done = built.invoke("train.run", "--", "python", "-c", program, f"http://{host}:{port}/", env=env)
    assert done.returncode == 0, done.stderr
    published = built.docker("port", *built.containers(service="env-server"))
    assert published == f"{port}/tcp -> 127.0.0.1:{port}"


def test_env_bind_publishes_elsewhere(built: Workbench, environment_image: str, port: int) -> None:
    env = {"ENV": environment_image, "ENV_PORT": str(port), "ENV_BIND": "127.0.0.2"}
    assert built.compose("--profile", "env", "up", "-d", "env-server", env=env).returncode == 0
    assert built.docker("port", *built.containers(service="env-server")) == f"{port}/tcp -> 127.0.0.2:{port}"


# format


def test_format_checks_then_formats_in_the_checkout_s_own_style(built: Workbench) -> None:
    messy = built.sources / "AgentGym-RL" / "verl" / "messy.py"
    messy.write_text(
        "value = dict(first=1,second=2,third=3,fourth=4,fifth=5,sixth=6,seventh=7,eighth=8,ninth=9,tenth=10)\n")
    try:
        check = built.invoke("format", "--check")
        assert check.returncode == 1, check.stderr
        assert "+value = dict(first=1," in check.stdout
        assert messy.read_text().count("\n") == 1
        done = built.invoke("format")
        assert done.returncode == 0, done.stderr
        # 100 columns, as the checkout's .style.yapf says and ours does not
        assert max(map(len, messy.read_text().splitlines())) <= 100 and messy.stat().st_uid == os.getuid()
        assert built.invoke("format", "--check").returncode == 0
    finally:
        messy.unlink()


def test_format_without_a_checkout_says_what_to_set(built: Workbench) -> None:
    done = built.invoke("format", env={"AGENTGYM_RL_SRC": "https://example.org/x.git#abc"})
    assert done.returncode == 2
    assert re.fullmatch(r"format: no AgentGym-RL checkout \(.*\); set AGENTGYM_RL_SRC to its folder\n", done.stderr)


# status, down, clean, doctor


def test_status_shows_containers_ports_health_and_images(built: Workbench, environment_image: str, port: int) -> None:
    env = {"ENV": environment_image, "ENV_PORT": str(port)}
    assert built.compose("--profile", "env", "up", "-d", "env-server", env=env).returncode == 0
    done = built.invoke("status")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{built.name}-env-server-1 +running +127.0.0.1:{port}->{port}/tcp$", done.stdout, re.M)
    assert re.search(rf"^agentgym-rl/train:{built.name} +[\d.]+GB +(seconds|\d+ \w+) +this checkout$", done.stdout, re.M)
    missing = built.invoke("status", env={"IMAGE_TAG": "absent"})
    assert missing.stdout.count("not built") == 5


def test_down_stops_the_project_s_containers_and_no_other(built: Workbench, environment_image: str, port: int) -> None:
    env = {"ENV": environment_image, "ENV_PORT": str(port)}
    assert built.compose("--profile", "env", "up", "-d", "env-server", env=env).returncode == 0
    assert built.compose("--profile", "scripts", "run", "-d", "scripts", "sleep", "300").returncode == 0
    other = built.docker("run", "-d", "--rm", built.image("agentgym/env-echo"), "sleep", "300")
    try:
        assert len(built.containers()) == 2
        done = built.invoke("down")
        assert done.returncode == 0, done.stderr
        assert built.containers() == []
        assert built.docker("inspect", "--format", "{{.State.Running}}", other) == "true"
    finally:
        built.docker("rm", "-f", other)


def test_clean_containers_asks_and_removes(built: Workbench) -> None:
    assert built.compose("--profile", "scripts", "run", "-d", "scripts", "sleep", "300").returncode == 0
    asked = built.invoke("clean.containers")
    assert (asked.returncode, asked.stderr) == (2, "clean: nobody is here to answer; add --yes\n")
    assert re.search(r"container .*scripts-run-.* \(running\)", asked.stdout)
    assert len(built.containers()) == 1
    assert built.invoke("clean.containers", "--yes").returncode == 0
    assert built.containers() == []


@pytest.mark.parametrize("answer", ["n\n", "\x04"], ids=["n", "Ctrl-D"])
def test_clean_asks_on_a_terminal_and_takes_no_for_an_answer(answer: str, built: Workbench) -> None:
    asked = Terminal(built, sys.executable, "-m", "invoke", "clean.images")
    asked.wait_for(r"Go on\? \[y/N\] ")
    asked.type(answer)
    assert asked.exit_code() == 0 and "Traceback" not in asked.seen
    assert built.docker("image", "inspect", "--format", "x", built.image("agentgym/eval")) == "x"


def test_clean_images_removes_ours_and_keeps_saves(built: Workbench) -> None:
    tag = f"{built.name}-clean"
    for name in ("agentgym/eval", "agentgym/env-echo", "agentgym-rl/base"):
        built.docker("tag", built.image("agentgym/eval"), f"{name}:{tag}")
    kept = built.root / "saves" / "kept"
    kept.write_text("kept")
    done = built.invoke("clean.images", "--yes", env={"IMAGE_TAG": tag})
    assert done.returncode == 0, done.stderr
    assert built.docker("images", "-q", "--filter", f"reference=*/*:{tag}") == ""
    assert built.docker("image", "inspect", "--format", "x", built.image("agentgym/eval")) == "x"
    assert kept.read_text() == "kept"
    kept.unlink()


def test_clean_cache_prunes_what_is_older(built: Workbench) -> None:
    # An age that nothing has reached: the cache is the whole engine's, other tests build on it.
    done = built.invoke("clean.cache", "--yes", "--older-than", "9000h")
    assert done.returncode == 0, done.stderr
    assert "of other projects too, last used over 9000h ago" in done.stdout
    # A row: ID, RECLAIMABLE, SIZE, LAST ACCESSED. The engine counts what was never accessed as older than any age.
    rows = re.findall(r"^\S+\s+(?:true|false)\s+\S+(.*)$", done.stdout, re.MULTILINE)
    assert re.search(r"^Total:\s+\d", done.stdout, re.MULTILINE) and not "".join(rows).strip()


def test_clean_pycache_leaves_sources_and_data(built: Workbench) -> None:
    for folder in ("tasks/__pycache__", "saves/__pycache__", ".pytest_cache"):
        (built.root / folder).mkdir(exist_ok=True)
    done = built.invoke("clean.pycache", "--yes", env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0, done.stderr
    assert not (built.root / "tasks/__pycache__").exists() and not (built.root / ".pytest_cache").exists()
    assert (built.root / "saves/__pycache__").is_dir() and (built.root / "tasks/clean.py").is_file()


def test_clean_all_removes_containers_images_and_pycache(built: Workbench) -> None:
    tag = f"{built.name}-all"
    built.docker("tag", built.image("agentgym/eval"), f"agentgym/eval:{tag}")
    assert built.compose("--profile", "scripts", "run", "-d", "scripts", "sleep", "300").returncode == 0
    done = built.invoke("clean.all", "--yes", "--older-than", "9000h", env={"IMAGE_TAG": tag})
    assert done.returncode == 0, done.stderr
    assert built.containers() == []
    assert built.docker("images", "-q", "--filter", f"reference=*/*:{tag}") == ""


def test_doctor_reports_every_check(built: Workbench) -> None:
    done = built.invoke("doctor", "--json")
    checks = {one["name"]: one for one in json.loads(done.stdout)["checks"]}
    assert set(checks) == {
        "engine", "environments", "compose", "buildx", "nvidia", "disk", "settings", ".env", "AGENTGYM_RL_SRC",
        "AGENTGYM_SRC", "files", "gpus", "memory", "/dev/shm", "ports", "clock", "images", "data", "models", "keys", "others", ".env and environment"
    }
    assert checks["images"]["level"] == "ok", "all are built"
    assert checks["engine"]["found"] == built.docker("version", "--format", "{{.Server.Version}}")
    assert checks["AGENTGYM_RL_SRC"]["found"].startswith(f"{built.sources}, commit ")
    assert done.returncode == int(any(one["level"] == "missing" for one in checks.values()))
    lines = built.invoke("doctor").stdout.splitlines()
    assert len(lines) == 1 + len(checks)


def test_doctor_exits_1_when_something_needed_is_missing(built: Workbench) -> None:
    lost = built.root / "docker" / "train.Dockerfile"
    text = lost.read_text()
    lost.unlink()
    try:
        done = built.invoke("doctor")
        assert done.returncode == 1
        assert re.search(r"missing +files +not there: docker/train.Dockerfile +git checkout -- docker/train.Dockerfile",
                         done.stdout)
    finally:
        lost.write_text(text)


# Faults: one line with the remedy, no traceback


def fault(done, code: int, line: str) -> None:  # type: ignore[no-untyped-def]
    assert done.returncode == code, done.stdout + done.stderr
    assert re.search(line, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_no_docker_command_is_one_line(built: Workbench, tmp_path: Path) -> None:
    done = built.invoke("train.run", "--", "true", env={"PATH": str(tmp_path)})
    fault(done, 127, r"\Adocker: no docker command on PATH; install Docker Engine 24 or newer.*\n\Z")


@pytest.mark.parametrize("task", [["train.shell"], ["build.all"], ["status"], ["down"], ["clean.images", "--yes"]],
                         ids=lambda words: words[0])
def test_no_engine_is_one_line(built: Workbench, tmp_path: Path, task: list[str]) -> None:
    done = built.invoke(*task, env={"DOCKER_HOST": f"unix://{tmp_path}/none.sock"})
    fault(
        done, 1,
        r"\Adocker: no Docker engine answers at DOCKER_HOST=unix://[^\n]*none.sock; start that one, or unset DOCKER_HOST\n\Z"
    )


def test_doctor_without_an_engine_says_so_and_exits_1(built: Workbench, tmp_path: Path) -> None:
    done = built.invoke("doctor", env={"DOCKER_HOST": f"unix://{tmp_path}/none.sock"})
    assert done.returncode == 1
    assert re.search(r"missing +engine +none answers +no Docker engine answers at", done.stdout)


def test_engine_too_old_is_one_line(built: Workbench, tmp_path: Path) -> None:
    old = tmp_path / "docker"
    old.write_text(
        "#!/bin/sh\necho '{\"Client\": {\"Version\": \"20.10.24\"}, \"Server\": {\"Version\": \"20.10.24\"}}'\n")
    old.chmod(0o755)
    done = built.invoke("train.run", "--", "true", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    fault(done, 1, r"\Adocker: engine 20\.10\.24 is too old; install Docker Engine 24 or newer\n\Z")


@pytest.mark.parametrize("task, image, remedy", [
    (["train.shell"], "agentgym-rl/train", "build.train"),
    (["train.run", "--", "true"], "agentgym-rl/train", "build.train"),
    (["merge.shell"], "agentgym-rl/scripts", "build.scripts"),
    (["format"], "agentgym-rl/scripts", "build.scripts"),
    (["build.train"], "agentgym-rl/base", "build.base"),
],
                         ids=["shell", "run", "merge shell", "format", "build on no base"])
def test_no_image_yet_names_the_task_that_builds_it(built: Workbench, task: list[str], image: str, remedy: str) -> None:
    done = built.invoke(*task, env={"IMAGE_TAG": "absent"})
    fault(
        done, 1, rf"docker: no image {image}:absent yet; build it with `invoke {remedy}` "
        r"\(IMAGE_TAG and REGISTRY choose the name\)\n\Z")


def test_no_gpu_is_one_line(built: Workbench) -> None:
    done = built.invoke("train.run", "--gpus", "0,1", "--", "true")
    fault(
        done, 2,
        r"\Atrain: --gpus 0,1: the engine has no NVIDIA runtime; install nvidia-container-toolkit, or pass --gpus none\n\Z"
    )


@pytest.mark.parametrize("words, line", [
    (["train.run", "--gpus", "two", "--", "true"], r"train: --gpus 'two' is no choice; use all, none, or indices"),
    (["train.shell", "--shm-size", "big"], r"train: --shm-size 'big' is no size; write it as 512m or 32g"),
    (["train.run"], r"train: no command; write it after --: invoke train.run -- python -V"),
    (["build.all", "--tag", "a b"], r"build: --tag 'a b' is no image tag"),
    (["merge", "--runner", "podman"], r"merge: unknown runner 'podman'; choose one of auto, docker, local"),
    (["merge", "--runner", "docker", "--local-dir", "saves/none"], r"merge: no folder .*saves/none; give --local-dir"),
],
                         ids=["gpus", "shm size", "no command", "tag", "runner", "missing folder"])
def test_misuse_is_one_line_and_exit_2(built: Workbench, words: list[str], line: str) -> None:
    done = built.invoke(*words)
    fault(done, 2, r"\A" + line + r"[^\n]*\n\Z")


def test_missing_source_folder_is_one_line(built: Workbench) -> None:
    done = built.invoke("build.train", env={"AGENTGYM_RL_SRC": "/nowhere"})
    fault(
        done, 2,
        r"\Abuild: AGENTGYM_RL_SRC=/nowhere has no AgentGym-RL/verl; point it at the root of a checkout, or unset it\n\Z"
    )


def test_missing_mount_is_a_clear_refusal_without_invoke(built: Workbench) -> None:
    data = built.root / "data"
    data.rename(built.root / "elsewhere")
    try:
        done = built.compose("--profile", "scripts", "run", "--rm", "-T", "scripts", "true")
        assert done.returncode != 0 and "bind source path does not exist" in done.stderr
        assert not data.exists()
    finally:
        (built.root / "elsewhere").rename(data)


def test_port_in_use_names_the_setting(built: Workbench, environment_image: str, port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        env = {"ENV": environment_image, "ENV_PORT": str(port)}
        # The tasks that start servers come with the environments; the door to Docker is theirs already.
        program = (
            "from invoke.context import Context; from tasks.lib.engine import client as docker\n"
            "docker.drive(Context(), lambda d: d.compose.up(['env-server'], detach=True, stream_logs=True), profiles=['env'])"
        )
        done = built.run(
            sys.executable,
            "-c",
            f"import sys\nfrom tasks.lib.errors import UserError\ntry:\n    exec({program!r})\nexcept UserError as e:\n    print(e.said(), file=sys.stderr); sys.exit(e.code)",
            env=env)
        fault(done, 1, r"docker: the port is in use; choose another with ENV_PORT\n\Z")


def test_a_limit_that_the_engine_may_not_lift_has_a_remedy(built: Workbench) -> None:
    limit = Path(f"/proc/{Path('/run/docker.pid').read_text().strip()}/limits") if Path(
        "/run/docker.pid").exists() else None
    if limit is None or re.search(r"Max locked memory +\d+ +unlimited", limit.read_text()):
        pytest.skip("this engine may lift the limit on locked memory")
    fault(built.invoke("train.run", "--", "true", env={"MEMLOCK": "-1"}), 1, r"docker: .*set MEMLOCK")


# --dry


@pytest.mark.parametrize("words, expected", [
    (["build.all"], ["build base", "build train", "build scripts", "build eval-runner"]),
    (["build.eval", "--no-cache", "--push"], ["build --no-cache eval-runner", "push eval-runner"]),
    (["train.shell", "--gpus", "none", "--user", "root"], ["--no-TTY --rm --user root train bash"]),
    (["train.run", "--gpus", "none", "--", "echo", "a b"], ["--no-TTY --rm train echo 'a b'"]),
    (["merge.shell", "--gpus", "none"], ["--no-TTY --rm scripts bash"]),
    (["format", "--check"], ["--no-TTY --rm formatter --check"]),
    (["down"], ["down --remove-orphans"]),
    (["clean.containers"], ["down --remove-orphans"]),
    (["clean.cache", "--older-than", "72h"], ["prune --force --filter until=72h"]),
],
                         ids=lambda value: " ".join(value[:2]))
def test_dry_prints_the_command_lines_and_runs_none(built: Workbench, tmp_path: Path, words: list[str],
                                                    expected: list[str]) -> None:
    fake = tmp_path / "docker"
    fake.write_text(f"#!/bin/sh\necho ran >>{tmp_path}/ran\n")
    fake.chmod(0o755)
    done = built.invoke("--dry", *words, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected)
    assert all(line.endswith(end) for line, end in zip(lines, expected, strict=True)), lines
    assert not (tmp_path / "ran").exists()


def test_a_dry_command_line_works_when_pasted(built: Workbench) -> None:
    line = built.invoke("--dry", "train.run", "--", "python", "-c", "print('a  b')").stdout
    assert built.run("sh", "-c", line).stdout == "a  b\n"


def test_list_is_quick_and_loads_no_docker_library(built: Workbench) -> None:
    start = time.monotonic()
    done = built.run(sys.executable, "-X", "importtime", "-m", "invoke", "--list")
    assert done.returncode == 0
    assert "python_on_whales" not in done.stderr and "torch" not in done.stderr
    assert time.monotonic() - start < 10
