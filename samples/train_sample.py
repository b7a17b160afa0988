#!/usr/bin/env python3
"""Train a tiny byte-level agent on conversations: real FSDP, one process a rank, on the CPU and offline.

    python samples/train_sample.py --data lessons.jsonl --save-dir saves/sample/actor --reference reference.safetensors

The data has one JSON object a line, `{"messages": [{"role": …, "content": …}, …]}`; the model learns what the
assistant says, except where a message has `"weight": 0` (`invoke eval.conversations` writes such a file from the
records of a run). The checkpoint is laid out
as sample_checkpoint.py's; the reference holds the trained weights whole, gathered by torch. What is learned is good
for a demonstration: some 100,000 parameters read the last observation and repeat or weigh what it says.

Needs what sample_checkpoint.py needs.
"""
from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sample_checkpoint as ranks

if TYPE_CHECKING:
    import torch

Message = dict[str, Any]

IGNORED = -100  # a label that torch's cross entropy passes over


@dataclass(frozen=True)
class Lessons:
    """How to train.

    Attributes:
        data: file with the conversations.
        steps: optimizer steps.
        batch: windows of one step and rank.
        window: rounds of a conversation that are learned at once, at most. It begins with one and grows: short
            conversations teach soonest that the last observation counts.
        rate: highest learning rate.
        before: folder for a checkpoint of the weights before the first step; None for none.
    """
    data: Path
    steps: int
    batch: int
    window: int
    rate: float
    before: Path | None


def read_conversations(path: Path) -> list[list[Message]]:
    """Return the messages of each line.

    Raises:
        ValueError: the file has no conversation, or a line is none.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            messages = json.loads(line)["messages"]
            rounds = [messages[index]["content"] for index in answers(messages)]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} line {number} is no conversation; write it like "
                             '{"messages": [{"role": "user", "content": "…"}, …]}') from None
        if rounds:
            found.append(messages)
    if not found:
        raise ValueError(f"{path} has no conversation with an assistant in it; give another --data")
    return found


def answers(messages: list[Message]) -> list[int]:
    """Return where the messages to be learned are."""
    return [index for index, one in enumerate(messages) if one["role"] == "assistant" and one.get("weight") != 0]


def window(messages: list[Message], rounds: int, rng: random.Random) -> list[Message]:
    """Return some consecutive rounds, 1 to `rounds` of them, each an observation and the answer to it.

    The first round comes with all that stands before it.
    """
    places = answers(messages)
    count = min(rng.randint(1, rounds), len(places))
    first = rng.randrange(len(places) - count + 1)
    return messages[places[first] - 1 if first else 0:places[first + count - 1] + 1]


def encode(tokenizer: Any, conversations: list[list[Message]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return token ids, attention mask and labels, each (conversations, longest); only answers have labels."""
    import torch
    coded = tokenizer.apply_chat_template(conversations,
                                          return_dict=True,
                                          return_assistant_tokens_mask=True,
                                          padding=True,
                                          return_tensors="pt")
    labels = torch.where(torch.as_tensor(coded["assistant_masks"]) == 1, coded["input_ids"], IGNORED)
    return coded["input_ids"], coded["attention_mask"], labels


def whole(model: torch.nn.Module, sample: ranks.Sample) -> dict[str, torch.Tensor]:
    """Return the unsharded weights, gathered by torch; every rank must call it."""
    # Without another rank there is nothing to shard, and FSDP1's state has plain tensors.
    return {
        name: tensor.full_tensor() if sample.world_size > 1 else tensor
        for name, tensor in ranks.sharded_state(model, sample).items()
    }


