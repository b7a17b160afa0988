"""`invoke train.sync`, with a stand-in for wandb's command that notes what it is given, and with wandb's own."""
from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fixtures.invoking import invoke as run_invoke
from tests.fixtures.project import copy_project
from tests.fixtures.standins import Answer, serving
from tests.training.runs import write_run
from training import machine
from training.folder import RunFolder

KEY = "k" * 40
WANDB = """#!{python}
import json, os, sys
from pathlib import Path
with Path(os.environ["NOTES"]).open("a") as notes:
    notes.write(json.dumps([sys.argv[1:], {{k: v for k, v in os.environ.items() if "WANDB" in k or "OPENAI" in k}}]) + "\\n")
if "ARRIVE" not in os.environ or os.environ["ARRIVE"] in sys.argv[-1]:
    print("Syncing: http://there/me/p/runs/x ... done.")
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    root = copy_project(tmp_path_factory.mktemp("sync") / "project")
    program = root.parent / "bin" / "wandb"
    program.parent.mkdir()
    program.write_text(WANDB.format(python=sys.executable))
    program.chmod(0o755)
    return root


@pytest.fixture
def run(project) -> Iterator[RunFolder]:
    found = RunFolder(project / "saves" / "run1")
    write_run(found.path, attempts=[{"number": 1, "ended": 1.0, "state": "finished"}])
    for name in ("offline-run-20260101_000000-aaaaaaaa", "offline-run-20260102_000000-bbbbbbbb"):
        (found.wandb / name).mkdir(parents=True)
        (found.wandb / name / f"run-{name[-8:]}.wandb").write_bytes(b"data")
    yield found
    shutil.rmtree(found.path)


@pytest.fixture
def sync(project, tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:

    def call(*words: str, dry: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRAIN_"))}
        env |= {"PATH": f"{project.parent / 'bin'}:{env['PATH']}", "HOME": str(tmp_path), "NOTES": str(tmp_path / "notes"), **variables}
        return run_invoke(*(["--dry"] if dry else []), "train.sync", "--name=run1", *words, cwd=project, env=env)

    return call


def test_what_was_not_uploaded_is_and_the_key_is_in_no_argument(run, sync, tmp_path):
    done = sync(WANDB_API_KEY=KEY, WANDB_MODE="offline", OPENAI_API_KEY="sk")
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert [argv for argv, _ in calls] == [["sync", str(path)] for path in sorted(run.wandb.iterdir())]
    assert all(environ == {"WANDB_API_KEY": KEY} for _, environ in calls)
    assert done.stdout.splitlines()[0] == "train.sync: 2 of wandb's runs go to https://api.wandb.ai"
    assert done.stdout.splitlines()[-1] == "train.sync: 2 uploaded to https://api.wandb.ai"
    again = sync(WANDB_API_KEY=KEY)
    assert again.returncode == 0 and "offline-run-20260101_000000-aaaaaaaa was uploaded before" in again.stdout and "nothing to upload" in again.stdout
    time.sleep(0.05)
    (run.wandb / "offline-run-20260102_000000-bbbbbbbb" / "run-bbbbbbbb.wandb").write_bytes(b"data and more")
    assert "1 uploaded" in sync(WANDB_API_KEY=KEY, OPENAI_API_KEY="sk").stdout


def test_a_key_in_a_file_and_names(run, sync, tmp_path):
    (tmp_path / "key").write_text(KEY + "\n")
    done = sync(f"--key-file={tmp_path / 'key'}", "--project=p", "--entity=team", WANDB_BASE_URL="http://wandb.example/")
    argv, environ = json.loads((tmp_path / "notes").read_text().splitlines()[0])
    assert done.returncode == 0 and argv[:5] == ["sync", "--project", "p", "--entity", "team"] and environ["WANDB_API_KEY"] == KEY
    assert "go to http://wandb.example\n" in done.stdout


@pytest.mark.parametrize("flags, variables, code, said", [
    ([], {}, 2, "no key for https://api.wandb.ai: set WANDB_API_KEY"),
    (["--key-file=/none"], {}, 2, "--key-file /none cannot be read: No such file"),
    (["--key-file=/dev/null"], {}, 2, "--key-file /dev/null holds no key"),
    (["--runner=here"], {"WANDB_API_KEY": KEY}, 2, "unknown runner 'here'"),
    (["--figures"], {}, 2, "no key for https://api.wandb.ai: set WANDB_API_KEY"),
    ([], {"WANDB_API_KEY": KEY, "CODE": "3"}, 1, "wandb ended with the exit code 3"),
    ([], {"WANDB_API_KEY": KEY, "ARRIVE": "aaaaaaaa"}, 1, "offline-run-20260102_000000-bbbbbbbb did not arrive at https://api.wandb.ai"),
])
def test_what_does_not_arrive_is_one_line(flags, variables, code, said, run, sync):
    done = sync(*flags, **variables)
    assert done.returncode == code and said in done.stderr and done.stderr.count("\n") == 1 and KEY not in done.stdout + done.stderr


def test_the_login_of_this_machine_is_a_key(run, sync, tmp_path):
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n login user\n password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    other = sync(WANDB_BASE_URL="http://other.example")
    assert other.returncode == 2 and "no key for http://other.example" in other.stderr
    assert sync().returncode == 0


def test_what_is_being_written_waits(run, sync):
    write_run(run.path, attempts=[{"number": 1, "ended": None}])
    run.write_state(state="running", step=1, **machine.identity(os.getpid()))
    done = sync(WANDB_API_KEY=KEY)
    assert done.returncode == 0 and "offline-run-20260102_000000-bbbbbbbb is still being written" in done.stdout and "1 uploaded" in done.stdout
    assert not list(run.wandb.glob("*bbbbbbbb/*.synced"))


@pytest.mark.parametrize("words", [["--runner=docker"], ["--runner=docker", "--key-file=key"]])
def test_in_the_container_the_key_comes_as_a_file(words, run, sync, project):
    (project / "key").write_text(KEY)
    done = sync(*words, dry=True, WANDB_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert re.search(r"run .*train python -m training upload /workspace/saves/run1/wandb/offline-run-\S+aaaaaaaa /workspace/saves/run1/wandb/", done.stdout)
    assert KEY not in done.stdout + done.stderr


def test_without_runs_it_says_so(run, sync):
    shutil.rmtree(run.wandb)
    assert "nothing to upload in" in sync(WANDB_API_KEY=KEY).stdout
    for words in (["--key-file=/none"], ["--runner=moon"]):
        wrong = sync(*words)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1, wrong.stdout
    figures = sync("--figures", WANDB_API_KEY=KEY)
    assert figures.returncode == 2 and "holds no wandb run to send figures to" in figures.stderr and figures.stderr.count("\n") == 1


@pytest.mark.parametrize("words, told", [
    ([], r"python\S* -m training upload --wandb \S+/wandb /\S+aaaaaaaa /\S+bbbbbbbb\n.*python\S* -m training figures /\S+/saves/run1\n"),
    (["--project=q"], r"upload --project q .*\n.*figures --project q /"),
    (["--runner=docker"], r"run .*train python -m training upload /workspace/.*\n(.*\n)*.*run .*train python -m training figures /workspace/saves/run1"),
])
def test_figures_follow_the_trainers_own_data(words, told, run, sync):
    done = sync("--figures", *words, dry=True, WANDB_API_KEY=KEY)
    assert done.returncode == 0 and re.search(told, done.stdout), done.stdout + done.stderr
    assert KEY not in done.stdout + done.stderr


def test_wandbs_own_command_reaches_the_address_with_the_key_in_a_header_alone(run, sync, tmp_path):
    shutil.rmtree(run.wandb)
    write = "import sys, wandb; r = wandb.init(project='p', mode='offline', dir=sys.argv[1]); r.log({'x': 1}); r.finish()"
    subprocess.run([sys.executable, "-c", write, str(run.path)], check=True, capture_output=True)
    seen: list[str] = []

    def answer(method: str, path: str, headers: dict[str, str], body: dict[str, object]) -> Answer:
        seen.append(headers.get("authorization", ""))
        query = str((body or {}).get("query", ""))
        bucket = {"id": "b", "name": "x", "displayName": "n", "description": "", "config": "{}", "sweepName": None, "historyLineCount": 0,
                  "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}}  # yapf: disable
        data = {"upsertBucket": {"bucket": bucket, "inserted": True}} if "upsertBucket" in query else {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        return Answer({"data": data} if path == "/graphql" else {})

    with serving(answer) as url:
        done = sync(TRAIN_PYTHON=sys.executable, WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert done.returncode == 0 and "1 uploaded to " + url in done.stdout, done.stdout + done.stderr
    assert set(seen) == {"Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()}
    assert KEY not in done.stdout + done.stderr
