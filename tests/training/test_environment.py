"""What is seen of the environment's server, and which steps that poisons."""
from __future__ import annotations

import json
import re
import socket
import threading

import pytest

from tests.fixtures.dripping import DRIPS, dripping, within
from tests.training.test_supervisor import served
from training import rollouts
from training.environment import Answer, Monitor, ask
from training.rollouts import Errors, Played, Window, is_cut, verdict

LOOK = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "look"}]


@pytest.mark.parametrize("trajectory, cut", [
    ({
        "reward": 0,
        "conversations": LOOK
    }, True),
    ({
        "reward": 0.0,
        "conversations": LOOK
    }, True),
    ({
        "reward": 0,
        "conversations": [*LOOK, {
            "role": "user",
            "content": "a ball"
        }]
    }, False),
    ({
        "reward": 0.5,
        "conversations": LOOK
    }, False),
    ({
        "reward": 0,
        "conversations": []
    }, False),
    ({
        "reward": 0
    }, False),
    (None, False),
    ({
        "reward": 0,
        "conversations": ["x"]
    }, False),
],
                         ids=range(8))
def test_a_trajectory_that_the_environment_cut_off(trajectory, cut):
    assert is_cut(trajectory) is cut


def write(folder, step, *ranks):
    place = folder / f"step{step}"
    place.mkdir(parents=True)
    for rank, found in enumerate(ranks):
        (place / f"{rank}.json").write_text(found if isinstance(found, str) else json.dumps(found))


def test_a_steps_files(tmp_path):
    bad, good = {"reward": 0, "conversations": LOOK}, {"reward": 1, "conversations": LOOK}
    write(tmp_path, 3, [bad, good], [good, bad])
    assert rollouts.read(tmp_path, 3) == Played(4, 2, 2) and rollouts.count_files(tmp_path, 3) == 2
    write(tmp_path, 4, [bad], '[{"reward": 0')
    assert rollouts.read(tmp_path, 4) is None  # one is being written
    assert rollouts.read(tmp_path, 9) is None and rollouts.count_files(tmp_path, 9) == 0
    (tmp_path / "step10").mkdir()
    assert rollouts.later(tmp_path, 3) == ["step10", "step4"] and rollouts.later(tmp_path / "absent", 0) == []
    write(tmp_path, 5, "[" * 100_000)
    assert rollouts.read(tmp_path, 5) is None


@pytest.mark.parametrize("played, windows, errors, words", [
    (Played(128, 0, 8), [Window(5, None, "refused")], Errors(3), ""),
    (Played(128, 1, 8), [Window(5, None, "refused")], Errors(), "1 of 128 trajectories scored 0 because .* was away"),
    (Played(128, 1, 8), [Window(15, 16, "restarted")], Errors(), "restarted and lost its sessions"),
    (Played(128, 1, 8), [Window(1, 2, "refused")], Errors(), ""),
    (Played(128, 1, 8), [Window(30, None, "refused")], Errors(), ""),
    (Played(128, 1, 8), [], Errors(away=1), "did not answer"),
    (Played(128, 25, 8), [], Errors(answered=25), ""),
    (Played(128, 26, 8), [], Errors(answered=26), "answered with errors"),
    (Played(128, 26, 8), [], Errors(answered=2, other=24), ""),
    (Played(8, 8, 2), [], Errors(), "8 of 8"),
],
                         ids=range(10))
def test_which_steps_are_poisoned(played, windows, errors, words):
    found = verdict(played, windows, 10.0, 20.0, errors)
    assert re.search(words, found) if words else found == ""


def test_many_errors_are_no_verdict_before_the_trainer_has_said_what_they_are():
    assert verdict(Played(8, 8, 2), [], 10.0, 20.0, Errors(), all_said=False) == ""
    assert verdict(Played(8, 8, 2), [], 10.0, 20.0, Errors(answered=1), all_said=False)


