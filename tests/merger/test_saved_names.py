"""Tensors that transformers 5 fuses or renames in memory are written as it saves them, bit for bit."""
import json
import math
import os
import shutil
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from merger import MergeError
from merger.checkpoint import Layout, Tensor
from merger.job import as_saved
from merger.lattice import Lattice, cut, row_major
from merger.layout import Shard, box_of
from merger.model_check import Verdict
from merger.plan import BLOCK_BYTES, Fusion, Output, view_blocks
from merger.verify import read_header
from merger.views import View
from safetensors.torch import load_file

from tests.merger import families
from tests.merger.merging import Run, differences, flip, merge, weights

transformers = pytest.importorskip("transformers", minversion="5")

# One of each kind of conversion.
KINDS = {
    "qwen3_moe": "experts' slices of fused halves",
    "mixtral": "the same, renamed",
    "llava": "renamed alone",
    "radio": "several tensors joined",
    "inkling2_text": "every second row",
    "kimi_k25": "rows of heads in another order",
    "nemo_speechlm": "transposed",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    families.write_families(folder, list(KINDS))
    return folder


def saved(folder: Path) -> dict[str, Any]:
    """Return what transformers saved of a whole model."""
    return {name: tensor for path in folder.glob("saved/*.safetensors") for name, tensor in load_file(path).items()}


def run(folder: Path, out: Path, *flags: str) -> Run:
    return merge("--local-dir", folder / "actor", "--save-dir", out, "--dtype", "keep", *flags)


@pytest.mark.parametrize("name", KINDS)
def test_files_have_the_names_and_tensors_that_transformers_saves(name: str, written: Path, tmp_path: Path) -> None:
    # Heads that share keys do not fit that family's mapping, and tiny ones do: it would not load what it saves.
    allowed = ["--allow", "keys"] if name == "nemo_speechlm" else []
    record = run(written / name, tmp_path / "out", "--verify", "--json", *allowed).record()
    found = weights(tmp_path / "out")
    assert differences(found, saved(written / name)) == []
    assert record["requested"]["names"] == "files" and 0 < record["renamed"] <= len(found)


def test_names_in_memory_are_kept_where_asked_for_and_verified_as_such(written: Path, tmp_path: Path) -> None:
    record = run(written / "qwen3_moe", tmp_path / "out", "--names", "memory", "--json").record()
    assert (record["requested"]["names"], record["renamed"]) == ("memory", 0)
    assert "model.layers.1.mlp.experts.gate_up_proj" in weights(tmp_path / "out")
    assert "keep the names of transformers" in record["notes"][0]
    text = (tmp_path / "out/merge.json").read_text()
    older = json.loads(text)
    del older["requested"]["names"], older["renamed"]  # as it was written before there was a choice
    for told in (text, json.dumps(older)):
        (tmp_path / "out/merge.json").write_text(told)
        done = merge("--verify-only", "--local-dir", written / "qwen3_moe/actor", "--save-dir", tmp_path / "out")
        assert done.code == 0, done.err


@pytest.mark.parametrize("name", ["qwen3_moe", "inkling2_text", "nemo_speechlm"])
def test_verify_sees_one_changed_byte_of_a_tensor_that_is_made_of_others(name: str, written: Path,
                                                                         tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(written / name, out, "--json").record()
    made = next(key for key in weights(out) if "experts" in key and ("down" in key or "w13" in key))
    place = read_header(out / "model.safetensors")[made]
    flip(out / "model.safetensors", place.offset + 4, 1)
    refusal = merge("--verify-only", "--local-dir", written / name / "actor", "--save-dir", out).refusal
    assert refusal.startswith(made) and "differs from rank" in refusal and "in 1 elements" in refusal


def test_where_no_model_can_be_asked_the_names_are_said_to_be_the_checkpoint_s(written: Path, tmp_path: Path) -> None:
    config = json.loads((written / "mixtral/actor/huggingface/config.json").read_text())
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_text(json.dumps({**config, "model_type": "own", "architectures": ["Own"]}))
    record = run(written / "mixtral", tmp_path / "out", "--config-dir", str(tmp_path / "config"), "--json").record()
    assert any("they are the checkpoint's, whatever model files have" in note for note in record["notes"])
    assert record["renamed"] == 0


class Halved:
    """An operation that changes numbers, of a release to come."""

    def convert(self, tensors: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Any]:
        (found, ) = tensors.values()
        return {target_patterns[0]: (found[0] if isinstance(found, list) else found) / 2}


class Shortened(Halved):
    """One that leaves elements out."""

    def convert(self, tensors: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Any]:
        (found, ) = tensors.values()
        return {target_patterns[0]: (found[0] if isinstance(found, list) else found)[1:]}


@pytest.mark.parametrize(("operation", "told"), [(Halved, "Halved"), (Shortened, "elements would be saved")])
def test_an_operation_that_does_more_than_move_elements_is_refused_by_name(operation: Any, told: str, written: Path,
                                                                           tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping as mapping
    from transformers.core_model_loading import ConversionOps, WeightConverter
    there = type(operation.__name__, (operation, ConversionOps), {"reverse_op": property(lambda self: self)})
    mapping.get_checkpoint_conversion_mapping("qwen2")  # so that the cache is there
    cache = {**(mapping._checkpoint_conversion_mapping_cache or {}),
             "Qwen3MoeForCausalLM": [WeightConverter("norm.scale", "model.norm.weight", [there()])]}  # yapf: disable
    monkeypatch.setattr(mapping, "_checkpoint_conversion_mapping_cache", cache)
    refusal = run(written / "qwen3_moe", tmp_path / "out", "--allow", "keys").refusal
    assert told in refusal and "pass --names memory" in refusal and not (tmp_path / "out").exists()
    assert run(written / "qwen3_moe", tmp_path / "out", "--allow", "keys", "--names", "memory").code == 0


def tensor(name: str, shape: tuple[int, ...], ranks: int = 1) -> Tensor:
    """Return a tensor that `ranks` hold in pieces of the first dimension."""
    boxes = [box_of(shape, [Shard(0)], [ranks], [rank]) for rank in range(ranks)]
    held = tuple(enumerate(boxes))
    return Tensor(name, "float32", shape, Layout(held, held, ()), 0, "")


def test_a_view_is_read_in_small_blocks_whatever_its_size() -> None:
    fused = tensor("gate_up", (64, 1 << 15, 1 << 14), ranks=24)  # 128 GiB
    checkpoint = SimpleNamespace(
        places=lambda tensor, every: ((rank, box, 1 << 12) for rank, box in tensor.layout.pieces))
    half = fused.numel // 128
    turned = Lattice(0, 5 * half, ((1 << 10, 1, 1 << 14), (1 << 14, 1 << 10, 1)))
    views = [
        View((1 << 14, 1 << 14), ((fused, Lattice(0, 5 * half, ((half, 1, 1), ))), )),
        View((1 << 14, 1 << 10), ((fused, turned), ))
    ]
    for view in views:
        elements = 0
        for _, count, parts in view_blocks(checkpoint, view):  # type: ignore[arg-type]
            assert 4 * count <= BLOCK_BYTES and sum(part.rows * part.width for part in parts) == count
            elements += count
        assert elements == view.numel


@pytest.mark.parametrize(("outputs", "on_disk", "told"), [
    ({"a": {"fusion": True}}, {"x": [[4, 4], [["a", [0, 0, [[16, 1, 1]]]]]]}, "LoRA changes a, which model files have as x"),
    ({"a": {"twins": True}}, {"x": [[4, 4], [["a", [0, 0, [[16, 1, 1]]]]]]}, "the config ties a"),
    ({"a": {}, "b": {"dtype": "float16"}},
     {"x": [[8, 4], [["a", [0, 0, [[16, 1, 1]]]], ["b", [16, 0, [[16, 1, 1]]]]]]}, "b and a are of different types"),
    ({"a": {}, "x": {}}, {"x": "a"}, "the checkpoint has x, and so has"),
    ({"b": {}}, {"x": [[4, 4], [["a", [0, 0, [[16, 1, 1]]]]]]}, "tied to another"),
], ids=["LoRA", "tied", "types", "twice", "dropped"])  # yapf: disable
def test_what_cannot_be_written_as_model_files_have_it_is_refused_by_name(outputs: dict[str, Any],
                                                                          on_disk: dict[str, Any], told: str) -> None:
    ours = []
    for name, what in outputs.items():
        source = tensor(name, (4, 4))
        ours.append(Output(name, source, what.get("dtype", "float32"),
                           Fusion(source, source, 1.0) if "fusion" in what else None,
                           (source, ) if "twins" in what else ()))  # yapf: disable
    verdict = Verdict(in_memory=["a"], on_disk=on_disk, transformers="5")
    with pytest.raises(MergeError, match=told) as refused:
        as_saved(ours, ["a"] if "a" not in outputs else [], verdict)
    assert "pass --names memory" in str(refused.value)


@pytest.mark.parametrize("seed", range(40))
def test_a_lattice_follows_slices_transposes_and_reshapes(seed: int) -> None:
    random = Random(seed)
    shape = tuple(random.randint(1, 7) for _ in range(random.randint(1, 4)))
    wanted, found = np.arange(math.prod(shape)), [Lattice(0, 0, ((math.prod(shape), 1, 1), ))]
    for _ in range(5):
        start = [random.randint(0, extent - 1) for extent in shape]
        extent = [random.randint(1, extent - first) for first, extent in zip(start, shape, strict=True)]
        order = random.sample(range(len(shape)), len(shape))
        new = tuple(extent[dim] for dim in order)
        steps = [row_major(new)[order.index(dim)] for dim in range(len(shape))]
        found = [part for lattice in found for part in cut(lattice, shape, start, extent, steps)]
        box = tuple(slice(first, first + count) for first, count in zip(start, extent, strict=True))
        wanted = wanted.reshape(shape)[box].transpose(order).reshape(-1)
        there = np.full(wanted.size, -1)
        for lattice in found:
            index = np.indices([count for count, _, _ in lattice.dims] or [1]).reshape(max(len(lattice.dims), 1), -1)
            here = lattice.here + sum(index[i] * step for i, (_, step, _) in enumerate(lattice.dims))
            assert (there[here] == -1).all() and np.max(here) == lattice.last
            there[here] = lattice.there + sum(index[i] * step for i, (_, _, step) in enumerate(lattice.dims))
        assert (there == wanted).all()
        shape = random.choice([new, (math.prod(new), ), tuple(reversed(new)), (1, *new)])


@pytest.mark.slow
@pytest.mark.timeout(3600 if os.environ.get("FAMILIES") == "all" else 900)
def test_families_of_the_mapping(tmp_path: Path) -> None:
    """Merged from three ranks, equal to what transformers saves: those that are trained most.

    With FAMILIES=all, in about half an hour, each that a tiny model can be made of.
    """
    names = list(families.REQUIRED)
    if os.environ.get("FAMILIES") == "all":
        names = [name for name in families.known() if families.is_tiny(name)]
        assert set(families.REQUIRED) <= set(names) and len(names) > 150
    faults = {}
    for first in range(0, len(names), 20):
        folder = tmp_path / str(first)
        folder.mkdir()
        families.write_families(folder, names[first:first + 20])
        for name in names[first:first + 20]:
            if not families.was_sharded(folder / name):
                assert name not in families.REQUIRED
                continue
            done = run(folder / name, folder / "out", "--verify", "--force", "--allow", "keys")
            wrong = differences(weights(folder / "out"), saved(folder / name)) if done.code == 0 else done.err
            if wrong:
                faults[name] = wrong
        shutil.rmtree(folder)
    assert not faults
