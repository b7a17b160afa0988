"""Environment servers in containers: every protocol form, every fault, replicas, and what happens to sessions."""
import json
import re
import shutil
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.docker.workbench import ROOT, Terminal, Workbench
from tests.fixtures.servers import free_port

sys.path[:0] = [str(ROOT), str(ROOT / "demo")]
from agentenv_demo.players import expert  # noqa: E402

from servers.protocol import Client, ServerError  # noqa: E402
from tasks.lib.environments.rows import environment, environments  # noqa: E402

pytestmark = pytest.mark.docker
FIXTURES = "tests/fixtures/environments.toml"
ROWS = environments(ROOT / FIXTURES)
# A crash, from inside: `docker kill` would count as a stop that the user wanted, and nothing would start it again.
KILL_SERVER = """
import glob, os
for path in glob.glob('/proc/[0-9]*/cmdline'):
    try:
        words = open(path).read().split(chr(0))
    except OSError:  # it ended meanwhile
        continue
    if words[0] == 'python' and words[1].endswith('serve.py'):
        os.kill(int(path.split('/')[2]), 9)
"""
FORMS = sorted(name for name in ROWS if name.startswith("form-"))


@pytest.fixture(scope="module")
def servers(bench: Workbench) -> Iterator[Workbench]:
    """Return the copy of the project with the fixture servers in it."""
    fixtures = bench.root / "tests" / "fixtures"
    fixtures.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "tests/fixtures/envserver", fixtures / "envserver", dirs_exist_ok=True)
    shutil.copy2(ROOT / FIXTURES, fixtures)
    yield bench


@pytest.fixture(autouse=True)
def nothing_left(servers: Workbench) -> Iterator[None]:
    yield
    for container in servers.containers():
        servers.run("docker", "rm", "-f", container)


def url_in(said: str) -> str:
    found = re.search(r"is ready: (http://127\.0\.0\.1:\d+)", said)
    assert found, said
    return found[1]


def up(servers: Workbench, name: str, *words: str, rows: str = FIXTURES, **variables: str) -> Client:
    done = servers.invoke("env.up",
                          "--env",
                          name,
                          "--runner",
                          "docker",
                          *words,
                          env={
                              "ENVIRONMENTS": rows,
                              **variables
                          })
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    row = environments(ROOT / rows)[name]
    return Client(url_in(done.stdout), row.protocol, timeout=20)


def told(client: Client, path: str = "/_sessions") -> dict:
    with urllib.request.urlopen(client.base + path, timeout=60) as reply:
        return json.loads(reply.read())


@pytest.mark.parametrize("name", FORMS)
def test_a_server_of_this_form_comes_up_conforms_and_goes_down(servers: Workbench, name: str) -> None:
    up(servers, name)
    checked = servers.invoke("env.check", "--env", name, env={"ENVIRONMENTS": FIXTURES})
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert len(re.findall(r"  yes  ", checked.stdout)) == 8
    done = servers.invoke("env.down", "--env", name, env={"ENVIRONMENTS": FIXTURES})
    assert done.stdout == f"{name} is down\n" and servers.containers() == []


def test_a_server_may_load_libraries_from_its_own_folder_on_disk_which_goes_with_it(servers: Workbench) -> None:
    up(servers, "form-alfworld")
    container, = servers.containers(service="env-form-alfworld")
    for folder, runs in (("/scratch", 0), ("/tmp", 126)):  # a tmpfs is noexec
        tried = servers.run("docker", "exec", container, "sh", "-c", f"cp /bin/true {folder}/x && {folder}/x")
        assert tried.returncode == runs, (folder, tried.stderr)
    volumes = servers.docker("inspect", "--format", "{{range .Mounts}}{{.Type}} {{.Name}} {{end}}", container).split()
    assert "volume" in volumes
    servers.invoke("env.down", "--env", "form-alfworld", env={"ENVIRONMENTS": FIXTURES})
    left = servers.docker("volume", "ls", "--quiet").split()
    assert volumes[volumes.index("volume") + 1] not in left


