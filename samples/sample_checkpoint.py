#!/usr/bin/env python3
"""Write a small checkpoint as verl writes them: real FSDP, one process a rank, on the CPU and offline.

    python samples/sample_checkpoint.py --save-dir saves/sample/actor --reference saves/sample/reference.safetensors

The directory gets what `verl/utils/checkpoint/fsdp_checkpoint_manager.py` leaves in `global_step_N/actor`: for each rank
`{model,optim,extra_state}_world_size_W_rank_R.pt`, and `huggingface/` with config and tokenizer. The reference holds the
same weights whole, so that a merge can be compared with it bit for bit. The weights are random and of no other use.

Needs torch (2.4 or newer), transformers, safetensors and tokenizers; `--model lora` needs peft too.
"""
from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import random
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from torch import nn

STRATEGIES = ("fsdp1", "fsdp2", "hsdp", "fsdp2-tp", "sharded-tensor")
MODELS = ("qwen2", "qwen2-tied", "critic", "moe", "vision", "buffers", "lora")
DTYPES = ("float32", "bfloat16", "float16")

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")  # ids 256 to 259, after the bytes
PAD, BOS, EOS, IMAGE = range(256, 260)
# ChatML without what a model that reads bytes can spare. What stands between the generation marks is to be learned:
# return_assistant_tokens_mask of transformers tells it. An answer of weight 0 was given to the model, not by it.
CHAT_TEMPLATE = ("{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
                 "{% if message['weight'] == 0 %}{{ message['content'] }}<|im_end|>"
                 "{% else %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% endif %}"
                 "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

IMAGE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 28},
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}  # yapf: disable

LORA_RANK, LORA_ALPHA = 8, 16
CONTEXT = 4096  # tokens

# Column-parallel layers split the rows of a weight (out, in), row-parallel ones its columns; an embedding (vocabulary,
# hidden) is split by vocabulary. q/k/v biases follow their weights.
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
ROW_PARALLEL = ("o_proj", "down_proj", "embed_tokens")


@dataclass(frozen=True)
class Sample:
    """What to write; hashable, so that the model built from it can be cached."""
    save_dir: Path
    reference: Path
    strategy: str
    world_size: int
    mesh_name: str
    model: str
    dtype: str
    vocab_size: int
    seed: int
    hidden_size: int
    layers: int

    @property
    def mesh(self) -> dict[str, int]:
        """Names and sizes of the device mesh's dimensions; empty where FSDP runs without a mesh."""
        pairs = self.world_size // 2
        meshes = {"hsdp": {"ddp": 2, self.mesh_name: pairs}, "fsdp2-tp": {self.mesh_name: pairs, "tp": 2}}
        return {} if self.strategy == "sharded-tensor" else meshes.get(self.strategy, {self.mesh_name: self.world_size})

    def shard_file(self, kind: str, rank: int) -> Path:
        return self.save_dir / f"{kind}_world_size_{self.world_size}_rank_{rank}.pt"


def installed(package: str) -> bool:
    return find_spec(package) is not None


