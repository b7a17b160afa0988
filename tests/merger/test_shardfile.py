"""Reading what ranks wrote: finding files, the pickle's allow-list, zip records, sizes on the command line."""
import argparse
import collections
import contextlib
import enum
import json
import math
import os
import pickle
import pty
import re
import resource
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from merger import MergeError, cli, lora, modelconfig, pickles, show
from merger.discover import find_checkpoint
from merger.shardfile import is_contiguous, read_shard_file
from merger.torchforms import plain_name

from tests.merger.merging import ROOT, Sample

# Folders


def ranks(folder: Path, world: int = 2, present: list[int] | None = None) -> Path:
    """Make empty rank files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(world) if present is None else present:
        (folder / f"model_world_size_{world}_rank_{rank}.pt").touch()
    return folder


def test_the_ranks_files_of_a_folder_are_found(tmp_path: Path) -> None:
    folder = ranks(tmp_path / "actor", 12)
    for other in ("optim_world_size_12_rank_0.pt", "extra_state_world_size_12_rank_0.pt", "model.pt",
                  "model_world_size_12_rank_0.pt.tmp", "xmodel_world_size_12_rank_0.pt"):
        (folder / other).touch()
    found = find_checkpoint([str(folder)])
    assert found.world_size == 12 and sorted(found.paths) == list(range(12)) and found.missing == []
    assert found.paths[11].name == "model_world_size_12_rank_11.pt"


@pytest.mark.parametrize(("below", "taken", "note"), [
    (["actor"], "actor", "took"),
    (["critic"], "critic", "took"),
    (["actor", "critic"], "actor", "for the critic pass"),
    (["global_step_5/actor"], "global_step_5/actor", "took"),
    (["global_step_5"], "global_step_5", None),
    (["global_step_5/actor", "global_step_20/actor"], "global_step_20/actor", "the last of the steps 5, 20"),
    (["global_step_5/actor", "global_step_20/data"], "global_step_20/data", None),
    (["actor", "global_step_5/actor"], "actor", "took"),
])  # yapf: disable
def test_the_folder_above_is_understood(below: list[str], taken: str, note: str | None, tmp_path: Path) -> None:
    for name in below:
        ranks(tmp_path / name)
    if taken.endswith("data"):  # no role: such a step counts for nothing
        taken = "global_step_5/actor"
    found = find_checkpoint([str(tmp_path)])
    assert found.folders == (tmp_path / taken, )
    assert note is None or note in " ".join(found.notes)


@pytest.mark.parametrize("deep", ["run/actor", "a/b"])
def test_a_checkpoint_further_below_is_hinted_at(deep: str, tmp_path: Path) -> None:
    ranks(tmp_path / deep)
    with pytest.raises(MergeError, match=f"did you mean {tmp_path / deep}"):
        find_checkpoint([str(tmp_path)])


def test_merged_weights_are_told_from_shards(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(MergeError, match="need no merging"):
        find_checkpoint([str(tmp_path)])


def test_ranks_of_several_folders_are_one_checkpoint(tmp_path: Path) -> None:
    first, second = ranks(tmp_path / "a", 4, [0, 2]), ranks(tmp_path / "b", 4, [1])
    found = find_checkpoint([str(first), str(second), str(first)])
    assert found.folders == (first, second) and found.missing == [3]
    assert {rank: path.parent.name for rank, path in found.paths.items()} == {0: "a", 1: "b", 2: "a"}


def test_one_file_by_two_names_is_no_rank_twice(tmp_path: Path) -> None:
    first, links = ranks(tmp_path / "a"), tmp_path / "links"
    (tmp_path / "b").symlink_to(first)
    links.mkdir()
    for path in first.iterdir():
        (links / path.name).symlink_to(path)
    found = find_checkpoint([str(first), str(tmp_path / "links/../a"), str(tmp_path / "b"), str(links)])
    assert found.folders == (first, links) and {path.parent for path in found.paths.values()} == {first}
    shutil.copy(first / "model_world_size_2_rank_1.pt", links / "copy")
    (links / "copy").rename(links / "model_world_size_2_rank_1.pt")
    with pytest.raises(MergeError, match="rank 1 is there twice"):
        find_checkpoint([str(first), str(links)])


@pytest.mark.parametrize(("saved", "given", "what"), [
    (["n0/global_step_100/actor", "n0/global_step_150/actor", "n1/global_step_100/actor"], ["n0", "n1"], "step"),
    (["n0/global_step_100/actor", "n1/global_step_150"], ["n0/global_step_100/actor", "n1/global_step_150"], "step"),
    (["n0/global_step_100/actor", "n1/global_step_100/critic"], ["n0", "n1"], "role"),
], ids=["each takes its last step", "named by hand", "actor and critic"])  # yapf: disable
def test_folders_of_two_steps_or_roles_are_not_merged(saved: list[str], given: list[str], what: str,
                                                      tmp_path: Path) -> None:
    for name in saved:
        ranks(tmp_path / name, 4, [0, 1] if name.startswith("n0") else [2, 3])
    with pytest.raises(MergeError, match=f"n0/.* is of .*, but .*n1/.* of .*; name folders of one {what}"):
        find_checkpoint([str(tmp_path / name) for name in given])


def test_only_the_part_of_the_paths_that_differs_names_a_step_or_role(tmp_path: Path) -> None:
    run = tmp_path / "critic/global_step_7"
    for first, second in (("a/global_step_5/actor", "b/global_step_5/actor"), ("c/actor", "d"), ("e", "actor")):
        ranks(run / first, 4, [0, 1])
        ranks(run / second, 4, [2, 3])
        assert find_checkpoint([str(run / first), str(run / second)]).missing == []
    (run / "latest").symlink_to(run / "b/global_step_5/actor")
    assert find_checkpoint([str(run / "a/global_step_5/actor"), str(run / "latest")]).missing == []


def test_a_name_that_claims_a_huge_world_costs_no_time(tmp_path: Path) -> None:
    (tmp_path / "model_world_size_99999999999_rank_9.pt").touch()
    found = find_checkpoint([str(tmp_path)])
    assert found.missing == list(range(8))
    assert found.missing_text == "0, 1, 2, 3, 4, 5, 6, 7 and 99999999990 more"


@pytest.mark.parametrize("world", ["1e999", "NaN", "null", '"many"', "[]"])
def test_an_fsdp_config_without_a_proper_world_size_is_refused(world: str, tmp_path: Path) -> None:
    (ranks(tmp_path) / "fsdp_config.json").write_text(f'{{"world_size": {world}}}')
    with pytest.raises(MergeError, match=r"fsdp_config\.json"):
        find_checkpoint([str(tmp_path)])


def test_fsdp_config_decides_between_two_world_sizes(tmp_path: Path) -> None:
    ranks(ranks(tmp_path, 4), 2)
    with pytest.raises(MergeError, match="world sizes 2, 4"):
        find_checkpoint([str(tmp_path)])
    (tmp_path / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 2}')
    found = find_checkpoint([str(tmp_path)])
    assert found.world_size == 2 and len(found.paths) == 2 and any("left out" in note for note in found.notes)


# The pickle


def by_name(module: str, name: str, *args: str) -> bytes:
    """Return a pickle that calls `module.name(*args)`."""
    strings = b"".join(b"X" + len(arg).to_bytes(4, "little") + arg.encode() for arg in args)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + strings + b"tR."


@pytest.mark.parametrize(("module", "name"), [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("builtins", "eval"), ("builtins", "exec"),
    ("__builtin__", "eval"), ("builtins", "__import__"), ("subprocess", "Popen"), ("torch", "load"),
    ("torch.hub", "load"), ("torch.serialization", "load"), ("numpy.core.multiarray", "_reconstruct"),
    ("collections", "defaultdict"), ("functools", "partial"), ("operator", "attrgetter"), ("pickle", "loads"),
    ("torch.distributed", "init_process_group"), ("torch.distributed.tensor", "DTensor.from_local"),
    ("torch.distributed.run", "main"), ("torch.storage", "_load_from_bytes"), ("merger.cli", "main"),
    ("torch._utils", "_rebuild_qtensor"), ("torch._tensor", "_rebuild_from_type"), ("torchvision", "DTensor"),
    ("torch.distributedx", "DTensor"), ("codecs", "encode"), ("_codecs", "decode"),
], ids=lambda part: part)  # yapf: disable
def test_names_off_the_allow_list_are_refused(module: str, name: str) -> None:
    with pytest.raises(MergeError, match=f"mentions {module}.{name}.*was not read"):
        pickles.load(by_name(module, name, "touch /never"))


@pytest.mark.parametrize("home", ["torch.distributed.tensor", "torch.distributed._tensor.api",
                                  "torch.distributed.some.later.home"])  # yapf: disable
def test_torch_s_classes_are_read_as_inert_records(home: str) -> None:
    record = pickles.load(by_name(home, "Replicate", "a", "b"))
    assert (record.kind, record.args, record.state) == ("Replicate", ("a", "b"), {})
    with pytest.raises(MergeError, match="a DTensor of 2 arguments"):  # torch has a function make one
        pickles.load(by_name(home, "DTensor", "a", "b"))


def test_getattr_reaches_the_one_class_that_torch_names_so() -> None:
    head = b"\x80\x02cbuiltins\ngetattr\n(ctorch.distributed._shard.sharded_tensor.api\nShardedTensor\nX"
    good = head + len(b"ProcessGroupState").to_bytes(4, "little") + b"ProcessGroupStatetR."
    assert pickles.load(good) is pickles.RECORDS["ProcessGroupState"]
    for name in (b"__new__", b"__class__", b"__setattr__", b"mro", b"__subclasses__"):
        with pytest.raises(MergeError):
            pickles.load(head + len(name).to_bytes(4, "little") + name + b"tR.")


def test_getattr_reaches_a_member_of_the_one_enumeration_that_torch_pickles() -> None:
    """As Python 3.11.0 to 3.11.3 name it; others call the enumeration."""
    head = b"\x80\x02cbuiltins\ngetattr\n(ctorch.distributed._shard.sharded_tensor.metadata\nMEM_FORMAT_ENCODING\n"
    record = pickles.load(head + b"X\x17\x00\x00\x00TORCH_CONTIGUOUS_FORMATtR.")
    assert (record.kind, record.args) == ("MEM_FORMAT_ENCODING", ("TORCH_CONTIGUOUS_FORMAT", ))
    with pytest.raises(MergeError):
        pickles.load(head + b"K\x01tR.")


@pytest.mark.parametrize(("shape", "stride", "offset"), [((2, 1 << 20), (1, 1), 0), ((2, ), (4, ), 0), ((2, ), (2, ), 2),
                                                         ((2, ), (1 << 40, ), 0), ((0, ), (1, ), 0)])
def test_a_mesh_that_reaches_beyond_its_storage_is_refused(shape: Any, stride: Any, offset: int, tmp_path: Path) -> None:
    torch.save(torch.arange(4), tmp_path / "a.pt")
    shard = read_shard_file(tmp_path / "a.pt")
    assert shard.read_integers(replace(shard.content, shape=(2, ), stride=(2, ), offset=1)).tolist() == [1, 3]
    with pytest.raises(MergeError, match=r"a\.pt"):
        shard.read_integers(replace(shard.content, shape=shape, stride=stride, offset=offset))


def test_an_element_type_that_models_do_not_have_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "a.pt")
    with pytest.raises(MergeError, match="not supported"):
        read_shard_file(tmp_path / "a.pt")


@pytest.mark.parametrize("target", [
    b"ctorch.distributed.tensor\nDTensor\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch.distributed.tensor\nReplicate\n)R",
    b"ccollections\nOrderedDict\n",
], ids=["a class", "a function", "a record", "OrderedDict"])  # yapf: disable
def test_a_pickle_cannot_alter_what_it_was_given(target: bytes) -> None:
    # BUILD with a pair of None and a dict sets attributes: state is (None, {"kind": "x"})
    state = b"(NX\x04\x00\x00\x00kindX\x01\x00\x00\x00x"
    classes = collections.OrderedDict, pickles.RECORDS["DTensor"], pickles.RECORDS["Replicate"], pickles.Function
    names = [set(vars(one)) for one in classes]
    try:
        value = pickles.load(b"\x80\x02" + target + b"(N}" + state[2:] + b"stb.")
    except MergeError:
        value = None
    assert value is None or isinstance(value, (pickles.Record, collections.OrderedDict))
    assert names == [set(vars(one)) for one in classes]
    assert pickles.load(by_name("torch.distributed.tensor", "Replicate")).kind == "Replicate"


@pytest.mark.parametrize("data", [
    b"", b".", b"\x80\x02.", b"\x80\x02N", b"\x80\xff.", b"(", b"\x80\x02h\xff.",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x80\x02r\xff\xff\xff\xff.", b"\x80\x02]q\xffa.",
    b"\x80\x02" + b"(" * 100000 + b".", b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
    b"\x80\x02X\xff\xff\xff\x7fabc.", b"\x80\x02Q.", b"\x80\x02)Q.", b"I1" + b"0" * 5000 + b"\n.",
], ids=lambda data: f"{data[:12].hex() or 'nothing'}")  # yapf: disable
def test_damaged_pickles_are_refused_cleanly(data: bytes) -> None:
    try:
        value = pickles.load(data)
    except MergeError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(value, list)  # a deep list is a whole pickle


@pytest.mark.parametrize("dtype", [
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "uint16", "uint32",
    "uint64", "float8_e4m3fn", "float8_e5m2"
])
def test_plain_tensors_of_every_type_are_byte_ranges(dtype: str, tmp_path: Path) -> None:
    raw = torch.arange(1, 1 + 4 * torch.empty(0, dtype=getattr(torch, dtype)).element_size(), dtype=torch.uint8)
    tensor = (raw % 2 if dtype == "bool" else raw).view(getattr(torch, dtype)).reshape(2, 2)
    torch.save(collections.OrderedDict(other=torch.zeros(9), wanted=tensor, parameter=torch.nn.Parameter(torch.ones(3))),
               tmp_path / "x.pt")  # yapf: disable
    shard = read_shard_file(tmp_path / "x.pt")
    found = shard.content["wanted"]
    assert (found.dtype, found.shape) == (dtype, (2, 2))
    offset = shard.byte_offset(found)
    assert (tmp_path / "x.pt").read_bytes()[offset:offset + raw.numel()] == bytes(tensor.view(torch.uint8).flatten())
    assert shard.content["parameter"].shape == (3, )


def test_a_view_begins_inside_its_storage(tmp_path: Path) -> None:
    torch.save({"x": torch.arange(10, dtype=torch.float32)[4:7]}, tmp_path / "x.pt")
    shard = read_shard_file(tmp_path / "x.pt")
    offset = shard.byte_offset(shard.content["x"])
    assert torch.frombuffer(bytearray((tmp_path / "x.pt").read_bytes()[offset:offset + 12]),
                            dtype=torch.float32).tolist() == [4, 5, 6]


def test_a_transposed_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3, 2).t()}, tmp_path / "x.pt")
    shard = read_shard_file(tmp_path / "x.pt")
    with pytest.raises(MergeError, match="contiguous"):
        shard.byte_offset(shard.content["x"])


@pytest.mark.parametrize(("shape", "stride", "answer"), [
    ((2, 3), (3, 1), True), ((2, 3), (1, 2), False), ((1, 3), (99, 1), True), ((2, 1, 3), (3, 77, 1), True),
    ((0, 3), (1, 1), True), ((), (), True), ((4, ), (2, ), False), ((3, ), (0, ), False),
], ids=str)  # yapf: disable
def test_contiguity_is_torch_s(shape: tuple[int, ...], stride: tuple[int, ...], answer: bool) -> None:
    assert is_contiguous(shape, stride) is answer
    assert torch.empty(1000).as_strided(shape, stride).is_contiguous() is answer


def save_records(path: Path, records: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(("records", "fault"), [
    ({}, "no data.pkl"),
    ({"archive/version": b"3\n"}, "no data.pkl"),
    ({"archive/data.pkl": pickle.dumps({}), "archive/byteorder": b"big"}, "big-endian"),
], ids=["nothing inside", "no pickle", "big-endian"])  # yapf: disable
def test_archives_that_are_no_checkpoint_are_refused(records: dict[str, bytes], fault: str, tmp_path: Path) -> None:
    save_records(tmp_path / "x.pt", records)
    with pytest.raises(MergeError, match=fault):
        read_shard_file(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [{}, [], {"x": 1}, {"x": {}}, {1: torch.ones(1)}, {"x": torch.ones(2).to_sparse()},
                                     torch.ones(2), {"x": torch.ones(2, dtype=torch.complex64)}],
                         ids=["no tensor", "a list", "a number", "a dict", "a key that is no name", "sparse",
                              "a tensor alone", "complex"])  # yapf: disable
def test_state_dicts_that_hold_no_weights_are_refused(content: Any, tmp_path: Path) -> None:
    from merger.checkpoint import read_checkpoint
    torch.save(content, tmp_path / "model_world_size_1_rank_0.pt")
    with pytest.raises(MergeError, match=r"model_world_size_1_rank_0\.pt"):
        read_checkpoint(find_checkpoint([str(tmp_path)]))


def test_a_state_dict_whose_methods_were_replaced_is_read(tmp_path: Path) -> None:
    from merger.checkpoint import read_checkpoint

    class Replaced(dict[str, torch.Tensor]):

        def __reduce__(self) -> Any:
            return collections.OrderedDict, (), {"items": "replaced"}, None, iter(self.items())

    torch.save(Replaced(x=torch.ones(2)), tmp_path / "model_world_size_1_rank_0.pt")
    assert list(read_checkpoint(find_checkpoint([str(tmp_path)])).tensors) == ["x"]


@pytest.mark.parametrize(("key", "name"), [
    ("model.layers.0.mlp.weight", "model.layers.0.mlp.weight"),
    ("_orig_mod.model.norm.weight", "model.norm.weight"),
    ("model._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
])
def test_wrappers_leave_the_names(key: str, name: str) -> None:
    assert plain_name(key) == name


# What the user types


@pytest.mark.parametrize(("text", "count"), [
    ("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 GB", 1_500_000_000), ("2GiB", 2 << 30), ("100kb", 100_000),
    ("1024", 1024), ("7B", 7), ("0.5TB", 5 * 10**11), (" 3MiB ", 3 << 20),
])  # yapf: disable
def test_sizes_are_read_as_they_are_written(text: str, count: int) -> None:
    assert cli.byte_count(text) == count


@pytest.mark.parametrize("text", ["", "GB", "5 potatoes", "-1GB", "0", "0.1B", "1e9", "5GBB", "nan", "٣GB x", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        cli.byte_count(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e999", "much", ""])
def test_what_is_no_alpha_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no alpha"):
        cli.lora_alpha(text)


@pytest.mark.parametrize("text", ["0", "257", "-1", "two", "1.5"])
def test_what_is_no_number_of_threads_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no number of threads"):
        cli.thread_count(text)


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 5.0, 6.0, 10.0])
    monkeypatch.setattr(show.time, "monotonic", lambda: next(clock))
    with show.progress("merging", 4_000_000_000, quiet=False) as step:
        for _ in range(4):
            step(500_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "merge: merging 1.00 GB of 4.00 GB, 200 MB/s, 15 s left", "merge: merging 2.00 GB of 4.00 GB, 200 MB/s, 10 s left"]


def test_in_a_pipe_no_value_is_cut_and_no_row_broken(capsys: pytest.CaptureFixture[str]) -> None:
    folder, placement = "/x/" + "p" * 200, "[" + "Shard(0)," * 30 + "]"
    show.print_table("merge", [("folder", folder)])
    show.print_tensors([show.Kind(placement, (2, ), "float32")])
    lines = capsys.readouterr().out.splitlines()
    assert any(folder in line for line in lines) and any(placement in line for line in lines)


def test_progress_is_a_bar_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    code = ("import time\nfrom merger import show\nwith show.progress('merging', 4_000_000_000, False) as step:\n"
            "    for _ in range(30):\n        time.sleep(0.05)\n        step(100_000_000)\n")
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
                   cwd=ROOT / "scripts")
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode()
    assert re.search(r"merging .*/4\.0 GB +[\d.]+ .B/s +0:00:0\d", plain), plain


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (33_554_432, "33.6 MB"),
                                             (3_087_000_000, "3.09 GB"), (2.5e12, "2.50 TB")])  # yapf: disable
def test_sizes_are_shown_in_decimal_units(count: float, text: str) -> None:
    assert show.size_text(count) == text


# Configs and LoRA names


def test_the_type_is_set_where_the_config_names_it() -> None:
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "x": 1}, "vision_config": {"y": 2}}
    assert modelconfig.with_dtype(config, "bfloat16") == {
        "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "x": 1}, "vision_config": {"y": 2}}  # yapf: disable
    assert config["torch_dtype"] == "float32"
    assert modelconfig.with_dtype({}, "float16") == {"torch_dtype": "float16"}
    assert modelconfig.with_dtype(config, None) == config


def test_type_and_ties_are_set_at_any_depth_but_not_in_a_quantization() -> None:
    text = {"torch_dtype": "float32", "tie_word_embeddings": True}
    config = {"thinker_config": {"dtype": "float32", "text_config": text},
              "quantization_config": {"dtype": "fp8_e4m3", "weight": {"dtype": "int4"}}}  # yapf: disable
    assert modelconfig.with_dtype(config, "bfloat16") == {
        **config, "torch_dtype": "bfloat16",
        "thinker_config": {"dtype": "bfloat16", "text_config": {**text, "torch_dtype": "bfloat16"}}}  # yapf: disable
    names = ["thinker.model.embed_tokens.weight", "thinker.lm_head.weight"]
    assert modelconfig.tied_by_config(config, names) == [names]
    assert modelconfig.tied_by_config(modelconfig.untied(config), names) == []
    assert text["tie_word_embeddings"] and "tie_word_embeddings" not in config


def test_untying_reaches_nested_configs() -> None:
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}, "vision_config": {}}
    assert modelconfig.untied(config) == {
        "tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}, "vision_config": {}}  # yapf: disable


@pytest.mark.parametrize(("modules", "names", "targets"), [
    (["base_model.model.a.q", "base_model.model.b.q"], ["base_model.model.a.k.weight"], ["q"]),
    (["base_model.model.a.q"], ["base_model.model.b.q.weight"], ["a.q"]),
],
                         ids=["all modules of a name", "one of two"])
def test_target_modules_are_as_short_as_can_be(modules: list[str], names: list[str], targets: list[str]) -> None:
    assert lora.target_modules(modules, names) == targets


@pytest.mark.parametrize("name", ["base_model.model.q.lora_magnitude_vector.default.weight",
                                  "base_model.model.embed.lora_embedding_A.default",
                                  "base_model.model.q.lora_C.default.weight"])  # yapf: disable
def test_other_kinds_of_adapters_are_refused(name: str) -> None:
    tensors: Any = {name: None}
    with pytest.raises(MergeError, match="merge it with PEFT"):
        lora.read_lora(tensors, SimpleNamespace(find=lambda name: None), None)  # type: ignore[arg-type]


def test_two_adapters_are_refused(spoil: Callable[..., Any]) -> None:
    from tests.merger.merging import edit_ranks, merge
    sample = spoil("LoRA, FSDP1")

    def double(state: dict[str, Any]) -> None:
        for key in [key for key in state if ".lora_" in key]:
            state[key.replace(".default.", ".second.")] = state[key]

    edit_ranks(sample, double)
    assert "2 adapters (default, second)" in merge("--local-dir", sample.actor, "--lora", "fuse").refusal


def test_a_json_record_that_is_no_object_is_refused(spoil: Callable[..., Any]) -> None:
    from tests.merger.merging import merge
    sample = spoil("LoRA, FSDP1")
    for text in ("[]", "{", *(json.dumps({"r": 8, "lora_alpha": alpha}) for alpha in ("many", math.nan, 10**400))):
        (sample.actor / "lora_train_meta.json").write_text(text)
        assert "lora_train_meta.json" in merge("--local-dir", sample.actor, "--lora", "fuse").refusal


def test_reading_in_several_threads_leaves_the_process_without_a_memory_limit(samples: dict[str, Sample]) -> None:
    path, before = samples["FSDP1, 4 ranks"].rank(0), resource.getrlimit(resource.RLIMIT_AS)
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(read_shard_file, [path] * 64))) == 64
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_nothing_is_unpickled_in_the_merger_s_own_process(samples: dict[str, Sample], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.merger.merging import merge
    sample, loaded, readers = samples["FSDP1, 4 ranks"], pickles._loaded, tmp_path / "readers"

    def note(unpickler: Any, data: bytes) -> Any:
        with readers.open("a") as file:
            file.write(f"{os.getpid() == here}, {threading.current_thread() == threading.main_thread()}\n")
        return loaded(unpickler, data)

    here = os.getpid()
    monkeypatch.setattr(pickles, "_loaded", note)
    args = ["--local-dir", sample.actor, "--save-dir", tmp_path / "out", "--json"]
    merge(*args, "--verify").record()
    merge(*args, "--verify-only", "--threads", "32").record()
    lines = readers.read_text().splitlines()
    assert set(lines) == {"False, True"} and len(lines) >= 8  # four ranks, twice


def test_files_that_were_saved_without_checksums_are_read_and_not_compared(tmp_path: Path) -> None:
    from tests.merger.merging import merge
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface/config.json").write_text('{"architectures": ["Own"], "model_type": "own"}')
    torch.serialization.set_crc32_options(False)
    try:
        for rank in range(2):
            torch.save({"a": torch.ones(3)}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    run = merge("--local-dir", tmp_path, "--save-dir", tmp_path / "out", "--verify")
    assert run.code == 0, run.err


# Tensors of other devices, in the forms that their packages pickle


class Format(enum.IntEnum):
    """Stands for torch_npu's enumeration of storage formats."""
    ND = 2
    FRACTAL_NZ = 29


