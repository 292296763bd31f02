"""Prints how much rank a trained run's attention maps and features keep, by layer and head.

    python -m adderflax.diversity runs/digits_adder_vit
    python -m adderflax.diversity runs/digits_adder_vit --images 100 --output results/diversity

The figures are explained in `adderflax.analysis.diversity`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adderflax import pipes
from adderflax.analysis import figures
from adderflax.analysis.diversity import Diversity, measure_workdir
from adderflax.data import DatasetNotReadyError
from adderflax.training import profiling
from adderflax.training.config import ConfigError
from adderflax.training.workdir import WorkdirError


@pipes.reader_may_leave()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m adderflax.diversity",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", help="directory of a trained run")
    parser.add_argument("--images", type=int, default=30, help="how many images (default 30)")
    parser.add_argument("--part", choices=("test", "validation", "train"), default="test")
    parser.add_argument("--best", action="store_true", help="the best checkpoint, not the newest")
    parser.add_argument("--data_dir", metavar="DIR", help="where prepared data sets are on this machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", metavar="DIR", help="write figures, singular values and pictures there")
    arguments = parser.parse_args(argv)
    profiling.keep_compiled_programs()
    try:
        found, images = measure_workdir(
            arguments.workdir,
            images=arguments.images,
            part=arguments.part,
            best=arguments.best,
            data_dir=arguments.data_dir,
        )
        if found is None:
            raise ValueError(f"The model in {arguments.workdir} has no attention maps to measure.")
        report = {"workdir": arguments.workdir, "part": arguments.part} | found.figures()
        if arguments.output:
            _write(Path(arguments.output), found, images, report)
    except (
        ConfigError,
        DatasetNotReadyError,
        ImportError,
        OSError,
        ValueError,
        WorkdirError,
    ) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report) if arguments.json else as_text(report))


def as_text(report: dict) -> str:
    """The tables that the command prints, from `Diversity.figures`."""
    used = "softmax + I" if report["identity"] else "softmax alone"
    lines = [
        f"{report['images']} images of the {report['part']} part, {report['tokens']} tokens;"
        f" the model uses {used}",
        "",
        f"{'attention map':16}{'softmax':^32}{'softmax + I':^32}",
        f"{'layer  head':16}" + f"{'0.8 index':>10}{'eff. rank':>11}{'rank-1':>9}  " * 2,
    ]
    for layer in report["layers"]:
        for row in (*layer["heads"], layer):
            cells = "".join(
                f"{row[name]['index_80']:10.1f}{row[name]['effective_rank']:11.2f}"
                f"{row[name]['rank_one_distance']:9.4f}  "
                for name in ("softmax", "softmax_plus_identity")
            )
            lines.append(f"{layer['layer']:5}{row.get('head', 'mean'):>6}     {cells}")
    lines += ["", f"{'features after':16}{'rank-1':>10}{'residual':>11}{'cosine':>9}"]
    for layer in report["layers"]:
        features = layer["features"]
        lines.append(
            f"{layer['layer']:5}{'':11}{features['rank_one_distance']:10.4f}"
            f"{features['mean_residual']:11.4f}{features['token_cosine_similarity']:9.4f}"
        )
    lines += [
        "",
        "0.8 index: how many of the largest singular values hold 0.8 of their sum. eff. rank: exp",
        "of the entropy of the normalized singular values. rank-1: relative distance from the",
        "nearest rank-one matrix. residual: share of the features that is not the mean token.",
        "cosine: mean over pairs of tokens.",
    ]
    return "\n".join(lines)


def _write(output: Path, found: Diversity, images: np.ndarray, report: dict) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "diversity.json").write_text(json.dumps(report, indent=1) + "\n")
    np.savez_compressed(output / "singular_values.npz", **found.maps())
    figures.draw_spectra(found, output / "spectra.png")
    figures.draw_attention(found, images, output / "attention.png")
    figures.draw_depth(found, output / "depth.png")


if __name__ == "__main__":
    main()
