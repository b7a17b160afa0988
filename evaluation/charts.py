"""Charts as SVG that follow the page's light and dark colours, drawn by matplotlib."""
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation import foreign
from evaluation.text import one_line

# matplotlib wants real colours; these stand for the page's own and are exchanged in the SVG.
TEXT, GRID = "#010203", "#010205"
SERIES = ("#010210", "#010211", "#010212", "#010213", "#010214", "#010215")
COLOURS = {
    TEXT: "currentColor",
    GRID: "var(--grid)",
    **{
        colour: f"var(--series-{n})"
        for n, colour in enumerate(SERIES)
    }
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: a screen reader can read it, and the page's font is used
    "svg.hashsalt": "evaluation",  # the same chart has the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
}


def svg(draw: Any, name: str, width: float = 4.6, height: float = 2.6) -> str:
    """Return what `draw(axes)` draws, as an SVG element for the middle of a page; sizes in inches.

    Args:
        name: goes before every id in the SVG, since a page has several.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        file = io.StringIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of characters that its own font lacks: the page's font draws the text
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg"):], flags=re.DOTALL)
    for colour, ours in COLOURS.items():
        text = text.replace(colour, ours)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)


def legend(run: str) -> str:
    """Return a run's name for the legend, its middle left out where it is long: names of runs differ at their ends."""
    run = one_line(foreign.replaced(run))  # in a folder's name they stand for bytes that are no UTF-8
    short = run if len(run) <= 40 else f"{run[:19]}…{run[-20:]}"
    return short.replace("$", r"\$")  # which would begin a formula


def bars(labels: Sequence[str],
         runs: Mapping[str, Sequence[float]],
         name: str,
         unit: str,
         errors: Mapping[str, Any] | None = None,
         lying: bool = False) -> str:
    """Return grouped bars, a group each label and a bar each run.

    Args:
        runs: values by run.
        unit: what the values are.
        errors: by run, the lengths of the error bars below and above.
        lying: bars lie, for long labels.
    """
    labels = [label if len(label) <= 24 else label[:23] + "…" for label in map(one_line, labels)]
    # A dollar sign would begin a formula.
    labels = [label.replace("$", r"\$") for label in labels]
    thick = 0.8 / max(1, len(runs))

    def draw(axes: Any) -> None:
        for number, (run, values) in enumerate(runs.items()):
            places = [place - 0.4 + thick * (number + 0.5) for place in range(len(labels))]
            colour = SERIES[number % len(SERIES)]
            error, label = None if errors is None else errors[run], legend(run)
            if lying:
                axes.barh(places, values, thick * 0.95, color=colour, label=label, xerr=error, ecolor=TEXT, capsize=2)
            else:
                axes.bar(places, values, thick * 0.95, color=colour, label=label, yerr=error, ecolor=TEXT, capsize=2)
        step = max(1, -(-len(labels) // 16))
        if lying:
            axes.set_yticks(range(len(labels)), labels)
            axes.invert_yaxis()
            axes.set_xlabel(unit)
            axes.grid(axis="y", visible=False)
        else:
            axes.set_xticks(range(0, len(labels), step), labels[::step])
            axes.set_ylabel(unit)
            axes.grid(axis="x", visible=False)
            if all(float(value).is_integer() for values in runs.values() for value in values):
                axes.yaxis.get_major_locator().set_params(integer=True)
        if len(runs) > 1:
            axes.figure.legend(fontsize=7, loc="outside upper center", ncols=min(len(runs), 4))

    return svg(draw, name, height=max(2.0, 0.3 * len(labels) + 0.8) if lying else 2.6)


def curves(runs: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]], name: str) -> str:
    """Return mean reward and interval by training step, a curve for each training."""

    def draw(axes: Any) -> None:
        for number, (run, points) in enumerate(runs.items()):
            steps = [step for step, _ in points]
            means = [figure["mean"] for _, figure in points]
            low = [0.0 if figure["low"] is None else figure["mean"] - figure["low"] for _, figure in points]
            high = [0.0 if figure["high"] is None else figure["high"] - figure["mean"] for _, figure in points]
            colour = SERIES[number % len(SERIES)]
            axes.errorbar(steps,
                          means,
                          yerr=[low, high],
                          color=colour,
                          ecolor=colour,
                          marker="o",
                          capsize=3,
                          label=legend(run))
        axes.set_xlabel("training step")
        axes.set_ylabel("mean reward")
        axes.set_ylim(0, 1.02)
        if len(runs) > 1:
            axes.figure.legend(fontsize=7, loc="outside upper center", ncols=min(len(runs), 4))

    return svg(draw, name)
