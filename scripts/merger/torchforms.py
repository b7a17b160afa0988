"""What one rank's file says of its tensors, in any of the forms that torch pickles them in.

Plain tensors, DTensors of torch 2.4 and later, and FSDP1's older ShardedTensors become `Entry`s of one kind.
"""
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from merger import MergeError
from merger.dtypes import NUMPY
from merger.foreign.text import printable
from merger.foreign.values import as_count, as_list, as_mesh, as_name, as_shape, shown
from merger.layout import Box, Placement, Replicate, Shard, box_of, cutting_order
from merger.pickles import Dtype, Record, TensorRef
from merger.shardfile import MOST_RANKS, ShardFile

# Wrappers that may stay in the names of a sharded state dict: FSDP's own, activation checkpointing, torch.compile.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# What DDP and DeepSpeed, and torch's examples, put before all names.
OUTER = ("module.", "_forward_module.")


@dataclass(frozen=True)
class Mesh:
    """A device mesh as one rank pickled it.

    Attributes:
        names: of its dimensions, such as ("ddp", "fsdp"); empty where unnamed.
        shape: their sizes.
        coordinate: where on it the rank that wrote the file stands.
        rank: the rank that wrote the file.
    """
    names: tuple[str, ...]
    shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    rank: int


@dataclass(frozen=True)
class Entry:
    """One tensor as one rank's file describes it.

    `box` is the block of the global tensor that the file holds, `crc` the CRC32 of its bytes, 0 where not known.
    """
    dtype: str
    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    mesh: tuple[tuple[str, ...], tuple[int, ...]]
    box: Box
    offset: int
    crc: int = 0

    @property
    def agreement(self) -> tuple[Any, ...]:
        """What must be the same on every rank."""
        return self.dtype, self.shape, self.placements, self.mesh

    def __str__(self) -> str:
        placements = ", ".join(map(str, self.placements)) or "plain"
        mesh = f" on {dict(zip(*self.mesh, strict=False)) or self.mesh[1]}" if self.mesh[1] else ""
        return f"{self.dtype} {list(self.shape)} {placements}{mesh}"


def mesh_sizes(entries: Iterable[Entry]) -> list[dict[str, int]]:
    """Return the meshes that the tensors lie on, each as {dimension's name or number: size}."""
    return [{
        name or str(i): size
        for i, (name, size) in enumerate(zip(names or [""] * len(shape), shape, strict=True))
    } for names, shape in dict.fromkeys(entry.mesh for entry in entries) if shape]


def read_entries(shard: ShardFile, rank: int) -> dict[str, Entry]:
    """Return the tensors of one file by their plain names.

    Raises:
        MergeError: one is no tensor, cannot be read, or is another rank's.
    """
    content = shard.content
    if not isinstance(content, (dict, OrderedDict)):
        raise MergeError(f"{shard.path}: holds a {type(content).__name__} in place of a state dict")
    meshes: dict[int, Mesh] = {}
    entries: dict[str, Entry] = {}
    for key, value in dict.items(content):  # an OrderedDict may have been pickled with an attribute `items`
        try:
            name = as_name(plain_name(as_name(key)))
        except MergeError as error:
            raise MergeError(f"{shard.path}: {error}") from error
        if name in entries:
            raise MergeError(f"{shard.path}: {name} is there twice")
        try:
            entries[name] = _entry(shard, rank, value, meshes)
        except MergeError as error:
            text = str(error)
            raise MergeError(text if str(shard.path) in text else f"{shard.path}: {name}: {text}") from error
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise MergeError(f"{shard.path}: {name} is described in a way that no torch writes "
                             f"({type(error).__name__}: {printable(str(error), 100)})") from error
    if not entries:
        raise MergeError(f"{shard.path}: holds no tensor at all")
    return dict(zip(without_outer(list(entries)), entries.values(), strict=True))


def without_outer(names: list[str]) -> list[str]:
    """Return names without what wraps the whole model, where all have it."""
    for outer in OUTER:
        if all(name.startswith(outer) for name in names):
            names = [name.removeprefix(outer) for name in names]
    return names


