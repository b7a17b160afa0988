"""Which items are played: AgentGym's lists, ids of all their forms, ranges, and categories from the files' names."""
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation import foreign
from evaluation.problems import Misuse, reason
from evaluation.rows import Row

COLLECTED = Path(__file__).resolve().parents[1] / "item_maps.json"  # written when the image is built

_RANGE = re.compile(r"(\d+)-(\d+)")
_TRIAL = re.compile(r"trial_T\d+_\d+_\d+$")
_NUMBER = re.compile(r"(?:^|_)(\d+)$")
MOST_DIGITS = 18  # beyond, no server counts, and Python refuses some texts


class Item(NamedTuple):
    """One item.

    Attributes:
        id: its name, as the list has it; `env_7` for a bare number.
        number: the number that the server is reset with.
        category: the list's name without environment and ending; empty where there is none.
    """
    id: str
    number: int
    category: str = ""


def trial_numbers(maps: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, int]:
    """Return the item numbers of ALFWorld's trials: by trial name, and by task and trial."""
    numbers = {}
    for entries in maps:
        for entry in entries:
            numbers[entry["task_id"]] = numbers[f"{entry['task_type']}/{entry['task_id']}"] = int(entry["item_id"])
    return numbers


def read_map(path: Path) -> list[Any]:
    """Return the item map in the file `path`.

    Raises:
        Misuse: it cannot be read, or has another form.
    """
    try:
        entries = foreign.read_json(path)
        trial_numbers([entries])
    except (OSError, ValueError) as error:  # a pointer of Git LFS is no JSON
        raise Misuse(f"item map {path} cannot be read: {reason(error)}; restore it in the checkout") from None
    except (KeyError, TypeError):
        raise Misuse(f"item map {path} has an entry without task_id, task_type and item_id; "
                     "restore it in the checkout") from None
    return entries


def collect_maps(rows: Iterable[Row], checkout: Path) -> dict[str, list[Any]]:
    """Return the item maps in an AgentGym checkout, by environment: what the image is built with.

    Raises:
        Misuse: one cannot be read.
    """
    found: dict[str, list[Any]] = {}
    for row in rows:
        for path in (checkout / row.folder / name for name in row.item_maps):
            if path.is_file():
                found.setdefault(row.name, []).append(read_map(path))
    return found


def collected_maps(env: str, collected: Path = COLLECTED) -> list[Any]:
    """Return the image's item maps of `env`; none where there is no such file, or a damaged one."""
    try:
        maps = foreign.read_json(collected)[env]
        trial_numbers(maps)
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return maps


def item_of(name: str | int, env: str, category: str = "", trials: Mapping[str, int] | None = None) -> Item:
    """Return the item called `name`: a number, `env_7`, or a name that ends in an ALFWorld trial's.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(name, int):
        return Item(f"{env}_{name}", name, category)
    trial = _TRIAL.search(name)
    if trial:
        if trial[0] not in (trials or {}):
            raise ValueError(
                f"{name} is a trial's name, and no item map has it; set AGENTGYM_SRC to an AgentGym checkout "
                "(the image reads the maps when it is built)")
        return Item(name, (trials or {})[trial[0]], category)
    number = _NUMBER.search(name)
    if number is None:
        raise ValueError(f"{name!r} has no number at its end")
    if len(number[1]) > MOST_DIGITS:
        raise ValueError(f"{name[:30]}… has {len(number[1])} digits, more than any item's number")
    return Item(f"{env}_{int(name)}" if name.isdecimal() else name, int(number[1]), category)


def check_owner(items: Iterable[Item], env: str, names: Iterable[str]) -> None:
    """Refuse items whose ids begin with the name of another environment of `names`.

    Raises:
        Misuse: there is one.
    """
    owners = sorted({env, *names}, key=len, reverse=True)  # the longest first: one name may begin with another
    for item in items:
        plain = item.id.removeprefix("lmrlgym_")  # as AgentGym's lists call those of maze and wordle
        owner = next((name for name in owners if plain.startswith(f"{name}_")), env)
        if owner != env:
            raise Misuse(f"item {item.id} is one of {owner} and not of {env}; give --env {owner}, or items of {env}")


def read_list(path: Path) -> list[str | int]:
    """Return the item names in a file of AgentGym's form, or of plain names or numbers in JSON or one a line.

    Raises:
        Misuse: it cannot be read so.
    """
    try:
        text = foreign.read_text(path)
    except (OSError, ValueError) as error:
        raise Misuse(f"item list {path} cannot be read: {reason(error)}; "
                     "name a text or JSON file that you may read, or items such as 0-99") from None
    if not text.lstrip().startswith(("[", "{", '"')):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        entries = foreign.loads(text)
    except ValueError:
        raise Misuse(f"item list {path} is no JSON; expected [{{\"item_id\": \"env_0\"}}, …]") from None
    names = [entry.get("item_id") if isinstance(entry, dict) else entry
             for entry in entries] if isinstance(entries, list) else [None]
    if any(isinstance(name, bool) or not isinstance(name, str | int) for name in names):
        raise Misuse(f"item list {path} has an entry without item_id; expected [{{\"item_id\": \"env_0\"}}, …]")
    return [name for name in names if name is not None]


def list_files(env: str, root: Path) -> tuple[Path | None, list[Path]]:
    """Return the whole list of `env` under `root`, and the lists of its categories beside it.

    A category's list is any other JSON file in AgentEval/<env>; AgentGym-RL's own evaluation reads them so.
    """
    for folder in (root / "AgentEval" / env, root / "AgentEval" / f"lmrlgym_{env}"):
        files = sorted(folder.glob("*.json"))
        if files:
            whole = [file for file in files if re.fullmatch(rf"(lmrlgym_)?{env}_test", file.stem)]
            return (whole[0] if whole else None), [file for file in files if file not in whole]
    for name in (f"{env}_train.json", f"lmrlgym_{env}_train.json"):
        if (root / "AgentItemId" / name).is_file():
            return root / "AgentItemId" / name, []
    return None, []


def category_of(file: Path, env: str) -> str:
    """Return the category that a list's file name tells: searchqa_nq_test.json is nq."""
    return foreign.replaced(file.stem).removeprefix("lmrlgym_").removeprefix(f"{env}_").removesuffix("_test")


