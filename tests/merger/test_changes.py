"""Files, and whole steps, that a training replaces while they are merged: one step's model or none, never a mixture."""
from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from merger import MergeError
from merger.filenames import DCP
from merger.filenames import RANKS as FSDP_RANKS
from merger.foreign.files import Seen

from tests.merger.dcp_samples import FORMS, write_form
from tests.merger.merging import run_program, unchecked, weights

RANKS, ROWS, TENSORS = 2, 512, 24
# Each write takes a moment, so that there are moments to replace something in.
SLOW = "import os, time\nfast = os.pwrite\nos.pwrite = lambda *a: (time.sleep(0.02), fast(*a))[1]\n"
ALLOW = ("--allow", "keys")  # sharded safetensors do not say how large their tensors are
WHATS = ("a rank", "the config", "a step")


def write_step(folder: Path, step: int, form: str = FSDP_RANKS) -> Path:
    """Write a step of two ranks (of torch's own forms: of four files), each value of which is the step's number."""
    (folder / "huggingface").mkdir(parents=True)
    if form == FSDP_RANKS:
        for rank in range(RANKS):
            write_rank(folder, rank, step)
    else:
        write_form(form, {f"layers.{i}.weight": torch.full((RANKS * ROWS, 64), float(step)) for i in range(TENSORS)}, folder)
    (folder / "huggingface/config.json").write_text(config(step))
    (folder / "huggingface/tokenizer.json").write_text(json.dumps({"step": step}))
    return folder


def config(step: int) -> str:
    return json.dumps({"model_type": "none", "architectures": ["None"], "step": step})


def write_rank(folder: Path, rank: int, step: int) -> None:
    """Write one rank of a mesh."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (RANKS, ), mesh_dim_names=("fsdp", ))
        shape = torch.Size((RANKS * ROWS, 64))
        meta = TensorMeta(shape, (64, 1), torch.float32)
        state = {f"layers.{i}.weight": DTensor(torch.full((ROWS, 64), float(step)),
                                               DTensorSpec(mesh, (Shard(0), ), tensor_meta=meta), requires_grad=False)
                 for i in range(TENSORS)}  # yapf: disable
        name = folder / f"model_world_size_{RANKS}_rank_{rank}.pt"
        torch.save(state, name.with_suffix(".part"))
        os.replace(name.with_suffix(".part"), name)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two steps in the form of the parameter."""
    folder = tmp_path_factory.mktemp("steps")
    return {step: write_step(folder / str(step), step, getattr(request, "param", FSDP_RANKS)) for step in (1, 2)}


def copy_step(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder, copy_function=shutil.copy)  # times of its own, as a training gives them
    return folder


def replace(what: str, actor: Path, new: Path, how: random.Random) -> None:
    """Put step 2 in the place of step 1: one rank of it, its config, or all."""
    def put(name: str) -> None:
        if how.random() < 0.5:  # in one step, or in place
            shutil.copy(new / name, actor / f"{name}.part")
            os.replace(actor / f"{name}.part", actor / name)
        else:
            shutil.copy(new / name, actor / name)

    if what == "a rank":
        put(max(path.name for path in actor.iterdir() if path.suffix in (".pt", ".distcp", ".safetensors")))
    elif what == "the config":
        put("huggingface/config.json")
    else:
        copy_step(new, actor.with_name("coming"))
        os.rename(actor, actor.with_name("gone"))
        os.rename(actor.with_name("coming"), actor)


def outcome(target: Path) -> set[float]:
    """Return the steps that a merged folder is of."""
    values = {float(v) for tensor in weights(target).values() for v in (tensor.min(), tensor.max())}
    values.add(json.loads((target / "config.json").read_text())["step"])
    values.add(json.loads((target / "tokenizer.json").read_text())["step"])
    return values


