"""Work in the training image."""
from __future__ import annotations

import sys
from json import dumps
from typing import TYPE_CHECKING

from invoke.context import Context
from invoke.tasks import task

from tasks import evaluate, merge
from tasks.lib.errors import UserError
from tasks.lib.flags import as_words, whole_number
from tasks.lib.notices import note, put
from tasks.train_start import check, resume, start

# What a task does is imported where it is done: each command would pay for all of them.
if TYPE_CHECKING:
    from tasks.lib.training.follow import Rules

__all__ = ["check", "resume", "start"]

FLAGS = {
    "shm_size": "Shared memory of a new container, such as 64g (default: $SHM_SIZE, then 32g).",
    "gpus": "all, none, or indices such as 0,1 (default: $GPUS, then all).",
    "user": "User of the container, name or uid[:gid] (default: you).",
}


def container_variables(shm_size: str) -> dict[str, str]:
    """Return what Compose interpolates for the flag.

    Raises:
        UserError: no such size.
    """
    from tasks.lib.training.place import check_size
    check_size(shm_size)
    return {"SHM_SIZE": shm_size} if shm_size else {}


@task(positional=[],
      auto_shortflags=False,
      help={
          **FLAGS, "any_": "Where you have none that runs, ask about joining others' on this engine."
      })
def shell(c: Context, shm_size: str = "", gpus: str = "", user: str = "", any_: bool = False) -> None:
    """Open a shell in the training container."""
    from tasks.lib.engine import containers
    variables = container_variables(shm_size)
    running = containers.running(c, "train", any_)
    if running:
        if shm_size or gpus:
            put("train: joining the running container, so --shm-size and --gpus do not count", file=sys.stderr)
        containers.join(c, running, ["bash"], user)
    else:
        containers.run(c, "train", ["bash"], gpus=gpus, user=user, variables=variables)


@task(positional=[], auto_shortflags=False, help=FLAGS)
def run(c: Context, shm_size: str = "", gpus: str = "", user: str = "") -> None:
    """Run the command after -- in the training image."""
    from tasks.lib.engine import containers
    from tasks.lib.engine.client import remainder
    command = remainder(c)
    if not command:
        raise UserError("no command; write it after --: invoke train.run -- python -V")
    containers.run(c, "train", command, gpus=gpus, user=user, variables=container_variables(shm_size))


@task(positional=[],
      auto_shortflags=False,
      help={
          "name": "The run's name (default: the one that runs, or the last one made).",
          "watch": "Show it again every 2 s until the run has ended.",
          "json": "Print JSON, for a program.",
      })
def status(c: Context, name: str = "", watch: bool = False, json: bool = False) -> None:
    """Show a run: step, reward, time left, health."""
    from tasks.lib.training import runs, showing
    run = runs.find(name)

    def told() -> list[str]:
        found = runs.read(run)[0]
        return [dumps(found.json())] if json else showing.lines(found, width=showing.width_of_terminal())

    if watch:
        showing.watch(run, told, lambda: runs.read(run)[0].state)
    else:
        for line in told():
            put(line)


@task(name="list", positional=[], auto_shortflags=False, help={"json": "Print JSON, for a program."})
def list_runs(c: Context, json: bool = False) -> None:
    """List the training runs in saves/."""
    from tasks.lib.tables import print_table
    from tasks.lib.training import runs, showing
    found = runs.all_statuses()
    if json:
        print(dumps({"runs": [one.json() for one in found]}))
    elif not found:
        put(f"train.list: no run in {runs.saves()}; `invoke train.start` makes one")
    print_table(showing.HEAD, [] if json else [showing.row(one) for one in found])


@task(positional=[],
      help={
          "name": "The run's name (default: the one that runs, or the last one made).",
          "follow": "Go on with what comes, until the run has ended.",
          "lines": "How many of the last lines; 0 for all (default: 200).",
          "attempt": "Which attempt's log (default: the last).",
      })
def logs(c: Context, name: str = "", follow: bool = False, lines: str = "200", attempt: str = "") -> None:
    """Show what the trainer of a run printed."""
    from tasks.lib.training import runs, showing
    count, number = whole_number("lines", lines, 0), whole_number("attempt", attempt, 1) if attempt else None
    showing.logs(runs.find(name), count, follow, number)


@task(positional=[],
      auto_shortflags=False,
      help={
          "name": "The run's name (default: the one that runs, or the last one made).",
          "now": "Kill the trainer at once in place of asking it to end.",
          "any_": "Ask about a run whose container another checkout or user has.",
      })
