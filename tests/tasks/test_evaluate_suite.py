"""`invoke eval.suite`: pairs from flags and files, played once each over real HTTP, averaged only where they are whole."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.lib.errors import UserError
from tasks.lib.evaluation import suites
from tasks.lib.evaluation.suites import SUITE
from tasks.lib.settings import ROOT as PROJECT
from tests.fixtures.project import copy_project
from tests.fixtures.servers import FIXTURE_ROWS
from tests.fixtures.standins import Answer, completion, counter_player, endpoint, environment


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A copy of the project, whose saves are the tests' own."""
    folder = copy_project(tmp_path_factory.mktemp("suites") / "project")
    shutil.copy(FIXTURE_ROWS, folder / "own.toml")
    return folder


def surroundings() -> dict[str, str]:
    ours = ("ENV", "MODEL", "MAX_ROUND", "OPENAI_BASE_URL", "AGENTGYM_SRC")
    return {**{name: value for name, value in os.environ.items() if name not in ours}, "OPENAI_API_KEY": "sk-of-the-test", "ENVIRONMENTS": "own.toml"}


def invoke(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "invoke", *words], cwd=root, env=surroundings(), capture_output=True, text=True, timeout=600, check=False)


def suite_file(root: Path, name: str, servers: dict[str, str], base_url: str, models: list[str], **flags: str) -> str:
    text = "".join(f'{key} = "{value}"\n' for key, value in {"seed": "3", "base_url": base_url, "model_tries": "2", **flags}.items())
    text += "".join(f'[[environment]]\nenv = "{env}"\nserver = "{url}"\nsource = "the test"\n' for env, url in servers.items())
    text += "".join(f'[[model]]\nmodel = "{model}"\n' for model in models)
    (root / f"{name}.toml").write_text(text)
    return f"{name}.toml"


def asked_by_model(model) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, body in model.requests:
        found[body["model"]] = found.get(body["model"], 0) + 1
    return found