def train_rank(rank: int, sample: ranks.Sample, store: str, lessons: Lessons, tokenizer: Any,
               conversations: list[list[Message]]) -> None:
    """Run one rank: shard the model, train it on this rank's draws, write this rank's files."""
    import torch
    with ranks.rank_group(rank, sample, store) as mesh:
        model: Any = ranks.shard(ranks.build_model(sample), sample, mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lessons.rate, betas=(0.9, 0.98), weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer,
                                                        lessons.rate,
                                                        total_steps=lessons.steps,
                                                        pct_start=0.1)
        if lessons.before:
            before = replace(sample, save_dir=lessons.before)
            ranks.save_weights(model, before, rank)
            ranks.save_states(before, rank, optimizer.state_dict(), scheduler.state_dict())
        rng = random.Random(sample.seed * sample.world_size + rank)
        for step in range(1, lessons.steps + 1):
            rounds = 1 + (step - 1) * lessons.window // lessons.steps  # short conversations first
            drawn = [window(rng.choice(conversations), rounds, rng) for _ in range(lessons.batch)]
            ids, mask, labels = encode(tokenizer, drawn)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            model.clip_grad_norm_(1.0)
            optimizer.step()
            scheduler.step()
            if rank == 0 and (step % 100 == 0 or step == lessons.steps):
                print(f"train_sample: step {step} of {lessons.steps}, loss {loss.item():.3f}", flush=True)
        ranks.save_weights(model, sample, rank)
        ranks.save_states(sample, rank, optimizer.state_dict(), scheduler.state_dict())
        weights = whole(model, sample)
        if rank == 0:
            ranks.write_reference(weights, sample.reference)


def train(sample: ranks.Sample, lessons: Lessons, conversations: list[list[Message]]) -> None:
    """Write the trained checkpoint, its reference and, if asked for, the checkpoint before.

    Raises:
        ranks.RankFailed: a rank failed.
    """
    ranks.prepare_ranks()
    import transformers
    model = ranks.build_model(sample)
    for place in filter(None, (sample.save_dir, lessons.before)):
        place.mkdir(parents=True, exist_ok=True)
        ranks.write_huggingface(model, replace(sample, save_dir=place))
        ranks.write_metadata(replace(sample, save_dir=place))
    tokenizer = transformers.AutoTokenizer.from_pretrained(sample.save_dir / "huggingface", local_files_only=True)
    tokenizer.padding_side = "right"
    ranks.run_ranks(train_rank, sample, lessons, tokenizer, conversations)


def parse(arguments: list[str] | None = None) -> tuple[ranks.Sample, Lessons]:
    """Return what the command line asks for."""
    parser = ranks.Parser(prog="train_sample",
                          description="Train a tiny byte-level agent with real FSDP ranks, on the CPU, offline.",
                          formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="conversations, one JSON object a line")
    add("--save-dir", type=Path, required=True, help="directory for the shards and huggingface/; created")
    add("--reference", type=Path, required=True, help="safetensors file for the trained weights, whole")
    add("--before-dir", type=Path, help="also write a checkpoint of the untrained weights here")
    add("--steps", type=int, default=400, help="optimizer steps")
    add("--batch", type=int, default=4, help="windows of one step and rank")
    add("--window", type=int, default=8, help="rounds of a conversation learned at once, at most, towards the end")
    add("--rate", type=float, default=6e-3, help="highest learning rate")
    add("--world-size", type=int, default=4, help="number of ranks")
    add("--seed", type=int, default=0, help="seed of the weights and the draws")
    options = parser.parse_args(arguments)
    sample = ranks.Sample(save_dir=options.save_dir,
                          reference=options.reference,
                          strategy="fsdp1",
                          world_size=options.world_size,
                          mesh_name="fsdp",
                          model="qwen2",
                          dtype="float32",
                          vocab_size=ranks.IMAGE + 1,
                          seed=options.seed,
                          hidden_size=64,
                          layers=2)
    problem = ranks.misuse(sample)
    for name in ("steps", "batch", "window"):
        if getattr(options, name) < 1:
            problem = f"--{name} {getattr(options, name)} is too small; give 1 or more"
    if problem:
        parser.error(problem)
    return sample, Lessons(options.data, options.steps, options.batch, options.window, options.rate, options.before_dir)


def main(arguments: list[str] | None = None) -> int:
    """Run the training; return the exit code."""
    sample, lessons = parse(arguments)
    start = time.perf_counter()
    try:
        conversations = read_conversations(lessons.data)
    except OSError as error:
        return ranks.report("train_sample", f"cannot read --data {lessons.data}: {error.strerror}; give another", 2)
    except ValueError as error:
        return ranks.report("train_sample", str(error), 2)
    code = ranks.run_offline(lambda: train(sample, lessons, conversations), "train_sample", sample.save_dir)
    if not code:
        print(f"train_sample: {len(conversations)} conversations, {lessons.steps} steps on {sample.world_size} ranks; "
              f"shards in {sample.save_dir} ({time.perf_counter() - start:.1f} s)")
    return code


if __name__ == "__main__":
    sys.exit(main())
