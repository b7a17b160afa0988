"""Stream blocks from the ranks' files into the output: read, cast, write in place.

Memory is two or three buffers of `plan.BLOCK_BYTES` a thread, whatever the model's size.
"""
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from merger import MergeError
from merger.checkpoint import Checkpoint, Tensor
from merger.dtypes import CONVERTED, NUMPY, itemsize
from merger.plan import BLOCK_BYTES, Block, OutputFile, Part, all_blocks, nonfinite, tensor_blocks

FLUSH_BYTES = 64 << 20  # written back to disk while the copying goes on, so that the last fsync has little to do

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


class Sources:
    """The ranks' files, open for reading at any place by any thread."""

    def __init__(self, checkpoint: Checkpoint, drop_cache: bool = False) -> None:
        self.checkpoint = checkpoint
        self.drop_cache = drop_cache and hasattr(os, "posix_fadvise")
        self._fds: dict[int, int] = {}

    def __enter__(self) -> "Sources":
        _raise_file_limit(len(self.checkpoint.files.paths) + 64)
        for rank, path in self.checkpoint.files.paths.items():
            self._fds[rank] = os.open(path, os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fds[rank], 0, 0, os.POSIX_FADV_SEQUENTIAL)
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
        if self.drop_cache:
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
        if output.fusion is not None:
            values = fused(block, values, self.sources)
        if values.dtype != target_type:
            target = self._target[:block.numel * target_type.itemsize].view(target_type)
            with np.errstate(over="ignore", invalid="ignore"):
                np.copyto(target, values, casting="unsafe")
            values = target
        return values, read, nonfinite(values) if output.dtype in CONVERTED else (0, 0)


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


def copy_blocks(blocks: Iterator[Block], make_converter: Callable[[], Converter], fds: Mapping[int, int], threads: int,
                progress: Progress) -> Tally:
    """Copy `blocks` into the output files `fds` (by number) with `threads` threads.

    Raises:
        MergeError, OSError: the first fault of any thread; the others stop at their next block.
    """
    tally, lock, stop = Tally(), threading.Lock(), threading.Event()
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


class Flusher:
    """Write the files' data back to disk in the background while they are being written."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = fds
        self._wake = threading.Event()
        self._done = False
        self._pending = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Flusher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done = True
        self._wake.set()
        self._thread.join()

    def wrote(self, count: int) -> None:
        """Note that `count` more bytes wait to be written back."""
        self._pending += count
        if self._pending >= FLUSH_BYTES:
            self._pending = 0
            self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._done:
                return
            for fd in self._fds:
                try:
                    os.fdatasync(fd)
                except OSError:
                    return  # the closing fsync meets the same fault and reports it


def default_threads() -> int:
    """Return the copying threads that keep a disk busy: one a core, two to four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores, 2), 4)


def write_files(checkpoint: Checkpoint,
                files: Sequence[OutputFile],
                folder: Path,
                threads: int,
                progress: Progress,
                drop_cache: bool = False,
                converter: Callable[[Sources], Converter] = HostConverter) -> Tally:
    """Write `files` into `folder` and flush them to disk.

    Raises:
        MergeError, OSError: a source became shorter; no space, no permission.
    """
    fds = {}
    try:
        for number, file in enumerate(files):
            fds[number] = os.open(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.ftruncate(fds[number], file.size)
            write_at(fds[number], np.frombuffer(file.header, np.uint8), 0)
        with Sources(checkpoint, drop_cache) as sources, Flusher(list(fds.values())) as flusher:

            def step(count: int) -> None:
                flusher.wrote(count)
                progress(count)

            tally = copy_blocks(all_blocks(checkpoint, files), lambda: converter(sources), fds, threads, step)
        for fd in fds.values():
            os.fsync(fd)
            if drop_cache and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return tally
    finally:
        for fd in fds.values():
            os.close(fd)


def same_bytes(checkpoint: Checkpoint, a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors of one shape and type have equal bytes."""
    with Sources(checkpoint) as sources:
        left, right, scratch = (np.empty(BLOCK_BYTES, np.uint8) for _ in range(3))
        size = itemsize(a.dtype)
        for (_, numel, here), (_, _, there) in zip(tensor_blocks(checkpoint, a),
                                                   tensor_blocks(checkpoint, b),
                                                   strict=True):
            ours, theirs = left[:numel * size].view(NUMPY[a.dtype]), right[:numel * size].view(NUMPY[b.dtype])
            sources.read_parts(here, ours, scratch)
            sources.read_parts(there, theirs, scratch)
            if not np.array_equal(ours.view(np.uint8), theirs.view(np.uint8)):
                return False
    return True


def _raise_file_limit(needed: int) -> None:
    try:
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < needed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard) if hard > 0 else needed, hard))
    except (ImportError, ValueError, OSError):
        return  # opening the files says it better


def available_memory() -> int:
    """Return the bytes that programs could take without swapping, page cache included; 0 where unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class Prefetch:
    """Read the files ahead into the page cache while the config check keeps the copying waiting.

    It stops at a quarter of the available memory, where it would begin to evict what it has read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._budget = available_memory() // 4
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Prefetch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        scratch = np.empty(BLOCK_BYTES // 2, np.uint8)
        sizes = self._checkpoint.sizes
        try:
            with Sources(self._checkpoint) as sources:
                for offset in range(0, max(sizes.values()), scratch.nbytes):
                    for rank, size in sizes.items():
                        count = min(scratch.nbytes, size - offset)
                        self._budget -= count
                        if self._stop.is_set() or self._budget < 0:
                            return
                        if count > 0:
                            sources.read_into(rank, offset, scratch[:count])
        except (OSError, MergeError):
            return  # the copying meets the same fault and reports it
