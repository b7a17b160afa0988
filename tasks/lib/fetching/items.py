"""AgentGym-RL's lists of items, from its data set on the Hub to where trainer and evaluation look for them.

The data set has `train/` and `eval/`. The trainer reads AgentItemId/ENV_train.json, the evaluation all lists in
AgentEval/ENV: ENV_test.json, and categories beside it. Both take a JSON list of objects with `item_id`.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tasks.lib import hub
from tasks.lib.errors import UserError
from training import foreign

DATA_SET = "AgentGym/AgentGym-RL-Data-ID"
TRAIN, EVAL = "AgentItemId", "AgentEval"
PREFIX = "lmrlgym_"  # AgentGym's name for the origin of maze and wordle

Say = Callable[[str], None]


@dataclass(frozen=True)
class Item:
    """A list in the data set.

    Attributes:
        file: its name there.
        environment: of which it is.
        place: where it goes, from the project's folder.
    """
    file: str
    environment: str
    place: Path


def owner(path: Path, environments: Iterable[str]) -> str:
    """Return the environment that a list's folder or name says it is of; empty where none is said.

    >>> owner(Path("eval/searchqa/nq.json"), ["searchqa"]), owner(Path("train/lmrlgym_maze_train.jsonl"), ["maze"])
    ('searchqa', 'maze')
    """
    longest = sorted(environments, key=len, reverse=True)  # one name may begin with another
    for word in (*reversed(path.parts[1:-1]), path.name.partition(".")[0]):
        plain = word.lower().removeprefix(PREFIX)
        for name in longest:
            if plain == name or re.match(rf"{re.escape(name)}[_-]", plain):
                return name
    return ""


def place_of(file: str, environment: str) -> Path | None:
    """Return where a list of the data set goes; None for what is no list of train/ or eval/.

    >>> place_of("train/babyai_train.json", "babyai"), place_of("eval/nq.jsonl", "searchqa")
    (PosixPath('AgentItemId/babyai_train.json'), PosixPath('AgentEval/searchqa/nq.json'))
    """
    path = Path(file)
    if path.suffix not in (".json", ".jsonl") or len(path.parts) < 2:
        return None
    plain = path.stem.lower().removeprefix(PREFIX)
    if path.parts[0] == "train":
        return Path(TRAIN) / f"{environment}_train.json"
    if path.parts[0] == "eval":
        whole = plain in (environment, "test", "eval", f"{environment}_eval")
        return Path(EVAL) / environment / f"{f'{environment}_test' if whole else plain}.json"
    return None


def choose(files: Iterable[str], known: Sequence[str], asked: Sequence[str]) -> tuple[list[Item], list[str]]:
    """Return the lists of the data set that are wanted, and what of train/ and eval/ is left out.

    Args:
        files: what the data set holds.
        known: the environments that there are.
        asked: those that are wanted; none for all.

    Raises:
        UserError: there is none of an environment that was asked for, or two lists would be one.
    """
    found: dict[Path, Item] = {}
    left = []
    for file in sorted(files):
        if Path(file).parts[0] not in ("train", "eval"):
            continue
        environment = owner(Path(file), known)
        place = place_of(file, environment) if environment else None
        if place is None:
            left.append(file)
        elif not asked or environment in asked:
            if place in found:
                raise UserError(
                    f"{found[place].file} and {file} of the data set would both be {place}; fetch them by hand")
            found[place] = Item(file, environment, place)
    for name in asked:
        if not any(item.environment == name for item in found.values()):
            raise UserError(f"the data set has no list of {name}; it has those of " +
                            (", ".join(sorted({owner(Path(file), known)
                                               for file in files} - {''})) or "none"))
    if not found:
        raise UserError("the data set has no list in train/ or eval/ that belongs to an environment here")
    return list(found.values()), left


def as_list(text: str, name: str) -> tuple[str, int]:
    """Return a list in the form that trainer and evaluation read, whatever of the usual forms it has, and how many of
    its entries named an item again and are left out: the evaluation plays no item twice.

    Args:
        text: a JSON list, JSON lines, of objects with `item_id` or bare ids.
        name: of the file, for messages.

    Raises:
        UserError: it is none, or has no entry.
    """
    try:
        entries = foreign.loads(text) if text.lstrip().startswith("[") else [
            foreign.loads(line) for line in text.splitlines() if line.strip()
        ]
    except ValueError as error:
        raise UserError(f"{name} of the data set is neither a JSON list nor JSON lines: {error}", code=1) from None
    made: dict[object, dict[str, Any]] = {}
    for entry in entries:
        one = entry if isinstance(entry, dict) else {"item_id": entry}
        identity = one.get("item_id")
        if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
            raise UserError(f"{name} of the data set has an entry without item_id: {json.dumps(entry)[:80]}", code=1)
        made.setdefault(identity, one)
    if not made:
        raise UserError(f"{name} of the data set is empty", code=1)
    return json.dumps([*made.values()], ensure_ascii=False, indent=0) + "\n", len(entries) - len(made)


def fetch(root: Path,
          known: Sequence[str],
          asked: Sequence[str],
          revision: str,
          force: bool,
          dry: bool,
          say: Say,
          size_of: Callable[[int], str],
          data_set: str = DATA_SET) -> None:
    """Fetch the lists into `root`; either all of them are put in place or none.

    Raises:
        UserError: see `choose`, `as_list`, `hub.look`; or one of another content is there and not `force`.
    """
    repository = hub.look(data_set, "dataset", revision)
    items, left = choose(repository.files, known, asked)
    total = sum(repository.files[item.file].size for item in items)
    say(f"{data_set} at {repository.commit[:8]}: {len(items)} lists, {size_of(total)}")
    if left:
        say(f"left out, of no environment here: {', '.join(left)}")
    if dry:
        for item in items:
            say(f"{item.file} -> {root / item.place}")
        return
    with TemporaryDirectory(prefix="items-") as place:
        hub.download(repository, [item.file for item in items], Path(place))
        read = {item: as_list(_read(Path(place) / item.file, item.file), item.file) for item in items}
    texts = {item: text for item, (text, _) in read.items()}
    different = [item for item in items if (root / item.place).exists() and not _holds(root / item.place, texts[item])]
    if different and not force:
        raise UserError(
            f"{root / different[0].place} is there with other items; move it away, or replace it with --force" +
            (f" (so are {len(different) - 1} more)" if different[1:] else ""))
    for item, text in texts.items():
        path = root / item.place
        new = not _holds(path, text)
        if new:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.new")
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        twice = f", {read[item][1]} entries that named one again left out" if read[item][1] else ""
        say(f"{path}: {len(json.loads(text))} items{twice}{'' if new else ', as before'}")


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} of the data set is not UTF-8", code=1) from None


def _holds(path: Path, text: str) -> bool:
    """Tell whether a list is there with these items, in whatever spacing."""
    try:
        return bool(foreign.read_json(path, foreign.LARGEST_LIST) == foreign.loads(text))
    except (OSError, ValueError):
        return False
