"""A sharded checkpoint as one thing: its tensors, and where in the ranks' files their pieces lie.

Every check that needs no tensor bytes is made here: the ranks agree with each other, each file is the rank that its
name says, and the pieces tile every tensor.
"""
import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from merger import MergeError
from merger.chunks import Chunks, read_chunks
from merger.discover import RankFiles, earlier_whole
from merger.dtypes import itemsize
from merger.filenames import DCP, RANKS, SHARD_FILE, SHARDED
from merger.foreign.archives import Record
from merger.foreign.limits import each
from merger.layout import Box, tiling_fault
from merger.shardfile import read_shard_file
from merger.steps import check_one_step
from merger.torchforms import Entry, mesh_sizes, read_entries


@dataclass(frozen=True)
class Layout:
    """How a tensor lies on the ranks; tensors of one shape and placement share it.

    Attributes:
        holders: the block that each rank holds, replicas and empty ones too.
        pieces: of those, one holder of each block that has elements: what is read.
        replicas: the ranks that hold the same block, for each block that several hold.
    """
    holders: tuple[tuple[int, Box], ...]
    pieces: tuple[tuple[int, Box], ...]
    replicas: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the checkpoint: its element type, global shape (elements), layout, and its number in the files.

    It is `plain` where no mesh is said to hold it, as of buffers.
    """
    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: Layout
    index: int
    description: str
    plain: bool = False

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor, as stored."""
        return self.numel * itemsize(self.dtype)


class Checkpoint:
    """All ranks' files as one set of tensors.

    Attributes:
        files: the ranks' files.
        tensors: by name, in the order of the files.
        sizes: bytes of each rank's file.
        meshes: the meshes that the tensors lie on, as {dimension: size}.
        notes: what the user should know.
        taken: tensors of which the ranks' copies differ, and whose is taken.
    """

    def __init__(self, files: RankFiles, tensors: dict[str, Tensor], offsets: dict[int, np.ndarray],
                 sizes: dict[int, int], meshes: list[dict[str, int]]) -> None:
        self.files = files
        self.tensors = tensors
        self.sizes = sizes
        self.meshes = meshes
        self.notes = list(files.notes)
        self.taken: dict[str, int] = {}
        self._offsets = offsets

    def places(self, tensor: Tensor, every: bool = False) -> Iterator[tuple[int, Box, int]]:
        """Yield (rank, block, byte of the rank's file) of the blocks that are read, or with `every` of all holders."""
        for rank, box in tensor.layout.holders if every else tensor.layout.pieces:
            yield rank, box, int(self._offsets[rank][tensor.index])

    def records(self, rank: int) -> Mapping[str, Record]:
        """Return the places of `rank`'s file of which it names a CRC32, by key."""
        return read_shard_file(self.path(rank), None, self.files.seen).records

    def piece_of(self, rank: int) -> str:
        """Return what holds a piece in the file of `rank`, for a refusal."""
        return f"rank {rank}'s piece"

    def path(self, rank: int) -> Path:
        """Return the file of `rank`."""
        return self.files.paths[rank]


