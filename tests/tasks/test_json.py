"""`--json`: one object on standard output and nothing else there."""
import json
import os
import subprocess

import pytest

from tests.fixtures.invoking import invoke as run_invoke
from tests.fixtures.servers import FIXTURE_ROWS, ROOT, rows, running


def invoke(*words: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "ENVIRONMENTS": str(FIXTURE_ROWS.relative_to(ROOT))}
    return run_invoke(*words, cwd=ROOT, env=variables)


def test_every_environment_is_in_the_object():
    done = invoke("env.list", "--json")
    assert done.returncode == 0, done.stderr
    found = {one["name"]: one for one in json.loads(done.stdout)["environments"]}
    assert set(found) == set(rows())
    assert set(found["form-textcraft"]) == {"name", "title", "port", "image", "running", "data_missing", "keys_missing"}
    assert found["fault-key"]["keys_missing"] == ["FIXTURE_KEY"] or os.environ.get("FIXTURE_KEY")


def test_the_checks_of_a_server_are_in_the_object(tmp_path):
    with running(rows()["form-textcraft"], tmp_path) as client:
        done = invoke("env.check", "--env", "form-textcraft", "--url", client.base.removesuffix("/textcraft"), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["environment"] == "form-textcraft" and len(found["checks"]) == 8
    assert all(one["holds"] in (True, None) for one in found["checks"])


@pytest.mark.parametrize("words", [("env.check", "--env", "form-textcraft", "--url", "http://127.0.0.1:9", "--json")], ids=" ".join)
def test_a_server_that_is_not_there_fails_every_check(words):
    done = invoke(*words)
    assert done.returncode == 1
    assert not any(one["holds"] for one in json.loads(done.stdout)["checks"])