@pytest.mark.parametrize("name", ["form-maze", "form-sqlgym", "form-webarena", "form-textcraft"])
def test_this_form_conforms_behind_the_proxy_too(servers: Workbench, name: str) -> None:
    client = up(servers, name, "--replicas", "2")
    checked = servers.invoke("env.check", "--env", name, env={"ENVIRONMENTS": FIXTURES})
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert {client.create() % 2 for _ in range(4)} == {0, 1}


@pytest.mark.parametrize("name,words,line", [
    ("fault-dies", [], r"env.up: fault-dies ended: RuntimeError: the fixture was told to die at import"),
    ("fault-never", ["--wait", "15"], r"env.up: fault-never was not ready after 15 s: POST /create: HTTP 500 .*"),
    ("fault-error200", ["--wait", "15"], r"env.up: fault-error200 was not ready after 15 s: POST /create: told to .*"),
    ("fault-hangs", ["--wait", "15"], r"env.up: fault-hangs was not ready after 15 s: .*"),
    ("fault-data", [], r"env.up: fault-data needs index.bin in data/fault-data: ask the author"),
    ("fault-key", [], r"env.up: fault-key needs FIXTURE_KEY in the environment or in .env; .*: ask the author"),
    ("fault-consent", [], r"env.up: this fixture deletes everything; pass --i-understand to go on"),
    ("form-textcrft", [],
     r"env.up: no environment 'form-textcrft' in environments.toml; did you mean form-textcraft.*"),
    ("form-textcraft", ["--port", "x"], r"env.up: --port x is no port; choose one from 1 to 65535"),
    ("form-textcraft", ["--replicas", "0"], r"env.up: --replicas 0 is no whole number of at least 1"),
    ("form-textcraft", ["--runner", "cloud"], r"env.up: unknown runner 'cloud'; choose one of auto, docker, local"),
])
def test_a_fault_is_one_line_and_leaves_nothing(servers: Workbench, name: str, words: list[str], line: str) -> None:
    if name in ROWS and not words:
        servers.invoke("build.env", "--env", name, env={"ENVIRONMENTS": FIXTURES})
    words = words if "--runner" in words else [*words, "--runner", "docker"]
    done = servers.invoke("env.up", "--env", name, *words, env={"ENVIRONMENTS": FIXTURES})
    assert done.returncode in (1, 2)
    assert re.fullmatch(line, done.stderr.strip().splitlines()[-1]), done.stderr[-3000:]
    assert "Traceback" not in done.stderr and servers.containers() == []


def test_a_taken_port_is_passed_over_and_told(servers: Workbench) -> None:
    port = ROWS["form-textcraft"].port
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", port))
        holder.listen()
        done = servers.invoke("env.up", "--env", "form-textcraft", "--runner", "docker", env={"ENVIRONMENTS": FIXTURES})
        assert f"env.up: port {port} is taken; form-textcraft gets {port + 1}" in done.stdout
        assert url_in(done.stdout).endswith(f":{port + 1}")
        asked = servers.invoke("env.up",
                               "--env",
                               "form-babyai",
                               "--runner",
                               "docker",
                               "--port",
                               str(port),
                               env={"ENVIRONMENTS": FIXTURES})
        assert (asked.returncode,
                asked.stderr.strip()) == (1, f"env.up: port {port} is taken; leave --port out, or choose another")


def test_two_environments_run_side_by_side_and_go_down_one_by_one(servers: Workbench) -> None:
    first, second = up(servers, "form-textcraft"), up(servers, "form-maze")
    assert first.create() and second.create()
    listed = servers.invoke("env.list", env={"ENVIRONMENTS": FIXTURES}).stdout
    assert re.search(rf"^form-textcraft +yes +docker x1 +{ROWS['form-textcraft'].port} ", listed, re.M)
    assert re.search(r"^form-webshop +\w+ +- +\(", listed, re.M)
    servers.invoke("env.down", "--env", "form-textcraft", env={"ENVIRONMENTS": FIXTURES})
    assert second.create()
    with pytest.raises(ServerError):
        first.create()
    assert "form-maze is down" in servers.invoke("env.down", env={"ENVIRONMENTS": FIXTURES}).stdout
    assert servers.containers() == []


