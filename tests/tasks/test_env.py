"""The env.* tasks with `--runner local`, as a user types them, and the fetching of data."""
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from environment_rows import about
from servers.protocol import Client, ServerError
from tasks.lib.environments import data as env_data
from tasks.lib.environments import lease
from tasks.lib.environments import local as env_local
from tasks.lib.environments.haproxy import proxy_config
from tasks.lib.environments.rows import Data, Environment, environment, environments
from tasks.lib.environments.start_stop import recall_options
from tasks.lib.errors import UserError
from tasks.lib.host import processes, venvs
from tasks.lib.host.ports import choose_port, port_is_free, take_port
from tasks.lib.host.venvs import ensure_venv, reason_in
from tests.fixtures import needs
from tests.fixtures.dripping import dripping, within
from tests.fixtures.invoking import invoke as run_invoke
from tests.fixtures.servers import FIXTURE_ROWS, ROOT, free_port, rows

STATES = ROOT / ".run" / "env"


def invoke(*words: str, **variables: str) -> subprocess.CompletedProcess:
    return run_invoke(*words,
                      cwd=ROOT,
                      env={
                          **os.environ, "ENVIRONMENTS": str(FIXTURE_ROWS.relative_to(ROOT)),
                          **variables
                      })


def processes_of(name: str) -> list[psutil.Process]:
    """Return all processes that have the environment's run folder in their command line."""
    folder = str(STATES / name)
    return [one for one in psutil.process_iter(["cmdline"]) if folder in " ".join(one.info["cmdline"] or [])]


@pytest.fixture
def up():
    started = []

    def start(name: str, *words: str, **variables: str) -> Client:
        started.append((name, variables))
        done = invoke("env.up", "--env", name, "--runner", "local", *words, **variables)
        found = re.search(r"is ready: (http://[\d.:]+)", done.stdout)
        assert done.returncode == 0 and found, done.stdout + done.stderr
        row = environments(ROOT / variables.get("ENVIRONMENTS", str(FIXTURE_ROWS.relative_to(ROOT))))[name]
        return Client(found[1], row.protocol, timeout=10)

    yield start
    for name, variables in started:
        invoke("env.down", "--env", name, **variables)
        assert processes_of(name) == []


@pytest.mark.parametrize("name", ["form-maze", "form-sqlgym"])
def test_a_local_server_comes_up_conforms_and_goes_down(name, up):
    up(name)
    assert json.loads((STATES / name / "state.json").read_text())["processes"]
    checked = invoke("env.check", "--env", name)
    assert checked.returncode == 0 and len(re.findall("  yes  ", checked.stdout)) == 8, checked.stdout
    again = invoke("env.up", "--env", name, "--runner", "local")
    assert again.returncode == 0 and f"{name} is up already" in again.stdout and "its flags" not in again.stdout
    other = invoke("env.up", "--env", name, "--runner", "local", "--replicas", "3")
    assert other.returncode == 0 and f"for others `invoke env.down --env {name}` first" in other.stdout
    elsewhere = invoke("env.up", "--env", name, "--runner", "docker")
    assert elsewhere.returncode == 0 and f"for others `invoke env.down --env {name}` first" in elsewhere.stdout
    assert invoke("env.up", "--env", name, "--runner", "local", "--port", "0").returncode == 2
    assert re.search(rf"^{name} +\w+ +local x1 +\d+ ", invoke("env.list").stdout, re.M)
    assert invoke("env.down", "--env", name).stdout == f"{name} is down\n"
    assert processes_of(name) == []
    assert invoke("env.down", "--env", name).stdout == f"{name} was not up\n"


def test_two_that_start_the_same_server_take_turns():
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: invoke("env.up", "--env", "form-maze", "--runner", "local"), range(2)))
    invoke("env.down", "--env", "form-maze")
    said = [one.stdout for one in done]
    assert [one.returncode for one in done] == [0, 0] and sorted("form-maze is up already" in one
                                                                 for one in said) == [False, True], said
    assert sorted("form-maze is ready" in one for one in said) == [False, True] and processes_of("form-maze") == []


def test_rows_that_are_not_there_and_a_wrong_row_are_named(tmp_path):
    missing = invoke("env.list", ENVIRONMENTS="nofile.toml")
    assert missing.returncode == 2 and re.fullmatch(
        r"env.list: .*nofile.toml: No such file or directory; ENVIRONMENTS must name a file with rows\n",
        missing.stderr)
    own = tmp_path / "own.toml"
    own.write_text(re.sub(r"rounds = \d+\n", "", (ROOT / "environments.toml").read_text(), count=1))
    wrong = invoke("env.list", ENVIRONMENTS=str(own))
    assert wrong.returncode == 2 and re.fullmatch(r"env.list: own.toml: \w+.rounds: missing: Rounds .*\n", wrong.stderr)


@pytest.mark.parametrize("said,reason", [
    ("", "no message"),
    ("one line\n", "one line"),
    ("  × Failed to fetch: `x`\n  ├─▶ sending\n  ╰─▶ invalid peer certificate\n\nhint: pass --flag\n",
     "Failed to fetch: `x`: invalid peer certificate"),
])
def test_a_programs_reason_is_shown_and_not_its_hints(said, reason):
    assert reason_in(said) == reason


def test_down_stops_exactly_its_own_process_group(up, tmp_path):
    # A server with a child of its own, as sciworld has JVMs; and a bystander that stays.
    up("form-textcraft")
    entry = json.loads((STATES / "form-textcraft" / "state.json").read_text())["processes"][0]
    assert os.getpgid(entry["pid"]) == entry["pid"] != os.getpgid(0)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        invoke("env.down", "--env", "form-textcraft")
        assert not env_local.is_running(entry) and bystander.poll() is None
    finally:
        bystander.kill()


def test_down_leaves_a_stranger_alone_that_has_the_old_id(tmp_path):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        (tmp_path / "gone").mkdir()
        stale = {**processes.identity(os.getpid()), "pid": bystander.pid, "role": "server-0"}  # born earlier
        (tmp_path / "gone" / "state.json").write_text(json.dumps({"port": 1, "processes": [stale]}))
        assert env_local.down("gone", tmp_path)
        assert bystander.poll() is None
    finally:
        bystander.kill()


def test_a_clock_that_is_set_hides_no_process(monkeypatch):
    entry = processes.identity(os.getpid())
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 12.0)
    assert env_local.is_running(entry) and not env_local.is_running({
        **entry, "born":
        "1@" + entry["born"].partition("@")[2]
    })


