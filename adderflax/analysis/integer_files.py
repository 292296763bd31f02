"""The directory of an integer model: files that hardware and simulators read without this library.

    README.md        what the other files hold, and every step between the integer sums (integer_format.md)
    reference.py     the model in NumPy alone, which checks itself (integer_reference.py)
    integers.json    bits, limits, the model's description, and each operation in the order in which it runs
    integers.npz     params/NAME/adder_kernel int8, constants/NAME int32 where the layer is centered, all
                     other variables float32 under the names of weights.npz
    vectors.npz      images uint8, logits float32, and what goes into and comes out of every operation
                     (`IntegerModel.vectors`), also of operands that take its accumulators to their ends
    config.json, dataset.json    of the run: the model and the images it is for

A value is its integer times 2^exponent of its operation. With `integer_only`, besides:

    integer_only.md              what the following hold, and every step, none of them in floats
    integer_only.py              the model in NumPy alone, which checks itself (integer_only_reference.py)
    integer_only.json            the model's description, and units of all values
    integer_only.npz             all weights and tables, in integers
    integer_only_vectors.npz     inputs, and what every step gives for them

With `hexadecimal`, besides, hex/ARCHIVE/NAME.hex of every array of these archives, for Verilog's $readmemh.
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from adderflax.analysis import accumulators
from adderflax.analysis.integer_only import (
    INTEGER_ONLY_FORMAT,
    at_the_limits,
    computing_fast,
    integer_only_model,
)
from adderflax.analysis.integer_only_reference import LIMITS, IntegerOnly
from adderflax.analysis.integers import BITS, IntegerModel, IntegerOperation, in_float32, quantize
from adderflax.data import DatasetInfo, evaluation_batches, load_dataset, normalize_batch
from adderflax.encoder_config import EncoderConfig
from adderflax.models.families import build_model
from adderflax.training import environment
from adderflax.training.config import RunConfig
from adderflax.training.restore import (
    config_here,
    data_from,
    load_step,
    unflatten_variables,
)
from adderflax.training.workdir import (
    INTEGERS,
    WorkdirError,
    leaving_nothing_empty,
    read_config,
    read_info,
)

_INTEGERS, _VECTORS = "integers.npz", "vectors.npz"
_INTEGER_ONLY = "integer_only"
_CALIBRATION = 256  # images, where a set has as many
_FORMAT = 2  # 1: an L1 aggregation was -sum |weights - values|
_EVALUATED_AT_ONCE = 100
_HEXADECIMAL = "hex"
# What reading a damaged file of ours ends with.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, ArithmeticError, EOFError, zipfile.BadZipFile)


def export_workdir(
    workdir: str | Path,
    directory: str | Path,
    *,
    bits: int = 8,
    calibration: int | None = None,
    vectors: int = 2,
    evaluate: bool = False,
    integer_only: bool = False,
    hexadecimal: bool = False,
    best: bool = False,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Writes a trained run as an integer model.

    Args:
      workdir: the run's directory.
      directory: where to write; it must not hold anything yet.
      bits: of inputs and templates, 2 to 8.
      calibration: how many training images choose the grids; None takes 256, or all where there are fewer.
      vectors: how many test images are traced into vectors.npz.
      evaluate: also classify the whole test part, with integers and without.
      integer_only: also write the model without a float anywhere; it must be a Vision Transformer.
      hexadecimal: also write every array as text, a number a line, which Verilog's $readmemh reads.
      best: take the checkpoint with the best validation accuracy instead of the newest.
      data_dir: where prepared data sets are on this machine; None looks where the run's configuration says.

    Returns:
      What integers.json holds.

    Raises:
      ValueError: an argument is not allowed, the directory is not empty, or the model adds nowhere and is
        not written with `integer_only`.
      WorkdirError: the workdir holds no trained run, or the directory cannot be written.
      adderflax.data.DatasetNotReadyError: the data set is not there.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not an empty directory; choose another to write to.")
    model, variables, info, step = load_step(workdir, best=best)
    data = RunConfig.parse(data_from(read_config(workdir), data_dir)).data
    dataset = load_dataset(data)
    if calibration is None:
        calibration = min(_CALIBRATION, len(dataset.train))
    for name, count, part in (("calibration", calibration, "train"), ("vectors", vectors, "test")):
        if not 1 <= count <= len(dataset.part(part)):
            raise ValueError(
                f"{name}={count} images cannot be taken from the {part} part of {info.name}, which has"
                f" {len(dataset.part(part))}: choose a number from 1 to that."
            )

    def first_images(part: str, count: int) -> np.ndarray:
        return next(evaluation_batches(dataset, part, data, batch_size=count))["image"]

    def accuracies(integers: IntegerModel, whole: IntegerOnly | None) -> dict[str, Any]:
        functions = {"float": _jitted(lambda images: in_float32(model).apply(variables, images), info)}
        if integers.operations:
            functions["integer"] = _jitted(integers.apply, info)
        if whole is not None:
            functions["integer_only"] = lambda pixels: whole.logits(pixels).integers
        figures = {}
        for name, function in functions.items():
            batches = evaluation_batches(dataset, "test", data, batch_size=_EVALUATED_AT_ONCE)
            figures[f"test_accuracy_{name}"] = _accuracy(function, batches)
        return figures | {"test_examples": len(dataset.test)}

    with _all_or_nothing(directory) as written:
        images = first_images("train", calibration)
        integers = quantize(model, variables, normalize_batch(images, info), bits=bits)
        if not (integers.operations or integer_only):
            raise ValueError(
                "The model has no adder layer and no L1 similarity, so it has no integers to export. Choose a"
                " model whose arithmetic adds, or for a VisionTransformer integer_only, which rounds what"
                " multiplies too."
            )
        if not integers.operations and bits != 8:
            raise ValueError(
                f"bits={bits} is that of adder layers and L1 similarities, and the model has none: what"
                " multiplies does so with 8. Leave bits out."
            )
        whole = integer_only_model(integers, images, info) if integer_only else None
        here = environment.describe()
        figures = {"integer_only": integer_only, "step": step}
        figures |= {"calibration_images": calibration} | {
            name: here[name] for name in ("adderflax", "commit")
        }
        figures |= accuracies(integers, whole) if evaluate else {}
        with _telling_of(directory):
            for name in ("config.json", "dataset.json"):
                shutil.copyfile(Path(workdir) / name, written / name)
            traced = first_images("test", vectors)
            if whole is not None:
                write_integer_only(written, whole, traced)
            description = write_integers(written, integers, traced, info, figures)
            if hexadecimal:
                write_hexadecimal(written)
            return description


def write_integers(
    directory: Path,
    integers: IntegerModel,
    images: np.ndarray,
    info: DatasetInfo,
    figures: Mapping[str, Any] = types.MappingProxyType({}),
) -> dict[str, Any]:
    """Writes all files but config.json and dataset.json.

    Args:
      directory: where to.
      integers: the model.
      images: uint8 [B, H, W, C] that are traced.
      info: the data set that they are from.
      figures: what integers.json says besides.

    Returns:
      What integers.json holds.
    """
    normalized = normalize_batch(images, info)
    found = {"images": images, "logits": np.asarray(integers.apply(normalized))}
    np.savez_compressed(directory / _INTEGERS, **_arrays(integers))
    found |= integers.vectors(normalized) | accumulators.vectors(integers)
    np.savez_compressed(directory / _VECTORS, **found)
    for source, name in (("integer_format.md", "README.md"), ("integer_reference.py", "reference.py")):
        shutil.copyfile(Path(__file__).with_name(source), directory / name)
    description = _described(integers) | figures
    (directory / INTEGERS).write_text(json.dumps(description, indent=1) + "\n")
    return description


def write_integer_only(directory: Path, whole: IntegerOnly, images: np.ndarray) -> None:
    """Writes the files of a model without floats.

    Args:
      directory: where to.
      whole: the model.
      images: uint8 [B, H, W, C] that are traced.
    """
    np.savez_compressed(directory / f"{_INTEGER_ONLY}.npz", **whole.arrays)
    limits = at_the_limits(whole)
    vectors = {"images": images} | {LIMITS + name: inputs for name, inputs in limits.items()}
    vectors |= whole.trace(images) | whole.trace_limits(**limits) | accumulators.integer_only_vectors(whole)
    np.savez_compressed(directory / f"{_INTEGER_ONLY}_vectors.npz", **vectors)
    for source, kind in (("integer_only_format.md", "md"), ("integer_only_reference.py", "py")):
        shutil.copyfile(Path(__file__).with_name(source), directory / f"{_INTEGER_ONLY}.{kind}")
    (directory / f"{_INTEGER_ONLY}.json").write_text(json.dumps(whole.described, indent=1) + "\n")


def write_hexadecimal(directory: Path) -> None:
    """Writes every array of the archives in `directory` as text, for memories of simulated hardware.

    hex/ARCHIVE/NAME.hex has a comment with dtype and shape, then a number a line, in C order. Integers are
    two's complement, floats their bits, in two digits a byte of the dtype.
    """
    for archive in sorted(directory.glob("*.npz")):
        with np.load(archive) as arrays:
            for name, array in arrays.items():
                path = directory / _HEXADECIMAL / archive.stem / f"{name}.hex"
                path.parent.mkdir(parents=True, exist_ok=True)
                digits = array.astype(array.dtype.newbyteorder(">")).tobytes().hex("\n", array.itemsize)
                path.write_text(f"// {array.dtype} {' '.join(map(str, array.shape))}\n{digits}\n")


def _described(integers: IntegerModel) -> dict[str, Any]:
    operations = [
        {"name": name, **dataclasses.asdict(integers.operations[name]), **accumulators.told(accumulator)}
        for name, accumulator in accumulators.accumulators(integers).items()
    ]
    half = 2 ** (integers.bits - 1)
    described = {
        "format": _FORMAT,
        "bits": integers.bits,
        "rounding": "half to even",
        "operands": {"lowest": -half, "highest": half - 1},
        "model": _resolved(integers.model.config),
        "operations": operations,
    }
    return json.loads(json.dumps(described))  # tuples become lists, as the file has them


@contextlib.contextmanager
def _all_or_nothing(directory: Path) -> Iterator[Path]:
    """Gives a directory to write whose files are those of `directory` in the end, or leaves nothing."""
    with leaving_nothing_empty(directory):
        with _telling_of(directory):
            directory.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix=".export-", dir=directory)
        with scratch:
            yield (written := Path(scratch.name))
            with _telling_of(directory):
                # The one that says what the others are comes last.
                for file in sorted(written.iterdir(), key=lambda file: file.name == INTEGERS):
                    file.rename(directory / file.name)


@contextlib.contextmanager
def _telling_of(directory: Path) -> Iterator[None]:
    """Turns what a file system refuses into a WorkdirError with the directory's name."""
    try:
        yield
    except OSError as error:
        raise WorkdirError(
            f"{directory} cannot be written: {error.strerror or error}. Mend that, or choose another"
            " directory."
        ) from error


