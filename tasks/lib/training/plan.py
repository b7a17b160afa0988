"""What a run is to be: the layers of its overrides, decided from what the user typed."""
from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.lib.errors import UserError
from tasks.lib.training import presets, scripts
from tasks.lib.training.overrides import Override, layer, make, parse
from tasks.lib.training.rules import DEFAULTS, MODEL, RESERVED, TASK
from training.folder import NAME

# What users type, and what the trainer calls it; those that do not train are refused by a rule, with the reason.
ALGORITHMS = {
    "grpo": "grpo",
    "reinforce++": "reinforce_plus_plus",
    "reinforce_plus_plus": "reinforce_plus_plus",
    "rloo": "rloo",
    "remax": "remax",
    "gae": "gae",
    "ppo": "gae",
}
ADDRESS, ITEMS = "actor_rollout_ref.agentgym.env_addr", "data.train_file"
ROLLOUTS, SAVES, HYDRA = "actor_rollout_ref.rollout.rollout_log_dir", "trainer.default_local_dir", "hydra.run.dir"
GPUS, EPOCHS, TOTAL = "trainer.n_gpus_per_node", "trainer.total_epochs", "trainer.total_training_steps"
PROJECT, EXPERIMENT = "trainer.project_name", "trainer.experiment_name"
# The example scripts' placeholders, which are no names of anybody's.
PLACEHOLDERS = {"xxx", "test", "verl_examples", "gsm8k"}
# What a run's identity does not hang on: another address of the same environment is the same run.
NOT_COMPARED = (ADDRESS, )

MOST = 10**9  # of what is counted


@dataclass(frozen=True)
class Wanted:
    """What the user typed; empty where nothing was."""
    environment: str = ""
    model: str = ""
    algorithm: str = ""
    rounds: str = ""
    scaling_inter: str = ""
    every: str = ""
    steps: str = ""
    presets: tuple[str, ...] = ()
    script: str = ""
    typed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """The layers below what a run has of its own.

    Attributes:
        environment: the trainer's name of it.
        base: of a preset or script, with the preset files over it.
        flags: of the flags.
        typed: what follows --.
        presets: names and files, in order.
        variables: of a script, for the trainer's environment.
        notices: lines to show.
        steps: asked for with --steps; None where not.
    """
    environment: str
    base: list[Override]
    flags: list[Override]
    typed: list[Override]
    presets: list[str]
    variables: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    steps: int | None = None

    def value(self, key: str) -> Any:
        """Return what the layers set `key` to; None where they do not."""
        found = {one.key: one.value for one in layer(self.base, self.flags, self.typed)}
        return found.get(key)

    def reserved(self) -> list[str]:
        """Return the keys, typed or of a preset file, that the run's folder decides."""
        return [one.key for one in self.typed if one.key in RESERVED]


def whole(flag: str, value: str, least: int = 1) -> int:
    """Return the number that the user typed.

    Raises:
        UserError: it is none.
    """
    if not value.isdecimal() or not value.isascii() or int(value[:12]) < least:
        raise UserError(f"--{flag} {value} is no whole number of at least {least}")
    if len(value) > 12 or int(value) > MOST:
        raise UserError(f"--{flag} {value} is more than {MOST}; give less")
    return int(value)


def check_name(name: str) -> str:
    """Return `name` where it can name a run: a folder, a container and a label.

    Raises:
        UserError: it cannot.
    """
    if not NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r} is no name; use letters, digits, dot, dash, underscore, at most 64, a letter or digit "
            "first")
    return name


def choose(wanted: Wanted, environ: Mapping[str, str], default_environment: str = "") -> Chosen:
    """Return the layers for what the user wanted.

    Args:
        environ: of the user, for a script's HOME, USER and PWD.
        default_environment: where neither flag nor script names one.

    Raises:
        UserError: flags that contradict one another, or a preset or script that cannot be read.
    """
    typed = [parse(word) for word in wanted.typed]
    twice = sorted({one.key for one in typed if [two.key for two in typed].count(one.key) > 1})
    if twice:
        raise UserError(f"{twice[0]} stands twice after --; leave one out")
    flags, steps = _flags(wanted)
    kinds = [name for name in wanted.presets if name in presets.KINDS]
    files = [name for name in wanted.presets if name not in presets.KINDS]
    if len(kinds) > 1:
        raise UserError(f"--preset {' and --preset '.join(kinds)}: take one of the two")
    if wanted.script and kinds:
        raise UserError(f"--script has values of its own; leave out --preset {kinds[0]}")
    script = scripts.load(Path(wanted.script), environ) if wanted.script else None
    over = [one for name in files for one in presets.from_file(Path(name))]
    named = {one.key: str(one.value) for one in [*(script.overrides if script else []), *over, *typed]}
    environment = _environment(wanted.environment, named.get(TASK, ""), default_environment)
    if script:
        base, names = script.overrides, [f"script {wanted.script}"]
    else:
        kind = kinds[0] if kinds else "scaling" if wanted.scaling_inter else "fixed"
        known = kind in presets.environments().get(environment, ())
        if not known and not files:
            presets.built_in(environment, kind)  # which says what there is
        base = presets.built_in(environment, kind) if known else presets.common()
        names = [f"{environment}.{kind}" if known else presets.COMMON]
    notices = [script.notice(Path(wanted.script).name)] if script else []
    return Chosen(environment, layer(base, over), flags, typed, [*names, *files], script.variables if script else {},
                  [line for line in notices if line], steps)


