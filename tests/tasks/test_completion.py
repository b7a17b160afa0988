"""Completion: what may stand where the cursor is, in each shell, within 150 ms."""
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks import ns
from tasks.completing import CHOICES, build, candidates, values
from tasks.completion import SCRIPTS, place_for, with_block
from tasks.words import contexts
from tests.fixtures.project import ROOT


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, bool]]:
    return build()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "environments.toml").write_text("[maze]\nx = 1\n[maze.protocol]\n[movie]\n[demo]\n")
    for name in ("saves/run1", "saves/other", "saves/eval/maze-expert"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "saves/run1/global_step_2/actor").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("words, expected", [
    (["env.u"], ["env.up"]),
    (["--dr"], ["--dry"]),
    (["--dry", "env.u"], ["env.up"]),
    (["env.up", "--re"], ["--replicas"]),
    (["env.up", "--env", "m"], ["maze", "movie"]),
    (["env.up", "--env=m"], ["--env=maze", "--env=movie"]),
    (["env.up", "--env", "=", "ma"], ["maze"]),
    (["env.up", "--env", "="], ["demo", "maze", "movie"]),
    (["env.up", "--env", "maze", "--runner", ""], ["auto", "docker", "local"]),
    (["train.status", "--name", ""], ["other", "run1"]),
    (["eval.report", "--run", ""], ["maze-expert"]),
    (["merge", "--local-dir", "sav"], ["saves/run1/global_step_2/actor"]),
    (["merge", "--lora", "f"], ["fuse"]),
    (["merge", "--lora-alpha", ""], []),
    (["env.up", "ma"], []),
    (["train.run", "--", "pyth"], []),
    (["nothing", "--x"], []),
], ids=" ".join)
def test_what_may_stand_there(words: list[str], expected: list[str], table: dict[str, dict[str, bool]], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert candidates(table, root, words) == expected


def test_a_folder_without_anything_offers_nothing(table: dict[str, dict[str, bool]], tmp_path: Path) -> None:
    assert [candidates(table, tmp_path, [task, flag, ""]) for task, flag in (("env.up", "--env"), ("eval.report", "--run"))] == [[], []]


def test_the_choices_are_those_that_the_help_names(root: Path) -> None:
    for context in contexts(ns):
        for flag, choices in CHOICES.items():
            if flag in context.flags and flag != "--format":
                told = context.flags[flag].help
                assert set(choices) >= set(values(context.name or "", flag, root)) and any(choice in told for choice in choices), (context.name, flag)


@pytest.mark.parametrize("words", [["env.up", "--env", "m"], ["tra"], ["merge", "--local-dir", ""]], ids=" ".join)
def test_it_takes_150_ms_at_most(words: list[str]) -> None:
    """Of processor time, which other programs on the machine do not lengthen; the first call asks invoke and notes it."""
    argv = [sys.executable, "-IS", str(ROOT / "tasks/completing.py"), str(ROOT), *words]
    subprocess.run(argv, check=True, capture_output=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 0.15
    assert done.stdout.strip() or words[0] == "merge"


@pytest.mark.parametrize("shell", SCRIPTS)
def test_installing_says_which_file_it_changes_and_keeps_the_rest(shell: str, tmp_path: Path) -> None:
    environ = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": "", "ZDOTDIR": ""}
    file = {"bash": ".bashrc", "zsh": ".zshrc", "fish": ".config/fish/conf.d/agentgym_invoke.fish"}[shell]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("alias x=y")
    (tmp_path / file).chmod(0o600)
    for _ in range(2):
        done = subprocess.run([sys.executable, "-m", "invoke", "completion", "--install", shell], cwd=ROOT, env=environ, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith(f"completion: changed {tmp_path / file}; "), done.stderr
    text = (tmp_path / file).read_text()
    assert text.startswith("alias x=y\n") and text.count(">>> completion of invoke") == 1
    assert (tmp_path / file).stat().st_mode & 0o777 == 0o600


def test_what_follows_the_block_stays() -> None:
    first = with_block("a\n", "one\n") + "b\n"
    assert with_block(first, "two\n") == with_block("a\nb\n", "two\n")
    assert place_for("bash") == Path.home() / ".bashrc"


@pytest.mark.parametrize("typed, offered", [(["env.up", "--env", "m"], {"maze", "movie"}), (["stat"], {"status"}), (["env.up", "--env", "=", "dem"], {"demo"})])
def test_bash_offers_it(typed: list[str], offered: set[str], tmp_path: Path) -> None:
    environ = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "invoke", "completion", "--install", "bash"], cwd=ROOT, env=environ, check=True, capture_output=True)
    script = 'source ~/.bashrc; COMP_WORDS=(invoke "$@"); COMP_CWORD=$#; _agentgym_invoke; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run([shutil.which("bash") or "bash", "-c", script, "bash", *typed], cwd=ROOT / "docker", env=environ, capture_output=True, text=True)
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.mark.parametrize("words, said", [([], "give --install bash, zsh or fish"), (["--install", "tcsh"], "no completion for 'tcsh'; choose one of bash, zsh, fish"),
                                         (["--install", "bash", "--show", "bash"], "give --install")])
def test_misuse_of_completion_is_one_line(words: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "invoke", "completion", *words], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and said in done.stderr
