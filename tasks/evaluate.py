"""Evaluate models on the environments; look at what came of it."""
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.engine.mounts import WORKSPACE, Translation
from tasks.lib.errors import UserError
from tasks.lib.evaluation.plan import NEEDED, Endpoint, endpoint_flags, flags, folders, loopback_host
from tasks.lib.host.programs import GPUS_HERE, choose_program_runner, environment, run_module
from tasks.lib.interrupts import as_ctrl_c
from tasks.lib.notices import tell
from tasks.lib.settings import ROOT, resolve

if TYPE_CHECKING:
    from tasks.lib.engine.gpus import GpuChoice
    from tasks.lib.environments.rows import Environment

RUN_HELP = "Folder of a run, or its name in saves/eval (default: the latest). Repeatable."
PRICES_HELP = "TOML or JSON file with input and output of each model, for a million tokens."
COMPAT_HELP = "Add the figures as AgentGym's own evaluation would count them."
# By name: none of these values is ever in an argument.
VARIABLES = ("MODEL", "OPENAI_API_KEY", "OPENAI_BASE_URL")
COMPARED = str(ROOT / "saves" / "eval" / "compare.html")
# A checkpoint's name and address are known once it is served.
CHECKPOINT = "checkpoint"
SERVE_WAIT = "600"
SCRIPTED = ("expert", "random")


@contextmanager
def served(c: Context, row: "Environment", runner: str, understood: bool, seconds: int) -> Iterator[str]:
    """Give the address of the row's server: the one that is up, or one that is started.

    A server that an evaluation started is stopped by the last evaluation that uses it.

    Args:
        runner: where the evaluation runs: a container cannot reach a process of this machine.
        seconds: until a server that is started must be ready.

    Raises:
        UserError: it cannot start, or cannot be reached from there.
    """
    from tasks.lib.environments import lease
    from tasks.lib.environments.running import container_url, servers_up
    from tasks.lib.environments.start_stop import stop_server
    if c.config.run.dry:
        yield _start(c, row, runner, understood, seconds)
        return

    def find() -> str | None:
        up = servers_up().get(row.name)
        if up and runner == "docker" and up.runner == "local":
            raise UserError(f"{row.name} is up as a process of this machine, which a container cannot reach; "
                            f"`invoke env.down --env {row.name}`, or --runner local")
        if up is None:
            return None
        return container_url(up.service, up.port) if runner == "docker" else up.url

    def leave(shared: bool) -> None:
        if shared:
            tell(f"left {row.name} up, another evaluation uses it")
        else:
            stop_server(c, row.name)
            tell(f"stopped {row.name}")

    with lease.shared_server(row.name, find, lambda: _start(c, row, runner, understood, seconds), leave) as url:
        yield url


