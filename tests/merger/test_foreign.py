"""The gates for foreign files, archives, values, JSON and text: what was found once, and what is drawn at random."""
from __future__ import annotations

import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from merger import MergeError, verify
from merger.checkpoint import read_checkpoint
from merger.discover import find_checkpoint
from merger.foreign import documents
from merger.foreign.files import Seen
from merger.foreign.text import markdown, printable
from merger.foreign.values import as_shape

from tests.merger.merging import ROOT, Run, Sample, merge, rewrite_pickle, run_program, unchecked, untouched

sys.path.insert(0, str(ROOT / "benchmarks"))
import fuzz

TARGETS = [name for name in fuzz.all_targets() if name.startswith("merger.")]
RANK = "model_world_size_1_rank_0.pt"


# Fuzz


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_nobody_listed_find_nothing(name: str) -> None:
    target = fuzz.all_targets()[name]
    target.ready()
    accepted = 0
    for seed in range({"merger.text": 100}.get(name, 25)):
        took, finding, _ = fuzz.throw(target, target.make(random.Random(f"{name} {seed}")))
        assert not finding or "MiB" in finding, (seed, finding)  # the process holds all of torch's tests
        accepted += took
    assert accepted


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TARGETS)
def test_half_a_minute_of_them(name: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "benchmarks/fuzz.py", name, "--seconds", "30", "--seed", "1000"],
                          capture_output=True, text=True, check=False)  # yapf: disable
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("path", sorted(fuzz.CORPUS.glob("merger.*/*")), ids=lambda path: f"{path.parent.name} {path.name}")
def test_what_was_found_once_is_found_no_more(path: Path) -> None:
    target = fuzz.all_targets()[path.parent.name]
    target.ready()
    _, finding, _ = fuzz.throw(target, path.read_bytes())
    assert not finding or "MiB" in finding, finding


def test_the_fuzzer_tells_a_finding(tmp_path: Path) -> None:
    def fall(data: bytes, folder: Path) -> bool:
        raise KeyError(data)

    assert "KeyError" in fuzz.throw(fuzz.Target(lambda chance: b"", fall), b"x")[1]


# Archives


def parts_of(path: Path) -> list[Any]:
    import fuzz_merger
    return [(name, data, {}) for name, data in fuzz_merger.records_of(path.read_bytes()).items()]


@pytest.mark.parametrize("what", ["a name twice, the last other", "a name twice, the first other", "a second folder",
                                  "another case", "a local header of another name", "records that overlap", "a comment", "a byte before"])
def test_an_archive_that_torch_reads_otherwise_is_refused(what: str, tmp_path: Path) -> None:
    import fuzz_merger
    torch.save({"x": torch.tensor([1.0, 2.0, 3.0, 4.0])}, tmp_path / RANK)
    parts = parts_of(tmp_path / RANK)
    end: dict[str, Any] = {}
    index = next(i for i, (name, _, _) in enumerate(parts) if name.endswith("data/0"))
    name, data, _ = parts[index]
    other = torch.full((4, ), 666.0).numpy().tobytes()
    match what:
        case "a name twice, the last other":
            parts.append((name, other, {}))
        case "a name twice, the first other":
            parts.insert(index, (name, other, {}))
        case "a second folder":
            parts.append((f"other/{name.partition('/')[2]}", other, {}))
        case "another case":
            parts.insert(0, (name.replace("data/0", "DATA/0"), other, {}))
        case "a local header of another name":
            parts[index] = (name, data, {"local_name": name.replace("data/0", "data/1").encode()})
        case "records that overlap":
            parts[index] = (name, data, {"same": 0})
        case "a byte before":
            end["before"] = b"x"
        case "a comment":
            end["comment"] = b"c" * 30
    good = fuzz_merger.write_archive(parts_of(tmp_path / RANK), {})
    (tmp_path / RANK).write_bytes(good)
    assert list(read_checkpoint(find_checkpoint([str(tmp_path)])).tensors) == ["x"]
    (tmp_path / RANK).write_bytes(fuzz_merger.write_archive(parts, end))
    with pytest.raises(MergeError, match="truncated or damaged"):
        read_checkpoint(find_checkpoint([str(tmp_path)]))


def test_an_archive_with_wide_fields_is_read(tmp_path: Path) -> None:
    import fuzz_merger
    torch.save({"x": torch.ones(4)}, tmp_path / RANK)
    (tmp_path / RANK).write_bytes(fuzz_merger.write_archive(parts_of(tmp_path / RANK), {"zip64": 1}))
    torch.load(tmp_path / RANK)
    assert list(read_checkpoint(find_checkpoint([str(tmp_path)])).tensors) == ["x"]


# Values