def misuse(sample: Sample) -> str | None:
    """Say what is wrong with a request and how to mend it; None if nothing is."""
    world_size = sample.world_size
    if world_size < 1:
        return f"--world-size; {world_size}; give 1 or more"
    if sample.strategy in ("hsdp", "fsdp2-tp") and (world_size < 4 or world_size % 2):
        return f"--strategy {sample.strategy} needs a two-dimensional mesh; --world-size {world_size}; give 4, 6, 8, ..."
    if not sample.mesh_name.isidentifier() or sample.mesh_name in ("ddp", "tp"):
        return f"--mesh-name; {sample.mesh_name!r}; give a name such as fsdp or dp_shard (ddp and tp are taken)"
    if sample.strategy == "fsdp2-tp" and installed("torch") and version("torch").startswith("2.4."):
        return f"--strategy fsdp2-tp; torch {version('torch')} refuses its state dict; install torch 2.5 or newer"
    if sample.hidden_size < 64 or sample.hidden_size % 64:
        return f"--hidden-size; {sample.hidden_size}; give a multiple of 64 (attention heads are 32 wide, in pairs)"
    if sample.layers < 1:
        return f"--layers; {sample.layers}; give 1 or more"
    if sample.vocab_size <= IMAGE:
        return f"--vocab-size; {sample.vocab_size}; give {IMAGE + 1} or more (256 bytes and the special tokens)"
    if sample.model == "lora" and not installed("peft"):
        return "--model lora needs peft; not installed; run `pip install peft` or leave out --model lora"
    if sample.save_dir.exists() and not sample.save_dir.is_dir():
        return f"--save-dir is not a directory; {sample.save_dir}; give another"
    if sample.reference.is_dir():
        return f"--reference is a directory; {sample.reference}; give a file name ending in .safetensors"
    for path in sorted(sample.save_dir.glob("model_world_size_*_rank_*.pt")):
        if not path.name.startswith(f"model_world_size_{world_size}_"):
            return f"--save-dir holds a shard of another world size; {path}; remove it or give another --save-dir"
    return None


# The model


def model_config(sample: Sample) -> Any:
    """Return the transformers configuration of a tiny model; the head is tied only in `qwen2-tied`."""
    import transformers

    heads = sample.hidden_size // 32
    text: dict[str, Any] = {
        "vocab_size": sample.vocab_size,
        "hidden_size": sample.hidden_size,
        "intermediate_size": 2 * sample.hidden_size,
        "num_hidden_layers": sample.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "sliding_window": None,  # unused, but transformers 4 warns of its default
        "tie_word_embeddings": sample.model == "qwen2-tied",
    }
    if sample.model == "critic":
        text["num_labels"] = 1
    if sample.model == "moe":
        return transformers.Qwen2MoeConfig(num_experts=6,
                                           num_experts_per_tok=2,
                                           moe_intermediate_size=sample.hidden_size // 2,
                                           shared_expert_intermediate_size=sample.hidden_size,
                                           **text)
    if sample.model == "vision":
        vision = transformers.CLIPVisionConfig(hidden_size=64,
                                               intermediate_size=128,
                                               num_hidden_layers=2,
                                               num_attention_heads=2,
                                               image_size=28,
                                               patch_size=14,
                                               projection_dim=64)
        return transformers.LlavaConfig(vision_config=vision,
                                        text_config=transformers.Qwen2Config(**text),
                                        image_token_index=IMAGE,
                                        image_seq_length=4,
                                        tie_word_embeddings=False)
    return transformers.Qwen2Config(**text)


def randomize(model: nn.Module, seed: int) -> None:
    """Give all weights seeded random values: among ones and zeros a mix-up of shards would not show."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.1, generator=generator)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)


def add_buffers(model: nn.Module) -> None:
    """Register persistent buffers that a cast to the weights' dtype, or a sum over ranks, would spoil."""
    import torch

    model.register_buffer("steps_seen", torch.tensor(2**53 + 1))  # () int64; no float64 holds it
    model.register_buffer("frozen_rows", torch.arange(7) % 3 == 0)  # (7,) bool
    model.register_buffer("running_mean", torch.arange(1, 6, dtype=torch.float32) / 7)  # (5,) float


@functools.cache
def build_model(sample: Sample) -> Any:
    """Build the model in one piece; cached, so that forked ranks share the parent's memory and time."""
    import torch
    import transformers

    classes = {
        "critic": transformers.Qwen2ForTokenClassification,
        "moe": transformers.Qwen2MoeForCausalLM,
        "vision": transformers.LlavaForConditionalGeneration,
    }
    model = classes.get(sample.model, transformers.Qwen2ForCausalLM)(model_config(sample))
    # verl's critic keeps the name of the causal model that it was made from.
    model.config.architectures = ["Qwen2ForCausalLM" if sample.model == "critic" else type(model).__name__]
    if sample.model == "lora":
        from peft import LoraConfig, TaskType, get_peft_model
        model = get_peft_model(
            model,
            LoraConfig(task_type=TaskType.CAUSAL_LM,
                       r=LORA_RANK,
                       lora_alpha=LORA_ALPHA,
                       target_modules=["q_proj", "v_proj"]))
    randomize(model, sample.seed)
    if sample.model == "buffers":
        add_buffers(model.model)
    return model.to(getattr(torch, sample.dtype))


