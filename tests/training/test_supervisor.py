"""The supervisor with a trainer that trains nothing: every end it can come to, and what is left in the folder."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import archive, checkpoint, write_run
from training import machine
from training.folder import RunFolder
from training.status import status

ROOT = Path(__file__).parents[2]
FAKE = str(Path(__file__).with_name("fake_trainer.py"))


def make(folder: Path, *overrides: str, steps: int = 9, save_freq: int = 2, **changes: Any) -> RunFolder:
    options = {"retries": 0, "on_env_loss": "stop", "stop_seconds": 3, "retry_seconds": 0.1, "env_start_seconds": 1}
    write_run(folder,
              command=[sys.executable, "-u", FAKE],
              steps=steps,
              save_freq=save_freq,
              environment={
                  "name": "babyai",
                  "url": changes.pop("url", ""),
                  "replicas": 1,
                  "started_by_run": False
              },
              overrides=[
                  f"trainer.default_local_dir={folder}", f"trainer.total_training_steps={steps + 1}",
                  f"trainer.save_freq={save_freq}", *overrides
              ],
              options={
                  **options,
                  **changes.pop("options", {})
              },
              **changes)
    return RunFolder(folder)


def begin(run: RunFolder) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training", "run", str(run.path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True)


def supervise(run: RunFolder) -> tuple[int, str]:
    supervisor = begin(run)
    said, _ = supervisor.communicate(timeout=60)
    return supervisor.returncode, said


def until(true: Callable[[], Any], seconds: float = 20) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = true()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def events(run: RunFolder, name: str) -> list[dict[str, Any]]:
    return [event for event in run.read_events() if event["event"] == name]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_run_to_its_end(run):
    folder = make(run)
    code, said = supervise(folder)
    assert code == 0, said
    attempt, = folder.read()["attempts"]
    assert (attempt["state"], attempt["exit_code"], attempt["last_step"], attempt["resumed_from"]) == ("finished", 0, 9,
                                                                                                       None)
    assert attempt["argv"][-1] == "trainer.resume_mode=disable"
    assert list(folder.read_metrics()) == list(range(1, 10))
    assert folder.read_metrics()[3]["metrics"]["critic/task_score/mean"] == 0.03
    log = folder.log(1).read_text()
    assert "\x1b" not in log and "(main_task pid=77) step:1 - " in log
    assert [event["step"] for event in events(folder, "checkpoint")][-1] == 10
    found = status(run)
    assert (found.state, found.step, found.steps, found.checkpoint, found.reward) == ("finished", 9, 9, 10, 0.09)


def test_a_finished_run_trains_no_extra_step(run):
    folder = make(run)
    supervise(folder)
    before = folder.log(1).read_bytes()
    code, said = supervise(folder)
    assert code == 0 and "trained all its 9 steps" in said
    assert len(folder.read()["attempts"]) == 1 and not folder.log(2).exists() and folder.log(1).read_bytes() == before


def test_what_goes_wrong_after_the_last_checkpoint_is_no_death(run):
    folder = make(run, "fake.do=ray_worker", "fake.at=10", options={"retries": 2})
    code, said = supervise(folder)
    assert code == 0 and "after its last checkpoint was written" in said
    attempt, = folder.read()["attempts"]
    assert attempt["state"] == "finished" and status(run).step == 9


@pytest.mark.parametrize("what, cause, words, code", [
    ("gpu_oom", "gpu_oom", "CUDA out of memory", 1),
    ("ray_worker", "ray_worker", "ActorDiedError", 1),
    ("nccl_timeout", "nccl_timeout", "Watchdog", 134),
    ("disk_full", "disk_full", "No space left", 1),
    ("misuse", "misuse", "is not in struct", 1),
    ("kill", "killed", "SIGKILL", 137),
    ("unknown", "unknown", "exit code 3", 3),
    ("nan", "nan", "step 5 has figures that are no numbers: actor/grad_norm", 134),
    ("end", "unknown", "after step 4 of 9", 1),
])
def test_a_death_is_named(run, what, cause, words, code):
    folder = make(run, f"fake.do={what}", "fake.at=5", "fake.seconds=0.2")
    returned, said = supervise(folder)
    attempt, = folder.read()["attempts"]
    assert (attempt["state"], attempt["cause"]) == ("died", cause), said
    assert words in attempt["reason"] and cause in said
    assert returned == attempt["exit_code"] == code
    found = status(run)
    assert (found.state, found.cause, found.checkpoint) == ("died", cause, 4) and found.remedy and found.last_lines


def test_a_death_before_the_first_step_is_misuse(run):
    folder = make(run, "fake.do=assert", "fake.at=0")
    supervise(folder)
    assert folder.read()["attempts"][0]["cause"] == "misuse"


def test_a_nan_is_no_place_to_resume_from(run):
    folder = make(run, "fake.do=nan", "fake.at=4", "fake.seconds=0.2", f"fake.once={run}/once")
    supervise(folder)
    assert folder.read()["nan_steps"] == [4] and status(run).checkpoint == 2
    assert supervise(folder)[0] == 0
    assert folder.read()["attempts"][1]["resumed_from"] == 2 and folder.read()["nan_steps"] == []


def test_a_nan_in_the_last_step_is_no_success(run):
    folder = make(run, "fake.do=nan", "fake.at=9")
    assert supervise(folder)[0] != 0
    assert folder.read()["attempts"][0]["cause"] == "nan"


def test_a_hang_is_ended(run):
    folder = make(run, "fake.do=hang", "fake.at=3", options={"hang_seconds": 1.5})
    assert supervise(folder)[0] != 0
    attempt, = folder.read()["attempts"]
    assert attempt["cause"] == "hang" and "said nothing" in attempt["reason"]


def test_a_training_loop_that_ray_starts_again_is_ended(run):
    """Seen with Ray 2.60: its memory monitor kills the loop's process, and the new one waits for the first one's GPUs."""
    folder = make(run, "fake.do=loop_lost", "fake.at=3")
    assert supervise(folder)[0] != 0
    attempt, = folder.read()["attempts"]
    assert attempt["cause"] == "ray_worker" and "Ray started another" in attempt["reason"]


def test_ray_that_waits_for_gpus_that_are_not_there_is_ended_however_often_it_says_so(run):
    folder = make(run, "fake.do=unscheduled", "fake.at=0", options={"hang_seconds": 1.5})
    assert supervise(folder)[0] != 0
    attempt, = folder.read()["attempts"]
    assert attempt["cause"] == "misuse" and "can fulfill resource request {'GPU': 1.0}" in attempt["reason"]


def test_a_trainer_that_cannot_be_started(run):
    folder = make(run)
    folder.update(lambda now: {**now, "command": ["/no/such/python"]})
    code, said = supervise(folder)
    assert code == 127 and folder.read()["attempts"][0]["cause"] == "misuse" and "/no/such/python" in said


def test_noise_neither_forges_a_step_nor_loses_one(run):
    folder = make(run, "fake.do=noise", "fake.at=5")
    assert supervise(folder)[0] == 0
    metrics = folder.read_metrics()
    assert list(metrics) == list(range(1, 10)) and metrics[5]["metrics"]["critic/task_score/mean"] == 0.05
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", folder.log(1).read_text())
    assert "Running: 20%" in folder.log(1).read_text() and "Running: 10%" not in folder.log(1).read_text()


def test_more_steps_than_were_expected_are_counted_too(run):
    folder = make(run)
    folder.update(lambda now: {**now, "steps": 6})
    assert supervise(folder)[0] == 0
    assert list(folder.read_metrics()) == list(range(1, 10))


def test_a_torn_line_is_put_together(run):
    folder = make(run, "fake.do=torn", "fake.at=5")
    assert supervise(folder)[0] == 0
    assert folder.read_metrics()[5]["metrics"]["critic/task_score/mean"] == 0.05
    assert folder.read_metrics()[5]["metrics"]["response_length/mean"] == 95.875


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_is_graceful_and_a_resume_goes_on(run, number, code):
    folder = make(run, "fake.seconds=0.2")
    supervisor = begin(folder)
    until(lambda: len(folder.read_metrics()) >= 3)
    assert until(lambda: status(run).step >= 3) and status(run).state == "running"
    supervisor.send_signal(number)
    assert supervisor.wait(20) == code
    attempt, = folder.read()["attempts"]
    assert attempt["state"] == "stopped" and attempt["exit_code"] == code
    assert status(run).state == "stopped"
    assert supervise(folder)[0] == 0
    second = folder.read()["attempts"][1]
    assert second["number"] == 2 and second["resumed_from"] == status_checkpoint(attempt["last_step"])
    assert list(folder.read_metrics()) == list(range(1, 10))


def status_checkpoint(step: int) -> int:
    return step - step % 2


def test_a_trainer_that_hears_no_sigterm_is_killed(run):
    folder = make(run, "fake.do=deaf", "fake.at=3", options={"stop_seconds": 0.5})
    supervisor = begin(folder)
    until((run / "deaf").exists)
    supervisor.terminate()
    assert supervisor.wait(20) == 143


def test_a_terminal_that_closes_does_not_end_it(run):
    folder = make(run, "fake.seconds=0.1")
    supervisor = begin(folder)
    until(lambda: len(folder.read_metrics()) >= 2)
    supervisor.send_signal(signal.SIGHUP)
    assert supervisor.stdout is not None
    supervisor.stdout.close()  # whoever read it is gone
    assert supervisor.wait(30) == 0


def test_what_the_trainer_leaves_behind_is_ended(run):
    folder = make(run, "fake.do=orphan", "fake.at=3")
    before = {pid for pid in processes() if b"sleep" in command(pid)}
    supervise(folder)
    assert {pid for pid in processes() if b"sleep\x003600" in command(pid)} <= before


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_two_supervisors_do_not_share_a_folder(run):
    folder = make(run, "fake.seconds=0.3")
    first = begin(folder)
    until(lambda: folder.read()["attempts"])
    code, said = supervise(folder)
    assert code == 2 and "is being run already" in said and said.count("\n") == 1
    first.terminate()
    assert first.wait(20) == 143


@pytest.mark.parametrize("text, words", [
    (None, "train.start"),
    ("{", "no JSON"),
    ('{"schema": 9}', "schema 9"),
    ('{"schema": 1}', "command"),
    ('{"schema": 1, "command": "python"}', "command is no list"),
    ('{"schema": 1, "command": ["x", 3]}', "command[1] is 3, no text"),
    ('{"schema": 1, "command": ["x"], "attempts": null}', "attempts is no list"),
    ('{"schema": 1, "command": ["x"], "folder": "/elsewhere"}', "is of the folder /elsewhere"),
])
def test_a_folder_that_cannot_be_run_is_refused_in_one_line(run, text, words):
    run.mkdir()
    if text is not None:
        (run / "run.json").write_text(text)
    code, said = supervise(RunFolder(run))
    assert code == 2 and words in said and said.count("\n") == 1 and "Traceback" not in said


def test_a_killed_supervisor_takes_the_trainer_along_and_the_next_one_goes_on(run):
    folder = make(run, "fake.seconds=0.2")
    supervisor = begin(folder)
    until(lambda: len(folder.read_metrics()) >= 3)
    trainer = folder.read_state()["trainer"]
    assert machine.lives(trainer)
    supervisor.kill()
    supervisor.wait()
    found = status(run)
    assert found.state == "vanished" and "killed" in found.reason and "train.resume" in found.remedy
    until(lambda: machine.lives(trainer) is False)
    code, said = supervise(folder)
    assert code == 0, said
    first, second = folder.read()["attempts"]
    assert (first["state"], first["cause"]) == ("died", "killed") and "supervisor was killed" in first["reason"]
    assert second["resumed_from"] in (2, 4) and list(folder.read_metrics()) == list(range(1, 10))


def test_poison_that_nobody_looked_at_any_more_is_found_by_the_next_supervisor(run):
    folder = make(run, attempts=[{"number": 1, "started": 1.0, "ended": None, "state": "running"}])
    for number in (2, 4):
        checkpoint(run, number)
        place = run / "rollouts" / f"step{number}"
        place.mkdir(parents=True)
        said = [{"role": "assistant", "content": "look"}]
        (place / "0.json").write_text(json.dumps([{"conversations": said, "reward": 0 if number == 4 else 1}]))
    code, said = supervise(folder)
    assert code == 0 and "global_step_4: step 4 was poisoned" in said
    assert folder.read()["attempts"][1]["resumed_from"] == 2 and folder.read()["poisoned"] == []


def test_what_a_reboot_left_is_closed_as_that(run):
    folder = make(run)
    checkpoint(run, 4)
    folder.update(lambda now: now["attempts"].append({"number": 1, "started": 1.0, "ended": None, "state": "running"}))
    folder.write_state(**{**machine.identity(os.getpid()), "boot_id": "another"}, state="running", attempt=1)
    found = status(run)
    assert found.state == "vanished" and "restarted" in found.reason and "global_step_4" in found.remedy
    assert supervise(folder)[0] == 0
    first, second = folder.read()["attempts"]
    assert first["cause"] == "killed" and "machine was restarted" in first["reason"] and second["resumed_from"] == 4


def test_a_half_checkpoint_is_named_passed_over_and_kept_aside(run):
    folder = make(run, "fake.do=half", "fake.at=6", f"fake.once={run}/once")
    supervise(folder)
    assert folder.read()["attempts"][0]["cause"] == "killed"
    assert status(run).checkpoint == 4 and "global_step_6" in status(run).half[0]
    code, said = supervise(folder)
    assert code == 0 and "passed over: global_step_6" in said and "data.pt brings the data loader" in said
    assert folder.read()["attempts"][1]["resumed_from"] == 4
    assert (run / "aside" / "attempt-2" / "global_step_6" / "actor").is_dir()
    assert sorted(os.listdir(run / "aside" / "attempt-2" / "rollouts")) == ["step5", "step6"]
    assert status(run).checkpoint == 10


def test_without_a_whole_checkpoint_it_begins_again(run):
    folder = make(run, "fake.do=kill", "fake.at=1", f"fake.once={run}/once")
    supervise(folder)
    (run / "latest_checkpointed_iteration.txt").write_text("8")  # of a checkpoint that is gone
    code, said = supervise(folder)
    assert code == 0 and "beginning at step 1" in said
    assert "trainer.resume_mode=disable" in folder.read()["attempts"][1]["argv"]


def test_another_world_size_is_refused(run):
    folder = make(run, world_size=4, attempts=[{"number": 1, "ended": 2.0, "state": "stopped"}])
    checkpoint(run, 2, world=2)
    code, said = supervise(folder)
    assert code == 2 and "written by 2 GPUs" in said and said.count("\n") == 1
    assert len(folder.read()["attempts"]) == 1 and (run / "global_step_2").is_dir()


def test_what_a_retry_cures_is_retried_and_numbered(run):
    folder = make(run, "fake.do=ray_worker", "fake.at=5", f"fake.once={run}/once", options={"retries": 2})
    code, said = supervise(folder)
    assert code == 0, said
    first, second = folder.read()["attempts"]
    assert (first["number"], first["cause"], second["number"], second["resumed_from"]) == (1, "ray_worker", 2, 4)
    assert events(folder, "retry")[0]["of"] == 2
    assert folder.log(2).exists() and list(folder.read_metrics()) == list(range(1, 10))


def test_retries_end(run):
    folder = make(run, "fake.do=ray_worker", "fake.at=5", options={"retries": 2})
    assert supervise(folder)[0] == 1
    assert [attempt["state"] for attempt in folder.read()["attempts"]] == ["died"] * 3


@pytest.mark.parametrize("what", ["gpu_oom", "nan", "misuse"])
def test_what_a_retry_does_not_cure_is_not_retried(run, what):
    folder = make(run, f"fake.do={what}", "fake.at=3", "fake.seconds=0.1", options={"retries": 3})
    assert supervise(folder)[0] != 0
    assert len(folder.read()["attempts"]) == 1


@pytest.mark.parametrize("at", range(1, 8))
def test_scaling_inter_plays_an_unbroken_runs_rounds_after_a_resume(run, at):
    rounds = ("algorithm.rounds_ctrl.type=scaling_inter_stepwise", "algorithm.rounds_ctrl.rounds=[10,20,30]",
              "algorithm.rounds_ctrl.steps_scaling_inter=2")
    folder = make(run, *rounds, "fake.do=kill", f"fake.at={at}", f"fake.once={run}/once", save_freq=1, steps=8)
    supervise(folder)
    assert supervise(folder)[0] == 0
    played = [line["metrics"]["max_rounds"] for line in folder.read_metrics().values()]
    assert played == [10, 10, 20, 20, 30, 30, 30, 30]


def test_secrets_come_from_their_files_and_stay_out_of_the_folder(run, tmp_path):
    (tmp_path / "key").write_text("s3cret-value\n")
    folder = make(run, secrets={"WANDB_API_KEY": str(tmp_path / "key")}, variables={"SEEN": "here"})
    script = tmp_path / "show.py"
    script.write_text(
        "import os, sys\nprint(os.environ['WANDB_API_KEY'] == 's3cret-value', os.environ['SEEN'])\nsys.exit(5)")
    folder.update(lambda now: {**now, "command": [sys.executable, str(script)]})
    assert supervise(folder)[0] == 5
    assert "True here" in folder.log(1).read_text()
    assert not any(b"s3cret-value" in path.read_bytes() for path in run.rglob("*") if path.is_file())


class Server(ThreadingHTTPServer):
    """An environment's server that can go, come back, fail, and lose its sessions."""
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0, ours: bool = True, pid: int = 1) -> None:
        self.ours, self.process, self.fails, self.live, self.steps = ours, pid, False, 4, 0
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02, ), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def go(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, found: Any) -> None:
        data = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path.startswith("/_sessions") and self.server.ours:
            self.answer(200, {"live": self.server.live, "pid": self.server.process, "pooled": 0, "memory_mb": 1})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.steps += 1
        self.answer(500 if self.server.fails else 200, {"observation": "x"})


