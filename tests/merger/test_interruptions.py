"""Runs that end early: killed, interrupted, out of space or permissions. The target is as before, or complete."""
from __future__ import annotations

import ctypes
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from merger.filenames import RANKS

from tests.fixtures.needs import missing
from tests.merger.dcp_samples import FORMS, write_form
from tests.merger.merging import (
    PROGRAM,
    Sample,
    ask_here,
    differences,
    listing,
    merge,
    run_program,
    unchecked,
    untouched,
    weights,
)

TENSORS, ELEMENTS = 16, 1 << 20
ALLOW = ("--allow", "keys")  # sharded safetensors do not say how large their tensors are
KILLS = 30
OVER_OLD = "with --force over an earlier merge"

# Makes the copying last two seconds and more, however fast the disk is.
SLOW_WRITES = """
import os, time
fast = os.pwrite
os.pwrite = lambda fd, data, offset: (time.sleep(0.5 if len(data) > 1e6 else 0), fast(fd, data, offset))[1]
"""


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 64 MB, in the form of the parameter: large enough to be killed in the middle."""
    folder = tmp_path_factory.mktemp("large") / "actor"
    (folder / "huggingface").mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    state = {f"layers.{i}.weight": torch.randn(1024, ELEMENTS // 1024, generator=generator) for i in range(TENSORS)}
    write_form(getattr(request, "param", RANKS), state, folder)
    (folder / "huggingface/config.json").write_text('{"model_type": "none", "architectures": ["None"]}')
    (folder / "huggingface/tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that end with the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start(processes: list[subprocess.Popen[str]], *args: str | Path, program: tuple[str, ...]) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, *program, *map(str, args)],
                               stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE,
                               text=True,
                               start_new_session=True)
    processes.append(process)
    return process


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def wait_for_staging(folder: Path, process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Wait until the merge has begun to write beside its target."""
    end = time.monotonic() + seconds
    while not any(list((folder / name).glob("*.safetensors")) for name in hidden(folder)):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.001)


def state_of(target: Path) -> dict[str, bytes | None] | None:
    """Return the files of a target, but for the record with its seconds; None where there is no target."""
    if not target.exists():
        return None
    files = listing(target)
    record = files.pop("merge.json", None)
    assert record is None or json.loads(record)["tensors"] == TENSORS
    return files


@pytest.mark.timeout(900)
@pytest.mark.parametrize("checkpoint", [RANKS, *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS if form != RANKS)],
                         indirect=True)
@pytest.mark.parametrize("before", ["with no earlier merge", OVER_OLD])
def test_kill_9_at_any_moment_leaves_the_old_state_or_the_new(before: str, checkpoint: Path, tmp_path: Path,
                                                              started: list[subprocess.Popen[str]]) -> None:
    target, chance = tmp_path / "saves/out", random.Random(before)
    args = ["--local-dir", checkpoint, "--save-dir", target, "--max-shard-size", "8MB", "--force", *ALLOW]

    def restore(number: int) -> None:
        """Give the target its old state again."""
        if target.exists():
            os.rename(target, tmp_path / f"aside-{number}")
        if before == OVER_OLD:
            run = run_program("--local-dir",
                              checkpoint,
                              "--save-dir",
                              target,
                              "--dtype",
                              "float16",
                              *ALLOW,
                              program=unchecked())
            assert run.code == 0, run.err

    began = time.monotonic()
    assert run_program(*args, program=unchecked()).code == 0
    seconds = time.monotonic() - began
    new = state_of(target)
    restore(-1)
    old = state_of(target)
    assert new is not None and new != old and len(new) > TENSORS // 4

    ends = {"old": 0, "new": 0}
    for attempt in range(KILLS):
        if state_of(target) != old:  # the run before came through
            restore(attempt)
        process, began = start(started, *args, program=unchecked()), time.monotonic()
        if attempt % 3:  # two of three kills fall into the time of writing
            while process.poll() is None and not (target.parent.is_dir() and hidden(target.parent)):
                time.sleep(0.0005)
        try:
            process.wait(chance.uniform(0, (0.6 if attempt % 3 else 1.1) * seconds))
            seconds = min(seconds, time.monotonic() - began)  # the machine was busy with other things when it was timed
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        state = state_of(target)
        assert state in (old, new), sorted(state or {})
        ends["old" if state == old else "new"] += 1
        assert len(hidden(target.parent)) <= 1  # leftovers do not pile up
    assert ends["old"] >= KILLS // 5, ends  # the kills came while there was something to interrupt
    assert run_program(*args, program=unchecked()).code == 0
    assert state_of(target) == new and hidden(target.parent) == []


