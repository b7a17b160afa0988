"""Tiny models of every family that transformers' conversion mapping knows, made from its own default configs."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of a config's whole numbers, the first that fits by its name: what it becomes in a tiny model.
SIZES = (
    (("vocab", "n_words"), 96),
    (("num_experts_per_tok", "moe_topk", "top_k", "moe_k", "experts_per_tok", "num_selected"), 2),
    (("n_group", "topk_group", "num_expert_group"), 1),
    (("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    (("n_shared_experts", "num_shared_experts", "moe_num_shared"), 1),
    (("first_k_dense", "num_dense_layers", "moe_layer_start"), 1),
    (("num_key_value_heads", "kv_heads", "num_kv"), 2),
    (("attention_heads", "num_heads", "n_head", "attn_heads"), 4),
    (("head_dim", "key_dim", "value_dim", "qk_nope", "qk_rope", "v_head"), 8),
    (("lora_rank", ), 16),
    (("hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers", "depth", "num_stages"), 2),
    (("intermediate", "ffn_dim", "mlp_dim", "ffn_hidden", "inner_dim"), 48),
    (("hidden_size", "d_model", "embed_dim", "hidden_dim", "out_hidden", "projection_dim", "text_dim"), 32),
    (("max_position", "max_source", "max_target"), 64),
)

# What no rule of names gives: by model type.
EXTRA: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "moe_intermediate_size": 16},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 4, "mamba_dt_rank": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
}  # yapf: disable


def sized(config: Any, kv_heads: int) -> dict[str, Any]:
    """Return the entries of a config that make it tiny."""
    found: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            found[name] = min(value, 7)
        elif type(value) is int and value >= 3:
            size = next((size for words, size in SIZES if any(word in name for word in words)), None)
            if size is not None:
                found[name] = min(kv_heads if (size == 2 and "kv" in name) or "key_value" in name else size, value)
    return found


def tiny_config(config_class: Any, kv_heads: int = 2, depth: int = 0) -> Any:
    """Return a config of `config_class` that makes a small model, its parts' configs too."""
    whole = config_class()
    entries = sized(whole, kv_heads)
    for name, value in vars(whole).items():
        if hasattr(value, "to_dict") and depth < 3:
            entries[name] = tiny_config(type(value), kv_heads, depth + 1)
    layers = entries.get("num_hidden_layers")
    if layers and isinstance(whole.to_dict().get("layer_types"), list):
        kinds = list(dict.fromkeys(whole.layer_types))
        entries["layer_types"] = (kinds * layers)[:max(layers, len(kinds))]
        entries["num_hidden_layers"] = len(entries["layer_types"])
    entries |= EXTRA.get(config_class.model_type, {})
    with contextlib.suppress(Exception):
        return config_class(**entries)
    return config_class(**{name: value for name, value in entries.items() if type(value) is not list})


def tiny_model(name: str) -> Any:
    """Return a model on the meta device of the class that a name of the mapping is about; None where there is none.

    Raises:
        Exception: the rules of this module make no config of it that its family takes.
    """
    import torch
    model_class = next(classes_of(name), None)
    if model_class is None:
        return None
    fault: Exception | None = None
    for kv_heads in (2, 4, 1):
        try:
            with torch.device("meta"):
                return model_class(tiny_config(model_class.config_class, kv_heads))
        except Exception as error:
            fault = fault or error
    raise fault or ValueError(name)


# What the mapping must not lose: the mixtures of experts and vision models that people train.
REQUIRED = ("mixtral", "minimax", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4v_moe",
            "olmoe", "flex_olmo", "phimoe", "hunyuan_v1_moe", "ernie4_5_moe", "dots1", "granitemoe", "jamba", "lfm2_moe",
            "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "qwen3_vl_moe", "gemma3", "llava",
            "llava_next", "internvl", "mistral3", "paligemma", "aya_vision", "kimi_k25")  # yapf: disable
LARGEST = 4_000_000  # elements of a model that is tiny


def is_tiny(name: str) -> bool:
    """Return True if a tiny model can be made of what a name of the mapping is about."""
    with contextlib.suppress(Exception):  # by the rules above
        model = tiny_model(name)
        return model is not None and sum(value.numel() for value in model.state_dict().values()) <= LARGEST
    return False


def was_sharded(folder: Path) -> bool:
    """Return True if FSDP2 takes the model in `folder`."""
    return any((folder / "actor").glob("*.pt"))


def known() -> list[str]:
    """Return the model types and class names that the mapping of the installed transformers has."""
    from transformers import conversion_mapping
    return sorted(conversion_mapping._build_checkpoint_conversion_mapping().keys() - {"legacy"})


def classes_of(name: str) -> Iterator[Any]:
    """Yield the model classes that a name of the mapping is about, with a head first."""
    import transformers
    from transformers.models.auto import modeling_auto as auto
    if hasattr(transformers, name):
        yield getattr(transformers, name)
    for table in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
                  auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, auto.MODEL_MAPPING_NAMES):  # yapf: disable
        architecture = table.get(name)
        for one in [architecture] if isinstance(architecture, str) else architecture or ():
            if hasattr(transformers, one):
                yield getattr(transformers, one)


WRITER = """
import json, sys
import torch.multiprocessing as mp
from tests.merger import families
if __name__ == "__main__":
    names, folder, world = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    families.write_references(names, folder)
    mp.start_processes(families.write_rank, (names, folder, world), nprocs=world, start_method="fork")
"""


def seeded(name: str, folder: Path) -> Any:
    """Return the tiny model `name` with random weights, which are those of every process that asks for them."""
    import torch
    config = type(tiny_model(name)).config_class.from_pretrained(folder / name / "actor/huggingface")
    model = next(classes_of(name))(config)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator))
    return model


def write_references(names: list[str], folder: str) -> None:
    """Write for each name its config, where a checkpoint has it, and what transformers saves of the whole model."""
    for name in names:
        place = Path(folder)
        model = tiny_model(name)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(place / name / "actor/huggingface")
        model = seeded(name, place)
        model.save_pretrained(place / name / "saved", state_dict=model.state_dict())


def write_rank(rank: int, names: list[str], folder: str, world: int) -> None:
    """Shard each model over gloo ranks with FSDP2, and write this rank's file of it."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world, ), mesh_dim_names=("fsdp", ))
    for name in names:
        model = seeded(name, Path(folder))
        layers = [layer for part in model.modules() if isinstance(part, nn.ModuleList) for layer in part]
        with contextlib.suppress(ValueError):  # FSDP2 takes no parameters without a dimension
            for module in (*layers[:4], model):
                fully_shard(module, mesh=mesh)
            torch.save(model.state_dict(), f"{folder}/{name}/actor/model_world_size_{world}_rank_{rank}.pt")
    dist.destroy_process_group()


def write_families(folder: Path, names: list[str], world: int = 3) -> None:
    """Write for each name a checkpoint of `world` ranks, and what transformers saves of the whole model beside it."""
    import json
    import subprocess
    import sys

    from tests.merger.merging import ROOT, SCRIPTS
    done = subprocess.run([sys.executable, "-c", WRITER, json.dumps(names), str(folder), str(world)],
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{SCRIPTS}", "TRANSFORMERS_VERBOSITY": "error"},
                          capture_output=True, text=True, timeout=900)  # yapf: disable
    assert done.returncode == 0, done.stderr[-3000:]