class ChunkCheckpoint(Checkpoint):
    """A distributed checkpoint of torch's: its files, by number, take the ranks' place, and one may hold several blocks.

    Attributes:
        parts: how many tensors each part of the training's state has, by the part's name.
        guessed: whether only a model's config can tell that no file is missing at the tensors' ends.
    """

    def __init__(self, files: RankFiles, chunks: Chunks) -> None:
        tensors, offsets = {}, {}
        self._records: dict[int, dict[str, Record]] = {}
        layouts: dict[Any, Layout] = {}
        for index, (name, (dtype, shape, pieces)) in enumerate(chunks.tensors.items()):
            holders = tuple((piece.file, piece.box) for piece in pieces)
            if (shape, holders) not in layouts:
                fault = tiling_fault(shape, (box for _, box in holders))
                if fault:
                    lost = "a file may be missing" if files.form == SHARDED else "the checkpoint is damaged"
                    raise MergeError(
                        f"{name} of shape {list(shape)} cannot be put together from {len(files.paths)} files in "
                        f"{files.folders[0]}: {fault}; {lost}{_gap(files)}")
                layouts[shape, holders] = Layout(holders, holders, ())
            offsets[index] = np.array([piece.offset for piece in pieces], dtype=np.int64)
            for piece in pieces:
                self._records.setdefault(piece.file, {})[str(piece.offset)] = piece.record
            description = f"{dtype} {list(shape)} in {len(pieces)} piece{'s' if len(pieces) != 1 else ''}"
            tensors[name] = Tensor(name, dtype, shape, layouts[shape, holders], index, description)
        sizes = {number: files.seen.identity(path).size for number, path in files.paths.items()}
        super().__init__(files, tensors, offsets, sizes, [])
        self.notes += chunks.notes
        self.parts, self.guessed = chunks.parts, chunks.guessed

    def places(self, tensor: Tensor, every: bool = False) -> Iterator[tuple[int, Box, int]]:
        """See `Checkpoint`."""
        for (number, box), offset in zip(tensor.layout.pieces, self._offsets[tensor.index], strict=True):
            yield number, box, int(offset)

    def records(self, rank: int) -> Mapping[str, Record]:
        """See `Checkpoint`."""
        return self._records.get(rank, {})


def _gap(files: RankFiles) -> str:
    """Return which of the numbered files is not there, as a part of a sentence."""
    found = {int(match[1]) for path in files.paths.values() if (match := SHARD_FILE.fullmatch(path.name))}
    absent = next((number for number in range(1, max(found, default=0)) if number not in found), None)
    return f": none begins with shard-{absent:05d}" if absent else ""


def read_checkpoint(files: RankFiles, allow_buffers: bool = False, model_key: str | None = None) -> Checkpoint:
    """Read the ranks' files as `_read` does, and name an earlier step that is whole where this one is not.

    Args:
        allow_buffers: take the lowest rank's of buffers that differ.
        model_key: of torch's own forms the part that is the model, such as `app.model`; None to choose it.

    Raises:
        MergeError: see `_read`.
    """
    if model_key is not None and files.form != DCP:
        raise MergeError(f"--model-key is for torch's distributed checkpoints; {files.folders[0]} holds {files.form}")
    try:
        if files.form != RANKS:
            return ChunkCheckpoint(files, read_chunks(files, model_key))
        checkpoint = _read(files, allow_buffers)
        checkpoint.notes += check_one_step(files)
        return checkpoint
    except MergeError as error:
        whole = earlier_whole(files.folders[0]) if any(fault in str(error) for fault in ("missing: ", "truncated",
                                                                                         "no .metadata")) else None
        if whole is None:
            raise
        raise MergeError(f"{error}; the step in {whole} is whole") from error


