"""LoRA weights in a sharded checkpoint (PEFT's names): write them as an adapter, or add them to the base weights.

PEFT computes base(x) + scale * b(a(x)) with scale = lora_alpha / r (Hu et al. 2021, https://arxiv.org/abs/2106.09685),
so the fused weight is base + scale * (b @ a); rank-stabilized LoRA has scale = lora_alpha / sqrt(r)
(Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
"""
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from merger import MergeError
from merger.checkpoint import Tensor
from merger.discover import RankFiles
from merger.filenames import ADAPTER_CONFIG, LORA_FOLDER, LORA_META
from merger.foreign.documents import read_object
from merger.foreign.text import printable
from merger.foreign.values import shown
from merger.plan import Fusion

PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.(?:(?P<adapter>[^.]+)\.)?weight")
# A module that is trained whole, such as a critic's head: PEFT keeps the base model's beside it.
SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<weight>.+)")
ORIGINAL = ".original_module."
PEFT_RECORD = f"{LORA_FOLDER}/{ADAPTER_CONFIG}"  # verl writes PEFT's own record there
# What an adapter may hold beside the factors, the entry of PEFT's record that says so, and what PEFT's files call it.
EXTRAS = (
    (re.compile(r"(?P<name>.+\.lora_magnitude_vector)\.(?P<adapter>[^.]+)(?:\.weight)?"), "use_dora", "{name}"),
    (re.compile(r"(?P<name>.+\.lora_B)\.(?P<adapter>[^.]+)\.bias"), "lora_bias", "{name}.bias"),
    (re.compile(r"(?P<name>.+\.lora_embedding_[AB])\.(?P<adapter>[^.]+)"), "target_modules", "{name}"),
)
# Of PEFT's record, what says nothing of how much the factors add to which weight, or is computed here. How the factors,
# and with them the base, were initialised is in the base weights that lie beside them.
HARMLESS = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "bias", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"
})  # yapf: disable
# Of the others, PEFT's defaults where those are not simply off.
DEFAULTS = {"peft_type": "LORA", "megatron_core": "megatron.core", "qalora_group_size": 16}
# Entries that PEFT leaves empty where a training names them elsewhere.
OPEN = ("base_model_name_or_path", "task_type", "modules_to_save")
# What trains tensors that are no LoRA weights; an adapter of ours would lack them.
MORE_TENSORS = ("bias", "trainable_token_indices")
# How factors may be initialised without a change of the base weights; all other ways take something off those.
BASE_KEPT = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Lora:
    """The LoRA part of a checkpoint: (a of shape (r, in), b of shape (out, r)) by module, and its hyperparameters.

    Attributes:
        factors: by module.
        saved: the modules that were trained whole: by module, the tensors by their name in it.
        extras: what else an adapter holds, by the names in PEFT's files.
        rank, alpha, task_type: of the record, or the weights and the flag.
        record: PEFT's own record; empty where there is none.
    """
    factors: dict[str, tuple[Tensor, Tensor]]
    saved: dict[str, dict[str, Tensor]]
    extras: dict[str, Tensor]
    rank: int
    alpha: float | None
    task_type: str | None
    record: dict[str, Any]

    @property
    def scale(self) -> float:
        """What b @ a is multiplied with."""
        return known_alpha(self) / (math.sqrt(self.rank) if self.record.get("use_rslora") else self.rank)


def has_lora(tensors: Mapping[str, Tensor]) -> bool:
    """Return True if any name is a LoRA weight's."""
    return any(".lora_" in name for name in tensors)


