"""Measures merging on CUDA beside the CPU: one command of a few minutes for a person with a GPU.

    python benchmarks/cuda.py > cuda.md

Every mesh's sample is merged both ways, and the files must be equal byte for byte, with --verify, and with the same counts
of NaN and infinite elements; then a checkpoint of Qwen2.5-0.5B's shapes is merged both ways in turn, and the bus is
measured. It prints a Markdown report, and where that belongs. Exit codes: 0, all equal; 1, a difference or a failure;
2, no CUDA device, or bad input.

`--device cpu` runs the same with the CPU in the GPU's place: a test of this program, of which no figure is of any use.
"""
from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsdp_checkpoint
import machine

ROOT = Path(__file__).resolve().parents[1]
MERGER = ROOT / "scripts/model_merger.py"
SAMPLE = ROOT / "samples/sample_checkpoint.py"
# Each kind of mesh and placement, and what is no float32.
SAMPLES = {
    "FSDP1": "--strategy fsdp1 --world-size 4",
    "FSDP2": "--strategy fsdp2 --world-size 3",
    "HSDP": "--strategy hsdp --world-size 4",
    "FSDP2 and TP": "--strategy fsdp2-tp --world-size 4",
    "ShardedTensor": "--strategy sharded-tensor --world-size 3",
    "tied": "--strategy fsdp2 --world-size 2 --model qwen2-tied",
    "buffers": "--strategy fsdp2 --world-size 2 --model buffers",
    "bfloat16": "--strategy fsdp2 --world-size 2 --dtype bfloat16",
}
DTYPES = ("bfloat16", "float16", "float32")
WHERE = "Put this report below `## Merging on CUDA` in benchmarks/README.md, and say there which machine it is of."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure merging on CUDA beside the CPU.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try this program without one")
    parser.add_argument("--size", choices=fsdp_checkpoint.SIZES, default="0.5B", help="of the timed checkpoint")
    parser.add_argument("--runs", type=int, default=3, help="timed merges of each device (default: 3)")
    parser.add_argument("--samples",
                        nargs="*",
                        default=list(SAMPLES),
                        help="kinds of samples to compare (default: all)")
    options = parser.parse_args(arguments)
    if strange := [name for name in options.samples if name not in SAMPLES]:
        print(f"cuda: no sample {strange[0]!r}; there are {', '.join(SAMPLES)} (exit 2)", file=sys.stderr)
        return 2
    if options.device != "cpu" and not cuda_is_here():
        print(
            "cuda: torch sees no CUDA device here; run it on a machine with an NVIDIA GPU and torch's CUDA build (exit 2)",
            file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="cuda-benchmark-") as place:
        folder, faults = Path(place), 0
        described = machine.describe(folder, {"Python": sys.executable})
        print("## Merging on CUDA\n")
        if options.device == "cpu":
            print("**The CPU stood in for the GPU: nothing here was measured on CUDA.**\n")
        print("| sample | types | bytes equal | NaN, infinite |\n|---|---|---|---|")
        for name in options.samples:
            row, fault = compare(folder / name.replace(" ", "-"), SAMPLES[name], options.device)
            faults += fault
            print(f"| {name} | {', '.join(DTYPES)} | {row} |", flush=True)
        print(f"\n| {options.size}, warm | s | GB/s read |\n|---|---|---|")
        for device, seconds, rate in timed(folder, options.size, options.runs, options.device):
            print(f"| {device} | {seconds} | {rate} |", flush=True)
        print(f"\n{bus(options.device)}\n")
        described["date"] = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M UTC}"
        print("; ".join(f"{name}: {value}"
                        for name, value in described.items()) + f". {gpu_name(options.device)}\n\n{WHERE}")
    return 1 if faults else 0


def cuda_is_here() -> bool:
    import torch
    return bool(torch.cuda.is_available())


def gpu_name(device: str) -> str:
    import torch
    return "" if device == "cpu" else f"GPU: {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}."


