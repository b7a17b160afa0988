"""How many steps a second an environment server makes, bare, in serve.py, behind the proxy, and as two replicas.

    python benchmarks/environments.py [--env demo] [--source DIR] [--seconds 5] [--sessions 1,16,64,256] [--json]

The servers are processes of this machine in the environment's own virtual environment. The generator is a process
too and shares the cores: on two cores a second server has little left to gain, and the table says how busy all was.
"""
import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from servers.protocol import Client, ServerError, check_ready
from tasks.lib.environments.haproxy import proxy_config
from tasks.lib.environments.local import ROOT, prepare
from tasks.lib.environments.rows import Environment, environment
from tasks.lib.host.ports import choose_port, port_is_free

FIRST_PORT = 21000  # below the range from which the generator's own connections get their ports


def spent(process: psutil.Process) -> float:
    """Return the seconds of processor time of a process's threads, by the scheduler's clock: psutil's has 10 ms."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


class Load:
    """Sessions that step as fast as the server lets them; counts steps and notes their latencies."""

    def __init__(self, row: Environment, urls: Sequence[str]) -> None:
        self.row, self.urls = row, urls
        self.latencies: list[float] = []
        self.errors = 0

    async def run(self, sessions: int, seconds: float, running: Sequence[psutil.Process]) -> tuple[float, list[float]]:
        """Run `sessions` sessions at once; return the seconds that their steps took, and each process's cores.

        All are open before the clock starts: a create can cost a server as much as ten steps.
        """
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as http:
            players = [Player(http, self.row, self.urls[number % len(self.urls)], number) for number in range(sessions)]
            await asyncio.gather(*(player.open() for player in players))
            busy = [spent(process) for process in running]
            begun = time.perf_counter()
            await asyncio.gather(*(self.play(player, begun + seconds) for player in players))
            elapsed = time.perf_counter() - begun
            cores = [(spent(process) - before) / elapsed for process, before in zip(running, busy, strict=True)]
            await asyncio.gather(*(player.close() for player in players))
            return elapsed, cores

    async def play(self, player: "Player", end: float) -> None:
        """Step one session until `end`."""
        while (begun := time.perf_counter()) < end:
            try:
                done = await player.step()
            except ServerError:
                self.errors += 1
                continue
            self.latencies.append(time.perf_counter() - begun)
            if done:
                await player.reset()


class Player:
    """One session of a server."""

    def __init__(self, http: aiohttp.ClientSession, row: Environment, url: str, number: int) -> None:
        self.http, self.row, self.base = http, row, url + row.protocol.prefix
        self.item = row.check.items[number % 2]
        self.session: Any = None

    async def open(self) -> None:
        """Create the session and reset it to its item."""
        protocol = self.row.protocol
        created = await self._post("/create", protocol.create)
        self.session = created[protocol.id_reply] if protocol.id_reply else created
        await self.reset()

    async def reset(self) -> None:
        """Begin the item (again)."""
        protocol = self.row.protocol
        await self._post("/reset", {protocol.id: self.session, protocol.item: self.item, **protocol.reset})

    async def step(self) -> bool:
        """Take the row's action; tell whether the episode ended."""
        protocol = self.row.protocol
        reply = await self._post("/step", {protocol.id: self.session, "action": self.row.check.action})
        return bool(reply[protocol.done])

    async def close(self) -> None:
        """Close the session, where the server can."""
        if self.row.protocol.close:
            await self._post("/close", {self.row.protocol.id: self.session})

    async def _post(self, route: str, body: Any) -> Any:
        async with self.http.post(self.base + route, json=body) as reply:
            if reply.status != 200:
                raise ServerError(f"HTTP {reply.status}")
            answer = await reply.json(content_type=None)
            if isinstance(answer, dict) and answer.get("error"):
                raise ServerError(answer["error"])
            return answer


