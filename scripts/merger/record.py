"""`merge.json`: what was merged from what, how, and by which versions."""
import os
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any

from merger import DTYPES, NAMES, MergeError, __version__
from merger.base import OverBase, with_base_files
from merger.companions import weights_in
from merger.copying import Tally
from merger.discover import RankFiles
from merger.filenames import RECORD, weight_index
from merger.foreign.documents import read_object
from merger.foreign.files import Seen
from merger.job import Job, Options

NUMBERS = ("world_size", "tensors", "parameters", "fused", "nan", "inf", "threads", "bytes_read", "bytes_written",
           "seconds")  # yapf: disable

BEFORE = {"names": "memory", "model_key": None, "base_model": None}  # how it was before there was a choice


def sources(files: RankFiles) -> list[dict[str, Any]]:
    """Return the ranks' files with their sizes (bytes) and times of change (ns since 1970)."""
    found = []
    for rank, path in sorted(files.paths.items()):
        identity = files.seen.identity(path)
        found.append({
            "file": path.name,
            "folder": os.path.realpath(path.parent),
            "rank": rank,
            "bytes": identity.size,
            "modified": identity.modified
        })
    return found


def base_sources(files: RankFiles, folder: str | None) -> list[dict[str, Any]]:
    """Return the files of the base model in `folder` as `sources` does those of the ranks, `files`."""
    if not folder:
        return []
    read = with_base_files(files, Path(folder))
    return [{key: value for key, value in source.items() if key != "rank"}
            for source in sources(read) if source["rank"] not in files.paths]  # yapf: disable


def requested(options: Options) -> dict[str, Any]:
    """Return those of the user's choices that the output's bytes depend on."""
    return {
        "dtype": options.dtype,
        "lora": options.lora,
        "base_model": os.path.realpath(options.base_model) if options.base_model else None,
        "model_key": options.model_key,
        "lora_alpha": options.lora_alpha,
        "tied_weights": options.tied_weights,
        "names": options.names,
        "allow": sorted(options.allow),
    }


def make_record(job: Job, options: Options, tally: Tally, seconds: float) -> dict[str, Any]:
    """Return the record of a merge that took `seconds`."""
    checkpoint = job.checkpoint.shards if isinstance(job.checkpoint, OverBase) else job.checkpoint
    return {
        "merger": __version__,
        "versions": _versions(),
        "requested": requested(options),
        "sources": sources(checkpoint.files),
        "base_sources": base_sources(checkpoint.files, options.base_model),
        "world_size": job.checkpoint.files.world_size,
        "meshes": job.checkpoint.meshes,
        "dtype": options.dtype,
        "files": file_sizes(job),
        "tensors": len(job.outputs),
        "renamed": job.renamed,
        "fused": job.fused,
        "base_model": job.base_model,
        "parameters": job.parameters,
        "tied_dropped": job.dropped,
        "taken_from_rank": job.checkpoint.taken,
        "nan": sum(tally.nan.values()),
        "inf": sum(tally.inf.values()),
        "model_check": _check_text(job, options),
        "verified": options.verify,
        "device": job.device,
        "threads": tally.threads,
        "bytes_read": tally.bytes_read,
        "bytes_written": tally.bytes_written,
        "seconds": round(seconds, 3),
    }


def file_sizes(job: Job) -> list[dict[str, Any]]:
    """Return the output files with their sizes in bytes."""
    return [{"name": file.name, "bytes": file.size} for file in job.files]  # yapf: disable


def _check_text(job: Job, options: Options) -> str:
    if job.verdict is None:
        return "not made (an adapter)"
    if job.verdict.silent:
        return f"not made: {job.verdict.silent}"
    allowed = ", or allowed" if "keys" in options.allow else ""
    return f"keys and shapes as transformers {job.verdict.transformers} expects{allowed}"


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "safetensors", "numpy", "ml_dtypes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_record(folder: Path, seen: Seen | None = None) -> dict[str, Any]:
    """Return the record in `folder`.

    Raises:
        MergeError: there is none, or it is damaged.
    """
    path = folder / RECORD
    try:
        record = read_object(path, seen or Seen())
        if isinstance(record["requested"], dict):
            for name, value in BEFORE.items():
                record["requested"].setdefault(name, value)
        if not _is_request(record["requested"]) or not _is_record(record):
            raise ValueError("it is of another version, or damaged")
        return record
    except FileNotFoundError:
        raise MergeError(f"no {path}; merge first, or name the merged folder with --save-dir") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeError(f"cannot read {path}: {error}; merge again with --force") from error


def _is_request(value: Any) -> bool:
    """Return True if `value` is what `requested` returns for some options."""
    return (isinstance(value, dict) and set(value) == set(requested(Options(
        ()))) and value["dtype"] in DTYPES and value["lora"] in (None, "adapter", "fuse") and value["names"] in NAMES
            and all(isinstance(value[name], (str, NoneType)) for name in ("model_key", "base_model"))
            and value["tied_weights"] in (None, "keep", "drop") and isinstance(value["lora_alpha"],
                                                                               (int, float, NoneType))
            and isinstance(value["allow"], list) and all(isinstance(name, str) for name in value["allow"]))


def _is_record(record: dict[str, Any]) -> bool:
    """Return True if all that is read of a record is of the kind that `make_record` writes."""
    texts = all(isinstance(record.get(name), str) for name in ("dtype", "model_check", "device"))
    numbers = all(_is_number(record.get(name)) for name in NUMBERS)
    return (texts and numbers and isinstance(record.get("base_model"),
                                             (str, NoneType)) and isinstance(record.get("verified"), bool)
            and _are(record.get("tied_dropped"), lambda name: isinstance(name, str))
            and _are(record.get("meshes"), lambda mesh: isinstance(mesh, dict) and all(map(_is_number, mesh.values())))
            and _are(record.get("files"), lambda file: _has(file, ("name", ), ("bytes", )))
            and _are(record.get("base_sources", []), lambda file: _has(file, ("file", "folder"), ("bytes", "modified")))
            and _are(record.get("sources"), lambda file: _has(file, ("file", "folder"), ("rank", "bytes", "modified"))))


def _are(values: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(map(fits, values))


def _has(value: Any, texts: tuple[str, ...], numbers: tuple[str, ...]) -> bool:
    return (isinstance(value, dict) and all(isinstance(value.get(name), str) for name in texts)
            and all(_is_number(value.get(name)) for name in numbers))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1 << 63


def as_requested(options: Options, record: dict[str, Any]) -> Options:
    """Return `options` with the choices that a merge was made with; a base model may lie elsewhere by now."""
    wanted = record["requested"]
    return replace(
        options, **{
            **wanted, "allow": frozenset(wanted["allow"]),
            "base_model": options.base_model or wanted["base_model"]
        })


def same_merge(options: Options, files: RankFiles, folder: Path) -> dict[str, Any] | None:
    """Return the record in `folder` if it is of the same files merged in the same way, and nothing is lost since."""
    try:
        record = read_record(folder)
    except MergeError:
        return None
    same = record["requested"] == requested(options) and record["sources"] == sources(files) and record.get(
        "base_sources", []) == base_sources(files, options.base_model)
    return record if same and is_whole(record, folder) else None


def is_whole(record: dict[str, Any], folder: Path) -> bool:
    """Return True if `folder` holds the weights that its record names, of their sizes, their index, and no others."""
    found = weights_in(folder)
    files = [{"name": name, "bytes": (folder / name).stat().st_size} for name in found if name != weight_index()]
    return record.get("files") == files and (weight_index() in found) == (len(files) > 1)
