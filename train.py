"""Trains, resumes or evaluates a Vision Transformer in adder arithmetic.

python train.py --config configs/digits_adder_vit.py
python train.py --config configs/cifar10_adder_vit.py:multiply --config.seed=1 --workdir runs/twin-1
python train.py --workdir runs/twin-1 --eval_only
"""

import json
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file; a colon gives it an argument: configs/X.py:multiply."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run, resumed if it holds one. Default: runs/, then the configuration file's name.",
)
_EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "Evaluate the workdir's newest checkpoint; do not train.")
_EXTEND = flags.DEFINE_bool("extend", False, "Go on with another number of steps than the run began with.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw a progress bar.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected argument {argv[1]!r}; flags begin with --.")
    if not flags.FLAGS["verbosity"].present:
        # orbax reports every file at INFO and warns of what is meant, such as saves between evaluations.
        logging.set_verbosity(logging.ERROR)
    # Imported here so that --help answers at once.
    from adderflax.data import DatasetNotReadyError
    from adderflax.training import trainer
    from adderflax.training.config import ConfigError
    from adderflax.training.steplog import DivergenceError
    from adderflax.training.workdir import WorkdirError

    config, workdir = _CONFIG.value, _WORKDIR.value
    try:
        if config is None and not (_EVAL_ONLY.value and workdir):
            raise ConfigError(
                "--config is missing: give a configuration file, such as --config"
                " configs/digits_adder_vit.py. Only --eval_only together with --workdir needs none."
            )
        if workdir is None:
            name, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
            workdir = Path("runs", "-".join(filter(None, (Path(name).stem, argument))))
        if _EVAL_ONLY.value:
            print(json.dumps(trainer.evaluate(workdir, config)))
        else:
            trainer.train(config, workdir, extend=_EXTEND.value, progress=_PROGRESS.value)
    except (ConfigError, DatasetNotReadyError, DivergenceError, WorkdirError) as error:
        sys.exit(f"error: {error}")


def _parse_flags(argv: list[str]) -> list[str]:
    from adderflax.training import command_line
    from adderflax.training.config import ConfigError

    try:
        return command_line.parse(flags.FLAGS, _CONFIG, argv)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
