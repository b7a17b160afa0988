"""Merge, verify, plan, inspect: what the command line offers."""
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from merger import MergeError, crew, hub, lora, model_check, publish, show, verify
from merger.checkpoint import ChunkCheckpoint, read_checkpoint, read_ranks
from merger.companions import check_free, check_tree, copy_companions, holds, keep_companions, weights_in
from merger.copying import Converter, HostConverter, Sources, Tally, write_files
from merger.discover import RankFiles, find_checkpoint
from merger.dtypes import CONVERTED
from merger.filenames import CONFIG, MODEL_STEM, RANKS, RECORD, TRACKER, weight_index
from merger.files import atomic_write
from merger.foreign.files import Seen
from merger.gpu import TorchConverter
from merger.gpu import choice as gpu_choice
from merger.job import (
    Job,
    Options,
    config_folder,
    free_bytes,
    lay_out,
    link_roots,
    merged_folder,
    prepare,
    target_folder,
)
from merger.model_check import complaint
from merger.modelconfig import dump_json, read_config
from merger.plan import BLOCK_BYTES, SMALL_BYTES, index_json, split_files
from merger.record import as_requested, file_sizes, make_record, read_record, same_merge
from merger.show import Kind
from merger.torchforms import mesh_sizes

LARGEST = {"float16": "65504", "bfloat16": "3.39e38", "float32": "3.4e38"}  # finite values; keep changes none


def merge(options: Options) -> dict[str, Any]:
    """Merge a checkpoint; return the record that `merge.json` holds, plus folder, notes and the upload's address.

    Raises:
        MergeError, OSError: nothing was changed.
        KeyboardInterrupt: with what is complete all the same, if anything.
    """
    began = time.monotonic()
    api = hub.log_in(options.hf_upload_path, options.private) if options.hf_upload_path else None
    files = find_checkpoint(options.local_dirs)
    target = target_folder(options, files)
    publish.restore(target)  # by default it holds the checkpoint's config
    # An upload that broke off left a finished merge behind.
    record = same_merge(options, files, target) if api is not None and not options.force else None
    notes: list[str] = []
    if api is not None and target.is_dir():
        check_tree(target, [target])
    if record is None:
        publish.check_replaceable(target)
        with model_check.Beside() as beside:
            try:
                job = prepare(options, files, ask=beside.ask)
            except MergeError:
                if not beside.guessed:
                    raise
                verdict = beside.answer()  # what that makes of the checkpoint comes first
                job = prepare(options, files, ask=lambda *_: verdict)
            try:
                record = carry_out(job, options, began, beside)
            except MergeError:
                job.checkpoint.files.seen.check()  # then that is the reason
                raise
            except KeyboardInterrupt:  # the folder that was replaced may take its time to go
                raise KeyboardInterrupt(f"{target} is complete" if job.published else "") from None
            notes = job.notes
    else:
        show.say(f"{target} holds this merge already; going on with the upload")
        if options.verify:
            record["verified"] = verify_only(options)["verified"]
    record |= {"folder": str(target), "notes": notes}
    if api is not None and options.hf_upload_path:
        hub.add_card(target, record)
        try:
            record["uploaded"] = hub.upload(api, target, options.hf_upload_path, options.private)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{target} is complete; run the same command again to go on with the "
                                    "upload") from None
    return record


def _say(job: Job, options: Options) -> None:
    for note in () if options.quiet else job.notes:
        show.say(note)


