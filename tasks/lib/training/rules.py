"""The rules that a run must keep, each looked at before anything starts. All of them are pure.

Most are AgentGym-RL's own (paths below its verl/, at 82402a9), where a broken one shows after minutes of loading, in the
middle of the first step, or as a hang. A rule yields a `Finding` for what is wrong, and raises `Undecided` where a fact
is missing: it is then listed as not checked, never as passed.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tasks.lib.training.facts import Facts
from training.retention import Rules

# ppo_trainer.yaml's own values of what the rules read.
DEFAULTS: dict[str, Any] = {
    "data.train_batch_size": 1024,
    "data.max_prompt_length": 2048,
    "data.max_response_length": 2048,
    "data.return_raw_chat": True,
    "data.prompt_key": "item_id",
    "actor_rollout_ref.model.use_remove_padding": False,
    "actor_rollout_ref.actor.strategy": "fsdp",
    "actor_rollout_ref.actor.ppo_mini_batch_size": 256,
    "actor_rollout_ref.actor.ppo_micro_batch_size": None,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": None,
    "actor_rollout_ref.actor.use_dynamic_bsz": False,
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size": 1,
    "actor_rollout_ref.actor.fsdp_config.fsdp_size": -1,
    "actor_rollout_ref.ref.log_prob_micro_batch_size": None,
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 1,
    "actor_rollout_ref.agentgym.task_name": "textcraft",
    "actor_rollout_ref.rollout.dtype": "bfloat16",
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.rollout.max_model_len": 32768,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 2,
    "actor_rollout_ref.rollout.enforce_eager": True,
    "actor_rollout_ref.rollout.free_cache_engine": True,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size": None,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 1,
    "algorithm.adv_estimator": "gae",
    "algorithm.rounds_ctrl.type": "fixed",
    "algorithm.rounds_ctrl.rounds": 15,
    "algorithm.rounds_ctrl.steps_scaling_inter": 100,
    "trainer.total_epochs": 30,
    "trainer.total_training_steps": None,
    "trainer.logger": ["console", "wandb"],
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
    "trainer.save_freq": -1,
    "trainer.remove_previous_ckpt_in_save": False,
}
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
BATCH, MINI = "data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size"
TP, SP = f"{ROLLOUT}.tensor_model_parallel_size", f"{ACTOR}.ulysses_sequence_parallel_size"
MODEL, TASK = "actor_rollout_ref.model.path", "actor_rollout_ref.agentgym.task_name"
ALGORITHMS = ("grpo", "reinforce_plus_plus")
# Why the others of core_algos.py do not train (each seen running, on two CPU ranks; remax read).
BROKEN = {
    "gae": "plays a whole rollout, then dies where the critic's values and the rewards differ in size",
    "rloo": "its trainer raises NotImplementedError",
    "remax": "it reads a key that the rollout does not have",
}
LOGGERS = ("console", "wandb", "mlflow", "swanlab")  # utils/tracking.py
DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")
# utils/agentgym/client.py
TASKS = ("webshop", "alfworld", "babyai", "sciworld", "textcraft", "webarena", "sqlgym", "maze", "wordle", "weather",
         "todo", "movie", "sheet", "academia", "searchqa")
# What vLLM 0.6.3 and verl's loader of its weights both know, for where the image cannot be asked.
ARCHITECTURES = ("AquilaForCausalLM", "AquilaModel", "DeepseekV2ForCausalLM", "GPT2LMHeadModel",
                 "GPTBigCodeForCausalLM", "Gemma2ForCausalLM", "GemmaForCausalLM", "InternLMForCausalLM",
                 "LLaMAForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM",
                 "Qwen2VLForConditionalGeneration", "Starcoder2ForCausalLM")
BYTES_A_PARAMETER = 12  # float32 weights, and Adam's two moments
BYTES_A_WEIGHT, BYTES_MERGED = 4, 2  # of a save without its optimizer, of a merged model in bfloat16
SHM_A_GPU = 1 << 30  # NCCL's buffers and Ray's object store; the service's default is 32 GB
# What the run's folder decides.
RESERVED = ("trainer.default_local_dir", f"{ROLLOUT}.rollout_log_dir", "hydra.run.dir", "trainer.resume_from_path")


class Undecided(Exception):
    """A rule that cannot be looked at, with the reason."""


@dataclass(frozen=True)
class Finding:
    """A rule that the run would break.

    Attributes:
        id: the rule's, for `--skip`.
        expected: what it asks for.
        actual: what is there.
        remedy: what to do.
    """
    id: str
    expected: str
    actual: str
    remedy: str

    def __str__(self) -> str:
        return " ".join(f"{self.id}: {self.actual}; expected {self.expected}; {self.remedy}".split())

    def as_dict(self) -> dict[str, str]:
        """Return it for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """A run as the rules see it.

    Attributes:
        settings: the configuration, by dotted key.
        facts: see there.
        typed: keys that the user typed or a script or preset gave, as far as RESERVED has them.
    """
    settings: Mapping[str, Any]
    facts: Facts = field(default_factory=Facts)
    typed: Collection[str] = ()

    def get(self, key: str) -> Any:
        """Return the value of `key`."""
        return self.settings.get(key, DEFAULTS.get(key))

    def number(self, key: str, least: int = 1) -> int:
        """Return a whole number of the configuration.

        Raises:
            Undecided: it is none; the rule `numbers` says so.
        """
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise Undecided(f"{key} is no whole number of at least {least}")
        return value

    @property
    def world(self) -> int:
        """Number of ranks: nodes times GPUs."""
        return self.number("trainer.nnodes") * self.number("trainer.n_gpus_per_node")

    def batches(self) -> int:
        """Return how many batches an epoch has.

        Raises:
            Undecided: the item list or the batch is not known.
        """
        items = self.facts.items
        if items is None or items.fault:
            raise Undecided("the item list cannot be read")
        return len(items.ids) // self.number(BATCH)

    def total(self) -> int:
        """Return the trainer's total of steps, of which the last is not trained.

        Raises:
            Undecided: the item list is not known.
        """
        total = self.get("trainer.total_training_steps")
        return total if isinstance(total, int) else self.batches() * self.number("trainer.total_epochs")

    def steps(self) -> int:
        """Return how many steps are really trained (rt:865: it counts before it compares, and one is always played).

        Raises:
            Undecided: the item list is not known.
        """
        total = max(1, self.total() - 1)
        try:
            return min(total, self.batches() * self.number("trainer.total_epochs"))
        except Undecided:
            return total


