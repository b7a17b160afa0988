"""The whole of a merge: check everything, then write, verify and publish."""
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from merger import MergeError, __version__, hub, lora, model_check, publish, show, verify
from merger.checkpoint import Checkpoint, Tensor, read_checkpoint
from merger.copying import HostConverter, Tally, default_threads, write_files
from merger.discover import MERGED, RankFiles, find_checkpoint
from merger.dtypes import output_dtype
from merger.gpu import TorchConverter, check_device
from merger.model_check import Verdict, complaint
from merger.modelconfig import CONFIG_NAME, dump_json, read_config, tied_by_config, untied, with_dtype
from merger.plan import BLOCK_BYTES, INDEX_NAME, Fusion, Output, OutputFile, index_json, split_files

ADAPTER_FOLDER = "lora_adapter"
MODEL_STEM = "model"

Named = dict[str, tuple[Tensor, Fusion | None]]


@dataclass(frozen=True)
class Options:
    """What the user asked for; `allow` holds names of checks whose finding is accepted: `keys`, `nonfinite`."""
    local_dirs: tuple[str, ...]
    save_dir: str | None = None
    dtype: str = "bfloat16"
    device: str = "auto"
    max_shard_size: int = 5_000_000_000
    threads: int = 0
    lora: str | None = None
    lora_alpha: float | None = None
    tied_weights: str | None = None
    verify: bool = False
    force: bool = False
    allow: frozenset[str] = frozenset()
    trust_remote_code: bool = False
    hf_upload_path: str | None = None
    private: bool = False
    quiet: bool = False


@dataclass
class Job:
    """A merge that passed its checks and can be carried out.

    Attributes:
        files: the output files with every tensor's place.
        config_dir: where config and tokenizer come from.
        texts: files to write beside the weights, by name.
        dropped: tied copies that are left out.
        verdict: what the config check found, or None where none was made (an adapter has no model config).
    """
    checkpoint: Checkpoint
    files: list[OutputFile]
    target: Path
    config_dir: Path
    stem: str
    device: str
    texts: dict[str, str]
    dropped: list[str]
    verdict: Verdict | None
    base_model: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def outputs(self) -> list[Output]:
        """The tensors to write."""
        return [output for file in self.files for output, _ in file.tensors]

    @property
    def nbytes(self) -> int:
        """The bytes to write."""
        return sum(file.size for file in self.files)


def prepare(options: Options) -> Job:
    """Make every check that comes before the first byte is written.

    Raises:
        MergeError: the first fault found.
    """
    device = check_device(options.device)
    files = find_checkpoint(options.local_dirs)
    target = target_folder(options, files)
    publish.check_target(target)
    present = publish.weights_in(target)
    if present and not options.force:
        raise MergeError(f"{target} already holds weights ({present[0]}); pass --force to replace them, or another "
                         "--save-dir")
    if options.lora == "adapter":
        return _prepare_adapter(options, read_checkpoint(files), target, device)
    config_dir = config_folder(files)
    config = read_config(config_dir)
    checkpoint = read_checkpoint(files)
    named = _plain_weights(options, checkpoint)
    verdict = model_check.ask(config_dir, {
        name: tensor.shape
        for name, (tensor, _) in named.items()
    }, options.trust_remote_code)
    notes = list(checkpoint.notes)
    if verdict.unknown:
        notes.append(f"keys were not checked against a model: {verdict.unknown}")
    elif "keys" not in options.allow and (fault := complaint(verdict, config, config_dir / CONFIG_NAME)):
        raise MergeError(fault)
    config, dropped = _resolve_ties(options, config, named, verdict)
    outputs = _outputs(options, named, dropped)
    written = {output.dtype for output in outputs if output.dtype in ("float64", "float32", "float16", "bfloat16")}
    config = with_dtype(config, written.pop() if len(written) == 1 else None)
    files_out = split_files(outputs, options.max_shard_size)
    _check_space(target, files_out)
    return Job(checkpoint, files_out, target, config_dir, MODEL_STEM, device, {CONFIG_NAME: dump_json(config)},
               sorted(dropped), verdict,
               config.get("_name_or_path") or None, notes)


