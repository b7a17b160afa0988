"""What the evaluation runner costs: steps a second beside a bare load generator, overhead, memory, the report.

    python benchmarks/eval_runner.py [--steps 40] [--sessions 1,16,64,512] [--attempts 10000] [--json]
    python benchmarks/eval_runner.py --agentgym ../AgentGym --agentgym-python peers/bin/python

The server answers like textcraft's, from a process of its own, and does next to nothing, so that what is measured is
the runner. The model answers at once, from the runner's own process. Both share the machine's cores.
"""
import argparse
import asyncio
import json
import multiprocessing
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluation import compared, report
from evaluation.attempts import Attempt, Outcome, Turn, UsageCounts
from evaluation.cli import parser
from evaluation.episodes import Limits, Place, attempt
from evaluation.items import Item
from evaluation.live import Board
from evaluation.model import Completion, Message
from evaluation.numbers import summarize
from evaluation.pace import MOST, Pace
from evaluation.prompts import plain
from evaluation.protocol import Server
from evaluation.records import Lines, RunFolder
from evaluation.rows import read_row, rows_file
from evaluation.runner import Stage, facts
from evaluation.settings import decide

OBSERVATION = "Inventory: [oak log] (2) [stick] (4). You can get 1 oak log, 2 stone or 1 coal. " * 2


def serve(port: int, work_us: float) -> None:
    """Serve sessions of textcraft's form; a step takes `work_us` microseconds of this process, as a game's would."""
    from aiohttp import web
    count = iter(range(10**9))

    async def create(request: web.Request) -> web.Response:
        return web.json_response({"id": next(count), "observation": OBSERVATION, "done": False, "reward": 0})

    async def reset(request: web.Request) -> web.Response:
        await request.json()
        return web.json_response({"observation": OBSERVATION, "reward": 0, "done": False})

    async def step(request: web.Request) -> web.Response:
        await request.json()
        end = time.perf_counter() + work_us / 1e6
        while time.perf_counter() < end:
            pass
        return web.json_response({"observation": OBSERVATION, "reward": 0.0, "done": False})

    async def close(request: web.Request) -> web.Response:
        return web.json_response(True)

    app = web.Application()
    app.add_routes(
        [web.post("/create", create),
         web.post("/reset", reset),
         web.post("/step", step),
         web.post("/close", close)])
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


class Instant:
    """A model that answers at once, or after `latency` seconds, for every attempt."""
    answered = True
    refused = ()
    adjusted: Sequence[str] = ()

    def __init__(self, latency: float = 0.0) -> None:
        self.latency = latency

    def player(self, item: int, sample: int, seed: int | None) -> "Instant":
        return self

    async def reply(self, messages: Sequence[Message]) -> Completion:
        if self.latency:
            await asyncio.sleep(self.latency)
        return Completion("Thought:\nI need wood.\n\nAction:\nget 1 oak log")

    async def aclose(self) -> None:
        pass


async def play_all(play: Callable[[int], Any], attempts: int, sessions: int) -> None:
    """Play the attempts, so many at once."""
    numbers = iter(range(attempts))

    async def worker() -> None:
        for number in numbers:
            await play(number)

    await asyncio.gather(*(worker() for _ in range(sessions)))


async def bare(url: str, sessions: int, steps: int, attempts: int) -> float:
    """Return the steps a second of a generator that does nothing but post and read JSON."""

    async def one(http: aiohttp.ClientSession) -> None:

        async def post(route: str, body: Any) -> Any:
            async with http.post(url + route, json=body) as answer:
                return json.loads(await answer.read())

        session = (await post("/create", {}))["id"]
        await post("/reset", {"id": session, "data_idx": 0})
        for _ in range(steps):
            await post("/step", {"id": session, "action": "get 1 oak log"})
        await post("/close", {"id": session})

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        begun = time.perf_counter()
        await play_all(lambda number: one(http), attempts, sessions)
        return attempts * steps / (time.perf_counter() - begun)