def _start(c: Context, row: "Environment", runner: str, understood: bool, seconds: int) -> str:
    from tasks.lib.environments.compose_model import service_name
    from tasks.lib.environments.plan import Options
    from tasks.lib.environments.running import container_url, servers_up
    from tasks.lib.environments.start_stop import choose_server_runner, pick_port, start_server
    place = "docker" if runner == "docker" else choose_server_runner("local" if row.source == "project" else "auto")
    bind = resolve("ENV_BIND")
    options = Options(port=pick_port(row, "", bind), bind=bind, understood=understood, aliases=not servers_up())
    url = start_server(c, row, options, place, False, seconds)
    if not c.config.run.dry:
        tell(f"started {row.name} at {url}")
    return container_url(service_name(row), options.port) if runner == "docker" else url


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that is merged and can be served; `gpus` is None where this Python does it."""
    model: Path
    name: str
    engine: str
    context: int
    seconds: int
    gpus: "GpuChoice | None"


def prepare_checkpoint(c: Context, folder: str, runner: str, engine: str, gpus: str, wait: str) -> Prepared:
    """Check what the user asked for, and merge the checkpoint if need be.

    Raises:
        UserError: one line.
    """
    from tasks.lib import checkpoints
    from tasks.lib.flags import whole_number
    from tasks.lib.serving import docker as serve_docker
    from tasks.lib.serving import local as serving
    from tasks.merge import run_merger
    seconds = whole_number("serve-wait", wait, 1)
    choice = serve_docker.gpus_for(c, gpus) if runner == "docker" else None
    chosen, why = serve_docker.choose_engine(engine, choice.cpu) if choice else serving.choose_engine(engine)
    found = checkpoints.find(Path(folder))
    if found.merge:
        tell(f"merging {found.shards}")
        run_merger(c, runner, [str(found.shards)], gpus=gpus, force=found.force)
    elif found.shards:
        tell(f"{found.model} is merged from these shards already")
    absent = c.config.run.dry and found.merge
    context = 0 if absent else checkpoints.check(found.model)
    name = checkpoints.served_name(found.model)
    tell(f"{found.model} is evaluated as {name}, served by {chosen} ({why})")
    return Prepared(found.model, name, chosen, context, seconds, choice)


@contextmanager
def served_checkpoint(c: Context, checkpoint: Prepared) -> Iterator[Endpoint]:
    """Serve the checkpoint and give where it answers; it is stopped afterwards.

    Raises:
        UserError: one line; nothing is left running.
    """
    from tasks.lib.serving import docker as serve_docker
    from tasks.lib.serving import local as serving
    model, name, engine, seconds = checkpoint.model, checkpoint.name, checkpoint.engine, checkpoint.seconds
    server = serve_docker.started(c, model, name, engine, checkpoint.gpus, seconds) if checkpoint.gpus else \
        serving.started(c, model, name, engine, seconds)
    with server as url:
        yield Endpoint(name, url, engine, checkpoint.context)


def run_evaluation(c: Context,
                   runner: str,
                   words: list[str],
                   inside: list[str] | None = None,
                   variables: Mapping[str, str] | None = None) -> None:
    """Run the evaluation program, in this Python or in its container.

    Args:
        words: its command line here; inside: the same with the container's names for files and folders.
        variables: for its environment.

    Raises:
        UserError: its exit code.
    """
    from tasks.lib.engine import containers
    from tasks.lib.engine.compose_files import QUIET
    from tasks.lib.environments.lookup import gym_source
    from tasks.lib.settings import effective_environment
    settings = effective_environment()
    if runner == "docker":
        containers.run(c, "eval-runner", words if inside is None else inside, variables={**QUIET, **(variables or {})})
        return
    absent = lacking()
    if absent:
        raise UserError(f"this Python has no {', '.join(absent)}; `pip install -r requirements-dev.txt`")
    own = {name: settings[name] for name in ("MAX_ROUND", ) if settings.get(name)}
    source = gym_source()
    if Path(source).is_dir():
        own["AGENTGYM_SRC"] = source
    run_module(c, "evaluation", words, env={**environment(VARIABLES, os.environ), **own, **(variables or {})})


def lacking() -> list[str]:
    """Return the packages that the evaluation needs and this Python has not."""
    return [name for name in NEEDED if not find_spec(name)]


def runner_for(runner: str, checkpoint: str = "") -> str:
    """Return where an evaluation runs: local or docker; by itself here, where this Python has what it needs.

    Args:
        checkpoint: what is served for it; empty where nothing is.

    Raises:
        UserError: no such runner.
    """
    from tasks import merge
    from tasks.lib.serving import local as serving
    lacks_merger = checkpoint and not all(find_spec(name) for name in merge.NEEDED)
    return choose_program_runner(runner, not lacking() and not lacks_merger and not (checkpoint and serving.missing()))


@task(default=True,
      positional=[],
      auto_shortflags=False,
      help={
          "env": "Environment, a table of environments.toml (default: $ENV, then searchqa).",
          "model": "Model of the endpoint, or expert or random for demo (default: $MODEL, then gpt-4o-mini).",
          "checkpoint": "Folder with shards, or a Hugging Face model: it is merged if need be, served and evaluated.",
          "engine": "What serves the checkpoint: vllm, transformers, or auto: vllm where it is and finds a CUDA GPU.",
          "serve_wait": "Seconds until the checkpoint's server must answer (default: 600).",
          "gpus": "With --runner docker, GPUs of merger and server: all, none, or 0,1 (default: $GPUS, then all).",
          "base_url": "OpenAI-compatible endpoint (default: $OPENAI_BASE_URL, then OpenAI's own).",
          "server": "Address of an environment server (default: the one that is up, else one is started and stopped).",
          "max_round": "Completions of one episode, at most (default: $MAX_ROUND, then the environment's own).",
          "items": "FILE, 0-99 or demo_3,demo_5 (default: AgentEval's list, AgentItemId's or the environment's first).",
          "limit": "Play at most so many items (default: all).",
          "samples": "Attempts at each item, for Avg@k and Pass@k (default: 1).",
          "concurrency": "Episodes at once (default: the environment's own).",
          "seed": "Make draws repeatable (default: none).",
          "shuffle_seed": "Shuffle the items with this seed before --limit (default: not shuffled).",
          "temperature": "0 to 5, or none to leave it out (default: 1.0).",
          "max_tokens": "Tokens of one completion, 0 to leave it out (default: 4096).",
          "extra_body": "JSON object with further fields of the request (default: none).",
          "max_error_rate": "Share of infrastructure errors above which the exit code is 1 (default: 0.02).",
          "out": "The run's folder (default: saves/eval/ENV-MODEL-HASH, so the same command resumes).",
          "fresh": "Replace an earlier run in that folder, once the model answers, in place of resuming it.",
          "prompt": "File with a prompt of your own (default: AgentGym's, where its source is at hand).",
          "prices": PRICES_HELP,
          "upstream_compat": COMPAT_HELP,
          "runner": "local (this Python), docker (the eval image), or auto: local where its packages are installed.",
          "wait": "Seconds until a server that is started must be ready (default: 120).",
          "i_understand": "Agree to what the environment does to real accounts; it says what when this is missing.",
      })
def run(c: Context,
        env: str = "",
        model: str = "",
        checkpoint: str = "",
        engine: str = "auto",
        serve_wait: str = SERVE_WAIT,
        gpus: str = "",
        base_url: str = "",
        server: str = "",
        max_round: str = "",
        items: str = "",
        limit: str = "",
        samples: str = "",
        concurrency: str = "",
        seed: str = "",
        shuffle_seed: str = "",
        temperature: str = "",
        max_tokens: str = "",
        extra_body: str = "",
        max_error_rate: str = "",
        out: str = "",
        fresh: bool = False,
        prompt: str = "",
        prices: str = "",
        upstream_compat: bool = False,
        runner: str = "auto",
        wait: str = "120",
        i_understand: bool = False) -> None:
    """Evaluate a model on an environment."""
    from tasks.lib.environments.lookup import find_row, rows_path
    from tasks.lib.flags import whole_number
    from tasks.lib.settings import effective_environment
    if checkpoint and (model or base_url):
        raise UserError(
            f"--checkpoint {checkpoint} is served under a name of its own; leave out --{'model' if model else 'base-url'}"
        )
    if not checkpoint and (engine != "auto" or gpus or serve_wait != SERVE_WAIT):
        raise UserError("--engine, --gpus and --serve-wait are about the server of a --checkpoint; leave them out")
    chosen = runner_for(runner, checkpoint)
    if chosen == "local" and gpus:
        raise UserError(f"{GPUS_HERE}")
    row = find_row(env)
    seconds = whole_number("wait", wait, 1)
    values: dict[str, str | bool] = {
        "env": row.name,
        "model": model,
        "base_url": base_url,
        "max_round": max_round,
        "items": items,
        "limit": limit,
        "samples": samples,
        "concurrency": concurrency,
        "seed": seed,
        "shuffle_seed": shuffle_seed,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "extra_body": extra_body,
        "max_error_rate": max_error_rate,
        "out": out,
        "fresh": fresh,
        "prompt": prompt,
        "prices": prices,
        "upstream_compat": upstream_compat
    }
    out_inside = inside_saves(out) if chosen == "docker" and out else ""
    if chosen == "docker" and (any(os.path.exists(name)
                                   for name in (items, prompt, prices) if name) or (out and not out_inside)):
        raise UserError(
            "--runner docker reads AgentEval, AgentItemId and writes below saves; for other files and folders "
            "use --runner local")
    if chosen == "docker":
        endpoint = "" if checkpoint or resolve("MODEL", model) in SCRIPTED else resolve("OPENAI_BASE_URL", base_url)
        for name, address in (("--server", server), ("--base-url" if base_url else "OPENAI_BASE_URL", endpoint)):
            if host := loopback_host(address):
                raise UserError(
                    f"{host}, the host of {name}, would be the container itself; give an address that it can "
                    "reach, or use --runner local")
    here = [f"--environments={rows_path()}", f"--root={ROOT}"]
    if not c.config.run.dry:  # what the runner would refuse is refused before anything starts
        asked = flags({**values, "model": CHECKPOINT if checkpoint else model, "server": server})
        run_evaluation(c, chosen, ["run", "--check", *asked, *here], _inside(["run", "--check", *asked], out_inside),
                       {"OPENAI_API_KEY": "none"} if checkpoint else None)
    prepared = prepare_checkpoint(c, checkpoint, chosen, engine, gpus, serve_wait) if checkpoint else None
    with as_ctrl_c(), ExitStack() as stack:
        url = server or stack.enter_context(served(c, row, chosen, i_understand, seconds))
        variables = {}
        if prepared:  # after the environment, which is sooner ready, and sooner known to lack something
            values.update(endpoint_flags(stack.enter_context(served_checkpoint(c, prepared)), values))
            variables = {"OPENAI_API_KEY": "none"}  # the user's own is for another endpoint
        words = ["run", *flags({**values, "server": url})]
        if chosen == "docker" and not max_round:  # Compose has a default of its own, which is not the environment's
            words.append(f"--max-round={effective_environment().get('MAX_ROUND') or row.rounds}")
        run_evaluation(c, chosen, [*words, *here], inside=_inside(words, out_inside), variables=variables)


def inside_saves(out: str) -> str:
    """Return the container's name of a folder in saves, which it sees; empty for any other folder."""
    try:
        inside = Translation(ROOT).output(out)
    except ValueError:
        return ""
    return inside if inside.startswith(f"{WORKSPACE / 'saves'}/") else ""