def without_wrappers(names: list[str]) -> list[str]:
    """Return all names of a state dict without those of wrapping modules.

    Raises:
        MergeError: one cannot be a tensor's, or two are the same.
    """
    plain = without_outer([as_name(plain_name(name)) for name in names])
    if len(set(plain)) < len(plain):
        twice = next(name for index, name in enumerate(plain) if name in plain[:index])
        raise MergeError(f"{twice} is there twice")
    return plain


def plain_name(key: str) -> str:
    """Return a parameter's name without the names of wrapping modules.

    >>> plain_name("model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.mlp.weight")
    'model.layers.0.mlp.weight'
    """
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    return key


def _entry(shard: ShardFile, rank: int, value: Any, meshes: dict[int, Mesh]) -> Entry:
    if isinstance(value, TensorRef):
        box = Box((0, ) * len(value.shape), value.shape)
        return Entry(known_dtype(value.dtype), value.shape, (), ((), ()), box, shard.byte_offset(value),
                     shard.checksum(value))
    kind = value.kind if isinstance(value, Record) else type(value).__name__
    if kind == "DTensor":
        return _dtensor(shard, rank, value, meshes)
    if kind == "ShardedTensor":
        return _sharded_tensor(shard, rank, value)
    raise MergeError(f"is a {kind}, not a tensor")


def _dtensor(shard: ShardFile, rank: int, value: Record, meshes: dict[int, Mesh]) -> Entry:
    local, spec = value.state["_local_tensor"], value.state["_spec"]
    if not isinstance(local, TensorRef):
        raise MergeError(f"its local tensor is a {type(local).__name__}, not a plain tensor")
    shape = as_shape(spec.state["tensor_meta"].args[0])
    if value.args != (local.dtype, shape):  # what torch takes the tensor for
        raise MergeError(
            f"it is made as {value.args[0]} {list(value.args[1])}, but described as {local.dtype} {list(shape)}")
    mesh_record = spec.state["mesh"]
    if id(mesh_record) not in meshes:
        meshes[id(mesh_record)] = _mesh(shard, mesh_record)
    mesh = meshes[id(mesh_record)]
    if mesh.rank != rank:
        raise MergeError(f"{shard.path}: is named rank {rank} but was written by rank {mesh.rank}; "
                         "were files renamed or exchanged?")
    placements = tuple(_placement(record) for record in as_list(spec.state["placements"], "placements"))
    for order in as_list(spec.state.get("shard_order") or (), "a shard order"):  # since torch 2.10
        dim, cuts = as_count(order.args[0], "a dimension"), list(as_shape(order.args[1], "an order of mesh dimensions"))
        if cuts != cutting_order(placements, mesh.shape, dim):
            raise MergeError(
                f"its dimension {dim} was cut along the mesh's dimensions in the order {cuts}, which is not "
                "read; save it with torch's default order")
    box = box_of(shape, placements, mesh.shape, mesh.coordinate)
    if local.shape != box.shape and not (0 in local.shape and box.numel == 0):
        raise MergeError(f"rank {rank} should hold a piece of shape {list(box.shape)} of {list(shape)}, but holds "
                         f"{list(local.shape)}")
    offset, crc = (shard.byte_offset(local), shard.checksum(local)) if box.numel else (0, 0)
    return Entry(known_dtype(local.dtype), shape, placements, (mesh.names, mesh.shape), box, offset, crc)


def _sharded_tensor(shard: ShardFile, rank: int, value: Record) -> Entry:
    """Read FSDP1's older form, which states each shard's offsets.

    Its state is (local shards, metadata, process group, sharding spec, …), see `ShardedTensor.__getstate__`.
    """
    local_shards, metadata = value.state[0], value.state[1]
    fields = metadata.state
    shape = as_shape(fields["size"])
    dtype = known_dtype(fields["tensor_properties"].state[0])
    if type(fields["shards_metadata"]) is not list or type(local_shards) is not list:
        raise MergeError("its shards are no list")
    spec = (("sharded", ), (len(fields["shards_metadata"]), ))
    if len(local_shards) > 1:
        raise MergeError(f"rank {rank} holds {len(local_shards)} pieces of it; one is read")
    if not local_shards:
        return Entry(dtype, shape, (), spec, Box((0, ) * len(shape), (0, ) * len(shape)), 0)
    piece = local_shards[0].state
    tensor, place = piece["tensor"], piece["metadata"].state
    box = Box(as_shape(place["shard_offsets"], "a shard's offsets"), as_shape(place["shard_sizes"], "a shard's sizes"))
    if not isinstance(tensor, TensorRef) or len(box.start) != len(box.shape) or len(box.shape) != len(shape):
        raise MergeError("its shard is no tensor of as many dimensions")
    if tensor.shape != box.shape or tensor.dtype != dtype:
        raise MergeError(f"rank {rank} should hold {dtype} {list(box.shape)}, but holds {tensor.dtype} "
                         f"{list(tensor.shape)}")
    return Entry(dtype, shape, (), spec, box, shard.byte_offset(tensor))