@contextmanager
def processes(commands: Sequence[Sequence[str]], cwd: Path, environ: dict[str, str]) -> Iterator[list[psutil.Process]]:
    """Run `commands` until the block ends."""
    started = [
        subprocess.Popen(command,
                         cwd=cwd,
                         env={
                             **os.environ,
                             **environ
                         },
                         stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL) for command in commands
    ]
    try:
        yield [psutil.Process(process.pid) for process in started]
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(timeout=20)


def wait_until_ready(row: Environment, urls: Sequence[str], seconds: float = 60.0) -> None:
    """Return when every URL plays a session."""
    end = time.monotonic() + seconds
    for url in urls:
        while True:
            try:
                check_ready(Client(url, row.protocol, timeout=5), row.check.items[0])
                break
            except ServerError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)


def measure(row: Environment, urls: Sequence[str], sessions: int, seconds: float,
            running: Sequence[psutil.Process]) -> dict[str, Any]:
    """Return steps a second, latencies in ms, and how busy generator and servers were, in cores."""
    load = Load(row, urls)
    elapsed, cores = asyncio.run(load.run(sessions, seconds, (psutil.Process(), *running)))
    ordered = sorted(load.latencies)
    return {
        "steps_per_s": round(len(ordered) / elapsed, 1),
        "p50_ms": round(1000 * statistics.median(ordered), 2),
        "p95_ms": round(1000 * ordered[int(0.95 * (len(ordered) - 1))], 2),
        "errors": load.errors,
        "generator_cores": round(cores[0], 2),
        "server_cores": [round(core, 4) for core in cores[1:]],
    }


