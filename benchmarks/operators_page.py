"""The results page of the operators: results/operators.md and its plot, from one JSON file a machine."""

import json
from pathlib import Path
from typing import Any

METHODS = ("forward", "input gradient", "whole backward")
INT8 = "int8"
PEERS = {"forward": "torch.cdist", "input gradient": "torch broadcast", "whole backward": "multiply"}


def write_page(folder: Path) -> tuple[Path, Path]:
    """Writes FOLDER.md and FOLDER.png from the JSON files in the folder.

    Raises:
      FileNotFoundError: there is no file yet.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no results yet: run python -m benchmarks.operators first.")
    results = [json.loads(file.read_text()) for file in files]
    page, plot = folder.with_suffix(".md"), folder.with_suffix(".png")
    sections = [_section(result, file.name) for result, file in zip(results, files)]
    page.write_text(_HEAD.format(plot=plot.name) + "\n".join(sections))
    _draw(results, plot)
    return page, plot


_HEAD = """# Speed of the adder operators

An element is one term `|x[m, k] - y[k, n]|`. G/s are 10^9 elements a second, in float32; medians of runs that
alternate in one process with the others of their line. The share is that of what the device's arithmetic
allows: on a CPU the speed of `benchmarks/cpu_limit.cpp`, a hand-written AVX-512 loop, alternating on the same
shape where the file has a "limit loop" for it and else that of one shape, measured before; for the input
gradient three quarters of the latter, as an element takes four instructions instead of three; on a GPU
multiprocessors x lanes x clock over the two instructions that an element takes in either. "x cdist" is
the speed relative to `torch.cdist(p=1)`, "x broadcast" to the same gradient rule written with torch
broadcasting, "x multiply" to `jnp.matmul` and its gradients in float32. Empty: not timed, because a single
call would take seconds, or torch was not installed.

![Elements per second]({plot})
"""


def _section(result: dict[str, Any], file: str) -> str:
    about, table = result["machine"], _by_case(result["records"])
    versions = (
        f"jax {about['jax']}, Python {about['python']}, load average {about['load_average']} at the start"
    )
    limits = result["limits"]
    limit = (
        "unknown"
        if limits is None
        else f"{limits[0] / 1e9:,.1f} G/s forward, {limits[1] / 1e9:,.1f} gradient"
    )
    lines = [
        f"\n## {about['device']}, {about['cores']} cores, {about['platform']}\n",
        f"`{result['command']}` ({versions}); limit: {limit}; figures: `{file}`.\n",
        "| case | batch | M, K, N | forward G/s | share | x cdist | x multiply | input gradient G/s | share "
        "| x broadcast | x multiply | backward G/s | x multiply |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (kind, batch, lengths), methods in table.items():
        cells = [kind, str(batch), " x ".join(map(str, lengths))]
        for method in METHODS:
            found = methods[method]
            own = found["adderflax"]
            cells.append(f"{own['elements_per_second'] / 1e9:,.1f}")
            if method != "whole backward":
                cells.append("" if own["share_of_limit"] is None else f"{own['share_of_limit']:.2f}")
                cells.append(_times(own, found.get(PEERS[method])))
            cells.append(_times(own, found.get("multiply")))
        lines.append("| " + " | ".join(cells) + " |")
    if any("kernels" in methods["forward"] for methods in table.values()):
        lines += ["", _KERNELS_HEAD, *_kernel_lines(table)]
    return "\n".join(lines) + "\n"


_KERNELS_HEAD = """The kernels of `implementation="cpu"`, in the same run. "x xla" is the speed relative to
the columns above, for int8 to what `implementation=None` does with int8; "x multiply" is again that relative
to `jnp.matmul` in float32, and "x torch" to int8 products by `torch._int_mm`, which uses the processor's
instructions for them. A share above 1 is faster than the hand-written loop: the kernels sum max(x, y), from
which sums of x and of y are taken (not where that would cost digits), and clip by one instruction, so that an
element takes two instructions and three.

| case | batch | M, K, N | forward G/s | share | x xla | x multiply | input gradient G/s | share | x xla \
| x multiply | backward G/s | x xla | x multiply | int8 G/s | x xla | x multiply | x torch |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def _kernel_lines(table) -> list[str]:
    lines = []
    for (kind, batch, lengths), methods in table.items():
        cells = [kind, str(batch), " x ".join(map(str, lengths))]
        for method in (*METHODS, INT8):
            found = methods[method]
            own = found["kernels"]
            cells.append(f"{own['elements_per_second'] / 1e9:,.1f}")
            if method in METHODS[:2]:
                cells.append("" if own["share_of_limit"] is None else f"{own['share_of_limit']:.2f}")
            others = ("adderflax", "multiply", *(("torch int8",) if method == INT8 else ()))
            cells += [_times(own, found.get(other)) for other in others]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _times(own: dict[str, Any], other: dict[str, Any] | None) -> str:
    return "" if other is None else f"{other['seconds'] / own['seconds']:.3g}"


def _by_case(records: list[dict[str, Any]]) -> dict[tuple, dict[str, dict[str, dict[str, Any]]]]:
    table = {}
    for record in records:
        key = (record["kind"], record["batch"], tuple(record["lengths"]))
        table.setdefault(key, {}).setdefault(record["method"], {})[record["contender"]] = record
    return table


def _draw(results: list[dict[str, Any]], plot: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 2, figsize=(11, 4.6 * len(results)), squeeze=False)
    for row, result in zip(axes, results):
        for axis, method in zip(row, METHODS):
            _bars(axis, result, method)
    figure.tight_layout()
    figure.savefig(plot, dpi=110)
    pyplot.close(figure)


def _bars(axis, result: dict[str, Any], method: str) -> None:
    table = _by_case(result["records"])
    # One batch tells the shapes apart; the page has the others.
    batches = sorted({batch for _, batch, _ in table})
    batch = batches[min(1, len(batches) - 1)]
    chosen = {key[2]: value[method] for key, value in table.items() if key[1] == batch}
    names = ("adderflax", "kernels", PEERS[method], "multiply")
    colors = ("#1f6f8b", "#6fb1c7", "#c8963e", "#9aa5ab")
    for index, (name, color) in enumerate(zip(names, colors)):
        places, values = [], []
        for place, found in enumerate(chosen.values()):
            if name in found:
                places.append(place + 0.21 * (index - 1.5))
                values.append(found[name]["elements_per_second"] / 1e9)
        if values:
            axis.barh(places, values, height=0.19, color=color, label=name)
    axis.set_yticks(range(len(chosen)), [" x ".join(map(str, lengths)) for lengths in chosen])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlabel("10^9 elements a second (log scale)")
    axis.set_title(f"{method}, batch {batch}, {result['machine']['device']} x{result['machine']['cores']}")
    limit = result["limits"] and result["limits"][("forward", "input gradient").index(method)] / 1e9
    if limit:
        axis.axvline(limit, color="black", linewidth=1, linestyle="--", label="limit of the device")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False)
