"""`invoke eval --checkpoint`: what a folder holds, what serves it, and whole runs with a real checkpoint on this machine."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from invoke.context import Context
from serve_transformers import generation, link

from evaluation.__main__ import main as evaluation
from evaluation.compared import STEP
from tasks import evaluate
from tasks.lib import checkpoints
from tasks.lib.errors import DockerError, UserError
from tasks.lib.evaluation import plan as eval_plan
from tasks.lib.evaluation.asked import Asked
from tasks.lib.serving import docker as serve_docker
from tasks.lib.serving import local as serving
from tasks.lib.settings import ROOT
from tests.fixtures.invoking import invoke as run_invoke
from tests.fixtures.servers import FIXTURE_ROWS, rows, running
from tests.fixtures.standins import completion, endpoint
from tests.merger.fsdp_samples import write_samples


def fill(folder: Path, *names: str, **texts: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    for name, value in texts.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def shards(folder: Path) -> Path:
    return fill(folder, "model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt")


def record(folder: Path) -> dict[str, object]:
    return {"sources": [{"file": path.name, "folder": "/workspace/saves/x", "bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}
                        for path in folder.glob("model_world_size_*.pt")]}


def test_a_folder_with_shards_a_step_and_a_model_are_found(tmp_path):
    actor = shards(tmp_path / "global_step_3" / "actor")
    unmerged = checkpoints.Checkpoint(actor / "huggingface", actor, merge=True)
    assert checkpoints.find(actor) == checkpoints.find(actor.parent) == unmerged
    fill(actor / "huggingface", "model.safetensors", config={}, merge=record(actor))
    assert checkpoints.find(actor) == checkpoints.Checkpoint(actor / "huggingface", actor)
    assert checkpoints.find(actor / "huggingface") == checkpoints.Checkpoint(actor / "huggingface")
    os.utime(actor / "model_world_size_2_rank_1.pt", (1, 1))
    assert checkpoints.find(actor) == checkpoints.Checkpoint(actor / "huggingface", actor, merge=True, force=True)


DCP_FILES, SHARDED_FILES = (".metadata", "__0_0.distcp", "__1_0.distcp"), ("shard-00001-model-00001-of-00001.safetensors", )


@pytest.mark.parametrize("place", ["", "policy", "actor/policy", "actor", "pytorch_model_fsdp_0", "sharded", "dcp"])
@pytest.mark.parametrize("names", [("model_world_size_1_rank_0.pt", ), DCP_FILES, SHARDED_FILES], ids=["ranks", "DCP", "sharded"])
def test_shards_of_every_form_are_found_where_the_merger_finds_them(names, place, tmp_path):
    from merger import discover
    step = tmp_path / "global_step_3"
    shards = fill(step / place, *names, config={})
    assert checkpoints.find(step) == checkpoints.Checkpoint(shards / "huggingface", shards, merge=True)
    files = discover.find_checkpoint([str(step)])
    assert files.folders[0] == shards and sorted(files.paths.values()) == checkpoints.shard_files(shards)
    sources = [{"file": path.name, "bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}
               for path in files.paths.values()]  # yapf: disable
    fill(shards / "huggingface", "model.safetensors", config={}, merge={"sources": sources})
    assert checkpoints.find(step) == checkpoints.Checkpoint(shards / "huggingface", shards)
    os.utime(checkpoints.shard_files(shards)[-1], (1, 1))
    assert checkpoints.find(step).force


def test_megatron_s_own_checkpoint_is_none_of_torch_s(tmp_path):
    fill(tmp_path, *DCP_FILES, "common.pt")
    with pytest.raises(UserError, match="neither shards"):
        checkpoints.find(tmp_path)


def test_a_base_model_that_changed_since_makes_a_merge_old(tmp_path):
    """One that is not here, as of a merge in a container or one that was moved, does not."""
    actor, base = shards(tmp_path / "actor"), fill(tmp_path / "base", "model.safetensors")
    file = base / "model.safetensors"
    told = {"file": file.name, "folder": str(base), "bytes": file.stat().st_size, "modified": file.stat().st_mtime_ns}
    fill(actor / "huggingface", "model.safetensors", config={}, merge={**record(actor), "base_sources": [told]})
    assert not checkpoints.find(actor).merge
    os.utime(file, (1, 1))
    assert checkpoints.find(actor).force
    file.unlink()
    assert not checkpoints.find(actor).merge
    fill(actor / "huggingface", merge={**record(actor), "base_sources": [{"file": 3}]})
    assert checkpoints.find(actor).force


@pytest.mark.parametrize("place", ["huggingface", "model/huggingface", "weights/hf"])
def test_a_whole_model_that_the_training_saved_is_found_from_the_step_and_the_actor(place, tmp_path):
    """`save_contents=['hf_model']` of FSDP, and verl's Megatron layout, whose manifest says where the weights are."""
    actor = tmp_path / "global_step_3" / "actor"
    model = fill(actor / place, "model.safetensors", config={})
    if place != "huggingface":
        fill(actor, ckpt_contents={"save_contents": ["model"], "contents": {
            "model": {"path": place, "format": "huggingface"}, "rng_state": {"path": "extra/dist_ckpt"}}})
    assert checkpoints.find(actor) == checkpoints.find(actor.parent) == checkpoints.Checkpoint(model)


