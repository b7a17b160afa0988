"""Random layouts put back together, and damaged files read: always right, or a clean refusal."""
import itertools
import math
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from merger import MergeError
from merger.checkpoint import read_checkpoint
from merger.copying import Sources
from merger.direct import page_buffer
from merger.discover import find_checkpoint
from merger.dtypes import NUMPY
from merger.plan import tensor_blocks

from tests.merger.merging import Sample

# Random layouts


@dataclass(frozen=True)
class Drawn:
    """A tensor to shard: which mesh dimensions cut which tensor dimensions, in the order in which they do."""
    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]  # (mesh dimension, tensor dimension)
    dtype: str

    def placements(self) -> list[Any]:
        """Return torch's placements: a dimension that cuts after others further right is a `_StridedShard`."""
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.placement_types import _StridedShard
        found: list[Any] = [Replicate()] * len(self.mesh)
        for position, (mesh_dim, dim) in enumerate(self.cuts):
            factor = math.prod(self.mesh[other] for other, same in self.cuts[:position]
                               if same == dim and other > mesh_dim)
            found[mesh_dim] = Shard(dim) if factor == 1 else _StridedShard(dim, split_factor=factor)
        return found

    def local(self, whole: np.ndarray, coordinate: tuple[int, ...]) -> np.ndarray:
        """Return what the rank at `coordinate` holds, cut one mesh dimension after the other."""
        for mesh_dim, dim in self.cuts:
            whole = pieces(whole, self.mesh[mesh_dim], dim)[coordinate[mesh_dim]]
        return whole


def pieces(whole: np.ndarray, count: int, dim: int) -> list[np.ndarray]:
    """Cut as `torch.chunk` documents it: pieces of one size but for the last; empty ones make up the count."""
    size = max(math.ceil(whole.shape[dim] / count), 1)
    bounds = [min(i * size, whole.shape[dim]) for i in range(1, count)]
    return np.split(whole, bounds, axis=dim)


@st.composite
def layouts(draw: st.DrawFn) -> Drawn:
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda sizes: math.prod(sizes) <= 12))
    shape = draw(st.lists(st.integers(0, 9), max_size=4).filter(lambda sizes: math.prod(sizes) <= 2000))
    cutting = draw(st.permutations(range(len(mesh)))) if shape else []
    cutting = cutting[:draw(st.integers(0, len(cutting)))]
    cuts = [(mesh_dim, draw(st.integers(0, len(shape) - 1))) for mesh_dim in cutting]
    return Drawn(tuple(shape), tuple(mesh), tuple(cuts), draw(st.sampled_from(["float32", "bfloat16", "int64",
                                                                               "bool"])))


