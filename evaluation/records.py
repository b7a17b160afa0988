"""A run's folder: one JSON line an attempt, the configuration, and the sessions that are open.

    attempts.jsonl   one line an attempt, written and flushed as it ends; each item and sample once, but for an
                     attempt that was played again since the run was last taken up: there the later line stands
    superseded.jsonl attempts that the infrastructure spoilt and that were played again
    damaged.jsonl    lines of attempts.jsonl that were no attempts, as they were; their items are played again
    run.json         configuration, its hash, row, prompt, versions, and when the run was worked on
    sessions.jsonl   sessions that were opened and closed, so that a run that was killed leaves none behind
    summary.json     the numbers; report.html: the report
    live.json        while the run goes on, what it does; see live.py
    .before/         the files of the run that --fresh replaces, until the model has answered in the new one
"""
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Any, Generic, NamedTuple, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from evaluation import foreign
from evaluation.attempts import ERRORS, Attempt, Key, Try, key_of, read_attempt
from evaluation.output import complain
from evaluation.problems import Misuse, Stopped, reason
from evaluation.secrets import hide, hide_in
from evaluation.text import json_line, short

T = TypeVar("T")

ATTEMPTS, SUPERSEDED, RUN, SESSIONS = "attempts.jsonl", "superseded.jsonl", "run.json", "sessions.jsonl"
SUMMARY, REPORT, LOCK, RULE, BEFORE = "summary.json", "report.html", ".lock", "rule.json", ".before"
DAMAGED, LIVE = "damaged.jsonl", "live.json"
FILES = (RUN, ATTEMPTS, SUPERSEDED, SUMMARY, REPORT, RULE, DAMAGED)  # of one run


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that it is either as before or whole; a text without secrets of ours."""
    beside = path.with_name(path.name + ".new")
    try:
        beside.unlink(missing_ok=True)  # left by whoever was killed; or a link, which must not be followed
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666), "wb") as file:
            file.write(hide(data).encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def _open_own(path: Path, flags: int) -> int:
    """Return a descriptor of a file of the run's folder, to write it.

    Raises:
        Misuse: it is a link, which may lead out of the folder, or no regular file.
        OSError: it cannot be opened.
    """
    try:
        return foreign.open_file(path, flags)
    except ValueError as error:
        raise Misuse(f"{path} is not written: {error}; remove it, or choose another folder with --out") from None


class Damaged(NamedTuple):
    """A line that is none of its file's."""
    number: int
    line: bytes
    reason: str


class ReadLines(NamedTuple, Generic[T]):
    """What a file of JSON lines holds; `size` is that of its whole lines, after which one may be torn."""
    values: list[T]
    damaged: list[Damaged]
    size: int


def whole_lines(lines: Iterable[bytes], read: Callable[[Any], T]) -> ReadLines[T]:
    """Return what `read` makes of the JSON values in `lines`, one in each.

    Args:
        read: raises ValueError for a value that is none of the file's.
    """
    values: list[T] = []
    damaged: list[Damaged] = []
    size = 0
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break  # torn, by whatever ended the run that wrote it
        size += len(line)
        try:
            value = foreign.loads(line)
        except ValueError:
            damaged.append(Damaged(number, line, f"line {number} is no JSON"))
            continue
        try:
            values.append(read(value))
        except ValueError as error:
            damaged.append(Damaged(number, line, f"line {number} {error}"))
    return ReadLines(values, damaged, size)


def read_lines(path: Path, read: Callable[[Any], T], repair: bool = False) -> ReadLines[T]:
    """Return what `read` makes of the values in a file of JSON lines; an absent one has none.

    Args:
        repair: cut a torn last line off.

    Raises:
        Misuse: the file cannot be read.
    """
    try:
        with open(foreign.open_file(path, os.O_RDWR if repair else os.O_RDONLY), "r+b" if repair else "rb") as file:
            found = whole_lines(foreign.lines(file), read)
            if repair and found.size < os.fstat(file.fileno()).st_size:
                file.truncate(found.size)
    except FileNotFoundError:
        return ReadLines([], [], 0)
    except (OSError, ValueError) as error:
        raise Misuse(f"{path} cannot be read: {reason(error)}; restore the file, or start anew with --fresh") from None
    return found


