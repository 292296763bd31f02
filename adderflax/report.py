"""Writes the page of a run, finished or going on, as one HTML file that needs no network.

python -m adderflax.report runs/digits_adder_vit
python -m adderflax.report runs/digits_adder_vit --output digits.html
"""

import argparse
import sys
from collections.abc import Sequence

from adderflax import pipes
from adderflax.analysis.run_page import write_run_page
from adderflax.training.config import ConfigError
from adderflax.training.workdir import WorkdirError


@pipes.reader_may_leave()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m adderflax.report",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", help="directory of a run")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the workdir")
    arguments = parser.parse_args(argv)
    try:
        page = write_run_page(arguments.workdir, arguments.output)
    except (ConfigError, ImportError, OSError, WorkdirError) as error:
        sys.exit(f"error: {error}")
    print(page)


if __name__ == "__main__":
    main()
