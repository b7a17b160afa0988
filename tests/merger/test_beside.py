"""Transformers is asked while the weights are written; nothing is published before it has answered."""
from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.merger.merging import PROGRAM, run_program, unchecked, untouched, weights

# Answers when the last bytes of the weights are in the staging folder.
ASKED = """
import glob, os, time
def asked(*question):
    if "merging-" in str(question[0]):
        return model_check.Verdict()
    parent, end = os.path.dirname(sys.argv[sys.argv.index("--save-dir") + 1]), time.monotonic() + 100
    while time.monotonic() < end:
        for name in glob.glob(parent + "/.*merging-*/*.safetensors"):
            with open(name, "rb") as file:
                file.seek(max(file.seek(0, 2) - 8, 0))  # it may be empty yet
                if any(file.read()):
                    {then}
        time.sleep(0.01)
    raise SystemExit("nothing was written meanwhile")
model_check.ask = asked
"""


def beside(then: str) -> tuple[str, str]:
    return unchecked(ASKED.format(then=then))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of one rank, with a tied head that is there twice."""
    import torch
    folder = tmp_path / "actor"
    (folder / "huggingface").mkdir(parents=True)
    torch.manual_seed(0)
    table = torch.randn(1003, 64)
    torch.save({"model.embed_tokens.weight": table, "model.norm.weight": torch.randn(64), "lm_head.weight": table.clone()},
               folder / "model_world_size_1_rank_0.pt")  # yapf: disable
    (folder / "huggingface/config.json").write_text(json.dumps({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True, "vocab_size": 1003}))  # yapf: disable
    (tmp_path / "saves").mkdir()
    return folder


def arguments(checkpoint: Path, tmp_path: Path) -> list[str | Path]:
    return ["--local-dir", checkpoint, "--save-dir", tmp_path / "saves/out", "--json"]


def test_the_weights_are_written_while_it_is_asked(checkpoint: Path, tmp_path: Path) -> None:
    run = run_program(*arguments(checkpoint, tmp_path),
                      program=beside(
                          'return model_check.Verdict(transformers="5.0", tied=[["model.embed_tokens.weight", '
                          '"lm_head.weight"]])'))
    record = run.record()
    assert record["model_check"] == "keys and shapes as transformers 5.0 expects"
    assert record["tied_dropped"] == ["lm_head.weight"]
    assert sorted(weights(tmp_path / "saves/out")) == ["model.embed_tokens.weight", "model.norm.weight"]


@pytest.mark.parametrize("before", ["with no earlier merge", "over an earlier merge"])
def test_a_refusal_leaves_nothing(before: str, checkpoint: Path, tmp_path: Path) -> None:
    args = [*arguments(checkpoint, tmp_path), "--force"]
    if before == "over an earlier merge":
        assert run_program(*args, "--dtype", "float16", program=unchecked()).code == 0
    with untouched(tmp_path):
        run = run_program(*args,
                          program=beside('return model_check.Verdict(missing=["model.layers.0.mlp.up_proj.weight"])'))
        assert "lacks model.layers.0.mlp.up_proj.weight" in run.refusal


@pytest.mark.parametrize(("verdict", "names", "dtype"), [
    ('fp32=["norm"], tied=[["model.embed_tokens.weight", "lm_head.weight"]]', 2, "float32"),
    ("", 3, "bfloat16"),
],
                         ids=["a module in float32", "no tied weights"])
def test_an_answer_that_changes_the_files_changes_them(verdict: str, names: int, dtype: str, checkpoint: Path,
                                                       tmp_path: Path) -> None:
    run = run_program(*arguments(checkpoint, tmp_path),
                      "--verify",
                      program=beside(f"return model_check.Verdict({verdict})"))
    record = run.record()
    found = weights(tmp_path / "saves/out")
    assert len(found) == record["tensors"] == names and str(found["model.norm.weight"].dtype) == f"torch.{dtype}"
    notes = run_program(
        *arguments(checkpoint, tmp_path),
        "--force",
        program=unchecked(f"model_check.ask = lambda *_: model_check.Verdict({verdict})")).record()["notes"]
    assert record["notes"] == notes


def test_what_it_says_comes_before_what_copying_finds(checkpoint: Path, tmp_path: Path) -> None:
    """Tied weights that differ are no fault where the model does not tie them."""
    import torch
    path = checkpoint / "model_world_size_1_rank_0.pt"
    state = torch.load(path)
    state["lm_head.weight"] += 1
    torch.save(state, path)
    slow = unchecked(
        "import time\ndef asked(*_):\n    time.sleep(2)\n    return model_check.Verdict({})\nmodel_check.ask = asked")
    args = arguments(checkpoint, tmp_path)
    tied = 'tied=[["model.embed_tokens.weight", "lm_head.weight"]]'
    assert "but their values differ" in run_program(*args, program=(slow[0], slow[1].replace("{}", tied))).refusal
    assert "lacks a.weight" in run_program(*args, program=(slow[0], slow[1].replace("({})",
                                                                                    '(missing=["a.weight"])'))).refusal
    run_program(*args, program=(slow[0], slow[1].replace("({})", "()"))).record()
    assert len(weights(tmp_path / "saves/out")) == 3


# Answers when what is likely has been taken, and before a byte of the weights is written.
AT_ONCE = """
import time
def asked(*question):
    time.sleep(0.5)
    return model_check.Verdict({})
model_check.ask = asked
def late(self, *question, usual=model_check.Beside.ask):
    found = usual(self, *question)
    self._done.wait()
    return found
