"""What Docker says, and what a user can do about it."""
from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from tasks.lib.redaction import hide_logins
from tasks.lib.settings import ROOT

NO_DOCKER = "no docker command on PATH; install Docker Engine 24 or newer with Compose v2 and Buildx"

MOUNT_MISSING = "a mounted folder is missing; create the folder that Docker names"
ENGINE_DOWN = "engine down"  # `engine_down` says more

# What Docker says, and what a user can do about it. The first match counts.
REMEDIES = (
    (r"context not found|context .* does not exist",
     "there is no such context; see `docker context ls`, then set or unset "
     "DOCKER_CONTEXT"),
    (r"permission denied while trying to connect", "add yourself to the group docker, then log in again"),
    (r"Cannot connect to the Docker daemon|error during connect|failed to connect to the docker API|"
     r"unable to (parse|resolve) docker (host|endpoint)", ENGINE_DOWN),
    (r"port is already allocated|address already in use", "the port is in use; choose another with ENV_PORT"),
    (r"could not select device driver",
     "the engine has no NVIDIA runtime; install nvidia-container-toolkit, or pass --gpus none"),
    (r"no builder .* found", "BUILDX_BUILDER names no builder; unset it, or choose one of `docker buildx ls`"),
    (r"error setting rlimit",
     "the engine may not lift the limit on locked memory (rootless?); set MEMLOCK to what `ulimit -l` allows, in bytes"
     ),
    (r"bind source path does not exist", MOUNT_MISSING),
    (r"no space left on device", "the disk is full; see `docker system df`, then `invoke clean.cache`"),
    (r"no such host|dial tcp|i/o timeout",
     "the registry does not answer; check the network, or name an image that is here (BASE_IMAGE, EVAL_BASE_IMAGE)"),
    (r"is not a docker command|unknown (shorthand )?flag",
     "docker has no Compose or Buildx plugin, or an old one; install docker-compose-plugin and docker-buildx-plugin"),
    (r"pull access denied|repository does not exist|failed to resolve source metadata|No such image",
     "an image is neither here nor in a registry; `invoke build.all` builds ours"),
    (r"Could not resolve host|temporary failure in name resolution|failed to fetch|Failed to fetch",
     "a download failed; check the network, PACKAGE_INDEX_URL and CA_BUNDLE"),
)

# How Docker begins what it says itself, where a command in a container says something on the same stream.
DOCKER_SAYS = (r"Error response from daemon|error during connect|Cannot connect to the Docker daemon|"
               r"failed to connect to the docker API|permission denied while trying to connect|Failed to initialize")


def remedy(said: str) -> str | None:
    """Return what a user can do about Docker's message `said`, where that is known."""
    advice = next((advice for pattern, advice in REMEDIES if re.search(pattern, said, re.IGNORECASE)), None)
    return engine_down(os.environ) if advice == ENGINE_DOWN else advice


def engine_down(environ: Mapping[str, str]) -> str:
    """Return what to do about an engine that does not answer; DOCKER_HOST says where it was looked for."""
    host = environ.get("DOCKER_HOST")
    if host:
        return f"no Docker engine answers at DOCKER_HOST={hide_logins(host)}; start that one, or unset DOCKER_HOST"
    return "the Docker engine does not answer; start it (sudo systemctl start docker)"


def mount_missing_at(host: str) -> str:
    """Return what to do about a folder that is missing on the machine of the engine at `host`."""
    return (
        f"the engine at {host} mounts folders of its own machine, and one of ours is missing there; copy this checkout "
        f"to the same path (`rsync -a {ROOT}/ HOST:{ROOT}/`), name volumes in docker-compose.override.yml, or take this "
        "machine's engine (`unset DOCKER_HOST`, `docker context use default`)")


def docker_said(argv: Sequence[str], said: str) -> str:
    """Return what of `said`, the standard error of `argv`, is Docker's own: with `compose run`, not the command's.

    Docker says what stopped it last.
    """
    lines = said.splitlines()
    if not ("compose" in argv[:2] and "run" in argv) or not lines:
        return said
    return lines[-1] if re.match(DOCKER_SAYS, lines[-1]) else ""