@pytest.mark.parametrize("contents", [[], {"model": 3}, {"model": {"path": "../other"}}, {"model": {"path": "/x"}},
                                      {"model": {"path": "model/dist_ckpt"}}], ids=str)
def test_a_manifest_leads_to_nothing_outside_its_checkpoint(contents, tmp_path):
    fill(tmp_path / "other", "model.safetensors", config={})
    fill(tmp_path / "actor", ckpt_contents={"contents": contents})
    with pytest.raises(UserError, match="neither shards"):
        checkpoints.find(tmp_path / "actor")


def test_the_merger_and_the_tasks_call_a_checkpoint_s_files_the_same():
    from merger import discover, filenames
    assert (checkpoints.BELOW, checkpoints.DCP_SUFFIX, checkpoints.MEGATRON) == (discover.PLACES, filenames.DCP_SUFFIX,
                                                                                filenames.MEGATRON)
    assert checkpoints.SHARD_FILE.pattern == filenames.SHARD_FILE.pattern.replace("(", "").replace(")", "")
    assert checkpoints.RANK_FILE.pattern == filenames.RANK_FILE.pattern.replace("(", "").replace(")", "")
    assert (checkpoints.MERGED, checkpoints.RECORD, checkpoints.CONTENTS) == (
        filenames.MODEL_FOLDER, filenames.RECORD, filenames.CONTENTS)


