"""A run's curves as one HTML file that needs nothing else: rewards, lengths, KL, seconds, and the evaluations."""
from __future__ import annotations

import html
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.status import Status, bytes_text, seconds_text
from training.text import shown

Point = tuple[float, float]
WIDTH, HEIGHT = 460, 250  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 34
MOST_POINTS = 600  # of a line; neighbours are averaged where there are more
MOST_ROWS = 2000
SMOOTH = 10  # steps of the moving mean


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        points: step and value; a value that is no number is a gap.
        low, high: ends of each point's interval, for points that are drawn apart.
        faint: in the background of another line.
        dots: each point is drawn, as few are there.
    """
    label: str
    points: Sequence[Point]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart: its title, the unit of its values, its lines."""
    title: str
    unit: str
    lines: Sequence[Line]
    from_zero: bool = False


# Title, unit, whether the axis begins at 0, and the keys of the trainer's figures with what they are called.
CHARTS: Sequence[tuple[str, str, bool, Sequence[tuple[str, str]]]] = (
    ("Reward", "mean score of a trajectory", True, (("critic/task_score/mean", "task score"), )),
    ("Response length", "tokens", True, (("response_length/mean", "mean"), ("response_length/max", "longest"))),
    ("Prompt length", "tokens", True, (("prompt_length/mean", "mean"), ("prompt_length/max", "longest"))),
    ("Rounds", "rounds of a trajectory", True, (("critic/task_round/mean", "played, mean"), ("max_rounds", "allowed"))),
    ("KL", "to the reference and to the policy before", False, (("actor/kl_loss", "KL loss"), ("actor/ppo_kl",
                                                                                               "PPO KL"))),
    ("Entropy", "nats a token", True, (("actor/entropy_loss", "entropy"), )),
    ("Gradient", "norm before clipping", True, (("actor/grad_norm", "gradient norm"), )),
    ("Policy loss", "loss", False, (("actor/pg_loss", "policy gradient loss"), )),
    ("Seconds a step", "seconds", True, (("timing_s/step", "whole step"), ("timing_s/gen", "rollout"),
                                         ("timing_s/update_actor", "update"), ("timing_s/save_checkpoint",
                                                                               "checkpoint"))),
)

LARGEST = 1e100  # sums of larger figures have none


def value_of(line: Mapping[str, Any], key: str) -> float | None:
    """Return a figure of a line of metrics.jsonl, infinite beyond LARGEST; None where it has none."""
    value = line["metrics"].get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return math.copysign(math.inf, value) if abs(value) > LARGEST else float(value)


def moving_mean(points: Sequence[Point], span: int = SMOOTH) -> list[Point]:
    """Return each point's mean with up to `span` - 1 before it."""
    return [(x, statistics.fmean(value for _, value in points[max(0, place - span + 1):place + 1]))
            for place, (x, _) in enumerate(points)]


