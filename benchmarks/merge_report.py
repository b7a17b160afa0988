"""Turns the measurements of merge.py into a Markdown report and verdicts; no measuring happens here."""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from contenders import AGENTGYM, BESIDE, FIRST, FORMS, FROM_DCP, OURS, VERL
from fsdp_checkpoint import SIZES
from process_meter import Measurement

MB, GB = 1e6, 1e9
SPEED_GOALS = {AGENTGYM: 4.0, VERL: 2.5}  # times faster than a peer, cold
SPEED_SIZE = "1.5B"  # the size that the speed goals are stated for
LIMIT_GOAL = 1.15  # times the disk's own limit, beyond the interpreter's start-up
MEMORY_GOAL = 300 * MB
NEW_GOAL, NEW_SIZES, NEW_MEMORY = 1.2, ("1.5B", "7B"), 450 * MB  # of a config not seen before, beside a known one


@dataclass
class Results:
    """All that one benchmark measured; seconds and bytes."""
    size: str
    shard_bytes: int
    output_bytes: int
    contenders: list[str]
    runs: dict[str, dict[str, list[Measurement]]] = field(default_factory=dict)  # contender: state: one a round
    durable: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # the same, to the end of an fsync
    skipped: dict[str, str] = field(default_factory=dict)  # "contender" or "contender warm": why
    limits: dict[str, list[float]] = field(default_factory=dict)
    startup: dict[str, list[float]] = field(default_factory=dict)  # seconds by the module imported
    comparison: dict[str, list[str]] = field(default_factory=dict)  # contender: what differs; empty: equal
    compared: int = 0  # outputs digested
    heads: dict[str, bool] = field(default_factory=dict)  # contender: whether it saved a tied lm_head
    cold: str = ""  # how the page cache was emptied
    machine: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def seconds(self, contender: str, state: str) -> list[float]:
        """Seconds of each run, or nothing when one of them failed."""
        runs = self.runs.get(contender, {}).get(state, [])
        return [] if any(run.exit_code for run in runs) else [run.seconds for run in runs]

    def limit(self) -> tuple[float, str] | None:
        """Median seconds of the disk's own limit, and which it is: the larger of reading and (the faster) writing."""
        writes = [name for name in self.limits if name.startswith("write")]
        if not writes or not self.limits.get("read"):
            return None
        write = min(writes, key=lambda name: statistics.median(self.limits[name]))
        name = max(("read", write), key=lambda name: statistics.median(self.limits[name]))
        return statistics.median(self.limits[name]), name