# The ranks


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks, which verl wraps one by one; the root holds the rest."""
    return [module for name, module in model.named_modules() if re.search(r"\.layers\.\d+$", name)]


def shard(model: nn.Module, sample: Sample, mesh: Any) -> nn.Module:
    """Shard the model over the ranks, the way that the sample's strategy says."""
    return shard_fsdp2(model, sample, mesh) if sample.strategy.startswith("fsdp2") else shard_fsdp1(model, sample, mesh)


def sharded_state(model: nn.Module, sample: Sample) -> dict[str, Any]:
    """Return this rank's pieces: DTensors, or ShardedTensors where FSDP1 runs without a mesh."""
    if sample.strategy.startswith("fsdp2"):
        return model.state_dict()
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import ShardedStateDictConfig, StateDictType
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig()):
        return model.state_dict()


def shard_fsdp1(model: nn.Module, sample: Sample, mesh: Any) -> nn.Module:
    """Wrap the blocks and the root in FSDP1."""
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import ShardingStrategy
    from torch.distributed.fsdp.wrap import CustomPolicy

    chosen = set(blocks(model))
    hybrid = sample.strategy == "hsdp"
    return FSDP(
        model,
        device_mesh=mesh,
        device_id=torch.device("cpu"),  # otherwise FSDP1 asks for CUDA's current device
        sharding_strategy=ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD,
        auto_wrap_policy=CustomPolicy(lambda module: module in chosen),
        use_orig_params=True,  # LoRA trains a part of each block
    )


def shard_fsdp2(model: nn.Module, sample: Sample, mesh: Any) -> nn.Module:
    """Apply `fully_shard` to each block and the root, after tensor parallelism where it is asked for."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:  # torch < 2.6
        from torch.distributed._composable.fsdp import fully_shard

    if "tp" in sample.mesh:
        split_tensors(model, mesh["tp"])
        mesh = mesh[sample.mesh_name]
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def split_tensors(model: nn.Module, mesh: Any) -> None:
    """Split the matrices named in COLUMN_PARALLEL and ROW_PARALLEL over a one-dimensional mesh."""
    from torch import nn
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles = {**dict.fromkeys(COLUMN_PARALLEL, ColwiseParallel()), **dict.fromkeys(ROW_PARALLEL, RowwiseParallel())}
    for name, module in list(model.named_modules()):
        style = styles.get(name.rpartition(".")[2])
        if style and isinstance(module, (nn.Linear, nn.Embedding)):
            parallelize_module(module, mesh, style)


def optimizer_states(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Step AdamW once and return its state and the scheduler's; one parameter has moments, to stay small."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
    smallest = min(trained, key=lambda parameter: parameter.numel(), default=None)  # None: this rank's shards are empty
    if smallest is not None:
        smallest.grad = torch.ones_like(smallest)
    optimizer.step()
    scheduler.step()
    return optimizer.state_dict(), scheduler.state_dict()


@contextmanager
def rank_group(rank: int, sample: Sample, store: str) -> Iterator[Any]:
    """Join the ranks' gloo group and give the device mesh; None where FSDP runs without one."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)  # the ranks share the machine's cores
    hush()
    dist.init_process_group("gloo",
                            init_method=f"file://{store}",
                            rank=rank,
                            world_size=sample.world_size,
                            timeout=timedelta(minutes=5))
    mesh = sample.mesh
    yield init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh)) if mesh else None
    dist.destroy_process_group()