def load_integers(directory: str | Path) -> tuple[IntegerModel, DatasetInfo]:
    """Loads what `export_workdir` has written.

    Raises:
      WorkdirError: a file is missing or damaged, or they do not belong to each other.
    """
    directory = Path(directory)
    run, info = RunConfig.parse(config_here(directory)), read_info(directory)
    model = in_float32(build_model(run.model_config(info)))
    try:
        description = json.loads((directory / INTEGERS).read_text())
        if description["format"] not in (1, _FORMAT):
            raise ValueError(f"its format is {description['format']}, and this version reads 1 and {_FORMAT}")
        if description["format"] == 1 and description["model"].get("aggregation") == "l1":
            raise ValueError("its L1 aggregation is that of an earlier version")
        if (bits := description["bits"]) not in BITS:
            raise ValueError(f"bits={bits!r} is not one of {', '.join(map(str, BITS))}")
        with np.load(directory / _INTEGERS) as archive:
            arrays = {name: archive[name] for name in archive.files if not name.startswith("constants/")}
        names = [field.name for field in dataclasses.fields(IntegerOperation)]
        operations = {
            entry["name"]: IntegerOperation(**{name: entry[name] for name in names})
            for entry in description["operations"]
        }
        listed = {name for name, operation in operations.items() if operation.kind != "similarity"}
        kernels = {f"params/{name}/adder_kernel" for name in listed}
        if wrong := kernels ^ {name for name in arrays if name.endswith("/adder_kernel")}:
            raise ValueError(f"{', '.join(sorted(wrong))} are in one of its two files of integers only")
        for name in listed:
            kernel = arrays[f"params/{name}/adder_kernel"]
            arrays[f"params/{name}/adder_kernel"] = kernel * np.float32(2.0 ** operations[name].exponent)
        arrays = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    except _DAMAGE as error:
        raise WorkdirError(
            f"{directory} cannot be read as an integer model: {error!r}. Export the run again."
        ) from error
    variables = unflatten_variables(arrays, model, directory / _INTEGERS)
    return IntegerModel(model, variables, bits, operations), info