def charts(metrics: Mapping[int, Mapping[str, Any]], evaluations: Iterable[Any] = ()) -> list[Chart]:
    """Return the charts that there is something for.

    Args:
        metrics: lines of metrics.jsonl by step.
        evaluations: points as the watcher has them: step, environment, plan, success and reward with mean, low, high.
    """
    found = []
    for title, unit, from_zero, keys in CHARTS:
        lines = []
        for key, label in keys:
            pairs = [(float(step), value_of(line, key)) for step, line in metrics.items()]
            points = [(step, value) for step, value in pairs if value is not None]
            finite = [point for point in points if math.isfinite(point[1])]
            if title == "Reward" and len(finite) > 2 * SMOOTH:
                lines.append(Line(label, points, faint=True))
                lines.append(Line(f"mean of {SMOOTH} steps", moving_mean(finite)))
            elif finite:
                lines.append(Line(label, points, dots=len(points) < 40))
        if lines:
            found.append(Chart(title, unit, lines, from_zero))
    rated: list[Chart] = []
    by_plan: dict[tuple[str, str], list[Any]] = {}
    for point in evaluations:
        by_plan.setdefault((str(point.environment), str(point.plan)), []).append(point)
    for what, title in (("success", "Evaluations: solved"), ("reward", "Evaluations: reward")):
        lines = []
        for (environment, plan), played in sorted(by_plan.items()):
            label = environment if sum(name == environment for name, _ in by_plan) == 1 else f"{environment} {plan}"
            figures = sorted(((int(point.step), getattr(point, what))
                              for point in played if getattr(point, what).get("mean") is not None),
                             key=lambda figure: figure[0])
            if figures:
                lines.append(
                    Line(label, [(float(step), float(figure["mean"])) for step, figure in figures],
                         [figure.get("low") for _, figure in figures], [figure.get("high") for _, figure in figures],
                         dots=True))
        if lines:
            rated.append(Chart(title, "share, 95 % interval", lines, True))
    place = 1 if found and found[0].title == "Reward" else 0
    return [*found[:place], *rated, *found[place:]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, about `count` of them.

    >>> ticks(0, 1)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = (high - low) / count
    size = 10.0**math.floor(math.log10(span))
    size = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= span * 0.999)
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [float(f"{number * size:.12g}") for number in range(first, last + 1)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most about `most` points: means of neighbours; a gap stays one."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    found = []
    for place in range(0, len(points), size):
        part = points[place:place + size]
        found.append((statistics.fmean(x for x, _ in part), statistics.fmean(value for _, value in part)))
    return found


def svg(chart: Chart, marks: Sequence[tuple[float, str]] = (), poisoned: Sequence[int] = ()) -> str:
    """Return a chart as an SVG element.

    Args:
        marks: steps at which an attempt began, with what a mouse over them shows.
        poisoned: steps that learnt from what the environment did not say.
    """
    values = [value for line in chart.lines for _, value in line.points if math.isfinite(value)]
    values += [end for line in chart.lines for end in (*line.low, *line.high) if end is not None]
    steps = [x for line in chart.lines for x, value in line.points if math.isfinite(value)]
    low, high = min(values), max(values)
    if chart.from_zero:
        low = min(0.0, low)
    size = max(1.0, abs(high), abs(low))
    if high - low < 1e-9 * size:
        low, high = low - (0.0 if chart.from_zero else 0.5 * size), high + 0.5 * size
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1

    def across(x: float) -> float:
        return round(LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def up(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true" font-size="11">']
    for value in ticks(low, high):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(value)}" y2="{up(value)}" stroke="var(--grid)"/>'
                     f'<text x="{LEFT - 6}" y="{up(value) + 4}" text-anchor="end">{value:g}</text>')
    for step in ticks(first, last, 6):
        if float(step).is_integer():
            parts.append(f'<text x="{across(step)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{step:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">training step</text>')
    for step, told in marks:
        if first <= step <= last:
            parts.append(f'<line x1="{across(step)}" x2="{across(step)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
                         f'stroke="var(--soft)" stroke-dasharray="2 4"><title>{escape(told)}</title></line>')
    for step in poisoned:
        if first <= step <= last:
            parts.append(f'<line x1="{across(step)}" x2="{across(step)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
                         f'stroke="var(--bad)"><title>step {step} is poisoned</title></line>')
    for number, line in enumerate(chart.lines):
        colour = f"var(--series-{number % 6})"
        parts += _drawn(line, colour, across, up)
    place = LEFT
    for number, line in enumerate(chart.lines if len(chart.lines) > 1 else ()):
        name = line.label if len(line.label) <= 24 else line.label[:23] + "…"
        parts.append(f'<circle cx="{place + 4}" cy="12" r="4" fill="var(--series-{number % 6})"/>'
                     f'<text x="{place + 12}" y="16">{escape(name)}</text>')
        place += 30 + round(6.2 * len(name))
    return "".join([*parts, "</svg>"])


def _drawn(line: Line, colour: str, across: Any, up: Any) -> list[str]:
    points = thinned(line.points)
    path, pen = [], "M"
    for x, value in points:
        if not math.isfinite(value):
            pen = "M"
            continue
        path.append(f"{pen}{across(x)} {up(value)}")
        pen = "L"
    opacity = ' opacity="0.35"' if line.faint else ""
    parts = [f'<path d="{" ".join(path)}" fill="none" stroke="{colour}" stroke-width="1.6"{opacity}/>']
    for (x, _), low, high in zip(line.points, line.low, line.high, strict=False):
        if low is not None and high is not None:
            parts.append(f'<line x1="{across(x)}" x2="{across(x)}" y1="{up(low)}" y2="{up(high)}" stroke="{colour}"/>')
    if line.dots or len([value for _, value in points if math.isfinite(value)]) == 1:
        parts += [
            f'<circle cx="{across(x)}" cy="{up(value)}" r="2.6" fill="{colour}"><title>step {x:g}: {value:.4g}</title>'
            "</circle>" for x, value in points if math.isfinite(value)
        ]
    return parts


def words(chart: Chart) -> str:
    """Return what a chart shows, for who does not see it."""
    told = []
    for line in chart.lines:
        finite = [(x, value) for x, value in line.points if math.isfinite(value)]
        told.append(f"{line.label} from {finite[0][1]:.3g} at step {finite[0][0]:g} to {finite[-1][1]:.3g} at step "
                    f"{finite[-1][0]:g}")
    return "; ".join(told)


def escape(text: Any) -> str:
    """Return text of others for the page."""
    return html.escape(shown(str(text)))


def facts(status: Status) -> list[tuple[str, str]]:
    """Return the page's table of numbers."""
    found = [("state", status.state + (f" of {status.cause}: {status.reason}" if status.cause else "")),
             ("step", f"{status.step} of {status.steps}" if status.steps is not None else str(status.step))]
    if status.reward is not None:
        best = f", best {status.best[1]:.3f} at step {status.best[0]}" if status.best is not None else ""
        found.append((status.reward_of, f"{status.reward:.3f}{best}"))
    if status.step_seconds is not None:
        found.append(("seconds a step", f"{status.step_seconds:.1f}"))
    if status.eta_seconds:
        found.append(("left", seconds_text(status.eta_seconds)))
    if status.checkpoint is not None:
        found.append(
            ("last whole checkpoint", f"global_step_{status.checkpoint}, {bytes_text(status.checkpoint_bytes)}"))
    if status.poisoned:
        found.append(("poisoned steps", ", ".join(map(str, status.poisoned))))
    return found


COLUMNS = (("reward", "critic/task_score/mean"), ("rounds", "critic/task_round/mean"), ("response tokens",
                                                                                        "response_length/mean"),
           ("KL loss", "actor/kl_loss"), ("gradient norm", "actor/grad_norm"), ("seconds", "timing_s/step"))


def page(status: Status,
         run: Mapping[str, Any],
         metrics: Mapping[int, Mapping[str, Any]],
         evaluations: Iterable[Any] = ()) -> str:
    """Return the page.

    Args:
        run: run.json.
        metrics: lines of metrics.jsonl by step.
        evaluations: as for `charts`.
    """
    attempts = [found for found in run.get("attempts") or [] if isinstance(found, dict)]
    marks = [(float(found.get("resumed_from") or 0) + 0.5, f"attempt {found.get('number')}") for found in attempts[1:]
             if isinstance(found.get("resumed_from"), (int, type(None)))]
    figures = [
        f'<figure role="img" aria-label="{escape(chart.title)}: {escape(words(chart))}">'
        f"<figcaption>{escape(chart.title)}</figcaption>{svg(chart, marks, status.poisoned)}"
        f'<p class="note">{escape(chart.unit)}</p></figure>' for chart in charts(metrics, evaluations)
    ]
    place = run.get("environment") or {}
    about = " · ".join(
        filter(None, (place.get("name"), status.algorithm, f"{status.gpu_count} GPUs" if status.gpu_count else "",
                      f"made {time.strftime('%Y-%m-%d %H:%M', time.localtime())}")))
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(told)}</td></tr>'
                   for name, told in facts(status))
    tried = "".join(
        f"<tr><td>{escape(found.get('number'))}</td><td>{escape(found.get('resumed_from') or 'the model')}</td>"
        f"<td>{escape(found.get('last_step') if found.get('last_step') is not None else '')}</td><td>{escape(found.get('state'))}</td>"
        f"<td>{escape(': '.join(filter(None, (found.get('cause'), found.get('reason')))))}</td></tr>"
        for found in attempts)
    listed = list(metrics.items())[-MOST_ROWS:]
    steps = "".join(f"<tr><td>{step}</td>" + "".join(f"<td>{_cell(line, key)}</td>" for _, key in COLUMNS) + "</tr>"
                    for step, line in listed)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("step", *(name for name, _ in COLUMNS)))
    style = (Path(__file__).parent / "plot.css").read_text()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(status.name)}: training</title>
<style>{style}</style>
</head>
<body>
<header><h1>{escape(status.name)}</h1><p class="facts">{escape(about)}</p></header>
<main>
<section aria-labelledby="numbers"><h2 id="numbers">Numbers</h2><div class="scroll"><table class="numbers"><tbody>{rows}</tbody></table></div></section>
<section class="charts" aria-label="Charts">{"".join(figures) or "<p>No step is finished yet.</p>"}</section>
<section aria-labelledby="attempts"><h2 id="attempts">Attempts</h2><div class="scroll"><table><thead><tr><th scope="col">attempt</th>
<th scope="col">from</th><th scope="col">last step</th><th scope="col">ended</th><th scope="col">because</th></tr></thead>
<tbody>{tried}</tbody></table></div></section>
<section aria-label="Steps"><details><summary>All steps{f", the last {MOST_ROWS}" if len(metrics) > MOST_ROWS else ""}</summary>
<div class="scroll"><table class="steps"><thead><tr>{head}</tr></thead><tbody>{steps}</tbody></table></div></details></section>
</main>
</body>
</html>
"""


def _cell(line: Mapping[str, Any], key: str) -> str:
    value = value_of(line, key)
    return "" if value is None else f"{value:.4g}"