REFUSED = ("HTTPConnectionPool(host='127.0.0.1', port=36005): Max retries exceeded with url: /step (Caused by "
           "NewConnectionError('Connection refused'))")


@pytest.mark.parametrize("line, expected", [
    ("Rollou step Error:  item id = 37", Errors(answered=2)),
    (f"Rollou step Error: {REFUSED} item id = 4", Errors(away=2)),
    ("Rollou step Error: ('Connection aborted.', RemoteDisconnected('Remote end closed')) item id = 4", Errors(away=2)),
    ("Rollou step Error: HTTPConnectionPool(host='x', port=1): Read timed out. (read timeout=2400) item id = 4",
     Errors(away=2)),
    ("Rollou step Error: 'observation' item id = 4", Errors(answered=2)),
    ("Rollou step Error: Invalid action. item id = 4", Errors(other=2)),
    ("Reset Timeout: Webarena Env Timeout. item id = 4", Errors(away=2)),
    ("Rollout of item id = 4", Errors()),
])
def test_what_the_trainer_says_of_a_failed_step(line, expected):
    errors = Errors()
    assert errors.feed(line, 2) is (expected != Errors()) and errors == expected
    assert errors.plus(errors) == Errors(2 * expected.away, 2 * expected.answered, 2 * expected.other)


def test_our_own_server_tells_its_sessions_and_others_only_that_they_are_there():
    with served() as server:
        assert ask(server.url) == Answer("", 4, ((1, None), ))
        assert ask(server.url + "/", replicas=2).sessions == 8
    assert ask(server.url).why == "refused"
    with served(ours=False) as server:
        assert ask(server.url) == Answer("")


def test_a_server_that_accepts_and_says_nothing_is_unanswered():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert ask(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2).why == "unanswered"


@pytest.mark.parametrize("said", [
    b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{", b"HTTP/1.1 502 x\r\n\r\n"
])
def test_whatever_answers_is_survived(said):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(said)
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        assert ask(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=2).why in ("", "refused")


@pytest.mark.parametrize("kind", DRIPS)
def test_a_server_that_drips_does_not_hold_the_monitor_up(kind):
    with dripping(kind) as url, within(10):
        found = ask(url, timeout=1)
    assert found.why == ("" if kind == "error" else "unanswered")


def test_the_monitor_notes_windows():
    monitor = Monitor("http://x")
    first, second = ((1, 10.0), ), ((1, 20.0), )
    monitor.note(Answer("", 3, first), 100)
    assert monitor.seen.reachable and monitor.seen.sessions == 3 and monitor.told() == ""
    monitor.note(Answer("refused"), 101)
    monitor.note(Answer("refused"), 102)
    assert monitor.windows == [Window(101, None, "refused")
                               ] and "is gone" in monitor.told() and monitor.seen.since == 101
    monitor.note(Answer("", 0, second), 105)
    assert monitor.windows == [Window(101, 105, "refused"), Window(101, 105, "restarted")] and monitor.told() == ""
    monitor.note(Answer("", 0, second), 106)
    assert len(monitor.windows) == 2


def test_a_restart_between_two_looks_is_seen():
    monitor = Monitor("http://x")
    monitor.note(Answer("", 3, ((1, 10.0), )), 100)
    monitor.note(Answer("", 0, ((1, 20.0), )), 101)
    assert [window.why for window in monitor.windows] == ["restarted"]


def test_a_busy_server_is_not_away_until_patience_ends():
    monitor = Monitor("http://x", patience=60)
    monitor.note(Answer("", 3), 100)
    monitor.note(Answer("unanswered"), 101)
    monitor.note(Answer("unanswered"), 150)
    assert monitor.seen.reachable and not monitor.windows
    monitor.note(Answer(""), 155)
    monitor.note(Answer("unanswered"), 160)
    monitor.note(Answer("unanswered"), 221)
    assert monitor.windows == [Window(160, None, "unanswered")] and "does not answer" in monitor.told()
