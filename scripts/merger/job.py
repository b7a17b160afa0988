"""What a merge is asked for, and every check and decision that comes before the first byte is written."""
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merger import MergeError, lora, model_check, publish
from merger.base import OverBase, check_apart, over_base
from merger.checkpoint import Checkpoint, ChunkCheckpoint, Tensor, read_checkpoint
from merger.companions import check_documents, check_free, companions
from merger.discover import RankFiles, find_checkpoint
from merger.dtypes import CONVERTED, output_dtype
from merger.filenames import ADAPTER_CONFIG, ADAPTER_STEM, CONFIG, LORA_FOLDER, MODEL_FOLDER, MODEL_STEM, RANKS, RECORD
from merger.gpu import check_device
from merger.lattice import Lattice
from merger.model_check import Verdict, complaint, naming_note
from merger.modelconfig import (
    dump_json,
    for_critic,
    read_config,
    tied_by_config,
    untied,
    with_dtype,
    without_quantization,
)
from merger.plan import Fusion, Output, OutputFile, split_files
from merger.show import size_text
from merger.views import View

ROUTING_BIAS = "e_score_correction_bias"

TOKENIZERS = ("tokenizer", "vocab", "spiece.model", "tekken.json", "qwen.tiktoken")  # how their files begin
QUANTIZED = frozenset({"float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32"})
CACHE_SCALES = frozenset({"k_scale", "v_scale", "q_scale", "prob_scale",
                          "kv_scale"})  # of vLLM's and compressed-tensors' cache in 8 bits

Named = dict[str, tuple[Tensor, Fusion | None]]
Ask = Callable[..., Verdict]  # as `model_check.ask`


@dataclass(frozen=True)
class Options:
    """What the user asked for; `allow` holds names of checks whose finding is accepted: `keys`, `nonfinite`, `buffers`.

    `names` are those of model files, or `memory` where the checkpoint's are to be kept.
    """
    local_dirs: tuple[str, ...]
    save_dir: str | None = None
    config_dir: str | None = None
    base_model: str | None = None
    dtype: str = "bfloat16"
    device: str = "auto"
    max_shard_size: int = 5_000_000_000
    threads: int = 0
    lora: str | None = None
    lora_alpha: float | None = None
    tied_weights: str | None = None
    names: str = "files"
    verify: bool = False
    force: bool = False
    allow: frozenset[str] = frozenset()
    trust_remote_code: bool = False
    model_key: str | None = None
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
        published: whether the merged folder is in its place.
        folder_notes: those of the notes that are of the folder, not of the checkpoint.
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
    published: bool = False
    folder_notes: list[str] = field(default_factory=list)

    def settle(self, found: "Job") -> None:
        """Become the job that was `found` once transformers had answered."""
        self.files, self.texts, self.dropped, self.verdict = found.files, found.texts, found.dropped, found.verdict
        self.base_model, self.notes = found.base_model, [*found.notes, *self.folder_notes]

    @property
    def outputs(self) -> list[Output]:
        """The tensors to write."""
        return [output for file in self.files for output, _ in file.tensors]

    @property
    def fused(self) -> int:
        """How many of them are sums with LoRA weights, of which only the rounding's limits can be checked."""
        return sum(output.fusion is not None for output in self.outputs)

    @property
    def renamed(self) -> int:
        """How many of them are named as in model files, and otherwise in the checkpoint."""
        names = self.verdict.on_disk if self.verdict else {}
        return sum(output.name in names for output in self.outputs)

    @property
    def nbytes(self) -> int:
        """The bytes to write."""
        return sum(file.size for file in self.files)

    @property
    def parameters(self) -> int:
        """The elements to write."""
        return sum(output.numel for output in self.outputs)


