"""environments.toml and what is decided from its rows, without starting anything."""
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from invoke.context import Context
from invoke.exceptions import Exit

from servers import protocol as served_protocol
from tasks import build
from tasks.lib.environments import docker as env_docker
from tasks.lib.environments import start_stop
from tasks.lib.environments.compose_model import ALIASES, compose_model
from tasks.lib.environments.haproxy import proxy_config
from tasks.lib.environments.plan import Options, choose_port, refusal, server_variables
from tasks.lib.environments.rows import ROWS, Protocol, Success, environment, environments, parse
from tasks.lib.errors import DockerError, UserError
from tasks.lib.flags import port_number
from tests.fixtures.servers import FIXTURE_ROWS, ROOT, rows

AGENTGYM = {
    "searchqa", "babyai", "sciworld", "textcraft", "webarena", "webshop", "alfworld", "sqlgym", "maze", "wordle",
    "weather", "movie", "academia", "todo", "sheet"
}
TABLE = tomllib.loads(ROWS.read_text())
DOCKERFILE = (ROOT / "docker" / "env.Dockerfile").read_text()


def stages() -> dict[str, str]:
    """Return what every stage of the Dockerfile starts from."""
    return {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.M)}


def python_of(stage: str) -> str:
    base = stages()[stage]
    found = re.fullmatch(r"python:(3\.\d+)-slim", base)
    return found[1] if found else python_of(base)


def test_there_are_agentgyms_fifteen_and_our_own():
    assert set(environments()) == AGENTGYM | {"demo"}


@pytest.mark.parametrize("name", sorted(AGENTGYM | {"demo"}))
def test_the_dockerfile_has_the_rows_stage_with_its_python_and_pins(name):
    row = environment(name)
    assert python_of(row.stage or name) == row.python
    pins = ROOT / "docker" / "constraints" / f"env-{row.constraints}.txt"
    lines = [line for line in pins.read_text().splitlines() if line and not line.startswith(("#", "--"))]
    assert lines and all("==" in line or " @ " in line for line in lines)
    assert f"env-{row.constraints}.txt" in DOCKERFILE


def test_ports_differ():
    ports = [row.port for row in environments().values()]
    assert len(set(ports)) == len(ports)


@pytest.mark.parametrize("typed,hint", [("babyia", "did you mean babyai?"), ("TextCraft", "did you mean textcraft?"),
                                        ("qqqq", "choose one of searchqa, babyai")])
def test_an_unknown_name_gets_near_ones(typed, hint):
    with pytest.raises(UserError, match=re.escape(hint)):
        environment(typed)


@pytest.mark.parametrize("change,message", [
    ({
        "memry_mb": 3
    }, r"environments.toml: demo.memry_mb: Extra inputs"),
    ({
        "port": "x"
    }, r"environments.toml: demo.port: Input should be a valid integer"),
    ({
        "port": 80
    }, r"environments.toml: demo.port: .*greater than or equal to 1024"),
    ({
        "app": "agentenv_demo"
    }, r"environments.toml: demo.app: String should match"),
    ({
        "protocol": {
            "id": "number"
        }
    }, r"environments.toml: demo.protocol.id_reply: Field required"),
    ({
        "reward_range": [1.0, 1.0]
    }, r"environments.toml: demo.reward_range: Value error, give the least reward and a greater one"),
    ({
        "max_sessions": 0
    }, r"environments.toml: demo.max_sessions: .*greater than or equal to 1"),
    ({
        "success": {}
    }, r"environments.toml: demo.success: Value error, give either at_least or above"),
    ({
        "data": [{
            "path": "x"
        }]
    }, r"environments.toml: demo.data.0: Value error, give url, hub or how"),
])
def test_a_row_that_does_not_fit_is_named_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        parse({"demo": {**TABLE["demo"], **change}})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["MyEnv", "my env", "a/b", "a.b", "-a", "a--b", ""])
def test_a_name_that_no_image_can_have_is_refused(name):
    with pytest.raises(UserError, match=re.escape(f"environments.toml: {name!r} names an image")):
        parse({name: TABLE["demo"]})


def test_a_queue_of_slow_queries_is_no_stuck_server():
    """A server whose queries run one after the other: the last session's step waits for all before it."""
    slow = [row for row in environments().values() if row.sqlite_seconds]
    assert slow
    for row in slow:  # the action's query, and the one that it is compared with
        assert row.request_seconds > row.max_sessions * 2 * row.sqlite_seconds


def test_two_rows_with_one_port_are_refused():
    with pytest.raises(UserError, match=r"other\.port: 36016 is the port of demo too"):
        parse({"demo": TABLE["demo"], "other": TABLE["demo"]})


@pytest.mark.parametrize("tables,message", [
    ({
        "x": 1,
        "demo": TABLE["demo"]
    }, r"environments.toml: x is no table; a row begins with \[x\]"),
    ({
        "demo": {
            **TABLE["demo"], "name": "mine"
        }
    }, r"environments.toml: demo.name: the table's own name is the row's; leave the key out"),
])
def test_what_is_no_row_is_named_in_one_line(tables, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        parse(tables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make,message", [
    (lambda path: path.mkdir(), "rows.toml: Is a directory; ENVIRONMENTS must name a file with rows"),
    (lambda path: path.write_bytes(b"[demo]\xff"), "^rows.toml: 'utf-8' codec can't decode"),
])
def test_a_file_that_cannot_be_read_is_named(make, message, tmp_path):
    make(tmp_path / "rows.toml")
    with pytest.raises(UserError, match=message):
        environments(tmp_path / "rows.toml")