def _read(files: RankFiles, allow_buffers: bool) -> Checkpoint:
    """Read the directories and pickles of all rank files and check them against each other.

    Memory: one rank's pickle (about 3 KB a tensor) and 12 bytes a tensor and rank; of tensors, only copies are
    read that no checksum tells of. With `allow_buffers` those that differ are the lowest rank's.

    Raises:
        MergeError: naming the file and the tensor at fault.
    """
    first: dict[str, Entry] = {}
    first_path = Path()
    boxes: list[list[tuple[int, Box]]] = []
    interned: dict[tuple[int, Box], tuple[int, Box]] = {}  # thousands of tensors, a few dozen distinct blocks
    offsets, checksums, sizes = {}, {}, {}
    for rank, path, entries in read_ranks(files):
        if not first:
            first, first_path, boxes = entries, path, [[] for _ in entries]
        _check_agreement(first, first_path, entries, path)
        for index, name in enumerate(first):
            holder = (rank, entries[name].box)
            boxes[index].append(interned.setdefault(holder, holder))
        offsets[rank] = np.array([entries[name].offset for name in first], dtype=np.int64)
        checksums[rank] = np.array([entries[name].crc for name in first], dtype=np.uint32)
        sizes[rank] = files.seen.identity(path).size
    layouts: dict[Any, Layout] = {}
    tensors = {}
    for index, (name, entry) in enumerate(first.items()):
        holders = tuple(boxes[index])
        if (entry.shape, holders) not in layouts:
            layouts[entry.shape, holders] = _layout(name, entry.shape, holders, files)
        boxes[index] = []
        tensors[name] = Tensor(name, entry.dtype, entry.shape, layouts[entry.shape, holders], index, str(entry),
                               not entry.placements and not entry.mesh[1])
    checkpoint = Checkpoint(files, tensors, offsets, sizes, mesh_sizes(first.values()))
    if files.missing:
        checkpoint.notes.append(f"without rank {files.missing_text}: the others hold a complete replica")
    _check_replicas(checkpoint, checksums, allow_buffers)
    if checkpoint.taken:
        name, rank = next(iter(checkpoint.taken.items()))
        checkpoint.notes.append(
            f"{len(checkpoint.taken)} tensors that the ranks keep whole differ, and are rank {rank}'s: {name}"
            f"{', …' if len(checkpoint.taken) > 1 else ''}")
    return checkpoint


def read_ranks(files: RankFiles) -> Iterator[tuple[int, Path, dict[str, Entry]]]:
    """Yield (rank, file, its tensors by name) of each rank, under the limits that hold for foreign pickles.

    Raises:
        MergeError: a file cannot be read, or not within the limits.
    """
    ranks = sorted(files.paths.items())
    for _, path in ranks:
        files.seen.use(path)

    def read(item: tuple[int, Path]) -> dict[str, Entry]:
        rank, path = item
        return read_entries(read_shard_file(path, seen=files.seen), rank)

    for (rank, path), entries in zip(ranks, each(read, ranks, lambda item: str(item[1])), strict=True):
        yield rank, path, entries


def _layout(name: str, shape: tuple[int, ...], holders: tuple[tuple[int, Box], ...], files: RankFiles) -> Layout:
    """Choose one holder of each block, the lowest rank, and check that the blocks tile the tensor."""
    ranks: dict[Box, list[int]] = {}
    for rank, box in holders:
        if box.numel:
            ranks.setdefault(box, []).append(rank)
    fault = tiling_fault(shape, ranks)
    if fault and files.missing:
        raise MergeError(
            f"{len(files.paths)} of {files.world_size} ranks are in "
            f"{', '.join(map(str, files.folders))}; missing: rank {files.missing_text} "
            f"(model_world_size_{files.world_size}_rank_{files.missing[0]}.pt); copy it there, or name its "
            "folder with one more --local-dir")
    if fault:
        raise MergeError(f"{name} of shape {list(shape)} cannot be put together: {fault}; the checkpoint is damaged")
    replicas = tuple(tuple(same) for same in ranks.values() if len(same) > 1)
    return Layout(holders, tuple((same[0], box) for box, same in ranks.items()), replicas)


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def _check_agreement(first: Mapping[str, Entry], first_path: Path, entries: Mapping[str, Entry], path: Path) -> None:
    for here, there, where, other in ((first, entries, path, first_path), (entries, first, first_path, path)):
        absent = [name for name in here if name not in there]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise MergeError(f"{where} has no {absent[0]}{more}, which {other} has; save or copy the checkpoint again")
    for name, entry in entries.items():
        if entry.agreement != first[name].agreement:
            raise MergeError(f"{name} is {entry} in {path} but {first[name]} in {first_path}; "
                             "the files are not of one checkpoint")


SMALL = 1 << 20  # bytes up to which copies are always compared themselves, whatever their checksums say
COMPARED = 1 << 22  # bytes that are compared at once