async def runner(url: str, sessions: int, steps: int, attempts: int, folder: Path, latency: float = 0.0) -> float:
    """Return the steps a second of the runner's own episodes, records written and sessions noted."""
    row = read_row("textcraft", rows_file())
    prompt, model, limits = plain(row), Instant(latency), Limits(steps)
    records, noted = Lines(folder / "attempts.jsonl"), Lines(folder / "sessions.jsonl")
    async with Server(url, row.protocol, 300, lambda one: noted.add({"open": one}),
                      lambda one: noted.add({"close": one})) as server:

        async def one(number: int) -> None:
            records.add(await attempt(server, model.player, row, prompt, Item(f"textcraft_{number}", number), 0, None,
                                      limits, [], Place()))

        begun = time.perf_counter()
        await play_all(one, attempts, sessions)
        return attempts * steps / (time.perf_counter() - begun)


def measured(kind: str, url: str, sessions: int, steps: int, attempts: int, results: Any) -> None:
    """Measure in a process of its own, whose memory is then its own too."""
    before = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if kind == "whole":
            rate = asyncio.run(whole(url, attempts, steps, Path(folder)))
        else:
            rate = asyncio.run(
                bare(url, sessions, steps, attempts) if kind ==
                "bare" else runner(url, sessions, steps, attempts, Path(folder)))
    cpu = 1000 * (time.process_time() - before) / (attempts * steps)
    results.put((rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, cpu))


async def whole(url: str, attempts: int, rounds: int, folder: Path) -> float:
    """Return the rounds a second of a whole run of so many attempts, 512 at once, its folder, numbers and report."""
    row = read_row("textcraft", rows_file())
    prompt, items = plain(row), [Item(f"textcraft_{n}", n) for n in range(attempts)]
    settings: Any = SimpleNamespace(items=items, samples=1, seed=None, row=row, prompt=prompt, limits=Limits(rounds))
    pace = Pace(512)
    config = {"env": row.name, "model": "m", "items": [item.id for item in items], "samples": 1, "max_round": rounds}
    facts = {"title": "", "items_from": "", "row": row.to_json(), "prompt": prompt.model_dump(), "revision": ""}
    begun = time.perf_counter()
    with RunFolder(folder / "run") as kept:
        kept.begin(config, facts)
        board = Board(kept.folder / "live.json", attempts, {}, pace)
        async with Server(url, row.protocol, 300) as server, board.kept():
            await Stage(settings, kept, server, Instant(), lambda record: None, pace, board).play_all()
    report.write(folder / "report.html", compared.load([folder / "run"]))
    return attempts * rounds / (time.perf_counter() - begun)


def suite_overhead(pairs: int, attempts: int) -> dict[str, float]:
    """Return the seconds that a suite adds to its runs: one look before them, and the table after them, of whole pairs."""
    with tempfile.TemporaryDirectory() as place:
        folder, plan = Path(place), []
        for number in range(pairs):
            words = [
                "--env=demo", f"--model=m{number}", "--base-url=http://127.0.0.1:9/v1", f"--items=0-{attempts - 1}",
                "--samples=1"
            ]
            words += [f"--out={folder / str(number)}", f"--root={folder}", f"--environments={rows_file().resolve()}"]
            settings = decide(parser().parse_args(["run", *words]))
            with RunFolder(settings.out) as kept:
                kept.begin(settings.config, facts(settings))
                for item, record in zip(settings.items, recorded(attempts, 10), strict=True):
                    kept.add({**record, "item": item.id, "index": item.number})
            plan.append({"env": "demo", "model": f"m{number}", "words": words})
        file = folder / "plan.json"
        file.write_text(json.dumps({"name": "x", "pairs": plan}))
        times = []
        for flags in (["--check"], []):
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-m", "evaluation", "suite",
                            str(file), *flags],
                           cwd=Path(__file__).parents[1],
                           env={
                               **os.environ, "OPENAI_API_KEY": ""
                           },
                           capture_output=True,
                           check=True)
            times.append(time.perf_counter() - begun)
    return {"pairs": pairs, "attempts": attempts, "before_s": times[0], "after_s": times[1]}


