"""`invoke models.fetch` and `invoke data.fetch`, against a stand-in for the Hub."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation.items import category_of, list_files, read_list
from tasks.lib.errors import UserError
from tasks.lib.fetching import items, models
from tasks.lib.hub import look
from tests.fixtures.hub import COMMIT, Hub, hub
from tests.fixtures.invoking import invoke as run_invoke
from tests.fixtures.project import copy_project

KNOWN = ("babyai", "searchqa", "maze", "textcraft", "alfworld", "webshop", "sciworld", "search")
WEIGHTS = os.urandom(12 << 20)  # the client hands on 10 MiB at a time
MODEL = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"the same again",
    "original/consolidated.00.pth": b"and again",
    "README.md": b"# x"
}


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub() as found:
        found.repositories["models/org/Tiny"] = dict(MODEL)
        yield found


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return copy_project(tmp_path_factory.mktemp("fetch") / "project")


def invoke(project: Path, server: Hub, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and name != "ENVIRONMENTS"}
    env |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **variables}
    return run_invoke(*words, cwd=project, env=env)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".gitkeep")


# --- models ---


def test_a_model_comes_whole_and_without_its_weights_in_other_forms(project, server):
    done = invoke(project, server, "models.fetch", "org/Tiny", HF_TOKEN="hf_OfTheTest")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"models.fetch: org/Tiny at {COMMIT[:8]}: 4 files, 12.6MB to fetch to {project}/models/Tiny, ") and lines[0].endswith(" free")
    assert lines[-1] == f"models.fetch: {project}/models/Tiny is there"
    folder = project / "models" / "Tiny"
    assert files(folder) == [".fetched.json", "README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and not list((project / "models").glob(".Tiny*"))
    assert json.loads((folder / ".fetched.json").read_text())["commit"] == COMMIT
    assert server.tokens == {"Bearer hf_OfTheTest"} and "hf_OfTheTest" not in done.stdout + done.stderr
    again = invoke(project, server, "models.fetch", "org/Tiny")
    assert again.stdout == f"models.fetch: {folder} is org/Tiny at {COMMIT[:8]} already\n" and again.returncode == 0
    server.repositories["models/other/Tiny"] = dict(MODEL)
    other = invoke(project, server, "models.fetch", "other/Tiny")
    assert other.returncode == 2 and "is there already, and nothing tells that it is other/Tiny" in other.stderr and other.stderr.count("\n") == 1
    server.commit = "decade" + "0" * 34
    later = invoke(project, server, "models.fetch", "org/Tiny")
    assert later.returncode == 2 and f"is org/Tiny at {COMMIT[:8]}, and the Hub has decade00" in later.stderr


def test_a_fetch_that_breaks_off_leaves_no_model_and_goes_on_where_it_was(project, server, tmp_path):
    target = tmp_path / "Tiny"

    def fetch() -> subprocess.CompletedProcess[str]:
        return invoke(project, server, "models.fetch", "org/Tiny", f"--to={target}")

    class Cuts(dict[str, int]):
        """Cut again and again: the client goes on by itself a few times, until it gives up."""

        def pop(self, key: str, *_: object) -> int | None:  # type: ignore[override]
            cut = self.get(key)
            if cut:
                self[key] = 1 << 16
            return cut

    server.breaks = Cuts({"model.safetensors": 11 << 20})
    broken = fetch()
    assert broken.returncode == 1 and broken.stderr.strip().splitlines()[-1].startswith("models.fetch: ") and "run it again to go on" in broken.stderr
    assert "Traceback" not in broken.stderr and not target.exists()
    server.breaks = {}
    server.requests.clear()
    done = fetch()
    assert done.returncode == 0, done.stderr
    assert "of it came before" in done.stdout and (target / "model.safetensors").read_bytes() == WEIGHTS
    spans = [span for method, path, span in server.requests if method == "GET" and path.endswith("model.safetensors")]
    assert spans == [f"bytes={10 << 20}-"]
    assert files(target) == [".fetched.json", "README.md", "config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_file_that_came_damaged_is_fetched_again(file, project, server, tmp_path):
    server.flips.add(file)
    broken = invoke(project, server, "models.fetch", "org/Tiny", f"--to={tmp_path / 'Tiny'}")
    assert broken.returncode == 1 and f"{file} came damaged and was removed; run it again" in broken.stderr and not (tmp_path / "Tiny").exists()
    assert invoke(project, server, "models.fetch", "org/Tiny", f"--to={tmp_path / 'Tiny'}").returncode == 0
    assert all((tmp_path / "Tiny" / name).read_bytes() == MODEL[name] for name in ("model.safetensors", "config.json"))


def test_what_there_is_no_room_for_is_refused_before_anything_comes(project, server, tmp_path, monkeypatch):
    monkeypatch.setattr(models.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    said: list[str] = []
    with pytest.raises(UserError, match=r"org/Tiny needs 12582\d\d\d more, and 1000 are free"):
        models.fetch("org/Tiny", tmp_path / "Tiny", "", False, False, said.append, str)
    assert not list(tmp_path.iterdir()) and len(said) == 1


@pytest.mark.parametrize("words, said", [
    (["org/None"], "the Hub has no model org/None, or your token may not read it"),
    (["org/Gated"], "the model org/Gated is gated: ask for access on its page, then set HF_TOKEN"),
    (["org/Tiny", "--revision=v9"], "the Hub has no model org/Tiny at v9"),
    (["org/Empty"], "it has no config.json with weights beside it"),
    (["../Tiny"], "'../Tiny' is no model of the Hub; write it like Qwen/Qwen2.5-7B-Instruct"),
    ([""], "which model? invoke models.fetch Qwen/Qwen2.5-7B-Instruct"),
])
def test_a_model_that_cannot_be_had_is_one_line(words, said, project, server):
    server.repositories["models/org/Empty"] = {"README.md": b""}
    server.refused.add("models/org/Gated")
    done = invoke(project, server, "models.fetch", *words)
    assert done.returncode in (1, 2) and done.stderr.startswith("models.fetch: ") and said in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil.json", "a/../../evil.json", "a//b", "a\\b", "a\x1b[2Jb", "."])
def test_a_file_that_would_leave_its_folder_stops_the_fetch(name, project, server, tmp_path):
    for place, word in (("models/org/Evil", "models.fetch"), (f"datasets/{items.DATA_SET}", "data.fetch")):
        server.repositories[place] = {**MODEL, **LISTS, name: b"x"}
        done = invoke(project, server, word, *(["org/Evil", f"--to={tmp_path / 'in' / 'Evil'}"] if word == "models.fetch" else []))
        assert done.returncode == 1 and "would leave its folder" in done.stderr and done.stderr.count("\n") == 1 and "\x1b" not in done.stderr
    assert not list(tmp_path.iterdir()) and files(project / "AgentItemId") == []


def test_a_hub_out_of_reach_is_one_line(project, server):
    for variables, said in (({"HF_ENDPOINT": "http://127.0.0.1:9"}, "check the network and HF_ENDPOINT"), ({"HF_HUB_OFFLINE": "1"}, "unset it")):
        done = invoke(project, server, "models.fetch", "org/Tiny2", **variables)
        assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_help_after_the_name_of_the_task(project, server):
    done = invoke(project, server, "models.fetch", "--help")
    assert done.returncode == 0 and "Fetch a model from the Hub into models/." in done.stdout


def test_dry_says_what_would_come_and_writes_nothing(project, server, tmp_path):
    done = invoke(project, server, "--dry", "models.fetch", "org/Tiny", f"--to={tmp_path / 'Tiny'}")
    assert done.returncode == 0 and "4 files, 12.6MB to fetch" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("typed, name", [
    ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
    ("https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/tree/main", "Qwen/Qwen2.5-7B-Instruct"),
    ("gpt2", "gpt2"),
])
def test_a_models_name(typed, name):
    assert models.repository_name(typed) == name


def test_a_models_files():
    assert models.wanted(["config.json", "pytorch_model.bin", "x.gguf"]) == ["config.json", "pytorch_model.bin", "x.gguf"]
    assert models.wanted(["config.json", "model.safetensors", "x.gguf", "onnx/model.json"]) == ["config.json", "model.safetensors"]
    assert models.wanted(["x.gguf", "model.safetensors"], everything=True) == ["model.safetensors", "x.gguf"]


# --- lists of items ---

LISTS = {
    "README.md": b"",
    "train/babyai_train.json": b'[{"item_id": "babyai_3", "conversations": null}, {"item_id": "babyai_5", "conversations": null}]',
    "train/lmrlgym_maze_train.jsonl": b'{"item_id": "maze_1"}\n{"item_id": "maze_2"}\n{"item_id": "maze_1"}\n',
    "eval/babyai/babyai_test.json": b'["babyai_7"]',
    "eval/searchqa/searchqa_test.json": b'[{"item_id": "searchqa_1"}, {"item_id": "searchqa_2"}]',
    "eval/searchqa/searchqa_nq_test.json": b'[{"item_id": "searchqa_1"}]',
    "eval/textcraft_test.json": b'[{"item_id": "textcraft_0"}]',
    "eval/chess_test.json": b'[{"item_id": "chess_0"}]',
}


@pytest.fixture
def lists(project, server) -> Iterator[Hub]:
    server.repositories[f"datasets/{items.DATA_SET}"] = dict(LISTS)
    yield server
    for name in ("AgentItemId", "AgentEval"):
        for path in sorted((project / name).rglob("*.json")):
            path.unlink()


def test_lists_lie_where_trainer_and_evaluation_read_them(project, lists):
    done = invoke(project, lists, "data.fetch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert files(project / "AgentItemId") == ["babyai_train.json", "maze_train.json"]
    assert files(project / "AgentEval") == ["babyai/babyai_test.json", "searchqa/searchqa_nq_test.json", "searchqa/searchqa_test.json", "textcraft/textcraft_test.json"]
    assert json.loads((project / "AgentItemId/babyai_train.json").read_text()) == json.loads(LISTS["train/babyai_train.json"])
    assert json.loads((project / "AgentItemId/maze_train.json").read_text()) == [{"item_id": "maze_1"}, {"item_id": "maze_2"}]
    assert json.loads((project / "AgentEval/babyai/babyai_test.json").read_text()) == [{"item_id": "babyai_7"}]
    assert "maze_train.json: 2 items, 1 entries that named one again left out" in done.stdout
    assert "left out, of no environment here: eval/chess_test.json" in done.stdout
    whole, parts = list_files("searchqa", project)  # the evaluation's own eyes
    assert whole and read_list(whole) == ["searchqa_1", "searchqa_2"] and [category_of(part, "searchqa") for part in parts] == ["nq"]
    again = invoke(project, lists, "data.fetch", "--env=babyai")
    assert again.returncode == 0 and again.stdout.count("as before") == 2
    (project / "AgentItemId/babyai_train.json").write_text('[{"item_id": "babyai_9"}]')
    (project / "AgentEval/babyai/babyai_test.json").unlink()
    kept = invoke(project, lists, "data.fetch", "--env=babyai")
    assert kept.returncode == 2 and "babyai_train.json is there with other items; move it away, or replace it with --force" in kept.stderr
    assert not (project / "AgentEval/babyai/babyai_test.json").exists()  # all or none
    assert invoke(project, lists, "data.fetch", "--env=babyai", "--force").returncode == 0
    assert len(json.loads((project / "AgentItemId/babyai_train.json").read_text())) == 2


@pytest.mark.parametrize("words, said", [
    (["--env=chess"], "no environment 'chess' in environments.toml; choose one of "),
    (["--env=webshop"], "the data set has no list of webshop; it has those of babyai, maze, searchqa, textcraft"),
    (["--data-set=org/none"], "the Hub has no dataset org/none"),
    (["--revision=v9"], "the Hub has no dataset AgentGym/AgentGym-RL-Data-ID at v9"),
    (["--data-set=org/broken"], "train/babyai_train.json of the data set has an entry without item_id: {\"id\": 1}"),
    (["--data-set=org/cut"], "train/babyai_train.json of the data set is neither a JSON list nor JSON lines"),
    (["--data-set=org/other"], "the data set has no list in train/ or eval/ that belongs to an environment here"),
])
def test_lists_that_cannot_be_had_are_one_line(words, said, project, lists):
    lists.repositories["datasets/org/broken"] = {"train/babyai_train.json": b'[{"id": 1}]', "eval/babyai_test.json": LISTS["eval/babyai/babyai_test.json"]}
    lists.repositories["datasets/org/cut"] = {"train/babyai_train.json": LISTS["train/babyai_train.json"][:50]}
    lists.repositories["datasets/org/other"] = {"data/train.json": b"[1]"}
    done = invoke(project, lists, "data.fetch", *words)
    assert done.returncode in (1, 2) and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert files(project / "AgentItemId") == files(project / "AgentEval") == []


@pytest.mark.parametrize("file, environment, place", [
    ("train/babyai_train.json", "babyai", "AgentItemId/babyai_train.json"),
    ("train/searchqa_train.json", "searchqa", "AgentItemId/searchqa_train.json"),
    ("train/searchqa/train.jsonl", "searchqa", "AgentItemId/searchqa_train.json"),
    ("train/lmrlgym_maze_train.json", "maze", "AgentItemId/maze_train.json"),
    ("eval/sciworld_test.json", "sciworld", "AgentEval/sciworld/sciworld_test.json"),
    ("eval/sciworld/test.json", "sciworld", "AgentEval/sciworld/sciworld_test.json"),
    ("eval/searchqa/searchqa_nq_test.json", "searchqa", "AgentEval/searchqa/searchqa_nq_test.json"),
    ("eval/searchqa_hotpotqa_test.json", "searchqa", "AgentEval/searchqa/searchqa_hotpotqa_test.json"),
])
def test_where_a_list_goes(file, environment, place):
    assert items.owner(Path(file), KNOWN) == environment
    assert str(items.place_of(file, environment)) == place


def test_two_lists_that_would_be_one_are_refused():
    with pytest.raises(UserError, match=r"train/babyai_train.json and train/babyai_train.jsonl of the data set would both be AgentItemId/babyai_train.json"):
        items.choose(["train/babyai_train.jsonl", "train/babyai_train.json"], KNOWN, [])


def test_a_python_without_the_hubs_client_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of the network."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="huggingface_hub"):
        look("nope/none", "model")
