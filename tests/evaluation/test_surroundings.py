"""Runs in odd surroundings: another locale, few open files, a terminal of old."""
import json
import os
import re
import resource
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from evaluation.__main__ import main
from evaluation.problems import EnvironmentFault
from tests.evaluation.whole import attempts, run, summary
from tests.fixtures.servers import FIXTURE_ROWS, ROOT
from tests.fixtures.standins import Answer, completion, counter_player, endpoint, environment


def process(out, server, model, *flags, **options):
    words = ["run", "--env", "form-textcraft", "--environments", str(FIXTURE_ROWS), "--server", server.url, "--base-url", model.base_url, "--model", "stand-in", "--out", str(out), *flags]
    return subprocess.run([sys.executable, "-m", "evaluation", *words], cwd=ROOT, capture_output=True, timeout=120, check=False, **options)


def test_every_file_is_utf_8_whatever_the_locale(tmp_path):
    surroundings = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    prompt, items = tmp_path / "prompt.txt", tmp_path / "liste.txt"
    prompt.write_text("Zähle weiter: ü, 数\n", encoding="utf-8")
    items.write_text("größe_0\n", encoding="utf-8")
    with environment() as env, endpoint(lambda messages, body: f"{counter_player(messages, body)}") as model:
        done = process(tmp_path / "out", env, model, "--prompt", str(prompt), "--items", str(items), env=surroundings)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
        assert "Zähle weiter: ü, 数" in model.requests[0][1]["messages"][0]["content"]
    for words in (["rescore", "out"], ["report", "out"], ["list", "."], ["conversations", "out", "--out", "talks"], ["compare", "out", "out", "--out", "both.html"]):
        done = subprocess.run([sys.executable, "-m", "evaluation", *words], cwd=tmp_path, env={**surroundings, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, (words, done.stderr)
    assert "größe_0" in (tmp_path / "talks").read_text(encoding="utf-8")


def test_too_few_open_files_are_said_before_anything_is_played(tmp_path):
    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

    with environment() as env, endpoint(counter_player) as model:
        done = process(tmp_path / "out", env, model, "--items", "0", "--concurrency", "64", preexec_fn=few)
        assert done.returncode == 2 and b"`ulimit -n` allows 100; raise it, or give --concurrency 18" in done.stderr and done.stderr.count(b"\n") == 1
        assert model.requests == []
        done = process(tmp_path / "out", env, model, "--items", "0", "--concurrency", "18", preexec_fn=few)
        assert done.returncode == 0, done.stderr


def test_the_processes_own_limit_is_raised_where_it_may_be(tmp_path):
    with environment() as env, endpoint(counter_player) as model:
        done = process(tmp_path / "out", env, model, "--items", "0", "--concurrency", "64", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 1000)))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("surroundings", [{"TERM": "dumb"}, {"TERM": "xterm", "COLUMNS": "30"}], ids=["dumb", "narrow"])
def test_a_terminal_that_cannot_show_a_bar_gets_no_moves_of_the_cursor(surroundings, tmp_path):
    ours, theirs = os.openpty()
    said: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the last writer has gone
            while piece := os.read(ours, 65536):
                said.append(piece)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    environ = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    with environment() as env, endpoint(counter_player) as model:
        words = ["run", "--env", "form-textcraft", "--environments", str(FIXTURE_ROWS), "--server", env.url, "--base-url", model.base_url, "--model", "stand-in", "--out", str(tmp_path / "out"), "--items", "0-1"]
        done = subprocess.run([sys.executable, "-m", "evaluation", *words], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env={**environ, **surroundings}, timeout=120, check=False)
    os.close(theirs)
    reader.join(60)
    os.close(ours)
    text = b"".join(said).decode()
    assert done.returncode == 0 and "success" in text and not re.search(r"\x1b\[[0-9;?]*[A-HJKSTfhlsu]", text), text


def test_running_out_of_open_files_is_named():
    assert "ulimit -n" in str(EnvironmentFault("POST /step: cannot connect (Too many open files)"))


def test_sessions_that_cannot_be_closed_are_a_line_and_a_row(tmp_path, capsys):
    fault = lambda path, number, body: Answer({"error": "no"}, 500) if path == "/close" else None  # noqa: E731
    with environment(fault) as env, endpoint(counter_player) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-2") == 0
    shown = capsys.readouterr().out
    assert summary(tmp_path / "out")["sessions_lost"] == 3 and "3 sessions could not be closed" in shown and "sessions lost" in shown


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85"])
def test_no_line_ends_within_a_conversation(end, tmp_path):
    def fault(path, number, body):
        return Answer({"observation": f"won{end}now", "reward": 1.0, "done": True}) if path == "/step" else None

    with environment(fault) as env, endpoint(lambda messages, body: completion(f"win{end}x")) as model:
        assert run(tmp_path / "out", env.url, model.base_url, "--items", "0-1") == 0
    assert main(["conversations", str(tmp_path / "out"), "--out", str(tmp_path / "talks")]) == 0
    for path, count in ((tmp_path / "talks", 2), (tmp_path / "out" / "attempts.jsonl", 2)):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) == count and all(json.loads(line) for line in lines)
    assert attempts(tmp_path / "out")[0]["turns"][0]["completion"] == f"win{end}x"
