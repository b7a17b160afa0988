"""How fast a training run's folder is read: `train.status` with a log of 1 GB, and what watching costs the trainer.

    python benchmarks/training_runs.py [--log-gb 1] [--steps 2000] [--checkpoints 20] [--ranks 8] [--runs 5] [--json]

It makes the folder that a long run leaves (a log, a line of metrics a step, checkpoints of tiny files), and times the
program that a user types, from its start to its end, and the reading alone. The supervisor's own cost is its CPU time
while a trainer prints as verl's does; the watcher's, while it waits beside a run whose checkpoints are all merged, too.

What that does to a trainer's seconds a step is measured in pairs, so that a machine that does other things meanwhile falls out: a
trainer with a process a core works on, and what is beside it is stopped (SIGSTOP) in every other step. Beside it are the waiting
watcher, and what keeps every core busy as a merge or an evaluation on the CPU does at worst, at the priority that the watcher gives
those and at the trainer's own.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import Barrier, Process
from multiprocessing.synchronize import Barrier as BarrierType
from pathlib import Path
from threading import Event, Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import describe

from tasks.lib.checkpoints import RECORD, rank_files
from tasks.lib.tables import print_table
from tasks.lib.training.hands import NICE, TETHER
from training.folder import RunFolder
from training.status import status

ROOT = Path(__file__).resolve().parents[1]
NAME = "benchmark-of-status"
IDLE = 130.0  # s for which the watcher's CPU time is counted: two of its looks at least
FIGURES = ("max_rounds", "actor/kl_loss", "actor/entropy_loss", "actor/pg_loss", "actor/grad_norm", "critic/score/mean",
           "critic/task_score/mean", "critic/rewards/mean", "response_length/mean", "prompt_length/mean",
           "timing_s/gen", "timing_s/update_actor", "timing_s/step", *(f"other/figure_{number}"
                                                                       for number in range(34)))


def make(folder: Path, log_bytes: int, steps: int, checkpoints: int, ranks: int) -> None:
    """Write the folder of a run that has come to `steps` and was then stopped."""
    (folder / "log").mkdir(parents=True)
    with open(folder / "log" / "attempt-1.log", "wb") as log:
        block = b"".join(b"(WorkerDict pid=%d) rollout %d: some words that a worker says of what it does\n" % (pid, pid)
                         for pid in range(12_000))
        while log.tell() < log_bytes:
            log.write(block)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            metrics = {key: round(0.001 * step, 3) for key in FIGURES}
            file.write(json.dumps({"step": step, "attempt": 1, "time": float(step), "metrics": metrics}) + "\n")
    for number in range(1, checkpoints + 1):
        place = folder / f"global_step_{number * 25}"
        (place / "actor" / "huggingface").mkdir(parents=True)
        (place / "actor" / "huggingface" / "config.json").write_text("{}")
        files = [
            place / "actor" / f"{kind}_world_size_{ranks}_rank_{rank}.pt" for kind in ("model", "optim", "extra_state")
            for rank in range(ranks)
        ]
        for path in [*files, place / "data.pt"]:
            with zipfile.ZipFile(path, "w") as archive:
                for entry in range(340):  # as many tensors as 7B has
                    archive.writestr(f"archive/data/{entry}", b"x" * 64)
    record = {
        "schema": 1,
        "name": folder.name,
        "created": time.time(),
        "environment": {"name": "babyai", "url": "http://127.0.0.1:9", "replicas": 1},
        "algorithm": "grpo",
        "overrides": [],
        "command": [],
        "runner": "local",
        "world_size": ranks,
        "steps": steps,
        "options": {},
        "attempts": [{"number": 1, "started": 1.0, "ended": 2.0, "state": "stopped", "exit_code": 143, "last_step": steps}],
        "poisoned": []
    }  # yapf: disable
    (folder / "run.json").write_text(json.dumps(record))


def merged(folder: Path) -> None:
    """Write what a watcher takes for the merges of all checkpoints there, compared with them."""
    for place in sorted(folder.glob("global_step_*")):
        model = folder / "merged" / place.name
        model.mkdir(parents=True)
        (model / "model.safetensors").write_bytes(b"x" * 64)
        (model / RECORD).write_text(
            json.dumps({
                "verified": True,
                "files": [{"name": "model.safetensors", "bytes": 64}],
                "sources": [{"file": path.name, "bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}
                            for path in rank_files(place / "actor")],
            }))  # yapf: disable
    record = json.loads((folder / "run.json").read_text())
    record["attempts"] = [{"number": 1, "started": time.time(), "ended": None}]
    (folder / "run.json").write_text(json.dumps(record))


def busy_seconds(pid: int) -> float:
    """Return what a process has taken of the CPU, those included that it waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def beating(folder: Path) -> Iterator[None]:
    """Keep the run's heartbeat fresh, as its supervisor does."""
    over = Event()

    def beat() -> None:
        while not over.wait(1.0):
            RunFolder(folder).write_state(state="running", step=2000, updated=time.time())

    RunFolder(folder).write_state(state="running", step=2000, updated=time.time())
    thread = Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def waiting_watcher() -> Iterator[subprocess.Popen[bytes]]:
    """Run `invoke train.watch` beside the run until it has looked at everything and waits."""
    words = ["train.watch", "--name", NAME, "--keep-all", "--runner", "local"]
    shown = RunFolder(ROOT / "saves" / NAME).watch_json
    shown.unlink(missing_ok=True)
    process = subprocess.Popen([sys.executable, "-m", "invoke", *words],
                               cwd=ROOT,
                               stdout=subprocess.DEVNULL,
                               start_new_session=True)
    try:
        while not shown.exists() or json.loads(shown.read_text())["doing"] != "waiting":
            if process.poll() is not None:
                raise SystemExit(f"the watcher ended with exit code {process.returncode}")
            time.sleep(0.1)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        process.terminate()
        process.wait()


