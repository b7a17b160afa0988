"""Lay out the output before any data is read: which tensor goes where, and in which blocks it is copied.

A safetensors file is 8 bytes of header length, a JSON header, and the tensors' bytes without holes
(https://github.com/huggingface/safetensors#format), so every byte's place is known from shapes and types alone.
"""
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from merger import MergeError
from merger.checkpoint import Checkpoint, Tensor
from merger.dtypes import SAFETENSORS, itemsize
from merger.filenames import MODEL_STEM
from merger.lattice import cut
from merger.layout import Run, cut_dimension, runs_of
from merger.safetensorsfile import MAX_HEADER
from merger.views import View, on_ranks, rows_of

BLOCK_BYTES = 8 << 20  # of source data; two buffers of this size a thread
SMALL_BYTES = 1 << 20  # while a process with torch and transformers in it runs beside


@dataclass(frozen=True)
class Fusion:
    """LoRA matrices to add: weight + scale * (b @ a), for a of shape (r, in) and b of shape (out, r)."""
    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Output:
    """A tensor to write: the checkpoint's tensor under its final name and element type.

    `twins` are tied copies that are left out, and must have equal bytes. Where it is no tensor of the checkpoint but
    made of some, it is a `view`, and `source` is the first of them.
    """
    name: str
    source: Tensor
    dtype: str
    fusion: Fusion | None = None
    twins: tuple[Tensor, ...] = ()
    view: View | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The extents, in elements."""
        return self.source.shape if self.view is None else self.view.shape

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in the output."""
        return self.numel * itemsize(self.dtype)


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file: its name, its header's bytes, and its tensors with the byte at which each begins."""
    name: str
    header: bytes
    tensors: tuple[tuple[Output, int], ...]
    size: int


@dataclass(frozen=True)
class Part:
    """Rows of one rank's file that go into a block.

    Attributes:
        rank: whose file.
        offset: byte of that file at which the first row begins; rows follow each other.
        target: element of the block at which the first row begins.
        rows, width, pitch: number of rows, elements of a row, elements between two rows of the block.
    """
    rank: int
    offset: int
    target: int
    rows: int
    width: int
    pitch: int

    def within(self, values: np.ndarray) -> np.ndarray:
        """Return the place of these rows in `values`, the elements of the block, as (rows, width)."""
        if self.rows == 1:
            return values[self.target:self.target + self.width].reshape(1, self.width)
        size = values.itemsize
        return np.lib.stride_tricks.as_strided(values[self.target:], (self.rows, self.width), (self.pitch * size, size))


@dataclass(frozen=True)
class Block:
    """Consecutive elements of one output tensor, small enough to be held in memory.

    Attributes:
        output: the tensor.
        file: number of the output file.
        offset: byte of that file at which the block begins.
        start, numel: first element of the tensor, and how many.
        parts: what fills it.
        twin_parts: what fills the same block of each of the output's twins.
    """
    output: Output
    file: int
    offset: int
    start: int
    numel: int
    parts: tuple[Part, ...]
    twin_parts: tuple[tuple[Part, ...], ...] = ()


