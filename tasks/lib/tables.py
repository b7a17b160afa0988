"""Columns, sizes and ages, as a terminal shows them."""
from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from tasks.lib.errors import printable
from tasks.lib.notices import put


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print `rows` in columns under `head`, a line each; nothing where there is no row."""
    if not rows:
        return
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        put("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def human_size(size: float) -> str:
    """Return `size` bytes the way `docker images` does: 1.5GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:  # which is rounded to three digits, and not to 1e+03
            return f"{size:.3g}{unit}"
        size /= 1000
    return f"{size:.3g}TB"


def human_age(age: timedelta) -> str:
    """Return `age` in its largest unit: 3 days."""
    seconds = int(age.total_seconds())
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return "seconds"