@pytest.mark.parametrize("torn", ["", '{"processes": [', "{}", "[]", '{"port": 1, "processes": [{"pid": 1}]}'])
def test_a_torn_state_is_passed_over_and_what_runs_is_stopped(torn, tmp_path):
    home = tmp_path / "broken"
    home.mkdir()
    argv = [sys.executable, "-c", "import time; time.sleep(60)", str(home / "row.json")]
    server = subprocess.Popen(argv, start_new_session=True)
    follower = subprocess.Popen([*argv[:-1], str(home / "server-0.log")], start_new_session=True)
    try:
        (home / "state.json").write_text(torn)
        assert env_local.states(tmp_path) == {}
        threading.Thread(target=server.wait).start()
        assert env_local.down("broken", tmp_path) and not (home / "state.json").exists()
        assert server.wait(10) and follower.poll() is None
    finally:
        server.kill()
        follower.kill()


@pytest.mark.parametrize("torn", ["", "{}", '{"runner": "local", "prt": 3}', "[]"])
def test_torn_options_are_no_options(torn, tmp_path, monkeypatch):
    monkeypatch.setattr(env_local, "RUN", tmp_path)
    (tmp_path / "form-maze").mkdir()
    (tmp_path / "form-maze" / "options.json").write_text(torn)
    assert recall_options(rows()["form-maze"]) is None


def test_what_runs_before_the_server_has_its_python(tmp_path):
    python, seen = tmp_path / "bin" / "python", tmp_path / "seen"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    before = (("sh", "-c", f"command -v python > {seen}"), )
    row = rows()["form-textcraft"].replaced(before=before)
    options = env_local.Options(port=choose_port(26500, take_port))
    env_local.up(row, options, ROOT, tmp_path, dict(os.environ), 60, tmp_path / "run", python)
    assert env_local.down(row.name, tmp_path / "run") and seen.read_text() == f"{python}\n"


@pytest.mark.parametrize("server", ["alive", "killed before"])
def test_children_that_outlive_the_server_are_stopped_too(server, tmp_path):
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)']); print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    (tmp_path / "family").mkdir()
    entry = env_local.entry_of(parent, "server-0", 1)
    (tmp_path / "family" / "state.json").write_text(json.dumps({"port": 1, "processes": [entry]}))
    if server == "alive":
        threading.Thread(target=parent.wait).start()
    else:
        parent.kill()
        parent.wait()
    assert env_local.down("family", tmp_path)
    end = time.monotonic() + 5
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.mark.parametrize("name,words,code,line", [
    ("fault-dies", [], 1,
     r"env.up: fault-dies: the server-0 ended: RuntimeError: the fixture was told to die at import"),
    ("fault-never", ["--wait", "15"
                     ], 1, r"env.up: fault-never was not ready after 15 s: POST /create: HTTP 500 .*--wait"),
    ("fault-data", [], 2, r"env.up: fault-data needs index.bin in data/fault-data: ask the author"),
    ("fault-key", [], 2, r"env.up: fault-key needs FIXTURE_KEY in the environment or in .env; .*"),
    ("fault-consent", [], 2, r"env.up: this fixture deletes everything; pass --i-understand to go on"),
    ("fault-consent", ["--i-understand", "--replicas", "2"
                       ], 2, r"env.up: fault-consent plays on one real account; --replicas 2 would .*; leave it out"),
    ("form-textcrft", [], 2,
     r"env.up: no environment 'form-textcrft' in environments.toml; did you mean form-textcraft.*"),
    ("form-textcraft", ["--wait", "soon"], 2, r"env.up: --wait soon is no whole number of at least 1"),
    ("form-textcraft", ["--wait", "99999999999999"
                        ], 2, r"env.up: --wait 99999999999999 is more than 2000000; give less"),
])
def test_a_fault_is_one_line_and_leaves_nothing(name, words, code, line):
    done = invoke("env.up", "--env", name, "--runner", "local", *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch(line, done.stderr.strip()), done.stderr
    assert processes_of(name) == [] and not (STATES / name / "state.json").exists()


@pytest.mark.parametrize("pressed", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_during_a_start_stops_the_server(pressed):
    name = "fault-never"
    process = subprocess.Popen([sys.executable, "-m", "invoke", "env.up", "--env", name, "--runner", "local"],
                               cwd=ROOT,
                               env={
                                   **os.environ, "ENVIRONMENTS": str(FIXTURE_ROWS.relative_to(ROOT))
                               },
                               stderr=subprocess.PIPE,
                               text=True)
    end = time.monotonic() + 60
    while not (STATES / name / "state.json").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert processes_of(name)
    process.send_signal(pressed)
    said = process.communicate(timeout=30)[1]
    assert (process.returncode, said) == (130, "env.up: interrupted\n")
    assert processes_of(name) == [] and not (STATES / name / "state.json").exists()


def test_a_taken_port_is_passed_over_and_told(up):
    port = rows()["form-maze"].port
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # another program of this machine holds it: taken all the same
            holder.bind(("127.0.0.1", port))
            holder.listen()
        client = up("form-maze")
    chosen = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/maze", client.base)
    assert chosen and port < int(chosen[1]) < port + 100


def up_here(name: str, port: int, folder: Path, python: str = sys.executable, replicas: int = 1, **change) -> Client:
    """Start a fixture's server in `folder`, with this Python."""
    row = rows()[name].replaced(**change)
    path = os.pathsep.join((str(folder), str(ROOT / row.folder)))
    options = env_local.Options(port=port, replicas=replicas)
    url = env_local.up(row, options, ROOT, folder, {**os.environ, "PYTHONPATH": path}, 60, folder / "run", Path(python))
    return Client(url, row.protocol, timeout=30)


@pytest.mark.parametrize("words,line", [
    ("libdownward.so: failed to map segment",
     r"the server-0 ended: POST /reset: libdownward\.so: failed to map segment$"),
    ("", r"the server-0 ended: POST /reset: an error without a word$"),
])
def test_a_server_that_answered_why_before_it_died_is_told_with_that(words, line, tmp_path):
    (tmp_path / "dying.py").write_text(
        "import os, threading, time\nfrom fixture_server import app\n\n"
        "def die():\n    time.sleep(2)\n    print('goodbye', flush=True)\n    os._exit(1)\n\n"
        "@app.middleware('http')\nasync def fails(request, go_on):\n"
        "    from fastapi.responses import JSONResponse\n"
        "    if request.url.path != '/reset':\n        return await go_on(request)\n"
        f"    threading.Thread(target=die).start()\n    return JSONResponse({{'error': {words!r}}})\n")
    with pytest.raises(UserError, match=line):
        up_here("form-textcraft", free_port(), tmp_path, app="dying:app")
    assert "goodbye" in (tmp_path / "run" / "form-textcraft" / "server-0.log").read_text()


def test_another_environments_server_is_not_taken_for_ours(tmp_path):
    """Two starts may choose one port, before either listens on it: the second must not say that it is ready."""
    port = free_port()
    first = up_here("form-textcraft", port, tmp_path)
    try:
        with pytest.raises(UserError, match=r"the server-0 ended: .*address already in use"):
            up_here("form-maze", port, tmp_path)
        assert first.create() > 0
    finally:
        assert env_local.down("form-textcraft", tmp_path / "run")


def test_a_server_gets_no_secret_that_is_not_its_own(up):
    secrets = {"OPENAI_API_KEY": "sk-not-yours", "HF_TOKEN": "hf-not-yours", "FIXTURE_KEY": "its-own"}
    up("form-maze", **secrets)
    up("fault-key", **secrets)
    assert not secrets.keys() & processes_of("form-maze")[0].environ().keys()
    assert secrets.keys() & processes_of("fault-key")[0].environ().keys() == {"FIXTURE_KEY"}


def test_a_server_that_loads_the_nearest_dotenv_does_not_come_to_the_projects(tmp_path):
    (tmp_path / ".env").write_text("HF_TOKEN=hf-not-yours\n")  # above the run folder, as the project's is
    (tmp_path / "loads.py").write_text(
        "import os\nimport dotenv\nfrom fixture_server import app\n"
        "dotenv.load_dotenv(dotenv.find_dotenv(usecwd=True))\n\n"
        "@app.get('/leaked')\nasync def leaked():\n    return os.environ.get('HF_TOKEN')\n")
    before = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    row = rows()["form-textcraft"].replaced(app="loads:app")
    options = env_local.Options(port=free_port())
    path = os.pathsep.join((str(tmp_path), str(ROOT / row.folder)))
    url = env_local.up(row, options, ROOT, tmp_path / "data", {
        **before, "PYTHONPATH": path
    }, 60, tmp_path / "run", Path(sys.executable))
    try:
        with urllib.request.urlopen(url + "/leaked", timeout=10) as answer:
            assert json.loads(answer.read()) is None
    finally:
        env_local.down(row.name, tmp_path / "run")


def test_a_server_sees_its_own_packages_and_not_the_callers(up, tmp_path):
    (tmp_path / "fastapi.py").write_text("raise RuntimeError('the caller's')")
    assert up("form-maze", PYTHONPATH=str(tmp_path)).create() > 0


def test_what_an_evaluation_left_behind_does_not_stop_the_users_server(up):
    STATES.mkdir(parents=True, exist_ok=True)
    (STATES / "form-maze.users").write_text(lease.STARTED)
    up("form-maze")
    assert (STATES / "form-maze.users").read_text() == ""


def test_two_that_stop_a_server_do_not_disturb_each_other(up):
    up("form-maze")
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: invoke("env.down", "--env", "form-maze"), range(2)))
    assert [one.returncode for one in done] == [0, 0] and "".join(one.stderr for one in done) == ""


