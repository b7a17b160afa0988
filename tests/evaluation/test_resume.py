"""Runs that are interrupted: killed at any moment, stopped by hand, on a full disk, with another configuration."""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaluation import records
from evaluation.__main__ import main
from evaluation.attempts import FIELDS
from evaluation.problems import Stopped
from evaluation.protocol import Server
from tests.fixtures.servers import FIXTURE_ROWS, ROOT, rows, running
from tests.fixtures.standins import Answer, completion, counter_player, endpoint, environment, failure

ITEMS = 10
SAMPLES = 4
RECORD = {
    "item": "a", "index": 0, "category": "", "sample": 0, "seed": None, "outcome": "success", "success": True, "reward": 1.0, "scaled": 1.0,
    "upstream_reward": 1.0, "rounds": 0, "invalid_actions": 0, "usage": {"prompt": 0, "completion": 0, "cached": 0, "reasoning": 0, "unknown": 0}, "seconds": 0.0, "model_seconds": 0.0, "env_seconds": 0.0,
    "model_retries": 0, "error": "", "tries_before": [], "started": "", "task": "", "first": "", "turns": []
}


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch, tmp_path):
    for name in ("ENV", "ENV_SERVER", "MODEL", "MAX_ROUND", "OPENAI_BASE_URL", "AGENTGYM_SRC", "ENVIRONMENTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.chdir(tmp_path)


def words(out: Path, server: str, base_url: str, *flags: str) -> list[str]:
    return [
        "run", "--env", "form-textcraft", "--environments", str(FIXTURE_ROWS), "--server", server, "--base-url", base_url,
        "--model", "stand-in", "--out", str(out), "--seed", "3", *flags
    ]


def process(*argv: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "evaluation", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, cwd=ROOT, **options)


def attempts(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "attempts.jsonl").read_text().splitlines()]


def lasting(record: dict) -> dict:
    """What of a record must not depend on when it was made."""
    passing = ("seconds", "model_seconds", "env_seconds", "started", "tries_before", "model_retries")
    turns = [{key: value for key, value in turn.items() if key != "seconds"} for turn in record["turns"]]
    return {**{key: value for key, value in record.items() if key not in passing}, "turns": turns}


def by_key(out: Path) -> dict:
    records = attempts(out)
    keyed = {(record["item"], record["sample"]): lasting(record) for record in records}
    assert len(keyed) == len(records), "an item is twice in the file"
    return keyed


@pytest.mark.slow
@pytest.mark.timeout(1800)  # Python starts twenty times, on whatever else the machine does
def test_a_run_killed_at_twenty_moments_ends_as_if_it_never_was(tmp_path):
    import urllib.request
    # Slow enough that every kill meets attempts in flight: 40 attempts of 3 answers, 4 at once.
    slowly = lambda messages, body: Answer(completion(counter_player(messages, body)), delay=0.05)  # noqa: E731
    flags = ("--items", f"0-{ITEMS - 1}", "--samples", str(SAMPLES))
    # A session whose create was on its way when the kill came is known to nobody: the server's own limit ends it.
    with running(rows()["form-textcraft"], tmp_path, True, "--session-ttl", "4") as client, endpoint(slowly) as model:

        def opened() -> int:
            with urllib.request.urlopen(client.base + "/opened") as answer:
                return json.loads(answer.read())

        assert process(*words(tmp_path / "whole", client.base, model.base_url, *flags)).wait(120) == 0
        rng, kills, lengths = random.Random(0), 0, []
        for _ in range(20):
            run = process(*words(tmp_path / "killed", client.base, model.base_url, *flags))
            file = tmp_path / "killed" / "attempts.jsonl"
            had = file.stat().st_size if file.exists() else 0
            # Not before it plays, or nothing would be killed; then at a random moment of an episode or two.
            end = time.monotonic() + 120
            while time.monotonic() < end and run.poll() is None and not (file.exists() and file.stat().st_size > had):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.12))
            if run.poll() is None:
                run.send_signal(signal.SIGKILL)
                kills += 1
            run.wait()
            lengths.append(len(file.read_bytes().splitlines()))
            if lengths[-1] >= ITEMS * SAMPLES - 8:  # play the rest in more pieces: begin another run from here
                records = file.read_bytes().splitlines(keepends=True)
                file.write_bytes(b"".join(records[:4]) + records[4][:rng.randrange(len(records[4]))])
        last = process(*words(tmp_path / "killed", client.base, model.base_url, *flags))
        said = last.communicate(timeout=120)[0]
        assert last.returncode == 0, said
        end = time.monotonic() + 20
        while opened() and time.monotonic() < end:
            time.sleep(0.2)
        assert opened() == 0
    assert kills == 20
    assert by_key(tmp_path / "killed") == by_key(tmp_path / "whole")
    assert len(attempts(tmp_path / "killed")) == ITEMS * SAMPLES