def measure(kind: str, url: str, sessions: int, steps: int, attempts: int) -> tuple[float, float, float]:
    """Return steps a second, the most memory in MB, and milliseconds of CPU a step."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(target=measured, args=(kind, url, sessions, steps, attempts, results))
    process.start()
    found = results.get(timeout=600)
    process.join()
    return found


class Simulated:
    """An endpoint: an answer takes `latency` seconds, `slots` are given at once, others wait or, `strict`, get a 429.

    Beyond `crowd` at once each takes longer by their square, as where memory is swapped. A 429 is tried again after half
    a second, as the runner's own client does.
    """
    answered = True
    refused = ()
    adjusted: Sequence[str] = ()

    def __init__(self, latency: float = 0.05, slots: int = 10_000, strict: bool = False, crowd: int = 10_000) -> None:
        self.latency, self.strict, self.crowd = latency, strict, crowd
        self.slots = asyncio.Semaphore(slots)
        self.at_once = self.limited = 0
        self.on_limit: Callable[[], None] = lambda: None

    def player(self, item: int, sample: int, seed: int | None) -> "Simulated":
        return self

    async def reply(self, messages: Sequence[Message]) -> Completion:
        while self.strict and self.slots.locked():
            self.limited += 1
            self.on_limit()
            await asyncio.sleep(random.uniform(0.25, 0.5))
        async with self.slots:
            self.at_once += 1
            try:
                await asyncio.sleep(self.latency * max(1.0, self.at_once / self.crowd)**2)
            finally:
                self.at_once -= 1
        return Completion("Thought:\nI need wood.\n\nAction:\nget 1 oak log")

    async def aclose(self) -> None:
        pass


ENDPOINTS: dict[str, dict[str, Any]] = {
    "as many as come": {},
    "24 at once, others wait": {
        "slots": 24
    },
    "24 at once, others get a 429": {
        "slots": 24,
        "strict": True
    },
    "slower than one after the other beyond 40 at once": {
        "crowd": 40
    },
}


async def paced(url: str, endpoint: dict[str, Any], at_once: int, attempts: int, rounds: int, folder: Path) -> Any:
    """Return answers a second, 429s, and how the number at once changed; `at_once` 0 is `auto`."""
    row = read_row("textcraft", rows_file())
    model, pace = Simulated(**endpoint), Pace(at_once or MOST, not at_once)
    model.on_limit = pace.refused
    settings: Any = SimpleNamespace(items=[Item(f"textcraft_{n}", n) for n in range(attempts)],
                                    samples=1,
                                    seed=None,
                                    row=row,
                                    prompt=plain(row),
                                    limits=Limits(rounds))
    kept: Any = SimpleNamespace(records={}, earlier={}, add=Lines(folder / f"{at_once}.jsonl").add)
    board = Board(folder / "live.json", attempts, {}, pace)
    async with Server(url, row.protocol, 300) as server:
        begun = time.perf_counter()
        async with board.kept():
            await Stage(settings, kept, server, model, lambda record: None, pace, board).play_all()
        took = time.perf_counter() - begun
    return {
        "rate": attempts * rounds / took,
        "limited": model.limited,
        "limit": pace.limit,
        "changes": [change._asdict() for change in pace.changes]
    }


def auto_against_fixed(url: str, attempts: int, rounds: int) -> list[dict[str, Any]]:
    """Return, for each simulated endpoint, answers a second with fixed numbers at once and with `auto`."""
    found = []
    for name, endpoint in ENDPOINTS.items():
        with tempfile.TemporaryDirectory() as folder:
            rates = {
                at_once: asyncio.run(paced(url, endpoint, at_once, attempts, rounds, Path(folder)))
                for at_once in (8, 24, 64, 256, 0)
            }
        fixed = {at_once: one["rate"] for at_once, one in rates.items() if at_once}
        found.append({
            "endpoint": name,
            "fixed": fixed,
            "auto": rates[0]["rate"],
            "share": rates[0]["rate"] / max(fixed.values()),
            "limited": {
                at_once or "auto": one["limited"]
                for at_once, one in rates.items()
            },
            "limit": rates[0]["limit"],
            "changes": rates[0]["changes"]
        })
    return found


def beside_agentgym(url: str, items: int, rounds: int, latency: float, checkout: str, python: str) -> dict[str, float]:
    """Return the seconds that AgentGym's evaluator and the runner take for the same items of the same server."""
    script = Path(__file__).with_name("agentgym_eval.py")
    theirs = subprocess.run([
        python,
        str(script), "--agentgym", checkout, "--url", url, "--items",
        str(items), "--rounds",
        str(rounds), "--latency",
        str(latency)
    ],
                            capture_output=True,
                            text=True,
                            check=False)
    if theirs.returncode:
        raise SystemExit(f"eval_runner: AgentGym's evaluator failed: {theirs.stderr.strip().splitlines()[-1]}")
    with tempfile.TemporaryDirectory() as folder:
        rate = asyncio.run(runner(url, items, rounds, items, Path(folder), latency))
    return {
        "latency": latency,
        "items": items,
        "rounds": rounds,
        "agentgym_s": json.loads(theirs.stdout.splitlines()[-1])["seconds"],
        "runner_s": items * rounds / rate
    }