def test_a_server_that_ended_is_not_up_and_comes_up_again(servers: Workbench) -> None:
    up(servers, "form-textcraft", "--replicas", "2")
    servers.docker("stop", "--time", "1", *servers.containers(service="env-form-textcraft"))
    asked = servers.invoke("env.check", "--env", "form-textcraft", env={"ENVIRONMENTS": FIXTURES})
    assert asked.returncode == 1 and "form-textcraft is not up" in asked.stderr
    assert up(servers, "form-textcraft").create() and len(servers.containers()) == 1
    again = servers.invoke("env.up", "--env", "form-textcraft", env={"ENVIRONMENTS": FIXTURES})
    assert "form-textcraft is up already" in again.stdout


@pytest.mark.parametrize("replicas", ["1", "2"])
def test_the_address_that_it_is_published_on_is_the_one_that_is_asked(servers: Workbench, replicas: str) -> None:
    said = servers.invoke("env.up",
                          "--env",
                          "form-maze",
                          "--replicas",
                          replicas,
                          "--runner",
                          "docker",
                          env={
                              "ENVIRONMENTS": FIXTURES,
                              "ENV_BIND": "127.0.0.2"
                          })
    assert "is ready: http://127.0.0.2:" in said.stdout, said.stderr
    checked = servers.invoke("env.check", "--env", "form-maze", env={"ENVIRONMENTS": FIXTURES})
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_container_is_contained(servers: Workbench) -> None:
    up(servers, "form-textcraft")
    found = json.loads(servers.docker("inspect", servers.containers()[0]))[0]
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["Init"]
    assert host["Memory"] == ROWS["form-textcraft"].memory_mb * 2**20
    assert "no-new-privileges:true" in host["SecurityOpt"] and found["Config"]["User"] != ""
    inside = servers.docker("exec", found["Id"], "python", "-c", "import os; print(os.environ['PYTHONHASHSEED'])")
    assert inside == "0"
    refused = servers.run("docker", "exec", found["Id"], "touch", "/srv/x")
    assert "Read-only file system" in refused.stderr


def test_the_health_check_means_ready(servers: Workbench) -> None:
    up(servers, "form-weather")
    container = servers.containers()[0]
    for _ in range(60):
        status = servers.docker("inspect", "-f", "{{.State.Health.Status}}", container)
        if status == "healthy":
            break
        time.sleep(0.5)
    assert status == "healthy"
    built = servers.invoke("build.env", "--env", "fault-never", env={"ENVIRONMENTS": FIXTURES})
    assert built.returncode == 0, built.stderr
    servers.docker("run", "-d", "--name", f"{servers.name}-never", "--label",
                   f"com.docker.compose.project={servers.name}", servers.image("agentgym/env-fault-never"))
    end, never = time.monotonic() + 60, ""  # its web server listens; its sessions fail
    while "not ready: POST /create: HTTP 500" not in never and time.monotonic() < end:
        time.sleep(0.5)
        never = servers.docker("inspect", "-f", "{{json .State.Health}}", f"{servers.name}-never")
    assert json.loads(never)["Status"] == "starting" and "not ready: POST /create: HTTP 500" in never


def test_the_raw_compose_command_works(servers: Workbench) -> None:
    (servers.root / "data").mkdir(exist_ok=True)
    port = free_port()
    done = servers.compose("--profile", "env", "up", "-d", "--wait", env={"ENV": "demo", "ENV_PORT": str(port)})
    assert done.returncode == 0, done.stderr
    client = Client(f"http://127.0.0.1:{port}", environment("demo").protocol)
    assert client.reset(client.create(), 0).startswith("find")
    assert "demo is down" in servers.invoke("env.down", "--env", "demo").stdout


