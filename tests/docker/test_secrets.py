"""No secret reaches an image, `docker inspect`, a command line or our output."""
import http.server
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tasks.lib.settings import SETTINGS
from tests.docker.workbench import ROOT, Workbench

pytestmark = pytest.mark.docker
SECRETS = [name for name, setting in SETTINGS.items() if setting.secret]


@pytest.fixture(scope="module")
def sentinels() -> dict[str, str]:
    """Return a value for each secret that occurs nowhere else."""
    values = {name: f"sentinel{uuid.uuid4().hex}" for name in SECRETS}
    return {**values, "PACKAGE_INDEX_URL": f"https://someone:{values['PACKAGE_INDEX_URL']}@pypi.org/simple"}


def needles(sentinels: dict[str, str]) -> list[str]:
    return [value.removeprefix("https://someone:").removesuffix("@pypi.org/simple") for value in sentinels.values()]


def layers(bench: Workbench, name: str) -> list[Path]:
    """Return the folders of an image's layers, the topmost first."""
    driver = json.loads(bench.docker("image", "inspect", "--format", "{{json .GraphDriver}}", name))
    assert driver["Name"] == "overlay2", "this test reads overlay2's folders"
    return [Path(path) for path in [driver["Data"]["UpperDir"], *driver["Data"]["LowerDir"].split(":")]]


def test_build_secrets_leave_no_trace(built: Workbench, sentinels: dict[str, str], tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can read the engine's layers")
    authority = tmp_path / "authority.pem"
    own = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")).read_text()
    mark = f"# mark{uuid.uuid4().hex}"
    authority.write_text(f"{own}\n{mark}\n")
    tag = f"{built.name}-secret"
    built.docker("tag", built.image("agentgym-rl/base"), f"agentgym-rl/base:{tag}")
    done = built.invoke("build.scripts", "--no-cache", "--tag", tag, env={**sentinels, "CA_BUNDLE": str(authority)})
    assert done.returncode == 0, done.stdout + done.stderr
    name = f"agentgym-rl/scripts:{tag}"
    searched = [*needles(sentinels), mark]
    new = [path for path in layers(built, name) if path not in layers(built, f"agentgym-rl/base:{tag}")]
    assert len(new) >= 3
    grep = subprocess.run(["grep", "-rlF", *(word for one in searched for word in ("-e", one)), *map(str, new)],
                          capture_output=True,
                          text=True,
                          check=False)
    assert (grep.returncode, grep.stdout) == (1, ""), "a secret lies in a layer"
    for said in (built.docker("history", "--no-trunc", name), built.docker("image", "inspect",
                                                                           name), done.stdout, done.stderr):
        assert not [one for one in searched if one in said]


def test_the_private_index_and_the_authority_are_used(built: Workbench, tmp_path: Path) -> None:
    asked: list[str] = []

    class Index(http.server.BaseHTTPRequestHandler):

        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers.get('Authorization')}")
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    gateway = built.docker("network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}")
    tag = f"{built.name}-index"
    built.docker("tag", built.image("agentgym-rl/base"), f"agentgym-rl/base:{tag}")
    done = built.invoke("build.scripts",
                        "--no-cache",
                        "--tag",
                        tag,
                        env={"PACKAGE_INDEX_URL": f"http://me:word@{gateway}:{server.server_port}/simple"})
    server.shutdown()
    assert done.returncode != 0
    assert any(line.startswith("/simple/") and line.endswith("Basic bWU6d29yZA==") for line in asked), asked
    assert "me:word" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def with_secrets_set(bench: Workbench, build: None, sentinels: dict[str, str]) -> Iterator[dict[str, str]]:
    """Return the secrets as the environment has them, while `.env` has them too."""
    dotenv = bench.root / ".env"
    dotenv.write_text("".join(f"{name}={value}\n" for name, value in sentinels.items()))
    yield sentinels
    dotenv.unlink()


@pytest.mark.parametrize("words",
                         [["build.all", "--push"], ["train.shell"], ["train.run", "--", "env"], ["merge.shell"],
                          ["format"], ["status"], ["down"], ["clean.all"]],
                         ids=lambda words: words[0])
def test_dry_shows_no_secret(built: Workbench, with_secrets_set: dict[str, str], words: list[str]) -> None:
    for env in ({}, with_secrets_set):
        done = built.invoke("--dry", *words, env=env)
        assert done.returncode == 0, done.stderr
        assert not [one for one in needles(with_secrets_set) if one in done.stdout + done.stderr]


def test_dry_redacts_a_secret_that_the_user_typed(built: Workbench, with_secrets_set: dict[str, str]) -> None:
    key = with_secrets_set["WANDB_API_KEY"]
    done = built.invoke("--dry", "train.run", "--", "wandb", "login", key)
    assert done.stdout.rstrip().endswith("train wandb login ***")


def test_secrets_reach_the_container_by_name(built: Workbench, with_secrets_set: dict[str, str]) -> None:
    done = built.invoke("train.run", "--", "printenv", "WANDB_API_KEY", "HF_TOKEN")
    assert done.stdout.split() == [with_secrets_set["WANDB_API_KEY"], with_secrets_set["HF_TOKEN"]]


def test_images_built_while_secrets_are_set_hold_none(built: Workbench, with_secrets_set: dict[str, str]) -> None:
    assert built.invoke("build.all").returncode == 0
    for name in ("agentgym-rl/base", "agentgym-rl/train", "agentgym-rl/scripts", "agentgym/eval"):
        said = built.docker("image", "inspect", built.image(name)) + built.docker("history", "--no-trunc",
                                                                                  built.image(name))
        assert not [one for one in needles(with_secrets_set) if one in said]


def test_no_secret_is_in_argv_nor_inspected_while_a_container_runs(built: Workbench, with_secrets_set: dict[str, str]) -> None:
    program = ("import sys\n"
               "print('ready', flush=True); sys.stdin.readline()\n")
    running = subprocess.Popen([sys.executable, "-m", "invoke", "train.run", "--", "python", "-c", program],
                               cwd=built.root,
                               env=built.environment(with_secrets_set),
                               stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE,
                               text=True)
    assert running.stdout and running.stdin
    assert running.stdout.readline() == "ready\n"
    command_lines = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            command_lines += path.read_bytes()
    inspected = built.docker("inspect", *built.containers(service="train"))
    running.communicate("\n", timeout=60)
    assert b"compose" in command_lines and "WANDB_MODE" in inspected
    assert not [one for one in needles(with_secrets_set) if one.encode() in command_lines or one in inspected]


def test_nothing_secret_has_a_value_in_the_compose_file() -> None:
    whole = (ROOT / "docker-compose.yml").read_text()
    text, _, files = whole.partition("\nconfigs:\n")  # there a key is a file's content, not a variable
    assert [files.count(f"${{{name}:-}}") for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY")] == [1, 1, 1]
    assert "\nservices:\n" in text
    for name in SECRETS:
        assert f"${{{name}" not in text and f"{name}=" not in text
