"""LoRA weights in a sharded checkpoint (PEFT's names): write them as an adapter, or add them to the base weights.

PEFT computes base(x) + scale * b(a(x)) with scale = lora_alpha / r (Hu et al. 2021, https://arxiv.org/abs/2106.09685),
so the fused weight is base + scale * (b @ a); rank-stabilized LoRA has scale = lora_alpha / sqrt(r)
(Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
"""
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merger import MergeError
from merger.checkpoint import Tensor
from merger.discover import RankFiles
from merger.filenames import ADAPTER_CONFIG, LORA_FOLDER, LORA_META
from merger.foreign.documents import read_object
from merger.plan import Fusion

PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.(?:(?P<adapter>[^.]+)\.)?weight")
# A module that is trained whole, such as a critic's head: PEFT keeps the base model's beside it.
SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<weight>.+)")
ORIGINAL = ".original_module."
UNSUPPORTED = (".lora_magnitude_vector", ".lora_embedding_")
PEFT_RECORD = f"{LORA_FOLDER}/{ADAPTER_CONFIG}"  # verl writes PEFT's own record there
# Its entries that change the sum in ways that are not computed here.
OTHER_SUMS = ("use_dora", "alpha_pattern", "rank_pattern", "fan_in_fan_out", "use_qalora", "lora_bias")
# Those that add tensors to an adapter: fused weights have them all the same, an adapter of ours would lack them.
MORE_TENSORS = ("bias", "trainable_token_indices")


@dataclass(frozen=True)
class Lora:
    """The LoRA part of a checkpoint: (a of shape (r, in), b of shape (out, r)) by module, and its hyperparameters.

    `saved` holds the modules that were trained whole: by module, the tensors by their name in it. `more` names what
    PEFT's record says was trained besides.
    """
    factors: dict[str, tuple[Tensor, Tensor]]
    saved: dict[str, dict[str, Tensor]]
    rank: int
    alpha: float | None
    task_type: str | None
    rank_stabilized: bool = False
    more: str = ""

    @property
    def scale(self) -> float:
        """What b @ a is multiplied with."""
        return known_alpha(self) / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def has_lora(tensors: Mapping[str, Tensor]) -> bool:
    """Return True if any name is a LoRA weight's."""
    return any(".lora_" in name for name in tensors)