def test_each_pair_is_a_run_of_its_own_and_is_played_once(root):
    with environment() as one, environment() as other, endpoint(counter_player) as model:
        servers = {"form-textcraft": one.url, "form-babyai": other.url}
        file = suite_file(root, "once", servers, model.base_url, ["a", "b"], items="0-4")
        done = invoke(root, "eval.suite", "--suite", file, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(done.stdout)
        # counter_player wins even items: 0, 2 and 4.
        assert found["whole"] and [line["success"]["mean"] for line in found["pairs"]] == [0.6] * 4
        assert {model: one["success"]["mean"] for model, one in found["macro"].items()} == {"a": 0.6, "b": 0.6}
        macro, pair = found["macro"]["a"]["success"], found["pairs"][0]["success"]
        assert macro["items"] == 10 and pair["low"] < macro["low"] < 0.6 < macro["high"] < pair["high"]
        assert found["sources"] == {"form-textcraft": "the test", "form-babyai": "the test"} and found["notes"] == []
        assert len({line["folder"] for line in found["pairs"]}) == 4
        asked = asked_by_model(model)
        assert asked == {"a": 30, "b": 30}
        again = invoke(root, "eval.suite", "--suite", file)
        assert again.returncode == 0 and asked_by_model(model) == asked and one.sessions == other.sessions == {}
        assert "macro average" in again.stdout and "a on form-babyai is whole already" in again.stdout
        # One more model plays nothing but its own; one more item, nothing but that.
        more = invoke(root, "eval.suite", "--suite", file, "--model", "c", "--json")
        assert more.returncode == 0 and asked_by_model(model) == {**asked, "c": 30}, more.stderr
        assert json.loads(more.stdout)["models"] == ["a", "b", "c"]
        grown = invoke(root, "eval.suite", "--suite", file, "--env", "form-babyai", "--items", "0-5", "--json")
        assert grown.returncode == 0 and asked_by_model(model) == {"a": 33, "b": 33, "c": 30}
        assert [line["expected"] for line in json.loads(grown.stdout)["pairs"]] == [6, 6]
    page = (root / "saves/eval/suites/once/report.html").read_text()
    assert "Environments and models" in page and "macro average" in page and "form-babyai: a" in page


def test_a_pair_that_failed_is_named_and_never_averaged(root):
    broken = [True]

    def fault(path, number, body):
        return Answer({"error": "broken"}, 500) if broken and path == "/reset" and body["data_idx"] == 1 else None

    with environment() as one, environment(fault) as other, endpoint(counter_player) as model:
        servers = {"form-babyai": other.url, "form-textcraft": one.url}
        file = suite_file(root, "failing", servers, model.base_url, ["d"], items="0-3", tries="1")
        done = invoke(root, "eval.suite", "--suite", file, "--json")
        assert done.returncode == 1, done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert [line["state"] for line in found["pairs"]] == ["failed", "whole"] and not found["whole"]
        assert found["macro"]["d"]["success"] is None and found["macro"]["d"]["lacking"] == ["form-babyai"]
        assert found["pairs"][0]["success"]["items"] == 3 and "broken" in found["pairs"][0]["why"]
        assert "d on form-babyai is in no average (failed)" in found["notes"][0]
        shown = invoke(root, "eval.suite", "--suite", file)
        assert shown.returncode == 1 and "- (1 of 2 not whole)" in shown.stdout and "(failed, 4 of 4)" in shown.stdout
        # An error that the user allows is no reason to leave the pair out, and is said.
        allowed = invoke(root, "eval.suite", "--suite", file, "--max-error-rate", "0.3", "--json")
        found = json.loads(allowed.stdout)
        assert allowed.returncode == 0 and found["macro"]["d"]["success"]["items"] == 7
        assert found["notes"] == ["d on form-babyai: 1 of 4 attempts failed by infrastructure and are in no score"]
        broken.clear()
        before = len(model.requests)
        mended = invoke(root, "eval.suite", "--suite", file, "--json")
        assert mended.returncode == 0 and len(model.requests) - before == 3
        assert json.loads(mended.stdout)["macro"]["d"]["success"]["mean"] == 0.5


def test_what_does_not_start_stops_nothing_else(root):
    with environment() as one, endpoint(counter_player) as model:
        servers = {"form-babyai": "http://127.0.0.1:9", "form-textcraft": one.url}
        file = suite_file(root, "away", servers, model.base_url, ["e"], items="0-1", env_wait="0.5")
        done = invoke(root, "eval.suite", "--suite", file, "--json")
        found = json.loads(done.stdout)
    assert done.returncode == 1 and [line["state"] for line in found["pairs"]] == ["partial", "whole"]
    assert "0 of 2 attempts were played" in found["pairs"][0]["why"] and "no environment server" in done.stderr


def test_misuse_is_refused_before_anything_is_played(root):
    with environment() as one, endpoint(counter_player) as model:
        file = suite_file(root, "wrong", {"form-babyai": one.url, "form-textcraft": one.url}, model.base_url, ["f"], items="0-1")
        done = invoke(root, "eval.suite", "--suite", file, "--temperature", "hot")
        assert done.returncode == 2 and "f on form-babyai: --temperature hot" in done.stderr and done.stderr.count("\n") == 1
        assert not model.requests and one.created == 0
        done = invoke(root, "eval.suite", "--suite", file, "--check")
        assert done.returncode == 0 and not model.requests and one.created == 0
        lines = done.stdout.splitlines()
        assert lines[1].split()[:6] == ["form-babyai", "f", "2", "5", "0", "of"] and lines[-1] == "form-textcraft: the test"
        done = invoke(root, "--dry", "eval.suite", "--suite", file)
        assert done.returncode == 0 and done.stdout.count("-m evaluation run --env=form-") == 2 and not model.requests
    for words, told in [
        (["--env", "demo"], "no model"),
        (["--model", "x"], "no environment"),
        (["--suite", "agentgym-r", "--model", "x"], "did you mean agentgym-rl?"),
        (["--suite", "none.toml", "--model", "x"], "no file none.toml"),
        (["--env", "form-babyai,form-babyai", "--model", "x"], "form-babyai is there twice"),
    ]:
        done = invoke(root, "eval.suite", *words)
        assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)  # invoke starts twenty times, on whatever else the machine does
