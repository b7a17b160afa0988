"""Measures our checkpoint merger beside AgentGym-RL's and verl's, beside torch's own tools, and beside what the disk can do.

    python benchmarks/merge.py --size 1.5B --work-dir DIR --agentgym-rl CHECKOUT --verl CHECKOUT --peer-python PYTHON

prints a Markdown report on standard output (progress goes to standard error). The checkpoint is made on the spot. Linux
only: memory and bytes come from /proc. benchmarks/README.md says how the peers are installed.

Exit codes: 0, all ran and all outputs are right (goals may be missed); 1, a merger failed or its output is wrong;
2, bad input; 130, interrupted.
"""
from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import disk_limit
import fsdp_checkpoint
import machine
import tensor_digest
from contenders import (
    AGENTGYM,
    FIRST,
    FORMS,
    FROM_DCP,
    FROM_SHARDED,
    OURS,
    TORCH_TOOLS,
    VERL,
    Contender,
    find_agentgym,
    find_verl,
    prepare,
)
from fsdp_checkpoint import DCP, RANKS, SHARDED, SIZES, Checkpoint
from merge_report import Results, markdown
from process_meter import Measurement, measure
from tensor_digest import differences, digest_folder

CHECKOUT = Path(__file__).resolve().parents[1]
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
GB = 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up as Ctrl-C does

    def work() -> int:
        check(options)
        with work_folder(options) as folder:
            return run(options, folder, contenders(options))

    return exit_code(work)


