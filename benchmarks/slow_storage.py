"""Measures how much of a storage's latency the merger hides: one checkpoint, read through a file system that waits.

    pip install mfusepy    # and libfuse: apt-get install fuse3
    python benchmarks/slow_storage.py --size 0.5B --work-dir DIR

mounts the checkpoint's folder read-only (FUSE; no root needed where `fusermount3` is) with so many milliseconds before each
answer to a read, as a network's file system or an object store has them, and merges from there onto the disk: with
the threads that the merger chooses, and with numbers of threads that are told. It prints a Markdown table. The kernel asks
in requests of at most 128 KiB, several of them ahead. Linux only; not in a container without /dev/fuse.

Exit codes: 0, all merged; 1, a merge failed; 2, bad input, or FUSE is missing; 130, interrupted.
"""
from __future__ import annotations

import argparse
import ctypes
import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import machine
import merge
from contenders import OURS, Contender, prepare
from fsdp_checkpoint import SIZES, Checkpoint
from merge_report import spread, table
from process_meter import Measurement, measure

REQUESTS = 128  # that may be under way: FUSE's own limits (12, and 10 threads) would be measured otherwise
CHOSEN = 0  # threads: the merger's choice


def main() -> int:
    """Run the benchmark; return its exit code."""
    options = parse()
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:
        print(f"benchmark: {error}; pip install mfusepy, and apt-get install fuse3 (exit 2)", file=sys.stderr)
        return 2

    def work() -> int:
        with merge.work_folder(options) as folder:
            return run(options, folder)

    return merge.exit_code(work)


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Measure how much of a storage's latency the merger hides.")
    add = parser.add_argument
    add("--size", choices=SIZES, default="0.5B", help="shapes of the model that is merged (default: 0.5B)")
    add("--latency", type=float, nargs="+", default=[0, 5, 20], metavar="MS", help="ms a read (default: 0 5 20)")
    add("--threads",
        type=int,
        nargs="*",
        default=[4],
        metavar="N",
        help="numbers of threads beside the merger's own choice (default: 4)")
    add("--runs", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    add("--work-dir", type=Path, metavar="DIR", help="where the checkpoint is made, kept and found again")
    add("--keep", action="store_true", help="keep the temporary folder's checkpoint")
    add("--python", default=sys.executable, help="interpreter for the merger (default: the one running this)")
    return parser.parse_args()


def run(options: argparse.Namespace, folder: Path) -> int:
    """Measure and print; return the exit code."""
    checkpoint = merge.checkpoint_in(folder, options.size, options.python)
    script = merge.CHECKOUT / "scripts/model_merger.py"
    ways = [CHOSEN, *options.threads]
    found: dict[tuple[float, int], list[tuple[Measurement, int]]] = {}
    for number in range(options.runs + 1):  # the first one lets the merger see the config
        for latency in options.latency if number else options.latency[:1]:
            for threads in ways if number else ways[:1]:
                extra = ("--threads", str(threads)) if threads else ()
                contender = Contender(OURS, merge.interpreter(options.python), script, extra)
                with mounted(checkpoint.actor, folder / "slow", latency / 1000) as actor:
                    seen = dataclasses.replace(checkpoint, actor=actor)
                    measured = once(contender, seen, folder / "run")
                if measured[0].exit_code:
                    print(f"benchmark: the merger failed: {measured[0].tail} (exit 1)", file=sys.stderr)
                    return 1
                if number:
                    found.setdefault((latency, threads), []).append(measured)
                    merge.say(
                        f"{latency:g} ms, {threads or 'chosen'}: {measured[0].seconds:.2f} s, {measured[1]} threads")
    print(report(options, folder, found))
    return 0


def once(contender: Contender, checkpoint: Checkpoint, folder: Path) -> tuple[Measurement, int]:
    """Return one merge's measurement, and with how many threads it ended."""
    job = prepare(contender, checkpoint, folder)
    try:
        measured = measure(job.command, job.env, job.folder, job.folder / "log")
        record = job.output / "merge.json"
        return measured, json.loads(record.read_text())["threads"] if record.is_file() else 0
    finally:
        shutil.rmtree(job.folder)


def report(options: argparse.Namespace, folder: Path, found: dict[tuple[float, int], list[tuple[Measurement,
                                                                                                int]]]) -> str:
    """Return the table and what a reader must know."""
    size = SIZES[options.size]
    rows: list[tuple[str, ...]] = [("ms a read", "threads", "s", "times without latency", "CPU s", "all processes MB")]
    medians = {key: statistics.median(run.seconds for run, _ in runs) for key, runs in found.items()}
    for (latency, threads), runs in found.items():
        ended = sorted({number for _, number in runs})
        least = medians.get((min(options.latency), threads), 0)
        rows.append((f"{latency:g}", str(threads) if threads else f"chosen: {', '.join(map(str, ended))}",
                     spread([run.seconds for run, _ in runs]), f"{medians[latency, threads] / least:.2f}",
                     f"{statistics.median(run.cpu_seconds for run, _ in runs):.1f}",
                     f"{max(run.tree_rss for run, _ in runs) / 1e6:.0f}"))  # yapf: disable
    described = machine.describe(folder, {"Python": merge.interpreter(options.python)})
    return "\n\n".join([
        f"### {options.size} from a storage that waits: {size.world_size} ranks, {size.shard_bytes() / 1e9:.2f} GB of fp32 shards",
        table(rows),
        "Medians (least–most). The file system's own work (Python) takes part of the cores.",
        "; ".join(f"{name}: {value}" for name, value in described.items()) + "."
    ]) + "\n"  # yapf: disable


@contextmanager
def mounted(source: Path, point: Path, seconds: float) -> Iterator[Path]:
    """Mount `source` read-only at `point`, each answer to a read waiting `seconds`; nothing of it is cached before."""
    point.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=serve, args=(str(source), str(point), seconds))
    process.start()
    try:
        deadline = time.monotonic() + 30
        while not os.path.ismount(point):
            if not process.is_alive() or time.monotonic() > deadline:
                raise OSError(f"FUSE cannot be mounted at {point}; the lines above say why")
            time.sleep(0.02)
        yield point
    finally:
        unmount(point)
        process.join(10)
        process.kill()
        point.rmdir()


