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

from tasks.lib.errors import UserError
from tasks.lib.evaluation.asked import COMPAT_HELP, PRICES_HELP, Asked, Passed, in_container, refuse_loopback
from tasks.lib.evaluation.plan import NEEDED, Endpoint, endpoint_flags, folders
from tasks.lib.flags import Value, as_words, helps, repeatable, takes, values, whole_number
from tasks.lib.host.programs import GPUS_HERE, choose_program_runner, environment, run_module
from tasks.lib.interrupts import as_ctrl_c
from tasks.lib.notices import reporting, tell
from tasks.lib.settings import ROOT, resolve

if TYPE_CHECKING:
    from tasks.lib.engine.gpus import GpuChoice
    from tasks.lib.environments.rows import Environment

RUN_HELP = "Folder of a run, or its name in saves/eval (default: the latest). Repeatable."
# By name: none of these values is ever in an argument.
VARIABLES = ("MODEL", "OPENAI_API_KEY", "OPENAI_BASE_URL")
COMPARED = str(ROOT / "saves" / "eval" / "compare.html")
# A checkpoint's name and address are known once it is served.
CHECKPOINT = "checkpoint"
SCRIPTED = ("expert", "random", "check")


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
            tell(f"left {row.name} up, another evaluation or a run uses it")
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


def prepare_checkpoint(c: Context, asked: Asked, runner: str) -> Prepared:
    """Check what the user asked for, and merge the checkpoint if need be; not with --check.

    Raises:
        UserError: one line.
    """
    from tasks.lib import checkpoints
    from tasks.lib.serving import docker as serve_docker
    from tasks.lib.serving import local as serving
    from tasks.merge import run_merger
    seconds = whole_number("serve-wait", asked.serve_wait, 1)
    choice = serve_docker.gpus_for(c, asked.gpus) if runner == "docker" else None
    chosen, why = serve_docker.choose_engine(asked.engine, choice.cpu) if choice else serving.choose_engine(
        asked.engine)
    found = checkpoints.find(Path(asked.checkpoint))
    if found.merge and not asked.check:
        tell(f"merging {found.shards}")
        run_merger(c, runner, [str(found.shards)], gpus=asked.gpus, force=found.force)
    elif found.shards and not found.merge:
        tell(f"{found.model} is merged from these shards already")
    absent = found.merge and (asked.check or c.config.run.dry)
    context = 0 if absent else checkpoints.check(found.model)
    name = checkpoints.served_name(found.model)
    if found.merge and asked.check:  # its name comes of the files that it will have
        tell(f"{found.shards} would be merged, and served by {chosen} ({why})")
    else:
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


def run_evaluation(c: Context, runner: str, words: list[str], variables: Mapping[str, str] | None = None) -> None:
    """Run the evaluation program, in this Python or in its container.

    Args:
        words: its command line, with the container's names for files and folders where it runs in one.
        variables: for its environment.

    Raises:
        UserError: its exit code.
    """
    from tasks.lib.engine import containers
    from tasks.lib.environments.lookup import gym_source
    from tasks.lib.settings import effective_environment
    settings = effective_environment()
    words = [*words, "--json"] if reporting() else words
    if runner == "docker":
        containers.run(c, "eval-runner", words, variables=variables)
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


def typed_for(asked: Asked, row: "Environment", chosen: str) -> tuple[dict[str, Value], dict[str, str]]:
    """Return the runner's flags for what the user asked for, and the variables that it gets.

    Args:
        chosen: where it runs.

    Raises:
        UserError: a container cannot do so.
    """
    from tasks.lib.settings import effective_environment
    settings = effective_environment()
    typed: dict[str, Value] = {**values(asked, Passed), "env": row.name}
    if chosen == "docker":
        if not asked.checkpoint and resolve("MODEL", asked.model) not in SCRIPTED:
            refuse_loopback("--base-url" if asked.base_url else "OPENAI_BASE_URL",
                            resolve("OPENAI_BASE_URL", asked.base_url))
        in_container(typed, ROOT)
        # Compose has a default of its own, which is not the environment's.
        typed["max_round"] = asked.max_round or settings.get("MAX_ROUND") or str(row.rounds)
    # By name, as a key: what a header sends may be in `.env`.
    variables = {name: settings[name] for name in asked.header_variables() if name in settings}
    if asked.checkpoint:
        variables["OPENAI_API_KEY"] = "none"  # the user's own is for another endpoint
    return typed, variables


