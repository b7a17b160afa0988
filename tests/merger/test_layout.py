"""Where pieces belong, where tensors go in the output, and what a cast makes of every value."""
import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merger.copying import EXPONENT, count_nonfinite
from merger.dtypes import NUMPY, SAFETENSORS, itemsize, output_dtype
from merger.layout import (
    Box,
    Replicate,
    Run,
    Shard,
    box_of,
    chunk,
    cut_dimension,
    cutting_order,
    overlap,
    runs_of,
    tiling_fault,
)
from merger.plan import Output, index_json, split_files
from merger.verify import slabs

# Chunks and boxes


@pytest.mark.parametrize("extent", [0, 1, 2, 3, 7, 8, 250, 1003])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_chunks_are_torch_s(extent: int, parts: int) -> None:
    values = torch.arange(extent)
    pieces = [piece.tolist() for piece in torch.chunk(values, parts)]
    pieces += [[]] * (parts - len(pieces))  # torch leaves empty ones out
    starts = [chunk(extent, parts, index) for index in range(parts)]
    assert [list(range(start, start + count)) for start, count in starts] == pieces


def test_chunks_of_a_vocabulary_that_does_not_divide() -> None:
    assert [chunk(1003, 4, index) for index in range(4)] == [(0, 251), (251, 251), (502, 251), (753, 250)]


def test_a_chunk_after_the_last_is_empty() -> None:
    assert [chunk(1, 3, index) for index in range(3)] == [(0, 1), (1, 0), (1, 0)]


@pytest.mark.parametrize(("placements", "mesh", "order"), [
    ((Shard(0), ), (4, ), [0]),
    ((Replicate(), Shard(0)), (2, 2), [1]),
    ((Shard(0), Shard(1)), (2, 2), [0]),
    ((Shard(0), Shard(0)), (2, 3), [0, 1]),
    ((Shard(0, 3), Shard(0)), (2, 3), [1, 0]),
    ((Replicate(), Shard(0, 3), Shard(0)), (2, 2, 3), [2, 1]),
    ((Shard(0, 6), Shard(0, 3), Shard(0)), (5, 2, 3), [2, 1, 0]),
    ((Shard(0, 3), Shard(0), Shard(0)), (5, 3, 2), [1, 0, 2]),
    ((Shard(0), Shard(0, 2), Shard(0)), (5, 3, 2), [0, 2, 1]),
    ((Replicate(), Replicate()), (2, 2), []),
], ids=["FSDP", "HSDP", "two dimensions", "left to right", "FSDP2 and TP", "HSDP and TP", "three, right to left",
        "the middle one first", "the left one first", "nothing is cut"])  # yapf: disable
def test_the_order_in_which_mesh_dimensions_cut(placements: tuple[Any, ...], mesh: tuple[int, ...],
                                                order: list[int]) -> None:
    assert cutting_order(placements, mesh, 0) == order


def test_a_split_factor_that_nothing_makes_up_is_refused() -> None:
    with pytest.raises(ValueError, match="split factor"):
        cutting_order((Shard(0, 2), Shard(1)), (2, 2), 0)
    with pytest.raises(ValueError, match="split factor"):
        cutting_order((Shard(0, 4), Shard(0)), (2, 3), 0)


def test_tensor_parallelism_cuts_first_and_fsdp_cuts_its_pieces() -> None:
    boxes = [box_of((10, 2), (Shard(0, 2), Shard(0)), (2, 2), coordinate)
             for coordinate in itertools.product(range(2), range(2))]  # yapf: disable
    assert [(box.start[0], box.shape[0]) for box in boxes] == [(0, 3), (5, 3), (3, 2), (8, 2)]


@pytest.mark.parametrize(
    ("shape", "placements", "mesh", "coordinate"), [
        ((4, ), (Shard(1), ), (2, ), (0, )),
        ((4, ), (Shard(-1), ), (2, ), (0, )),
        ((), (Shard(0), ), (2, ), (0, )),
        ((4, ), (Shard(0), ), (2, 2), (0, 0)),
        ((4, ), (Shard(0), Replicate()), (2, 2), (0, )),
    ],
    ids=["beyond the shape", "negative", "of a scalar", "too few placements", "too few coordinates"])
