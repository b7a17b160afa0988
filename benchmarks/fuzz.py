#!/usr/bin/env python3
"""Throw inputs that nobody listed at what reads and prints foreign things; say what fell over.

    python benchmarks/fuzz.py                                    # half a minute of every target
    python benchmarks/fuzz.py merger.pickle --seconds 600        # one of them, for long
    python benchmarks/fuzz.py merger.pickle --seed 4711 --cases 1

Each `fuzz_WING.py` beside this file has a `targets()` of its own: by name, how an input is made from a random generator
and how it is checked. An input that raises anything, takes more than 10 s of processor time or the process above 1 GB is a finding; it is
kept in `tests/fixtures/fuzz/TARGET/`, from where the tests throw it again. Exit codes: 0 none, 1 findings, 2 misuse.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE.parent / "tests/fixtures/fuzz"
LONGEST, HIGHEST = 10.0, 1 << 30  # s, bytes
GRACE = 60.0  # s without a word from a worker until it is ended: its imports take long on a busy machine


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        make: returns an input, as bytes, from a random generator.
        check: takes an input and an empty folder, raises for a finding, and returns whether it was accepted.
        ready: is called once before.
    """
    make: Callable[[random.Random], bytes]
    check: Callable[[bytes, Path], bool]
    ready: Callable[[], object] = lambda: None


def all_targets() -> dict[str, Target]:
    """Return the targets of all wings by name."""
    found: dict[str, Target] = {}
    for path in sorted(HERE.glob("fuzz_*.py")):
        found |= importlib.import_module(path.stem).targets()
    return found


def spent_seconds() -> float:
    """Return the processor time of this process and those that it waited for: a busy machine finds no hangs."""
    return sum(used.ru_utime + used.ru_stime
               for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def throw(target: Target, data: bytes) -> tuple[bool, str, float]:
    """Check one input; return whether it was accepted, the finding or an empty text, and the seconds."""
    began = spent_seconds()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        try:
            accepted, finding = target.check(data, Path(folder)), ""
        except Exception:
            accepted, finding = False, traceback.format_exc(limit=-4)
    seconds = spent_seconds() - began
    if not finding and seconds > LONGEST:
        finding = f"took {seconds:.0f} s"
    used = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    if not finding and used > HIGHEST:
        finding = f"took {used >> 20} MiB"
    return accepted, finding, seconds


def work(name: str, seed: int, cases: int, seconds: float) -> None:
    """Throw inputs at one target; write a line of JSON before and after each. Runs in a process of its own."""
    target, number = all_targets()[name], seed
    target.ready()
    end = time.monotonic() + seconds
    while number < seed + cases and time.monotonic() < end:
        print(json.dumps({"seed": number}), flush=True)
        began = time.monotonic()
        accepted, finding, spent = throw(target, target.make(random.Random(f"{name} {number}")))
        print(json.dumps({"seed": number, "accepted": accepted, "finding": finding, "seconds": spent,
                          "wall": time.monotonic() - began}), flush=True)  # yapf: disable
        if finding.startswith("took") and "MiB" in finding:  # the highest mark stays with a process
            return
        number += 1


@dataclass
class Figures:
    """What one target came to."""
    cases: int = 0
    accepted: int = 0
    findings: int = 0
    seconds: float = 0.0
    slowest: float = 0.0


def run(name: str, seed: int, cases: int, seconds: float) -> Figures:
    """Fuzz one target in processes that are ended where they hang; keep and print what is found."""
    figures, number = Figures(), seed
    while number < seed + cases and (left := seconds - figures.seconds) > 0:
        command = [sys.executable, __file__, name, "--worker", "--seed", str(number), "--cases", str(seed + cases - number),
                   "--seconds", str(left)]  # yapf: disable
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            number = _follow(process, name, number, figures, seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return figures


def _follow(process: subprocess.Popen[bytes], name: str, number: int, figures: Figures, seconds: float) -> int:
    """Read a worker's lines until it ends or hangs; return the seed to go on with."""
    assert process.stdout is not None
    selector, began, asked = selectors.DefaultSelector(), False, number
    selector.register(process.stdout, selectors.EVENT_READ)
    while True:
        if not selector.select(GRACE):
            _keep(name, number, "hangs", figures)
            return number + 1
        line = process.stdout.readline()
        if not line:
            if began:
                _keep(name, number, "ended the process", figures)
                return number + 1
            if process.wait():
                sys.exit(f"fuzz: {name} does not start; see with --worker")
            figures.seconds = max(figures.seconds, seconds if number == asked else 0.0)
            return number
        told = json.loads(line)
        number, began = told["seed"], "accepted" not in told
        if began:
            continue
        figures.cases += 1
        figures.accepted += told["accepted"]
        figures.seconds += told["wall"]
        figures.slowest = max(figures.slowest, told["seconds"])
        if told["finding"]:
            _keep(name, number, told["finding"], figures)
        number += 1


def _keep(name: str, seed: int, finding: str, figures: Figures) -> None:
    figures.findings += 1
    folder = CORPUS / name
    folder.mkdir(parents=True, exist_ok=True)
    target = all_targets()[name]
    target.ready()
    (folder / str(seed)).write_bytes(target.make(random.Random(f"{name} {seed}")))
    print(
        f"{name}, seed {seed} (kept as {folder / str(seed)}):\n{finding.encode('ascii', 'backslashreplace').decode()}",
        flush=True)


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Fuzz what reads and prints foreign things.")
    parser.add_argument("targets", nargs="*", help="by name, or by wing (default: all)")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each target (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the first input (default: 0)")
    parser.add_argument("--cases", type=int, default=1 << 40, help="inputs for each target (default: as time allows)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.targets[0], args.seed, args.cases, args.seconds)
        return 0
    known = all_targets()
    wanted = [
        name for name in known if not args.targets or name in args.targets or name.partition(".")[0] in args.targets
    ]
    strange = [word for word in args.targets if not any(word in (name, name.partition(".")[0]) for name in known)]
    if strange:
        print(f"fuzz: no target {strange[0]}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    found = 0
    for name in wanted:
        figures = run(name, args.seed, args.cases, args.seconds)
        found += figures.findings
        print(f"{name}: {figures.cases} inputs, {figures.accepted} accepted, {figures.findings} findings, slowest "
              f"{figures.slowest:.1f} s", flush=True)  # yapf: disable
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