def markdown(results: Results) -> str:
    """The whole report, ready to be pasted into a README."""
    shape = SIZES[results.size]
    heading = (f"### {results.size}: {shape.world_size} ranks, {results.shard_bytes / GB:.2f} GB of fp32 shards, "
               f"{results.output_bytes / GB:.2f} GB of bf16 output")
    parts = [heading, contender_table(results), limit_table(results), "\n".join(verdicts(results)), notes(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def contender_table(results: Results) -> str:
    rows: list[tuple[str, ...]] = [
        ("merger", "cold s", "warm s", "cold, on disk s", "CPU s, cold", "times ours, cold / warm",
         "largest process MB", "all processes MB (anon + file)", "read / written GB, cold", "exit")
    ]
    rows += [_contender_row(results, name) for name in results.contenders if name not in results.skipped]
    text = table(rows)
    for name, reason in results.skipped.items():
        text += f"\n\n{name}: not run, {reason}."
    return text


def _contender_row(results: Results, name: str) -> tuple[str, ...]:
    states = results.runs.get(name, {})
    runs = [run for measured in states.values() for run in measured]
    if not runs:
        return (name, *["-"] * 9)
    peak = max(runs, key=lambda run: run.tree_rss)
    cold = states.get("cold") or runs
    codes = sorted({run.exit_code for run in runs})
    durable = results.durable.get(name, {}).get("cold", []) if results.seconds(name, "cold") else []
    return (
        name,
        _seconds_cell(results, name, "cold"),
        _seconds_cell(results, name, "warm"),
        spread(durable),
        f"{statistics.median(run.cpu_seconds for run in cold):.1f}",
        " / ".join(_ratio_cell(results, name, state) for state in ("cold", "warm")),
        f"{max(run.largest_rss for run in runs) / MB:.0f}",
        f"{peak.tree_rss / MB:.0f} ({peak.tree_anon / MB:.0f} + {peak.tree_file / MB:.0f})",
        f"{statistics.median(run.disk_read for run in cold) / GB:.2f} / "
        f"{statistics.median(run.disk_written for run in cold) / GB:.2f}",
        ", ".join(map(str, codes)),
    )


def _seconds_cell(results: Results, name: str, state: str) -> str:
    runs = results.runs.get(name, {}).get(state, [])
    failed = sorted({run.exit_code for run in runs if run.exit_code})
    return f"failed (exit {', '.join(map(str, failed))})" if failed else spread([run.seconds for run in runs])


def _ratio_cell(results: Results, name: str, state: str) -> str:
    ratio = times_ours(results, name, state) if name not in FORMS or name in BESIDE else None
    return f"{ratio:.1f}" if ratio else "-"


def times_ours(results: Results, name: str, state: str, ours_name: str = OURS) -> float | None:
    """Median seconds of a contender over ours."""
    ours, theirs = results.seconds(BESIDE.get(name, ours_name), state), results.seconds(name, state)
    return statistics.median(theirs) / statistics.median(ours) if ours and theirs else None


def limit_table(results: Results) -> str:
    sizes = {"read": results.shard_bytes, "both at once": results.shard_bytes + results.output_bytes}
    rows: list[tuple[str, ...]] = [("the machine's own limit", "GB", "s", "GB/s")]
    for name, seconds in results.limits.items():
        size = sizes.get(name, results.output_bytes)
        rows.append(
            (LIMITS[name], f"{size / GB:.2f}", spread(seconds), f"{size / GB / statistics.median(seconds):.2f}"))
    rows += [(f'`python -c "import {name}"`', "", spread(seconds), "") for name, seconds in results.startup.items()]
    return table(rows)


LIMITS = {
    "read": "reading all shards, cold, two streams, the cache dropped behind",
    "write": "writing the output with fsync, two streams",
    "write direct": "writing the output around the page cache (O_DIRECT) with fsync, two streams",
    "both at once": "reading and writing at once",
}


def verdicts(results: Results) -> list[str]:
    """One line a goal; a goal that this run cannot judge says why."""
    lines = []
    for ours in (name for name in (OURS, FIRST) if name in results.contenders):
        lines += ["", f"{ours[0].upper()}{ours[1:]}:", ""]
        lines += [_speed_verdict(results, ours, name, goal) for name, goal in SPEED_GOALS.items()]
        lines += [_limit_verdict(results, ours), *(_memory_verdicts(results, ours) if ours == OURS else ())]
    lines += [*_new_verdicts(results), *_dcp_verdict(results)]
    return ["Goals.", *lines, "", _equality(results)]


def _new_verdicts(results: Results) -> list[str]:
    """What a config not seen before may cost beside a known one."""
    ratio = times_ours(results, FIRST, "cold")
    if ratio is None:
        return []
    judged = _met(ratio <= NEW_GOAL) if results.size in NEW_SIZES else f"not judged at {results.size}"
    peak = max(run.tree_rss for runs in results.runs[FIRST].values() for run in runs)
    return [f"- a config not seen before at most {NEW_GOAL} times a known one, cold, at {' and '.join(NEW_SIZES)}: **{judged}** "
            f"({ratio:.2f} times)",
            f"- all its processes added up at most {NEW_MEMORY / MB:.0f} MB: **{_met(peak <= NEW_MEMORY)}** "
            f"({peak / MB:.0f} MB)"]  # yapf: disable


def _dcp_verdict(results: Results) -> list[str]:
    runs = [run for measured in results.runs.get(FROM_DCP, {}).values() for run in measured if not run.exit_code]
    if not runs:
        return []
    peak = max(run.tree_rss for run in runs)
    return ["", f"From torch's distributed checkpoint: peak resident memory at most {MEMORY_GOAL / MB:.0f} MB, all processes "
            f"added up: **{_met(peak <= MEMORY_GOAL)}** ({peak / MB:.0f} MB)"]  # yapf: disable


def _speed_verdict(results: Results, ours: str, name: str, goal: float) -> str:
    text = f"- at least {goal:g} times as fast as {name}'s merger, {SPEED_SIZE}, cold: "
    ratio = times_ours(results, name, "cold", ours)
    if ratio is None:
        return text + "**not judged** (one of the two did not run, or failed)"
    if results.size != SPEED_SIZE:
        return text + f"**not judged at {results.size}** ({ratio:.2f} times)"
    return text + f"**{_met(ratio >= goal)}** ({ratio:.2f} times)"


def _limit_verdict(results: Results, name: str) -> str:
    text = f"- within {LIMIT_GOAL} times the disk's limit, cold, beyond the interpreter's start-up: "
    ours, limit = results.seconds(name, "cold"), results.limit()
    if not ours or not limit or not results.startup:
        return text + "**not judged** (no cold run, or no limit measured)"
    seconds, over = statistics.median(ours), {}
    for module, startup in results.startup.items():
        over[module] = (seconds - statistics.median(startup)) / limit[0]
    both = f", {seconds / statistics.median(results.limits['both at once']):.2f} times both at once, start-up included"
    figures = " and ".join(f"{ratio:.2f} times beyond `import {module}`" for module, ratio in over.items())
    verdict = f"not judged at {results.size}" if results.size == "tiny" else _met(over["numpy"] <= LIMIT_GOAL)
    return text + f"**{verdict}** ({figures}; the limit is {limit[0]:.2f} s, {LIMITS[limit[1]]}{both})"


def _memory_verdicts(results: Results, name: str) -> list[str]:
    runs = [run for measured in results.runs.get(name, {}).values() for run in measured if not run.exit_code]
    text = f"- peak resident memory at most {MEMORY_GOAL / MB:.0f} MB, "
    if not runs:
        return [text + "all processes: **not judged** (no run)"]
    peaks = {
        "largest process": max(run.largest_rss for run in runs),
        "all processes added up": max(run.tree_rss for run in runs)
    }
    return [f"{text}{what}: **{_met(peak <= MEMORY_GOAL)}** ({peak / MB:.0f} MB)" for what, peak in peaks.items()]


def _equality(results: Results) -> str:
    text = "Every output equal to torch's own bf16 cast of the same weights (where fp32 is said, to the weights): "
    if not results.comparison:
        return text + "**not judged** (not compared)"
    wrong = {name: texts for name, texts in results.comparison.items() if texts}
    if not wrong:
        return text + f"**met** ({results.compared} outputs of {len(results.comparison)} merger(s), bit by bit)"
    shown = "; ".join(f"{name}: {', '.join(texts[:3])}{f' and {len(texts) - 3} more' if len(texts) > 3 else ''}"
                      for name, texts in wrong.items())
    return text + f"**missed** ({shown})"


def notes(results: Results) -> str:
    """What a reader must know to read the table, then the machine."""
    shown = ["Medians (least–most). MB and GB are powers of ten. " + results.cold]
    shown.append("“All processes” adds up the resident memory of the merger and its children, sampled every 20 ms; "
                 "pages shared between them count in each. “Cold, on disk” goes on to the end of an fsync of the "
                 "output. “Read / written” is what the storage delivered and what was handed to it.")
    if SIZES[results.size].tied and results.heads:
        heads = ", ".join(f"{name} {'twice' if twice else 'once'}" for name, twice in results.heads.items())
        shown.append(f"The tied embedding is saved: {heads}.")
    shown += results.notes
    shown.append("; ".join(f"{name}: {value}" for name, value in results.machine.items()) + ".")
    return "\n\n".join(shown)


def spread(seconds: Sequence[float]) -> str:
    """`median (least–most)` of seconds, or `-` for none."""
    if not seconds:
        return "-"
    if len(seconds) == 1:
        return f"{seconds[0]:.2f}"
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"


def _met(met: bool) -> str:
    return "met" if met else "missed"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
