"""Checkpoints that real FSDP writes for the tests, and what to do where a machine cannot do what a test needs."""
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.merger.merging import SAMPLE_PROGRAMS, Sample

# What `samples/sample_checkpoint.py` is asked for: the vocabulary of 1003 divides by no world size here.
SAMPLES = {
    "FSDP1, 4 ranks": "--strategy fsdp1 --world-size 4",
    "FSDP1, 3 ranks, tied": "--strategy fsdp1 --world-size 3 --model qwen2-tied",
    "FSDP1, 4 ranks, tied": "--strategy fsdp1 --world-size 4 --model qwen2-tied",
    "FSDP1, 1 rank": "--strategy fsdp1 --world-size 1",
    "FSDP2, 4 ranks": "--strategy fsdp2 --world-size 4",
    "FSDP2, 3 ranks, mesh dp_shard": "--strategy fsdp2 --world-size 3 --mesh-name dp_shard",
    "FSDP2, 4 ranks, tied": "--strategy fsdp2 --world-size 4 --model qwen2-tied",
    "FSDP2, 1 rank, tied": "--strategy fsdp2 --world-size 1 --model qwen2-tied",
    "HSDP, 2 x 2 ranks": "--strategy hsdp --world-size 4",
    "HSDP, 2 x 3 ranks, tied": "--strategy hsdp --world-size 6 --model qwen2-tied",
    "FSDP2 and TP, 2 x 2 ranks": "--strategy fsdp2-tp --world-size 4",
    "FSDP2 and TP, 3 x 2 ranks": "--strategy fsdp2-tp --world-size 6",
    "ShardedTensor, 4 ranks": "--strategy sharded-tensor --world-size 4",
    "ShardedTensor, 3 ranks, tied": "--strategy sharded-tensor --world-size 3 --model qwen2-tied",
    "FSDP2, bfloat16 shards": "--strategy fsdp2 --world-size 4 --dtype bfloat16",
    "FSDP1, float16 shards": "--strategy fsdp1 --world-size 4 --dtype float16",
    "critic, FSDP1": "--strategy fsdp1 --world-size 4 --model critic --seed 7",
    "critic, FSDP2": "--strategy fsdp2 --world-size 3 --model critic",
    "mixture of experts, HSDP": "--strategy hsdp --world-size 4 --model moe",
    "mixture of experts, FSDP2": "--strategy fsdp2 --world-size 3 --model moe",
    "vision, FSDP2": "--strategy fsdp2 --world-size 4 --model vision",
    "vision, ShardedTensor": "--strategy sharded-tensor --world-size 4 --model vision",
    "buffers, FSDP1": "--strategy fsdp1 --world-size 4 --model buffers",
    "buffers, FSDP2": "--strategy fsdp2 --world-size 4 --model buffers",
    "LoRA, FSDP1": "--strategy fsdp1 --world-size 4 --model lora",
    "LoRA, FSDP2": "--strategy fsdp2 --world-size 3 --model lora",
}

WRITE_SAMPLES = """
import json, sys
sys.path.insert(0, sys.argv[1])
import sample_checkpoint
for arguments in json.load(sys.stdin):
    code = sample_checkpoint.main(arguments)
    if code:
        sys.exit(code)
"""


def laid_out(folder: Path, wanted: Iterable[str]) -> dict[str, Sample]:
    """Return where in `folder` the samples `wanted` are, or will be."""
    return {
        name: Sample(folder / str(i) / "actor", folder / str(i) / "reference.safetensors")
        for i, name in enumerate(wanted)
    }


def write_samples(folder: Path, wanted: dict[str, str], python: str = sys.executable) -> dict[str, Sample]:
    """Write checkpoints with one process of `python`, which imports torch once for all of them."""
    samples = laid_out(folder, wanted)
    requests = [["--save-dir",
                 str(sample.actor), "--reference",
                 str(sample.reference), *wanted[name].split()] for name, sample in samples.items()]
    done = subprocess.run([python, "-c", WRITE_SAMPLES, str(SAMPLE_PROGRAMS)],
                          input=json.dumps(requests),
                          text=True,
                          capture_output=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    return samples
