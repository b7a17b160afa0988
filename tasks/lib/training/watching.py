"""Follow a run: merge, evaluate and prune its checkpoints as they come.

What was done is read from the disk each time, so a watcher that was killed goes on where it was:
    merged      merged/global_step_N/merge.json was verified, and names the shards as they are now; the merger puts that
                folder in place in one step
    evaluated   eval/ENV-global_step_N-PLAN has all its numbers, and its checkpoint.json names the merge
    pruned      the folder is gone
What fails is tried again, later and later; watch.json shows it, and nothing reads it to decide.
"""
from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tasks.lib.checkpoints import RECORD, is_current, rank_files
from training import checkpoints, curve, pruning, resume, retention
from training.folder import RunFolder, atomic_write
from training.foreign import read_object
from training.lease import Lease, described
from training.status import state_of

MARK = "checkpoint.json"  # in an evaluation's folder: which merge was evaluated
POLL, LONGEST = 5.0, 12  # seconds between two looks, and how many times as long they may become
LOOKING = 0.01  # of a core, which looking takes at most: the more checkpoints are kept, the rarer
PAUSE, LONGEST_PAUSE = 60.0, 3600.0  # seconds until what failed is tried again; twice as long each time
EVALUATION_TRIES = 6  # over half an hour
LINGER = 60.0  # seconds that a run must have ended: a container that starts again has a gap

Say = Callable[[str], None]


class Failed(Exception):
    """A merge or an evaluation failed; the message is one line."""


@dataclass(frozen=True)
class Plan:
    """How each checkpoint is evaluated on one environment.

    Attributes:
        environment: its name.
        words: the flags of `invoke eval` that the numbers depend on.
    """
    environment: str
    words: tuple[str, ...] = ()

    @property
    def flags(self) -> dict[str, str]:
        """Its flags by name, as a task has them."""
        pairs = (word.removeprefix("--").partition("=") for word in self.words)
        return {name.replace("-", "_"): value for name, _, value in pairs}

    @property
    def digest(self) -> str:
        """What tells it from another plan for the same environment."""
        return hashlib.sha256(json.dumps(sorted(self.words)).encode()).hexdigest()[:6]

    def folder(self, run: RunFolder, step: int) -> Path:
        """Return where the evaluation of a step lies."""
        return run.eval / curve.folder_name(self.environment, step, self.digest)


class Hands(Protocol):
    """What does the work."""

    def merge(self, shards: Path, target: Path, log: Path) -> None:
        """Merge and verify; raises Failed."""

    def evaluate(self, model: Path, step: int, plan: Plan, out: Path, log: Path) -> None:
        """Evaluate a merged model into the folder `out`, or go on with what is there; raises Failed."""

    def report(self, folders: Sequence[Path], out: Path, log: Path) -> None:
        """Write a report of all evaluations; raises Failed."""

    def publish(self, log: Path) -> str:
        """Send what the run came to where the user wants it; return what to say, "" for nowhere; raises Failed."""


@dataclass(frozen=True)
class Step:
    """A step of the run, as it is on the disk.

    Attributes:
        number: of the step.
        folder: where its checkpoint is or was.
        raw: its checkpoint; None where that was pruned.
        target: where its merged model is or will be.
        merged: whether there is one.
        verified: whether that was compared with the checkpoint's files as they are now.
        missing: the plans by which it is still to be evaluated.
    """
    number: int
    folder: Path
    raw: checkpoints.Step | None
    target: Path
    merged: bool
    verified: bool
    missing: tuple[Plan, ...] = ()

    @property
    def shards(self) -> Path:
        """The folder with the actor's files."""
        return self.folder / "actor"


@dataclass(frozen=True)
class Work:
    """What is to do next: merge `step` where `plan` is None, else evaluate it."""
    step: Step
    plan: Plan | None = None

    @property
    def key(self) -> str:
        """What a failure of it is remembered by."""
        return f"{self.plan.environment if self.plan else 'merge'} {self.step.number}"


@dataclass
class Failure:
    """What failed, how often, and when it is tried again (seconds of the monotonic clock)."""
    reason: str
    tries: int
    again: float
    about: str


def read_record(model: Path) -> dict[str, Any]:
    """Return the merge.json of a merged model; {} where there is none that can be read."""
    try:
        return read_object(model / RECORD)
    except (OSError, ValueError):
        return {}