def test_a_restart_that_cannot_start_stops_nothing(up):
    up("fault-key", FIXTURE_KEY="sk-fixture")
    again = invoke("env.restart", "--env", "fault-key", FIXTURE_KEY="")
    assert again.returncode == 2 and "needs FIXTURE_KEY" in again.stderr
    assert processes_of("fault-key")
    assert invoke("env.restart", "--env", "fault-key", FIXTURE_KEY="sk-fixture").returncode == 0


@pytest.mark.parametrize("path", [os.environ["PATH"], "/nowhere"],
                         ids=["with haproxy, if there is one", "without haproxy"])
def test_replicas_above_the_last_port_are_refused(path, tmp_path, monkeypatch):
    if path == "/nowhere":
        monkeypatch.setattr(env_local.shutil, "which", lambda *_, **__: None)
    with pytest.raises(UserError, match="no port from 65536"):
        up_here("form-maze", 65535, tmp_path, replicas=2)


def test_env_port_rules_over_the_rows_port(up):
    assert up("form-maze", ENV_PORT="26777").base == "http://127.0.0.1:26777/maze"


def test_the_address_that_it_listens_on_is_the_one_that_is_asked_and_told(up):
    assert up("form-maze", ENV_BIND="127.0.0.2").base.startswith("http://127.0.0.2:")
    checked = invoke("env.check", "--env", "form-maze")  # ENV_BIND is not what it was
    assert checked.returncode == 0 and "127.0.0.2" in invoke("env.up", "--env", "form-maze").stdout


def test_consent_lets_it_start(up):
    assert up("fault-consent", "--i-understand").create() > 0


def test_a_key_from_the_environment_reaches_the_server(up):
    up("fault-key", FIXTURE_KEY="sk-fixture")
    server = next(one for one in processes_of("fault-key"))
    assert server.environ()["FIXTURE_KEY"] == "sk-fixture" and "sk-fixture" not in " ".join(server.cmdline())


def test_logs_of_a_start_that_failed_are_shown():
    assert invoke("env.up", "--env", "fault-dies", "--runner", "local").returncode == 1
    shown = invoke("env.logs", "--env", "fault-dies")
    assert shown.returncode == 0 and "the fixture was told to die at import" in shown.stdout, shown.stderr
    assert "fault-dies is not up; this is what its last start printed" in shown.stderr


def test_dry_prints_the_commands_for_a_local_server_and_runs_none(up):
    up("form-maze")
    entry = json.loads((STATES / "form-maze" / "state.json").read_text())["processes"][0]
    log = STATES / "form-maze" / "server-0.log"
    assert invoke("--dry", "env.down", "--env", "form-maze").stdout == f"kill -TERM -- -{entry['pid']}\n"
    assert invoke("--dry", "env.logs", "--env", "form-maze", "--follow").stdout == f"tail -n +1 -F {log}\n"
    assert env_local.is_running(entry)