@pytest.mark.parametrize("checkpoint", FORMS, indirect=True)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("before", ["with no earlier merge", "over an earlier merge"])
def test_a_signal_while_writing_leaves_nothing(before: str, number: signal.Signals, code: int, checkpoint: Path,
                                               tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    args = ["--local-dir", checkpoint, "--save-dir", tmp_path / "out", "--force", *ALLOW]
    if before == "over an earlier merge":
        assert run_program(*args, "--dtype", "float16", program=unchecked()).code == 0
    with untouched(tmp_path):
        process = start(started, *args, program=unchecked(SLOW_WRITES))
        wait_for_staging(tmp_path, process)
        os.killpg(process.pid, number)  # as a terminal does
        out, err = process.communicate(timeout=30)
    assert process.returncode == code and out == ""
    assert len(err.splitlines()) <= 1 and "Traceback" not in err
    if number == signal.SIGINT:
        assert err == "merge: interrupted; nothing was changed\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_while_the_keys_are_checked_ends_that_too(number: signal.Signals, code: int, samples: dict[str,
                                                                                                            Sample],
                                                           tmp_path: Path, started: list[subprocess.Popen[str]],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing is remembered there
    with untouched(tmp_path):
        process = start(started,
                        "--local-dir",
                        samples["FSDP1, 4 ranks"].actor,
                        "--save-dir",
                        tmp_path / "out",
                        program=(str(PROGRAM), ))
        end = time.monotonic() + 60
        while not (children := psutil.Process(process.pid).children()):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT) if number == signal.SIGINT else process.terminate()
        out, err = process.communicate(timeout=30)
    assert process.returncode == code and out == ""
    assert len(err.splitlines()) <= 1 and "Traceback" not in err
    assert psutil.wait_procs(children, timeout=15)[1] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_while_checksums_are_taken_is_heard(number: signal.Signals, code: int, checkpoint: Path,
                                                     tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    slow = ("import time, types, zlib\nfrom merger import shardfile, show\n"
            "shardfile.zlib = types.SimpleNamespace(error=zlib.error, crc32=lambda data, so_far=None: zlib.crc32(data) if so_far is None else (time.sleep(0.5), 0)[1])\n"
            "shardfile.CRC_CHUNK, show.PLAIN_STEP = 1 << 16, 0.1")  # eight minutes for the file
    process = start(started, "--local-dir", checkpoint, "--save-dir", tmp_path / "out", "--verify",
                    program=unchecked(slow))  # yapf: disable
    assert process.stderr is not None
    while "checking the shards" not in process.stderr.readline():
        assert process.poll() is None
    began = time.monotonic()
    os.killpg(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode == code and time.monotonic() - began < 60
    assert listing(tmp_path) == {}


def test_ctrl_c_after_the_exchange_says_that_the_merge_is_complete(checkpoint: Path, tmp_path: Path) -> None:
    stop = ("from merger import publish\ndef leave(*_): raise KeyboardInterrupt\npublish.Staging.__exit__ = leave")
    run = run_program("--local-dir", checkpoint, "--save-dir", tmp_path / "out", program=unchecked(stop))
    assert (run.code, run.err) == (130, f"merge: interrupted; {tmp_path / 'out'} is complete\n")
    assert len(weights(tmp_path / "out")) == TENSORS


# Standard output that takes nothing


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "JSON"])
@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("out", ["a full disk", "a reader that left", "closed"])
def test_a_result_that_cannot_be_printed_is_there_all_the_same(out: str, buffered: str, form: list[str],
                                                               checkpoint: Path, tmp_path: Path) -> None:
    redirection = {"a full disk": ">/dev/full", "a reader that left": "| true", "closed": ">&-"}[out]
    if out == "a full disk" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = shlex.join([sys.executable, *unchecked(), "--local-dir", str(checkpoint), "--save-dir",
                          str(tmp_path / "out"), *form])  # yapf: disable
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} {redirection}"],
                          env={
                              **os.environ, "PYTHONUNBUFFERED": buffered
                          },
                          capture_output=True,
                          text=True,
                          timeout=60)
    (line, ) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("merge: the result cannot be printed (")
    assert line.endswith(f"); {tmp_path / 'out'} is complete")
    assert len(weights(tmp_path / "out")) == TENSORS