def test_an_environment_of_one_s_own_as_the_guide_adds_it(servers: Workbench) -> None:
    shutil.copytree(ROOT / "demo", servers.root / "environments/mine", ignore=shutil.ignore_patterns("__pycache__"))
    table = (ROOT / "environments.toml").read_text().partition("[demo]\n")[2]
    row = ("[mine]\n" + table).replace("[demo.", "[mine.").replace('folder = "demo"',
                                                                   'folder = "environments/mine"\nstage = "demo"')
    rows = servers.root / "environments/own.toml"
    rows.write_text(row.replace("port = 26016", "port = 26777"))
    own = {"ENVIRONMENTS": "environments/own.toml"}
    done = servers.invoke("env.up", "--env", "mine", "--runner", "docker", env=own)
    assert url_in(done.stdout).endswith(":26777"), done.stderr[-3000:]
    assert servers.invoke("env.check", "--env", "mine", env=own).returncode == 0
    assert servers.invoke("env.down", "--env", "mine", env=own).stdout == "mine is down\n"
    servers.docker("rmi", servers.image("agentgym/env-mine"))
    raw = {**own, "ENV": "mine", "ENV_STAGE": "demo", "ENV_FOLDER": "environments/mine", "ENV_PORT": "26777"}
    done = servers.compose("--profile", "env", "up", "-d", "--wait", env=raw)
    assert done.returncode == 0, done.stderr
    client = Client("http://127.0.0.1:26777", environments(rows)["mine"].protocol)
    assert client.reset(client.create(), 0).startswith("find")


def test_restart_starts_it_as_it_was(servers: Workbench) -> None:
    client = up(servers, "form-textcraft", "--replicas", "2", "--session-ttl", "77")
    old = client.create()
    done = servers.invoke("env.restart", "--env", "form-textcraft", env={"ENVIRONMENTS": FIXTURES})
    assert url_in(done.stdout) == client.base and len(servers.containers()) == 3
    with pytest.raises(ServerError, match="no session"):
        client.reset(old, 0)


def test_dry_prints_the_command_and_starts_nothing(servers: Workbench) -> None:
    done = servers.invoke("--dry",
                          "env.up",
                          "--env",
                          "form-textcraft",
                          "--runner",
                          "docker",
                          env={"ENVIRONMENTS": FIXTURES})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.search(r"docker compose .*compose\.json up --detach --force-recreate env-form-textcraft$", lines[-1])
    assert servers.containers() == []
    absent = servers.invoke("--dry",
                            "env.up",
                            "--env",
                            "form-textcraft",
                            "--runner",
                            "docker",
                            env={
                                "ENVIRONMENTS": FIXTURES,
                                "IMAGE_TAG": "absent"
                            })
    assert [line.split("compose.json ")[1].split()[0] for line in absent.stdout.splitlines()] == ["build", "up"]


def test_dry_prints_the_commands_for_a_server_that_is_up(servers: Workbench) -> None:
    up(servers, "form-textcraft")
    container = servers.docker("ps", "-q", "--no-trunc", "--filter", f"label=com.docker.compose.project={servers.name}")

    def dry(task: str) -> list[str]:
        done = servers.invoke("--dry", task, "--env", "form-textcraft", env={"ENVIRONMENTS": FIXTURES})
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    stop = [f"docker container stop {container}", f"docker container rm --force --volumes {container}"]
    assert dry("env.down") == stop
    assert dry("env.logs") == [f"docker container logs {container}"]
    assert dry("env.shell")[0].endswith(f" {container} bash")
    assert dry("env.restart")[:2] == stop and " up --detach --force-recreate " in dry("env.restart")[2]
    assert servers.docker("inspect", "-f", "{{.State.Status}}", container) == "running"
    images = servers.invoke("--dry", "clean.images")
    assert servers.image("agentgym/env-form-textcraft") in images.stdout and "image rm" in images.stdout


