"""What the watcher has done by others: `invoke merge` and `invoke eval`, each a process that dies with the watcher."""
from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.lib.errors import UserError
from tasks.lib.host import processes
from tasks.lib.settings import ROOT, resolve
from tasks.lib.training.watching import Failed, Going, Plan
from training.exchange import Stays, opener
from training.foreign import LARGEST_FILE, loads
from training.text import shown

ASK_SECONDS = 30.0  # for an endpoint's list of models
UNSERVED, NOWHERE = "checkpoint", "http://checkpoint/v1"  # of a model that is not there yet; nobody is asked there
NICE = 10  # of a merge and an evaluation: the trainer on the same machine comes first
# The child gets SIGTERM when the watcher is gone, however it went, and tidies up; a function between fork and exec could
# hang, for the watcher has a second thread.
TETHER = """
import os, sys
from training.machine import die_with_parent, lower_priority
die_with_parent()
if os.getppid() != int(sys.argv[1]):
    sys.exit(143)
lower_priority(int(sys.argv[2]))
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""
SPEAKERS = ("merge: ", "eval: ", "docker: ", "eval.report: ", "training: ", "train.sync: ")


def run_tethered(words: Sequence[str], log: Path, env: Mapping[str, str] | None = None, nice: int = 0) -> int:
    """Run this Python with `words` until it ends or this process does; return its exit code, its output in `log`."""
    argv = [sys.executable, "-c", TETHER, str(os.getpid()), str(nice), *words]
    with log.open("w") as output:
        process = subprocess.Popen(argv,
                                   cwd=ROOT,
                                   env=None if env is None else dict(env),
                                   stdin=subprocess.DEVNULL,
                                   stdout=output,
                                   stderr=subprocess.STDOUT)
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal, or `as_ctrl_c`, told the program too: let it tidy up
            process.wait()
            raise


def reason(log: Path, code: int) -> str:
    """Return why a program failed, as the last line of its log that explains says."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    said = next((line for line in reversed(lines) if line.startswith(SPEAKERS)), lines[-1] if lines else "")
    ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{said or 'it said nothing'} ({ending}; {log})"


@dataclass(frozen=True)
class InvokeHands:
    """Merges, evaluates and reports by the project's own commands.

    Attributes:
        run: the run's name.
        merge_runner, eval_runner: local or docker.
        gpus: for the model's server: all, none, indices; empty for the default.
        endpoint: address of a server that has the merged models; empty where each is served for its evaluation.
        model_name: what the endpoint calls a step's model, with {run} and {step} in it.
        servers: addresses of environments' servers, by environment.
        words: further flags of `invoke eval`, of which the numbers do not depend.
        dtype: element type of the merged model; empty for the merger's default.
        wandb_runner: --runner of `train.sync`; empty where nothing goes to wandb.
    """
    run: str
    merge_runner: str
    eval_runner: str
    gpus: str = ""
    endpoint: str = ""
    model_name: str = "{run}-global_step_{step}"
    servers: Mapping[str, str] | None = None
    words: tuple[str, ...] = ()
    dtype: str = ""
    wandb_runner: str = ""

    def merge_words(self, shards: Path, target: Path) -> list[str]:
        """Return the command line of a merge."""
        words = ["merge", f"--local-dir={shards}", f"--save-dir={target}", "--verify", "--force"]
        words += [f"--runner={self.merge_runner}"] + (["--gpus=none"] if self.merge_runner == "docker" else [])
        return words + ([f"--dtype={self.dtype}"] if self.dtype else [])

    def eval_words(self, model: Path, step: int, plan: Plan, out: Path) -> list[str]:
        """Return the command line of an evaluation."""
        if self.endpoint:
            player = [f"--model={self.called(step)}", f"--base-url={self.endpoint}"]
        else:
            player = [f"--checkpoint={model}"]
            player += [f"--gpus={self.gpus}"] if self.gpus and self.eval_runner == "docker" else []
        return self._evaluation(plan, f"--out={out}", player) + list(self.words)

    def check_words(self, plan: Plan) -> list[str]:
        """Return the command line that only says what is wrong with the words of an evaluation, whose model is not there yet."""
        player = [f"--model={self.called(1) if self.endpoint else UNSERVED}", f"--base-url={self.endpoint or NOWHERE}"]
        # The engine is that of a checkpoint, and what serves it here.
        further = [word for word in self.words if not word.startswith("--engine=")]
        return [*self._evaluation(plan, "--check", player), "--json", *further]

    def _evaluation(self, plan: Plan, how: str, player: Sequence[str]) -> list[str]:
        server = (self.servers or {}).get(plan.environment)
        words = ["eval", f"--env={plan.environment}", how, f"--runner={self.eval_runner}", *plan.words, *player]
        return words + ([f"--server={server}"] if server else [])

    def called(self, step: int) -> str:
        """Return what the endpoint calls a step's model."""
        return self.model_name.format(run=self.run, step=step)

    def environment(self) -> dict[str, str]:
        """Return the variables of an evaluation."""
        found = dict(os.environ)
        if self.gpus and self.eval_runner == "local" and not self.endpoint:
            found.pop("CUDA_VISIBLE_DEVICES", None)
            if self.gpus != "all":
                found["CUDA_VISIBLE_DEVICES"] = "" if self.gpus == "none" else self.gpus
        return found

    def merge(self, shards: Path, target: Path, log: Path) -> None:
        """Merge and verify.

        Raises:
            Failed: with the merger's line.
        """
        self._invoke(self.merge_words(shards, target), log, dict(os.environ), NICE)

    def evaluate(self, model: Path, step: int, plan: Plan, out: Path, log: Path) -> None:
        """Evaluate a merged model, or go on with its evaluation.

        Raises:
            Failed: with the runner's line, or because the endpoint does not have the model.
        """
        if self.endpoint:
            check_served(self.endpoint, self.called(step))
        self._invoke(self.eval_words(model, step, plan, out), log, self.environment(), NICE)

    def check(self, plan: Plan) -> None:
        """Have `invoke eval` look at the words of an evaluation, now and not when the first checkpoint is there.

        Raises:
            UserError: with its line, for the task at hand to say.
        """
        done = subprocess.run([sys.executable, "-m", "invoke", *self.check_words(plan)],
                              cwd=ROOT,
                              env={
                                  **os.environ, "OPENAI_API_KEY": "none"
                              },
                              stdin=subprocess.DEVNULL,
                              capture_output=True,
                              text=True,
                              errors="replace",
                              check=False)
        if done.returncode == 0:
            return
        try:
            said = loads(done.stdout)["error"]["message"].removeprefix("eval: ")
        except (ValueError, KeyError, TypeError):
            said = (done.stderr.strip().splitlines() or ["the evaluation said nothing"])[-1]
        raise UserError(said, code=done.returncode if done.returncode > 0 else 1)

    def report(self, folders: Sequence[Path], out: Path, log: Path) -> None:
        """Write the report of all evaluations.

        Raises:
            Failed: with the line that says why.
        """
        words = [word for folder in folders for word in ("--run", str(folder))]
        self._invoke(["eval.report", *words, f"--out={out}"], log, dict(os.environ))

    def publish(self, log: Path) -> str:
        """Send what the run came to to wandb; return the last line that was said, empty where nothing is to be sent.

        Raises:
            Failed: with the line that says why.
        """
        if not self.wandb_runner:
            return ""
        words = ["train.sync", f"--name={self.run}", f"--runner={self.wandb_runner}", "--figures"]
        self._invoke(words, log, dict(os.environ))
        return shown(processes.last_line(log))

    def _invoke(self, words: Sequence[str], log: Path, env: Mapping[str, str], nice: int = 0) -> None:
        code = run_tethered(["-m", "invoke", *words], log, env, nice)
        if code:
            raise Failed(reason(log, code))


