"""Where a shard belongs: from placements on a device mesh to boxes of the global tensor.

Sharding is that of `torch.chunk` (torch/distributed/tensor/placement_types.py): extents are cut into pieces of
ceil(extent / parts), the last ones smaller or empty. Mesh dimensions act from left to right, but for a
`_StridedShard`, which FSDP2 uses to say that tensor parallelism, further right, has cut the dimension first.
"""
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Replicate:
    """Every rank along this mesh dimension holds the same values."""

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True)
class Shard:
    """Tensor dimension `dim` is cut along this mesh dimension.

    `split_factor`, where above 1, is the product of the mesh dimensions, further right, that cut `dim` before this
    one does (`_StridedShard`).
    """
    dim: int
    split_factor: int = 1

    def __str__(self) -> str:
        return f"Shard({self.dim})" if self.split_factor == 1 else f"StridedShard({self.dim}, {self.split_factor})"


Placement = Replicate | Shard


@dataclass(frozen=True)
class Box:
    """A block of a tensor: per dimension its first index and its extent."""
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements; a tensor of no dimension has one."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The block as an index of the global tensor."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))


def chunk(extent: int, parts: int, index: int) -> tuple[int, int]:
    """Return (start, extent) of piece `index` of `extent` cut into `parts` as `torch.chunk` cuts it.

    >>> [chunk(1003, 4, i) for i in range(4)]
    [(0, 251), (251, 251), (502, 251), (753, 250)]
    >>> [chunk(1, 3, i) for i in range(3)]
    [(0, 1), (1, 0), (1, 0)]
    """
    piece = -(-extent // parts)
    start = min(index * piece, extent)
    return start, min(piece, extent - start)


def cutting_order(placements: Sequence[Placement], mesh_shape: Sequence[int], dim: int) -> list[int]:
    """Return the mesh dimensions that cut tensor dimension `dim`, in the order in which they do.

    Raises:
        ValueError: a split factor that the mesh dimensions further right cannot make up.
    """
    order: list[int] = []
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if not isinstance(placement, Shard) or placement.dim != dim:
            continue
        position, product = 0, 1
        while product < placement.split_factor and position < len(order):
            product *= mesh_shape[order[position]]
            position += 1
        if product != placement.split_factor:
            raise ValueError(f"{placement} on mesh {tuple(mesh_shape)}: no mesh dimensions make up its split factor")
        order.insert(position, mesh_dim)
    return order


def box_of(shape: Sequence[int], placements: Sequence[Placement], mesh_shape: Sequence[int],
           coordinate: Sequence[int]) -> Box:
    """Return the block of a tensor of `shape` that the rank at `coordinate` of the mesh holds.

    Raises:
        ValueError: a placement that does not fit the shape or the mesh.
    """
    if not len(placements) == len(mesh_shape) == len(coordinate):
        raise ValueError(f"{len(placements)} placements on a mesh of {len(mesh_shape)} dimensions")
    for placement in placements:
        if isinstance(placement, Shard) and not 0 <= placement.dim < len(shape):
            raise ValueError(f"{placement} of a tensor of shape {tuple(shape)}")
    start, extents = [0] * len(shape), list(shape)
    for dim in range(len(shape)):
        for mesh_dim in cutting_order(placements, mesh_shape, dim):
            offset, extents[dim] = chunk(extents[dim], mesh_shape[mesh_dim], coordinate[mesh_dim])
            start[dim] += offset
    return Box(tuple(start), tuple(extents))


def overlap(a: Box, b: Box) -> bool:
    """Return True if two blocks have an element in common."""
    return all(max(i, j) < min(i + n, j + m) for i, n, j, m in zip(a.start, a.shape, b.start, b.shape, strict=True))


def tiling_fault(shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """Return why `boxes` do not cover a tensor of `shape` exactly once, or None where they do.

    Empty boxes count for nothing. Neighbours are compared along the dimension that is cut most, so that n boxes along
    one dimension (the usual case) take n comparisons, and a grid of n boxes about n * sqrt(n).
    """
    pieces = [box for box in boxes if box.numel]
    along = max(range(len(shape)), key=lambda dim: len({box.start[dim] for box in pieces}), default=0)
    pieces.sort(key=lambda box: (box.start[along:], box.start))
    for box in pieces:
        if any(a < 0 or a + n > extent for a, n, extent in zip(box.start, box.shape, shape, strict=True)):
            return f"the piece at {box.start} of shape {box.shape} reaches beyond {tuple(shape)}"
    for index, box in enumerate(pieces):
        for other in pieces[index + 1:]:
            if shape and other.start[along] >= box.start[along] + box.shape[along]:
                break
            if overlap(box, other):
                return f"the pieces at {box.start} and {other.start} overlap"
    covered, total = sum(box.numel for box in pieces), math.prod(shape)
    if covered != total:
        return f"the pieces hold {covered} of {total} elements"
    return None


@dataclass(frozen=True)
class Run:
    """Rows of elements that lie `pitch` apart in the global tensor and back to back in the shard.

    All in elements: row i is global[target + i * pitch : … + width] and shard[source + i * width : … + width].
    """
    source: int
    target: int
    rows: int
    width: int
    pitch: int


def cut_dimension(shape: Sequence[int], boxes: Iterable[Box]) -> int:
    """Return the last dimension that any of `boxes` cuts; 0 where none does."""
    return max((dim for box in boxes for dim in range(len(shape)) if box.shape[dim] != shape[dim]), default=0)


def runs_of(shape: Sequence[int], box: Box, cut: int) -> list[Run]:
    """Return `box` as evenly spaced rows, for `cut` the `cut_dimension` of the tensor's boxes.

    The rows of all boxes of a tensor keep to the same raster: row i of the raster begins at element
    i * prod(shape[cut:]). A tensor cut in its first dimension only has one row.
    """
    if box.numel == 0:
        return []
    strides = [math.prod(shape[dim + 1:]) for dim in range(len(shape))]
    first = sum(a * s for a, s in zip(box.start, strides, strict=True))
    if cut == 0:
        return [Run(0, first, 1, box.numel, max(math.prod(shape), 1))]
    width, pitch = box.shape[cut] * strides[cut], shape[cut] * strides[cut]
    even = cut - 1  # rows are evenly spaced over dimensions even … cut - 1: all but the first of them are whole
    while even > 0 and box.shape[even] == shape[even]:
        even -= 1
    rows = math.prod(box.shape[even:cut])
    starts = (sum(i * s for i, s in zip(index, strides, strict=False))
              for index in itertools.product(*(range(n) for n in box.shape[:even])))
    return [Run(i * rows * width, first + start, rows, width, pitch) for i, start in enumerate(starts)]