def test_a_folder_without_a_model_says_what_it_is(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        checkpoints.find(tmp_path / "none")
    with pytest.raises(UserError, match="neither shards"):
        checkpoints.find(tmp_path)
    actor = shards(tmp_path / "global_step_9" / "actor")
    shards(tmp_path / "global_step_30" / "actor")
    actor = shards(tmp_path / "global_step_100" / "actor")  # the last step, though not the last name
    with pytest.raises(UserError, match=f"did you mean {actor}"):
        checkpoints.find(tmp_path)
    fill(actor / "huggingface", "model.safetensors", config={})
    with pytest.raises(UserError, match="no merge of these shards"):
        checkpoints.find(actor)


@pytest.mark.parametrize("path, label", [
    ("saves/x/global_step_100/actor/huggingface", "x-global_step_100-actor"),
    ("home/a b/saves/deep/er/x y/global_step_7/actor/huggingface", "x-y-global_step_7-actor"),
    ("models/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
    ("models/org@v1/größe", "org-v1-gr-e"),
])
def test_the_name_is_readable(path, label, tmp_path):
    assert checkpoints.label(Path("/") / path) == label


def test_the_name_follows_the_weights_and_nothing_else(tmp_path):
    model = fill(tmp_path / "saves" / "x" / "global_step_100" / "actor", "model.safetensors", config={})
    name = checkpoints.served_name(model)
    assert re.fullmatch(r"x-global_step_100-actor-[0-9a-f]{8}", name)
    step = STEP.search(name)
    assert step and step[1] == "100"  # where `eval.compare` finds the training step
    fill(model, config={"other": 1})
    assert checkpoints.served_name(model) == name
    os.utime(model / "model.safetensors", (1, 1))
    assert checkpoints.served_name(model) != name


@pytest.mark.parametrize("config, tokenizer, said", [
    ({"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 4096}, {"chat_template": "x"}, None),
    ({"architectures": ["Qwen2VLForConditionalGeneration"], "text_config": {"max_position_embeddings": 4096}}, {"chat_template": "x"}, None),
    ({"architectures": ["Qwen2ForTokenClassification"]}, {"chat_template": "x"}, "writes no text"),
    ({"architectures": ["Qwen2ForCausalLM"]}, {}, "no chat template"),
    ({"architectures": ["Qwen2ForCausalLM"]}, None, "no tokenizer"),
])
def test_a_model_that_cannot_talk_is_refused(config, tokenizer, said, tmp_path):
    model = fill(tmp_path / "m", config=config, **({} if tokenizer is None else {"tokenizer_config": tokenizer}))
    if said is None:
        assert checkpoints.check(model) == 4096
    else:
        with pytest.raises(UserError, match=said):
            checkpoints.check(model)


@pytest.mark.parametrize("engine, packages, cuda, expected", [
    ("auto", {"vllm"}, True, ("vllm", "a CUDA GPU is here")),
    ("auto", {"vllm"}, False, ("transformers", "no CUDA GPU is here")),
    ("auto", set(), True, ("transformers", "vllm is not installed")),
    ("transformers", {"vllm"}, True, ("transformers", "--engine says so")),
    ("vllm", set(), True, "which is not installed"),
    ("vllm", {"vllm"}, False, "needs a CUDA GPU"),
    ("sglang", {"vllm"}, True, "choose one of auto, vllm, transformers"),
])
def test_which_engine_serves_here(engine, packages, cuda, expected, monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: name in packages)
    monkeypatch.setattr(serving, "has_cuda", lambda: cuda)
    monkeypatch.setattr(serving, "missing", list)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            serving.choose_engine(engine)
    else:
        chosen, why = serving.choose_engine(engine)
        assert chosen == expected[0] and expected[1] in why


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: name not in ("fastapi", "vllm"))
    with pytest.raises(UserError, match=r"serving a model needs fastapi; `pip install -r requirements-dev.txt`"):
        serving.choose_engine("auto")


@pytest.mark.parametrize("engine, cpu, expected", [("auto", True, "transformers"), ("auto", False, "vllm"), ("transformers", False, "transformers")])
def test_which_engine_serves_in_a_container(engine, cpu, expected):
    assert serve_docker.choose_engine(engine, cpu)[0] == expected
    with pytest.raises(UserError, match="needs a GPU"):
        serve_docker.choose_engine("vllm", True)


def test_a_servers_surroundings_are_offline_and_have_no_secret(tmp_path):
    found = serving.surroundings({"PATH": "/bin", "OPENAI_API_KEY": "sk", "HF_TOKEN": "hf"}, tmp_path)
    assert found == {"PATH": "/bin", "TMPDIR": str(tmp_path), **serving.OFFLINE}


def test_the_users_key_is_not_sent_to_our_server(monkeypatch):
    from invoke.context import Context
    seen: dict[str, str] = {}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-the-users-own")
    monkeypatch.setattr(evaluate, "run_module", lambda c, module, words, env: seen.update(env))
    evaluate.run_evaluation(Context(), "local", [], variables={"OPENAI_API_KEY": "none"})
    assert seen["OPENAI_API_KEY"] == "none"


def test_the_runner_gets_what_the_engine_lacks():
    slow = eval_plan.Endpoint("x", "http://127.0.0.1:1/v1", "transformers", 32768)
    assert eval_plan.endpoint_flags(slow, {}) == {
        "model": "x", "base_url": slow.url, "base_url_as": "transformers, started for the run", "context_length": "32768", "concurrency": "1"
    }
    assert eval_plan.endpoint_flags(slow, {"context_length": "99"})["context_length"] == "99"
    fast = eval_plan.Endpoint("x", "http://127.0.0.1:1/v1", "vllm", 2048)
    assert eval_plan.endpoint_flags(fast, {})["max_tokens"] == "1024"
    assert not {"max_tokens", "context_length", "concurrency"} & set(eval_plan.endpoint_flags(fast, {"max_tokens": "9"}))


def test_a_check_merges_nothing(tmp_path, monkeypatch, capsys):
    actor = shards(tmp_path / "global_step_3" / "actor")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(serving, "choose_engine", lambda engine: ("transformers", "a test says so"))
    prepared = evaluate.prepare_checkpoint(Context(), Asked(checkpoint=str(actor), check=True), "local")
    assert (prepared.model, prepared.context) == (actor / "huggingface", 0) and sorted(tmp_path.rglob("*")) == before
    assert capsys.readouterr().out == f"invoke: {actor} would be merged, and served by transformers (a test says so)\n"


def test_temperature_counts_and_the_models_own_settings_stay(tmp_path):
    assert generation({}) == {"top_k": 0, "do_sample": True}
    assert generation({"top_k": 20, "do_sample": False}) == {"top_k": 20, "do_sample": True}
    link(fill(tmp_path / "model", "model.safetensors", generation_config={"eos_token_id": 7}), tmp_path / "name")
    assert (tmp_path / "name" / "model.safetensors").read_bytes() == b"model.safetensors"
    assert json.loads((tmp_path / "name" / "generation_config.json").read_text())["eos_token_id"] == 7
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text()) == {"eos_token_id": 7}


def test_a_named_endpoint_resumes_at_another_address_and_its_context_is_watched(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = rows()["form-textcraft"]
    with running(row, tmp_path, False) as server:
        for turn in range(2):
            with endpoint(lambda messages, body: completion("Action: add", prompt_tokens=95, completion_tokens=6)) as model:
                assert evaluation(["run", "--env", row.name, "--environments", str(FIXTURE_ROWS), "--server", server.base, "--model", "x", "--base-url",
                                   model.base_url, "--base-url-as", "ours", "--context-length", "100", "--items", "0-1", "--out", "out"]) == 0
                assert len(model.requests) == (0 if turn else 2)
    assert "resuming" in capsys.readouterr().out
    assert json.loads(Path("out/run.json").read_text())["config"]["base_url"] == "ours"
    told = [json.loads(line) for line in Path("out/attempts.jsonl").read_text().splitlines()]
    assert {one["outcome"] for one in told} == {"context_overflow"} and "101 tokens" in told[0]["error"]


# --- whole runs ---


@pytest.fixture(scope="module")
def actor(tmp_path_factory) -> Path:
    """A step's actor that real FSDP wrote."""
    folder = tmp_path_factory.mktemp("checkpoint")
    written = write_samples(folder, {"one": "--strategy fsdp1 --world-size 2"})["one"].actor
    return Path(shutil.copytree(written, folder / "saves" / "x" / "global_step_3" / "actor"))


@pytest.fixture(scope="module")
def merged(actor) -> Path:
    """The same, merged, in a folder of its own."""
    folder = actor.parents[2] / "y"
    subprocess.run([sys.executable, str(ROOT / "scripts" / "model_merger.py"), "--local-dir", str(actor), "--save-dir", str(folder)],
                   check=True, capture_output=True)
    return folder


@pytest.fixture
def clean() -> dict[str, str]:
    ours = ("ENV", "ENV_PORT", "MODEL", "MAX_ROUND", "OPENAI_BASE_URL", "ENVIRONMENTS", "AGENTGYM_SRC")
    return {**{name: value for name, value in os.environ.items() if name not in ours}, "OPENAI_API_KEY": "sk-of-the-test"}


def argv(*words: str) -> list[str]:
    return [sys.executable, "-m", "invoke", *words]


def invoke(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run_invoke(*words, cwd=ROOT, env=env, timeout=300)


def servers(folder: Path) -> list[psutil.Process]:
    """The servers of models below `folder`."""
    return [process for process in psutil.process_iter(["cmdline"]) if any(str(folder) in word for word in process.info["cmdline"] or [])
            and any("serve_transformers" in word for word in process.info["cmdline"])]


@pytest.fixture(autouse=True)
def nothing_left(tmp_path) -> Iterator[None]:
    yield
    assert not list(serving.RUN.glob("*/state.json"))


def test_shards_are_merged_served_evaluated_and_evaluated_again(actor, clean, tmp_path):
    words = ["eval", "--checkpoint", str(actor.parent), "--env", "demo", "--limit", "2", "--max-round", "2", "--max-tokens", "8", "--runner",
             "local", "--out", str(tmp_path / "out")]
    done = invoke(*words, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    name = checkpoints.served_name(actor / "huggingface")
    assert f"eval: merging {actor}" in done.stdout and f"as {name}, served by transformers (" in done.stdout and "stopped demo" in done.stdout
    told = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    context = json.loads((actor / "huggingface" / "config.json").read_text())["max_position_embeddings"]
    assert (told["model"], told["base_url"], told["context_length"]) == (name, "transformers, started for the run", context)
    records = [json.loads(line) for line in (tmp_path / "out" / "attempts.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(one["outcome"] in ("max_rounds", "success", "failure") for one in records)
    assert not servers(actor)
    again = invoke(*words, env=clean)
    assert again.returncode == 0 and "merged from these shards already" in again.stdout and "resuming" in again.stdout
    assert "sk-of-the-test" not in done.stdout + (serving.RUN / name / "server.log").read_text()


def test_a_server_that_dies_is_one_line(merged, clean, tmp_path):
    broken = shutil.copytree(merged, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    done = invoke("eval", "--checkpoint", str(broken), "--env", "demo", "--runner", "local", env=clean)
    assert done.returncode == 1 and done.stderr.startswith("eval: the model's server ended: ") and done.stderr.count("\n") == 1
    assert "stopped demo" in done.stdout and not servers(tmp_path)


def test_one_of_two_runs_that_begin_at_once_serves_a_model(tmp_path):
    with ThreadPoolExecutor() as pool:
        assert sorted(pool.map(lambda _: serving.claim(tmp_path / "x"), range(8))) == [False] * 7 + [True]
    assert not serving.claim(tmp_path / "x")
    serving.stop_leftovers(tmp_path)  # its owner runs
    assert (tmp_path / "x" / "state.json").exists()
    state = json.loads((tmp_path / "x" / "state.json").read_text())
    state["owner"]["born"] = "long ago"
    (tmp_path / "x" / "state.json").write_text(json.dumps(state))
    serving.stop_leftovers(tmp_path)
    assert serving.claim(tmp_path / "x")


@pytest.mark.parametrize("whose", ["another run's", "nobody's"])
def test_a_container_that_came_before_ours_is_left_alone(whose, monkeypatch, tmp_path):
    """Between the look for a container and its start, another run may have started it."""
    there, removed = [], []

    def run(*_, **__):
        if whose == "another run's":
            there.append("it")
        raise DockerError("the name is in use", code=1)

    labels = {serve_docker.OWNER: json.dumps({"pid": 1, "born": "before"})}
    client = SimpleNamespace(
        compose=SimpleNamespace(run=run),
        container=SimpleNamespace(list=lambda **_: [], exists=lambda _: bool(there), remove=lambda name, **_: removed.append(name),
                                  inspect=lambda _: SimpleNamespace(config=SimpleNamespace(labels=labels))))
    monkeypatch.setattr(serve_docker, "ask", lambda action, **_: action(client))
    monkeypatch.setattr(serve_docker, "look", lambda *_: [])
    monkeypatch.setattr(serve_docker, "ensure_image", lambda *_: None)
    monkeypatch.setattr(serve_docker, "ensure_folders", lambda *_: [])
    gpus = SimpleNamespace(variables={}, cpu=True)
    told = "another run serves x" if whose == "another run's" else "the name is in use"
    with pytest.raises(UserError, match=told), serve_docker.started(Context(), tmp_path, "x", "transformers", gpus, 1):
        pass
    assert removed == []


def test_ctrl_c_stops_the_server_and_a_killed_run_leaves_it_to_the_next(merged, clean, tmp_path):
    # An address of no environment: neither run comes so far, and a killed one leaves no environment behind.
    words = argv("eval", "--checkpoint", str(merged), "--env", "demo", "--server", "http://127.0.0.1:9", "--runner", "local", "--out",
                 str(tmp_path / "out"))

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(words, cwd=ROOT, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        while not any('"server"' in path.read_text() for path in serving.RUN.glob("*/state.json")):
            assert process.poll() is None
            time.sleep(0.1)
        return process

    pressed = start()
    os.killpg(pressed.pid, signal.SIGINT)
    said, _ = pressed.communicate(timeout=60)
    assert pressed.returncode == 130 and "Traceback" not in said and not servers(merged)
    killed = start()
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    left, = servers(merged)
    serving.stop_leftovers()
    with suppress(psutil.NoSuchProcess):
        assert left.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("words, told", [
    (["--checkpoint", "nowhere"], "--checkpoint nowhere: no such folder"),
    (["--checkpoint", "tests"], "neither shards"),
    (["--checkpoint", "saves", "--model", "x"], "leave out --model"),
    (["--checkpoint", "saves", "--base-url", "http://127.0.0.1:1"], "leave out --base-url"),
    (["--checkpoint", "saves", "--header", "api-key=AZURE_KEY"], "leave out --header"),
    (["--checkpoint", "saves", "--api-version", "2024-10-21"], "leave out --api-version"),
    (["--checkpoint", "saves", "--base-url-as", "x"], "leave out --base-url-as"),
    (["--checkpoint", "nowhere", "--check"], "--checkpoint nowhere: no such folder"),
    (["--model", "x", "--engine", "vllm"], "are about the server of a --checkpoint"),
    (["--checkpoint", "saves", "--engine", "sglang"], "unknown engine 'sglang'"),
    (["--checkpoint", "saves", "--serve-wait", "soon"], "--serve-wait soon"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_misuse_is_one_line(words, told, clean):
    done = invoke("eval", "--env", "demo", "--runner", "local", *words, env=clean)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_dry_shows_the_server_and_starts_nothing(merged, clean):
    done = invoke("--dry", "eval", "--checkpoint", str(merged), "--env", "demo", "--runner", "local", env=clean)
    assert done.returncode == 0, done.stderr
    assert f"serve_transformers.py --model {merged} --name y-" in done.stdout and "-m evaluation run" in done.stdout
    assert "sk-of-the-test" not in done.stdout and not servers(merged)
