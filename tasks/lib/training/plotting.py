"""Write a run's page of curves."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.lib.errors import UserError
from tasks.lib.training import runs
from training import plot
from training.curve import points
from training.folder import RunFolder, atomic_write


def write(run: RunFolder, output: str = "") -> Path:
    """Write the page; return the file.

    Raises:
        UserError: the run's run.json cannot be read, or the file has no folder.
        OSError: the file cannot be written.
    """
    found, record = runs.read(run)
    target = Path(output).expanduser() if output else run.path / "plot.html"
    if output and (target.is_dir() or not target.parent.is_dir()):
        raise UserError(f"--output {output}: " + (f"it is a folder; write {target / 'plot.html'}" if target.is_dir(
        ) else f"there is no folder {target.parent}; make it first, or choose another"))
    atomic_write(target, plot.page(found, record, run.read_metrics(), evaluations(run)))
    return target


def evaluations(run: RunFolder) -> list[Any]:
    """Return the evaluations of the run's checkpoints."""
    return list(points(run.eval))
