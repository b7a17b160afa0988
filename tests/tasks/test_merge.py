"""The tasks and their settings; and that what stands below them stands alone."""
import ast
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from invoke.program import Program

from tasks import ns
from tasks.lib import settings as project_settings
from tasks.lib.host import programs
from tasks.lib.settings import SETTINGS, read_dotenv, resolve, resolve_path
from tasks.merge import merger_args
from tests.merger.merging import ROOT, SCRIPTS, Sample, differences, run_program, weights


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the reader's own settings."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(project_settings, "read_dotenv", dict)


def invoke(*args: str | Path) -> int:
    """Run `invoke` with `args` in this process; return its exit code."""
    try:
        Program(namespace=ns, name="invoke").run(["invoke", *map(str, args)], exit=True)
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


# Settings


@pytest.mark.parametrize(("flag", "environ", "dotenv", "value"), [
    ("flag", {"SAVE_DIR": "environment"}, {"SAVE_DIR": ".env"}, "flag"),
    ("", {"SAVE_DIR": "environment"}, {"SAVE_DIR": ".env"}, "environment"),
    (None, {"SAVE_DIR": ""}, {"SAVE_DIR": ".env"}, ".env"),
    (None, {}, {"SAVE_DIR": ""}, ""),
    (None, {}, {}, ""),
], ids=["the flag wins", "then the environment", "then .env, also over an empty variable", "an empty one is unset",
        "then the default"])  # yapf: disable
def test_settings_are_resolved_in_order(flag: str | None, environ: Mapping[str, str], dotenv: Mapping[str, str],
                                        value: str) -> None:
    assert resolve("SAVE_DIR", flag, environ, dotenv) == value


def test_the_default_of_local_dir_is_below_saves() -> None:
    assert resolve("LOCAL_DIR", None, {}, {}) == "saves/checkpoint"


def test_an_unknown_setting_is_a_programmer_s_mistake() -> None:
    with pytest.raises(KeyError):
        resolve("LOCAL_DIRECTORY", "x", {}, {})


def test_dotenv_files_are_read_without_touching_the_environment(tmp_path: Path) -> None:
    import os
    (tmp_path / ".env").write_text("# a comment\nSAVE_DIR='a b'\nexport HF_TOKEN=secret # why\nEMPTY\n")
    before = dict(os.environ)
    found = read_dotenv(tmp_path / ".env")
    assert (found["SAVE_DIR"], found["HF_TOKEN"]) == ("a b", "secret") and "EMPTY" not in found
    assert dict(os.environ) == before
    assert read_dotenv(tmp_path / "absent") == {}


