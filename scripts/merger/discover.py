"""Find the ranks' files of a checkpoint below the folders that the user named."""
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from merger import MergeError
from merger.filenames import (
    ACCELERATE_FILE,
    CONFIG,
    CONTENTS,
    DCP,
    DCP_FILE,
    DCP_SUFFIX,
    FSDP_CONFIG,
    LORA_FOLDER,
    MEGATRON,
    METADATA,
    MODEL_FOLDER,
    RANK_FILE,
    RANK_PATTERN,
    RANKS,
    ROLES,
    SHARD_FILE,
    SHARDED,
    STEP_FOLDER,
    TRACKER,
)
from merger.foreign.documents import read_object
from merger.foreign.files import Seen, check_regular
from merger.foreign.values import shown

MOST_RANKS = 1 << 20
# Where the ranks' files lie below a step: SkyRL's, accelerate's, and what trainers of torch's own forms call the model.
PLACES = ("policy", "actor/policy", "pytorch_model_fsdp_0", "pytorch_model_fsdp", "sharded", "model", "trainer", "dcp")
FILES = (RANK_PATTERN, ".metadata", "shard-*.safetensors")
END_BYTES = 22  # of a zip archive without a comment, as torch writes it
LISTED = 8  # of the ranks that are missing: a name may claim a world of any size


@dataclass(frozen=True)
class RankFiles:
    """The files of one checkpoint.

    Attributes:
        folders: where they lie; the first is where the merged model goes by default.
        world_size: the number of ranks that wrote it.
        paths: the file of each rank that was found; in torch's own forms the files by number, in the order of names.
        notes: what was chosen on the user's behalf.
        seen: what they and all that lies beside them were when they were found.
        configs: folders that were named too, and hold a config and no ranks.
        form: of the checkpoint.
    """
    folders: tuple[Path, ...]
    world_size: int
    paths: dict[int, Path]
    notes: list[str] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen, compare=False)
    configs: tuple[Path, ...] = ()
    form: str = RANKS

    @property
    def missing(self) -> list[int]:
        """The ranks without a file, the first `LISTED` of them."""
        if self.form != RANKS:  # what is missing of them, their own metadata tells
            return []
        return list(islice((rank for rank in range(self.world_size) if rank not in self.paths), LISTED))

    @property
    def missing_text(self) -> str:
        """The ranks without a file, as a list that ends."""
        listed, count = self.missing, self.world_size - len(self.paths)
        return ", ".join(map(str, listed)) + (f" and {count - len(listed)} more" if count > len(listed) else "")

    def find(self, name: str) -> Path | None:
        """Return the first of the folders' files or folders called `name`."""
        return next((folder / name for folder in self.folders if (folder / name).exists()), None)


def find_checkpoint(local_dirs: Sequence[str]) -> RankFiles:
    """Return the rank files below `local_dirs`, which hold one checkpoint between them.

    Raises:
        MergeError: there is none, or more than one, or a rank twice; the text names the folder and the remedy.
    """
    notes: list[str] = []
    folders: list[Path] = []
    configs = [Path(name) for name in local_dirs if len(local_dirs) > 1 and _is_config_folder(Path(name))]
    for name in local_dirs:
        if Path(name) in configs[:len(local_dirs) - 1]:  # with the config that the ranks' folders lack
            continue
        folder = _checkpoint_folder(Path(name), notes, len(local_dirs) == 1)
        if os.path.realpath(folder) not in map(os.path.realpath, folders):
            folders.append(folder)
    _check_same(folders)
    seen = Seen()
    for folder in folders:  # before any file is read, so that none of another step is taken for one of this
        seen.survey(path for place in (folder, folder / MODEL_FOLDER, folder / LORA_FOLDER) for path in _paths(place))
    seen.survey(path for folder in configs for path in _paths(folder))
    forms = {folder: form_of(_names(folder)) for folder in folders}
    if len(set(forms.values())) > 1:
        one, other = folders[0], next(folder for folder in folders if forms[folder] != forms[folders[0]])
        raise MergeError(f"{one} holds {forms[one]}, {other} {forms[other]}; name the folders of one checkpoint")
    if (form := forms[folders[0]]) != RANKS:
        return _chunk_files(folders, form, notes, seen, tuple(configs))
    files = [(folder / name, int(match[1]), int(match[2])) for folder in folders for name in _names(folder)
             if (match := RANK_FILE.fullmatch(name))]
    world_size = _world_size(folders, {world for _, world, _ in files}, seen)
    paths: dict[int, Path] = {}
    for path, world, rank in sorted(files):
        if world != world_size:
            notes.append(f"left out {path.name}: {FSDP_CONFIG} names world size {world_size}")
        elif rank >= world_size:
            raise MergeError(f"{path} names rank {rank} of {world_size}; ranks count from 0, so rename or remove it")
        elif rank in paths and os.path.realpath(path) == os.path.realpath(paths[rank]):
            continue
        elif rank in paths:
            raise MergeError(f"rank {rank} is there twice, as {paths[rank]} and {path}; remove one of them")
        else:
            paths[rank] = path
    if not paths:
        raise MergeError(f"no model_world_size_{world_size}_rank_*.pt in {folders[0]}, though {FSDP_CONFIG} names "
                         f"world size {world_size}; copy the ranks' files there")
    return RankFiles(tuple(folders), world_size, paths, notes, seen, tuple(configs))


