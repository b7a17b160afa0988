"""Runs' folders as the trainer leaves them, made without one."""
from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

KINDS = ("model", "optim", "extra_state")


def archive(path: Path, text: str = "weights" * 50) -> None:
    """Write a file of torch.save's form: a zip archive, nothing compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr(f"{path.stem}/data.pkl", "pickled")
        file.writestr(f"{path.stem}/data/0", text)


def checkpoint(run: Path, step: int, world: int = 2, critic: bool = False, track: bool = True) -> Path:
    """Write a whole checkpoint in the order of the trainer; return its folder."""
    folder = run / f"global_step_{step}"
    for part in ("actor", "critic") if critic else ("actor", ):
        for rank in range(world):
            for kind in KINDS:
                archive(folder / part / f"{kind}_world_size_{world}_rank_{rank}.pt")
        (folder / part / "huggingface").mkdir()
        (folder / part / "huggingface" / "config.json").write_text("{}")
    archive(folder / "data.pt")
    if track:
        (run / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder


def record(place: Path, /, **changes: Any) -> dict[str, Any]:
    """Return a run.json for the folder `place`; `changes` go over it."""
    return {
        "schema": 1,
        "name": place.name,
        "created": 1.0,
        "environment": {
            "name": "babyai",
            "url": "http://127.0.0.1:9",
            "replicas": 1,
            "started_by_run": False
        },
        "algorithm": "grpo",
        "presets": [],
        "overrides": [],
        "resolved": None,
        "command": [],
        "variables": {},
        "secrets": {},
        "cwd": str(place),
        "runner": "local",
        "container": None,
        "image": None,
        "commits": {},
        "versions": {},
        "gpus": {
            "choice": "all",
            "count": 2
        },
        "world_size": 2,
        "steps": 9,
        "save_freq": 2,
        "options": {
            "retries": 0,
            "on_env_loss": "stop",
            "stop_seconds": 5,
            "skip": []
        },
        "folder": str(place),
        "attempts": [],
        "poisoned": [],
        **changes
    }


def write_run(folder: Path, /, **changes: Any) -> dict[str, Any]:
    """Write run.json; return what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    run = record(folder, **changes)
    (folder / "run.json").write_text(json.dumps(run))
    return run


def set_time(path: Path, seconds: float) -> None:
    """Set the time that `path` was changed last, in seconds since 1970."""
    os.utime(path, (seconds, seconds))
