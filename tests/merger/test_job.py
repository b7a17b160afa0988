"""Faulty checkpoints and wrong folders: exit code 2, one line that names the culprit, nothing written."""
import argparse
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.merger.merging import (
    Sample,
    cast,
    differences,
    edit_rank,
    edit_ranks,
    flip,
    listing,
    local,
    merge,
    rewrite_pickle,
    storage_range,
    untouched,
    weights,
)

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def truncate(path: Path, keep: float) -> None:
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * keep))


def swap(sample: Sample, a: int, b: int) -> None:
    aside = sample.actor / "aside"
    sample.rank(a).rename(aside)
    first = sample.actor / f"model_world_size_{sample.world_size + 1}_rank_{a}.pt"
    sample.rank(b).rename(first)
    aside.rename(first.with_name(first.name.replace(f"rank_{a}", f"rank_{b}")))


def put(value: float) -> Callable[[dict[str, Any]], None]:
    """Return a change that sets one element of a weight, on the ranks that hold some of it."""

    def change(state: dict[str, Any]) -> None:
        local(state[Q_PROJ]).view(-1)[3] = value

    return change


def add_key(state: dict[str, Any]) -> None:
    state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(32)


def remove(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.__delitem__(name)


def nudge(name: str) -> Callable[[dict[str, Any]], None]:
    """Return a change of one element of a buffer."""

    def change(state: dict[str, Any]) -> None:
        state[name].view(-1)[0] += 1

    return change


def layers(sample: Sample, count: int) -> None:
    """Make the config name another number of layers, in all the places where transformers 5 does."""
    types = {"layer_types": ["full_attention"] * count} if "layer_types" in sample.config else {}
    sample.configure(num_hidden_layers=count, **types)


def delete_record(path: Path) -> None:
    """Take the last storage out of the archive."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    last = max((name for name, _ in records if "/data/" in name), key=lambda name: int(name.rpartition("/")[2]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records:
            if name != last:
                archive.writestr(name, data)


def compress(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records:
            archive.writestr(name, data)


def as_half(state: dict[str, Any]) -> None:
    from torch.distributed.tensor import DTensor
    old = state[Q_PROJ]
    state[Q_PROJ] = DTensor(old._local_tensor.half(), old._spec, requires_grad=False)


def turn_order(state: dict[str, Any]) -> None:
    """Say that the weight's dimension was cut along the mesh's second dimension first, as torch can since 2.10."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._dtensor_spec import ShardOrderEntry
    object.__setattr__(state[Q_PROJ]._spec, "placements", (Shard(0), Shard(0)))
    object.__setattr__(state[Q_PROJ]._spec, "shard_order", (ShardOrderEntry(0, (1, 0)), ))


# (sample, what spoils it, what the one line must contain)
FAULTS: dict[str, tuple[str, Callable[[Sample], Any], list[str]]] = {
    "a rank's file is missing": (
        "FSDP1, 4 ranks", lambda s: s.rank(2).unlink(),
        ["3 of 4 ranks", "missing: rank 2", "model_world_size_4_rank_2.pt"]),
    "two ranks' files are missing": (
        "FSDP2, 4 ranks", lambda s: [s.rank(rank).unlink() for rank in (0, 3)], ["missing: rank 0, 3"]),
    "the only file of a replicated mesh's shard is missing": (
        "FSDP2 and TP, 2 x 2 ranks", lambda s: s.rank(3).unlink(), ["missing: rank 3"]),
    "a file is cut in half": ("FSDP1, 4 ranks", lambda s: truncate(s.rank(1), 0.5), ["rank_1.pt", "truncated"]),
    "a file lacks its last byte": (
        "FSDP1, 4 ranks", lambda s: truncate(s.rank(3), 1 - 1e-9), ["rank_3.pt", "truncated"]),
    "a file is empty": ("FSDP2, 4 ranks", lambda s: truncate(s.rank(0), 0), ["rank_0.pt"]),
    "a file is no archive": ("FSDP2, 4 ranks", lambda s: s.rank(0).write_bytes(b"version https://git-lfs\n" * 40),
                             ["rank_0.pt"]),
    "a storage's record is missing": ("FSDP1, 4 ranks", lambda s: delete_record(s.rank(2)), ["rank_2.pt", "storage"]),
    "a record is compressed": ("FSDP1, 4 ranks", lambda s: compress(s.rank(2)), ["rank_2.pt", "compressed"]),
    "a key is missing on one rank": (
        "FSDP1, 4 ranks", lambda s: edit_rank(s.rank(2), remove(Q_PROJ)), [Q_PROJ, "rank_2.pt"]),
    "a key is extra on one rank": (
        "FSDP1, 4 ranks", lambda s: edit_rank(s.rank(1), add_key), ["q_norm.weight", "rank_1.pt"]),
    "a key is extra everywhere": ("FSDP1, 4 ranks", lambda s: edit_ranks(s, add_key), ["q_norm.weight", "unexpected"]),
    "a key is missing everywhere": ("FSDP1, 4 ranks", lambda s: edit_ranks(s, remove(Q_PROJ)), [Q_PROJ, "lacks"]),
    "two ranks' files are swapped": ("FSDP1, 4 ranks", lambda s: swap(s, 1, 2), ["rank_1.pt", "written by rank 2"]),
    "two files of FSDP2 and TP are swapped": (
        "FSDP2 and TP, 2 x 2 ranks", lambda s: swap(s, 1, 2), ["rank_1.pt", "written by rank 2"]),
    "two replicas of HSDP are swapped": ("HSDP, 2 x 2 ranks", lambda s: swap(s, 0, 2), ["rank_0.pt", "rank 2"]),
    "one rank's weight is of another type": (
        "FSDP2, 4 ranks", lambda s: edit_rank(s.rank(1), as_half), [Q_PROJ, "rank_1.pt", "float16"]),
    "a weight is NaN": ("FSDP1, 4 ranks", lambda s: edit_rank(s.rank(1), put(float("nan"))), [Q_PROJ, "1 NaN"]),
    "a weight is infinite": (
        "FSDP1, 4 ranks", lambda s: edit_rank(s.rank(1), put(float("-inf"))), [Q_PROJ, "1 infinite"]),
    "the config's vocabulary differs": (
        "FSDP1, 4 ranks", lambda s: s.configure(vocab_size=1004), ["1003", "vocab_size 1004", "config.json"]),
    "the config's width differs": ("FSDP1, 4 ranks", lambda s: s.configure(intermediate_size=96), ["mlp", "96"]),
    "the config has one layer more": ("FSDP1, 4 ranks", lambda s: layers(s, 3), ["lacks", "layers.2"]),
    "the config has one layer less": (
        "FSDP1, 4 ranks", lambda s: layers(s, 1), ["unexpected", "layers.1"]),
    "the config ties heads that differ": (
        "FSDP1, 4 ranks", lambda s: s.configure(tie_word_embeddings=True), [HEAD, EMBEDDING, "--tied-weights"]),
    "the config names an activation that there is not": (
        "FSDP1, 4 ranks", lambda s: s.configure(hidden_act="nope"), ["config.json", "cannot build", "nope"]),
    "the config's vocabulary is no number": (
        "FSDP1, 4 ranks", lambda s: s.configure(vocab_size="x"), ["config.json", "cannot build"]),
    "there is no config": ("FSDP1, 4 ranks", lambda s: (s.huggingface / "config.json").unlink(), ["config.json"]),
    "the config is no JSON": (
        "FSDP1, 4 ranks", lambda s: (s.huggingface / "config.json").write_text("{"), ["config.json"]),
    "fsdp_config.json names another world size": (
        "FSDP2, 4 ranks", lambda s: (s.actor / "fsdp_config.json").write_text('{"world_size": 8}'),
        ["world_size_8", "fsdp_config.json"]),
    "fsdp_config.json names none": (
        "FSDP2, 4 ranks", lambda s: (s.actor / "fsdp_config.json").write_text("{}"), ["fsdp_config.json"]),
    "two checkpoints lie in one folder": (
        "FSDP1, 4 ranks", lambda s: shutil.copy(s.rank(0), s.actor / "model_world_size_8_rank_0.pt"),
        ["world sizes 4, 8"]),
    "a file names a rank beyond the world": (
        "FSDP1, 4 ranks", lambda s: shutil.copy(s.rank(0), s.actor / "model_world_size_4_rank_4.pt"), ["rank 4 of 4"]),
    "a pipe stands where a rank's file should": (
        "FSDP1, 4 ranks", lambda s: (s.rank(1).unlink(), os.mkfifo(s.actor / "model_world_size_4_rank_1.pt")),
        ["rank_1.pt", "a pipe, not a file"]),
    "a weight was cut in another order than the mesh's": (
        "FSDP2 and TP, 2 x 2 ranks", lambda s: edit_ranks(s, turn_order), [Q_PROJ, "in the order [1, 0]"]),
    "output exists": (
        "FSDP1, 4 ranks", lambda s: (s.huggingface / "model-00001-of-00009.safetensors").write_bytes(b"old"),
        ["model-00001-of-00009.safetensors", "--force"]),
}  # yapf: disable


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_refused(fault: str, spoil: Callable[..., Sample], tmp_path: Path) -> None:
    name, damage, culprits = FAULTS[fault]
    sample = spoil(name)
    damage(sample)
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor).refusal
    for culprit in culprits:
        assert culprit in refusal