def stop(c: Context, name: str = "", now: bool = False, any_: bool = False) -> None:
    """Stop a run and say what is left of it."""
    from tasks.lib.training import runs, stopping
    said = stopping.stop(c, runs.find(name), now, any_)
    if said:
        note(said=said)
        put(f"train.stop: {said}")


@task(positional=[],
      auto_shortflags=False,
      help={
          "name": "The run's name (default: the one that runs, or the last one made).",
          "output": "The file to write (default: plot.html in the run's folder).",
      })
def plot(c: Context, name: str = "", output: str = "") -> None:
    """Write a run's curves into one HTML file."""
    from tasks.lib.training import plotting, runs
    written = plotting.write(runs.find(name), output)
    note(file=str(written))
    put(f"train.plot: {written}")


@task(positional=[],
      auto_shortflags=False,
      help={
          "name": "The run's name (default: the one that runs, or the last one made).",
          "eval": "Environments to evaluate each checkpoint on, such as textcraft,babyai (default: none).",
          "limit": "Items of an evaluation, at most (default: all).",
          "items": "As for `eval`, of every environment of --eval.",
          "samples": "Attempts at each item (default: 1).",
          "seed": "Make draws repeatable (default: none).",
          "temperature": "0 to 5 (default: 1.0).",
          "max_tokens": "Tokens of one completion (default: 4096, less where the context is small).",
          "max_round": "Completions of one episode, at most (default: the environment's own).",
          "concurrency": "Episodes at once (default: the environment's own).",
          "server":
          "Address of the environment's server, or ENV=URL,… (default: the one that is up, else one is started).",
          "keep_last": "Keep so many of the newest checkpoints that were verified (default: 2).",
          "keep_every": "Keep the checkpoints whose step is a multiple of it; 0 for none (default: 100).",
          "keep_best": "Keep so many with the best success rate; 0 for none (default: 1 with --eval).",
          "keep_optimizer":
          "Of what is kept, so many of the newest keep the optimizer's files (default: as --keep-last).",
          "keep_all": "Prune nothing.",
          "prune_merged": "Merged models go with their checkpoints (default: they all stay).",
          "dtype": "Element type of the merged models (default: bfloat16).",
          "engine": "What serves a model: vllm, transformers or auto.",
          "gpus": "GPUs for the model's server: all, none, or indices such as 6,7, other ones than the run's.",
          "endpoint": "Address of a server that has the merged models (default: each is served for its evaluation).",
          "endpoint_model": "What it calls them (default: {run}-global_step_{step}).",
          "runner": "local, docker, or auto, as for `merge` and `eval`.",
          "wandb":
          "When the run has ended, do what `train.sync --figures` does (default: nothing leaves this machine).",
          "once": "Do what is to do now, and end.",
          "stop": "Stop the run's watcher.",
          "i_understand": "Agree to what an environment does to real accounts.",
      })
def watch(c: Context,
          name: str = "",
          eval: str = "",
          limit: str = "",
          items: str = "",
          samples: str = "",
          seed: str = "",
          temperature: str = "",
          max_tokens: str = "",
          max_round: str = "",
          concurrency: str = "",
          server: str = "",
          keep_last: str = "",
          keep_every: str = "",
          keep_best: str = "",
          keep_optimizer: str = "",
          keep_all: bool = False,
          prune_merged: bool = False,
          dtype: str = "",
          engine: str = "",
          gpus: str = "",
          endpoint: str = "",
          endpoint_model: str = "",
          runner: str = "auto",
          wandb: bool = False,
          once: bool = False,
          stop: bool = False,
          i_understand: bool = False) -> None:
    """Merge, evaluate and prune checkpoints as they come.

    It deletes: checkpoints that no --keep-… keeps, once they are merged and compared with the merged model.
    """
    from tasks.lib.environments.lookup import all_rows
    from tasks.lib.training import follow
    run = follow.run_folder(name)
    if stop:
        put(f"train.watch: {follow.stop(run)}")
        return
    flags = {
        "limit": limit,
        "items": items,
        "samples": samples,
        "seed": seed,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "max_round": max_round
    }
    asked = follow.Asked(
        run=run,
        environments=eval,
        known=tuple(all_rows()),
        flags=flags,
        server=server,
        rules=follow.rules_of(keep_last, keep_every, keep_best, keep_optimizer, prune_merged, bool(eval)),
        prune=not keep_all,
        dtype=dtype,
        gpus=gpus,
        endpoint=endpoint,
        endpoint_model=endpoint_model,
        merge_runner=merge.runner_for(runner),
        eval_runner=evaluate.runner_for(runner, "" if endpoint else evaluate.CHECKPOINT) if eval else "",
        wandb=wandb,
        runner=runner,
        words=evaluation_words(engine, concurrency, i_understand),
        dry=bool(c.config.run.dry))
    follow.watch(asked.dry, follow.watcher(asked), once)