Rule = Callable[[Case], Iterator[Finding]]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Enter `function` in RULES under its own name."""
    RULES[function.__name__.strip("_")] = function
    return function


@dataclass(frozen=True)
class Report:
    """What came of the rules.

    Attributes:
        findings: what is wrong.
        passed: rules that hold.
        undecided: rules that could not be looked at, with the reason.
        skipped: rules that the user left out.
    """
    findings: tuple[Finding, ...]
    passed: tuple[str, ...]
    undecided: Mapping[str, str]
    skipped: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it for `--json`."""
        return {
            "ok": not self.findings,
            "findings": [one.as_dict() for one in self.findings],
            "passed": list(self.passed),
            "not_checked": dict(self.undecided),
            "skipped": list(self.skipped)
        }


def check(case: Case, skip: Collection[str] = ()) -> Report:
    """Look at every rule but those in `skip`."""
    findings: list[Finding] = []
    passed, undecided = [], {}
    for name, function in RULES.items():
        if name in skip:
            continue
        try:
            found = list(function(case))
        except Undecided as reason:
            undecided[name] = str(reason)
            continue
        findings += found
        if not found:
            passed.append(name)
    return Report(tuple(findings), tuple(passed), undecided, tuple(name for name in RULES if name in skip))


# The place


@rule
def place(case: Case) -> Iterator[Finding]:
    """There is an image, or a Python, to train with."""
    missing, remedy = case.facts.place_missing
    if missing:
        yield Finding("place", "somewhere to train", missing, remedy)


def probed(case: Case, key: str) -> Any:
    """Return what the place tells of `key`.

    Raises:
        Undecided: nothing.
    """
    found = case.facts.place.get(key)
    if found is None:
        raise Undecided(case.facts.place_missing[0] or "the place where it would train does not tell")
    return found


@rule
def verl(case: Case) -> Iterator[Finding]:
    """AgentGym-RL's verl is there."""
    if case.facts.place_missing[0] or not case.facts.place:
        raise Undecided(case.facts.place_missing[0] or "nobody looked")
    if not case.facts.place.get("verl"):
        yield Finding(
            "verl", "AgentGym-RL's verl where it trains", "no package verl",
            "build the image again (`invoke build.train`)" if case.facts.runner == "docker" else
            "set AGENTGYM_RL_SRC to a checkout, and TRAIN_PYTHON or --python to a Python with its packages")


