"""Work in the training image."""
import re
import sys

from invoke.context import Context
from invoke.tasks import task

from tasks.lib.engine import containers
from tasks.lib.engine.client import remainder
from tasks.lib.errors import UserError

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
