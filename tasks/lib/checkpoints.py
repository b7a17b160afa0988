"""What a folder with a checkpoint holds: where its merged model is or will be, and what the evaluation calls it."""
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.lib.errors import UserError
from training import foreign

RANK_FILE = re.compile(r"model_world_size_\d+_rank_\d+\.pt")
# The files of torch's own forms, which the merger reads too, and where the shards may lie below a step.
SHARD_FILE = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors")
DCP_SUFFIX, MEGATRON = ".distcp", "common.pt"
BELOW = ("policy", "actor/policy", "pytorch_model_fsdp_0", "pytorch_model_fsdp", "sharded", "model", "trainer", "dcp")
MERGED = "huggingface"
RECORD = "merge.json"
CONTENTS = "ckpt_contents.json"  # of verl's Megatron layout: where the weights are
# Folders whose names say nothing about the model in them.
PLACES = ("saves", "models", MERGED)
NAME_PARTS = 3


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that can be served.

    Attributes:
        model: the Hugging Face folder; it is not there yet where `merge` is set.
        shards: the folder with the ranks' files, or None where there are none.
        merge: whether the shards must be merged first.
        force: whether a merge of earlier shards is in the way.
    """
    model: Path
    shards: Path | None = None
    merge: bool = False
    force: bool = False


def find(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`: shards, a step's folder with `actor`, or a Hugging Face model.

    Raises:
        UserError: there is none, in one line.
    """
    if not folder.is_dir():
        raise UserError(f"--checkpoint {folder}: no such folder; name one with shards, or a Hugging Face model")
    shards = next((place for place in (folder, *(folder / name for name in (*BELOW, "actor"))) if shard_files(place)),
                  None)
    if shards is None:
        actor = folder / "actor"
        for place in (folder, folder / MERGED, *listed(folder), actor / MERGED, *listed(actor)):
            if has_weights(place):
                return Checkpoint(place)
        below = sorted((path.parent for path in folder.glob("global_step_*/actor/*.pt")), key=step_of)
        raise UserError(
            f"--checkpoint {folder}: neither shards (model_world_size_*_rank_*.pt, *.distcp) nor a Hugging Face model "
            f"(config.json, *.safetensors); " +
            (f"did you mean {below[-1]}?" if below else "name a folder such as …/global_step_100/actor"))
    model = shards / MERGED
    if not any(model.glob("*.safetensors")):
        return Checkpoint(model, shards, merge=True)
    if not (model / RECORD).is_file():
        raise UserError(
            f"{model} holds weights that are no merge of these shards; name it with --checkpoint to evaluate "
            f"them, or `invoke merge --local-dir {shards} --force`")
    current = is_current(model, shards)
    return Checkpoint(model, shards, merge=not current, force=not current)


def listed(actor: Path) -> list[Path]:
    """Return the folders in `actor` that the manifest of verl's Megatron layout names; none where there is no manifest."""
    try:
        contents = foreign.read_object(actor / CONTENTS).get("contents")
    except (OSError, ValueError):
        return []
    entries = contents.values() if isinstance(contents, dict) else ()
    names = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return [actor / name for name in names
            if isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts]  # yapf: disable


def step_of(actor: Path) -> int:
    """Return the step of a checkpoint's actor folder: global_step_100/actor is 100."""
    found = re.search(r"\d+$", actor.parent.name)
    return int(found[0]) if found else -1


def rank_files(folder: Path) -> list[Path]:
    """Return the ranks' files in `folder`, in the order of their names."""
    return sorted(path for path in folder.glob("*.pt") if RANK_FILE.fullmatch(path.name))


def shard_files(folder: Path) -> list[Path]:
    """Return the files in `folder` that a merge would read, in the order of their names: the ranks', or of torch's own forms."""
    if found := rank_files(folder):
        return found
    paths = sorted(folder.glob("*"))
    if found := [path for path in paths if SHARD_FILE.fullmatch(path.name)]:
        return found
    return [] if (folder / MEGATRON).exists() else [path for path in paths if path.suffix == DCP_SUFFIX]


def has_weights(folder: Path) -> bool:
    """Tell whether `folder` is a Hugging Face model."""
    return (folder / "config.json").is_file() and any(not SHARD_FILE.fullmatch(path.name)
                                                      for path in folder.glob("*.safetensors"))


def is_current(model: Path, shards: Path) -> bool:
    """Tell whether `model` was merged, in whatever way, from the files that `shards` holds now, and a base as it is now."""
    try:
        record = foreign.read_object(model / RECORD)
        merged = sorted((file["file"], file["bytes"], file["modified"]) for file in record["sources"])
        base = [(Path(file["folder"], file["file"]), file["bytes"], file["modified"])
                for file in record.get("base_sources", [])]
    except (ValueError, KeyError, TypeError):
        return False
    # The folder is left out: a merge in a container knows it by another name. So is a base that is not here.
    return merged == [_identity(path) for path in shard_files(shards)] and all(
        _identity(path)[1:] == (size, modified) for path, size, modified in base if path.exists())


def _identity(path: Path) -> tuple[str, int, int]:
    return path.name, path.stat().st_size, path.stat().st_mtime_ns


def served_name(model: Path) -> str:
    """Return the name that the evaluation gives to the weights in `model`: readable, and another for other files.

    The same files give the same name, so that an evaluation of them resumes.
    """
    digest = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return f"{label(model)}-{digest.hexdigest()[:8]}"


def label(model: Path) -> str:
    """Return the readable part of the name: x-global_step_100-actor."""
    parts = list(model.resolve().parts[1:])
    for place in ("saves", "models"):
        if place in parts[:-1]:
            parts = parts[len(parts) - parts[::-1].index(place):]
    kept = [part for part in parts if part not in PLACES][-NAME_PARTS:]
    return re.sub(r"[^\w.]+", "-", "-".join(kept), flags=re.ASCII).strip("-.") or "model"


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return foreign.read_object(path, nonfinite=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def check(model: Path) -> int:
    """Return how many tokens the model's context has; 0 where its config does not say.

    Raises:
        UserError: the model cannot hold a conversation; with the remedy.
    """
    config = read_json(model / "config.json")
    positions = {"max_position_embeddings": foreign.is_count}
    if fault := foreign.misfit(config, {"architectures": [foreign.is_text], "text_config": positions, **positions}):
        raise UserError(f"{model / 'config.json'}: {fault}")
    kind = ", ".join(config.get("architectures") or ["model of no architecture"])
    if not re.search("CausalLM|ConditionalGeneration|LMHead", kind):
        raise UserError(f"{model} is a {kind}, which writes no text; name the actor's folder")
    if not (model / "tokenizer_config.json").is_file():
        raise UserError(
            f"{model} has no tokenizer; copy tokenizer.json and tokenizer_config.json of the base model there")
    if "chat_template" not in read_json(model / "tokenizer_config.json") and not any(model.glob("chat_template*")):
        raise UserError(
            f"{model} has no chat template; copy chat_template.jinja or tokenizer_config.json of an instruct "
            "model there")
    places = (config, config.get("text_config") or {})  # of a model that sees, the second
    return next((place["max_position_embeddings"] for place in places if place.get("max_position_embeddings")), 0)
