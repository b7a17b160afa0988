"""What is decided from a row before anything is started: ports, variables, services, the proxy's rules, builds of all."""
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from invoke.context import Context
from invoke.exceptions import Exit

from tasks import build
from tasks.lib.environments import docker as env_docker
from tasks.lib.environments import start_stop
from tasks.lib.environments.compose_model import ALIASES, compose_model
from tasks.lib.environments.haproxy import proxy_config
from tasks.lib.environments.plan import Options, memory_mb, server_variables
from tasks.lib.environments.rows import environment, environments
from tasks.lib.errors import DockerError, UserError
from tasks.lib.flags import port_number
from tasks.lib.host.ports import choose_port, port_is_free, take_port
from tests.fixtures import needs
from tests.fixtures.servers import free_port, rows


def test_a_port_of_a_connection_that_has_ended_is_free():
    """The side that closed first keeps its port in TIME_WAIT for a minute."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = listening.accept()
        assert not port_is_free(port)
    accepted.close()
    client.close()
    with socket.socket() as strict, pytest.raises(OSError, match="in use"):
        strict.bind(("127.0.0.1", port))
    assert port_is_free(port)


def test_the_port_is_the_first_free_one():
    assert choose_port(100, lambda port: port >= 103) == 103
    with pytest.raises(UserError, match="no port from 100 to 199"):
        choose_port(100, lambda port: False)


@pytest.mark.skipif(sys.platform != "linux", reason="ports are kept on Linux alone")
def test_two_tasks_that_look_at_once_choose_different_ports():
    port = free_port()
    other = "import sys\nfrom tasks.lib.host.ports import choose_port, take_port\nprint(choose_port(int(sys.argv[1]), take_port))"
    assert take_port(port) and take_port(port)  # one's own is no obstacle
    chosen = subprocess.run([sys.executable, "-c", other, str(port)], capture_output=True, text=True, check=True).stdout
    assert port < int(chosen) < port + 100


@pytest.fixture
def builds_with(monkeypatch):
    """Set what builds an image, where there is no engine."""
    monkeypatch.setattr(build, "require_engine", lambda *_: None)
    monkeypatch.setattr(build, "image_facts", lambda _: None)
    monkeypatch.setattr(start_stop, "write_compose_file", lambda *_: Path("/nowhere"))
    return lambda build_one: monkeypatch.setattr(env_docker, "build", build_one)


def test_ctrl_c_ends_the_build_of_all(builds_with):
    begun = []

    def interrupted(c, row, *_, **__):
        begun.append(row.name)
        raise UserError(code=130)

    builds_with(interrupted)
    with pytest.raises(Exit) as left:
        build.env(Context(), env="all")
    assert left.value.code == 130 and len(begun) == 1


def test_each_build_of_all_that_failed_says_why(builds_with, capsys):

    def full(c, row, *_, **__):
        raise DockerError(f"no space left for {row.name}", code=1)

    builds_with(full)
    with pytest.raises(Exit, match=r"not built: .*babyai"):
        build.env(Context(), env="all")
    assert "babyai: docker: no space left for babyai\n" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["9" * 5000, "0", "65536"])
def test_a_number_that_is_no_port_is_one_line(value):
    with pytest.raises(UserError, match="is no port; choose one from 1 to 65535"):
        port_number("--port", value)


def model(name="form-textcraft", replicas=1, data=Path("/nowhere"), **options):
    return compose_model(rows()[name], Options(port=4000, replicas=replicas,
                                               **options), f"r/agentgym/env-{name}:env-{name}",
                         f"r/agentgym/env-proxy:env-{name}", Path("/home"), data, {"context": "."})


def test_one_server_publishes_its_port_on_this_machine_only():
    services = model()["services"]
    assert list(services) == ["env-form-textcraft"]
    server = services["env-form-textcraft"]
    assert server["ports"] == ["127.0.0.1:4000:4000"] and server["environment"]["ENV_PORT"] == "4000"
    assert server["mem_limit"] == "256m" and server["read_only"] is True and server["cap_drop"] == ["ALL"]
    assert server["networks"]["default"]["aliases"] == list(ALIASES)


def test_replicas_hide_behind_the_proxy():
    services = model(replicas=3)["services"]
    assert list(services) == [*(f"env-form-textcraft-{number}" for number in range(3)), "env-form-textcraft"]
    proxy = services["env-form-textcraft"]
    assert proxy["image"] == "r/agentgym/env-proxy:env-form-textcraft" and proxy["ports"] == ["127.0.0.1:4000:4000"]
    for number in range(3):
        server = services[f"env-form-textcraft-{number}"]
        assert "ports" not in server
        assert (server["environment"]["REPLICA"], server["environment"]["REPLICAS"]) == (str(number), "3")


def test_secrets_go_by_name():
    server = model("fault-key")["services"]["env-fault-key"]
    assert server["environment"]["FIXTURE_KEY"] is None


def test_data_is_mounted_read_only_where_it_is(tmp_path):
    assert "volumes" not in model()["services"]["env-form-textcraft"]
    mount = model(data=tmp_path)["services"]["env-form-textcraft"]["volumes"][0]
    assert (mount["source"], mount["target"], mount["read_only"]) == (str(tmp_path), "/data/form-textcraft", True)


def test_a_server_that_loads_libraries_from_temporary_files_gets_a_folder_on_disk(monkeypatch):
    """What lies in a tmpfs cannot be run, and counts as memory."""
    scratch = rows()["form-textcraft"].replaced(scratch=True)
    services = compose_model(scratch, Options(port=4000, replicas=2), "i", "p", Path("/home"), Path("/nowhere"),
                             {})["services"]
    for replica in range(2):
        assert services[f"env-form-textcraft-{replica}"]["volumes"] == [{"type": "volume", "target": "/scratch"}]
    assert environment("alfworld").scratch and "games" in environment("alfworld").answers


@pytest.mark.parametrize("device,reserves", [("", True), ("cuda", True), ("cpu", False)])
def test_a_gpu_is_reserved_unless_the_user_does_without(device, reserves):
    service = compose_model(environment("searchqa"), Options(port=4000, device=device), "i", "p", Path("/home"),
                            Path("/nowhere"), {})["services"]["env-searchqa"]
    assert ("deploy" in service) == reserves and service["environment"].get("DEVICE") == (device or None)


@pytest.mark.parametrize("name,device,line", [
    ("demo", "cuda", "demo uses no GPU; leave --device out"),
    ("demo", "tpu", "--device tpu is neither cpu nor cuda"),
    ("searchqa", "CPU", "--device CPU is neither cpu nor cuda"),
])
def test_a_device_that_cannot_be_is_refused(name, device, line):
    with pytest.raises(UserError, match=line):
        start_stop.choose_device(environment(name), device)
    assert start_stop.choose_device(environment("demo"), "cpu") == ""  # what it does anyway


def searchqa_data(folder, about, size):
    (folder / "about.json").write_text(about)
    for name in ("e5_Flat.index", "e5_ivfpq.index", "wiki-18.jsonl"):
        with (folder / name).open("wb") as file:
            file.truncate(size)
    return folder


@pytest.mark.parametrize("about,megabytes", [
    ("{}", 163840),
    ('{"index": "ivfpq"}', 4096 + 2.5 * 2000),
    ('{"index": "nonsense"}', 4096 + 2.5 * 2000),
    ("no JSON", 163840),
])
def test_the_memory_limit_follows_the_search_index(about, megabytes, tmp_path):
    assert memory_mb(environment("searchqa"), searchqa_data(tmp_path, about, 10**9)) == megabytes


def test_the_memory_limit_is_never_above_the_rows(tmp_path):
    assert memory_mb(environment("searchqa"), searchqa_data(tmp_path, '{"index": "ivfpq"}', 10**11)) == 163840


def test_the_server_takes_the_index_that_was_chosen(tmp_path):
    row = environment("searchqa")
    assert row.index(tmp_path).path == "e5_Flat.index"
    (tmp_path / "about.json").write_text('{"index": "hnsw"}')
    assert row.index(tmp_path).path == "e5_hnsw.index"
    assert "e5_hnsw.index" in [one.path for one in row.missing_data(tmp_path)]
    assert not {"e5_Flat.index", "e5_ivfpq.index"} & {one.path for one in row.missing_data(tmp_path)}


def test_every_replica_knows_its_number_and_the_hash_seed_is_fixed():
    variables = server_variables(environment("demo"), Options(port=1, replicas=2, session_ttl=7, understood=True), 1)
    assert variables == {
        "SESSION_TTL": "7",
        "REPLICA": "1",
        "REPLICAS": "2",
        "PYTHONHASHSEED": "0",
        "I_UNDERSTAND": "demo"
    }


@pytest.mark.parametrize("name", sorted(environments()))
def test_haproxy_takes_the_configuration(name, tmp_path):
    config = tmp_path / "haproxy.cfg"
    config.write_text(proxy_config(environment(name), 4000, ["127.0.0.1:1", "127.0.0.1:2"]))
    checked = subprocess.run([needs.haproxy(), "-c", "-f", config], capture_output=True, text=True)
    assert checked.returncode == 0 and "warning" not in checked.stderr.lower(), checked.stderr