@pytest.mark.parametrize("replicas, said_by", [("1", ""), ("2", "env-form-textcraft")])
def test_a_shell_opens_in_the_server_and_its_logs_are_followed(servers: Workbench, replicas: str, said_by: str) -> None:
    rows = {"ENVIRONMENTS": FIXTURES}
    up(servers, "form-textcraft", "--replicas", replicas)
    shell = servers.invoke("env.shell", "--env", "form-textcraft", env=rows, stdin="pwd; exit 3\n")
    assert shell.returncode == 3 and "/srv" in shell.stdout.splitlines(), shell.stdout + shell.stderr
    service = "env-form-textcraft" if replicas == "1" else "env-form-textcraft-1"
    container, = servers.containers(service=service)
    logs = Terminal(servers,
                    sys.executable,
                    "-m",
                    "invoke",
                    "env.logs",
                    "--env",
                    "form-textcraft",
                    "--follow",
                    env=rows)
    # Again and again: what was said before it follows may not be shown.
    for number in range(50):
        servers.docker("exec", container, "sh", "-c", f"echo said {number} just now >/proc/1/fd/2")
        with suppress(AssertionError):
            shown = logs.wait_for(r"said \d+ just now", timeout=1)
            break
    assert said_by in shown
    logs.type("\x03")
    assert logs.exit_code() == 130


def test_the_log_of_a_start_that_failed_is_kept(servers: Workbench) -> None:
    failed = servers.invoke("env.up", "--env", "fault-dies", "--runner", "docker", env={"ENVIRONMENTS": FIXTURES})
    assert failed.returncode == 1 and servers.containers() == []
    shown = servers.invoke("env.logs", "--env", "fault-dies", env={"ENVIRONMENTS": FIXTURES})
    assert shown.returncode == 0 and "told to" in shown.stdout, shown.stdout + shown.stderr


def play(client: Client, item: int, results: dict, number: int, go_on: threading.Event) -> None:
    """Play `item` with the expert, slowly until `go_on`; note the reward, or the error."""
    try:
        session = client.create()
        results[number] = (session, None)
        observation, done, reward = client.reset(session, item), False, 0.0
        while not done:
            go_on.wait(1.0)
            observation, reward, done = client.step(session, expert(observation))
        results[number] = (session, reward)
    except ServerError as error:
        results[number] = (results.get(number, (None, ))[0], error)


def test_a_replica_that_dies_takes_its_own_sessions_only(servers: Workbench) -> None:
    client = up(servers, "demo", "--replicas", "3", rows="environments.toml")
    results: dict = {}
    killed = threading.Event()
    victim = servers.containers(service="env-demo-1")[0]
    # Items of the last level take 12 moves or more: the server dies while all of them are on their way.
    players = [
        threading.Thread(target=play, args=(client, 36 + number % 12, results, number, killed)) for number in range(30)
    ]
    for player in players:
        player.start()
    end = time.monotonic() + 60
    while len(results) < 30 and time.monotonic() < end:
        time.sleep(0.05)
    # The container ends with its server, at times before this command is through: it is killed with it then (137).
    killer = servers.run("docker", "exec", victim, "python", "-c", KILL_SERVER)
    assert killer.returncode in (0, 137), killer.stdout + killer.stderr
    killed.set()
    for player in players:
        player.join()
    lost = {number for number, (session, result) in results.items() if isinstance(result, ServerError)}
    ended = {number for number, (session, result) in results.items() if result == 1.0}
    assert {number for number, (session, _) in results.items() if session is not None and session % 3 == 1} == lost
    assert len(lost) == 10 and len(ended) == 20
    # It comes back, gives out new ids, and does not know the old ones.
    old = next(session for session, result in results.values() if isinstance(result, ServerError))
    end = time.monotonic() + 30
    fresh = []
    while time.monotonic() < end and not any(session % 3 == 1 for session in fresh):
        try:
            fresh.append(client.create())
        except ServerError:
            time.sleep(0.2)
    assert any(session % 3 == 1 for session in fresh) and old not in fresh
    with pytest.raises(ServerError, match="no session"):
        client.step(old, "look")