@task(default=True, positional=[], auto_shortflags=False, iterable=repeatable(Asked), help=helps(Asked))
@takes(Asked)
def run(c: Context, asked: Asked) -> None:
    """Evaluate a model on an environment."""
    from tasks.lib.environments.lookup import find_row
    asked.check_checkpoint()
    chosen = runner_for(asked.runner, asked.checkpoint)
    if chosen == "local" and asked.gpus:
        raise UserError(f"{GPUS_HERE}")
    row = find_row(asked.env)
    seconds = whole_number("wait", asked.wait, 1)
    typed, variables = typed_for(asked, row, chosen)
    # What the runner would refuse is refused before anything starts.
    known: dict[str, Value] = {
        "model": CHECKPOINT,
        "resume": asked.resume and bool(asked.out)
    } if asked.checkpoint else {}
    run_evaluation(c, chosen, program_words(chosen, {**typed, **known, "check": True}), variables)
    prepared = prepare_checkpoint(c, asked, chosen) if asked.checkpoint else None
    if asked.check:
        if not c.config.run.dry:
            tell("nothing is wrong with these words; without --check they play")
        return
    with as_ctrl_c(), ExitStack() as stack:
        typed["server"] = asked.server or stack.enter_context(served(c, row, chosen, asked.i_understand, seconds))
        if prepared:  # after the environment, which is sooner ready, and sooner known to lack something
            typed.update(endpoint_flags(stack.enter_context(served_checkpoint(c, prepared)), typed))
        run_evaluation(c, chosen, program_words(chosen, typed), variables)


def program_words(runner: str, typed: Mapping[str, Value]) -> list[str]:
    """Return the runner's words, of which the container has those that say where its files are itself."""
    from tasks.lib.environments.lookup import rows_path
    if runner == "docker":
        return ["run", *as_words(in_container(typed, ROOT))]
    return ["run", *as_words({**typed, "environments": str(rows_path()), "root": str(ROOT)})]


def _folders(command: str, names: list[str] | None) -> list[Path]:
    return folders(names or [], ROOT)


def _over_runs(c: Context, command: str, names: list[str] | None, typed: Mapping[str, Value], least: int = 1) -> None:
    found = _folders(command, names)
    if len(found) < least:
        raise UserError(f"needs at least {least} runs; name each with --run")
    run_evaluation(c, "local", [command, *map(str, found), *as_words(typed)])


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
    run_evaluation(c, "local", ["conversations", *map(str, found), *as_words({"out": out, "all": all})])


@task(positional=[],
      auto_shortflags=False,
      iterable=["run"],
      help={
          "run": RUN_HELP,
          "format": "Of the file: csv (formulas get an apostrophe), jsonl, or parquet with pyarrow (default: csv).",
          "rows": "What a row is: attempts or turns (default: attempts).",
          "out": "The file to write (default: ROWS.FORMAT in the first run's folder).",
          "to": "Hand the runs' figures to wandb, trackio or mlflow, by its own client, and write no file.",
          "project": "With --to, its project or experiment (default: agentgym-eval)."
      })
def export(c: Context,
           run: list[str] | None = None,
           format: str = "csv",
           rows: str = "attempts",
           out: str = "",
           to: str = "",
           project: str = "") -> None:
    """Write runs as a table, or their figures to a tracker."""
    found = _folders("export", run)
    out = out if out or to else str(found[0] / f"{rows}.{format}")
    typed: dict[str, Value] = {"format": format, "rows": rows, "out": out, "to": to, "project": project}
    run_evaluation(c, "local", ["export", *map(str, found), *as_words(typed)])


@task(positional=[],
      auto_shortflags=False,
      help={
          "run": "Folder of a run, or its name in saves/eval (default: the latest).",
          "every": "Seconds between looks (default: 2, and 10 where nobody looks).",
          "report_every": "Seconds between reports of what there is, 0 for none before the end (default: 30).",
          "once": "Look once, and do not wait for the end.",
          "json": "Print one JSON object a look, a line each."
      })
def watch(c: Context,
          run: str = "",
          every: str = "",
          report_every: str = "",
          once: bool = False,
          json: bool = False) -> None:
    """Show a run that goes on, until it ends."""
    [found] = folders([run] if run else [], ROOT)
    typed: dict[str, Value] = {"every": every, "report_every": report_every, "once": once, "json": json}
    run_evaluation(c, "local", ["watch", str(found), *as_words(typed)])


@task(name="list", positional=[], auto_shortflags=False, help={"folder": "Where to look (default: saves/eval)."})
def list_(c: Context, folder: str = "") -> None:
    """Show the runs and their success rates."""
    run_evaluation(c, "local", ["list", folder or str(ROOT / "saves" / "eval")])
