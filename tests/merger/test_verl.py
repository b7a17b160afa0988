"""verl's own checkpoint manager, from PyPI: what it writes is merged and compared.

verl's requirements would bring another torch. So pinned packages are put, without what they require, into a folder before this torch's.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.merger.merging import SAMPLE_PROGRAMS, Sample, differences, merge, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # 0.6 GB
PACKAGES = ("verl==0.9.1", "tensordict==0.10.0", "pyvers==0.2.3", "codetiming==1.4.0", "torchdata==0.11.0", "hydra-core==1.3.2", "omegaconf==2.3.0",
            "antlr4-python3-runtime==4.9.3", "ray==2.60.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19",
            "xxhash==4.1.0", "pyarrow==26.0.1", "pandas==3.1.1", "python-dateutil==4.0.0", "pytz==2026.6", "six==1.17.0",
            "cloudpickle==3.1.3", "msgpack==1.2.4", "orjson==3.13.0")  # yapf: disable

WRITE = """
import json, os, sys, warnings
sys.path.insert(0, sys.argv[1])
import sample_checkpoint as samples

def save_rank(rank, sample, store):
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(sample.world_size), LOCAL_RANK=str(rank))
    import torch
    from omegaconf import OmegaConf
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager
    with samples.rank_group(rank, sample, store) as mesh:
        model = samples.shard(samples.build_model(sample), sample, mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        contents = {"save_contents": ["model", "optimizer", "extra"], "load_contents": ["model"]}
        manager = FSDPCheckpointManager(model, optimizer, scheduler, checkpoint_config=OmegaConf.create(contents))
        manager.save_checkpoint(str(sample.save_dir), global_step=1)

def write(arguments):
    sample = samples.parse(arguments)
    def program():
        samples.prepare_ranks()
        model = samples.build_model(sample)
        samples.write_reference(model.state_dict(), sample.reference)
        samples.run_ranks(save_rank, sample)
    return samples.run_offline(program, "verl", sample.save_dir)

for request in json.load(sys.stdin):
    if code := write(request):
        sys.exit(code)
"""

KINDS = {"FSDP1": "--strategy fsdp1 --world-size 2", "FSDP2": "--strategy fsdp2 --world-size 2", "HSDP": "--strategy hsdp --world-size 4",
         "FSDP2, tied": "--strategy fsdp2 --world-size 3 --model qwen2-tied"}  # yapf: disable


@pytest.fixture(scope="module")
def by_verl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    """Checkpoints that verl 0.9.1 wrote over gloo."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("verl")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, *PACKAGES],
                   check=True,
                   timeout=600)
    assert not (site / "torch").exists()
    found = {
        name: Sample(folder / str(i) / "global_step_1/actor", folder / str(i) / "reference.safetensors")
        for i, name in enumerate(KINDS)
    }
    requests = [["--save-dir",
                 str(sample.actor), "--reference",
                 str(sample.reference), *KINDS[name].split()] for name, sample in found.items()]
    done = subprocess.run([sys.executable, "-c", WRITE, str(SAMPLE_PROGRAMS)], input=json.dumps(requests), text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(site)}, timeout=600)  # yapf: disable
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize("name", KINDS)
def test_what_verl_wrote_is_merged_bit_for_bit(name: str, by_verl: dict[str, Sample], tmp_path: Path) -> None:
    sample = by_verl[name]
    record = merge("--local-dir", sample.actor.parent, "--save-dir", tmp_path / "out", "--dtype", "keep", "--verify",
                   "--json").record()
    wanted = sample.tensors()
    if "tied" in name:
        del wanted["lm_head.weight"]
    assert record["verified"] and differences(weights(tmp_path / "out"), wanted) == []
