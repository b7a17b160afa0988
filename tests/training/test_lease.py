"""One watcher a run: on this machine, from another one, and after a death."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from training import machine
from training.lease import Lease, Lost, Taken, lives

HOLD = "import sys, time; from pathlib import Path; from training.lease import Lease; Lease(Path(sys.argv[1])).take(); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "watch.lock"


def holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)],
                               stdout=subprocess.PIPE,
                               text=True,
                               cwd=Path(__file__).parents[2])
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def write(path: Path, **owner: object) -> None:
    path.write_text(
        json.dumps({
            "host": "elsewhere",
            "boot_id": "another",
            "pid": 7,
            "start_time": 1,
            "token": "t",
            "count": "1",
            **owner
        }))


def test_a_process_that_lives_is_named_and_one_that_was_killed_is_followed_at_once(path):
    process = holder(path)
    try:
        with pytest.raises(Taken, match=f"process {process.pid} on "):
            Lease(path).take()
        process.send_signal(signal.SIGKILL)
        process.wait()
        began = time.monotonic()
        mine = Lease(path)
        mine.take()
        assert time.monotonic() - began < 5
        mine.check()
        mine.release()
        assert not path.exists()
    finally:
        process.kill()
        process.wait()


def test_a_later_process_with_the_same_id_is_another(path):
    write(path, **{**machine.identity(os.getpid()), "start_time": 1})
    Lease(path).take()


def test_an_owner_of_another_start_of_this_machine_is_gone(path):
    write(path, host=machine.host())
    Lease(path, silence=600).take()


@pytest.mark.parametrize("changed", [{"boot_id": "another", "host": "elsewhere"}, {"pid_namespace": "pid:[1]"}])
def test_whom_the_system_cannot_be_asked_about(changed, monkeypatch):
    own = machine.identity(os.getpid())
    assert lives(own) is True and lives({**own, **changed}) is None
    monkeypatch.setattr(machine, "boot_id", lambda: "")  # not Linux
    assert lives({**own, "boot_id": ""}) is None


def test_a_process_that_was_gone_when_it_was_looked_at_does_not_live():
    assert machine.lives(machine.identity(2**22 + 1)) is False


def test_an_owner_on_another_machine_is_looked_at_until_it_counts(path):
    write(path)
    stop = threading.Event()

    def beat() -> None:
        count = 1
        while not stop.wait(0.05):
            count += 1
            write(path, count=str(count))

    thread = threading.Thread(target=beat)
    thread.start()
    said: list[str] = []
    try:
        with pytest.raises(Taken, match="process 7 on elsewhere"):
            Lease(path, beat=0.05, silence=20).take(said.append)
    finally:
        stop.set()
        thread.join()
    assert len(said) == 1 and "looking for 20 s whether it lives" in said[0]
    mine = Lease(path, beat=0.05, silence=0.3)
    mine.take()  # it counts no more
    mine.check()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_file_that_says_nothing_is_taken_after_the_silence(text, path):
    path.write_text(text)
    mine = Lease(path, beat=0.05, silence=0.2)
    mine.take()
    mine.check()


def test_of_many_that_take_it_from_the_dead_one_has_it(path):
    write(path, **{**machine.identity(os.getpid()), "pid": 2**22 + 1})
    taken, refused = [], []

    def take() -> None:
        one = Lease(path, beat=0.02, silence=0.2)
        try:
            one.take()
            taken.append(one)
        except Taken:
            refused.append(one)

    threads = [threading.Thread(target=take) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.1)
    owners = []
    for one in taken:
        try:
            one.check()
            owners.append(one)
        except Lost:
            pass
    assert len(owners) == 1 and len(taken) + len(refused) == 12
    assert not list(path.parent.glob("watch.lock.*"))


def test_who_was_taken_for_dead_finds_out_before_it_deletes_and_leaves_the_others_file(path):
    slow = Lease(path)
    slow.take()
    write(path, token="another")
    with pytest.raises(Lost, match="process 7 on elsewhere"):
        slow.check()
    slow.release()
    assert path.exists()
    path.unlink()
    with pytest.raises(Lost, match="nobody"):
        slow.check()


def test_it_counts_while_it_is_held(path):
    mine = Lease(path, beat=0.02)
    mine.take()
    first = json.loads(path.read_text())
    time.sleep(0.3)
    second = json.loads(path.read_text())
    assert second["count"] > first["count"] and second["token"] == first["token"]
    mine.release()
