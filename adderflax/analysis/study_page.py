"""The Markdown page of a study: tables and pictures of the lines that are there."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from adderflax.analysis import figures
from adderflax.analysis.study import Study, StudyError, read_lines

Line = dict[str, Any]
_NONE = "-"


def write_page(study: Study, results: Path, file: str) -> Path:
    """Writes tables and pictures of the lines that are there; returns the Markdown page.

    Args:
      study: the description, which gives title, text, order and comparisons.
      results: its JSON-lines file; the page and its pictures lie beside it.
      file: the description's path, for the commands on the page.

    Raises:
      StudyError: no run of the study is finished, or a line is of another configuration.
      ImportError: matplotlib is not installed.
    """
    lines = read_lines(results)
    missing = len(study.pending(lines))
    wanted = {(run.name, seed) for run in study.runs for seed in run.seeds}
    lines = [line for line in lines if (line["name"], line["seed"]) in wanted]
    finished = {
        run.name: [line for line in lines if line["name"] == run.name and "figures" in line]
        for run in study.runs
    }
    finished = {name: found for name, found in finished.items() if found}
    if not finished:
        raise StudyError(
            f"{results} has no finished run of {study.name} yet. Run the study first: the same command"
            " without --report."
        )
    page = [
        f"# {study.title}",
        study.text,
        f"{len(lines)} of {len(wanted)} runs, {_listed(lines, 'machine')}, jax"
        f" {_listed(lines, 'jax')}, commit {_listed(lines, 'commit')}. Written by"
        f" `python -m adderflax.study {file} --results {results} --report`; without `--report`"
        f" the same command trains what is missing ({missing} runs).",
        "Figures are mean ± standard deviation over the seeds. " + _noise(finished),
        "## Accuracy, energy and time",
        _accuracy_table(study, lines),
        "Energy is that of one image by the two conventions of `python -m adderflax.energy` with"
        " its default table: `paper` prices matrix products and adder operators alone, `full`"
        " everything.",
    ]
    measured = {name: [line for line in found if line["diversity"]] for name, found in finished.items()}
    measured = {name: found for name, found in measured.items() if found}
    if measured:
        page += ["## Ranks of the attention maps", *_ranks(measured)]
    if study.comparisons:
        page += ["## Differences, seed by seed", _comparison_table(study, finished)]
    page += ["## Pictures", *_pictures(results, finished, measured)]
    target = results.with_suffix(".md")
    target.write_text("\n\n".join(filter(None, page)) + "\n", encoding="utf-8")
    return target


# A figure of a line, as columns show it: (header, the figure, digits behind the point).
_Column = tuple[str, Callable[[Line], float], int]


def _figure(header: str, name: str, digits: int, factor: float = 1.0) -> _Column:
    return header, lambda line: factor * line["figures"].get(name, np.nan), digits


def _rank(header: str, map_: str | None, name: str, digits: int) -> _Column:
    """The mean over layers of a map's figure; None is the map that the model uses."""

    def value(line: Line) -> float:
        found = line["diversity"]
        used = "softmax_plus_identity" if found["identity"] else "softmax"
        return float(np.mean([layer[map_ or used][name] for layer in found["layers"]]))

    return header, value, digits


def _feature(header: str, name: str) -> _Column:
    """A figure of the last layer's output."""
    return header, lambda line: line["diversity"]["layers"][-1]["features"][name], 3


_ACCURACY = _figure("test accuracy, %", "test_accuracy", 1, 100.0)
_SOFTMAX_RANK = _rank("effective rank, softmax", "softmax", "effective_rank", 2)
_COSINE = _feature("cosine of tokens, last layer", "token_cosine_similarity")


def _accuracy_table(study: Study, lines: list[Line]) -> str:
    columns = (
        _ACCURACY,
        _figure("test loss", "test_loss", 3),
        _figure("validation accuracy, %", "validation_accuracy", 1, 100.0),
        _figure("last train loss", "train_loss", 3),
    )
    rows = []
    for run in study.runs:
        found = [line for line in lines if line["name"] == run.name]
        trained = [line for line in found if "figures" in line]
        diverged = len(found) - len(trained)
        rows.append(
            [
                run.name,
                f"{len(found)} of {len(run.seeds)}" + f", {diverged} diverged" * bool(diverged),
                *(_spread(map(figure, trained), digits) for _, figure, digits in columns),
                *(_microjoules(trained, convention) for convention in ("paper", "full")),
                _spread((line["figures"]["seconds"] for line in trained if not line["resumed"]), 0),
            ]
        )
    headers = [header for header, _, _ in columns]
    return _table(["run", "seeds", *headers, "µJ, paper", "µJ, full", "seconds"], rows)