@pytest.mark.parametrize("replicas", [1, 2])
def test_dry_prints_what_starts_a_local_server_word_for_word(replicas, up, request):
    if replicas > 1:
        request.getfixturevalue("haproxy")
    words = ("--port", str(free_port()), "--replicas", str(replicas), "--session-ttl", "7")
    done = invoke("--dry", "env.up", "--env", "form-maze", "--runner", "local", *words)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    up("form-maze", *words)
    entries = json.loads((STATES / "form-maze" / "state.json").read_text())["processes"]
    assert len(entries) == (1 if replicas == 1 else 3)
    for entry, line in zip(entries, lines[-len(entries):], strict=True):
        first = next(number for number, word in enumerate(line) if "=" not in word)
        process = psutil.Process(entry["pid"])
        assert process.cmdline()[-len(line[first:]):] == line[first:]
        assert dict(word.split("=", 1) for word in line[:first]).items() <= process.environ().items()
    assert [line for line in lines[:-len(entries)] if str(ROOT / "servers/link_data.py") in line]


def test_an_environment_that_is_made_takes_no_command(tmp_path):
    pins = env_local.CONSTRAINTS / "env-textcraft.txt"
    made, filled = venvs.making(tmp_path, "3.11", pins)
    assert made[1:] == ["venv", "--quiet", "--clear", "--python", "3.11", str(tmp_path / "venv")] and filled[-2:] == ["--requirements", str(pins)]
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/.made-from").write_text(hashlib.sha256(pins.read_bytes() + b"3.11").hexdigest())
    assert venvs.making(tmp_path, "3.11", pins) == [] and len(venvs.making(tmp_path, "3.12", pins)) == 2


def test_logs_show_what_the_server_said(up):
    (STATES / "form-maze").mkdir(parents=True, exist_ok=True)
    (STATES / "form-maze" / "server-1.log").write_text("of an earlier run\n")
    up("form-maze")
    assert "of an earlier run" not in invoke("env.logs", "--env", "form-maze").stdout
    invoke("env.down", "--env", "form-maze")
    up("form-maze", "--session-ttl", "1")
    pid = json.loads((STATES / "form-maze" / "state.json").read_text())["processes"][0]["pid"]
    (STATES / "form-maze" / "server-0.log").open("a").write("a line of the log\n")
    shown = invoke("env.logs", "--env", "form-maze")
    assert "a line of the log" in shown.stdout and psutil.pid_exists(pid)


@pytest.mark.parametrize("linked", ["data", "data/tool"])
def test_data_is_linked_into_the_copy_and_never_through_a_link_out_of_it(linked, tmp_path):
    disk, package = tmp_path / "disk", tmp_path / "gym" / "server"
    raw = disk.joinpath(*["tool"][:linked == "data"], "raw")
    raw.mkdir(parents=True)
    (raw / "mine.pkl").write_text("precious")
    (disk / "beside").write_text("beside")
    (package / linked).parent.mkdir(parents=True)
    (package / linked).symlink_to(disk)
    (tmp_path / "have").mkdir()
    row = rows()["form-textcraft"].replaced(folder="server", links={".": "{folder}/data/tool/raw"})
    for _ in range(2):
        *_, copy = env_local.prepare(row, tmp_path / "gym", tmp_path / "have", tmp_path / "run", Path(sys.executable))
        assert (copy / "server/data/tool/raw").readlink() == tmp_path / "have"
        assert (copy / "server" / linked / "beside").read_text() == "beside"
        assert not raw.is_symlink() and (raw / "mine.pkl").read_text() == "precious"


@pytest.fixture
def haproxy() -> str:
    return needs.haproxy()


def test_a_busy_replica_is_not_down(haproxy, tmp_path):
    """Many servers compute in their one event loop and answer nothing meanwhile, not even the proxy's checks."""
    (tmp_path / "busy.py").write_text("import time\nfrom fixture_server import app\n\n"
                                      "@app.middleware('http')\nasync def slow(request, go_on):\n"
                                      "    if request.headers.get('busy'):\n        time.sleep(6)\n"
                                      "    return await go_on(request)\n")
    client = up_here("form-textcraft", free_port(), tmp_path, replicas=2, app="busy:app")
    try:
        sessions = [client.create() for _ in range(4)]
        busy, waits = [session for session in sessions if session % 2]
        for session in sessions:
            client.reset(session, 0)
        body = json.dumps({"id": busy, "action": "add"}).encode()
        request = urllib.request.Request(client.root + "/step",
                                         data=body,
                                         headers={
                                             "Content-Type": "application/json",
                                             "busy": "yes"
                                         })
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(lambda: urllib.request.urlopen(request, timeout=30).status)
            time.sleep(4)
            assert client.step(waits, "add").observation == "count 1" and answer.result() == 200
    finally:
        env_local.down("form-textcraft", tmp_path / "run")


def test_replicas_behind_the_proxy_survive_the_death_of_one(haproxy, up):
    client = up("form-maze", "--replicas", "2")
    sessions = [client.create() for _ in range(6)]
    for number, session in enumerate(sessions):
        client.reset(session, number)
    assert [session % 2 for session in sessions].count(0) == 3
    state = json.loads((STATES / "form-maze" / "state.json").read_text())
    victim = next(entry for entry in state["processes"] if entry["role"] == "server-0")
    os.kill(victim["pid"], signal.SIGKILL)
    end = time.monotonic() + 30  # the proxy looks once a second and believes the second failure
    while time.monotonic() < end:
        with suppress(ServerError):
            if {client.create() % 2 for _ in range(4)} == {1}:
                break
        time.sleep(0.2)
    for number, session in enumerate(sessions):
        if session % 2:
            assert client.step(session, "add").observation == f"count {number + 1}"
        else:
            with pytest.raises(ServerError, match="the replica of this session is down"):
                client.step(session, "add")
    assert {client.create() % 2 for _ in range(4)} == {1}
    listed, = (line for line in invoke("env.list").stdout.splitlines() if "form-maze" in line)
    assert "local x1 of 2" in listed and re.search(r"\d+, \d+ MB", listed), listed
    with pytest.raises(ServerError, match=r"HTTP 400.*no id in the request"):
        client._call("/step", {"action": "add"})


def test_creates_take_turns_whatever_else_is_asked(haproxy, tmp_path):
    client = up_here("form-textcraft", free_port(), tmp_path, replicas=2)
    try:
        seen = []
        for _ in range(6):
            urllib.request.urlopen(client.root + "/", timeout=10).close()
            seen.append(client.create() % 2)
        assert seen.count(0) == 3
    finally:
        env_local.down("form-textcraft", tmp_path / "run")