def prepare(options: Options,
            files: RankFiles | None = None,
            checkpoint: Checkpoint | None = None,
            ask: Ask | None = None) -> Job:
    """Make every check that comes before the first byte is written.

    Args:
        files: where they are found already: what has changed since is refused, not taken.
        checkpoint: where it is read already, from `files`.
        ask: what is asked in place of `model_check.ask`.

    Raises:
        MergeError: the first fault found.
    """
    files = files or find_checkpoint(options.local_dirs)
    target = target_folder(options, files)
    publish.check_target(target, files.folders)
    if options.base_model:
        check_apart(Path(options.base_model), target)
    check_free(target, options.force)
    try:
        job = lay_out(options, files, target, config_folder(options, files, target), checkpoint, ask)
    except MergeError:
        files.seen.check()  # half of a file that is being written is no fault of the checkpoint
        raise
    along = list(companions(job.config_dir, target, link_roots(options, files)))
    _check_space(job, along)
    job.notes += check_documents((job.config_dir, target), files.seen, job.texts)
    names = {path.name for path in (*along, *(target.iterdir() if target.is_dir() else ()))}
    if job.stem == MODEL_STEM and not any(name.startswith(TOKENIZERS) for name in names):
        job.folder_notes.append(f"no tokenizer in {job.config_dir}; copy the base model's into {target}")
        job.notes += job.folder_notes
    return job


def lay_out(options: Options,
            files: RankFiles,
            target: Path,
            config_dir: Path,
            checkpoint: Checkpoint | None = None,
            ask: Ask | None = None) -> Job:
    """Check the checkpoint and decide what its merged model is made of, whatever `target` holds; see `prepare`.

    Raises:
        MergeError: the first fault found.
    """
    device, allow_buffers = check_device(options.device), "buffers" in options.allow
    if options.base_model and options.lora != "fuse":
        raise MergeError(
            "--base-model is for --lora fuse, which adds LoRA weights to it; add --lora fuse, or leave it out")
    if options.lora == "adapter":
        return _lay_out_adapter(options, checkpoint or read_checkpoint(files, allow_buffers, options.model_key), target,
                                device)
    if checkpoint is None and (files.missing or files.form != RANKS) and not (config_dir / CONFIG).is_file():
        checkpoint = read_checkpoint(files, allow_buffers,
                                     options.model_key)  # of two faults, files that are not there come first
    if options.lora == "fuse":
        checkpoint = checkpoint or read_checkpoint(files, allow_buffers, options.model_key)
        if options.base_model:
            checkpoint = over_base(checkpoint, Path(options.base_model))
        elif lora.has_lora(checkpoint.tensors) and lora.is_alone(checkpoint.tensors):
            raise MergeError(
                "the checkpoint holds LoRA weights alone; name the folder of the model that was trained with "
                "--base-model DIR, or use --lora adapter")
    told_by = Path(options.config_dir or options.base_model or config_dir)
    config = read_config(told_by, files.seen)
    checkpoint = checkpoint or read_checkpoint(files, allow_buffers, options.model_key)
    named = _plain_weights(options, checkpoint)
    config, changed = for_critic(config, named)
    config, cleaned = without_quantization(config, {name: tensor.dtype for name, (tensor, _) in named.items()})
    verdict = (ask or model_check.ask)(told_by, {
        name: tensor.shape
        for name, (tensor, _) in named.items()
    }, options.trust_remote_code, config["architectures"][0] if changed else "", bool(cleaned), files.seen)
    notes = [*checkpoint.notes, *changed, *cleaned, *naming_note(verdict, options.names)]
    if verdict.silent:
        asked = "; they are the checkpoint's, whatever model files have" if options.names == "files" else ""
        notes.append(f"keys were not checked against a model: {verdict.silent}{asked}")
        _check_extents(checkpoint, options)
    if "keys" not in options.allow and (fault := complaint(verdict, config, told_by / CONFIG)):
        raise MergeError(fault)
    tied = config
    config, dropped = _resolve_ties(options, tied, named, verdict)
    if options.tied_weights and config is tied and not dropped:
        notes.append(f"--tied-weights {options.tied_weights} has nothing to do: {told_by / CONFIG} ties no two of "
                     "the checkpoint's tensors")
    scales = quantization_parts({name: tensor.dtype for name, (tensor, _) in named.items()})
    kept = kept_whole(named, options.dtype, verdict)
    if kept:
        notes.append(f"{len(kept)} tensors keep their type, as the model does not work with them rounded: {kept[0]}"
                     f"{', …' if len(kept) > 1 else ''}")
    kept += scales
    outputs = _outputs(options, named, dropped, kept)
    if options.names == "files":
        outputs = as_saved(outputs, dropped, verdict)
        kept = [output.name for output in outputs if output.source.name in kept]
    written = {output.dtype for output in outputs if output.dtype in CONVERTED and output.name not in kept}
    config = with_dtype(config, written.pop() if len(written) == 1 else None)
    files_out = split_files(outputs, options.max_shard_size)
    return Job(checkpoint, files_out, target, config_dir, MODEL_STEM, device, {CONFIG: dump_json(config)},
               sorted(dropped), verdict,
               config.get("_name_or_path") or None, notes)


