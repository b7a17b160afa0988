"""What the trainer prints: whole lines without colours, who said them, and the figures of a step.

Ray puts `(main_task pid=7) ` or `(WorkerDict pid=8, ip=10.0.0.2) ` before each line of another process, and
` [repeated 2x across cluster]` behind some. The trainer's own logger writes a step as one line,
`step:3 - max_rounds:20.000 - critic/score/mean:0.183 - …`, each value with three decimals.
"""
from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, field

from training.text import plain

LONGEST = 1 << 20  # characters of a line; the rest is another line
BAR = "%|"  # of tqdm
PREFIX = re.compile(
    r"\((?:(?P<who>[^()=]*?) )?(?:pid=[\w.-]+)(?:, ip=[^()]*)?\) ?|\((?P<daemon>raylet|autoscaler[^()]*)\) ?")
REPEATED = re.compile(r" ?\[repeated (\d+)x across cluster\].*$")
# Who may speak for the training loop; the workers print what models and environments say.
DRIVERS = ("", "main_task", "TaskRunner")

START = re.compile(r"(?:^|[^\w/:.-])step:(\d{1,9}) - (?=[\w/.@-]+(?::|$))")
KEY = re.compile(r"[\w/.@-]{1,200}", re.ASCII)
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf(?:inity)?)",
                    re.IGNORECASE | re.ASCII)
WRAPPED = re.compile(r"(?:(?:np|numpy|torch)\.)?\w+\(([^(),]+)(?:,[^()]*)?\)")  # np.float64(0.5), tensor(0.5)
LOGGED = re.compile(r"[-+]?\d+\.\d{3}|nan|[-+]?inf")  # as the logger formats it
MOST_PAIRS = 1000
PATIENCE = 20  # lines between the pieces of a line that was torn


class Lines:
    """Turns what a pipe gives into lines: UTF-8 or not, without colours; of a progress bar its last state."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._rest = ""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that `data` completes; b"" is the end, which completes the last one."""
        text = self._rest + self._decoder.decode(data, final=not data)
        lines = text.split("\n")
        self._rest = "" if not data else lines.pop()
        if not data and lines[-1] == "":
            lines.pop()
        while len(self._rest) > LONGEST:
            lines.append(self._rest[:LONGEST])
            self._rest = self._rest[LONGEST:]
        return [part for line in lines for part in self._parts(line)]

    def _parts(self, line: str) -> list[str]:
        line = plain(line)
        if "\r" not in line:
            return [line]
        parts = [part for part in line.split("\r") if part]
        last_bar = max((number for number, part in enumerate(parts) if BAR in part), default=-1)
        return [part for number, part in enumerate(parts) if BAR not in part or number == last_bar]


def speaker(line: str) -> tuple[str, str, int]:
    """Return who said a line ("" for the driver itself), what was said, and how often."""
    match = PREFIX.match(line)
    who = ""
    if match:
        who = match["who"] or match["daemon"] or "worker"
        line = line[match.end():]
    repeated = REPEATED.search(line) if line.endswith(("cluster]", ")")) else None
    if repeated:
        return who, line[:repeated.start()], int(repeated[1])
    return who, line, 1


@dataclass
class StepLine:
    """The figures of one step; values may be NaN or infinite."""
    step: int
    metrics: dict[str, float] = field(default_factory=dict)


def number(text: str) -> float | None:
    """Return the number that `text` is, also as numpy or torch show it; None where it is none."""
    wrapped = WRAPPED.fullmatch(text)
    text = wrapped[1].strip() if wrapped else text
    return float(text) if NUMBER.fullmatch(text) else None


def pairs(text: str) -> tuple[dict[str, float], list[str]]:
    """Return the figures in `key:value - key:value - …`, and the parts that are none."""
    found: dict[str, float] = {}
    broken = []
    for part in text.split(" - ")[:MOST_PAIRS]:
        key, colon, value = part.strip().rpartition(":")
        figure = number(value) if colon and KEY.fullmatch(key) else None
        if figure is None:
            broken.append(part)
        else:
            found[key] = figure
    return found, broken


class Steps:
    """Finds the steps' figures among the lines; a line that other output tore in two is put together."""

    def __init__(self) -> None:
        self._step: int | None = None  # of a line whose end is missing
        self._given: int | None = None  # of a line that looked whole
        self._text = ""
        self._who = ""
        self._waited = 0

    def feed(self, who: str, line: str) -> list[StepLine]:
        """Return the steps that the line completes, the earlier one first.

        One is given again, with more figures, where the line before only looked whole.
        """
        if who not in DRIVERS:
            return self._wait()
        start = START.search(line)
        if start:
            done = self.flush()
            self._step, self._text, self._who, self._waited = int(start[1]), line[start.end():], who, 0
            return done + (self.flush() if self._is_whole() else [])
        more = (self._given is not None and line.lstrip(" ").startswith("- ")) or self._step is not None
        if more and who == self._who and self._continues(line):
            self._step, self._text = self._step if self._step is not None else self._given, self._text + line
            return self.flush() if self._is_whole() else []
        return self._wait()

    def flush(self) -> list[StepLine]:
        """Return the step whose line may lack its end, without a last figure that may be cut off."""
        if self._step is None:
            return []
        whole = self._is_whole()
        found = StepLine(self._step, pairs(self._text if whole else self._without_end())[0])
        self._step, self._given = None, self._step if whole else None
        return [found] if found.metrics else []

    @property
    def waits(self) -> bool:
        """Whether a line's end is missing."""
        return self._step is not None

    def _wait(self) -> list[StepLine]:
        self._waited += 1
        if self._waited <= PATIENCE:
            return []
        found, self._given = self.flush(), None
        return found

    def _without_end(self) -> str:
        before, _, last = self._text.rpartition(" - ")
        value = last.rpartition(":")[2].strip()
        others = [part.rpartition(":")[2] for part in before.split(" - ")]
        logged = all(LOGGED.fullmatch(other) for other in others)
        return self._text if not logged and number(value) is not None and not value.endswith(".") else before

    def _is_whole(self) -> bool:
        value = self._text.rpartition(" - ")[2].rpartition(":")[2].strip()
        return bool(LOGGED.fullmatch(value) or WRAPPED.fullmatch(value))

    def _continues(self, line: str) -> bool:
        before, after = pairs(self._text), pairs(self._text + line)
        return len(after[1]) <= len(before[1]) and (":" in line or bool(NUMBER.fullmatch(line.strip()))
                                                    or " - " in line)