def carry_out(job: Job, options: Options, began: float, beside: model_check.Beside | None = None) -> dict[str, Any]:
    """Write, check and publish what `prepare` planned; return the record.

    Args:
        beside: what `prepare` asked; where `job` comes of a guess, the weights are written meanwhile, and it becomes what
            the answer makes of it before anything is published.
    """
    guessed = beside is not None and beside.guessed
    if not guessed:
        _say(job, options)
    choice = gpu_choice() if job.device == "auto" else None
    converter = choice.converter if choice else HostConverter if job.device == "cpu" else partial(TorchConverter,
                                                                                                  device=job.device)
    files = job.checkpoint.files
    with publish.Staging(job.target) as staging:
        check_free(job.target, options.force)  # another merge may have ended since the first look
        copy_companions(job.config_dir, staging.folder, job.target, files.seen, link_roots(options, files))
        own = any(holds(folder, job.target) for folder in files.folders)
        keep_companions(job.target, staging.folder, files.seen, files.folders if own else (), job.texts)
        write = partial(_write, options=options, folder=staging.folder, converter=converter)
        tally = _write_checked(job, options, beside, staging.folder, write) if beside and guessed else write(job)
        if choice:
            job.device = choice.chosen or "cpu, and a GPU for some blocks"
            if choice.reason and not options.quiet:
                show.say(choice.reason)
        _check_finite(options, tally)
        index = index_json(job.files)
        if index is not None:
            atomic_write(staging.folder / weight_index(), index)
        for name, text in job.texts.items():
            atomic_write(staging.folder / name, text.encode())
        if options.verify:
            _verify(job, options, staging.folder, tally.threads, Seen())  # it goes with the staging folder
        record = make_record(job, options, tally, time.monotonic() - began)
        atomic_write(staging.folder / RECORD, dump_json(record).encode())
        if options.hf_upload_path:
            hub.add_card(staging.folder, record)
        check_free(job.target, options.force)
        files.seen.check()
        staging.publish()
        job.published = True
    return record


class _Superseded(Exception):
    """Transformers' answer makes other files of a merge than those that are being written."""


def _write(job: Job,
           options: Options,
           folder: Path,
           converter: Callable[[Sources], Converter],
           look: Callable[[], int] = lambda: BLOCK_BYTES) -> Tally:
    """Write the weights into `folder`; `look` is called for each block, returns what one may have, and may raise."""
    with show.progress("merging", job.nbytes, options.quiet) as bar:

        def step(count: int) -> None:
            look()
            bar(count)

        return write_files(job.checkpoint, job.files, folder, options.threads, step, converter, look)


def _write_checked(job: Job, options: Options, beside: model_check.Beside, folder: Path,
                   write: Callable[..., Tally]) -> Tally:
    """Write the weights into `folder` while transformers is asked; where its answer makes other ones of them, write those.

    Raises:
        MergeError: what its answer says is wrong with the checkpoint comes first.
    """
    settled: list[Job | MergeError] = []
    differs: list[bool] = []

    def final() -> Job | MergeError:
        if not settled:
            verdict = beside.answer()
            try:
                found = lay_out(options, job.checkpoint.files, job.target, job.config_dir, job.checkpoint,
                                lambda *_: verdict)
                settled.append(found)
            except MergeError as error:
                settled.append(error)
        return settled[0]

    def look() -> int:  # called by one thread at a time
        if beside.pending:
            return SMALL_BYTES
        if not settled:
            final()
            differs.append(not _same(settled[0], job))
        if differs[0]:
            raise _Superseded
        return BLOCK_BYTES

    tally: Tally | None = None
    fault: MergeError | None = None
    try:
        tally = write(job, look=look)
    except _Superseded:
        pass
    except MergeError as error:
        fault = error
    found = final()
    if isinstance(found, MergeError):
        raise found
    same = _same(found, job)
    if same and fault:
        raise fault
    job.settle(found)
    _say(job, options)
    if tally is None or not same:
        for file in folder.glob("*.safetensors"):
            file.unlink()
        tally = write(job)
    return tally


def _same(found: Job | MergeError, job: Job) -> bool:
    return isinstance(found, Job) and found.files == job.files


def _check_finite(options: Options, tally: Tally) -> None:
    if "nonfinite" in options.allow or not (tally.nan or tally.inf):
        return
    name = next(iter({**tally.nan, **tally.inf}))
    largest = LARGEST.get(options.dtype) if name in tally.inf else None
    remedy = f"values beyond {largest} become infinite as {options.dtype}, so choose another --dtype, or if the training " \
        "diverged pass" if largest else "the training diverged; to merge it all the same pass"
    raise MergeError(f"{name} has {tally.nan.get(name, 0)} NaN and {tally.inf.get(name, 0)} infinite elements"
                     f"{'' if options.dtype == 'keep' else ' as ' + options.dtype}; {remedy} --allow nonfinite")


