"""The report: one HTML file that needs no network, of one run or of several side by side."""
import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evaluation import foreign, show, suites
from evaluation.attempts import Outcome
from evaluation.compared import Run, difference_lines
from evaluation.pictures import draw, draw_suite
from evaluation.text import visible

if TYPE_CHECKING:
    import jinja2

PAGE = Path(__file__).parent / "page"
WORDS = ("completion", "action", "observation", "reasoning", "refusal")  # of a turn; the page has them in this order
SHOWN = {"first", "turns", "error", "tries_before", "reward", "seed", "task", "started"}  # by the viewer alone
CHUNK = 1 << 20  # characters, of whole attempts, that are packed together: unpacking one takes milliseconds


def pack(text: str) -> str:
    """Return a text deflated, in base 64: a browser unpacks it with DecompressionStream."""
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()


def apart(detail: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return an attempt with the length of each of its words (UTF-16 units) in their place, and the words.

    A browser searches the words as they are and reads no JSON for it. Each is followed by a line break, so that nothing
    is found that begins in one and ends in the next.
    """
    words: list[str] = []

    def take(text: str) -> int:
        # As the page will have them: half a character, which UTF-8 has no form for, is written out.
        words.append(text.encode("utf-8", "backslashreplace").decode())
        return len(words[-1]) + sum(letter > "\uffff" for letter in words[-1] if not words[-1].isascii())

    skeleton = {**detail, **{key: take(detail[key]) for key in ("first", "error")}}
    skeleton["turns"] = [{
        **turn,
        **{key: take(turn[key]) for key in WORDS if isinstance(turn.get(key), str)},
        **({"extras": take(json.dumps(turn["extras"], ensure_ascii=False, indent=1))} if turn.get("extras") else {}),
    } for turn in detail["turns"]]  # yapf: disable
    return skeleton, "".join(word + "\n" for word in words)


def packed_chunks(details: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[str]]:
    """Return what the viewer shows of each attempt, packed in chunks, and the number of each chunk's first attempt.

    A chunk is a line of JSON, the attempts without their words, and the words of all of them.
    """
    firsts: list[int] = []
    chunks: list[str] = []
    waiting: list[tuple[dict[str, Any], str]] = []
    size = 0
    for number, one in enumerate(details):
        if not waiting:
            firsts.append(number)
        waiting.append(apart(one))
        size += len(waiting[-1][1])
        if size > CHUNK or number + 1 == len(details):
            skeletons = json.dumps([skeleton for skeleton, _ in waiting], ensure_ascii=True)
            chunks.append(pack(skeletons + "\n" + "".join(words for _, words in waiting)))
            waiting, size = [], 0
    return firsts, chunks


def inert(value: Any) -> str:
    """Return `value` as JSON that can stand in a script element, whatever is in it."""
    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


class Line(NamedTuple):
    """One attempt in the page's table; the page is told the fields' names."""
    run: int
    item: str
    category: str
    sample: int
    outcome: Outcome
    reward: float | None
    rounds: int
    invalid: int
    tokens: int
    seconds: float


def table_lines(runs: Sequence[Run]) -> tuple[list[Line], list[dict[str, Any]]]:
    """Return the attempts table's lines and, in the same order, what the viewer shows of each attempt."""
    lines, details = [], []
    for number, run in enumerate(runs):
        for record in sorted(run.records, key=lambda one: (one["index"], one["item"], one["sample"])):
            usage = record["usage"]
            lines.append(
                Line(run=number,
                     item=record["item"],
                     category=record["category"],
                     sample=record["sample"],
                     outcome=record["outcome"],
                     reward=record["scaled"],
                     rounds=record["rounds"],
                     invalid=record["invalid_actions"],
                     tokens=usage["prompt"] + usage["completion"],
                     seconds=record["seconds"]))
            details.append({key: value for key, value in record.items() if key in SHOWN})
    return lines, details


def headline(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the headline table: name, and a cell each run."""
    table = show.table("", {run.name: run.summary for run in runs})
    columns = [list(column.cells) for column in table.columns]
    return [(str(columns[0][line]), [str(column[line]) for column in columns[1:]]) for line in range(len(columns[0]))]


def methods(runs: Sequence[Run]) -> str:
    """Return how the intervals were made."""
    used = sorted(
        {figure["method"]
         for run in runs
         for figure in (run.summary["success"], run.summary["reward"]) if figure})
    return f"In brackets: 95 % intervals ({', '.join(used)})." if used else "No attempt has a score."


def template() -> "jinja2.Environment":
    """Return what makes the page: every text in it is escaped, for HTML and for whoever would turn its direction."""
    import jinja2
    return jinja2.Environment(loader=jinja2.FileSystemLoader(PAGE),
                              autoescape=True,
                              trim_blocks=True,
                              lstrip_blocks=True,
                              finalize=lambda value: visible(foreign.replaced(value))
                              if isinstance(value, str) and not hasattr(value, "__html__") else value)


def render(runs: Sequence[Run], compat: bool = False, suite: Mapping[str, Any] | None = None, again: int = 0) -> str:
    """Return the page.

    Args:
        again: seconds after which the browser reads it again, for a run that goes on; 0 is never.
        suite: the summary of the suite whose runs these are.
    """
    lines, details = table_lines(runs)
    firsts, chunks = packed_chunks(details)
    script = (PAGE / "report.js").read_text(encoding="utf-8")
    configs = [{
        key: value
        for key, value in run.manifest["config"].items() if key not in ("row", "items")
    } for run in runs]
    return template().get_template("report.html").render(
        title=f"Suite {suite['suite']}"
        if suite else f"{', '.join(dict.fromkeys(run.manifest['config']['env'] for run in runs))}: "
        f"{', '.join(run.name for run in runs)}",
        runs=runs,
        again=again,
        suite=suite,
        suite_rows=suites.rows(suite) if suite else [],
        configs=[json.dumps(config, indent=1) for config in configs],
        headline=headline(runs),
        methods=methods(runs),
        differences=difference_lines(runs),
        charts=[*(draw_suite(suite) if suite else []), *draw(runs)],
        upstream=[show.upstream_line(run.summary) for run in runs] if compat else [],
        style=(PAGE / "report.css").read_text(encoding="utf-8"),
        script=script,
        # The policy names the one script that may run: nothing that a model or an environment said can become another.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=inert({
            "runs": [run.name for run in runs],
            "chunks": firsts,
            "fields": Line._fields,
            "rows": lines
        }),
        chunks=chunks)


def write(path: Path,
          runs: Sequence[Run],
          compat: bool = False,
          suite: Mapping[str, Any] | None = None,
          again: int = 0) -> None:
    """Write the page to `path`.

    Raises:
        Misuse: `path` is a folder.
        Stopped: it cannot be written.
    """
    from evaluation.problems import Misuse, Stopped
    from evaluation.records import write_whole
    if path.is_dir():
        raise Misuse(f"{path} is a folder; name a file with --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, foreign.replaced(render(runs, compat, suite, again)))
    except OSError as error:
        raise Stopped(f"{path} cannot be written: {error.strerror}; choose another place with --out") from None
