"""What the tests of the merger share: running it, and taking checkpoints apart.

`merge` runs the program in this process, where transformers is imported once for all tests; `run_program` runs it as the
user does, in a process of its own.
"""
from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parents[1]
SCRIPTS = ROOT / "scripts"
SAMPLE_PROGRAMS = ROOT / "samples"
PROGRAM = SCRIPTS / "model_merger.py"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run of the merger left: exit code, standard output, standard error."""
    code: int
    out: str
    err: str

    def record(self) -> dict[str, Any]:
        """The JSON object on standard output."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def refusal(self) -> str:
        """The one line of a run that refused, without its prefix."""
        assert self.code == 2, self
        assert not self.out, self
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("merge: "), self.err
        return lines[0].removeprefix("merge: ")


def ask_here(*question: Any) -> Any:
    """Stand in for `model_check.ask`: put the same question to the same function, in this process."""
    import transformers
    from merger.model_check import Verdict, check
    level = transformers.logging.get_verbosity()
    try:
        return Verdict(**json.loads(json.dumps(check(*question[:5]))))  # without what the files were
    except Exception as error:  # a child process that ends so is reported the same way
        return Verdict(unknown=f"{type(error).__name__}: {error}")
    finally:
        transformers.logging.set_verbosity(level)


def merge(*args: str | Path) -> Run:
    """Run the merger's command line in this process."""
    from unittest import mock

    from merger import cli, model_check
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(
            model_check, "ask", ask_here):
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as exit:
            code = int(exit.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
    return Run(code, out.getvalue(), err.getvalue())


def run_program(*args: str | Path,
                python: str | Path = sys.executable,
                program: Sequence[str | Path] = (PROGRAM, ),
                env: Mapping[str, str] | None = None,
                **popen: Any) -> Run:
    """Run the merger as a program; `env` is added to the environment."""
    process = subprocess.run([str(part) for part in (python, *program, *args)],
                             capture_output=True,
                             text=True,
                             timeout=300,
                             env={
                                 **os.environ,
                                 **(env or {})
                             },
                             **popen)
    return Run(process.returncode, process.stdout, process.stderr)


# A program that merges without asking transformers about the keys: it starts in a quarter of the time.
UNCHECKED = """
import sys
sys.path.insert(0, {scripts!r})
from merger import cli, model_check
model_check.ask = lambda *question: model_check.Verdict()
{extra}
sys.exit(cli.main())
"""


def unchecked(extra: str = "") -> tuple[str, str]:
    """Return a `program` for `run_program` that skips the config check; `extra` is run before it starts."""
    return "-c", UNCHECKED.format(scripts=str(SCRIPTS), extra=extra)


# Checkpoints, taken apart


@dataclasses.dataclass(frozen=True)
class Sample:
    """A checkpoint that real FSDP wrote, with the same weights whole."""
    actor: Path
    reference: Path

    def copy(self, folder: Path) -> Sample:
        """Return a copy in `folder` that a test may spoil."""
        shutil.copytree(self.actor, folder / "actor", ignore=shutil.ignore_patterns("optim_*", "extra_state_*"))
        return Sample(folder / "actor", self.reference)

    @property
    def world_size(self) -> int:
        return len(list(self.actor.glob("model_world_size_*_rank_*.pt")))

    def rank(self, rank: int) -> Path:
        """Return the weights' file of one rank."""
        (path, ) = self.actor.glob(f"model_world_size_*_rank_{rank}.pt")
        return path

    @property
    def huggingface(self) -> Path:
        return self.actor / "huggingface"

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.huggingface / "config.json").read_text())

    def configure(self, **changes: Any) -> None:
        """Change fields of the checkpoint's config.json."""
        (self.huggingface / "config.json").write_text(json.dumps({**self.config, **changes}))

    def tensors(self) -> dict[str, Any]:
        """Return the whole weights as torch tensors."""
        from safetensors.torch import load_file
        return load_file(self.reference)


def load_rank(path: Path) -> dict[str, Any]:
    """Return the state dict of one rank's file, as torch reads it."""
    import torch
    import torch.distributed.tensor
    log = logging.getLogger("torch.distributed.device_mesh")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that meshes read without a process group cannot communicate
    try:
        return torch.load(path, weights_only=False, map_location="cpu")
    finally:
        log.setLevel(level)


def edit_rank(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the state dict of one rank's file and save it again."""
    import torch
    state = load_rank(path)
    change(state)
    torch.save(state, path)


def edit_ranks(sample: Sample, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to every rank's state dict."""
    for path in sample.actor.glob("model_world_size_*_rank_*.pt"):
        edit_rank(path, change)


def local(value: Any) -> Any:
    """Return the tensor that a rank holds of a DTensor; of a plain tensor, itself."""
    return getattr(value, "_local_tensor", value)


def storage_range(path: Path, name: str) -> tuple[int, int]:
    """Return where in a rank's file the bytes of tensor `name` begin and end."""
    import torch
    held = local(load_rank(path)[name]).contiguous()
    data = held.reshape(-1).view(torch.uint8).numpy().tobytes()
    position = path.read_bytes().find(data)
    assert position > 0
    return position, position + len(data)


def flip(path: Path, start: int, count: int) -> None:
    """Invert the low bit of `count` bytes of a file: small changes that leave every number finite."""
    with path.open("r+b") as file:
        file.seek(start)
        data = bytes(byte ^ 1 for byte in file.read(count))
        file.seek(start)
        file.write(data)


def rewrite_pickle(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace the pickle inside a `.pt` file; its other records stay, uncompressed."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records:
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)


# Results


def weights(folder: Path) -> dict[str, Any]:
    """Return the tensors of a merged folder, from its one file or by its index."""
    from safetensors.torch import load_file
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    tensors: dict[str, Any] = {}
    for name in sorted(set(weight_map.values())):
        part = load_file(folder / name)
        assert {key for key, file in weight_map.items() if file == name} == set(part)
        tensors.update(part)
    return tensors


def cast(tensor: Any, dtype: str) -> Any:
    """Return `tensor` as torch casts it to `dtype` (`keep`, or not floating: as it is)."""
    import torch
    return tensor if dtype == "keep" or not tensor.is_floating_point() else tensor.to(getattr(torch, dtype))


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the names of tensors that are not bit for bit the same."""
    return sorted(name for name in {*found, *wanted}
                  if name not in found or name not in wanted or not same_bits(found[name], wanted[name]))


def same_bits(a: Any, b: Any) -> bool:
    """Return True if two torch tensors have one type, one shape and the same bytes."""
    import torch
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def folder(path: Path, **files: str) -> Path:
    """Make a folder of text files by name; return it."""
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def listing(folder: Path) -> dict[str, bytes | None]:
    """Return everything below `folder`, hidden or not: the files with their bytes, the folders with None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@contextlib.contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Fail where the block changes anything below `folders`."""
    before = [listing(folder) for folder in folders]
    yield
    for folder, old in zip(folders, before, strict=True):
        new = listing(folder)
        assert sorted(new) == sorted(old)
        assert [name for name in old if new[name] != old[name]] == []