@rule
def flash_attn(case: Case) -> Iterator[Finding]:
    """dp_actor.py:34 imports it in every worker."""
    if not case.facts.place.get("verl"):
        raise Undecided("no verl")
    if not probed(case, "flash_attn"):
        yield Finding(
            "flash_attn", "the package flash_attn", "not installed",
            "build base with FLASH_ATTN_WHEEL" if case.facts.runner == "docker" else "pip install flash-attn==2.7.3")


@rule
def hydra(case: Case) -> Iterator[Finding]:
    """Hydra composes the list."""
    if case.facts.place.get("hydra_error"):
        yield Finding("hydra", "overrides that Hydra composes", str(case.facts.place["hydra_error"]),
                      "mend or leave out that key; a key that the trainer's file does not have needs a +")
    elif case.facts.place.get("resolved") is None:
        raise Undecided("no verl with Hydra to compose it with")


# The configuration


@rule
def numbers(case: Case) -> Iterator[Finding]:
    """Sizes and counts are whole numbers."""
    for key in (BATCH, MINI, f"{ROLLOUT}.n", TP, SP, "data.max_prompt_length", "data.max_response_length",
                f"{ROLLOUT}.max_model_len", "trainer.nnodes", "trainer.n_gpus_per_node", "trainer.total_epochs"):
        value = case.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            yield Finding("numbers", "a whole number above 0", f"{key}={value}", f"give {key}=… one")


@rule
def algorithm(case: Case) -> Iterator[Finding]:
    """Two of the estimators in core_algos.py train."""
    chosen = case.get("algorithm.adv_estimator")
    if chosen not in ALGORITHMS:
        why = BROKEN.get(str(chosen))
        yield Finding("algorithm", "grpo or reinforce_plus_plus",
                      f"{chosen}" + (f", which cannot train there: {why}" if why else ""),
                      "use --algorithm grpo or reinforce++")