def _check_replicas(checkpoint: Checkpoint, checksums: Mapping[int, np.ndarray], allow_buffers: bool) -> None:
    """Compare the ranks that hold the same block of a tensor: by the CRC32 that their files name, or byte by byte.

    Expert parallelism as VeOmni does it writes each group's experts as a tensor of their own on a mesh of the group's
    ranks, of which nothing tells which group it is: all groups claim the same blocks. Buffers that each rank keeps whole
    may differ for a reason (HSDP leaves those of other replicas uninitialised): with `allow_buffers` the lowest rank's is
    the tensor.

    Raises:
        MergeError: naming the tensor and the ranks that differ.
    """
    with contextlib.ExitStack() as stack:
        seen = checkpoint.files.seen
        handles = {rank: stack.enter_context(seen.descriptor(path)) for rank, path in checkpoint.files.paths.items()}
        for tensor in list(checkpoint.tensors.values()):
            held = {
                rank: (box, offset)
                for rank, box, offset in checkpoint.places(tensor, every=bool(tensor.layout.replicas))
            }
            for ranks in tensor.layout.replicas:
                differing = _differing(tensor, {rank: held[rank] for rank in ranks}, checksums, handles)
                if not differing:
                    continue
                if tensor.plain and allow_buffers:
                    _take(checkpoint, tensor, ranks[0])
                    break
                raise _refusal(checkpoint, tensor, ranks, differing)


def _differing(tensor: Tensor, held: Mapping[int, tuple[Box, int]], checksums: Mapping[int, np.ndarray],
               handles: Mapping[int, int]) -> list[int]:
    """Return those ranks that `held` a block of `tensor`, of one shape, in other bytes than the first of them."""
    ranks = list(held)
    first, *others = ranks
    box = held[first][0]
    size = box.numel * itemsize(tensor.dtype)
    known = {rank: int(checksums[rank][tensor.index]) for rank in ranks}
    if size > SMALL and all(known.values()):
        return [rank for rank in others if known[rank] != known[first]]
    starts = {rank: offset for rank, (_, offset) in held.items()}
    differing: set[int] = set()
    for done in range(0, size, COMPARED):
        count = min(COMPARED, size - done)
        wanted = os.pread(handles[first], count, starts[first] + done)
        differing |= {
            rank
            for rank in others
            if rank not in differing and os.pread(handles[rank], count, starts[rank] + done) != wanted
        }
    return sorted(differing)


def _take(checkpoint: Checkpoint, tensor: Tensor, rank: int) -> None:
    """Let `tensor` be the one that `rank` holds whole, and note it."""
    held = tuple((holder, box) for holder, box in tensor.layout.holders if holder == rank)
    checkpoint.tensors[tensor.name] = replace(tensor, layout=Layout(held, held, ()))
    checkpoint.taken[tensor.name] = rank


def _refusal(checkpoint: Checkpoint, tensor: Tensor, ranks: Sequence[int], differing: Sequence[int]) -> MergeError:
    what = f"{tensor.name}: rank {_ranks(differing)} and rank {ranks[0]} hold the same piece, but with other values; "
    if tensor.plain:
        return MergeError(
            f"{tensor.name} is kept whole by {len(ranks)} ranks, but rank {_ranks(differing)} has other values "
            f"than rank {ranks[0]}; the checkpoint is damaged, or each rank keeps a value of its own: to take "
            f"rank {ranks[0]}'s, pass --allow buffers")
    kept = _one_replica(checkpoint)
    if kept:
        return MergeError(f"{what}if they are replicas that differ, merge one of them: a folder with the files of rank "
                          f"{_ranks(kept)} alone; if they are expert-parallel ranks, save the experts gathered")
    return MergeError(
        f"{what}no rank can be left out; if they are expert-parallel ranks, save the experts gathered, else the "
        "checkpoint is damaged: save or copy it again")


def _one_replica(checkpoint: Checkpoint) -> list[int]:
    """Return the lowest ranks that hold all blocks of all tensors; empty where that takes all ranks."""
    kept = sorted({rank for tensor in checkpoint.tensors.values() for rank, _ in tensor.layout.pieces})
    return kept if len(kept) < len(checkpoint.files.paths) else []