def _rebuild_npu_tensor(*_: Any) -> None:
    """Stands for torch_npu's."""


FORMATS: dict[str, Any] = {"a number": 2, "a flag": True, "a member by value": Format.ND, "a member by name": "by name"}


class ByName:
    """A member of the enumeration as Python 3.11.0 to 3.11.3 pickles it."""

    def __reduce__(self) -> Any:
        return getattr, (Format, "FRACTAL_NZ")


@pytest.mark.parametrize("home", ["torch_npu.npu._format", "torch_npu.npu"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_tensor_of_an_ascend_npu_is_read(form: str, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module, thing in (("_rebuild_npu_tensor", "torch_npu.utils.storage", _rebuild_npu_tensor), ("Format", home, Format)):
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            parent = ".".join(parts[:count])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        setattr(sys.modules[module], name, thing)
        monkeypatch.setattr(thing, "__module__", module)
    info = ByName() if form == "a member by name" else FORMATS[form]

    def reduce(self: torch.Tensor, _: int) -> Any:
        storage = torch.storage.TypedStorage(wrap_storage=self.untyped_storage(), dtype=self.dtype, _internal=True)
        return _rebuild_npu_tensor, (storage, self.storage_offset(), tuple(self.size()), self.stride(), False,
                                     collections.OrderedDict(), info)  # yapf: disable

    whole = torch.arange(6.0).reshape(2, 3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__reduce_ex__", reduce)
        torch.save({"x": whole}, tmp_path / "model_world_size_1_rank_0.pt")
    assert b"torch_npu" in (tmp_path / "model_world_size_1_rank_0.pt").read_bytes()
    read_as(tmp_path, whole)


@pytest.mark.parametrize("device", ["xla:0", "mtia:1", "hpu:0", "ort:0"])
def test_a_tensor_that_a_device_saves_as_the_cpu_s_is_read(device: str, tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)

    class OnDevice(torch.Tensor):

        def __reduce_ex__(self, _: Any) -> Any:
            plain = self.as_subclass(torch.Tensor)
            return torch._utils._rebuild_device_tensor_from_cpu_tensor, (plain, plain.dtype, device, False)

    torch.save({"x": whole.as_subclass(OnDevice)}, tmp_path / "model_world_size_1_rank_0.pt")
    read_as(tmp_path, whole)


@pytest.mark.parametrize("device", ["xpu:0", "musa:3", "npu:0", "privateuseone:0"])
def test_a_storage_s_device_does_not_matter(device: str, tmp_path: Path) -> None:
    from tests.merger.merging import rewrite_pickle
    whole, path = torch.arange(6.0).reshape(2, 3), tmp_path / "model_world_size_1_rank_0.pt"
    torch.save({"x": whole}, path)
    rewrite_pickle(path, lambda data: data.replace(b"X\x03\0\0\0cpu", b"X" + len(device).to_bytes(4, "little") + device.encode()))
    assert device.encode() in path.read_bytes()
    read_as(tmp_path, whole)


def read_as(folder: Path, whole: torch.Tensor) -> None:
    from merger.checkpoint import read_checkpoint
    from merger.copying import Sources
    checkpoint = read_checkpoint(find_checkpoint([str(folder)]))
    with Sources(checkpoint) as sources:
        assert torch.equal(torch.from_numpy(sources.read_tensor(checkpoint.tensors["x"])), whole)


@pytest.mark.parametrize("name", ["torch_npu.utils.storage._rebuild_other", "torch_npu.npu.Other", "torch_xla.core._rebuild"])
def test_what_else_a_device_s_package_has_is_not_run(name: str) -> None:
    module, _, function = name.rpartition(".")
    with pytest.raises(MergeError, match="which no checkpoint needs"):
        pickles.load(f"c{module}\n{function}\n.".encode())