@pytest.mark.parametrize("fault", ["a rank's file is missing", "a file is cut in half", "two ranks' files are swapped",
                                   "a key is missing on one rank", "a weight is NaN", "the config's vocabulary differs"
                                   ])  # yapf: disable
def test_a_refused_merge_leaves_the_earlier_one_as_it_is(fault: str, spoil: Callable[..., Sample],
                                                         tmp_path: Path) -> None:
    name, damage, _ = FAULTS[fault]
    sample = spoil(name)
    assert merge("--local-dir", sample.actor).code == 0
    damage(sample)
    with untouched(tmp_path):
        assert merge("--local-dir", sample.actor, "--force").refusal


def test_inspect_tells_the_same_problem(spoil: Callable[..., Sample]) -> None:
    sample = spoil("FSDP1, 4 ranks")
    sample.configure(vocab_size=1004)
    run = merge("--local-dir", sample.actor, "--inspect", "--json")
    assert run.code == 2 and "vocab_size 1004" in json.loads(run.out)["problems"][0]


@pytest.mark.parametrize("fault", ["a rank's file is missing", "a file is cut in half", "two ranks' files are swapped"])
def test_inspect_shows_what_it_can_of_files_that_are_no_checkpoint(fault: str, spoil: Callable[..., Sample]) -> None:
    name, damage, culprits = FAULTS[fault]
    sample = spoil(name)
    damage(sample)
    run = merge("--local-dir", sample.actor, "--inspect", "--json")
    facts = json.loads(run.out)
    refusal = merge("--local-dir", sample.actor).refusal
    assert run.code == 2 and run.err == "" and facts["problems"] == [refusal.removeprefix("merge: ").strip()]
    assert facts["meshes"] == [{"fsdp": 4}] and facts["tensors"] > 10 and facts["world_size"] == 4
    assert facts["bytes"] == sum(path.stat().st_size for path in sample.actor.glob("model_*.pt"))
    shown = re.sub(r"[\s│]", "", merge("--local-dir", sample.actor, "--inspect").out)  # a table's lines are folded
    assert all(culprit.replace(" ", "") in shown for culprit in culprits[:1]) and "Shard(0)" in shown