def test_placements_that_do_not_fit_are_refused(shape: tuple[int, ...], placements: tuple[Any, ...],
                                                mesh: tuple[int, ...], coordinate: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        box_of(shape, placements, mesh, coordinate)


def test_a_scalar_is_a_box_of_one_element() -> None:
    box = box_of((), (Replicate(), ), (2, ), (1, ))
    assert box == Box((), ()) and box.numel == 1 and box.slices == ()


def test_boxes_overlap_where_they_share_an_element() -> None:
    assert overlap(Box((0, 0), (2, 2)), Box((1, 1), (2, 2)))
    assert not overlap(Box((0, 0), (2, 2)), Box((2, 0), (2, 2)))
    assert not overlap(Box((0, 0), (2, 2)), Box((1, 1), (0, 2)))


@pytest.mark.parametrize(("shape", "boxes", "fault"), [
    ((4, 2), [Box((0, 0), (2, 2)), Box((2, 0), (2, 2))], None),
    ((4, 2), [Box((2, 0), (2, 2)), Box((0, 0), (2, 2)), Box((4, 0), (0, 2))], None),
    ((4, 2), [Box((0, 1), (4, 1)), Box((0, 0), (4, 1))], None),
    ((), [Box((), ())], None),
    ((0, 3), [], None),
    ((4, 2), [Box((0, 0), (2, 2))], "4 of 8"),
    ((4, 2), [Box((0, 0), (3, 2)), Box((2, 0), (2, 2))], "overlap"),
    ((4, 2), [Box((0, 0), (4, 2)), Box((0, 0), (4, 2))], "overlap"),
    ((4, 2), [Box((0, 0), (2, 2)), Box((3, 0), (2, 2))], "beyond"),
    ((4, 2), [Box((0, 0), (4, 1)), Box((0, 0), (4, 1))], "overlap"),
    ((4, 2), [Box((0, 0), (1, 2)), Box((1, 0), (1, 2)), Box((3, 0), (1, 2))], "6 of 8"),
    ((), [], "0 of 1"),
],
                         ids=[
                             "halves", "any order and an empty one", "columns", "a scalar", "no elements",
                             "half is missing", "an overlap", "twice the whole", "beyond the end", "a column twice",
                             "a hole", "a scalar is missing"
                         ])
def test_tiling_faults_are_told(shape: tuple[int, ...], boxes: list[Box], fault: str | None) -> None:
    found = tiling_fault(shape, boxes)
    assert (found is None) if fault is None else (found is not None and fault in found)


@pytest.mark.parametrize("grid", [(1024, 1), (1, 1024), (32, 32), (1, 64, 16)], ids=str)
def test_many_pieces_take_few_comparisons(grid: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from merger import layout
    compared = []
    monkeypatch.setattr(layout, "overlap", lambda a, b: compared.append(a) or overlap(a, b))
    shape = tuple(2 * cuts for cuts in grid)
    boxes = [Box(tuple(2 * i for i in index), (2, ) * len(grid)) for index in itertools.product(*map(range, grid))]
    np.random.default_rng(0).shuffle(boxes)  # type: ignore[arg-type]
    assert tiling_fault(shape, boxes) is None
    assert len(compared) <= 1024 * 32
    assert "the pieces hold" in str(tiling_fault(shape, boxes[1:]))


@given(st.lists(st.tuples(st.tuples(*[st.integers(0, 4)] * 2), st.tuples(*[st.integers(0, 4)] * 2)), max_size=5))
def test_a_tiling_is_told_as_by_counting_elements(blocks: list[Any]) -> None:
    boxes = [Box(*block) for block in blocks]
    inside = all(a + n <= 4 for box in boxes if box.numel for a, n in zip(box.start, box.shape, strict=True))
    count = np.zeros((8, 8), int)
    for box in boxes:
        count[box.slices] += 1
    exact = inside and bool((count[:4, :4] == 1).all())
    assert (tiling_fault((4, 4), boxes) is None) == exact


@pytest.mark.parametrize(("shape", "placements", "mesh"), [
    ((7, ), (Shard(0), ), (3, )),
    ((7, 5), (Shard(0), ), (3, )),
    ((7, 5), (Shard(1), ), (3, )),
    ((4, 3, 5), (Shard(1), Shard(0)), (2, 2)),
    ((4, 3, 5), (Shard(2), Shard(1)), (2, 2)),
    ((9, 5), (Shard(0, 2), Shard(0)), (3, 2)),
    ((5, 9), (Shard(1, 2), Shard(1)), (3, 2)),
    ((2, 3, 4, 5), (Shard(2), Shard(0)), (3, 2)),
    ((), (), ()),
    ((3, 0, 2), (Shard(0), ), (2, )),
],
                         ids=str)
def test_runs_put_every_element_in_its_place(shape: tuple[int, ...], placements: tuple[Any, ...],
                                             mesh: tuple[int, ...]) -> None:
    whole = np.arange(math.prod(shape)).reshape(shape)
    boxes = [box_of(shape, placements, mesh, coordinate) for coordinate in itertools.product(*map(range, mesh))]
    cut, found = cut_dimension(shape, boxes), np.full(whole.size, -1)
    for box in boxes:
        shard = whole[box.slices].reshape(-1)
        for run in runs_of(shape, box, cut):
            for row in range(run.rows):
                piece = shard[run.source + row * run.width:run.source + (row + 1) * run.width]
                found[run.target + row * run.pitch:run.target + row * run.pitch + run.width] = piece
    assert np.array_equal(found.reshape(shape), whole)


def test_a_tensor_cut_by_rows_is_one_run() -> None:
    assert runs_of((8, 4), Box((2, 0), (3, 4)), 0) == [Run(0, 8, 1, 12, 32)]


@pytest.mark.parametrize("limit", [1, 2, 5, 12, 1000])
@pytest.mark.parametrize("shape", [(3, 4, 5), (7, ), (1, 1, 9), (6, 2)], ids=str)
def test_slabs_cover_a_block_in_order(shape: tuple[int, ...], limit: int) -> None:
    box = Box((2, ) * len(shape), shape)
    found, end = [], 0
    for position, part in slabs(box, limit):
        assert position == end and part.numel <= limit
        end += part.numel
        found.append(part)
    assert end == box.numel
    assert sum(part.numel for part in found) == box.numel
    assert not any(overlap(a, b) for a, b in itertools.combinations(found, 2))


# The output's files


def output(name: str, shape: tuple[int, ...], dtype: str = "bfloat16") -> Output:
    """Return a tensor to write, of which only name, shape and type are known."""
    source: Any = SimpleNamespace(shape=shape, numel=math.prod(shape), dtype=dtype, name=name)
    return Output(name, source, dtype)


def test_tensors_are_split_over_files_in_order() -> None:
    files = split_files([output(f"t{i}", (50, )) for i in range(7)], 200)
    assert [file.name for file in files] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert [[tensor.name for tensor, _ in file.tensors] for file in files] == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"],
                                                                               ["t6"]]


def test_a_tensor_larger_than_a_file_has_one_of_its_own() -> None:
    files = split_files([output("a", (10, )), output("big", (500, )), output("b", (10, ))], 100)
    assert [[tensor.name for tensor, _ in file.tensors] for file in files] == [["a"], ["big"], ["b"]]


def test_one_file_needs_no_index() -> None:
    (file, ) = split_files([output("a", (10, ))], 100)
    assert file.name == "model.safetensors" and index_json([file]) is None


def test_the_index_names_the_file_of_each_tensor() -> None:
    files = split_files([output("b", (50, )), output("a", (50, ))], 100)
    index = json.loads(index_json(files) or b"")
    assert index == {"metadata": {"total_size": 200},
                     "weight_map": {"a": "model-00002-of-00002.safetensors",
                                    "b": "model-00001-of-00002.safetensors"}}  # yapf: disable


def test_headers_are_what_the_safetensors_library_reads() -> None:
    from safetensors import deserialize
    outputs = [output(f"tensor of {dtype} é", (3, 5), dtype) for dtype in NUMPY]
    outputs += [output("scalar", (), "int64"), output("empty", (0, 7), "float32")]
    (file, ) = split_files(outputs, 1 << 30)
    found = dict(deserialize(file.header + bytes(file.size - len(file.header))))
    assert len(file.header) % 8 == 0
    for tensor, offset in file.tensors:
        entry = found.pop(tensor.name)
        assert (entry["dtype"], tuple(entry["shape"])) == (SAFETENSORS[tensor.dtype], tensor.source.shape)
        assert len(entry["data"]) == tensor.nbytes
        assert offset % itemsize(tensor.dtype) == 0  # aligned
    assert not found


# Element types


def test_every_element_type_has_torch_s_size() -> None:
    for name in NUMPY:
        assert itemsize(name) == torch.empty(0, dtype=getattr(torch, name)).element_size()


@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float32"])
def test_only_floating_point_is_converted(wanted: str) -> None:
    for name in NUMPY:
        converted = name in ("float64", "float32", "float16", "bfloat16")
        assert output_dtype(name, wanted) == (wanted if converted else name)
        assert output_dtype(name, "keep") == name


def every_value(dtype: str) -> np.ndarray:
    """Return all 65536 patterns of a 16-bit type; of float32 those around each rounding, and random ones."""
    if dtype != "float32":
        return np.arange(1 << 16, dtype=np.uint16)
    high = np.arange(1 << 16, dtype=np.uint32) << 16  # every bfloat16; between two of them lie the ties
    near = [high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    steps = np.arange(0, 1 << 32, 1 << 12, dtype=np.uint64).astype(np.uint32)  # the same for float16, 13 bits below
    near += [steps, steps | 1, steps | 0xFFF]
    edges = np.array([65504, 65519.996, 65520, 65536, 5.96e-8, 2.98e-8, 2.9802322e-08, 6.1e-5, 3.4e38], np.float32)
    return np.concatenate([*near, edges.view(np.uint32), (-edges).view(np.uint32),
                           np.random.default_rng(3).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)])  # yapf: disable


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32"])
def test_casts_are_torch_s_for_every_finite_value(source: str, target: str) -> None:
    bits = every_value(source)
    values = bits.view(NUMPY[source])
    finite = np.isfinite(values)
    bits, values = bits[finite], values[finite]
    with np.errstate(over="ignore"):
        found = values.astype(NUMPY[target])
    signed = bits.view(np.int16 if bits.itemsize == 2 else np.int32)
    wanted = torch.from_numpy(signed).view(getattr(torch, source)).to(getattr(torch, target))
    assert len(values) > 60000
    assert np.array_equal(found.view(np.uint8), wanted.view(torch.uint8).numpy())


def test_ties_round_to_even_and_overflow_becomes_infinite() -> None:
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 65519.996, 65520.0, 2**-25, 2**-25 * 1.0001], np.float32)
    with np.errstate(over="ignore"):
        assert values[:2].astype(NUMPY["bfloat16"]).astype(np.float32).tolist() == [1.0, 1 + 2**-6]
        assert values[2:].astype(np.float16).tolist() == [65504.0, math.inf, 0.0, 2**-24]


@pytest.mark.parametrize(("dtype", "counts"), [("float8_e5m2", (1, 2)), ("float8_e4m3fn", (1, 0))])
def test_nan_and_infinite_elements_of_eight_bits_are_seen(dtype: str, counts: tuple[int, int]) -> None:
    every = np.arange(256, dtype=np.uint8).view(NUMPY[dtype])
    finite = np.isfinite(every.astype(np.float32))
    for value, is_finite in zip(every, finite, strict=True):
        exponent = EXPONENT[dtype]
        assert bool(value.view(np.uint8) & exponent != exponent) == is_finite
    values = np.array([1, math.nan, *([math.inf, -math.inf] if counts[1] else []), 0], np.float32).astype(NUMPY[dtype])
    assert count_nonfinite(values) == counts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_nan_and_infinite_elements_are_counted(dtype: str) -> None:
    values = np.array([1, math.nan, math.inf, -math.inf, 0], np.float32).astype(NUMPY[dtype])
    assert count_nonfinite(values) == (1, 2) and count_nonfinite(values[:1]) == (0, 0) and count_nonfinite(
        values[:0]) == (0, 0)
