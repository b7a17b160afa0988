"""Reading and writing around the page cache: whole pages, ragged ends, and file systems that refuse."""
from __future__ import annotations

import errno
import itertools
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merger import copying, direct
from merger.checkpoint import read_checkpoint
from merger.copying import Sources
from merger.direct import PAGE, OutputStream, open_direct, page_buffer
from merger.discover import find_checkpoint

from tests.merger.merging import Sample, listing, merge

WAYS = ["around the cache", "refused when opened", "refused when used"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the file system takes O_DIRECT; where this one refuses it, "around the cache" repeats the second."""
    if request.param == "refused when opened":
        monkeypatch.setattr(direct, "open_direct", lambda path, flags: None)
        monkeypatch.setattr(copying, "open_direct", lambda path, flags: None)
    if request.param == "refused when used":  # opened for the other direction

        def other(path: Path, flags: int) -> int:
            return os.open(path, os.O_RDONLY if flags & os.O_WRONLY else os.O_WRONLY)

        monkeypatch.setattr(direct, "open_direct", other)
        monkeypatch.setattr(copying, "open_direct", other)
    return request.param


def placed(data: bytes, offset: int, aligned: bool) -> np.ndarray:
    """Return `data` in memory at the same place of a page as `offset` is, or one byte further."""
    start = offset % PAGE + (0 if aligned else 1)
    values = page_buffer(len(data) + PAGE)[start:start + len(data)]
    values[:] = np.frombuffer(data, np.uint8)
    return values


def test_a_file_of_memory_or_a_network_is_not_opened_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(os, "stat", lambda path: os.stat_result((0o100644, 1, os.makedev(0, 7), 1, 0, 0, 1, 0, 0, 0)))
    assert open_direct(tmp_path / "file", os.O_RDONLY) is None


def test_a_file_system_that_refuses_is_not_opened_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def refuse(*_: Any) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(os, "open", refuse)
    assert open_direct(tmp_path / "file", os.O_RDONLY) is None


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned memory", "memory a byte off"])
@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 40 * PAGE + 17])
def test_pieces_of_any_size_make_up_the_file(size: int, aligned: bool, way: str, tmp_path: Path) -> None:
    chance = random.Random(size)
    data = chance.randbytes(size)
    for pieces in range(1, 8):
        cuts = sorted({0, size, *(chance.randrange(size + 1) for _ in range(pieces - 1))})
        spans = list(itertools.pairwise(cuts))
        chance.shuffle(spans)
        path = tmp_path / f"{pieces}"
        with OutputStream(path, size) as stream:
            for begin, end in spans:
                stream.write(placed(data[begin:end], begin, aligned), begin)
            stream.flush()
        assert path.read_bytes() == data


def test_an_output_s_cache_is_given_back_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "open_direct", lambda path, flags: None)
    monkeypatch.setattr(direct, "FLUSH_BYTES", 4 * PAGE)
    dropped: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *_: dropped.append(fd), raising=False)
    with OutputStream(tmp_path / "file", 10 * PAGE) as stream:
        for page in range(10):
            stream.write(page_buffer(PAGE)[:PAGE], page * PAGE)
    assert len(dropped) == 2


@pytest.mark.parametrize("elements", [1, PAGE // 4, 5 * PAGE + 3])
def test_any_range_of_a_cold_file_is_read(elements: int, way: str, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "is_cached", lambda fd, size: False)
    torch.save({"weight": torch.arange(elements, dtype=torch.float32)}, tmp_path / "model_world_size_1_rank_0.pt")
    whole = (tmp_path / "model_world_size_1_rank_0.pt").read_bytes()
    chance, buffer = random.Random(elements), page_buffer(len(whole))
    with Sources(read_checkpoint(find_checkpoint([str(tmp_path)]))) as sources:
        for _ in range(50):
            begin, end = sorted(chance.randrange(len(whole) + 1) for _ in range(2))
            assert sources.read(0, begin, end - begin, buffer).tobytes() == whole[begin:end]
        assert sources.read(0, 0, len(whole), buffer).tobytes() == whole


@pytest.mark.parametrize("name", ["FSDP1, 4 ranks", "FSDP2 and TP, 3 x 2 ranks", "HSDP, 2 x 3 ranks, tied"])
@pytest.mark.parametrize("dtype", ["bfloat16", "keep", "float32"])
def test_cold_shards_merge_to_the_same_bytes(name: str, dtype: str, way: str, samples: dict[str, Sample],
                                             tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["--local-dir", samples[name].actor, "--max-shard-size", "300KB", "--dtype", dtype, "--verify", "--json"]
    merge(*args, "--save-dir", tmp_path / "warm").record()
    monkeypatch.setattr(copying, "is_cached", lambda fd, size: False)
    merge(*args, "--save-dir", tmp_path / "cold").record()
    warm, cold = listing(tmp_path / "warm"), listing(tmp_path / "cold")
    del warm["merge.json"], cold["merge.json"]
    assert warm == cold


def test_through_the_cache_all_of_a_read_is_asked_for_at_once(samples: dict[str, Sample],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps that Linux does not cut short, so that a network's file system has them all under way."""
    monkeypatch.setattr(copying, "open_direct", lambda path, flags: None)
    monkeypatch.setattr(copying, "is_cached", lambda fd, size: False)
    monkeypatch.setattr(copying, "AHEAD", 1 << 12)
    asked: list[tuple[int, int]] = []

    def note(fd: int, offset: int, nbytes: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            asked.append((offset, offset + nbytes))

    monkeypatch.setattr(os, "posix_fadvise", note)
    checkpoint = read_checkpoint(find_checkpoint([str(samples["FSDP1, 4 ranks"].actor)]))
    size = checkpoint.sizes[1]
    with Sources(checkpoint) as sources:
        sources.read(1, 5, size - 10, page_buffer(size))
    assert asked[0][0] == 5 and asked[-1][1] == size - 5
    assert all(end - start <= 1 << 12 for start, end in asked)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(asked))
