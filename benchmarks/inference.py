"""Images a second of a trained adder model, in float32 and in int8, beside its multiplying twin.

    python -m benchmarks.inference weights/cifar10_adder_vit weights/cifar10_twin
    python -m benchmarks.inference runs/digits_adder_vit runs/twin --batches 1,256 --json

Everything is float32 but for the sums of adder layers, which "int8" sums in integers, by the kernels of
implementation="cpu" (`IntegerModel.apply`). Images and calibration are random: speed does not depend on them.
Times are medians of runs that alternate in one process.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from adderflax import pipes
from adderflax.analysis.integers import in_float32, quantize
from adderflax.data import DatasetInfo
from adderflax.operators._dispatch import unavailable
from adderflax.training.config import ConfigError
from adderflax.training.restore import load_model
from adderflax.training.workdir import WorkdirError
from benchmarks.timing import alternate, machine

_CALIBRATION = 64
_KERNELS = "cpu"


def contenders(adder: Path, twin: Path) -> tuple[dict[str, Callable[[jax.Array], jax.Array]], DatasetInfo]:
    """Compiled functions of normalized images, by name, and the description of these images.

    Raises:
      ValueError: the two take different images, or the CPU's kernels cannot be built.
    """
    (model, variables, info), (other, other_variables, other_info) = map(load_model, (adder, twin))
    if (info.image_size, info.channels) != (other_info.image_size, other_info.channels):
        raise ValueError(f"{adder} and {twin} take images of different sizes: they are no twins.")
    if reason := unavailable(_KERNELS):
        raise ValueError(f"The kernels for int8 are not to be had here: {reason}.")
    other = in_float32(other)
    model, by_kernels = (
        in_float32(model.clone(config=dataclasses.replace(model.config, implementation=implementation)))
        for implementation in (None, _KERNELS)
    )
    integers = quantize(model, variables, random_images(info, _CALIBRATION))
    functions = {
        "twin, float32": functools.partial(other.apply, other_variables),
        "adder, float32": functools.partial(model.apply, variables),
        "adder, float32, kernels": functools.partial(by_kernels.apply, variables),
        "adder, int8, kernels": functools.partial(integers.apply, implementation=_KERNELS),
    }
    return {name: jax.jit(function) for name, function in functions.items()}, info


def random_images(info: DatasetInfo, count: int) -> jax.Array:
    """Normalized images [count, H, W, C]."""
    shape = (count, info.image_size, info.image_size, info.channels)
    return jax.random.normal(jax.random.key(0), shape)


def measure(adder: Path, twin: Path, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """A record for each batch and contender."""
    functions, info = contenders(adder, twin)
    records = []
    for batch in batches:
        images = random_images(info, batch)
        calls = {name: functools.partial(function, images) for name, function in functions.items()}
        for name, seconds in alternate(calls).items():
            records.append({"batch": batch, "contender": name, "images_per_second": batch / seconds})
    return records


@pipes.reader_may_leave()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("adder", type=Path, help="workdir of a trained adder model")
    parser.add_argument("twin", type=Path, help="workdir of a model that multiplies, of the same image size")
    parser.add_argument("--batches", default="1,64", help="images at once, separated by commas")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        batches = tuple(int(batch) for batch in options.batches.split(","))
        if min(batches) < 1:
            raise ValueError
    except ValueError:
        parser.error(f"--batches: {options.batches!r} is not a list of positive numbers such as 1,64.")
    try:
        records = measure(options.adder, options.twin, batches)
    except (ConfigError, OSError, ValueError, WorkdirError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        command = "python -m benchmarks.inference " + " ".join(arguments or sys.argv[1:])
        print(json.dumps({"machine": machine(), "command": command, "records": records}, indent=1))
        return 0
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine().items()))
    for batch in batches:
        found = {r["contender"]: r["images_per_second"] for r in records if r["batch"] == batch}
        print(f"\n{batch} images at once")
        for name, rate in found.items():
            print(f"{name:26s} {rate:9.1f} images/s {rate / found['twin, float32']:6.2f} x the twin")
    return 0


if __name__ == "__main__":
    sys.exit(main())