def replace_midway(what: str, verify: bool, moment: float, chance: random.Random, steps: dict[int, Path], folder: Path) -> str:
    actor = copy_step(steps[1], folder / "step/actor")
    args = ["--local-dir", str(actor), "--save-dir", str(folder / "out"), *ALLOW, *(["--verify"] if verify else [])]
    found_it = folder / "found"
    tell = (f"from merger.foreign.files import Seen\nsurvey = Seen.survey\n"
            f"Seen.survey = lambda self, paths: (survey(self, paths), open({str(found_it)!r}, 'a').close())[0]\n")
    process = subprocess.Popen([sys.executable, *unchecked(SLOW + tell), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)  # yapf: disable
    time.sleep(moment)
    begun, complete = found_it.exists(), (folder / "out").exists()
    replace(what, actor, steps[2], chance)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:
        found = outcome(folder / "out")
        if what == "a step" or len(found) == 1:
            assert len(found) == 1, (what, moment, found)
            return "one step"
        # Replaced, in part, before the merge looked at the files: what lay there then was merged.
        assert not begun and not complete, (what, moment, found)
        assert json.loads((folder / "out/merge.json").read_text())["sources"], err
        return "began after"
    assert process.returncode == 2 and len(err.splitlines()) == 1, err
    assert "changed while it was read" in err or not begun, err
    assert sorted(path.name for path in folder.iterdir() if path.name not in ("step", "found")) == []
    return "changed"


@pytest.mark.parametrize("steps", FORMS, indirect=True)
@pytest.mark.parametrize("verify", [False, True], ids=["", "--verify"])
@pytest.mark.parametrize("what", WHATS)
def test_what_is_replaced_while_it_is_merged_is_refused(what: str, verify: bool, steps: dict[int, Path], tmp_path: Path) -> None:
    """The merge has begun to write: its sources are known, and half of the bytes are still to come."""
    actor = copy_step(steps[1], tmp_path / "step/actor")
    go_on = tmp_path / "go on"
    waits = ("import os, time\nfast = os.pwrite\n"
             f"os.pwrite = lambda *a: ([time.sleep(0.02) for _ in iter(lambda: os.path.exists({str(go_on)!r}), True)], fast(*a))[1]\n")
    process = subprocess.Popen([sys.executable, *unchecked(waits), "--local-dir", str(actor), "--save-dir", str(tmp_path / "out"), *ALLOW,
                                *(["--verify"] if verify else [])],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # yapf: disable
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".out.merging-*/*.safetensors")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    replace(what, actor, steps[2], random.Random(what))
    go_on.touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "changed while it was read" in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", FORMS, indirect=True)
@pytest.mark.parametrize("what", WHATS)
def test_what_is_replaced_after_the_files_were_found_is_refused(what: str, steps: dict[int, Path], tmp_path: Path) -> None:
    """They are looked for once: a second look would take what came since for what was there."""
    actor = copy_step(steps[1], tmp_path / "step/actor")
    paused = ("import pathlib, time\nfrom merger import publish\n"
              f"publish.restore = lambda _, at=pathlib.Path({str(tmp_path)!r}): ((at / 'found').touch(), "
              "[time.sleep(0.02) for _ in iter((at / 'go on').exists, True)])\n")
    with subprocess.Popen([sys.executable, *unchecked(paused), "--local-dir", str(actor), "--save-dir", str(tmp_path / "out"), *ALLOW],
                          stderr=subprocess.PIPE, text=True) as process:  # yapf: disable
        end = time.monotonic() + 60
        while not (tmp_path / "found").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        replace(what, actor, steps[2], random.Random(what))
        (tmp_path / "go on").touch()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "changed while it was read" in err, err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("steps", [FSDP_RANKS, DCP], indirect=True)
@pytest.mark.parametrize("verify", [False, True], ids=["", "--verify"])
@pytest.mark.parametrize("what", WHATS)
def test_at_thirty_random_moments_there_is_never_a_mixture(what: str, verify: bool, steps: dict[int, Path], tmp_path: Path) -> None:
    chance = random.Random(f"{what} {verify}")
    actor = copy_step(steps[1], tmp_path / "time/actor")
    began = time.monotonic()
    run = run_program("--local-dir", actor, "--save-dir", tmp_path / "time/out", *ALLOW, *(["--verify"] if verify else []),
                      program=unchecked(SLOW))  # yapf: disable
    assert run.code == 0, run.err
    seconds = time.monotonic() - began
    ends = [replace_midway(what, verify, chance.uniform(0.0, 1.1 * seconds), chance, steps, tmp_path / str(number))
            for number in range(30)]  # yapf: disable
    assert "changed" in ends, ends


# The gate itself


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    yield path


CHANGES: dict[str, Callable[[Path], object]] = {
    "written in place": lambda path: path.write_bytes(b"new"),
    "replaced": lambda path: (path.with_name("y").write_bytes(b"new"), os.replace(path.with_name("y"), path)),
    "replaced with its old times": lambda path: (path.with_name("y").write_bytes(b"new"), shutil.copystat(path, path.with_name("y")),
                                                 os.replace(path.with_name("y"), path)),
    "written in place with its old times": lambda path: (before := path.stat(), path.write_bytes(b"new"),
                                                         os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))),
    "removed": lambda path: path.unlink(),
    "made a link": lambda path: (path.with_name("y").write_bytes(b"old"), path.unlink(), path.symlink_to("y")),
}  # yapf: disable


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changed_is_told_from_the_one_that_was_read(how: str, file: Path) -> None:
    seen = Seen()
    assert seen.read(file, 10) == b"old"
    seen.check()
    CHANGES[how](file)
    with pytest.raises(MergeError, match="changed while it was read"):
        seen.check()
    with pytest.raises(MergeError, match="changed while it was read"):
        seen.read(file, 10)


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changed_since_it_was_found_is_not_read(how: str, file: Path) -> None:
    seen = Seen()
    time.sleep(0.06)
    seen.survey([file])
    CHANGES[how](file)
    with pytest.raises(MergeError, match="changed while it was read"):
        seen.read(file, 10)


def test_a_file_written_a_moment_ago_is_read_when_its_times_can_tell(file: Path) -> None:
    seen = Seen()
    fd = seen.open(file)  # waits until the clock has gone on
    file.write_bytes(b"new")
    os.close(fd)
    with pytest.raises(MergeError, match="changed"):
        seen.check()


def test_one_more_link_of_ours_is_no_change(file: Path) -> None:
    seen = Seen()
    seen.read(file, 10)
    os.link(file, file.with_name("y"))
    seen.linked(file)
    seen.check()
