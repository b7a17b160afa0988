"""`--json` is a contract: every task that reports takes it, prints one object that its schema allows, and nothing else."""
import json
import os
import re
import subprocess

import jsonschema
import pytest
from invoke.program import Program

from tasks import ns, reporting
from tasks.lib.tables import print_table
from tests.fixtures.project import ROOT, copy_project
from tests.tasks.test_edge import FAKE, Project

SCHEMA = json.loads((ROOT / "tasks.schema.json").read_text())
TASKS = {("eval" if name == "eval.run" else "merge" if name == "merge.run" else name) for name in ns.task_names}
REPORTING = sorted(TASKS - set(reporting.SILENT))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One copy for all tests: nothing of it stays up."""
    folder = tmp_path_factory.mktemp("reporting")
    (folder / "docker").mkdir()
    (folder / "docker/docker").write_text(FAKE)
    (folder / "docker/docker").chmod(0o755)
    return Project(copy_project(folder / "project"), folder / "docker")


def valid(done: subprocess.CompletedProcess[str], task: str) -> dict:
    """Return the one object on standard output, which is as documented and has the exit code."""
    assert done.stdout.count("\n") == 1 and done.stdout.endswith("\n"), (done.stdout, done.stderr)
    found = json.loads(done.stdout)
    jsonschema.Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{task}"}).validate(found)
    assert (found["task"], found["code"]) == (task, done.returncode)
    assert "Traceback" not in done.stderr, done.stderr
    return found


def test_every_task_that_reports_has_the_flag_and_a_schema() -> None:
    flagged = {name for name in TASKS if any(one.name == "json" for one in ns[name].get_arguments())}
    assert flagged - {"eval.watch"} == set(REPORTING)  # which prints an object a look
    assert set(SCHEMA["$defs"]) - {"answer", "summary"} == set(REPORTING)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


WORDS = {
    "env.check": ["--env", "demo", "--url", "http://127.0.0.1:9"],
    "train.start": ["--env", "maze", "--model", "/nowhere"],
    "train.check": ["--env", "maze", "--model", "/nowhere"],
    "models.fetch": ["x"],
    "data.fetch": ["--env", "nowhere"],
    "env.try": ["--env", "movie"],
    "eval.merge": ["--out", "/nowhere/x"],
}


@pytest.mark.parametrize("task", [name for name in REPORTING if name not in ("quickstart", "env.up")])
def test_every_task_prints_one_object(task: str, project: Project) -> None:
    """On a machine that has nothing: what fails is an object too."""
    words = [task, *WORDS.get(task, []), "--json"]
    valid(project.invoke(*words), task)


@pytest.mark.parametrize("task", [name for name in REPORTING if name not in ("data.fetch", "models.fetch")])
def test_every_task_tells_what_it_would_do(task: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = 0
    try:
        Program(namespace=ns).run(["invoke", "--dry", task, *WORDS.get(task, []), "--json"])
    except SystemExit as left:
        code = int(left.code or 0)
    done = capfd.readouterr()
    found = valid(subprocess.CompletedProcess([], code, done.out, done.err), task)
    looks = task in ("doctor", "env.list", "train.list")
    assert code or ("would" in found) != looks


@pytest.mark.parametrize("words", [["env.up", "--port", "x"], ["merge", "--local-dir", "/nowhere"], ["eval", "--env", "demo", "--tries", "x"],
                                   ["eval", "--env", "nothing"], ["env.data", "--env", "nothing"], ["train.status", "--name", "../x"],
                                   ["eval.report", "--run", "/nowhere"], ["build.all", "--tag", "a b"], ["eval.merge"]], ids=" ".join)
def test_misuse_is_an_object_with_the_line(words: list[str], project: Project) -> None:
    (project.answers / "images").write_text('[{"Id": "sha256:1"}]')
    done = project.invoke(*words, "--json")
    found = valid(done, words[0])
    assert found["code"] == 2 and found["error"]["code"] == 2
    assert found["error"]["message"] in re.sub(r"\s+", " ", done.stderr) and len(found["error"]["message"]) > 15, done.stderr


def test_a_run_s_numbers_are_in_the_object(project: Project) -> None:
    run = ["eval", "--env", "demo", "--runner", "local", "--json", "--items", "0-5"]
    runs = [valid(project.invoke(*run, "--model", model, "--seed", "1"), "eval") for model in ("expert", "random")]
    folders = [one["runs"][0]["folder"] for one in runs]
    assert [one["runs"][0]["summary"]["attempts"] for one in runs] == [6, 6]
    words = [word for folder in folders for word in ("--run", folder)]
    compared = valid(project.invoke("eval.compare", *words, "--json"), "eval.compare")
    assert compared["differences"][0]["items"] == 6 and compared["differences"][0]["success"]["mean"] <= 0
    listed = valid(project.invoke("eval.list", "--json"), "eval.list")
    assert [one["folder"] for one in listed["runs"]] == folders
    for task in ("eval.report", "eval.rescore", "eval.export", "eval.conversations"):
        found = valid(project.invoke(task, "--run", folders[0], "--json"), task)
        assert found["code"] == 0
    merged = valid(project.invoke("eval.merge", *words, "--out", str(project.root / "saves/eval/both"), "--json"), "eval.merge")
    assert merged["code"] == 2 and merged["error"]["message"]


@pytest.mark.parametrize("words", [["status"], ["env.list"], ["doctor"], ["build.all"], ["build.env", "--env", "demo"], ["clean.images", "--yes"], ["down"], ["env.down"]],
                         ids=" ".join)
def test_no_table_is_printed_where_there_is_something_to_show(words: list[str], project: Project) -> None:
    label = "com.docker.compose.project"
    labels = {label: "x", f"{label}.working_dir": str(project.root), "com.docker.compose.service": "env-demo", "org.agentgym-rl.uid": str(os.getuid()),
              "org.agentgym-rl.env": "demo", "org.agentgym-rl.env.port": "26016"}
    told = {"ids": "c1\n", "image-ids": "sha256:1\n",
            "images": json.dumps([{"Id": "sha256:1", "Size": 5, "Created": "2026-01-01T00:00:00Z", "RepoTags": ["agentgym/env-demo:latest"]}]),
            "containers": json.dumps([{"Id": "c1", "Name": "/x-env-demo-1", "Image": "sha256:1", "State": {"Status": "running", "Running": True},
                                       "Config": {"Labels": labels}, "HostConfig": {"PortBindings": {}}, "NetworkSettings": {"Ports": {}}}])}
    for name, text in told.items():
        (project.answers / name).write_text(text)
    try:
        shown = project.invoke(*words)
        found = valid(project.invoke(*words, "--json"), words[0])
    finally:
        for name in told:
            (project.answers / name).unlink()
    assert (shown.stdout.strip() or words == ["down"]) and found["code"] == shown.returncode, shown.stderr
    assert {"status": "x-env-demo-1", "env.list": "26016", "down": "x-env-demo-1", "env.down": "demo"}.get(words[0], "") in json.dumps(found)


def test_a_table_in_a_pipe_has_each_row_on_a_line_and_each_value_whole(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("x" * 300, "y " * 200 + "z"), ("short", "too")]
    print_table(("a", "b"), rows)
    assert [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()] == [["a", "b"], *map(list, rows)]