def split_files(outputs: Sequence[Output], max_bytes: int, stem: str = MODEL_STEM) -> list[OutputFile]:
    """Distribute `outputs` over files of at most `max_bytes` of tensor data (a larger tensor has a file of its own)."""
    groups: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if groups[-1] and filled + output.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.nbytes
    count = len(groups)
    names = [f"{stem}.safetensors"
             ] if count == 1 else [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [_output_file(name, group) for name, group in zip(names, groups, strict=True)]


def _output_file(name: str, outputs: Sequence[Output]) -> OutputFile:
    # Wider elements first: then every tensor begins at a multiple of its element size, as readers like it.
    ordered = sorted(outputs, key=lambda output: -itemsize(output.dtype))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = [], 0
    for output in ordered:
        offsets.append(end)
        end += output.nbytes
        header[output.name] = {
            "dtype": SAFETENSORS[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [offsets[-1], end]
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise MergeError(
            f"{name} would have a header of {len(text)} bytes, and safetensors reads {MAX_HEADER}; choose a "
            "smaller --max-shard-size")
    prefix = len(text).to_bytes(8, "little") + text
    placed = tuple((output, len(prefix) + offset) for output, offset in zip(ordered, offsets, strict=True))
    return OutputFile(name, prefix, placed, len(prefix) + end)


def index_json(files: Sequence[OutputFile]) -> bytes | None:
    """Return the index that names each tensor's file, or None where one file holds all."""
    if len(files) == 1:
        return None
    weight_map = {output.name: file.name for file in files for output, _ in file.tensors}
    total = sum(output.nbytes for file in files for output, _ in file.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def all_blocks(checkpoint: Checkpoint,
               files: Sequence[OutputFile],
               bytes_now: Callable[[], int] = lambda: BLOCK_BYTES) -> Iterator[Block]:
    """Yield the blocks of all files, in the order of the output.

    Args:
        bytes_now: the source bytes that a block may have, asked for each tensor.

    Raises:
        MergeError: tied copies lie on the ranks in ways that cannot be compared block by block.
    """
    for number, file in enumerate(files):
        for output, offset in file.tensors:
            size, whole_rows = itemsize(output.dtype), output.fusion is not None or bool(output.twins)
            block_bytes = bytes_now()
            if output.view is not None:
                for start, numel, parts in view_blocks(checkpoint, output.view, block_bytes):
                    yield Block(output, number, offset + start * size, start, numel, parts)
                continue
            same = (tensor_blocks(checkpoint, tensor, block_bytes, whole_rows)
                    for tensor in (output.source, *output.twins))
            for (start, numel, parts), *copies in zip(*same, strict=True):
                if any(copy[:2] != (start, numel) for copy in copies):
                    raise MergeError(
                        f"{output.name} and its tied copy lie differently on the ranks; pass --tied-weights")
                yield Block(output, number, offset + start * size, start, numel, parts,
                            tuple(copy[2] for copy in copies))


def tensor_blocks(checkpoint: Checkpoint,
                  tensor: Tensor,
                  block_bytes: int = BLOCK_BYTES,
                  whole_rows: bool = False) -> Iterator[tuple[int, int, tuple[Part, ...]]]:
    """Yield (first element, elements, parts) of blocks of at most `block_bytes` that make up `tensor`.

    Args:
        whole_rows: let blocks begin at multiples of the tensor's last dimension, however long that is.
    """
    size = itemsize(tensor.dtype)
    limit = max(block_bytes // size, 1)
    shape, layout = tensor.shape, tensor.layout
    cut = cut_dimension(shape, (box for _, box in layout.pieces))
    runs = [(rank, offset, run) for rank, box, offset in checkpoint.places(tensor) for run in runs_of(shape, box, cut)]
    raster = math.prod(shape[cut:]) if cut else 0
    if 0 < raster <= limit:
        rows = math.prod(shape[:cut])
        step = limit // raster
        for row in range(0, rows, step):
            count = min(step, rows - row)
            parts = [part for rank, offset, run in runs if (part := _rows_within(rank, offset, run, row, count, size))]
            yield row * raster, count * raster, tuple(parts)
        return
    lines = sorted(((rank, offset + (run.source + i * run.width) * size, run.target + i * run.pitch, run.width)
                    for rank, offset, run in runs for i in range(run.rows)),
                   key=lambda line: line[2])
    if whole_rows and shape:
        limit = max(limit // shape[-1], 1) * shape[-1]
    yield from _cut_lines(lines, tensor.numel, limit, size)


def view_blocks(checkpoint: Checkpoint,
                view: View,
                block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int, tuple[Part, ...]]]:
    """Yield (first element, elements, parts) of blocks of at most `block_bytes` of source data that make up `view`."""
    size = itemsize(view.parts[0][0].dtype)
    limit = max(block_bytes // size, 1)
    held = [found for tensor, places in view.parts for found in on_ranks(checkpoint, tensor, places)]
    for start in range(0, view.numel, limit):
        count = min(limit, view.numel - start)
        parts = [
            Part(rank, offset + there * size, target, rows, width, pitch)
            for rank, offset, places in held if places.here < start + count and places.last >= start
            for part in cut(places, (view.numel, ), (start, ), (count, ), (1, ))
            for target, there, rows, width, pitch in rows_of(part)
        ]  # yapf: disable
        yield start, count, tuple(sorted(parts, key=lambda part: (part.rank, part.offset)))


def _rows_within(rank: int, offset: int, run: Run, row: int, count: int, size: int) -> Part | None:
    """Return those rows of `run` that lie on rows row … row + count of the raster."""
    first, column = divmod(run.target, run.pitch)
    low, high = max(first, row), min(first + run.rows, row + count)
    if low >= high:
        return None
    return Part(rank, offset + (run.source + (low - first) * run.width) * size, (low - row) * run.pitch + column,
                high - low, run.width, run.pitch)


def _cut_lines(lines: Sequence[tuple[int, int, int, int]], numel: int, limit: int,
               size: int) -> Iterator[tuple[int, int, tuple[Part, ...]]]:
    """Cut consecutive lines (rank, byte offset, first element, elements) into blocks of `limit` elements."""
    position = 0
    for start in range(0, numel, limit):
        end = min(start + limit, numel)
        parts = []
        while position < len(lines):
            rank, offset, target, width = lines[position]
            low, high = max(target, start), min(target + width, end)
            if low < high:
                parts.append(Part(rank, offset + (low - target) * size, low - start, 1, high - low, high - low))
            if target + width > end:
                break
            position += 1
        yield start, end - start, tuple(parts)
