"""The Hugging Face Hub as the tasks use it: its own client, with the address and the token of the settings."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.lib.errors import UserError
from tasks.lib.settings import resolve

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def hub_client() -> HfApi:
    """Return the hub's own client, with the address and the token of the settings; an unset one it finds itself."""
    from huggingface_hub import HfApi
    return HfApi(endpoint=resolve("HF_ENDPOINT").strip().rstrip("/") or None, token=resolve("HF_TOKEN").strip() or None)


@dataclass(frozen=True)
class File:
    """A file of a repository.

    Attributes:
        size: in bytes.
        sha256: of its content, where it is a large one; sha1: git's own of a blob, where it is none; or empty.
    """
    size: int
    sha256: str = ""
    sha1: str = ""


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub at one commit.

    Attributes:
        name: user/name.
        kind: model or dataset.
        commit: which one.
        files: by name.
    """
    name: str
    kind: str
    commit: str
    files: dict[str, File]


def look(name: str, kind: str, revision: str = "") -> Repository:
    """Ask the Hub what a repository holds.

    Args:
        name: user/name.
        kind: model or dataset.
        revision: branch, tag or commit; empty for main.

    Raises:
        UserError: it is not there, may not be read, or the Hub cannot be reached.
    """
    try:
        info = hub_client().repo_info(name, repo_type=kind, revision=revision or None, files_metadata=True)
    except ModuleNotFoundError:  # the tasks' edge says what to install
        raise
    except Exception as error:  # of the hub, of HTTP and of the network: no common class across releases
        raise UserError(refusal(name, kind, revision, error), code=1) from None
    files = {}
    for sibling in getattr(info, "siblings", None) or []:
        if not _is_inside(sibling.rfilename):
            raise UserError(
                f"the {kind} {name} has a file {sibling.rfilename!r}, which would leave its folder; nothing is "
                "fetched",
                code=1)
        large = getattr(sibling.lfs, "sha256", "") if sibling.lfs else ""
        files[sibling.rfilename] = File(sibling.size or 0, large or "", "" if large else sibling.blob_id or "")
    return Repository(name, kind, str(info.sha), files)


def _is_inside(name: str) -> bool:
    """Tell whether a file's name is one below a folder, and one that can be shown."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and all(part not in ("", ".", "..") for part in parts)


def download(repository: Repository, names: list[str], folder: Path) -> None:
    """Fetch files of a repository into `folder`, going on where an earlier try stopped, also in the middle of a file.

    Raises:
        UserError: one did not come, or not as the Hub has it; what came is kept for the next try.
    """
    for name in names:
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(repository, name, part_of(path))
            part_of(path).rename(path)


def part_of(path: Path) -> Path:
    """Return where a file lies while it comes."""
    return path.with_name(path.name + ".part")


def _fetch(repository: Repository, name: str, part: Path) -> None:
    # hf_hub_download begins a file anew after each break-off: its part has another name in each process.
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers
    client, told = hub_client(), repository.files[name]
    url = hf_hub_url(repository.name,
                     name,
                     repo_type=repository.kind,
                     revision=repository.commit,
                     endpoint=client.endpoint)
    if part.exists() and part.stat().st_size > told.size:
        part.unlink()
    with part.open("ab") as file:
        try:
            http_get(url,
                     file,
                     resume_size=file.tell(),
                     headers=build_hf_headers(token=client.token),
                     expected_size=told.size,
                     displayed_filename=name)
        except OSError as error:
            if error.errno:  # of the disk, not of the network
                raise
            raise UserError(f"{name}: {_why(error)}; run it again to go on", code=1) from None
        except Exception as error:  # see `look`
            raise UserError(f"{name}: {_why(error)}; run it again to go on", code=1) from None
    if part.stat().st_size != told.size or not _is_right(part, told):
        part.unlink()
        raise UserError(f"{name} came damaged and was removed; run it again", code=1)


def _is_right(path: Path, told: File) -> bool:
    if not (told.sha256 or told.sha1):
        return True
    digest = hashlib.sha256() if told.sha256 else hashlib.sha1(f"blob {told.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == (told.sha256 or told.sha1)


def refusal(name: str, kind: str, revision: str, error: Exception) -> str:
    """Return what the Hub's refusal means, with the remedy."""
    which = f"{kind} {name}" + (f" at {revision}" if revision else "")
    said = type(error).__name__
    if said == "GatedRepoError":
        return f"the {which} is gated: ask for access on its page, then set HF_TOKEN (or `hf auth login`)"
    if said == "RevisionNotFoundError":
        return f"the Hub has no {which}; leave --revision out, or name a branch, tag or commit"
    if said == "RepositoryNotFoundError":
        return f"the Hub has no {which}, or your token may not read it; mind the spelling, or set HF_TOKEN"
    if said == "OfflineModeIsEnabled":
        return f"the {which} cannot be looked up while HF_HUB_OFFLINE is set; unset it"
    if said == "HFValidationError":
        return f"{name!r} is no repository's name; write user/name"
    return f"the {which} cannot be looked up: {_why(error)}; check the network and HF_ENDPOINT"


def _why(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
