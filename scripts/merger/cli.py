"""The command line of the merger."""
import argparse
import contextlib
import errno
import io
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

from merger import DTYPES, NAMES, MergeError, __version__
from merger.filenames import RANKS, TRACKER
from merger.foreign.text import printable

if TYPE_CHECKING:
    from merger.show import Kind, Rows

MISUSE, INTERRUPTED, TERMINATED = 2, 130, 143
NOTHING = "nothing was changed"
SMALLEST = 1000  # bytes that somebody means who names no unit
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str) -> int:
    """Return the bytes that a size such as `5GB` or `500MiB` names.

    Raises:
        argparse.ArgumentTypeError: it is no positive size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    count = float(match[1]) * unit if match and unit else 0.0
    if not 1 <= count < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no size; write it like 5GB or 500MB")
    if match and not match[2] and count < SMALLEST:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is a size in bytes; is {match[1]}GB meant?")
    return int(count)


def thread_count(text: str) -> int:
    """Return a number of threads from 1 to 256.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of threads; give 1 to 256")
    return int(text)


def lora_alpha(text: str) -> float:
    """Return LoRA's alpha, a number above 0.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no alpha; give the training's, a number above 0")
    return alpha


def folder_name(text: str) -> str:
    """Return a folder's name, with the user's home in place of a `~` that the shell has left (as in `--save-dir=~/x`).

    Raises:
        argparse.ArgumentTypeError: it is empty, as an unset variable is, and would mean the current folder; or it is an
            address (s3://…), which would mean a folder of that name.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty name is no folder; is a variable unset?")
    if re.match(r"[A-Za-z][\w+.-]+:/", text) and not os.path.exists(text):
        raise argparse.ArgumentTypeError(
            f"{text:.200} is an address, not a folder; give a folder of this machine, and copy from or to it")
    return os.path.expanduser(text)


def backend(text: str) -> str:
    """Return verl's name of the kind of checkpoint that is merged.

    Raises:
        argparse.ArgumentTypeError: it is another one.
    """
    if text != "fsdp":
        raise argparse.ArgumentTypeError(
            f"{text!r:.80} is not merged here, fsdp is; `python -m verl.model_merger merge "
            "--backend megatron --local_dir DIR --target_dir OUT` merges Megatron's")
    return text


class _Parser(argparse.ArgumentParser):
    """Answers misuse with one line."""

    def error(self, message: str) -> NoReturn:
        print(f"merge: {printable(message)}; --help lists the flags", file=sys.stderr)
        sys.exit(MISUSE)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    p = _Parser(prog="model_merger.py",
                allow_abbrev=False,
                description="Merge a sharded FSDP checkpoint (model_world_size_*_rank_*.pt, as verl writes it) into "
                "Hugging Face safetensors; or a distributed checkpoint of torch's (.metadata and .distcp, or sharded "
                "safetensors). Exit codes: 0 done, 2 misuse or a faulty checkpoint, 130 interrupted, 143 terminated.")
    p.add_argument(
        "--local-dir",
        type=folder_name,
        action="append",
        required=True,
        metavar="DIR",
        help="checkpoint folder, such as saves/x/global_step_100/actor; repeat it for ranks in several folders")
    p.add_argument("--save-dir",
                   "--target-dir",
                   "--test-hf-dir",
                   type=folder_name,
                   metavar="DIR",
                   help="folder for the merged model (default: LOCAL_DIR/huggingface, or LOCAL_DIR/lora_adapter with "
                   "--lora adapter)")
    p.add_argument("--config-dir",
                   "--hf-model-path",
                   type=folder_name,
                   metavar="DIR",
                   help="folder with the base model's config.json and tokenizer, where the checkpoint has none")
    p.add_argument("--dtype",
                   choices=DTYPES,
                   default="bfloat16",
                   help="element type of floating-point tensors; others keep theirs (default: bfloat16)")
    p.add_argument("--max-shard-size",
                   type=byte_count,
                   default="5GB",
                   metavar="SIZE",
                   help="largest output file, such as 5GB or 500MB (default: 5GB)")
    p.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto (the CPU; where a GPU is, the faster of both by the first blocks, remembered for the host), cpu, "
        "cuda or cuda:N (default: auto)")
    p.add_argument(
        "--threads",
        type=thread_count,
        default=0,
        metavar="N",
        help="copying threads (default: as many as the storage and the cores make use of, 4 to 32, by the first blocks)"
    )
    p.add_argument("--lora",
                   choices=("adapter", "fuse"),
                   help="LoRA weights: save the adapter, or add it to the base weights (default: stop and say so)")
    p.add_argument(
        "--base-model",
        type=folder_name,
        metavar="DIR",
        help="with --lora fuse: the base model's folder (config and safetensors), where the checkpoint holds "
        "LoRA weights alone")
    p.add_argument("--lora-alpha",
                   type=lora_alpha,
                   metavar="A",
                   help="LoRA's alpha, where neither lora_train_meta.json nor lora_adapter/adapter_config.json has it")
    p.add_argument("--tied-weights",
                   choices=("keep", "drop"),
                   help="tied weights whose values differ: keep both, or drop the copy (default: stop and say so)")
    p.add_argument(
        "--names",
        choices=NAMES,
        default="files",
        help="where transformers 5 fuses or renames a model's tensors in memory: the names and tensors of model "
        "files, as save_pretrained writes them, or those in memory (default: files)")
    p.add_argument(
        "--allow",
        action="append",
        choices=("keys", "nonfinite", "buffers"),
        default=[],
        help=
        "accept keys that do not fit the config, NaN and infinite elements, or buffers that differ between ranks, of "
        "which the lowest rank's are taken; repeatable")
    p.add_argument(
        "--model-key",
        metavar="NAME",
        help="part of a distributed checkpoint that is the model, such as app.model (default: the one that is "
        "called so)")
    p.add_argument("--trust-remote-code",
                   action="store_true",
                   help="let transformers run the checkpoint's own code to check the keys")
    p.add_argument("--verify",
                   action="store_true",
                   help="read sources and result again: checksums, every element (of fused LoRA: within the rounding), "
                   "and the model's keys")
    p.add_argument("--force", action="store_true", help="replace weights that are already in the save folder")
    p.add_argument("--hf-upload-path", metavar="USER/NAME", help="Hub repository to upload to; it loses other weights")
    p.add_argument("--private",
                   action="store_true",
                   help="create that repository as a private one; stop where it is public")
    p.add_argument("--json", action="store_true", help="print one JSON object in place of tables and progress")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="check and plan; write nothing")
    mode.add_argument("--inspect", action="store_true", help="show mesh, ranks, tensors and faults")
    mode.add_argument("--verify-only", action="store_true", help="compare a merged folder with its shards")
    p.add_argument("--backend", type=backend, default="fsdp", help=argparse.SUPPRESS)  # of verl's command line
    for flag in ("--use-cpu-initialization", "--tie-word-embedding",
                 "--is-value-model"):  # of Megatron's checkpoints only
        p.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--version", action="version", version=f"model_merger {__version__}")
    return p