def read_lora(tensors: Mapping[str, Tensor], files: RankFiles, alpha: float | None) -> Lora:
    """Collect the factors; take r from their shapes and alpha from the flag, `lora_train_meta.json` or PEFT's record.

    Raises:
        MergeError: half a pair, several adapters, ranks that differ, DoRA and its like, a record that disagrees.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    adapters = set()
    for name, tensor in tensors.items():
        match = SAVED.fullmatch(name)
        if any(part in name for part in UNSUPPORTED) or (match and ".lora_" in name):
            raise MergeError(f"{name} belongs to a kind of adapter that is not supported; merge it with PEFT")
        if match:
            saved.setdefault(match["module"], {})[match["weight"]] = tensor
            adapters.add(match["adapter"])
        elif match := FACTOR.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
            adapters.add(match["adapter"])
        elif ".lora_" in name:
            raise MergeError(f"{name} is no LoRA weight that is known; merge it with PEFT")
    if len(adapters) > 1:
        raise MergeError(f"holds {len(adapters)} adapters ({', '.join(sorted(map(str, adapters)))}); one can be merged")
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or len(pair["A"].shape) != 2 or pair["A"].shape[0] != pair["B"].shape[-1]:
            raise MergeError(f"{module} has no matching pair of lora_A and lora_B; the checkpoint is damaged")
    ranks = {pair["A"].shape[0] for pair in sides.values()}
    if len(ranks) != 1:
        raise MergeError(f"LoRA ranks differ between modules ({sorted(ranks)}); merge it with PEFT")
    config, meta = _recorded(files, PEFT_RECORD), _recorded(files, LORA_META)
    rank = ranks.pop()
    for name, record in ((LORA_META, meta), (PEFT_RECORD, config)):
        if record.get("r", rank) != rank:
            raise MergeError(f"{name} says r = {record['r']}, but the weights have r = {rank}; mend the file")
    other = next((name for name in OTHER_SUMS if config.get(name)), None)
    if other:
        raise MergeError(
            f"{PEFT_RECORD} has {other} {json.dumps(config[other])[:60]}, which is not supported; merge it "
            "with PEFT")
    recorded = {**config, **meta}
    chosen = alpha if alpha is not None else recorded.get("lora_alpha")
    factors = {module: (pair["A"], pair["B"]) for module, pair in sides.items()}
    more = next((f"{name} {json.dumps(config[name])[:60]}"
                 for name in MORE_TENSORS if config.get(name) not in (None, "none", [], {})), "")
    return Lora(factors, saved, rank, chosen, recorded.get("task_type"), bool(config.get("use_rslora")), more)


def _recorded(files: RankFiles, name: str) -> dict[str, Any]:
    path = files.find(name)
    if path is None:
        return {}
    try:
        return read_object(path, files.seen)
    except OSError as error:
        raise MergeError(f"cannot read {path}: {error.strerror}") from error


def known_alpha(lora: Lora) -> float:
    """Return alpha.

    Raises:
        MergeError: it is not recorded, or no number, or 0, which would leave the base model as it is.
    """
    if not isinstance(lora.alpha, (int, float)) or not 0 < abs(lora.alpha) <= sys.float_info.max:
        found = "is not recorded" if lora.alpha is None else f"is recorded as {json.dumps(lora.alpha)}"
        raise MergeError(f"lora_alpha {found} ({LORA_META}, {PEFT_RECORD}); pass the training's with --lora-alpha")
    return lora.alpha


def fuse(tensors: Mapping[str, Tensor], lora: Lora) -> dict[str, tuple[Tensor, Fusion | None]]:
    """Return the base model's tensors by their plain names, those with LoRA factors with their fusion."""
    scale = lora.scale
    fused: dict[str, tuple[Tensor, Fusion | None]] = {}
    for name, tensor in tensors.items():
        if match := SAVED.fullmatch(name):
            name = f"{match['module']}.{match['weight']}"
        elif ".lora_" in name or (ORIGINAL in name and name.partition(ORIGINAL)[0] in lora.saved):
            continue
        module, _, kind = name.rpartition(".")
        layer = module.removesuffix(".base_layer")
        fusion = None
        if kind == "weight" and layer in lora.factors:
            a, b = lora.factors[layer]
            if tensor.shape != (b.shape[0], a.shape[1]):
                raise MergeError(f"{name} of shape {list(tensor.shape)} does not fit lora_B {list(b.shape)} @ lora_A "
                                 f"{list(a.shape)}")
            fusion = Fusion(a, b, scale)
        fused[f"{layer}.{kind}".removeprefix(PREFIX)] = (tensor, fusion)
    lost = [layer for layer in lora.factors if f"{layer}.weight".removeprefix(PREFIX) not in fused]
    if lost:
        raise MergeError(f"the base weight of {lost[0]} is not in the checkpoint; use --lora adapter")
    return fused


def adapter(lora: Lora) -> dict[str, Tensor]:
    """Return the adapter's tensors by the names that PEFT loads.

    Raises:
        MergeError: alpha is not known, or more was trained than the adapter would hold.
    """
    known_alpha(lora)
    if lora.more:
        raise MergeError(
            f"{PEFT_RECORD} has {lora.more}, which --lora adapter would leave out; use --lora fuse, or save "
            "the adapter with PEFT")
    factors = {
        f"{module}.lora_{side}.weight": tensor
        for module, pair in lora.factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    return factors | {
        f"{module}.{weight}": tensor
        for module, tensors in lora.saved.items()
        for weight, tensor in tensors.items()
    }


def adapter_config(lora: Lora, tensors: Mapping[str, Tensor], base_model: str | None) -> dict[str, Any]:
    """Return `adapter_config.json` (https://huggingface.co/docs/peft/package_reference/lora)."""
    names = list(tensors)
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": target_modules(list(lora.saved), names) or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": target_modules(list(lora.factors), names),
        "task_type": lora.task_type,
        "use_rslora": lora.rank_stabilized,
    }


def target_modules(modules: list[str], names: list[str]) -> list[str]:
    """Return the shortest names that PEFT matches to exactly `modules`: last parts, or whole paths where those say more.

    >>> target_modules(["base_model.model.a.q", "base_model.model.b.q"], ["base_model.model.a.k.weight"])
    ['q']
    >>> target_modules(["base_model.model.a.q"], ["base_model.model.b.q.weight"])
    ['a.q']
    """
    parts = {module.rpartition(".")[2] for module in modules}
    others = {name.rpartition(".")[0] for name in names if ".lora_" not in name and ".base_layer." not in name}
    if any(other.rpartition(".")[2] in parts for other in others):
        return sorted(module.removeprefix(PREFIX) for module in modules)
    return sorted(parts)