@pytest.mark.parametrize("shape", [(True, 4), (0, 2**70), (2**62, 2, 2), (0, 2**62, 2**62), (1.0, ), (-1, ), (1, ) * 65, "4", None,
                                   (2**63, )], ids=str)  # yapf: disable
def test_what_is_no_shape_is_refused(shape: Any) -> None:
    with pytest.raises(MergeError):
        as_shape(shape)


@pytest.mark.parametrize("shape", [(), (0, ), [2, 3], (2**62, ), (1, ) * 64], ids=str)
def test_what_is_a_shape_is_taken(shape: Any) -> None:
    assert as_shape(shape) == tuple(shape)


# Limits


def bomb(levels: int = 60) -> bytes:
    """Return the end of a pickle: a tuple in a tuple, twice each, as the key of a dict."""
    return b"\x80\x02}K\x01" + b"2\x86" * levels + b"K\x01s."


@pytest.mark.parametrize("data", [bomb(), b"\x80\x02}X\x01\0\0\0xK\x01" + b"2\x86" * 60 + b"s.",
                                  b"\x80\x02]" + b"2a2\x86" * 40 + b"\x8a\xff" + b"\x7f" * 255 + b"\x86}q\0h\0K\x01s."],
                         ids=["as a key", "as a value", "as another"])  # yapf: disable
def test_a_pickle_that_would_take_years_is_refused_in_seconds(data: bytes, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(4)}, tmp_path / RANK)
    rewrite_pickle(tmp_path / RANK, lambda _: data)
    began = sum(os.times()[:4])
    with pytest.raises(MergeError, match=RANK):
        read_checkpoint(find_checkpoint([str(tmp_path)]))
    assert sum(os.times()[:4]) - began < 10


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_pickle_that_would_take_years_can_be_interrupted(number: signal.Signals, code: int, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(4)}, tmp_path / RANK)
    rewrite_pickle(tmp_path / RANK, lambda _: bomb())
    longer = "from merger.foreign import limits; limits.SECONDS = 300"
    process = subprocess.Popen([sys.executable, *unchecked(longer), "--local-dir", tmp_path, "--inspect"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # yapf: disable
    end = time.monotonic() + 60
    while not (children := psutil.Process(process.pid).children()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and "Traceback" not in err
    assert psutil.wait_procs(children, timeout=15)[1] == []


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"hidden_size": 64, "layer_types": ["full_attention"] * 10**5},
                                    {"vision_config": {"depth": 10**9}}], ids=["layers", "a list", "nested"])  # yapf: disable
def test_a_config_of_a_model_too_large_ends(change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            spoil: Callable[..., Sample]) -> None:
    from merger import model_check
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sample = spoil("FSDP1, 4 ranks")
    sample.configure(**change)
    shapes = {name: tuple(tensor.shape) for name, tensor in sample.tensors().items()}
    verdict = model_check.ask(sample.huggingface, shapes, False)
    assert verdict.silent or not verdict.missing


@pytest.mark.slow
def test_a_model_that_takes_too_much_to_describe_is_not_checked(spoil: Callable[..., Sample], tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    from merger import model_check
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sample = spoil("FSDP1, 4 ranks")
    sample.configure(num_hidden_layers=1_000_000, layer_types=None)
    shapes: dict[str, Any] = {f"t{i}": (1, ) for i in range(1_000_001)}
    began = sum(os.times()[:4])
    verdict = model_check.ask(sample.huggingface, shapes, False)
    assert "too large" in verdict.silent
    assert sum(os.times()[:4]) - began < 120


# Files


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "deep/vocab.txt", "model_world_size_4_rank_2.pt",
                                  "fsdp_config.json"])  # yapf: disable