def test_paths_from_settings_start_at_the_project_and_flags_where_the_user_stands(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAVE_DIR", "models/out")
    assert resolve_path("SAVE_DIR") == str(ROOT / "models/out")
    assert resolve_path("SAVE_DIR", "models/out") == "models/out"
    monkeypatch.setenv("SAVE_DIR", "/models/out")
    assert resolve_path("SAVE_DIR") == "/models/out"
    monkeypatch.delenv("SAVE_DIR")
    assert resolve_path("SAVE_DIR") == ""


def test_a_tilde_in_a_setting_or_a_flag_is_the_user_s_home(monkeypatch: pytest.MonkeyPatch,
                                                           capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SAVE_DIR", "~/models")
    assert resolve_path("SAVE_DIR") == "/home/me/models"
    assert invoke("--dry", "merge", "--local-dir=~/a", "--local-dir", "b~") == 0
    assert shlex.split(capfd.readouterr().out)[2:] == ["--local-dir", "/home/me/a", "--local-dir", "b~",
                                                      "--save-dir", "/home/me/models"]  # yapf: disable


@pytest.mark.parametrize("runner", ["local", "docker"])
def test_an_empty_local_dir_is_refused(runner: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke("--dry", "merge", "--runner", runner, "--local-dir", "a", "--local-dir", "") == 2
    assert capfd.readouterr().err == "merge: --local-dir is empty, which is no folder; is a variable unset?\n"


def test_the_token_is_marked_as_a_secret() -> None:
    assert SETTINGS["HF_TOKEN"].secret and not SETTINGS["LOCAL_DIR"].secret


def test_a_program_s_environment_gets_what_dotenv_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project_settings, "read_dotenv", lambda: {"HF_TOKEN": "from .env", "HF_ENDPOINT": "there"})
    found = programs.environment(("HF_TOKEN", "HF_ENDPOINT"), {"PATH": "/bin", "HF_TOKEN": "mine"})
    assert found == {"PATH": "/bin", "HF_TOKEN": "mine", "HF_ENDPOINT": "there"}


# Tasks


def test_only_flags_that_are_set_reach_the_program() -> None:
    assert merger_args(["a", "b"], save_dir="out", force=True, verify=False, dtype="", allow=["keys", "nonfinite"],
                       threads="2") == ["--local-dir", "a", "--local-dir", "b", "--save-dir", "out", "--force",
                                        "--allow", "keys", "--allow", "nonfinite", "--threads", "2"]  # yapf: disable


def would(out: str) -> str:
    """Return the command line that `--dry` prints, with `--json` in an object."""
    return json.loads(out)["would"][0] if out.startswith("{") else out


@pytest.mark.parametrize(("args", "wanted"), [
    (["merge", "--local-dir", "x"], ["--local-dir", "x"]),
    (["merge", "--local-dir", "x", "--local-dir", "y z"], ["--local-dir", "x", "--local-dir", "y z"]),
    (["merge", "--local-dir=x", "--save-dir=o", "--dtype", "keep", "--force", "--verify", "--json", "--dry-run"],
     ["--local-dir", "x", "--save-dir", "o", "--dtype", "keep", "--verify", "--force", "--dry-run", "--json"]),
    (["merge", "--local-dir", "x", "--hf-upload-path", "u/n", "--private", "--max-shard-size", "1GB", "--threads", "3"],
     ["--local-dir", "x", "--hf-upload-path", "u/n", "--private", "--max-shard-size", "1GB", "--threads", "3"]),
    (["merge", "--local-dir", "x", "--lora", "fuse", "--lora-alpha", "16", "--tied-weights", "keep", "--allow", "keys"],
     ["--local-dir", "x", "--lora", "fuse", "--lora-alpha", "16", "--tied-weights", "keep", "--allow", "keys"]),
    (["merge.inspect", "--local-dir", "x", "--json"], ["--local-dir", "x", "--inspect", "--json"]),
    (["merge.verify", "--local-dir", "x", "--save-dir", "o"],
     ["--local-dir", "x", "--save-dir", "o", "--verify-only"]),
], ids=lambda part: " ".join(part[:4]))  # yapf: disable
def test_a_task_becomes_one_command_line(args: list[str], wanted: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke("--dry", *args) == 0
    python, program, *rest = shlex.split(would(capfd.readouterr().out))
    assert (python, program) == (sys.executable, str(SCRIPTS / "model_merger.py"))
    pairs = sorted(" ".join(rest).split(" --")), sorted(" ".join(wanted).split(" --"))
    assert [part.removeprefix("--") for part in pairs[0]] == [part.removeprefix("--") for part in pairs[1]]


def test_every_command_line_is_one_that_the_program_knows(capfd: pytest.CaptureFixture[str]) -> None:
    from merger.cli import parser
    assert invoke("--dry", "merge", "--local-dir", "x", "--save-dir", "o", "--dtype", "float16", "--device", "cpu",
                  "--max-shard-size", "1GB", "--threads", "3", "--lora", "fuse", "--lora-alpha", "16",
                  "--tied-weights", "drop", "--allow", "keys", "--verify", "--force", "--json", "--trust-remote-code",
                  "--hf-upload-path", "u/n", "--private") == 0  # yapf: disable
    args = parser().parse_args(shlex.split(would(capfd.readouterr().out))[2:])
    assert (args.lora_alpha, args.threads, args.allow, args.private) == (16.0, 3, ["keys"], True)


def test_the_folders_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch,
                                                   capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCAL_DIR", "/shards")
    monkeypatch.setenv("SAVE_DIR", "out")
    monkeypatch.setenv("HF_UPLOAD_PATH", "u/n")
    monkeypatch.setenv("MERGE_DEVICE", "cuda:1")
    assert invoke("--dry", "merge") == 0
    assert shlex.split(capfd.readouterr().out)[2:] == ["--local-dir", "/shards", "--save-dir", str(ROOT / "out"),
                                                      "--hf-upload-path", "u/n", "--device", "cuda:1"]  # yapf: disable


def test_the_token_is_in_no_command_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_Secret")
    assert invoke("--dry", "--echo", "merge", "--local-dir", "x", "--hf-upload-path", "u/n") == 0
    shown = capfd.readouterr()
    assert "u/n" in shown.out and "hf_Secret" not in shown.out + shown.err


@pytest.mark.parametrize("args", [["merge"], ["merge.inspect"], ["merge.verify"], ["quickstart"]],
                         ids=lambda args: args[0])
def test_help_shows_help_and_runs_nothing(args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke(*args, "--help") == 0
    shown = capfd.readouterr()
    assert f"Usage: invoke [--core-opts] {args[0]}" in shown.out and "--help" not in shown.err
    if args != ["quickstart"]:
        assert "--local-dir" in shown.out


def test_every_flag_of_every_task_is_explained() -> None:
    code = ("from tasks import ns\n"
            "for name in ns.task_names:\n"
            "    print(name, [flag.name for flag in ns[name].get_arguments() if not flag.help])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) >= 4 and all(line.endswith(" []") for line in lines), done
    assert all(len((ns[name].__doc__ or "x" * 60).splitlines()[0]) < 60 for name in ns.task_names)


@pytest.mark.parametrize(("installed", "said"), [
    (True, "merge: running with --runner local: this Python has all that it needs\n"),
    (False, "merge: running with --runner docker: this Python lacks numpy, rich\n"),
], ids=["installed", "not installed"])  # yapf: disable
def test_auto_says_what_it_took_and_why(installed: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capfd: pytest.CaptureFixture[str]) -> None:
    import tasks.merge
    monkeypatch.setattr(tasks.merge, "find_spec", lambda name: installed or name not in ("numpy", "rich"))
    monkeypatch.setattr(tasks.merge, "run_in_container", lambda *_: None)
    assert invoke("--dry", "merge", "--local-dir", tmp_path, "--json") == 0
    shown = capfd.readouterr()
    assert shown.err == said and "merge: " not in shown.out
    assert invoke("--dry", "merge", "--local-dir", tmp_path, "--runner", "local") == 0
    assert capfd.readouterr().err == ""


def test_a_save_folder_that_cannot_be_made_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert invoke("merge", "--runner", "docker", "--local-dir", tmp_path, "--save-dir", tmp_path / "file/x/out") == 2
    (line, ) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"merge: cannot make {tmp_path / 'file/x'}: ") and "--save-dir" in line


def test_gpus_that_would_mean_nothing_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke("--dry", "merge", "--local-dir", "x", "--runner", "local", "--gpus", "1") == 2
    assert capfd.readouterr().err == "merge: --gpus is for --runner docker; on this machine set CUDA_VISIBLE_DEVICES\n"


def test_a_python_that_cannot_check_the_keys_does_not_merge_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                      capfd: pytest.CaptureFixture[str]) -> None:
    import tasks.merge
    monkeypatch.setattr(tasks.merge, "find_spec", lambda name: name != "accelerate")
    monkeypatch.setattr(tasks.merge, "run_in_container", lambda *_: None)
    assert invoke("--dry", "merge", "--local-dir", tmp_path) == 0
    assert "--runner docker: this Python lacks accelerate" in capfd.readouterr().err


def test_an_unknown_runner_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke("--dry", "merge", "--local-dir", "x", "--runner", "podman") == 2
    assert "unknown runner 'podman'" in capfd.readouterr().err


def test_a_merge_s_exit_code_is_the_task_s(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert invoke("merge", "--local-dir", tmp_path, "--runner", "local") == 2
    err = capfd.readouterr().err
    assert err.startswith("merge: no model_world_size_") and len(err.splitlines()) == 1


def test_the_task_merges_inspects_and_verifies(spoil: Callable[..., Sample], capfd: pytest.CaptureFixture[str]) -> None:
    sample = spoil("FSDP2 and TP, 2 x 2 ranks")
    for task in ("merge", "merge.inspect", "merge.verify"):
        assert invoke(task, "--local-dir", sample.actor, "--runner", "local") == 0, capfd.readouterr().err
    shown = capfd.readouterr().out
    assert "fsdp 2 x tp 2" in shown and "equal to the shards in every element" in shown
    assert differences(weights(sample.huggingface), {}) == sorted(sample.tensors())


def test_invoke_lists_its_tasks_without_heavy_imports() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "invoke", "--list"],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)  # yapf: disable
    assert done.returncode == 0, done.stderr
    for task in ("merge", "merge.inspect", "merge.verify", "quickstart"):
        assert task in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "invoke" in imported and "tasks" in imported
    heavy = {"torch", "transformers", "numpy", "rich", "python_on_whales", "huggingface_hub", "safetensors", "pydantic",
             "ml_dtypes", "dotenv"}  # yapf: disable
    assert imported & heavy == set()


def test_invoke_works_from_a_subfolder() -> None:
    done = subprocess.run([sys.executable, "-m", "invoke", "--list"], cwd=SCRIPTS, capture_output=True, text=True,
                          timeout=60)  # yapf: disable
    assert done.returncode == 0 and "merge.inspect" in done.stdout


# The programs stand alone


def imports(path: Path) -> set[str]:
    """Return the packages that a file imports, at the top or inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("*.py")), ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_no_program_imports_the_tasks(path: Path) -> None:
    assert imports(path) & {"tasks", "invoke", "tests", "benchmarks", "merging", "python_on_whales", "dotenv"} == set()


def test_the_merger_runs_as_a_copy_from_anywhere(samples: dict[str, Sample], tmp_path: Path) -> None:
    shutil.copytree(SCRIPTS, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("__pycache__"))
    run = run_program("--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", "out", "--json",
                      program=("-E", "-s", tmp_path / "elsewhere/model_merger.py"), cwd=tmp_path)  # yapf: disable
    assert run.record()["tensors"] == len(weights(tmp_path / "out"))


def test_reading_and_merging_need_neither_torch_nor_transformers() -> None:
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import merger.cli, merger.merging, merger.pickles\n"
            "print({'torch', 'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code, SCRIPTS], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("task", ["merge", "merge.verify"])
def test_a_base_model_is_given_to_the_merger_and_mounted_for_the_container(task: str, tmp_path: Path,
                                                                           capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("only", "base"):
        (tmp_path / name).mkdir()
    args = ["--dry", task, "--local-dir", tmp_path / "only", "--base-model", tmp_path / "base"]
    more = ["--lora", "fuse"] if task == "merge" else []
    assert invoke(*args, *more, "--runner", "local") == 0
    assert f"--base-model {tmp_path}/base" in capfd.readouterr().out
    assert invoke(*args, *more, "--runner", "docker") == 0
    said = capfd.readouterr().out
    assert f"--base-model /host{tmp_path}/base" in said and f"{tmp_path}/base:/host{tmp_path}/base" in said
    (tmp_path / "base").rmdir()
    assert invoke(*args, *more, "--runner", "docker") == 2
    assert "give --base-model the base model's folder" in capfd.readouterr().err
