"""Run the project's own programs on this machine, as the user would type them."""
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from invoke.context import Context

from tasks.lib.errors import INTERRUPTED, UserError
from tasks.lib.notices import put
from tasks.lib.settings import ROOT, resolve

RUNNERS = ("auto", "docker", "local")
GPUS_HERE = "--gpus is for --runner docker; on this machine set CUDA_VISIBLE_DEVICES"


def choose_program_runner(runner: str, importable: bool) -> str:
    """Return where a program runs: as asked, and by itself in this Python where it has what the program needs.

    Raises:
        UserError: no such runner.
    """
    if runner not in RUNNERS:
        raise UserError(f"unknown runner {runner!r}; choose one of {', '.join(RUNNERS)}")
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
        UserError: the program's exit code; 130 after Ctrl-C.
    """
    _run(c, [sys.executable, str(script), *args], env)


def run_module(c: Context, module: str, args: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    """Run the project's package `module` with this Python, as `run_program` does a script.

    Raises:
        UserError: as for `run_program`.
    """
    inherited = dict(os.environ if env is None else env)
    path = os.pathsep.join(filter(None, (str(ROOT), inherited.get("PYTHONPATH"))))
    _run(c, [sys.executable, "-m", module, *args], {**inherited, "PYTHONPATH": path})


def _run(c: Context, argv: Sequence[str], env: Mapping[str, str] | None) -> None:
    if c.config.run.dry or c.config.run.echo:
        put(shlex.join(argv))
    if c.config.run.dry:
        return
    process = subprocess.Popen(argv, env=dict(env) if env is not None else None)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal signalled the program too: let it tidy up
        process.wait()
        code = INTERRUPTED
    if code:
        raise UserError(code=code)