def test_notes_reach_a_machine_too(samples: dict[str, Sample], tmp_path: Path) -> None:
    sample = samples["HSDP, 2 x 2 ranks"].copy(tmp_path)
    sample.rank(0).unlink()
    record = merge("--local-dir", sample.actor, "--json").record()
    assert record["notes"] == ["without rank 0: the others hold a complete replica"]


@pytest.mark.parametrize("name", ["__metadata__", "model.\ud800"])
def test_a_name_that_no_safetensors_file_can_hold_is_refused(name: str, spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    for path in sample.actor.glob("model_*.pt"):
        rewrite_pickle(path, lambda data: data.replace(*(
            b"X" + len(one).to_bytes(4, "little") + one
            for one in (Q_PROJ.encode(), name.encode(errors="surrogatepass")))))
    with untouched(tmp_path):
        assert "safetensors cannot hold; rename it" in merge("--local-dir", sample.actor, "--allow", "keys").refusal


def test_flipped_bytes_are_found_by_verify(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    start, end = storage_range(sample.rank(2), Q_PROJ)
    flip(sample.rank(2), (start + end) // 2, 64)
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor, "--verify").refusal
    assert str(sample.rank(2)) in refusal and Q_PROJ in refusal and "CRC32" in refusal


class Bomb:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, exec, __import__, getattr, pickle.loads],
                         ids=lambda function: function.__name__)
@pytest.mark.parametrize("place", ["in the state dict", "in place of it"])
def test_no_code_in_a_pickle_runs(place: str, function: Callable[..., Any], spoil: Callable[..., Sample],
                                  tmp_path: Path) -> None:
    sample, trace = spoil("FSDP2, 4 ranks"), tmp_path / "trace"
    args = {
        os.mkdir: (str(trace), ),
        os.system: (f"mkdir {trace}", ),
        eval: (f"__import__('os').mkdir({str(trace)!r})", ),
        exec: (f"__import__('os').mkdir({str(trace)!r})", ),
        __import__: ("this", ),
        getattr: (os, "mkdir"),
        pickle.loads: (pickle.dumps(Bomb(os.mkdir, str(trace))), ),
    }[function] if function is not getattr else (dict, "mro")
    bomb = Bomb(function, *args)
    if place == "in place of it":
        rewrite_pickle(sample.rank(1), lambda data: pickle.dumps(bomb, protocol=2))
    else:
        edit_rank(sample.rank(1), lambda state: state.update(bomb=bomb))
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor).refusal
    assert str(sample.rank(1)) in refusal and "was not read" in refusal
    assert not trace.exists()