def recorded(attempts: int, rounds: int) -> list[Attempt]:
    """Return so many attempts, each of `rounds` rounds with its own words."""
    usage = UsageCounts(prompt=900, completion=60, cached=0, reasoning=0, unknown=0)
    records: list[Attempt] = []
    for number in range(attempts):
        turns: list[Turn] = [{
            "completion": f"Thought:\n{number} needs {turn}\n\nAction:\nget {turn} oak log",
            "action": f"get {turn} oak log",
            "observation": f"{OBSERVATION} {number * turn}",
            "reward": 0.0
        } for turn in range(rounds)]
        won = number % 3 == 0
        records.append({
            "item": f"textcraft_{number}",
            "index": number,
            "category": "",
            "sample": 0,
            "seed": None,
            "task": "x",
            "started": "",
            "outcome": Outcome.SUCCESS if won else Outcome.FAILURE,
            "success": won,
            "reward": float(won),
            "scaled": float(won),
            "upstream_reward": float(won),
            "rounds": rounds,
            "invalid_actions": 0,
            "usage": usage,
            "seconds": 1.0,
            "model_seconds": 1.0,
            "env_seconds": 0.1,
            "model_retries": 0,
            "error": "",
            "tries_before": [],
            "first": OBSERVATION,
            "turns": list(turns)
        })
    return records


def large_run(attempts: int, rounds: int) -> compared.Run:
    """Return a run of so many attempts, as a report takes it."""
    records = recorded(attempts, rounds)
    manifest: dict[str, Any] = {
        "config": {
            "env": "textcraft",
            "model": "m",
            "max_round": rounds
        },
        "title": "",
        "items_from": "",
        "revision": "",
        "work": [],
        "prompt": {
            "source": "plain",
            "place": "",
            "revision": "",
            "user": ""
        }
    }
    return compared.Run("m", manifest, records, summarize(records, 1))