def test_a_create_goes_to_the_replica_that_has_room(haproxy, tmp_path):
    client = up_here("form-textcraft", free_port(), tmp_path, replicas=2, max_sessions=1)
    try:
        held = {(session := client.create()) % 2: session for _ in range(2)}
        assert held.keys() == {0, 1}
        with pytest.raises(ServerError, match="all 1 sessions") as full:
            client.create()
        assert full.value.status == 429
        for free in (1, 1, 1, 0, 0, 0):
            client.close(held[free])
            held[free] = client.create()
            assert held[free] % 2 == free
    finally:
        env_local.down("form-textcraft", tmp_path / "run")


def test_a_request_that_its_replica_died_of_is_answered_with_json(haproxy, tmp_path):
    (tmp_path / "ends.py").write_text("import os\nfrom fixture_server import app\n\n"
                                      "@app.middleware('http')\nasync def ends(request, go_on):\n"
                                      "    if request.headers.get('die'):\n        os._exit(1)\n"
                                      "    return await go_on(request)\n")
    client = up_here("form-textcraft", free_port(), tmp_path, replicas=2, app="ends:app")
    try:
        body = json.dumps({"id": client.create(), "action": "add"}).encode()
        headers = {"Content-Type": "application/json", "die": "yes"}
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(client.root + "/step", data=body, headers=headers),
                                   timeout=30)
        assert caught.value.code == 502 and "died while it answered" in json.loads(caught.value.read())["error"]
    finally:
        env_local.down("form-textcraft", tmp_path / "run")


def test_a_proxy_comes_up_where_few_files_may_be_open(haproxy, tmp_path):
    config = tmp_path / "haproxy.cfg"
    port = free_port()
    config.write_text(proxy_config(rows()["form-textcraft"], port, ["127.0.0.1:1"]))
    process = subprocess.Popen([haproxy, "-db", "-f", config],
                               stderr=subprocess.PIPE,
                               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)))
    try:
        end = time.monotonic() + 30
        while port_is_free(port):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()


def test_a_python_that_is_nowhere_is_named_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"no Python 3\.99 on PATH.* --runner docker"):
        ensure_venv(tmp_path, "3.99", env_local.CONSTRAINTS / "env-textcraft.txt")


def test_without_haproxy_replicas_are_refused_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(env_local.shutil, "which", lambda *_, **__: None)
    options = env_local.Options(port=1, replicas=2)
    with pytest.raises(UserError, match="apt install haproxy"):
        env_local.up(rows()["form-maze"], options, ROOT, tmp_path, {}, 1, tmp_path)


# ---------------------------------------------------------------- data


class Files(http.server.BaseHTTPRequestHandler):
    """Serves bytes with ranges; the first request of a file in `breaks` stops half way."""
    content: ClassVar[dict[str, bytes]] = {}
    breaks: ClassVar[set[str]] = set()
    asked: ClassVar[list[tuple[str, str]]] = []

    def do_HEAD(self):
        self.reply(b"")

    def do_GET(self):
        self.reply(self.content.get(self.path, b""))

    def reply(self, body):
        whole = self.content.get(self.path)
        if whole is None:
            self.send_error(404)
            return
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.asked.append((self.command + " " + self.path, self.headers.get("Range") or ""))
        if first > len(whole):
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(whole) - first))
        self.end_headers()
        if self.path in self.breaks and self.command == "GET":
            self.breaks.discard(self.path)
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body[first:])

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path):
    inner = tmp_path / "inner.zip"
    with zipfile.ZipFile(inner, "w") as zipped:
        zipped.writestr("shop/shop.sqlite", os.urandom(1000))
    outer = tmp_path / "train.zip"
    with zipfile.ZipFile(outer, "w") as zipped:
        zipped.writestr("train/train.json", "[]")
        zipped.write(inner, "train/train_databases.zip")
    Files.content = {"/train.zip": outer.read_bytes(), "/corpus.gz": gzip.compress(b"text" * 1000)}
    Files.breaks, Files.asked = set(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def row_with(*data: dict) -> Environment:
    return rows()["form-textcraft"].replaced(data=tuple(map(Data.read, data)))


def zipped_row(site):
    return row_with({
        "path": "train/train.json",
        "url": f"{site}/train.zip",
        "then": "unzip",
        "inner": ["train/train_databases.zip"]
    })


def test_data_is_fetched_unpacked_and_told(site, tmp_path):
    said: list[str] = []
    row = zipped_row(site)
    assert env_data.fetch(row, tmp_path / "data", said.append) == []
    assert (tmp_path / "data/train/train.json").read_text() == "[]"
    assert (tmp_path / "data/train/shop/shop.sqlite").stat().st_size == 1000
    assert "to fetch into" in said[0] and "free" in said[0] and len(list((tmp_path / "data").iterdir())) == 1
    asked = len(Files.asked)
    assert env_data.fetch(row, tmp_path / "data", said.append) == [] and len(Files.asked) == asked


def test_an_archive_whose_folder_has_another_name_is_put_where_the_row_says(site, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as dated:
        with zipfile.ZipFile(io.BytesIO(Files.content["/train.zip"])) as zipped:
            for name in zipped.namelist():
                dated.writestr(name.replace("train/", "train_20240627/", 1), zipped.read(name))
        dated.writestr("__MACOSX/train_20240627/._train.json", "")
    Files.content["/train.zip"] = packed.getvalue()
    assert env_data.fetch(zipped_row(site), tmp_path / "data", print) == []
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["train"]
    assert {path.name for path in (tmp_path / "data/train").iterdir()} == {"train.json", "shop"}


def test_an_archive_whose_inner_one_is_damaged_leaves_nothing_that_looks_complete(site, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        zipped.writestr("train/train.json", "[]")
        zipped.writestr("train/train_databases.zip", "torn")
    Files.content["/train.zip"] = packed.getvalue()
    row = zipped_row(site)
    with pytest.raises(UserError, match="is damaged"):
        env_data.fetch(row, tmp_path / "data", print)
    assert row.missing_data(tmp_path / "data") == list(row.data)


def test_a_folder_in_the_way_is_told_and_kept(site, tmp_path):
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/train/mine").write_text("x")
    with pytest.raises(UserError, match=r"is there without train\.json; move it away"):
        env_data.fetch(zipped_row(site), tmp_path / "data", print)
    assert (tmp_path / "data/train/mine").read_text() == "x"


@pytest.mark.parametrize("size_told", [True, False])
def test_what_came_of_a_longer_file_is_fetched_anew(size_told, site, tmp_path):
    target, whole = tmp_path / "file", Files.content["/train.zip"]
    (tmp_path / "file.part").write_bytes(b"x" * (len(whole) + 1))
    if not size_told:
        with pytest.raises(UserError, match="of another file, and was removed; run it again"):
            env_data.download(site + "/train.zip", target, 0, print)
    env_data.download(site + "/train.zip", target, len(whole) * size_told, print)
    assert target.read_bytes() == whole and not (tmp_path / "file.part").exists()


def test_a_broken_download_goes_on_where_it_stopped(site, tmp_path):
    Files.breaks = {"/train.zip"}
    row, size = zipped_row(site), len(Files.content["/train.zip"])
    with pytest.raises(UserError, match="run it again to go on"):
        env_data.fetch(row, tmp_path / "data", print)
    assert env_data.fetch(row, tmp_path / "data", print) == []
    assert Files.asked[-1] == ("GET /train.zip", f"bytes={size // 2}-")


def deflated() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("train/train.json", json.dumps([os.urandom(300).hex()] * 20))
    return packed.getvalue()


def holed(whole: bytes) -> bytes:
    return whole[:60] + bytes(40) + whole[100:]


@pytest.mark.parametrize("file,then,make", [
    ("train.zip", "unzip", lambda: holed(Files.content["/train.zip"])),
    ("train.zip", "unzip", lambda: holed(deflated())),
    ("train.zip", "unzip", lambda: b"<html>"),
    ("c.gz", "gunzip", lambda: gzip.compress(os.urandom(5000))[:-2000]),
    ("c.gz", "gunzip", lambda: holed(gzip.compress(os.urandom(300).hex().encode() * 20))),
    ("c.gz", "gunzip", lambda: b"<html>"),
],
                         ids=["stored, holed", "deflated, holed", "no zip", "gz, torn", "gz, holed", "no gz"])
def test_a_damaged_archive_is_told_and_fetched_anew(file, then, make, site, tmp_path):
    row = row_with({"path": "train/train.json", "url": f"{site}/{file}", "then": then})
    good = deflated() if then == "unzip" else gzip.compress(b"[]")
    Files.content[f"/{file}"] = make()
    with pytest.raises(UserError, match=r"is damaged \(.*\) and was removed; run it again to fetch it anew"):
        env_data.fetch(row, tmp_path / "data", print)
    assert row.missing_data(tmp_path / "data") == list(row.data)
    Files.content[f"/{file}"] = good
    assert env_data.fetch(row, tmp_path / "data", print) == []


def test_what_came_before_needs_no_space_again(site, tmp_path, monkeypatch):
    Files.content["/big.bin"] = os.urandom(100_000)
    row = row_with({"path": "big.bin", "url": f"{site}/big.bin"})
    store = tmp_path / env_data.PARTS / "big.bin"
    (store / "unpacked").mkdir(parents=True)
    (store / "big.bin.part").write_bytes(Files.content["/big.bin"][:95_000])
    (store / "unpacked" / "half").write_bytes(bytes(90_000))
    monkeypatch.setattr(env_data.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 9 * 10**5, 4_000))
    with pytest.raises(UserError, match=r"about 5kB more .* 4kB are free"):
        env_data.fetch(row, tmp_path, print)
    monkeypatch.setattr(env_data.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 9 * 10**5, 6_000))
    said: list[str] = []
    assert env_data.fetch(row, tmp_path, said.append) == []
    assert "100kB to fetch" in said[0] and "(95kB of it came before)" in said[0]
    assert Files.asked[-1] == ("GET /big.bin", "bytes=95000-")


def test_an_archive_that_leads_out_of_the_folder_is_refused(tmp_path):
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w") as zipped:
        zipped.writestr("../outside", "x")
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="leads out"):
        env_data.unzip(evil, tmp_path / "in")
    assert not (tmp_path / "outside").exists()


