"""`invoke eval` on this machine: the environment is started and stopped, flags reach the runner, misuse is one line."""
import argparse
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
from invoke.config import Config
from invoke.context import Context

from evaluation.cli import parser
from tasks import evaluate, ns
from tasks.lib.environments import lease
from tasks.lib.environments.lookup import rows_path
from tasks.lib.errors import UserError
from tasks.lib.evaluation import plan as eval_plan
from tasks.lib.evaluation.asked import SAID, Asked, Passed, in_container
from tasks.lib.evaluation.suites import SUITE
from tasks.lib.flags import as_words, dashed
from tasks.lib.settings import ROOT as PROJECT
from tests.fixtures.invoking import invoke as run_invoke
from tests.fixtures.servers import ROOT
from tests.fixtures.standins import completion, endpoint


@pytest.fixture
def clean():
    """The surroundings of a user who has set nothing."""
    ours = ("ENV", "ENV_PORT", "MODEL", "MAX_ROUND", "OPENAI_API_KEY", "OPENAI_BASE_URL", "ENVIRONMENTS", "AGENTGYM_SRC")
    return {name: value for name, value in os.environ.items() if name not in ours}


def invoke(*words: str, env: dict[str, str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return run_invoke(*words, cwd=ROOT, env=env, timeout=timeout)


def test_the_demo_is_started_played_and_stopped(clean, tmp_path):
    done = invoke("eval", "--env", "demo", "--model", "expert", "--out", str(tmp_path / "expert"), env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "started demo" in done.stdout and "stopped demo" in done.stdout and "100.0 %" in done.stdout
    assert json.loads((tmp_path / "expert" / "summary.json").read_text())["success"]["mean"] == 1.0
    assert "demo was not up" in invoke("env.down", "--env", "demo", env=clean).stdout
    again = invoke("eval.rescore", "--run", str(tmp_path / "expert"), env=clean)
    assert again.returncode == 0 and "100.0 %" in again.stdout


def test_a_server_that_is_up_is_used_and_left_up(clean, tmp_path):
    assert invoke("env.up", "--env", "demo", "--runner", "local", env=clean).returncode == 0
    try:
        chance = invoke("eval", "--env", "demo", "--model", "random", "--limit", "6", "--out", str(tmp_path / "random"), env=clean)
        expert = invoke("eval", "--env", "demo", "--model", "expert", "--limit", "6", "--out", str(tmp_path / "expert"), env=clean)
        assert (chance.returncode, expert.returncode) == (0, 0) and "started" not in chance.stdout + expert.stdout
    finally:
        assert "demo is down" in invoke("env.down", "--env", "demo", env=clean).stdout
    both = invoke("eval.compare", "--run", str(tmp_path / "random"), "--run", str(tmp_path / "expert"), "--out",
                  str(tmp_path / "both.html"), env=clean)
    assert both.returncode == 0 and "expert − random" in both.stdout and (tmp_path / "both.html").stat().st_size > 10_000


def test_the_last_of_two_evaluations_stops_the_server(clean, tmp_path):
    def start(player: str) -> subprocess.Popen[str]:
        words = ["eval", "--env", "demo", "--model", player, "--limit", "2", "--out", str(tmp_path / player)]
        return subprocess.Popen([sys.executable, "-m", "invoke", *words], cwd=ROOT, env=clean, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)

    both = [start("expert"), start("random")]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "".join(said).count("started demo") == "".join(said).count("stopped demo") >= 1
    # The one that started it leaves while another one plays.
    with lease.exclusive_lock("demo"):
        other = lease.User("demo")
    done = invoke("eval", "--env", "demo", "--model", "expert", "--limit", "1", "--out", str(tmp_path / "third"), env=clean)
    assert done.returncode == 0 and "left demo up, another evaluation or a run uses it" in done.stdout and "stopped" not in done.stdout
    assert other.leave() == (True, False)
    # It is nobody's any more once the user asks for it.
    assert "is up already" in invoke("env.up", "--env", "demo", "--runner", "local", env=clean).stdout
    kept = invoke("eval", "--env", "demo", "--model", "expert", "--limit", "1", "--out", str(tmp_path / "fourth"), env=clean)
    assert kept.returncode == 0 and "stopped" not in kept.stdout
    assert "demo is down" in invoke("env.down", "--env", "demo", env=clean).stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_schedulers_or_terminals_signal_closes_the_sessions_and_stops_what_was_started(number, clean, tmp_path):
    def say(messages, body):
        time.sleep(0.2)
        return completion("look")

    with endpoint(say) as model:
        words = ["eval", "--env", "demo", "--model", "slow", "--base-url", model.base_url, "--max-round", "30", "--out", str(tmp_path / "out")]
        process = subprocess.Popen([sys.executable, "-m", "invoke", *words], cwd=ROOT, env={**clean, "OPENAI_API_KEY": "sk-x"}, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        while len(model.requests) < 5:
            assert process.poll() is None
            time.sleep(0.1)
        if number == signal.SIGHUP:  # to all of them, as the kernel does, and nobody is there to read
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in said
    assert number == signal.SIGHUP or ("interrupted; the same command goes on" in said and "stopped demo" in said)
    work = json.loads((tmp_path / "out" / "run.json").read_text())["work"][0]
    assert work["sessions"]["opened"] == work["sessions"]["closed"] > 0
    assert "demo was not up" in invoke("env.down", "--env", "demo", env=clean).stdout


@pytest.mark.parametrize("words, told", [
    (["--model", "x"], "OPENAI_API_KEY"),
    (["--model", "expert", "--temperature", "warm"], "--temperature warm"),
    (["--model", "expert", "--items", "9999"], "9999"),
    (["--model", "x", "--base-url", "nowhere"], "'nowhere' is no address"),
    (["--model", "expert", "--prices", "none.toml"], "none.toml"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_the_runner_refuses_is_refused_before_anything_starts(words, told, clean):
    done = invoke("eval", "--env", "demo", "--runner", "local", *words, env=clean)
    assert done.returncode == 2 and told in done.stderr and done.stderr.strip().count("\n") == 0
    assert "started" not in done.stdout


def test_conversations_are_what_was_said(clean, tmp_path):
    for model in ("expert", "random"):
        done = invoke("eval", "--env", "demo", "--model", model, "--limit", "3", "--seed", "0", "--out", str(tmp_path / model), env=clean)
        assert done.returncode == 0, done.stdout + done.stderr
    done = invoke("eval.conversations", "--run", str(tmp_path / "expert"), env=clean)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "expert" / "conversations.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in (tmp_path / "expert" / "attempts.jsonl").read_text().splitlines()]
    records.sort(key=lambda record: record["index"])
    assert [line["item"] for line in lines] == [record["item"] for record in records]
    for line, record in zip(lines, records, strict=True):
        said = [message["content"] for message in line["messages"] if message["role"] == "assistant" and message.get("weight") != 0]
        heard = [message["content"] for message in line["messages"] if message["role"] == "user"]
        assert said == [turn["completion"] for turn in record["turns"]]
        assert heard[1:] == [record["first"], *(turn["observation"] for turn in record["turns"][:-1])]
    none = invoke("eval.conversations", "--run", str(tmp_path / "random"), env=clean)
    assert none.returncode == 2 and none.stderr.count("\n") == 1 and "--all" in none.stderr
    every = invoke("eval.conversations", "--run", str(tmp_path / "random"), "--all", "--out", str(tmp_path / "all.jsonl"), env=clean)
    assert every.returncode == 0 and len((tmp_path / "all.jsonl").read_text().splitlines()) == 3


def test_a_model_over_http_and_a_wrong_key(clean, tmp_path):
    sys.path.insert(0, str(ROOT / "demo"))
    from agentenv_demo.players import expert

    def say(messages, body):
        return completion("I will do this:\n" + expert(messages[-1]["content"]))

    with endpoint(say) as model:
        done = invoke("eval", "--env", "demo", "--base-url", model.base_url, "--model", "stand-in", "--limit", "4", "--samples", "2",
                      "--max-round", "29", "--out", str(tmp_path / "out"), env={**clean, "OPENAI_API_KEY": "sk-of-the-test"})
        assert done.returncode == 0, done.stdout + done.stderr
        told = json.loads((tmp_path / "out" / "run.json").read_text())
        assert (told["config"]["max_round"], told["config"]["samples"], told["prompt"]["source"]) == (29, 2, "row")
        assert model.requests[0][0]["authorization"] == "Bearer sk-of-the-test" and "sk-of-the-test" not in done.stdout + done.stderr
    from tests.fixtures.standins import failure
    with endpoint(lambda messages, body: failure(401, "Incorrect API key provided")) as model:
        begun = time.monotonic()
        done = invoke("eval", "--env", "demo", "--base-url", model.base_url, "--out", str(tmp_path / "wrong"), env={**clean, "OPENAI_API_KEY": "sk-x"})
    assert done.returncode == 2 and "the key is not accepted" in done.stderr and "Traceback" not in done.stderr
    assert time.monotonic() - begun < 60 and "stopped demo" in done.stdout


@pytest.mark.parametrize("words,told", [
    (["eval", "--env", "serchqa"], "did you mean searchqa"),
    (["eval", "--env", "demo", "--runner", "cloud"], "unknown runner"),
    (["eval", "--env", "demo", "--wait", "x"], "--wait x"),
    (["eval.report", "--run", "nowhere"], "no run nowhere"),
    (["eval.compare", "--run", "nowhere"], "no run nowhere"),
    (["eval", "--env", "demo", "--model", "expert", "--server", "http://127.0.0.1:9", "--samples", "-1"], "--samples"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_misuse_is_one_line(words, told, clean):
    done = invoke(*words, env=clean)
    assert done.returncode == 2 and told in done.stderr and done.stderr.strip().count("\n") == 0


def test_dry_shows_the_command_and_starts_nothing(clean):
    done = invoke("--dry", "eval", "--env", "demo", "--model", "expert", "--runner", "local", env={**clean, "OPENAI_API_KEY": "sk-secret"})
    assert done.returncode == 0, done.stderr
    assert "-m evaluation run --env=demo --model=expert" in done.stdout and "sk-secret" not in done.stdout
    assert "demo is down" not in invoke("env.down", "--env", "demo", env=clean).stdout


def test_flags_keep_values_that_begin_with_a_dash():
    assert as_words({"shuffle_seed": "-3", "fresh": True, "items": "", "upstream_compat": False}) == ["--shuffle-seed=-3", "--fresh"]
    assert as_words({"header": ("-a=B", "c=D"), "finish_reason": (), "limit": "0"}) == ["--header=-a=B", "--header=c=D", "--limit=0"]


# --- the flags of the tasks are those of the program ---


def program() -> dict[str, dict[str, argparse.Action]]:
    """The program's commands, each with its flags by name."""
    commands = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
    return {command: {action.option_strings[0]: action for action in one._actions if action.option_strings and action.dest != "help"}
            for command, one in commands.items()}


def offered(task: str) -> dict[str, object]:
    """The flags of a task, as typed, each with its default."""
    _, *parameters = inspect.signature(ns.collections["eval"].tasks[task].body).parameters.values()
    return {dashed(one.name): one.default for one in parameters}


def test_every_command_of_the_program_is_a_task():
    # `prompts` is for those who build an image.
    assert set(program()) - set(ns.collections["eval"].tasks) == {"prompts"}


@pytest.mark.parametrize("command", sorted(set(program()) - {"prompts"}))
def test_a_task_offers_every_flag_of_the_program_and_none_that_it_has_not(command):
    of_the_task = {"run": {dashed(one.name) for one in fields(Asked)} - {dashed(one.name) for one in fields(Passed)}, "list": {"--folder"},
                   "suite": {dashed(one.name) for one in fields(SUITE)} - {"--check", "--out", "--json", "--prices", "--upstream-compat"}}
    said = {dashed(name) for name in SAID} if command == "run" else set()
    assert set(offered(command)) - of_the_task.get(command, {"--run"}) == set(program()[command]) - said


def test_a_switch_is_a_switch_and_what_may_be_repeated_may_be():
    flags, may = offered("run"), program()["run"]
    for name in {dashed(one.name) for one in fields(Passed)}:
        assert isinstance(flags[name], bool) == isinstance(may[name], argparse._StoreTrueAction), name
        assert (flags[name] is None) == isinstance(may[name], argparse._AppendAction), name
    assert {dashed(name) for name in evaluate.run.iterable} == {name for name, one in may.items() if isinstance(one, argparse._AppendAction)}


def dry() -> Context:
    return Context(Config(overrides={"run": {"dry": True}}))


def typed(name: str, action: argparse.Action) -> object:
    """Something to type after a flag, which is not its default."""
    if isinstance(action, argparse._StoreTrueAction):
        return True
    if isinstance(action, argparse._AppendAction):
        return ["x=Y", "v=W"]
    return {"--env": "demo", "--base-url": "http://127.0.0.1:9/v1", "--server": "http://127.0.0.1:8", "--max-error-rate": "0.5",
            "--top-p": "0.5"}.get(name, "7")


@pytest.mark.parametrize("flag", sorted(set(program()["run"]) - {dashed(name) for name in SAID}))
def test_what_is_typed_reaches_the_program(flag, monkeypatch):
    action = program()["run"][flag]
    words: list[str] = []
    monkeypatch.setattr(evaluate, "run_module", lambda c, module, given, env: words.__setitem__(slice(None), given))  # the last: a check comes first
    value = typed(flag, action)
    evaluate.run(dry(), **{"env": "demo", "server": "http://127.0.0.1:9", "runner": "local", action.dest: value})
    got = getattr(parser().parse_args(words), action.dest)
    assert got == (action.type(value) if action.type else value) != action.default
    there = parser().parse_args(words)
    assert (there.environments, there.root) == (str(rows_path()), str(PROJECT))


@pytest.mark.parametrize("name, value, told", [
    ("out", str(PROJECT / "saves" / "x" / "eval" / "y"), "/workspace/saves/x/eval/y"),
    ("out", "/tmp/x", "--out /tmp/x is out of its reach"),
    ("out", str(PROJECT / "saves"), "is out of its reach"),
    ("out", str(PROJECT / "models" / "x"), "is out of its reach"),
    ("items", "0-99", "0-99"),
    ("items", __file__, "--items .* is out of its reach; for other files and folders use --runner local"),
    ("prompt", __file__, "--prompt .* is out of its reach"),
    ("prices", __file__, "--prices .* is out of its reach"),
    ("agentgym", str(Path(__file__).parent), "--agentgym .* is out of its reach"),
    ("server", "http://localhost:1", "localhost, the host of --server, would be the container itself"),
    ("header", ("api-key=AZURE_KEY",), "--header sends what a variable of this machine holds"),
    ("finish_reason", ("done", "-x"), ("done", "-x")),
    ("keep_think", True, True),
    ("max_answer", "7", "7"),
], ids=lambda value: str(value).rsplit("/", 1)[-1][:40])
def test_what_a_container_is_told(name, value, told):
    typed = {"env": "demo", name: value}
    refused = isinstance(told, str) and " " in told
    if refused:
        with pytest.raises(UserError, match=told):
            in_container(typed, PROJECT)
    else:
        assert in_container(typed, PROJECT) == {"env": "demo", name: told}


def test_a_container_gets_its_own_names_and_what_was_typed(monkeypatch):
    from tasks.lib.engine import containers
    words: list[str] = []
    monkeypatch.setattr(containers, "run", lambda c, service, given, variables: words.__setitem__(slice(None), given))
    monkeypatch.delenv("MAX_ROUND", raising=False)
    evaluate.run(dry(), env="demo", model="expert", server="http://env:1", runner="docker", keep_think=True, finish_reason=["done", "over"],
                 out=str(PROJECT / "saves" / "z"))
    assert words[:-1] == ["run", "--env=demo", "--model=expert", "--server=http://env:1", words[4], "--keep-think", "--finish-reason=done",
                          "--finish-reason=over"]
    assert words[4].startswith("--max-round=") and words[-1] == "--out=/workspace/saves/z"


def test_what_a_header_sends_may_be_in_dotenv_and_is_in_no_word(monkeypatch):
    seen: dict[str, str] = {}
    words: list[str] = []
    monkeypatch.setattr("tasks.lib.settings.read_dotenv", lambda: {"AZURE_KEY": "sk-of-the-file", "OTHER": "not asked for"})
    monkeypatch.setattr(evaluate, "run_module", lambda c, module, given, env: (words.__setitem__(slice(None), given), seen.update(env)))
    evaluate.run(dry(), env="demo", server="http://127.0.0.1:9", runner="local", header=["api-key=AZURE_KEY", "no-variable"])
    assert seen["AZURE_KEY"] == "sk-of-the-file" and "OTHER" not in seen
    assert words.count("--header=api-key=AZURE_KEY") == 1 and "sk-of-the-file" not in " ".join(words)


def test_headers_and_finish_reasons_of_an_endpoint_of_another_kind(clean, tmp_path):
    sys.path.insert(0, str(ROOT / "demo"))
    from agentenv_demo.players import expert

    def say(messages, body):
        answer = completion("I will do this:\n" + expert(messages[-1]["content"]))
        answer["choices"][0]["finish_reason"] = ("done", "over")[len(messages) // 2 % 2]
        return answer

    with endpoint(say) as model:
        done = invoke("eval", "--env", "demo", "--runner", "local", "--base-url", model.base_url, "--model", "stand-in", "--limit", "2",
                      "--header", "api-key=AZURE_KEY", "--header", "x-team=TEAM", "--finish-reason", "done", "--finish-reason", "over", "--quiet",
                      "--out", str(tmp_path / "out"), env={**clean, "AZURE_KEY": "sk-of-the-test", "TEAM": "agents"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert {(headers["api-key"], headers["x-team"]) for headers, *_ in model.requests} == {("sk-of-the-test", "agents")}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["errors"] == 0
    assert "sk-of-the-test" not in done.stdout + done.stderr and "report:" not in done.stdout


def test_a_check_plays_and_starts_nothing(clean, tmp_path):
    out = tmp_path / "out"
    right = invoke("eval", "--check", "--env", "demo", "--model", "expert", "--runner", "local", "--out", str(out), env=clean)
    assert right.returncode == 0 and right.stdout == "eval: nothing is wrong with these words; without --check they play\n", right.stderr
    wrong = invoke("eval", "--check", "--env", "demo", "--model", "expert", "--runner", "local", "--max-answer", "0", env=clean)
    assert wrong.returncode == 2 and "0 is not above 0" in wrong.stderr and wrong.stderr.count("\n") == 1 and not wrong.stdout
    none = invoke("eval", "--check", "--env", "demo", "--model", "expert", "--runner", "local", "--resume", "--out", str(out), env=clean)
    assert none.returncode == 2 and "--resume: no run in" in none.stderr and not out.exists()


def test_runs_are_found_by_name_by_path_and_the_latest_by_itself(tmp_path):
    for age, name in enumerate(("new", "old")):
        folder = tmp_path / "saves" / "eval" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        os.utime(folder / "run.json", (1e9 - age, 1e9 - age))
    assert eval_plan.folders([], tmp_path)[0].name == "new"
    assert eval_plan.folders(["old", str(tmp_path / "saves" / "eval" / "new")], tmp_path)[0].name == "old"
    with pytest.raises(UserError, match="no runs in"):
        eval_plan.latest_run(tmp_path / "none")
