"""Prints a model's operations and energy beside its multiplying twin's.

python -m adderflax.energy --config configs/imagenet_adder_deit_ti.py
python -m adderflax.energy --config configs/imagenet_adder_deit_ti.py --convention full --json
python -m adderflax.energy --config configs/digits_adder_vit.py --config.model.similarity=dot
python -m adderflax.energy --config configs/imagenet_adder_deit_ti.py --table int8_int32_7nm
python -m adderflax.energy weights/cifar10_adder_vit
python -m adderflax.energy runs/digits_whole --table integer_only
python -m adderflax.energy runs/cifar10_int8 --table integer_only --twin runs/twin_int8
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from adderflax import pipes
from adderflax.analysis import TABLES, EnergyTable
from adderflax.analysis.configured import (
    configured_model,
    inference_ledger,
    multiplying_twin,
    trained_model,
)
from adderflax.analysis.energy_plot import draw
from adderflax.analysis.energy_report import compare
from adderflax.analysis.energy_text import as_text
from adderflax.analysis.integer_files import load_integer_only
from adderflax.analysis.integer_ledger import integer_only_ledger
from adderflax.analysis.ledger import Ledger
from adderflax.analysis.pricing import CONVENTIONS, MEMORY_DEFAULT
from adderflax.models import VisionTransformerConfig
from adderflax.models.families import ModelConfig
from adderflax.training.command_line import load_config, require_overrides
from adderflax.training.config import ConfigError
from adderflax.training.workdir import WorkdirError


@pipes.reader_may_leave()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments, overrides = _parse(sys.argv[1:] if argv is None else list(argv))
    try:
        if arguments.config is not None:
            config = load_config(arguments.config, overrides)
            variant, model, exported = config.model.variant, configured_model(config), False
        else:
            variant, model, exported = trained_model(arguments.directory)
        table = TABLES[arguments.table or ("exported" if exported else "fp32")]
        named = [(arguments.directory or arguments.config, model, exported)]
        if arguments.twin is not None:
            _, *twin = trained_model(arguments.twin)
            named.append((arguments.twin, *twin))
            _require_same_task(*named)
        report = compare(*_ledgers(named, table), table, arguments.memory, arguments.twin or "")
        title = (
            f"{arguments.config or arguments.directory}: {variant}, one image of "
            f"{model.image_size}x{model.image_size}x{model.channels}, {model.num_classes} classes"
        )
        if arguments.plot:
            if Path(arguments.plot).is_dir():
                raise ValueError(
                    f"{arguments.plot} is a directory. Name the picture's file, such as"
                    f" {Path(arguments.plot) / 'energy.png'}."
                )
            if not (folder := Path(arguments.plot).resolve().parent).is_dir():
                raise ValueError(
                    f"{arguments.plot} cannot be drawn: there is no directory {folder}. Make it."
                )
            draw(report, arguments.plot, f"{title}\nunit energies {table.name}, memory {arguments.memory}")
    except (ConfigError, ImportError, OSError, ValueError, WorkdirError) as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        print(json.dumps({"model": title, "twin": arguments.twin} | report.as_json(arguments.convention)))
    else:
        print(f"{title}\n\n{as_text(report, arguments.convention)}")


def _ledgers(named: list[tuple[str, ModelConfig, bool]], table: EnergyTable) -> list[Ledger]:
    """Of a model and its twin, which is derived where only the model is given.

    Args:
        named: directories or files, the models there, and whether they are exports.
        table: prices them.
    """
    if not table.by_bits:
        models = [model for _, model, _ in named]
        return [
            inference_ledger(model)
            for model in (models if named[1:] else [*models, multiplying_twin(*models)])
        ]
    for name, model, exported in named:
        if not isinstance(model, VisionTransformerConfig):
            raise ValueError(
                f"--table {table.name} prices a model without floats, which only a VisionTransformer has, and"
                f" {name} is of {type(model).__name__.removesuffix('Config')}. Take another table, such as"
                " exported."
            )
        if not exported:
            raise ValueError(
                f"--table {table.name} prices a model without floats, and {name} is none. Write one by"
                " python -m adderflax.export WORKDIR DIRECTORY --integer_only, and name that directory."
            )
    wholes = [load_integer_only(name)[0] for name, *_ in named]
    found = [integer_only_ledger(whole) for whole in wholes]
    return found if found[1:] else [*found, integer_only_ledger(*wholes, twin=True)]


def _require_same_task(*named: tuple[str, ModelConfig, bool]) -> None:
    (name, model, _), (twin_name, twin, _) = named
    tasks = [
        f"images {each.image_size}x{each.image_size}x{each.channels} and {each.num_classes} classes"
        for each in (model, twin)
    ]
    if tasks[0] != tasks[1]:
        raise ValueError(
            f"{name} takes {tasks[0]}, but --twin {twin_name} takes {tasks[1]}. Compare models of one task."
        )


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m adderflax.energy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "directory",
        nargs="?",
        help="workdir of a run, directory of a file of weights, or export: the model as it was trained; no "
        "checkpoint is read",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="configuration file, configs/X.py or configs/X.py:multiply; --config.a.b=value "
        "changes a field; the data set is not opened",
    )
    parser.add_argument(
        "--twin",
        metavar="DIRECTORY",
        help="a trained or exported model to stand beside, in place of the multiplying twin that is derived; "
        "with --table integer_only that has its own accumulators",
    )
    parser.add_argument(
        "--convention",
        choices=CONVENTIONS,
        default="paper",
        help="paper: matrix products, convolutions and adder operators only; full: everything. "
        "The tables show both; this is the one of --json and of the last line (default paper)",
    )
    parser.add_argument(
        "--table",
        choices=TABLES,
        help="unit energies, at 45 nm but for _7nm (default fp32; of an export, exported); integer_only: of "
        "what an export holds besides if it was written with --integer_only",
    )
    levels = tuple(dict.fromkeys(level for table in TABLES.values() for level in table.memory))
    parser.add_argument(
        "--memory",
        choices=levels,
        default=MEMORY_DEFAULT,
        help=f"memory that `full` prices (default {MEMORY_DEFAULT}; hbm2 at 7 nm only)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and no tables")
    parser.add_argument("--plot", metavar="FILE", help="draw stacked bars, such as energy.png")
    arguments, overrides = parser.parse_known_args(argv)
    require_overrides(parser, overrides)
    directory = arguments.directory
    if (directory is None) == (arguments.config is None):
        given = "neither is" if directory is None else f"{directory} and --config {arguments.config} are"
        parser.error(
            "the model is that of a directory, such as weights/cifar10_adder_vit, or that of --config FILE; "
            f"{given} given. Give one of them"
        )
    if directory is not None and overrides:
        parser.error(
            f"{overrides[0]} changes a configuration file's field, and {directory} names a model as it was "
            "trained. Leave one of them out; a file is named by --config FILE"
        )
    if directory is not None and Path(directory).is_file():
        parser.error(
            f"{directory} is a file. Give the directory of a run, or --config {directory} where it is a "
            "configuration file"
        )
    return arguments, overrides


if __name__ == "__main__":
    main()
