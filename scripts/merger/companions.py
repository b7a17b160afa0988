"""Which files go along with merged weights: what a model needs beside them, and what the target had already."""
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from merger import MergeError
from merger.filenames import ADAPTER_CONFIG, RANK_FILE, RECORD
from merger.foreign.documents import check_loadable
from merger.foreign.files import Seen, check_inside, lfs_pointer
from merger.foreign.limits import each

# The names that transformers and PEFT load weights by, and those of Mistral's and Llama's own format, which vLLM loads;
# a merge replaces these and leaves every other file alone.
WEIGHT = re.compile(
    r"(model|pytorch_model|tf_model|flax_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin|h5|msgpack)"
    r"(\.index\.json)?|consolidated(-\d+-of-\d+|\.\d+)?\.(safetensors|pth)(\.index\.json)?")
# What transformers loads beside config and weights; the names that it saves them under.
LOADED = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|generation_config|"
    r"((video_|image_|audio_)?pre)?processor_config)\.json")
CHUNK = 1 << 22  # bytes that are copied at once
GGUF = ".gguf"  # what somebody made of a model, under any name: neither taken along nor removed


def is_weight(name: str) -> bool:
    """Return True if a file of a model folder holds weights, or is the index of files that do.

    >>> [is_weight(n) for n in ("model-00001-of-00002.safetensors", "pytorch_model.bin", "tokenizer.json", "merges.txt")]
    [True, True, False, False]
    """
    return WEIGHT.fullmatch(name) is not None


def is_replaced(name: str) -> bool:
    """Return True if a merge replaces or removes a file of its target: weights, and what says how to load those."""
    return is_weight(name) or name in (RECORD, ADAPTER_CONFIG)


def weights_in(folder: Path) -> list[str]:
    """Return the names of the weight files in `folder`, which may be absent."""
    return sorted(path.name for path in folder.iterdir() if is_weight(path.name)) if folder.is_dir() else []


def check_free(target: Path, force: bool) -> None:
    """Refuse to replace weights unasked.

    Raises:
        MergeError: there are some in `target`, and not `force`.
    """
    present = weights_in(target)
    if present and not force:
        raise MergeError(f"{target} already holds weights ({present[0]}); pass --force to replace them, or another "
                         "--save-dir")


def keep_companions(target: Path,
                    staging: Path,
                    seen: Seen | None = None,
                    roots: Sequence[Path] = (),
                    skip: Collection[str] = ()) -> None:
    """Take over from `target` what `staging` lacks, but for weights, as hard links: subfolders may be large.

    Args:
        roots: where the target is a checkpoint's own folder, what its links may lead into.
        skip: names that will be written anyway.

    Raises:
        MergeError: a link leads out of `roots`; something is neither file nor folder.
    """
    if not target.is_dir():
        return
    for path, place in missing_companions(target, staging):
        if path.parent == target and path.name in skip:
            continue
        if roots:
            check_tree(path, roots)
        _link(path, place, seen or Seen())


def check_tree(path: Path, roots: Sequence[Path]) -> None:
    """Refuse what a foreign folder would publish that is not its own; links that lead nowhere publish nothing.

    Raises:
        MergeError: naming a link that leads out of `roots`, or what is neither file nor folder.
    """
    if path.is_symlink() and not path.exists():
        return
    check_inside(path, roots)
    if is_folder(path):
        for below in sorted(path.iterdir()):
            check_tree(below, roots)


def missing_companions(old: Path, new: Path) -> Iterator[tuple[Path, Path]]:
    for path in sorted(old.iterdir()):
        if not is_replaced(path.name):
            yield from _missing(path, new / path.name)


def _missing(old: Path, new: Path) -> Iterator[tuple[Path, Path]]:
    """Yield `old` and its place `new` where nothing is there; a folder that is in both places is looked into."""
    if not os.path.lexists(new):
        yield old, new
    elif is_folder(old) and is_folder(new):
        for path in sorted(old.iterdir()):
            yield from _missing(path, new / path.name)


