"""Would transformers load this? Asked in a process of its own, on the meta device, before anything is written.

The child builds the model without memory for weights and hands transformers' own loading code a state dict of meta
tensors of the checkpoint's names and shapes: so renaming, fused experts and ignored buffers count as the installed
version counts them. The parent needs neither torch nor transformers, and its memory stays small.
"""
import contextlib
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from merger.filenames import CONFIG
from merger.files import atomic_write
from merger.foreign.documents import MAX_BYTES
from merger.foreign.files import Seen
from merger.foreign.limits import confine
from merger.foreign.text import printable
from merger.modelconfig import QUANTIZATION, read_config, tied_by_config

SCRIPTS = Path(__file__).resolve().parents[1]
SECONDS, MEMORY = 60, 1 << 30  # of processor time, and bytes beside torch and transformers
REMEMBERED = 0.2  # s that reading an answer takes which is remembered, with room to spare
TOO_LARGE = f"too large: the config's model takes more than {SECONDS} s or {MEMORY >> 20} MiB to describe"


@dataclass(frozen=True)
class Verdict:
    """What the child found.

    Attributes:
        unknown: why no model could be built that transformers has no part in; then nothing else is known.
        broken: why transformers cannot build this model of its own from the config.
        missing: names that the model has and the checkpoint has not.
        unexpected: names that the checkpoint has and the model has not.
        mismatched: (name, shape in the checkpoint, shape in the model).
        tied: groups of names that the model keeps as one tensor.
        fp32, fp32_in_half: modules that the model keeps in float32 when it is loaded in bfloat16 or float16, and in
            float16 only.
        in_memory: names that this version holds in memory and the checkpoint has, but that model files do not use.
        on_disk: what model files have in their place, by name: the name of the one that it is, or its shape (elements)
            and of which tensors' elements it is made (`lattice`).
        unsaved: why that is not known, or empty.
        transformers: version.
        torch: version.
    """
    unknown: str = ""
    broken: str = ""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[list[Any]] = field(default_factory=list)
    tied: list[list[str]] = field(default_factory=list)
    fp32: list[str] = field(default_factory=list)
    fp32_in_half: list[str] = field(default_factory=list)
    in_memory: list[str] = field(default_factory=list)
    on_disk: dict[str, Any] = field(default_factory=dict)
    unsaved: str = ""
    transformers: str = ""
    torch: str = ""

    @property
    def silent(self) -> str:
        """Why nothing is known of the model's keys, or empty."""
        return self.unknown or self.broken


def ask(config_dir: Path,
        shapes: Mapping[str, Sequence[int]],
        trust_remote_code: bool,
        architecture: str = "",
        unquantized: bool = False,
        seen: Seen | None = None) -> Verdict:
    """Return what transformers makes of `shapes` (elements by name) under the config in `config_dir`.

    `architecture` stands for the one that the config names, where that is not the weights'; `unquantized` leaves its
    `quantization_config` out, where the weights are not of that.

    The answer depends on the config, the names and shapes and the installed versions alone, so it is remembered: the
    next checkpoint of the same run needs no process with torch and transformers in it. The child reads a copy of what
    was read here, and only that.
    """
    files = _read_files(config_dir, trust_remote_code, seen or Seen())
    request = {
        "trust_remote_code": trust_remote_code,
        "architecture": architecture,
        "unquantized": unquantized,
        "shapes": {
            name: list(shape)
            for name, shape in shapes.items()
        }
    }
    cache = _cache()
    memory = cache / _digest(files, request) if cache else None
    if memory:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Verdict(**json.loads(memory.read_text()))
    with tempfile.TemporaryDirectory(prefix="model-check-") as place:
        folder = Path(place) / config_dir.absolute().name  # transformers names a model's own code after its folder
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        code, answer, errors = _run_child(Path(place), {"config_dir": str(folder), **request})
        answer = answer.replace(json.dumps(str(folder))[1:-1], json.dumps(str(config_dir))[1:-1])
    if code:
        last = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
        return Verdict(unknown=TOO_LARGE if code < 0 else printable(last, 300))
    verdict = Verdict(**json.loads(answer))
    if memory and not verdict.silent:
        _remember(memory, answer)
    return verdict