def check_served(endpoint: str, model: str) -> None:
    """Refuse an endpoint that does not name the model among its own: some answer with whatever they have.

    Raises:
        Failed: it does not, or cannot be asked.
    """
    request = urllib.request.Request(f"{endpoint.rstrip('/')}/models")
    key = resolve("OPENAI_API_KEY")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        # The key goes to the endpoint and to nobody that it names.
        with opener(Stays()).open(request, timeout=ASK_SECONDS) as reply:
            names = [shown(str(one["id"])) for one in loads(reply.read(LARGEST_FILE))["data"]]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise Failed(
            f"{endpoint}/models cannot be read ({shown(str(getattr(error, 'reason', error)))}); start the server, or leave "
            "--endpoint out") from None
    if model not in names:
        raise Failed(
            f"{endpoint} serves {', '.join(names) or 'nothing'} and no {model}; serve the merged model under that "
            "name, or say with --endpoint-model how it is called")


def gpu_clash(wanted: str, endpoint: str, used: str, going: Going, here: bool, nvidia: bool) -> str:
    """Return why an evaluation would take GPUs from the trainer, and the remedy; empty where it does not.

    Args:
        wanted: --gpus; empty where it was not given.
        endpoint: --endpoint.
        used: the run's own GPUs: all, none, indices, or empty where nobody knows.
        going: what the run is doing.
        here: whether it runs on this machine.
        nvidia: whether this machine has NVIDIA GPUs.
    """
    if endpoint or wanted == "none" or used in ("", "none") or going.ended is not False or not here or not nvidia:
        return ""
    remedy = "name others with --gpus, serve the models elsewhere (--endpoint), or evaluate on the CPU (--gpus none)"
    if not wanted:
        return f"the run trains on the GPUs {used}, and an evaluation beside it could take their memory; {remedy}"
    common = "all" in (wanted, used) or bool(set(wanted.split(",")) & set(used.split(",")))
    return f"--gpus {wanted}: the run trains on the GPUs {used}; {remedy}" if common else ""


def has_nvidia() -> bool:
    """Tell whether this machine has NVIDIA GPUs, without asking them."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
