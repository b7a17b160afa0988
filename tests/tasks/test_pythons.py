"""Each Python that is promised, with the packages that the guide's CI installs and no other: every task works, or names what it lacks."""
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tasks import ns
from tests.fixtures.needs import missing
from tests.fixtures.project import ROOT, copy_project
from tests.tasks.test_edge import FAKE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WORDS = {
    "env.check": ["--env", "demo", "--url", "http://127.0.0.1:9"],
    "env.up": ["--env", "nowhere"],
    "env.try": ["--env", "nowhere"],
    "train.start": ["--env", "maze", "--model", "/nowhere"],
    "train.check": ["--env", "maze", "--model", "/nowhere"],
    "train.run": ["--gpus", "none", "--", "true"],
    "models.fetch": ["x"],
    "data.fetch": ["--env", "nowhere"],
    "eval.merge": ["--out", "/nowhere/x"],
    "completion": ["--show", "bash"],
}
TASKS = sorted({("eval" if name == "eval.run" else "merge" if name == "merge.run" else name) for name in ns.task_names})


def python(version: str) -> str:
    """Return the path of a Python of that version which starts."""
    places = [shutil.which(f"python{version}"), *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]
    for place in filter(None, places):
        if subprocess.run([place, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return str(place)
    return missing(f"python{version}", f"no Python {version}")


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_task_works_or_names_what_it_lacks_in_one_line(version: str, tmp_path: Path) -> None:
    packages = re.search(r"pip install ((?:invoke|python-on-whales|psutil| )+)$", (ROOT / "DOCKER.md").read_text(), re.M)
    assert packages
    venv = tmp_path / "venv"
    subprocess.run([python(version), "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin/python", "-m", "pip", "install", "-q", *packages[1].split()], check=True)
    root, answers = copy_project(tmp_path / "project"), tmp_path / "docker"
    answers.mkdir()
    (answers / "docker").write_text(FAKE)
    (answers / "docker").chmod(0o755)
    (answers / "ids").touch()
    environ = {"HOME": str(tmp_path), "ANSWERS": str(answers), "PATH": f"{venv / 'bin'}:{answers}:/usr/bin:/bin", "LANG": os.environ.get("LANG", "C.UTF-8")}

    def invoke(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([venv / "bin/python", "-m", "invoke", *words], cwd=root, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=300, check=False)

    faults, lacking = [], {}
    for task in TASKS:
        for dry in ([], ["--dry"]):
            done = invoke(*dry, task, *WORDS.get(task, []))
            said = done.stderr.strip().splitlines()
            if "Traceback" in done.stdout + done.stderr or (done.returncode == 2 and not 1 <= len(said) <= 2) or done.returncode not in (0, 1, 2):
                faults.append((dry, task, done.returncode, done.stderr[-500:]))
            if said and "this Python has no" in said[-1]:
                lacking[task] = said[-1]
    assert not faults
    assert all("pip install -r requirements-dev.txt" in line for line in lacking.values()), lacking
    assert {"quickstart", "eval.list", "models.fetch"} <= set(lacking), "which need more than these"
    assert json.loads(invoke("env.list", "--json").stdout)["environments"], "and this needs no more"
