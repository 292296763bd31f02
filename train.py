"""Trains, resumes or evaluates a Vision Transformer in adder arithmetic.

python train.py --config configs/digits_adder_vit.py
python train.py --config configs/cifar10_adder_vit.py:multiply --config.seed=1 --workdir runs/twin-1
python train.py --workdir runs/twin-1 --eval_only

SIGTERM and SIGINT (Ctrl-C) finish the update at hand, save it and exit; the same command goes on from there.
Before the first update there is nothing to save.
A training whose output nobody reads any more, as behind `| head`, goes on.
Exit codes: 0 finished; 1 an error, told in one paragraph; 75 (EX_TEMPFAIL) stopped by a signal, saved; 128
plus the signal's number: a second signal came before that, or a first one where nothing was being trained:
the last checkpoint is where the run goes on.
"""

import json
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from adderflax import pipes

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file; a colon gives it an argument: configs/X.py:multiply."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run, resumed if it holds one. Default: runs/, then the configuration file's name.",
)
_EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "Evaluate the workdir's newest checkpoint; do not train.")
_BEST = flags.DEFINE_bool(
    "best", False, "With --eval_only: the checkpoint with the best validation accuracy, not the newest."
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "With --eval_only: where prepared data sets are here, in place of the run's data.data_dir.",
)
_EXTEND = flags.DEFINE_bool("extend", False, "Go on with another number of steps than the run began with.")
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps",
    None,
    "Updates to profile, first and last: 10:15. The trace goes to workdir/profile, for XProf or Perfetto.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Train together with the processes on the other hosts, started by the same command there; they are found"
    " by themselves on Cloud TPU, Slurm, Open MPI and Kubernetes. The workdir must be a directory that all"
    " of them see.",
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "Elsewhere: HOST:PORT of the first process, in every one. Implies --distributed, as do the next two.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Elsewhere: how many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Elsewhere: which one this is, from 0.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Draw a progress bar.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: Unexpected argument {argv[1]!r}; flags begin with --, and --help shows them.")
    if not flags.FLAGS["verbosity"].present:
        # orbax reports every file, warns of what is meant, such as saves between evaluations, and prints a
        # traceback of every error that it also raises.
        logging.set_verbosity(logging.FATAL)
    # Imported here so that --help answers at once.
    from adderflax.data import DatasetNotReadyError
    from adderflax.training import distributed, profiling, trainer
    from adderflax.training.config import ConfigError
    from adderflax.training.steplog import DivergenceError
    from adderflax.training.workdir import WorkdirError

    joining = (_COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    profiling.keep_compiled_programs()
    config, workdir, profile_steps = _CONFIG.value, _WORKDIR.value, _PROFILE_STEPS.value
    try:
        if _DISTRIBUTED.value or any(value is not None for value in joining):
            distributed.initialize(*joining)
        if config is None and not (_EVAL_ONLY.value and workdir):
            raise ConfigError(
                "--config is missing: give a configuration file, such as --config"
                " configs/digits_adder_vit.py. Only --eval_only together with --workdir needs none."
            )
        if _DATA_DIR.value is not None and not _EVAL_ONLY.value:
            raise ConfigError("--data_dir goes with --eval_only. To train, set --config.data.data_dir=DIR.")
        if _BEST.value and not _EVAL_ONLY.value:
            raise ConfigError("--best goes with --eval_only: training goes on from the newest checkpoint.")
        if _EVAL_ONLY.value and (_EXTEND.value or profile_steps is not None):
            raise ConfigError("--extend and --profile_steps go with training, which --eval_only leaves out.")
        if profile_steps is not None:
            profile_steps = profiling.parse_steps(profile_steps)
        if "://" in (workdir or ""):
            raise ConfigError(
                f"--workdir={workdir} is an address, and a run needs a directory of a file system: its lock"
                " and its atomic renames are those of one. docs/cloud.md says which serve in a cloud."
            )
        if workdir is None:
            name, _, argument = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
            workdir = Path("runs", "-".join(filter(None, (Path(name).stem, argument))))
        if _EVAL_ONLY.value:
            figures = trainer.evaluate(
                workdir,
                config,
                data_dir=_DATA_DIR.value,
                best=_BEST.value,
                progress=_PROGRESS.value,
            )
            print(json.dumps(figures))
        else:
            with pipes.reader_may_leave_unheeded():
                trainer.train(
                    config,
                    workdir,
                    extend=_EXTEND.value,
                    progress=_PROGRESS.value,
                    profile_steps=profile_steps,
                )
    except (
        ConfigError,
        DatasetNotReadyError,
        DivergenceError,
        WorkdirError,
        distributed.DistributedError,
    ) as error:
        sys.exit(f"error: {error}")


def _parse_flags(argv: list[str]) -> list[str]:
    from adderflax.training import command_line
    from adderflax.training.config import ConfigError

    try:
        return command_line.parse(flags.FLAGS, _CONFIG, argv)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    with pipes.reader_may_leave():
        try:
            app.run(main, flags_parser=_parse_flags)
        except KeyboardInterrupt:  # where nothing is being trained: data is read, or evaluated
            sys.exit(130)