def test_a_suite_killed_at_twenty_moments_ends_as_if_it_never_was(root):
    slowly = lambda messages, body: Answer(completion(counter_player(messages, body)), delay=0.05)  # noqa: E731

    def records(name: str) -> dict:
        found = {}
        for line in json.loads((root / f"saves/eval/suites/{name}/summary.json").read_text())["pairs"]:
            for record in map(json.loads, (Path(line["folder"]) / "attempts.jsonl").read_text().splitlines()):
                key = line["env"], line["model"][:1], record["item"], record["sample"]
                assert key not in found, "an attempt is there twice"
                found[key] = (record["outcome"], record["seed"], [turn["completion"] for turn in record["turns"]])
        return found

    with environment() as one, environment() as other, endpoint(slowly) as model:
        servers = {"form-textcraft": one.url, "form-babyai": other.url}
        kinds = {"items": "0-9", "samples": "2", "concurrency": "2"}
        whole = suite_file(root, "whole", servers, model.base_url, ["g-whole", "h-whole"], **kinds)
        assert invoke(root, "eval.suite", "--suite", whole, "--quiet").returncode == 0
        killed = suite_file(root, "killed", servers, model.base_url, ["g-killed", "h-killed"], **kinds)
        rng, kills = random.Random(0), 0
        for _ in range(60):
            if kills == 20:
                break
            before = len(model.requests)
            process = subprocess.Popen([sys.executable, "-m", "invoke", "eval.suite", "--suite", killed, "--quiet"], cwd=root, env=surroundings(),
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            while process.poll() is None and len(model.requests) < before + 2:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            if process.poll() is None:
                kills += 1
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert kills == 20
        done = invoke(root, "eval.suite", "--suite", killed, "--quiet")
        assert done.returncode == 0, done.stdout + done.stderr
    assert records("killed") == records("whole") and len(records("whole")) == 80


# --- what a suite is made of ---


def decided(tmp_path: Path, text: str, **typed) -> list[suites.Pair]:
    (tmp_path / "s.toml").write_text(text)
    return suites.decide(SUITE(suite=str(tmp_path / "s.toml"), **typed), tmp_path)[1]


TWO = '''
max_tokens = 512
temperature = 0
[[environment]]
env = "one"
max_round = 7
max_tokens = 200
concurrency = 8
[[environment]]
env = "two"
[[model]]
model = "m"
concurrency = 4
header = ["a=B"]
[[model]]
checkpoint = "saves/x/global_step_3/actor"
max_tokens = 64
'''


def test_who_says_a_flag_last_is_heard(tmp_path):
    pairs = {(pair.env, pair.model): pair.asked for pair in decided(tmp_path, TWO)}
    of_m, of_x = pairs["one", "m"], pairs["one", "x/global_step_3/actor"]
    assert (of_m.max_tokens, of_m.max_round, of_m.temperature, of_m.concurrency, of_m.header) == ("200", "7", "0", "4", ("a=B",))
    assert (of_x.max_tokens, of_x.concurrency, of_x.header, of_x.model) == ("64", "8", (), "")
    assert (pairs["two", "m"].max_tokens, pairs["two", "m"].max_round) == ("512", "")
    typed = {(pair.env, pair.model): pair.asked for pair in decided(tmp_path, TWO, max_tokens="9", concurrency="20", base_url="http://h/v1", gpus="0")}
    assert {one.max_tokens for one in typed.values()} == {"9"} and typed["one", "m"].concurrency == "20"
    assert (typed["one", "m"].base_url, typed["one", "m"].gpus) == ("http://h/v1", "")
    assert (typed["one", "x/global_step_3/actor"].base_url, typed["one", "x/global_step_3/actor"].gpus) == ("", "0")


def test_a_checkpoint_is_served_once(tmp_path):
    order = [(pair.env, pair.model) for pair in suites.order(decided(tmp_path, TWO + '[[model]]\nmodel = "n"\n'))]
    assert order == [("one", "m"), ("one", "n"), ("two", "m"), ("two", "n"), ("one", "x/global_step_3/actor"), ("two", "x/global_step_3/actor")]


@pytest.mark.parametrize("text, told", [
    ("max_token = 3\n" + TWO, "no such key 'max_token'; did you mean max_tokens"),
    (TWO + "[[environment]]\nenv = 3\n", "environment 3: give it env, a text"),
    (TWO + '[[environment]]\nenvironment = "x"\n', "environment 3: give it env"),
    (TWO + '[[model]]\nmodel = "x"\ncheckpoint = "y"\n', "model 3: give it model or checkpoint"),
    (TWO + '[[model]]\nmodel = "m"\n', "the model m is there twice"),
    (TWO + '[[environment]]\nenv = "one"\n', "the environment one is there twice"),
    (TWO + '[[model]]\nmodel = "z"\nheader = "a=B"\n', "header = 'a=B' is not a list of texts"),
    (TWO + '[[model]]\nmodel = "z"\nstream = 1\n', "stream = 1 is not true or false"),
    (TWO + '[[model]]\nmodel = "z"\ntop_p = [1]\n', "top_p = \\[1\\] is not a text or a number"),
    (TWO + '[[environment]]\nenv = "z"\ncount = 0\n', "count = 0 is no whole number above 0"),
    (TWO + '[[environment]]\nenv = "z"\ncount = true\n', "count = True is no whole number"),
    (TWO + '[[model]]\nmodel = "z"\nout = "x"\n', "no such key 'out'"),
    ('environment = "x"\n', "environment is no list of tables"),
    ("= 3", "is no TOML"),
    ('[[model]]\ncheckpoint = "x"\nbase_url = "http://h/v1"\n[[environment]]\nenv = "e"\n', "leave out --base-url"),
    ('[[model]]\nmodel = "x"\ngpus = "0"\n[[environment]]\nenv = "e"\n', "are about the server of a --checkpoint"),
], ids=lambda text: text.strip()[-40:])
def test_a_file_that_is_no_suite_is_refused_in_one_line(text, told, tmp_path):
    with pytest.raises(UserError, match=told) as refused:
        decided(tmp_path, text)
    assert "\n" not in refused.value.message


def test_the_papers_suite_has_its_five_environments_rounds_and_sources():
    name, pairs = suites.decide(SUITE(suite="agentgym-rl", model=("m", )), PROJECT)
    assert name == "agentgym-rl" and all(pair.own_list and f"examples/eval/{pair.env}_eval.sh" in pair.source for pair in pairs)
    assert {pair.env: (pair.asked.max_round, pair.asked.max_tokens, pair.count) for pair in pairs} == {
        "webarena": ("15", "512", 0), "searchqa": ("30", "512", 0), "textcraft": ("30", "512", 100), "babyai": ("20", "512", 90),
        "sciworld": ("30", "200", 200)}
    assert {(pair.asked.temperature, pair.asked.samples) for pair in pairs} == {("1.0", "1")}


def test_a_suite_that_means_a_list_plays_no_other(tmp_path):
    (tmp_path / "suites").mkdir()
    shutil.copy(PROJECT / "suites/agentgym-rl.toml", tmp_path / "suites")
    (tmp_path / "AgentEval/textcraft").mkdir(parents=True)
    (tmp_path / "AgentEval/textcraft/textcraft_test.json").write_text("[]")
    _, pairs = suites.decide(SUITE(suite="agentgym-rl", model=("m", ), env=("textcraft,babyai", )), tmp_path)
    assert "AgentEval's list of babyai, which is not here; fetch it with `invoke data.fetch --env babyai`" in suites.missing_list(pairs, tmp_path)
    _, others = suites.decide(SUITE(suite="agentgym-rl", model=("m", ), env=("babyai", ), items="0-9"), tmp_path)
    assert suites.missing_list(others, tmp_path) == ""