def _inside(words: list[str], out: str) -> list[str]:
    """Return the runner's words with the container's name of --out."""
    return [f"--out={out}" if word.startswith("--out=") else word for word in words]


def _folders(command: str, names: list[str] | None) -> list[Path]:
    return folders(names or [], ROOT)


def _over_runs(c: Context,
               command: str,
               names: list[str] | None,
               values: dict[str, str | bool],
               least: int = 1) -> None:
    found = _folders(command, names)
    if len(found) < least:
        raise UserError(f"needs at least {least} runs; name each with --run")
    run_evaluation(c, "local", [command, *map(str, found), *flags(values)])


@task(positional=[],
      auto_shortflags=False,
      iterable=["run"],
      help={
          "run": RUN_HELP,
          "out": "The file to write (default: report.html in the run's folder; of several, saves/eval/compare.html).",
          "prices": PRICES_HELP,
          "upstream_compat": COMPAT_HELP
      })
def report(c: Context,
           run: list[str] | None = None,
           out: str = "",
           prices: str = "",
           upstream_compat: bool = False) -> None:
    """Write a run's report again, or one of several."""
    out = out or (COMPARED if len(run or []) > 1 else "")
    _over_runs(c, "report", run, {"out": out, "prices": prices, "upstream_compat": upstream_compat})


@task(positional=[],
      auto_shortflags=False,
      iterable=["run"],
      help={
          "run":
          "Folder of a run, or its name in saves/eval; the first is what the others are compared with. Repeatable.",
          "out": "The report to write (default: saves/eval/compare.html).",
          "prices": PRICES_HELP,
          "upstream_compat": COMPAT_HELP
      })
def compare(c: Context,
            run: list[str] | None = None,
            out: str = "",
            prices: str = "",
            upstream_compat: bool = False) -> None:
    """Compare runs item by item, with intervals."""
    _over_runs(c,
               "compare",
               run, {
                   "out": out or COMPARED,
                   "prices": prices,
                   "upstream_compat": upstream_compat
               },
               least=2)


@task(positional=[],
      auto_shortflags=False,
      iterable=["run"],
      help={
          "run": RUN_HELP,
          "environments": "Take success rule and reward range from this file's rows (default: the run's own).",
          "prices": PRICES_HELP,
          "upstream_compat": COMPAT_HELP
      })
def rescore(c: Context,
            run: list[str] | None = None,
            environments: str = "",
            prices: str = "",
            upstream_compat: bool = False) -> None:
    """Compute a run's numbers again, without a model."""
    _over_runs(c, "rescore", run, {"environments": environments, "prices": prices, "upstream_compat": upstream_compat})