@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
def test_what_is_no_file_is_refused(kind: str, name: str, spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    path = (sample.actor if name.endswith(".pt") or name.startswith("fsdp") else sample.huggingface) / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        server = socket.socket(socket.AF_UNIX)
        here = os.open(path.parent, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{here}/{path.name}")
    else:
        path.symlink_to("/dev/zero")
    with_target = ["--local-dir", sample.actor, "--save-dir", tmp_path / "out"]
    run = run_program(*with_target, program=unchecked())
    assert f"{path} " in run.refusal and kind in run.refusal
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["the default target", "another target"])
@pytest.mark.parametrize("link", ["vocab.txt", "deep/vocab.txt", "folder"])
def test_a_link_that_leads_out_of_the_checkpoint_is_refused(link: str, target: str, spoil: Callable[..., Sample],
                                                            tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("PRIVATE")
    (sample.huggingface / link).parent.mkdir(exist_ok=True)
    (sample.huggingface / link).symlink_to(secret if link == "folder" else secret / "key")
    out = sample.huggingface if target == "the default target" else tmp_path / "out"
    with untouched(sample.huggingface):
        run = merge("--local-dir", sample.actor, *([] if target == "the default target" else ["--save-dir", out]))
    assert f"{sample.huggingface / link} leads out of its folder, to {secret}" in run.refusal
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_s_folder_may_be_no_link_that_leads_out(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    sample.huggingface.rename(tmp_path / "elsewhere")
    sample.huggingface.symlink_to(tmp_path / "elsewhere")
    assert "leads out of its folder" in merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal


def test_links_inside_the_checkpoint_and_to_a_hub_cache_s_blobs_are_followed(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    blobs = tmp_path / "hub/models--a--b/blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc").write_text("blob")
    (sample.actor / "notes.txt").write_text("inside")
    (sample.huggingface / "vocab.txt").symlink_to(blobs / "abc")
    (sample.huggingface / "notes.txt").symlink_to("../notes.txt")
    assert merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").code == 0
    assert (tmp_path / "out/vocab.txt").read_text() == "blob" and (tmp_path / "out/notes.txt").read_text() == "inside"


def test_an_index_of_weights_elsewhere_is_refused(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    args = ["--local-dir", spoil("FSDP1, 4 ranks").actor, "--save-dir", tmp_path / "out", "--max-shard-size", "100kB"]
    assert merge(*args).code == 0
    index = tmp_path / "out/model.safetensors.index.json"
    found = json.loads(index.read_text())
    moved = min(found["weight_map"].values())
    os.rename(tmp_path / "out" / moved, tmp_path / moved)
    found["weight_map"] = {
        name: f"../{file}" if file == moved else file
        for name, file in found["weight_map"].items()
    }
    index.write_text(json.dumps(found))
    with pytest.raises(MergeError, match="no file of weights beside it"):
        verify.read_folder(tmp_path / "out")


# JSON and text


@pytest.mark.parametrize(("text", "fault"), [
    ("[" * 200_000 + "]" * 200_000, "nested deeper"),
    ("[" * 65 + "]" * 65, "nested deeper"),
    ('{"a": 1, "a": 2}', "there twice"),
    ('{"a": NaN}', "NaN"),
    ('{"a": 1e999}', "1e999"),
    ("1" * 100, "100 digits"),
    (r'{"a": "\ud800"}', "surrogate"),
    ("{", "no JSON"),
    ("\xff", "no UTF-8"),
], ids=["far too deep", "too deep", "a key twice", "NaN", "beyond floats", "long", "half a pair", "cut", "Latin-1"])  # yapf: disable
def test_json_that_readers_disagree_about_is_refused(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault) as refused:
        documents.parse(text.encode("latin1"))
    assert str(refused.value).isprintable() and len(str(refused.value)) < 200


@pytest.mark.parametrize("name", ["huggingface/config.json", "fsdp_config.json"])
def test_json_of_200_000_levels_is_one_line(name: str, spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    (sample.actor / name).write_text('{"a":' * 200_000 + "1" + "}" * 200_000)
    assert name in merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal


def test_infinity_may_be_in_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    found = documents.read_object(tmp_path / "config.json", Seen(), nonfinite=True)
    assert found["time_step_limit"][1] == float("inf")


def test_a_tensor_s_name_cannot_speak_for_the_merger(tmp_path: Path) -> None:
    torch.save({"x\x1b[2J\r\nmerge: /safe is complete and verified\u202e": 5}, tmp_path / RANK)
    run: Run = merge("--local-dir", tmp_path, "--inspect")
    assert "\x1b" not in run.out + run.err and "\u202e" not in run.out
    refusal = merge("--local-dir", tmp_path, "--save-dir", tmp_path / "out", "--lora", "adapter").refusal
    assert "\\r\\nmerge: /safe" in refusal


@pytest.mark.parametrize(("text", "shown"), [("a\nb", "a\\nb"), ("\x9b31m", "\\x9b31m"), ("\u2066", "\\u2066"), ("grün 漢", "grün 漢"),
                                             ("\U000e0041", "\\U000e0041")])  # yapf: disable
def test_what_a_terminal_acts_on_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert "<" not in markdown(f"<img src=x>{text}")


def test_pickled_text_is_no_element_type(tmp_path: Path) -> None:
    """A text that is spelt like one is refused by torch, and so it is here."""
    torch.save({"x": torch.ones(4)}, tmp_path / RANK)
    rewrite_pickle(tmp_path / RANK, lambda data: data.replace(b"ctorch\nFloatStorage\n", b"X\x07\0\0\0float32"))
    with pytest.raises((pickle.UnpicklingError, AttributeError)):
        torch.load(tmp_path / RANK, weights_only=True)
    with pytest.raises(MergeError):
        read_checkpoint(find_checkpoint([str(tmp_path)]))
