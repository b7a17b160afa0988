"""Names of images and files that a user sets: what cannot be is named with its variable."""
import subprocess
import sys
from types import SimpleNamespace

import pytest
from invoke.context import Context

from tasks.lib.engine import images
from tasks.lib.engine.compose_files import compose_files
from tasks.lib.errors import DockerError, UserError
from tasks.lib.settings import ROOT, read_dotenv


@pytest.mark.parametrize("variables, said", [
    ({"IMAGE_TAG": "a b"}, r"IMAGE_TAG='a b' is no image tag"),
    ({"IMAGE_TAG": "-x"}, r"IMAGE_TAG='-x' is no image tag"),
    ({"IMAGE_TAG": "x" * 129}, r"is no image tag"),
    ({"IMAGE_TAG": "ü"}, r"IMAGE_TAG='ü' is no image tag"),
    ({"REGISTRY": "registry.example.com/team"}, r"REGISTRY=registry\.example\.com/team has no slash .*; write registry\.example\.com/team/"),
], ids=lambda value: str(value)[:40])
def test_a_name_that_no_image_can_have_is_told_by_its_variable(variables, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said) as caught:
        images.image_name("agentgym-rl/train")
    assert caught.value.code == 2


def test_a_name_is_registry_name_and_tag(monkeypatch):
    monkeypatch.setenv("REGISTRY", "registry.example.com/team/")
    monkeypatch.setenv("IMAGE_TAG", "v1.2")
    assert images.image_name("agentgym-rl/train") == "registry.example.com/team/agentgym-rl/train:v1.2"


@pytest.mark.parametrize("asked, refused", [("", False), ("linux/amd64", False), ("linux/arm64", True), ("linux/arm64/v8", True)])
def test_an_image_for_another_platform_is_neither_built_nor_pulled(asked, refused, monkeypatch):
    monkeypatch.setenv("DOCKER_DEFAULT_PLATFORM", asked)
    monkeypatch.setattr(images, "require_engine", lambda *_: None)
    monkeypatch.setattr(images, "image_exists", lambda _: True)
    monkeypatch.setattr(images, "ask", lambda _: SimpleNamespace(os="linux", architecture="amd64"))
    if not refused:
        images.require_image(Context(), "x", "build.train")
        return
    with pytest.raises(DockerError, match=f"is for linux/amd64, and DOCKER_DEFAULT_PLATFORM={asked}; unset it"):
        images.require_image(Context(), "x", "build.train")


@pytest.mark.parametrize("there, taken", [
    ([], None),
    (["docker-compose.override.yaml"], "docker-compose.override.yaml"),
    (["compose.override.yaml"], "compose.override.yaml"),
    (["docker-compose.override.yml", "compose.override.yml"], "compose.override.yml"),
], ids=str)
def test_the_users_override_is_read_as_compose_reads_it(there, taken, tmp_path):
    for name in there:
        (tmp_path / name).write_text("services: {}\n")
    assert compose_files(tmp_path, cpu=False)[1:] == ([tmp_path / taken] if taken else [])


def test_a_dotenv_in_utf_16_says_so(tmp_path):
    (tmp_path / ".env").write_text("ENV=maze\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"\.env is UTF-16; save it as UTF-8"):
        read_dotenv(tmp_path / ".env")


def test_an_older_python_is_told_which_one_is_needed():
    code = "import sys; sys.version_info = (3, 10, 13, 'final', 0); exec(compile(open('tasks.py').read(), 'tasks.py', 'exec'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("invoke: this project needs Python 3.11 or newer; this is ")
    assert len(done.stderr.splitlines()) == 1
