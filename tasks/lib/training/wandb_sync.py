"""Upload a run's offline wandb runs with wandb's own command; the key goes by the environment or as a file, never in argv.

The trainer writes saves/NAME/wandb/offline-run-DATE-ID/run-ID.wandb, one folder an attempt; `wandb sync` puts
run-ID.wandb.synced beside it. A folder that is still being written is left out: what came after an upload would never be
sent.
"""
from __future__ import annotations

import netrc
import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from invoke.context import Context

from tasks.lib.engine import containers
from tasks.lib.engine.mounts import Translation
from tasks.lib.errors import UserError
from tasks.lib.host.programs import choose_program_runner
from tasks.lib.settings import ROOT, SETTINGS, resolve
from training.folder import RunFolder
from training.status import status

PUBLIC = "https://api.wandb.ai"


@dataclass(frozen=True)
class Offline:
    """A folder that wandb wrote without a network.

    Attributes:
        folder: offline-run-DATE-ID.
        synced: whether all that it holds was uploaded.
    """
    folder: Path
    synced: bool


def offline_runs(run: RunFolder) -> list[Offline]:
    """Return the run's offline wandb runs, the first one first."""
    found = []
    for folder in sorted(run.wandb.glob("offline-run-*")):
        for data in sorted(folder.glob("run-*.wandb")):
            mark = data.with_name(data.name + ".synced")
            found.append(Offline(folder, mark.exists() and mark.stat().st_mtime >= data.stat().st_mtime))
    return found


def to_upload(run: RunFolder) -> tuple[list[Path], list[str]]:
    """Return the folders to upload, and what to say of the others."""
    found = offline_runs(run)
    said = [f"{one.folder.name} was uploaded before" for one in found if one.synced]
    folders = [one.folder for one in found if not one.synced]
    state = ""
    with suppress(OSError, ValueError):
        state = status(run).state
    if state in ("running", "starting") and folders and folders[-1] == found[-1].folder:
        said.append(f"{folders.pop().name} is still being written; upload it when the run has ended")
    return folders, said


def read_key(key_file: str) -> str:
    """Return the key: the file's, else the setting's; empty where there is none.

    Raises:
        UserError: the file cannot be read, or is no key.
    """
    if not key_file:
        return resolve("WANDB_API_KEY").strip()
    try:
        key = Path(os.path.expanduser(key_file)).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--key-file {key_file} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    if not key or len(key.split()) != 1:
        raise UserError(f"--key-file {key_file} holds no key; write it there alone, on one line")
    return key


def program(environ: Mapping[str, str]) -> str:
    """Return this machine's `wandb`: beside the trainer's Python, else on PATH; empty where there is none."""
    beside = Path(resolve("TRAIN_PYTHON") or "/nowhere/python").expanduser().parent / "wandb"
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("wandb", path=environ.get("PATH")) or ""


def logged_in(address: str) -> bool:
    """Tell whether `wandb login` left a key for that host on this machine."""
    try:
        return netrc.netrc().authenticators(urlsplit(address).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def surroundings(environ: Mapping[str, str], key: str) -> dict[str, str]:
    """Return the environment of wandb's command: with its key, without ours, and with no mode that keeps it offline."""
    left_out = {"WANDB_MODE", *(name for name, setting in SETTINGS.items() if setting.secret)}
    kept = {name: value for name, value in environ.items() if name not in left_out}
    return {**kept, **({"WANDB_API_KEY": key} if key else {})}


def sync(c: Context, run: RunFolder, runner: str, key_file: str, project: str, entity: str) -> list[str]:
    """Upload what was not uploaded; return what to say.

    Raises:
        UserError: there is no key or no wandb, or something did not arrive.
    """
    key, wandb = read_key(key_file), program(os.environ)
    chosen = choose_program_runner(runner, bool(wandb))
    folders, said = to_upload(run)
    if not folders:
        return [*said, f"nothing to upload in {run.wandb}"]
    address = os.environ.get("WANDB_BASE_URL", "").strip().rstrip("/") or PUBLIC
    if chosen == "local" and not wandb:
        raise UserError(
            "no program wandb here; `pip install wandb`, name the trainer's Python with TRAIN_PYTHON, or use "
            "--runner docker")
    if not key and not (chosen == "local" and logged_in(address)):
        raise UserError(f"no key for {address}: set WANDB_API_KEY, in the environment or in .env, or name a file with "
                        "--key-file")
    flags = [*(["--project", project] if project else []), *(["--entity", entity] if entity else [])]
    print(f"train.sync: {len(folders)} of wandb's runs go to {address}", flush=True)
    if chosen == "docker":
        os.environ["WANDB_API_KEY"] = key  # where Compose reads it, and where it is known as a secret
        inside = [Translation(ROOT).path(folder) for folder in folders]
        where = ["env", f"WANDB_BASE_URL={address}"] if address != PUBLIC else []
        containers.run(c,
                       "train", [*where, "wandb", "sync", *flags, *inside],
                       gpus="none",
                       variables={
                           "WANDB_API_KEY": key,
                           "WANDB_MODE": "online"
                       })
    elif c.config.run.dry:
        print(" ".join([wandb, "sync", *flags, *map(str, folders)]))
    else:
        code = subprocess.run([wandb, "sync", *flags, *map(str, folders)],
                              cwd=run.path,
                              env=surroundings(os.environ, key),
                              stdin=subprocess.DEVNULL,
                              check=False).returncode
        if code:
            raise UserError(f"wandb ended with the exit code {code}; run it again to go on", code=1)
    if c.config.run.dry:
        return said
    missing = [one.folder.name for one in offline_runs(run) if one.folder in folders and not one.synced]
    if missing:  # its exit code is 0 all the same
        raise UserError(f"{', '.join(missing)} did not arrive at {address}, as wandb said above; run it again to go on",
                        code=1)
    return [*said, f"{len(folders)} uploaded to {address}"]
