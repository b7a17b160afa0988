"""What the evaluation runner costs: steps a second beside a bare load generator, overhead, memory, the report.

    python benchmarks/eval_runner.py [--steps 200] [--sessions 1,64,512] [--attempts 10000] [--json]
    python benchmarks/eval_runner.py --agentgym ../AgentGym --agentgym-python peers/bin/python

The server answers like textcraft's, from a process of its own, and does next to nothing, so that what is measured is
the runner. The model answers at once, from the runner's own process. Both share the machine's cores.
"""
import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluation import compared, report
from evaluation.attempts import Attempt, Outcome, Turn, UsageCounts
from evaluation.episodes import Limits, attempt
from evaluation.items import Item
from evaluation.model import Completion, Message
from evaluation.numbers import summarize
from evaluation.prompts import plain
from evaluation.protocol import Server
from evaluation.records import Lines
from evaluation.rows import read_row, rows_file

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


async def bare(url: str, sessions: int, steps: int) -> float:
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
        await asyncio.gather(*(one(http) for _ in range(sessions)))
        return sessions * steps / (time.perf_counter() - begun)


async def runner(url: str, sessions: int, steps: int, folder: Path, latency: float = 0.0) -> float:
    """Return the steps a second of the runner's own episodes, records written and sessions noted."""
    row = read_row("textcraft", rows_file())
    prompt, model, limits = plain(row), Instant(latency), Limits(steps)
    records, noted = Lines(folder / "attempts.jsonl"), Lines(folder / "sessions.jsonl")
    async with Server(url, row.protocol, 300, lambda one: noted.add({"open": one}),
                      lambda one: noted.add({"close": one})) as server:

        async def one(number: int) -> None:
            records.add(await attempt(server, model, row, prompt, Item(f"textcraft_{number}", number), 0, None, limits,
                                      []))

        begun = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(sessions)))
        return sessions * steps / (time.perf_counter() - begun)


def measured(kind: str, url: str, sessions: int, steps: int, results: Any) -> None:
    """Measure in a process of its own, whose memory is then its own too."""
    with tempfile.TemporaryDirectory() as folder:
        rate = asyncio.run(bare(url, sessions, steps) if kind == "bare" else runner(url, sessions, steps, Path(folder)))
    results.put((rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def measure(kind: str, url: str, sessions: int, steps: int) -> tuple[float, float]:
    """Return steps a second and the most memory in MB."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    process = spawn.Process(target=measured, args=(kind, url, sessions, steps, results))
    process.start()
    found = results.get(timeout=600)
    process.join()
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
        rate = asyncio.run(runner(url, items, rounds, Path(folder), latency))
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of each session (default: 200)")
    parser.add_argument("--sessions", default="1,64,512", help="sessions at once (default: 1,64,512)")
    parser.add_argument("--work",
                        type=float,
                        default=300.0,
                        help="microseconds that a step takes the server (default: 300)")
    parser.add_argument("--attempts", type=int, default=10_000, help="attempts of the report (default: 10000)")
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each, the best counts (default: 3)")
    parser.add_argument("--agentgym", default="", help="AgentGym checkout, to measure its own evaluator too")
    parser.add_argument(
        "--agentgym-python",
        default=sys.executable,
        help="Python for it, with torch, transformers, requests, openai (default: the one running this)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
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
        steps = max(20, min(options.steps, 20_000 // sessions))
        # Taken in turns, so that what else the machine does meets both.
        rounds = [(measure("bare", url, sessions, steps), measure("runner", url, sessions, steps))
                  for _ in range(options.repeat)]
        bare_rate, ours = max(one[0][0] for one in rounds), max(one[1][0] for one in rounds)
        lines.append({
            "sessions": sessions,
            "bare_steps_s": bare_rate,
            "runner_steps_s": ours,
            "share": ours / bare_rate,
            "overhead_ms": 1000 * (1 / ours - 1 / bare_rate),
            "runner_mb": min(one[1][1] for one in rounds),
            "bare_mb": min(one[0][1] for one in rounds)
        })
    peers = [
        beside_agentgym(url, 64, 20, latency, options.agentgym, options.agentgym_python) for latency in (0.0, 0.05)
        if options.agentgym
    ]
    server.terminate()
    result = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "server_work_us": options.work,
        "steps": lines,
        "agentgym": peers,
        "report": large_report(options.attempts, 10)
    }
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{result['cores']} cores, load {result['load']:.1f}; a step costs the server {options.work:g} us; best of {options.repeat}"
    )
    print(
        f"{'sessions':>8} {'bare steps/s':>13} {'runner steps/s':>15} {'share':>6} {'overhead/step':>14} {'runner MB':>10} {'bare MB':>8}"
    )
    for line in lines:
        print(f"{line['sessions']:8} {line['bare_steps_s']:13.0f} {line['runner_steps_s']:15.0f} {line['share']:6.0%} "
              f"{line['overhead_ms']:11.3f} ms {line['runner_mb']:10.0f} {line['bare_mb']:8.0f}")
    for peer in peers:
        print(
            "{items} items x {rounds} rounds, model answers after {latency:g} s: AgentGym's evaluator {agentgym_s:.1f} s, "
            "the runner {runner_s:.1f} s".format(**peer))
    found = result["report"]
    print(
        "report of {attempts} attempts of 10 rounds ({trajectories_megabytes:.0f} MB of trajectories): {seconds:.1f} s, of which numbers "
        "{numbers_s:.1f} s; {megabytes:.1f} MB".format(**found))


if __name__ == "__main__":
    main()
