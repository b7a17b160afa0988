"""Where the blocks of a tensor lie in the ranks' files, with cuts and block sizes that are the same each time."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from merger.lattice import Lattice
from merger.layout import Box
from merger.plan import Part, tensor_blocks, view_blocks
from merger.views import View

BEGIN = (100, 1000, 5000, 9000, 300, 700)  # byte of each rank's file where its piece begins


def cut_into(shape: tuple[int, ...], grid: tuple[tuple[int, ...], ...]) -> list[Box]:
    """Return the boxes of a grid: per dimension the extents of its pieces."""
    edges = [list(itertools.accumulate((0, *extents))) for extents in grid]
    assert tuple(edge[-1] for edge in edges) == shape
    return [
        Box(tuple(edges[dim][i] for dim, i in enumerate(index)), tuple(grid[dim][i] for dim, i in enumerate(index)))
        for index in itertools.product(*(range(len(extents)) for extents in grid))
    ]


def stand_in(shape: tuple[int, ...], boxes: list[Box]) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Return a checkpoint and a float32 tensor of which each box is a rank's."""
    places = [(rank, box, BEGIN[rank]) for rank, box in enumerate(boxes)]
    tensor = SimpleNamespace(dtype="float32",
                             shape=shape,
                             numel=math.prod(shape),
                             layout=SimpleNamespace(pieces=list(enumerate(boxes))))
    return SimpleNamespace(places=lambda *_: places), tensor


def test_later_rows_of_a_piece_lie_further_on_in_its_file() -> None:
    """Columns of (6, 4): two ranks, blocks of two rows. A row of a piece is two elements, eight bytes."""
    checkpoint, tensor = stand_in((6, 4), cut_into((6, 4), ((6, ), (2, 2))))
    assert list(tensor_blocks(checkpoint, tensor, 32)) == [  # type: ignore[arg-type]
        (0, 8, (Part(0, 100, 0, 2, 2, 4), Part(1, 1000, 2, 2, 2, 4))),
        (8, 8, (Part(0, 116, 0, 2, 2, 4), Part(1, 1016, 2, 2, 2, 4))),
        (16, 8, (Part(0, 132, 0, 2, 2, 4), Part(1, 1032, 2, 2, 2, 4))),
    ]


def test_a_block_begins_within_a_piece_and_ends_in_the_next() -> None:
    checkpoint, tensor = stand_in((6, 4), cut_into((6, 4), ((3, 3), (4, ))))
    assert list(tensor_blocks(checkpoint, tensor, 32)) == [  # type: ignore[arg-type]
        (0, 8, (Part(0, 100, 0, 1, 8, 8), )),
        (8, 8, (Part(0, 132, 0, 1, 4, 4), Part(1, 1000, 4, 1, 4, 4))),
        (16, 8, (Part(1, 1016, 0, 1, 8, 8), )),
    ]


@pytest.mark.parametrize("whole_rows", [False, True], ids=["", "whole rows"])
@pytest.mark.parametrize("block_bytes", [4, 20, 28, 64, 96, 1 << 20])
@pytest.mark.parametrize("shape, grid", [
    ((7, ), ((3, 4), )),
    ((6, 4), ((1, 2, 3), (4, ))),
    ((6, 5), ((6, ), (2, 3))),
    ((5, 6), ((2, 3), (1, 5))),
    ((4, 3, 5), ((2, 2), (1, 2), (5, ))),
    ((2, 4, 3), ((2, ), (3, 1), (1, 2))),
    ((3, 2, 4), ((1, 2), (2, ), (3, 1))),
],
                         ids=str)
def test_every_element_is_read_from_its_own_place(shape: tuple[int, ...], grid: tuple[tuple[int, ...], ...],
                                                  block_bytes: int, whole_rows: bool) -> None:
    boxes = cut_into(shape, grid)
    checkpoint, tensor = stand_in(shape, boxes)
    whole = np.arange(math.prod(shape), dtype=np.float32)
    files = [bytes(BEGIN[rank]) + whole.reshape(shape)[box.slices].tobytes() for rank, box in enumerate(boxes)]
    found, reached = np.full_like(whole, -1), 0
    for start, count, parts in tensor_blocks(checkpoint, tensor, block_bytes, whole_rows):  # type: ignore[arg-type]
        assert start == reached and (not whole_rows or start % shape[-1] == 0)
        assert count * 4 <= max(block_bytes, 4 * shape[-1] * whole_rows)
        reached = start + count
        for part in parts:
            assert part.rows * part.width > 0
            values = np.frombuffer(files[part.rank], np.float32, part.rows * part.width, part.offset)
            part.within(found[start:start + count])[:] = values.reshape(part.rows, part.width)
    assert reached == whole.size and (found == whole).all()


@pytest.mark.parametrize("block_bytes, sizes", [(1, [1] * 12), (4, [1] * 12), (20, [5, 5, 2]), (1 << 20, [12])])
@pytest.mark.parametrize("grid", [((2, 2), (6, )), ((1, 3), (6, )), ((4, ), (3, 3)), ((4, ), (6, ))], ids=str)
def test_a_view_that_turns_columns_into_rows_is_read_from_its_own_places(grid: tuple[tuple[int, ...], ...],
                                                                         block_bytes: int, sizes: list[int]) -> None:
    """Columns 2, 3 and 4 of (4, 6), as the rows of (3, 4)."""
    boxes = cut_into((4, 6), grid)
    checkpoint, tensor = stand_in((4, 6), boxes)
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    files = [bytes(BEGIN[rank]) + whole[box.slices].tobytes() for rank, box in enumerate(boxes)]
    view = View((3, 4), ((tensor, Lattice(0, 2, ((4, 1, 6), (3, 4, 1)))), ))  # type: ignore[arg-type]
    found, counts = np.full(12, -1, np.float32), []
    for start, count, parts in view_blocks(checkpoint, view, block_bytes):  # type: ignore[arg-type]
        assert start == sum(counts)
        counts.append(count)
        for part in parts:
            values = np.frombuffer(files[part.rank], np.float32, part.rows * part.width, part.offset)
            part.within(found[start:start + count])[:] = values.reshape(part.rows, part.width)
    assert counts == sizes and (found.reshape(3, 4) == whole[:, 2:5].T).all()
