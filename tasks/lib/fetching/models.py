"""Fetch a model into models/: the size said first, resumable, and in its place only when it is whole.

It comes into a hidden folder beside its place and is renamed when every file is there: no training or evaluation ever
finds half a model.
"""
from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tasks.lib import hub
from tasks.lib.errors import UserError
from training import foreign

RECORD = ".fetched.json"
# The same weights in other forms, which nothing here reads where there are safetensors.
OTHER_WEIGHTS = re.compile(r".*\.(bin|pth|pt|h5|msgpack|onnx|gguf|ot|tflite)|(original|onnx|coreml|openvino)/.*",
                           re.IGNORECASE)

Say = Callable[[str], None]


def repository_name(text: str) -> str:
    """Return user/name of what the user typed, which may be the page's address.

    Raises:
        UserError: it is none.
    """
    name = re.sub(r"^https?://[^/]+/", "", text.strip()).strip("/")
    name = re.sub(r"/tree/[^/]+$", "", name)
    part = r"[A-Za-z0-9][\w.-]*"
    if not re.fullmatch(rf"({part}/)?{part}", name, re.ASCII) or ".." in name:
        raise UserError(f"{text!r} is no model of the Hub; write it like Qwen/Qwen2.5-7B-Instruct"
                        if text else "which model? invoke models.fetch Qwen/Qwen2.5-7B-Instruct")
    return name


def wanted(files: Iterable[str], everything: bool = False) -> list[str]:
    """Return the files of a model that are fetched: all but what is no use, such as the weights in a second form.

    Raises:
        UserError: there are no weights, or no config.
    """
    names = sorted(files)
    if everything:
        return names
    safe = any(name.endswith(".safetensors") and "/" not in name for name in names)
    kept = [name for name in names if not (safe and OTHER_WEIGHTS.fullmatch(name))]
    if "config.json" not in kept or not (safe or any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in kept)):
        raise UserError(
            "it has no config.json with weights beside it, so it is no model that can be trained or served; "
            "--everything fetches it all the same")
    return kept


def fetch(name: str, folder: Path, revision: str, everything: bool, dry: bool, say: Say,
          size_of: Callable[[int], str]) -> None:
    """Fetch the model `name` to `folder`.

    Args:
        revision: branch, tag or commit; empty for main.
        everything: weights in further forms too.
        dry: say what would be fetched, and fetch nothing.
        size_of: bytes in words.

    Raises:
        UserError: it is not there, there is no room, something else is in its place, or it did not come whole.
    """
    repository = hub.look(name, "model", revision)
    names = wanted(repository.files, everything)
    told = read_record(folder)
    if told.get("repository") == name:
        if told.get("commit") == repository.commit and set(names) <= set(told.get("files") or ()):
            say(f"{folder} is {name} at {repository.commit[:8]} already")
            return
        raise UserError(f"{folder} is {name} at {str(told.get('commit'))[:8]}, and the Hub has {repository.commit[:8]} "
                        f"with {len(names)} files; move it away, or choose another --to")
    if os.path.lexists(folder) and not _is_empty(folder):
        raise UserError(
            f"{folder} is there already, and nothing tells that it is {name}; move it away, or choose another --to")
    staged = folder.with_name(f".{folder.name}.fetching-{repository.commit[:8]}")
    places = [path for one in names for path in (staged / one, hub.part_of(staged / one)) if path.is_file()]
    here = sum(path.stat().st_size for path in places)
    total = sum(repository.files[one].size for one in names)
    place = next(parent for parent in (staged, *staged.parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    say(f"{name} at {repository.commit[:8]}: {len(names)} files, {size_of(total)} to fetch to {folder}"
        f"{f' ({size_of(here)} of it came before)' if here else ''}, {size_of(free)} free")
    if total - here > free:
        raise UserError(
            f"{name} needs {size_of(total - here)} more, and {size_of(free)} are free in {place}; make room, or "
            "choose another --to")
    if dry:
        return
    staged.mkdir(parents=True, exist_ok=True)
    hub.download(repository, names, staged)
    record = {
        "repository": name,
        "commit": repository.commit,
        "files": {
            one: repository.files[one].size
            for one in names
        }
    }
    (staged / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    if folder.is_dir():
        folder.rmdir()  # empty, as was seen above
    staged.rename(folder)
    say(f"{folder} is there")


def read_record(folder: Path) -> dict[str, Any]:
    """Return what an earlier fetch noted in `folder`; {} where there is no note."""
    try:
        found = foreign.read_json(folder / RECORD)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