def test_a_file_that_is_no_toml_is_named(tmp_path):
    broken = tmp_path / "rows.toml"
    broken.write_text("[demo\n")
    with pytest.raises(UserError, match=r"^rows.toml: Expected"):
        environments(broken)


def test_the_servers_fill_in_what_the_rows_leave_out():
    defaults = Protocol(id_reply="id", id="id", item="i", observation="reply", close=True).model_dump(mode="json")
    assert {name: defaults[name] for name in served_protocol.DEFAULTS} == served_protocol.DEFAULTS
    required = {"id_reply", "id", "item", "observation", "close"}
    assert set(defaults) - required == set(served_protocol.DEFAULTS)


@pytest.mark.parametrize("name", sorted(AGENTGYM | {"demo"}))
def test_a_served_row_says_all_that_the_table_says(name):
    # The image turns the table into JSON by itself; --runner local sends the row.
    sent = json.loads(json.dumps(environment(name).served()))
    assert sent.pop("name") == name
    assert parse({name: sent})[name] == environment(name)


@pytest.mark.parametrize("rule,reward,holds", [({
    "at_least": 1.0
}, 1.0, True), ({
    "at_least": 1.0
}, 0.99, False), ({
    "above": 0.0
}, 0.8875, True), ({
    "above": 0.0
}, 0.0, False)])
def test_success_follows_the_rows_rule(rule, reward, holds):
    assert Success(**rule).holds(reward) is holds


def test_a_quick_babyai_win_and_nothing_less_than_a_full_sciworld_count():
    assert environment("babyai").success.holds(0.8875)
    assert not environment("sciworld").success.holds(83.0)


def test_webshops_index_is_linked_where_a_server_of_a_thousand_products_opens_it():
    assert environment("webshop").links["indexes_1k"] == "{folder}/webshop/search_engine/indexes_1k"


def test_textcrafts_resets_take_turns():
    assert [name for name, row in environments().items() if row.serial_reset] == ["textcraft"]


def test_an_optional_key_is_passed_on_by_name_and_not_asked_for():
    row = environment("webarena")
    must = {key.name: "x" for key in row.keys if key.name != "OPENAI_BASE_URL"}
    assert row.missing_keys(must) == [] and refusal(row, Path("/nowhere"), must, False) is None
    served = compose_model(row, Options(port=4000), "i", "p", Path("/home"), Path("/nowhere"), {"context": "."})
    assert served["services"]["env-webarena"]["environment"]["OPENAI_BASE_URL"] is None


def test_the_port_is_the_first_free_one():
    assert choose_port(100, lambda port: port >= 103) == 103
    with pytest.raises(UserError, match="no port from 100 to 199"):
        choose_port(100, lambda port: False)


@pytest.mark.parametrize("name,understood,variables,message", [
    ("fault-data", False, {}, "needs index.bin in data/fault-data: ask the author"),
    ("fault-key", False, {}, "needs FIXTURE_KEY in the environment or in .env"),
    ("fault-consent", False, {}, "deletes everything; pass --i-understand"),
    ("fault-key", False, {
        "FIXTURE_KEY": "x"
    }, None),
    ("fault-consent", True, {}, None),
    ("form-textcraft", False, {}, None),
])
def test_what_is_missing_is_refused_with_the_remedy(name, understood, variables, message, tmp_path):
    found = refusal(rows()[name], tmp_path, variables, understood)
    assert found is None if message is None else message in (found or "")


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


@pytest.mark.parametrize("name", ["todo", "sheet"])
def test_what_deletes_real_accounts_asks_first(name, tmp_path):
    (tmp_path / "credential.json").touch()
    keys = {key.name: "x" for key in environment(name).keys}
    assert "delete" in (refusal(environment(name), tmp_path, keys, False) or "")
    assert refusal(environment(name), tmp_path, keys, True) is None


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


def test_every_replica_knows_its_number_and_the_hash_seed_is_fixed():
    variables = server_variables(environment("demo"), Options(port=1, replicas=2, session_ttl=7, understood=True), 1)
    assert variables == {
        "SESSION_TTL": "7",
        "REPLICA": "1",
        "REPLICAS": "2",
        "PYTHONHASHSEED": "0",
        "I_UNDERSTAND": "demo"
    }


HAPROXY = shutil.which("haproxy", path=os.environ["PATH"] + ":/usr/sbin")


@pytest.mark.parametrize("name", sorted(AGENTGYM | {"demo"}))
def test_haproxy_takes_the_configuration(name, tmp_path):
    if HAPROXY is None:
        if os.environ.get("CI"):
            pytest.fail("no haproxy, which CI must have")
        pytest.skip("no haproxy on this machine")
    config = tmp_path / "haproxy.cfg"
    config.write_text(proxy_config(environment(name), 4000, ["127.0.0.1:1", "127.0.0.1:2"]))
    checked = subprocess.run([HAPROXY, "-c", "-f", config], capture_output=True, text=True)
    assert checked.returncode == 0 and "warning" not in checked.stderr.lower(), checked.stderr


def test_fixture_rows_cover_every_form_of_the_real_ones():

    def forms(table):
        return {(p.prefix != "", p.create
                 is not None, p.id_reply, p.id, p.observation, p.state, p.done, p.reward_when_done, p.close)
                for p in (row.protocol for row in table.values())}

    assert forms(environments()) <= forms(environments(FIXTURE_ROWS))
