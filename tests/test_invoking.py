"""The tests' own way of running `invoke` is a user's."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.invoking import invoke

TASKS = """
import os, sys, time
from invoke.tasks import task

@task
def tell(c, code=0):
    print(sys.argv[1:], sys.argv[0].endswith("invoke/__main__.py"), sys.path[0], os.getcwd(), os.environ["WORD"], sys.stdin.read())
    print("fault", file=sys.stderr)
    os.system("echo a child")
    sys.exit(int(code))

@task
def wait(c):
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("words", [["tell"], ["tell", "--code=7"], ["no-such-task"]], ids=" ".join)
def test_a_run_from_the_fork_is_what_the_command_is(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    env = {**os.environ, "WORD": "ä"}
    plain = subprocess.run([sys.executable, "-m", "invoke", *words], cwd=tmp_path, env=env, input="said", capture_output=True, text=True, check=False)
    done = invoke(*words, cwd=tmp_path, env=env, input="said")
    assert (done.args, done.returncode, done.stderr) == (plain.args, plain.returncode, plain.stderr)
    assert sorted(done.stdout.splitlines()) == sorted(plain.stdout.splitlines()) and ("said" in done.stdout) == (words[0] == "tell")


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        invoke("wait", cwd=tmp_path, timeout=3)
    assert caught.value.stdout in ("begun\n", "")  # a busy machine may not have come so far


def test_an_interpreter_that_starts_otherwise_is_started(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text("import sys\nfrom invoke.tasks import task\n\n@task\ndef tell(c):\n    print(sys.flags.utf8_mode)\n")
    assert invoke("tell", cwd=tmp_path, env={**os.environ, "PYTHONUTF8": "1"}).stdout == "1\n"
