"""What is told of the place where a trainer would run, without Ray, torch or a GPU."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.dripping import dripping, within
from tests.fixtures.standins import serving
from tests.training import places
from training import probe


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders that hold verl and agentenv."""
    found = places.sources(tmp_path_factory.mktemp("sources"))
    return [f"{found['AGENTGYM_RL_SRC']}/AgentGym-RL", f"{found['AGENTGYM_SRC']}/agentenv"]


def test_the_program_answers_with_one_line(sources: list[str], tmp_path: Path) -> None:
    model = places.model(tmp_path / "m")
    asked = {
        "path": sources,
        "model": str(model),
        "prompt": ["babyai.py", "BabyAIEnvClient"],
        "overrides": ["data.max_prompt_length=77", "+data.seed=3"]
    }
    done = subprocess.run(
        [sys.executable, "-m", "training.probe", json.dumps(asked)],
        cwd=places.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={
            **os.environ, "RAY_OVERRIDE_RESOURCES": '{"GPU": 3, "CPU": 9}'
        })
    assert done.returncode == 0 and done.stdout.startswith(probe.MARK) and done.stdout.count("\n") == 1, done.stderr
    told = json.loads(done.stdout.removeprefix(probe.MARK))
    assert told["resolved"]["actor_rollout_ref"]["rollout"]["prompt_length"] == 77, "interpolations are resolved"
    assert told["resolved"]["data"]["seed"] == 3 and told["hydra_error"] is None
    assert (told["gpus"], told["cpus"], told["clients"], told["markers"]) == (3, 9, ["babyai", "sciworld"], [1, 1])
    assert told["verl"] == f"{sources[0]}/verl" and told["unreachable"] is None and told["shm"] > 0
    text = probe.PROMPT.format(user=places.PROMPT, assistant="OK.")
    # A token a byte, and one for each of the three pairs of markers.
    assert told["prompt_tokens"] == len(text.encode()) - 3 * sum(map(len, probe.MARKERS)) + 6


@pytest.mark.parametrize(("word", "said"), [
    ("nothing=1", "Could not override 'nothing'"),
    ("data.nothing=1", "Key 'nothing' is not in struct"),
    ("+data.train_file=x", "Could not append to config"),
    ("data.train_file=a=b", "mismatched input"),
    ("data.train_file=${nowhere}", "not found"),
])
def test_what_hydra_refuses_is_told_in_one_line(sources: list[str], word: str, said: str) -> None:
    told = probe.look({"path": sources, "overrides": [word]})
    assert told["resolved"] is None and said in told["hydra_error"] and "\n" not in told["hydra_error"]


def test_hydra_refuses_the_second_of_two_sweeps_and_never_runs_several(sources: list[str]) -> None:
    assert probe.look({"path": sources, "overrides": ["trainer.save_freq=1,2"]})["hydra_error"]


@pytest.mark.parametrize(("text", "count"), [("", 0), ("{", None)])
def test_a_tokenizer_that_cannot_be_read_is_told(tmp_path: Path, text: str, count: int | None) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    told = probe.look({"model": str(tmp_path)})
    assert told["tokenizer_error"] and "\n" not in told["tokenizer_error"] and told["markers"] is None


def test_a_file_of_the_model_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert probe.closed_file(tmp_path) == ""
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert probe.closed_file(tmp_path) == str(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_the_cache_of_data_sets_is_closed_or_open(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert probe.closed_cache({name: str(tmp_path / "new" / "folder")}) == ""
    assert probe.closed_cache({name: str(tmp_path / "file" / "cache")}) == str(tmp_path / "file")


def test_an_address_is_reached_or_not() -> None:
    with serving(places.babyai) as url:
        assert probe.unreachable(url) == "" and probe.unreachable(f"{url}/none") == ""
    assert "refused" in probe.unreachable(url)
    with dripping("header") as url, within(10):
        assert "timed out" in probe.unreachable(url)
    assert probe.unreachable("http://nowhere.invalid:1") and probe.unreachable("babyai:36003") and probe.unreachable("")


@pytest.mark.parametrize(("visible", "count"), [("0", 1), ("0,1", 2), ("7", 0), ("0,7,1", 1), ("", 0), ("-1", 0),
                                                ("0,-1", 1), ("GPU-aa", 1), ("GPU-cc", 0), ("MIG-x", 1), ("x", 0),
                                                (" 1 ", 1)])
def test_the_gpus_that_cuda_shows_are_those_before_the_first_that_is_not_there(visible: str, count: int) -> None:
    """https://docs.nvidia.com/cuda/cuda-c-programming-guide/ (CUDA_VISIBLE_DEVICES)."""
    assert probe.visible_gpus(visible, ["GPU-aa-1", "GPU-bb-2"]) == count


def test_gpus_are_counted_as_nvidia_smi_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-aa-1)'\necho '  MIG 1g.18gb Device 0: (UUID: MIG-x)'\n"
        "echo 'GPU 1: NVIDIA H200 (UUID: GPU-bb-2)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("RAY_OVERRIDE_RESOURCES", raising=False)
    for visible, count in ((None, 2), ("1", 1), ("7", 0)):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert probe.gpus() == count


def test_classes_are_those_that_both_vllm_and_verl_know(tmp_path: Path) -> None:
    registry = tmp_path / "vllm" / "model_executor" / "models"
    loaders = tmp_path / "verl" / "third_party" / "vllm" / "vllm_v_0_6_3"
    registry.mkdir(parents=True)
    loaders.mkdir(parents=True)
    (registry / "registry.py").write_text("A = {'Qwen2ForCausalLM': 1, 'MambaForCausalLM': 2}\n")
    (loaders / "dtensor_weight_loaders.py").write_text("B = {'Qwen2ForCausalLM': 1, 'GemmaForCausalLM': 2}\n")
    assert probe.architectures(tmp_path / "vllm", tmp_path / "verl") == ["Qwen2ForCausalLM"]
    assert probe.architectures(None, None) is None


@pytest.mark.parametrize(("source", "want"), [
    ("class C:\n    conversation_start = (M({'value': 'a'}), M({'value': ' b '.strip()}))\n", ("a", "b")),
    ("class C:\n    conversation_start_dict = {F.REACT: (M({'value': 'a'}), M({'value': 'b'})), F.OTHER: 1}\n",
     ("a", "b")),
    ("class C:\n    conversation_start = (M({'value': make()}), M({'value': 'b'}))\n", None),
    ("class D:\n    conversation_start = (M({'value': 'a'}), M({'value': 'b'}))\n", None),
])
def test_the_texts_are_read_out_of_a_client_class(source: str, want: tuple[str, str] | None) -> None:
    assert probe.texts(source, "C") == want


@pytest.mark.parametrize("words", [[], ["x"], ["[1]"], ["{}", "{}"]])
def test_a_wrong_argument_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(words) == 2 and capsys.readouterr().err.count("\n") == 1