def _verify(job: Job, options: Options, folder: Path, threads: int, seen: Seen) -> None:
    """Compare the sources with their checksums, the output in `folder` with the sources, and its keys with the model.

    Args:
        seen: notes what the files in `folder` were.
    """
    stored = verify.read_folder(folder, job.stem, seen)
    with show.progress("checking the shards", sum(job.checkpoint.sizes.values()), options.quiet) as step:
        verify.check_sources(job.checkpoint, threads, step)
    with show.progress("verifying", sum(output.nbytes for output in job.outputs), options.quiet) as step:
        verify.check_output(job.checkpoint, job.outputs, stored, step)
    if job.stem != MODEL_STEM:
        return
    verdict = model_check.ask(folder, {
        name: there.shape
        for name, there in stored.items()
    }, options.trust_remote_code, "", False, seen)
    if "keys" not in options.allow and (fault := complaint(verdict, read_config(folder, seen), folder / CONFIG)):
        raise MergeError(f"after merging, {fault}")


def verify_only(options: Options) -> dict[str, Any]:
    """Compare a merged folder with the shards that it came from; return what was compared.

    Raises:
        MergeError: the first difference.
    """
    began = time.monotonic()
    files = find_checkpoint(options.local_dirs)
    target = merged_folder(options, files)
    merged_here = (target / RECORD).is_file() or not weights_in(target)
    if merged_here:
        again = as_requested(options, read_record(target))
        job = lay_out(again, files, target, config_folder(options, files, target))
    else:
        again, job = _as_found(options, files, target)
    _verify(job, again, target, options.threads or crew.first(crew.cores()), files.seen)
    files.seen.check()
    return {
        "folder": str(target),
        "tensors": len(job.outputs),
        "fused": job.fused,
        "bytes": sum(output.nbytes for output in job.outputs),
        "verified": True,
        "merged_by": "this merger" if merged_here else "another tool",
        "seconds": round(time.monotonic() - began, 3)
    }


def _as_found(options: Options, files: RankFiles, target: Path) -> tuple[Options, Job]:
    """Return the merge that would have the names and element types of `target`, which another tool wrote.

    Raises:
        MergeError: see `lay_out`, or its weights cannot be read.
    """
    stored = verify.read_folder(target, seen=files.seen)
    chosen = replace(options, dtype="keep")
    job = lay_out(chosen, files, target, config_folder(options, files, target))
    if not {output.name for output in job.outputs} <= set(stored):
        memory = lay_out(replace(chosen, names="memory"), files, target, job.config_dir, job.checkpoint)
        if {output.name for output in memory.outputs} <= set(stored):
            chosen, job = replace(chosen, names="memory"), memory
    if any(name in stored for name in job.dropped):  # saved under both names
        chosen = replace(chosen, tied_weights="keep")
        job = lay_out(chosen, files, target, job.config_dir, job.checkpoint)
    outputs = [
        replace(output, dtype=stored[output.name].dtype)
        if output.name in stored and {output.dtype, stored[output.name].dtype} <= CONVERTED else output
        for output in job.outputs
    ]  # yapf: disable
    return chosen, replace(job, files=split_files(outputs, sum(output.nbytes for output in outputs)))


def plan_only(options: Options) -> dict[str, Any]:
    """Return what `merge` would do: files, sizes, memory and space."""
    began = time.monotonic()
    files = find_checkpoint(options.local_dirs)
    publish.check_replaceable(target_folder(options, files))
    job = prepare(options, files)
    return {
        "folder": str(job.target),
        "tensors": len(job.outputs),
        "parameters": job.parameters,
        "dtype": options.dtype,
        "files": file_sizes(job),
        "bytes_written": job.nbytes,
        "bytes_free": free_bytes(job.target),
        "buffer_bytes": 2 * (options.threads * BLOCK_BYTES or crew.IN_FLIGHT),
        "tied_dropped": job.dropped,
        "device": job.device,
        "notes": job.notes,
        "seconds": round(time.monotonic() - began, 3),
    }


