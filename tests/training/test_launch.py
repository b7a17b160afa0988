"""What a start leaves where nothing began, and the variables of a trainer."""
from __future__ import annotations

from pathlib import Path

import pytest

from tasks.lib.training import launch
from tasks.lib.training.place import Place, outside, size_bytes
from tests.training.runs import record
from training.folder import RunFolder


@pytest.mark.parametrize(("attempts", "stays"), [([], False), ([{"number": 1}], True)])
def test_the_name_of_a_run_that_never_began_is_free(tmp_path: Path, attempts: list[dict], stays: bool) -> None:
    folder = RunFolder(tmp_path / "x")
    folder.create(record(folder.path, attempts=attempts))
    folder.logs.mkdir()
    (folder.logs / "supervisor.log").write_text("why")
    launch.forget(folder.path)
    assert folder.exists() is stays and (folder.logs / "supervisor.log").exists()


def test_variables_of_a_run_keep_everything_in_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    found = launch.variables(Place("docker"), "/workspace/saves/" + "x" * 64, {
        "OMP_NUM_THREADS": "1",
        "WANDB_DIR": "/elsewhere"
    })
    assert (found["WANDB_DIR"], found["WANDB_MODE"], found["OMP_NUM_THREADS"]) == ("/workspace/saves/" + "x" * 64,
                                                                                   "online", "1")
    assert len(found["RAY_TMPDIR"]) < 40, "a socket's path has at most 107 bytes, Ray's own part included"
    assert "PYTHONPATH" not in found, "the image has its own"


@pytest.mark.parametrize(("text", "size"), [("64m", 64 << 20), ("32g", 32 << 30), ("1.5GB", 3 << 29), ("512", 512),
                                            ("much", None), ("", None)])
def test_sizes_are_read_as_docker_writes_them(text: str, size: int | None) -> None:
    assert size_bytes(text) == size


def test_a_path_of_the_container_is_told_as_this_machine_s() -> None:
    from tasks.lib.engine.mounts import Translation
    from tasks.lib.settings import ROOT
    place = Place("docker", translation=Translation(ROOT, {"/big/models": "/host/big/models"}))
    assert outside(place, "/host/big/models/m") == "/big/models/m"
    assert outside(place, "/workspace/models/m") == str(ROOT / "models/m")
    assert outside(Place("local"), "/x/y") == "/x/y"
