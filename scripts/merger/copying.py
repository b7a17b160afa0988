"""Stream blocks from the ranks' files into the output: read, cast, write in place.

Memory is two or three buffers of `plan.BLOCK_BYTES` a thread, whatever the model's size.
"""
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from merger import MergeError
from merger.checkpoint import Checkpoint, Tensor
from merger.dtypes import NUMPY
from merger.plan import BLOCK_BYTES, Block, OutputFile, Part, all_blocks, tensor_blocks

FLUSH_BYTES = 64 << 20
CACHED_ELEMENTS = 1 << 17  # cast and looked at while they are in the processor's cache
EXPONENT: dict[str, np.unsignedinteger[Any]] = {
    "bfloat16": np.uint16(0x7F80),
    "float16": np.uint16(0x7C00),
    "float32": np.uint32(0x7F800000),
    "float64": np.uint64(0x7FF0000000000000)
}

Progress = Callable[[int], None]


@dataclass
class Tally:
    """What the copying saw: bytes read and written, NaN and infinite elements by tensor."""
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
    """Tell whether most of a file of `size` bytes is in the page cache, by a few reads that do not wait for the disk."""
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

    What was in the page cache stays there; the files that were not are dropped again behind the reading. That spares
    the kernel gigabytes of fresh pages, which can cost more time than the disk does.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._fds: dict[int, int] = {}
        self._dropped: set[int] = set()

    def __enter__(self) -> "Sources":
        _raise_file_limit(len(self.checkpoint.files.paths) + 64)
        for rank, path in self.checkpoint.files.paths.items():
            self._fds[rank] = os.open(path, os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fds[rank], 0, 0, os.POSIX_FADV_SEQUENTIAL)
                if not is_cached(self._fds[rank], self.checkpoint.sizes[rank]):
                    self._dropped.add(rank)
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def read_into(self, rank: int, offset: int, target: np.ndarray) -> None:
        """Fill `target` (bytes) from `rank`'s file, from byte `offset` on.

        Raises:
            MergeError: the file ends before, as it was cut while being read.
        """
        view, fd, done = target.data, self._fds[rank], 0
        while done < len(view):
            count = os.preadv(fd, [view[done:]], offset + done)
            if count == 0:
                raise MergeError(f"{self.checkpoint.path(rank)} became shorter while it was read")
            done += count
        if rank in self._dropped:
            os.posix_fadvise(fd, offset, done, os.POSIX_FADV_DONTNEED)

    def read_parts(self, parts: Sequence[Part], values: np.ndarray, scratch: np.ndarray) -> int:
        """Fill `values` (elements of a block) from `parts`; return the bytes read. `scratch` holds as many bytes."""
        total = 0
        for part in parts:
            count = part.rows * part.width
            total += count * values.itemsize
            if part.rows == 1 or part.width == part.pitch:
                target = values[part.target:part.target + count]
                self.read_into(part.rank, part.offset, target.view(np.uint8))
                continue
            rows = scratch[:count * values.itemsize]
            self.read_into(part.rank, part.offset, rows)
            first, column = divmod(part.target, part.pitch)
            raster = values.reshape(-1, part.pitch)
            raster[first:first + part.rows,
                   column:column + part.width] = rows.view(values.dtype).reshape(part.rows, part.width)
        return total

    def read_tensor(self, tensor: Tensor) -> np.ndarray:
        """Return a whole (small) tensor, of its own shape and type."""
        values = np.empty(tensor.numel, NUMPY[tensor.dtype])
        scratch = np.empty(max(tensor.nbytes, 1), np.uint8)
        for start, numel, parts in tensor_blocks(self.checkpoint, tensor):
            self.read_parts(parts, values[start:start + numel], scratch)
        return values.reshape(tensor.shape)


class Converter(Protocol):
    """Reads a block and gives its elements in the output's type; each copying thread has one of its own."""

    def convert(self, block: Block) -> tuple[np.ndarray, int, tuple[int, int]]:
        """Return (elements, bytes read, (NaN, infinite) counts); the elements live until the next call."""


