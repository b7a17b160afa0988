"""Stream blocks from the ranks' files into the output: read, cast, write in place.

Memory is two or three buffers of `plan.BLOCK_BYTES` a thread, whatever the model's size.
"""
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from merger import MergeError
from merger.checkpoint import Checkpoint, Tensor
from merger.crew import Crew
from merger.direct import PAGE, OutputStream, open_direct, page_buffer, read_pages
from merger.dtypes import NUMPY
from merger.plan import BLOCK_BYTES, SMALL_BYTES, Block, OutputFile, Part, all_blocks, tensor_blocks

CACHED_ELEMENTS = 1 << 17  # cast and looked at while they are in the processor's cache
AHEAD = 128 << 10  # bytes that Linux fetches ahead by default; it ignores what is asked for beyond
EXPONENT: dict[str, np.unsignedinteger[Any]] = {
    "bfloat16": np.uint16(0x7F80),
    "float16": np.uint16(0x7C00),
    "float32": np.uint32(0x7F800000),
    "float64": np.uint64(0x7FF0000000000000),
    "float8_e5m2": np.uint8(0x7C),
    "float8_e4m3fn": np.uint8(0x7F),  # no infinity; NaN has all ones behind the sign
}

Progress = Callable[[int], None]


@dataclass
class Tally:
    """What the copying saw: bytes read and written, NaN and infinite elements by tensor; and how many threads copied at last."""
    threads: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    nan: dict[str, int] = field(default_factory=dict)
    inf: dict[str, int] = field(default_factory=dict)

    def add(self, block: Block, read: int, written: int, counts: tuple[int, int]) -> None:
        """Add one block's figures."""
        self.bytes_read += read
        self.bytes_written += written
        for kind, count in zip((self.nan, self.inf), counts, strict=True):
            if count:
                kind[block.output.name] = kind.get(block.output.name, 0) + count


