"""Tensors of a model's files that are made of others in the checkpoint: an expert's slice, half of a fused matrix."""
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from merger.checkpoint import Checkpoint, Tensor
from merger.lattice import Lattice, cut, row_major

Parts = Iterator[tuple[int, int, Lattice]]


@dataclass(frozen=True, slots=True)
class View:
    """A tensor of `shape` (elements): which of its elements (here) are which of a tensor of the checkpoint (there).

    Those tensors have one element type.
    """
    shape: tuple[int, ...]
    parts: tuple[tuple[Tensor, Lattice], ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def on_ranks(checkpoint: Checkpoint, tensor: Tensor, lattice: Lattice, every: bool = False) -> Parts:
    """Yield (rank, byte of its file at which a block of `tensor` begins, places) of what of `lattice` the blocks hold.

    Places are elements of the view (here) and of the block (there). With `every` all holders of a block are looked at.
    """
    there = lattice.turned()
    row = max(math.prod(tensor.shape[1:]), 1)
    first, last = there.here // row, there.last // row
    for rank, box, offset in checkpoint.places(tensor, every):
        if not box.numel or (box.shape and (box.start[0] > last or box.start[0] + box.shape[0] <= first)):
            continue
        for part in cut(there, tensor.shape, box.start, box.shape, row_major(box.shape)):
            yield rank, offset, part.turned()


def rows_of(lattice: Lattice) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (here, there, rows, width, pitch): rows that lie back to back there, and `pitch` apart here, in elements."""
    dims = sorted(lattice.dims, key=lambda dim: -dim[2])
    rows = width = pitch = 1
    if dims and dims[-1][2] == 1:
        count, pitch, _ = dims.pop()
        if pitch != 1:  # a transpose: neighbours there are a column here
            rows = count
        else:
            width = pitch = count
            if dims and dims[-1][2] == width:
                rows, pitch, _ = dims.pop()
    for index in itertools.product(*(range(count) for count, _, _ in dims)):
        here = lattice.here + sum(i * step for i, (_, step, _) in zip(index, dims, strict=True))
        there = lattice.there + sum(i * step for i, (_, _, step) in zip(index, dims, strict=True))
        yield here, there, rows, width, pitch
