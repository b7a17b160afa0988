"""How fast a training run's folder is read: `train.status` with a log of 1 GB, and what watching costs the trainer.

    python benchmarks/training_runs.py [--log-gb 1] [--steps 2000] [--checkpoints 20] [--ranks 8] [--runs 5] [--json]

It makes the folder that a long run leaves (a log, a line of metrics a step, checkpoints of tiny files), and times the
program that a user types, from its start to its end, and the reading alone. The supervisor's own cost is its CPU time
while a trainer prints as verl's does.
"""
from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import describe

from tasks.lib.tables import print_table
from training.folder import RunFolder
from training.status import status

ROOT = Path(__file__).resolve().parents[1]
NAME = "benchmark-of-status"
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
        finally:
            folder.rename(work / NAME)
        watched = supervised(work / "supervised", 10, options.seconds)
    facts = describe(ROOT, {"Python": sys.executable})
    if options.json:
        print(json.dumps({"machine": facts, "seconds": figures, "supervisor": watched}))
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


if __name__ == "__main__":
    main()
