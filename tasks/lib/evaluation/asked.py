"""The flags of `invoke eval`: one table, from which come its help, the runner's words and what a container is told.

Marks of a flag:
    travels: how its value gets into a container. An "address" must be no loopback, which would be the container
        itself; a "folder" of saves has another name there; a "file" or a "variable" of this machine is not there.
    endpoint: it is about an endpoint of the user's, which a checkpoint does not have.
"""
from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks.lib.engine.mounts import WORKSPACE, Translation
from tasks.lib.errors import UserError
from tasks.lib.evaluation.plan import loopback_host
from tasks.lib.flags import Value, dashed, flag, marked

PRICES_HELP = "TOML or JSON file with input and output of each model, for a million tokens."
COMPAT_HELP = "Add the figures as AgentGym's own evaluation would count them."
SERVE_WAIT = "600"
# The runner's own, which `invoke eval` says itself: the rows, from which it starts the server, and the project's folder.
SAID = ("environments", "root")


@dataclass(frozen=True)
class Passed:
    """The runner's flags, as typed: an empty one is left to the runner."""
    env: str = flag("Environment, a table of environments.toml (default: $ENV, then searchqa).")
    model: str = flag(
        "Model of the endpoint, or expert or random for demo, or check for any (default: $MODEL, then gpt-4o-mini).",
        endpoint=True)
    base_url: str = flag("OpenAI-compatible endpoint (default: $OPENAI_BASE_URL, then OpenAI's own).", endpoint=True)
    base_url_as: str = flag("Name of the endpoint in the configuration, where its address differs from run to run.",
                            endpoint=True)
    api_version: str = flag("api-version in the address of each request, as Azure wants it (default: none).",
                            endpoint=True)
    header: tuple[str, ...] = flag(
        "NAME=VARIABLE: send this header with what the environment variable holds, as in api-key=AZURE_KEY. Repeatable.",
        (),
        endpoint=True,
        travels="variable")
    server: str = flag(
        "Address of an environment server (default: the one that is up, else one is started and stopped).",
        travels="address")
    max_round: str = flag("Completions of one episode, at most (default: $MAX_ROUND, then the environment's own).")
    items: str = flag(
        "FILE, 0-99 or demo_3,demo_5 (default: AgentEval's list, AgentItemId's or the environment's first).",
        travels="file")
    limit: str = flag("Play at most so many items (default: all).")
    samples: str = flag("Attempts at each item, for Avg@k and Pass@k (default: 1).")
    concurrency: str = flag("Episodes at once, or auto: as many as bring more answers a second, fewer at a 429 "
                            "(default: the environment's own).")
    seed: str = flag("Make draws repeatable (default: none).")
    shuffle_seed: str = flag("Shuffle the items with this seed before --limit (default: not shuffled).")
    temperature: str = flag("0 to 5, or none to leave it out (default: 1.0).")
    top_p: str = flag("0 to 1 (default: left out).")
    max_tokens: str = flag("Tokens of one completion, 0 to leave it out (default: 4096).")
    context_length: str = flag(
        "Tokens of the model's context, where its endpoint does not watch it (default: it does).")
    extra_body: str = flag("JSON object with further fields of the request (default: none).")
    keep_think: bool = flag(
        "Leave a thought (<think>...</think>) in the answer, as upstream does (default: kept apart).", False)
    finish_reason: tuple[str, ...] = flag(
        "A finish_reason of the endpoint's whole answers that is not known here. Repeatable.", ())
    stream: bool = flag("Ask for answers in pieces, for endpoints that give them in no other way.", False)
    max_answer: str = flag("MB of one answer of the environment or the endpoint, unpacked (default: 64).")
    token_limit: str = flag("Tokens of an episode, prompts and completions (default: no limit).")
    time_limit: str = flag("Seconds of an episode (default: 3600).")
    env_timeout: str = flag("Seconds for one request to the environment (default: 300).")
    env_wait: str = flag("Seconds to wait for an environment server that is away (default: 60).")
    tries: str = flag("Starts of an item when the environment fails (default: 3).")
    request_timeout: str = flag("Seconds for one completion (default: 600).")
    model_tries: str = flag("Tries for one completion (default: 8).")
    max_error_rate: str = flag("Share of infrastructure errors above which the exit code is 1 (default: 0.02).")
    out: str = flag("The run's folder (default: saves/eval/ENV-MODEL-HASH, so the same command resumes).",
                    travels="folder")
    fresh: bool = flag("Replace an earlier run in that folder, once the model answers, in place of resuming it.", False)
    resume: bool = flag("Go on with the run in that folder, and fail where there is none.", False)
    agentgym: str = flag("AgentGym checkout with the prompts (default: $AGENTGYM_SRC, then the image's).",
                         travels="file")
    prompt: str = flag("File with a prompt of your own (default: AgentGym's, where its source is at hand).",
                       travels="file")
    plain_prompt: bool = flag("Use this project's own plain prompt.", False)
    quiet: bool = flag("Of the run, one line with the numbers, and faults.", False)
    check: bool = flag("Start and play nothing, and only say what is wrong with these words.", False)
    prices: str = flag(PRICES_HELP, travels="file")
    upstream_compat: bool = flag(COMPAT_HELP, False)


@dataclass(frozen=True)
class Asked(Passed):
    """The flags of `invoke eval`, as typed: the runner's, and those of what is started for it."""
    checkpoint: str = flag(
        "Folder with shards, or a Hugging Face model: it is merged if need be, served and evaluated.")
    engine: str = flag(
        "What serves the checkpoint: vllm, transformers, or auto: vllm where it is and finds a CUDA GPU.", "auto")
    serve_wait: str = flag(f"Seconds until the checkpoint's server must answer (default: {SERVE_WAIT}).", SERVE_WAIT)
    gpus: str = flag("With --runner docker, GPUs of merger and server: all, none, or 0,1 (default: $GPUS, then all).")
    runner: str = flag("local (this Python), docker (the eval image), or auto: local where its packages are installed.",
                       "auto")
    wait: str = flag("Seconds until a server that is started must be ready (default: 120).", "120")
    i_understand: bool = flag("Agree to what the environment does to real accounts; it says what when this is missing.",
                              False)

    def header_variables(self) -> list[str]:
        """Return the variables whose values are sent in headers."""
        return [one.partition("=")[2] for one in self.header]

    def check_checkpoint(self) -> None:
        """Refuse what a checkpoint has no use for, and what has no use without one.

        Raises:
            UserError: in one line.
        """
        needless = [dashed(name) for name in marked(Passed, "endpoint") if getattr(self, name)]
        if self.checkpoint and needless:
            raise UserError(f"--checkpoint {self.checkpoint} is served under a name and an address of its own; "
                            f"leave out {needless[0]}")
        if not self.checkpoint and (self.engine != "auto" or self.gpus or self.serve_wait != SERVE_WAIT):
            raise UserError("--engine, --gpus and --serve-wait are about the server of a --checkpoint; leave them out")


def in_container(typed: Mapping[str, Value], root: Path) -> dict[str, Value]:
    """Return the runner's flags with the container's names, for `--runner docker`.

    Args:
        root: the project's folder.

    Raises:
        UserError: one means something that the container does not see.
    """
    found = dict(typed)
    for name, how in marked(Passed, "travels").items():
        value = typed.get(name)
        if not value:
            continue
        if how == "variable":
            raise UserError(f"{dashed(name)} sends what a variable of this machine holds, which the container does not "
                            "get; use --runner local")
        if how == "address":
            refuse_loopback(dashed(name), str(value))
        if how == "folder":
            found[name] = _inside_saves(str(value), root)
        if (how == "file" and os.path.exists(str(value))) or not found[name]:
            raise UserError(f"--runner docker reads AgentEval, AgentItemId and writes below saves, so {dashed(name)} "
                            f"{value} is out of its reach; for other files and folders use --runner local")
    return found


def refuse_loopback(name: str, address: str) -> None:
    """Refuse an address that in a container is the container.

    Raises:
        UserError: it is one.
    """
    if host := loopback_host(address):
        raise UserError(f"{host}, the host of {name}, would be the container itself; give an address that it can "
                        "reach, or use --runner local")


def _inside_saves(folder: str, root: Path) -> str:
    """Return the container's name of a folder in saves, which it sees; empty for any other folder."""
    inside = Translation(root).output(folder)
    return inside if inside.startswith(f"{WORKSPACE / 'saves'}/") else ""