def _prepare_adapter(options: Options, checkpoint: Checkpoint, target: Path, device: str) -> Job:
    if not lora.has_lora(checkpoint.tensors):
        raise MergeError("--lora adapter: the checkpoint holds no LoRA weights; leave the flag out")
    found = lora.read_lora(checkpoint.tensors, checkpoint.files, options.lora_alpha)
    outputs = [
        Output(name, tensor, output_dtype(tensor.dtype, options.dtype)) for name, tensor in lora.adapter(found).items()
    ]
    files_out = split_files(outputs, sum(output.nbytes for output in outputs), lora.ADAPTER_STEM)
    _check_space(target, files_out)
    config_dir = next((folder / MERGED for folder in checkpoint.files.folders if (folder / MERGED).is_dir()), target)
    base = read_config(config_dir).get("_name_or_path") if (config_dir / CONFIG_NAME).is_file() else None
    texts = {"adapter_config.json": dump_json(lora.adapter_config(found, checkpoint.tensors, base or None))}
    return Job(checkpoint, files_out, target, target, lora.ADAPTER_STEM, device, texts, [], None, base or None,
               list(checkpoint.notes))


def _plain_weights(options: Options, checkpoint: Checkpoint) -> Named:
    """Return the weights by the names that they are saved under."""
    if lora.has_lora(checkpoint.tensors):
        found = lora.read_lora(checkpoint.tensors, checkpoint.files, options.lora_alpha)
        if options.lora is None:
            raise MergeError(
                f"holds LoRA weights (r = {found.rank} on {len(found.factors)} modules); pass --lora adapter "
                "to save the adapter, or --lora fuse to add it to the base weights")
        return lora.fuse(checkpoint.tensors, found)
    if options.lora is not None:
        raise MergeError(f"--lora {options.lora}: the checkpoint holds no LoRA weights; leave the flag out")
    return {name: (tensor, None) for name, tensor in checkpoint.tensors.items()}