model_check.Beside.ask = late
"""


def test_an_answer_that_comes_right_after_the_guess_counts(checkpoint: Path, tmp_path: Path) -> None:
    args = arguments(checkpoint, tmp_path)
    with untouched(tmp_path):
        refusal = run_program(*args, program=unchecked(AT_ONCE.replace("({})", '(missing=["a.weight"])'))).refusal
    assert "lacks a.weight" in refusal
    told = AT_ONCE.replace("{}", 'transformers="5.0", fp32=["norm"]')
    record = run_program(*args, program=unchecked(told)).record()
    assert record["model_check"] == "keys and shapes as transformers 5.0 expects"
    found = weights(tmp_path / "saves/out")
    assert len(found) == 3 and str(found["model.norm.weight"].dtype) == "torch.float32"


def test_a_crash_of_the_question_is_one_line_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with untouched(tmp_path):
        run = run_program(*arguments(checkpoint, tmp_path), program=beside('raise OSError(5, "Input/output error")'))
        assert "Input/output error" in run.refusal


SOON = """
import threading, time
def asked(*question):
    time.sleep(0.4)
    return model_check.Verdict()
model_check.ask = asked
"""


def small_files() -> None:
    """Bound the files of a process, as a disk that fills up while it writes: the merged weights are larger."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


@pytest.mark.parametrize("before", ["with no earlier merge", "over an earlier merge"])
def test_no_room_while_it_is_asked_leaves_what_was_there(before: str, checkpoint: Path, tmp_path: Path) -> None:
    args = [*arguments(checkpoint, tmp_path), "--force"]
    if before == "over an earlier merge":
        assert run_program(*args, "--dtype", "float16", program=unchecked()).code == 0
    with untouched(tmp_path):
        assert "File too large" in run_program(*args, program=unchecked(SOON), preexec_fn=small_files).refusal


def test_no_room_while_transformers_itself_is_asked_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path.with_name("cache")), "PYTHONDONTWRITEBYTECODE": "1"}
    with untouched(tmp_path):
        run = run_program(*arguments(checkpoint, tmp_path), "--allow", "keys", env=cache, preexec_fn=small_files)
        assert "File too large" in run.refusal


@pytest.fixture
def waiting(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that starts a merge whose child with transformers never answers, and returns it with its child."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "transformers.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    processes = []

    def start() -> tuple[subprocess.Popen[str], psutil.Process]:
        process = subprocess.Popen([sys.executable, PROGRAM, *map(str, arguments(checkpoint, tmp_path))], text=True,
                                   env={**os.environ, "PYTHONPATH": str(slow)}, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, start_new_session=True)  # yapf: disable
        processes.append(process)
        end = time.monotonic() + 100
        while not (list((tmp_path / "saves").glob(".*merging-*/*.safetensors")) and list(
            (tmp_path / "tmp").glob("model-check-*"))):
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.01)
        return process, psutil.Process(process.pid).children()[0]

    yield start
    for process in processes:
        process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_meanwhile_ends_both_and_leaves_nothing(number: signal.Signals, code: int, waiting: Any,
                                                         tmp_path: Path) -> None:
    with untouched(tmp_path):
        process, child = waiting()
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code and out == "" and "Traceback" not in err and len(err.splitlines()) <= 1
    assert psutil.wait_procs([child], timeout=30)[1] == []


def test_kill_9_meanwhile_publishes_nothing_and_the_child_ends_and_tidies_up(waiting: Any, checkpoint: Path,
                                                                             tmp_path: Path) -> None:
    process, child = waiting()
    process.kill()
    process.communicate()
    assert psutil.wait_procs([child], timeout=60)[1] == []
    assert list((tmp_path / "tmp").iterdir()) == [] and not (tmp_path / "saves/out").exists()
    assert run_program(*arguments(checkpoint, tmp_path), program=unchecked()).code == 0
    assert [path.name for path in (tmp_path / "saves").iterdir()] == ["out"]


def test_kill_9_at_30_moments_leaves_the_old_state_or_the_new(checkpoint: Path, tmp_path: Path) -> None:
    args, target, chance = [*arguments(checkpoint, tmp_path), "--force"], tmp_path / "saves/out", random.Random(15)
    assert run_program(*args, program=unchecked()).code == 0
    new = state_of(target)
    assert run_program(*args, "--dtype", "float16", program=unchecked()).code == 0
    old = state_of(target)
    assert old != new
    shutil.copytree(target, tmp_path / "old")
    ends = []
    for _ in range(30):
        process = subprocess.Popen([sys.executable, *unchecked(SOON), *map(str, args)], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # yapf: disable
        while process.poll() is None and not list((tmp_path / "saves").glob(".*merging-*")):
            time.sleep(0.005)
        try:
            process.wait(chance.uniform(0, 0.6))
        except subprocess.TimeoutExpired:
            process.kill()
        process.wait()
        ends.append(state_of(target) == old)
        assert ends[-1] or state_of(target) == new
        if not ends[-1]:
            shutil.rmtree(target)
            shutil.copytree(tmp_path / "old", target)
    assert any(ends)
    assert run_program(*args, program=unchecked()).code == 0
    assert [path.name for path in (tmp_path / "saves").iterdir()] == ["out"] and state_of(target) == new


def state_of(target: Path) -> dict[str, bytes]:
    """Return the merged files but the record, which holds times."""
    return {path.name: path.read_bytes() for path in target.iterdir() if path.name != "merge.json"}