def is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _link(source: Path, place: Path, seen: Seen) -> None:
    """Make `place` a hard link to `source`; of a folder, a folder with links to its files."""
    if is_folder(source):
        place.mkdir()
        for path in source.iterdir():
            _link(path, place / path.name, seen)
        shutil.copystat(source, place)
        return
    try:
        os.link(source, place, follow_symlinks=False)
        if not source.is_symlink():
            seen.linked(source)
    except OSError:  # a file system without hard links
        shutil.copy2(source, place, follow_symlinks=False)


def companions(source: Path, target: Path, roots: Sequence[Path] = ()) -> Iterator[Path]:
    """Yield the files and folders of `source` that a model takes along: config, tokenizer, processor and custom code.

    Weights are not taken, and from beside the ranks' files only other files, and no `.pt`. The target, whose files are
    kept anyway, and folders that hold it are left out. `roots` are what links may lead into; `source` where there are none.

    Raises:
        MergeError: a link leads nowhere or out of `roots`; something is neither file nor folder.
    """
    if not source.is_dir() or os.path.realpath(source) == os.path.realpath(target):
        return
    roots = roots or (source, )
    check_inside(source, roots)
    found = [
        path for path in sorted(source.iterdir())
        if not path.name.startswith(".") and path.suffix != GGUF and not is_replaced(path.name)
    ]
    if any(RANK_FILE.fullmatch(path.name) for path in found):
        found = [path for path in found if not path.is_dir() and path.suffix != ".pt"]
    for path in found:
        yield from _tree(path, target, roots)


def _tree(path: Path, target: Path, roots: Sequence[Path]) -> Iterator[Path]:
    """Yield `path` and all below it, folders first; but not a link to a folder that it lies in, which has no end."""
    check_inside(path, roots)
    if not path.is_dir():
        yield path
    elif path.name != "__pycache__" and not holds(path, target) and not holds(path, path.parent):
        yield path
        for below in sorted(path.iterdir()):
            yield from _tree(below, target, roots)


def check_documents(folders: Iterable[Path], seen: Seen, skip: Collection[str] = ()) -> list[str]:
    """Look at the JSON files of `folders` that will lie beside merged weights; return notes of those that are damaged.

    Args:
        skip: names that will be written anew.

    Raises:
        MergeError: one that transformers loads is no JSON object, or endless.
    """
    found = {os.path.realpath(path): path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())
             if path.suffix == ".json" and path.name not in skip and not path.name.startswith(".")
             and not is_replaced(path.name) and path.is_file()}  # yapf: disable
    for path in found.values():
        seen.identity(path)

    def look(path: Path) -> str:
        try:
            check_loadable(path, seen)
        except MergeError as error:
            if LOADED.fullmatch(path.name):
                raise MergeError(
                    f"{error}; the merged model could not be loaded with it: mend it, or copy it again") from None
            return f"{error}; it goes along as it is"
        return ""

    return [note for note in each(look, found.values()) if note] if found else []


def holds(folder: Path, path: Path) -> bool:
    """Return True if `path` is `folder` or lies in it, links followed."""
    inner, outer = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return inner == outer or outer in inner.parents


def copy_companions(source: Path,
                    staging: Path,
                    target: Path,
                    seen: Seen | None = None,
                    roots: Sequence[Path] = ()) -> None:
    """Copy the companions of a model that goes to `target` from `source` to `staging`, an empty folder, byte for byte.

    Links are followed (hub snapshots are made of them); modes stay.
    """
    seen = seen or Seen()
    pairs = [(path, staging / path.relative_to(source)) for path in companions(source, target, roots)]
    for path, place in pairs:
        if path.is_dir():
            place.mkdir()
        else:
            _copy(path, place, seen)
    for path, place in reversed(pairs):  # a folder's mode may forbid to write in it
        shutil.copystat(path, place)


def _copy(path: Path, place: Path, seen: Seen) -> None:
    """Copy a file, as long as it was when it was first looked at and no longer."""
    with seen.descriptor(path) as fd, place.open("xb") as out:
        if pointer := lfs_pointer(os.pread(fd, 64, 0)):
            raise MergeError(f"{path}, which goes with the model, {pointer}")
        for start in range(0, seen.identity(path).size, CHUNK):
            out.write(os.pread(fd, CHUNK, start))
        seen.compare(path, fd)