def _resolve_ties(options: Options, config: dict[str, Any], named: Named,
                  verdict: Verdict) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the config, and of each tied group the copies to leave out with the name that stands for them.

    That their bytes are equal is seen while the first is copied, unless the user has decided.
    """
    groups = tied_by_config(config, list(named)) if verdict.unknown else verdict.tied
    dropped = {}
    for group in groups:
        first, *copies = [name for name in group if name in named] or [""]
        if copies and options.tied_weights == "keep":
            config = untied(config)
        else:
            dropped.update(dict.fromkeys(copies, first))
    return config, dropped


def _outputs(options: Options, named: Named, dropped: dict[str, str]) -> list[Output]:
    twins = {} if options.tied_weights == "drop" else {first: named[copy][0] for copy, first in dropped.items()}
    for name, twin in twins.items():
        if (twin.dtype, twin.shape) != (named[name][0].dtype, named[name][0].shape):
            raise MergeError(f"the config ties {twin.name} to {name}, but they are of different type or shape; pass "
                             "--tied-weights keep or --tied-weights drop")
    return [
        Output(name, tensor, output_dtype(tensor.dtype, options.dtype), fusion, twins.get(name))
        for name, (tensor, fusion) in named.items() if name not in dropped
    ]


def config_folder(files: RankFiles) -> Path:
    """Return the folder with the checkpoint's config.json: `huggingface/`, or beside the ranks' files."""
    candidates = [path for folder in files.folders for path in (folder / MERGED, folder)]
    return next((path for path in candidates if (path / CONFIG_NAME).is_file()), candidates[0])


def target_folder(options: Options, files: RankFiles) -> Path:
    """Return where the merged model goes."""
    if options.save_dir:
        return Path(options.save_dir)
    return files.folders[0] / (ADAPTER_FOLDER if options.lora == "adapter" else MERGED)


def _check_space(target: Path, files: Sequence[OutputFile]) -> None:
    existing = next(path for path in (target, *target.absolute().parents) if path.is_dir())
    needed, free = sum(file.size for file in files), shutil.disk_usage(existing).free
    if needed > free:
        raise MergeError(f"{show.size_text(needed)} are needed in {existing}, {show.size_text(free)} are free; "
                         "free space or choose another --save-dir")


def merge(options: Options) -> dict[str, Any]:
    """Merge a checkpoint; return the record that `merge.json` holds, plus the folder and the upload's address.

    Raises:
        MergeError, OSError: nothing was changed.
    """
    began = time.monotonic()
    api = hub.log_in(options.hf_upload_path) if options.hf_upload_path else None
    record = _merged_before(options) if api is not None else None
    if record is None:
        job = prepare(options)
        for note in job.notes:
            if not options.quiet:
                show.say(note)
        record = carry_out(job, options, began)
        record["folder"] = str(job.target)
    if api is not None and options.hf_upload_path:
        record["uploaded"] = hub.upload(api, Path(record["folder"]), options.hf_upload_path, options.private)
    return record


def carry_out(job: Job, options: Options, began: float) -> dict[str, Any]:
    """Write, check and publish what `prepare` planned; return the record."""
    threads = options.threads or default_threads()
    converter = HostConverter if job.device == "cpu" else partial(TorchConverter, device=job.device)
    with publish.Staging(job.target) as staging:
        publish.copy_companions(job.target, staging.folder)
        publish.copy_companions(job.config_dir, staging.folder)
        with show.progress("merging", job.nbytes, options.quiet) as step:
            tally = write_files(job.checkpoint, job.files, staging.folder, threads, step, converter)
        _check_finite(options, tally)
        index = index_json(job.files)
        if index is not None:
            (staging.folder / INDEX_NAME).write_bytes(index)
        for name, text in job.texts.items():
            (staging.folder / name).write_text(text)
        if options.verify:
            _verify(job, options, staging.folder, threads)
        record = _record(job, options, tally, threads, time.monotonic() - began)
        (staging.folder / publish.RECORD_NAME).write_text(dump_json(record))
        card = staging.folder / hub.CARD_NAME
        if options.hf_upload_path and not card.exists():
            card.write_text(hub.model_card(record, job.base_model))
        staging.publish()
    return record


def _check_finite(options: Options, tally: Tally) -> None:
    if "nonfinite" in options.allow or not (tally.nan or tally.inf):
        return
    name = next(iter({**tally.nan, **tally.inf}))
    remedy = "values beyond 65504 become infinite as float16, so choose another --dtype, or pass" \
        if options.dtype == "float16" else "the training diverged; to merge it all the same pass"
    raise MergeError(f"{name} has {tally.nan.get(name, 0)} NaN and {tally.inf.get(name, 0)} infinite elements as "
                     f"{options.dtype}; {remedy} --allow nonfinite")


def _verify(job: Job, options: Options, folder: Path, threads: int) -> None:
    """Compare the sources with their checksums, the output in `folder` with the sources, and its keys with the model."""
    stored = verify.read_folder(folder, job.stem)
    verify.check_sources(job.checkpoint, threads)
    with show.progress("verifying", sum(output.nbytes for output in job.outputs), options.quiet) as step:
        verify.check_output(job.checkpoint, job.outputs, stored, step)
    if job.stem != MODEL_STEM:
        return
    verdict = model_check.ask(folder, {name: there.shape for name, there in stored.items()}, options.trust_remote_code)
    if not verdict.unknown and "keys" not in options.allow and (fault := complaint(verdict, read_config(folder),
                                                                                   folder / CONFIG_NAME)):
        raise MergeError(f"after merging, {fault}")


def verify_only(options: Options) -> dict[str, Any]:
    """Compare a merged folder with the shards that it came from; return what was compared.

    Raises:
        MergeError: the first difference.
    """
    began = time.monotonic()
    files = find_checkpoint(options.local_dirs)
    target = target_folder(options, files)
    record = _read_record(target)
    again = Options(local_dirs=options.local_dirs,
                    save_dir=str(target),
                    dtype=record["requested"]["dtype"],
                    lora=record["requested"]["lora"],
                    lora_alpha=record["requested"]["lora_alpha"],
                    tied_weights=record["requested"]["tied_weights"],
                    allow=frozenset(record["requested"]["allow"]),
                    trust_remote_code=options.trust_remote_code,
                    force=True,
                    quiet=options.quiet)
    job = prepare(again)
    _verify(job, again, target, options.threads or default_threads())
    return {
        "folder": str(target),
        "tensors": len(job.outputs),
        "bytes": sum(output.nbytes for output in job.outputs),
        "verified": True,
        "seconds": round(time.monotonic() - began, 3)
    }


def plan_only(options: Options) -> dict[str, Any]:
    """Return what `merge` would do: files, sizes, memory and space."""
    began = time.monotonic()
    job = prepare(options)
    existing = next(path for path in (job.target, *job.target.absolute().parents) if path.is_dir())
    return {
        "folder": str(job.target),
        "tensors": len(job.outputs),
        "parameters": _parameters(job),
        "dtype": options.dtype,
        "files": [{
            "name": file.name,
            "bytes": file.size
        } for file in job.files],
        "bytes_written": job.nbytes,
        "bytes_free": shutil.disk_usage(existing).free,
        "buffer_bytes": (options.threads or default_threads()) * 2 * BLOCK_BYTES,
        "tied_dropped": job.dropped,
        "device": job.device,
        "notes": job.notes,
        "seconds": round(time.monotonic() - began, 3),
    }


def inspect(options: Options) -> tuple[Checkpoint, dict[str, Any]]:
    """Return the checkpoint and its facts, with the faults that a merge would stop at under `problems`.

    Raises:
        MergeError: the files cannot be read as one checkpoint.
    """
    checkpoint = read_checkpoint(find_checkpoint(options.local_dirs))
    problems = []
    try:
        prepare(
            Options(local_dirs=options.local_dirs, force=True, quiet=True, trust_remote_code=options.trust_remote_code))
    except MergeError as error:
        problems.append(str(error))
    return checkpoint, {
        "folders": [str(folder) for folder in checkpoint.files.folders],
        "world_size": checkpoint.files.world_size,
        "ranks": sorted(checkpoint.files.paths),
        "meshes": checkpoint.meshes,
        "tensors": len(checkpoint.tensors),
        "parameters": sum(tensor.numel for tensor in checkpoint.tensors.values()),
        "bytes": sum(checkpoint.sizes.values()),
        "notes": checkpoint.notes,
        "problems": problems,
    }


def _parameters(job: Job) -> int:
    return sum(output.source.numel for output in job.outputs)


def _sources(files: RankFiles) -> list[dict[str, Any]]:
    return [{"file": path.name, "folder": str(path.parent), "rank": rank, "bytes": path.stat().st_size}
            for rank, path in sorted(files.paths.items())]  # yapf: disable


def _requested(options: Options) -> dict[str, Any]:
    return {
        "dtype": options.dtype,
        "lora": options.lora,
        "lora_alpha": options.lora_alpha,
        "tied_weights": options.tied_weights,
        "allow": sorted(options.allow),
    }


def _record(job: Job, options: Options, tally: Tally, threads: int, seconds: float) -> dict[str, Any]:
    verdict = job.verdict
    checked = "not made (an adapter)" if verdict is None else f"not made: {verdict.unknown}" if verdict.unknown else \
        f"keys and shapes as transformers {verdict.transformers} expects" + (", or allowed" if "keys" in options.allow else "")
    return {
        "merger": __version__,
        "versions": _versions(),
        "requested": _requested(options),
        "sources": _sources(job.checkpoint.files),
        "world_size": job.checkpoint.files.world_size,
        "meshes": job.checkpoint.meshes,
        "dtype": options.dtype,
        "files": [{
            "name": file.name,
            "bytes": file.size
        } for file in job.files],
        "tensors": len(job.outputs),
        "parameters": _parameters(job),
        "tied_dropped": job.dropped,
        "nan": sum(tally.nan.values()),
        "inf": sum(tally.inf.values()),
        "model_check": checked,
        "verified": options.verify,
        "device": job.device,
        "threads": threads,
        "bytes_read": tally.bytes_read,
        "bytes_written": tally.bytes_written,
        "seconds": round(seconds, 3),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "safetensors", "numpy", "ml_dtypes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / publish.RECORD_NAME
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        record["requested"], record["sources"]
        return record
    except FileNotFoundError:
        raise MergeError(f"no {path}; merge first, or name the merged folder with --save-dir") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MergeError(f"cannot read {path}: {error!r}; merge again with --force") from error


def _merged_before(options: Options) -> dict[str, Any] | None:
    """Return the record of an earlier merge of the same files in the same way, whose upload may have broken off."""
    files = find_checkpoint(options.local_dirs)
    folder = target_folder(options, files)
    if options.force or not publish.weights_in(folder):
        return None
    try:
        record = _read_record(folder)
    except MergeError:
        return None
    if record["requested"] != _requested(options) or record["sources"] != _sources(files):
        return None
    show.say(f"{folder} holds this merge already; going on with the upload")
    return {**record, "folder": str(folder)}