def test_ten_thousand_sessions_that_nobody_closes_do_not_stay(servers: Workbench) -> None:
    row = environment("demo")
    client = up(servers, "demo", "--session-ttl", "60", rows="environments.toml")
    before = told(client)["memory_mb"]

    def open_many(count: int) -> None:
        for _ in range(count):
            client.create()

    openers = [threading.Thread(target=open_many, args=(1250, )) for _ in range(8)]
    for opener in openers:
        opener.start()
    most = 0
    while any(opener.is_alive() for opener in openers):
        most = max(most, told(client)["live"])
        time.sleep(0.5)
    end = time.monotonic() + 240
    while (left := told(client))["live"] and time.monotonic() < end:
        time.sleep(1)
    assert most > 5000 and left["live"] == 0
    assert left["memory_mb"] < row.memory_mb and left["memory_mb"] < before + 40
    container = servers.containers()[0]
    assert servers.docker("inspect", "-f", "{{.State.OOMKilled}} {{.RestartCount}}", container) == "false 0"


def test_a_server_without_close_is_recycled_when_memory_is_short_and_nobody_plays(servers: Workbench) -> None:
    # The limit in the row is what serve.py looks at: below what Python itself needs, it recycles as soon as it may.
    rows = servers.root / "small.toml"
    text = (servers.root / FIXTURES).read_text()
    rows.write_text(text.replace("memory_mb = 256", "memory_mb = 40"))
    shutil.copy2(rows, servers.root / "tests/fixtures/small.toml")
    built = servers.invoke("build.env", "--env", "form-maze", env={"ENVIRONMENTS": "tests/fixtures/small.toml"})
    assert built.returncode == 0, built.stderr[-2000:]
    container = servers.docker("run", "-d", "--label", f"com.docker.compose.project={servers.name}", "--restart",
                               "on-failure:5", "-e", "SESSION_TTL=1", servers.image("agentgym/env-form-maze"))
    end = time.monotonic() + 30
    while time.monotonic() < end and "starting afresh" not in servers.run("docker", "logs", container).stderr:
        time.sleep(0.5)
    assert "memory is near its limit and no session is live" in servers.run("docker", "logs", container).stderr
    while time.monotonic() < end and servers.docker("inspect", "-f", "{{.RestartCount}}", container) == "0":
        time.sleep(0.5)
    assert int(servers.docker("inspect", "-f", "{{.RestartCount}}", container)) >= 1


def test_what_lies_in_memory_counts_as_the_servers(servers: Workbench) -> None:
    """A tmpfs and shared memory are what the container is killed for, and no process's own."""
    client = up(servers, "form-textcraft")
    container = servers.docker("ps", "-q", "--filter", "label=org.agentgym-rl.env=form-textcraft", "--filter",
                               f"label=com.docker.compose.project={servers.name}")
    before = client.sessions()["memory_mb"]
    servers.docker("exec", container, "python", "-c", "open('/tmp/held', 'wb').write(b'x' * 100_000_000)")
    assert 90 < client.sessions()["memory_mb"] - before < 130


def test_no_secret_is_in_the_containers_command_or_in_dry_output(servers: Workbench, tmp_path: Path) -> None:
    secret = "sk-fixture-0123456789"
    dry = servers.invoke("--dry",
                         "env.up",
                         "--env",
                         "fault-key",
                         "--runner",
                         "docker",
                         env={
                             "ENVIRONMENTS": FIXTURES,
                             "FIXTURE_KEY": secret
                         })
    assert dry.returncode == 0 and secret not in dry.stdout + dry.stderr
    up(servers, "fault-key", FIXTURE_KEY=secret)
    assert secret not in (servers.root / ".run/env/fault-key/compose.json").read_text()
    found = json.loads(servers.docker("image", "inspect", servers.image("agentgym/env-fault-key")))
    assert secret not in json.dumps(found)