_running: set[subprocess.Popen[str]] = set()  # the children that have not answered yet


def _run_child(place: Path, request: dict[str, Any]) -> tuple[int, str, str]:
    """Put `request` to a child; return its exit code and what it printed on standard output and standard error.

    Its standard input stays open: where that ends, so has this process, and the child removes `place` and ends too.
    """
    with (place / "errors").open("w+") as errors:
        child = subprocess.Popen([sys.executable, "-m", "merger.model_check"],
                                 stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE,
                                 stderr=errors,
                                 cwd=SCRIPTS,
                                 text=True)
        _running.add(child)
        try:
            assert child.stdin and child.stdout
            with child.stdin, child.stdout:
                with contextlib.suppress(BrokenPipeError):  # it ended at once, and its code says so
                    child.stdin.write(json.dumps({"place": str(place), **request}) + "\n")
                    child.stdin.flush()
                answer = child.stdout.read()
                code = child.wait()
        finally:
            child.kill()
            child.wait()
            _running.discard(child)
        errors.seek(0)
        return code, answer, errors.read()


class Beside:
    """Transformers, asked in a thread while the merge goes on with what the config alone tells.

    It ends with its block, and the child with it.

    Attributes:
        guessed: what `ask` returned was no answer but what is likely, so that the answer must be asked for, however soon
            it comes.
    """

    def __init__(self) -> None:
        self._answers: list[Verdict | BaseException] = []
        self._done = threading.Event()  # a thread's `join` that is interrupted may take it for ended (Python 3.11)
        self._done.set()
        self.guessed = False

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, *_: object) -> None:
        while self.pending:
            for child in list(_running):
                child.kill()
            self._done.wait(0.05)

    @property
    def pending(self) -> bool:
        """Whether there is a question without an answer."""
        return not self._done.is_set()

    def ask(self, *question: Any) -> Verdict:
        """Put a question to `ask` of this module; return the answer, or where that takes a while what is likely."""

        def put() -> None:
            try:
                self._answers.append(ask(*question))
            except BaseException as error:
                self._answers.append(error)
            finally:
                self._done.set()

        self._done.clear()
        threading.Thread(target=put, daemon=True).start()
        if self._done.wait(REMEMBERED):
            return self.answer()
        self.guessed = True
        config_dir, shapes = question[:2]
        return Verdict(tied=tied_by_config(read_config(config_dir), list(shapes)))

    def answer(self) -> Verdict:
        """Wait for the answer and return it; raise what `ask` raised."""
        self._done.wait()
        self.guessed = False
        found = self._answers[-1]
        if isinstance(found, BaseException):
            raise found
        return found


def _read_files(config_dir: Path, trust_remote_code: bool, seen: Seen) -> dict[str, bytes]:
    """Return what the answer depends on: the config and, where it may run, the model's own code."""
    paths = [config_dir / CONFIG, *(sorted(config_dir.glob("*.py")) if trust_remote_code else ())]
    files = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            files[path.name] = seen.read(path, MAX_BYTES)
    return files