@pytest.mark.parametrize("flags", [[], ["--fresh"]], ids=["resumed", "begun anew"])
def test_the_sessions_of_a_killed_run_are_closed_by_the_next_one(flags, tmp_path):
    import urllib.request
    slowly = lambda messages, body: Answer(completion(counter_player(messages, body)), delay=0.3)  # noqa: E731
    with running(rows()["form-textcraft"], tmp_path) as client, endpoint(slowly) as model:

        def opened() -> int:
            with urllib.request.urlopen(client.base + "/opened") as answer:
                return json.loads(answer.read())

        argv = words(tmp_path / "out", client.base, model.base_url, "--items", "0-9")
        before = opened()
        run = process(*argv)
        while len(model.requests) < 6:  # four play at once, so each has its session by now
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert opened() > before
        assert main([*argv, *flags]) == 0
        assert opened() == before


def test_a_killed_stretch_of_work_is_in_the_time_that_the_run_took(tmp_path):
    slowly = lambda messages, body: Answer(completion(counter_player(messages, body)), delay=0.3)  # noqa: E731
    out = tmp_path / "out"
    with environment() as env, endpoint(slowly) as model:
        argv = words(out, env.url, model.base_url, "--items", "0-5", "--concurrency", "1")
        run = process(*argv)
        while not (out / "attempts.jsonl").exists() or (out / "attempts.jsonl").read_bytes().count(b"\n") < 3:
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
        killed = attempts(out)
        assert main(["rescore", str(out)]) == 0
        took = json.loads((out / "summary.json").read_text())["seconds"]["wall"]
        assert sum(one["seconds"] for one in killed) <= took + 0.1
        assert main(argv) == 0
    work = json.loads((out / "run.json").read_text())["work"]
    assert [one["seconds"] is None for one in work] == [True, False] and work[0]["started"] <= killed[0]["started"]
    assert json.loads((out / "summary.json").read_text())["seconds"]["wall"] == pytest.approx(took + work[1]["seconds"])
    assert f"begun {work[0]['started']}" in (out / "report.html").read_text().replace("&#43;", "+")


def test_a_session_that_is_being_created_when_a_run_is_stopped_is_given_back(tmp_path):
    with environment(lambda path, number, body: Answer(delay=5.0) if path == "/create" else None) as env, \
            endpoint(counter_player) as model:
        run = process(*words(tmp_path / "out", env.url, model.base_url, "--items", "0-9"))
        while env.created < 4:
            time.sleep(0.02)
        time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=60)[0]
        assert run.returncode == 130 and env.sessions == {} and "Traceback" not in said
    sessions = json.loads((tmp_path / "out" / "run.json").read_text())["work"][0]["sessions"]
    assert (sessions["opened"], sessions["closed"], sessions["lost"]) == (4, 4, 0)


def test_a_create_that_hangs_does_not_hold_up_a_run_that_is_stopped(tmp_path, monkeypatch):
    import asyncio

    from evaluation import episodes
    monkeypatch.setattr(episodes, "CLOSE_SECONDS", 0.2)

    async def stop() -> int:
        async with Server(env.url, rows()["form-textcraft"].protocol) as server:
            opening = asyncio.create_task(episodes.open_session(server, 60))
            await asyncio.sleep(0.1)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            return server.lost

    with environment(lambda path, number, body: Answer(delay=30) if path == "/create" else None) as env:
        begun = time.monotonic()
        assert asyncio.run(stop()) == 1
        assert time.monotonic() - begun < 10


def test_a_session_that_cannot_be_noted_is_closed_again(tmp_path, monkeypatch, capsys):
    add, noted = records.Lines.add, []

    def full(self, value):
        noted.append(value)
        if self.path.name == records.SESSIONS and sum("open" in one for one in noted) >= 3:
            raise Stopped("the disk is full")
        add(self, value)

    monkeypatch.setattr(records.Lines, "add", full)
    with environment() as env, endpoint(counter_player) as model:
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0-9")) == 1
        assert env.created >= 3 and env.sessions == {}
    assert "the disk is full" in capsys.readouterr().err