def save_weights(model: nn.Module, sample: Sample, rank: int) -> None:
    """Write this rank's pieces of the weights."""
    import torch

    torch.save(sharded_state(model, sample), sample.shard_file("model", rank))


def save_states(sample: Sample, rank: int, optimizer: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """Write what this rank would go on training with."""
    import numpy as np
    import torch

    torch.save(optimizer, sample.shard_file("optim", rank))
    rng = {"cpu": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}
    torch.save({"lr_scheduler": scheduler, "rng": rng}, sample.shard_file("extra_state", rank))


def save_rank(rank: int, sample: Sample, store: str) -> None:
    """Run one rank: join the group, shard the model, write this rank's three files."""
    with rank_group(rank, sample, store) as mesh:
        model = shard(build_model(sample), sample, mesh)
        save_weights(model, sample, rank)
        save_states(sample, rank, *optimizer_states(model))


def hush() -> None:
    """Silence what the chosen strategies always warn of and no reader can act on."""
    for message in (
            r"FSDP\.state_dict_type\(\) and FSDP\.set_state_dict_type\(\) are being deprecated",
            r"Please use DTensor instead and we are deprecating ShardedTensor",
            r"`_get_pg_default_device` will be deprecated",
            r"Multiple backends are registered with this ProcessGroup",
            r"FSDP is switching to use `NO_SHARD`",  # one rank has nothing to shard
            r"When using ``NO_SHARD`` for ``ShardingStrategy``",
            r".* has both parameters with requires_grad=True and False",  # LoRA; nothing is trained here
            r"`is_gradient_checkpointing` is deprecated",  # peft asks transformers 5 for it
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # names each rank it ends after a failure


# What stands beside the shards


def write_json(path: Path, content: dict[str, Any] | None) -> None:
    """Write a JSON file; None removes what an earlier run may have left there."""
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_reference(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Save a whole state dict, each tensor in its own memory (tied ones under both names)."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(tensors, {"format": "pt"}))  # save_file() would make it unreadable to other users


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are the 256 bytes and SPECIAL_TOKENS.

    The two small files are spelled out because transformers 5 writes a `tokenizer_class` that 4 does not know.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": SPECIAL_TOKENS[0], "bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[2]}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "chat_template": CHAT_TEMPLATE,
            **special,
        })


def write_huggingface(model: Any, sample: Sample) -> None:
    """Write `huggingface/`: all that a merged model needs beside its weights."""
    folder = sample.save_dir / "huggingface"
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("dtype", None)
    write_json(folder / "config.json", {**config, "torch_dtype": sample.dtype})  # the name that every version reads
    generation = getattr(model, "generation_config", None)  # a critic has none
    write_json(folder / "generation_config.json", generation and json.loads(generation.to_json_string()))
    write_json(folder / "preprocessor_config.json", IMAGE_PROCESSOR if sample.model == "vision" else None)
    write_tokenizer(folder)


def write_metadata(sample: Sample) -> None:
    """Write the JSON files that newer verl puts beside the shards."""
    fsdp = {"FSDP_version": 2, "world_size": sample.world_size}
    lora = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "task_type": "CAUSAL_LM"}
    write_json(sample.save_dir / "fsdp_config.json", fsdp if sample.strategy.startswith("fsdp2") else None)
    write_json(sample.save_dir / "lora_train_meta.json", lora if sample.model == "lora" else None)


# The program


class RankFailed(RuntimeError):
    """A rank ended early; the message holds its traceback, and last what it raised."""

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


def write_sample(sample: Sample) -> None:
    """Write the checkpoint and its reference; raises RankFailed, after ending the other ranks, when one fails."""
    prepare_ranks()
    model = build_model(sample)
    sample.save_dir.mkdir(parents=True, exist_ok=True)
    write_reference(model.state_dict(), sample.reference)
    write_huggingface(model, sample)
    write_metadata(sample)
    run_ranks(save_rank, sample)