def in_lists(whole: Path | None, parts: Sequence[Path], env: str, trials: Mapping[str,
                                                                                  int]) -> list[tuple[str | int, str]]:
    """Return the items of the list `whole`, or of all `parts` where there is none, each with its category.

    A category's list may name an item in another form than the whole list does: 7, searchqa_7.

    Raises:
        Misuse: a list cannot be read.
    """
    placed: dict[int, tuple[str | int, str]] = {}
    for file in parts:
        for name in read_list(file):
            placed[_numbered(name, env, trials, file)] = name, category_of(file, env)
    if whole is None:
        return list(placed.values())
    numbered = ((name, _numbered(name, env, trials, whole)) for name in read_list(whole))
    return [(name, placed[number][1] if number in placed else "") for name, number in numbered]


def _numbered(name: str | int, env: str, trials: Mapping[str, int], file: Path) -> int:
    try:
        return item_of(name, env, trials=trials).number
    except ValueError as error:
        raise Misuse(f"items of {file.name}: {error}") from None


def held_out(row: Row) -> tuple[int, int | None, str]:
    """Return first and last item of the split that no training has seen, or of all items, and what they are called."""
    for name in ("test", "dev"):
        if name in row.items.splits:
            return *row.items.splits[name], f"the row's {name} split"
    return row.items.first, row.items.last, "the row's items"


def choose(row: Row,
           items: str = "",
           limit: int | None = None,
           shuffle_seed: int | None = None,
           root: Path = Path("."),
           maps: Sequence[Sequence[Mapping[str, Any]]] = (),
           collected: Path = COLLECTED) -> tuple[list[Item], str]:
    """Return the items to play and where they come from.

    Args:
        row: the environment.
        items: --items: a file, ranges and names separated by commas, or empty for AgentGym's list under `root`, or,
            where there is none, the first items of the row's test or dev split, or of all, up to its evaluation's size.
        limit: at most so many; None is all.
        shuffle_seed: shuffle before the limit, with this seed.
        root: the folder that has AgentEval and AgentItemId.
        maps: ALFWorld's item maps; where there are none, those in the file `collected`.

    Raises:
        Misuse: an item cannot be read, is not there or comes twice; or there is none.
    """
    trials = trial_numbers(maps or (collected_maps(row.name, collected) if row.item_maps else ()))
    found: list[tuple[str | int, str]]
    if os.path.isfile(items):  # pathlib raises where a long list of items is too long for a name
        found, origin = [(name, "") for name in read_list(Path(items))], Path(items).name
    elif items:
        found, origin = [], "--items"
        for piece in filter(None, (part.strip() for part in items.split(","))):
            span = _RANGE.fullmatch(piece)
            if span and max(map(len, span.groups())) > MOST_DIGITS:
                raise Misuse(f"--items {piece[:30]}… is more than a million items; choose fewer")
            if span and int(span[1]) > int(span[2]):
                raise Misuse(f"--items {piece} ends before it begins; write {span[2]}-{span[1]}")
            if span and int(span[2]) - int(span[1]) >= 1_000_000:
                raise Misuse(f"--items {piece} is more than a million items; choose fewer")
            if not span and (piece.endswith(".json") or "/" in piece) and not _TRIAL.search(piece):
                raise Misuse(f"no item list {piece}; name a file, or items such as 0-99 or {row.name}_3")
            found += [(n, "") for n in range(int(span[1]), int(span[2]) + 1)] if span else [(piece, "")]
    else:
        whole, parts = list_files(row.name, root)
        if whole or parts:
            found = in_lists(whole, parts, row.name, trials)
            origin = whole.name if whole else f"{len(parts)} lists in {parts[0].parent}"
        else:
            first, last, of = held_out(row)
            last = first + (row.items.eval_size or 100) - 1 if last is None else last
            size = min(row.items.eval_size or last - first + 1, last - first + 1)
            found = [(n, "") for n in range(first, first + size)]
            origin = f"the first {size} of {of}"
    try:
        chosen = [item_of(name, row.name, category, trials) for name, category in found]
    except ValueError as error:
        raise Misuse(f"items of {origin}: {error}") from None
    seen: set[int] = set()
    for item in chosen:
        if item.number < row.items.first or (row.items.last is not None and item.number > row.items.last):
            raise Misuse(f"items of {origin}: {row.name} has no item {item.number}; "
                         f"they are {row.items.first} to {'…' if row.items.last is None else row.items.last}")
        if item.number in seen:
            raise Misuse(f"items of {origin}: item {item.number} comes twice; name each once and use --samples")
        seen.add(item.number)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(chosen)
    chosen = chosen[:limit]
    if not chosen:
        raise Misuse(f"items of {origin}: there are none; name some with --items")
    return chosen, origin
