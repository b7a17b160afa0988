"""Ray's own logs of a dead attempt."""
from __future__ import annotations

import time

import pytest

from tests.training.runs import set_time
from tests.training.test_supervisor import make, supervise
from training import raylogs


def session(tmp_path, **files):
    logs = tmp_path / "ray" / "session_latest" / "logs"
    logs.mkdir(parents=True)
    for name, text in files.items():
        (logs / name.replace("_", "-", 1).replace("__", ".")).write_text(text)
    return logs


def test_what_was_written_since_is_kept_in_part(tmp_path):
    logs = session(tmp_path,
                   worker_1__err="old",
                   worker_2__err="x" * 300_000 + "\nend",
                   worker_3__out="no",
                   raylet__out="")
    set_time(logs / "worker-1.err", 1.0)
    found = raylogs.find({"RAY_TMPDIR": str(tmp_path)}, time.time() - 60)
    assert [place.name for place in found] == ["worker-2.err"]
    raylogs.keep(found, tmp_path / "kept")
    assert (tmp_path / "kept" / "worker-2.err").stat().st_size == raylogs.FILE_BYTES


@pytest.mark.parametrize("address, there", [("10.0.0.1:6379", False), ("auto", False), ("local", True), ("", True)])
def test_a_clusters_logs_are_not_ours(tmp_path, address, there):
    session(tmp_path, worker_1__err="x")
    assert bool(raylogs.find({"RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": address}, 0.0)) is there
    assert raylogs.find({"RAY_TMPDIR": str(tmp_path / "nothing")}, 0.0) == []


def test_a_workers_last_words_name_the_death_that_the_driver_did_not_see(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    logs = session(tmp_path, worker_1__err="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n")
    set_time(logs / "worker-1.err", time.time() + 60)
    folder = make(tmp_path / "run", "fake.do=ray_worker", "fake.at=3", variables={"RAY_TMPDIR": str(tmp_path)})
    supervise(folder)
    assert folder.read()["attempts"][0]["cause"] == "gpu_oom"
    assert (folder.logs / "attempt-1-ray" / "worker-1.err").is_file()