def _check_extents(checkpoint: Checkpoint, options: Options) -> None:
    """Refuse pieces that nothing but the config says to be all, where that says nothing.

    Raises:
        MergeError: only `--allow keys` lets them pass.
    """
    checkpoint = checkpoint.shards if isinstance(checkpoint, OverBase) else checkpoint
    if isinstance(checkpoint, ChunkCheckpoint) and checkpoint.guessed and "keys" not in options.allow:
        raise MergeError(
            f"{checkpoint.files.folders[0]} does not say how large its tensors are, so only a config that transformers knows "
            "tells whether the last rank's file is there; give it with --config-dir, or pass --allow keys")


def _lay_out_adapter(options: Options, checkpoint: Checkpoint, target: Path, device: str) -> Job:
    _check_extents(checkpoint, options)
    if not lora.has_lora(checkpoint.tensors):
        raise MergeError("--lora adapter: the checkpoint holds no LoRA weights; leave the flag out")
    found = lora.read_lora(checkpoint.tensors, checkpoint.files, options.lora_alpha)
    outputs = [
        Output(name, tensor, output_dtype(tensor.dtype, options.dtype)) for name, tensor in lora.adapter(found).items()
    ]
    files_out = split_files(outputs, sum(output.nbytes for output in outputs), ADAPTER_STEM)
    config_dir = next(
        (folder / MODEL_FOLDER for folder in checkpoint.files.folders if (folder / MODEL_FOLDER).is_dir()), target)
    base = read_config(config_dir, checkpoint.files.seen).get("_name_or_path") if (config_dir /
                                                                                   CONFIG).is_file() else None
    texts = {ADAPTER_CONFIG: dump_json(lora.adapter_config(found, checkpoint.tensors, base or None))}
    return Job(checkpoint, files_out, target, target, ADAPTER_STEM, device, texts, [], None, base or None,
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

    Raises:
        MergeError: LoRA changes one of a tied group, so that no tensor can stand for all.
    """
    groups = _tied_groups(config, named, verdict)
    dropped = {}
    for group in groups:
        first, *copies = [name for name in group if name in named] or [""]
        adapted = next((name for name in (first, *copies) if name and named[name][1]), None)
        if adapted and not (copies and options.tied_weights == "keep"):
            remedy = "pass --tied-weights keep to save each" if copies else "use --lora adapter"
            raise MergeError(f"LoRA changes {adapted}, which the config ties to "
                             f"{next(name for name in group if name != adapted)}; {remedy}")
        if copies and options.tied_weights == "keep":
            config = untied(config)
        else:
            dropped.update(dict.fromkeys(copies, first))
    return config, dropped


def _tied_groups(config: dict[str, Any], named: Named, verdict: Verdict) -> list[list[str]]:
    """Return the groups of tied names as transformers knows them, or by the config where it has other names for them.

    transformers 5 renames what 4 wrote for vision models, so that a group may name one tensor of the checkpoint, or none.
    """
    if verdict.silent:
        return tied_by_config(config, list(named))
    known = [group for group in verdict.tied if sum(name in named for name in group) > 1]
    named_here = {name for group in known for name in group}
    told = [group for group in tied_by_config(config, list(named)) if named_here.isdisjoint(group)]
    partial = [group for group in verdict.tied if group not in known]
    return [*known, *(told or partial if partial else [])]


def kept_whole(named: Named, wanted: str, verdict: Verdict) -> list[str]:
    """Return the float32 tensors that loading in `wanted` would leave as they are.

    transformers' models name them (`_keep_in_fp32_modules_strict`; those of `_keep_in_fp32_modules` for float16 only).
    DeepSeek's routing bias is one whatever the version says: rounded, it sends tokens to other experts.
    """
    modules = {
        "bfloat16": [*verdict.fp32, ROUTING_BIAS],
        "float16": [*verdict.fp32, *verdict.fp32_in_half, ROUTING_BIAS]
    }.get(wanted, [])
    return [
        name for name, (tensor, _) in named.items()
        if tensor.dtype == "float32" and any(f".{module}." in f".{name}." for module in modules)
    ]


def quantization_parts(dtypes: Mapping[str, str]) -> list[str]:
    """Return the floating-point tensors that belong to a quantized weight, by all tensors' element types.

    A scale beside 8-bit or packed numbers is a part of what those mean, and is not rounded: `x.weight_scale_inv` of
    `x.weight`, all but the bias beside `x.qweight`, `x.weight.absmax`, `experts.down_proj_scale` of `experts.down_proj`;
    and the attention's, of the cache in 8 bits, where its projections are quantized.

    >>> quantization_parts({"x.weight": "float8_e4m3fn", "x.weight_scale_inv": "float32", "x.bias": "float32"})
    ['x.weight_scale_inv']
    >>> quantization_parts({"attn.k.weight": "float8_e4m3fn", "attn.k_scale": "float32", "attn.sinks": "float32"})
    ['attn.k_scale']
    """
    quantized = {name for name, dtype in dtypes.items() if dtype in QUANTIZED}
    leaves: dict[str, list[str]] = {}
    for name in quantized:
        module, _, leaf = name.rpartition(".")
        leaves.setdefault(module, []).append(leaf.removesuffix("_blocks"))

    def belongs(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        beside = any(
            ("weight" in other and leaf != "bias") or leaf.startswith(other) for other in leaves.get(module, ()))
        of_cache = leaf in CACHE_SCALES and any(other.startswith(f"{module}.") for other in leaves)
        return beside or module in quantized or of_cache

    return [name for name, dtype in dtypes.items() if dtype in CONVERTED and belongs(name)]


def _outputs(options: Options, named: Named, dropped: dict[str, str], kept: Collection[str] = ()) -> list[Output]:
    twins: dict[str, tuple[Tensor, ...]] = {}
    for copy, first in dropped.items():
        ours, theirs = named[first][0], named[copy][0]
        if options.tied_weights == "drop":
            continue
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            raise MergeError(f"the config ties {copy} to {first}, but they are of different type or shape; pass "
                             "--tied-weights keep or --tied-weights drop")
        twins[first] = (*twins.get(first, ()), theirs)
    return [
        Output(name, tensor, output_dtype(tensor.dtype, "keep" if name in kept else options.dtype), fusion,
               twins.get(name, ())) for name, (tensor, fusion) in named.items() if name not in dropped
    ]


def as_saved(outputs: Sequence[Output], dropped: Collection[str], verdict: Verdict) -> list[Output]:
    """Return `outputs`, named as the checkpoint's tensors, as the tensors that transformers would save of them.

    Raises:
        MergeError: the way back is not known, or is not one for these tensors.
    """
    keep = "pass --names memory to keep the checkpoint's names"
    if verdict.unsaved:
        raise MergeError(
            f"transformers {verdict.transformers} saves these tensors under other names, by what is not known "
            f"here: {verdict.unsaved}; {keep}")
    ours = {output.name: output for output in outputs}
    made: dict[str, list[Output]] = {}
    for name, origin in verdict.on_disk.items():
        sources = [origin] if isinstance(origin, str) else list(dict.fromkeys(source for source, _ in origin[1]))
        if isinstance(origin, str) and origin in dropped:
            continue
        first = ours.get(sources[0])
        if first is None or any(source not in ours or ours[source].twins for source in sources[1:]):
            raise MergeError(f"model files have {name} as a part of {sources[0]}, which is tied to another; {keep}")
        if isinstance(origin, str):
            made.setdefault(first.name, []).append(replace(first, name=name))
            continue
        for source in sources:
            if ours[source].fusion or ours[source].twins:
                what = "LoRA changes" if ours[source].fusion else "the config ties"
                raise MergeError(f"{what} {source}, which model files have as {name}; {keep}")
            if (ours[source].source.dtype, ours[source].dtype) != (first.source.dtype, first.dtype):
                raise MergeError(
                    f"{source} and {first.name} are of different types, and one tensor, {name}, in model files; "
                    f"{keep}")
        parts = tuple((ours[source].source, Lattice(here, there, tuple(map(tuple, dims))))
                      for source, (here, there, dims) in origin[1])
        made.setdefault(first.name, []).append(replace(first, name=name, view=View(tuple(origin[0]), parts)))
    changed = set(verdict.in_memory)
    found = [
        new for output in outputs
        for new in (*made.get(output.name, ()), *([output] if output.name not in changed else ()))
    ]
    twice = next((name for name, count in Counter(output.name for output in found).items() if count > 1), None)
    if twice:
        raise MergeError(
            f"the checkpoint has {twice}, and so has what model files make of {verdict.on_disk[twice]}; {keep}")
    return found


def config_folder(options: Options, files: RankFiles, *others: Path) -> Path:
    """Return the folder with the model's config.json.

    It is the one that the user named, or `huggingface/`, or beside the ranks' files, or one of `others`.

    Raises:
        MergeError: the user named one that has none.
    """
    if options.config_dir:
        folder = Path(options.config_dir)
        if not (folder / CONFIG).is_file():
            raise MergeError(f"--config-dir {folder} has no {CONFIG}; name the base model's folder")
        return folder
    candidates = [
        *(path for folder in files.folders for path in (folder / MODEL_FOLDER, folder)), *files.configs, *others,
        *(folder.parent for folder in files.folders if files.form != RANKS)
    ]
    if options.base_model:  # its config it is, and its tokenizer where the checkpoint has none
        return next((path for path in candidates if _has_tokenizer(path) and (path / CONFIG).is_file()),
                    Path(options.base_model))
    return next((path for path in candidates if (path / CONFIG).is_file()), candidates[0])


def _has_tokenizer(folder: Path) -> bool:
    return folder.is_dir() and any(path.name.startswith(TOKENIZERS) for path in folder.iterdir())


def link_roots(options: Options, files: RankFiles) -> tuple[Path, ...]:
    """Return the folders that the user named, into which links may lead."""
    named = (options.config_dir, options.base_model, options.save_dir)
    return (*files.folders, *files.configs, *(Path(folder) for folder in named if folder))


def target_folder(options: Options, files: RankFiles) -> Path:
    """Return where the merged model goes."""
    if options.save_dir:
        return Path(options.save_dir)
    return files.folders[0] / (LORA_FOLDER if options.lora == "adapter" else MODEL_FOLDER)


def merged_folder(options: Options, files: RankFiles) -> Path:
    """Return where an earlier merge went: the adapter's folder where only that holds one."""
    target, adapter = target_folder(options, files), files.folders[0] / LORA_FOLDER
    elsewhere = not options.save_dir and not (target / RECORD).is_file()
    return adapter if elsewhere and (adapter / RECORD).is_file() else target


def _check_space(job: Job, companions: Iterable[Path]) -> None:
    seen = job.checkpoint.files.seen
    needed = job.nbytes + sum(seen.identity(path).size for path in companions)
    free = free_bytes(job.target)
    if needed > free:
        raise MergeError(f"{size_text(needed)} are needed for {job.target}, {size_text(free)} are free; "
                         "free space or choose another --save-dir")


def free_bytes(target: Path) -> int:
    """Return the bytes that are free where `target` is or will be."""
    return shutil.disk_usage(next(path for path in (target, *target.absolute().parents) if path.is_dir())).free