def compare(row: Environment, commands: Sequence[list[str]], urls: Sequence[str], cwd: Path, environ: dict[str, str],
            sessions: int, seconds: float, pairs: int) -> None:
    """Print what two servers make in turns, both up all the while, and the median of the pairs' quotients.

    On a machine that does other work, too, the processor time of a step is what compares.
    """
    steps: list[list[float]] = [[], []]
    cost: list[list[float]] = [[], []]
    with processes(commands, cwd, environ) as running:
        wait_until_ready(row, urls)
        for number in range(pairs + 1):
            for which in (0, 1) if number % 2 else (1, 0):
                found = measure(row, [urls[which]], sessions, seconds, [running[which]])
                if found["errors"]:
                    sys.exit(f"environments: {found['errors']} errors at {urls[which]}")
                if number:  # the first pair warms up
                    steps[which].append(found["steps_per_s"])
                    cost[which].append(1000 * found["server_cores"][0] / found["steps_per_s"])

    def quotient(values: list[list[float]]) -> str:
        quotients = sorted(now / before for before, now in zip(*values, strict=True))
        return f"{100 * statistics.median(quotients):.1f} % ({100 * quotients[0]:.1f} to {100 * quotients[-1]:.1f})"

    print(f"{row.name}, {sessions} sessions, {pairs} pairs of {seconds:g} s, this checkout beside the earlier one: "
          f"steps/s {statistics.median(steps[1]):.0f} and {statistics.median(steps[0]):.0f}, {quotient(steps)}; "
          f"the server's processor time for a step {statistics.median(cost[1]):.3f} and "
          f"{statistics.median(cost[0]):.3f} ms, {quotient(cost)}")  # yapf: disable


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--env", default="demo")
    parser.add_argument("--source", default=str(ROOT), help="folder that the package folder lies in")
    parser.add_argument("--data", default=str(ROOT / "data"))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--repeat", type=int, default=3, help="rounds over all measurements; the median counts")
    parser.add_argument("--sessions", default="1,16,64,256")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--before", metavar="CHECKOUT", help="an earlier checkout: compare its one server with this one's, "
                        "--repeat pairs for each of --sessions")  # yapf: disable
    options = parser.parse_args()
    row = environment(options.env)
    counts = [int(count) for count in options.sessions.split(",")]
    if row.max_sessions and max(counts) > row.max_sessions:
        sys.exit(f"environments: {row.name} has room for {row.max_sessions} sessions; give --sessions at most that")
    haproxy = shutil.which("haproxy", path=os.environ["PATH"] + ":/usr/sbin")
    if not haproxy:
        sys.exit("environments: needs haproxy on PATH (Debian: apt install haproxy)")
    python, row_file, copy = prepare(row, Path(options.source), Path(options.data) / row.name, ROOT / ".run" / "bench")
    folder = copy / row.folder
    ports: list[int] = []
    for _ in range(6):
        ports.append(choose_port(ports[-1] + 1 if ports else FIRST_PORT, port_is_free))
    bare, alone, one_behind, both_0, both_1, front = ports
    environ = {
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join([str(folder), *(str(folder / extra) for extra in row.pythonpath)]),
        **{
            name: value.format(folder=folder, data=Path(options.data) / row.name)
            for name, value in row.env.items()
        }
    }

    def url(port: int) -> str:
        return f"http://127.0.0.1:{port}"

    def uvicorn(port: int) -> list[str]:
        return [str(python), "-m", "uvicorn", row.app, "--port", str(port), "--no-access-log", "--log-level", "warning"]

    def serve(port: int, replica: int = 0, replicas: int = 1, root: Path = ROOT) -> list[str]:
        return [
            str(python),
            str(root / "servers/serve.py"),
            str(row_file), "--source",
            str(copy), "--data",
            str(Path(options.data) / row.name), "--port",
            str(port), "--replica",
            str(replica), "--replicas",
            str(replicas)
        ]

    def proxy(*behind: int) -> list[str]:
        config = copy.parent / f"bench-{len(behind)}.cfg"
        config.write_text(proxy_config(row, front, [f"127.0.0.1:{port}" for port in behind]))
        return [haproxy, "-db", "-f", str(config)]

    if options.before:
        for count in counts:
            compare(row, [serve(alone, root=Path(options.before).resolve()),
                          serve(both_0)], [url(alone), url(both_0)], folder / row.workdir, environ, count,
                    options.seconds, options.repeat)
        return
    setups: dict[str, tuple[list[list[str]], list[str]]] = {
        "one server, bare": ([uvicorn(bare)], [url(bare)]),
        "one server": ([serve(alone)], [url(alone)]),
        "one server, proxy": ([serve(one_behind), proxy(one_behind)], [url(front)]),
        "two servers, direct": ([serve(both_0, 0, 2), serve(both_1, 1, 2)], [url(both_0), url(both_1)]),
        "two servers, proxy": ([serve(both_0, 0, 2), serve(both_1, 1, 2),
                                proxy(both_0, both_1)], [url(front)]),
    }
    results: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(options.repeat):  # in rounds: what else the machine does then meets every setup
        for name, (commands, urls) in setups.items():
            cwd = folder / row.workdir
            with processes(commands, cwd, environ) as running:
                wait_until_ready(row, urls)
                for sessions in counts:
                    results.setdefault((name, sessions),
                                       []).append(measure(row, urls, sessions, options.seconds, running))
    summary = []
    for (name, sessions), found in results.items():
        middle = sorted(found, key=lambda one: one["steps_per_s"])[len(found) // 2]
        summary.append({"setup": name, "sessions": sessions, **middle})
    if options.json:
        print(json.dumps({"env": row.name, "cpus": os.cpu_count(), "seconds": options.seconds, "results": summary}))
        return
    print(
        f"{row.name}, {os.cpu_count()} cores shared with the generator, median of {options.repeat} x {options.seconds:g} s"
    )
    print(
        f"{'setup':22}{'sessions':>9}{'steps/s':>10}{'p50 ms':>9}{'p95 ms':>9}{'errors':>8}  cores: generator, servers")
    for one in summary:
        print(
            f"{one['setup']:22}{one['sessions']:>9}{one['steps_per_s']:>10.0f}{one['p50_ms']:>9.2f}{one['p95_ms']:>9.2f}"
            f"{one['errors']:>8}  {one['generator_cores']}, {[round(core, 2) for core in one['server_cores']]}")


if __name__ == "__main__":
    main()