def merge(actor: Path, out: Path, device: str, *flags: str) -> dict[str, Any]:
    """Merge by the program; return its record."""
    command = [sys.executable, str(MERGER), "--local-dir", str(actor), "--save-dir", str(out), "--device", device, "--json",
               "--force", *flags]  # yapf: disable
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(folder: Path, flags: str, device: str) -> tuple[str, int]:
    """Merge one sample both ways in every type, then with NaN and infinite elements; return a row's cells, and 1 for a fault."""
    actor = folder / "actor"
    subprocess.run([sys.executable, str(SAMPLE), "--save-dir", str(actor), "--reference", str(folder / "reference.safetensors"),
                    *flags.split()], check=True, capture_output=True)  # yapf: disable
    try:
        equal = all(both(actor, folder, device, "--dtype", dtype, "--verify", "--allow", "keys") for dtype in DTYPES)
        spoil(actor)
        ours, theirs = (merge(actor, folder / name, name, "--allow", "nonfinite", "--allow", "keys")
                        for name in ("cpu", device))
    except RuntimeError as error:
        return f"**failed**: {error} | ", 1
    counts = [(record["nan"], record["inf"]) for record in (ours, theirs)]
    right = counts[0] == counts[1] and counts[0][0] > 0
    return f"{'yes' if equal else '**no**'} | {counts[1]}{'' if right else f', **the CPU counts {counts[0]}**'}", not (
        equal and right)


def both(actor: Path, folder: Path, device: str, *flags: str) -> bool:
    """Return True if the two devices' weights are equal byte for byte."""
    for name in ("cpu", device):
        merge(actor, folder / f"out-{name}", name, *flags)
    return all((folder / "out-cpu" / path.name).read_bytes() == path.read_bytes()
               for path in (folder / f"out-{device}").glob("*.safetensors"))


def spoil(actor: Path) -> None:
    """Make one element of a matrix NaN and one infinite, in the file of the first rank."""
    import torch
    import torch.distributed.tensor
    path = min(actor.glob("model_world_size_*_rank_0.pt"))
    state = torch.load(path, weights_only=False, map_location="cpu")
    value = next(value for name, value in state.items() if name.endswith("q_proj.weight"))
    local = value.local_shards()[0].tensor if hasattr(value, "local_shards") else getattr(value, "_local_tensor", value)
    local.view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
    torch.save(state, path)


def timed(folder: Path, size: str, runs: int, device: str) -> list[tuple[str, str, str]]:
    """Merge a large checkpoint by each device in turn; return (device, seconds, rate) of the medians."""
    fsdp_checkpoint.make(folder / "large", size)
    seconds: dict[str, list[float]] = {"cpu": [], device: []}
    read = 0
    for _ in range(runs + 1):
        for name, found in seconds.items():
            began = time.perf_counter()
            read = merge(folder / "large/actor", folder / "large/out", name)["bytes_read"]
            found.append(time.perf_counter() - began)
    rows = []
    for name, found in seconds.items():
        kept = sorted(found[1:])  # the first also asked transformers, and filled caches
        middle = statistics.median(kept)
        rows.append((name, f"{middle:.2f} ({kept[0]:.2f}–{kept[-1]:.2f})", f"{read / middle / 1e9:.2f}"))
    return rows


def bus(device: str) -> str:
    """Return how fast pinned memory goes to the device and back, beside what a merge needs."""
    import torch
    if device == "cpu":
        return "Bus: not measured."
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    rates = []
    for target, source in ((there, host), (host, there)):
        target.copy_(source)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(8):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(8 * host.numel() / (time.perf_counter() - began) / 1e9)
    return (
        f"Bus, pinned memory: {rates[0]:.1f} GB/s to the device, {rates[1]:.1f} GB/s back; a merge to bfloat16 sends all that it "
        "reads, and takes half of that back.")


if __name__ == "__main__":
    sys.exit(main())
