"""Check, start and resume training runs: what `train.check`, `train.start` and `train.resume` do."""
from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.errors import UserError
from tasks.lib.notices import TASK, say
from tasks.lib.settings import ROOT, effective_environment, resolve

if TYPE_CHECKING:
    from tasks.lib.environments.rows import Environment
    from tasks.lib.environments.running import Running
    from tasks.lib.training.facts import Facts, Server
    from tasks.lib.training.follow import Rules
    from tasks.lib.training.launch import Decided
    from tasks.lib.training.overrides import Override
    from tasks.lib.training.place import Place
    from tasks.lib.training.plan import Chosen
    from tasks.lib.training.rules import Case, Report

WHAT = {
    "env": "Environment that is played (default: the script's, then $ENV).",
    "model": "Folder of the Hugging Face model, or its name in models/ (default: the script's or preset's).",
    "name": "Name of the run and its folder, saves/NAME (default: ENV-ALGORITHM-fixed|scaling-DATE-TIME).",
    "algorithm": "grpo or reinforce++ (default: the preset's or script's, grpo).",
    "rounds": "Rounds of an episode, a fixed number (default: the preset's or script's).",
    "scaling_inter": "ScalingInter: rounds of each stage, such as 6,13,20.",
    "every": "With --scaling-inter, steps of a stage (default: the preset's or script's, 100).",
    "steps": "Steps to train (default: all epochs of the preset or script, less one step).",
    "gpus": "GPUs: all, or indices such as 0,1 (default: $GPUS, then all).",
    "shm_size": "With --runner docker, shared memory of the container, such as 64g (default: $SHM_SIZE, then 32g).",
    "preset": "fixed, scaling, or a TOML file of the trainer's keys. Repeatable; the last wins.",
    "script": "Take the overrides of one of AgentGym-RL's training scripts, or of a copy of yours.",
    "server": "Address of the environment server, for the trainer (default: the one that is up, else one is started).",
    "replicas":
    "Servers behind the one address, where one is started; with --server, those that are there (default: 1).",
    "runner": "auto (default: docker where there is one, else local), docker, or local (a Python of this machine).",
    "python": "With --runner local, the Python with AgentGym-RL's packages (default: $TRAIN_PYTHON, then this one).",
    "skip": "Checks to leave out, by their ids: gpus,disk. They are written down in run.json.",
    "i_understand": "Agree to what the environment does to real accounts; it says what when this is missing.",
}
HOW = {
    "retries": "Deaths from which it resumes by itself: environment, Ray worker, NCCL (default: 0).",
    "on_env_loss": "Where the environment was away in a step: stop (default) at the last good checkpoint, or continue.",
    "stop_seconds": "Seconds that the trainer has to end before it is killed (default: 30).",
    "attach": "Follow the log; Ctrl-C leaves the run going.",
    "watch": "Merge, evaluate and prune its checkpoints as they come, as `train.watch` does.",
    "watch_flags": "Flags of `train.watch` for that, in one word: '--eval=babyai --limit=50 --keep-last=2'.",
    "wait": "Seconds until an environment server that is started must be ready (default: 120).",
}

# What a run.json must have to go on from it.
NEEDED = ("environment", "overrides", "command", "folder", "runner", "presets", "variables", "algorithm", "options")


@dataclass
class Asked:
    """The flags that `check` and `start` share, as typed."""
    env: str = ""
    model: str = ""
    name: str = ""
    algorithm: str = ""
    rounds: str = ""
    scaling_inter: str = ""
    every: str = ""
    steps: str = ""
    gpus: str = ""
    shm_size: str = ""
    preset: tuple[str, ...] = ()
    script: str = ""
    server: str = ""
    replicas: str = ""
    runner: str = "auto"
    python: str = ""
    skip: str = ""
    i_understand: bool = False
    typed: tuple[str, ...] = ()
    retention: Rules | None = None


@dataclass
class Prepared:
    """A run that was looked at: what it would be, and what the rules say."""
    decided: Decided
    report: Report
    server: Server
    row: Environment
    replicas: int