@contextmanager
def served(**settings: Any) -> Iterator[Server]:
    server = Server(**settings)
    try:
        yield server
    finally:
        server.go()


def played_against(run: Path, server: Server, *overrides: str, **changes: Any) -> RunFolder:
    return make(run,
                f"actor_rollout_ref.agentgym.env_addr={server.url}",
                "fake.turn=0.1",
                "fake.seconds=0.5",
                *overrides,
                url=server.url,
                **changes)


def test_a_server_whose_routes_lie_below_a_prefix_is_asked_at_its_root(run):
    """maze and wordle: of the address that the trainer gets, nobody would tell sessions, nor a restart."""
    server = Server()
    folder = played_against(run, server)
    place = {**folder.read()["environment"], "url": f"{server.url}/maze", "prefix": "/maze"}
    folder.update(lambda now: {**now, "environment": place})
    supervisor = begin(folder)
    try:
        assert until(lambda: folder.read()["attempts"] and status(run).environment["sessions"]) == 4
        assert status(run).environment["url"] == f"{server.url}/maze"
    finally:
        supervisor.terminate()
        supervisor.wait(30)
        server.go()


@pytest.mark.parametrize("ours", [True, False], ids=["the project's server", "a server that counts nothing"])
def test_an_environment_that_goes_ends_the_run_before_more_is_learnt(run, ours):
    server = Server(ours=ours)
    folder = played_against(run, server)
    supervisor = begin(folder)
    until(lambda: len(folder.read_metrics()) >= 3)
    until(lambda: (folder.read_state() or {}).get("environment"))
    if ours:
        assert until(lambda: status(run).environment["sessions"]) == 4
    server.go()
    assert supervisor.wait(30) != 0
    attempt, = folder.read()["attempts"]
    assert (attempt["state"], attempt["cause"]) == ("died", "environment")
    bad, = folder.read()["poisoned"]
    assert bad in (attempt["last_step"] + 1, attempt["last_step"]) and f"step {bad}" in attempt["reason"]
    found = status(run)
    assert found.poisoned == [bad] and found.checkpoint is not None and found.checkpoint < bad
    assert events(folder, "poisoned")[0]["step"] == bad