class HostConverter:
    """Converts on the CPU. Rounding is to nearest, ties to even, as torch's; a NaN keeps its sign only."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._grow(BLOCK_BYTES)

    def _grow(self, nbytes: int) -> None:
        self._source = np.empty(nbytes, np.uint8)
        self._scratch = np.empty(nbytes, np.uint8)
        self._target = np.empty(nbytes, np.uint8)

    def convert(self, block: Block) -> tuple[np.ndarray, int, tuple[int, int]]:
        """See `Converter`."""
        output = block.output
        source_type, target_type = NUMPY[output.source.dtype], NUMPY[output.dtype]
        needed = block.numel * max(source_type.itemsize, target_type.itemsize)
        if needed > self._source.nbytes:  # a wider output type, or a row of a fused weight longer than a block
            self._grow(needed)
        values = self._source[:block.numel * source_type.itemsize].view(source_type)
        read = self.sources.read_parts(block.parts, values, self._scratch)
        for twin, parts in zip(output.twins, block.twin_parts, strict=True):
            read += self._check_twin(output.name, twin.name, parts, values)
        if output.fusion is not None:
            values = fused(block, values, self.sources)
        if values.dtype == target_type:
            finite = output.dtype not in EXPONENT or self._finite(values)
        else:
            target, finite = self._target[:block.numel * target_type.itemsize].view(target_type), True
            with np.errstate(over="ignore", invalid="ignore"):
                for start in range(0, block.numel, CACHED_ELEMENTS):
                    part = target[start:start + CACHED_ELEMENTS]
                    np.copyto(part, values[start:start + CACHED_ELEMENTS], casting="unsafe")
                    finite = finite and self._finite(part)
            values = target
        return values, read, (0, 0) if finite else count_nonfinite(values)

    def _finite(self, values: np.ndarray) -> bool:
        """Tell whether all elements are finite: whether no exponent is all ones (IEEE 754)."""
        exponent = EXPONENT[values.dtype.name]
        for start in range(0, len(values), CACHED_ELEMENTS):
            bits = values[start:start + CACHED_ELEMENTS].view(exponent.dtype)
            scratch = self._scratch[:bits.nbytes].view(bits.dtype)
            if np.bitwise_and(bits, exponent, out=scratch).max(initial=0) == exponent:
                return False
        return True

    def _check_twin(self, name: str, copy: str, parts: Sequence[Part], values: np.ndarray) -> int:
        """Compare a block of a tied tensor with that of a copy, which is left out; return the bytes read."""
        twin = self._target[:values.nbytes].view(values.dtype)
        read = self.sources.read_parts(parts, twin, self._scratch)
        if not np.array_equal(values.view(np.uint8), twin.view(np.uint8)):
            raise MergeError(
                f"the config ties {copy} to {name}, but their values differ; pass --tied-weights keep to save "
                "both and untie them in the config, or --tied-weights drop to save the first")
        return read


def count_nonfinite(values: np.ndarray) -> tuple[int, int]:
    """Return how many NaN and how many infinite elements a floating-point array has."""
    return int(np.isnan(values).sum()), int(np.isinf(values).sum())


def fused(block: Block, weight: np.ndarray, sources: Sources) -> np.ndarray:
    """Return `weight` + scale * (b @ a) in float32, for the rows of the block."""
    fusion, columns = block.output.fusion, block.output.source.shape[-1]
    assert fusion is not None
    a, b = _factors(sources, fusion.a, fusion.b)
    first, rows = block.start // columns, block.numel // columns
    delta = (b[first:first + rows] @ a) * np.float32(fusion.scale)
    return weight.astype(np.float32) + delta.reshape(-1)


@lru_cache(maxsize=4)
def _factors(sources: Sources, a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return sources.read_tensor(a).astype(np.float32), sources.read_tensor(b).astype(np.float32)


def write_at(fd: int, data: np.ndarray, offset: int) -> None:
    """Write all of `data` to `fd` from byte `offset` on."""
    view, done = data.view(np.uint8).data, 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def copy_blocks(blocks: Iterator[Block], make_converter: Callable[[], Converter], fds: Sequence[int], threads: int,
                progress: Progress) -> Tally:
    """Copy `blocks` into the output files `fds` (by number) with `threads` threads.

    Raises:
        MergeError, OSError: the first fault of any thread; the others stop at their next block.
    """
    tally, lock, stop, cache = Tally(), threading.Lock(), threading.Event(), CacheKeeper()
    faults: list[BaseException] = []

    def work() -> None:
        try:
            converter = make_converter()
            while not stop.is_set():
                with lock:
                    block = next(blocks, None)
                if block is None:
                    return
                values, read, counts = converter.convert(block)
                write_at(fds[block.file], values, block.offset)
                with lock:
                    tally.add(block, read, values.nbytes, counts)
                    cache.wrote(fds[block.file], values.nbytes)
                    progress(values.nbytes)
        except BaseException as error:
            faults.append(error)
            stop.set()

    run_threads(work, threads, stop)
    if faults:
        raise faults[0]
    return tally


def run_threads(work: Callable[[], None], threads: int, stop: threading.Event) -> None:
    """Run `work` in `threads` threads; set `stop` when the user interrupts."""
    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except BaseException:
        stop.set()
        for worker in workers:
            worker.join()
        raise


class CacheKeeper:
    """Start writing the output back while it grows, and give its page cache back.

    Without this the kernel allocates fresh memory for gigabytes that nobody reads soon, which can take longer than the
    writing, and the last fsync waits for all of it.
    """

    def __init__(self) -> None:
        self._pending: dict[int, int] = {}

    def wrote(self, fd: int, count: int) -> None:
        """Note that `count` more bytes of file `fd` were written."""
        self._pending[fd] = self._pending.get(fd, 0) + count
        if self._pending[fd] >= FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            self._pending[fd] = 0
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # queues dirty pages, drops clean ones


def default_threads() -> int:
    """Return the copying threads that keep a disk busy: one a core, two to four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores, 2), 4)


def write_files(checkpoint: Checkpoint,
                files: Sequence[OutputFile],
                folder: Path,
                threads: int,
                progress: Progress,
                converter: Callable[[Sources], Converter] = HostConverter) -> Tally:
    """Write `files` into `folder` and flush them to disk.

    Raises:
        MergeError, OSError: a source became shorter, tied weights differ; no space, no permission.
    """
    fds: list[int] = []
    try:
        for file in files:
            fds.append(os.open(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
            os.ftruncate(fds[-1], file.size)
            write_at(fds[-1], np.frombuffer(file.header, np.uint8), 0)
        with Sources(checkpoint) as sources:
            tally = copy_blocks(all_blocks(checkpoint, files), lambda: converter(sources), fds, threads, progress)
        for fd in fds:
            os.fsync(fd)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return tally
    finally:
        for fd in fds:
            os.close(fd)


def _raise_file_limit(needed: int) -> None:
    try:
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard) if hard > 0 else needed, hard))
    except (ImportError, ValueError, OSError):
        return  # opening the files says it better
