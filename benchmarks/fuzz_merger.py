"""What of the merger is fuzzed: archives and pickles with torch as the judge, JSON for its readers, text for its printers.

torch as the judge: what the merger accepts, `torch.load(weights_only=True)` accepts with equal values, or torch's own
reader where that knows the class (a DTensor).
"""
from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import pickletools
import random
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from fuzz import HERE, Target

sys.path.insert(0, str(HERE.parent / "scripts"))
RANK = "model_world_size_1_rank_0.pt"
INTERESTING = [
    True, False, None, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**32, 2**63 - 1, 2**63, 2**70, -2**63, 10**400, 1.5, "", "x",
    "\x1b[2J", "../x", "\ud800", "cuda:0"
]  # yapf: disable


@lru_cache(maxsize=1)
def bases() -> list[bytes]:
    """Return archives of one rank, by `torch.save`: plain tensors and buffers, and DTensors of several placements."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.testing._internal.distributed.fake_pg import FakeStore
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    whole = torch.arange(24.0).reshape(6, 4)
    plain = {"a.weight": whole, "b.bias": torch.arange(5, dtype=torch.int64), "c": torch.tensor(True), "e": whole[2:4],
             "d": torch.arange(6).to(torch.bfloat16).reshape(2, 1, 3)}  # yapf: disable
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("ddp", "fsdp"))
        meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
        sharded: dict[str, Any] = {
            f"t{i}": DTensor(whole.clone(), DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=False)
            for i, placements in enumerate([(Replicate(), Shard(0)), (Shard(1), Shard(0)), (Replicate(), Replicate())])
        }
        return [_saved(plain), _saved({**sharded, "b": plain["b.bias"]})]
    finally:
        dist.destroy_process_group()


def _saved(state: dict[str, Any]) -> bytes:
    import torch
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def records_of(archive: bytes) -> dict[str, bytes]:
    """Return the records of an archive that `torch.save` wrote."""
    import zipfile
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {name: file.read(name) for name in file.namelist()}


# Archives

Part = tuple[str, bytes, dict[str, Any]]  # name, data, faults


def write_archive(parts: list[Part], end: dict[str, Any]) -> bytes:
    """Return an archive of stored records, each with the faults that it asks for."""
    out, directory = bytearray(end.get("before", b"")), bytearray()
    places: list[int] = []
    for name, data, fault in parts:
        raw, crc, size = name.encode("latin1", "replace"), zlib.crc32(data), len(data)
        place = places[fault["same"] % len(places)] if "same" in fault and places else len(out)
        places.append(place)
        local = [b"PK\x03\x04", 20, fault.get("flags", 0), fault.get("method", 0), 0, 0, fault.get("local_crc", crc),
                 fault.get("local_size", size), fault.get("local_size", size), len(raw), fault.get("extra", 0)]  # yapf: disable
        if place == len(out):
            out += struct.pack("<4s5H3L2H", *local) + fault.get("local_name", raw)[:len(raw)].ljust(len(raw), b"x")
            out += b"\0" * fault.get("extra", 0) + data
        directory += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, fault.get("flags", 0), fault.get("method", 0), 0, 0,
                                 fault.get("crc", crc), fault.get("size", size), fault.get("size", size), len(raw), 0, 0, 0,
                                 0, 0, (place + fault.get("shift", 0)) & 0xFFFFFFFF) + raw  # yapf: disable
    start, count = len(out) + end.get("shift", 0), (len(parts) + end.get("count", 0)) & 0xFFFF
    out += directory
    if end.get("zip64"):
        out += struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), start)
        out += struct.pack("<4sLQL", b"PK\x06\x07", 0, len(out) - 56 + end["zip64"] - 1, 1)
    comment = end.get("comment", b"")
    out += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), max(start, 0),
                       len(comment)) + comment
    return bytes(out + end.get("after", b""))


def make_archive(chance: random.Random) -> bytes:
    """Return an archive of a checkpoint with some faults in its structure."""
    parts: list[Part] = [(name, data, {}) for name, data in records_of(chance.choice(bases())).items()]
    end: dict[str, Any] = {}
    for _ in range(chance.choice([0, 1, 1, 1, 2, 3])):
        index = chance.randrange(len(parts))
        name, data, fault = parts[index]
        root, _, rest = name.partition("/")
        other = bytes(chance.randrange(256) for _ in data[:64]) + data[64:]
        match chance.randrange(12):
            case 0:  # once more, with other bytes
                parts.insert(chance.randrange(len(parts) + 1), (name, other, {}))
            case 1:
                parts.insert(chance.randrange(len(parts) + 1), (chance.choice(["other/", ""]) + rest, other, {}))
            case 2:
                parts[index] = (f"{root}/{rest.swapcase()}", data, fault)
            case 3:
                parts.append((name.swapcase() if chance.random() < 0.5 else f"{root}/{rest.upper()}", other, {}))
            case 4:
                fault["same"] = chance.randrange(8)
            case 5:
                fault[chance.choice(["local_size", "local_crc", "size", "crc"
                                     ])] = chance.choice([0, 1,
                                                          len(data) - 1 & 0xFFFFFFFF,
                                                          len(data) + 1, 0xFFFFFFFF])
            case 6:
                fault["local_name"] = chance.choice(parts)[0].encode("latin1", "replace")
            case 7:
                fault["flags"] = chance.choice([1, 8, 2048, 8 | 2048])
            case 8:
                fault["shift"] = chance.choice([-1, 1, 64, -64])
            case 9:
                parts.pop(index) if len(parts) > 1 else None
            case 10:
                fault["method"] = chance.choice([0, 8, 12])
            case 11:
                end |= chance.choice([{"before": b"x" * chance.choice([1, 100])}, {"after": b"x"}, {"comment": b"PK\x05\x06"},
                                      {"comment": b"c" * 30}, {"shift": chance.choice([-1, 1])},
                                      {"count": chance.choice([-1, 1])}, {"zip64": chance.choice([1, 1, 2])}])  # yapf: disable
    if chance.random() < 0.3:
        chance.shuffle(parts)
    return write_archive(parts, end)


# Pickles


def make_pickle(chance: random.Random) -> bytes:
    """Return an archive whose pickle has some opcodes changed, and no checksum that gives it away."""
    records = records_of(chance.choice(bases()))
    name = next(name for name in records if name.endswith("/data.pkl"))
    records[name] = mutated_pickle(records[name], chance)
    return write_archive([(name, data, {}) for name, data in records.items()], {})


def mutated_pickle(data: bytes, chance: random.Random) -> bytes:
    """Return a pickle with opcodes changed, dropped, repeated, exchanged or put in."""
    places = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    ops = [data[a:b] for a, b in itertools.pairwise(places)]
    for _ in range(chance.choice([0, 1, 1, 1, 1, 2, 3, 8])):
        at = chance.randrange(1, len(ops))
        match chance.randrange(9):
            case 0:
                del ops[at]
            case 1:
                ops.insert(at, chance.choice(ops))
            case 2:
                other = chance.randrange(1, len(ops))
                ops[at], ops[other] = ops[other], ops[at]
            case 3 | 4 | 5:  # a number or a text becomes another
                numbers = [
                    i for i, op in enumerate(ops) if op[:1] in (b"K", b"M", b"J", b"X", b"\x88", b"\x89", b"N", b")")
                ]
                ops[chance.choice(numbers)] = _pickled(chance.choice(INTERESTING))
            case 6:
                ops[at:at] = [b"K\x01", b"2\x86" * chance.choice([2, 60])]  # DUP, TUPLE2: 2^60 leaves
            case 7:
                numbers = [i for i, op in enumerate(ops) if op[:1] == b"c"]
                ops[chance.choice(numbers)] = ops[chance.choice(numbers)]
            case 8:
                ops[at] = _pickled(chance.choice(INTERESTING)) + b"2\x86" * 60
    return b"".join(ops)


def _pickled(value: Any) -> bytes:
    import pickle
    if isinstance(value, str):
        raw = value.encode("utf-8", "surrogatepass")
        return b"X" + len(raw).to_bytes(4, "little") + raw
    return pickle.dumps(value, 2)[2:-1]


def judge(data: bytes, folder: Path) -> bool:
    """Let the merger read an archive, and torch what the merger accepted; both must see the same tensors."""
    import torch
    import torch.distributed.tensor
    from merger import MergeError
    from merger.checkpoint import read_checkpoint
    from merger.copying import Sources
    from merger.discover import find_checkpoint
    path = folder / RANK
    path.write_bytes(data)
    try:
        checkpoint = read_checkpoint(find_checkpoint([str(folder)]))
        with Sources(checkpoint) as sources:
            ours = {name: sources.read_tensor(tensor) for name, tensor in checkpoint.tensors.items()}
    except MergeError as error:
        _one_line(str(error))
        return False
    try:
        theirs = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:
        theirs = torch.load(path, weights_only=False,
                            map_location="cpu")  # names that the merger knows, or it had refused
    found = {name: getattr(value, "_local_tensor", value) for name, value in theirs.items()}
    assert set(found) == set(ours), (sorted(found), sorted(ours))
    for name, value in found.items():
        assert tuple(theirs[name].shape) == ours[name].shape, (name, theirs[name].shape, ours[name].shape)
        same = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == ours[name].tobytes()
        assert same and str(value.dtype) == f"torch.{ours[name].dtype}", name
    return True


def _one_line(text: str) -> None:
    assert text and text.isprintable(), repr(text)


# Distributed checkpoints


@lru_cache(maxsize=1)
def saved_dcp() -> tuple[bytes, bytes]:
    """Return the `.metadata` and the `.distcp` file of a checkpoint that torch saved without other ranks."""
    import pickle
    import tempfile

    import torch
    import torch.distributed.checkpoint as dcp
    warnings.simplefilter("ignore")
    whole = torch.arange(24.0).reshape(6, 4)
    with tempfile.TemporaryDirectory() as place:
        dcp.save({"model": {"a.weight": whole, "b": torch.arange(5), "c": torch.tensor(True)}, "step": 3},
                 checkpoint_id=place, no_dist=True)  # yapf: disable
        metadata = pickle.loads((Path(place) / ".metadata").read_bytes())  # in the protocol that the mutations know
        return pickle.dumps(metadata, 2), (Path(place) / "__0_0.distcp").read_bytes()


def make_dcp(chance: random.Random) -> bytes:
    """Return the length of a `.metadata`, that, and a `.distcp` file, with faults in one of them."""
    metadata, data = saved_dcp()
    if chance.random() < 0.7:
        metadata = mutated_pickle(metadata, chance)
    else:
        changed = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 8])):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        data = bytes(changed[:chance.choice([len(data), len(data), chance.randrange(len(data))])])
    return len(metadata).to_bytes(8, "little") + metadata + data


def judge_dcp(data: bytes, folder: Path) -> bool:
    """Let the merger read a distributed checkpoint, and torch the tensors that it accepted; both must see the same ones."""
    import torch
    import torch.distributed.checkpoint as dcp
    from merger import MergeError
    from merger.checkpoint import read_checkpoint
    from merger.copying import Sources
    from merger.discover import find_checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    end = 8 + int.from_bytes(data[:8], "little")
    (folder / ".metadata").write_bytes(data[8:end])
    (folder / "__0_0.distcp").write_bytes(data[end:])
    try:
        checkpoint = read_checkpoint(find_checkpoint([str(folder)]))
        with Sources(checkpoint) as sources:
            ours = {name: sources.read_tensor(tensor) for name, tensor in checkpoint.tensors.items()}
    except MergeError as error:
        _one_line(str(error))
        return False
    whole = dcp.FileSystemReader(folder).read_metadata()
    theirs = {}
    for key, stated in whole.state_dict_metadata.items():
        path = (whole.planner_data or {}).get(key)
        plain = path if isinstance(path, tuple) and all(type(part) in (str, int) for part in path) else ()
        name = str(plain[-1]) if plain else key  # others may be endless as text
        if name in ours and isinstance(stated, TensorStorageMetadata):
            theirs[key] = name, torch.empty(stated.size, dtype=stated.properties.dtype)
    assert {name for name, _ in theirs.values()} == set(ours), set(ours) - {name for name, _ in theirs.values()}
    asked = {key: tensor for key, (_, tensor) in theirs.items()}
    try:
        dcp.load(asked, checkpoint_id=folder, no_dist=True)
    except dcp.api.CheckpointException as error:  # derives from BaseException
        raise AssertionError(str(error)) from None
    for key, (name, _) in theirs.items():
        value = asked[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert tuple(asked[key].shape) == ours[name].shape and value == ours[name].tobytes(), name
    return True


# JSON


def any_json(chance: random.Random, depth: int = 0) -> Any:
    """Return a random value, of JSON and of what Python writes as JSON."""
    if depth > 3 or chance.random() < 0.6:
        return chance.choice([*INTERESTING, 1e308, float("nan"), float("inf"), [], {}, "float32", ["Qwen2ForCausalLM"]])
    if chance.random() < 0.5:
        return [any_json(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {chance.choice(["a", "r", "\x1b", "text_config", "dtype"]): any_json(chance, depth + 1) for _ in range(3)}


def changed_json(document: Any, chance: random.Random) -> Any:
    """Return `document` with a random value at a random place."""
    if isinstance(document, (dict, list)) and document and chance.random() < 0.85:
        copy = document.copy()
        key = chance.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        copy[key] = changed_json(copy[key], chance)
        return copy
    return any_json(chance)


def make_json(chance: random.Random) -> bytes:
    """Return the name of a reader's file, a line break, and a document for it."""
    name = chance.choice(list(readers()))
    text = json.dumps(changed_json(readers()[name][0], chance))
    match chance.randrange(8):
        case 0:
            depth = chance.choice([10, 63, 64, 65, 1000, 200_000])
            text = chance.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth])
        case 1:
            text = text.replace("}", ', "a": 1, "a": 2}', 1)
        case 2:
            text = text.replace("1", "1" * chance.choice([63, 65, 5000, 100_000]), 1)
        case 3:
            at = chance.randrange(len(text) + 1)
            text = text[:at] + chance.choice(["", "\0", "{", '"', "\ufeff", "1e999", "NaN"
                                              ]) + text[at + chance.randrange(3):]
    return f"{name}\n{text}".encode("utf-8", "surrogatepass")


@lru_cache(maxsize=1)
def readers() -> dict[str, tuple[Any, Callable[[Path], object]]]:
    """Return, by the name of a file, a document of its kind and what reads it in a checkpoint or model folder."""
    from merger import hub, modelconfig, verify
    from merger.discover import RankFiles
    from merger.job import Options, lay_out
    from merger.lora import read_lora
    from merger.record import is_whole, read_record, same_merge
    files = lambda folder: RankFiles((folder, ), 1, {})  # noqa: E731

    def config(folder: Path) -> None:
        found = modelconfig.read_config(folder)
        modelconfig.for_critic(found, ["score.weight"])
        modelconfig.without_quantization(found, {"a": "float32"})
        modelconfig.tied_by_config(modelconfig.untied(found), ["lm_head.weight", "model.embed_tokens.weight"])
        modelconfig.dump_json(modelconfig.with_dtype(found, "bfloat16")).encode()
        with merged_nothing():
            lay_out(Options((str(folder), )), _checkpoint(folder).files, folder / "out", folder, _checkpoint(folder))

    def record(folder: Path) -> None:
        found = read_record(folder)
        same_merge(Options((str(folder), )), files(folder), folder)
        is_whole(found, folder)
        hub.model_card(hub.public_record(found))

    def adapter(folder: Path) -> None:
        from merger.lora import adapter_config
        checkpoint = _lora_checkpoint(folder)
        found = read_lora(checkpoint.tensors, checkpoint.files, None)
        adapter_config(found, checkpoint.tensors, None)

    def fsdp(folder: Path) -> None:
        from merger.discover import find_checkpoint
        (folder / RANK).touch()
        find_checkpoint([str(folder)])

    peft = {"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", "peft_type": "LORA", "use_rslora": False, "bias": "none",
            "target_modules": ["q"], "rank_pattern": {}, "init_lora_weights": True}  # yapf: disable
    requested: dict[str, Any] = {
        "dtype": "bfloat16",
        "lora": None,
        "model_key": None,
        "lora_alpha": None,
        "tied_weights": None,
        "allow": []
    }
    return {
        "config.json": ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "float32",
                         "tie_word_embeddings": True, "text_config": {"dtype": "float32"}, "vocab_size": 8,
                         "num_hidden_layers": 2, "_name_or_path": "a/b", "quantization_config": {"quant_method": "fp8"}}, config),
        "fsdp_config.json": ({"FSDP_version": 2, "world_size": 1}, fsdp),
        "lora_train_meta.json": ({"r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}, adapter),
        "lora_adapter/adapter_config.json": (peft, adapter),
        "merge.json": ({"requested": requested, "sources": [{"file": "x", "folder": "/a/b", "rank": 0, "bytes": 1, "modified": 2}],
                        "files": [{"name": "model.safetensors", "bytes": 8}], "meshes": [{"fsdp": 2}], "tensors": 1,
                        "parameters": 2, "dtype": "bfloat16", "world_size": 1, "nan": 0, "inf": 0, "base_model": None,
                        "model_check": "x", "fused": 0}, record),
        "model.safetensors.index.json": ({"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00002.safetensors"}},
                                         lambda folder: verify.read_folder(folder)),
        "model.safetensors": ({"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
                              lambda folder: verify.read_folder(folder)),
    }  # yapf: disable


def _checkpoint(folder: Path) -> Any:
    """Return a checkpoint of one rank with tied tensors, of which no byte is read."""
    return _described(folder, {"lm_head.weight": (8, 4), "model.embed_tokens.weight": (8, 4)})


def _lora_checkpoint(folder: Path) -> Any:
    return _described(folder, {"base_model.model.q.lora_A.weight": (2, 4), "base_model.model.q.lora_B.weight": (8, 2)})


def _described(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Any:
    import numpy as np
    from merger.checkpoint import Checkpoint, Layout, Tensor
    from merger.discover import RankFiles
    from merger.layout import Box
    tensors = {
        name: Tensor(name, "float32", shape, Layout(((0, Box((0, 0), shape)), ), ((0, Box((0, 0), shape)), ), ()), index, name)
        for index, (name, shape) in enumerate(shapes.items())
    }  # yapf: disable
    files = RankFiles((folder, ), 1, {0: folder / RANK})
    return Checkpoint(files, tensors, {0: np.zeros(len(tensors), np.int64)}, {0: 1}, [])


@contextlib.contextmanager
def merged_nothing() -> Iterator[None]:
    """Answer the question for transformers' opinion with none: it has its own process and limits."""
    from unittest import mock

    from merger import model_check
    with mock.patch.object(model_check, "ask", lambda *_: model_check.Verdict(unknown="not asked")):
        yield


def check_json(data: bytes, folder: Path) -> bool:
    """Let a reader read a document: it takes it, or refuses it in one line."""
    from merger import MergeError
    first, _, text = data.partition(b"\n")
    name = first.decode()
    place = folder / name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 8 if name == "model.safetensors" else text)
    try:
        readers()[name][1](folder)
    except MergeError as error:
        _one_line(str(error).replace(str(folder), ""))
        return False
    return True


# Text


def make_text(chance: random.Random) -> bytes:
    """Return text with what moves cursors, ends lines, turns reading around or means something in a page."""
    pieces = ["\x1b[2J", "\x1b]0;x\x07", "\r", "\n", "\x9b31m", "\u202e", "\u2066", "\u2028", "\x00", "\x7f", "|", "<b>", "`", "](x)",
              "&", "[bold]", "[/]", "merge: /safe is complete and verified", "ä", "漢", " ", "\ufeff", "\u0085", "#", "---"]  # yapf: disable
    return "".join(chance.choice(pieces) if chance.random() < 0.6 else chr(chance.randrange(1, 0x3000))
                   for _ in range(chance.randrange(1, 30))).encode()  # yapf: disable


def check_text(data: bytes, folder: Path) -> bool:
    """Let every printer print the text: no line more than there should be, and nothing that a terminal acts on."""
    from merger import cli, hub, show
    text = data.decode()
    for lines, print_it in ((1, lambda: show.say(text)), (1, lambda: cli._fail(text)),
                            (None, lambda: show.print_table("title", [(text, text), (text, [text, text])])),
                            (None, lambda: show.print_tensors([show.Kind(text, (2, ), "float32")]))):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            print_it()
        seen = out.getvalue()
        assert all(line.isprintable() for line in seen.split("\n")), repr(seen)
        assert lines is None or seen.count("\n") == lines, repr(seen)
    record = {"base_model": text, "meshes": [{text: 2}], "tensors": 1, "parameters": 1, "dtype": text, "world_size": 1, "nan": 0,
              "inf": 0}  # yapf: disable
    plain = {**record, "base_model": None, "meshes": [{"m": 2}], "dtype": "d"}
    card = hub.model_card(record)
    assert card.isascii() or all(line.isprintable() for line in card.split("\n"))
    assert card.count("\n") == hub.model_card(plain).count("\n") and "<" not in card, card
    return True


def targets() -> dict[str, Target]:
    """Return the merger's targets."""
    return {
        "merger.archive": Target(make_archive, judge, bases),
        "merger.pickle": Target(make_pickle, judge, bases),
        "merger.dcp": Target(make_dcp, judge_dcp, saved_dcp),
        "merger.json": Target(make_json, check_json),
        "merger.text": Target(make_text, check_text),
    }
