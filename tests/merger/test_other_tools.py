"""`--verify-only` compares a folder that another tool wrote, in its names and types, with the shards."""
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.merger.merging import Sample, flip, merge, storage_range


def by_another(sample: Sample, folder: Path, change: Callable[[dict[str, Any]], object], dtype: torch.dtype) -> Path:
    """Write what another tool may make of a checkpoint: no record beside it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sample.config))
    tensors = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in sample.tensors().items()
    }
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "change"), [
    ("FSDP1, 4 ranks", lambda tensors: None),
    ("FSDP2, 4 ranks, tied", lambda tensors: None),
    ("FSDP2, 4 ranks, tied", lambda tensors: tensors.pop("lm_head.weight")),
    ("vision, FSDP2", lambda tensors: None),
], ids=["plain", "both of a tied pair", "one of a tied pair", "names in memory"])  # yapf: disable
def test_what_another_tool_wrote_is_compared(name: str, change: Any, dtype: torch.dtype, samples: dict[str, Sample],
                                             tmp_path: Path) -> None:
    folder = by_another(samples[name], tmp_path / "theirs", change, dtype)
    args: list[str | Path] = ["--verify-only", "--local-dir", samples[name].actor, "--save-dir", folder]
    found = merge(*args, "--json").record()
    assert (found["verified"], found["merged_by"]) == (True, "another tool")
    assert "as another tool wrote them, equal to the shards in every element" in merge(*args).out


@pytest.mark.parametrize(("change", "told"), [
    (lambda tensors: tensors["model.norm.weight"][3].add_(1), "model.norm.weight in .* differs from rank 0's piece in 1 ele"),
    (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is in the checkpoint, not in the output"),
    (lambda tensors: tensors.update(extra=torch.ones(2)), "extra is in the output, not in the checkpoint"),
    (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight should be .*\[64\]"),
], ids=["a number", "a tensor less", "a tensor more", "a shape"])  # yapf: disable
def test_what_another_tool_got_wrong_is_named(change: Any, told: str, samples: dict[str, Sample],
                                              tmp_path: Path) -> None:
    import re
    sample = samples["FSDP1, 4 ranks"]
    folder = by_another(sample, tmp_path / "theirs", change, torch.float32)
    refusal = merge("--verify-only", "--local-dir", sample.actor, "--save-dir", folder).refusal
    assert re.search(told, refusal)


def test_ranks_that_were_exchanged_by_another_tool_are_seen(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    """AgentGym-RL's merger takes a rank with other bytes without a word."""
    sample = spoil("FSDP1, 4 ranks")
    folder = by_another(sample, tmp_path / "theirs", lambda tensors: None, torch.bfloat16)
    start, _ = storage_range(sample.rank(2), "lm_head.weight")
    flip(sample.rank(2), start + 3, 1)  # the sign and exponent of one number
    assert merge("--verify-only", "--local-dir", sample.actor, "--save-dir", folder).code == 2


def test_without_weights_the_merge_comes_first(samples: dict[str, Sample], tmp_path: Path) -> None:
    refusal = merge("--verify-only", "--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path).refusal
    assert refusal.endswith("merge first, or name the merged folder with --save-dir")