def test_packed_text_is_unpacked(site, tmp_path):
    row = row_with({"path": "corpus.jsonl", "url": f"{site}/corpus.gz", "then": "gunzip"})
    assert env_data.fetch(row, tmp_path, print) == []
    assert (tmp_path / "corpus.jsonl").read_bytes() == b"text" * 1000


def test_too_little_space_is_told_before_anything_is_fetched(site, tmp_path, monkeypatch):
    monkeypatch.setattr(env_data.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(UserError, match="are free in"):
        env_data.fetch(zipped_row(site), tmp_path / "data", print)
    assert [asked for asked, _ in Files.asked] == ["HEAD /train.zip"]


def test_a_source_that_is_gone_is_one_line(site, tmp_path):
    row = row_with({"path": "x", "url": f"{site}/nothing"})
    with pytest.raises(UserError, match="Not Found; fetch it by other means, then --from DIR"):
        env_data.fetch(row, tmp_path / "data", print)


class Hub(Files):
    """Answers as the Hugging Face Hub does, to one token alone."""
    REVISION = "0" * 40
    content: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[tuple[str, str]]] = []

    def reply(self, body):
        if self.headers.get("Authorization") != "Bearer hf_of_dotenv":
            self.send_error(401)
            return
        file = {"rfilename": "corpus.jsonl", "path": "corpus.jsonl", "type": "file", "oid": "1", "size": 4}
        told = [file] if "/tree/" in self.path else {"id": "user/name", "sha": self.REVISION, "siblings": [file]}
        self.content[self.path] = json.dumps(told).encode() if self.path.startswith("/api/") else b"text"
        super().reply(self.content[self.path])

    def end_headers(self):
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", self.REVISION)
        super().end_headers()


@pytest.mark.parametrize("files", [("corpus.jsonl", ), ()], ids=["a file", "the whole repository"])
def test_the_hub_is_asked_where_and_with_what_dotenv_says(files, tmp_path, monkeypatch):
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    dotenv = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_of_dotenv"}
    monkeypatch.setattr("tasks.lib.settings.read_dotenv", lambda: dotenv)
    row = row_with({"path": "corpus", "hub": "datasets/user/name", "files": files})
    try:
        assert env_data.fetch(row, tmp_path, print) == []
        found = tmp_path / "corpus" if files else tmp_path / "corpus" / "corpus.jsonl"
        assert found.read_bytes() == b"text"
        dotenv["HF_TOKEN"] = "hf_another"
        (tmp_path / "corpus").rename(tmp_path / "away")
        with pytest.raises(UserError, match=r"hub user/name: .*401"):
            env_data.fetch(row, tmp_path, print)
    finally:
        server.shutdown()


