"""Run the trainer of a run's folder: read what it says, watch it and the environment, explain its end, try again.

One supervisor a folder; it is the container's program, or a process of its own on a host. The trainer is its child, in
a session of its own, and goes when it goes. All that is known is in the folder at any moment (`training/folder.py`).
"""
from __future__ import annotations

import errno
import fcntl
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from training import checkpoints, diagnosis, machine, raylogs, resume, rollouts
from training.attempt import LINE_WIDTH, Attempt
from training.diagnosis import Death, Facts
from training.environment import EVERY, Monitor, ask
from training.folder import RunFolder, atomic_write
from training.foreign import WRITE
from training.rollouts import Errors, Window
from training.text import shown

MISUSE, STOPPED = 2, 143
HEARTBEAT = 1.0  # seconds
TICK = 0.1
RAY_WAITS_SECONDS = 300.0
LOOK = 0.5  # between two looks at the folder, which may be on a network
# What the trainer says comes later than what it writes, and from different processes in no order.
WORDS_SECONDS, LATE_SECONDS = 2.0, 5.0
ORPHAN_SECONDS = 5.0  # for what the trainer started to end by itself
GPUS_EVERY = 30.0


class Refusal(Exception):
    """The folder cannot be run; one line for the user."""


class Options:
    """run.json's `options`, with the defaults of those that it leaves out; seconds where nothing else is said."""

    def __init__(self, found: Mapping[str, Any]) -> None:

        def number(name: str, default: float) -> float:
            value = found.get(name)
            good = isinstance(value,
                              (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
            return float(value) if good else default  # type: ignore[arg-type]

        self.retries = int(number("retries", 0))
        self.keeps_on = found.get("on_env_loss") == "continue"
        self.stop_seconds = number("stop_seconds", 30)
        # A step's requests wait up to 2400 s for the environment (verl/utils/agentgym/client.py).
        self.hang_seconds = number("hang_seconds", 3600)
        self.env_lost_seconds = number("env_lost_seconds", 10)
        # Between steps nothing is lost at once: the trainer asks for sessions a while, and a restart takes seconds.
        self.env_gone_seconds = number("env_gone_seconds", 20)
        self.env_wait_seconds = number("env_wait_seconds", 600)
        self.env_start_seconds = number("env_start_seconds", 60)
        self.retry_seconds = number("retry_seconds", 10)


def say(text: str) -> None:
    """Print a line for whoever reads the supervisor's own output; it may have nobody."""
    with suppress(OSError, ValueError):
        print(shown(text), flush=True)


class Supervisor:
    """Runs attempts of a run until it is finished, stopped, or died of what another attempt does not cure."""

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(Path(path).absolute())
        self.stop_signal = 0
        self.signals = 0
        self.identity = machine.identity(os.getpid())
        self.attempt: Attempt | None = None
        self.monitor: Monitor | None = None
        self.gpus: list[dict[str, Any]] | None = None
        self.note = ""  # what the supervisor itself waits for
        self.retries = 0  # so far
        self._beat = 0.0
        self._gpus_at = 0.0
        self._spawning = threading.Lock()
        self._lock = -1

    # -- the whole run

    def run(self) -> int:
        """Run the folder; return the exit code.

        Raises:
            Refusal: it cannot be run.
        """
        try:
            run = self.folder.read()
        except FileNotFoundError:
            raise Refusal(f"{self.folder.run_json} is not there; `invoke train.start` makes a run's folder") from None
        except (OSError, ValueError) as error:
            raise Refusal(str(error)) from None
        self._check(run)
        self.options = Options(run.get("options") or {})
        self._take_folder()
        for caught in (signal.SIGTERM, signal.SIGINT):
            signal.signal(caught, self._on_signal)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal that closes
        machine.adopt_orphans()
        self.folder.reserve()
        run = self._close_left_over(run)
        if resume.is_finished(self.folder, run):
            say(f"{self.folder.name} has trained all its {run.get('steps')} steps; nothing is left to do")
            return 0
        while True:
            number = 1 + max((found.get("number", 0) for found in run.get("attempts") or ()), default=0)
            waits = self.options.env_wait_seconds if self.retries else self.options.env_start_seconds
            death, code = self._one(run, number, waits)
            run = self.folder.read()
            if death is None or not self._goes_on_after(death):
                return code
            self.retries += 1
            self._event("retry", attempt=number, cause=death.cause, retry=self.retries, of=self.options.retries)
            say(f"retry {self.retries} of {self.options.retries} in {self.options.retry_seconds:g} s")
            if not self._sleep(self.options.retry_seconds, self.note):
                return self._stopped_between(number)

    def _goes_on_after(self, death: Death) -> bool:
        """Tell whether another attempt follows."""
        return death.curable and self.retries < self.options.retries and not self.stop_signal

    def _check(self, run: dict[str, Any]) -> None:
        """Refuse a run.json that lacks what is needed, or that is another folder's."""
        for key, kind in (("command", list), ("overrides", list), ("attempts", list), ("options", dict)):
            if not isinstance(run.setdefault(key, kind()), kind):
                raise Refusal(f"{self.folder.run_json}: {key} is no {'list' if kind is list else 'table'}")
        if not run["command"]:
            raise Refusal(f"{self.folder.run_json} has no command")
        said = run.get("folder")
        if said and os.path.realpath(said) != os.path.realpath(self.folder.path):
            raise Refusal(
                f"{self.folder.run_json} is of the folder {said}, where the trainer would write; run it there, or "
                "make a new run")

    def _take_folder(self) -> None:
        """Take the folder for this process alone.

        Raises:
            Refusal: another has it, or a file that is written in it is a link, which may lead out, a pipe or a device.
        """
        place = self.folder.path
        for path in (self.folder.events, self.folder.metrics, place / ".supervisor.lock", place / ".run.lock"):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise Refusal(
                    f"{path} is {'a link' if path.is_symlink() else 'no regular file'}, so nothing is written "
                    "there; put a file in its place, or remove it")
        self._lock = os.open(self.folder.path / ".supervisor.lock", os.O_RDWR | WRITE, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return  # a file system without locks
            raise Refusal(f"{self.folder.path} is being run already; `invoke train.status --name "
                          f"{self.folder.name}` shows it") from None

    def _on_signal(self, number: int, _: object) -> None:
        self.stop_signal = self.stop_signal or number
        self.signals += 1

    def _close_left_over(self, run: dict[str, Any]) -> dict[str, Any]:
        """Close the attempt that a supervisor before this one left open, and end what it left running."""
        state = self.folder.read_state() or {}
        trainer = state.get("trainer")
        if isinstance(trainer, dict) and machine.lives(trainer):
            say(f"the trainer of an earlier supervisor still runs (process {trainer['pid']}); ending it")
            self._end_process(int(trainer["pid"]))
        opened = [found for found in run.get("attempts") or () if found.get("ended") is None]
        if not opened:
            return run
        for number, played in rollouts.last(self.folder.rollouts, 2):  # nobody may have looked at them
            if number > (opened[-1].get("resumed_from") or 0) and rollouts.verdict(played, (), 0, 0, rollouts.Errors()):
                self._mark("poisoned", number)
                self._event("poisoned", attempt=opened[-1].get("number"), step=number, goes_on=self.options.keeps_on)
        run = self.folder.read()
        same_boot = state.get("boot_id") == machine.boot_id()
        reason = "the supervisor was killed, or its container was" if same_boot else "the machine was restarted"
        last = max(self.folder.read_metrics(1 << 20), default=None)
        done = resume.is_finished(self.folder, run)
        ended = state.get("updated") or time.time()

        def close(now: dict[str, Any]) -> None:
            for found in now["attempts"]:
                if found.get("ended") is None:
                    found.update(ended=ended,
                                 exit_code=None,
                                 state="finished" if done else "died",
                                 cause=None if done else diagnosis.KILLED,
                                 reason="" if done else reason,
                                 last_step=last)

        run = self.folder.update(close)
        self._event("finished" if done else "died",
                    attempt=opened[-1].get("number"),
                    cause=None if done else diagnosis.KILLED,
                    reason="" if done else reason)
        return run

    def _stopped_between(self, number: int) -> int:

        def mark(now: dict[str, Any]) -> None:
            now["attempts"][-1].update(state="stopped", reason="stopped while it waited for a retry")

        self.folder.update(mark)
        self._event("stopped", attempt=number)
        self._heartbeat("stopped", force=True)
        return 128 + self.stop_signal

    def _event(self, event: str, **fields: Any) -> None:
        with suppress(OSError):  # a full disk does not end a run
            self.folder.append_event(event, **fields)

    # -- one attempt

    def _one(self, run: dict[str, Any], number: int, waits: float) -> tuple[Death | None, int]:
        """Run one attempt; return why it died (None where it did not) and the exit code."""
        try:
            plan = resume.plan(self.folder, run)
        except ValueError as error:
            raise Refusal(str(error)) from None
        step = plan.step
        resumed = step.number if step is not None else None
        fresh = number == 1 and step is None
        argv = [*run["command"], *(run.get("overrides") or ()), *resume.resume_overrides(run, step)]
        self.note = ""
        for passed in plan.passed_over:
            say(f"passed over: {passed}")
        if step is not None:
            say(f"resuming from global_step_{step.number}, {resume.steps_to_train(run, step)} steps to train. "
                f"{resume.LOADER}")
            if resume.scaling_stages(run):
                say("ScalingInter: the rounds are given step by step, as an unbroken run plays them")
        elif not fresh:
            say("no whole checkpoint: beginning at step 1")
        self._put_aside(number, resumed)
        attempt = self.attempt = Attempt(self.folder, run, number, resumed)
        record = {
            "number": number,
            "started": attempt.started,
            "ended": None,
            "argv": argv,
            "resumed_from": resumed,
            "exit_code": None,
            "state": "running",
            "cause": None,
            "reason": "",
            "last_step": None
        }

        def begin(now: dict[str, Any]) -> None:
            now.setdefault("attempts", []).append(record)
            for which in ("poisoned", "nan_steps"):  # what is trained again is clean
                now[which] = [bad for bad in now.get(which, []) if bad <= (resumed or 0)]

        self.folder.update(begin)
        self._event("started",
                    attempt=number,
                    resumed_from=resumed,
                    passed_over=list(plan.passed_over),
                    note=resume.LOADER if step is not None else "")
        self._heartbeat("running", force=True)
        problem = self._wait_for_environment(run, waits)
        if problem:
            return self._over(attempt, 1, Death(diagnosis.ENVIRONMENT, problem))
        if self.stop_signal:
            return self._over(attempt, 128 + self.stop_signal, None)
        before = machine.oom_kills()
        try:
            with self._spawning:
                attempt.start(argv, self._environment(run))
        except (OSError, ValueError) as error:
            return self._over(attempt, 127, Death(diagnosis.MISUSE, f"the trainer cannot be started: {error}"))
        say(f"attempt {number} began: log in {self.folder.log(number)}")
        place = run.get("environment") or {}
        if place.get("url"):  # the server's own routes lie at its root, not where the environment's begin
            root = place["url"].rstrip("/").removesuffix(place.get("prefix") or "")
            self.monitor = Monitor(root, int(place.get("replicas") or 1))
            self.monitor.start()
        self._heartbeat("running", force=True)
        try:
            code, death = self._follow(attempt)
        finally:
            self._sweep(attempt)
        self._progress(attempt)
        if death is None and not self.stop_signal:  # the last words, and the last trajectories
            death = diagnosis.diagnose(attempt.evidence, self._facts(attempt, code, 0)) if attempt.nan else None
            poison = "" if death is not None else self._judge(attempt, is_over=True)
            death = Death(diagnosis.ENVIRONMENT, poison) if poison else death
        elif death is None:
            self._judge(attempt, is_over=True)  # a machine that goes down may take the environment first
        if attempt.nan is not None:
            self._mark("nan_steps", attempt.nan[0])
        if death is None and (self.stop_signal or (code == 0 and self._is_complete(attempt))):
            return self._over(attempt, code, None)
        if death is None and self._is_saved(attempt):
            say(f"the trainer ended with {code} after its last checkpoint was written")
            return self._over(attempt, 0, None)
        if death is None:
            after = machine.oom_kills()
            death = diagnosis.diagnose(attempt.evidence, self._facts(attempt, code, (after or 0) - (before or 0)))
            if death.cause in (diagnosis.RAY, diagnosis.UNKNOWN, diagnosis.KILLED):
                found = raylogs.keep(raylogs.find(self._variables(run), attempt.started),
                                     self.folder.logs / f"attempt-{number}-ray")
                better = diagnosis.diagnose(found, self._facts(attempt, code, 0))
                death = better if better.cause in (diagnosis.GPU_OOM, diagnosis.HOST_OOM, diagnosis.DISK) else death
        return self._over(attempt, diagnosis.exit_code(code), death)

    def _facts(self, attempt: Attempt, code: int, oom_kills: int, **more: Any) -> Facts:
        free = None
        with suppress(OSError):
            free = shutil.disk_usage(self.folder.path).free
        return Facts(exit_code=code,
                     last_step=attempt.last_step,
                     steps=attempt.steps,
                     oom_kills=oom_kills,
                     disk_free=free,
                     nan=attempt.nan,
                     environment_lost=self.monitor.told() if self.monitor is not None else "",
                     **more)

    def _variables(self, run: Mapping[str, Any]) -> dict[str, str]:
        """Return the trainer's environment variables without the secrets."""
        given = {name: str(value) for name, value in (run.get("variables") or {}).items()}
        return {**os.environ, "PYTHONUNBUFFERED": "1", **given}

    def _environment(self, run: Mapping[str, Any]) -> dict[str, str]:
        """Return the trainer's environment variables: ours, the run's, and the secrets from their files.

        Raises:
            OSError: a secret's file cannot be read.
        """
        found = self._variables(run)
        for name, place in (run.get("secrets") or {}).items():
            found[name] = Path(place).read_text().strip()
        return found

    def _put_aside(self, number: int, resumed: int | None) -> None:
        """Move checkpoints and trajectories of the steps that are trained again from out of the trainer's way.

        It would write over them in place: a half checkpoint would look whole, an old trajectory new.
        """
        aside = self.folder.aside / f"attempt-{number}"
        later = [found for found in checkpoints.numbers(self.folder.path) if resumed is None or found > resumed]
        moves = [(self.folder.checkpoint(found), aside / f"global_step_{found}") for found in later]
        moves += [(self.folder.rollouts / name, aside / "rollouts" / name)
                  for name in rollouts.later(self.folder.rollouts, resumed or 0)]
        for place, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(place, target)
        if later:
            self._event("aside", attempt=number, checkpoints=later, folder=str(aside))
            say(f"moved {', '.join(f'global_step_{found}' for found in later)} to {aside}")
        tracked = checkpoints.tracked(self.folder.path)
        if resumed is None:
            self.folder.tracker.unlink(missing_ok=True)
        elif tracked != resumed:
            atomic_write(self.folder.tracker, str(resumed))

    def _wait_for_environment(self, run: Mapping[str, Any], seconds: float) -> str:
        """Wait until the environment's server answers; return what is wrong where it does not, "" otherwise."""
        place = run.get("environment") or {}
        url = place.get("url")
        if not url:
            return ""
        end = time.monotonic() + seconds
        while True:
            answer = ask(url, int(place.get("replicas") or 1), timeout=2)
            if answer.why != "refused":  # one that is busy will answer the trainer
                return ""
            if time.monotonic() >= end:
                return f"nothing answers at the environment's address {url}, tried for {seconds:.0f} s"
            if not self._sleep(min(1.0, max(0.1, seconds)), f"waiting for the environment's server at {url}"):
                return ""

    def _sleep(self, seconds: float, note: str) -> bool:
        """Wait, with a heartbeat; return False where the run is to stop."""
        self.note = note
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.stop_signal:
            self._heartbeat("running")
            time.sleep(min(TICK, max(0.0, end - time.monotonic())))
        self.note = ""
        return not self.stop_signal

    def _follow(self, attempt: Attempt) -> tuple[int, Death | None]:
        """Follow the trainer to its end; return its exit code, and the death where the supervisor ended it."""
        process = attempt.process
        assert process is not None
        looked = 0.0
        while True:
            code = process.poll()
            if code is not None:
                return code, None
            self._reap()
            attempt.idle()
            self._heartbeat("running")
            if self.stop_signal:
                self._end(attempt, self.options.stop_seconds)
                return process.returncode, None
            if attempt.nan is not None:
                return self._kill(attempt, self._facts(attempt, 1, 0))
            if attempt.loops > 1:
                self._end(attempt, min(5.0, self.options.stop_seconds))
                return process.returncode or 1, None
            if time.monotonic() - looked > LOOK or attempt.errors.away:
                looked = time.monotonic()
                self._progress(attempt)
                lost = self._judge(attempt) or self._gone(attempt)
                if lost:
                    self._end(attempt, min(5.0, self.options.stop_seconds))
                    return process.returncode, Death(diagnosis.ENVIRONMENT, lost)
            silent = time.monotonic() - attempt.heard
            # A cluster may get the machines that Ray waits for; this one gets no more GPUs.
            hopeless = attempt.evidence.waits and not self._variables(attempt.run).get("RAY_ADDRESS")
            limit = min(RAY_WAITS_SECONDS, self.options.hang_seconds) if hopeless else self.options.hang_seconds
            if limit and silent > limit:
                return self._kill(attempt, self._facts(attempt, 1, 0, hung=True, silent_seconds=silent))
            time.sleep(TICK)

    def _progress(self, attempt: Attempt) -> None:
        """Write down a step that is finished, and a checkpoint."""
        if attempt.last_step != attempt.noted_step:
            attempt.noted_step = attempt.last_step
            self._event("step", attempt=attempt.number, step=attempt.last_step)
            self._heartbeat("running", force=True)
        tracked = checkpoints.tracked(self.folder.path)
        if tracked != attempt.tracked and tracked is not None:
            attempt.tracked = tracked
            self._event("checkpoint", attempt=attempt.number, step=tracked)
            say(f"checkpoint global_step_{tracked}")

    def _kill(self, attempt: Attempt, facts: Facts) -> tuple[int, Death]:
        self._end(attempt, min(5.0, self.options.stop_seconds))
        assert attempt.process is not None
        return attempt.process.returncode, diagnosis.diagnose(attempt.evidence, facts)

    def _judge(self, attempt: Attempt, is_over: bool = False) -> str:
        """Look for a step that learnt, or would, from what the environment did not say; return why the run is to end.

        The trajectories' files are written before the step is learnt from. "" where the run goes on.

        Args:
            is_over: the trainer has ended, and says no more.
        """
        step = attempt.step
        # One that was finished before its files were looked at, and the one that is played.
        for number in range(max(attempt.judged + 1, (attempt.resumed_from or 0) + 1, step - 1), step + 1):
            written = rollouts.count_files(self.folder.rollouts, number)
            if not written or (written < attempt.ranks and number == step):
                continue
            played = rollouts.read(self.folder.rollouts, number)
            if played is None:
                continue
            attempt.judged = number
            if played.cut:
                attempt.doubtful[number] = (played, time.time())
                if self.monitor is not None:  # it may have gone since the last look
                    self.monitor.look()
        for number in list(attempt.doubtful):
            why = self._judge_cut(attempt, number, is_over)
            if why:
                return self._poison(attempt, number, why)
        return self._judge_open(attempt)

    def _judge_cut(self, attempt: Attempt, number: int, is_over: bool) -> str:
        """Return why a step whose trajectories were cut off is poisoned, a clause; "" where it is not, or not yet."""
        played, seen = attempt.doubtful[number]
        waited = time.time() - seen
        errors = attempt.errors if number == attempt.step else attempt.errors.plus(attempt.errors_before)
        why = rollouts.verdict(played, self._windows(), attempt.began.get(number, attempt.started), seen + 2 * EVERY,
                               errors, is_over or waited > WORDS_SECONDS)
        if why:
            del attempt.doubtful[number]
            if number == attempt.step:
                attempt.errors = Errors()
        elif is_over or waited > LATE_SECONDS:
            del attempt.doubtful[number]
            self._event("server_errors",
                        attempt=attempt.number,
                        step=number,
                        cut=played.cut,
                        trajectories=played.trajectories)
        return why

    def _judge_open(self, attempt: Attempt) -> str:
        """Return why the run is to end although no trajectory of the step is written yet."""
        step, now = attempt.step, time.time()
        if attempt.judged >= step or not self._is_open(attempt):
            return ""
        # Words that come so soon may be of the step before, whose files are there.
        if attempt.errors.away and now - attempt.step_ended > WORDS_SECONDS:
            lines, attempt.errors.away = attempt.errors.away, 0
            attempt.judged = step
            trajectories = "a trajectory" if lines == 1 else f"{lines} trajectories"
            return self._poison(attempt, step,
                                f"{trajectories} scored 0 because the environment's server did not answer")
        for window in () if self.options.keeps_on else self._windows():
            lasts = window.end is None and window.why == "refused" and now - window.begin > self.options.env_lost_seconds
            # Where it went before the step began, nothing is open: the trainer tries for a while to open sessions.
            if window.begin > attempt.step_ended and (lasts or window.why == "restarted"):
                how = "was restarted and lost its sessions" if window.why == "restarted" else "is gone"
                attempt.judged = step
                return self._poison(attempt, step, f"the environment's server {how} while its trajectories were open")
        return ""

    def _gone(self, attempt: Attempt) -> str:
        """Return why no step can begin: the server is gone, and not for a moment; "" where one can, or is to wait."""
        if self.options.keeps_on or self.monitor is None or not attempt.begun:
            return ""
        seen = self.monitor.seen
        gone = seen.reachable is False and seen.why == "refused"
        return self.monitor.told() if gone and time.time() - seen.since > self.options.env_gone_seconds else ""

    def _windows(self) -> list[Window]:
        return list(self.monitor.windows) if self.monitor is not None else []

    def _is_open(self, attempt: Attempt) -> bool:
        """Tell whether trajectories of the step that is played may be open."""
        written = rollouts.count_files(self.folder.rollouts, attempt.step)
        return attempt.begun and written < attempt.ranks

    def _poison(self, attempt: Attempt, step: int, why: str) -> str:
        """Write down that a step is poisoned; return why the run is to end, "" where it is to go on."""
        told = f"step {step}: {why}"
        goes_on = self.options.keeps_on

        self._mark("poisoned", step)
        self._event("poisoned", attempt=attempt.number, step=step, reason=why, goes_on=goes_on)
        say(told + ("; going on, as --on-env-loss says" if goes_on else "; ending the trainer before more is learnt"))
        return "" if goes_on else told

    def _mark(self, which: str, step: int) -> None:
        """Write down that the checkpoints from `step` on are none to go on from."""

        def mark(now: dict[str, Any]) -> None:
            now[which] = sorted({*now.get(which, []), step})

        self.folder.update(mark)

    def _is_complete(self, attempt: Attempt) -> bool:
        """Tell whether all steps were trained when the trainer ended with 0."""
        if attempt.steps is None:
            return True
        if attempt.last_step is not None and attempt.last_step >= attempt.steps:
            return True
        # Without the console among its loggers the trainer tells no step.
        return bool(rollouts.count_files(self.folder.rollouts, attempt.steps))

    def _is_saved(self, attempt: Attempt) -> bool:
        """Tell whether all steps were trained and the checkpoint after the last one is whole: what came then is no death."""
        if attempt.steps is None or attempt.last_step is None or attempt.last_step < attempt.steps:
            return False
        newest = checkpoints.newest_whole(self.folder.path)
        return newest is not None and newest.number >= attempt.steps

    def _over(self, attempt: Attempt, code: int, death: Death | None) -> tuple[Death | None, int]:
        """Write down how an attempt ended; return why it died and the exit code."""
        if self.monitor is not None:
            self.monitor.stop()
        complete = code == 0 and self._is_complete(attempt)
        state = "died" if death is not None else "stopped" if self.stop_signal and not complete else "finished"
        code = 128 + self.stop_signal if state == "stopped" else code

        def end(now: dict[str, Any]) -> None:
            for found in now["attempts"]:
                if found["number"] == attempt.number:
                    found.update(ended=round(time.time(), 3),
                                 exit_code=code,
                                 state=state,
                                 cause=death.cause if death is not None else None,
                                 reason=death.reason[:LINE_WIDTH] if death is not None else "",
                                 last_step=attempt.last_step)

        shown_state = state
        if death is not None and self._goes_on_after(death):  # a reader never sees that nothing follows
            shown_state = "running"
            self.note = f"attempt {attempt.number} died of {death.cause}; retry {self.retries + 1} of {self.options.retries} begins soon"
            self._heartbeat(shown_state, force=True)
        self.folder.update(end)
        self._event(state,
                    attempt=attempt.number,
                    exit_code=code,
                    cause=death.cause if death is not None else None,
                    reason=death.reason[:LINE_WIDTH] if death is not None else "",
                    step=attempt.last_step)
        self._heartbeat(shown_state, force=True)
        self.monitor = None
        if death is not None:
            say(f"attempt {attempt.number} died of {death.cause}: {death.reason}")
        else:
            say(f"{state} after step {attempt.last_step if attempt.last_step is not None else attempt.resumed_from or 0}"
                )
        return death, code

    # -- processes

    def _end(self, attempt: Attempt, seconds: float) -> None:
        """End the trainer: SIGTERM, and SIGKILL to its group after `seconds` or a second signal to us."""
        process = attempt.process
        assert process is not None
        with suppress(ProcessLookupError):
            process.terminate()
        end, signals = time.monotonic() + seconds, self.signals
        while process.poll() is None and time.monotonic() < end and self.signals == signals:
            self._heartbeat("running")
            time.sleep(0.05)
        if process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _sweep(self, attempt: Attempt) -> None:
        """End what the trainer left behind: it has become our child."""
        if attempt.process is not None and attempt.process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(attempt.process.pid, signal.SIGKILL)
            attempt.process.wait()
        end = time.monotonic() + ORPHAN_SECONDS
        while time.monotonic() < end:
            self._reap()
            if not machine.descendants(os.getpid()):
                break
            self._heartbeat("running")
            time.sleep(0.1)
        for _ in range(20):
            left = machine.descendants(os.getpid())
            if not left:
                break
            machine.kill(left, signal.SIGKILL)
            time.sleep(0.05)
            self._reap()
        attempt.drain()

    def _reap(self) -> None:
        """Take note of the end of adopted processes; the trainer's own is its Popen's."""
        with self._spawning:
            mine = self.attempt.process.pid if self.attempt is not None and self.attempt.process is not None else -1
            for _ in range(1000):
                try:
                    found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                    if found is None or found.si_pid == mine:
                        return
                    os.waitpid(found.si_pid, os.WNOHANG)
                except ChildProcessError:
                    return

    def _end_process(self, pid: int) -> None:
        started = machine.start_time(pid)
        for hard in (False, True):
            with suppress(ProcessLookupError, PermissionError):
                if hard:
                    os.killpg(pid, signal.SIGKILL)
                else:
                    os.kill(pid, signal.SIGTERM)
            end = time.monotonic() + (5.0 if hard else self.options.stop_seconds)
            while time.monotonic() < end and machine.start_time(pid) == started:
                time.sleep(0.1)
            if machine.start_time(pid) != started:
                return

    # -- the heartbeat

    def _heartbeat(self, state: str, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._beat < HEARTBEAT:
            return
        self._beat = now
        attempt, monitor = self.attempt, self.monitor
        if now - self._gpus_at > GPUS_EVERY and state == "running":
            self._gpus_at = now
            threading.Thread(target=self._look_at_gpus, daemon=True).start()
        place: dict[str, Any] | None = None
        if monitor is not None:
            seen = monitor.seen
            place = {"reachable": seen.reachable, "sessions": seen.sessions, "since": seen.since, "why": seen.why}
        process = attempt.process if attempt is not None else None
        trainer = machine.identity(process.pid) if process is not None and process.returncode is None else None
        silent = now - attempt.heard if attempt is not None else 0.0
        with suppress(OSError):  # a full disk; the next one may go through
            self.folder.write_state(**self.identity,
                                    trainer=trainer,
                                    state=state,
                                    attempt=attempt.number if attempt is not None else None,
                                    step=attempt.last_step if attempt is not None else None,
                                    resumed_from=attempt.resumed_from if attempt is not None else None,
                                    total=attempt.steps if attempt is not None else None,
                                    started=attempt.started if attempt is not None else None,
                                    step_started=attempt.step_ended if attempt is not None else None,
                                    silent_seconds=round(silent, 1),
                                    note=self.note,
                                    environment=place,
                                    gpus=self.gpus,
                                    log=str(self.folder.log(attempt.number)) if attempt is not None else None,
                                    log_bytes=attempt.log_bytes if attempt is not None else 0,
                                    log_lost=attempt.log_lost if attempt is not None else 0,
                                    last_lines=list(attempt.last_lines) if attempt is not None else [])

    def _look_at_gpus(self) -> None:
        if shutil.which("nvidia-smi"):
            self.gpus = machine.gpus()


def main(path: str) -> int:
    """Run the folder; return the exit code."""
    try:
        return Supervisor(path).run()
    except (Refusal, OSError) as error:
        with suppress(OSError):
            print(shown(f"training: {error}"), file=sys.stderr, flush=True)
        return MISUSE
