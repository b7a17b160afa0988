"""Read a merged model again and compare it with the shards, piece by piece.

This goes the other way round than the copying: each rank's block is laid over the tensor as numpy cuts it, so a fault
of the plan does not hide itself.
"""
import math
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from merger import MergeError
from merger.checkpoint import Checkpoint
from merger.companions import is_weight
from merger.copying import Sources, factors
from merger.direct import page_buffer
from merger.dtypes import NUMPY, itemsize
from merger.filenames import MODEL_STEM, weight_index
from merger.foreign.documents import read_object
from merger.foreign.files import Seen
from merger.foreign.text import printable
from merger.foreign.values import shown
from merger.lattice import Lattice
from merger.layout import Box
from merger.plan import BLOCK_BYTES, Output
from merger.safetensorsfile import MAX_HEADER, read_tensors
from merger.shardfile import damaged_records
from merger.views import View, on_ranks


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file: its type, shape (elements) and first byte in the file."""
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    seen: Seen = field(default_factory=Seen, compare=False)


def read_folder(folder: Path, stem: str = MODEL_STEM, seen: Seen | None = None) -> dict[str, Stored]:
    """Return the tensors of a model folder by name, from its index or its single file.

    Raises:
        MergeError: no weights, or a file that is missing or not whole.
    """
    index = folder / weight_index(stem)
    seen = seen or Seen()
    try:
        if index.is_file():
            names = sorted(set(read_object(index, seen, MAX_HEADER)["weight_map"].values()))
            for name in names:
                if not is_weight(name) or name.endswith(".json"):
                    raise MergeError(f"{index} names {shown(name)}, which is no file of weights beside it; merge again "
                                     "with --force")
        else:
            names = [f"{stem}.safetensors"]
        stored: dict[str, Stored] = {}
        for name in names:
            try:
                stored.update(read_header(folder / name, seen))
            except MergeError as error:
                raise MergeError(
                    str(error) if str(folder) in str(error) else f"{folder / name} {error}; merge again with "
                    "--force") from error
        return stored
    except FileNotFoundError as error:
        raise MergeError(
            f"no merged weights at {error.filename}; merge first, or name the folder with --save-dir") from None
    except MergeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MergeError(f"the weights in {folder} cannot be read: {printable(str(error), 200)}") from error


def read_header(path: Path, seen: Seen | None = None) -> dict[str, Stored]:
    """Return the tensors of one safetensors file by name.

    Raises:
        MergeError: the file ends early, or its header places a tensor where it does not fit.
    """
    seen = seen or Seen()
    with seen.descriptor(path) as fd:
        found, _ = read_tensors(path, fd, seen.identity(path).size, "merge again with --force")
    return {name: Stored(path, *place, seen) for name, place in found.items()}


def check_sources(checkpoint: Checkpoint, threads: int, progress: Callable[[int], None]) -> None:
    """Compare every record of the ranks' files with the CRC32 that torch stored beside it.

    Raises:
        MergeError: naming the file and the tensor whose bytes changed since they were written.
    """
    lock, stop = threading.Lock(), threading.Event()

    def step(count: int) -> None:
        if stop.is_set():
            raise CancelledError
        with lock:
            progress(count)

    def check(rank: int) -> None:
        path, records = checkpoint.path(rank), checkpoint.records(rank)
        for key in damaged_records(path, records, checkpoint.files.seen, step):
            begin, end = records[key].offset, records[key].offset + records[key].size
            name = next((name for name, tensor in checkpoint.tensors.items()
                         for holder, _, offset in checkpoint.places(tensor, every=True)
                         if holder == rank and begin <= offset < end), f"record {key}")
            raise MergeError(f"{path}: {name} has not the CRC32 that was stored with it; "
                             "its bytes changed after it was saved; copy it again")

    with ThreadPoolExecutor(threads) as pool:
        try:
            for _ in pool.map(check, checkpoint.files.paths):
                pass
        except BaseException:  # Ctrl-C too: the pool waits for its threads, so let them end
            stop.set()
            raise


def check_output(checkpoint: Checkpoint, outputs: Sequence[Output], stored: Mapping[str, Stored],
                 progress: Callable[[int], None]) -> None:
    """Compare every rank's block, replicas too, with the tensor in the output.

    Raises:
        MergeError: naming the tensor and the rank that differ.
    """
    expected = {output.name: output for output in outputs}
    for name in [
            *(name for name in stored if name not in expected), *(name for name in expected if name not in stored)
    ]:
        where = "the output, not in the checkpoint" if name in stored else "the checkpoint, not in the output"
        raise MergeError(f"{name} is in {where}; merge again with --force")
    buffer = page_buffer(BLOCK_BYTES)
    with Sources(checkpoint) as sources, _Maps() as maps:
        for output in outputs:
            there, source = stored[output.name], output.source
            if (there.dtype, there.shape) != (output.dtype, output.shape):
                raise MergeError(f"{output.name} should be {output.dtype} {list(output.shape)}, but {there.path} has "
                                 f"{there.dtype} {list(there.shape)}; merge again with --force")
            if output.view is not None:
                _compare_view(sources, output, output.view, there, maps, buffer)
                maps.forget(there.path)
                progress(output.nbytes)
                continue
            for rank, box, begin in checkpoint.places(source, every=True):
                if box.numel:
                    _compare(sources, output, there, maps, rank, box, begin, buffer)
            maps.forget(there.path)
            progress(output.nbytes)


class _Maps:
    """The output files, mapped; their pages are given back after each tensor."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def __enter__(self) -> "_Maps":
        return self

    def __exit__(self, *_: object) -> None:
        self._maps.clear()

    def view(self, stored: Stored) -> np.ndarray:
        """Return `stored` as an array of its shape."""
        if stored.path not in self._maps:
            with stored.seen.descriptor(stored.path) as fd:
                self._maps[stored.path] = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        count = math.prod(stored.shape)
        flat = np.frombuffer(self._maps[stored.path], NUMPY[stored.dtype], count, stored.offset) if count else np.empty(
            0, NUMPY[stored.dtype])
        return flat.reshape(stored.shape)

    def forget(self, path: Path) -> None:
        """Let go of the pages read so far."""
        if path in self._maps and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[path].madvise(mmap.MADV_DONTNEED)