def evaluation_words(engine: str, concurrency: str, i_understand: bool) -> tuple[str, ...]:
    """Return the flags of `invoke eval` that the numbers do not depend on.

    Raises:
        UserError: no such engine.
    """
    from tasks.lib.serving.local import ENGINES
    if engine and engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
    return tuple(as_words({"engine": engine, "concurrency": concurrency, "i_understand": i_understand}))


def check_watch_words(c: Context, words: list[str], used: str) -> Rules | None:
    """Refuse flags that `train.watch` would refuse, before there is a run; return what it keeps, None for everything.

    Args:
        used: the run's own GPUs: all, indices, or empty where they are not known yet.

    Raises:
        UserError: in one line, which names --watch-flags: a run has flags of the same names.
    """
    try:
        return _checked_watch_words(bool(c.config.run.dry), words, used)
    except UserError as error:
        raise UserError(f"--watch-flags: {error.said()}", error.code) from None


def _checked_watch_words(dry: bool, words: list[str], used: str) -> Rules | None:
    from invoke.exceptions import ParseError
    from invoke.parser import Parser, ParserContext

    from tasks.lib.environments.lookup import all_rows
    from tasks.lib.training import follow
    from tasks.lib.training.hands import InvokeHands, gpu_clash, has_nvidia
    from tasks.lib.training.watching import Going
    parser = Parser([ParserContext(name="train.watch", args=watch.get_arguments())])
    try:
        parsed, *more = parser.parse_argv(["train.watch", *words])
    except ParseError as error:
        raise UserError(f"{error}; `invoke train.watch --help` shows them") from None
    given = parsed.as_kwargs
    for name in ("name", "once", "stop"):
        if given[name]:
            raise UserError(f"--{name} has no place beside a run that is started")
    if more:
        raise UserError(f"{more[0].name!r} is no flag of train.watch")
    evaluated = bool(given["eval"])
    rules = follow.rules_of(given["keep_last"], given["keep_every"], given["keep_best"], given["keep_optimizer"],
                            given["prune_merged"], evaluated)
    plans = follow.plans_of(given["eval"], tuple(all_rows()), {name: given[name] for name in follow.DECISIVE})
    servers = follow.servers_of(given["server"], [plan.environment for plan in plans])
    follow.check_endpoint(given["endpoint"], given["endpoint_model"], "run")
    follow.check_merge(given["dtype"], plans, given["gpus"], given["endpoint"])
    further = evaluation_words(given["engine"], given["concurrency"], given["i_understand"])
    merger = merge.runner_for(given["runner"])
    if given["wandb"]:
        follow.check_wandb(None, given["runner"])
    if plans:
        clash = gpu_clash(given["gpus"], given["endpoint"], used, Going(False, "starting", None, ()), True,
                          has_nvidia())
        if clash:
            raise UserError(clash)
        runner = evaluate.runner_for(given["runner"], "" if given["endpoint"] else evaluate.CHECKPOINT)
        hands = InvokeHands("run",
                            merger,
                            runner,
                            endpoint=given["endpoint"],
                            model_name=given["endpoint_model"] or InvokeHands.model_name,
                            servers=servers,
                            words=further)
        for plan in () if dry else plans:
            hands.check(plan)
    return None if given["keep_all"] else rules


@task(
    positional=[],
    auto_shortflags=False,
    help={
        "name":
        "The run's name (default: the one that runs, or the last one made).",
        "key_file":
        "File with wandb's key (default: $WANDB_API_KEY, then what `wandb login` left here).",
        "project":
        "wandb project (default: the run's own).",
        "entity":
        "wandb user or team (default: the key's own).",
        "runner":
        "local (this machine's wandb), docker (the training image's), or auto: local where there is one.",
        "figures":
        "Also what merges and evaluations came to, and the status, to the wandb run of the last attempt that has ended.",
    })
def sync(c: Context,
         name: str = "",
         key_file: str = "",
         project: str = "",
         entity: str = "",
         runner: str = "auto",
         figures: bool = False) -> None:
    """Upload a run's offline wandb data."""
    from tasks.lib.training import follow, wandb_sync
    for line in wandb_sync.sync(c, follow.run_folder(name), runner, key_file, project, entity, figures):
        put(f"train.sync: {line}")
