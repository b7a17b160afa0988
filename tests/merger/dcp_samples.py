"""Torch's own distributed checkpoints for the tests: written by its writers, over gloo, of the models of the samples."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from merger.filenames import DCP, RANKS, SHARDED

from tests.merger.merging import SAMPLE_PROGRAMS, Sample

# (torch refuses to save 1003 rows over 3 x 2 ranks.) The sample's flags, and how its state is saved: in which parts, and by which writer.
SAMPLES = {
    "FSDP1": ("--strategy fsdp1 --world-size 4", "bare", "dcp"),
    "FSDP1, ShardedTensor": ("--strategy sharded-tensor --world-size 3", "model", "dcp"),
    "FSDP2": ("--strategy fsdp2 --world-size 4", "bare", "dcp"),
    "FSDP2, tied": ("--strategy fsdp2 --world-size 3 --model qwen2-tied", "model", "dcp"),
    "FSDP2, with its optimizer": ("--strategy fsdp2 --world-size 2", "app", "dcp"),
    "FSDP2, flattened optimizer": ("--strategy fsdp2 --world-size 2", "flat", "dcp"),
    "FSDP2, threads": ("--strategy fsdp2 --world-size 2", "model", "threads"),
    "FSDP2, a file each": ("--strategy fsdp2 --world-size 2", "bare", "a file each"),
    "FSDP2, safetensors inside": ("--strategy fsdp2 --world-size 2", "app", "safetensors"),
    "HSDP": ("--strategy hsdp --world-size 4", "bare", "dcp"),
    "FSDP2 and TP": ("--strategy fsdp2-tp --world-size 4", "bare", "dcp"),
    "FSDP2 and TP, 3 x 2": ("--strategy fsdp2-tp --world-size 6 --vocab-size 1008", "model", "dcp"),
    "buffers": ("--strategy fsdp2 --world-size 3 --model buffers", "bare", "dcp"),
    "one rank": ("--strategy fsdp2 --world-size 1", "bare", "dcp"),
    "bfloat16": ("--strategy fsdp2 --world-size 3 --dtype bfloat16", "model", "dcp"),
    "LoRA": ("--strategy fsdp2 --world-size 2 --model lora", "model", "dcp"),
    "sharded safetensors": ("--strategy fsdp2 --world-size 4", "bare", "sharded"),
    "sharded safetensors, TP": ("--strategy fsdp2-tp --world-size 4", "bare", "sharded"),
    "sharded safetensors, several files": ("--strategy fsdp2 --world-size 2", "bare", "sharded, 2 files"),
}

WRITE = """
import json, sys, logging, warnings
sys.path.insert(0, sys.argv[1])
import sample_checkpoint as samples

def save_rank(rank, sample, store, parts, writer):
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import SerializationFormat
    warnings.simplefilter("ignore")
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    with samples.rank_group(rank, sample, store) as mesh:
        model = samples.shard(samples.build_model(sample), sample, mesh)
        state = samples.sharded_state(model, sample)
        twice = {name: value.clone() for name, value in state.items()} if parts in ("app", "flat") else {}
        moments = {"state": {name: {"step": torch.tensor(3.0), "exp_avg": value} for name, value in twice.items()}}
        flat = {f"state.{name}.exp_avg": value for name, value in twice.items()}
        state = {"bare": state, "model": {"model": state}, "app": {"app": {"model": state, "optim": moments}, "step": 7},
                 "adapter": {"model": {name: value for name, value in state.items() if ".lora_" in name}},
                 "flat": {**state, "optimizer": flat, "train_state": {"step": torch.tensor(1)}}}[parts]
        path = str(sample.save_dir)
        names = list(state)
        dcp.save(state, storage_writer={
            "dcp": lambda: dcp.FileSystemWriter(path),
            "threads": lambda: dcp.FileSystemWriter(path, thread_count=3),
            "a file each": lambda: dcp.FileSystemWriter(path, single_file_per_rank=False),
            "safetensors": lambda: dcp.FileSystemWriter(path, serialization_format=SerializationFormat.SAFETENSORS),
            "sharded": lambda: dcp.HuggingFaceStorageWriter(path, save_distributed=True),
            "sharded, 2 files": lambda: dcp.HuggingFaceStorageWriter(
                path, save_distributed=True, fqn_to_index_mapping={name: 1 + i % 2 for i, name in enumerate(names)}),
        }[writer]())

def write(arguments, parts, writer):
    sample = samples.parse(arguments)
    def program():
        samples.prepare_ranks()
        import torch.distributed.checkpoint
        model = samples.build_model(sample)
        sample.save_dir.mkdir(parents=True)
        samples.write_reference(model.state_dict(), sample.reference)
        samples.write_huggingface(model, sample)
        samples.write_metadata(sample)
        samples.run_ranks(save_rank, sample, parts, writer)
    return samples.run_offline(program, "dcp", sample.save_dir)

for request in json.load(sys.stdin):
    if code := write(*request):
        sys.exit(code)
"""


def write_dcp(folder: Path, wanted: dict[str, tuple[str, str, str]], python: str = sys.executable) -> dict[str, Sample]:
    """Write checkpoints with one process of `python`, and return where they are."""
    samples = {
        name: Sample(folder / str(i) / "dcp", folder / str(i) / "reference.safetensors")
        for i, name in enumerate(wanted)
    }
    requests = [[["--save-dir",
                  str(sample.actor), "--reference",
                  str(sample.reference), *wanted[name][0].split()], *wanted[name][1:]]
                for name, sample in samples.items()]
    done = subprocess.run([python, "-c", WRITE, str(SAMPLE_PROGRAMS)],
                          input=json.dumps(requests),
                          text=True,
                          capture_output=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    return samples


FORMS = (RANKS, DCP, SHARDED)


def write_form(form: str, state: dict[str, Any], folder: Path) -> None:
    """Write a state dict of whole tensors into a folder that is there, as one rank: a `.pt` file, or four files by torch's writers."""
    import logging

    import torch
    import torch.distributed.checkpoint as dcp
    if form == RANKS:
        torch.save(state, folder / "model_world_size_1_rank_0.pt")
        return
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    writer = (dcp.FileSystemWriter(folder, thread_count=4) if form == DCP else dcp.HuggingFaceStorageWriter(
        str(folder), save_distributed=True, fqn_to_index_mapping={name: 1 + i % 4 for i, name in enumerate(state)}))  # yapf: disable
    dcp.save(dict(state), storage_writer=writer, no_dist=True)