def test_nonfinite_weights_can_be_allowed_and_are_counted(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    edit_rank(sample.rank(1), put(float("nan")))
    edit_rank(sample.rank(2), put(float("inf")))
    record = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--allow", "nonfinite", "--verify",
                   "--json").record()
    assert (record["nan"], record["inf"]) == (1, 1)
    wanted = cast(sample.tensors()[Q_PROJ], "bfloat16").view(-1)
    found = weights(tmp_path / "out")[Q_PROJ].view(-1)
    assert int((found != wanted).sum()) == 2 and int(found.isnan().sum()) == 1 and int(found.isinf().sum()) == 1


def test_a_value_beyond_float16_is_refused_with_the_reason(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    edit_rank(sample.rank(1), put(65520.0))  # the first that rounds up to infinity
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor, "--dtype", "float16").refusal
    assert Q_PROJ in refusal and "1 infinite" in refusal and "65504" in refusal
    assert merge("--local-dir", sample.actor, "--dtype", "bfloat16", "--json").record()["inf"] == 0


def test_a_value_beyond_bfloat16_is_refused_with_the_reason(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    edit_rank(sample.rank(1), put(3.4e38))
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor).refusal
    assert Q_PROJ in refusal and "1 infinite" in refusal and "3.39e38" in refusal and "another --dtype" in refusal
    assert merge("--local-dir", sample.actor, "--dtype", "float32", "--json").record()["inf"] == 0


def test_keys_that_do_not_fit_can_be_allowed(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    edit_ranks(sample, add_key)
    merge("--local-dir", sample.actor, "--allow", "keys", "--json").record()
    assert "model.layers.0.self_attn.q_norm.weight" in weights(sample.huggingface)


@pytest.mark.parametrize("name", ["buffers, FSDP1", "buffers, FSDP2"])
@pytest.mark.parametrize("buffer", ["model.steps_seen", "model.running_mean"])
def test_a_buffer_that_differs_between_ranks_is_refused(name: str, buffer: str, spoil: Callable[..., Sample],
                                                        tmp_path: Path) -> None:
    sample = spoil(name)
    edit_rank(sample.rank(3), nudge(buffer))
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor, "--allow", "keys").refusal
    assert buffer in refusal and "rank 3" in refusal


