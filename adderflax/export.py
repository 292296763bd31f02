"""Writes a trained run's adder layers as integers: templates, units, constants and test vectors.

    python -m adderflax.export runs/digits_adder_vit runs/digits_int8
    python -m adderflax.export runs/digits_adder_vit runs/digits_int4 --bits 4 --evaluate
    python -m adderflax.export runs/digits_adder_vit runs/digits_whole --integer_only --hex

The arithmetic is explained in `adderflax.analysis.integers`, that without a float in
`adderflax.analysis.integer_only`, the files in `adderflax.analysis.integer_files`.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from adderflax import pipes
from adderflax.analysis.integer_files import export_workdir
from adderflax.analysis.integers import BITS
from adderflax.data import DatasetNotReadyError
from adderflax.training import profiling
from adderflax.training.config import ConfigError
from adderflax.training.workdir import WorkdirError


@pipes.reader_may_leave()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m adderflax.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("workdir", help="directory of a trained run")
    parser.add_argument("directory", help="where to write; it must not hold anything yet")
    parser.add_argument(
        "--bits", type=int, default=8, help=f"of inputs and templates, {BITS[0]} to {BITS[-1]}"
    )
    parser.add_argument(
        "--calibration", type=int, help="training images, some hundred (default 256, or all of fewer)"
    )
    parser.add_argument("--vectors", type=int, default=2, help="test images to trace (default 2)")
    parser.add_argument("--evaluate", action="store_true", help="classify the whole test part, too")
    parser.add_argument(
        "--integer_only", action="store_true", help="also the model without a float, from pixels to logits"
    )
    parser.add_argument(
        "--hex", action="store_true", dest="hexadecimal", help="also every array as text for $readmemh"
    )
    parser.add_argument("--best", action="store_true", help="the best checkpoint, not the newest")
    parser.add_argument("--data_dir", metavar="DIR", help="where prepared data sets are on this machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = vars(parser.parse_args(argv))
    as_json = arguments.pop("json")
    profiling.keep_compiled_programs()
    try:
        description = export_workdir(**arguments)
    except (ConfigError, DatasetNotReadyError, ImportError, OSError, ValueError, WorkdirError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(description) if as_json else as_text(description))


def as_text(description: dict) -> str:
    """The table that the command prints, from `export_workdir`."""
    lines = [f"{'operation':32}{'kind':13}{'unit':>6}{'terms':>7}{'accumulator':>13}{'cut off':>10}"]
    for entry in description["operations"]:
        lines.append(
            f"{entry['name']:32}{entry['kind']:13}{'2^' + str(entry['exponent']):>6}{entry['terms']:>7}"
            f"{str(entry['accumulator_bits']) + ' bits':>13}{100 * entry['clipped']:>8.2f} %"
        )
    if "test_examples" in description:
        forms = {
            "float": "in float32",
            "integer": f"with integers of {description['bits']} bits",
            "integer_only": "with nothing but integers",
        }
        told = ", ".join(
            f"{description[f'test_accuracy_{name}']:.4f} {form}"
            for name, form in forms.items()
            if f"test_accuracy_{name}" in description
        )
        lines += ["", f"{description['test_examples']} test images: {told}"]
    if description.get("integer_only"):
        lines += ["", "The model without floats: integer_only.py, and integer_only.md for what it computes."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