def read_object(value: Any) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")
    return value


def read_session(value: Any) -> dict[str, Any]:
    """Return a line of sessions.jsonl.

    Raises:
        ValueError: it names no server.
    """
    if not isinstance(read_object(value).get("server"), str):
        raise ValueError(f"has server {short(value.get('server'))}" if "server" in value else "has no server")
    return value


@with_config(ConfigDict(strict=True, extra="allow"))
class Work(TypedDict):
    """A stretch of work on a run; `seconds` is None until it ends, and where it was killed."""
    started: str
    seconds: Annotated[float, Field(ge=0, le=1e10)] | None


@with_config(ConfigDict(strict=True, extra="allow"))
class Config(TypedDict):
    """What every configuration has; the rest is compared and shown."""
    env: str
    model: str
    items: list[str]
    samples: Annotated[int, Field(ge=1, le=10**6)]


@with_config(ConfigDict(strict=True, extra="allow"))
class Words(TypedDict):
    """What is told of the prompt, beside its words: whose it is, where it was read, at which revision."""
    source: NotRequired[str]
    place: NotRequired[str]
    revision: NotRequired[str]


@with_config(ConfigDict(strict=True, extra="allow"))
class Manifest(TypedDict):
    """run.json."""
    config: Config
    row: dict[str, Any]
    prompt: Words
    revision: str
    work: list[Work]


MANIFEST: TypeAdapter[Manifest] = TypeAdapter(Manifest)


def is_run(manifest: Any) -> bool:
    """Return True if a value has the form of run.json."""
    try:
        MANIFEST.validate_python(manifest)
    except ValidationError:
        return False
    return True


def read_run(folder: Path) -> dict[str, Any]:
    """Return run.json of a run's folder.

    Raises:
        Misuse: there is none, or it is damaged.
    """
    try:
        manifest = foreign.read_json(folder / RUN)
    except OSError:
        raise Misuse(f"no run in {folder}: it has no {RUN}; `python -m evaluation list` shows the runs") from None
    except ValueError as error:
        raise Misuse(f"{folder / RUN} is no JSON ({reason(error)}); restore it, or start anew with --fresh") from None
    if not is_run(manifest):
        raise Misuse(f"{folder / RUN} tells of no run; restore it, or start anew with --fresh")
    return manifest


def latest_of(records: Iterable[Attempt], config: Mapping[str, Any]) -> dict[Key, Attempt]:
    """Return the records of a run by what they are known by, the later of two; others' items are left out."""
    items = set(config["items"])
    return {
        key_of(record): record
        for record in records if record["item"] in items and record["sample"] < config["samples"]
    }


def read_attempts(folder: Path) -> list[Attempt]:
    """Return the attempts of a run's folder, without a torn last one; a later line stands for an earlier one.

    A line that is no attempt is named on standard error and left out.

    Raises:
        Misuse: a file cannot be read, or run.json is damaged.
    """
    config = read_run(folder)["config"]
    found = read_lines(folder / ATTEMPTS, read_attempt)
    for one in found.damaged:
        complain(f"{folder / ATTEMPTS}: {one.reason}; it is left out, and played again when the run goes on")
    return list(latest_of(found.values, config).values())


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Return what differs between two configurations, a line each: `key: was 1, is 2`."""

    def shown(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 60 else text[:57] + "…"

    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{path}{key}.")
        elif before != after:
            lines.append(f"{path}{key}: was {shown(before)}, is {shown(after)}")
    return lines


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a configuration all attempts depend on: more items and samples only add to them."""
    return {key: value for key, value in config.items() if key not in ("items", "samples")}


