"""Whether the ranks' files are of one training step, as far as what lies beside them tells.

The model's files name no step. verl writes beside each the rank's extra state, with the learning rate's scheduler, and
when all ranks have written, the tracker beside the steps. A step that is written again over an earlier one of the same
number, model files alone, leaves nothing that tells but the times of the files.
"""
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merger import MergeError
from merger.discover import RankFiles
from merger.filenames import STEP_FOLDER, TRACKER
from merger.foreign.limits import each
from merger.pickles import skim
from merger.shardfile import read_shard_file

APART = 600.0  # s between ranks' files of one step at most: each writes as long, and a barrier ends it


def check_one_step(files: RankFiles) -> list[str]:
    """Return notes of what may be of several steps, or not complete.

    Raises:
        MergeError: the ranks' extra states name different steps.
    """
    steps = {rank: step for rank, step in _scheduled(files) if step is not None}
    if len(set(steps.values())) > 1:
        (first, one), (other, two) = next((a, b) for a in steps.items() for b in steps.items() if a[1] != b[1])
        raise MergeError(
            f"the extra state of rank {first} is of step {one}, that of rank {other} of step {two}: "
            f"{files.folders[0]} holds files of different steps; copy one step whole, or, if only the extra states are of "
            "another one, move extra_state_*.pt away")
    return [*_tracked(files), *_apart(files)]


def _scheduled(files: RankFiles) -> Iterator[tuple[int, int | None]]:
    """Yield each rank with the scheduler's step in its extra state; None where that is not there or does not say."""
    name = "extra_state_world_size_{}_rank_{}.pt"
    places = [(rank, path.with_name(name.format(files.world_size, rank))) for rank, path in sorted(files.paths.items())]
    places = [(rank, path) for rank, path in places if path.is_file()]

    def read(item: tuple[int, Path]) -> int | None:
        try:
            return _step_in(read_shard_file(item[1], skim, files.seen).content)
        except (MergeError, OSError):  # nothing is taken from it but this
            return None

    if places:
        yield from zip((rank for rank, _ in places), each(read, places, lambda item: str(item[1])), strict=True)


def _step_in(content: Any) -> int | None:
    scheduler = content.get("lr_scheduler") if type(content) is dict else None
    step = scheduler.get("last_epoch") if type(scheduler) is dict else None
    return step if type(step) is int and 0 <= step < 1 << 63 else None


def _tracked(files: RankFiles) -> Iterator[str]:
    """Yield a note where the tracker names an earlier step than the folder's."""
    folder = next((place for path in files.folders for place in (path.absolute(), *path.absolute().parents)
                   if STEP_FOLDER.fullmatch(place.name)), None)  # yapf: disable
    if folder is None:
        return
    try:
        text = files.seen.read(folder.parent / TRACKER, 64).decode("ascii", "replace").strip()
    except (OSError, MergeError):
        return
    if re.fullmatch(r"\d{1,18}", text) and int(text) < int(folder.name.rpartition("_")[2]):
        yield (
            f"{TRACKER} names step {text}: {folder.name} is being written, or its training ended before it was whole")


def _apart(files: RankFiles) -> Iterator[str]:
    """Yield a note where some ranks' files were written just now, and others long before."""
    written = {rank: files.seen.identity(path).modified / 1e9 for rank, path in files.paths.items()}
    new, old = max(written, key=lambda rank: written[rank]), min(written, key=lambda rank: written[rank])
    if written[new] - written[old] > APART and abs(time.time() - written[new]) < APART:
        yield (f"rank {new} was written just now, rank {old} {(written[new] - written[old]) / 3600:.1f} h before it; "
               "if a training writes this step again, merge when it has ended")