def test_an_unknown_architecture_is_merged_with_a_warning(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks, tied")
    sample.configure(architectures=["NeverSeenForCausalLM"], model_type="never_seen")
    run = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out")
    assert run.code == 0 and "keys were not checked" in run.err and "never_seen" in run.err
    wanted = {name: cast(tensor, "bfloat16") for name, tensor in sample.tensors().items() if name != HEAD}
    assert differences(weights(tmp_path / "out"), wanted) == []


def test_custom_code_is_copied_but_never_run(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample, trace = spoil("FSDP1, 4 ranks"), tmp_path / "trace"
    sample.configure(auto_map={"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"},
                     model_type="custom", architectures=["Model"])  # yapf: disable
    code = f"import os\nos.mkdir({str(trace)!r})\n"
    (sample.huggingface / "custom.py").write_text(code)
    run = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--verify")
    assert run.code == 0 and not trace.exists()
    assert (tmp_path / "out/custom.py").read_text() == code


# Tied weights


def test_equal_tied_weights_are_saved_once(samples: dict[str, Sample], tmp_path: Path) -> None:
    record = merge("--local-dir", samples["FSDP1, 4 ranks, tied"].actor, "--save-dir", tmp_path / "out",
                   "--json").record()
    assert record["tied_dropped"] == [HEAD] and HEAD not in weights(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("choice", ["keep", "drop"])
def test_the_flag_decides_about_tied_weights_that_differ(choice: str, spoil: Callable[..., Sample],
                                                         tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    sample = spoil("FSDP1, 4 ranks")
    sample.configure(tie_word_embeddings=True)
    merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--tied-weights", choice, "--verify",
          "--json").record()
    wanted = {name: cast(tensor, "bfloat16") for name, tensor in sample.tensors().items()}
    if choice == "drop":
        del wanted[HEAD]
    assert differences(weights(tmp_path / "out"), wanted) == []
    tied = json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    assert tied is (choice == "drop")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, wanted[EMBEDDING if choice == "drop" else HEAD].to(model.dtype))


@pytest.mark.parametrize("choice", ["keep", "drop"])
def test_a_choice_about_tied_weights_where_there_are_none_is_noted(choice: str, spoil: Callable[..., Sample]) -> None:
    sample = spoil("FSDP1, 4 ranks, tied")
    args = ["--local-dir", sample.actor, "--force", "--json", "--tied-weights"]
    assert merge(*args, "keep").record()["notes"] == []  # and its config, here the checkpoint's, ties none from now on
    again = merge(*args, choice).record()
    (note, ) = again["notes"]
    assert note.startswith(f"--tied-weights {choice} has nothing to do: {sample.huggingface / 'config.json'} ties no two")
    assert again["tied_dropped"] == [] and HEAD in weights(sample.huggingface)


def test_one_differing_bit_in_tied_weights_is_enough(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks, tied")

    def change(state: dict[str, Any]) -> None:
        local(state[HEAD]).view(-1)[-1:].view(torch.int32).bitwise_xor_(1)

    edit_rank(sample.rank(3), change)
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor).refusal
    assert HEAD in refusal and "--tied-weights" in refusal


@pytest.mark.parametrize("differing", ["b", "c"])
def test_every_copy_of_three_tied_weights_is_compared(differing: str, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    from merger.model_check import Verdict

    from tests.merger import merging
    monkeypatch.setattr(merging, "ask_here", lambda *question: Verdict(tied=[["a", "b", "c"]]))
    state = {name: torch.arange(12.0).reshape(3, 4) for name in "abc"}
    (tmp_path / "actor/huggingface").mkdir(parents=True)
    (tmp_path / "actor/huggingface/tokenizer.json").write_text("{}")
    (tmp_path / "actor/huggingface/config.json").write_text("{}")
    path = tmp_path / "actor/model_world_size_1_rank_0.pt"
    torch.save(state, path)
    record = merge("--local-dir", path.parent, "--save-dir", tmp_path / "equal", "--json").record()
    assert record["tied_dropped"] == ["b", "c"] and list(weights(tmp_path / "equal")) == ["a"]
    state[differing] = state[differing] + 1
    torch.save(state, path)
    refusal = merge("--local-dir", path.parent, "--save-dir", tmp_path / "differing").refusal
    assert f"ties {differing} to a" in refusal


@pytest.mark.parametrize("choice", [None, "drop", "keep"])
def test_lora_on_a_tied_head_is_never_dropped(choice: str | None, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    from merger.model_check import Verdict

    from tests.merger import merging
    monkeypatch.setattr(merging, "ask_here", lambda *question: Verdict(tied=[[EMBEDDING, HEAD]]))
    table, a, b = torch.arange(12.0).reshape(3, 4), torch.ones(2, 4), torch.ones(3, 2)
    (tmp_path / "actor/huggingface").mkdir(parents=True)
    (tmp_path / "actor/huggingface/config.json").write_text('{"tie_word_embeddings": true}')
    torch.save({f"base_model.model.{EMBEDDING}": table, "base_model.model.lm_head.base_layer.weight": table.clone(),
                "base_model.model.lm_head.lora_A.default.weight": a,
                "base_model.model.lm_head.lora_B.default.weight": b},
               tmp_path / "actor/model_world_size_1_rank_0.pt")  # yapf: disable
    args = ["--local-dir", tmp_path / "actor", "--save-dir", tmp_path / "out", "--lora", "fuse", "--lora-alpha", "8",
            "--dtype", "keep", "--verify", *(["--tied-weights", choice] if choice else [])]  # yapf: disable
    if choice == "keep":
        assert merge(*args).code == 0
        assert differences(weights(tmp_path / "out"), {EMBEDDING: table, HEAD: table + 4 * (b @ a)}) == []
        assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    else:
        with untouched(tmp_path):
            refusal = merge(*args).refusal
        assert HEAD in refusal and EMBEDDING in refusal and "--tied-weights keep" in refusal


# Comparing what was merged before


def test_comparing_takes_no_room_and_no_config_of_the_checkpoint(spoil: Callable[..., Sample], tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    from merger import job
    sample = spoil("FSDP1, 4 ranks, tied")
    args = ["--local-dir", sample.actor, "--save-dir", tmp_path / "out"]
    assert merge(*args).code == 0
    shutil.rmtree(sample.huggingface)
    monkeypatch.setattr(job, "free_bytes", lambda target: 0)
    assert merge(*args, "--verify-only", "--json").record()["verified"]
    monkeypatch.undo()
    assert merge(*args, "--force", "--verify").code == 0  # the save folder has the config too
    (tmp_path / "out/config.json").unlink()
    assert "config.json" in merge(*args, "--force").refusal


@pytest.mark.parametrize("change", ["the first byte", "both bytes", "the shape", "a negative byte"])
def test_a_header_that_places_a_tensor_wrongly_is_refused(change: str, spoil: Callable[..., Sample],
                                                          tmp_path: Path) -> None:
    args = ["--local-dir", spoil("FSDP1, 4 ranks").actor, "--save-dir", tmp_path / "out"]
    assert merge(*args).code == 0
    path = tmp_path / "out/model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    entry = header[max((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])]
    first, last = entry["data_offsets"]
    entry["data_offsets"] = {"the first byte": [first + 1, last], "both bytes": [first - 2, last - 2],
                             "a negative byte": [-2, last - first - 2]}.get(change, [first, last])  # yapf: disable
    if change == "the shape":
        entry["shape"][0] += 1
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])
    assert str(path) in merge(*args, "--verify-only").refusal


# Output that exists


def test_force_replaces_stale_shards_and_their_index(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    fresh = listing(sample.huggingface)
    merge("--local-dir", sample.actor, "--max-shard-size", "100KB", "--json").record()
    assert (sample.huggingface / "model.safetensors.index.json").is_file()
    (sample.huggingface / "pytorch_model.bin").write_bytes(b"older still")
    assert "--force" in merge("--local-dir", sample.actor).refusal
    merge("--local-dir", sample.actor, "--force", "--json").record()
    assert set(listing(sample.huggingface)) == {*fresh, "model.safetensors", "merge.json"}
    assert sorted(path.name for path in sample.actor.iterdir() if path.name.startswith(".")) == []


def test_force_keeps_what_a_merge_did_not_write(samples: dict[str, Sample], tmp_path: Path) -> None:
    args = ["--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "out", "--json"]
    merge(*args).record()
    (tmp_path / "out/NOTES.md").write_text("mine")
    merge(*args, "--force").record()
    assert (tmp_path / "out/NOTES.md").read_text() == "mine"


def test_a_refused_merge_changes_nothing_in_the_subfolders_of_the_earlier_one(spoil: Callable[..., Sample],
                                                                              tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    (sample.huggingface / "code").mkdir()
    (sample.huggingface / "code/a.py").write_text("v1")
    args = ["--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--json"]
    merge(*args).record()
    (sample.huggingface / "code/a.py").write_text("v2")
    edit_rank(sample.rank(1), put(float("nan")))
    with untouched(tmp_path):
        assert "1 NaN" in merge(*args, "--force").refusal
    merge(*args, "--force", "--allow", "nonfinite").record()
    assert (tmp_path / "out/code/a.py").read_text() == "v2"


@pytest.mark.parametrize("spelling", ["{actor}/huggingface", "{link}/huggingface", "{link}/../actor/huggingface"])
def test_the_default_target_may_be_named_in_any_way(spelling: str, spoil: Callable[..., Sample],
                                                    tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    (sample.huggingface / "code").mkdir()
    (sample.huggingface / "code/a.py").write_text("v1")
    (tmp_path / "link").symlink_to(sample.actor)
    before = listing(sample.huggingface)
    target = spelling.format(actor=sample.actor, link=tmp_path / "link")
    merge("--local-dir", os.path.relpath(sample.actor), "--save-dir", target, "--json").record()
    after = listing(sample.huggingface)
    assert {*after} == {*before, "model.safetensors", "merge.json"} and after["code/a.py"] == b"v1"


def test_a_target_inside_the_checkpoint_s_folder_does_not_nest(spoil: Callable[..., Sample]) -> None:
    sample = spoil("FSDP1, 4 ranks")
    args = ["--local-dir", sample.actor, "--save-dir", sample.huggingface / "merged/bf16", "--force", "--json"]
    merge(*args).record()
    first = set(listing(sample.huggingface))
    merge(*args).record()
    assert set(listing(sample.huggingface)) == first and "merged/bf16/merged" not in first


@pytest.mark.parametrize("target", [None, "out"], ids=["the default target", "another target"])
def test_a_config_beside_the_ranks_does_not_bring_the_shards_along(target: str | None, samples: dict[str, Sample],
                                                                   tmp_path: Path) -> None:
    actor = tmp_path / "actor"
    shutil.copytree(samples["FSDP1, 4 ranks"].actor, actor)
    shutil.move(actor / "huggingface/config.json", actor)
    (actor / "huggingface/tokenizer.json").write_text("{}")
    assert list(actor.glob("optim_*"))
    where = ["--save-dir", tmp_path / target] if target else []
    merge("--local-dir", actor, *where, "--json").record()
    found = listing(tmp_path / target if target else actor / "huggingface")
    assert {"config.json", "model.safetensors", "merge.json"} <= set(found)
    assert not [name for name in found if name.endswith(".pt") or name == "huggingface"]


def test_the_files_that_a_model_takes_along_need_space_too(spoil: Callable[..., Sample], tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    sample = spoil("FSDP1, 4 ranks")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=8_000_000))
    (sample.huggingface / "code").mkdir()
    (sample.huggingface / "code/data.bin").write_bytes(bytes(8_000_000))
    args = ["--local-dir", sample.actor, "--save-dir"]
    with untouched(tmp_path):
        assert "8 MB are free; free space" in merge(*args, tmp_path / "out").refusal
    merge(*args, sample.huggingface, "--json").record()  # where they are already


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_link_that_leads_nowhere_is_named(name: str, spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil("FSDP1, 4 ranks")
    (sample.huggingface / name).unlink(missing_ok=True)
    (sample.huggingface / name).symlink_to("../blobs/1234")
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor, "--save-dir", tmp_path / "out").refusal
    assert refusal.startswith(f"{sample.huggingface / name} is a link to ../blobs/1234, which is not there; mend")


def test_a_model_merged_over_its_adapter_is_no_adapter(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    args = ["--local-dir", spoil("LoRA, FSDP1").actor, "--save-dir", tmp_path / "out", "--json"]
    merge(*args, "--lora", "adapter").record()
    assert (tmp_path / "out/adapter_config.json").is_file()
    merge(*args, "--lora", "fuse", "--force").record()
    assert not [name for name in listing(tmp_path / "out") if name.startswith("adapter")]
    merge(*args, "--lora", "adapter", "--force").record()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(listing(tmp_path / "out"))


# Folders and flags that cannot be meant


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with untouched(tmp_path):
        refusal = merge("--local-dir", tmp_path / "empty").refusal
    assert str(tmp_path / "empty") in refusal and "model_world_size_*_rank_*.pt" in refusal


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with untouched(tmp_path):
        assert str(tmp_path / "nowhere") in merge("--local-dir", tmp_path / "nowhere").refusal


def test_a_file_in_place_of_a_folder_is_refused(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil()
    with untouched(tmp_path):
        assert "is a file" in merge("--local-dir", sample.rank(0)).refusal
        assert "is a file" in merge("--local-dir", sample.actor, "--save-dir", sample.rank(0), "--force").refusal


def test_optimizer_state_alone_is_refused(samples: dict[str, Sample], tmp_path: Path) -> None:
    (tmp_path / "actor").mkdir()
    for path in samples["FSDP1, 4 ranks"].actor.glob("optim_*"):
        shutil.copy(path, tmp_path / "actor")
    with untouched(tmp_path):
        assert "only optimizer state" in merge("--local-dir", tmp_path / "actor").refusal


@pytest.mark.parametrize("slash", ["", "/"], ids=["huggingface", "huggingface/"])
def test_the_folder_of_merged_weights_is_refused_as_a_source(slash: str, spoil: Callable[..., Sample],
                                                             tmp_path: Path) -> None:
    sample = spoil()
    with untouched(tmp_path):
        refusal = merge("--local-dir", f"{sample.huggingface}{slash}").refusal
    assert f"did you mean {sample.actor}?" in refusal


def test_the_same_rank_in_two_folders_is_refused(spoil: Callable[..., Sample], tmp_path: Path) -> None:
    sample = spoil()
    (tmp_path / "other").mkdir()
    shutil.copy(sample.rank(1), tmp_path / "other")
    with untouched(tmp_path):
        refusal = merge("--local-dir", sample.actor, "--local-dir", tmp_path / "other").refusal
    assert "rank 1 is there twice" in refusal


@pytest.mark.parametrize("mode", [[], ["--dry-run"]], ids=["a merge", "a plan"])
def test_the_current_folder_is_refused_as_a_target(mode: list[str], spoil: Callable[..., Sample],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    sample = spoil()
    monkeypatch.chdir(sample.huggingface)
    with untouched(sample.actor):
        assert "holds the current folder" in merge("--local-dir", "..", "--save-dir", ".", *mode).refusal


def test_from_within_a_merged_folder_it_can_be_verified(spoil: Callable[..., Sample],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    sample = spoil()
    merge("--local-dir", sample.actor, "--json").record()
    monkeypatch.chdir(sample.huggingface)
    assert merge("--local-dir", sample.actor, "--save-dir", ".", "--verify-only", "--json").record()["verified"]


def test_a_mount_point_is_refused_as_a_target(samples: dict[str, Sample]) -> None:
    if not os.path.ismount("/proc"):
        pytest.skip("no /proc here")
    refusal = merge("--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", "/proc", "--force").refusal
    assert "/proc is a mount point" in refusal


@pytest.mark.parametrize("args", [
    ["--dtype", "int8"],
    ["--max-shard-size", "5 potatoes"],
    ["--max-shard-size", "0"],
    ["--threads", "0"],
    ["--threads", "many"],
    ["--threads", "²"],
    ["--device", "cuda:²"],
    ["--allow", "everything"],
    ["--dry-run", "--verify-only"],
    ["--hf-token", "hf_secret"],
    ["--lora-alpha", "much"],
    ["--lora-alpha", "0"],
    ["--max-shard-size", "9" * 400],
], ids=" ".join)  # yapf: disable
def test_a_flag_that_makes_no_sense_is_refused(args: list[str], samples: dict[str, Sample], tmp_path: Path) -> None:
    with untouched(tmp_path):
        refusal = merge("--local-dir", samples["FSDP1, 4 ranks"].actor, "--save-dir", tmp_path / "out", *args).refusal
    assert args[0] in refusal or args[-1] in refusal


@pytest.mark.parametrize("flag", ["--local-dir", "--save-dir"])
def test_an_empty_folder_name_is_refused(flag: str, spoil: Callable[..., Sample],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    sample = spoil()
    monkeypatch.chdir(sample.actor)
    with untouched(sample.actor):
        refusal = merge("--local-dir", ".", flag, "").refusal
    assert flag in refusal and "an empty name is no folder" in refusal


def test_a_tilde_that_the_shell_has_left_is_the_home(spoil: Callable[..., Sample],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    sample = spoil()
    monkeypatch.setenv("HOME", str(sample.actor.parent))
    monkeypatch.chdir(sample.actor)
    record = merge("--local-dir=~/actor", "--save-dir=~/out", "--json").record()
    assert record["folder"] == str(sample.actor.parent / "out") and not (sample.actor / "~").exists()


def test_a_missing_local_dir_flag_is_refused() -> None:
    assert "--local-dir" in merge().refusal


# Quantized weights


@pytest.mark.parametrize(("dtypes", "kept"), [
    ({"x.weight": "float8_e4m3fn", "x.weight_scale_inv": "float32", "x.bias": "float32", "y.weight": "float32"},
     ["x.weight_scale_inv"]),
    ({"x.weight": "int8", "x.weight_scale": "bfloat16", "x.input_scale": "float32"}, ["x.weight_scale", "x.input_scale"]),
    ({"x.qweight": "int32", "x.scales": "float16", "x.qzeros": "int32", "x.g_idx": "int32", "x.bias": "float16"}, ["x.scales"]),
    ({"x.weight": "uint8", "x.weight.absmax": "float32", "x.weight.quant_map": "float32"}, ["x.weight.absmax",
                                                                                          "x.weight.quant_map"]),
    ({"e.down_proj": "float8_e5m2", "e.down_proj_scale": "float32", "e.gate_up_proj": "float32"}, ["e.down_proj_scale"]),
    ({"e.down_proj_blocks": "uint8", "e.down_proj_scales": "float32", "e.up_bias": "float32"}, ["e.down_proj_scales"]),
    ({"n.weight": "float32", "n.running_mean": "float32", "n.num_batches_tracked": "int64"}, []),
    ({"p.weight": "float32", "p.position_ids": "int64", "p.mask": "bool"}, []),
], ids=["FP8", "int8", "GPTQ and AWQ", "bitsandbytes", "experts in FP8", "MXFP4", "a batch norm", "positions"])  # yapf: disable
def test_what_belongs_to_a_quantized_weight_keeps_its_type(dtypes: dict[str, str], kept: list[str]) -> None:
    from merger.job import quantization_parts
    assert quantization_parts(dtypes) == kept


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_scale_beside_8_bit_weights_is_not_rounded(dtype: str, tmp_path: Path) -> None:
    state = {"x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "x.weight_scale_inv": torch.tensor([[0.0123457]]),
             "y.weight": torch.full((2, 2), 0.0123457)}  # yapf: disable
    (tmp_path / "actor/huggingface").mkdir(parents=True)
    (tmp_path / "actor/huggingface/config.json").write_text('{"model_type": "none", "architectures": ["None"]}')
    torch.save(state, tmp_path / "actor/model_world_size_1_rank_0.pt")
    merge("--local-dir", tmp_path / "actor", "--save-dir", tmp_path / "out", "--dtype", dtype, "--verify", "--json").record()
    found = weights(tmp_path / "out")
    assert torch.equal(found["x.weight_scale_inv"], state["x.weight_scale_inv"]) and found["x.weight"].dtype == torch.float8_e4m3fn
    assert found["y.weight"].dtype == getattr(torch, dtype)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype
