"""Makes sharded FSDP1 checkpoints of Qwen2.5's shapes, as verl leaves them in `global_step_N/actor`; also in torch's own forms.

The files are `torch.save` outputs of DTensors that torch made itself, one rank after the other in one process with
torch's "fake" process group; their pickles are byte for byte those of a `gloo` group. The values are one random tile
repeated, from another offset for each tensor, so a swapped rank, row or tensor shows. Beside the checkpoint,
`expected.json` keeps a digest of each tensor as torch casts it to bf16, and as it is: a truth that no merger had a hand in.
Torch's forms (distributed checkpoint, sharded safetensors) are written by its own writers, a process a rank, over gloo.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes over a second to import; merge.py needs only the names and sizes of this module
    from torch import Tensor

FORMAT = 2  # raise it when the files change: a kept checkpoint of another format is made anew
TILE = 1_048_583  # values; a prime, so that no row length or shard length divides it
STD = 0.02  # Qwen2's initializer_range
RANKS, DCP, SHARDED = "ranks", "dcp", "sharded"  # forms of a checkpoint
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Size:
    """Shapes of one model of the Qwen2 family and the number of ranks it is sharded over."""
    world_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of Qwen2ForCausalLM's state dict, by name; with tied heads both are there."""
        head = self.hidden // self.heads
        kv, hidden, inner = head * self.kv_heads, self.hidden, self.intermediate
        layer = {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.q_proj.bias": (hidden, ),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.k_proj.bias": (kv, ),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.v_proj.bias": (kv, ),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden, ),
            "post_attention_layernorm.weight": (hidden, ),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, hidden)}
        for index in range(self.layers):
            shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
        shapes["model.norm.weight"] = (hidden, )
        shapes["lm_head.weight"] = (self.vocab, hidden)
        return shapes

    def shard_bytes(self) -> int:
        """Bytes of all ranks' fp32 weights, without the few KB of pickle in each file."""
        return 4 * sum(_count(shape) for shape in self.shapes().values())

    def output_bytes(self) -> int:
        """Bytes of the bf16 weights, a tied head counted once."""
        twice = self.vocab * self.hidden if self.tied else 0
        return self.shard_bytes() // 2 - 2 * twice


SIZES = {
    "tiny": Size(4, 64, 2, 4, 2, 160, 1003, True),
    "0.5B": Size(4, 896, 24, 14, 2, 4864, 151936, True),
    "1.5B": Size(8, 1536, 28, 12, 2, 8960, 151936, True),
    "7B": Size(8, 3584, 28, 28, 4, 18944, 152064, False),
}


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint: `actor/` holds what a merger reads, `expected` maps names to `[dtype, shape, digest]` in bf16.

    `expected_fp32` does so as the values are; of another form than the ranks' files the folder is `actor/../FORM`.
    """
    actor: Path
    size: Size
    expected: dict[str, list[Any]]
    expected_fp32: dict[str, list[Any]]
    form: str = RANKS

    def shards(self) -> list[Path]:
        if self.form != RANKS:
            return sorted(path for path in self.actor.iterdir() if path.suffix in (".distcp", ".safetensors"))
        return [self.actor / shard_name(self.size.world_size, rank) for rank in range(self.size.world_size)]


def shard_name(world_size: int, rank: int) -> str:
    return f"model_world_size_{world_size}_rank_{rank}.pt"


def find(folder: Path, name: str, form: str = RANKS) -> Checkpoint | None:
    """The checkpoint of size `name` in `folder` if it is there and complete, else None."""
    try:
        record = json.loads((folder / "expected.json").read_text())
        written = form == RANKS or (folder / form / "complete").is_file()
        if record["format"] != FORMAT or record["size"] != name or not written:
            return None
        if any((folder / "actor" / path).stat().st_size != size for path, size in record["files"].items()):
            return None
    except (OSError, ValueError, KeyError):
        return None
    return Checkpoint(folder / ("actor" if form == RANKS else form), SIZES[name], record["tensors"], record["fp32"],
                      form)


def make(folder: Path, name: str) -> None:
    """Write the checkpoint of size `name` into `folder`; takes the time to write its bytes, and torch.

    `expected.json` comes last, so that an interrupted run leaves a folder that `find` does not take for complete.
    """
    size, actor = SIZES[name], folder / "actor"
    (actor / "huggingface").mkdir(parents=True, exist_ok=True)
    (folder / "expected.json").unlink(missing_ok=True)
    for stale in actor.glob("model_world_size_*_rank_*.pt"):
        stale.unlink()
    _write_huggingface(actor / "huggingface", size)
    for rank in range(size.world_size):
        _write_rank(actor / shard_name(size.world_size, rank), size, rank)
        print(f"rank {rank + 1}/{size.world_size} written", file=sys.stderr)
    record = {
        "format": FORMAT,
        "size": name,
        "files": {
            str(path.relative_to(actor)): path.stat().st_size
            for path in actor.rglob("*") if path.is_file()
        },
        **_digests(size),
    }
    (folder / "expected.json").write_text(json.dumps(record, indent=1))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def _offset(name: str) -> int:
    """Where in the tile a tensor begins; the two halves of a tied head begin alike."""
    name = "model.embed_tokens.weight" if name == "lm_head.weight" else name
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % TILE


def _tile() -> Tensor:
    import torch
    return torch.randn(TILE, generator=torch.Generator().manual_seed(20250915)) * STD


def _fill(tile: Tensor, begin: int, count: int) -> Tensor:
    """`count` fp32 values of the endlessly repeated tile from position `begin`, in a storage of their own."""
    import torch
    values, done = torch.empty(count), 0
    while done < count:
        at = (begin + done) % TILE
        step = min(TILE - at, count - done)
        values[done:done + step] = tile[at:at + step]
        done += step
    return values


def _begin(name: str, size: Size) -> int:
    # An untied head must differ from the embedding, or mergers may save it once.
    return _offset(name) + (7 if name == "lm_head.weight" and not size.tied else 0)


def _write_rank(path: Path, size: Size, rank: int) -> None:
    """Save one rank's state dict; rows are dealt as torch.chunk deals them, and an empty shard is normal."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size.world_size, store=FakeStore())
    try:
        state = _rank_state(size, rank)
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # clean pages can be evicted; dirty ones would make a cold run warm
    finally:
        dist.destroy_process_group()


