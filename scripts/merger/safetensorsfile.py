"""The header of a safetensors file: which tensors it holds, and where (https://github.com/huggingface/safetensors#format)."""
import math
import os
from pathlib import Path
from typing import Any

from merger import MergeError
from merger.dtypes import SAFETENSORS, itemsize
from merger.foreign.documents import parse
from merger.foreign.files import lfs_pointer
from merger.foreign.values import as_name, as_shape

MAX_HEADER = 100_000_000  # bytes; safetensors reads no longer one
TORCH_DTYPES = {code: dtype for dtype, code in SAFETENSORS.items()}

Place = tuple[str, tuple[int, ...], int]  # element type, shape (elements), first byte in the file


def read_tensors(path: Path, fd: int, size: int, remedy: str, base: int = 0) -> tuple[dict[str, Place], dict[str, Any]]:
    """Return the tensors of an open safetensors file of `size` bytes by name, and the header's metadata.

    Args:
        remedy: what to do about a file that is not whole, for the refusal.
        base: the byte of the file at which it begins.

    Raises:
        MergeError: it ends early, or its header places a tensor where it does not fit.
        ValueError, KeyError, TypeError: its header is none.
    """
    head = os.pread(fd, 64, base)
    if pointer := lfs_pointer(head):
        raise MergeError(f"{path} {pointer}")
    length = int.from_bytes(head[:8], "little")
    if length > min(size, MAX_HEADER):
        raise MergeError(f"{path} is not a whole safetensors file; {remedy}")
    header: dict[str, Any] = parse(os.pread(fd, length, base + 8))
    metadata = header.pop("__metadata__", None)
    found: dict[str, Place] = {}
    ranges = []
    for name, entry in header.items():
        dtype, shape = TORCH_DTYPES[entry["dtype"]], as_shape(entry["shape"])
        first, last = as_shape(entry["data_offsets"], "offsets")
        if last - first != math.prod(shape) * itemsize(dtype):
            raise MergeError(f"{path} places {name} of shape {list(shape)} at bytes {first} to {last}; {remedy}")
        found[as_name(name)] = (dtype, shape, base + 8 + length + first)
        ranges.append((first, last))
    end = 0
    for first, last in sorted(ranges):
        if first != end:
            raise MergeError(f"{path} has tensors that overlap, or bytes of none before byte {first}; {remedy}")
        end = last
    if 8 + length + end != size:
        raise MergeError(f"{path} is not a whole safetensors file; {remedy}")
    return found, metadata if isinstance(metadata, dict) else {}
