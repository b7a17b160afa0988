"""Putting a finished folder in place: the exchange, locks, leftovers, and targets that cannot be replaced."""
import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest
from merger import MergeError, publish
from merger.companions import keep_companions

from tests.fixtures.needs import missing
from tests.merger.merging import folder, listing, untouched


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system, or the file system, cannot exchange two folders."""

    def no_library(*_: object, **__: object) -> None:
        raise OSError("no C library")

    monkeypatch.setattr(publish.ctypes, "CDLL", no_library)


def test_two_folders_change_places(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", x="1", only_a=""), folder(tmp_path / "b", x="2")
    assert publish.exchange(a, b)
    assert listing(a) == {"x": b"2"} and listing(b) == {"x": b"1", "only_a": b""}


def test_a_system_that_cannot_exchange_says_so(tmp_path: Path, no_exchange: None) -> None:
    a, b = folder(tmp_path / "a", x="1"), folder(tmp_path / "b", x="2")
    assert not publish.exchange(a, b)
    assert listing(tmp_path) == {"a": None, "a/x": b"1", "b": None, "b/x": b"2"}


def test_an_exchange_that_fails_changes_nothing(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", x="1")
    with pytest.raises(OSError):
        publish.exchange(a, tmp_path / "nowhere")
    assert listing(tmp_path) == {"a": None, "a/x": b"1"}


@pytest.mark.parametrize("way", ["in one step", "in two renames"])
def test_a_folder_takes_the_place_of_another(way: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if way == "in two renames":
        request.getfixturevalue("no_exchange")
    publish.replace(folder(tmp_path / "new", x="new"), folder(tmp_path / "out", x="old"))
    beside = "new.old" if way == "in two renames" else "new.replaced"
    assert listing(tmp_path) == {"out": None, "out/x": b"new", beside: None, f"{beside}/x": b"old"}


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["a fault", "Ctrl-C"])
def test_the_first_of_two_renames_is_undone_where_the_second_fails(fault: BaseException, tmp_path: Path,
                                                                   no_exchange: None,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    new, out, rename = folder(tmp_path / "new", x="new"), folder(tmp_path / "out", x="old"), os.rename

    def fail(source: Path, place: Path) -> None:
        if source == new:
            raise fault
        rename(source, place)

    monkeypatch.setattr(os, "rename", fail)
    with untouched(tmp_path), pytest.raises(type(fault)):
        publish.replace(new, out)


def test_a_staged_folder_becomes_the_target(tmp_path: Path) -> None:
    with publish.Staging(tmp_path / "deep/er/out") as staging:
        (staging.folder / "x").write_text("new")
        assert not staging.target.exists()
        staging.publish()
    assert listing(tmp_path / "deep/er") == {"out": None, "out/x": b"new"}


def test_folders_made_for_a_target_that_is_never_published_go_again(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    with pytest.raises(ValueError), publish.Staging(tmp_path / "deep/er/still/out"):
        raise ValueError
    with pytest.raises(MergeError, match="cannot write"), publish.Staging(tmp_path / "deep/er" / ("n" * 250)):
        pass
    assert listing(tmp_path) == {"deep": None}


def test_a_staged_folder_replaces_the_target_and_keeps_its_mode(tmp_path: Path) -> None:
    folder(tmp_path / "out", **{"x": "old", "pytorch_model.bin": ""}).chmod(0o2750)
    with publish.Staging(tmp_path / "out") as staging:
        (staging.folder / "x").write_text("new")
        staging.publish()
    assert listing(tmp_path) == {"out": None, "out/x": b"new"}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o2750


@pytest.mark.parametrize("allowed", ["both", "the group", "neither"])
def test_a_replaced_target_keeps_owner_and_group_as_far_as_is_permitted(allowed: str, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    out, chown = folder(tmp_path / "out", x="old"), os.chown
    wanted, given = (out.stat().st_uid, out.stat().st_gid), []
    if os.geteuid() == 0:
        chown(out, *(wanted := (12345, 23456)))
    out.chmod(0o2770)

    def permit(path: Path, owner: int, group: int) -> None:
        if allowed == "neither" or (allowed == "the group" and owner != -1):
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))
        chown(path, owner, group)
        given.append((owner, group))

    monkeypatch.setattr(os, "chown", permit)
    with publish.Staging(out) as staging:
        (staging.folder / "x").write_text("new")
        staging.publish()
    assert listing(tmp_path) == {"out": None, "out/x": b"new"}
    assert given == {"both": [wanted], "the group": [(-1, wanted[1])], "neither": []}[allowed]
    found = out.stat()
    assert allowed != "both" or (found.st_uid, found.st_gid) == wanted
    assert stat.S_IMODE(found.st_mode) == 0o2770


def test_what_was_staged_vanishes_when_anything_fails(tmp_path: Path) -> None:
    folder(tmp_path / "out", x="old")
    for fault in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(fault), publish.Staging(tmp_path / "out") as staging:
            (staging.folder / "x").write_text("new")
            raise fault
    assert listing(tmp_path) == {"out": None, "out/x": b"old"}


def test_a_second_staging_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with publish.Staging(tmp_path / "out") as first:
        second = publish.Staging(tmp_path / "out")
        second.folder = second.folder.with_name(second.folder.name + "1")  # as of another process
        with pytest.raises(MergeError, match="another merge is writing"), second:
            pass
        assert first.folder.is_dir() and not second.folder.exists()
    with publish.Staging(tmp_path / "out"):
        pass


@pytest.mark.parametrize("name", ["out", "out[1]", "*"])
def test_leftovers_of_dead_merges_go_and_others_stay(name: str, tmp_path: Path) -> None:
    folder(tmp_path / f".{name}.merging-4000001", x="")
    folder(tmp_path / ".out2.merging-4000001", x="")
    folder(tmp_path / ".out.mine", x="")
    with publish.Staging(tmp_path / name):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.mine", ".out2.merging-4000001"]


def test_a_leftover_stays_where_it_cannot_be_told_whether_a_merge_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                        capsys: pytest.CaptureFixture[str]) -> None:

    def no_locks(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(publish.fcntl, "flock", no_locks)
    theirs = folder(tmp_path / f".out.merging-{os.getpid()}", x="half a model")  # numbers repeat between containers
    with publish.Staging(tmp_path / "out") as staging:
        (staging.folder / "x").write_text("new")
        staging.publish()
    assert listing(tmp_path) == {theirs.name: None, f"{theirs.name}/x": b"half a model", "out": None, "out/x": b"new"}
    assert f"left {theirs}" in capsys.readouterr().err


def test_a_folder_that_a_dead_merge_moved_aside_comes_back(tmp_path: Path) -> None:
    folder(tmp_path / ".out.merging-4000001.old", x="old")
    folder(tmp_path / ".out.merging-4000001", x="half a model")
    publish.restore(tmp_path / "out")
    assert (tmp_path / "out/x").read_text() == "old"
    with publish.Staging(tmp_path / "out"):
        pass
    assert listing(tmp_path) == {"out": None, "out/x": b"old"}


def test_a_folder_that_was_replaced_does_not_come_back_where_the_user_moved_the_new_one(tmp_path: Path) -> None:
    folder(tmp_path / ".out.merging-4000001.replaced", x="old")  # its merge died before it could remove it
    for _ in range(2):
        with publish.Staging(tmp_path / "out") as staging:
            (staging.folder / "x").write_text("new")
            staging.publish()
    assert listing(tmp_path) == {"out": None, "out/x": b"new"}


def test_a_folder_that_a_live_merge_moved_aside_stays_there(tmp_path: Path) -> None:
    aside = folder(tmp_path / ".out.merging-4000001.old", x="old")
    lock = os.open(aside, os.O_RDONLY)
    publish.fcntl.flock(lock, publish.fcntl.LOCK_EX)
    with untouched(tmp_path):
        publish.restore(tmp_path / "out")
        with pytest.raises(MergeError, match=r"another merge is writing .*/out \(process 4000001\)"):
            publish.Staging(tmp_path / "out").__enter__()
    os.close(lock)


@pytest.mark.parametrize("way", ["in one step", "in two renames", "with the end left to the next merge"])
def test_what_comes_to_the_target_while_a_merge_runs_stays(way: str, tmp_path: Path, request: pytest.FixtureRequest,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "in two renames":
        request.getfixturevalue("no_exchange")
    out = folder(tmp_path / "out", **{"model.safetensors": "old", "config.json": "old", "mine": "1"})
    folder(out / "runs", first="1")
    with monkeypatch.context() as patch, publish.Staging(out) as staging:
        if way == "with the end left to the next merge":
            patch.setattr(publish, "_retire", lambda *_: None)
        (staging.folder / "config.json").write_text("new")
        (staging.folder / "model-00001-of-00001.safetensors").write_text("new")
        keep_companions(out, staging.folder)
        (out / "note.txt").write_text("2")
        (out / "runs/second").write_text("2")
        folder(out / "other", **{"model.safetensors": "another merge's"})
        for name in ("pytorch_model.bin", "merge.json", "adapter_config.json"):
            (out / name).write_text("of what is replaced")
        staging.publish()
    if way == "with the end left to the next merge":
        with publish.Staging(out):
            pass
    assert listing(tmp_path) == {
        "out": None, "out/model-00001-of-00001.safetensors": b"new", "out/config.json": b"new", "out/mine": b"1",
        "out/runs": None, "out/runs/first": b"1", "out/runs/second": b"2", "out/note.txt": b"2", "out/other": None,
        "out/other/model.safetensors": b"another merge's"}  # yapf: disable


def test_what_cannot_be_moved_to_the_target_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           capsys: pytest.CaptureFixture[str]) -> None:
    out, rename = folder(tmp_path / "out", x="old"), os.rename

    def refuse(source: Path, place: Path) -> None:
        if source.name == "note.txt":
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        rename(source, place)

    monkeypatch.setattr(os, "rename", refuse)
    with publish.Staging(out) as staging:
        (out / "note.txt").write_text("mine")
        staging.publish()
    replaced = staging.folder.with_name(staging.folder.name + publish.REPLACED)
    assert (replaced / "note.txt").read_text() == "mine"
    (line, ) = capsys.readouterr().err.splitlines()
    assert f"left {replaced}" in line and "Permission denied" in line


def test_a_target_may_be_a_link_to_a_folder(tmp_path: Path) -> None:
    real = folder(tmp_path / "disk/real", x="old")
    (tmp_path / "out").symlink_to(real)
    with publish.Staging(tmp_path / "out") as staging:
        (staging.folder / "x").write_text("new")
        staging.publish()
    assert (tmp_path / "out/x").read_text() == "new"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_target_that_holds_the_checkpoint_is_refused(tmp_path: Path) -> None:
    actor = folder(tmp_path / "step/actor")
    for target in (actor, tmp_path / "step", tmp_path):
        with pytest.raises(MergeError, match="holds the checkpoint"):
            publish.check_target(target, [actor])
    publish.check_target(actor / "huggingface", [actor])
    publish.check_target(tmp_path / "step/actor2", [actor])


@pytest.mark.parametrize("below", ["out", "out/deep/er disk"])
def test_a_target_with_a_mount_point_is_refused(below: str, tmp_path: Path) -> None:
    out, point = tmp_path / "out", tmp_path / below
    point.mkdir(parents=True)
    folder(tmp_path / "elsewhere", x="")
    bind = subprocess.run(["mount", "--bind", tmp_path / "elsewhere", point], capture_output=True, text=True)
    if bind.returncode:
        missing("mount", f"nothing can be mounted here (it takes root): {bind.stderr.strip()}")
    try:
        (tmp_path / "link").symlink_to(out)
        for target in (out, tmp_path / "link"):
            with pytest.raises(MergeError, match=f"{target} (is a mount|has the mount point {point} in it)"):
                publish.check_replaceable(target)
        publish.check_replaceable(tmp_path / "out2")
    finally:
        subprocess.run(["umount", point], check=True)
    publish.check_replaceable(out)


def test_mount_points_are_found_without_a_table_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "out/a/disk")

    def no_table(_: Path) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_bytes", no_table)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(MergeError, match="out/a/disk"):
        publish.check_replaceable(tmp_path / "out")


def test_a_target_that_holds_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = folder(tmp_path / "out/deep")
    folder(tmp_path / "gone")
    monkeypatch.chdir(here)
    for target in (Path("."), here, Path(".."), tmp_path / "out"):
        with pytest.raises(MergeError, match="holds the current folder"):
            publish.check_replaceable(target)
    for target in (Path("below"), tmp_path / "out2", here / "below"):
        publish.check_replaceable(target)
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    publish.check_replaceable(tmp_path / "out")