@pytest.mark.parametrize("name", ["modèle", b"mod\xe8le".decode(errors="surrogateescape")], ids=["UTF-8", "Latin-1"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_folders_of_any_name_are_merged_and_named(encoding: str, name: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(checkpoint)
    out, strict = tmp_path / f"{name}-out", {"PYTHONIOENCODING": f"{encoding}:strict"}
    args = ["--local-dir", tmp_path / name, "--save-dir", out]
    assert run_program(*args, "--json", program=unchecked(), env=strict).record()["folder"] == str(out)
    run = run_program(*args, "--force", program=unchecked(), env=strict)
    assert run.code == 0, run.err


@pytest.mark.parametrize("name", ["numpy", "ml_dtypes", "rich"])
def test_a_package_that_is_not_installed_is_named(name: str, checkpoint: Path, tmp_path: Path) -> None:
    absent = ("-c", f"import sys; sys.path.insert(0, {str(PROGRAM.parent)!r}); sys.modules[{name!r}] = None\n"
              "from merger import cli; sys.exit(cli.main())")  # yapf: disable
    with untouched(tmp_path):
        run = run_program("--local-dir", checkpoint, "--save-dir", tmp_path / "out", program=absent)
        assert run.refusal.startswith(f"needs {name}, ") and run.refusal.endswith(f"; pip install {name}")


@pytest.mark.parametrize("args", [["--max-shard-size", "1MB", "--verify"], ["--inspect"]], ids=["merge", "inspect"])
def test_a_low_limit_of_open_files_is_raised(args: list[str], checkpoint: Path, samples: dict[str, Sample],
                                             tmp_path: Path) -> None:
    import resource
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    source = samples["HSDP, 2 x 3 ranks, tied"].actor if args == ["--inspect"] else checkpoint
    run = run_program("--local-dir",
                      source,
                      "--save-dir",
                      tmp_path / "out",
                      *args,
                      program=unchecked(),
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (8, hard)))
    assert run.code == 0, run.err


def test_a_second_merge_into_the_same_folder_is_refused(checkpoint: Path, tmp_path: Path,
                                                        started: list[subprocess.Popen[str]]) -> None:
    args = ["--local-dir", checkpoint, "--save-dir", tmp_path / "out"]
    go_on = tmp_path / "go on"
    waits = (f"import os, time\nfast = os.pwrite\n"
             f"os.pwrite = lambda *args: ([time.sleep(0.05) for _ in iter(lambda: os.path.exists({str(go_on)!r}), True)], fast(*args))[1]\n")
    first = start(started, *args, program=unchecked(waits))
    wait_for_staging(tmp_path, first)
    second = run_program(*args, program=unchecked())
    assert second.code == 2 and "another merge is writing" in second.err and str(first.pid) in second.err
    go_on.touch()
    assert first.wait(timeout=60) == 0
    assert (tmp_path / "out/model.safetensors").is_file() and hidden(tmp_path) == []


@pytest.mark.parametrize("when", ["before the staging", "while it writes"])
def test_weights_that_came_since_the_first_look_are_not_replaced(when: str, checkpoint: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    from merger import MergeError, merging
    from merger.job import Options, prepare
    monkeypatch.setattr("merger.model_check.ask", ask_here)
    target, write_files = tmp_path / "out", merging.write_files

    def another_s(*args: Any, **kwargs: Any) -> Any:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"another merge's")
        return write_files(*args, **kwargs) if args else None

    options = Options((str(checkpoint), ), save_dir=str(target), quiet=True, allow=frozenset({"keys"}))
    job = prepare(options)
    if when == "before the staging":
        another_s()
    else:
        monkeypatch.setattr(merging, "write_files", another_s)
    with pytest.raises(MergeError, match="already holds weights"):
        merging.carry_out(job, options, 0.0)
    assert listing(tmp_path) == {"out": None, "out/model.safetensors": b"another merge's"}


def test_merges_into_neighbouring_folders_do_not_disturb_each_other(checkpoint: Path, tmp_path: Path,
                                                                    started: list[subprocess.Popen[str]]) -> None:
    first = start(started, "--local-dir", checkpoint, "--save-dir", tmp_path / "out", program=unchecked(SLOW_WRITES))
    wait_for_staging(tmp_path, first)
    assert run_program("--local-dir", checkpoint, "--save-dir", tmp_path / "out2", program=unchecked()).code == 0
    assert first.wait(timeout=60) == 0
    assert differences(weights(tmp_path / "out"), weights(tmp_path / "out2")) == []


def test_a_run_cleans_up_after_a_killed_one(checkpoint: Path, tmp_path: Path,
                                            started: list[subprocess.Popen[str]]) -> None:
    args = ["--local-dir", checkpoint, "--save-dir", tmp_path / "out"]
    process = start(started, *args, program=unchecked(SLOW_WRITES))
    wait_for_staging(tmp_path, process)
    process.kill()
    process.wait()
    assert len(hidden(tmp_path)) == 1
    assert run_program(*args, program=unchecked()).code == 0
    assert hidden(tmp_path) == [] and len(weights(tmp_path / "out")) == TENSORS


# Two renames in place of an exchange, as on NFS; the second does what {what} says.
TWO_RENAMES = """
import os, signal
from merger import publish
publish.exchange = lambda a, b: False
rename, kill = os.rename, lambda: os.kill(os.getpid(), signal.SIGKILL)
def fault(): raise OSError(5, "Input/output error", "the disk")
os.rename = lambda a, b: {what}() if not str(a).endswith(".old") and str(b) == {target!r} else rename(a, b)
"""


@pytest.mark.parametrize("default", [True, False], ids=["the default target", "another target"])
def test_a_folder_lost_to_a_kill_between_two_renames_comes_back(default: bool, checkpoint: Path,
                                                                tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "actor")
    target = tmp_path / ("actor/huggingface" if default else "out")
    args = ["--local-dir", tmp_path / "actor", "--save-dir", target, "--force"]
    assert run_program(*args, "--dtype", "float16", program=unchecked()).code == 0
    (target / "note.txt").write_text("mine")
    old = state_of(target)
    killed = run_program(*args, program=unchecked(TWO_RENAMES.format(what="kill", target=str(target))))
    assert killed.code == -signal.SIGKILL and not target.exists()
    again = run_program(*args, "--dtype", "none", program=unchecked())
    assert again.code == 2 and not target.exists()  # what is no merge at all puts nothing back
    refused = run_program(*[arg for arg in args if arg != "--force"], program=unchecked())
    assert refused.code == 2 and "--force" in refused.err and state_of(target) == old
    assert run_program(*args, program=unchecked()).code == 0
    assert hidden(target.parent) == [] and (target / "note.txt").read_text() == "mine"
    assert {tensor.dtype for tensor in weights(target).values()} == {torch.bfloat16}


def test_a_fault_between_two_renames_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    args = ["--local-dir", checkpoint, "--save-dir", tmp_path / "out", "--force"]
    assert run_program(*args, "--dtype", "float16", program=unchecked()).code == 0
    with untouched(tmp_path):
        run = run_program(*args, program=unchecked(TWO_RENAMES.format(what="fault", target=str(tmp_path / "out"))))
        assert "Input/output error" in run.refusal


def test_what_comes_to_the_target_while_a_merge_runs_stays(checkpoint: Path, tmp_path: Path,
                                                           started: list[subprocess.Popen[str]]) -> None:
    models = tmp_path / "models"
    args = ["--local-dir", checkpoint, "--force", "--save-dir"]
    assert run_program(*args, models, "--dtype", "float16", program=unchecked()).code == 0
    slow = start(started, *args, models, program=unchecked(SLOW_WRITES))
    wait_for_staging(tmp_path, slow)
    assert run_program(*args, models / "other", program=unchecked()).code == 0
    (models / "note.txt").write_text("mine")
    assert slow.wait(timeout=60) == 0
    assert (models / "note.txt").read_text() == "mine"
    assert differences(weights(models), weights(models / "other")) == [] and hidden(tmp_path) == []


# A full disk


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB, in memory or of a (loop) disk; the merged model has 32 MB."""
    folder, image = tmp_path / "disk", tmp_path / "disk.img"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if request.param == "ext4":
        if not shutil.which("mkfs.ext4"):
            missing("mkfs.ext4", "mkfs.ext4 is not here")
        with image.open("wb") as file:
            file.truncate(24 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
        mount = ["mount", "-o", "loop", str(image), str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        missing("mount", f"a small {request.param} cannot be mounted here (it takes root): {done.stderr.strip()}")
    if request.param == "ext4":
        (folder / "lost+found").rmdir()
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("checkpoint", FORMS, indirect=True)
def test_too_small_a_disk_is_refused_before_a_byte_is_written(checkpoint: Path, small_disk: Path) -> None:
    run = run_program("--local-dir", checkpoint, "--save-dir", small_disk / "out", *ALLOW, program=unchecked())
    assert str(small_disk) in run.refusal and "33.6 MB are needed" in run.err
    assert listing(small_disk) == {}


@pytest.mark.parametrize("checkpoint", FORMS, indirect=True)
@pytest.mark.parametrize("before", ["with no earlier output", "over earlier output"])
def test_a_disk_that_fills_up_midway_leaves_what_was_there(before: str, checkpoint: Path, small_disk: Path) -> None:
    if before == "over earlier output":
        (small_disk / "out").mkdir()
        (small_disk / "out/model.safetensors").write_bytes(b"earlier")
        (small_disk / "out/config.json").write_text("{}")
    lie = "import collections, shutil; shutil.disk_usage = lambda path: collections.namedtuple('u', 'free')(1 << 60)"
    with untouched(small_disk):
        run = run_program("--local-dir",
                          checkpoint,
                          "--save-dir",
                          small_disk / "out",
                          "--force",
                          *ALLOW,
                          program=unchecked(lie))
        assert "disk" in run.refusal and "nothing was changed" in run.err


@pytest.mark.parametrize("checkpoint", FORMS, indirect=True)
def test_a_file_size_limit_leaves_what_was_there(checkpoint: Path, tmp_path: Path) -> None:
    import resource
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.safetensors").write_bytes(b"earlier")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))

    with untouched(tmp_path):
        run = run_program("--local-dir",
                          checkpoint,
                          "--save-dir",
                          tmp_path / "out",
                          "--force",
                          *ALLOW,
                          program=unchecked(),
                          preexec_fn=limit)
        assert "File too large" in run.refusal


# Permissions

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def obey_permissions() -> None:
    """Let root be bound by file modes, from the next program on."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[Callable[[Path, int], None]]:
    """A function that sets a mode, which ends with the test; skips where modes do not bind anyone."""
    changed = []

    def set_mode(path: Path, mode: int) -> None:
        changed.append((path, path.stat().st_mode & 0o7777))
        path.chmod(mode)

    (tmp_path / "probe").touch(0o000)
    probe = subprocess.run([sys.executable, "-c", f"open({str(tmp_path / 'probe')!r})"],
                           capture_output=True, text=True, preexec_fn=obey_permissions)  # yapf: disable
    (tmp_path / "probe").unlink()
    if "PermissionError" not in probe.stderr:
        missing("file modes", "file modes bind no one here")
    yield set_mode
    for path, mode in reversed(changed):
        path.chmod(mode)


def test_everything_is_on_the_disk_before_it_takes_its_place(samples: dict[str, Sample], tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    merge("--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "out", "--json").record()
    staged = [path for path in flushed if "/.out.merging-" in path]
    folder = next(path for path in staged if path.rpartition("/")[2].startswith(".out.merging-"))
    assert {f"{folder}/{name}" for name in listing(tmp_path / "out")} <= set(staged)
    assert flushed[-1] == str(tmp_path), "the folder's new name too"


@pytest.mark.parametrize("what", ["the folder", "a rank's file", "the config"])
def test_no_read_permission_is_refused(what: str, bound: Callable[[Path, int], None], spoil: Callable[..., Sample],
                                       tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    path = {
        "the folder": sample.actor,
        "a rank's file": sample.rank(1),
        "the config": sample.huggingface / "config.json"
    }[what]
    bound(path, 0)
    run = run_program("--local-dir",
                      sample.actor,
                      "--save-dir",
                      tmp_path / "out",
                      program=unchecked(),
                      preexec_fn=obey_permissions)
    assert str(path) in run.refusal and "Permission denied" in run.refusal
    assert sorted(path.name for path in tmp_path.iterdir()) == ["actor"]


@pytest.mark.parametrize("what", ["the folder above the target", "the target's parent, which is to be made"])
def test_no_write_permission_is_refused(what: str, bound: Callable[[Path, int], None], samples: dict[str, Sample],
                                        tmp_path: Path) -> None:
    (tmp_path / "saves").mkdir()
    target = tmp_path / "saves" / ("out" if what == "the folder above the target" else "deeper/out")
    bound(tmp_path / "saves", 0o555)
    run = run_program("--local-dir",
                      samples["FSDP1, 4 ranks"].actor,
                      "--save-dir",
                      target,
                      program=unchecked(),
                      preexec_fn=obey_permissions)
    assert str(tmp_path / "saves") in run.refusal and "Permission denied" in run.err
    assert listing(tmp_path / "saves") == {}


def test_a_target_that_is_read_only_is_named(bound: Callable[[Path, int], None], samples: dict[str, Sample],
                                             tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    bound(tmp_path / "out", 0o555)
    run = run_program("--local-dir",
                      samples["FSDP1, 4 ranks"].actor,
                      "--save-dir",
                      tmp_path / "out",
                      program=unchecked(),
                      preexec_fn=obey_permissions)
    assert f"cannot write in {tmp_path / 'out'}: Permission denied; mend" in run.refusal
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out"]


def test_a_read_only_folder_in_the_target_leaves_nothing_behind(bound: Callable[[Path, int], None],
                                                                samples: dict[str, Sample], tmp_path: Path) -> None:
    (tmp_path / "out/runs/deep").mkdir(parents=True)
    (tmp_path / "out/runs/deep/log").touch(0o444)
    bound(tmp_path / "out/runs/deep", 0o555)
    bound(tmp_path / "out/runs", 0o555)
    for _ in range(2):
        run = run_program("--local-dir",
                          samples["FSDP1, 4 ranks"].actor,
                          "--save-dir",
                          tmp_path / "out",
                          "--force",
                          program=unchecked(),
                          preexec_fn=obey_permissions)
        assert run.code == 0, run.err
        assert hidden(tmp_path) == [] and (tmp_path / "out/runs/deep/log").is_file()
        assert (tmp_path / "out/runs").stat().st_mode & 0o777 == 0o555


def test_a_read_only_file_in_the_checkpoint_s_folder_is_no_hindrance(bound: Callable[[Path, int], None],
                                                                     spoil: Callable[..., Sample],
                                                                     tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    (sample.huggingface / "code").mkdir()
    (sample.huggingface / "code/a.py").touch()
    bound(sample.huggingface / "code/a.py", 0o444)
    for _ in range(2):
        run = run_program("--local-dir",
                          sample.actor,
                          "--save-dir",
                          tmp_path / "out",
                          "--force",
                          program=unchecked(),
                          preexec_fn=obey_permissions)
        assert run.code == 0, run.err