def write_checkpoint(folder: Path, drawn: list[Drawn], wholes: list[torch.Tensor]) -> None:
    """Write the ranks' files of tensors on one mesh, with torch's own classes and pickles."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.testing._internal.distributed.fake_pg import FakeStore
    mesh = drawn[0].mesh
    for rank, coordinate in enumerate(itertools.product(*map(range, mesh))):
        dist.init_process_group("fake", rank=rank, world_size=math.prod(mesh), store=FakeStore())
        try:
            device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=tuple(f"axis{i}" for i in range(len(mesh))))
            state = {}
            for index, (layout, whole) in enumerate(zip(drawn, wholes, strict=True)):
                places = np.arange(whole.numel()).reshape(layout.shape)
                held = torch.from_numpy(np.array(layout.local(places, coordinate), order="C"))
                local = whole.reshape(-1)[held.reshape(-1)].reshape(held.shape)
                meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
                spec = DTensorSpec(device_mesh, tuple(layout.placements()), tensor_meta=meta)
                state[f"t{index}"] = DTensor(local, spec, requires_grad=False)
            torch.save(state, folder / f"model_world_size_{math.prod(mesh)}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()


def values(layout: Drawn, seed: int) -> torch.Tensor:
    """Return a tensor in which, but for booleans, no two elements are the same."""
    count = math.prod(layout.shape)
    numbers = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).reshape(layout.shape)
    return (numbers % 2 == 0) if layout.dtype == "bool" else (numbers % 251 if layout.dtype == "bfloat16" else numbers).to(
        getattr(torch, layout.dtype))  # yapf: disable


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layout=layouts(), data=st.data())
def test_any_layout_is_put_back_together(layout: Drawn, data: st.DataObject) -> None:
    others = data.draw(st.lists(layouts(), max_size=2))
    drawn = [layout, *(other for other in others if other.mesh == layout.mesh)]
    wholes = [values(each, seed) for seed, each in enumerate(drawn)]
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), drawn, wholes)
        checkpoint = read_checkpoint(find_checkpoint([name]))
        for index, whole in enumerate(wholes):
            tensor = checkpoint.tensors[f"t{index}"]
            assert tensor.shape == tuple(whole.shape) and tensor.dtype == drawn[index].dtype
            itemsize = whole.element_size()
            for block_bytes in (itemsize, 7 * itemsize, data.draw(st.integers(1, 200)), 1 << 20):
                found = np.zeros(whole.numel(), NUMPY[tensor.dtype])
                written = np.zeros(whole.numel(), int)
                with Sources(checkpoint) as sources:
                    for start, numel, parts in tensor_blocks(checkpoint, tensor, block_bytes):
                        assert numel * itemsize <= max(block_bytes, itemsize)
                        buffer = page_buffer(numel * itemsize)
                        sources.read_parts(parts, found[start:start + numel], buffer)
                        written[start:start + numel] += 1
                assert (written == 1).all()
                assert found.tobytes() == whole.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("mesh", "cuts", "text"), [
    ((2, 2), ((1, 0), (0, 0)), ["_StridedShard(dim=0, sf=2)", "S(0)"]),
    ((2, 3, 2), ((2, 0), (1, 0)), ["R", "_StridedShard(dim=0, sf=2)", "S(0)"]),
    ((2, 2), ((1, 1), (0, 0)), ["S(0)", "S(1)"]),
], ids=["FSDP2 and TP", "HSDP and TP", "rows and columns"])  # yapf: disable
def test_the_drawn_layouts_include_fsdp2_s(mesh: tuple[int, ...], cuts: tuple[tuple[int, int], ...],
                                           text: list[str]) -> None:
    """Check the test's own cutting against torch's, where torch can tell it without other ranks."""
    from torch.distributed.tensor.placement_types import Replicate, Shard, _StridedShard
    placements = Drawn((8, 8), mesh, cuts, "float32").placements()
    kinds = {"R": Replicate, "S": Shard, "_": _StridedShard}
    for placement, wanted in zip(placements, text, strict=True):
        assert type(placement) is kinds[wanted[0]]
        if wanted[0] == "_":
            assert (placement.dim, placement.split_factor) == (0, 2)


# Damaged files


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Flip, cut, insert or repeat some bytes, mostly where the archive keeps its pickle and directory."""
    changed = bytearray(data)
    pickle_start = data.find(b"data.pkl")
    for _ in range(chance.choice([1, 1, 1, 2, 4, 16])):
        if not changed:
            break
        where = chance.choice([
            lambda: chance.randrange(len(changed)),
            lambda: min(pickle_start + chance.randrange(12000), len(changed) - 1),
            lambda: max(len(changed) - 1 - chance.randrange(6000), 0),
        ])()  # yapf: disable
        match chance.randrange(6):
            case 0:
                changed[where] ^= 1 << chance.randrange(8)
            case 1:
                changed[where] = chance.choice(b"\x00\xff\x80.()cRqXKJMhjtsbQ0")
            case 2:
                del changed[where:where + chance.choice([1, 2, 64, 4096])]
            case 3:
                changed[where:where] = bytes(chance.randrange(256) for _ in range(chance.choice([1, 4, 64])))
            case 4:
                del changed[where:]
            case 5:
                changed[where:where + 4] = chance.choice([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0"])
    return bytes(changed)


def mutate_pickle(data: bytes, chance: random.Random) -> bytes:
    """Change the pickle only and mend the archive around it, so that no checksum gives the change away."""
    import io
    import zipfile
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records:
            archive.writestr(name, mutate(content, chance) if name.endswith("/data.pkl") else content)
    return out.getvalue()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("how", ["the archive", "the pickle"])
@pytest.mark.parametrize("name", ["FSDP1, 4 ranks", "FSDP2 and TP, 2 x 2 ranks", "HSDP, 2 x 2 ranks",
                                  "ShardedTensor, 4 ranks", "buffers, FSDP2"])  # yapf: disable
def test_a_damaged_file_is_read_right_or_refused(name: str, how: str, samples: dict[str, Sample],
                                                 tmp_path: Path) -> None:
    damage_and_read(samples[name].copy(tmp_path), how, 150)


def damage_and_read(sample: Sample, how: str, examples: int) -> None:
    """Damage one rank's file again and again: reading raises `MergeError`, or describes the tensors as before."""
    good = read_checkpoint(find_checkpoint([str(sample.actor)]))
    shapes = {tensor_name: (tensor.shape, tensor.dtype) for tensor_name, tensor in good.tensors.items()}
    path = sample.rank(1)
    data, refused = path.read_bytes(), 0
    for seed in range(examples):
        chance = random.Random(f"{how} {seed}")
        changed = mutate(data, chance) if how == "the archive" else mutate_pickle(data, chance)
        path.write_bytes(changed)
        try:
            found = read_checkpoint(find_checkpoint([str(sample.actor)]))
        except MergeError as error:
            assert str(error) and "\n" not in str(error), (seed, error)
            refused += 1
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert {
            tensor_name: (tensor.shape, tensor.dtype)
            for tensor_name, tensor in found.tensors.items()
        } == shapes, seed
        with Sources(found) as sources:  # whatever was accepted can be read
            for tensor in found.tensors.values():
                assert sources.read_tensor(tensor).shape == tensor.shape
    assert refused > examples // 10  # the damage was not all in places that do not matter
    path.write_bytes(data)
    assert read_checkpoint(find_checkpoint([str(sample.actor)])).tensors == good.tensors
