"""`pip install .`: the programs that run on a bare host, their data, one version, and the pins that CI ran with."""
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import merger
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import evaluation
from tests.fixtures.project import ROOT, copy_project

# Not the tests: many are older than the style.
FORMATTED = ("tasks", "scripts", "samples", "evaluation", "environment_rows", "servers", "training", "demo", "benchmarks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install .` puts into a folder of its own, without the packages that it needs."""
    copy = copy_project(tmp_path_factory.mktemp("source") / "project")
    site = tmp_path_factory.mktemp("site")
    words = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site), str(copy)]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return site


def run(site: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a console command of `site` in a folder that knows nothing of the project."""
    return subprocess.run([sys.executable, str(site / "bin" / words[0]), *words[1:]],
                          cwd=cwd,
                          env={
                              **os.environ, "PYTHONPATH": str(site)
                          },
                          capture_output=True,
                          text=True,
                          check=False)


@pytest.mark.parametrize("words", [("model-merger", "--version"), ("agentgym-eval", "--version")])
def test_the_console_commands_tell_the_version(installed, tmp_path, words):
    done = run(installed, tmp_path, *words)
    assert done.returncode == 0 and done.stdout.split()[-1] == merger.__version__, done.stdout + done.stderr


def test_the_rows_and_the_page_come_along(installed, tmp_path):
    done = run(installed, tmp_path, "agentgym-eval", "run", "--check", "--env", "maze", "--model", "m",
               "--base-url", "http://127.0.0.1:9/v1", "--items", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (installed / "evaluation" / "page").iterdir()} >= {"report.html", "report.css", "report.js"}
    assert all((installed / name / "py.typed").is_file() for name in ("merger", "evaluation", "environment_rows"))


def test_a_merge_that_cannot_be_is_one_line(installed, tmp_path):
    done = run(installed, tmp_path, "model-merger", "--local-dir", "nowhere")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_every_wing_has_the_one_version():
    assert evaluation.__version__ == merger.__version__
    assert f"## {merger.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def pins() -> dict[str, Version]:
    """Return the packages of requirements-dev.txt and their versions."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in found}


def test_the_pins_are_those_of_the_extras():
    extras = [word for words in PROJECT["optional-dependencies"].values() for word in words]
    needed = [Requirement(word) for word in (*PROJECT["dependencies"], *extras)]
    wanted = {re.sub(r"[-_.]+", "-", one.name).lower(): one for one in needed if one.name != PROJECT["name"]}
    assert set(pins()) == set(wanted)
    for name, version in pins().items():
        assert version in wanted[name].specifier, f"{name}=={version} does not fit {wanted[name]}"


@pytest.mark.parametrize("words", [("ruff", "check", "."), ("mypy", ), ("yapf", "--diff", "--recursive", *FORMATTED)],
                         ids=["ruff", "mypy", "yapf"])
def test_the_source_is_in_order(words, tmp_path):
    """As the pre-commit hooks and CONTRIBUTING.md have it."""
    program = Path(sys.executable).with_name(words[0])
    if not program.exists():
        pytest.fail(f"no {words[0]} beside this Python; requirements-dev.txt has it")
    done = subprocess.run([str(program), *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_invoke_lists_without_what_the_tasks_need_later():
    """`invoke --list` imports nothing that takes long."""
    code = ("import sys; from tasks import ns; slow = {'python_on_whales', 'pydantic', 'torch', 'rich', 'dotenv', 'numpy', 'psutil'};"
            "print(sorted(slow & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

