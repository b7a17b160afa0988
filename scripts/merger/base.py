"""The base model under a checkpoint that holds LoRA weights alone: a Hugging Face folder, whose tensors join the ranks'."""
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from merger import MergeError
from merger.checkpoint import Checkpoint, Layout, Tensor
from merger.companions import holds, is_weight, weights_in
from merger.discover import RankFiles
from merger.filenames import MODEL_STEM, weight_index
from merger.foreign.archives import Record
from merger.foreign.documents import read_object
from merger.foreign.files import Seen, check_inside
from merger.foreign.text import printable
from merger.foreign.values import shown
from merger.layout import Box
from merger.lora import PREFIX, check_alone, check_saved
from merger.modelconfig import quantized_part
from merger.safetensorsfile import MAX_HEADER, Place, read_tensors

COPY_AGAIN = "copy the base model again"
SINGLE = f"{MODEL_STEM}.safetensors"


class OverBase(Checkpoint):
    """A checkpoint of LoRA weights with the tensors of its base model, whose files are numbered behind the ranks'.

    Attributes:
        shards: the checkpoint without the base model.
    """

    def __init__(self, shards: Checkpoint, folder: Path) -> None:
        files = with_base_files(shards.files, folder)
        found = _read(folder, files, {number for number in files.paths if number not in shards.files.paths})
        if part := quantized_part({name: place[0] for name, (_, place) in found.items()}):
            raise MergeError(
                f"the base model in {folder} is quantized ({part}), and LoRA cannot be added to that; give "
                "the unquantized one with --base-model, or use --lora adapter")
        check_saved(shards.tensors, found, shards.files)
        prefix = PREFIX if all(name.startswith(PREFIX) for name in shards.tensors) else ""
        tensors: dict[str, Tensor] = {}
        self._begins: dict[str, int] = {}
        for name, (number, (dtype, shape, begin)) in found.items():
            held = ((number, Box((0, ) * len(shape), shape)), )
            full = prefix + name
            self._begins[full] = begin
            pieces = tuple((holder, box) for holder, box in held if box.numel)
            tensors[full] = Tensor(full, dtype, shape, Layout(held, pieces, ()), 0,
                                   f"{dtype} {list(shape)} of the base")
        sizes = {number: files.seen.identity(path).size for number, path in files.paths.items()}
        super().__init__(files, {**tensors, **shards.tensors}, {}, sizes, shards.meshes)
        self.shards, self.notes, self.taken = shards, list(shards.notes), shards.taken

    def places(self, tensor: Tensor, every: bool = False) -> Iterator[tuple[int, Box, int]]:
        """See `Checkpoint`."""
        if tensor.name not in self._begins:
            yield from self.shards.places(tensor, every)
            return
        for number, box in tensor.layout.holders if every else tensor.layout.pieces:
            yield number, box, self._begins[tensor.name]

    def piece_of(self, rank: int) -> str:
        """See `Checkpoint`."""
        return self.shards.piece_of(rank) if rank in self.shards.files.paths else f"the base's in {self.path(rank)}"

    def records(self, rank: int) -> Mapping[str, Record]:
        """See `Checkpoint`; a base model's files name no CRC32."""
        return self.shards.records(rank) if rank in self.shards.files.paths else {}


def over_base(shards: Checkpoint, folder: Path) -> Checkpoint:
    """Return a checkpoint of LoRA weights alone with the base model in `folder`.

    Raises:
        MergeError: it holds no LoRA weights, or more; the base model cannot be read, or is quantized.
    """
    if isinstance(shards, OverBase):
        return shards
    check_alone(shards.tensors, shards.files)
    return OverBase(shards, folder)


def check_apart(folder: Path, target: Path) -> None:
    """Refuse to write the merged model over its base, or around it.

    Raises:
        MergeError: `folder`, the base's, is `target` or lies in it.
    """
    if holds(target, folder):
        raise MergeError(f"--base-model {folder} lies where the merged model would go ({target}); choose another "
                         "--save-dir")


