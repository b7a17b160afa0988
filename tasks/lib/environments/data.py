"""Fetch what an environment needs into data/<name>: resumable, checked, with size and space told before."""
import gzip
import http.client
import json
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from environment_rows import ABOUT, about
from tasks.lib.environments.lookup import local_source
from tasks.lib.environments.rows import Data, Environment
from tasks.lib.errors import UserError
from tasks.lib.hub import hub_client
from tasks.lib.tables import human_size
from training.exchange import opener

CHUNK = 1 << 20
PIECE, PATIENCE = 1 << 16, 60.0  # bytes that have so many seconds to come
# Bytes of disk for each that is fetched. An archive lies beside what comes out of it, text and databases of about three
# times its size; parts that are joined go one by one.
SPACE = {"unzip": 4.0, "untar": 4.0, "gunzip": 4.0, "join": 2.0}
PARTS = ".parts"

Say = Callable[[str], None]
Make = Callable[[str, Path], None]


def chosen(row: Environment, split: str, index: str) -> list[Data]:
    """Return the entries of the row's data that `split` and `index` ask for; empty is all splits, and the row's index.

    Raises:
        UserError: the row has no such split or index.
    """
    kinds = {
        "split": [one.split for one in row.data if one.split],
        "index": [one.index for one in row.data if one.index]
    }
    for flag, value in (("split", split), ("index", index)):
        known = list(dict.fromkeys(kinds[flag]))
        if value and value not in known:
            raise UserError(f"--{flag} {value}: {row.name} has " +
                            (f"{', '.join(known)}; choose one" if known else f"no choice of it; leave --{flag} out"))
    first = next(iter(kinds["index"]), "")
    # The others are made of the first.
    return [
        one for one in row.data
        if one.split in ("", split or one.split) and (not one.index or one.index in (first, index))
    ]


def lacking(wanted: Sequence[Data], folder: Path) -> list[Data]:
    """Return the entries that are not in `folder`."""
    return [one for one in wanted if not (folder / one.path).exists()]


def choose_index(row: Environment, folder: Path, index: str) -> None:
    """Note in `folder` which search index the server takes; the row's own needs no note."""
    told = {key: value for key, value in about(folder).items() if key != "index"}
    if index != next(one.index for one in row.data if one.index):
        told["index"] = index
    if told:
        (folder / ABOUT).write_text(json.dumps(told))
    else:
        (folder / ABOUT).unlink(missing_ok=True)


def make_toy(row: Environment, folder: Path, make: Make) -> None:
    """Make the row's toy data in `folder`, in place of toy data of an earlier time.

    Raises:
        UserError: the row has none, or `folder` holds other data.
    """
    if not row.toy:
        raise UserError(f"there is no toy data for {row.name}; leave --toy out")
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not is_toy(folder)):
        raise UserError(f"{folder} holds other data; move it away, and run it again")
    remove_toy(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    make("toy-" + row.toy, folder)


def is_toy(folder: Path) -> bool:
    """Tell whether `folder` holds toy data."""
    return not folder.is_symlink() and about(folder).get("data") == "toy"


def remove_toy(folder: Path) -> None:
    """Remove `folder` where it holds toy data, or nothing."""
    if is_toy(folder):
        shutil.rmtree(folder)
    elif folder.is_dir() and not folder.is_symlink():
        folder.rmdir()


def adopt(row: Environment, folder: Path, source: Path) -> None:
    """Let `folder` be the data that already lies in `source`.

    Raises:
        UserError: `source` lacks something, or `folder` holds data of its own.
    """
    if not source.is_dir():
        raise UserError(f"--from {source} is no folder")
    missing = row.missing_data(source)
    if missing:
        raise UserError(f"{source} has no {missing[0].path}; {row.name} needs {', '.join(d.path for d in row.data)}")
    target = source.resolve()  # before a link goes that it may lead through
    if folder.resolve() == target:
        return
    if folder.is_symlink():
        folder.unlink()
    elif folder.is_file():
        raise UserError(f"{folder} is a file; move it away, and run it again")
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; move it away, or leave --from out")
    elif folder.is_dir():
        folder.rmdir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(target)


def leading_out(row: Environment, folder: Path) -> Path | None:
    """Return a link in the row's data in `folder` that leads out of it: where a container, which sees `folder` only,
    cannot follow. A snapshot in the hub's cache is full of them.
    """
    inside = folder.resolve()
    for data in row.data:
        top = inside / data.path
        below = (Path(place) / name for place, *names in os.walk(top) for some in names for name in some)
        for path in (top, *below):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                return path
    return None


def url_size(url: str) -> int:
    """Return the size in bytes that the server of `url` tells; 0 where it tells none.

    Raises:
        UserError: the server refuses or cannot be reached.
    """
    try:
        with opener().open(urllib.request.Request(url, method="HEAD"), timeout=30) as reply:
            return int(reply.headers.get("Content-Length") or 0)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url}: {getattr(error, 'reason', error)}; fetch it by other means, then --from DIR",
                        code=1) from None


