"""What `invoke eval` hands to the evaluation runner, decided from flags, settings and what is up."""
from collections.abc import Mapping, Sequence
from pathlib import Path

RUNS = Path("saves") / "eval"
NEEDED = ("aiohttp", "openai", "pydantic", "rich", "jinja2", "numpy", "tenacity", "matplotlib")
RUNNERS = ("auto", "docker", "local")


def choose_runner(runner: str, importable: bool) -> str:
    """Return where the runner runs: as asked, and by itself in this Python where it has what the runner needs.

    Raises:
        ValueError: no such runner.
    """
    if runner not in RUNNERS:
        raise ValueError(f"unknown runner {runner!r}; choose one of {', '.join(RUNNERS)}")
    if runner == "auto":
        return "local" if importable else "docker"
    return runner


def flags(values: Mapping[str, str | bool]) -> list[str]:
    """Return the flags that are set, as the runner's command line has them."""
    found = []
    for name, value in values.items():
        if value:
            flag = "--" + name.replace("_", "-")
            found += [flag] if value is True else [f"{flag}={value}"]  # with =, so that a value may begin with a dash
    return found


def run_folder(name: str, root: Path) -> Path:
    """Return the folder of the run called `name`: a path, or a folder of saves/eval.

    Raises:
        ValueError: neither is there.
    """
    for path in (Path(name), root / RUNS / name):
        if (path / "run.json").is_file():
            return path
    raise ValueError(f"no run {name}; `invoke eval.list` shows them")


def latest_run(root: Path) -> Path:
    """Return the folder of the run that was worked on last.

    Raises:
        ValueError: there is none.
    """
    found = sorted((root / RUNS).glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no runs in {root / RUNS}; `invoke eval` makes one")
    return found[-1].parent


def folders(names: Sequence[str], root: Path) -> list[Path]:
    """Return the folders of the runs called `names`, or of the latest run where there is no name."""
    return [run_folder(name, root) for name in names] if names else [latest_run(root)]