def large_report(attempts: int, rounds: int) -> dict[str, float]:
    """Return what a report of so many attempts takes."""
    run = large_run(attempts, rounds)
    begun = time.perf_counter()
    summarize(run.records, 1)
    summed = time.perf_counter() - begun
    page = report.render([run])
    return {
        "attempts": attempts,
        "numbers_s": summed,
        "seconds": time.perf_counter() - begun,
        "megabytes": len(page.encode()) / 1e6,
        "trajectories_megabytes": len(json.dumps(run.records)) / 1e6
    }


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--steps", type=int, default=40, help="steps of each attempt (default: 40)")
    words.add_argument("--sessions", default="1,16,64,512", help="sessions at once (default: 1,16,64,512)")
    words.add_argument("--played", type=int, default=512, help="attempts in each row (default: 512)")
    words.add_argument("--work",
                       type=float,
                       default=300.0,
                       help="microseconds that a step takes the server (default: 300)")
    words.add_argument("--attempts", type=int, default=10_000, help="attempts of the report (default: 10000)")
    words.add_argument(
        "--auto",
        type=int,
        default=0,
        help="attempts of ten rounds for --concurrency auto beside fixed numbers (default: not measured)")
    words.add_argument("--whole",
                       type=int,
                       default=0,
                       help="attempts of a whole run at 512 at once, and what a suite costs (default: not measured)")
    words.add_argument("--repeat", type=int, default=3, help="measurements of each, the best counts (default: 3)")
    words.add_argument("--agentgym", default="", help="AgentGym checkout, to measure its own evaluator too")
    words.add_argument("--agentgym-python",
                       default=sys.executable,
                       help="Python for it, with torch, transformers, requests, openai (default: the one running this)")
    words.add_argument("--json", action="store_true", help="print one JSON object")
    options = words.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port, options.work), daemon=True)
    server.start()
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    url, lines = f"http://127.0.0.1:{port}", []
    for sessions in map(int, options.sessions.split(",")):
        # As many attempts whatever is played at once, so that opening and closing one costs each row the same. Taken in
        # turns, so that what else the machine does meets both.
        play = (url, sessions, options.steps, options.played)
        rounds = [(measure("bare", *play), measure("runner", *play)) for _ in range(options.repeat)]
        bare_rate, ours = max(one[0][0] for one in rounds), max(one[1][0] for one in rounds)
        lines.append({
            "sessions": sessions,
            "bare_steps_s": bare_rate,
            "runner_steps_s": ours,
            "share": ours / bare_rate,
            "overhead_ms": 1000 * (1 / ours - 1 / bare_rate),
            "bare_cpu_ms": min(one[0][2] for one in rounds),
            "runner_cpu_ms": min(one[1][2] for one in rounds),
            "runner_mb": min(one[1][1] for one in rounds),
            "bare_mb": min(one[0][1] for one in rounds)
        })
    peers = [
        beside_agentgym(url, 64, 20, latency, options.agentgym, options.agentgym_python) for latency in (0.0, 0.05)
        if options.agentgym
    ]
    run = measure("whole", url, 512, 3, options.whole) if options.whole else None
    auto = auto_against_fixed(url, options.auto, 10) if options.auto else []
    server.terminate()
    result = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "server_work_us": options.work,
        "steps": lines,
        "agentgym": peers,
        "auto": auto,
        "whole": run and {
            "attempts": options.whole,
            "rounds_s": run[0],
            "mb": run[1]
        },
        "suite": suite_overhead(10, 200) if options.whole else None,
        "report": large_report(options.attempts, 10)
    }
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{result['cores']} cores, load {result['load']:.1f}; a step costs the server {options.work:g} us; best of {options.repeat}"
    )
    print(
        f"{'sessions':>8} {'bare steps/s':>13} {'runner steps/s':>15} {'share':>6} {'overhead/step':>14} {'bare CPU/step':>14} {'runner CPU/step':>16} {'runner MB':>10} {'bare MB':>8}"
    )
    for line in lines:
        print(
            f"{line['sessions']:8} {line['bare_steps_s']:13.0f} {line['runner_steps_s']:15.0f} {line['share']:6.0%} "
            f"{line['overhead_ms']:11.3f} ms {line['bare_cpu_ms']:11.3f} ms {line['runner_cpu_ms']:13.3f} ms {line['runner_mb']:10.0f} {line['bare_mb']:8.0f}"
        )
    for peer in peers:
        print(
            "{items} items x {rounds} rounds, model answers after {latency:g} s: AgentGym's evaluator {agentgym_s:.1f} s, "
            "the runner {runner_s:.1f} s".format(**peer))
    if result["whole"]:
        print(
            "{attempts} attempts of 3 rounds, 512 at once, with folder, numbers and report: {rounds_s:.0f} rounds/s, {mb:.0f} MB"
            .format(**result["whole"]))
        print(
            "a suite of {pairs} whole pairs of {attempts} attempts: {before_s:.1f} s before, {after_s:.1f} s for table and report"
            .format(**result["suite"]))
    for one in auto:
        print(f"{one['endpoint']}: " + ", ".join(f"{rate:.0f} answers/s at {at_once}"
                                                 for at_once, rate in one["fixed"].items()) +
              f"; auto {one['auto']:.0f} (ends at {one['limit']}), {one['share']:.0%} of the best; 429s: " +
              ", ".join(f"{count} at {at_once}" for at_once, count in one["limited"].items()))
    found = result["report"]
    print(
        "report of {attempts} attempts of 10 rounds ({trajectories_megabytes:.0f} MB of trajectories): {seconds:.1f} s, of which numbers "
        "{numbers_s:.1f} s; {megabytes:.1f} MB".format(**found))


if __name__ == "__main__":
    main()
