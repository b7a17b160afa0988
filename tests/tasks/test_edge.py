"""What the tasks say about bad input, and what they ask of Docker: a copy of the project, and a docker that records."""
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fixtures import needs
from tests.fixtures.invoking import invoke as run_invoke
from tests.fixtures.project import ROOT, copy_project

# Answers what the tasks ask an engine and notes every command line; ANSWERS has a file for some of the questions.
FAKE = """#!/bin/sh
echo "$*" >>"$ANSWERS/log"
case "$*" in
    *"container list"*) cat "$ANSWERS/ids" 2>/dev/null ;;
    *"container inspect"*) cat "$ANSWERS/containers" ;;
    *"image inspect"*) cat "$ANSWERS/images" 2>/dev/null || { echo "Error: No such image: x" >&2; exit 1; } ;;
    *"image list"*) cat "$ANSWERS/image-ids" 2>/dev/null ;;
    *" config "*) echo '{"name": "x"}' ;;
    *"system info"*) echo '{"Runtimes": {}}' ;;
    version*) cat "$ANSWERS/version" 2>/dev/null ||
        echo '{"Client": {"Version": "26.1.5"}, "Server": {"Version": "26.1.5"}}' ;;
esac
"""


@dataclass
class Project:
    """A copy of the project with a docker of its own; `answers` is the folder of what that one says."""
    root: Path
    answers: Path

    def invoke(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run `invoke`."""
        environ = {
            **os.environ, "ANSWERS": str(self.answers),
            "PATH": f"{self.answers}:{os.environ['PATH']}",
            **variables
        }
        return run_invoke(*words, cwd=self.root, env=environ)

    def asked(self) -> list[str]:
        """Return docker's command lines so far."""
        log = self.answers / "log"
        return log.read_text().splitlines() if log.exists() else []

    def write(self, name: str, text: str) -> None:
        """Write a file of the project."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    answers = tmp_path / "docker"
    answers.mkdir()
    (answers / "docker").write_text(FAKE)
    (answers / "docker").chmod(0o755)
    yield Project(copy_project(tmp_path / "project"), answers)


def fault(done: subprocess.CompletedProcess[str], code: int, line: str) -> None:
    """Check that the whole of standard error is one line, which has `line` in it."""
    assert (done.returncode, done.stderr.count("\n")) == (code, 1) and line in done.stderr, done.stdout + done.stderr


def own_rows(**changes: object) -> str:
    """Return a rows file: the table of demo with `changes`."""
    table = (ROOT / "environments.toml").read_text().partition("[demo]\n")[2].split("\n[", 1)
    first = "".join(f"{key} = {json.dumps(value)}\n" for key, value in changes.items())
    kept = [line for line in table[0].splitlines() if line.split(" = ")[0] not in changes]
    return "[demo]\n" + first + "\n".join(kept) + "\n[" + table[1]


# GPUs


def test_without_the_nvidia_runtime_an_environment_that_needs_a_gpu_is_refused(project: Project) -> None:
    project.write("own.toml", own_rows(gpu=True))
    done = project.invoke("env.up", "--env", "demo", "--runner", "docker", ENVIRONMENTS="own.toml")
    fault(done, 2, "env.up: demo needs an NVIDIA GPU: the engine has no NVIDIA runtime")
    assert not [line for line in project.asked() if line.startswith("compose")]


# Secrets

LOGIN = "https://me:t0ken@example.org/x.git"


@pytest.mark.parametrize("words, variables", [
    (["doctor"], {
        "AGENTGYM_RL_SRC": LOGIN + "#abc"
    }),
    (["doctor", "--json"], {
        "AGENTGYM_SRC": LOGIN
    }),
    (["format"], {
        "AGENTGYM_RL_SRC": LOGIN + "#abc"
    }),
    (["build.all"], {
        "AGENTGYM_RL_SRC": LOGIN
    }),
    (["--dry", "build.train"], {
        "AGENTGYM_RL_SRC": LOGIN + "#abc"
    }),
],
                         ids=["doctor", "doctor, not pinned", "format", "not pinned", "dry"])
def test_a_login_in_a_source_s_url_is_not_shown(project: Project, words: list[str], variables: dict[str, str]) -> None:
    done = project.invoke(*words, **variables)
    assert "https://***@example.org/x.git" in done.stdout + done.stderr
    assert "t0ken" not in done.stdout + done.stderr


def test_files_of_a_start_are_their_owner_s_alone(project: Project) -> None:
    project.write("own.toml", own_rows(source="agentgym"))
    home = project.root / ".run/env/demo"
    home.mkdir(parents=True)
    (home / "build.json").touch(0o644)
    done = project.invoke("build.env", "--env", "demo", ENVIRONMENTS="own.toml", AGENTGYM_SRC=LOGIN + "#abc")
    assert done.returncode == 0, done.stderr
    assert "t0ken" in (home / "build.json").read_text() and (home / "build.json").stat().st_mode & 0o777 == 0o600


# --dry


@pytest.mark.parametrize(
    "words", [["env.up", "--runner", "docker", "--replicas", "2"], ["env.up", "--runner", "local"], ["build.env"]],
    ids=lambda words: " ".join(words[:3]))
def test_dry_writes_nothing(project: Project, words: list[str]) -> None:
    done = project.invoke("--dry", *words, "--env", "demo")
    assert done.returncode == 0 and done.stdout, done.stderr
    assert not (project.root / ".run").exists()


def test_a_build_leaves_alone_what_describes_the_running_server(project: Project) -> None:
    project.write(".run/env/demo/compose.json", "{}")
    project.invoke("build.env", "--env", "demo")
    assert (project.root / ".run/env/demo/compose.json").read_text() == "{}"
    assert [line.split(" --file ")[-1].split("/")[-1] for line in project.asked()
            if " build " in line] == ["build.json build env-demo"]


# The engine


@pytest.mark.parametrize("words", [["build.env"], ["env.up", "--runner", "docker"]], ids=lambda words: words[0])
def test_an_engine_too_old_for_environments_is_refused_for_them_alone(project: Project, words: list[str]) -> None:
    (project.answers / "version").write_text('{"Client": {"Version": "24.0.7"}, "Server": {"Version": "24.0.7"}}')
    done = project.invoke(*words, "--env", "demo")
    fault(done, 1, "docker: engine 24.0.7 is too old for environment servers; install Docker Engine 25 or newer")
    doctor = project.invoke("doctor").stdout
    assert re.search(r"^note +environments +engine 24\.0\.7 builds no environment servers", doctor, re.M), doctor
    assert re.search(r"^ok +engine +24\.0\.7", doctor, re.M)


def test_what_a_command_in_a_container_says_gets_no_remedy(project: Project) -> None:
    (project.answers / "images").write_text('[{"Id": "sha256:1"}]')
    script = project.answers / "docker"
    last = '    compose*) echo "OSError: [Errno 98] Address already in use" >&2; exit 3 ;;\nesac'
    script.write_text(script.read_text().replace("esac", last))
    done = project.invoke("train.run", "--gpus", "none", "--", "x")
    assert (done.returncode, done.stderr) == (3, "OSError: [Errno 98] Address already in use\n")


@pytest.mark.parametrize("contents, said", [(b"A KEY=1\n", "line 1: no NAME=value +mend it"), (b"\xff", "is not UTF-8 +save it as UTF-8"),
                                            (b"HF_TOKEN=hf_a$bcd\n", "line 1: HF_TOKEN has a [$].* set it above")])
def test_doctor_shows_what_is_wrong_with_a_dotenv(project: Project, contents: bytes, said: str) -> None:
    (project.root / ".env").write_bytes(contents)
    done = project.invoke("doctor")
    assert done.returncode == 1 and not done.stderr
    assert re.search(rf"^missing +\.env +\S+\.env {said}", done.stdout, re.M) and "bcd" not in done.stdout


# Bad input: one line and exit code 2, no traceback


@pytest.mark.parametrize("words, variables, line", [
    (["env.up", "--port", "99999"], {}, "env.up: --port 99999 is no port; choose one from 1 to 65535"),
    (["env.up"], {
        "ENV_PORT": "99999"
    }, "env.up: ENV_PORT 99999 is no port"),
    (["env.up"], {
        "ENV_PORT": "0"
    }, "env.up: ENV_PORT 0 is no port"),
    (["env.up"], {
        "ENV_BIND": "nonsense"
    }, "env.up: ENV_BIND=nonsense is no IPv4 address"),
    (["env.up", "--port", "41234"], {
        "ENV_BIND": "::1"
    }, "env.up: ENV_BIND=::1 is no IPv4 address"),
    (["env.up"], {
        "ENV_BIND": "203.0.113.7"
    }, "env.up: ENV_BIND=203.0.113.7 is no address of this machine"),
    (["eval", "--serve-wait", "7"], {}, "--serve-wait are about the server of a --checkpoint; leave them out"),
    (["eval", "--checkpoint", "saves", "--runner", "local", "--gpus", "1"], {},
     "eval: --gpus is for --runner docker; on this machine set CUDA_VISIBLE_DEVICES"),
    (["eval", "--runner", "docker", "--server", "http://localhost:1"
      ], {}, "eval: localhost, the host of --server, would be the container itself"),
    (["eval", "--runner", "docker", "--base-url", "http://[::1]:1/v1"
      ], {}, "eval: ::1, the host of --base-url, would be the container itself"),
    (["eval", "--runner", "docker"], {
        "OPENAI_BASE_URL": "http://127.0.0.1:8000/v1"
    }, "eval: 127.0.0.1, the host of OPENAI_BASE_URL, would be the container itself"),
    (["build.env"], {
        "AGENTGYM_SRC": "~nosuchuser/x"
    }, "build: AGENTGYM_SRC=~nosuchuser/x has no agentenv/agentenv"),
],
                         ids=lambda value: value if isinstance(value, str) else None)
def test_bad_input_is_one_line(project: Project, words: list[str], variables: dict[str, str], line: str) -> None:
    fault(project.invoke(*words, "--env", "demo", **variables), 2, line)


@pytest.mark.parametrize("words", [["status"], ["env.down"], ["--dry", "down"], ["eval.list"]],
                         ids=lambda words: words[-1])
def test_a_dotenv_that_is_not_utf_8_is_named(project: Project, words: list[str]) -> None:
    (project.root / ".env").write_bytes("MODEL=Käse\n".encode("latin-1"))
    fault(project.invoke(*words), 2, ".env is not UTF-8; save it as UTF-8")


def test_a_mounted_folder_that_is_a_dangling_link_is_named(project: Project) -> None:
    (project.answers / "images").write_text('[{"Id": "sha256:1"}]')
    shutil.rmtree(project.root / "saves")
    (project.root / "saves").symlink_to("/nowhere/saves")
    done = project.invoke("train.run", "--gpus", "none", "--", "true")
    fault(done, 2, "saves is a link to /nowhere/saves, which is not there; create that folder, or remove the link")


def test_an_id_that_is_no_number_is_named(project: Project) -> None:
    (project.answers / "images").write_text('[{"Id": "sha256:1"}]')
    shutil.rmtree(project.root / "data")
    done = project.invoke("train.run", "--gpus", "none", "--", "true", HOST_UID="me")
    fault(done, 2, "train.run: HOST_UID=me is no number")


def test_a_build_without_git_goes_on(project: Project) -> None:
    for program in ("sh", "cat"):
        (project.answers / program).symlink_to(f"/bin/{program}")
    done = project.invoke("--dry", "build.base", PATH=str(project.answers))
    assert done.returncode == 0 and "REVISION=unknown" in done.stdout, done.stderr


def test_a_project_that_cannot_be_written_to_is_named(project: Project) -> None:
    (project.root / ".run").touch()  # what a test of root can do in place of chmod
    fault(project.invoke("env.up", "--env", "demo", "--runner", "docker"), 2, "project/.run")
    assert project.invoke("--dry", "env.up", "--env", "demo", "--runner", "docker").returncode == 0


def test_a_cache_that_is_a_link_goes_and_what_it_leads_to_stays(project: Project, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (project.root / ".mypy_cache").symlink_to(tmp_path / "elsewhere")
    done = project.invoke("clean.pycache", "--yes")
    assert done.returncode == 0, done.stderr
    assert not (project.root / ".mypy_cache").is_symlink() and (tmp_path / "elsewhere").is_dir()


def test_nothing_is_up_where_there_is_no_docker(project: Project) -> None:
    (project.answers / "docker").unlink()
    done = project.invoke("env.down", "--env", "demo", PATH=str(project.answers))
    assert (done.returncode, done.stdout, done.stderr) == (0, "demo was not up\n", "")


@pytest.mark.parametrize("host", ["unix:///nowhere.sock", "tcp://127.0.0.1:1", "ftp://x"])
def test_an_engine_elsewhere_that_does_not_answer_is_named(project: Project, host: str) -> None:
    needs.docker()
    (project.answers / "docker").unlink()
    fault(project.invoke("status", DOCKER_HOST=host), 1, f"docker: no Docker engine answers at DOCKER_HOST={host}; ")


@pytest.mark.parametrize("words", [["env.list"], ["eval", "--env", "demo", "--model", "expert"], ["eval.list"]], ids=" ".join)
def test_a_package_that_is_not_installed_is_named(project: Project, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name == 'pydantic' else find(name, *rest))\n")
    done = project.invoke(*words, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and re.fullmatch(r"\S+: this Python has no pydantic; `pip install .*`\n", done.stderr), done.stderr