def test_only_what_is_missing_or_spoilt_is_played_again(tmp_path):
    broken = [True]

    def fault(path, number, body):
        return Answer({"error": "broken"}, 500) if broken and path == "/reset" and body["data_idx"] == 2 else None

    with environment(fault) as env, endpoint(counter_player) as model:
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0-3")) == 1
        broken.clear()
        asked, created = len(model.requests), env.created
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0-3")) == 0
        assert (len(model.requests) - asked, env.created - created) == (3, 1)
        asked = len(model.requests)
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0-3", "--resume")) == 0
        assert len(model.requests) == asked
    again = by_key(tmp_path / "out")[("form-textcraft_2", 0)]
    assert again["outcome"] == "success" and len(by_key(tmp_path / "out")) == 4
    record = next(one for one in attempts(tmp_path / "out") if one["item"] == "form-textcraft_2")
    assert [one["outcome"] for one in record["tries_before"]] == ["env_error"] * 3
    assert "broken" in (tmp_path / "out" / "superseded.jsonl").read_text()


def test_a_resume_that_does_not_start_loses_nothing(tmp_path):
    broken = [True]

    def fault(path, number, body):
        return Answer({"error": "broken"}) if broken and path == "/reset" and body["data_idx"] == 1 else None

    with environment(fault) as env, endpoint(counter_player) as model:
        argv = words(tmp_path / "out", env.url, model.base_url, "--items", "0-3", "--tries", "1")
        assert main(argv) == 1
        before = (tmp_path / "out" / "attempts.jsonl").read_bytes()
        assert main([*argv, "--server", "http://127.0.0.1:9", "--env-wait", "0.1"]) == 2
        assert (tmp_path / "out" / "attempts.jsonl").read_bytes() == before
        broken.clear()
        assert main(argv) == 0
    record = next(one for one in attempts(tmp_path / "out") if one["item"] == "form-textcraft_1")
    assert [one["outcome"] for one in record["tries_before"]] == ["env_error"]
    assert len(by_key(tmp_path / "out")) == 4
    assert [one["outcome"] for one in records.read_lines(tmp_path / "out" / "superseded.jsonl", records.read_object).values] == ["env_error"]


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name not in (records.LOCK, records.SESSIONS)}


@pytest.mark.parametrize("why", ["no server", "no key", "refused"])
def test_a_fresh_start_that_fails_costs_the_old_run_nothing(why, tmp_path):
    answer = []
    with environment() as env, endpoint(lambda messages, body: answer[0] if answer else counter_player(messages, body)) as model:
        argv = words(tmp_path / "out", env.url, model.base_url, "--items", "0-3", "--concurrency", "1")
        assert main(argv) == 0
        before = files(tmp_path / "out")
        assert set(before) == {"run.json", "attempts.jsonl", "summary.json", "report.html"}
        answer.append(failure(401 if why == "no key" else 400, "no, thank you"))
        away = ("--server", "http://127.0.0.1:9", "--env-wait", "0.1") if why == "no server" else ()
        assert main([*argv, "--fresh", "--temperature", "0.5", *away]) == 2
        assert files(tmp_path / "out") == before and not (tmp_path / "out" / records.BEFORE).exists()
        answer.clear()
        assert main([*argv, "--fresh", "--temperature", "0.5"]) == 0
        assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["sampling"]["temperature"] == 0.5
        assert not (tmp_path / "out" / records.BEFORE).exists()


def test_a_fresh_start_that_is_killed_or_stopped_before_an_answer_costs_the_old_run_nothing(tmp_path):
    hang = []
    with environment() as env, endpoint(lambda messages, body: Answer(delay=60) if hang else counter_player(messages, body)) as model:
        argv = words(tmp_path / "out", env.url, model.base_url, "--items", "0-3")
        assert main(argv) == 0
        before = files(tmp_path / "out")
        hang.append("now")
        for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGINT):
            asked = len(model.requests)
            fresh = process(*argv, "--fresh")
            while len(model.requests) == asked:
                time.sleep(0.02)
            fresh.send_signal(number)
            fresh.communicate(timeout=60)
        assert files(tmp_path / "out") == before
        hang.clear()
        assert main([*argv, "--fresh"]) == 0
    assert len(by_key(tmp_path / "out")) == 4 and files(tmp_path / "out") != before


