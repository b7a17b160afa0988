"""What a run would meet: the model's files, the item list, the disk. Read from files alone, nothing is loaded."""
from __future__ import annotations

import math
import os
import shutil
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.foreign import LARGEST_LIST, loads, open_file, read_bytes, read_object
from training.retention import Rules

HEADER_BYTES = 100_000_000  # safetensors' own limit of a file's header
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Model:
    """A Hugging Face folder.

    Attributes:
        path: the folder on this machine.
        fault: what keeps it from being one; empty where it is.
        config: config.json.
        parameters: how many the weights hold; None where the files do not tell.
        chat_template: of the tokenizer; empty where it has none.
        tokenizer: whether its files are there.
    """
    path: Path
    fault: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    chat_template: str = ""
    tokenizer: bool = False


def read_model(path: Path) -> Model:
    """Return what the folder `path` says of itself."""
    if not path.is_dir():
        return Model(path, "there is no such folder" if not path.exists() else "it is no folder")
    try:
        config = read_object(path / "config.json", nonfinite=True)
    except FileNotFoundError:
        hint = "; the model in it is " + str(path / "huggingface") if (path / "huggingface" /
                                                                       "config.json").is_file() else ""
        return Model(path, f"it has no config.json{hint}")
    except (OSError, ValueError) as error:
        return Model(path, f"its config.json cannot be read: {error}")
    weights = sorted(path.glob("*.safetensors")) + sorted(path.glob("pytorch_model*.bin"))
    if not weights:
        return Model(path, "it has no weights (*.safetensors, pytorch_model*.bin)", config)
    fault, parameters = "", None
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = {str(name) for name in dict(read_object(index)["weight_map"]).values()}
        except (OSError, ValueError, KeyError, TypeError):
            return Model(path, f"its {index.name} cannot be read", config)
        lacking = sorted(name for name in wanted if not (path / name).is_file())
        if lacking:
            return Model(path, f"{len(lacking)} of its {len(wanted)} files of weights are not there: {lacking[0]}",
                         config)
        weights = [path / name for name in sorted(wanted)]
    try:
        counts = [count_parameters(file) for file in weights if file.suffix == ".safetensors"]
        parameters = sum(counts) if counts else None
    except (OSError, ValueError) as error:
        fault = str(error)
    return Model(path, fault, config, parameters, chat_template(path),
                 any((path / name).is_file() for name in TOKENIZERS))


def count_parameters(file: Path) -> int:
    """Return how many numbers a safetensors file holds, and check that the file is as long as its header says.

    Raises:
        ValueError: it is cut off, or none; in one line.
    """
    with open(open_file(file), "rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_BYTES + 1
        if length > HEADER_BYTES:
            raise ValueError(f"{file.name} is no safetensors file")
        try:
            header = loads(opened.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            count = sum(math.prod(entry["shape"]) for entry in tensors)
            end = max((entry["data_offsets"][1] for entry in tensors), default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise ValueError(f"{file.name} is cut off, or no safetensors file") from None
    if file.stat().st_size < 8 + length + end:
        raise ValueError(f"{file.name} is cut off: {file.stat().st_size} of {8 + length + end} bytes")
    return count


def chat_template(path: Path) -> str:
    """Return the tokenizer's chat template, of its own file or of tokenizer_config.json; empty where there is none."""
    with suppress(OSError, ValueError):
        return read_bytes(path / "chat_template.jinja").decode()
    with suppress(OSError, ValueError):
        found = read_object(path / "tokenizer_config.json", nonfinite=True).get("chat_template")
        if isinstance(found, str):
            return found
        if isinstance(found, list):
            return "".join(str(one.get("template", "")) for one in found if isinstance(one, dict))
    return ""


@dataclass(frozen=True)
class Items:
    """An item list, as the trainer reads it: JSON with a list of objects, or an object a line.

    Attributes:
        path: the file on this machine.
        fault: why it cannot be read; empty where it can.
        ids: its item ids, in order.
    """
    path: Path
    fault: str = ""
    ids: tuple[str, ...] = ()


def read_items(path: Path, key: str = "item_id") -> Items:
    """Return the item list at `path`; `key` is where an object has its id."""
    try:
        text = read_bytes(path, LARGEST_LIST).decode("utf-8-sig")
    except UnicodeDecodeError:
        return Items(path, "it is no text")
    except OSError as error:
        return Items(path, "there is no such file" if isinstance(error, FileNotFoundError) else str(error.strerror))
    except ValueError as error:
        return Items(path, str(error))
    try:
        found = loads(text)
        rows = found if isinstance(found, list) else [found]
    except ValueError:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    rows.append(loads(line))
                except ValueError:
                    return Items(path, f"line {number} is no JSON")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            return Items(path, f"item {number} has no text `{key}`")
    return Items(path, "" if rows else "it has no items", tuple(row[key] for row in rows))


def free_bytes(folder: Path) -> int:
    """Return the room of the disk that `folder`, or the nearest folder above it that is there, is on."""
    place = Path(os.path.abspath(folder))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def unwritable(folder: Path) -> Path | None:
    """Return the folder, `folder` or the nearest above it, where this user cannot write; None where one can."""
    place = Path(os.path.abspath(folder))
    while not place.exists():
        place = place.parent
    # As this process may, whose capabilities count; by itself the call asks for the user who started it.
    open_to_us = os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)
    return None if place.is_dir() and open_to_us else place


@dataclass(frozen=True)
class Server:
    """The environment's server, and its row's limits.

    Attributes:
        name: the row's.
        first, last: item numbers; no last one means no end. wraps: beyond the last it starts again.
        state: ready, absent (it can be started), or why it is not to be had.
        remedy: what to do about the last.
        url: for the trainer; empty where it is not known yet.
        replicas: servers behind the address; of one that was given, as the user says.
        max_sessions: at once, of one server; None: no limit is known.
        live: sessions that are open now; None: it does not tell.
        port_taken: the port that it is to be started on, where another program has it.
        given: whether the user gave the address.
    """
    name: str
    first: int = 0
    last: int | None = None
    wraps: bool = False
    state: str = "ready"
    remedy: str = ""
    url: str = ""
    replicas: int = 1
    max_sessions: int | None = None
    live: int | None = None
    port_taken: int | None = None
    given: bool = False


@dataclass(frozen=True)
class Facts:
    """What the rules look at beside the configuration. None, where nobody could tell: the rule then says so.

    Attributes:
        model: of the model's folder.
        items: of the item list.
        server: of the environment.
        place: what training/probe.py tells of where the trainer would run; what it cannot tell is None.
        place_missing: why there is no such place (no image, no Python), and the remedy; empty where there is one.
        runner: docker or local.
        cluster: address of the Ray cluster that the run would join, which then decides on GPUs and CPUs.
        gpus: how many the run would get.
        shm: bytes of shared memory that it would get.
        folder: the run's, on this machine.
        free_bytes: of the disk that it is on.
        unwritable: where this user cannot write, though the run's folder is to be there.
        keep: what the watcher beside the run keeps; None: there is none, or it keeps everything.
        wandb_mode, wandb_key: where wandb would send the run, and whether it has a key.
    """
    model: Model | None = None
    items: Items | None = None
    server: Server | None = None
    place: Mapping[str, Any] = field(default_factory=dict)
    place_missing: tuple[str, str] = ("", "")
    runner: str = "docker"
    cluster: str = ""
    gpus: int | None = None
    shm: int | None = None
    folder: Path | None = None
    free_bytes: int | None = None
    unwritable: Path | None = None
    keep: Rules | None = None
    wandb_mode: str = "offline"
    wandb_key: bool = False
