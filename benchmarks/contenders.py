"""The mergers that are compared: how each is found, what it is given to read, and where it writes."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fsdp_checkpoint import DCP, RANKS, SHARDED, Checkpoint, Size

# Ours remembers what transformers said of a config and its keys; a config that it has not seen costs it a process with
# torch and transformers in it. Both are measured.
OURS, FIRST, AGENTGYM, VERL = "this merger", "this merger, config not seen before", "AgentGym-RL", "verl"
# Torch's own forms, and torch's own tools for them, which keep the element type (fp32): ours does so beside them.
FROM_DCP, FROM_SHARDED = "this merger, from torch's DCP, fp32", "this merger, from torch's sharded safetensors, fp32"
DCP_TO_TORCH, CONSOLIDATE = "torch's dcp_to_torch_save, fp32", "torch's consolidate_safetensors_files, fp32"
FORMS = {FROM_DCP: DCP, DCP_TO_TORCH: DCP, FROM_SHARDED: SHARDED, CONSOLIDATE: SHARDED}
BESIDE = {DCP_TO_TORCH: FROM_DCP, CONSOLIDATE: FROM_SHARDED}  # whose time a tool's is compared with; else ours
TORCH_TOOLS = {
    DCP_TO_TORCH:
    "import sys; from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as run; "
    "run(sys.argv[1], sys.argv[2] + '/model.pt')",
    CONSOLIDATE:
    "import json, sys; from torch.distributed.checkpoint._consolidate_hf_safetensors import "
    "consolidate_safetensors_files as run; "
    "run(sys.argv[1], sys.argv[2], dict.fromkeys(json.load(open(sys.argv[3])), 1), num_threads=4)",
}
GIB = 1 << 30


@dataclass(frozen=True)
class Contender:
    """One merger: `source` is a script, or for verl the checkout that goes on PYTHONPATH."""
    name: str
    python: str
    source: Path
    extra: tuple[str, ...] = ()

    @property
    def form(self) -> str:
        """The form of the checkpoint that it reads."""
        return FORMS.get(self.name, RANKS)

    def memory_needed(self, size: Size) -> int:
        """Bytes of memory to have before it is started: a peer holds all shards at once (measured: 1.0-1.12 times)."""
        return GIB if self.name in (OURS, FIRST, FROM_DCP, FROM_SHARDED,
                                    CONSOLIDATE) else GIB + size.shard_bytes() * 6 // 5


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
    command: list[str]
    if contender.name in (OURS, FIRST):
        env["XDG_CACHE_HOME"] = str(folder / "cache" if contender.name == FIRST else folder.parent / "cache")
        command = [str(contender.source), "--local-dir", str(checkpoint.actor), "--save-dir", str(output)]
    elif contender.name in (FROM_DCP, FROM_SHARDED):
        env["XDG_CACHE_HOME"] = str(folder.parent / "cache")
        command = [str(contender.source), "--local-dir", str(checkpoint.actor), "--save-dir", str(output)]
        command += ["--config-dir", str(checkpoint.actor.parent / "actor/huggingface"), "--dtype", "keep"]
    elif contender.name in TORCH_TOOLS:
        output.mkdir()
        (folder / "names").write_text(json.dumps(list(checkpoint.expected)))
        command = ["-c", TORCH_TOOLS[contender.name], str(checkpoint.actor), str(output), str(folder / "names")]
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
