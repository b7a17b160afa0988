"""Run the project's own programs on this machine, as the user would type them."""
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from invoke.context import Context
from invoke.exceptions import Exit

from tasks.lib.errors import INTERRUPTED
from tasks.lib.settings import ROOT, resolve

RUNNERS = ("auto", "docker", "local")
GPUS_HERE = "--gpus is for --runner docker; on this machine set CUDA_VISIBLE_DEVICES"


def choose_runner(runner: str, importable: bool) -> str:
    """Return where a program runs: as asked, and by itself in this Python where it has what the program needs.

    Raises:
        ValueError: no such runner.
    """
    if runner not in RUNNERS:
        raise ValueError(f"unknown runner {runner!r}; choose one of {', '.join(RUNNERS)}")
    if runner == "auto":
        return "local" if importable else "docker"
    return runner


def environment(names: Sequence[str], inherited: Mapping[str, str]) -> dict[str, str]:
    """Return `inherited` plus those settings `names` that `.env` has and the environment has not."""
    found = {name: resolve(name, environ=inherited) for name in names}
    return {**inherited, **{name: value for name, value in found.items() if value}}


def run_program(c: Context, script: Path, args: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    """Run `script` with this Python in the foreground; leave with its exit code when that is not 0.

    The program inherits the terminal, so progress bars and Ctrl-C work as if it had been typed.

    Raises:
        Exit: the program's exit code; 130 after Ctrl-C.
    """
    _run(c, [sys.executable, str(script), *args], env)


def run_module(c: Context, module: str, args: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    """Run the project's package `module` with this Python, as `run_program` does a script.

    Raises:
        Exit: as for `run_program`.
    """
    inherited = dict(os.environ if env is None else env)
    path = os.pathsep.join(filter(None, (str(ROOT), inherited.get("PYTHONPATH"))))
    _run(c, [sys.executable, "-m", module, *args], {**inherited, "PYTHONPATH": path})


@contextmanager
def as_ctrl_c() -> Iterator[None]:
    """Answer SIGTERM and SIGHUP like Ctrl-C, and pass them on to what this program runs.

    A cluster's scheduler sends the one; the other comes when the terminal is closed, except under nohup.
    """
    import psutil

    def press(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:  # nobody reads on: what is said from here on must not fail
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
        for child in psutil.Process().children():
            with suppress(OSError, psutil.Error):
                if os.getpgid(child.pid) == os.getpgrp():  # not the servers, which have a group of their own
                    child.terminate()
        answer = signal.getsignal(signal.SIGINT)
        if not callable(answer):  # a shell's background job ignores Ctrl-C
            raise KeyboardInterrupt
        answer(signal.SIGINT, frame)

    heard = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    before = [(one, signal.signal(one, press)) for one in heard]
    try:
        yield
    finally:
        for one, handler in before:
            signal.signal(one, handler)


def _run(c: Context, argv: Sequence[str], env: Mapping[str, str] | None) -> None:
    if c.config.run.dry or c.config.run.echo:
        print(shlex.join(argv), flush=True)
    if c.config.run.dry:
        return
    process = subprocess.Popen(argv, env=dict(env) if env is not None else None)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal signalled the program too: let it tidy up
        process.wait()
        code = INTERRUPTED
    if code:
        raise Exit(code=code)
