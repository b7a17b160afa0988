"""environments.toml, what a row is, and what keeps its server from starting."""
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

import environment_rows
from environment_rows import Key, Success, refusal
from tasks.lib.environments.compose_model import compose_model
from tasks.lib.environments.plan import Options
from tasks.lib.environments.rows import ROWS, environment, environments
from tasks.lib.errors import UserError
from tests.fixtures.needs import missing
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
    pins = ROOT / "docker" / "constraints" / row.pins
    lines = [line for line in pins.read_text().splitlines() if line and not line.startswith(("#", "--"))]
    assert lines and all("==" in line or " @ " in line for line in lines)
    assert row.pins in DOCKERFILE


def test_ports_differ():
    ports = [row.port for row in environments().values()]
    assert len(set(ports)) == len(ports)


def test_no_port_is_one_that_an_outgoing_connection_may_have():
    """Linux's default range for those is 32768 to 60999; Kubernetes' node ports begin at 30000."""
    inside = [name for name, row in environments().items() if row.port >= 30000]
    assert inside == ["searchqa"] and environment("searchqa").port == 36001  # as AgentGym-RL documents it


@pytest.mark.parametrize("typed,hint", [("babyia", "did you mean babyai?"), ("TextCraft", "did you mean textcraft?"),
                                        ("qqqq", "choose one of searchqa, babyai")])
def test_an_unknown_name_gets_near_ones(typed, hint):
    with pytest.raises(UserError, match=re.escape(hint)):
        environment(typed)


@pytest.mark.parametrize("change,message", [
    ({
        "memry_mb": 3
    }, r"^demo.memry_mb: no such key; did you mean memory_mb\?"),
    ({
        "port": "x"
    }, r"^demo.port: 'x' is no whole number"),
    ({
        "port": 80
    }, r"^demo.port: 80 is below 1024"),
    ({
        "app": "agentenv_demo"
    }, r"^demo.app: 'agentenv_demo' does not match"),
    ({
        "protocol": {
            "id": "number"
        }
    }, r"^demo.protocol.id_reply: missing: Key of the id in create's reply"),
    ({
        "reward_range": [1.0, 1.0]
    }, r"^demo.reward_range: give the least reward and a greater one"),
    ({
        "max_sessions": 0
    }, r"^demo.max_sessions: 0 is below 1"),
    ({
        "success": {}
    }, r"^demo.success: give either at_least or above"),
    ({
        "data": [{
            "path": "x"
        }]
    }, r"^demo.data.0: give url, hub, source, make or how"),
])
def test_a_row_that_does_not_fit_is_named_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        environment_rows.environments({"demo": {**TABLE["demo"], **change}})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["MyEnv", "my env", "a/b", "a.b", "-a", "a--b", ""])
def test_a_name_that_no_image_can_have_is_refused(name):
    with pytest.raises(ValueError, match=re.escape(f"{name!r} names an image")):
        environment_rows.environments({name: TABLE["demo"]})


def test_a_queue_of_slow_queries_is_no_stuck_server():
    """A server whose queries run one after the other: the last session's step waits for all before it."""
    slow = [row for row in environments().values() if row.sqlite_seconds]
    assert slow
    for row in slow:  # the action's query, and the one that it is compared with
        assert row.request_seconds > row.max_sessions * 2 * row.sqlite_seconds


@pytest.mark.parametrize("tables,message", [
    ({
        "port": 3.0
    }, "demo.port: 3.0 is no whole number"),
    ({
        "port": True
    }, "demo.port: True is no whole number"),
    ({
        "rounds": 10**400
    }, "demo.rounds: a number above 10^60 is no number that is used here; give one below 2^63"),
    ({
        "reward_range": [0.0, float("nan")]
    }, "demo.reward_range.1: nan is no number that is used here; give one below 2^63"),
    ({
        "reward_range": [0.0]
    }, "demo.reward_range: give 2 values, not 1"),
    ({
        "notes": "one"
    }, "demo.notes: 'one' is no list"),
    ({
        "env": {
            "A": 1
        }
    }, "demo.env.A: 1 is no text"),
    ({
        "title": "\x1b[2J\u202e" + "x" * 500,
        "action": "\x1b[2J\u202e"
    }, "demo.action: '\\x1b[2J\\u202e' is none of raw, one_action_line, after_first_action, after_last_action, "
     "sql_block, backticks, whole_line"),
    ({
        "\x1b[2J": 1
    }, "demo.'\\x1b[2J': no such key; the keys are name, title"),
    ({
        "protocol": 3
    }, "demo.protocol: 3 is no table"),
])
def test_a_value_of_another_kind_is_named_with_its_place(tables, message):
    with pytest.raises(environment_rows.Misfit) as caught:
        environment_rows.environments({"demo": {**TABLE["demo"], **tables}})
    assert str(caught.value).startswith(message) and str(caught.value).isprintable()