@task(positional=[],
      auto_shortflags=False,
      iterable=["run"],
      help={
          "run": "Folder of a run, or its name in saves/eval. Repeatable.",
          "out": "Folder of the run that they become (default: none; it must not hold one).",
          "prices": PRICES_HELP,
          "upstream_compat": COMPAT_HELP
      })
def merge(c: Context,
          run: list[str] | None = None,
          out: str = "",
          prices: str = "",
          upstream_compat: bool = False) -> None:
    """Join runs of one configuration from several machines."""
    if not out:
        raise UserError("no --out; name the folder that the runs become")
    _over_runs(c, "merge", run, {"out": out, "prices": prices, "upstream_compat": upstream_compat}, least=2)


@task(positional=[],
      auto_shortflags=False,
      iterable=["run"],
      help={
          "run": RUN_HELP,
          "out":
          "The file to write, JSON lines with messages (default: conversations.jsonl in the first run's folder).",
          "all": "Failures too (default: what ended in success)."
      })
def conversations(c: Context, run: list[str] | None = None, out: str = "", all: bool = False) -> None:
    """Write what was said in runs, to train on."""
    found = _folders("conversations", run)
    out = out or str(found[0] / "conversations.jsonl")
    run_evaluation(c, "local", ["conversations", *map(str, found), *flags({"out": out, "all": all})])


@task(positional=[],
      auto_shortflags=False,
      iterable=["run"],
      help={
          "run": RUN_HELP,
          "format": "Of the file: csv, jsonl, or parquet where pyarrow is installed (default: csv).",
          "rows": "What a row is: attempts or turns (default: attempts).",
          "out": "The file to write (default: ROWS.FORMAT in the first run's folder)."
      })
def export(c: Context,
           run: list[str] | None = None,
           format: str = "csv",
           rows: str = "attempts",
           out: str = "") -> None:
    """Write runs as a table, a row an attempt or a turn."""
    found = _folders("export", run)
    out = out or str(found[0] / f"{rows}.{format}")
    run_evaluation(c, "local", ["export", *map(str, found), *flags({"format": format, "rows": rows, "out": out})])


@task(name="list", positional=[], auto_shortflags=False, help={"folder": "Where to look (default: saves/eval)."})
def list_(c: Context, folder: str = "") -> None:
    """Show the runs and their success rates."""
    run_evaluation(c, "local", ["list", folder or str(ROOT / "saves" / "eval")])