def is_cached(fd: int, size: int) -> bool:
    """Return True if most of a file of `size` bytes is in the page cache, by a few reads that do not wait for the disk."""
    samples, hits = 8, 0
    for number in range(samples):
        try:
            hits += os.preadv(fd, [bytearray(1)], size * number // samples, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except (OSError, AttributeError):  # a file system or a system that cannot tell
            return False
    return hits > samples // 2


class Sources:
    """The ranks' files, open for reading at any place by any thread.

    Files in the page cache are read from there. Those that are not are read around it, or where that cannot be are
    dropped from it again behind the reading.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._fds: dict[int, int] = {}
        self._direct: dict[int, int] = {}
        self._dropped: set[int] = set()

    def __enter__(self) -> "Sources":
        for rank, path in self.checkpoint.files.paths.items():
            seen = self.checkpoint.files.seen
            fd = self._fds[rank] = seen.open(path)
            if is_cached(fd, self.checkpoint.sizes[rank]):
                continue
            if (direct := open_direct(path, os.O_RDONLY)) is not None:
                self._direct[rank] = direct
                seen.compare(path, direct)
            elif hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                self._dropped.add(rank)
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (*self._fds.values(), *self._direct.values()):
            os.close(fd)

    def read(self, rank: int, offset: int, nbytes: int, buffer: np.ndarray) -> np.ndarray:
        """Return `nbytes` bytes of `rank`'s file from byte `offset` on; they lie in `buffer`, a `page_buffer`.

        Raises:
            MergeError: the file ends before, as it was cut while being read.
        """
        self._ask(rank, offset, nbytes)
        data = buffer[offset % PAGE:][:nbytes]
        view, fd = data.data, self._fds[rank]
        done = read_pages(self._direct[rank], offset, nbytes, buffer) if rank in self._direct else 0
        while done < nbytes:
            count = os.preadv(fd, [view[done:]], offset + done)
            if count == 0:
                raise MergeError(f"{self.checkpoint.path(rank)} became shorter while it was read")
            done += count
        if rank in self._dropped:
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        return data

    def rows(self, parts: Sequence[Part], dtype: np.dtype, buffer: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
        """Yield each part with its elements, (rows, width), which live in `buffer` until the next."""
        for part in parts[1:]:
            self._ask(part.rank, part.offset, part.rows * part.width * dtype.itemsize)
        for part in parts:
            data = self.read(part.rank, part.offset, part.rows * part.width * dtype.itemsize, buffer)
            yield part, data.view(dtype).reshape(part.rows, part.width)

    def _ask(self, rank: int, offset: int, nbytes: int) -> None:
        """Let the system fetch bytes at once: a read fetches them in small steps, and a network answers each late."""
        if rank in self._dropped:
            for start in range(offset, offset + nbytes, AHEAD):
                step = min(AHEAD, offset + nbytes - start)
                os.posix_fadvise(self._fds[rank], start, step, os.POSIX_FADV_WILLNEED)

    def read_parts(self, parts: Sequence[Part], values: np.ndarray, buffer: np.ndarray) -> int:
        """Fill `values` (elements of a block) from `parts`; return the bytes read."""
        total = 0
        for part, rows in self.rows(parts, values.dtype, buffer):
            part.within(values)[...] = rows
            total += rows.nbytes
        return total

    def read_tensor(self, tensor: Tensor) -> np.ndarray:
        """Return a whole (small) tensor, of its own shape and type."""
        values, buffer = np.empty(tensor.numel, NUMPY[tensor.dtype]), page_buffer(tensor.nbytes)
        for start, numel, parts in tensor_blocks(self.checkpoint, tensor):
            self.read_parts(parts, values[start:start + numel], buffer)
        return values.reshape(tensor.shape)


class Converter(Protocol):
    """Reads a block and gives its elements in the output's type; each copying thread has one of its own."""

    def convert(self, block: Block) -> tuple[np.ndarray, int, tuple[int, int]]:
        """Return (elements, bytes read, (NaN, infinite) counts); the elements live until the next call."""


class HostConverter:
    """Converts on the CPU. Rounding is to nearest, ties to even, as torch's; a NaN keeps its sign only."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._grow(SMALL_BYTES)

    def _grow(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._buffer, self._target = page_buffer(nbytes), page_buffer(nbytes)
        self._whole, self._scratch = np.empty(nbytes, np.uint8), np.empty(nbytes, np.uint8)  # touched where needed

    def convert(self, block: Block) -> tuple[np.ndarray, int, tuple[int, int]]:
        """See `Converter`."""
        output, read, finite = block.output, 0, True
        source_type, target_type = NUMPY[output.source.dtype], NUMPY[output.dtype]
        needed = block.numel * max(source_type.itemsize, target_type.itemsize)
        if needed > self._nbytes:
            self._grow(max(needed, 2 * self._nbytes))
        target = self._target[block.offset % PAGE:][:block.numel * target_type.itemsize].view(target_type)
        if output.fusion is not None or output.twins:
            values, read = self._read_whole(block)
            finite = self._cast(values, target)
        else:
            for part, rows in self.sources.rows(block.parts, source_type, self._buffer):
                finite = self._cast(rows, part.within(target)) and finite
                read += rows.nbytes
        return target, read, (0, 0) if finite else count_nonfinite(target)

    def _cast(self, values: np.ndarray, target: np.ndarray) -> bool:
        """Cast `values` into `target`, of the same shape; return True if all elements are finite there."""
        if target.flags.c_contiguous:
            values, target = values.reshape(-1), target.reshape(-1)
        step, finite = max(CACHED_ELEMENTS // math.prod(target.shape[1:]), 1), True
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(target), step):
                part = target[start:start + step]
                np.copyto(part, values[start:start + step], casting="unsafe")
                finite = finite and self._finite(part)
        return finite

    def _finite(self, values: np.ndarray) -> bool:
        """Return True if all elements are finite: whether no exponent is all ones (IEEE 754)."""
        exponent = EXPONENT.get(values.dtype.name)
        if exponent is None:
            return True
        scratch = self._scratch[:values.nbytes].view(exponent.dtype).reshape(values.shape)
        return bool(np.bitwise_and(values.view(exponent.dtype), exponent, out=scratch).max() != exponent)

    def _read_whole(self, block: Block) -> tuple[np.ndarray, int]:
        """Return the elements of a block that tied copies must equal or that LoRA adds to, and the bytes read."""
        dtype = NUMPY[block.output.source.dtype]
        bits = np.dtype(f"u{dtype.itemsize}")
        values = self._whole[:block.numel * dtype.itemsize].view(dtype)
        read = self.sources.read_parts(block.parts, values, self._buffer)
        for twin, parts in zip(block.output.twins, block.twin_parts, strict=True):
            for part, rows in self.sources.rows(parts, dtype, self._buffer):
                if not np.array_equal(part.within(values).view(bits), rows.view(bits)):
                    raise MergeError(f"the config ties {twin.name} to {block.output.name}, but their values differ; "
                                     "pass --tied-weights keep to save both and untie them in the config, or "
                                     "--tied-weights drop to save the first")
                read += rows.nbytes
        return values if block.output.fusion is None else fused(block, values, self.sources), read


def count_nonfinite(values: np.ndarray) -> tuple[int, int]:
    """Return how many NaN and how many infinite elements a floating-point array has."""
    return int(np.isnan(values).sum()), int(np.isinf(values).sum())


def fused(block: Block, weight: np.ndarray, sources: Sources) -> np.ndarray:
    """Return `weight` + scale * (b @ a) in float32, for the rows of the block."""
    fusion, columns = block.output.fusion, block.output.source.shape[-1]
    assert fusion is not None
    a, b = factors(sources, fusion.a, fusion.b)
    first, rows = block.start // columns, block.numel // columns
    delta: np.ndarray = (b[first:first + rows] @ a) * np.float32(fusion.scale)
    total: np.ndarray = weight.astype(np.float32) + delta.reshape(-1)
    return total


@lru_cache(maxsize=4)
def factors(sources: Sources, a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return two LoRA matrices in float32; all blocks of a weight need them whole."""
    return sources.read_tensor(a).astype(np.float32), sources.read_tensor(b).astype(np.float32)


def copy_blocks(blocks: Iterator[Block], make_converter: Callable[[], Converter], streams: Sequence[OutputStream],
                crew: Crew, progress: Progress) -> Tally:
    """Copy `blocks` into the output files `streams` (by number) with the threads of `crew`.

    Raises:
        MergeError, OSError: the first fault of any thread; the others stop at their next block.
    """
    tally, lock, stop = Tally(), threading.Lock(), threading.Event()
    faults: list[BaseException] = []
    workers: list[threading.Thread] = []

    def work(number: int) -> None:
        try:
            converter = make_converter()
            while not stop.is_set() and number < crew.size:
                with lock:
                    block = next(blocks, None)
                if block is None:
                    return
                values, read, counts = converter.convert(block)
                streams[block.file].write(values, block.offset)
                with lock:
                    tally.add(block, read, values.nbytes, counts)
                    crew.count(read, len(block.parts))
                    enlist()
                    progress(values.nbytes)
        except BaseException as error:
            faults.append(error)
            stop.set()

    def enlist() -> None:
        while len(workers) < crew.size and not stop.is_set():
            worker = threading.Thread(target=work, args=(len(workers), ), daemon=True)
            try:
                worker.start()
            except RuntimeError:  # a container's limit, say; those that there are will do
                if not workers:
                    raise
                return crew.settle(len(workers))
            workers.append(worker)

    try:
        with lock:
            enlist()
        for worker in workers:  # it may grow meanwhile, but not after its last thread has ended
            worker.join()
    except BaseException:  # Ctrl-C
        stop.set()
        with lock:
            begun = list(workers)
        for worker in begun:
            worker.join()
        raise
    if faults:
        raise faults[0]
    tally.threads = crew.size
    return tally


def write_files(checkpoint: Checkpoint,
                files: Sequence[OutputFile],
                folder: Path,
                threads: int,
                progress: Progress,
                converter: Callable[[Sources], Converter] = HostConverter,
                bytes_now: Callable[[], int] = lambda: BLOCK_BYTES) -> Tally:
    """Write `files` into `folder` and flush them to disk; `bytes_now` is that of `all_blocks`.

    Args:
        threads: how many copy; 0 for as many as pay.

    Raises:
        MergeError, OSError: a source became shorter, tied weights differ; no space, no permission.
    """
    with ExitStack() as stack:
        streams = [stack.enter_context(OutputStream(folder / file.name, file.size)) for file in files]
        for file, stream in zip(files, streams, strict=True):
            stream.write(np.frombuffer(file.header, np.uint8), 0)
        sources = stack.enter_context(Sources(checkpoint))
        crew = Crew(threads)
        blocks = all_blocks(checkpoint, files, lambda: min(bytes_now(), crew.block_bytes))
        tally = copy_blocks(blocks, lambda: converter(sources), streams, crew, progress)
        for stream in streams:
            stream.flush()
        return tally
