"""Distributed checkpoints of torch's: which tensors they hold, and where in their files the pieces lie.

`torch.distributed.checkpoint` (DCP) writes `.metadata`, a pickle that names each tensor's chunks and the byte range of
each in the `.distcp` files beside it (torch/distributed/checkpoint/metadata.py). A byte range holds an archive of one
tensor, as `torch.save` writes it; or a safetensors file of all tensors of its rank. Its `HuggingFaceStorageWriter` writes
`shard-R-model-N-of-M.safetensors`, which name each piece's place in its tensor, and nothing names the whole shapes.
"""
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from merger import MergeError, pickles
from merger.discover import RankFiles
from merger.dtypes import itemsize
from merger.filenames import DCP, METADATA
from merger.foreign.archives import Record
from merger.foreign.documents import parse
from merger.foreign.files import Seen
from merger.foreign.limits import allow, each
from merger.foreign.text import printable
from merger.foreign.values import as_count, as_list, as_name, as_shape, shown
from merger.layout import Box
from merger.pickles import TensorRef
from merger.safetensorsfile import read_tensors
from merger.shardfile import MAX_PICKLE, read_archive
from merger.torchforms import known_dtype, without_wrappers

SHARDING = "DCP_SHARDING_INFO"  # of a safetensors file's metadata: torch/distributed/checkpoint/_hf_utils.py
COPY_AGAIN = "copy it again"
# What the parts of a training's state are called: those that are no model, and the model among several others.
OTHER_PARTS = ("optim", "lr_sched", "sched", "dataload", "train_state", "rng", "random", "scaler", "progress")
MODELS = ("model", "module", "model_state", "model_state_dict", "state_dict", "actor", "policy")


class Piece(NamedTuple):
    """A block of a tensor: the number of its file, its first byte there, and the record with its CRC32."""
    box: Box
    file: int
    offset: int
    record: Record


