"""Runs a study: a list of configurations times seeds, each finished run a line of a results file.

    python -m adderflax.study studies/rank_digits.py
    python -m adderflax.study studies/rank_digits.py --report

The same command again goes on where it stopped. When all is done, or with --report alone, it writes
tables and pictures beside the results file. `adderflax.analysis.study` says what a description is.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from adderflax import pipes
from adderflax.analysis.study import StudyError, load_study, run_study
from adderflax.analysis.study_page import write_page
from adderflax.data import DatasetNotReadyError
from adderflax.training import profiling
from adderflax.training.config import ConfigError
from adderflax.training.workdir import WorkdirError


@pipes.reader_may_leave()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m adderflax.study",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help="study description, a Python file")
    parser.add_argument("--workdir", default="runs/studies", help="default: runs/studies")
    parser.add_argument("--results", help="JSON-lines file; default: results/STUDY.jsonl")
    parser.add_argument("--report", action="store_true", help="only write the page, train nothing")
    parser.add_argument("--images", type=int, default=30, help="test images that ranks are measured on")
    parser.add_argument("--data_dir", help="where prepared data sets are")
    parser.add_argument(
        "--keep_checkpoints", action="store_true", help="keep the checkpoints of finished runs"
    )
    arguments = parser.parse_args(argv)
    profiling.keep_compiled_programs()
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # orbax reports every file
    try:
        study = load_study(arguments.study)
        results = Path(arguments.results or Path("results", f"{study.name}.jsonl"))
        if not arguments.report:
            with pipes.reader_may_leave_unheeded():
                run_study(
                    study,
                    arguments.workdir,
                    results,
                    images=arguments.images,
                    data_dir=arguments.data_dir,
                    keep_checkpoints=arguments.keep_checkpoints,
                    progress=sys.stderr.isatty(),
                )
        print(f"Report in {write_page(study, results, arguments.study)}")
    except BrokenPipeError:
        raise  # of the output, which is no error
    except (
        ConfigError,
        DatasetNotReadyError,
        ImportError,
        OSError,
        StudyError,
        ValueError,
        WorkdirError,
    ) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