def test_the_schema_for_editors_is_the_rows(tmp_path):
    printed = subprocess.run([sys.executable, "-m", "environment_rows", "schema"],
                             cwd=ROOT,
                             capture_output=True,
                             text=True)
    assert (ROOT / "environments.schema.json").read_text() == printed.stdout  # else: write it anew with this command
    assert ROWS.read_text().startswith("#:schema ./environments.schema.json\n")


def test_the_schema_says_what_the_rows_are_checked_for():
    validator = jsonschema.Draft7Validator(json.loads((ROOT / "environments.schema.json").read_text()))
    assert not list(validator.iter_errors(TABLE))
    for change in ({
            "memry_mb": 3
    }, {
            "port": "x"
    }, {
            "port": 80
    }, {
            "app": "x"
    }, {
            "action": "shout"
    }, {
            "max_sessions": 0
    }):
        assert list(validator.iter_errors({"demo": {**TABLE["demo"], **change}})), change
    assert list(validator.iter_errors({"My Env": TABLE["demo"]}))


@pytest.mark.parametrize("name", sorted(AGENTGYM | {"demo"}))
def test_rows_leave_out_what_is_the_default(name):
    assert TABLE[name].keys() == environment(name).to_json(defaults=False).keys() - {"name"}


def test_every_python_of_the_servers_reads_the_rows(tmp_path):
    """The oldest: 3.8, which has no tomllib; the rows come as JSON there."""
    oldest = oldest_python()
    done = subprocess.run([sys.executable, "-m", "environment_rows", "json", ROWS, tmp_path], cwd=ROOT, check=True)
    assert done.returncode == 0
    code = (
        "import json, sys; from environment_rows import Environment; from servers import foreign, memory, protocol, "
        "sessions; print(Environment.read(json.load(open(sys.argv[1]))).protocol.id)")
    for name in environments():
        done = subprocess.run([oldest, "-c", code, tmp_path / f"{name}.json"], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == environment(name).protocol.id, done.stderr


def oldest_python() -> str:
    """Return a Python 3.8, which CI must have."""
    found = next((path
                  for path in (shutil.which("python3.8"), *map(str,
                                                               Path.home().glob(".pyenv/versions/3.8*/bin/python")))
                  if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0), None)
    if found is None:
        missing("python3.8", "no Python 3.8")
    return found


def test_two_rows_with_one_port_are_refused():
    with pytest.raises(ValueError, match=r"other\.port: 26016 is the port of demo too"):
        environment_rows.environments({"demo": TABLE["demo"], "other": TABLE["demo"]})


@pytest.mark.parametrize("tables,message", [
    ({
        "x": 1,
        "demo": TABLE["demo"]
    }, r"^x is no table; a row begins with \[x\]"),
    ({
        "demo": {
            **TABLE["demo"], "name": "mine"
        }
    }, r"^demo.name: the table's own name is the row's; leave the key out"),
])
def test_what_is_no_row_is_named_in_one_line(tables, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        environment_rows.environments(tables)
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


@pytest.mark.parametrize("name", sorted(AGENTGYM | {"demo"}))
def test_a_served_row_says_all_that_the_table_says(name):
    # The image turns the table into JSON by itself; --runner local sends the row.
    sent = json.loads(json.dumps(environment(name).to_json(defaults=False)))
    assert sent.pop("name") == name
    assert environment_rows.environments({name: sent})[name] == environment(name)


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
    assert row.missing_keys(must) == [] and refusal(row, "/nowhere", must, False, "data") is None
    served = compose_model(row, Options(port=4000), "i", "p", Path("/home"), Path("/nowhere"), {"context": "."})
    assert served["services"]["env-webarena"]["environment"]["OPENAI_BASE_URL"] is None


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
    found = refusal(rows()[name], tmp_path, variables, understood, f"data/{name}")
    assert found is None if message is None else message in (found or "")


@pytest.mark.parametrize("name", ["todo", "sheet"])
def test_what_deletes_real_accounts_asks_first(name, tmp_path):
    (tmp_path / "credential.json").touch()
    keys = {key.name: "x" for key in environment(name).keys}
    assert "delete" in (refusal(environment(name), tmp_path, keys, False, "data") or "")
    assert refusal(environment(name), tmp_path, keys, True, "data") is None


def test_an_optional_key_is_not_missed():
    key = {"name": "JUDGE_URL", "how": "ask"}
    row = rows()["form-textcraft"]
    for optional, found in (False, "JUDGE_URL is: ask"), (True, None):
        keyed = row.replaced(keys=(Key.read({**key, "optional": optional}), ))
        assert (refusal(keyed, "/nowhere", {}, False, "data") or "").endswith(found or "")


def test_fixture_rows_cover_every_form_of_the_real_ones():

    def forms(table):
        return {(p.prefix != "", p.create
                 is not None, p.id_reply, p.id, p.observation, p.state, p.done, p.reward_when_done, p.close)
                for p in (row.protocol for row in table.values())}

    assert forms(environments()) <= forms(environments(FIXTURE_ROWS))