@task(positional=[], auto_shortflags=False, iterable=["preset"], help={**WHAT, "json": "Print the findings as JSON."})
def check(c: Context,
          env: str = "",
          model: str = "",
          name: str = "",
          algorithm: str = "",
          rounds: str = "",
          scaling_inter: str = "",
          every: str = "",
          steps: str = "",
          gpus: str = "",
          shm_size: str = "",
          preset: list[str] | None = None,
          script: str = "",
          server: str = "",
          replicas: str = "",
          runner: str = "auto",
          python: str = "",
          skip: str = "",
          i_understand: bool = False,
          json: bool = False) -> None:
    """Check a training run before it starts."""
    asked = Asked(env, model, name, algorithm, rounds, scaling_inter, every, steps, gpus, shm_size, tuple(preset or ()),
                  script, server, replicas, runner, python, skip, i_understand, _typed(c))
    prepared = prepare(c, asked, quiet=json)
    if json:
        print(_dumps(prepared.report.as_dict()))
        if prepared.report.findings:
            raise UserError()
        return
    show(prepared.report)
    tell(f"{len(prepared.report.passed)} checks passed; `invoke train.start` with the same words starts it")


@task(positional=[], auto_shortflags=False, iterable=["preset"], help={**WHAT, **HOW})
def start(c: Context,
          env: str = "",
          model: str = "",
          name: str = "",
          algorithm: str = "",
          rounds: str = "",
          scaling_inter: str = "",
          every: str = "",
          steps: str = "",
          gpus: str = "",
          shm_size: str = "",
          preset: list[str] | None = None,
          script: str = "",
          server: str = "",
          replicas: str = "",
          runner: str = "auto",
          python: str = "",
          skip: str = "",
          i_understand: bool = False,
          retries: str = "0",
          on_env_loss: str = "stop",
          stop_seconds: str = "30",
          attach: bool = False,
          watch: bool = False,
          watch_flags: str = "",
          wait: str = "120") -> None:
    """Start a training run, after checking it."""
    beside, retention = watch_words(c, watch, watch_flags, gpus or resolve("GPUS"))
    from tasks.lib.training import launch
    from tasks.lib.training.plan import whole
    asked = Asked(env, model, name, algorithm, rounds, scaling_inter, every, steps, gpus, shm_size, tuple(preset or ()),
                  script, server, replicas, runner, python, skip, i_understand, _typed(c), retention)
    if on_env_loss not in ("stop", "continue"):
        raise UserError(f"--on-env-loss {on_env_loss} is no choice; use stop or continue")
    options = {
        "retries": whole("retries", retries, 0),
        "on_env_loss": on_env_loss,
        "stop_seconds": whole("stop-seconds", stop_seconds)
    }
    seconds = whole("wait", wait)
    prepared = prepare(c, asked)
    run = prepared.decided
    run.options.update(options)
    if c.config.run.dry:
        if prepared.server.state == "absent":
            serve(c, prepared, seconds)
        launch.show(run)
        launch.start(c, run)
        show_watcher(run.name, beside)
        return
    if (run.folder / "run.json").exists():
        again(c, prepared, attach, seconds, beside)
        return
    show(prepared.report)
    prepared = serve(c, prepared, seconds)
    run = prepared.decided
    launch.prepare_folder(run)
    launch.start(c, run)
    say_started(run)
    start_watcher(run, beside)
    if attach:
        follow(run.name)


@task(positional=[],
      auto_shortflags=False,
      help={
          "name": "The run's name.",
          "skip": WHAT["skip"],
          "attach": HOW["attach"],
          "watch": HOW["watch"],
          "watch_flags": HOW["watch_flags"],
          "wait": HOW["wait"],
      })
def resume(c: Context,
           name: str = "",
           skip: str = "",
           attach: bool = False,
           watch: bool = False,
           watch_flags: str = "",
           wait: str = "120") -> None:
    """Go on with a run from its newest whole checkpoint."""
    from tasks.lib.training.plan import whole
    beside, _ = watch_words(c, watch, watch_flags)
    if not name:
        raise UserError("which run? name it with --name; `invoke train.list` shows them")
    seconds = whole("wait", wait)
    _resume(c, name, skip, attach, seconds, beside)


def watch_words(c: Context, watch: bool, flags: str, used: str = "") -> tuple[list[str] | None, Rules | None]:
    """Return the flags for the run's watcher, None where none is wanted; and what it keeps, None for everything.

    Raises:
        UserError: they are none of `train.watch`, or say what cannot be.
    """
    from tasks.train import check_watch_words
    if not watch:
        if flags:
            raise UserError("--watch-flags is about the watcher; add --watch")
        return None, None
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise UserError(f"--watch-flags {flags!r}: {error}") from None
    return words, check_watch_words(c, words, used)