def load_integer_only(directory: str | Path) -> tuple[IntegerOnly, DatasetInfo]:
    """Loads the model without floats that `export_workdir` has written with `integer_only`.

    Raises:
      WorkdirError: a file is missing or damaged.
    """
    directory = Path(directory)
    info = read_info(directory)
    try:
        described = json.loads((directory / f"{_INTEGER_ONLY}.json").read_text())
        if (found := described["format"]) != INTEGER_ONLY_FORMAT:
            raise ValueError(f"its format is {found}, and this version reads {INTEGER_ONLY_FORMAT}")
        with np.load(directory / f"{_INTEGER_ONLY}.npz") as archive:
            arrays = dict(archive)
        needed = {"pixels", "exponentials", "position_embedding", *described["tables"]}
        needed |= {f"{name}/kernel" for name in described["layers"]}
        needed |= {f"{name}/{part}" for name in described["norms"] for part in ("gain", "offset")}
        if missing := sorted(needed - arrays.keys()):
            raise ValueError(f"{', '.join(missing)} are not in {_INTEGER_ONLY}.npz")
        _require_own_description(described, arrays, info)
        return computing_fast(described, arrays), info
    except _DAMAGE as error:
        raise WorkdirError(
            f"{directory} cannot be read as a model without floats: {error!r}. Export the run again, with"
            " --integer_only."
        ) from error


