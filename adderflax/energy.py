"""Prints a model's operations and energy beside its multiplying twin's.

python -m adderflax.energy --config configs/imagenet_adder_deit_ti.py
python -m adderflax.energy --config configs/imagenet_adder_deit_ti.py --convention full --json
python -m adderflax.energy --config configs/digits_adder_vit.py --config.model.similarity=dot
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from adderflax import pipes
from adderflax.analysis import TABLES
from adderflax.analysis.configured import (
    configured_model,
    inference_ledger,
    multiplying_twin,
)
from adderflax.analysis.energy_plot import draw
from adderflax.analysis.energy_report import as_text, compare
from adderflax.analysis.energy_tables import CONVENTIONS, MEMORY_DEFAULT
from adderflax.training.command_line import load_config
from adderflax.training.config import ConfigError


@pipes.reader_may_leave()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments, overrides = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        config = load_config(arguments.config, overrides)
        model = configured_model(config)
        table = TABLES[arguments.table]
        ledgers = inference_ledger(model), inference_ledger(multiplying_twin(model))
        report = compare(*ledgers, table, arguments.memory)
        title = (
            f"{arguments.config}: {config.model.variant}, one image of "
            f"{model.image_size}x{model.image_size}x{model.channels}, {model.num_classes} classes"
        )
        if arguments.plot:
            if not (folder := Path(arguments.plot).resolve().parent).is_dir():
                raise ValueError(
                    f"{arguments.plot} cannot be drawn: there is no directory {folder}. Make it."
                )
            draw(report, arguments.plot, title)
    except (ConfigError, ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        print(json.dumps(report.as_json(arguments.convention)))
    else:
        print(f"{title}\n\n{as_text(report, arguments.convention)}")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m adderflax.energy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="configuration file, configs/X.py or configs/X.py:multiply; --config.a.b=value "
        "changes a field; the data set is not opened",
    )
    parser.add_argument(
        "--convention",
        choices=CONVENTIONS,
        default="paper",
        help="paper: matrix products, convolutions and adder operators only; full: everything. "
        "The tables show both; this is the one of --json and of the last line (default paper)",
    )
    parser.add_argument("--table", choices=TABLES, default="fp32", help="unit energies")
    levels = tuple(TABLES["fp32"].memory)
    parser.add_argument("--memory", choices=levels, default=MEMORY_DEFAULT, help="memory that `full` prices")
    parser.add_argument("--json", action="store_true", help="print one JSON object and no tables")
    parser.add_argument("--plot", metavar="FILE", help="draw stacked bars, such as energy.png")
    arguments, overrides = parser.parse_known_args(argv)
    for override in overrides:
        if not re.match(r"--?(no)?config\.", override):
            parser.error(f"unknown argument {override}; fields are set by --config.a.b=value")
    return arguments, overrides


if __name__ == "__main__":
    main()