def unmount(point: Path) -> None:
    """Unmount `point`, as root or by FUSE's own program."""
    if os.path.ismount(point) and (os.geteuid() or ctypes.CDLL(None).umount2(os.fsencode(point), 2)):
        subprocess.run(["fusermount3", "-u", "-z", str(point)], check=False)


def serve(source: str, point: str, seconds: float) -> None:
    """Serve the files of `source` at `point` until it is unmounted."""
    import mfusepy

    class Slow(mfusepy.Operations):  # type: ignore[misc]
        """Reads of the files of `source`, each answered late."""
        use_ns = True

        def init_with_config(self, conn_info: Any, config: Any) -> None:
            conn_info.max_background = conn_info.congestion_threshold = REQUESTS

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            found = self._of(os.lstat, path)
            return {name: getattr(found, name) for name in ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")
                    } | {"st_mtime": found.st_mtime_ns, "st_ctime": found.st_ctime_ns}  # yapf: disable

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *self._of(os.listdir, path)]

        def open(self, path: str, flags: int) -> int:
            return self._of(lambda name: os.open(name, os.O_RDONLY), path)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            time.sleep(seconds)
            return os.pread(fh, size, offset)

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

        @staticmethod
        def _of(ask, path: str):  # type: ignore[no-untyped-def]
            try:
                return ask(source + path)
            except OSError as error:
                raise mfusepy.FuseOSError(error.errno or errno.EIO) from None

    mfusepy.FUSE(Slow(), point, foreground=True, ro=True, max_threads=REQUESTS, attr_timeout=60)


if __name__ == "__main__":
    sys.exit(main())
