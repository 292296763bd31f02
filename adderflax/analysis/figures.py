"""Pictures of diversity figures and of studies. matplotlib is imported when one is drawn."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adderflax.analysis.diversity import MASS, Diversity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, told apart with color vision deficiencies too.
_SOFTMAX, _IDENTITY, _OTHER = "#0072B2", "#D55E00", "#009E73"
_MAPS = {"softmax": (_SOFTMAX, "softmax"), "softmax_plus_identity": (_IDENTITY, "softmax + I")}
_DASHED = "dashed: not the map that the model uses"
_DPI = 150
_COLORS = 64  # of a study's pictures, which grow with its runs
_SHOWN_IMAGES = 4
_SHOWN_LAYERS = 6


def draw_spectra(found: Diversity, file: str | Path) -> None:
    """Cumulative normalized singular values of the maps by layer, over images and heads.

    Lines are means; bands reach from the 5th to the 95th percentile of images and heads.

    Args:
      found: the measurement.
      file: where to; the ending chooses the format.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    layers, tokens = found.softmax.shape[1], found.softmax.shape[-1]
    figure, panels = _panels(layers, columns=min(layers, 4))
    for layer, axes in enumerate(panels):
        for name, values in found.maps().items():
            rows = values[:, layer].reshape(-1, tokens)
            rows = np.cumsum(rows, axis=-1) / np.sum(rows, axis=-1, keepdims=True)
            color, _ = _MAPS[name]
            used = found.identity == (name != "softmax")
            count = np.arange(1, tokens + 1)
            low, high = np.percentile(rows, (5, 95), axis=0)
            axes.fill_between(count, low, high, color=color, alpha=0.2, linewidth=0)
            axes.plot(count, rows.mean(axis=0), "-" if used else "--", color=color, linewidth=1.6)
        _cumulative_axes(axes, tokens)
        axes.set_title(f"layer {layer}", fontsize=10)
    _map_legend(figure, f"{_DASHED}; bands: 5th to 95th percentile of images and heads")
    _save(figure, file)


def draw_depth(found: Diversity, file: str | Path) -> None:
    """Ranks of the maps, and how alike the tokens become, by layer; lines are means over images.

    Args and Raises: as for `draw_spectra`.
    """
    figure, (left, right) = _panels(2, columns=2, size=(4.0, 3.2))
    figures = found.figures(heads=False)["layers"]
    depth = [layer["layer"] for layer in figures]
    for name, (color, label) in _MAPS.items():
        used = found.identity == (name != "softmax")
        label += "" if used else " (not used)"
        ranks = [layer[name]["effective_rank"] for layer in figures]
        left.plot(depth, ranks, "o-" if used else "o--", color=color, label=label)
    left.set_ylim(0, None)
    left.set(xlabel="layer", ylabel="effective rank of the map")
    for name, color, label in (
        ("token_cosine_similarity", _SOFTMAX, "cosine similarity of tokens"),
        ("mean_residual", _IDENTITY, "residual beside the mean token"),
        ("rank_one_distance", _OTHER, "distance from rank one"),
    ):
        right.plot(depth, [layer["features"][name] for layer in figures], "o-", color=color, label=label)
    right.set_ylim(min(0.0, right.get_ylim()[0]), 1.0)
    right.set(xlabel="layer", ylabel="features after the layer")
    for axes in (left, right):
        axes.set_xticks(depth[:: math.ceil(len(depth) / 12)])
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def draw_attention(found: Diversity, images: np.ndarray, file: str | Path) -> None:
    """Attention of the class token over the first images, before the identity, mean over heads.

    Args:
      found: the measurement; its tokens are the patches of a square grid in reading order, after a class
        token unless their number is a square. Without a class token it is the mean of all tokens that is
        shown.
      images: uint8 [N, H, W, C], those that were measured.
      file: where to; the ending chooses the format.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    layers, tokens = found.class_attention.shape[1], found.class_attention.shape[-1]
    side = math.isqrt(tokens)
    has_class_token = side**2 != tokens
    shown = images[:_SHOWN_IMAGES]
    chosen = np.unique(np.linspace(0, layers - 1, min(layers, _SHOWN_LAYERS)).round().astype(int))
    figure, panels = _panels(len(shown) * (1 + len(chosen)), columns=1 + len(chosen), size=(1.5, 1.5))
    grid = np.reshape(panels, (len(shown), -1))
    patches = np.mean(found.class_attention, axis=2)[..., int(has_class_token) :]
    patches = patches.reshape(-1, layers, side, side)
    # One scale for all: what a layer looks at can be compared with what another does.
    top = float(np.max(patches[: len(shown)][:, chosen]))
    extent = (0, images.shape[2], images.shape[1], 0)
    from matplotlib.colors import LinearSegmentedColormap

    overlay = LinearSegmentedColormap.from_list("weight", [(0.7, 0.1, 0.0, 0.0), (0.7, 0.1, 0.0, 0.95)])
    for row, image in enumerate(shown):
        gray = np.mean(image, axis=-1) / 255
        for column, axes in enumerate(grid[row]):
            axes.set_xticks([])
            axes.set_yticks([])
            # Pale behind the weights, so that a color means the same weight over every image.
            shade = gray if column == 0 else 0.7 + 0.3 * gray
            axes.imshow(shade, cmap="gray", extent=extent, vmin=0.0, vmax=1.0)
            if column == 0:
                continue
            weights = patches[row, chosen[column - 1]]
            drawn = axes.imshow(
                weights, cmap=overlay, extent=extent, vmin=0.0, vmax=top, interpolation="nearest"
            )
            if row == 0:
                axes.set_title(f"layer {chosen[column - 1]}", fontsize=9)
    bar = figure.colorbar(drawn, ax=list(grid[:, 1:].flat), shrink=0.7)
    what = "attention of the class token" if has_class_token else "mean attention of all tokens"
    bar.set_label(what, fontsize=9)
    _save(figure, file)


def draw_study_overview(
    names: Sequence[str],
    columns: Sequence[tuple[str, Sequence[Sequence[float]]]],
    file: str | Path,
) -> None:
    """A row a run, a panel a figure: a dot for each seed and a line at the mean.

    Args:
      names: names of the runs, from the top.
      columns: label of each panel, and for each run the figures of its seeds.
      file: where to; the ending chooses the format.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    height = (0.28 * len(names) + 1.0) / math.ceil(len(columns) / 3)
    figure, panels = _panels(len(columns), columns=len(columns), size=(2.9, height))
    for index, (axes, (label, rows)) in enumerate(zip(panels, columns)):
        for position, values in enumerate(rows):
            axes.axhline(position, color="#DDDDDD", linewidth=0.8, zorder=0)
            axes.plot(values, [position] * len(values), "o", color=_SOFTMAX, alpha=0.6, markersize=5)
            if len(values):
                axes.plot([np.mean(values)], [position], "|", color="black", markersize=13)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names if index == 0 else [""] * len(names))
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        axes.spines[["top", "right", "left"]].set_visible(False)
    _save(figure, file, colors=_COLORS)