def _require_own_description(
    described: Mapping[str, Any], arrays: Mapping[str, np.ndarray], info: DatasetInfo
) -> None:
    """Refuses a description that is not of these arrays, as far as accumulators and images tell."""
    for field in ("image_size", "channels", "num_classes"):
        if (found := described["model"][field]) != (own := getattr(info, field)):
            raise ValueError(f"model.{field} is {found!r}, and {own} in dataset.json")
    entries = described["layers"] | described["attentions"]
    for name, accumulator in accumulators.integer_only_accumulators(described, arrays).items():
        for field, own in accumulators.told(accumulator).items():
            # An earlier version did not tell them.
            if (found := entries[name].get(field, own)) != own:
                raise ValueError(f"{field} of {name} is {found!r}, and {own} by its weights and bits")


def _resolved(config: Any) -> dict[str, Any]:
    """A model's description with what its unset fields stand for."""
    return dataclasses.asdict(config.resolved() if isinstance(config, EncoderConfig) else config)


def _arrays(integers: IntegerModel) -> dict[str, np.ndarray]:
    flat = traverse_util.flatten_dict(integers.variables, sep="/")
    arrays = {name: np.asarray(array, np.float32) for name, array in flat.items()}
    arrays |= {f"params/{name}/adder_kernel": array for name, array in integers.templates().items()}
    return arrays | {f"constants/{name}": array for name, array in integers.constants().items()}


def _jitted(function: Callable, info: DatasetInfo) -> Callable[[np.ndarray], np.ndarray]:
    """The function of normalized images as one of pixels."""
    jitted = jax.jit(lambda pixels: function(normalize_batch(pixels, info)))
    return lambda pixels: np.asarray(jitted(pixels))


def _accuracy(logits: Callable[[np.ndarray], np.ndarray], batches: Iterator[Mapping]) -> float:
    """Share of images, 0 to 1, whose label has the largest logit."""
    correct = total = 0.0
    for batch in batches:
        predicted = logits(batch["image"]).argmax(axis=-1)
        correct += float(np.sum((predicted == batch["label"]) * batch["weight"]))
        total += float(np.sum(batch["weight"]))
    return correct / total