def start_watcher(run: Decided, words: list[str] | None) -> None:
    """Start the run's watcher, where one is wanted.

    Raises:
        UserError: it did not start; the run goes on.
    """
    from tasks.lib.training.follow import launch_beside
    from training.folder import RunFolder
    if words is not None:
        tell(launch_beside(RunFolder(run.folder), words))


def show_watcher(name: str, words: list[str] | None) -> None:
    """Print the command of the run's watcher, where one is wanted."""
    from tasks.lib.training.follow import command
    if words is not None:
        print(shlex.join(command(name, words)), flush=True)


def _typed(c: Context) -> tuple[str, ...]:
    from tasks.lib.engine.client import remainder
    return tuple(remainder(c))


def _dumps(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def tell(text: str) -> None:
    """Print what came of the task, a line with its name."""
    print(f"{TASK.get()}: {text}", flush=True)


def skipped(text: str) -> list[str]:
    """Return the ids that the user leaves out.

    Raises:
        UserError: there is no such check.
    """
    from tasks.lib.training.rules import RULES
    found = [one.strip() for one in text.split(",") if one.strip()]
    unknown = [one for one in found if one not in RULES]
    if unknown:
        raise UserError(f"--skip {','.join(unknown)}: there is no such check; they are {', '.join(RULES)}")
    return found


def show(report: Report) -> None:
    """Print what the rules said; what is wrong is a line each.

    Raises:
        UserError: something is.
    """
    from training.text import shown
    for name, reason in report.undecided.items():
        say(f"not checked: {name}: {shown(reason)}")
    if report.skipped:
        say(f"left out: {', '.join(report.skipped)}")
    for finding in report.findings:
        say(shown(str(finding)))
    if report.findings:
        raise UserError()


def prepare(c: Context, asked: Asked, quiet: bool = False) -> Prepared:
    """Decide what a run would be, and look at every rule. Nothing is started or written.

    Raises:
        UserError: what was typed makes no run.
    """
    from tasks.lib.environments.lookup import find_row
    from tasks.lib.training import place as places
    from tasks.lib.training import plan
    from tasks.lib.training.launch import SAVES, Decided, variables
    from tasks.lib.training.overrides import layer, settings
    skip = skipped(asked.skip)
    replicas = plan.whole("replicas", asked.replicas) if asked.replicas else 1
    named = effective_environment().get("ENV", "")
    if asked.env:
        find_row(asked.env)  # a mistyped name is told with near ones
    chosen = plan.choose(
        plan.Wanted(asked.env, asked.model, asked.algorithm, asked.rounds, asked.scaling_inter, asked.every,
                    asked.steps, asked.preset, asked.script, asked.typed), os.environ, named)
    for line in chosen.notices if not quiet else []:
        say(line)
    row = find_row(chosen.environment)
    before = settings(layer(chosen.base, chosen.flags, chosen.typed), {})
    name = plan.check_name(asked.name) if asked.name else plan.default_name(chosen.environment, before,
                                                                            time.strftime("%Y%m%d-%H%M%S"))
    place = places.choose(c, asked.runner, asked.python, asked.gpus, asked.shm_size)
    folder = SAVES.resolve() / name
    inside = str(place.translation.path(SAVES) if place.translation else SAVES.resolve()) + f"/{name}"
    server = find_server(c, row, place, asked.server or _typed_value(chosen, plan.ADDRESS), replicas,
                         asked.i_understand)
    if asked.replicas and server.replicas != replicas:
        say(f"{row.name} is up with {server.replicas} replica{'s' if server.replicas > 1 else ''}, so --replicas {replicas} "
            f"does not count; `invoke env.down --env {row.name}` first, and as many are started")
    model, items = model_of(asked, chosen), items_of(asked, chosen)
    typed_model = str(_typed_value(chosen, plan.MODEL))
    slash = (typed_model
             or ("" if asked.model else str(before.get(plan.MODEL, "")))).endswith("/")  # which a rule refuses
    named_model = place.inside(model) + ("/" if slash else "") if model else ""
    facts = facts_of(place, folder, model, items, server, str(before.get("data.prompt_key", "item_id")))
    facts = replace(facts, keep=asked.retention)
    batches = len(facts.items.ids) // int(before["data.train_batch_size"]) if facts.items and _is_count(
        before.get("data.train_batch_size")) else None
    stepping = plan.stepping(chosen.steps, before.get(plan.EPOCHS), batches)
    gpus = None if _typed_value(chosen, plan.GPUS) != "" else len(place.chosen) or None

    def listed(gpus: int | None) -> list[Override]:
        own = plan.own(chosen.environment, server.url, inside, name, gpus, named_model,
                       place.inside(items) if items else "", before)
        return plan.final(chosen, own, stepping)

    if not c.config.run.dry:
        places.look(
            c, place, {
                "overrides": list(map(str, listed(gpus))),
                "model": place.inside(model) if model and model.is_dir() else None,
                "host_model": str(model) if model and model.is_dir() else None,
                "prompt": [row.prompt.file, row.prompt.class_] if row.prompt and row.prompt.file else None,
                "url": server.url if server.state in ("ready", "unknown") else None,
            })
    there = places.gpu_count(place)
    if not gpus and there and not _typed_value(chosen, plan.GPUS) and not facts.cluster:
        gpus = there
        if place.told.get("resolved"):
            place.told["resolved"]["trainer"]["n_gpus_per_node"] = gpus
    overrides = listed(gpus)
    facts = replace(facts, place=place.told, place_missing=place.missing, gpus=there, shm=places.shared_memory(place))
    case, report = judge(overrides, facts, skip, chosen.reserved())
    decided = Decided(name,
                      folder,
                      inside,
                      place, {
                          "name": row.name,
                          "url": server.url,
                          "prefix": row.protocol.prefix,
                          "replicas": server.replicas,
                          "started_by_run": False
                      },
                      overrides,
                      place.told.get("resolved"),
                      chosen.presets,
                      variables(place, inside, chosen.variables),
                      *counted(case),
                      algorithm=str(case.get("algorithm.adv_estimator")),
                      options={"skip": skip})
    return Prepared(decided, report, server, row, replicas)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _typed_value(chosen: Chosen, key: str) -> Any:
    return next((one.value for one in chosen.typed if one.key == key), "")


