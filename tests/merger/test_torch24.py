"""Checkpoints across torch versions: written by 2.4.0 and read by this torch, and the other ways round.

torch 2.4.0 lives in an environment of its own: TORCH24_PYTHON names its interpreter (with torch 2.4.0, transformers
4.51.3, numpy below 2, safetensors, ml_dtypes, rich). Without it, CI makes one in `.cache/torch-2.4.0`, 3 GB once.
"""
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.needs import UNDER_CI
from tests.merger.fsdp_samples import write_samples
from tests.merger.merging import (
    ROOT,
    SCRIPTS,
    TESTS,
    Run,
    Sample,
    cast,
    differences,
    merge,
    run_program,
    weights,
)

pytestmark = pytest.mark.slow  # its environment takes 3 GB and minutes
CACHED = ROOT / ".cache/torch-2.4.0"
COMPLETE = CACHED / "complete"  # a run that was stopped half-way leaves an environment without it
PACKAGES = ("torch==2.4.0", "transformers==4.51.3", "accelerate==1.15.0", "numpy<2", "safetensors", "ml_dtypes", "rich")
HOW = (
    f"torch 2.4.0 is not here; set TORCH24_PYTHON to an interpreter that has it, or run `uv venv --python 3.11 {CACHED} "
    f"&& uv pip install --python {CACHED} {' '.join(repr(p) for p in PACKAGES)}` (3 GB)")

OLD_SAMPLES = {
    "FSDP1, 4 ranks": "--strategy fsdp1 --world-size 4",
    "FSDP1, 3 ranks, tied": "--strategy fsdp1 --world-size 3 --model qwen2-tied",
    "FSDP2, 4 ranks": "--strategy fsdp2 --world-size 4",
    "HSDP, 2 x 2 ranks": "--strategy hsdp --world-size 4",
    "ShardedTensor, 4 ranks": "--strategy sharded-tensor --world-size 4",
    "critic, FSDP1": "--strategy fsdp1 --world-size 4 --model critic",
    "buffers, FSDP2": "--strategy fsdp2 --world-size 4 --model buffers",
}
NEW_SAMPLES = ("FSDP1, 4 ranks", "FSDP1, 3 ranks, tied", "FSDP2, 4 ranks", "HSDP, 2 x 3 ranks, tied",
               "FSDP2 and TP, 2 x 2 ranks", "ShardedTensor, 4 ranks", "critic, FSDP1", "buffers, FSDP2")

MERGE_ALL = """
import dataclasses, json, sys
sys.path[:0] = sys.argv[1:]
import merging
print(json.dumps([dataclasses.astuple(merging.merge(*arguments)) for arguments in json.load(sys.stdin)]))
"""


def make_environment() -> Path:
    """Make the environment with uv, and return its interpreter."""
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--clear", "--python", "3.11", str(CACHED)], check=True)
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", str(CACHED), *PACKAGES], check=True)
    COMPLETE.touch()
    return CACHED / "bin/python"


@pytest.fixture(scope="session")
def old_python() -> Path:
    """The interpreter of an environment with torch 2.4.0."""
    named = os.environ.get("TORCH24_PYTHON")
    python = Path(named) if named else CACHED / "bin/python"
    if not (python if named else COMPLETE).exists():
        if named or not UNDER_CI:
            pytest.fail(f"TORCH24_PYTHON: no {named}") if named else pytest.skip(HOW)
        python = make_environment()
    found = subprocess.run([python, "-c", "import torch, ml_dtypes, rich; print(torch.__version__)"],
                           capture_output=True, text=True)  # yapf: disable
    assert found.stdout.startswith("2.4.0"), f"{python}: {found.stdout}{found.stderr}"
    return python


@pytest.fixture(scope="session")
def old_samples(old_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Sample]]:
    yield write_samples(tmp_path_factory.mktemp("torch24"), OLD_SAMPLES, str(old_python))


@pytest.fixture(scope="session")
def merged_there(old_python: Path, old_samples: dict[str, Sample], samples: dict[str, Sample],
                 tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Run, Sample, Path]]:
    """What torch 2.4.0 makes of all samples: one process merges them, as importing takes longer than all the rest."""
    out = tmp_path_factory.mktemp("merged-there")
    wanted = {f"old {name}": sample for name, sample in old_samples.items()}
    wanted |= {f"new {name}": samples[name] for name in NEW_SAMPLES}
    done = subprocess.run([old_python, "-c", MERGE_ALL, str(TESTS), str(SCRIPTS)],
                          input=json.dumps([arguments(sample, out / name) for name, sample in wanted.items()]),
                          capture_output=True, text=True, timeout=600)  # yapf: disable
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)
    return {name: (Run(*run), sample, out / name)
            for run, (name, sample) in zip(runs, wanted.items(), strict=True)}  # yapf: disable


def arguments(sample: Sample, out: Path) -> list[str]:
    return ["--local-dir", str(sample.actor), "--save-dir", str(out), "--verify", "--allow", "keys", "--json"]


def compare(run: Run, sample: Sample, out: Path) -> None:
    """Compare a merge with the reference."""
    wanted = {name: cast(tensor, "bfloat16") for name, tensor in sample.tensors().items()}
    if sample.config.get("tie_word_embeddings"):
        del wanted["lm_head.weight"]
    assert run.record()["verified"] and "as transformers" in run.record()["model_check"]
    assert differences(weights(out), wanted) == []


@pytest.mark.parametrize("name", OLD_SAMPLES)
def test_what_torch_2_4_wrote_is_read_here(name: str, old_samples: dict[str, Sample], tmp_path: Path) -> None:
    compare(merge(*arguments(old_samples[name], tmp_path / "out")), old_samples[name], tmp_path / "out")


@pytest.mark.parametrize("name", OLD_SAMPLES)
def test_what_torch_2_4_wrote_is_read_there(name: str, merged_there: dict[str, tuple[Run, Sample, Path]]) -> None:
    run, sample, out = merged_there[f"old {name}"]
    compare(run, sample, out)
    assert "transformers 4.51.3" in run.record()["model_check"] and run.record()["versions"]["torch"].startswith(
        "2.4.0")


@pytest.mark.parametrize("name", NEW_SAMPLES)
def test_what_this_torch_wrote_is_read_with_torch_2_4(name: str, merged_there: dict[str, tuple[Run, Sample,
                                                                                               Path]]) -> None:
    compare(*merged_there[f"new {name}"])


def test_the_program_itself_runs_with_torch_2_4(old_samples: dict[str, Sample], old_python: Path,
                                                tmp_path: Path) -> None:
    sample = old_samples["FSDP1, 4 ranks"].copy(tmp_path)
    compare(run_program(*arguments(sample, tmp_path / "out"), python=old_python), sample, tmp_path / "out")
    sample.configure(num_hidden_layers=3)
    assert "lacks model.layers.2" in run_program("--local-dir", sample.actor, python=old_python).refusal
