"""Device meshes as each torch pickles them; the files below fixtures/meshes were written by those torches."""
from pathlib import Path

import numpy as np
import pytest
from merger.checkpoint import read_checkpoint
from merger.copying import Sources
from merger.discover import find_checkpoint

MESHES = Path(__file__).parents[1] / "fixtures/meshes"
# Names of the tensors' modules, and the mesh that each was saved on.
KINDS = {
    "tensor_parallel": {"dp_shard": 2, "tp": 2},
    "leading": {"dp_shard": 2},
    "trailing": {"fsdp": 2},
    "hybrid": {"ddp": 2, "fsdp": 2},
    "fsdp1": {"fsdp": 4},
    "sharded_tensor": {"sharded": 3},  # five rows on four ranks
}  # yapf: disable


@pytest.mark.parametrize("torch", ["2.4.0", "2.5.1", "2.6.0", "2.7.1", "2.8.0", "2.9.1", "2.10.0", "2.11.0", "2.13.0"])
def test_every_element_is_in_its_place_whichever_torch_wrote_it(torch: str) -> None:
    checkpoint = read_checkpoint(find_checkpoint([str(MESHES / f"torch-{torch}")]))
    absent = ("tensor_parallel", "hybrid") if torch == "2.4.0" else ()  # its FSDP2 had no state dict of two dimensions
    kinds = {name: mesh for name, mesh in KINDS.items() if name not in absent}
    assert {name.partition(".")[0] for name in checkpoint.tensors} == kinds.keys()
    assert all(mesh in checkpoint.meshes for mesh in kinds.values())
    with Sources(checkpoint) as sources:
        for name, tensor in checkpoint.tensors.items():
            counted = np.arange(tensor.numel, dtype=np.float32).reshape(tensor.shape)
            assert np.array_equal(sources.read_tensor(tensor), counted), name
