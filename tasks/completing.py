"""What may stand where the cursor is: run by the shell, so it imports nothing that takes long.

    python -IS tasks/completing.py FOLDER WORDS…    # the words after `invoke`, the last being typed

The tasks and flags are noted in .run/completion.json, and asked for anew when a file of tasks/ has changed.
"""
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
CACHE = HERE / ".run" / "completion.json"
# What a flag may be; its help says so too (a test compares).
CHOICES = {
    "--runner": ("auto", "docker", "local"),
    "--gpus": ("all", "none"),
    "--dtype": ("bfloat16", "float16", "float32", "keep"),
    "--device": ("auto", "cpu", "cuda"),
    "--lora": ("adapter", "fuse"),
    "--tied-weights": ("keep", "drop"),
    "--allow": ("keys", "nonfinite", "buffers"),
    "--engine": ("auto", "transformers", "vllm"),
    "--format": ("csv", "jsonl", "parquet"),
    "--rows": ("attempts", "turns"),
    "--install": ("bash", "zsh", "fish"),
}


def environments(root: Path) -> list[str]:
    """Return the environments' names, without reading what the rows say."""
    return re.findall(r"^\[([\w-]+)\]", (root / "environments.toml").read_text(), re.MULTILINE)


def training_runs(root: Path) -> list[str]:
    """Return the names of the training runs."""
    return [path.parent.name for path in (root / "saves").glob("*/run.json")]


def evaluations(root: Path) -> list[str]:
    """Return the names of the evaluations."""
    return [path.parent.name for path in (root / "saves/eval").glob("*/run.json")]


def checkpoints(root: Path) -> list[str]:
    """Return the checkpoints' folders, relative to where the user stands."""
    found = [
        path for pattern in ("*", "*/*") for path in (root / "saves").glob(f"{pattern}/global_step_*") if path.is_dir()
    ]
    return [os.path.relpath(path / "actor" if (path / "actor").is_dir() else path) for path in found]


VALUES: dict[str, Callable[[Path], list[str]]] = {
    "--env": environments,
    "--local-dir": checkpoints,
    "--checkpoint": checkpoints,
    "--run": evaluations,
}


def values(task: str, flag: str, root: Path) -> Iterable[str]:
    """Return what the flag of a task may be; nothing where only the user knows."""
    if flag == "--name" and task.startswith("train."):
        return training_runs(root)
    if flag in VALUES:
        try:
            return VALUES[flag](root)
        except OSError:
            return ()
    return CHOICES.get(flag, ())


def candidates(table: dict[str, dict[str, bool]], root: Path, words: Sequence[str]) -> list[str]:
    """Return what the last of `words` may become.

    Args:
        table: of each task and, under "", of invoke itself, the flags, and whether they take a value.
        root: the project's folder.
    """
    # bash makes --env=ma three words, zsh and fish make it one.
    typed = [word for word in words if word != "="] + ([""] if words[-1:] == ["="] else [])
    *before, last = typed or [""]
    if "--" in before:
        return []
    task = ""
    for number, word in enumerate(before):
        if word in table and not (number and takes_value(table, task, before[number - 1])):
            task = word
    prefix = ""
    if before and takes_value(table, task, before[-1]):
        found: Iterable[str] = values(task, before[-1], root)
    elif last.startswith("--") and "=" in last:
        flag, _, last = last.partition("=")
        prefix, found = f"{flag}=", values(task, flag, root)
    elif last.startswith("-"):
        found = (table[""] if not task else table[task]).keys()
    else:
        found = [] if task else [name for name in table if name]
    return [prefix + one for one in sorted(set(found)) if one.startswith(last)]


def takes_value(table: dict[str, dict[str, bool]], task: str, flag: str) -> bool:
    """Tell whether a value follows the flag."""
    return table[task].get(flag, table[""].get(flag, False))


def build() -> dict[str, dict[str, bool]]:
    """Return the table, by asking invoke."""
    from invoke.program import Program

    from tasks import ns
    from tasks.words import contexts

    def flags(context: Any) -> dict[str, bool]:
        return {name: bool(one.takes_value) for name, one in context.flags.items()}

    found = {"": flags(Program().initial_context)}
    for context in contexts(ns):
        for name in (context.name or "", *context.aliases):
            found[name] = flags(context)
    return found


def stamp() -> str:
    """Return what tells whether a file of tasks/ has changed."""
    files = sorted((HERE / "tasks").rglob("*.py"))
    return " ".join(f"{one.stat().st_mtime_ns}:{one.stat().st_size}" for one in files)


def read_table() -> dict[str, dict[str, bool]]:
    """Return the table as it was noted, or ask for it and note it."""
    now = stamp()
    try:
        noted = json.loads(CACHE.read_text())
        if noted["stamp"] == now:
            table: dict[str, dict[str, bool]] = noted["table"]
            return table
    except (OSError, ValueError, KeyError, TypeError):
        pass
    import subprocess
    code = "import json; from tasks.completing import build; print(json.dumps(build()))"
    asked = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    table = json.loads(asked.stdout)
    try:
        CACHE.parent.mkdir(mode=0o700, exist_ok=True)
        beside = CACHE.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps({"stamp": now, "table": table}))
        beside.replace(CACHE)
    except OSError:  # it is only slower without
        pass
    return table


if __name__ == "__main__":
    print("\n".join(candidates(read_table(), Path(sys.argv[1]), sys.argv[2:])))
