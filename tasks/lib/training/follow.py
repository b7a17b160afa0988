"""What `invoke train.watch` was asked for, checked before anything is done; and a watcher that outlives its terminal."""
from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tasks.lib.errors import UserError
from tasks.lib.flags import whole_number
from tasks.lib.host import processes
from tasks.lib.interrupts import as_ctrl_c
from tasks.lib.notices import put
from tasks.lib.settings import ROOT
from tasks.lib.training import runs
from tasks.lib.training.hands import InvokeHands, gpu_clash, has_nvidia
from tasks.lib.training.watching import Plan, Watcher, going, look
from training import checkpoints, lease, machine
from training.folder import RunFolder
from training.retention import Rules

DTYPES = ("bfloat16", "float16", "float32", "keep")  # the merger's
LOCK = "watch.lock"
LOG = "watch.log"
# Flags of `invoke eval` that the numbers depend on: evaluations that differ in one are not compared.
DECISIVE = ("limit", "items", "samples", "seed", "temperature", "max_tokens", "max_round")


def run_folder(name: str) -> RunFolder:
    """Return the run with that name, or as `runs.find` does; of a run that nobody here started, the folder with steps.

    Raises:
        UserError: there is none.
    """
    folder = runs.folder_of(name) if name else None
    if folder and not folder.exists() and checkpoints.numbers(folder.path):
        return folder
    found = runs.find(name)
    runs.now(found)  # one that cannot be read is told here
    return found


def _number(flag: str, text: str, least: int, default: int) -> int:
    return whole_number(flag, text, least) if text else default


def rules_of(keep_last: str,
             keep_every: str,
             keep_best: str,
             keep_optimizer: str,
             prune_merged: bool,
             evaluated: bool = True) -> Rules:
    """Return the rules that the flags name.

    Args:
        evaluated: whether checkpoints are evaluated; without that none is the best.

    Raises:
        UserError: a flag is no number, or asks for the best of what is not evaluated.
    """
    last = _number("keep-last", keep_last, 1, 2)
    if keep_best and keep_best != "0" and not evaluated:
        raise UserError(f"--keep-best {keep_best} needs evaluations; say of what with --eval, or leave it out")
    return Rules(keep_last=last,
                 keep_every=_number("keep-every", keep_every, 0, 100),
                 keep_best=_number("keep-best", keep_best, 0, 1 if evaluated else 0),
                 keep_optimizer=_number("keep-optimizer", keep_optimizer, 1, last),
                 merged_too=prune_merged)


def plans_of(environments: str, known: Sequence[str], flags: Mapping[str, str]) -> tuple[Plan, ...]:
    """Return how each checkpoint is evaluated.

    Args:
        environments: --eval, names with commas between them.
        known: the environments that there are.
        flags: those of DECISIVE that were given.

    Raises:
        UserError: an environment that is not there or comes twice, or flags without an environment.
    """
    names = [name.strip() for name in environments.split(",") if name.strip()]
    given = {name: value for name, value in flags.items() if value}
    if given and not names:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} is about evaluations; say of what with --eval")
    for name in names:
        if name not in known:
            raise UserError(f"--eval {name}: no such environment; choose of {', '.join(known)}")
        if names.count(name) > 1:
            raise UserError(f"--eval names {name} twice; once is enough")
    words = tuple(f"--{name.replace('_', '-')}={given[name]}" for name in DECISIVE if name in given)
    return tuple(Plan(name, words) for name in names)


def servers_of(text: str, environments: Sequence[str]) -> dict[str, str]:
    """Return the address of each environment's server, from URL or ENV=URL,ENV=URL.

    Raises:
        UserError: it names none of the environments, or none for several.
    """
    if not text:
        return {}
    pairs = [piece.strip() for piece in text.split(",") if piece.strip()]
    if len(pairs) == 1 and re.match(r"https?://", pairs[0]):
        if len(environments) != 1:
            raise UserError(f"--server {text} is one address for {len(environments)} environments; write "
                            f"{','.join(f'{name}=http://…' for name in environments) or '--eval, too'}")
        return {environments[0]: pairs[0]}
    found = {}
    for pair in pairs:
        name, _, url = pair.partition("=")
        if name not in environments or not re.match(r"https?://[^/\s]+", url):
            raise UserError(f"--server {pair!r}: write it as ENV=http://HOST:PORT, with an environment of --eval")
        found[name] = url
    return found