def _chunk_files(folders: Sequence[Path], form: str, notes: list[str], seen: Seen, configs: tuple[Path,
                                                                                                  ...]) -> RankFiles:
    """Return the files of one of torch's own checkpoints, by number."""
    found: dict[str, Path] = {}
    for folder in folders:
        for name in _names(folder):
            if not (name.endswith(DCP_SUFFIX) if form == DCP else SHARD_FILE.fullmatch(name)):
                continue
            if os.path.realpath(found.setdefault(name, folder / name)) != os.path.realpath(folder / name):
                raise MergeError(f"{name} is there twice, as {found[name]} and {folder / name}; remove one of them")
    pattern = DCP_FILE if form == DCP else SHARD_FILE
    ranks = {match[1] for name in found if (match := pattern.fullmatch(name))}
    paths = dict(enumerate(path for _, path in sorted(found.items())))
    return RankFiles(tuple(folders), max(len(ranks), 1), paths, notes, seen, configs, form)


def form_of(names: Iterable[str]) -> str:
    """Return the form of the checkpoint whose files a folder of `names` holds; empty where it holds none.

    >>> form_of([".metadata", "__0_0.distcp"]), form_of(["model.safetensors"])
    ('torch DCP', '')
    """
    names = set(names)
    if any(RANK_FILE.fullmatch(name) for name in names):
        return RANKS
    if any(SHARD_FILE.fullmatch(name) for name in names):
        return SHARDED
    if MEGATRON not in names and any(METADATA.fullmatch(name) or name.endswith(DCP_SUFFIX) for name in names):
        return DCP
    return ""


def _check_same(folders: Sequence[Path]) -> None:
    """Refuse folders whose paths name different training steps or roles: their ranks would fit, and be no model."""
    parts = list(zip(_own_parts(map(os.path.abspath, folders)), _own_parts(map(os.path.realpath, folders)),
                     strict=True))
    for pattern, what in ((STEP_FOLDER, "step"), (re.compile("|".join(ROLES)), "role")):
        named: dict[str, Path] = {}
        for folder, (written, real) in zip(folders, parts, strict=True):
            found = next((part for part in (*reversed(written), *reversed(real)) if pattern.fullmatch(part)), None)
            if found:
                named.setdefault(found, folder)
        if len(named) > 1:
            (one, first), (other, second) = list(named.items())[:2]
            raise MergeError(
                f"{first} is of {one}, but {second} of {other}; name folders of one {what} with --local-dir")