def _ranks(measured: dict[str, list[Line]]) -> list[str]:
    columns = (
        _rank("0.8 index, softmax", "softmax", "index_80", 1),
        _SOFTMAX_RANK,
        _rank("distance from rank one, softmax", "softmax", "rank_one_distance", 3),
        _rank("0.8 index, softmax + I", "softmax_plus_identity", "index_80", 1),
        _rank("effective rank, softmax + I", "softmax_plus_identity", "effective_rank", 2),
        _COSINE,
        _feature("residual, last layer", "mean_residual"),
    )
    rows = [
        [
            name,
            "yes" if found[0]["diversity"]["identity"] else "no",
            *(_spread(map(figure, found), digits) for _, figure, digits in columns),
        ]
        for name, found in measured.items()
    ]
    example = next(iter(measured.values()))[0]["diversity"]
    return [
        _table(["run", "uses I", *(header for header, _, _ in columns)], rows),
        f"Maps of {example['tokens']} tokens, mean over layers, heads and {example['images']} test"
        " images; `adderflax.analysis.diversity` defines the figures. Adding I raises the rank of"
        " any map, so `softmax + I` says what a model with the identity multiplies its values"
        " with, and `softmax` what it learned; for a model without the identity `softmax + I` is"
        " hypothetical.",
    ]


def _comparison_table(study: Study, finished: dict[str, list[Line]]) -> str:
    ranks = (_SOFTMAX_RANK, _rank("effective rank, map in use", None, "effective_rank", 2), _COSINE)
    rows = []
    for comparison in study.comparisons:
        ours = {line["seed"]: line for line in finished.get(comparison.run, [])}
        theirs = {line["seed"]: line for line in finished.get(comparison.base, [])}
        pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        ranked = [pair for pair in pairs if all(line["diversity"] for line in pair)]
        rows.append(
            [
                comparison.label,
                f"{comparison.run} - {comparison.base}",
                str(len(pairs)),
                _differences(_ACCURACY, pairs),
                *(_differences(column, ranked) for column in ranks),
            ]
        )
    headers = [header for header, _, _ in ranks]
    return _table(["what", "difference", "seeds", "test accuracy, points", *headers], rows)


def _differences(column: _Column, pairs: list[tuple[Line, Line]]) -> str:
    _, figure, digits = column
    return _spread((figure(a) - figure(b) for a, b in pairs), digits, signed=True)


def _pictures(results: Path, finished: dict[str, list[Line]], measured: dict[str, list[Line]]) -> list[str]:
    shown = []

    def picture(kind: str, caption: str) -> Path:
        file = results.with_name(f"{results.stem}_{kind}.png")
        shown.append(f"![{caption}]({file.name})\n\n{caption}.")
        return file

    columns = [(_ACCURACY, finished), (_SOFTMAX_RANK, measured)]
    columns += [(("µJ an image, paper", lambda line: 1000 * line["energy_mJ"]["paper"], 0), finished)]
    figures.draw_study_overview(
        list(finished),
        [
            (header, [[figure(line) for line in source.get(name, [])] for name in finished])
            for (header, figure, _), source in columns
            if source
        ],
        picture("overview", "Each run: a dot a seed, a bar at the mean"),
    )
    if measured:
        found = {name: [line["diversity"] for line in lines] for name, lines in measured.items()}
        figures.draw_study_ranks(
            found, picture("ranks", "Effective rank of the maps by layer, a line a seed")
        )
        caption = "Cumulative normalized singular values of the maps, a line a layer; dotted: 0.8"
        figures.draw_study_spectra(found, picture("spectra", caption))
    return shown


def _noise(finished: dict[str, list[Line]]) -> str:
    """How much of a difference the size of the test part alone explains."""
    trained = [line["figures"] for lines in finished.values() for line in lines]
    examples = trained[0]["test_examples"]
    accuracy = float(np.mean([found["test_accuracy"] for found in trained]))
    error = 100 * np.sqrt(accuracy * (1 - accuracy) / examples)
    return (
        f"The test part has {examples:,} images: one image is {100 / examples:.2f} points, and at"
        f" the mean accuracy the binomial standard error of one run is {error:.1f} points."
    )


def _spread(values: Iterable[float], digits: int, *, signed: bool = False) -> str:
    """The mean ± the sample standard deviation, or the one value."""
    values = list(values)
    if not values or not np.all(np.isfinite(values)):
        return _NONE
    text = f"{np.mean(values):{'+' if signed else ''}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.{digits}f}"


def _microjoules(lines: list[Line], convention: str) -> str:
    """The energy of an image, which no seed changes."""
    return f"{1000 * lines[0]['energy_mJ'][convention]:,.4g}" if lines else _NONE


def _listed(lines: list[Line], name: str) -> str:
    return ", ".join(dict.fromkeys(str(line[name]) for line in lines))


def _table(header: list[str], rows: list[list[str]]) -> str:
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *rows))
