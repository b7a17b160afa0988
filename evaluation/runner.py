"""Drive a run: all items and samples, many at once, each record kept as it ends."""
import asyncio
import importlib.metadata
import os
import platform
import resource
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evaluation import __version__
from evaluation.attempts import Attempt
from evaluation.endpoint import ChatModel
from evaluation.episodes import attempt, derived_seed
from evaluation.items import Item
from evaluation.live import Board
from evaluation.model import Completion, Message, Model, Player
from evaluation.pace import Pace
from evaluation.problems import EnvironmentFault, Misuse
from evaluation.protocol import Server
from evaluation.records import LIVE, RunFolder, told
from evaluation.settings import Settings, config_hash

Watcher = Callable[[Attempt], None]


def versions() -> dict[str, str]:
    """Return what the run was made with."""
    found = {"evaluation": __version__, "python": platform.python_version()}
    for name in ("openai", "aiohttp", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_revision(folder: Path) -> str:
    """Return the project's commit, with -dirty for local changes; the image's label, which is baked in; or unknown."""
    if os.environ.get("EVAL_REVISION"):
        return os.environ["EVAL_REVISION"]
    try:
        said = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"


def facts(settings: Settings) -> dict[str, Any]:
    """Return what run.json tells beside the configuration."""
    return {
        "format": 1,
        "hash": config_hash(settings.config),
        "title": settings.row.title,
        "items_from": settings.origin,
        "row": settings.row.to_json(),
        "prompt": settings.prompt.model_dump(),
        "versions": versions(),
        "revision": git_revision(Path(__file__).parent),
    }


def check_descriptors(concurrency: int, auto: bool = False) -> int:
    """See that the process may open as many files as it needs, and raise its own limit where that is allowed.

    Args:
        auto: fewer at once will do.

    Returns:
        How many episodes at once it may play: `concurrency`, or fewer.

    Raises:
        Misuse: it may not play as many.
    """
    needed = 2 * concurrency + 64  # a connection to the server and one to the endpoint each, and what is open anyway
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return concurrency
    if hard != resource.RLIM_INFINITY and hard < needed:
        fewer = max(1, (hard - 64) // 2)
        if auto:
            return fewer
        raise Misuse(f"{concurrency} episodes at once need {needed} open files, and `ulimit -n` allows {hard}; "
                     f"raise it, or give --concurrency {fewer}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return concurrency


async def wait_for(server: Server, name: str, seconds: float, say: Callable[[str], None]) -> None:
    """Return once the server answers.

    Raises:
        Misuse: nothing does within `seconds`.
    """
    end, told = time.monotonic() + seconds, False
    while not await server.answers():
        if time.monotonic() > end:
            raise Misuse(
                f"no environment server at {server.shown} ({server.silence}); start it with `invoke env.up --env {name}`, "
                "or name its address with --server")
        if not told:
            say(f"waiting for the environment server at {server.shown}")
            told = True
        await asyncio.sleep(0.3)


async def close_leftovers(server: Server, folder: RunFolder, say: Callable[[str], None]) -> None:
    """Close the sessions that a killed run left open.

    Only where the project's own wrapper keeps the server, whose ids are never used twice: on a bare server the same
    number may be somebody else's session by now.
    """
    left = folder.leftover.pop(server.shown, [])
    if not left or await server.wrapper_status() is None:
        return
    before = server.closed
    for session in left:
        await server.give_back(session, clean=False)
    server.lost = 0  # those had been closed already
    if server.closed > before:
        say(f"closed {server.closed - before} sessions that the last run left open")
    server.opened += server.closed - before


def pending(settings: Settings, folder: RunFolder) -> list[tuple[Item, int]]:
    """Return the attempts that have no result yet, all items' first samples first."""
    wanted = [(item, sample) for sample in range(settings.samples) for item in settings.items]
    return [(item, sample) for item, sample in wanted if (item.id, sample) not in folder.records]


class Paced:
    """A player that asks its model when there is room."""

    def __init__(self, player: Player, pace: Pace) -> None:
        self.player, self.pace = player, pace

    async def reply(self, messages: Sequence[Message]) -> Completion:
        """Return the completion of the conversation."""
        async with self.pace.turn():
            return await self.player.reply(messages)


class Stage:
    """What a run plays on: the server, the model, how many at once, and who looks on."""

    def __init__(self, settings: Settings, folder: RunFolder, server: Server, model: Model, watch: Watcher, pace: Pace,
                 board: Board) -> None:
        self.settings, self.folder, self.server, self.model = settings, folder, server, model
        self.watch, self.pace, self.board = watch, pace, board

    async def play_all(self) -> None:
        """Play what is missing, as many attempts at once as the pace says.

        What the model refused before it ever answered is played again once it has: whether a conversation that is too
        long is the model's or the configuration's must not depend on which attempt came first.

        Raises:
            Misuse: the endpoint refuses every request.
            Stopped: a record cannot be written, or the endpoint or the server has gone.
        """
        missing = pending(self.settings, self.folder)
        await self._play(missing)
        early = [(item, sample) for item, sample in missing if (item.number, sample) in self.model.refused]
        if early and self.model.answered:
            await self._play(early)

    async def _one(self, item: Item, sample: int) -> None:
        settings = self.settings
        seed = None if settings.seed is None else derived_seed(settings.seed, item.number, sample)
        make = self.model.player
        if self.pace.auto:
            make = lambda item, sample, seed: Paced(self.model.player(item, sample, seed), self.pace)  # noqa: E731
        with self.board.place(item.id, sample) as place:
            record = await attempt(self.server, make, settings.row, settings.prompt, item, sample, seed,
                                   settings.limits, self.folder.earlier.get((item.id, sample), []), place)
        self.folder.add(record)
        self.watch(record)
        self.board.note(record)

    async def _play(self, wanted: Sequence[tuple[Item, int]]) -> None:
        queue, pace = deque(wanted), self.pace
        tasks: set[asyncio.Task[None]] = set()
        failed: list[asyncio.Task[None]] = []

        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            pace.playing -= 1
            if not task.cancelled() and task.exception():
                failed.append(task)
            pace.wake.set()

        try:
            while (queue or tasks) and not failed:
                while queue and len(tasks) < pace.limit:
                    task = asyncio.create_task(self._one(*queue.popleft()))
                    tasks.add(task)
                    pace.playing += 1
                    pace.queued = len(queue)
                    task.add_done_callback(ended)
                pace.wake.clear()
                await pace.wake.wait()
            for task in failed[:1]:
                task.result()
        finally:
            left = list(tasks)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)


async def evaluate(settings: Settings, folder: RunFolder, model: Model, watch: Watcher, say: Callable[[str],
                                                                                                      None]) -> None:
    """Carry out the run in its folder; what was done before is not done again.

    Raises:
        Misuse, Stopped: see `Stage.play_all`.
        asyncio.CancelledError: after Ctrl-C, SIGTERM or SIGHUP, with every session closed.
    """
    pace = Pace(check_descriptors(settings.concurrency, settings.auto), settings.auto)
    main = asyncio.current_task()
    assert main is not None
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if not main.cancelling():  # a second one must not keep the sessions from being closed
            main.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
            loop.add_signal_handler(number, stop)
    begun, before = time.perf_counter(), len(folder.records)

    def journal(what: str) -> Callable[[int], None]:
        return lambda session: folder.sessions.add({what: session, "server": server.shown})

    model.answered = model.answered or folder.answered()
    server = Server(settings.server, settings.row.protocol, settings.env_timeout, journal("open"), journal("close"),
                    settings.max_answer)
    server.on_full = pace.full
    if isinstance(model, ChatModel):
        model.on_limit = pace.refused
    total = len(settings.items) * settings.samples
    board = Board(folder.folder / LIVE, total, {key: record["outcome"] for key, record in folder.records.items()}, pace)
    work = {
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "seconds": None,  # should it be killed
        "server": server.shown,
        "concurrency": "auto" if settings.auto else settings.concurrency,
        "versions": versions(),
    }
    with suppress(OSError):
        folder.note_work(work)
    try:
        async with server:
            try:
                if pending(settings, folder):
                    await wait_for(server, settings.row.name, settings.limits.wait, say)
                    about = await server.about()
                    folder.note_about(about)
                    if about:
                        say(f"the server plays on {told(about)}")
                    await close_leftovers(server, folder, say)
                    async with board.kept():
                        await Stage(settings, folder, server, model, watch, pace, board).play_all()
                elif server.shown in folder.leftover and await server.answers():  # all is played: it may be away
                    await close_leftovers(server, folder, say)
            finally:
                if server.opened == server.closed + server.pooled and not server.lost and not folder.leftover:
                    folder.forget_sessions()
    finally:
        with suppress(OSError, EnvironmentFault):
            await model.aclose()
        with suppress(OSError):  # a full disk has its own line already
            folder.note_work({
                **work,
                "seconds": round(time.perf_counter() - begun, 3),
                "attempts": len(folder.records) - before,
                "adjusted": list(model.adjusted),
                **({
                    "pace": [change._asdict() for change in pace.changes]
                } if settings.auto else {}),
                "sessions": {
                    "opened": server.opened,
                    "closed": server.closed,
                    "pooled": server.pooled,
                    "lost": server.lost
                },
            })