def _environment(flag: str, named: str, default: str) -> str:
    if flag and named and flag != named:
        raise UserError(f"--env {flag}, and {TASK}={named}: name one environment")
    if not (flag or named or default):
        raise UserError("which environment? name it with --env babyai, or take a script with --script")
    return flag or named or default


def _flags(wanted: Wanted) -> tuple[list[Override], int | None]:
    found = []
    if wanted.algorithm:
        if wanted.algorithm not in ALGORITHMS:
            raise UserError(f"--algorithm {wanted.algorithm} is none; use grpo or reinforce++")
        found.append(make("algorithm.adv_estimator", ALGORITHMS[wanted.algorithm]))
    if wanted.rounds and wanted.scaling_inter:
        raise UserError("--rounds and --scaling-inter contradict one another; leave one out")
    if wanted.every and not wanted.scaling_inter:
        raise UserError("--every is about the stages of --scaling-inter 6,13,20; give both")
    if wanted.rounds:
        found += [
            make("algorithm.rounds_ctrl.type", "fixed"),
            make("algorithm.rounds_ctrl.rounds", whole("rounds", wanted.rounds))
        ]
    if wanted.scaling_inter:
        stages = wanted.scaling_inter.strip("[]").split(",")
        if not all(one.strip().isdecimal() and int(one) for one in stages):
            raise UserError(f"--scaling-inter {wanted.scaling_inter} is no list of rounds; write 6,13,20")
        found += [
            make("algorithm.rounds_ctrl.type", "scaling_inter_stepwise"),
            make("algorithm.rounds_ctrl.rounds", list(map(int, stages)))
        ]
        if wanted.every:
            found.append(make("algorithm.rounds_ctrl.steps_scaling_inter", whole("every", wanted.every)))
    steps = whole("steps", wanted.steps) if wanted.steps else None
    return found, steps


def stepping(steps: int | None, epochs: Any, batches: int | None) -> list[Override]:
    """Return the overrides with which the trainer trains `steps` steps: its total is one more, and its epochs must do.

    Args:
        steps: asked for; None leaves the trainer's own.
        epochs: that would be trained without it.
        batches: of an epoch; None where the item list cannot be read.
    """
    if steps is None:
        return []
    found = [make(TOTAL, steps + 1)]
    if batches and isinstance(epochs, int) and epochs * batches < steps:
        found.append(make(EPOCHS, -(-steps // batches)))
    return found


def own(environment: str, url: str, folder: str, name: str, gpus: int | None, model: str, items: str,
        before: Mapping[str, Any]) -> list[Override]:
    """Return what a run puts right in any preset or script: address, folders, names, GPUs, and absolute paths.

    Args:
        url: of the environment, for the trainer; folder, model, items: as the trainer sees them; empty: as they are.
        gpus: how many a node gives; None: as they are.
        before: what the layers set, for names of the user's own.
    """
    found = [make(TASK, environment)]
    found += [make(ADDRESS, url)] if url else []
    found += [make(MODEL, model)] if model else []
    found += [make(ITEMS, items)] if items else []
    found += [make(GPUS, gpus)] if gpus is not None else []
    project = before.get(PROJECT)
    return [
        *found,
        make(PROJECT, project if project and project not in PLACEHOLDERS else f"agentgym-rl-{environment}"),
        make(EXPERIMENT, name),
        make(SAVES, folder),
        make(ROLLOUTS, f"{folder}/rollouts"),
        make(HYDRA, f"{folder}/hydra"),
    ]


def final(chosen: Chosen, own_layer: Sequence[Override], stepping_layer: Sequence[Override]) -> list[Override]:
    """Return the list that is sent: the base, what the run has of its own, the flags, and what was typed over all."""
    put_right = {one.key for one in own_layer}
    # Paths and the address of what was typed are in the run's own layer already, as the trainer sees them.
    typed = [
        one for one in chosen.typed if not (one.key in (MODEL, ITEMS, ADDRESS, *RESERVED) and one.key in put_right)
    ]
    return layer(chosen.base, own_layer, chosen.flags, stepping_layer, typed)


def default_name(environment: str, settings: Mapping[str, Any], stamp: str) -> str:
    """Return a run's name: babyai-grpo-fixed-20260102-030405."""
    algorithm = str(settings.get("algorithm.adv_estimator",
                                 DEFAULTS["algorithm.adv_estimator"])).replace("reinforce_plus_plus", "reinforce++")
    kind = "fixed" if settings.get("algorithm.rounds_ctrl.type", "fixed") == "fixed" else "scaling"
    return re.sub(r"[^\w.-]", "p", f"{environment}-{algorithm}-{kind}-{stamp}", flags=re.ASCII)[:64]


def differences(before: Collection[str], now: Collection[str]) -> list[str]:
    """Return in which keys two lists of overrides differ, `key: before, now after`; the environment's address may."""
    first, second = ({one.key: one for one in map(parse, words)} for words in (before, now))
    found = []
    for key in [*first, *(key for key in second if key not in first)]:
        one, two = first.get(key), second.get(key)
        if key not in NOT_COMPARED and (one is None or two is None or
                                        (one.text is None) != (two.text is None) or one.value != two.value):
            said = [str(each.text) if each else "not set" for each in (one, two)]
            found.append(f"{key}: {said[0]}, now {said[1]}")
    return found
