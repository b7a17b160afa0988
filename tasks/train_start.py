"""Check, start and resume training runs: what `train.check`, `train.start` and `train.resume` do."""
from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.errors import UserError
from tasks.lib.flags import helps, repeatable, takes
from tasks.lib.notices import TASK, note, put, say
from tasks.lib.settings import ROOT, effective_environment, resolve
from tasks.lib.training.asked import Asked, Beside, Checked, Resumed, Started

if TYPE_CHECKING:
    from tasks.lib.environments.rows import Environment
    from tasks.lib.training.facts import Facts, Server
    from tasks.lib.training.follow import Rules
    from tasks.lib.training.launch import Decided
    from tasks.lib.training.overrides import Override
    from tasks.lib.training.place import Place
    from tasks.lib.training.plan import Chosen
    from tasks.lib.training.rules import Case, Report

# What a run.json must have to go on from it.
NEEDED = ("environment", "overrides", "command", "folder", "runner", "presets", "variables", "algorithm", "options")


@dataclass
class Prepared:
    """A run that was looked at: what it would be, and what the rules say."""
    decided: Decided
    report: Report
    server: Server
    row: Environment
    replicas: int


@task(positional=[], auto_shortflags=False, iterable=repeatable(Checked), help=helps(Checked))
@takes(Checked)
def check(c: Context, asked: Checked) -> None:
    """Check a training run before it starts."""
    prepared = prepare(c, asked, _typed(c), quiet=asked.json)
    if asked.json:
        print(_dumps(prepared.report.as_dict()))
        if prepared.report.findings:
            raise UserError()
        return
    show(prepared.report)
    tell(f"{len(prepared.report.passed)} checks passed; `invoke train.start` with the same words starts it")


@task(positional=[], auto_shortflags=False, iterable=repeatable(Started), help=helps(Started))
@takes(Started)
def start(c: Context, asked: Started) -> None:
    """Start a training run, after checking it."""
    beside, retention = watch_words(c, asked.watch, asked.watch_flags, asked.gpus or resolve("GPUS"))
    from tasks.lib.training import launch
    from tasks.lib.training.plan import whole
    from tasks.train_environment import served
    if asked.on_env_loss not in ("stop", "continue"):
        raise UserError(f"--on-env-loss {asked.on_env_loss} is no choice; use stop or continue")
    options = {
        "retries": whole("retries", asked.retries, 0),
        "on_env_loss": asked.on_env_loss,
        "stop_seconds": whole("stop-seconds", asked.stop_seconds),
        "keep_env": asked.keep_env
    }
    seconds = whole("wait", asked.wait)
    prepared = prepare(c, asked, _typed(c), retention)
    run = prepared.decided
    run.options.update(options)
    if (run.folder / "run.json").exists() and not c.config.run.dry:
        again(c, prepared, asked, seconds, beside)
        return
    if not c.config.run.dry:
        show(prepared.report)
    with served(c, run, prepared.server, prepared.row, prepared.replicas, seconds, asked.keep_env) as run:
        if c.config.run.dry:
            launch.show(run)
        else:
            launch.prepare_folder(run)
        launch.start(c, run)
    if c.config.run.dry:
        show_watcher(run.name, beside)
        return
    say_started(run)
    start_watcher(run, beside)
    if asked.attach:
        follow(run.name)


@task(positional=[], auto_shortflags=False, help=helps(Resumed))
@takes(Resumed)
def resume(c: Context, asked: Resumed) -> None:
    """Go on with a run from its newest whole checkpoint."""
    from tasks.lib.training.plan import whole
    beside, _ = watch_words(c, asked.watch, asked.watch_flags)
    if not asked.name:
        raise UserError("which run? name it with --name; `invoke train.list` shows them")
    seconds = whole("wait", asked.wait)
    steps = whole("steps", asked.steps) if asked.steps else None
    _resume(c, asked.name, asked.skip, asked, seconds, beside, steps)


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
        put(shlex.join(command(name, words)))


def _typed(c: Context) -> tuple[str, ...]:
    from tasks.lib.engine.client import remainder
    return tuple(remainder(c))


