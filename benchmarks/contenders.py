"""The mergers that are compared: how each is found, what it is given to read, and where it writes."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdp_checkpoint import Checkpoint, Size

# Ours remembers what transformers said of a config and its keys; a config that it has not seen costs it a process with
# torch and transformers in it. Both are measured.
OURS, FIRST, AGENTGYM, VERL = "this merger", "this merger, config not seen before", "AgentGym-RL", "verl"
GIB = 1 << 30


@dataclass(frozen=True)
class Contender:
    """One merger: `source` is a script, or for verl the checkout that goes on PYTHONPATH."""
    name: str
    python: str
    source: Path
    extra: tuple[str, ...] = ()

    def memory_needed(self, size: Size) -> int:
        """Bytes of memory to have before it is started: a peer holds all shards at once (measured: 1.0-1.12 times)."""
        return GIB if self.name in (OURS, FIRST) else GIB + size.shard_bytes() * 6 // 5


@dataclass(frozen=True)
class Job:
    """A command ready to run in `folder`, and the folder its model will be in."""
    command: list[str]
    env: dict[str, str]
    folder: Path
    output: Path


def find_agentgym(path: Path) -> Path:
    """AgentGym-RL's merger, given the script, the repository, or its AgentGym-RL folder; else ValueError."""
    name = Path("scripts/model_merger.py")
    for candidate in (path, path / "AgentGym-RL" / name, path / name):
        if candidate.is_file():
            return candidate.resolve()
    raise ValueError(f"--agentgym-rl: no AgentGym-RL/{name} under {path}; "
                     "give a checkout of WooooDyy/AgentGym-RL or the script")


def find_verl(path: Path) -> Path:
    """verl's checkout, else ValueError."""
    if not (path / "verl/model_merger/__main__.py").is_file():
        raise ValueError(f"--verl: no verl/model_merger/__main__.py under {path}; give a checkout of volcengine/verl")
    return path.resolve()


def prepare(contender: Contender, checkpoint: Checkpoint, folder: Path) -> Job:
    """Lay out `folder` (new) for one run. The peers read hard links: one writes into the checkpoint it merges."""
    folder.mkdir(parents=True)
    output, env = folder / "merged", _environment(os.environ)
    command: Sequence[str]
    if contender.name in (OURS, FIRST):
        env["XDG_CACHE_HOME"] = str(folder / "cache" if contender.name == FIRST else folder.parent / "cache")
        command = [str(contender.source), "--local-dir", str(checkpoint.actor), "--save-dir", str(output)]
    elif contender.name == AGENTGYM:
        actor = _link(checkpoint, folder / "actor")
        output = actor / "huggingface"
        command = [str(contender.source), "--local_dir", str(actor)]
    else:
        actor = _link(checkpoint, folder / "actor")
        # AgentGym-RL's verl does not write this file, today's verl does not merge without it.
        record = {"FSDP_version": 1, "world_size": checkpoint.size.world_size}
        (actor / "fsdp_config.json").write_text(json.dumps(record))
        env["PYTHONPATH"] = str(contender.source)
        command = ["-m", "verl.model_merger", "merge", "--backend", "fsdp"]
        command = [*command, "--local_dir", str(actor), "--target_dir", str(output)]
    return Job([contender.python, *command, *contender.extra], env, folder, output)


def _environment(outer: Mapping[str, str]) -> dict[str, str]:
    """Ours, without what would mix the contenders' libraries, and with the hub off: nothing may be fetched."""
    env = {name: value for name, value in outer.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**env, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _link(checkpoint: Checkpoint, folder: Path) -> Path:
    """Hard links to the shards (same pages in the cache, no bytes) and copies of the small files."""
    shutil.copytree(checkpoint.actor / "huggingface", folder / "huggingface")
    for shard in checkpoint.shards():
        try:
            os.link(shard, folder / shard.name)
        except OSError:  # a file system without hard links
            (folder / shard.name).symlink_to(shard)
    return folder