def _own_parts(paths: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the parts of each path that come after what all have in common."""
    paths = list(paths)
    shared = len(Path(os.path.commonpath(paths)).parts)
    return [Path(path).parts[shared:] for path in paths]


def _world_size(folders: Sequence[Path], found: set[int], seen: Seen) -> int:
    for folder in folders:
        config = folder / FSDP_CONFIG
        if os.path.lexists(config):
            try:
                size = read_object(config, seen).get("world_size")
            except OSError as error:
                raise MergeError(f"cannot read {config}: {error.strerror}; mend or remove it") from error
            if type(size) is not int or not 0 < size < MOST_RANKS:
                raise MergeError(f"{config} names no world_size, but {shown(size)}; mend or remove it")
            return size
    if len(found) > 1:
        sizes = ", ".join(map(str, sorted(found)))
        raise MergeError(f"{folders[0]} holds checkpoints of world sizes {sizes}; keep the files of one of them")
    return found.pop()


def _is_config_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not any(_has_ranks(folder / name) for name in ("", *ROLES))


def _checkpoint_folder(folder: Path, notes: list[str], alone: bool = True) -> Path:
    """Return the folder at or below `folder` that holds rank files, noting what was chosen.

    Raises:
        MergeError: there is none; or the last of several steps, where it holds the ranks `alone`, is not whole.
    """
    names = _names(folder)
    if form_of(names):
        return folder
    if folder.name == MODEL_FOLDER and not any(STEP_FOLDER.fullmatch(name) for name in names):
        if _has_ranks(folder.parent):
            raise MergeError(f"--local-dir {folder} is a folder for merged weights; did you mean {folder.parent}?")
        raise MergeError(_explain(folder, names))
    place = next((folder / name for name in PLACES if _has_ranks(folder / name)), None)
    if place:
        notes.append(f"took {place}")
        return place
    roles = [role for role in ROLES if _has_ranks(folder / role)]
    if roles:
        other = f"; for the {roles[1]} pass {folder / roles[1]}" if len(roles) > 1 else ""
        notes.append(f"took {folder / roles[0]}{other}")
        return folder / roles[0]
    steps = sorted(
        int(match[1]) for name in names
        if (match := STEP_FOLDER.fullmatch(name)) and any(_has_ranks(folder / name / role) for role in ("", *ROLES)))
    if steps:
        last = folder / f"global_step_{steps[-1]}"
        if len(steps) > 1:
            fault, whole = _fault(_ranks_of(last)), earlier_whole(last)
            if alone and fault and whole:
                raise MergeError(
                    f"the last of the steps in {folder} is not whole: {_ranks_of(last)} {fault}"
                    f"{_tracked(folder)}; {whole} is whole: pass it with --local-dir, or the last one's own folder "
                    "if that is meant")
            notes.append(
                f"took the last of the steps {', '.join(map(str, steps))}{_tracked(folder)}; for another pass its "
                "folder")
        return _checkpoint_folder(last, notes)
    raise MergeError(_explain(folder, names))


def _ranks_of(step: Path) -> Path:
    """Return the folder of a step that holds its ranks: the actor's, where it has several."""
    return next((step / role for role in (*ROLES, "") if _has_ranks(step / role)), step)


def earlier_whole(folder: Path) -> Path | None:
    """Return the folder of the latest step before that of `folder` that has every rank, whole; None where none is."""
    step = next((place for place in (folder, *folder.parents) if STEP_FOLDER.fullmatch(place.name)), None)
    if step is None or not step.parent.is_dir():
        return None
    numbers = sorted((int(match[1]) for name in _names(step.parent) if (match := STEP_FOLDER.fullmatch(name))),
                     reverse=True)
    for number in numbers:
        place = step.parent / f"global_step_{number}" / folder.relative_to(step)
        place = place if place.is_dir() and _has_ranks(place) else _ranks_of(step.parent / f"global_step_{number}")
        if number < int(step.name.rpartition("_")[2]) and _has_ranks(place) and not _fault(place):
            return place
    return None


def _fault(folder: Path) -> str:
    """Return what is seen at a glance to be missing of the ranks in `folder`, or empty."""
    if (form := form_of(_names(folder))) != RANKS:
        finished = form != DCP or any(METADATA.fullmatch(name) for name in _names(folder))
        return "" if finished else "has no .metadata, which is written last"
    found = {int(match[2]): int(match[1]) for name in _names(folder) if (match := RANK_FILE.fullmatch(name))}
    worlds = set(found.values())
    if len(worlds) != 1:
        return f"has files of world sizes {', '.join(map(str, sorted(worlds)))}"
    world = worlds.pop()
    if len(found) < world:
        return f"has {len(found)} of {world} ranks"
    for rank in sorted(found):
        path = folder / f"model_world_size_{world}_rank_{rank}.pt"
        if not _ends(path):
            return f"has rank {rank} of {world} cut short"
    return ""


def _ends(path: Path) -> bool:
    """Return True if a file ends as an archive of torch's does."""
    try:
        check_regular(path, path.stat())
        with path.open("rb") as file:
            file.seek(-END_BYTES, os.SEEK_END)
            return file.read(4) == b"PK\x05\x06"
    except (OSError, MergeError):
        return False


def _tracked(folder: Path) -> str:
    """Return what the file says that verl writes when a step is complete, as a part of a sentence."""
    try:
        text = Seen().read(folder / TRACKER, 64).decode("ascii", "replace").strip()
    except (OSError, MergeError):
        return ""
    return f" ({TRACKER} names {text})" if text.isdecimal() else ""


def by_numbers(path: Path) -> list[tuple[int, str]]:
    """Return a key that sorts 9 before 10.

    >>> sorted([Path("global_step_10"), Path("global_step_9")], key=by_numbers)[0].name
    'global_step_9'
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _explain(folder: Path, names: Sequence[str]) -> str:
    """Return why `folder` holds no checkpoint, and where one may be."""
    below = sorted(
        {
            path.parent
            for depth in ("*", "*/*")
            for pattern in FILES
            for path in folder.glob(f"{depth}/{pattern}")
            if not path.parent.name.startswith("optim") and _has_ranks(path.parent)
        },
        key=by_numbers)
    if below:
        return f"no {RANK_PATTERN} in {folder}; did you mean {below[-1]}?"
    kind = _other_kind(folder, names)
    if kind:
        return f"no {RANK_PATTERN} in {folder}; {kind}"
    if any(name.startswith("optim_world_size") for name in names):
        return f"no {RANK_PATTERN} in {folder}, only optimizer state; copy the model's shards there too"
    if any(name.endswith(".safetensors") for name in names):
        return f"no {RANK_PATTERN} in {folder}; it holds safetensors, which need no merging"
    return f"no {RANK_PATTERN} in {folder}; name the folder that verl wrote, such as …/global_step_100/actor"


def _other_kind(folder: Path, names: Sequence[str]) -> str:
    """Return what else a folder without ranks' files is, and what to do with it; empty where that is not known."""
    actors = [folder, *(folder / role for role in ROLES)]
    saved = {actor: _listed(actor) for actor in actors}
    for place in (folder, *(path for actor in actors for path in (actor / MODEL_FOLDER, *saved[actor]))):
        if (place / CONFIG).is_file() and any(path.suffix == ".safetensors" for path in _paths(place)):
            return (f"{place} holds a whole model, which needs no merging: use that folder, for example `invoke eval "
                    f"--checkpoint {place}`")  # yapf: disable
    for place in actors:
        inside = [path.name for path in _paths(place)]
        sharded = next((path for path in (*saved[place], place / "dist_ckpt", place / "model/dist_ckpt")
                        if path.name == "dist_ckpt" and path.is_dir()), None)  # yapf: disable
        if sharded:
            return (f"{sharded} is Megatron's: `python -m verl.model_merger merge --backend megatron --local_dir "
                    f"{place} --target_dir OUT` merges it")  # yapf: disable
        if "zero_to_fp32.py" in inside or any(name.startswith("zero_pp_rank_") for name in inside):
            return f"{place} is DeepSpeed ZeRO's: `python {place / 'zero_to_fp32.py'} {place} OUT` merges it"
        if MEGATRON in inside:
            return (
                f"{place} is Megatron's distributed checkpoint: convert it with the tool of the framework that wrote it, "
                "which knows its names")
        by_accelerate = [match for name in sorted(inside) if (match := ACCELERATE_FILE.fullmatch(name))]
        if by_accelerate:
            stem, world = by_accelerate[0][1], 1 + max(int(match[2]) for match in by_accelerate)
            return (f"{place} holds a file a rank, as accelerate names them; link them under the names that are read: `cd "
                    f"{shlex.quote(str(place))} && for r in $(seq 0 {world - 1}); do ln {stem}_rank$r.bin "
                    f"model_world_size_{world}_rank_$r.pt; done`")  # yapf: disable
        packed = next((name for name in inside if name.startswith("model_world_size_") and not name.endswith(".pt")),
                      None)
        if packed:
            return f"{place / packed} is not a rank's file as torch wrote it; unpack or rename it"
    return ""


def _listed(actor: Path) -> list[Path]:
    """Return the folders in `actor` that the manifest of verl's Megatron layout names; none where there is no manifest."""
    try:
        contents = read_object(actor / CONTENTS, Seen()).get("contents")
    except (OSError, MergeError):
        return []
    entries = contents.values() if isinstance(contents, dict) else ()
    names = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return [actor / name for name in names
            if isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts]  # yapf: disable


def _has_ranks(folder: Path) -> bool:
    return folder.is_dir() and bool(form_of(_names(folder)))


def _paths(folder: Path) -> list[Path]:
    """Return what lies in a folder that need not be there."""
    return [folder / name for name in _names(folder)] if folder.is_dir() else []


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        raise MergeError(f"no folder {folder}; check --local-dir") from None
    except NotADirectoryError:
        raise MergeError(f"{folder} is a file; --local-dir takes the folder that holds it") from None
    except OSError as error:
        raise MergeError(f"cannot list {folder}: {error.strerror}") from error
