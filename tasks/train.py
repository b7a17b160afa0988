"""Work in the training image."""
import re
import sys
from json import dumps

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.engine import containers
from tasks.lib.engine.client import remainder
from tasks.lib.errors import UserError
from tasks.lib.tables import print_table
from tasks.lib.training import plotting, runs, showing, stopping

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
    if shm_size and not re.fullmatch(r"\d+(\.\d+)?[bkmg]b?", shm_size, re.IGNORECASE):
        raise UserError(f"--shm-size {shm_size!r} is no size; write it as 512m or 32g")
    return {"SHM_SIZE": shm_size} if shm_size else {}


@task(positional=[], auto_shortflags=False, help=FLAGS)
def shell(c: Context, shm_size: str = "", gpus: str = "", user: str = "") -> None:
    """Open a shell in the training container."""
    variables = container_variables(shm_size)
    running = containers.running(c, "train")
    if running:
        if shm_size or gpus:
            print("train: joining the running container, so --shm-size and --gpus do not count", file=sys.stderr)
        containers.join(c, running, ["bash"], user)
    else:
        containers.run(c, "train", ["bash"], gpus=gpus, user=user, variables=variables)


@task(positional=[], auto_shortflags=False, help=FLAGS)
def run(c: Context, shm_size: str = "", gpus: str = "", user: str = "") -> None:
    """Run the command after -- in the training image."""
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
    run = runs.find(name)

    def told() -> list[str]:
        found = runs.read(run)[0]
        return [dumps(found.json())] if json else showing.lines(found, width=showing.width_of_terminal())

    if watch:
        showing.watch(run, told, lambda: runs.read(run)[0].state)
    else:
        print("\n".join(told()))


@task(name="list", positional=[], auto_shortflags=False, help={"json": "Print JSON, for a program."})
def list_runs(c: Context, json: bool = False) -> None:
    """List the training runs in saves/."""
    found = runs.all_statuses()
    if json:
        print(dumps([one.json() for one in found]))
    elif not found:
        print(f"train: no run in {runs.saves()}; `invoke train.start` makes one")
    print_table(showing.HEAD, [] if json else [showing.row(one) for one in found])


@task(positional=[],
      help={
          "name": "The run's name (default: the one that runs, or the last one made).",
          "follow": "Go on with what comes, until the run has ended.",
          "lines": "How many of the last lines; 0 for all (default: 200).",
          "attempt": "Which attempt's log (default: the last).",
      })
def logs(c: Context, name: str = "", follow: bool = False, lines: int = 200, attempt: int = 0) -> None:
    """Show what the trainer of a run printed."""
    showing.logs(runs.find(name), max(0, lines), follow, attempt or None)


@task(positional=[],
      auto_shortflags=False,
      help={
          "name": "The run's name (default: the one that runs, or the last one made).",
          "now": "Kill the trainer at once in place of asking it to end.",
      })
def stop(c: Context, name: str = "", now: bool = False) -> None:
    """Stop a run and say what is left of it."""
    said = stopping.stop(c, runs.find(name), now)
    if said:
        print(f"train.stop: {said}")


@task(positional=[],
      auto_shortflags=False,
      help={
          "name": "The run's name (default: the one that runs, or the last one made).",
          "output": "The file to write (default: plot.html in the run's folder).",
      })
def plot(c: Context, name: str = "", output: str = "") -> None:
    """Write a run's curves into one HTML file."""
    print(f"train.plot: {plotting.write(runs.find(name), output)}")