@rule
def batch(case: Case) -> Iterator[Finding]:
    """protocol.py:499 cuts the batch itself into equal chunks, before it is repeated n times."""
    size, world = case.number(BATCH), case.world
    if size % world:
        near = max(world, size // world * world)
        yield Finding("batch", f"a batch that {world} GPUs divide", f"{BATCH}={size}", f"give {BATCH}={near}")


@rule
def mini_batch(case: Case) -> Iterator[Finding]:
    """fw:116 makes it mini x n // ranks, and never looks whether it became 0."""
    micro = case.get(f"{ACTOR}.ppo_micro_batch_size_per_gpu")
    if isinstance(micro, bool) or not isinstance(micro, int) or micro < 1 or case.get(f"{ACTOR}.use_dynamic_bsz"):
        return
    ranks = max(1, case.world // case.number(SP))
    mini, n = case.number(MINI), case.number(f"{ROLLOUT}.n")
    each = mini * n // ranks
    if each < micro or each % micro:
        wanted = -(-micro * ranks // n)
        while wanted * n // ranks % micro:
            wanted += 1
        yield Finding("mini_batch", f"mini x n // {ranks} GPUs to be a multiple of the micro batch of {micro}",
                      f"{mini} x {n} // {ranks} = {each}", f"give {MINI}={wanted} or more")


@rule
def micro_batch(case: Case) -> Iterator[Finding]:
    """rt:447 wants exactly one of two ways to say each."""
    if case.get(f"{ACTOR}.use_dynamic_bsz"):
        return
    for name, key in ((ACTOR, "ppo_micro_batch_size"), ("actor_rollout_ref.ref", "log_prob_micro_batch_size"),
                      (ROLLOUT, "log_prob_micro_batch_size")):
        old, new = case.get(f"{name}.{key}"), case.get(f"{name}.{key}_per_gpu")
        if old is not None and new is not None:
            yield Finding("micro_batch", f"{key}_per_gpu alone", f"{name}.{key} is set as well",
                          f"leave {name}.{key} out")
        elif old is None and (isinstance(new, bool) or not isinstance(new, int) or new < 1):
            yield Finding("micro_batch", "a micro batch of at least 1", f"{name}.{key}_per_gpu={new}",
                          f"give {name}.{key}_per_gpu=1")


@rule
def tensor_parallel(case: Case) -> Iterator[Finding]:
    """fw:288, and vLLM cuts the attention heads."""
    tp, world = case.number(TP), case.world
    if world % tp:
        yield Finding("tensor_parallel", f"a size that divides {world} GPUs", f"{TP}={tp}", f"give {TP}=1")
    model = case.facts.model
    heads = model.config.get("num_attention_heads") if model else None
    if isinstance(heads, int) and heads % tp:
        yield Finding("tensor_parallel", f"a size that divides the model's {heads} attention heads", f"{TP}={tp}",
                      f"give {TP}=1")


@rule
def fsdp_size(case: Case) -> Iterator[Finding]:
    """fw:51."""
    size = case.get(f"{ACTOR}.fsdp_config.fsdp_size")
    if size != -1:
        yield Finding("fsdp_size", "-1 (all ranks)", f"{ACTOR}.fsdp_config.fsdp_size={size}", "leave it out")


@rule
def strategy(case: Case) -> Iterator[Finding]:
    """main_ppo.py knows FSDP alone; sequence parallelism needs its padding removed (rt:498)."""
    chosen = case.get(f"{ACTOR}.strategy")
    if chosen != "fsdp":
        yield Finding("strategy", "fsdp", f"{ACTOR}.strategy={chosen}", "leave it out")
    sp = case.number(SP)
    if sp > 1 and not case.get("actor_rollout_ref.model.use_remove_padding"):
        yield Finding("strategy", "use_remove_padding with sequence parallelism", f"{SP}={sp} without it",
                      "give actor_rollout_ref.model.use_remove_padding=True")
    if case.world % sp:
        yield Finding("strategy", f"a size that divides {case.world} GPUs", f"{SP}={sp}", f"give {SP}=1")


@rule
def rounds(case: Case) -> Iterator[Finding]:
    """rt:544: one number for fixed, a list for scaling_inter_stepwise; the wrong one dies in step 1."""
    kind, wanted = case.get("algorithm.rounds_ctrl.type"), case.get("algorithm.rounds_ctrl.rounds")
    shown = f"algorithm.rounds_ctrl.rounds={wanted}"

    def count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    if kind == "fixed":
        if not count(wanted):
            yield Finding("rounds", "one whole number of rounds for fixed", shown,
                          "use --rounds 20, or --scaling-inter 6,13,20 for stages")
    elif kind == "scaling_inter_stepwise":
        if not isinstance(wanted, list) or not wanted or not all(map(count, wanted)):
            yield Finding("rounds", "a list of rounds for ScalingInter", shown,
                          "use --scaling-inter 6,13,20, or --rounds 20")
        every = case.get("algorithm.rounds_ctrl.steps_scaling_inter")
        if not count(every):
            yield Finding("rounds", "a number of steps above 0 for each stage",
                          f"algorithm.rounds_ctrl.steps_scaling_inter={every}", "use --every 100")
    else:
        yield Finding("rounds", "fixed or scaling_inter_stepwise", f"algorithm.rounds_ctrl.type={kind}",
                      "use --rounds 20 or --scaling-inter 6,13,20")


@rule
def logger(case: Case) -> Iterator[Finding]:
    """utils/tracking.py:321 refuses another one after the workers are up."""
    chosen = case.get("trainer.logger")
    names = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(names, list):
        yield Finding("logger", "a list of loggers", f"trainer.logger={chosen}", "give trainer.logger=[console]")
        return
    wrong = [str(name) for name in names if name not in LOGGERS]
    if wrong:
        yield Finding("logger", f"loggers among {', '.join(LOGGERS)}", f"trainer.logger has {', '.join(wrong)}",
                      "give trainer.logger=[console,wandb]")
    if "console" not in names:
        yield Finding("logger", "console among the loggers: status and metrics read its lines",
                      f"trainer.logger={','.join(map(str, names))}", "give trainer.logger=[console,wandb]")


@rule
def wandb(case: Case) -> Iterator[Finding]:
    """Without a key, wandb asks for one in a worker that has no terminal."""
    chosen = case.get("trainer.logger")
    mode = case.facts.wandb_mode
    if "wandb" not in (chosen if isinstance(chosen, list) else [chosen]):
        return
    if mode not in ("online", "offline", "disabled", "shared", "dryrun"):
        yield Finding("wandb", "online, offline or disabled", f"WANDB_MODE={mode}", "set WANDB_MODE=offline")
    elif mode in ("online", "shared") and not case.facts.wandb_key:
        yield Finding("wandb", "a key for WANDB_MODE=online", "WANDB_API_KEY is not set",
                      "set it in the environment or .env, or WANDB_MODE=offline and `invoke train.sync` later")


@rule
def rollout(case: Case) -> Iterator[Finding]:
    """vr:51 and vr:131."""
    if not case.get(f"{ROLLOUT}.enforce_eager") and case.get(f"{ROLLOUT}.free_cache_engine"):
        yield Finding("rollout", "free_cache_engine=False without enforce_eager", f"{ROLLOUT}.enforce_eager=False",
                      f"give {ROLLOUT}.free_cache_engine=False as well")
    if not case.get("data.return_raw_chat"):
        yield Finding("rollout", "data.return_raw_chat=True", "data.return_raw_chat=False", "leave it out")


@rule
def steps(case: Case) -> Iterator[Finding]:
    """A total that trains something."""
    total = case.get("trainer.total_training_steps")
    if total is not None and (isinstance(total, bool) or not isinstance(total, int) or total < 2):
        yield Finding("steps", "a total of at least 2, one more than the steps that are trained",
                      f"trainer.total_training_steps={total}", "use --steps 1 or more")


@rule
def saving(case: Case) -> Iterator[Finding]:
    """Without saves nothing can be resumed or evaluated; cm:102 deletes the last save before it writes the next."""
    often = case.get("trainer.save_freq")
    if isinstance(often, bool) or not isinstance(often, int) or often < 1:
        yield Finding("saving", "checkpoints", f"trainer.save_freq={often}, which saves nothing",
                      "give trainer.save_freq=25")
    if case.get("trainer.remove_previous_ckpt_in_save"):
        yield Finding("saving", "no checkpoint deleted before the next is whole",
                      "trainer.remove_previous_ckpt_in_save=True",
                      "leave it out; `invoke train.watch --keep-last 2` prunes")


@rule
def folder(case: Case) -> Iterator[Finding]:
    """One run has one folder, which is writable and which nothing else decides."""
    for key in case.typed:
        if key in RESERVED:
            yield Finding("folder", "folders that the run's name decides", f"{key}={case.get(key)}",
                          "leave it out; use --name")
    if case.facts.unwritable:
        yield Finding("folder", f"a folder in which you can write, for {case.facts.folder}",
                      f"{case.facts.unwritable} is closed to you",
                      f"sudo chown -R $(id -u):$(id -g) {case.facts.unwritable}")


# The model


def known_model(case: Case) -> Any:
    """Return the model's facts.

    Raises:
        Undecided: it cannot be read.
    """
    found = case.facts.model
    if found is None or not found.config:
        raise Undecided("the model cannot be read")
    return found


@rule
def model_path(case: Case) -> Iterator[Finding]:
    """utils/fs.py:71."""
    path = case.get(MODEL)
    if isinstance(path, str) and len(path) > 1 and path.endswith("/"):
        yield Finding("model_path", "a path without a / at its end", f"{MODEL}={path}",
                      f"give {MODEL}={path.rstrip('/')}")


@rule
def model(case: Case) -> Iterator[Finding]:
    """The model is a whole Hugging Face folder, and not a quantized one: FSDP trains its weights."""
    found = case.facts.model
    if found is None:
        yield Finding("model", "a model", "none is named", "use --model models/Qwen2.5-7B-Instruct")
    elif found.fault:
        yield Finding("model", "a Hugging Face folder with config and weights", f"{found.path}: {found.fault}",
                      "name another with --model, or fetch it: `invoke models.fetch Qwen/Qwen2.5-7B-Instruct`")
    elif found.config.get("quantization_config"):
        yield Finding("model", "weights that FSDP can train", f"{found.path} is quantized",
                      "use the model that it was made from")


@rule
def architecture(case: Case) -> Iterator[Finding]:
    """Rollouts are vLLM's, whose release verl pins (<= 0.6.3), and verl has its own list of weights that it can hand over."""
    config = known_model(case).config
    names = config.get("architectures")
    known = case.facts.place.get("architectures") or ARCHITECTURES
    if not isinstance(names, list) or not names:
        yield Finding("architecture", "a model class in config.json", "none",
                      "take the config.json of the original model")
    elif not any(name in known for name in names):
        why = ": Qwen3 came after vLLM 0.6.3, the newest that this verl can use" if "Qwen3" in str(names[0]) else ""
        yield Finding("architecture", "a model class that vLLM 0.6.3 and verl's loader know, such as Qwen2ForCausalLM",
                      f"{names[0]}{why}", "use a Qwen2.5 model")


@rule
def dtype(case: Case) -> Iterator[Finding]:
    """The types that vLLM takes; the model's own is one of torch's."""
    chosen = case.get(f"{ROLLOUT}.dtype")
    if chosen not in DTYPES:
        yield Finding("dtype", f"one of {', '.join(DTYPES)}", f"{ROLLOUT}.dtype={chosen}",
                      f"give {ROLLOUT}.dtype=bfloat16")
    config = known_model(case).config
    own = config.get("torch_dtype", config.get("dtype"))
    if own is not None and str(own) not in ("bfloat16", "float16", "float32"):
        yield Finding("dtype", "bfloat16, float16 or float32 in config.json", f"torch_dtype {own}",
                      "mend the model's config.json")


@rule
def context(case: Case) -> Iterator[Finding]:
    """A trajectory has to fit into the model's positions."""
    limit = known_model(case).config.get("max_position_embeddings")
    if not isinstance(limit, int):
        raise Undecided("config.json has no max_position_embeddings")
    prompt, response = case.number("data.max_prompt_length"), case.number("data.max_response_length")
    if min(prompt + response, case.number(f"{ROLLOUT}.max_model_len")) > limit:
        yield Finding("context", f"prompt + response within the model's {limit} positions", f"{prompt} + {response}",
                      f"give data.max_response_length={max(1, limit - prompt)}")


@rule
def tokenizer(case: Case) -> Iterator[Finding]:
    """The model's folder has its tokenizer, and it can be read."""
    found = known_model(case)
    if not found.tokenizer:
        yield Finding("tokenizer", "a tokenizer beside the weights", f"none in {found.path}",
                      "copy tokenizer.json and tokenizer_config.json of the base model there")
    elif case.facts.place.get("tokenizer_error"):
        yield Finding("tokenizer", "a tokenizer that can be read", str(case.facts.place["tokenizer_error"]),
                      "copy tokenizer.json and tokenizer_config.json of the base model there")


@rule
def chat_format(case: Case) -> Iterator[Finding]:
    """rl_dataset.py:117 and schemas.py:67 write Qwen's format into every trajectory, whatever the model."""
    found = known_model(case)
    template, markers = found.chat_template, case.facts.place.get("markers")
    remedy = "use a Qwen2.5 Instruct model"
    if not found.tokenizer:
        raise Undecided("there is no tokenizer")
    if not template:
        yield Finding("chat_format", "Qwen's chat format", f"{found.path} has no chat template", remedy)
    elif "<|im_start|>" not in template or "<|im_end|>" not in template:
        yield Finding("chat_format", "Qwen's chat format, which the trainer writes whatever the model",
                      "a chat template without <|im_start|> and <|im_end|>", remedy)
    elif markers is not None and list(markers) != [1, 1]:
        yield Finding("chat_format", "<|im_start|> and <|im_end|> as one token each",
                      f"{markers[0]} and {markers[1]} tokens", remedy)


@rule
def prompt_length(case: Case) -> Iterator[Finding]:
    """torch_functional.py:295: the same words stand before every item of an environment, and are never cut."""
    if case.get("data.truncation") in ("left", "right"):
        return
    count = case.facts.place.get("prompt_tokens")
    if count is None:
        raise Undecided("no tokenizer, or no agentenv with the environment's prompt, is at hand")
    limit = case.number("data.max_prompt_length")
    if count > limit:
        yield Finding("prompt_length", f"a prompt of at most {limit} tokens", f"{count} tokens",
                      f"give data.max_prompt_length={count} or more")


# The items


@rule
def items(case: Case) -> Iterator[Finding]:
    """The list can be read."""
    found = case.facts.items
    if found is None:
        yield Finding("items", "an item list", "data.train_file is not set",
                      "give data.train_file=AgentItemId/babyai_train.json")
    elif found.fault:
        yield Finding("items", "a JSON list or lines of {\"item_id\": …}", f"{found.path}: {found.fault}",
                      "fetch the lists with `invoke data.fetch`, or name one with -- data.train_file=…")


@rule
def item_ids(case: Case) -> Iterator[Finding]:
    """vr:165 takes the digits after the last _ of an id for the item's number."""
    found, server = case.facts.items, case.facts.server
    if found is None or found.fault:
        raise Undecided("the item list cannot be read")
    bad = [one for one in found.ids if not re.fullmatch(r"\s*[+-]?\d+\s*", one.rsplit("_", 1)[-1])]
    trials = [one for one in found.ids if "_trial_" in one]
    if trials:
        yield Finding(
            "item_ids", "ids with the item's number at the end",
            f"{len(trials)} ids of trials, such as {trials[0]}, which would become item {trials[0].rsplit('_', 1)[-1].lstrip('0') or 0}",
            "number them with AgentGym's configs/mappings_train.json")
    elif bad:
        yield Finding("item_ids", "ids that end in _ and a number",
                      f"{len(bad)} of {len(found.ids)}, such as {bad[0]!r}", "mend the list")
    elif server and server.last is not None and not server.wraps:
        out = [one for one in found.ids if not server.first <= int(one.rsplit("_", 1)[-1]) <= server.last]
        if out:
            yield Finding("item_ids", f"items {server.first} to {server.last} of {server.name}",
                          f"{len(out)} others, such as {out[0]}",
                          "is the list another environment's? name its own with -- data.train_file=…")
    if not trials and server:
        other = sorted(
            {name
             for one in found.ids if (name := one.split("_")[0].lower()) in TASKS and name != server.name})
        if other:
            yield Finding("item_ids", f"items of {server.name}", f"items of {', '.join(other)}",
                          "name the list of this environment with -- data.train_file=…")


@rule
def full_batch(case: Case) -> Iterator[Finding]:
    """rt:532: what does not fill a batch is dropped, and no batch is an AssertionError."""
    if case.batches() < 1:
        count = len(case.facts.items.ids) if case.facts.items else 0
        yield Finding(
            "full_batch", f"at least one full batch of {case.number(BATCH)} items", f"{count} items",
            f"give {BATCH}={max(1, count // case.world * case.world) if count >= case.world else case.world}, or a longer list"
        )


# The environment


@rule
def client(case: Case) -> Iterator[Finding]:
    """The trainer has a client for the environment."""
    task, known = case.get(TASK), case.facts.place.get("clients") or TASKS
    if str(task).lower() not in known:
        yield Finding("client", "an environment that the trainer has a client for", f"{task}",
                      f"use --env with one of {', '.join(sorted(known))}")


@rule
def environment(case: Case) -> Iterator[Finding]:
    """The environment's server is ready, or can be started."""
    server = case.facts.server
    if server is None:
        raise Undecided("nobody looked")
    if server.state not in ("ready", "absent", "unknown"):
        yield Finding("environment", f"{server.name} ready to play", server.state, server.remedy)
    elif server.state != "absent":
        why = case.facts.place.get("unreachable")
        if why:
            yield Finding("environment", f"{server.name} in reach of the trainer",
                          f"{server.url} does not answer where it trains: {why}",
                          f"see `invoke env.list`, or start it anew: `invoke env.restart --env {server.name}`")
        elif why is None and server.state == "unknown":
            raise Undecided("an address that this machine does not reach, and no place to ask")


@rule
def sessions(case: Case) -> Iterator[Finding]:
    """vr:189 opens batch x n sessions at once on every rank of a tensor parallel group, and the data set one that stays."""
    server = case.facts.server
    if server is None:
        raise Undecided("nobody looked")
    needed = case.number(BATCH) * case.number(f"{ROLLOUT}.n") * case.number(TP) + 1
    if server.max_sessions is None:
        return
    room = server.max_sessions * server.replicas
    used = server.live or 0
    if needed + used > room:
        wanted = -(-(needed + used) // server.max_sessions)
        yield Finding(
            "sessions", f"room for {needed} sessions (batch x n x TP + 1)",
            f"{room} with {server.replicas} replica{'s' if server.replicas > 1 else ''}" +
            (f", {used} of them open" if used else ""), f"use --replicas {wanted}" +
            (", where so many are behind --server"
             if server.given else f" after `invoke env.down --env {server.name}`" if server.state == "ready" else ""))


@rule
def port(case: Case) -> Iterator[Finding]:
    """The port on which the environment is to be started is free."""
    server = case.facts.server
    if server is None:
        raise Undecided("nobody looked")
    if server.state == "absent" and server.port_taken:
        yield Finding("port", f"a free port for {server.name}", f"{server.port_taken} is taken",
                      "set ENV_PORT to another, or stop what listens there")


# The machine


@rule
def gpus(case: Case) -> Iterator[Finding]:
    """single_controller/ray/base.py:85 waits for ever for what is not there."""
    wanted = case.number("trainer.n_gpus_per_node")
    if case.facts.cluster:
        raise Undecided(f"the Ray cluster at {case.facts.cluster} decides")
    if case.facts.gpus is None:
        raise Undecided("nobody can tell how many GPUs there are")
    if wanted > case.facts.gpus:
        yield Finding("gpus", f"{wanted} GPUs",
                      f"{case.facts.gpus} there; the trainer would wait for the others for ever",
                      "use --gpus with those that are there" if case.facts.gpus else "train on a machine with GPUs")


@rule
def cpus(case: Case) -> Iterator[Finding]:
    """Each worker takes a CPU of Ray's, and the driver one."""
    if case.facts.cluster:
        raise Undecided(f"the Ray cluster at {case.facts.cluster} decides")
    there, wanted = probed(case, "cpus"), case.number("trainer.n_gpus_per_node") + 1
    if there < wanted:
        yield Finding("cpus", f"{wanted} CPUs, one for each GPU and one for the driver",
                      f"{there}; the trainer would wait for ever",
                      "give the container or job more CPUs, or use fewer GPUs")


@rule
def shm(case: Case) -> Iterator[Finding]:
    """NCCL and Ray's object store share memory there; too little is a bus error."""
    if case.facts.shm is None:
        raise Undecided("the size of /dev/shm is not known")
    wanted = case.number("trainer.n_gpus_per_node") * SHM_A_GPU
    if case.facts.shm < wanted:
        yield Finding(
            "shm", f"{wanted >> 30} GB of shared memory, one for each GPU",
            f"{case.facts.shm / (1 << 30):.3g} GB in /dev/shm", f"use --shm-size {max(wanted >> 30, 32)}g"
            if case.facts.runner == "docker" else f"sudo mount -o remount,size={max(wanted >> 30, 32)}g /dev/shm")


@rule
def model_files(case: Case) -> Iterator[Finding]:
    """Whoever trains is another user in a container."""
    file = probed(case, "closed_model")
    if file:
        yield Finding("model_files", "a model that this user can read", f"{file} cannot be read",
                      "give access to it (`chmod -R a+rX` of the model's folder), or put a dangling link right")


@rule
def cache(case: Case) -> Iterator[Finding]:
    """datasets reads the item list through a cache on the disk (rl_dataset.py:99)."""
    place = probed(case, "closed_cache")
    if place:
        yield Finding(
            "cache", "a cache of data sets that this user can write", f"{place} is closed to it",
            "give yourself access to models/ here (chown, chmod), where the container has its cache: models/.huggingface"
            if case.facts.runner == "docker" else "set HF_HOME to a folder of yours")


def saves(steps: int, often: int) -> int:
    """Return how many checkpoints a run of `steps` steps writes, the one at its end included."""
    return steps // often + (1 if steps % often else 0)


def stored(saves: int, often: int, keep: Rules | None) -> float:
    """Return how many bytes a parameter take that lie on the disk at once, at most.

    Args:
        saves: that the run writes, one every `often` steps.
        keep: what a watcher keeps of them; None: all.
    """
    if keep is None:
        return saves * BYTES_A_PARAMETER
    whole = min(saves, keep.keep_optimizer + 1)  # and the one that is being written
    every = saves * often // keep.keep_every if keep.keep_every else 0
    kept = min(saves, max(keep.keep_last - keep.keep_optimizer, 0) + keep.keep_best + every)
    merged = min(saves, keep.keep_last + keep.keep_best + every) if keep.merged_too else saves
    return whole * BYTES_A_PARAMETER + kept * BYTES_A_WEIGHT + merged * BYTES_MERGED


@rule
def disk(case: Case) -> Iterator[Finding]:
    """float32 weights and Adam's two moments are 12 bytes a parameter in every save."""
    found = case.facts.model
    if found is None or not found.parameters:
        raise Undecided("the model's parameters are not known")
    if case.facts.free_bytes is None:
        raise Undecided("the disk is not known")
    often = case.number("trainer.save_freq")
    count, keep = saves(case.steps(), often), case.facts.keep
    wanted = found.parameters * stored(count, often, keep)
    if wanted > case.facts.free_bytes:
        pruned = " with what the watcher keeps and merges" if keep else f" of {found.parameters * BYTES_A_PARAMETER / 1e9:.3g} GB"
        yield Finding(
            "disk", f"{wanted / 1e9:.0f} GB for {count} checkpoints{pruned}",
            f"{case.facts.free_bytes / 1e9:.0f} GB free at {case.facts.folder}",
            "free some, or save less often (trainer.save_freq)" +
            ("" if keep else ", or let a watcher prune: `--watch --watch-flags=--keep-last=2`"))
