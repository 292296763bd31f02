"""A stacked bar picture of a model's energy beside its multiplying twin."""

from pathlib import Path

from adderflax.analysis.energy_report import REST, Report
from adderflax.analysis.energy_text import unit_of
from adderflax.analysis.pricing import CONVENTIONS

# Okabe and Ito's colors and four of Tol's, told apart with color vision deficiencies too.
_COLORS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#332288",
    "#882255",
    "#44AA99",
    "#999933",
    "#000000",
)
_MEMORY_COLORS = {"memory, products and adders": "#888888", "memory, all else": "#CCCCCC"}
_THINNEST = 0.004  # of the highest bar: thinner layers cannot be seen


def draw(report: Report, file: str | Path, title: str) -> None:
    """Draws both conventions, each with a bar of the model and one of its twin.

    Args:
        report: what to draw.
        file: where to; the ending, such as .png or .svg, chooses the format.
        title: above the picture.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
        ValueError: the ending is none that matplotlib knows.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "A picture needs matplotlib, which is not installed here: `pip install matplotlib`, "
            "or leave --plot away for the tables alone."
        ) from error

    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    handles, (unit, factor) = {}, unit_of(report)
    for axes, convention in zip(figure.subplots(1, 2), CONVENTIONS):
        totals = [factor * total.total for total in report.total(convention)]
        bottoms = [0.0, 0.0]
        for name, heights in _layers(report, convention, _THINNEST * max(totals) / factor).items():
            color = _MEMORY_COLORS.get(name) or _color(report, name)
            heights = [factor * height for height in heights]
            handles[name] = axes.bar(["model", "multiplying\ntwin"], heights, 0.6, bottoms, color=color)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights)]
        for position, total in enumerate(totals):
            label = {"textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{total:.2f} {unit}", (position, total), (0, 3), **label)
        ratio = totals[1] / totals[0] if totals[0] else 1.0
        axes.set_title(f"{convention}: ratio {ratio:.2f}", fontsize=10)
        axes.set_ylabel(f"{unit} an image")
        axes.set_ylim(0, 1.1 * max(*totals, 1e-12))
        axes.spines[["top", "right"]].set_visible(False)
    # The legend lists the layers as they are stacked, the topmost first.
    order = [*(part.name for part in report.parts), REST, *_MEMORY_COLORS]
    names = sorted(handles, key=order.index, reverse=True)
    figure.legend([handles[n] for n in names], names, loc="outside right center", fontsize=9)
    figure.savefig(file, dpi=150)


def _layers(report: Report, convention: str, thinnest: float) -> dict[str, list[float]]:
    """Heights of the model's and the twin's layers, from the bottom; thin ones are in the rest."""
    layers, rest = {}, [0.0, 0.0]
    for part in report.parts:
        heights = [part.model[convention].arithmetic, part.twin[convention].arithmetic]
        if part.name == REST or max(heights) < thinnest:
            rest = [a + b for a, b in zip(rest, heights)]
        else:
            layers[part.name] = heights
    layers[REST] = rest
    if convention == "full":
        memory = [total.memory for total in report.total(convention)]
        products = report.product_memory()
        others = [whole - part for whole, part in zip(memory, products)]
        layers |= zip(_MEMORY_COLORS, (list(products), others))
    return {name: heights for name, heights in layers.items() if max(heights) > 0}


def _color(report: Report, name: str) -> str:
    names = [part.name for part in report.parts if part.name != REST]
    index = names.index(name) if name in names else len(_COLORS) - 1
    return _COLORS[index % len(_COLORS)]
