"""What the tasks note in .run is nobody else's, and nothing in it is a variable for Compose."""
import json
import os
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tasks.lib import atomic
from tasks.lib.environments import docker as env_docker
from tasks.lib.environments import lease, local
from tasks.lib.environments.compose_model import Variable, escaped
from tasks.lib.environments.plan import Options
from tasks.lib.host import processes
from tasks.lib.training import follow
from tests.fixtures import needs
from tests.fixtures.servers import ROOT, free_port, rows
from training.folder import RunFolder

ODD = "a$USER-${HF_TOKEN}-$$b-${X:?no}"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A `.run` of the test's own, which an earlier version left open to all."""
    folder = tmp_path / ".run"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    monkeypatch.setattr(atomic, "RUN", folder)
    for module in (local, lease):
        monkeypatch.setattr(module, "RUN", folder / "env")
    return folder


def open_to_others(folder: Path) -> list[str]:
    """Return what others than the owner may read, write or enter."""
    return [
        f"{path} {stat.filemode(path.lstat().st_mode)}" for path in (folder, *folder.rglob("*"))
        if path.lstat().st_mode & 0o077 and not path.is_symlink()
    ]


def test_all_of_run_is_the_owners_alone(run):
    row = rows()["form-textcraft"]
    before = os.umask(0o022)
    try:
        with lease.exclusive_lock(row.name):
            python = Path(shutil.which("python3") or "")
            local.prepare(row, ROOT, run.parent / "data", run / "env", python)
        atomic.write_private(run / "env" / row.name / "state.json", "{}")
        log = run / "env" / row.name / "server-0.log"
        words = ["sh", "-c", "echo said; mkdir made; echo x >made/file"]
        assert processes.launch(words, log, os.environ, run / "env" / row.name).wait() == 0
        with lease.shared_server(row.name, lambda: "http://there", lambda: "", lambda shared: None):
            pass
    finally:
        os.umask(before)
    assert open_to_others(run) == []
    assert (run / "env" / row.name / "made" / "file").is_file()


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_what_a_run_and_its_watcher_leave_behind_is_as_open_as_if_they_ran_in_the_foreground(umask, tmp_path, monkeypatch):
    """A colleague reads the merged models of a run, and a server of another user serves them."""
    made = tmp_path / "made"
    monkeypatch.setattr(follow, "command", lambda name, words: ["mkdir", str(made)])
    before = os.umask(umask)
    try:
        follow.launch(RunFolder(tmp_path / "run"), [])
        end = time.monotonic() + 20
        while not made.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "run" / "log" / "watch.log").stat().st_mode) == 0o600


def test_a_file_that_others_could_read_is_closed(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("old")
    path.chmod(0o644)
    atomic.write_private(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["state.json"]


def test_only_a_variable_is_one():
    value = {"a": ["$x", Variable("${X:-1}")], "b": {"c": "$$", "d": 1, "e": None}}
    assert escaped(value) == {"a": ["$$x", "${X:-1}"], "b": {"c": "$$$$", "d": 1, "e": None}}


def test_a_dollar_in_a_path_or_a_source_is_no_variable(run):
    """Compose itself reads the file: a folder's and a source's name come out as they went in."""
    needs.docker()
    row = rows()["form-textcraft"]
    home, data = run / ODD, run / "data" / ODD
    data.mkdir(parents=True)
    build = env_docker.build_section(row, Path("/src") / ODD, f"https://example.org/{ODD}.git#1", f"{ODD}.toml")
    build["additional_contexts"] = {"agentgym": f"/gym/{ODD}"}
    file = home / "compose.json"
    env_docker.write_model(file, row, Options(port=free_port(), replicas=2), data, build, "")
    done = subprocess.run(["docker", "compose", "-f", str(ROOT / "docker-compose.yml"), "-f", str(file), "config", "--format", "json"],
                          env={
                              **os.environ, "HF_TOKEN": "hf_secret",
                              "USER": "me",
                              "COMPOSE_PROJECT_NAME": "x",
                              "HOST_UID": "7"
                          },
                          cwd=run,
                          capture_output=True,
                          text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout and "variable is not set" not in done.stderr
    # `config` writes a $ as $$, for its output is a Compose file again.
    services = json.loads(done.stdout.replace("$$", "$"))["services"]
    server, proxy = services["env-form-textcraft-0"], services["env-form-textcraft"]
    assert server["build"]["context"] == f"/src/{ODD}"
    assert server["build"]["additional_contexts"] == {"agentgym": f"/gym/{ODD}"}
    assert server["build"]["args"]["ENVIRONMENTS"] == f"{ODD}.toml"
    assert server["volumes"][0]["source"] == str(data)
    assert proxy["volumes"][0]["source"] == str(home / "haproxy.cfg")
    assert server["user"] == "7:1000" and server["build"]["args"]["REVISION"] == "unknown"
    assert open_to_others(home) == []