def judge(overrides: list[Override], facts: Facts, skip: list[str], reserved: list[str]) -> tuple[Case, Report]:
    """Return the run as the rules see it, and what they say: of Hydra's own configuration where it could be asked."""
    from tasks.lib.training.overrides import flat, settings
    from tasks.lib.training.rules import DEFAULTS, Case, check
    resolved = facts.place.get("resolved")
    case = Case(flat(resolved) if resolved else settings(overrides, DEFAULTS), facts, reserved)
    return case, check(case, skip)


def counted(case: Case) -> tuple[int | None, int | None, int | None, int | None]:
    """Return world size, GPUs a node, steps and save_freq of a run; None for what is no count."""
    from tasks.lib.training.rules import Undecided

    def number(ask: Any) -> int | None:
        try:
            return ask()
        except Undecided:
            return None

    return (number(lambda: case.world), number(lambda: case.number("trainer.n_gpus_per_node")), number(case.steps),
            number(lambda: case.number("trainer.save_freq")))


def model_of(asked: Asked, chosen: Chosen) -> Path | None:
    """Return the model's folder on this machine; None where none is named."""
    from tasks.lib.training.place import data_path, model_path
    from tasks.lib.training.plan import MODEL
    typed = _typed_value(chosen, MODEL)
    if typed:
        return data_path(str(typed), [Path.cwd(), ROOT])
    if asked.model:
        return model_path(asked.model)
    named = chosen.value(MODEL)
    return data_path(str(named), _bases(asked)) if named else None


def items_of(asked: Asked, chosen: Chosen) -> Path | None:
    """Return the item list on this machine; None where none is named."""
    from tasks.lib.training.place import data_path
    from tasks.lib.training.plan import ITEMS
    typed = _typed_value(chosen, ITEMS)
    if typed:
        return data_path(str(typed), [Path.cwd(), ROOT])
    named = chosen.value(ITEMS)
    return data_path(str(named), _bases(asked)) if named else None