@dataclass
class Chunks:
    """A distributed checkpoint.

    Attributes:
        tensors: element type, shape and pieces by name.
        notes: what was chosen on the user's behalf.
        parts: how many tensors each part of the training's state has, by the part's name.
        guessed: whether the shapes are those that the pieces make up, as the files do not tell the whole.
    """
    tensors: dict[str, tuple[str, tuple[int, ...], list[Piece]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)
    guessed: bool = False


class Stated(NamedTuple):
    """A piece as `.metadata` tells of it: its tensor's name here and there, its place in that, and the byte range that holds it."""
    name: str
    key: str
    dtype: str
    box: Box
    file: str
    offset: int
    length: int


class Listing(NamedTuple):
    """What a `.metadata` tells of the model: types and shapes by name, pieces, what is no tensor; and of the parts."""
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    pieces: list[Stated]
    others: list[str]
    parts: dict[str, int]
    taken: str


def read_chunks(files: RankFiles, model_key: str | None) -> Chunks:
    """Read what a distributed checkpoint says of its tensors, and where they lie.

    Args:
        model_key: the part that is the model, such as `app.model`; None to choose it.

    Raises:
        MergeError: naming the file and what is wrong with it.
    """
    return _read_dcp(files, model_key) if files.form == DCP else _read_sharded(files)


# .metadata and .distcp


def _read_dcp(files: RankFiles, model_key: str | None) -> Chunks:
    paths = [path for folder in files.folders for path in sorted(folder.iterdir()) if METADATA.fullmatch(path.name)]
    if not paths:
        raise MergeError(
            f"no .metadata in {files.folders[0]}, which is written last: the save did not finish, or not all "
            "was copied; copy it there, or take another step")
    if paths[0].name != ".metadata":
        raise MergeError(f"{paths[0]} tells of its own rank alone (use_collectives=False), which is not read; save the "
                         "checkpoint with collectives")
    if len(paths) > 1:
        raise MergeError(f"{paths[0]} and {paths[1]} are of two checkpoints; name the folders of one with --local-dir")
    for path in (*paths, *files.paths.values()):
        files.seen.use(path)
    listing = next(each(lambda path: _listing(path, files.seen, model_key), paths, str))
    found = Chunks({name: (*kind, []) for name, kind in listing.tensors.items()}, parts=listing.parts)
    numbers = {path.name: number for number, path in files.paths.items()}
    named = {piece.file for piece in listing.pieces}
    if absent := sorted(named - set(numbers)):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise MergeError(
            f"{len(named) - len(absent)} of the {len(named)} files that {paths[0]} names are in "
            f"{', '.join(map(str, files.folders))}; missing: {absent[0]}{more}; copy it there, or name its "
            "folder with one more --local-dir")
    by_file: dict[int, list[Stated]] = {}
    for piece in listing.pieces:
        by_file.setdefault(numbers[piece.file], []).append(piece)
    items = [(files.paths[number], sorted(stated, key=lambda piece: piece.offset))
             for number, stated in sorted(by_file.items())]
    answers = each(lambda item: _places(item[0], item[1], files.seen), items, lambda item: str(item[0]))
    for (path, stated), places in zip(items, answers, strict=True):
        for piece, (offset, record) in zip(stated, places, strict=True):
            found.tensors[piece.name][2].append(Piece(piece.box, numbers[path.name], offset, record))
    _note(found, listing, set(numbers) - named)
    return found


def _note(found: Chunks, listing: Listing, unread: set[str]) -> None:
    taken, others = listing.taken, listing.others
    if taken or len(found.parts) > 1:
        rest = ", ".join(f"{part or 'the top'} ({count} tensors)" for part, count in found.parts.items()
                         if part != taken)
        found.notes.append(f"took {taken or 'the top'} ({len(found.tensors)} tensors)"
                           f"{f'; left out {rest}' if rest else ''}")
    if others:
        found.notes.append(f"left out {len(others)} entries that are no tensors: {others[0]}"
                           f"{', …' if len(others) > 1 else ''}")
    if unread and len(found.parts) == 1:
        found.notes.append(
            f"left out {min(unread)}{', …' if len(unread) > 1 else ''}, in which nothing of the model lies")


def _listing(path: Path, seen: Seen, model_key: str | None) -> Listing:
    """Read a `.metadata`; runs where `foreign.limits` hold."""
    try:
        data = seen.read(path, MAX_PICKLE)
        allow(len(data))
        return _listed(data, model_key)
    except OSError as error:
        raise MergeError(f"cannot read {path}: {error.strerror or error}") from error
    except MergeError as error:
        raise MergeError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise MergeError(f"{path}: describes tensors in a way that no torch writes "
                         f"({type(error).__name__}: {printable(str(error), 100)})") from error


def _listed(data: bytes, model_key: str | None) -> Listing:
    state = _state(pickles.load(data, metadata=True), "Metadata")
    described, stored, paths = (state.get(key) for key in ("state_dict_metadata", "storage_data", "planner_data"))
    if type(described) is not dict or type(stored) is not dict:
        raise MergeError("names no tensors and no places")
    if state.get("storage_meta") is not None:
        _state(state["storage_meta"], "StorageMeta")
    split = {as_name(name): _split(name, paths) for name in described}
    tensors = [name for name, entry in described.items() if getattr(entry, "kind", "") == "TensorStorageMetadata"]
    part = _choose([split[name][0] for name in tensors], model_key)
    places: dict[tuple[str, tuple[int, ...]], Any] = {}
    for index, info in stored.items():
        key = _state(index, "MetadataIndex")
        if key.get("offset") is not None:
            place = (as_name(key["fqn"]), as_shape(key["offset"], "a chunk's place"))
            if places.setdefault(place, info) is not info:
                raise MergeError(f"names two places for {place[0]} at {list(place[1])}")
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    pieces = []
    names = without_wrappers([split[name][1] for name in tensors if split[name][0] == part])
    plain = iter(names)
    for name in tensors:
        if split[name][0] != part:
            continue
        entry, ours = described[name].state, next(plain)
        dtype, shape = known_dtype(entry["properties"].state[0]), as_shape(entry["size"])
        found[ours] = (dtype, shape)
        if type(entry["chunks"]) is not list:
            raise MergeError(f"{name} has {shown(entry['chunks'])} for chunks")
        for chunk in entry["chunks"]:
            box = _box(_state(chunk, "ChunkStorageMetadata"), shape)
            if box.numel:
                if (name, box.start) not in places:
                    raise MergeError(f"names no place for {name} at {list(box.start)}")
                pieces.append(Stated(ours, name, dtype, box, *_range(places[name, box.start])))
    known = set(tensors)
    others = [split[name][1] for name in described if split[name][0] == part and name not in known]
    return Listing(found, pieces, others, _parts(split[name][0] for name in tensors), ".".join(part))


def _state(record: Any, kind: str) -> dict[str, Any]:
    if not isinstance(record, pickles.Record) or record.kind != kind or type(record.state) is not dict:
        raise MergeError(f"has {shown(record)} where a {kind} is written")
    return record.state


def _box(chunk: Mapping[str, Any], shape: tuple[int, ...]) -> Box:
    box = Box(as_shape(chunk["offsets"], "a chunk's place"), as_shape(chunk["sizes"], "a chunk's shape"))
    if not len(box.start) == len(box.shape) == len(shape):
        raise MergeError(
            f"has a chunk at {list(box.start)} of shape {list(box.shape)} of a tensor of shape {list(shape)}")
    return box


def _range(info: Any) -> tuple[str, int, int]:
    """Return the file's name, the first byte and the bytes that a place names."""
    state = _state(info, "_StorageInfo")
    name = state["relative_path"]
    if type(name) is not str or name in ("", ".", "..") or not name.isprintable() or "/" in name or os.sep in name:
        raise MergeError(f"names the file {shown(name)}, which is no name in its folder")
    if state.get("transform_descriptors"):
        what = as_list(state["transform_descriptors"], "transformations")[0]
        raise MergeError(f"its tensors are packed ({shown(what)}), which is not read; save it without extensions")
    return name, as_count(state["offset"], "a place in a file"), as_count(state["length"], "a length")


# Which part of the state is the model


def _split(name: str, paths: Any) -> tuple[tuple[str, ...], str]:
    """Return the part of the training's state that a tensor belongs to, and its name there, by the planner's record."""
    path = paths.get(name) if type(paths) is dict else None
    if type(path) is tuple and path and len(path) < 64 and all(type(step) in (str, int) for step in path):
        *outer, leaf = map(str, path)
        return tuple(outer), leaf
    return (("optimizer", ), name) if name.startswith(("optim.", "optimizer.")) else ((), name)


def _is_other(part: tuple[str, ...]) -> bool:
    return any(step.lower().startswith(OTHER_PARTS) for step in part)


def _parts(parts: Iterable[tuple[str, ...]]) -> dict[str, int]:
    """Count the tensors of each part; an optimizer keeps a part of its own for each parameter, counted as one."""
    counts: dict[str, int] = {}
    for part in parts:
        end = next((i + 1 for i, step in enumerate(part) if _is_other((step, ))), len(part))
        name = ".".join(part[:end])
        counts[name] = counts.get(name, 0) + 1
    return counts


def _choose(parts: list[tuple[str, ...]], model_key: str | None) -> tuple[str, ...]:
    """Return the part that is the model.

    Raises:
        MergeError: there is none, or several may be.
    """
    known = list(dict.fromkeys(parts))
    if model_key is not None:
        part = next((part for part in known if ".".join(part) == model_key), None)
        if part is None:
            raise MergeError(f"has no part {model_key!r:.80}; --model-key takes {_some(_parts(known))}")
        return part
    models = [part for part in known if not _is_other(part)]
    named = [part for part in models if part and part[-1] in MODELS]
    if len(models) == 1 or len(named) == 1:
        return (models if len(models) == 1 else named)[0]
    if not models:
        raise MergeError(
            f"holds no model, but {_some(_parts(known)) or 'no tensor at all'}; name the folder that the model "
            "was saved in")
    raise MergeError(
        f"holds several parts that may be the model: {_some(map('.'.join, models))}; name one with --model-key")


def _some(names: Iterable[str]) -> str:
    names = [printable(name, 80) or "''" for name in names]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# The pieces' bytes


def _places(path: Path, stated: list[Stated], seen: Seen) -> list[tuple[int, Record]]:
    """Return where each piece's bytes lie in a file, which `stated` names in order; runs where `foreign.limits` hold."""
    places: list[tuple[int, Record]] = []
    tables: dict[int, Any] = {}  # of the safetensors files that stand in this one
    end = 0
    try:
        with seen.descriptor(path) as fd:
            size = os.fstat(fd).st_size
            for piece in stated:
                try:
                    if piece.offset + piece.length > size:
                        raise MergeError(
                            f"should end at byte {piece.offset + piece.length}, the file ends at {size}: it is "
                            f"truncated; {COPY_AGAIN}")
                    head = os.pread(fd, 9, piece.offset)
                    if head[8:] == b"{":
                        places.append(_in_table(path, fd, size, piece, tables))
                        continue
                    if piece.offset < end:
                        raise MergeError("overlaps another tensor in the file; the metadata is not this checkpoint's")
                    end = piece.offset + piece.length
                    places.append(_in_archive(path, fd, piece, seen))
                except (MergeError, struct.error) as error:
                    raise MergeError(f"{path}: {piece.name} at {list(piece.box.start)}: "
                                     f"{str(error).removeprefix(f'{path}: ')}") from error
    except OSError as error:
        raise MergeError(f"cannot read {path}: {error.strerror or error}") from error
    return places


def _in_archive(path: Path, fd: int, piece: Stated, seen: Seen) -> tuple[int, Record]:
    shard = read_archive(path, fd, piece.length, pickles.load, seen, piece.offset)
    tensor = shard.content
    if not isinstance(tensor, TensorRef):
        raise MergeError(f"is {shown(tensor)}, not a tensor")
    _check_kind(piece, tensor.dtype, tensor.shape)
    return shard.byte_offset(tensor), shard.records[tensor.storage.key]


def _in_table(path: Path, fd: int, size: int, piece: Stated, tables: dict[int, Any]) -> tuple[int, Record]:
    if piece.offset not in tables:
        tables[piece.offset] = _table(path, fd, size - piece.offset, piece.offset)
    found, starts = tables[piece.offset]
    if starts.get(piece.key) != piece.box.start:
        raise MergeError("is not in the file's header; the metadata is not this checkpoint's")
    dtype, shape, offset = found[piece.key]
    _check_kind(piece, dtype, shape)
    return offset, Record(offset, piece.box.numel * itemsize(dtype), 0)


def _check_kind(piece: Stated, dtype: str, shape: tuple[int, ...]) -> None:
    if (dtype, shape) != (piece.dtype, piece.box.shape):
        raise MergeError(f"should be {piece.dtype} {list(piece.box.shape)}, but is {dtype} {list(shape)}")


def _table(path: Path, fd: int, size: int, base: int = 0) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return a safetensors file's tensors, and where each begins in its whole tensor."""
    try:
        found, metadata = read_tensors(path, fd, size, COPY_AGAIN, base)
        text = metadata.get(SHARDING)
        if type(text) is not str:
            raise MergeError(f"its header has no {SHARDING}; it is no rank's file that torch wrote")
        told = parse(text.encode())
        starts = {name: as_shape(told[name]["saved_offsets"], "a piece's place") for name in found}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        text = printable(str(error), 200)
        raise MergeError(text if str(path) in text else f"{path}: its header is none that torch writes ({text}); "
                         f"{COPY_AGAIN}") from error
    return found, starts


def _read_sharded(files: RankFiles) -> Chunks:
    """Read the headers of sharded safetensors; a tensor reaches as far as its last piece."""
    found = Chunks(guessed=True)
    saved: dict[str, tuple[str, list[int], list[Piece]]] = {}
    for number, path in sorted(files.paths.items()):
        try:
            with files.seen.descriptor(path) as fd:
                tensors, starts = _table(path, fd, os.fstat(fd).st_size)
        except OSError as error:
            raise MergeError(f"cannot read {path}: {error.strerror or error}") from error
        for name, (dtype, shape, offset) in tensors.items():
            box = Box(starts[name], shape)
            known, extents, pieces = saved.setdefault(name, (dtype, [0] * len(shape), []))
            if known != dtype or len(extents) != len(shape) or len(box.start) != len(shape):
                raise MergeError(f"{path}: {name} is {dtype} {list(shape)} at {list(box.start)}, and {known} of "
                                 f"{len(extents)} dimensions in another file; they are not of one save")
            extents[:] = [max(end, a + n) for end, a, n in zip(extents, box.start, shape, strict=True)]
            if box.numel:
                pieces.append(Piece(box, number, offset, Record(offset, box.numel * itemsize(dtype), 0)))
    for ours, (dtype, extents, pieces) in zip(without_wrappers(list(saved)), saved.values(), strict=True):
        found.tensors[ours] = (dtype, as_shape(extents), pieces)
    if not saved:
        raise MergeError(f"{files.folders[0]} holds no tensor at all")
    found.parts = {"": len(saved)}
    return found