def test_the_same_run_goes_on_with_a_clean_step_when_the_server_is_back(run):
    server = Server()
    port = server.server_address[1]
    folder = played_against(run, server, steps=6, options={"retries": 1, "env_wait_seconds": 30})
    supervisor = begin(folder)
    until(lambda: len(folder.read_metrics()) >= 3)
    server.go()
    until(lambda: events(folder, "retry"))
    bad = events(folder, "poisoned")[0]["step"]
    until(lambda: "waiting for the environment" in status(run).note)
    with served(port=port, pid=2):
        assert supervisor.wait(60) == 0
    second = folder.read()["attempts"][1]
    assert second["resumed_from"] < bad and second["state"] == "finished"
    assert folder.read()["poisoned"] == [] and list(folder.read_metrics()) == list(range(1, 7))


def test_a_restarted_server_that_lost_its_sessions_is_a_loss_too(run):
    with served() as server:
        folder = played_against(run, server)
        supervisor = begin(folder)
        until(lambda: len(folder.read_metrics()) >= 3)
        server.process, server.fails = 2, True  # the old sessions get errors
        assert supervisor.wait(30) != 0
    attempt, = folder.read()["attempts"]
    assert attempt["cause"] == "environment" and folder.read()["poisoned"]


def test_a_server_that_answers_with_errors_poisons_too(run):
    with served(ours=False) as server:
        folder = played_against(run, server)
        supervisor = begin(folder)
        until(lambda: len(folder.read_metrics()) >= 3)
        server.fails = True
        assert supervisor.wait(30) != 0
    attempt, = folder.read()["attempts"]
    assert attempt["cause"] == "environment" and "scored 0 because" in attempt["reason"]