def _bases(asked: Asked) -> list[Path]:
    """Return where a relative name of a preset or script may start: in the project, or beside the script's own checkout."""
    checkout = [parent / "AgentGym-RL" for parent in Path(asked.script).resolve().parents[:4]] if asked.script else []
    return [ROOT, *[place for place in checkout if place.is_dir()]]


def facts_of(place: Place, folder: Path, model: Path | None, items: Path | None, server: Server, key: str) -> Facts:
    """Return what this machine's files tell of a run."""
    from tasks.lib.training import facts
    environ = effective_environment()
    return facts.Facts(model=facts.read_model(model) if model else None,
                       items=facts.read_items(items, key) if items else None,
                       server=server,
                       runner=place.runner,
                       cluster=environ.get("RAY_ADDRESS", "") if place.runner == "local" else "",
                       folder=folder,
                       free_bytes=facts.free_bytes(folder),
                       unwritable=facts.unwritable(folder),
                       wandb_mode=resolve("WANDB_MODE"),
                       wandb_key=bool(resolve("WANDB_API_KEY")))


def find_server(c: Context, row: Environment, place: Place, address: str, replicas: int, understood: bool) -> Server:
    """Return what is known of the environment's server: the one at `address`, the one that is up, or one to be started."""
    from servers.protocol import Client, ServerError, check_ready
    from tasks.lib.environments.compose_model import service_name
    from tasks.lib.environments.plan import Options
    from tasks.lib.environments.running import container_url, servers_up, session_totals
    from tasks.lib.environments.start_stop import require_startable
    from tasks.lib.evaluation.plan import loopback_host
    from tasks.lib.host.ports import port_is_free
    from tasks.lib.training.facts import Server
    limits: dict[str, Any] = {
        "first": row.items.first,
        "last": row.items.last,
        "wraps": row.items.wraps,
        "max_sessions": row.max_sessions
    }
    prefix = row.protocol.prefix

    def ready(url: str) -> tuple[str, str]:
        try:
            check_ready(Client(url, row.protocol, timeout=4), row.check.items[0])
        except ServerError as error:
            return f"{url}: {error}", f"see `invoke env.logs --env {row.name}`, or start it anew: `invoke env.restart --env {row.name}`"
        return "ready", ""

    if address:
        url = address.rstrip("/").removesuffix(prefix)
        host = loopback_host(url) if place.runner == "docker" else ""
        if host:
            return Server(row.name,
                          state=f"{host} in {address} would be the container itself",
                          remedy=f"`invoke env.up --env {row.name}` and leave --server out",
                          url=url + prefix,
                          replicas=replicas,
                          given=True,
                          **limits)
        state, remedy = ("ready", "") if c.config.run.dry else ready(url)
        if state != "ready":
            remedy = f"see what serves there, or `invoke env.up --env {row.name}` and leave --server out"
        if state != "ready" and place.runner == "docker":
            state, remedy = "unknown", ""  # a name of the containers' network, or of another machine: not to be told from here
        return Server(row.name, state=state, remedy=remedy, url=url + prefix, replicas=replicas, given=True, **limits)
    up = servers_up().get(row.name)
    if up:
        if place.runner == "docker" and up.runner == "local":
            return Server(row.name,
                          state="it is up as a process of this machine, which a container cannot reach",
                          remedy=f"`invoke env.down --env {row.name}`, then start again",
                          **limits)
        url = container_url(up.service, up.port) if place.runner == "docker" else up.url
        state, remedy = ("ready", "") if c.config.run.dry else ready(up.url)
        told = None if c.config.run.dry or state != "ready" else session_totals(up)
        return Server(row.name,
                      state=state,
                      remedy=remedy,
                      url=url + prefix,
                      replicas=up.replicas,
                      live=told["live"] if told else None,
                      **limits)
    bind, settings = resolve("ENV_BIND"), effective_environment()
    runner = _server_runner(place)
    port = settings.get("ENV_PORT") or str(row.port)
    options = Options(port=int(port) if port.isdecimal() else row.port,
                      replicas=replicas,
                      bind=bind,
                      understood=understood)
    try:
        require_startable(c, row, options, runner)
    except UserError as error:
        said = str(error.message or "")
        what, _, remedy = said.partition("; ") if "; " in said else said.partition(": ")
        return Server(row.name,
                      state=what,
                      remedy=remedy or "see DOCKER.md, Environment servers",
                      replicas=replicas,
                      **limits)
    taken = options.port if settings.get("ENV_PORT") and not port_is_free(options.port, bind) else None
    url = container_url(service_name(row),
                        options.port) if place.runner == "docker" else f"http://127.0.0.1:{options.port}"
    return Server(row.name, state="absent", url=url + prefix, replicas=replicas, port_taken=taken, **limits)