def is_whole(model: Path, record: Mapping[str, Any]) -> bool:
    """Tell whether the files that the record of a merge names are there, each of its size."""
    try:
        return bool(record["files"]) and all(
            (model / file["name"]).stat().st_size == file["bytes"] for file in record["files"])
    except (OSError, KeyError, TypeError):
        return False


def verified(model: Path, shards: Path) -> bool:
    """Tell whether `model` was merged from the files that `shards` holds now, compared with them, and is whole."""
    record = read_record(model)
    return record.get("verified") is True and is_whole(model, record) and is_current(model, shards)


def identity(shards: Path) -> str:
    """Return what changes when the files in `shards` do."""
    try:
        return str([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in rank_files(shards)])
    except OSError:
        return ""


def merge_digest(model: Path) -> str:
    """Return what tells the merge in `model` from one of other shards."""
    named = read_record(model).get("sources")
    sources = [[file.get("file"), file.get("bytes"), file.get("modified")]
               for file in (named if isinstance(named, list) else ()) if isinstance(file, dict)]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def evaluated_merge(folder: Path) -> str:
    """Return the digest of the merge that the evaluation in `folder` is of; empty where that is not told."""
    try:
        return str(read_object(folder / MARK)["merge"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def look(run: RunFolder, plans: Sequence[Plan]) -> list[Step]:
    """Return the run's steps, by number, those included of which only the merged model is left."""
    raw = {step.number: step for step in checkpoints.steps(run.path)}
    merged = set(checkpoints.numbers(run.merged))
    found = []
    for number in sorted(raw.keys() | merged):
        step, target = raw.get(number), run.merged / f"global_step_{number}"
        there = (target / RECORD).is_file()
        if step is None:
            right = there and read_record(target).get("verified") is True
        else:
            right = there and step.model_whole and verified(target, step.path / "actor")
        missing = tuple(plan for plan in plans if right and not _is_evaluated(plan.folder(run, number), target))
        found.append(Step(number, run.checkpoint(number), step, target, there, right, missing))
    return found


def _is_evaluated(folder: Path, model: Path) -> bool:
    return curve.read_point(folder) is not None and evaluated_merge(folder) == merge_digest(model)


def next_work(steps: Sequence[Step], failures: Mapping[str, Failure], now: float) -> Work | None:
    """Return what is to do first: merges before evaluations, what never failed before what did, low steps first.

    A merge takes a minute and lets a checkpoint go; an evaluation takes an hour.
    """
    to_do = [Work(step) for step in steps if step.raw and step.raw.model_whole and not step.verified]
    to_do += [Work(step, plan) for step in steps for plan in step.missing]

    def order(work: Work) -> tuple[bool, int, int]:
        failure = failures.get(work.key)
        return work.plan is not None, failure.tries if failure else 0, work.step.number

    due = [work for work in to_do if is_due(failures.get(work.key), work, now)]
    return min(due, key=order, default=None)


def is_due(failure: Failure | None, work: Work, now: float) -> bool:
    """Tell whether to try: it has not failed, or with other files, or long enough ago and not too often."""
    if failure is None or (work.plan is None and failure.about != identity(work.step.shards)):
        return True
    return not is_given_up(failure, work) and now >= failure.again


def is_given_up(failure: Failure | None, work: Work) -> bool:
    """Tell whether an evaluation failed so often that no rule waits for it any more."""
    return failure is not None and work.plan is not None and failure.tries >= EVALUATION_TRIES


def candidates(steps: Sequence[Step], points: Sequence[curve.Point], plans: Sequence[Plan],
               failures: Mapping[str, Failure]) -> list[retention.Candidate]:
    """Return what the rules of retention look at."""
    counted = [(plan.environment, plan.digest) for plan in plans]
    found = []
    for step in steps:
        pending = any(not is_given_up(failures.get(Work(step, plan).key), Work(step, plan)) for plan in step.missing)
        found.append(
            retention.Candidate(step.number,
                                raw=step.raw is not None,
                                whole=step.raw is None or step.raw.model_whole,
                                optimizer=step.raw is not None and bool(pruning.optimizer_files(step.folder)),
                                merged=step.merged,
                                verified=step.verified,
                                score=None if step.missing else curve.score(points, step.number, counted),
                                pending=pending))
    return found


def look_aside(run: RunFolder) -> dict[retention.Aside, Path]:
    """Return the checkpoints that resumes moved away, each with its folder, the first moved first."""
    found = {}
    for attempt in sorted(int(path.name[8:]) for path in run.aside.glob("attempt-*") if path.name[8:].isdecimal()):
        folder = run.aside / f"attempt-{attempt}"
        for step in checkpoints.steps(folder):
            compared = step.model_whole and verified(run.merged / step.path.name, step.path / "actor")
            found[retention.Aside(attempt, step.number, step.model_whole, compared)] = step.path
    return found


@dataclass(frozen=True)
class Going:
    """What a run is doing.

    Attributes:
        ended: whether it has finished, stopped, died or vanished; None where the folder does not tell (no run.json).
        state: in a word.
        step: the step that it is at; None where none runs.
        resumed: steps that a resume may begin with, or that the running attempt began with.
    """
    ended: bool | None
    state: str
    step: int | None
    resumed: tuple[int, ...]


@dataclass
class Watcher:
    """Follows one run.

    Attributes:
        run: its folder.
        rules: what stays; None to prune nothing.
        plans: how to evaluate; none for no evaluation.
        hands: what merges and evaluates.
        lease: held by this process.
        going: tells what the run is doing.
        say: prints a line.
    """
    run: RunFolder
    rules: retention.Rules | None
    plans: Sequence[Plan]
    hands: Hands
    lease: Lease
    going: Callable[[RunFolder], Going]
    say: Say
    poll: float = POLL
    linger: float = LINGER
    failures: dict[str, Failure] = field(default_factory=dict)
    _said: set[str] = field(default_factory=set)
    _shown: str = ""

    def once(self) -> bool:
        """Do all that can be done now; return whether there is nothing left that failed.

        Raises:
            training.lease.Lost: another watcher took over.
        """
        self._finish()
        while True:
            steps = look(self.run, self.plans)
            self._name_faults(steps)
            self._draw()
            self._prune(steps)
            work = next_work(steps, self.failures, time.monotonic())
            if work is None:
                break
            self._do(work)
        self._show("waiting")
        return not self.failures

    def follow(self) -> bool:
        """Do what is to do as it comes, until the run has ended; return as `once` does."""
        ended_at: float | None = None
        while True:
            busy = time.process_time()
            good = self.once()
            going = self.going(self.run)
            if not going.ended:
                ended_at = None
            elif ended_at is None:
                ended_at = time.monotonic()
            elif time.monotonic() - ended_at >= self.linger:
                for failure in self.failures.values():  # once more, now that nothing else comes
                    failure.again = 0.0
                good = self.once()
                good = self.publish() and good
                self._show("ended")
                how = {"died": "has died", "vanished": "has vanished"}.get(going.state, f"is {going.state}")
                self.say(f"the run {how}; nothing more will come" +
                         ("" if going.state == "finished" else f" until `invoke train.resume --name {self.run.name}`"))
                return good
            time.sleep(min(max(self.poll, (time.process_time() - busy) / LOOKING), LONGEST * self.poll))

    def publish(self) -> bool:
        """Send figures elsewhere where the run writes no more; return whether that did not fail."""
        if self.going(self.run).ended is False:
            return True
        self.lease.check()
        self.run.logs.mkdir(exist_ok=True)
        try:
            said = self.hands.publish(self.run.logs / "publish.log")
        except Failed as error:
            self.failures["wandb"] = Failure(str(error), 1, 0.0, "")
            return False
        if said:
            self.say(said)
        return True

    def _do(self, work: Work) -> None:
        self.lease.check()
        step, began = work.step, time.monotonic()
        self._show("merging" if work.plan is None else "evaluating", step.number)
        try:
            if work.plan is None:
                self._merge(step)
            else:
                self._evaluate(step, work.plan)
        except Failed as error:
            self._note(work, str(error))
            return
        self.failures.pop(work.key, None)
        took = time.monotonic() - began
        if work.plan is None:
            self.run.append_event("merged", step=step.number, seconds=round(took, 1))
            self.say(f"step {step.number}: merged and verified in {took:.0f} s: {step.target}")
        else:
            self._tell(step, work.plan, took)

    def _merge(self, step: Step) -> None:
        self.run.merged.mkdir(exist_ok=True)
        self.run.logs.mkdir(exist_ok=True)
        self.hands.merge(step.shards, step.target, self.run.logs / f"merge-global_step_{step.number}.log")
        if not verified(step.target, step.shards):
            raise Failed(f"{step.target} is no merge of what {step.shards} holds now; somebody wrote there meanwhile")

    def _evaluate(self, step: Step, plan: Plan) -> None:
        out, merge = plan.folder(self.run, step.number), merge_digest(step.target)
        if out.exists() and evaluated_merge(out) != merge:  # of a checkpoint that was written again since
            pruning.remove(out, self.lease.check)
        if not out.exists():
            out.mkdir(parents=True)
            atomic_write(out / MARK, json.dumps({"step": step.number, "merge": merge}) + "\n")
        log = self.run.logs / f"eval-{plan.environment}-global_step_{step.number}.log"
        self.run.logs.mkdir(exist_ok=True)
        self.hands.evaluate(step.target, step.number, plan, out, log)
        if curve.read_point(out) is None:
            raise Failed(f"the evaluation has no numbers, or too many attempts failed by infrastructure; see {log}")

    def _tell(self, step: Step, plan: Plan, took: float) -> None:
        point = curve.read_point(plan.folder(self.run, step.number))
        assert point is not None
        self.run.append_event("evaluated",
                              step=step.number,
                              environment=plan.environment,
                              success=point.success["mean"],
                              reward=point.reward["mean"],
                              seconds=round(took, 1))
        self.say(f"step {step.number}: {plan.environment}: success {point.success['mean']:.1%}, reward "
                 f"{point.reward['mean']:.3f} in {took:.0f} s")

    def _draw(self) -> None:
        """Write curve and report where they are not of the evaluations that are there."""
        points = curve.points(self.run.eval)
        path, text = self.run.eval / "curve.json", curve.text(points)
        try:
            if not points or path.read_text() == text:
                return
        except OSError:
            pass
        self.run.logs.mkdir(exist_ok=True)
        try:
            # One curve is of one plan.
            now = {(plan.environment, plan.digest) for plan in self.plans}
            alike = [one for one in points if (one.environment, one.plan) in now] or points
            self.hands.report([self.run.eval / one.folder for one in alike], self.run.eval / "report.html",
                              self.run.logs / "eval-report.log")
        except Failed as error:
            self._say_once(f"no report of the evaluations: {error}")
        atomic_write(path, text)  # last: a watcher that is killed before draws again

    def _note(self, work: Work, reason: str) -> None:
        before = self.failures.get(work.key)
        about = identity(work.step.shards) if work.plan is None else ""
        tries = before.tries + 1 if before and before.about == about else 1
        pause = min(PAUSE * 2**(tries - 1), LONGEST_PAUSE)
        failure = Failure(reason, tries, time.monotonic() + pause, about)
        self.failures[work.key] = failure
        if before is None or before.reason != reason:
            what = f"{work.plan.environment} could not be evaluated" if work.plan else "not merged, so it is kept"
            self.say(f"step {work.step.number}: {what}: {reason}")
            self.run.append_event("failed",
                                  step=work.step.number,
                                  what=work.plan.environment if work.plan else "merge",
                                  reason=reason)
        if is_given_up(failure, work):
            self.say(
                f"step {work.step.number}: given up after {tries} tries; a watcher that is started anew tries again")

    def _name_faults(self, steps: Sequence[Step]) -> None:
        """Name the halves that lie below a whole checkpoint: above it, one may just be being written."""
        newest = max((step.number for step in steps if step.raw and step.raw.model_whole), default=-1)
        for step in steps:
            if step.raw and not step.raw.model_whole and step.number < newest:
                self._say_once(f"step {step.number}: not whole, so it is kept and passed over: {step.raw.faults[0]}")

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def decision(self, steps: Sequence[Step]) -> retention.Decision:
        """Return what goes."""
        if self.rules is None:
            return retention.Decision()
        going = self.going(self.run)
        points = curve.points(self.run.eval)
        return retention.decide(candidates(steps, points, self.plans, self.failures), self.rules, going.resumed,
                                going.step)

    def _prune(self, steps: Sequence[Step]) -> None:
        decision, by_number = self.decision(steps), {step.number: step for step in steps}
        for number in decision.optimizer:
            step = by_number[number]
            self._remove(number, "optimizer", partial(pruning.remove_optimizer, step.folder, partial(self._check,
                                                                                                     step)))
        for number in decision.checkpoints:
            step = by_number[number]
            self._remove(number, "checkpoint", partial(pruning.remove, step.folder, partial(self._check, step)))
        for number in decision.merged:
            step = by_number[number]
            if not step.folder.exists():  # its checkpoint may have stayed after all
                self._remove(number, "merged", partial(pruning.remove, step.target, self.lease.check))
        self._prune_aside(steps)

    def aside(self, steps: Sequence[Step]) -> tuple[dict[retention.Aside, Path], dict[retention.Aside, str]]:
        """Return what resumes moved away, and what of it stays, with the rule."""
        if self.rules is None:
            return {}, {}
        found = look_aside(self.run)
        return found, retention.decide_aside(list(found), candidates(steps, (), (), {})) if found else {}

    def _prune_aside(self, steps: Sequence[Step]) -> None:
        found, kept = self.aside(steps)
        for one, folder in found.items():
            if one not in kept:
                self._remove(one.number, "aside", partial(pruning.remove, folder, self.lease.check))
            elif kept[one] == "unverified":
                self._say_once(f"step {one.number}: {folder} was never merged and compared, so it stays; remove it by "
                               "hand where nobody needs it")

    def _check(self, step: Step) -> None:
        """Look once more, just before a checkpoint or a part of it goes.

        Raises:
            training.lease.Lost: another watcher took over.
            OSError: it is not the one that was verified.
        """
        self.lease.check()
        if not verified(step.target, step.shards):
            raise OSError(0, "was written again meanwhile", str(step.shards))

    def _remove(self, number: int, what: str, remove: Callable[[], int]) -> None:
        try:
            size = remove()
        except OSError as error:
            self._say_once(f"step {number}: its {what} stays: {error.filename} {error.strerror}")
            return
        self.run.append_event("pruned", step=number, what=what, bytes=size)
        words = {"optimizer": "optimizer's files", "merged": "merged model", "aside": "checkpoint aside"}
        self.say(f"step {number}: pruned its {words.get(what, what)}, {size / 1e9:.2f} GB")

    def _finish(self) -> None:
        """Finish what a watcher that was killed left half deleted."""
        for folder in (self.run.path, self.run.merged, self.run.eval, *self.run.aside.glob("attempt-*")):
            for path in pruning.finish(folder):
                self._say_once(f"left {path}, which cannot be removed; mend the permissions and remove it")

    def _show(self, doing: str, step: int | None = None) -> None:
        shown: dict[str, Any] = {
            "schema": 1,
            "doing": doing,
            "step": step,
            "rules": vars(self.rules) if self.rules else None,
            "evaluations": [plan.environment for plan in self.plans],
            "failures": {
                key: {
                    "reason": failure.reason,
                    "tries": failure.tries
                }
                for key, failure in sorted(self.failures.items())
            },
        }
        if json.dumps(shown) == self._shown:
            return
        self._shown = json.dumps(shown)
        owner = self.lease.read() or {}
        atomic_write(
            self.run.watch_json,
            json.dumps({
                **shown, "watcher": described(owner),
                "changed": round(time.time(), 3)
            }, indent=1) + "\n")


def going(run: RunFolder) -> Going:
    """Return what the run in a folder is doing, as far as its files tell."""
    try:
        told = run.read()
    except FileNotFoundError:  # checkpoints of a run that nobody here started
        return Going(None, "unknown", None, _resumable(run, None))
    except (OSError, ValueError):  # which steps were poisoned, nobody can tell: a resume may need any of them
        return Going(None, "unreadable", None, tuple(checkpoints.numbers(run.path)))
    state = run.read_state() or {}
    attempts = [attempt for attempt in told.get("attempts") or [] if isinstance(attempt, dict)]
    last = attempts[-1] if attempts else {}
    word = state_of(last, state, time.time(), told.get("created"))
    running = word in ("starting", "running")
    begun, step = last.get("resumed_from"), state.get("step")
    resumed = _resumable(run, resume.limit(told)) + ((begun, ) if running and isinstance(begun, int) else ())
    reached = step if isinstance(step, int) else begun if isinstance(begun, int) else 0
    return Going(not running, word, reached if running else None, resumed)


def _resumable(run: RunFolder, limit: int | None) -> tuple[int, ...]:
    """Return the steps that a resume may begin with: the trainer's own choice, and that of this project.

    Args:
        limit: the first step that was poisoned, if any.
    """
    newest = checkpoints.newest_whole(run.path, () if limit is None else (limit, ))
    numbers = (checkpoints.tracked(run.path), newest.number if newest else None)
    return tuple(number for number in numbers if number is not None)
