"""The curves of a run as inline SVG, in the colors of the page around them."""

import dataclasses
import html
import io
import math
import re
from collections.abc import Iterable, Sequence

# Stand-ins that matplotlib draws with, and the page's CSS variable that takes the place of each.
_INK, _GRID, _TRAIN, _HELD_OUT, _THIRD = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--muted", _GRID: "--line", _TRAIN: "--train", _HELD_OUT: "--held", _THIRD: "--third"}
# More points than pixels only make the page heavy; each bucket keeps its least and its greatest.
_BUCKETS = 400


@dataclasses.dataclass(frozen=True)
class Curve:
    """One figure of the log.

    Attributes:
      figure: its name in ``metrics.jsonl``.
      label: its name on the page.
      color: 0 for training, 1 for held-out images, 2 for a third figure.
    """

    figure: str
    label: str
    color: int = 0


@dataclasses.dataclass(frozen=True)
class Panel:
    """One diagram.

    Attributes:
      title: over the diagram, with the unit.
      curves: what it shows.
      factor: by which figures are multiplied.
      logarithmic: whether the vertical axis is.
      from_zero: whether the vertical axis begins there, for figures whose ratio is what counts.
    """

    title: str
    curves: tuple[Curve, ...]
    factor: float = 1.0
    logarithmic: bool = False
    from_zero: bool = False


PANELS = (
    Panel("Loss, nats", (Curve("train_loss", "training"), Curve("validation_loss", "validation", 1))),
    Panel(
        "Accuracy, %",
        (
            Curve("train_accuracy", "training"),
            Curve("validation_accuracy", "validation", 1),
            Curve("validation_accuracy_top5", "validation, top 5", 2),
        ),
        factor=100.0,
    ),
    Panel("Learning rate", (Curve("learning_rate", "learning rate"),)),
    Panel("Throughput, images/s", (Curve("images_per_second", "images/s"),), from_zero=True),
    Panel("Gradient norm", (Curve("train_gradient_norm", "gradient norm"),), logarithmic=True),
    Panel("Parameter norm", (Curve("train_parameter_norm", "parameter norm"),)),
)


def panels_for(names: Iterable[str]) -> list[Panel]:
    """The diagrams of a log with figures of these names: `PANELS` first, then one for each other figure."""
    names = [name for name in names if name != "step" and not name.endswith("_examples")]
    known = {curve.figure for panel in PANELS for curve in panel.curves}
    shown = [panel for panel in PANELS if any(curve.figure in names for curve in panel.curves)]
    others = [name for name in names if name not in known]
    return shown + [Panel(name.replace("_", " "), (Curve(name, name.replace("_", " ")),)) for name in others]


def draw_panel(panel: Panel, log: Sequence[dict[str, float]], restarts: Sequence[int]) -> str:
    """Draws a diagram over the steps.

    Args:
      panel: what is drawn.
      log: lines of ``metrics.jsonl``; figures that are not finite leave a gap.
      restarts: steps at which a process went on, drawn as dotted lines.

    Returns:
      An ``<svg>`` element whose colors are CSS variables.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    style = {
        "svg.fonttype": "none",  # text stays text: searchable, and in the reader's own font
        "svg.hashsalt": panel.title,
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for step in restarts:
            axes.axvline(step, color=_GRID, linestyle=":", linewidth=1.2)
        for curve in panel.curves:
            points = thin([(line["step"], line[curve.figure]) for line in log if curve.figure in line])
            if points:
                steps, values = zip(*points)
                color = (_TRAIN, _HELD_OUT, _THIRD)[curve.color]
                marker = {"marker": "o", "markersize": 3} if len(points) < 30 else {}
                axes.plot(steps, [panel.factor * value for value in values], color=color, lw=1.5, **marker)
        if panel.logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _themed(buffer.getvalue(), panel.title)


def legend(panel: Panel, names: Iterable[str]) -> list[tuple[str, str]]:
    """(CSS color, label) of each curve that is there, empty where the title says it all."""
    colors = ("--train", "--held", "--third")
    there = [curve for curve in panel.curves if curve.figure in set(names)]
    return [(f"var({colors[curve.color]})", curve.label) for curve in there] if len(panel.curves) > 1 else []


def thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most two points a bucket of steps, its least and its greatest; NaN stays, as a gap."""
    points = [(step, value if math.isfinite(value) else math.nan) for step, value in points]
    if len(points) <= 2 * _BUCKETS:
        return points
    size = -(-len(points) // _BUCKETS)
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [point for point in bucket if not math.isnan(point[1])] or bucket
        ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _themed(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    # The page decides how wide it is; the viewBox keeps the proportions.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]*", "font-family: inherit", svg)
    # Several diagrams share a page, and so one space of names.
    prefix = re.sub(r"\W+", "-", title)
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
