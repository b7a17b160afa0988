"""Upload a run's offline wandb runs, and what its checkpoints came to, by `training.uploading` and wandb's own programs.

The key goes by the environment or as a file, never in argv. The trainer writes
saves/NAME/wandb/offline-run-DATE-ID/run-ID.wandb, one folder an attempt. One that is still being written is left out:
what came after an upload would never be sent.
"""
from __future__ import annotations

import netrc
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from invoke.context import Context

from tasks.lib.engine import containers
from tasks.lib.engine.mounts import Translation
from tasks.lib.errors import UserError
from tasks.lib.host.programs import choose_program_runner
from tasks.lib.notices import put
from tasks.lib.settings import ROOT, SETTINGS, resolve
from training.folder import RunFolder
from training.status import status
from training.uploading import data_of, mark_of, wandb_id

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
        data = data_of(folder)
        if data:
            mark = mark_of(data)
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


def python_of(wandb: str) -> str:
    """Return the Python that has the package of the program `wandb`: the one that its first line names, or the one beside it.

    Raises:
        UserError: neither is there.
    """
    with suppress(OSError, UnicodeDecodeError), open(wandb, encoding="utf-8") as file:
        named = file.readline(4096).removeprefix("#!").strip()
        if Path(named).name.startswith("python") and os.access(named, os.X_OK):
            return named
    beside = Path(wandb).resolve().parent / "python"
    if os.access(beside, os.X_OK):
        return str(beside)
    raise UserError(f"{wandb} tells no Python that has its package; name one with TRAIN_PYTHON, or use --runner docker")


def surroundings(environ: Mapping[str, str], key: str) -> dict[str, str]:
    """Return the environment of wandb's programs: with its key, without ours, and with no mode that keeps it offline."""
    left_out = {"WANDB_MODE", *(name for name, setting in SETTINGS.items() if setting.secret)}
    kept = {name: value for name, value in environ.items() if name not in left_out}
    path = os.pathsep.join(filter(None, (str(ROOT), environ.get("PYTHONPATH"))))
    return {**kept, **({"WANDB_API_KEY": key} if key else {}), "PYTHONPATH": path}


@dataclass(frozen=True)
class Way:
    """How wandb is reached.

    Attributes:
        runner: local or docker.
        wandb: its program; empty in the container.
        key: empty where `wandb login` left one here.
        address: of the service.
    """
    runner: str
    wandb: str
    key: str
    address: str


def way(runner: str, key_file: str, has_flag: bool = True) -> Way:
    """Return how wandb is reached, without reaching for it.

    Args:
        has_flag: whether the task takes --key-file.

    Raises:
        UserError: there is no key or no wandb.
    """
    key, wandb = read_key(key_file), program(os.environ)
    chosen = choose_program_runner(runner, bool(wandb))
    address = os.environ.get("WANDB_BASE_URL", "").strip().rstrip("/") or PUBLIC
    if chosen == "local" and not wandb:
        raise UserError(
            "no program wandb here; `pip install wandb`, name the trainer's Python with TRAIN_PYTHON, or use "
            "--runner docker")
    if not key and not (chosen == "local" and logged_in(address)):
        raise UserError(f"no key for {address}: set WANDB_API_KEY, in the environment or in .env" +
                        (", or name a file with --key-file" if has_flag else ""))
    return Way(chosen, wandb if chosen == "local" else "", key, address)


def logs_to_wandb(run: RunFolder) -> bool | None:
    """Tell whether the run's trainer logs to wandb; None where run.json does not tell."""
    try:
        told = run.read()
    except (OSError, ValueError):
        return None
    trainer = (told.get("resolved") or {}).get("trainer")
    logger = trainer.get("logger") if isinstance(trainer, dict) else None
    return "wandb" in logger if isinstance(logger, (list, str)) else None


def sync(c: Context,
         run: RunFolder,
         runner: str,
         key_file: str,
         project: str,
         entity: str,
         figures: bool = False) -> Iterator[str]:
    """Upload what was not uploaded, and with `figures` what the checkpoints came to; give what to say as it comes.

    Raises:
        UserError: there is no key or no wandb, or something did not arrive.
    """
    read_key(key_file)
    choose_program_runner(runner, True)
    folders, said = to_upload(run)
    if not folders and not figures:
        yield from said
        yield f"nothing to upload in {run.wandb}"
        return
    if figures and not wandb_id(run):
        raise UserError(f"{run.wandb} holds no wandb run to send figures to; a run writes one where its trainer.logger "
                        "names wandb")
    how = way(runner, key_file)
    yield from said
    flags = [*(["--project", project] if project else []), *(["--entity", entity] if entity else [])]
    if folders:
        yield f"{len(folders)} of wandb's runs go to {how.address}"
        program = ["--wandb", how.wandb] if how.wandb else []
        code = _run(c, run, how, ["upload", *flags, *program], folders, sys.executable)
        if not c.config.run.dry:
            if code:
                raise UserError(f"wandb ended with the exit code {code}; run it again to go on", code=1)
            missing = [one.folder.name for one in offline_runs(run) if one.folder in folders and not one.synced]
            if missing:  # its exit code is 0 all the same
                raise UserError(
                    f"{', '.join(missing)} did not arrive at {how.address}, as wandb said above; run it again to go on",
                    code=1)
            yield f"{len(folders)} uploaded to {how.address}"
    if figures:
        named = project or project_of(run)
        flags = [*(["--project", named] if named else []), *(["--entity", entity] if entity else [])]
        if _run(c, run, how, ["figures", *flags], [run.path], python_of(how.wandb) if how.wandb else ""):
            raise UserError(code=1)


def project_of(run: RunFolder) -> str:
    """Return the wandb project that the trainer names; empty where run.json does not tell."""
    with suppress(OSError, ValueError):
        trainer = (run.read().get("resolved") or {}).get("trainer")
        if isinstance(trainer, dict) and isinstance(trainer.get("project_name"), str):
            return str(trainer["project_name"])
    return ""


def _run(c: Context, run: RunFolder, how: Way, words: list[str], folders: Sequence[Path], python: str) -> int:
    """Run `python -m training …` here or in the training image; return its exit code."""
    if how.runner == "docker":
        os.environ["WANDB_API_KEY"] = how.key  # where Compose reads it, and where it is known as a secret
        inside = [Translation(ROOT).path(folder) for folder in folders]
        where = ["env", f"WANDB_BASE_URL={how.address}"] if how.address != PUBLIC else []
        containers.run(c,
                       "train", [*where, "python", "-m", "training", *words, *inside],
                       gpus="none",
                       variables={
                           "WANDB_API_KEY": how.key,
                           "WANDB_MODE": "online"
                       })
        return 0
    argv = [python, "-m", "training", *words, *map(str, folders)]
    if c.config.run.dry:
        put(shlex.join(argv))
        return 0
    return subprocess.run(argv,
                          cwd=run.path,
                          env=surroundings(os.environ, how.key),
                          stdin=subprocess.DEVNULL,
                          check=False).returncode