def _cache() -> Path | None:
    """Return the folder of the answers that are remembered; None where the user has no home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no $HOME and no entry in the system's list of users, as in some containers
        return None
    return cache / "agentgym-rl-workbench" / "model-checks"


def _digest(files: Mapping[str, bytes], request: Mapping[str, Any]) -> str:
    """Return the name of the file that remembers the answer to `request`."""
    asked = {**request, "files": sorted(files), "versions": [sys.version, *map(_version, ("torch", "transformers"))]}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    with contextlib.suppress(OSError):
        digest.update(Path(__file__).read_bytes())
    for _, data in sorted(files.items()):
        digest.update(len(data).to_bytes(8, "little") + data)
    return f"{digest.hexdigest()}.json"


def _remember(memory: Path, answer: str) -> None:
    with contextlib.suppress(OSError):  # a read-only home only costs the next merge a few seconds
        memory.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(memory, answer.encode())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check(config_dir: Path,
          shapes: Mapping[str, Sequence[int]],
          trust_remote_code: bool,
          architecture: str = "",
          unquantized: bool = False) -> dict[str, Any]:
    """Return the fields of a `Verdict` for a checkpoint of `shapes` (elements by name). Runs in the child."""
    import torch
    import transformers
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    try:
        layers = read_config(config_dir).get("num_hidden_layers")
        if type(layers) is int and layers > len(shapes):
            raise ValueError(f"num_hidden_layers is {layers}, and the checkpoint has {len(shapes)} tensors")
        config = transformers.AutoConfig.from_pretrained(config_dir, trust_remote_code=trust_remote_code)
        if architecture:
            config.architectures = [architecture]
        if unquantized:
            for part in (config, getattr(config, "text_config", None)):
                getattr(part, "__dict__", {}).pop(QUANTIZATION, None)
        model_class = _model_class(config, config_dir, trust_remote_code)
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # an unknown architecture, custom code that is not trusted, a broken config
        text = f"{type(error).__name__}: {printable(' '.join(str(error).split()), 200)}"
        if isinstance(error, (MemoryError, TimeoutError)) or "bad_alloc" in text or "allocate memory" in text:
            text = TOO_LARGE  # C++ says so as a RuntimeError
        broken = _is_known(config_dir, architecture) and not isinstance(error, ImportError)
        return {"broken" if broken else "unknown": text, **versions}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [group for group in names.values() if len(group) > 1]
    # A tied copy may be absent: the other name stands for it.
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    from merger.saved_names import saved_as
    _, info = model_class.from_pretrained(None,
                                          config=config,
                                          state_dict=state,
                                          output_loading_info=True,
                                          ignore_mismatched_sizes=True,
                                          device_map={"": "meta"})
    return {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": _mismatched(info["mismatched_keys"], shapes, model),
        "tied": tied,
        "fp32": sorted(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
        "fp32_in_half": sorted(getattr(model, "_keep_in_fp32_modules", None) or ()),
        **saved_as(model, {
            name: tuple(shape)
            for name, shape in shapes.items()
        }),
        **versions
    }


def naming_note(verdict: Verdict, names: str) -> list[str]:
    """Return a note where the checkpoint has names that model files do not, and other versions may not read.

    Of those that are only renamed (vision models), late releases of transformers 4 read both; of fused ones they do not.
    """
    if not verdict.in_memory:
        return []
    name, origin = next(iter(verdict.on_disk.items()))
    ours = origin if isinstance(origin, str) else origin[1][0][0]
    held = f"{len(verdict.in_memory)} tensors"
    if names == "files":
        return [f"{held} have names that transformers {verdict.transformers} uses in memory, such as {ours}; they are written "
                f"as model files have them: {name}, …"]  # yapf: disable
    fused = not all(isinstance(origin, str) for origin in verdict.on_disk.values())
    readers = "only transformers 5 and later read" if fused else "older versions may not read"
    return [
        f"{held} keep the names of transformers {verdict.transformers} in memory, such as {ours}, which {readers}; model "
        f"files have {name}, …"
    ]


def _is_known(config_dir: Path, architecture: str) -> bool:
    """Return True if transformers itself has the model that the config names, so that a failure is the config's fault."""
    import transformers
    config = read_config(config_dir)
    architecture = architecture or (config.get("architectures") or [""])[0]
    return config.get("model_type") in transformers.CONFIG_MAPPING and hasattr(transformers, architecture)