def check_endpoint(endpoint: str, name: str, run: str) -> None:
    """Refuse an address that is none, and a name that differs in no step.

    Raises:
        UserError: naming it.
    """
    if name and not endpoint:
        raise UserError(f"--endpoint-model {name} is how a given endpoint calls the models; give --endpoint too")
    if endpoint and not re.match(r"https?://[^/\s]+", endpoint):
        raise UserError(f"--endpoint {endpoint!r} is no address; write it like http://127.0.0.1:8000/v1")
    try:
        differs = not name or name.format(run=run, step=1) != name.format(run=run, step=2)
    except (KeyError, IndexError, ValueError):
        raise UserError(
            f"--endpoint-model {name!r} has something in braces that is neither {{run}} nor {{step}}") from None
    if not differs:
        raise UserError(
            f"--endpoint-model {name!r} is the same at each step, so one model would be evaluated as all of "
            "them; put {step} into it")


@dataclass(frozen=True)
class Asked:
    """What the flags of `invoke train.watch` say.

    Attributes:
        run: the run's folder.
        environments: --eval; known: the environments that there are.
        flags: those of DECISIVE.
        rules: what stays; prune: whether anything goes.
        merge_runner, eval_runner: local or docker.
        wandb: --wandb; runner: --runner, for it.
        words: further flags of `invoke eval`.
        dry: whether nothing is to run, so that the evaluations' flags are not looked at.
    """
    run: RunFolder
    environments: str
    known: Sequence[str]
    flags: Mapping[str, str]
    server: str
    rules: Rules
    prune: bool
    dtype: str
    gpus: str
    endpoint: str
    endpoint_model: str
    merge_runner: str
    eval_runner: str
    wandb: bool
    runner: str
    words: Sequence[str]
    dry: bool = False


def check_merge(dtype: str, plans: Sequence[Plan], gpus: str, endpoint: str) -> None:
    """Refuse an element type that the merger does not write, and flags of evaluations without one.

    Raises:
        UserError: naming it.
    """
    if dtype and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is none; choose one of {', '.join(DTYPES)}")
    if not plans and (gpus or endpoint):
        raise UserError(f"--{'gpus' if gpus else 'endpoint'} is about evaluations; say of what with --eval")


def check_wandb(run: RunFolder | None, runner: str) -> None:
    """Refuse what could send nothing to wandb at the end of the run.

    Args:
        run: None where it is not there yet.

    Raises:
        UserError: no key, no wandb, or a run that does not log there.
    """
    from tasks.lib.training import wandb_sync
    wandb_sync.way(runner, "", has_flag=False)
    if run and wandb_sync.logs_to_wandb(run) is False:
        raise UserError(f"--wandb: {run.name} does not log to wandb, as its trainer.logger says; leave --wandb out")


def watcher(asked: Asked) -> Watcher:
    """Return the watcher that was asked for.

    Raises:
        UserError: a flag contradicts another one, the environments that there are, or the run.
    """
    run = asked.run
    plans = plans_of(asked.environments, asked.known, asked.flags)
    servers = servers_of(asked.server, [plan.environment for plan in plans])
    check_endpoint(asked.endpoint, asked.endpoint_model, run.name)
    check_merge(asked.dtype, plans, asked.gpus, asked.endpoint)
    if asked.wandb:
        check_wandb(run, asked.runner)
    if plans:
        used, here = used_gpus(run)
        clash = gpu_clash(asked.gpus, asked.endpoint, used, going(run), here, has_nvidia())
        if clash:
            raise UserError(clash)
    hands = InvokeHands(run=run.name,
                        merge_runner=asked.merge_runner,
                        eval_runner=asked.eval_runner,
                        gpus=asked.gpus,
                        endpoint=asked.endpoint,
                        model_name=asked.endpoint_model or InvokeHands.model_name,
                        servers=servers,
                        words=tuple(asked.words),
                        dtype=asked.dtype,
                        wandb_runner=asked.runner if asked.wandb else "")
    for plan in () if asked.dry else plans:
        hands.check(plan)
    return Watcher(run, asked.rules if asked.prune else None, plans, hands, lease.Lease(run.path / LOCK), going,
                   lambda line: put(f"train.watch: {line}"))


def used_gpus(run: RunFolder) -> tuple[str, bool]:
    """Return the GPUs that the run was started with, and whether it runs on this machine."""
    try:
        gpus = run.read().get("gpus") or {}
    except (OSError, ValueError):
        return "", False
    host = (run.read_state() or {}).get("host")
    # A container has a name of its own: it is taken to be on this machine.
    return str(gpus.get("choice")
               or ""), host is None or host == socket.gethostname() or bool(re.fullmatch(r"[0-9a-f]{12}", str(host)))