@pytest.mark.parametrize("answer",
                         [b"220 smtp ready\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"])
def test_a_source_that_speaks_no_http_or_stops_is_one_line(answer, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    asked = connection.recv(65536)
                    connection.sendall(answer.split(b"5\r\n")[0] if asked.startswith(b"HEAD") else answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a"
        with pytest.raises(UserError, match=re.escape(url)):
            env_data.fetch(row_with({"path": "a", "url": url}), tmp_path / "data", print)
    assert not (tmp_path / "data" / "a").exists()


@pytest.mark.parametrize("kind", ["header", "continue", "told body", "chunks"])
def test_a_source_that_drips_is_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(env_data, "PATIENCE", 1.0)
    with dripping(kind) as url, within(10), pytest.raises(UserError, match=f"{url}/a: .*timed out"):
        env_data.download(f"{url}/a", tmp_path / "a", 0, print)
    assert not (tmp_path / "a").exists()


def test_what_comes_by_hand_is_told_before_the_rest_is_fetched(site, tmp_path):
    row = row_with({"path": "train.zip", "url": f"{site}/train.zip"}, {"path": "b", "how": "ask Bob"})
    said: list[str] = []
    env_data.fetch(row, tmp_path / "data", said.append)
    assert said[0] == f"{row.name}: b comes by hand: ask Bob" and "to fetch into" in said[1]


def test_a_data_folder_that_is_a_dead_link_is_told(site, tmp_path):
    (tmp_path / "data").symlink_to(tmp_path / "disk that is not mounted")
    with pytest.raises(UserError, match=r"is a link to .*not mounted, which is not there; remove it"):
        env_data.fetch(zipped_row(site), tmp_path / "data", print)


@pytest.mark.parametrize("inside", ["index.bin", "folder"])
def test_data_behind_links_that_a_container_cannot_follow_is_told(inside, tmp_path):
    """As the hub's cache has it: snapshots of links to ../../blobs."""
    snapshot, blob = tmp_path / "snapshots" / "x", tmp_path / "blobs" / "1"
    blob.parent.mkdir()
    blob.touch()
    link = snapshot / ("index.bin" if inside == "index.bin" else "index.bin/deep/file")
    link.parent.mkdir(parents=True)
    link.symlink_to(Path(os.path.relpath(blob, link.parent)))
    data = ROOT / "data" / "fault-data"
    try:
        done = invoke("env.data", "--env", "fault-data", "--from", str(snapshot))
        assert done.returncode == 0 and f"{link} is a link out of that folder" in done.stdout
        done = invoke("env.up", "--env", "fault-data", "--runner", "docker")
        assert done.returncode == 2 and re.fullmatch(f"env.up: {link} is a link out .* --runner local\n",
                                                     done.stderr), done.stderr
        link.unlink()
        blob.rename(link)
        (snapshot / "again").symlink_to(link)
        assert invoke("env.data", "--env", "fault-data", "--from", str(snapshot)).stdout.count("\n") == 1
    finally:
        data.unlink(missing_ok=True)


def test_what_must_be_got_by_hand_is_listed(tmp_path):
    row = row_with({"path": "a", "how": "ask Ann"}, {"path": "b", "how": "ask Bob"})
    assert [data.how for data in env_data.fetch(row, tmp_path, print)] == ["ask Ann", "ask Bob"]


def test_data_that_is_there_is_taken_over(tmp_path):
    row, have = row_with({"path": "index.bin", "how": "ask"}), tmp_path / "have"
    have.mkdir()
    with pytest.raises(UserError, match=r"has no index\.bin"):
        env_data.adopt(row, tmp_path / "data" / "x", have)
    (have / "index.bin").touch()
    env_data.adopt(row, tmp_path / "data" / "x", have)
    assert row.missing_data(tmp_path / "data" / "x") == []
    env_data.adopt(row, tmp_path / "data" / "x", have)  # again, over its own link
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    with pytest.raises(UserError, match="not empty"):
        env_data.adopt(row, tmp_path / "other", have)
    assert (tmp_path / "other" / "mine").exists()


def test_data_that_is_a_link_already_is_taken_over_through_it(tmp_path):
    row, have, folder = row_with({"path": "index.bin", "how": "ask"}), tmp_path / "have", tmp_path / "data"
    have.mkdir()
    (have / "index.bin").touch()
    env_data.adopt(row, folder, have)
    for again in (folder, tmp_path / "way"):
        if again != folder:
            again.symlink_to(folder)
        env_data.adopt(row, folder, again)
        assert folder.resolve() == have and row.missing_data(folder) == []
    env_data.adopt(row, have, have)
    assert have.is_dir() and not have.is_symlink()


def test_a_file_where_the_data_belongs_is_told(site, tmp_path):
    (tmp_path / "have" / "train").mkdir(parents=True)
    (tmp_path / "have" / "train" / "train.json").touch()
    (tmp_path / "data").touch()
    with pytest.raises(UserError, match="data is a file; move it away"):
        env_data.adopt(zipped_row(site), tmp_path / "data", tmp_path / "have")
    with pytest.raises(UserError, match="data is a file; move it away"):
        env_data.fetch(zipped_row(site), tmp_path / "data", print)


def test_a_folder_of_data_that_is_none_is_misuse(tmp_path):
    done = invoke("env.data", "--env", "fault-data", "--from", str(tmp_path / "nowhere"))
    assert (done.returncode,
            done.stdout) == (2, "") and done.stderr == f"env.data: --from {tmp_path}/nowhere is no folder\n"


def test_the_data_task_tells_what_is_missing():
    done = invoke("env.data", "--env", "fault-data")
    assert done.returncode == 1 and "fault-data/index.bin: ask the author" in done.stderr
    assert invoke("env.data", "--env", "form-maze").stdout == "form-maze needs no data\n"


def making(log, content="made"):
    """Return a maker of data that writes a file, or a folder for toy data."""

    def make(what, out):
        log.append(what)
        if what.startswith("toy-"):
            out.mkdir()
            (out / "about.json").write_text('{"data": "toy"}')
            (out / "a").touch()
        else:
            out.write_text(content)

    return make


def test_what_is_made_is_made_last_and_only_when_all_else_is_there(site, tmp_path):
    log: list[str] = []
    row = row_with({"path": "index", "make": "an-index"}, {"path": "corpus.gz", "url": f"{site}/corpus.gz"})
    assert env_data.fetch(row, tmp_path / "data", print, make=making(log)) == []
    assert log == ["an-index"] and {path.name for path in (tmp_path / "data").iterdir()} == {"index", "corpus.gz"}
    log.clear()
    row = row_with({"path": "index", "make": "an-index"}, {"path": "key", "how": "ask Ann"})
    assert [one.path for one in env_data.fetch(row, tmp_path / "other", print, make=making(log))] == ["key"] and not log


def test_files_of_one_archive_are_fetched_once_and_counted_once(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "data.tar.gz", "w:gz") as packed:
        for name in ("a", "b"):
            (tmp_path / name).write_text(name * 3)
            packed.add(tmp_path / name, f"./raw/{name}.pkl")
    asked = []

    def fetch_from_hub(data, store):
        asked.append(data.path)
        shutil.copy(tmp_path / "data.tar.gz", store)
        return [store / "data.tar.gz"]

    monkeypatch.setattr(env_data, "hub_files", lambda data: [("data.tar.gz", 1000)])
    monkeypatch.setattr(env_data, "fetch_from_hub", fetch_from_hub)
    shared = {"hub": "datasets/u/n", "files": ["data.tar.gz"], "then": "untar"}
    row = row_with(*({"path": f"{name}.pkl", "inner": [f"raw/{name}.pkl"], **shared} for name in ("a", "b")))
    said: list[str] = []
    assert env_data.fetch(row, tmp_path / "data", said.append) == []
    assert (tmp_path / "data/b.pkl").read_text() == "bbb" and "1kB to fetch" in said[0]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["a.pkl", "b.pkl"]
    absent = row_with({"path": "c.pkl", "inner": ["raw/c.pkl"], **shared})
    with pytest.raises(UserError, match=r"data.tar.gz holds no raw/c.pkl"):
        env_data.fetch(absent, tmp_path / "data", print)


def test_what_comes_with_a_checkout_is_copied_from_it(tmp_path, monkeypatch):
    row = row_with({"path": "items.json", "source": "data/items.json", "how": "comes with a checkout"})
    monkeypatch.setattr(env_data, "local_source", lambda row: tmp_path / "gym")
    assert [one.path for one in env_data.fetch(row, tmp_path / "data", print)] == ["items.json"]  # this one has not
    place = tmp_path / "gym" / row.folder / "data"
    place.mkdir(parents=True)
    (place / "items.json").write_text("[1]")
    assert env_data.fetch(row, tmp_path / "data", print) == []
    assert (tmp_path / "data/items.json").read_text() == "[1]"


@pytest.mark.parametrize("name,split,index,wanted", [
    ("sqlgym", "", "", ["train/train.json", "dev/dev.json"]),
    ("sqlgym", "dev", "", ["dev/dev.json"]),
    ("searchqa", "", "", ["e5_Flat.index"]),
    ("searchqa", "", "flat", ["e5_Flat.index"]),
    ("searchqa", "", "ivfpq", ["e5_Flat.index", "e5_ivfpq.index"]),
])
def test_data_is_chosen_by_split_and_by_index(name, split, index, wanted):
    found = [one.path for one in env_data.chosen(environment(name), split, index) if one.split or one.index]
    assert found == wanted


@pytest.mark.parametrize("name,split,index,line", [
    ("sqlgym", "test", "", "--split test: sqlgym has train, dev; choose one"),
    ("searchqa", "", "HNSW", "--index HNSW: searchqa has flat, hnsw, ivfpq; choose one"),
    ("alfworld", "dev", "", "--split dev: alfworld has no choice of it; leave --split out"),
    ("sqlgym", "", "flat", "--index flat: sqlgym has no choice of it; leave --index out"),
])
def test_a_split_or_index_that_is_none_is_refused(name, split, index, line):
    with pytest.raises(UserError, match=line):
        env_data.chosen(environment(name), split, index)


def test_dev_alone_suffices_for_sqlgym_and_train_alone_does_not(tmp_path):
    row = environment("sqlgym")
    for split in ("train", "dev"):
        folder = tmp_path / split / split
        folder.mkdir(parents=True)
        (folder / f"{split}.json").touch()
    assert row.missing_data(tmp_path / "dev") == []
    assert [one.path for one in row.missing_data(tmp_path / "train")] == ["dev/dev.json"]


def test_an_index_is_noted_and_the_rows_own_needs_no_note(tmp_path):
    row = environment("searchqa")
    env_data.choose_index(row, tmp_path, "hnsw")
    assert about(tmp_path) == {"index": "hnsw"}
    (tmp_path / "about.json").write_text('{"data": "toy", "index": "hnsw"}')
    env_data.choose_index(row, tmp_path, "ivfpq")
    assert about(tmp_path) == {"data": "toy", "index": "ivfpq"}
    env_data.choose_index(row, tmp_path, "flat")
    assert about(tmp_path) == {"data": "toy"}
    (tmp_path / "about.json").write_text('{"index": "hnsw"}')
    env_data.choose_index(row, tmp_path, "flat")
    assert list(tmp_path.iterdir()) == []


def test_toy_data_takes_no_other_datas_place_and_the_real_none_of_its(site, tmp_path):
    row = zipped_row(site).replaced(toy="x")
    for content in ("own", "link", "file"):
        folder = tmp_path / content
        if content == "own":
            (folder / "train").mkdir(parents=True)
        elif content == "link":
            folder.symlink_to(tmp_path / "own")
        else:
            folder.touch()
        with pytest.raises(UserError, match=f"{content} holds other data; move it away"):
            env_data.make_toy(row, folder, making([]))
    log: list[str] = []
    for _ in range(2):  # an earlier toy is replaced
        env_data.make_toy(row, tmp_path / "data", making(log))
    assert log == ["toy-x", "toy-x"] and about(tmp_path / "data") == {"data": "toy"}
    with pytest.raises(UserError, match=r"holds toy data; `rm -r .*` before the real"):
        env_data.fetch(row, tmp_path / "data", print)
    assert (tmp_path / "data/a").exists()
    with pytest.raises(UserError, match="no toy data for form-textcraft"):
        env_data.make_toy(zipped_row(site), tmp_path / "new", making([]))


def test_an_index_of_an_environment_without_data_is_refused_and_not_passed_over():
    done = invoke("env.data", "--env", "demo", "--index", "hnsw", ENVIRONMENTS="environments.toml")
    assert done.returncode == 2
    assert done.stderr == "env.data: --index hnsw: demo has no choice of it; leave --index out\n"