def test_words_that_a_client_cannot_read_are_the_models_fault_and_no_poison(run):
    with served() as server:
        folder = played_against(run, server, "fake.do=unreadable", "fake.at=2", steps=4)
        code, said = supervise(folder)
    assert code == 0, said
    assert folder.read()["poisoned"] == [] and events(folder, "server_errors")[0]["cut"] == 4


def test_a_server_that_fails_a_few_steps_is_named_and_nothing_is_ended(run):
    with served(ours=False) as server:
        folder = played_against(run, server, "fake.trajectories=8", steps=4)
        supervisor = begin(folder)
        until(lambda: len(folder.read_metrics()) >= 1)
        before = server.steps
        server.fails = True
        until(lambda: server.steps > before)
        server.fails = False
        assert supervisor.wait(60) == 0
    assert folder.read()["poisoned"] == [] and len(events(folder, "server_errors")) == 1


def test_who_wants_to_goes_on_and_the_step_is_named(run):
    with served() as server:
        folder = played_against(run, server, steps=6, options={"on_env_loss": "continue"})
        supervisor = begin(folder)
        until(lambda: len(folder.read_metrics()) >= 2)
        server.fails = True
        bad = until(lambda: folder.read()["poisoned"])
        server.fails = False
        assert supervisor.wait(60) == 0
    assert folder.read()["attempts"][0]["state"] == "finished" and set(bad) <= set(folder.read()["poisoned"])
    assert status(run).checkpoint == 6  # it may be gone on from


