"""Mistyped words: one line that says what was meant, and exit code 2."""
import json
import subprocess
import sys

import pytest

from tasks import ns
from tasks.words import contexts, fault
from tests.fixtures.project import ROOT


@pytest.mark.parametrize("typed, said", [
    ("train.rnu", "no task 'train.rnu'; did you mean train.run?"),
    ("stauts", "no task 'stauts'; did you mean status?"),
    ("tarin", "no task 'tarin'; did you mean train?"),
    ("xyzzy", "no task 'xyzzy'; `invoke --list` shows them"),
    ("train", "train is no task; choose train.check, train.list, "),
    ("build", "build is no task; choose build.all, "),
    ("train.run python -V", "train.run: put the command after --: invoke train.run -- python -V"),
    ("train.run --gpus none python -c 1", "train.run: put the command after --: invoke train.run -- python -c 1"),
    ("train.start trainer.total_epochs=3", "train.start: put the trainer's own words after --: invoke train.start … -- trainer.total_epochs=3"),
    ("merge saves/x", "merge: 'saves/x' stands alone; write --local-dir saves/x"),
    ("merge.verify saves/x", "merge.verify: 'saves/x' stands alone; write --local-dir saves/x"),
    ("eval saves/x", "eval: 'saves/x' stands alone; write --checkpoint saves/x"),
    ("eval --model expert babyai", "eval: 'babyai' stands alone; write --env babyai"),
    ("env.down maze", "env.down: 'maze' stands alone; write --env maze"),
    ("train.status run1", "train.status: 'run1' stands alone; write --name run1"),
    ("eval.report one", "eval.report: 'one' stands alone; write --run one"),
    ("status all", "status: it takes no word 'all'; `invoke --help status` shows its flags"),
    ("status dwon", "status: it takes no word 'dwon'; did you mean down?"),
    ("env.up --prot 3", "env.up: no flag --prot; did you mean --port?"),
    ("env.up --prot=3", "env.up: no flag --prot; did you mean --port?"),
    ("merge --local_dir x", "merge: no flag --local_dir; did you mean --local-dir?"),
    ("merge --hf_model_path=y", "merge: no flag --hf_model_path; did you mean --config-dir?"),
    ("merge --hf-model-path y", "merge: no flag --hf-model-path; did you mean --config-dir?"),
    ("merge --target_dir z", "merge: no flag --target_dir; did you mean --save-dir?"),
    ("env.up --target-dir z", "env.up: no flag --target-dir; "),
    ("env.up --qqq", "env.up: no flag --qqq; `invoke --help env.up` shows them"),
    ("--nope status", "no flag --nope; "),
    ("merge --local-dir", "merge: --local-dir needs a value"),
    ("env.up --port", "env.up: Flag <Argument: port> needed value and was not given one"),
    ("--help trian.run", "no task 'trian.run'; did you mean train.run?"),
    ("models.fetch", "models.fetch: 'models.fetch' did not receive required positional arguments: 'name'; "),
    ("merge tränen/ß", "merge: 'tränen/ß' stands alone"),
], ids=lambda value: value if " no " not in value else None)
def test_what_was_meant_is_told(typed: str, said: str) -> None:
    assert fault(ns, ["invoke", *typed.split()]).startswith(said)


@pytest.mark.parametrize("typed", [
    "", "--list", "--list train", "--version", "--complete -- inv tr", "status", "status --json", "status down", "env.up --env demo --port 3 --build",
    "merge --local-dir x --local-dir y", "train.run -- python -V", "models.fetch x/y", "--dry env.down --env x", "env.up --help", "--help env.up",
    "eval --samples 3 --model x", "train.start --env x -- a.b=c"
])
def test_what_invoke_takes_is_left_to_it(typed: str) -> None:
    assert fault(ns, ["invoke", *typed.split()]) == ""


def test_invoke_finds_the_help_texts_that_it_takes_once() -> None:
    first, second = ({one.name: one.flags["--json"].help for one in contexts(ns) if "--json" in one.flags} for _ in range(2))
    assert first == second and len(first) > 40


def test_misuse_is_one_line_and_exit_code_2_and_with_json_an_object() -> None:
    done = subprocess.run([sys.executable, "-m", "invoke", "env.upp", "--json"], cwd=ROOT, capture_output=True, text=True, check=False)
    line = "invoke: no task 'env.upp'; did you mean env.up?"
    assert (done.returncode, done.stderr) == (2, line + "\n")
    assert json.loads(done.stdout) == {"task": "invoke", "code": 2, "error": {"code": 2, "message": line}}