def with_base_files(files: RankFiles, folder: Path) -> RankFiles:
    """Return `files` with the base model's, numbered behind them.

    Raises:
        MergeError: see `_weight_files`.
    """
    first = max(files.world_size, max(files.paths, default=-1) + 1)
    found = _weight_files(folder, files.seen)
    return replace(files, paths={**files.paths, **dict(enumerate(found, first))})


def _weight_files(folder: Path, seen: Seen) -> list[Path]:
    """Return the safetensors files in `folder`, as its index names them or the single one.

    Raises:
        MergeError: there are none, both, or one that is named is not there or leads out of the folder.
    """
    if not folder.is_dir():
        raise MergeError(
            f"no folder {folder}; give --base-model the base model's folder (a model of the Hub: hf download "
            "NAME --local-dir DIR)")
    index, single = folder / weight_index(), folder / SINGLE
    if index.exists() and single.exists():
        raise MergeError(f"{folder} holds both {SINGLE} and {index.name}; remove the one that is not its weights")
    if not index.exists() and not index.is_symlink():
        if not single.exists() and not single.is_symlink():
            there = next(iter(weights_in(folder)), None)
            what = f"only {there}, and a base is read from safetensors: save it with save_pretrained" if there else \
                "no weights: name the folder that has them"
            raise MergeError(f"--base-model {folder} has no {SINGLE} and no {index.name}, {what}")
        names = [SINGLE]
    else:
        check_inside(index, (folder, ))
        names = sorted(set(_weight_map(index, seen).values()))
    paths = [folder / name for name in names]
    for path in paths:
        if not path.exists() and not path.is_symlink():
            raise MergeError(f"{index} names {path.name}, which is not there; {COPY_AGAIN}")
        check_inside(path, (folder, ))
        seen.use(path)
    return paths


def _weight_map(index: Path, seen: Seen) -> dict[str, str]:
    """Return the file of each tensor, as a base model's index names it."""
    try:
        told = read_object(index, seen, MAX_HEADER).get("weight_map")
    except OSError as error:
        raise MergeError(f"cannot read {index}: {error.strerror}") from error
    if type(told) is not dict or not told:
        raise MergeError(f"{index} has no weight_map; {COPY_AGAIN}")
    for name in told.values():
        if type(name) is not str or not is_weight(name) or not name.endswith(".safetensors"):
            raise MergeError(f"{index} names {shown(name)}, which is no file of weights beside it; {COPY_AGAIN}")
    return told


def _read(folder: Path, files: RankFiles, numbers: set[int]) -> dict[str, tuple[int, Place]]:
    """Return (file's number, place) of each of the base model's tensors, which lie in the files `numbers`."""
    found: dict[str, tuple[int, Place]] = {}
    for number in sorted(numbers):
        path = files.paths[number]
        for name, place in _header(path, files.seen).items():
            if name in found:
                raise MergeError(f"{name} is in two files of {folder}, {files.paths[found[name][0]].name} and "
                                 f"{path.name}; {COPY_AGAIN}")
            found[name] = (number, place)
    index = folder / weight_index()
    for name, file in (_weight_map(index, files.seen) if index.exists() else {}).items():
        if name not in found or files.paths[found[name][0]].name != file:
            raise MergeError(f"{index} says that {printable(name, 200)} is in {file}, which has no such tensor; "
                             f"{COPY_AGAIN}")
    return found


def _header(path: Path, seen: Seen) -> dict[str, Place]:
    try:
        with seen.descriptor(path) as fd:
            return read_tensors(path, fd, seen.identity(path).size, COPY_AGAIN)[0]
    except OSError as error:
        raise MergeError(f"cannot read {path}: {error.strerror or error}") from error
    except (MergeError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = printable(str(error), 200)
        raise MergeError(text if str(path) in text else f"{path}: its header is none of safetensors' ({text}); "
                         f"{COPY_AGAIN}") from error