def known_dtype(dtype: str) -> str:
    """Return an element type's name.

    Raises:
        MergeError: it is none that is supported.
    """
    if type(dtype) not in (str, Dtype) or dtype not in NUMPY:
        raise MergeError(f"has elements of type {shown(dtype)}, which is not supported")
    return str(dtype)


def _placement(record: Any) -> Placement:
    match record:
        case Record(kind="Replicate"):
            return Replicate()
        case Record(kind="Shard", state={"dim": dim}):
            return Shard(as_count(dim, "a placement's dimension"))
        case Record(kind="_StridedShard", state={"dim": dim, "split_factor": factor}):
            return Shard(as_count(dim, "a placement's dimension"), as_count(factor, "a split factor"))
        case Record():
            raise MergeError(f"its placement is {record.kind}, of which no piece can be taken; "
                             "save a sharded state dict")
    raise MergeError(f"its placement is a {type(record).__name__}")


def _mesh(shard: ShardFile, record: Record) -> Mesh:
    """Read a mesh in any of the forms that torch pickled it in.

    Up to 2.9 it carries the tensor `mesh` of ranks; since then a `_layout` of sizes and strides over `_rank_map`, and
    from 2.11 on the `_rank` that wrote it.
    """
    state = record.state
    wanted, place = state.get("mesh_dim_names") or state.get("_mesh_dim_names"), state["_coordinate_on_dim"]
    if "mesh" in state:
        ranks = shard.read_integers(state["mesh"])
        names, coordinate = as_mesh(wanted, ranks.shape, place)
        shape, rank = ranks.shape, int(ranks[coordinate])
    else:
        rank_map = shard.read_integers(state["_rank_map"]).reshape(-1)
        axes = _layout_axes(state["_layout"])
        shape = as_shape([math.prod(sizes) for sizes, _ in axes], "a mesh")
        names, coordinate = as_mesh(wanted, shape, place)
        rank, root = state.get("_rank"), state.get("_root_mesh")
        if rank is None and root is not None:  # the coordinate is the sub-mesh's, the rank map the whole mesh's
            rank = _mesh(shard, root).rank
        if rank is None:
            rank = int(rank_map[sum(_axis_offset(c, *axis) for c, axis in zip(coordinate, axes, strict=True))])
    if math.prod(shape) > MOST_RANKS:
        raise MergeError(f"its mesh of shape {shape} has more ranks than there can be")
    return Mesh(names, tuple(shape), coordinate, as_count(rank, "a rank"))


def _layout_axes(layout: Record) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (sizes, strides) of each mesh dimension; a dimension made of several has several."""

    def as_tuple(value: Any) -> tuple[int, ...]:
        return as_shape(value if isinstance(value, (tuple, list)) else (value, ), "a mesh's layout")

    state = layout.state or dict(zip(("shape", "stride"), layout.args, strict=False))
    if "axes" in state:
        return [(as_tuple(axis.state["shape"]), as_tuple(axis.state["stride"]))
                for axis in as_list(state["axes"], "a mesh's axes")]
    return [(as_tuple(n), as_tuple(s))
            for n, s in zip(as_tuple(state["shape"]), as_tuple(state["stride"]), strict=True)]


def _axis_offset(index: int, sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return how far into the rank map step `index` of a mesh dimension leads (the last size varies fastest)."""
    offset = 0
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        index, step = divmod(index, size)
        offset += step * stride
    return offset
