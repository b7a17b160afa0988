"""Virtual environments for programs with pins of their own."""
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tasks.lib.atomic import write_private
from tasks.lib.errors import UserError

STAMP = ".made-from"  # what an environment was made from


def uv() -> str:
    """Return the path of uv.

    Raises:
        UserError: it is not installed.
    """
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if not found:
        raise UserError("no uv on PATH; `pip install uv` (requirements-dev.txt has it)", code=1)
    return found


def run_quietly(argv: Sequence[str], what: str) -> None:
    """Run `argv`, whose output nobody needs where it works.

    Raises:
        UserError: it failed; the message begins with `what`, and says why.
    """
    done = subprocess.run(argv, capture_output=True, text=True, check=False, umask=0o077)
    if done.returncode:
        raise UserError(f"{what} failed: {reason_in(done.stderr or done.stdout)}", code=1)


def reason_in(said: str) -> str:
    """Return why a program failed: its first line and the last, without hints about its own flags."""
    lines = [line.strip(" ×│├╰─▶") for line in said.splitlines()]
    hint = next((number for number, line in enumerate(lines) if line.lower().startswith("hint:")), len(lines))
    told = [line for line in lines[:hint] if line] or ["no message"]
    return told[0] if len(told) == 1 else f"{told[0]}: {told[-1]}"


def ensure_venv(folder: Path, python: str, pins: Path) -> Path:
    """Return the Python of the virtual environment in `folder`/venv, made anew when version or pins changed.

    Args:
        folder: where it lies.
        python: its version, such as 3.10.
        pins: a requirements file that names every package.

    Raises:
        UserError: there is no such Python, or a package cannot be had.
    """
    said = (f"no Python {python} on PATH that works (install it, or use --runner docker); fetching one",
            f"installing {pins.name}")
    commands = making(folder, python, pins)
    for argv, what in zip(commands, said, strict=False):
        run_quietly(argv, what)
    if commands:
        write_private(folder / "venv" / STAMP, _wanted(python, pins))
    return folder / "venv" / "bin" / "python"


def making(folder: Path, python: str, pins: Path) -> list[list[str]]:
    """Return the two commands that make that environment; none where it is made.

    Raises:
        UserError: there is no uv.
    """
    venv = folder / "venv"
    stamp = venv / STAMP
    if stamp.is_file() and stamp.read_text() == _wanted(python, pins):
        return []
    # --no-deps: the file is a whole freeze that ran, and some packages' own requirements contradict it.
    install = [
        uv(), "pip", "install", "--quiet", "--no-deps", "--python",
        str(venv / "bin" / "python"), "--requirements",
        str(pins)
    ]
    return [[uv(), "venv", "--quiet", "--clear", "--python", python, str(venv)], install]


def _wanted(python: str, pins: Path) -> str:
    return hashlib.sha256(pins.read_bytes() + python.encode()).hexdigest()