def inspect(options: Options) -> tuple[list[Kind], dict[str, Any]]:
    """Return the kinds of tensors and the checkpoint's facts, with the faults that a merge would stop at under `problems`.

    Where the files are not one checkpoint, tensors and mesh are those of the first file that can be read.

    Raises:
        MergeError: there are no such files.
    """
    files = find_checkpoint(options.local_dirs)
    try:
        checkpoint = read_checkpoint(files, model_key=options.model_key)
    except MergeError as error:
        return _inspect_first(files, str(error))
    problems, notes = [], list(checkpoint.notes)
    if lora.has_lora(checkpoint.tensors):
        notes.append("holds LoRA weights; merge it with --lora adapter or --lora fuse")
        options = replace(options, lora="adapter")
    try:
        prepare(replace(options, force=True), files, checkpoint)
    except MergeError as error:
        problems.append(str(error))
    kinds = [Kind(tensor.description, tensor.shape, tensor.dtype) for tensor in checkpoint.tensors.values()]
    parts = checkpoint.parts if isinstance(checkpoint, ChunkCheckpoint) else {}
    return kinds, _facts(files, checkpoint.meshes, kinds, notes, problems, parts)


def _inspect_first(files: RankFiles, problem: str) -> tuple[list[Kind], dict[str, Any]]:
    kinds: list[Kind] = []
    meshes: list[dict[str, int]] = []
    notes = list(files.notes)
    for rank, path in sorted(files.paths.items()) if files.form == RANKS else ():
        with contextlib.suppress(MergeError):
            _, _, entries = next(read_ranks(replace(files, paths={rank: path})))
            kinds = [Kind(str(entry), entry.shape, entry.dtype) for entry in entries.values()]
            meshes = mesh_sizes(entries.values())
            notes.append(f"mesh and tensors are those that {path.name} tells of")
            break
    return kinds, _facts(files, meshes, kinds, notes, [problem])


def _facts(files: RankFiles,
           meshes: list[dict[str, int]],
           kinds: list[Kind],
           notes: list[str],
           problems: list[str],
           parts: dict[str, int] | None = None) -> dict[str, Any]:
    return {
        "form": files.form,
        "folders": [str(folder) for folder in files.folders],
        "world_size": files.world_size,
        "ranks": sorted(files.paths),
        "meshes": meshes,
        "tensors": len(kinds),
        "parameters": sum(kind.numel for kind in kinds),
        "bytes": sum(path.stat().st_size for path in files.paths.values()),
        "resume": _resumable(files) if files.form == RANKS else _parts(files, parts or {}),
        "notes": notes,
        "problems": problems,
    }


def _parts(files: RankFiles, parts: dict[str, int]) -> dict[str, Any]:
    """Return whether a training could go on from torch's own checkpoint: an optimizer's state is in it, or beside it."""
    beside = any(
        path.name.startswith("optim") for folder in files.folders for path in folder.absolute().parent.iterdir())
    return {"possible": beside or any("optim" in part for part in parts), "parts": parts}


def _resumable(files: RankFiles) -> dict[str, Any]:
    """Return whether a training could go on from the checkpoint: which of each rank's files, and of the step's, are there."""
    there = {name for folder in files.folders for name in map(str, (path.name for path in folder.iterdir()))}
    kinds = {
        kind:
        sum(f"{kind}_world_size_{files.world_size}_rank_{rank}.pt" in there
            for rank in range(min(files.world_size, 1 << 16)))
        for kind in ("model", "optim", "extra_state")
    }
    step = files.folders[0].parent
    tracker = step.parent / TRACKER
    return {
        "possible": all(count == files.world_size for count in kinds.values()),
        **kinds,
        "data": (step / "data.pt").is_file(),
        "tracker": tracker.is_file(),
    }