def _server_runner(place: Place) -> str:
    from tasks.lib.environments.start_stop import choose_server_runner
    return "docker" if place.runner == "docker" else choose_server_runner("auto")


def serve(c: Context, prepared: Prepared, wait: int) -> Prepared:
    """Start the environment where it is not up, and return the run with its address.

    Raises:
        UserError: it did not get ready.
    """
    from tasks.lib.environments import lease
    from tasks.lib.environments.compose_model import service_name
    from tasks.lib.environments.plan import Options
    from tasks.lib.environments.running import container_url, servers_up
    from tasks.lib.environments.start_stop import pick_port, start_server
    from tasks.lib.training.overrides import layer, make
    from tasks.lib.training.plan import ADDRESS
    if prepared.server.state != "absent":
        return prepared
    row, run = prepared.row, prepared.decided
    runner, bind = _server_runner(run.place), resolve("ENV_BIND")
    with nullcontext() if c.config.run.dry else lease.exclusive_lock(row.name):
        up: Mapping[str, Running] = {} if c.config.run.dry else servers_up()
        if row.name in up:
            port, url = up[row.name].port, up[row.name].url
        else:
            port = pick_port(row, "", bind)
            options = Options(port=port,
                              replicas=prepared.replicas,
                              bind=bind,
                              understood=bool(row.consent),
                              aliases=not up)
            url = start_server(c, row, options, runner, False, wait)
            if not c.config.run.dry:
                say(f"started {row.name} at {url}")
    if run.place.runner == "docker":
        url = container_url(service_name(row), port)
    url += row.protocol.prefix
    environment = {**run.environment, "url": url, "replicas": prepared.replicas, "started_by_run": True}
    overrides = layer(run.overrides, [make(ADDRESS, url)])
    if run.resolved:
        run.resolved["actor_rollout_ref"]["agentgym"]["env_addr"] = url
    return replace(prepared, decided=replace(run, environment=environment, overrides=overrides))


def say_started(run: Decided) -> None:
    """Print what was started, and what to do next."""
    steps = f", {run.steps} steps" if run.steps else ""
    tell(f"{run.name} runs in the background{steps}: `invoke train.status --name {run.name}`, train.logs, train.stop; "
         f"folder {run.folder}")


def follow(name: str) -> None:
    """Follow the run's log until it ends, and tell how; Ctrl-C leaves it going.

    Raises:
        UserError: it did not finish.
    """
    from tasks.lib.training import runs, showing
    from training.text import shown
    run = runs.find(name)
    try:
        showing.logs(run, 200, True, None)
    except KeyboardInterrupt:
        say(f"{name} goes on; `invoke train.stop --name {name}` ends it")
        raise
    found, _ = runs.read(run)
    if found.state == "finished":
        tell(f"{name} is finished after {found.step} steps")
        return
    why = f" of {found.cause}" if found.state == "died" else ""
    raise UserError("; ".join(filter(None, (f"{name}: {found.state}{why}", shown(found.reason), found.remedy))), code=1)