def growth(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return why a run with the configuration `old` cannot become one with `new`, a line each; none where it can."""
    found = differences(identity(old), identity(new))
    lacking = set(old["items"]) - set(new["items"])
    if lacking:
        found.append(f"items: {len(lacking)} of {len(old['items'])} are not asked for any more, such as "
                     f"{short(min(lacking), 60)}")
    if new["samples"] < old["samples"]:
        found.append(f"samples: was {old['samples']}, is {new['samples']}")
    return found


class Lines:
    """A file that JSON lines are added to; a line is either whole in it or, after a crash, the torn last one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] = os.fdopen(_open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab", buffering=0)

    def add(self, value: Any) -> None:
        """Write a line to the file.

        Raises:
            Stopped: it cannot be written; what was written of it is taken back.
        """
        text = json_line(hide_in(value))
        line = text.encode("utf-8", "backslashreplace") + b"\n"
        size = os.fstat(self.file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self.file.write(line[written:]) or 0
        except OSError as error:
            os.ftruncate(self.file.fileno(), size)
            raise Stopped(f"{self.path} cannot be written: {error.strerror}; make room and run the same command again, "
                          "which resumes") from None

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class RunFolder:
    """The folder of a run that is being worked on, by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[Key, Attempt] = {}
        self.leftover: dict[str, list[int]] = {}
        self.spoilt: dict[Key, Attempt] = {}  # by the infrastructure, before this stretch of work
        self.earlier: dict[Key, list[Try]] = {}
        self.damaged: list[Damaged] = []  # lines of attempts.jsonl that were none

    def __enter__(self) -> "RunFolder":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / BEFORE).is_symlink():  # what it holds is moved, and its folder removed
                raise Misuse(f"{self.folder / BEFORE} is a link; remove it, or choose another folder with --out")
            self._lock = os.fdopen(_open_own(self.folder / LOCK, os.O_WRONLY | os.O_CREAT), "w")
        except OSError as error:
            raise Misuse(
                f"{self.folder} cannot be written: {error.strerror}; choose another folder with --out") from None
        for last in (False, False, False, True):  # who only looks whether somebody works here has it for a moment
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if last:
                    self._lock.close()
                    raise Misuse(f"{self.folder} is in use by another evaluation; wait for it, or choose another --out"
                                 ) from None
                time.sleep(0.1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for name in ("attempts", "sessions"):
            if hasattr(self, name):
                getattr(self, name).close()
        if self.spoilt.keys() & self.records.keys():
            with suppress(OSError, Stopped, Misuse):  # what does not succeed now is done when the run is taken up again
                lines = read_lines(self.folder / ATTEMPTS, read_attempt, True).values
                self._set_aside(lines, {key_of(record): record for record in lines})
        before = self.folder / BEFORE
        if before.is_dir() and (error is not None or not self.records):  # the new run has not begun
            self._remove()
            for name in FILES:
                with suppress(FileNotFoundError):
                    (before / name).rename(self.folder / name)
        shutil.rmtree(before, ignore_errors=True)
        self._lock.close()

    def clear(self) -> None:
        """Put an earlier run's files aside; they come back where the new run stops before the model has answered."""
        before = self.folder / BEFORE
        if not before.is_dir():  # else a new run was killed so early
            before.mkdir()
            for name in FILES:
                with suppress(FileNotFoundError):
                    (self.folder / name).rename(before / name)
        self._remove()

    def _remove(self) -> None:
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)

    def begin(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
        """Take up the run, or begin it; return whether there was one.

        Attempts that the infrastructure spoilt stay until they have been played again; a torn last line is cut off.

        Args:
            config: what must be the same for a run to be resumed, but for items and samples that are added.
            facts: what else goes into run.json.

        Raises:
            Misuse: the folder has a run with another configuration; the differences are in the message.
            Stopped: the folder cannot be written.
        """
        run = self.folder / RUN
        resumed = run.exists()
        if resumed:
            manifest = read_run(self.folder)
            differing = growth(manifest["config"], config)
            if differing:
                raise Misuse(f"{self.folder} has a run with another configuration ({'; '.join(differing)}); "
                             "choose another --out, or start anew with --fresh")
        self.leftover = open_sessions(read_lines(self.folder / SESSIONS, read_session, True).values)
        found = read_lines(self.folder / ATTEMPTS, read_attempt, True)
        lines, self.damaged = found.values, found.damaged
        # Without run.json nobody knows what the attempts are of.
        latest = latest_of(lines, config) if resumed else {}
        try:
            self._set_aside(lines, latest, found.damaged)
            (self.folder / RULE).unlink(missing_ok=True)
            if not resumed:
                write_whole(run, json.dumps({"config": config, **facts, "work": []}, indent=1))
            elif manifest["config"] != config:  # more items or samples, of which nothing is played yet
                grown = {key: facts[key] for key in ("hash", "items_from") if key in facts}
                write_whole(run, json.dumps({**manifest, **grown, "config": config}, indent=1))
            self.attempts, self.sessions = Lines(self.folder / ATTEMPTS), Lines(self.folder / SESSIONS)
        except OSError as error:
            raise Stopped(
                f"{run} cannot be written: {error.strerror}; make room and run the same command again") from None
        self.spoilt = {key: record for key, record in latest.items() if record["outcome"] in ERRORS}
        self.records = {key: record for key, record in latest.items() if key not in self.spoilt}
        self.earlier = {
            key:
            [*record["tries_before"],
             Try(outcome=record["outcome"], error=record["error"], usage=record["usage"])]
            for key, record in self.spoilt.items()
        }
        return resumed

    def _set_aside(self, lines: Sequence[Attempt], latest: Mapping[Key, Attempt],
                   damaged: Sequence[Damaged] = ()) -> None:
        """Move those of the attempts that do not stand any more from attempts.jsonl to superseded.jsonl.

        What is no attempt goes to damaged.jsonl. Killed on the way, it has written some there already: the next time it
        writes the rest.
        """
        away = [record for record in lines if latest.get(key_of(record)) is not record]
        if not away and not damaged:
            return
        path = self.folder / SUPERSEDED
        there = {(one.get("item"), one.get("sample"), one.get("started"))
                 for one in read_lines(path, read_object, True).values}
        superseded = Lines(path)
        try:
            for record in away:
                if (*key_of(record), record["started"]) not in there:
                    superseded.add(record)
        finally:
            superseded.close()
        if damaged:
            kept = self.folder / DAMAGED
            with open(_open_own(kept, os.O_RDWR | os.O_CREAT | os.O_APPEND), "ab") as file:
                with open(kept, "rb") as earlier:
                    before = set(foreign.lines(earlier))
                file.writelines(one.line for one in damaged if one.line not in before)
        write_whole(self.folder / ATTEMPTS, "".join(json_line(record) + "\n" for record in latest.values()))

    def add(self, record: Attempt) -> None:
        """Keep the record of an attempt that ended."""
        self.attempts.add(record)
        self.records[key_of(record)] = record
        if record["turns"]:
            shutil.rmtree(self.folder / BEFORE, ignore_errors=True)

    def latest(self) -> list[Attempt]:
        """Return the record of each attempt, those included that are still to be played again."""
        return list({**self.spoilt, **self.records}.values())

    def answered(self) -> bool:
        """Return True if the model has ever answered in this run."""
        return any(record["turns"] for record in self.latest())

    def note_work(self, work: Mapping[str, Any]) -> None:
        """Note in run.json one stretch of work on the run: when it begins, without `seconds`, and when it ends."""
        manifest = read_run(self.folder)
        manifest["work"] = [one for one in manifest["work"] if one["started"] != work["started"]] + [dict(work)]
        write_whole(self.folder / RUN, json.dumps(manifest, indent=1))

    def note_about(self, about: Mapping[str, str]) -> None:
        """Note in run.json what the server's scores depend on beside the row: made-up data, another search index.

        Raises:
            Misuse: the attempts so far were played on something else.
        """
        manifest = read_run(self.folder)
        before = manifest.get("about", {})
        if before == about:
            return
        if self.records:
            raise Misuse(
                f"{self.folder} was played on {told(before)}, and the server now plays on {told(about)}; choose "
                "another --out, or start anew with --fresh")
        write_whole(self.folder / RUN, json.dumps({**manifest, "about": dict(about)}, indent=1))

    def forget_sessions(self) -> None:
        """Empty the list of sessions, once all are closed."""
        os.ftruncate(self.sessions.file.fileno(), 0)


def told(about: Mapping[str, Any]) -> str:
    """Return in words what a server says that its scores depend on."""
    return ", ".join(f"{short(key)} {short(value)}" for key, value in sorted(about.items())) or "the row's own data"


def open_sessions(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the sessions that the lines open and do not close, by server."""
    found: dict[str, dict[int, None]] = {}
    for line in lines:
        sessions = found.setdefault(line["server"], {})
        if isinstance(line.get("open"), int):
            sessions[line["open"]] = None
        elif isinstance(line.get("close"), int):
            sessions.pop(line["close"], None)
    return {server: list(sessions) for server, sessions in found.items() if sessions}
