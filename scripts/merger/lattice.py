"""Evenly spaced elements of one tensor and their places in another: how a model file's tensor is made of one in memory.

Slices, transposes, reshapes and sums of these take numbers from one place to another and never change them, so a few
lattices say all of them, whatever the tensors' sizes; places are counted in elements, row-major.
"""
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Dims = tuple[tuple[int, int, int], ...]  # of each dimension its extent, and the steps here and there


class Lattice(NamedTuple):
    """Elements `here + sum(i * step_here)` of one tensor are `there + sum(i * step_there)` of another."""
    here: int
    there: int
    dims: Dims

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(extent for extent, _, _ in self.dims)

    @property
    def last(self) -> int:
        """The last of the elements here."""
        return self.here + sum((extent - 1) * step for extent, step, _ in self.dims)

    def turned(self) -> "Lattice":
        """Return the same with here and there exchanged."""
        return Lattice(self.there, self.here, tuple((extent, there, here) for extent, here, there in self.dims))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the steps between neighbours along each dimension.

    >>> row_major((4, 2, 3))
    (6, 3, 1)
    """
    return tuple(math.prod(shape[dim + 1:]) for dim in range(len(shape)))


def cut(lattice: Lattice, shape: Sequence[int], start: Sequence[int], extent: Sequence[int],
        steps: Sequence[int]) -> Iterator[Lattice]:
    """Yield what of `lattice` lies, here, in the block of a tensor of `shape` that begins at `start`, of `extent`.

    The places here are counted anew: from the block's first element, `steps` apart along each dimension.

    >>> [*cut(Lattice(0, 0, ((6, 1, 1), )), (2, 3), (0, 1), (2, 2), (2, 1))]
    [Lattice(here=0, there=1, dims=((2, 2, 3), (2, 1, 1)))]
    """
    dims = tuple(sorted((dim for dim in lattice.dims if dim[0] != 1), key=lambda dim: -dim[1]))
    yield from _cut(Lattice(lattice.here, lattice.there, dims), shape, start, extent, steps)


def _cut(lattice: Lattice, shape: Sequence[int], start: Sequence[int], extent: Sequence[int],
         steps: Sequence[int]) -> Iterator[Lattice]:
    if not shape:
        yield lattice
        return
    for rows, within in _by_rows(lattice, math.prod(shape[1:])):
        for chosen in _between(rows, start[0], start[0] + extent[0]):
            first = (chosen.here - start[0]) * steps[0]
            outer = tuple((count, step * steps[0], there) for count, step, there in chosen.dims)
            inner = Lattice(within.here, chosen.there, within.dims)
            for part in _cut(inner, shape[1:], start[1:], extent[1:], steps[1:]):
                yield Lattice(first + part.here, part.there, _merged(outer + part.dims))


def _merged(dims: Dims) -> Dims:
    """Return `dims` with each two that are one evenly spaced row in both tensors as one."""
    merged: list[tuple[int, int, int]] = []
    for count, here, there in dims:
        if merged and merged[-1][1:] == (count * here, count * there):
            merged[-1] = (merged[-1][0] * count, here, there)
        elif count != 1:
            merged.append((count, here, there))
    return tuple(merged)


def _by_rows(lattice: Lattice, width: int) -> Iterator[tuple[Lattice, Lattice]]:
    """Cut `lattice` where it goes from one row of `width` elements to the next.

    Yield (rows, within): which rows, here counted in rows, and which elements of each.
    """
    here, there, dims = lattice
    outer: list[tuple[int, int, int]] = []
    while dims and dims[0][1] >= width:
        (count, step, further), *rest = dims
        if step % width:
            for i in range(count):
                for rows, within in _by_rows(Lattice(here + i * step, there + i * further, tuple(rest)), width):
                    yield Lattice(rows.here, rows.there, (*outer, *rows.dims)), within
            return
        outer.append((count, step // width, further))
        dims = tuple(rest)
    while True:
        row, column = divmod(here, width)
        if column + sum((count - 1) * step for count, step, _ in dims) < width:
            yield Lattice(row, there, tuple(outer)), Lattice(column, 0, dims)
            return
        (count, step, further), *rest = dims
        below = sum((n - 1) * s for n, s, _ in rest)
        fit = (width - 1 - column - below) // step + 1
        if column + below >= width:  # one step alone goes on into the next row
            for i in range(count):
                for rows, within in _by_rows(Lattice(here + i * step, there + i * further, tuple(rest)), width):
                    yield Lattice(rows.here, rows.there, (*outer, *rows.dims)), within
            return
        done = min(fit, count)
        more: Dims = ()
        if width % step == 0 and column + below < step and count >= width // step:
            per_row = width // step
            done = count // per_row * per_row
            more, fit = ((count // per_row, 1, further * per_row), ), per_row
        yield Lattice(row, there, (*outer, *more)), Lattice(column, 0, ((min(fit, count), step, further), *rest))
        if done == count:
            return
        here, there, dims = here + done * step, there + done * further, ((count - done, step, further), *rest)


def _between(rows: Lattice, low: int, high: int) -> Iterator[Lattice]:
    """Yield what of `rows` lies, here, in low … high - 1."""
    here, there, dims = rows
    if not dims:
        if low <= here < high:
            yield rows
        return
    (count, step, further), *rest = dims
    below = sum((n - 1) * s for n, s, _ in rest)
    whole_first, whole_last = max(0, -(-(low - here) // step)), min(count - 1, (high - 1 - below - here) // step)
    first, last = max(0, -(-(low - below - here) // step)), min(count - 1, (high - 1 - here) // step)
    if whole_first <= whole_last:
        yield Lattice(here + whole_first * step, there + whole_first * further,
                      ((whole_last - whole_first + 1, step, further), *rest))
    else:
        whole_first, whole_last = last + 1, last
    for i in (*range(first, whole_first), *range(whole_last + 1, last + 1)):
        yield from _between(Lattice(here + i * step, there + i * further, tuple(rest)), low, high)