def read_lora(tensors: Mapping[str, Tensor], files: RankFiles, alpha: float | None) -> Lora:
    """Collect the factors; take r from their shapes and alpha from the flag, `lora_train_meta.json` or PEFT's record.

    Raises:
        MergeError: half a pair, several adapters, ranks that differ unasked, records that disagree.
    """
    record, meta = _recorded(files, PEFT_RECORD), _recorded(files, LORA_META)
    sides: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    adapters = set()
    for name, tensor in tensors.items():
        if match := SAVED.fullmatch(name):
            if ".lora_" in name:
                raise MergeError(f"{name} belongs to a kind of adapter that is not supported; merge it with PEFT")
            saved.setdefault(match["module"], {})[match["weight"]] = tensor
            adapters.add(match["adapter"])
        elif match := FACTOR.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
            adapters.add(match["adapter"])
        elif ".lora_" in name:
            adapters.add(_add_extra(name, tensor, record, extras))
    if len(adapters) > 1:
        raise MergeError(f"holds {len(adapters)} adapters ({', '.join(sorted(map(str, adapters)))}); one can be merged")
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or len(pair["A"].shape) != 2 or pair["A"].shape[0] != pair["B"].shape[-1]:
            raise MergeError(f"{module} has no matching pair of lora_A and lora_B; the checkpoint is damaged")
    factors = {module: (pair["A"], pair["B"]) for module, pair in sides.items()}
    rank = _rank(factors, record, meta)
    recorded = {**record, **meta}
    if alpha is None and {"lora_alpha"} <= set(record) & set(meta) and record["lora_alpha"] != meta["lora_alpha"]:
        raise MergeError(f"{PEFT_RECORD} says lora_alpha {shown(record['lora_alpha'])}, {LORA_META} "
                         f"{shown(meta['lora_alpha'])}; pass the training's with --lora-alpha")
    task = recorded.get("task_type")
    return Lora(factors, saved, extras, rank, alpha if alpha is not None else recorded.get("lora_alpha"),
                task if isinstance(task, str) else None, record)  # yapf: disable


def _add_extra(name: str, tensor: Tensor, record: Mapping[str, Any], extras: dict[str, Tensor]) -> str:
    """Note a tensor of an adapter that is no factor; return the adapter's name."""
    for pattern, entry, known in EXTRAS:
        if match := pattern.fullmatch(name):
            if not record.get(entry):
                raise MergeError(
                    f"{name} belongs to a kind of adapter that is not supported without PEFT's record of it "
                    f"({PEFT_RECORD} with {entry}); copy that there, or merge it with PEFT")
            extras[known.format(name=match["name"])] = tensor
            return match["adapter"]
    raise MergeError(f"{name} is no LoRA weight that is known; merge it with PEFT")


def _rank(factors: Mapping[str, tuple[Tensor, Tensor]], record: Mapping[str, Any], meta: Mapping[str, Any]) -> int:
    """Return r, of which the weights and each record must say the same, but where PEFT's record makes it differ."""
    ranks = {a.shape[0] for a, _ in factors.values()}
    if record.get("rank_pattern") or record.get("target_parameters") or (record and not factors):
        rank = record.get("r")
        if type(rank) is not int or rank < 1:
            raise MergeError(f"{PEFT_RECORD} says r = {shown(rank)}, which is none; mend the file")
        return rank
    if len(ranks) != 1:
        raise MergeError(f"LoRA ranks differ between modules ({sorted(ranks)}); merge it with PEFT")
    rank = ranks.pop()
    for name, told in ((LORA_META, meta), (PEFT_RECORD, record)):
        if told.get("r", rank) != rank:
            raise MergeError(f"{name} says r = {shown(told['r'])}, but the weights have r = {rank}; mend the file")
    return rank


def check_fusable(lora: Lora) -> None:
    """Refuse what changes the sum, or may: PEFT's record grows with each release.

    Raises:
        MergeError: naming the first entry that is neither PEFT's default nor known to be harmless.
    """
    for name, value in lora.record.items():
        default = DEFAULTS.get(name)
        off = value is None or value is False or value in ("", [], {})
        if name not in HARMLESS and not (value == default if default is not None else off):
            raise MergeError(
                f"{PEFT_RECORD} has {name} {printable(json.dumps(value), 60)}, which is not supported; use "
                "--lora adapter, or merge it with PEFT")
    if lora.extras:
        raise MergeError(f"{next(iter(lora.extras))} is not computed; use --lora adapter, or merge it with PEFT")


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
    check_fusable(lora)
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
        raise MergeError(f"{lost[0].removeprefix(PREFIX)} has LoRA weights, but its base weight is not there; name the "
                         "folder of the model that was trained with --base-model DIR, or use --lora adapter")
    return fused