def plain_words(words: Sequence[str]) -> list[str]:
    """Return a command line as we spell it, from verl's spelling: a leading `merge` or `test`, underscores in flags.

    >>> plain_words(["merge", "--local_dir", "a_b", "--target_dir=c_d"])
    ['--local-dir', 'a_b', '--target-dir=c_d']
    """
    leading = {"merge": [], "test": ["--verify-only"]}.get(words[0]) if words else None
    words = list(words) if leading is None else [*leading, *words[1:]]
    flags = [word.partition("=") for word in words]
    return ["".join((name.replace("_", "-"), sign, value)) if name.startswith("--") else name + sign + value
            for name, sign, value in flags]  # yapf: disable


def main(argv: Sequence[str] | None = None) -> int:
    """Run the merger; return its exit code."""
    args = parser().parse_args(plain_words(sys.argv[1:] if argv is None else argv))
    signal.signal(signal.SIGTERM, _terminate)
    _prepare_streams()
    _raise_file_limit()
    if missing := _missing_packages(args.json):
        return _fail(f"needs {', '.join(missing)}, which {sys.executable} has not; pip install {' '.join(missing)}")
    try:
        return _run(args)
    except MergeError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(_explain(error))
    except KeyboardInterrupt as stop:
        print(f"merge: interrupted; {printable(str(stop)) or NOTHING}", file=sys.stderr)
        return INTERRUPTED


def _terminate(*_: object) -> None:
    sys.exit(TERMINATED)  # as an exception, so that what was staged is removed


def _prepare_streams() -> None:
    """Let any text be printed: a closed standard error swallows it, what an encoding has not is escaped."""
    if sys.stderr is None:
        sys.stderr = io.StringIO()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _raise_file_limit() -> None:
    """Let the process open as many files as it may: two for each rank and each output file."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard, 10240):  # macOS refuses the "unlimited" that it names, and takes its OPEN_MAX
        with contextlib.suppress(ValueError, OSError):
            return resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def _missing_packages(json: bool) -> list[str]:
    return [name for name in ("numpy", "ml_dtypes", *(() if json else ("rich", ))) if find_spec(name) is None]


def _fail(text: str) -> int:
    print(f"merge: {printable(text)}", file=sys.stderr)
    return MISUSE


def _explain(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk filled up while writing{where}; {NOTHING}; free space or choose another --save-dir"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.strerror}{where}; {NOTHING}; mend the permissions or choose another --save-dir"
    if error.errno == errno.EMFILE:
        return f"{error.strerror}{where}; {NOTHING}; raise the limit with ulimit -Hn, or choose a larger --max-shard-size"
    return f"{error.strerror or error}{where}; {NOTHING}"


def _report(print_it: Callable[[], object], done: str = NOTHING) -> None:
    """Print a result; where that fails, `done` is what the user must know.

    Raises:
        MergeError: standard output is closed, its reader has left, or its disk is full.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        print_it()
        sys.stdout.flush()
    except OSError as error:
        if sys.stdout is not None:  # or what is still buffered fails once more when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise MergeError(f"the result cannot be printed ({error.strerror}); {done}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(done) from None


