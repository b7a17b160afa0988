"""Whose a container is: several people and several checkouts may use one engine.

What belongs to this checkout is told by the folder that Compose notes on it and by the caller's id, never by the
project's name alone, which two checkouts may share.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.lib.settings import ROOT, SETTINGS, effective_environment

if TYPE_CHECKING:
    from python_on_whales import Container

PROJECT = "com.docker.compose.project"
FOLDER = "com.docker.compose.project.working_dir"
SERVICE = "com.docker.compose.service"
UID = "org.agentgym-rl.uid"
CHECKOUT = "org.agentgym-rl.checkout"  # of an image: UID:FOLDER of who built it here


@dataclass(frozen=True)
class Owner:
    """Whose a container or an image is: the checkout's folder, and the id of who made it; empty where nobody noted it."""
    folder: str
    uid: str

    def __str__(self) -> str:
        return f"of {self.folder or 'an unknown folder'}" + (f", user id {self.uid}" if self.uid else "")


def caller() -> str:
    """Return the id that our containers run with: HOST_UID, else the caller's."""
    return effective_environment().get("HOST_UID") or str(os.getuid())


def project_name(environ: Mapping[str, str] | None = None) -> str:
    """Return the Compose project's name: COMPOSE_PROJECT_NAME, else one that tells this folder and this user."""
    given = (effective_environment() if environ is None else environ).get("COMPOSE_PROJECT_NAME")
    return given or f"{SETTINGS['COMPOSE_PROJECT_NAME'].default}-{_digest()}"


def _digest() -> str:
    return hashlib.sha256(f"{os.path.realpath(ROOT)} {os.getuid()}".encode()).hexdigest()[:6]


def owner_of(container: Container) -> Owner:
    """Return whose `container` is. Plain `docker compose` without HOST_UID notes no user."""
    labels = container.config.labels or {}
    return Owner(labels.get(FOLDER, ""), labels.get(UID, ""))


def builder() -> str:
    """Return what an image is labelled with that this checkout builds."""
    return f"{caller()}:{os.path.realpath(ROOT)}"


def builder_of(labels: Mapping[str, str]) -> Owner:
    """Return which checkout built the image with these labels; a pushed one does not say, nor does plain Compose's."""
    uid, _, folder = labels.get(CHECKOUT, "").partition(":")
    return Owner(folder, uid)


def is_ours(owner: Owner, root: Path = ROOT) -> bool:
    """Tell whether what `owner` has belongs to this checkout and this caller."""
    here = bool(owner.folder) and os.path.realpath(owner.folder) == os.path.realpath(root)
    return here and owner.uid in ("", caller())