def again(c: Context, prepared: Prepared, attach: bool, wait: int, beside: list[str] | None = None) -> None:
    """Answer a start of a run that is there: go on with the same one, refuse another.

    Raises:
        UserError: its configuration differs, with the difference.
    """
    from tasks.lib.training.plan import differences
    from training.folder import RunFolder
    from training.status import status
    run = prepared.decided
    try:
        stored, now = RunFolder(run.folder).read(), status(run.folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{error}; choose another --name") from None
    differing = differences(stored.get("overrides") or [], list(map(str, run.overrides)))
    if differing:
        shown = "; ".join(differing[:8]) + (f"; and {len(differing) - 8} more" if len(differing) > 8 else "")
        other = {
            "finished": "",
            "running": f", or see it: `invoke train.status --name {run.name}`"
        }.get("running" if now.supervised else now.state,
              f", or go on with it as it was: `invoke train.resume --name {run.name}`")
        raise UserError(
            f"{run.name} is there{', finished,' if not other else ''} with another configuration ({shown}); "
            f"choose another --name{other}")
    tell(f"{run.name} is there with this configuration")
    _resume(c, run.name, ",".join(run.options["skip"]), attach, wait, beside)


def _resume(c: Context, name: str, skip: str, attach: bool, wait: int, beside: list[str] | None = None) -> None:
    """Go on with a run; see `resume`."""
    from tasks.lib.environments.lookup import find_row
    from tasks.lib.environments.running import servers_up
    from tasks.lib.training import launch, runs
    from tasks.lib.training import place as places
    from tasks.lib.training.launch import Decided
    from tasks.lib.training.overrides import layer, make, parse
    from tasks.lib.training.plan import ADDRESS, ITEMS, MODEL
    from training import resume as resuming
    folder = runs.find(name)
    now, stored = runs.read(folder)
    lacking = [key for key in NEEDED if key not in stored]
    if lacking:
        raise UserError(f"{folder.run_json} has no {', '.join(lacking)}; start the run under another name")
    if now.supervised:
        tell(f"{folder.name} runs already: `invoke train.status --name {folder.name}`")
        return
    if now.state == "finished":
        tell(f"{folder.name} is finished after {now.step} steps; nothing is trained")
        return
    try:
        planned = resuming.plan(folder, stored)
    except ValueError as error:
        raise UserError(f"{folder.name}: {error}") from None
    place = places.again(c, stored)
    skipping = skipped(skip) or list(stored.get("options", {}).get("skip", ()))
    overrides = [parse(word, "in run.json") for word in stored["overrides"]]
    values = {one.key: one.value for one in overrides}
    row = find_row(str(stored["environment"]["name"]))
    started = bool(stored["environment"].get("started_by_run"))
    server = find_server(c, row, place,
                         "" if started or servers_up().get(row.name) else str(stored["environment"]["url"]),
                         int(stored["environment"].get("replicas") or 1), bool(row.consent))
    model = Path(places.outside(place, str(values.get(MODEL, "")).rstrip("/")))
    items = Path(places.outside(place, str(values.get(ITEMS, ""))))
    facts = facts_of(place, folder.path.resolve(), model, items, server, str(values.get("data.prompt_key", "item_id")))
    if not c.config.run.dry:
        places.look(
            c, place, {
                "overrides": stored["overrides"],
                "model": str(values.get(MODEL, "")).rstrip("/") if model.is_dir() else None,
                "host_model": str(model) if model.is_dir() else None,
                "prompt": [row.prompt.file, row.prompt.class_] if row.prompt and row.prompt.file else None,
                "url": server.url if server.state in ("ready", "unknown") else None,
            })
    facts = replace(facts,
                    place=place.told,
                    place_missing=place.missing,
                    gpus=places.gpu_count(place),
                    shm=places.shared_memory(place))
    case, report = judge(overrides, facts, skipping, [])
    run = Decided(folder.name,
                  folder.path.resolve(),
                  stored["folder"],
                  place, {
                      **stored["environment"], "url": server.url or stored["environment"]["url"],
                      "prefix": row.protocol.prefix
                  },
                  overrides,
                  place.told.get("resolved"),
                  stored["presets"],
                  stored["variables"],
                  *counted(case),
                  algorithm=stored["algorithm"],
                  options=stored["options"])
    prepared = Prepared(run, report, server, row, server.replicas)
    if not c.config.run.dry:
        show(report)
    run = serve(c, prepared, wait).decided
    for line in planned.passed_over:
        tell(f"passed over {line}")
    if planned.step:
        tell(
            f"goes on from {planned.step.path.name}; its data.pt brings that attempt's data loader along (batch size, item list, "
            "address), and the epoch begins anew")
    else:
        tell("there is no whole checkpoint; it begins at step 1")
    if c.config.run.dry:
        launch.launch(c, place, run.name, run.folder, run.inside)
        show_watcher(run.name, beside)
        return

    def change(found: dict[str, Any]) -> None:
        found["environment"] = run.environment
        found["overrides"] = list(map(str, layer(overrides, [make(ADDRESS, run.environment["url"])])))
        found["options"]["skip"] = skipping

    folder.update(change)
    launch.launch(c, place, run.name, run.folder, run.inside)
    say_started(run)
    start_watcher(run, beside)
    if attach:
        follow(run.name)