def draw_study_ranks(diversities: dict[str, list[dict[str, Any]]], file: str | Path) -> None:
    """A panel a run: the effective rank of its maps by layer, a line a seed.

    Args:
      diversities: for each run the diversity figures of its seeds, as a study's lines hold them.
      file: where to; the ending chooses the format.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    figure, panels = _panels(len(diversities), columns=min(len(diversities), 4), size=(2.6, 2.0))
    for axes, (run, seeds) in zip(panels, diversities.items()):
        for found in seeds:
            depth = [layer["layer"] for layer in found["layers"]]
            for name, (color, _) in _MAPS.items():
                used = found["identity"] == (name != "softmax")
                ranks = [layer[name]["effective_rank"] for layer in found["layers"]]
                style = "o-" if used else "--"
                axes.plot(depth, ranks, style, color=color, markersize=3, linewidth=1.2, alpha=0.8)
            axes.set_ylim(0, found["tokens"])
            axes.set_xticks(depth[:: math.ceil(len(depth) / 6)])
        axes.set_title(run, fontsize=9)
        axes.set(xlabel="layer", ylabel="effective rank")
        axes.label_outer()
    _map_legend(figure, _DASHED)
    _save(figure, file, colors=_COLORS)


def draw_study_spectra(diversities: dict[str, list[dict[str, Any]]], file: str | Path) -> None:
    """A panel a run: cumulative normalized singular values by layer, mean over seeds.

    Args and Raises: as for `draw_study_ranks`.
    """
    figure, panels = _panels(len(diversities), columns=min(len(diversities), 4), size=(2.6, 2.0))
    for axes, (run, seeds) in zip(panels, diversities.items()):
        tokens = seeds[0]["tokens"]
        for name, (color, _) in _MAPS.items():
            used = seeds[0]["identity"] == (name != "softmax")
            curves = np.cumsum(np.mean([found["spectra"][name] for found in seeds], axis=0), axis=-1)
            for layer, curve in enumerate(curves):
                # The later the layer, the darker its line.
                alpha = 0.35 + 0.65 * layer / max(len(curves) - 1, 1)
                count, style = np.arange(1, tokens + 1), "-" if used else "--"
                axes.plot(count, curve, style, color=color, linewidth=1.2, alpha=alpha)
        _cumulative_axes(axes, tokens)
        axes.set_title(run, fontsize=9)
    _map_legend(figure, f"{_DASHED}; darker: later layers")
    _save(figure, file, colors=_COLORS)


def _cumulative_axes(axes: "Axes", tokens: int) -> None:
    axes.axhline(MASS, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, tokens), ylim=(0, 1.02))
    axes.set(xlabel="number of singular values", ylabel="share of their sum")
    axes.label_outer()


def _panels(
    count: int, *, columns: int, size: tuple[float, float] = (2.8, 2.5)
) -> tuple["Figure", list["Axes"]]:
    """A figure of so many panels, each of a size in inches, in rows."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "A picture needs matplotlib, which is not installed here: `pip install matplotlib`."
        ) from error
    rows = math.ceil(count / columns)
    # The added inches hold legend and labels.
    figure = Figure(figsize=(size[0] * columns + 0.6, size[1] * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes[count:]:
        panel.set_axis_off()
    return figure, axes[:count]


def _map_legend(figure: "Figure", note: str) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, label=label) for color, label in _MAPS.values()]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=len(handles),
        fontsize=9,
        frameon=False,
        title=note,
        title_fontsize=8,
    )


def _save(figure: "Figure", file: str | Path, colors: int | None = None) -> None:
    """Writes a picture; with so many colors, lines and letters take a quarter of the bytes."""
    if colors is None:
        figure.savefig(file, dpi=_DPI)
        return
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=_DPI)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(colors).save(file, optimize=True)