def _rank_state(size: Size, rank: int) -> dict[str, Any]:
    """The state dict of one rank, under the process group that there is."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    mesh = init_device_mesh("cpu", (size.world_size, ), mesh_dim_names=("fsdp", ))
    tile, state = _tile(), {}
    for name, shape in size.shapes().items():
        rows, width = shape[0], _count(shape[1:])
        step = -(-rows // size.world_size)
        first, last = min(rank * step, rows), min((rank + 1) * step, rows)
        local = _fill(tile, _begin(name, size) + first * width, (last - first) * width).view(-1, *shape[1:])
        stride = (width, 1) if len(shape) == 2 else (1, )
        state[name] = DTensor.from_local(local,
                                         mesh, (Shard(0), ),
                                         run_check=False,
                                         shape=torch.Size(shape),
                                         stride=stride)
    return state


def make_form(folder: Path, name: str, form: str) -> None:
    """Write the checkpoint of size `name` into `folder`/`form` by torch's own writer; it holds the weights in memory."""
    import torch.multiprocessing as processes
    shutil.rmtree(folder / form, ignore_errors=True)
    (folder / form).mkdir()
    (folder / "store").unlink(missing_ok=True)
    processes.spawn(_save_form, (folder, SIZES[name], form), SIZES[name].world_size)
    (folder / "store").unlink(missing_ok=True)
    (folder / form / "complete").touch()


def _save_form(rank: int, folder: Path, size: Size, form: str) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    store = dist.FileStore(str(folder / "store"), size.world_size)
    dist.init_process_group("gloo", rank=rank, world_size=size.world_size, store=store)
    path = str(folder / form)
    writer = dcp.FileSystemWriter(path) if form == DCP else dcp.HuggingFaceStorageWriter(path, save_distributed=True)
    dcp.save(_rank_state(size, rank), storage_writer=writer)
    dist.destroy_process_group()


def _digests(size: Size) -> dict[str, dict[str, list[Any]]]:
    """`{name: [type, shape, SHA-256 of the little-endian values]}`: `tensors` rounded to bf16 by torch, `fp32` not."""
    import torch
    tile = _tile()

    def digest(item: tuple[str, tuple[int, ...]]) -> tuple[str, list[Any], list[Any]]:
        name, shape = item
        half, full = hashlib.sha256(), hashlib.sha256()
        for at in range(0, _count(shape), 1 << 22):
            part = _fill(tile, _begin(name, size) + at, min(1 << 22, _count(shape) - at))
            full.update(part.numpy().data)
            half.update(part.to(torch.bfloat16).view(torch.int16).numpy().data)
        return name, ["BF16", list(shape), half.hexdigest()], ["F32", list(shape), full.hexdigest()]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(digest, size.shapes().items()))
    return {"tensors": {name: half for name, half, _ in found}, "fp32": {name: full for name, _, full in found}}


def _write_huggingface(folder: Path, size: Size) -> None:
    """config, generation_config and a byte-level tokenizer, in the form that transformers 4 and 5 both read."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": STD,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": 32768,
        "max_window_layers": size.layers,
        "model_type": "qwen2",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": size.tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": size.vocab,
    }
    files = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": 0,
            "eos_token_id": 0,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.8
        },
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "model_max_length": 32768
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _tokenizer() -> dict[str, Any]:
    """A BPE tokenizer without merges: one token a byte, in GPT-2's printable alphabet for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    special = {"id": 0, "content": END_OF_TEXT, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{
            **special,
            **flags
        }],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {
                token: index
                for index, token in enumerate([END_OF_TEXT, *alphabet])
            },
            "merges": []
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make one sharded FSDP1 checkpoint (merge.py starts this itself).")
    parser.add_argument("--size", choices=SIZES, required=True, help="shapes of the model")
    parser.add_argument("--folder", type=Path, required=True, help="where actor/ and expected.json go")
    parser.add_argument("--form", choices=(RANKS, DCP, SHARDED), default=RANKS, help="the ranks' files, or torch's own")
    options = parser.parse_args()
    try:
        if options.form == RANKS:
            make(options.folder, options.size)
        else:
            make_form(options.folder.resolve(), options.size, options.form)
    except ImportError as error:
        sys.exit(f"{error}: {sys.executable} needs torch and NumPy")