def test_a_run_that_is_complete_shows_its_numbers_without_its_server(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        argv = words(tmp_path / "out", env.url, model.base_url, "--items", "0-3")
        assert main(argv) == 0
    shown = capsys.readouterr().out
    sessions = tmp_path / "out" / "sessions.jsonl"
    sessions.write_text(json.dumps({"open": 77, "server": env.url}) + "\n")
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "success rate" in said.out and "waiting" not in said.out and said.err == ""
    assert [line for line in said.out.splitlines() if "success rate" in line] == [line for line in shown.splitlines() if "success rate" in line]
    assert "77" in sessions.read_text()  # for a run that meets the server again


def test_a_run_that_is_complete_closes_what_a_killed_one_left_open(tmp_path, capsys):
    with running(rows()["form-textcraft"], tmp_path) as client, endpoint(counter_player) as model:
        argv = words(tmp_path / "out", client.base, model.base_url, "--items", "0-1")
        assert main(argv) == 0
        (tmp_path / "out" / "sessions.jsonl").write_text(json.dumps({"open": client.create(), "server": client.base}) + "\n")
        assert main(argv) == 0
        assert "closed 1 sessions that the last run left open" in capsys.readouterr().out


def test_a_kill_between_a_new_record_and_the_end_of_the_run_doubles_nothing(tmp_path):
    old = {**RECORD, "outcome": "env_error", "error": "broken", "started": "1"}
    new = {**RECORD, "started": "2"}
    config = {"env": "x", "model": "m", "samples": 1, "items": ["a"]}
    with records.RunFolder(tmp_path) as folder:
        folder.begin(config, {"row": {}, "prompt": {}, "revision": "x"})
    for name, lines in ((records.ATTEMPTS, [old, new]), (records.SUPERSEDED, [old])):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with records.RunFolder(tmp_path) as folder:
        folder.begin(config, {"row": {}, "prompt": {}, "revision": "x"})
        assert list(folder.records.values()) == [new] and folder.earlier == {}
    assert records.read_lines(tmp_path / records.ATTEMPTS, records.read_object).values == [new]
    assert records.read_lines(tmp_path / records.SUPERSEDED, records.read_object).values == [old]


def test_an_item_that_the_endpoint_always_refuses_is_settled_and_not_played_again(tmp_path, capsys):
    def say(messages, body):
        if messages[2]["content"] == "count 3":
            return failure(400, f"content policy, request {len(model.requests):08x}")
        return counter_player(messages, body)

    with environment() as env, endpoint(say) as model:
        for _ in range(3):
            assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0-3", "--concurrency", "1")) == 0
            record = by_key(tmp_path / "out")[("form-textcraft_3", 0)]
            assert (record["outcome"], record["reward"]) == ("refused", None)
        assert len(model.requests) == 3 * 3 + 2
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (found["items"], found["errors"], found["outcomes"]["refused"]) == (3, 0, 1)
    assert "refused, not scored" in capsys.readouterr().out


def test_tokens_of_every_try_are_in_the_total(tmp_path):
    broken = [True]

    def fault(path, number, body):  # the third step of the first try, and then the endpoint
        return Answer({"error": "broken"}) if path == "/step" and number == 2 else None

    def say(messages, body):
        return failure(503, "down") if broken and len(model.requests) > 5 else counter_player(messages, body)

    def summary() -> dict:
        return json.loads((tmp_path / "out" / "summary.json").read_text())

    with environment(fault) as env, endpoint(say) as model:
        argv = words(tmp_path / "out", env.url, model.base_url, "--items", "0", "--model-tries", "1")
        assert main(argv) == 1
        assert (summary()["usage"]["prompt"], summary()["usage"]["completion"]) == (50, 10)
        broken.clear()
        assert main(argv) == 0
    assert (summary()["usage"]["prompt"], summary()["usage"]["completion"]) == (80, 16)
    assert (summary()["usage_before"]["prompt"], summary()["usage_before"]["completion"]) == (50, 10)
    record, = attempts(tmp_path / "out")
    assert record["usage"]["prompt"] == 30 and [one["usage"]["prompt"] for one in record["tries_before"]] == [30, 20]


def test_records_of_items_that_the_run_does_not_have_count_nothing(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0-4")) == 0
        (tmp_path / "out" / "run.json").unlink()
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "4-5")) == 0
    assert sorted(one["item"] for one in attempts(tmp_path / "out")) == ["form-textcraft_4", "form-textcraft_5"]
    with (tmp_path / "out" / "attempts.jsonl").open("a") as file:  # as an older version left them
        file.write(json.dumps({**attempts(tmp_path / "out")[0], "item": "form-textcraft_9"}) + "\n")
    assert main(["rescore", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["attempts"] == 2


def test_a_run_that_was_stopped_tells_of_what_was_not_played_again(tmp_path):
    def fault(path, number, body):
        return Answer({"error": "broken"}) if path == "/reset" and body["data_idx"] in (1, 2) else None

    with environment(fault) as env, endpoint(counter_player) as model:
        argv = words(tmp_path / "out", env.url, model.base_url, "--items", "0-3", "--tries", "1")
        assert main(argv) == 1
        env.fault = lambda path, number, body: Answer(delay=20) if path == "/reset" else None
        before = env.seen["/reset"]
        run = process(*argv)
        while env.seen["/reset"] == before:
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (found["attempts"], found["errors"]) == (4, 2)


@pytest.mark.parametrize("line,told", [("{}", "line 2 has no item"), ("5", "line 2 is no JSON object"), ('{"item": "a"}', "line 2 has no index"),
                                       ("null", "line 2 is no JSON object"), ("usage=5", "line 2 has usage 5"),
                                       ('outcome="won"', 'line 2 has outcome "won"'), ("sample=[]", "line 2 has sample []")])
def test_a_line_that_is_no_attempt_is_set_aside_and_its_item_played_again(line, told, tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        argv = words(tmp_path / "out", env.url, model.base_url, "--items", "0-1")
        assert main(argv) == 0
        first, second = attempts(tmp_path / "out")
        if "=" in line:
            name, _, value = line.partition("=")
            line = json.dumps({**second, name: json.loads(value)})
        (tmp_path / "out" / "attempts.jsonl").write_text(f"{json.dumps(first)}\n{line}\n")
        capsys.readouterr()
        assert main(["rescore", str(tmp_path / "out")]) == 0
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["attempts"] == 1
        asked = len(model.requests)
        assert main(argv) == 0
        assert told in capsys.readouterr().out and len(model.requests) - asked == 3
        assert len(by_key(tmp_path / "out")) == 2 and (tmp_path / "out" / "damaged.jsonl").read_text() == line + "\n"
        assert main(argv) == 0 and told not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", "{}", '{"config": 5}', "5", '{"config": {"env": "x"}, "work": []}', "\xff",
                                  '{"config": {"env": "x", "model": "m", "items": [], "samples": 1}, "work": []}'])
def test_a_run_file_of_another_form_is_told_and_no_traceback(text, tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        argv = words(tmp_path / "out", env.url, model.base_url, "--items", "0")
        assert main(argv) == 0
        (tmp_path / "out" / "run.json").write_bytes(text.encode("latin-1"))
        for command in (argv, ["rescore", str(tmp_path / "out")], ["conversations", str(tmp_path / "out"), "--out", str(tmp_path / "talks")]):
            capsys.readouterr()
            assert main(command) == 2
            error = capsys.readouterr().err
            assert "run.json" in error and "--fresh" in error and error.count("\n") == 1
        assert main([*argv, "--fresh"]) == 0


def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path):
    import resource

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    with environment() as env, endpoint(counter_player) as model:
        run = process(*words(tmp_path / "out", env.url, model.base_url, "--items", "0"), preexec_fn=small_files)
        said = run.communicate(timeout=60)[0]
        assert run.returncode == 1 and "run.json cannot be written" in said and "Traceback" not in said, said
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0")) == 0


def test_the_fields_that_a_record_must_have_are_those_that_it_has(tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0")) == 0
    assert set(FIELDS) == set(attempts(tmp_path / "out")[0]) == set(RECORD)


@pytest.mark.parametrize("flags,told", [(("--temperature", "0.5"), "sampling.temperature: was 1.0, is 0.5"),
                                        (("--max-round", "3"), "max_round: was 5, is 3"),
                                        (("--items", "1"), "items: 1 of 1 are not asked for any more, such as form-textcraft_0")])
def test_another_configuration_is_refused_with_the_difference(flags, told, tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0")) == 0
        before = (tmp_path / "out" / "attempts.jsonl").read_bytes()
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0", *flags)) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
        assert (tmp_path / "out" / "attempts.jsonl").read_bytes() == before
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0", "--fresh", *flags)) == 0


def test_without_out_the_same_command_resumes_and_another_one_does_not(tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        argv = [word for word in words(Path(), env.url, model.base_url, "--items", "0") if word not in ("--out", ".")]
        assert main(argv) == main(argv) == main([*argv, "--max-round", "4"]) == 0
        assert len(model.requests) == 6
    assert len(list((tmp_path / "saves" / "eval").glob("form-textcraft-stand-in-*"))) == 2


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_torn_last_line_is_repaired(cut, tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0-3")) == 0
        whole, file = by_key(tmp_path / "out"), tmp_path / "out" / "attempts.jsonl"
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0-3")) == 0
    assert by_key(tmp_path / "out") == whole


@given(st.binary(min_size=1).filter(lambda data: b"\n" not in data and b"\r" not in data and data.strip()), st.integers(0, 2))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_lies_between_the_attempts_loses_none_of_them(garbage, place):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "run.json").write_text(json.dumps({"config": {"env": "x", "model": "m", "samples": 1, "items": ["a", "b"]}, "row": {}, "prompt": {},
                                                  "revision": "", "work": []}))
        lines = [json.dumps({**RECORD, "item": item}).encode() for item in "ab"]
        lines.insert(place, garbage)
        (out / "attempts.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        assert {record["item"] for record in records.read_attempts(out)} == {"a", "b"}


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGHUP, 130)])
def test_a_signal_closes_the_sessions_and_leaves_a_run_to_resume(number, code, tmp_path):
    slowly = lambda messages, body: Answer(completion(counter_player(messages, body)), delay=0.2)  # noqa: E731
    with environment() as env, endpoint(slowly) as model:
        run = process(*words(tmp_path / "out", env.url, model.base_url, "--items", "0-9"))
        while len(model.requests) < 6:
            time.sleep(0.02)
        run.send_signal(number)
        said = run.communicate(timeout=60)[0]
        assert run.returncode == code and env.sessions == {} and "interrupted" in said and "Traceback" not in said
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0-9")) == 0
    assert len(by_key(tmp_path / "out")) == 10


def test_a_full_disk_stops_the_run_and_the_same_command_goes_on(tmp_path):
    import resource

    def small_files() -> None:  # a limit on a file's size fails a write half-way, as a full disk does
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    flags = ("--items", "0-9", "--concurrency", "1")
    with environment() as env, endpoint(counter_player) as model:
        run = process(*words(tmp_path / "out", env.url, model.base_url, *flags), preexec_fn=small_files)
        said = run.communicate(timeout=60)[0]
        assert run.returncode == 1 and "cannot be written" in said and "Traceback" not in said, said
        kept = attempts(tmp_path / "out")
        assert 0 < len(kept) < 10 and env.sessions == {}
        asked = len(model.requests)
        assert main(words(tmp_path / "out", env.url, model.base_url, *flags)) == 0
        assert len(model.requests) - asked == 3 * (10 - len(kept))
    assert len(by_key(tmp_path / "out")) == 10


def test_two_runners_do_not_share_a_folder(tmp_path, capsys):
    refused = threading.Event()

    def wait(messages, body):
        refused.wait(120)
        return completion(counter_player(messages, body))

    with environment() as env, endpoint(wait) as model:
        argv = words(tmp_path / "out", env.url, model.base_url, "--items", "0-3")
        run = process(*argv)
        while not model.requests:
            time.sleep(0.02)
        assert main(argv) == 2
        refused.set()
        assert "in use by another evaluation" in capsys.readouterr().err
        assert run.wait(30) == 0


def test_a_session_number_on_a_bare_server_is_never_closed_by_a_later_run(tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        argv = words(tmp_path / "out", env.url, model.base_url, "--items", "0-1")
        assert main(argv) == 0
        # As a killed run would leave it; meanwhile the server gave the number to somebody else.
        (tmp_path / "out" / "sessions.jsonl").write_text(json.dumps({"open": 77, "server": env.url}) + "\n")
        env.sessions[77] = {"count": 0, "done": False}
        (tmp_path / "out" / "attempts.jsonl").write_bytes(b"")
        assert main(argv) == 0
        assert list(env.sessions) == [77]


def test_rescore_needs_no_model_and_follows_the_rule(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0-3")) == 0
    before = json.loads((tmp_path / "out" / "summary.json").read_text())
    os.environ.pop("OPENAI_API_KEY")
    assert main(["rescore", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == before
    easy = tmp_path / "rows.toml"
    easy.write_text(FIXTURE_ROWS.read_text().replace("success = { at_least = 1.0 }", "success = { at_least = 0.0 }"))
    assert main(["rescore", str(tmp_path / "out"), "--environments", str(easy)]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["success"]["mean"] == 1.0
    capsys.readouterr()
    assert main(["list", str(tmp_path)]) == 0 and "form-textcraft" in capsys.readouterr().out


def test_a_rule_that_takes_the_best_step_is_followed_from_the_records(tmp_path):
    said = iter(["win", "add", "add"])

    def play(path, number, body):
        if path != "/step":
            return None
        return Answer({"observation": "on", "reward": float(body["action"] == "win"), "done": False})

    with environment(play) as env, endpoint(lambda messages, body: next(said)) as model:
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0", "--max-round", "3")) == 0
    assert by_key(tmp_path / "out")[("form-textcraft_0", 0)]["outcome"] == "max_rounds"
    best = FIXTURE_ROWS.read_text().replace("success = { at_least = 1.0 }", "success = { at_least = 1.0, best = true }")
    (tmp_path / "rows.toml").write_text(best)
    assert main(["rescore", str(tmp_path / "out"), "--environments", str(tmp_path / "rows.toml")]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["reward"]["mean"] == 1.0
    assert main(["rescore", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["reward"]["mean"] == 0.0


def test_damaged_sessions_rule_and_prompt_are_no_traceback(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        argv = words(tmp_path / "out", env.url, model.base_url, "--items", "0")
        assert main(argv) == 0
        with (tmp_path / "out" / "sessions.jsonl").open("a") as file:
            file.write(json.dumps({"server": env.url, "open": [5]}) + "\n")
        assert main(argv) == 0
    told = json.loads((tmp_path / "out" / "run.json").read_text())
    talk = ["conversations", str(tmp_path / "out"), "--out", str(tmp_path / "talks")]
    for name, text, culprit in (("rule.json", "{}", "rule.json cannot be read"), ("rule.json", "{", "rule.json cannot be read"),
                                ("run.json", json.dumps({**told, "prompt": {}}), "run.json: the prompt")):
        (tmp_path / "out" / name).write_text(text)
        capsys.readouterr()
        assert main(talk) == 2
        error = capsys.readouterr().err
        assert culprit in error and error.count("\n") == 1


@pytest.mark.parametrize("more", [("--items", "0-9", "--limit", "6", "--samples", "3"), ("--items", "0-3", "--samples", "2"), ("--items", "0-5", "--samples", "1"), ("--items", "0-7", "--samples", "4"), ("--items", "5,3,2,1,0", "--samples", "1")])
def test_a_run_that_grows_plays_only_what_is_new(more, tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0-3" if "5,3,2,1,0" not in more else "0-2")) == 0
        asked = len(model.requests)
        assert main(words(tmp_path / "out", env.url, model.base_url, *more)) == 0
        grown = len(model.requests) - asked
        asked = len(model.requests)
        assert main(words(tmp_path / "whole", env.url, model.base_url, *more)) == 0
        assert grown == len(model.requests) - asked - (9 if "5,3,2,1,0" in more else 12)
        asked = len(model.requests)
        assert main(words(tmp_path / "out", env.url, model.base_url, *more)) == 0 and len(model.requests) == asked
    assert by_key(tmp_path / "out") == by_key(tmp_path / "whole")
    assert numbers_of(tmp_path / "out") == numbers_of(tmp_path / "whole")


def numbers_of(out: Path) -> dict:
    found = json.loads((out / "summary.json").read_text())
    return {key: value for key, value in found.items() if key != "seconds"}


def test_a_run_that_is_asked_for_less_is_refused_and_keeps_all(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        assert main(words(tmp_path / "out", env.url, model.base_url, "--items", "0-3", "--samples", "2")) == 0
        before = (tmp_path / "out" / "attempts.jsonl").read_bytes()
        for flags, told in ((("--items", "0-3"), "samples: was 2, is 1"), (("--items", "0-2", "--samples", "2"), "items: 1 of 4"), (("--items", "0-9", "--limit", "2"), "items: 2 of 4 are not asked for any more, such as form-textcraft_2; samples: was 2, is 1"), (("--items", "0-9", "--samples", "4", "--max-round", "3"), "max_round: was 5, is 3")):
            assert main(words(tmp_path / "out", env.url, model.base_url, *flags)) == 2
            assert told in capsys.readouterr().err
        assert (tmp_path / "out" / "attempts.jsonl").read_bytes() == before


def test_without_out_more_of_the_same_grows_and_less_has_a_folder_of_its_own(tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        argv = [word for word in words(Path(), env.url, model.base_url) if word not in ("--out", ".")]
        for items in ("0-1", "0-3", "2-3"):
            assert main([*argv, "--items", items]) == 0
        assert len(model.requests) == 3 * (2 + 2 + 2)
    runs = sorted((tmp_path / "saves" / "eval").iterdir())
    assert sorted(len(by_key(run)) for run in runs) == [2, 4]


def test_runs_of_several_machines_are_one(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        for name, items in (("a", "0-3"), ("b", "4-7"), ("whole", "0-7")):
            assert main(words(tmp_path / name, env.url, model.base_url, "--items", items, "--samples", "2")) == 0
        joined = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "both")]
        assert main(joined) == 0
        assert by_key(tmp_path / "both") == by_key(tmp_path / "whole") and numbers_of(tmp_path / "both") == numbers_of(tmp_path / "whole")
        asked = len(model.requests)
        assert main(words(tmp_path / "both", env.url, model.base_url, "--items", "0-8", "--samples", "2")) == 0 and len(model.requests) - asked == 6
        capsys.readouterr()
        assert main(joined) == 2 and "has a run already" in capsys.readouterr().err
        assert main(words(tmp_path / "other", env.url, model.base_url, "--items", "0", "--temperature", "0.5")) == 0
        assert main(["merge", str(tmp_path / "a"), str(tmp_path / "other"), "--out", str(tmp_path / "no")]) == 2
        assert "sampling.temperature: was 1.0, is 0.5" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_of_an_attempt_that_two_runs_have_one_with_a_result_stands(tmp_path, capsys):
    broken = [True]
    fault = lambda path, number, body: Answer({"error": "no"}) if broken and path == "/reset" and body["data_idx"] == 1 else None  # noqa: E731
    with environment(fault) as env, endpoint(counter_player) as model:
        assert main(words(tmp_path / "a", env.url, model.base_url, "--items", "0-1", "--tries", "1")) == 1
        broken.clear()
        assert main(words(tmp_path / "b", env.url, model.base_url, "--items", "1-2")) == 0
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "both")]) == 0
    assert {record["item"][-1]: record["outcome"] for record in attempts(tmp_path / "both")} == {"0": "success", "1": "failure", "2": "success"}
    assert "1 attempts are in more than one of the runs" in capsys.readouterr().err


def test_runs_of_other_samples_and_with_a_damaged_line_are_one_which_plays_the_rest(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        assert main(words(tmp_path / "a", env.url, model.base_url, "--items", "0-3", "--samples", "2")) == 0
        assert main(words(tmp_path / "b", env.url, model.base_url, "--items", "2-5")) == 0
        assert main(words(tmp_path / "whole", env.url, model.base_url, "--items", "0-5", "--samples", "2")) == 0
        lines = (tmp_path / "b" / "attempts.jsonl").read_bytes().splitlines(keepends=True)
        lost = next(place for place, line in enumerate(lines) if json.loads(line)["index"] == 5)
        lines[lost] = lines[lost][:40] + b"\n"
        (tmp_path / "b" / "attempts.jsonl").write_bytes(b"".join(lines))
        told = json.loads((tmp_path / "b" / "run.json").read_text())
        (tmp_path / "b" / "run.json").write_text(json.dumps({**told, "revision": "another"}))
        capsys.readouterr()
        assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "both")]) == 0
        error = capsys.readouterr().err
        for said in (f"line {lost + 1} is no JSON", "2 attempts are in more than one of the runs", "played by 2 different versions", "another"):
            assert said in error, said
        assert error.count("\n") == 3 and len(attempts(tmp_path / "both")) == 9 and summary_of(tmp_path / "both")["expected"] == 12
        asked = len(model.requests)
        assert main(words(tmp_path / "both", env.url, model.base_url, "--items", "0-5", "--samples", "2")) == 0 and len(model.requests) - asked == 9
    assert by_key(tmp_path / "both") == by_key(tmp_path / "whole") and numbers_of(tmp_path / "both") == numbers_of(tmp_path / "whole")


def summary_of(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def test_runs_on_other_data_and_one_that_is_named_twice_are_not_merged(tmp_path, capsys):
    with environment() as env, endpoint(counter_player) as model:
        for name, items in (("a", "0-1"), ("b", "2-3")):
            assert main(words(tmp_path / name, env.url, model.base_url, "--items", items)) == 0
    told = json.loads((tmp_path / "b" / "run.json").read_text())
    (tmp_path / "b" / "run.json").write_text(json.dumps({**told, "about": {"data": "toy"}}))
    capsys.readouterr()
    for folders, said in ((("a", "b"), "on data toy; merge runs on the same data"), (("a", "a"), "is named twice"), (("a", "b/../a"), "is named twice")):
        assert main(["merge", *(str(tmp_path / one) for one in folders), "--out", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)  # Python starts twenty times, on whatever else the machine does
def test_a_growing_run_that_is_killed_at_twenty_moments_ends_as_if_it_never_was(tmp_path):
    slowly = lambda messages, body: Answer(completion(counter_player(messages, body)), delay=0.05)  # noqa: E731
    rng, kills = random.Random(1), 0
    with environment() as env, endpoint(slowly) as model:
        assert main(words(tmp_path / "whole", env.url, model.base_url, "--items", "0-9", "--samples", "8")) == 0
        for number in range(60):
            if kills == 20:
                break
            before = len(model.requests)
            grown = ("--items", f"0-{min(9, number)}", "--samples", str(min(8, 1 + number // 3)))
            run = process(*words(tmp_path / "killed", env.url, model.base_url, *grown))
            while run.poll() is None and len(model.requests) < before + 2:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.12))
            kills += run.poll() is None
            run.kill()
            run.wait()
        last = process(*words(tmp_path / "killed", env.url, model.base_url, "--items", "0-9", "--samples", "8"))
        assert last.wait(120) == 0
    assert kills == 20 and by_key(tmp_path / "killed") == by_key(tmp_path / "whole")