def hub_files(data: Data) -> list[tuple[str, int]]:
    """Return the files of a hub entry with their sizes.

    Raises:
        UserError: the hub cannot be reached.
    """
    kind, repository = hub_repository(data.hub)
    client = hub_client()
    try:
        info = client.repo_info(repository, repo_type=kind, files_metadata=True)
    except Exception as error:  # hub, HTTP and network errors have no common class across releases
        raise UserError(f"hub {repository}: {str(error).splitlines()[0]}; check HF_ENDPOINT, or use --from DIR",
                        code=1) from None
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in getattr(info, "siblings", None) or []}
    wanted = data.files or tuple(sizes)
    absent = [name for name in wanted if name not in sizes]
    if absent:
        raise UserError(f"hub {repository} has no {absent[0]}", code=1)
    return [(name, sizes[name]) for name in wanted]


def hub_repository(hub: str) -> tuple[str, str]:
    """Return (repository type, user/name) of `datasets/user/name` or `user/name`."""
    return ("dataset", hub.removeprefix("datasets/")) if hub.startswith("datasets/") else ("model", hub)


def download(url: str, target: Path, size: int, say: Say) -> None:
    """Fetch `url` into `target`, going on where an earlier try stopped.

    Raises:
        UserError: the connection broke or the size is wrong; what came is kept for the next try.
    """
    part = target.with_name(target.name + ".part")
    if size and part.exists() and part.stat().st_size > size:  # the file changed since: nothing to go on with
        part.unlink()
    have = part.stat().st_size if part.exists() else 0
    if size and have == size:
        part.rename(target)
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with opener().open(request, timeout=PATIENCE) as reply:
            if have and reply.status != 206:  # the server knows no ranges: from the beginning
                have = 0
            told = have
            with part.open("ab" if have else "wb") as file:
                while chunk := reply.read(PIECE):
                    file.write(chunk)
                    reply.allow(PATIENCE)
                    have += len(chunk)
                    if have - told >= max(size // 10, CHUNK):
                        say(f"{target.name}: {human_size(have)}" + (f" of {human_size(size)}" if size else ""))
                        told = have
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", 0) == 416:  # there is nothing after what came: it is of another file
            part.unlink()
            raise UserError(f"{url}: what came before was of another file, and was removed; run it again",
                            code=1) from None
        raise UserError(f"{url}: {getattr(error, 'reason', error)} after {human_size(have)}; run it again to go on",
                        code=1) from None
    if size and have != size:
        raise UserError(f"{url}: {human_size(have)} of {human_size(size)} came; run it again to go on", code=1)
    part.rename(target)


def damaged(archive: Path, error: Exception) -> UserError:
    """Remove `archive`, so that the next try fetches it anew, and return what to say."""
    archive.unlink(missing_ok=True)
    return UserError(f"{archive.name} is damaged ({error}) and was removed; run it again to fetch it anew", code=1)


def unzip(archive: Path, folder: Path) -> None:
    """Unpack `archive`, checking every file, and remove it.

    Raises:
        UserError: it is damaged, or leads out of `folder`.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                if not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise UserError(f"{archive.name} holds {name}, which leads out of {folder}", code=1)
            zipped.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise damaged(archive, error) from None
    archive.unlink()


def unpack(data: Data, archive: Path, folder: Path) -> None:
    """Unpack `archive` and the archives in it beside it, then move what holds the row's path into `folder`.

    Raises:
        UserError: it is damaged, does not hold the path, or `folder` has something in its place.
    """
    path = Path(data.path)
    top, unpacked = path.parts[0], archive.with_name("unpacked")
    if (folder / top).is_dir() and any((folder / top).iterdir()):
        raise UserError(f"{folder / top} is there without {path.name}; move it away, and run it again", code=1)
    unzip(archive, unpacked)
    if not (unpacked / path).exists():
        # BIRD's dev.zip holds dev_20240627/ where AgentGym wants dev/.
        found = [other for other in unpacked.iterdir() if (other / Path(*path.parts[1:])).is_file()]
        if len(path.parts) < 2 or len(found) != 1:
            raise UserError(f"{archive.name} holds no {path}", code=1)
        found[0].rename(unpacked / top)
    for inner in data.inner:
        unzip(unpacked / inner, (unpacked / inner).parent)
    (unpacked / top).rename(folder / top)  # last: what is in place counts as complete


def untar(archive: Path, member: str, target: Path) -> None:
    """Take the file `member` out of `archive`, which stays for the other entries that are in it.

    Raises:
        UserError: it is damaged, or has no such file.
    """
    beside = target.with_name(target.name + ".part")
    try:
        with tarfile.open(archive) as packed:
            for one in packed:
                if one.isfile() and Path(one.name) == Path(member):
                    file = packed.extractfile(one)
                    assert file is not None
                    with beside.open("wb") as whole:
                        shutil.copyfileobj(file, whole, CHUNK)
                    beside.rename(target)
                    return
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise damaged(archive, error) from None
    raise UserError(f"{archive.name} holds no {member}", code=1)


def finish(data: Data, parts: Sequence[Path], folder: Path) -> None:
    """Make of the fetched `parts` what the row asks for.

    Raises:
        UserError: an archive is damaged (it is gone then), or `folder` has something in its place.
    """
    target = folder / data.path
    target.parent.mkdir(parents=True, exist_ok=True)
    if data.then == "join":
        with target.with_name(target.name + ".part").open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole, CHUNK)
                part.unlink()  # at once: two copies of 60 GB need not lie side by side
        target.with_name(target.name + ".part").rename(target)
    elif data.then == "gunzip":
        try:
            with gzip.open(parts[0]) as packed, target.with_name(target.name + ".part").open("wb") as whole:
                shutil.copyfileobj(packed, whole, CHUNK)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise damaged(parts[0], error) from None
        target.with_name(target.name + ".part").rename(target)
        parts[0].unlink()
    elif data.then == "unzip":
        unpack(data, parts[0], folder)
    elif data.then == "untar":
        untar(parts[0], data.inner[0], target)
    elif data.hub and not data.files:
        parts[0].parent.rename(target)
    else:
        parts[0].rename(target)


def store_of(data: Data, folder: Path) -> Path:
    """Return where what is fetched for `data` lies meanwhile; entries that are in one archive share it."""
    name = data.hub + "/" + "/".join(data.files) if data.then == "untar" else data.path
    return folder / PARTS / name.replace("/", "_")


def sizes(missing: Sequence[Data], folder: Path) -> dict[str, int]:
    """Return what there is to fetch for `missing`, in bytes, by path; what several are in counts with the first.

    Raises:
        UserError: a source cannot be reached.
    """
    found, counted = {}, set()
    for data in missing:
        if data.url:
            found[data.path] = url_size(data.url)
        elif data.hub:
            store = store_of(data, folder)
            found[data.path] = 0 if store in counted else sum(size for _, size in hub_files(data))
            counted.add(store)
    return found


def copy_from_checkout(row: Environment, data: Data, folder: Path) -> bool:
    """Copy what comes with a checkout of AgentGym; False where none on this machine has it."""
    try:
        there = local_source(row) / row.folder / data.source
    except UserError:  # AgentGym is known by its address alone
        return False
    if not there.exists():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / (data.path + ".part")
    shutil.copyfile(there, beside)
    beside.rename(folder / data.path)
    return True


def fetched(folder: Path) -> int:
    """Return the bytes that earlier tries left of what is to fetch; what they half unpacked goes."""
    for half in (folder / PARTS).glob("*/unpacked"):
        shutil.rmtree(half, ignore_errors=True)
    return sum(path.stat().st_size for path in (folder / PARTS).rglob("*") if path.is_file())


def fetch(row: Environment,
          folder: Path,
          say: Say,
          wanted: Sequence[Data] | None = None,
          make: Make | None = None) -> list[Data]:
    """Fetch or make what of `wanted` is missing; return what the user must get by hand.

    Args:
        wanted: entries of the row's data (default: all, and of search indexes the row's own).
        make: makes what only the environment's own packages can (servers/make_data.py), of what is in `folder`.

    Raises:
        UserError: too little space, or a source that fails; nothing of what is to be made is tried before all else is there.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file; move it away, and run it again", code=1)
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder} is a link to {os.readlink(folder)}, which is not there; remove it, and run it again",
                        code=1)
    wanted = chosen(row, "", "") if wanted is None else wanted
    if is_toy(folder) and any(not one.make for one in lacking(wanted, folder)):
        raise UserError(f"{folder} holds toy data; `rm -r {folder}` before the real is fetched")
    for data in lacking(wanted, folder):
        if data.source and copy_from_checkout(row, data, folder):
            say(f"{row.name}: {data.path} is there, from the checkout")
    missing = lacking(wanted, folder)
    to_fetch = sizes(missing, folder)
    for data in missing if to_fetch else ():  # before the hours of fetching, not after them alone
        if data.path not in to_fetch and not data.make:
            say(f"{row.name}: {data.path} comes by hand: {data.how}")
    if to_fetch:
        folder.mkdir(parents=True, exist_ok=True)
        have = fetched(folder)
        total, free = sum(to_fetch.values()), shutil.disk_usage(folder).free
        needed = sum(to_fetch.get(data.path, 0) * SPACE.get(data.then, 1.0) for data in row.data) - have
        here = f" ({human_size(have)} of it came before)" if have else ""
        say(f"{row.name}: {human_size(total)} to fetch into {folder}{here}, {human_size(free)} free")
        if needed > free:
            raise UserError(
                f"{row.name} needs about {human_size(needed)} more to fetch and unpack, "
                f"{human_size(free)} are free in {folder}",
                code=1)
    for data in missing:
        if not (data.url or data.hub):
            continue
        store = store_of(data, folder)
        store.mkdir(parents=True, exist_ok=True)
        if data.url:
            parts = [store / data.url.rsplit("/", 1)[-1]]
            if not parts[0].exists():
                download(data.url, parts[0], to_fetch[data.path], say)
        else:
            parts = fetch_from_hub(data, store)
        finish(data, parts, folder)
        say(f"{row.name}: {data.path} is there")
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    missing = lacking(wanted, folder)
    if make and all(data.make for data in missing):
        for data in missing:
            say(f"{row.name}: making {data.path}")
            make(data.make, folder / data.path)
            say(f"{row.name}: {data.path} is there")
        return []
    return [data for data in missing if not (make and data.make)]


def fetch_from_hub(data: Data, store: Path) -> list[Path]:
    """Fetch a hub entry into `store`; the hub's own client resumes, checks and shows progress."""
    kind, repository = hub_repository(data.hub)
    client = hub_client()
    try:
        if not data.files:
            inside = store / "snapshot"
            client.snapshot_download(repository, repo_type=kind, local_dir=inside)
            return [inside / "anything"]
        return [Path(client.hf_hub_download(repository, name, repo_type=kind, local_dir=store)) for name in data.files]
    except Exception as error:  # see hub_files
        raise UserError(f"hub {repository}: {str(error).splitlines()[0]}; run it again to go on", code=1) from None