def watch(dry: bool, made: Watcher, once: bool) -> None:
    """Follow a run.

    Raises:
        UserError: another watcher follows it, or something failed to the end.
    """
    held, name = made.lease, made.run.name
    if dry:
        show(made)
        return
    with as_ctrl_c():
        try:
            held.take(made.say)
        except lease.Taken as owner:
            raise UserError(f"{name} is followed already, by {owner}; `invoke train.watch --name "
                            f"{name} --stop` stops that one") from None
        try:
            good = made.once() if once else made.follow()
            good = (not once or made.publish()) and good
        except lease.Lost as owner:
            raise UserError(f"{owner} follows {name} by now; this watcher ends", code=1) from None
        finally:
            held.release()
    if not good:
        raise UserError("; ".join(f"{key}: {failure.reason}" for key, failure in made.failures.items()), code=1)


def show(made: Watcher) -> None:
    """Say what would be done now, and do nothing."""
    steps = look(made.run, made.plans)
    for step in steps:
        if step.raw and step.raw.model_whole and not step.verified:
            put(f"step {step.number}: merge {step.shards} into {step.target}, verify")
        elif step.raw and not step.raw.model_whole:
            put(f"step {step.number}: not whole: {step.raw.faults[0]}")
        for plan in made.plans:
            if plan in step.missing or (not step.verified and step.raw and step.raw.model_whole):
                put(f"step {step.number}: evaluate on {plan.environment} {' '.join(plan.words)}".rstrip())
    decision = made.decision(steps)
    for what, numbers in (("the optimizer's files", decision.optimizer), ("the checkpoint", decision.checkpoints),
                          ("the merged model", decision.merged)):
        for number in numbers:
            put(f"step {number}: prune {what}")
    for number, why in decision.kept.items():
        put(f"step {number}: keep ({', '.join(why)})")
    aside, kept = made.aside(steps)
    for one, folder in aside.items():
        put(f"step {one.number}: keep {folder} ({kept[one]})" if one in kept else f"step {one.number}: prune {folder}")


def command(name: str, words: Sequence[str]) -> list[str]:
    """Return the command line of a run's watcher."""
    return [sys.executable, "-m", "invoke", "train.watch", f"--name={name}", *words]


def launch(run: RunFolder, words: Sequence[str]) -> tuple[int, Path]:
    """Start a watcher of the run that goes on when this process and its terminal are gone; return its id and its log.

    Args:
        words: flags of `invoke train.watch`, without --name.
    """
    run.logs.mkdir(parents=True, exist_ok=True)
    log = run.logs / LOG
    with suppress(FileNotFoundError):
        log.replace(log.with_name(LOG + ".1"))
    process = processes.launch(command(run.name, words), log, os.environ, ROOT, processes.CALLERS)
    return process.pid, log


def launch_beside(run: RunFolder, words: Sequence[str], wait: float = 60.0) -> str:
    """Start a watcher beside a run that was just started; return what to say of it.

    Raises:
        UserError: it ended at once; the run goes on.
    """
    held = lease.Lease(run.path / LOCK)
    owner = held.read()
    if owner and lease.lives(owner) is not False:
        return f"{lease.described(owner)} watches its checkpoints already, with the flags that it was started with"
    pid, log = launch(run, words)
    end = time.monotonic() + wait
    while time.monotonic() < end:
        owner = held.read()
        if owner and owner.get("pid") == pid:
            break
        if not machine.lives(machine.identity(pid)):
            raise UserError(
                f"{run.name} is started, but its watcher is not: {processes.last_line(log).removeprefix('train.watch: ')}; "
                f"mended, `invoke train.watch --name {run.name}` follows it",
                code=1)
        time.sleep(0.1)
    return f"its checkpoints are watched: {log}, `invoke train.watch --name {run.name} --stop` ends that"


def stop(run: RunFolder) -> str:
    """Stop the run's watcher, as Ctrl-C would; return what was done, in words.

    Raises:
        UserError: it runs on another machine, or in another container.
    """
    owner = lease.Lease(run.path / LOCK).read()
    alive = lease.lives(owner) if owner else False
    if not owner or alive is False:
        return "no watcher runs"
    if alive is None:
        raise UserError(f"the watcher is {lease.described(owner)}, out of reach from here; stop it there")
    try:
        os.kill(owner["pid"], signal.SIGTERM)
    except PermissionError:
        raise UserError(
            f"the watcher is another user's, {lease.described(owner)}; only they, or root, can stop it") from None
    return f"told {lease.described(owner)} to stop; it goes on where it was when it is started again"
