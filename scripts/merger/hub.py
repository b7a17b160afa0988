"""Upload a merged folder to the Hugging Face Hub."""
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merger import MergeError
from merger.companions import check_tree, is_replaced
from merger.filenames import CARD, RECORD
from merger.files import atomic_write
from merger.foreign.text import markdown, printable
from merger.modelconfig import dump_json
from merger.record import read_record

# What huggingface_hub's validate_repo_id takes, with an owner.
REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))(?=.{3,96}$)[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?",
                        re.ASCII)


def log_in(repo_id: str, private: bool = False) -> Any:
    """Return a Hub client whose token works; before any merging, so that what the Hub refuses costs no time.

    The token comes from $HF_TOKEN or the login of `hf auth login`.

    Raises:
        MergeError: the name is no repository's, there is no token, the Hub refuses it, or a repository that shall be
            private is public.
    """
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise MergeError(f"--hf-upload-path {repo_id} is no Hub repository; write it as user/name")
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise MergeError("--hf-upload-path needs huggingface_hub; pip install huggingface_hub") from None
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise MergeError(f"--hf-upload-path {repo_id!r} is no Hub repository's name ({_one_line(error)}); write it as "
                         "user/name") from None
    if not get_token():
        raise MergeError("--hf-upload-path needs a token; set HF_TOKEN or run `hf auth login`")
    api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # the library's many, and those of its HTTP client, which changed with version 1
        raise MergeError(f"the Hub at {api.endpoint} does not take the token ({_one_line(error)}); "
                         "set another HF_TOKEN or run `hf auth login`") from error
    if private:
        _check_private(api, repo_id)
    return api


def _check_private(api: Any, repo_id: str) -> None:
    """Refuse a repository that is there and public: `create_repo` leaves it so without a word."""
    from huggingface_hub.utils import RepositoryNotFoundError
    try:
        found = api.model_info(repo_id)
    except RepositoryNotFoundError:  # it will be created
        return
    except Exception as error:
        raise MergeError(f"the Hub at {api.endpoint} does not tell whether {repo_id} is private ({_one_line(error)}); "
                         "try again, or leave out --private") from error
    if not found.private:
        raise MergeError(f"--private was given, but {repo_id} is public; make it private in its settings, name another "
                         "--hf-upload-path, or leave out --private")


def upload(api: Any, folder: Path, repo_id: str, private: bool) -> str:
    """Upload `folder` and return the repository's address. An upload that broke off goes on where it stopped.

    `merge.json` goes last, without this machine's folders. The same commit deletes what the repository has of other
    weights, which might be loaded in place of these; every other file there stays.

    Raises:
        MergeError: the Hub refused, could not be reached or left out a file; `folder` is as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    check_tree(folder, [folder])
    record = dump_json(public_record(read_record(folder))).encode()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        # This resumes in every version, for the Hub tells which contents it has. upload_large_folder believes notes that
        # it leaves in the folder and that name no repository; 0.36 repeats for ever what the Hub refuses, 2 has it not.
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload merged model",
                          ignore_patterns=[RECORD])  # yapf: disable
        local, remote = _names(folder), api.list_repo_files(repo_id)
        lost = sorted(set(local) - {*remote, RECORD})
        if not lost:
            stale = [CommitOperationDelete(name) for name in remote if is_replaced(name) and name not in local]
            api.create_commit(repo_id, [CommitOperationAdd(RECORD, record), *stale],
                              commit_message="Upload the merge's record")  # yapf: disable
    except Exception as error:
        raise MergeError(f"the upload to {repo_id} failed ({_one_line(error)}); {folder} is complete; "
                         "run the same command again to go on with the upload") from error
    if lost:
        raise MergeError(f"{repo_id} lacks {lost[0]} after the upload; {folder} is complete; see whether a .gitignore "
                         "names that file, then run the same command again")
    return str(url)


def _names(folder: Path) -> list[str]:
    """Return the files of `folder` that `upload_folder` sends, as the Hub names them."""
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
    files = [path.relative_to(folder).as_posix() for path in folder.glob("**/*") if path.is_file()]
    return list(filter_repo_objects(files, ignore_patterns=DEFAULT_IGNORE_PATTERNS))


def _one_line(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")


def add_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a model card into `folder` where it has none."""
    card = folder / CARD
    if not card.exists():
        atomic_write(card, model_card(record).encode())


def hub_name(base_model: str | None) -> str | None:
    """Return `base_model` where it names a repository of the Hub, which a path of this machine does not.

    >>> hub_name("Qwen/Qwen2.5-3B"), hub_name("/data/models/Qwen2.5-3B"), hub_name("models/a/b"), hub_name(None)
    ('Qwen/Qwen2.5-3B', None, None, None)
    """
    if not base_model or not REPOSITORY.fullmatch(base_model) or Path(base_model).exists():
        return None
    return base_model


def _without_folders(text: str) -> str:
    """Return `text` with only the last part of each absolute path in it.

    >>> _without_folders("no config in /data/x/actor, see https://hf.co/a/b")
    'no config in actor, see https://hf.co/a/b'
    """
    return re.sub(r"(?<![\w.:/])/(?:[^\s/]+/)+", "", text)


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a merge without this machine's folders: of each source, the folder's name."""
    named = {
        kind: [{**source, "folder": Path(source["folder"]).name} for source in record[kind]]
        for kind in ("sources", "base_sources") if kind in record
    }  # yapf: disable
    asked = dict(record.get("requested", {}))
    if asked.get("base_model"):
        asked["base_model"] = Path(asked["base_model"]).name
    told = _without_folders(record["model_check"])  # transformers may name the config's folder
    return {
        **record,
        **named, "requested": asked,
        "base_model": hub_name(record.get("base_model")),
        "model_check": told
    }


def model_card(record: Mapping[str, Any]) -> str:
    """Return a model card with the facts of `merge.json`."""
    base_model = hub_name(record.get("base_model"))
    head = ["---", "library_name: transformers", *([f'base_model: "{base_model}"'] if base_model else []), "---"]
    mesh = ", ".join(f"{name} {size}" for mesh in record["meshes"] for name, size in mesh.items()) or "none"
    rows = [("tensors", f"{record['tensors']:,}"), ("parameters", f"{record['parameters']:,}"),
            ("element type", record["dtype"]), ("ranks", record["world_size"]), ("device mesh", mesh),
            ("NaN or infinite elements", record["nan"] + record["inf"])]
    table = ["| | |", "|---|---|", *(f"| {name} | {markdown(str(value))} |" for name, value in rows)]
    return "\n".join([
        *head, "", "# Merged FSDP checkpoint", "",
        "These weights were merged from the shards of a training run; `merge.json` lists the shards.", "", *table, ""
    ])