def _dumps(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def tell(text: str) -> None:
    """Print what came of the task, a line with its name."""
    put(f"{TASK.get()}: {text}")


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


def prepare(c: Context,
            asked: Asked,
            typed: tuple[str, ...],
            retention: Rules | None = None,
            quiet: bool = False) -> Prepared:
    """Decide what a run would be, and look at every rule. Nothing is started or written.

    Args:
        typed: what follows --.
        retention: what its watcher keeps; None for everything.

    Raises:
        UserError: what was typed makes no run.
    """
    from tasks.lib.environments.lookup import find_row
    from tasks.lib.training import place as places
    from tasks.lib.training import plan
    from tasks.lib.training.launch import SAVES, Decided, variables
    from tasks.lib.training.overrides import layer, settings
    from tasks.train_environment import find_server
    skip = skipped(asked.skip)
    replicas = plan.whole("replicas", asked.replicas) if asked.replicas else 1
    named = effective_environment().get("ENV", "")
    if asked.env:
        find_row(asked.env)  # a mistyped name is told with near ones
    chosen = plan.choose(
        plan.Wanted(asked.env, asked.model, asked.algorithm, asked.rounds, asked.scaling_inter, asked.every,
                    asked.steps, asked.preset, asked.script, typed), os.environ, named)
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
    facts = replace(facts, keep=retention)
    stepping = plan.stepping(chosen.steps, before.get(plan.EPOCHS), _batches(facts, before))
    gpus = None if _typed_value(chosen, plan.GPUS) != "" else len(place.chosen) or None

    def listed(gpus: int | None) -> list[Override]:
        own = plan.own(chosen.environment, server.url, inside, name, gpus, named_model,
                       place.inside(items) if items else "", before)
        return plan.final(chosen, own, stepping)

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


def _batches(facts: Facts, values: Mapping[str, Any]) -> int | None:
    """Return how many batches an epoch has; None where the item list or the batch is not known."""
    batch = values.get("data.train_batch_size")
    return len(facts.items.ids) // int(batch) if facts.items and _is_count(batch) else None  # type: ignore[arg-type]


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


def say_started(run: Decided) -> None:
    """Print what was started, and what to do next."""
    steps = f", {run.steps} steps" if run.steps else ""
    note(name=run.name, folder=str(run.folder), steps=run.steps)
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


def again(c: Context, prepared: Prepared, asked: Started, wait: int, beside: list[str] | None) -> None:
    """Answer a start of a run that is there: go on with the same one, refuse another.

    Raises:
        UserError: its configuration differs, with the difference.
    """
    from tasks.lib.training.plan import EPOCHS, TOTAL, differences
    from training.folder import RunFolder
    from training.status import status
    run = prepared.decided
    try:
        stored, now = RunFolder(run.folder).read(), status(run.folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{error}; choose another --name") from None
    differing = differences(stored.get("overrides") or [], list(map(str, run.overrides)))
    if differing:
        if all(one.startswith((f"{TOTAL}: ", f"{EPOCHS}: ")) for one in differing) and run.steps:
            raise UserError(f"{run.name} is there with another number of steps ({'; '.join(differing)}); to go on to "
                            f"{run.steps}, `invoke train.resume --name {run.name} --steps {run.steps}`")
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
    _resume(c, run.name, ",".join(run.options["skip"]), asked, wait, beside)


def _resume(c: Context,
            name: str,
            skip: str,
            asked: Beside,
            wait: int,
            beside: list[str] | None,
            steps: int | None = None) -> None:
    """Go on with a run; see `resume`."""
    from tasks.lib.environments.lookup import find_row
    from tasks.lib.environments.running import servers_up
    from tasks.lib.training import launch, runs
    from tasks.lib.training import place as places
    from tasks.lib.training.launch import Decided
    from tasks.lib.training.overrides import layer, make, parse
    from tasks.lib.training.plan import ADDRESS, EPOCHS, ITEMS, MODEL, stepping
    from tasks.train_environment import find_server, served
    from training import resume as resuming
    folder = runs.find(name)
    now, stored = runs.read(folder)
    lacking = [key for key in NEEDED if key not in stored]
    if lacking:
        raise UserError(f"{folder.run_json} has no {', '.join(lacking)}; start the run under another name")
    if now.supervised:
        tell(f"{folder.name} runs already: `invoke train.status --name {folder.name}`")
        return
    if steps is not None and steps <= now.step:
        raise UserError(f"--steps {steps}: {folder.name} has trained {now.step} steps; name more")
    if now.state == "finished" and steps is None:
        tell(
            f"{folder.name} is finished after {now.step} steps; nothing is trained. `--steps N` goes on to step N; other rounds "
            f"or values are another run, from a model that `invoke train.watch --name {folder.name}` merges")
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
    overrides = layer(overrides, stepping(steps, values.get(EPOCHS), _batches(facts, values)))
    places.look(
        c, place, {
            "overrides": list(map(str, overrides)),
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
    if not c.config.run.dry:
        show(report)
    for line in planned.passed_over:
        tell(f"passed over {line}")
    if planned.step:
        tell(
            f"goes on from {planned.step.path.name}; its data.pt brings that attempt's data loader along (batch size, item list, "
            "address), and the epoch begins anew")
    else:
        tell("there is no whole checkpoint; it begins at step 1")
    keep = asked.keep_env or bool(run.options.get("keep_env"))
    with served(c, run, server, row, server.replicas, wait, keep) as run:
        if not c.config.run.dry:

            def change(found: dict[str, Any]) -> None:
                found["environment"] = run.environment
                found["overrides"] = list(map(str, layer(run.overrides, [make(ADDRESS, run.environment["url"])])))
                found["options"] |= {"skip": skipping, "keep_env": keep}
                if steps is not None:
                    found.update(steps=steps, resolved=run.resolved or found.get("resolved"))

            folder.update(change)
        launch.launch(c, place, run.name, run.folder, run.inside)
    if c.config.run.dry:
        show_watcher(run.name, beside)
        return
    say_started(run)
    start_watcher(run, beside)
    if asked.attach:
        follow(run.name)
