"""What the user sees: progress on standard error, tables and summaries on standard output."""
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

from merger.dtypes import itemsize
from merger.foreign.text import printable

PLAIN_STEP = 5.0  # seconds between two plain progress lines
UNBROKEN = 10_000  # columns, where nobody looks: whoever reads lines gets each value whole


class Progress(Protocol):
    """A running display of bytes done."""

    def __enter__(self) -> Callable[[int], None]:
        ...

    def __exit__(self, *_: object) -> None:
        ...


def size_text(count: float) -> str:
    """Return bytes in decimal units.

    >>> size_text(3_087_000_000), size_text(512)
    ('3.09 GB', '512 B')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} GB" if count < 1000 else f"{count / 1000:.2f} TB"


def count_text(count: float) -> str:
    """Return a number of parameters as the field writes it.

    >>> count_text(494_032_768), count_text(7_615_616_512), count_text(119_000)
    ('494.0M', '7.6B', '119.0K')
    """
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}"
    return str(int(count))


def say(text: str) -> None:
    """Print one line of what goes on."""
    print(f"merge: {printable(text)}", file=sys.stderr, flush=True)


def progress(label: str, total: int, quiet: bool) -> Progress:
    """Return a display for `total` bytes: a bar on a terminal, a line now and then elsewhere, nothing if `quiet`."""
    if quiet or total == 0:
        return _Silent()
    return _Bar(label, total) if sys.stderr.isatty() else _Lines(label, total)


class _Silent:

    def __enter__(self) -> Callable[[int], None]:
        return lambda count: None

    def __exit__(self, *_: object) -> None:
        pass


class _Lines:

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Callable[[int], None]:
        return self._step

    def _step(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last >= PLAIN_STEP:
            self._last = now
            rate = self._done / (now - self._began)
            say(f"{self._label} {size_text(self._done)} of {size_text(self._total)}, {size_text(rate)}/s, "
                f"{(self._total - self._done) / rate:.0f} s left")

    def __exit__(self, *_: object) -> None:
        pass


class _Bar:

    def __init__(self, label: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                             TimeRemainingColumn(), console=Console(stderr=True), transient=True)  # yapf: disable
        self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._bar.__enter__()
        return lambda count: self._bar.update(self._task, advance=count)

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__(None, None, None)


def mesh_text(meshes: list[dict[str, int]]) -> str:
    """Return the device meshes in one line."""
    return "; ".join(" x ".join(f"{name} {size}" for name, size in mesh.items()) for mesh in meshes) or "none"


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on one line, in ASCII: whatever the encoding and the folders' names."""
    print(json.dumps(value))


Rows = list[tuple[str, str | list[str]]]  # names, and one value or a line each


def print_table(title: str, rows: Rows) -> None:
    """Print a table of names and values."""
    from rich.table import Table
    from rich.text import Text
    table = Table(title=Text(title, justify="left"), title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        lines = [value] if isinstance(value, str) else value
        table.add_row(Text(printable(name)), Text("\n".join(map(printable, lines))))
    _print(table)


class Kind(NamedTuple):
    """What is shown of a tensor: its description, shape (elements) and element type."""
    description: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def print_tensors(tensors: Iterable[Kind]) -> None:
    """Print which element types and placements the tensors have, and how many of each."""
    from rich.table import Table
    from rich.text import Text
    kinds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        kind = tensor.description.replace(str(list(tensor.shape)) + " ", "")
        kinds[kind] += 1
        sizes[kind] += tensor.numel * itemsize(tensor.dtype)
    table = Table(title="tensors", title_justify="left", title_style="bold")
    for column, justify in (("type and placement", "left"), ("count", "right"), ("size", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for kind, count in kinds.most_common():
        table.add_row(Text(printable(kind)), str(count), size_text(sizes[kind]))
    _print(table)


def _print(table: Any) -> None:
    from rich.console import Console
    console = Console(width=None if sys.stdout.isatty() else UNBROKEN, highlight=False)
    with console.capture() as text:  # by itself it ends the program where the reader of a pipe has left
        console.print(table)
    print(text.get(), end="")


def equality_text(result: Mapping[str, Any]) -> str:
    """Return how far a verified result is known to be that of the shards.

    >>> equality_text({"fused": 0}), equality_text({"fused": 2})
    ('every element', '2 fused tensors within the rounding, all others in every element')
    """
    fused = result.get("fused", 0)
    return f"{fused} fused tensors within the rounding, all others in every element" if fused else "every element"


def summary_rows(record: Mapping[str, Any]) -> Rows:
    """Return the closing table of a merge from its record."""
    rate = record["bytes_read"] / max(record["seconds"], 1e-9)
    return [
        ("merged", f"{record['tensors']:,} tensors, {count_text(record['parameters'])} parameters, from "
         f"{len(record['sources'])} files of {record['world_size']} ranks"),
        ("mesh", mesh_text(record["meshes"])),
        ("written", f"{size_text(record['bytes_written'])} of {record['dtype']} in {len(record['files'])} "
         f"file{'s' if len(record['files']) > 1 else ''}"),
        ("dropped", ", ".join(record["tied_dropped"]) or "nothing"),
        ("NaN, infinite", f"{record['nan']}, {record['inf']}"),
        ("config check", record["model_check"]),
        ("verified", f"yes, {equality_text(record)}" if record["verified"] else "no (--verify does)"),
        ("time", f"{record['seconds']:.1f} s, {size_text(rate)}/s read, on {record['device']}, by {record['threads']} "
         f"thread{'s' if record['threads'] > 1 else ''}"),
        ("folder", record["folder"]),
        *([("uploaded", record["uploaded"])] if "uploaded" in record else []),
    ]