def _model_class(config: Any, config_dir: Path, trust_remote_code: bool) -> Any:
    import transformers
    architecture = (config.architectures or [""])[0]
    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code and remote:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
        reference = next((ref for ref in remote.values() if isinstance(ref, str) and ref.endswith("." + architecture)),
                         None)
        if reference:
            return get_class_from_dynamic_module(reference, str(config_dir))
    if not hasattr(transformers, architecture):
        raise ValueError(f"architecture {architecture or '(none named)'} is not in transformers "
                         f"{transformers.__version__}")
    return getattr(transformers, architecture)


def _mismatched(found: Any, shapes: Mapping[str, Sequence[int]], model: Any) -> list[list[Any]]:
    """Return (name, shape in the checkpoint, shape in the model) of what transformers `found`.

    Version 4 names the tensor, 5 gives name and shapes: of its own name, which the checkpoint may not have.
    """
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    whole = [(entry, shapes.get(entry, ()), expected.get(entry, ())) if isinstance(entry, str) else entry
             for entry in found]
    return sorted([name, list(ours), list(theirs)] for name, ours, theirs in whole)


def complaint(verdict: Verdict, config: Mapping[str, Any], config_path: Path) -> str | None:
    """Return the one line that names what does not fit, or None."""
    if verdict.broken:
        return (
            f"transformers {verdict.transformers} cannot build a model from {config_path} ({verdict.broken}); mend the "
            "config, or pass --allow keys")
    for name, ours, theirs in verdict.mismatched:
        vocabulary = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        if ours and theirs and ours[0] != theirs[0] and vocabulary == theirs[0]:
            return f"{name} has {ours[0]} rows, but {config_path} says vocab_size {vocabulary}; mend the config"
        return f"{name} is of shape {ours}, but {config_path} makes it {theirs}; mend the config"
    if prefix := _foreign_prefix(verdict):
        return (
            f"all names that the model of {config_path} has begin with {prefix!r} in the checkpoint, which holds it as a part of "
            "another module: save that part's state, or pass --model-key where torch's own checkpoint has it as a part")
    for names, what in ((verdict.missing, "lacks"), (verdict.unexpected, "has the unexpected")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return (f"the checkpoint {what} {names[0]}{more}, by {config_path} and transformers "
                    f"{verdict.transformers}; if that is meant, pass --allow keys")
    return None


def _foreign_prefix(verdict: Verdict) -> str:
    """Return what stands before every missing name in the checkpoint, which is no wrapper's that is known; else nothing."""
    there = set(verdict.unexpected)
    if not verdict.missing:
        return ""
    first = verdict.missing[0]
    prefixes = [name.removesuffix(first) for name in there if name.endswith("." + first)]
    return next(
        (prefix for prefix in sorted(prefixes, key=len) if all(prefix + name in there for name in verdict.missing)), "")


def _end_with_parent(place: str) -> None:
    """End this process when its parent has ended, which left `place` behind."""
    os.read(0, 1)  # not by `sys.stdin`, whose lock would be missed when Python ends
    shutil.rmtree(place, ignore_errors=True)
    os._exit(1)


def main() -> None:
    """Answer one request on standard input with one JSON object on standard output."""
    gc.disable()  # importing makes a million objects and no garbage
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # custom code may print, and so may the programs that it starts
        request = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with_parent, args=(request["place"], ), daemon=True).start()
        import torch
        with contextlib.suppress(ImportError):  # before the limits, which are the model's
            import transformers.modeling_utils  # noqa: F401
        torch.set_num_threads(1)
        try:
            confine(SECONDS, MEMORY)
            answer = check(Path(request["config_dir"]), request["shapes"], request["trust_remote_code"],
                           request["architecture"], request["unquantized"])  # yapf: disable
        except (MemoryError, TimeoutError):
            answer = {"unknown": TOO_LARGE}
        out.write(json.dumps(answer))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the terminal's Ctrl-C; the parent says so
        sys.exit(130)
