"""The model's config.json: read it, and say in it what the merged weights are."""
import copy
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from merger import MergeError
from merger.filenames import CONFIG
from merger.foreign.documents import read_object
from merger.foreign.files import Seen, check_link

CAUSAL = "ForCausalLM"
QUANTIZATION = "quantization_config"
# What no quantized model is made of alone: it has 8-bit or packed tensors, or scales beside its weights.
WHOLE_TYPES = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "bool"})
SCALES = ("weight_scale", "input_scale", "scale_inv", "scales", "qweight", "qzeros")
DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5 writes the first, 4 the second; both read the second


def read_config(folder: Path, seen: Seen | None = None) -> dict[str, Any]:
    """Return the config in `folder`.

    Raises:
        MergeError: there is none, or it is no JSON object.
    """
    path = folder / CONFIG
    try:
        return read_object(path, seen or Seen(), nonfinite=True)
    except FileNotFoundError:
        check_link(path)
        raise MergeError(f"no {path}; copy the base model's config.json (and tokenizer) there, or name its folder with "
                         "--config-dir") from None
    except OSError as error:
        raise MergeError(f"cannot read {path}: {error.strerror}") from error


def for_critic(config: dict[str, Any], names: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Return `config` naming the model that the weights `names` are of, and a note of what was changed, if anything.

    verl trains a critic as a token classifier that it makes from a causal model, and saves the causal model's config: by
    its `architectures` the head `score` would be dropped and a random `lm_head` put in its place.
    """
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    head = any(name.endswith("lm_head.weight") for name in names)
    if not isinstance(named, str) or not named.endswith(CAUSAL) or "score.weight" not in names or head:
        return config, []
    critic = named.removesuffix(CAUSAL) + "ForTokenClassification"
    return {
        **config, "architectures": [critic]
    }, [f"the weights are a critic's (score.weight): config.json names {critic}, not {named}"]


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield `config` and the configs in it, at any depth; but no quantization, whose types are its own."""
    yield config
    for key, value in config.items():
        if isinstance(value, dict) and key != QUANTIZATION:
            yield from _parts(value)


def quantized_part(dtypes: Mapping[str, str]) -> str | None:
    """Return the first of the tensors of `dtypes` (by name) that a quantized model is made of, None where there is none."""
    return next((name for name, dtype in dtypes.items() if dtype not in WHOLE_TYPES or name.endswith(SCALES)), None)


def without_quantization(config: dict[str, Any], dtypes: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return `config` without a `quantization_config` that tensors of `dtypes` (by name) are not of, and a note of it.

    A base model in FP8 or MXFP4 is trained in bfloat16 under its old config; by that its weights would be read as 8-bit
    ones whose scales are missing.
    """
    if quantized_part(dtypes):
        return config, []
    changed, methods = copy.deepcopy(config), []
    for part in _parts(changed):
        if found := part.pop(QUANTIZATION, None):
            methods.append(str(found.get("quant_method")) if isinstance(found, dict) else "damaged")
    if not methods:
        return config, []
    return changed, [f"the weights are not quantized: {CONFIG} goes without the {QUANTIZATION} ({methods[0]})"]


def with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return `config` naming `dtype`, in nested configs too where they name one; None leaves it as it is."""
    changed = copy.deepcopy(config)
    if dtype is None:
        return changed
    for part in _parts(changed):
        for key in DTYPE_KEYS:
            if key in part:
                part[key] = dtype
    if not any(key in changed for key in DTYPE_KEYS):
        changed["torch_dtype"] = dtype
    return changed


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` saying that input and output embeddings are two tensors."""
    changed = copy.deepcopy(config)
    for part in _parts(changed):
        if part is changed or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    return changed


def tied_by_config(config: dict[str, Any], names: list[str]) -> list[list[str]]:
    """Return the tied names that the config alone tells, for architectures that transformers does not know."""
    if not any(part.get("tie_word_embeddings") is True for part in _parts(config)):
        return []
    embeddings = [
        name for name in names if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
    ]
    heads = [name for name in names if name.endswith(("lm_head.weight", "embed_out.weight"))]
    return [[embeddings[0], heads[0]]] if len(embeddings) == len(heads) == 1 else []


def dump_json(value: Any) -> str:
    """Return `value` as the indented JSON that model folders hold; in ASCII, as a folder's name may be no UTF-8."""
    return json.dumps(value, indent=2) + "\n"