def _compare(sources: Sources, output: Output, stored: Stored, maps: _Maps, rank: int, box: Box, begin: int,
             buffer: np.ndarray) -> None:
    source = output.source
    whole = maps.view(stored)
    size = itemsize(source.dtype)
    for position, part in slabs(box, BLOCK_BYTES // size):
        data = sources.read(rank, begin + position * size, part.numel * size, buffer)
        values = data.view(NUMPY[source.dtype]).reshape(part.shape)
        found = whole[part.slices]
        with np.errstate(over="ignore", invalid="ignore"):
            if output.fusion is None:
                same = _bits(values.astype(NUMPY[output.dtype])) == _bits(found)
            else:
                a, b = factors(sources, output.fusion.a, output.fusion.b)
                same = is_fused(found, values, a[:, part.slices[1]], b[part.slices[0]], output.fusion.scale)
        if not same.all():
            raise MergeError(f"{output.name} in {stored.path} differs from {sources.checkpoint.piece_of(rank)} in "
                             f"{int(np.size(same) - np.count_nonzero(same))} elements of the block at "
                             f"{list(part.start)}; merge again with --force")


def _compare_view(sources: Sources, output: Output, view: View, stored: Stored, maps: _Maps,
                  buffer: np.ndarray) -> None:
    """Compare a view with every rank's piece of what it is made of, in the order of the pieces' elements."""
    whole = maps.view(stored).reshape(-1)
    size, dtype = itemsize(output.source.dtype), NUMPY[output.source.dtype]
    for tensor, places in view.parts:
        for rank, begin, held in on_ranks(sources.checkpoint, tensor, places, every=True):
            for part in pieces_of(held.turned(), BLOCK_BYTES // size):
                data = sources.read(rank, begin + part.here * size, (part.last - part.here + 1) * size, buffer)
                values = _strided(data.view(dtype), [(count, here) for count, here, _ in part.dims])
                found = _strided(whole[part.there:], [(count, there) for count, _, there in part.dims])
                with np.errstate(over="ignore", invalid="ignore"):
                    same = _bits(values.astype(found.dtype)) == _bits(found)
                if not same.all():
                    raise MergeError(
                        f"{output.name} in {stored.path} differs from {sources.checkpoint.piece_of(rank)} of {tensor.name} in "
                        f"{int(np.size(same) - np.count_nonzero(same))} elements; merge again with --force")


def _strided(values: np.ndarray, dims: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return those of `values` that lie, from the first on, (extent, step in elements) apart along each dimension."""
    shape, steps = tuple(count for count, _ in dims), tuple(step * values.itemsize for _, step in dims)
    return np.lib.stride_tricks.as_strided(values, shape, steps)


def pieces_of(places: Lattice, limit: int) -> Iterator[Lattice]:
    """Cut `places` into parts that reach over at most `limit` elements here."""
    dims = sorted(places.dims, key=lambda dim: -dim[1])
    if places.last - places.here < limit or not dims:
        yield Lattice(places.here, places.there, tuple(dims))
        return
    (count, here, there), *rest = dims
    below = sum((n - 1) * step for n, step, _ in rest)
    fit = max((limit - 1 - below) // here + 1, 1)
    for first in range(0, count, fit):
        some = ((min(fit, count - first), here, there), *rest) if fit > 1 else tuple(rest)
        yield from pieces_of(Lattice(places.here + first * here, places.there + first * there, some), limit)


def is_fused(found: np.ndarray, weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """Return for each element of `found`, in the output's type, True if it is one that weight + scale * (b @ a) may give.

    A float32 sum of r products is off by at most (r + 2) * 2^-24 of the sum of their magnitudes, in whatever order it
    is taken (Higham, Accuracy and Stability of Numerical Algorithms, 3.1): twice that, as there are two of them here.
    Rounding to the output's type is monotonic, so what lies between the rounded ends is right.
    """
    weight, scale32 = weight.astype(np.float32), np.float32(scale)
    wanted = weight + scale32 * (b @ a)
    slack = np.abs(weight) + np.abs(scale32) * (np.abs(b) @ np.abs(a))
    slack *= np.float32((len(a) + 3) * 2.0**-23)
    low, exact, high = (values.astype(found.dtype) for values in (wanted - slack, wanted, wanted + slack))
    right: np.ndarray = ((low <= found) & (found <= high)) | (found == exact) | (np.isnan(found) & np.isnan(exact))
    return right


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.itemsize}") if values.ndim else values.reshape(1).view(
        f"u{values.itemsize}")


def slabs(box: Box, limit: int) -> Iterator[tuple[int, Box]]:
    """Cut a block into consecutive parts of at most `limit` elements; yield (elements before it, part)."""
    if box.numel <= limit:
        yield 0, box
        return
    dim = next(dim for dim, extent in enumerate(box.shape) if extent > 1)
    inner = math.prod(box.shape[dim + 1:])
    step = max(limit // inner, 1)
    for first in range(0, box.shape[dim], step):
        count = min(step, box.shape[dim] - first)
        part = Box(tuple(a + (first if d == dim else 0) for d, a in enumerate(box.start)),
                   tuple(count if d == dim else n for d, n in enumerate(box.shape)))
        for position, smaller in slabs(part, limit):
            yield first * inner + position, smaller