def exit_code(work: Callable[[], int]) -> int:
    """Return what `work` returns; where it cannot be done or is interrupted, 2 or 130 after a line that says so."""
    try:
        return work()
    except (ValueError, OSError) as error:
        print(f"benchmark: {error} (exit 2)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark: interrupted (exit 130)", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure our merger beside AgentGym-RL's, verl's and the disk itself.",
                                     epilog="The report is Markdown on standard output; progress goes to stderr.")
    add = parser.add_argument
    add("--size", choices=SIZES, default="1.5B", help="shapes of the model that is merged (default: 1.5B)")
    add("--runs", type=int, default=3, metavar="N", help="timed runs of each merger, cold and warm (default: 3)")
    add("--cache",
        choices=("both", "cold", "warm"),
        default="both",
        help="whether the shards are in the page cache when a merger starts (default: both, one after the other)")
    add("--work-dir",
        type=Path,
        metavar="DIR",
        help="where checkpoints are made, kept and found again (default: a temporary folder beside the checkout)")
    add("--keep", action="store_true", help="keep the temporary folder's checkpoints too, and say where")
    add("--script",
        type=Path,
        default=CHECKOUT / "scripts/model_merger.py",
        metavar="FILE",
        help="our merger (default: this checkout's scripts/model_merger.py)")
    add("--script-args", default="", metavar="ARGS", help="further arguments for it, as one word: '--threads 4'")
    add("--python", default=sys.executable, help="interpreter for our merger (default: the one running this)")
    add("--agentgym-rl", type=Path, metavar="PATH", help="checkout of WooooDyy/AgentGym-RL, or its model_merger.py")
    add("--verl", type=Path, metavar="PATH", help="checkout of volcengine/verl")
    add("--peer-python", default=sys.executable, metavar="PYTHON", help="interpreter for those two (default: as above)")
    add("--forms",
        nargs="+",
        choices=(RANKS, DCP, SHARDED),
        default=[RANKS, DCP, SHARDED],
        help="what is merged: the ranks' files, torch's distributed checkpoint, its sharded safetensors (default: all)")
    add("--drop-caches",
        action="store_true",
        help="for a cold start empty the whole page cache (root) instead of the shards' part of it only")
    add("--no-compare", action="store_true", help="do not check the merged tensors")
    add("--json", type=Path, metavar="FILE", help="write every measurement there too")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for what the user can mend, before anything takes time."""
    if not sys.platform.startswith("linux"):
        raise ValueError(f"this benchmark reads /proc, and {sys.platform} has none; run it on Linux")
    if options.runs < 1:
        raise ValueError(f"--runs {options.runs}: at least 1 is needed")
    if not options.script.is_file():
        raise ValueError(f"--script {options.script}: no such file; give the path of model_merger.py")
    if options.json and not options.json.resolve().parent.is_dir():
        raise ValueError(f"--json {options.json}: its folder does not exist; make it first")
    if options.drop_caches and not os.access(DROP_CACHES, os.W_OK):
        raise ValueError(f"--drop-caches: {DROP_CACHES} cannot be written; run as root, or leave the option out")


def contenders(options: argparse.Namespace) -> list[Contender]:
    extra = tuple(shlex.split(options.script_args))
    names = [
        *((OURS, FIRST) if RANKS in options.forms else ()), *(name for name in FORMS if FORMS[name] in options.forms)
    ]
    found = [Contender(name, interpreter(options.python), options.script.resolve(), () if name in TORCH_TOOLS else extra)
             for name in names]  # yapf: disable
    if RANKS not in options.forms:
        return found
    if options.agentgym_rl:
        found.append(Contender(AGENTGYM, interpreter(options.peer_python), find_agentgym(options.agentgym_rl)))
    if options.verl:
        found.append(Contender(VERL, interpreter(options.peer_python), find_verl(options.verl)))
    return found


def interpreter(python: str) -> str:
    """Absolute path of an interpreter, its links kept: a virtual environment is found through them."""
    path = shutil.which(python)
    if not path:
        raise ValueError(f"{python}: no such interpreter; give a path for --python or --peer-python")
    return os.path.abspath(path)


@contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    """The folder for checkpoints; a temporary one goes away again unless it is to be kept."""
    if options.work_dir:
        try:
            options.work_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"--work-dir {options.work_dir}: {error.strerror}; name a folder that can be made") from None
        yield options.work_dir.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="merge-benchmark-", dir=CHECKOUT.parent))
    try:
        yield folder
    finally:
        if options.keep:
            say(f"checkpoints kept: --work-dir {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def run(options: argparse.Namespace, folder: Path, found: list[Contender]) -> int:
    """Make what is needed, measure, print; returns the exit code."""
    size = SIZES[options.size]
    results = Results(options.size, size.shard_bytes(), size.output_bytes(), [each.name for each in found])
    results.machine = facts(folder, found)
    check_disk(folder, options.size, options.forms)
    tiny, checkpoint = ({form: checkpoint_in(folder, name, options.python, form)
                         for form in dict.fromkeys((RANKS, *options.forms))} for name in ("tiny", options.size))  # yapf: disable
    scratch = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    try:
        bench = Benchmark(options, results, checkpoint, tiny, scratch)
        bench.rounds(bench.ready(found))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    results.machine["load average"] += f" before, {os.getloadavg()[0]:.1f} after"
    print(markdown(results))
    if options.json:
        options.json.write_text(json.dumps(dataclasses.asdict(results), indent=1) + "\n")
    return 1 if bench.failed or any(results.comparison.values()) else 0


def facts(folder: Path, found: list[Contender]) -> dict[str, str]:
    pythons: dict[str, str] = {}
    for contender in found:
        label = "our Python" if contender.name in (OURS, FIRST) else "the peers' Python"
        pythons[label] = contender.python
    described = machine.describe(folder, pythons)
    described["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    described["load average"] = f"{os.getloadavg()[0]:.1f}"
    return described


def check_disk(folder: Path, name: str, forms: Sequence[str]) -> None:
    """Raise ValueError unless the checkpoint in each form, one output (a tied head may be saved twice) and 1 GB fit."""
    size = SIZES[name]
    made = sum(fsdp_checkpoint.find(folder / name, name, form) is None for form in {RANKS, *forms})
    output = size.shard_bytes() if {DCP, SHARDED} & {*forms} else (2 if size.tied else 1) * size.output_bytes()
    needed = output + GB + made * size.shard_bytes()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"--size {name} needs {needed / GB:.1f} GB in {folder}, and {free / GB:.1f} GB are free; "
                         "choose a smaller size or another --work-dir")


def checkpoint_in(folder: Path, name: str, python: str, form: str = RANKS) -> Checkpoint:
    """The checkpoint of that size, made if it is not there; by a process of its own, because this one stays small.

    (A process inherits its starter's memory for a moment, so a large starter would blur what is measured.)
    """
    found = fsdp_checkpoint.find(folder / name, name, form)
    if not found:
        say(f"making the {name} checkpoint ({form}) in {folder / name}")
        command = [python, fsdp_checkpoint.__file__, "--size", name, "--folder", str(folder / name), "--form", form]
        made = subprocess.run(command, stdout=sys.stderr)
        found = fsdp_checkpoint.find(folder / name, name, form)
        if made.returncode or not found:
            raise ValueError(f"the {name} checkpoint could not be made with {python} (exit {made.returncode}); "
                             "the lines above say why")
    return found


@dataclasses.dataclass
class Benchmark:
    """Runs the rounds and fills `results`; `tiny` warms a contender's libraries up. Both by form."""
    options: argparse.Namespace
    results: Results
    checkpoints: dict[str, Checkpoint]
    tiny: dict[str, Checkpoint]
    scratch: Path
    failed: bool = False
    remaining: float = 0.0  # the largest share of the shards that an eviction left in the page cache
    count: int = 0

    @property
    def size(self) -> fsdp_checkpoint.Size:
        """The shapes."""
        return self.checkpoints[RANKS].size

    def ready(self, found: list[Contender]) -> list[Contender]:
        """Those that fit into memory; each merges the tiny checkpoint once, so that its libraries are in the cache."""
        available, kept = machine.memory_available(), []
        for contender in found:
            needed = contender.memory_needed(self.size)
            if needed > available:
                reason = f"it needs about {needed / GB:.0f} GB of memory and {available / GB:.0f} GB are available"
                self.results.skipped[contender.name] = reason
                say(f"{contender.name}: not run, {reason}")
                continue
            say(f"{contender.name}: warming up")
            self.warm_up(contender)
            if contender.name in (OURS, FROM_DCP, FROM_SHARDED):
                self.remember_config(contender)
            kept.append(contender)
        return kept

    def remember_config(self, contender: Contender) -> None:
        """Let our merger see the checkpoint's config once, without merging."""
        job = prepare(contender, self.checkpoints[contender.form], self.scratch / "seen")
        made = subprocess.run([*job.command, "--dry-run"], env=job.env, cwd=job.folder, capture_output=True, text=True)
        shutil.rmtree(job.folder)
        if made.returncode:
            raise ValueError(
                f"{contender.name} --dry-run failed (exit {made.returncode}): {made.stderr.strip()[-300:]}")

    def warm_up(self, contender: Contender) -> None:
        self.merge(contender, self.tiny[contender.form])

    def rounds(self, found: list[Contender]) -> None:
        """Contenders take turns, the first of a round being another each time; limits are measured in each round."""
        wanted = ("cold", "warm") if self.options.cache == "both" else (self.options.cache, )
        for index in range(max(self.options.runs, 3)):
            turn = index % max(len(found), 1)
            for contender in (found[turn:] + found[:turn]) if index < self.options.runs else []:
                for state in wanted:
                    if self.fits(contender, state):
                        self.measure(contender, state, f"round {index + 1} of {self.options.runs}")
            self.limits()
            self.startup(("numpy", "torch"))
        self.results.cold = self.describe_cold()

    def fits(self, contender: Contender, state: str) -> bool:
        """Whether the shards can stay in memory beside the merger; a cold run has no such need."""
        needed = self.size.shard_bytes() + contender.memory_needed(self.size)
        if state == "cold" or needed < machine.meminfo("MemAvailable"):
            return True
        name = f"{contender.name}, warm"
        if name not in self.results.skipped:
            self.results.skipped[name] = f"shards and merger ({needed / GB:.0f} GB) do not fit into memory together"
            say(f"{name}: not run, {self.results.skipped[name]}")
        return False

    def measure(self, contender: Contender, state: str, label: str) -> None:
        if state == "warm":
            disk_limit.warm(self.checkpoints[contender.form].shards())
        else:
            self.make_cold(contender)
        measured, durable, texts = self.merge(contender, self.checkpoints[contender.form])
        self.results.runs.setdefault(contender.name, {}).setdefault(state, []).append(measured)
        self.results.durable.setdefault(contender.name, {}).setdefault(state, []).append(durable)
        if not measured.exit_code and not self.options.no_compare:
            self.results.compared += 1
            known = self.results.comparison.setdefault(contender.name, [])
            known += [text for text in texts if text not in known]
        verdict = f"{measured.seconds:.2f} s, {measured.tree_rss / 1e6:.0f} MB" if not measured.exit_code else "failed"
        say(f"{label}: {contender.name}, {state}: {verdict}{'; ' + texts[0] if texts else ''}")

    def make_cold(self, contender: Contender) -> None:
        if self.options.drop_caches:
            os.sync()
            DROP_CACHES.write_text("1")
            self.warm_up(contender)  # its interpreter and libraries went too, and are not what is measured
        shards = self.checkpoints[contender.form].shards()
        disk_limit.evict(shards)
        self.remaining = max(self.remaining, disk_limit.cached_share(shards))

    def merge(self, contender: Contender, checkpoint: Checkpoint) -> tuple[Measurement, float, list[str]]:
        """One run: its measurement, the seconds until the output was on the disk, and what is wrong with it."""
        self.count += 1
        job = prepare(contender, checkpoint, self.scratch / str(self.count))
        try:
            measured = measure(job.command, job.env, job.folder, job.folder / "log")
            if measured.exit_code:
                self.failed = True
                note = f"{contender.name} failed (exit {measured.exit_code}): {measured.tail}"
                if note not in self.results.notes:
                    say(note)
                    self.results.notes.append(note)
                return measured, 0.0, []
            begin = time.perf_counter()
            flush(job.output)
            durable = measured.seconds + time.perf_counter() - begin
            return measured, durable, self.compare(contender, checkpoint, job.output)
        finally:
            shutil.rmtree(job.folder)
            flush(self.scratch)  # the deletion too is over before the next run begins

    def compare(self, contender: Contender, checkpoint: Checkpoint, output: Path) -> list[str]:
        if self.options.no_compare:
            return []
        expected = checkpoint.expected_fp32 if contender.form != RANKS else checkpoint.expected
        try:
            found = self.digest(output / "model.pt") if (output / "model.pt").is_file() else digest_folder(output)
        except (ValueError, KeyError, OSError) as error:
            return [f"unreadable output: {error}"]
        self.results.heads[contender.name] = "lm_head.weight" in found
        return differences(expected, found, checkpoint.size.tied)

    def digest(self, path: Path) -> tensor_digest.Digests:
        """Digests of a `torch.save`, by a process of its own, because this one stays small."""
        made = subprocess.run([interpreter(self.options.python), tensor_digest.__file__,
                               str(path)],
                              capture_output=True,
                              text=True)
        if made.returncode:
            raise ValueError(made.stderr.strip()[-300:])
        found: tensor_digest.Digests = json.loads(made.stdout)
        return found

    def limits(self) -> None:
        """Reading, writing in both ways, and reading and writing at once; one of each."""
        shards, total, limits = self.checkpoints[RANKS].shards(), self.results.output_bytes, self.results.limits
        direct = disk_limit.can_write_directly(self.scratch)
        disk_limit.evict(shards)
        limits.setdefault("read", []).append(disk_limit.read_seconds(shards))
        limits.setdefault("write", []).append(disk_limit.write_seconds(self.scratch, total, direct=False))
        if direct:
            limits.setdefault("write direct", []).append(disk_limit.write_seconds(self.scratch, total, direct=True))
        disk_limit.evict(shards)
        limits.setdefault("both at once", []).append(disk_limit.both_seconds(shards, self.scratch, total, direct))
        flush(self.scratch)

    def startup(self, modules: Sequence[str]) -> None:
        """Seconds that our interpreter takes to start, import a module, and end."""
        for module in modules:
            command, begin = [interpreter(self.options.python), "-c", f"import {module}"], time.perf_counter()
            if subprocess.run(command, capture_output=True).returncode:
                raise ValueError(f"{command[0]} cannot import {module}; install it there or name another --python")
            self.results.startup.setdefault(module, []).append(time.perf_counter() - begin)

    def describe_cold(self) -> str:
        how = ("the whole page cache is dropped (drop_caches), then the merger merges a tiny checkpoint, so that its "
               "interpreter and libraries are in the cache again" if self.options.drop_caches else
               "the shards' pages are dropped (posix_fadvise DONTNEED); interpreter and libraries stay in the cache, "
               "each merger having merged a tiny checkpoint first")
        return (
            f"Cold: before each run {how}; at most {self.remaining:.1%} of the shards remained (mincore). A cache of "
            "the storage behind the disk is out of reach. Runs take turns; each output is flushed, checked and "
            "deleted before the next run.")


def flush(folder: Path) -> None:
    """Bring a folder and the files in it to the disk."""
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
