"""Which checkpoints of a run are whole: the trainer writes nothing atomically, and a killed one leaves halves.

The trainer writes `global_step_N/actor/{model,optim,extra_state}_world_size_W_rank_r.pt`, `actor/huggingface/`, the
same below `critic/` where there is one, `data.pt` (the data loader), and last the number N into
`latest_checkpointed_iteration.txt`. Files that torch.save wrote are zip archives whose table of contents is at their
end, so one that was cut off has none.
"""
from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from training.foreign import open_file, read_bytes, read_object

FOLDER = re.compile(r"global_step_(0|[1-9]\d*)")
RANK_FILE = re.compile(r"(model|optim|extra_state)_world_size_(\d+)_rank_(\d+)\.pt")
KINDS = ("model", "optim", "extra_state")
TRACKER = "latest_checkpointed_iteration.txt"
# A save writes data.pt after the ranks' files; clocks of the machines that wrote them may differ by so much.
CLOCKS = 2.0


@dataclass(frozen=True)
class Step:
    """A checkpoint.

    Attributes:
        number: N of global_step_N.
        path: its folder.
        whole: whether training can be resumed from it.
        faults: what is wrong with it, a sentence each; [] where it is whole.
        world_size: how many ranks wrote it; 0 where no rank's file is there.
        has_optimizer: whether the optimizer's files are there, whole or not.
        model_whole: whether the model can be merged from it.
        bytes: size of all its files.
    """
    number: int
    path: Path
    whole: bool
    faults: tuple[str, ...]
    world_size: int
    has_optimizer: bool
    model_whole: bool
    bytes: int


def numbers(folder: str | Path) -> list[int]:
    """Return the numbers of the checkpoints in the run's folder, sorted; half ones too."""
    try:
        with os.scandir(folder) as entries:
            found = [FOLDER.fullmatch(entry.name) for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for match in found if match)


def tracked(folder: str | Path) -> int | None:
    """Return the number in the trainer's tracker file; None where there is none."""
    try:
        text = read_bytes(Path(folder) / TRACKER, 1 << 10).decode(errors="replace").strip()
    except (OSError, ValueError):
        return None
    return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


def archive_fault(path: Path) -> str | None:
    """Return what is wrong with a file of torch.save, as far as its table of contents tells; None where nothing is."""
    try:
        with open(open_file(path), "rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if not entries:
                return "is empty"
            last = max(entries, key=lambda entry: entry.header_offset)
            if last.header_offset + last.compress_size > archive.start_dir:
                return "is cut off"
            with archive.open(last):  # there is a header where the table says
                pass
    except zipfile.BadZipFile:
        return "is cut off or no checkpoint"
    except (OSError, NotImplementedError, RuntimeError, ValueError, OverflowError) as error:
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return None


def read(folder: str | Path, number: int) -> Step:
    """Look at the checkpoint `number` of the run's folder."""
    path = Path(folder) / f"global_step_{number}"
    model: list[str] = []  # faults that spoil the model, and with it all
    training: list[str] = []  # faults that spoil a resume only
    found = _files(path / "actor")
    files = list(found.values())
    worlds = sorted({world for _, world, _ in found})
    world = worlds[-1] if worlds else 0
    if not worlds:
        model.append("actor/ has no file of a rank")
    elif len(worlds) > 1:
        model.append(f"actor/ has files of {' and '.join(map(str, worlds))} ranks")
    model += _rank_faults(path, "actor", found, world, ("model", ))
    training += _rank_faults(path, "actor", found, world, ("optim", "extra_state"))
    if world and not _is_config(path / "actor" / "huggingface" / "config.json"):
        model.append("actor/huggingface/config.json is missing or broken")
    if (path / "critic").is_dir():
        critic = _files(path / "critic")
        training += _rank_faults(path, "critic", critic, world, KINDS)
        files += critic.values()
    data, latest = path / "data.pt", tracked(folder)
    if data.is_file():
        fault = archive_fault(data)
        if fault:
            training.append(f"data.pt {fault}")
            if latest is None or latest < number:
                model.append("the save did not end")
        else:
            saved = data.stat().st_mtime
            later = [file for file in files if _modified(file) > saved + CLOCKS]
            if later:
                model.append(f"{later[0].relative_to(path)} is newer than data.pt, so a save over it did not end "
                             f"(if you copied it: touch {data})")
    else:
        training.append("data.pt is missing")
        if latest is None or latest < number:
            model.append("the save did not end")
    faults = (*dict.fromkeys(model + training), )
    return Step(number=number,
                path=path,
                whole=not faults,
                faults=faults,
                world_size=world,
                has_optimizer=any(kind == "optim" for kind, _, _ in found),
                model_whole=not model,
                bytes=_size(path))


def steps(folder: str | Path) -> list[Step]:
    """Return the run's checkpoints, sorted by number."""
    return [read(folder, number) for number in numbers(folder)]


def newest_whole(folder: str | Path, poisoned: Collection[int] = ()) -> Step | None:
    """Return the newest checkpoint that training can be resumed from; None where there is none.

    Args:
        poisoned: steps that learnt from what the environment did not say; their checkpoints and all later ones are
            passed over.
    """
    for number in reversed(numbers(folder)):
        if poisoned and number >= min(poisoned):
            continue
        step = read(folder, number)
        if step.whole:
            return step
    return None


def _files(folder: Path) -> dict[tuple[str, int, int], Path]:
    """Return the ranks' files by kind, world size and rank."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    for name in names:
        match = RANK_FILE.fullmatch(name)
        if match and int(match[3]) < int(match[2]):
            found[match[1], int(match[2]), int(match[3])] = folder / name
    return found


def _rank_faults(path: Path, part: str, found: dict[tuple[str, int, int], Path], world: int,
                 kinds: Collection[str]) -> list[str]:
    """Return what is wrong with the ranks' files of those kinds, one sentence a kind and fault."""
    faults = []
    for kind in kinds:
        files = {rank: file for (of, size, rank), file in found.items() if of == kind and size == world}
        missing = world - len(files)
        if missing:
            which = f"{missing} of {world} ranks"
            if missing == 1:
                which = f"rank {next(rank for rank in range(world) if rank not in files)}"
            faults.append(f"{part}: the {kind} file of {which} is missing")
        for file in files.values():
            fault = archive_fault(file)
            if fault:
                faults.append(f"{file.relative_to(path)} {fault}")
                break
    return faults


def _is_config(path: Path) -> bool:
    try:
        read_object(path, nonfinite=True)
    except (OSError, ValueError):
        return False
    return True


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # it has just been pruned
                continue
    return total