def is_alone(tensors: Mapping[str, Tensor]) -> bool:
    """Return True if all tensors are an adapter's, and no base weight is among them."""
    return all(".lora_" in name or SAVED.fullmatch(name) for name in tensors)


def check_alone(tensors: Mapping[str, Tensor], files: RankFiles) -> None:
    """Refuse what is no adapter alone, or one that is not whole without what its training made of the base weights.

    Raises:
        MergeError: naming what is there or lacking.
    """
    if not has_lora(tensors):
        raise MergeError("the checkpoint holds no LoRA weights; leave --lora and --base-model out")
    if not is_alone(tensors):
        name = next(name for name in tensors if ".lora_" not in name and not SAVED.fullmatch(name))
        raise MergeError(f"the checkpoint holds base weights itself ({name}); leave --base-model out")
    record = _recorded(files, PEFT_RECORD)
    start = record.get("init_lora_weights", True)
    if type(start) not in (bool, str) or start not in BASE_KEPT:
        raise MergeError(
            f"{PEFT_RECORD} has init_lora_weights {printable(json.dumps(start), 60)}, which changes the base weights before "
            "the training, and those are not in the checkpoint; merge it with PEFT")
    if record.get("bias") not in (None, "none"):
        raise MergeError(
            f"{PEFT_RECORD} has bias {shown(record['bias'])}, and the checkpoint does not hold the biases that "
            "were trained; save it whole")


def check_saved(tensors: Mapping[str, Tensor], base: Iterable[str], files: RankFiles) -> None:
    """Refuse an adapter without a module that was trained whole and that the base model, of tensors `base`, has.

    PEFT's record also names some that only other models have.

    Raises:
        MergeError: naming the module.
    """
    saved = {match["module"] for name in tensors if (match := SAVED.fullmatch(name))}
    listed = _recorded(files, PEFT_RECORD).get("modules_to_save") or []
    if type(listed) is not list:
        raise MergeError(f"{PEFT_RECORD} has modules_to_save {shown(listed)}, which is no list; mend the file")
    for module in {name.rpartition(".")[0] for name in base}:
        for name in listed:
            inside = f".{module}.".partition(f".{name}.")
            if inside[1] and not any(f".{whole}".endswith(f"{inside[0]}.{name}") for whole in saved):
                raise MergeError(
                    f"{PEFT_RECORD} says that {shown(name)} was trained whole, and the checkpoint does not "
                    "hold it; save it whole")


def adapter(lora: Lora) -> dict[str, Tensor]:
    """Return the adapter's tensors by the names that PEFT loads.

    Raises:
        MergeError: alpha is not known, or more was trained than the adapter would hold.
    """
    known_alpha(lora)
    if lora.record.get("peft_type", "LORA") != "LORA":
        raise MergeError(
            f"{PEFT_RECORD} has peft_type {shown(lora.record['peft_type'])}, which is not LoRA; save the adapter "
            "with PEFT")
    for name in MORE_TENSORS:
        if lora.record.get(name) not in (None, "none", [], {}):
            raise MergeError(
                f"{PEFT_RECORD} has {name} {printable(json.dumps(lora.record[name]), 60)}, which --lora adapter "
                "would leave out; use --lora fuse, or save the adapter with PEFT")
    factors = {
        f"{module}.lora_{side}.weight": tensor
        for module, pair in lora.factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    return factors | lora.extras | {
        f"{module}.{weight}": tensor
        for module, tensors in lora.saved.items()
        for weight, tensor in tensors.items()
    }


def adapter_config(lora: Lora, tensors: Mapping[str, Tensor], base_model: str | None) -> dict[str, Any]:
    """Return `adapter_config.json` (https://huggingface.co/docs/peft/package_reference/lora).

    Where PEFT's own record is there, that is it, whole: how an adapter is loaded may depend on any of its entries. What
    it leaves open is filled in.
    """
    names = list(tensors)
    ours = {
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
        "use_rslora": False,
    }
    kept = {name: value for name, value in lora.record.items() if value is not None or name not in OPEN}
    return {**ours, **kept, "lora_alpha": lora.alpha, "inference_mode": True}


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