@contextmanager
def busy(nice: int) -> Iterator[subprocess.Popen[bytes]]:
    """Keep every core busy at that priority, in a process that is started as the watcher starts a merge."""
    cores = len(os.sched_getaffinity(0))
    burn = f"import os\nfor _ in range({cores - 1}):\n    if os.fork() == 0:\n        break\nwhile True:\n    pass"
    process = subprocess.Popen([sys.executable, "-c", TETHER,
                                str(os.getpid()), str(nice), "-c", burn],
                               cwd=ROOT,
                               start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def train(core: int, start: BarrierType, end: BarrierType, loops: int) -> None:
    """Work on one core, a step at a time, for ever."""
    os.sched_setaffinity(0, {core})
    while True:
        start.wait()
        total = 0
        for number in range(loops):
            total += number * number
        end.wait()


def loops_of(seconds: float) -> int:
    """Return how many loops of `train` take so long here."""
    loops, begun = 1_000_000, time.thread_time()
    total = 0
    for number in range(loops):
        total += number * number
    return round(loops * seconds / (time.thread_time() - begun))


def paired(process: subprocess.Popen[bytes], pairs: int, loops: int) -> list[float]:
    """Return of each pair of steps how much longer the one took that ran beside `process`, as a share.

    Of two steps the one beside it comes first, then last, then first, so that what goes up or down for long falls out.
    """
    cores = sorted(os.sched_getaffinity(0))
    start, end = Barrier(len(cores) + 1), Barrier(len(cores) + 1)
    workers = [Process(target=train, args=(core, start, end, loops), daemon=True) for core in cores]
    for worker in workers:
        worker.start()

    def step(beside: bool) -> float:
        os.killpg(process.pid, signal.SIGCONT if beside else signal.SIGSTOP)
        begun = time.perf_counter()
        start.wait()
        end.wait()
        return time.perf_counter() - begun

    try:
        found = []
        for number in range(pairs):
            order = (True, False) if number % 2 else (False, True)
            took = {beside: step(beside) for beside in order}
            found.append(took[True] / took[False] - 1)
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        for worker in workers:
            worker.kill()
    return found


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median, and an interval for it that covers at 95 %, of the order statistics (a sign test turned round)."""
    ordered, count = sorted(values), len(values)
    outside, at_most = 0, 0.025 * 2**count
    while outside < count // 2 and sum(math.comb(count, number) for number in range(outside + 1)) <= at_most:
        outside += 1
    low = max(outside - 1, 0)
    return statistics.median(ordered), ordered[low], ordered[count - 1 - low]


def beside(folder: Path, pairs: int, seconds: float) -> tuple[float, dict[str, tuple[float, float, float]]]:
    """Return what a waiting watcher takes of a core, and what it and busy cores do to a trainer's steps, as `interval`.

    Args:
        folder: the run's, of `make`; its checkpoints are told to be merged.
        pairs: of steps, for each of what is beside them.
        seconds: of a step, about.
    """
    merged(folder)
    loops, found = loops_of(seconds), {}
    with beating(folder), waiting_watcher() as process:
        begun, busy_before = time.perf_counter(), busy_seconds(process.pid)
        time.sleep(IDLE)
        share = (busy_seconds(process.pid) - busy_before) / (time.perf_counter() - begun)
        found["the watcher that waits"] = interval(paired(process, pairs, loops))
    for name, nice in ((f"every core busy at nice {NICE}, as a merge is", NICE), ("every core busy at nice 0", 0)):
        with busy(nice) as process:
            found[name] = interval(paired(process, pairs, loops))
    return share, found


def timed(runs: int, action: Any) -> list[tuple[float, float]]:
    """Return the seconds and the CPU's seconds of each of `runs` calls."""
    found = []
    for _ in range(runs):
        begun, busy = time.perf_counter(), cpu_seconds()
        action()
        found.append((time.perf_counter() - begun, cpu_seconds() - busy))
    return found


def cpu_seconds() -> float:
    """Return what this process and those that it waited for have taken of the CPU."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def typed() -> None:
    """Run `invoke train.status` as a user does."""
    subprocess.run([sys.executable, "-m", "invoke", "train.status", "--name", NAME],
                   cwd=ROOT,
                   check=True,
                   stdout=subprocess.DEVNULL)


def supervised(folder: Path, steps: int, seconds: float) -> dict[str, float]:
    """Return what the supervisor takes of the machine while a trainer runs for `steps` x `seconds`.

    The trainer here prints 200 lines a step and then its figures.
    """
    script = folder / "trainer.py"
    folder.mkdir()
    script.write_text("import time\n"
                      f"figures = {' - '.join(f'{key}:0.123' for key in FIGURES)!r}\n"
                      f"for step in range(1, {steps + 1}):\n"
                      "    for line in range(200):\n"
                      "        print('\\x1b[36m(WorkerDict pid=7)\\x1b[0m some words that a worker says', line)\n"
                      f"    time.sleep({seconds})\n"
                      "    print(f'\\x1b[36m(main_task pid=7)\\x1b[0m step:{step} - {figures}', flush=True)\n")
    run = {
        "schema": 1, "name": folder.name, "command": [sys.executable, str(script)], "overrides": [], "steps": steps,
        "world_size": 1, "attempts": [], "options": {}
    }  # yapf: disable
    (folder / "run.json").write_text(json.dumps(run))
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "training", "run", str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL)
    memory = 0.0
    own = 0.0
    while process.poll() is None:
        with suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            own = (int(fields[11]) + int(fields[12])) / 100
            memory = max(memory, int(fields[21]) * resource.getpagesize() / 1e6)
        time.sleep(0.2)
    elapsed = time.perf_counter() - begun
    return {"seconds": elapsed, "cpu_seconds": own, "percent": 100 * own / elapsed, "memory_mb": memory}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log-gb", type=float, default=1.0, help="size of the log")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds a step while the supervisor is measured")
    parser.add_argument("--pairs", type=int, default=40, help="of steps, with and without what is beside the trainer")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    saves = ROOT / "saves"
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=saves) as place:
        work = Path(place)
        # Status finds runs by name in saves/.
        folder = saves / NAME
        make(work / NAME, round(options.log_gb * 1e9), options.steps, options.checkpoints, options.ranks)
        (work / NAME).rename(folder)
        try:
            status(RunFolder(folder))
            figures = {
                "invoke train.status": timed(options.runs, typed),
                "reading the folder": timed(options.runs, lambda: status(RunFolder(folder))),
            }
            share, slower = beside(folder, options.pairs, 0.5)
        finally:
            folder.rename(work / NAME)
        watched = supervised(work / "supervised", 10, options.seconds)
    facts = describe(ROOT, {"Python": sys.executable})
    if options.json:
        print(
            json.dumps({
                "machine": facts,
                "seconds": figures,
                "supervisor": watched,
                "watcher": share,
                "slower": slower
            }))
        return
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    print(
        f"\nlog {options.log_gb:g} GB, {options.steps} steps, {options.checkpoints} checkpoints of {options.ranks} ranks\n"
    )
    print_table(["", "median s", "best s", "worst s", "CPU s"], [[
        name, *(f"{choose(seconds for seconds, _ in times):.3f}"
                for choose in (statistics.median, min, max)), f"{statistics.median(busy for _, busy in times):.3f}"
    ] for name, times in figures.items()])
    print(
        f"\nthe supervisor beside a trainer of {options.seconds:g} s a step and 200 lines: {watched['cpu_seconds']:.2f} s of "
        f"CPU in {watched['seconds']:.0f} s ({watched['percent']:.1f} % of a core), {watched['memory_mb']:.0f} MB")
    print(f"the watcher, while it waits: {100 * share:.2f} % of a core\n")
    print_table([f"beside a trainer on every core, {options.pairs} pairs of steps", "slower by, median", "95 % interval"],
                [[name, f"{100 * median:+.2f} %", f"{100 * low:+.2f} to {100 * high:+.2f} %"]
                 for name, (median, low, high) in slower.items()])  # yapf: disable


if __name__ == "__main__":
    main()
