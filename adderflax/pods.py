"""Compiles ImageNet runs for TPU pods, on a machine without a TPU, and prints what they would take.

python -m adderflax.pods
python -m adderflax.pods --pod v5e-16 --config configs/imagenet_adder_deit_ti.py --config.batch_size=2048

Each row takes minutes of CPU time. Finished ones are kept as JSON lines beside the page: the same command
goes on where it stopped, and compiles again what has changed.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adderflax import pipes
from adderflax.analysis import pods
from adderflax.training.command_line import load_config, require_overrides
from adderflax.training.config import ConfigError

_CONFIGS = tuple(f"configs/imagenet_adder_deit_{size}.py" for size in ("ti", "s", "b"))


@pipes.reader_may_leave()
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments, overrides = _parse(argv)
    if reason := pods.missing_compiler():
        print(f"skipped: {reason}")
        return
    kept = arguments.output.with_suffix(".jsonl")
    rows = []
    try:
        known = _finished(kept)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        for file in arguments.config or _CONFIGS:
            for pod in arguments.pod or pods.PODS:
                row = _row(file, overrides, pod, known)
                if row not in known:
                    with kept.open("a") as lines:
                        lines.write(json.dumps(row) + "\n")
                rows.append(row | {"config": " ".join([Path(file).stem, *overrides])})
        page = pods.as_page(rows, " ".join(["python -m adderflax.pods", *argv]))
        arguments.output.write_text(page, encoding="utf-8")
    except (ConfigError, OSError, concurrent.futures.BrokenExecutor) as error:
        sys.exit(f"error: {error}")
    print(pods.as_table(rows))


def _finished(kept: Path) -> list[dict[str, Any]]:
    """The rows of earlier calls."""
    rows = []
    for number, line in enumerate(kept.read_text().splitlines() if kept.exists() else (), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(
                f"Line {number} of {kept} is no finished row, perhaps cut short by a full disk. Delete it;"
                " then the row is compiled again."
            ) from error
    return rows


def _row(file: str, overrides: list[str], pod: str, known: list[dict[str, Any]]) -> dict[str, Any]:
    config = load_config(file, overrides)
    print(f"{file} for {pod} ...", file=sys.stderr, flush=True)
    # Every compilation in a process of its own, so that its memory is given back and a crash says which.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(pods.compile_update, config, pod, known).result()


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m adderflax.pods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="configuration file, as train.py takes it; may be repeated; default: the three DeiT sizes on"
        " ImageNet. --config.a.b=value changes a field of all; no data set is opened",
    )
    parser.add_argument(
        "--pod",
        action="append",
        choices=(*pods.PODS, *pods.SMALLEST),
        help=f"may be repeated; default: {', '.join(pods.PODS)}",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results/pods.md"), help="the page (default results/pods.md)"
    )
    arguments, overrides = parser.parse_known_args(argv)
    require_overrides(parser, overrides)
    return arguments, overrides


if __name__ == "__main__":
    main()