def prepare_ranks() -> None:
    """Import what the ranks need: importing takes longer than all the rest, and forked ranks need not repeat it."""
    import torch
    import torch.distributed.fsdp

    torch.set_num_threads(1)
    hush()


def run_ranks(rank_program: Callable[..., None], sample: Sample, *arguments: Any) -> None:
    """Run `rank_program(rank, sample, store, *arguments)` once a rank, each in a process of its own.

    Raises:
        RankFailed: one of them failed; the others are ended.
    """
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    method = "fork" if sys.platform == "linux" else "spawn"  # macOS does not bear such forks
    with tempfile.TemporaryDirectory(prefix="sample_checkpoint-") as folder:
        try:
            start_processes(rank_program, (sample, f"{folder}/store", *arguments),
                            nprocs=sample.world_size,
                            start_method=method)
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise RankFailed(error.error_index, str(error)) from None


class Parser(argparse.ArgumentParser):
    """Answers misuse with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: list[str] | None = None) -> Sample:
    parser = Parser(prog="sample_checkpoint",
                    description="Write a small checkpoint as verl writes them: real FSDP ranks, on the CPU, offline.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--save-dir", type=Path, required=True, help="directory for the shards and huggingface/; created")
    add("--reference", type=Path, required=True, help="safetensors file for the same weights, whole")
    add("--strategy", choices=STRATEGIES, default="fsdp1", help="how the weights are sharded")
    add("--world-size", type=int, default=4, help="number of ranks")
    add("--mesh-name", default="fsdp", help="name of the sharded mesh dimension")
    add("--model", choices=MODELS, default="qwen2", help="what is sharded")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")
    add("--vocab-size", type=int, default=1003, help="rows of the embedding; the default divides by no world size")
    add("--seed", type=int, default=0, help="seed of the weights")
    add("--hidden-size", type=int, default=64, help="width of the model, a multiple of 64")
    add("--layers", type=int, default=2, help="number of transformer blocks")
    sample = Sample(**vars(parser.parse_args(arguments)))
    if problem := misuse(sample):
        parser.error(problem)
    return sample


def report(name: str, problem: str, code: int) -> int:
    print(f"{name}: {problem}", file=sys.stderr)
    return code


def run_offline(program: Callable[[], None], name: str, save_dir: Path) -> int:
    """Run `program`, which starts ranks, on the CPU and offline; say in one line what went wrong.

    Returns:
        The exit code: 0, 1 where a rank failed, 2 for what the user can mend, 130 after Ctrl-C.
    """
    # Before torch is imported: no GPU is needed or wanted, and gloo would look up this host's name, which a container
    # without a network cannot.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # four ranks share the cores: who waits sleeps
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        program()
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        return report(
            name, f"{error.name} is missing; {sys.executable}; install torch, transformers, safetensors, "
            "tokenizers", 2)
    except OSError as error:
        return report(name, f"cannot write; {error}; give another --save-dir or --reference", 2)
    except RankFailed as error:
        *trace, cause = str(error).strip().splitlines()
        print(*trace, sep="\n", file=sys.stderr)
        return report(name, f"rank {error.rank} failed; {cause}; {save_dir} is incomplete, try again", 1)
    return 0


def main(arguments: list[str] | None = None) -> int:
    sample = parse(arguments)
    start = time.perf_counter()
    code = run_offline(lambda: write_sample(sample), "sample_checkpoint", sample.save_dir)
    if code:
        return code
    size = sum(sample.shard_file("model", rank).stat().st_size for rank in range(sample.world_size))
    print(f"sample_checkpoint: {sample.model}, {sample.dtype}, {sample.strategy}: "
          f"{sample.world_size} rank{'s' * (sample.world_size > 1)}, "
          f"{size / 1e6:.1f} MB of weights in {sample.save_dir}, reference {sample.reference} "
          f"({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
