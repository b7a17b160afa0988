#!/usr/bin/env python3
"""Load a merged model with transformers and compare it with the unsharded weights, tensor by tensor.

    python samples/compare_model.py --model saves/x/actor/huggingface --reference reference.safetensors

Equal means equal bits, after the reference is cast to the model's element type. Exit codes: 0 equal, 1 different,
2 misuse. Needs torch, transformers and safetensors.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def compare(model: Path, reference: Path) -> tuple[int, list[str]]:
    """Return how many tensors the loaded model has, and the names of those that differ from the reference.

    A tied weight counts under each of its names.

    Raises:
        OSError, ValueError: a folder that transformers does not load, a file that is no safetensors.
    """
    import transformers
    from safetensors.torch import load_file
    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, torch_dtype="auto", local_files_only=True)
    weights, expected = loaded.state_dict(), load_file(reference)
    names = [*weights, *(name for name in expected if name not in weights)]
    return len(weights), [name for name in names if not same_bits(weights.get(name), expected.get(name))]


def same_bits(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    """Return True if both are there and hold the same bits, `theirs` cast to the type of `ours`."""
    import torch
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return False
    return torch.equal(ours.contiguous().view(torch.uint8), theirs.to(ours.dtype).contiguous().view(torch.uint8))


def main() -> int:
    """Run the comparison; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, type=Path, help="folder of the merged model")
    parser.add_argument("--reference", required=True, type=Path, help="safetensors file with the unsharded weights")
    args = parser.parse_args()
    for path in (args.model, args.reference):
        if not path.exists():
            print(f"compare_model: no {path}; check the path", file=sys.stderr)
            return 2
    try:
        count, different = compare(args.model, args.reference)
    except (OSError, ValueError) as error:
        print(f"compare_model: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 2
    if different:
        print(f"{len(different)} of {count} tensors differ, the first is {different[0]}")
        return 1
    print(f"transformers loads {args.model}; all {count} tensors equal the unsharded weights, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