def _run(args: argparse.Namespace) -> int:
    from merger import merging, show
    from merger.job import Options
    options = Options(local_dirs=tuple(args.local_dir),
                      save_dir=args.save_dir,
                      config_dir=args.config_dir,
                      base_model=args.base_model,
                      dtype=args.dtype,
                      device=args.device,
                      max_shard_size=args.max_shard_size,
                      threads=args.threads,
                      lora=args.lora,
                      lora_alpha=args.lora_alpha,
                      tied_weights=args.tied_weights,
                      names=args.names,
                      verify=args.verify,
                      force=args.force,
                      allow=frozenset(args.allow),
                      trust_remote_code=args.trust_remote_code,
                      model_key=args.model_key,
                      hf_upload_path=args.hf_upload_path,
                      private=args.private,
                      quiet=args.json)
    if args.inspect:
        kinds, facts = merging.inspect(options)
        _report(lambda: show.print_json(facts) if args.json else _print_inspection(kinds, facts))
        return MISUSE if facts["problems"] else 0
    if args.dry_run:
        plan = merging.plan_only(options)
        _report(lambda: show.print_json(plan)
                if args.json else show.print_table("plan (nothing was written)", _plan_rows(plan)))
    elif args.verify_only:
        result = merging.verify_only(options)
        _report(lambda: show.print_json(result) if args.json else print(printable(_verified_line(result))))
    else:
        record = merging.merge(options)
        _report(lambda: show.print_json(record) if args.json else show.print_table("merge", show.summary_rows(record)),
                f"{record['folder']} is complete" + (" and uploaded" if "uploaded" in record else ""))
    return 0


def _verified_line(result: dict[str, Any]) -> str:
    from merger import show
    by = "" if result["merged_by"] == "this merger" else f", as {result['merged_by']} wrote them"
    return (
        f"{result['folder']}: {result['tensors']} tensors, {show.size_text(result['bytes'])}{by}, equal to the shards in "
        f"{show.equality_text(result)} ({result['seconds']:.1f} s)")


def _print_inspection(kinds: "list[Kind]", facts: dict[str, Any]) -> None:
    from merger import show
    show.print_table("checkpoint", _inspect_rows(facts))
    if kinds:
        show.print_tensors(kinds)


def _inspect_rows(facts: dict[str, Any]) -> "Rows":
    from merger import show
    ranks = facts["ranks"]
    return [
        ("folders", list(facts["folders"])),
        ("form", facts["form"]),
        ("ranks", f"{len(ranks)} of {facts['world_size']}") if facts["form"] == RANKS else
        ("files", f"{len(ranks)} of {facts['world_size']} ranks"),
        ("mesh", show.mesh_text(facts["meshes"])),
        ("tensors", f"{facts['tensors']:,}, {show.count_text(facts['parameters'])} elements"),
        ("size", show.size_text(facts["bytes"])),
        ("resume", _resume_text(facts["resume"], facts["world_size"])),
        ("notes", facts["notes"] or "none"),
        ("problems", facts["problems"] or "none"),
    ]


def _resume_text(resume: dict[str, Any], world_size: int) -> str:
    """Return in a line whether a training could go on from the checkpoint."""
    if "parts" in resume:
        held = ", ".join(f"{part or 'the top'} ({count} tensors)" for part, count in resume["parts"].items())
        return ("yes" if resume["possible"] else "no optimizer's state is there") + f"; it holds {held or 'nothing'}"
    lacking = [f"{kind} of {world_size - resume[kind]} ranks" for kind in ("model", "optim", "extra_state")
               if resume[kind] < world_size]  # yapf: disable
    lacking += [what for key, what in (("data", "data.pt"), ("tracker", TRACKER)) if not resume[key]]
    return ("yes" if resume["possible"] else "no") + (f"; not there: {', '.join(lacking)}" if lacking else "")


def _plan_rows(plan: dict[str, Any]) -> "Rows":
    from merger import show
    return [
        ("folder", plan["folder"]),
        ("tensors", f"{plan['tensors']:,}, {show.count_text(plan['parameters'])} parameters as {plan['dtype']}"),
        ("files", [f"{file['name']}  {show.size_text(file['bytes'])}" for file in plan["files"]]),
        ("space", f"{show.size_text(plan['bytes_written'])} needed, {show.size_text(plan['bytes_free'])} free"),
        ("memory", f"{show.size_text(plan['buffer_bytes'])} of buffers"),
        ("dropped", ", ".join(plan["tied_dropped"]) or "nothing"),
        ("notes", plan["notes"] or "none"),
    ]