def test_an_environment_that_was_never_there_is_named_before_the_trainer_loads(run):
    with served() as server:
        pass
    folder = played_against(run, server)
    assert supervise(folder)[0] == 1
    attempt, = folder.read()["attempts"]
    assert attempt["cause"] == "environment" and server.url in attempt["reason"] and not folder.log(1).exists()


def test_a_full_disk_is_named_although_nothing_can_be_written(run, tmp_path):
    """On a disk of its own, as small as can be, where that may be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("only root may mount a file system")
    try:
        folder = make(disk / "run", save_freq=1)
        script = tmp_path / "fill.py"
        script.write_text("import sys\nsys.stdout.write('x' * 100 + '\\n')\n"
                          f"file = open({str(disk / 'ballast')!r}, 'wb', buffering=0)\n"
                          "while True:\n    file.write(b'x' * 65536) or sys.exit('full')\n")
        folder.update(lambda now: {**now, "command": [sys.executable, "-u", str(script)], "overrides": []})
        assert supervise(folder)[0] != 0
        attempt, = folder.read()["attempts"]
        assert (attempt["state"], attempt["cause"]) == ("died", "disk_full")
        assert status(disk / "run").cause == "disk_full"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_archive_that_is_whole_stays_where_it_is(run):
    """What is put aside are checkpoints after the one that is resumed from, and nothing else."""
    folder = make(run, attempts=[{"number": 1, "ended": 2.0, "state": "stopped"}])
    for number in (2, 4, 6):
        checkpoint(run, number)
    archive(run / "global_step_6" / "data.pt")
    (run / "global_step_6" / "actor" / "optim_world_size_2_rank_1.pt").unlink()
    (run / "merged" / "global_step_6").mkdir(parents=True)
    assert supervise(folder)[0] == 0
    assert sorted(os.listdir(run / "aside" / "attempt-2")) == ["global_step_6"]
    assert (run / "merged" / "global_step_6").is_dir() and (run / "global_step_4").is_dir()


@pytest.mark.parametrize("name", [".supervisor.lock", ".run.lock", "events.jsonl", "metrics.jsonl", "log/attempt-1.log"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_a_link_or_into_a_pipe(tmp_path: Path, name: str, kind: str) -> None:
    run, outside = make(tmp_path / "run"), tmp_path / "outside"
    outside.write_text("a file\nof mine")
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(outside)
    else:
        os.mkfifo(path)
    process = begin(run)
    said, _ = process.communicate(timeout=120)
    assert process.returncode in (2, 127) and str(path) in said and said.count("\n") == 1 and "Traceback" not in said
    assert outside.read_text() == "a file\nof mine"
