"""The range that accumulators of integer sums need, and operands that take them to both of its ends.

An accumulator begins with its output's constant, or with 0, and every term adds something or takes it off, in
whatever order. With given weights, whatever the inputs, it stays between two ends. Images come nowhere near
them, so a circuit with a bit too few passes vectors that images made; the operands here reach both.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from adderflax.analysis.integer_only_reference import IntegerOnly
from adderflax.analysis.integer_reference import ACCUMULATORS
from adderflax.analysis.integers import IntegerModel
from adderflax.analysis.ranges import Range
from adderflax.operators import adder_conv, adder_matmul


@dataclasses.dataclass(frozen=True)
class LayerSums:
    """The sums of a layer.

    Attributes:
      kernel: integers [in, out], or [h, w, in / groups, out] with a geometry.
      constant: integers [out], what each output begins with; or 0.
      adds: whether a sum is of -|input - kernel|, or of input * kernel.
      bits: of the inputs.
      geometry: of a convolution, the arguments of `adderflax.adder_conv`, padding in numbers.
    """

    kernel: np.ndarray
    constant: np.ndarray | int
    adds: bool
    bits: int
    geometry: Mapping[str, Any] | None

    def ends(self) -> Range:
        """The least and the greatest value of an accumulator."""
        sums = [self._sums(inputs) for inputs in self._inputs()]
        return Range(int(np.min(sums[0])), int(np.max(sums[1])))

    def operands(self) -> dict[str, np.ndarray]:
        """inputs int8 [2, in] or [2, H, W, in]: the first reaches the least sum, the second the greatest.

        A convolution's do so where its window lies wholly inside of the image, in each group of channels for
        the output of the group that goes farthest.
        """
        choose = np.argmin, np.argmax
        rows = [self._farthest(inputs, best) for inputs, best in zip(self._inputs(), choose)]
        return {"inputs": np.stack(rows).astype(np.int8)}

    def _inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """For each weight the input with which its term is least, and greatest, in the kernel's shape."""
        lowest, highest = Range.of(self.bits)
        kernel = self.kernel.astype(np.int64)
        if self.adds:
            return np.where(kernel - lowest >= highest - kernel, lowest, highest), kernel
        return np.where(kernel > 0, lowest, highest), np.where(kernel > 0, highest, lowest)

    def _sums(self, inputs: np.ndarray) -> np.ndarray:
        kernel = self.kernel.astype(np.int64)
        terms = -np.abs(inputs - kernel) if self.adds else inputs * kernel
        return terms.reshape(-1, terms.shape[-1]).sum(axis=0) + self.constant

    def _farthest(self, inputs: np.ndarray, best) -> np.ndarray:
        sums = self._sums(inputs)
        if self.geometry is None:
            return inputs[:, best(sums)]
        groups = self.geometry["feature_group_count"]
        chosen = best(sums.reshape(groups, -1), axis=1) + np.arange(groups) * (len(sums) // groups)
        window = inputs[..., chosen]  # [h, w, in / groups, groups]
        window = window.swapaxes(2, 3).reshape(*window.shape[:2], -1)
        (height, rows), (width, columns) = self._places()
        image = np.zeros((height, width, window.shape[-1]), np.int64)
        image[np.ix_(rows, columns)] = window
        return image

    def _places(self) -> Iterator[tuple[int, np.ndarray]]:
        """In height and width the size of an image, and the positions of a window that lies inside of it."""
        geometry = self.geometry
        parts = (geometry[name] for name in ("strides", "padding", "dilation"))
        for size, stride, (before, after), step in zip(self.kernel.shape, *parts):
            start = max(math.ceil(before / stride), 0) * stride - before
            positions = start + np.arange(size) * step
            # Negative padding crops.
            yield int(positions[-1]) + 1 + max(-after, 0), positions


@dataclasses.dataclass(frozen=True)
class Scores:
    """The similarities of queries and keys.

    Attributes:
      terms: features of a head.
      adds: whether a score is of -|query - key|, or of query * key.
      bits: of both.
    """

    terms: int
    adds: bool
    bits: int

    def ends(self) -> Range:
        """The least and the greatest value of an accumulator."""
        lowest, highest = Range.of(self.bits)
        if self.adds:
            return Range(-self.terms * (highest - lowest), 0)
        return Range(self.terms * lowest * highest, self.terms * lowest * lowest)

    def operands(self) -> dict[str, np.ndarray]:
        """queries int8 [1, 1, 1, d] and keys int8 [1, 2, 1, d], whose scores are the two ends."""
        lowest, highest = Range.of(self.bits)
        row = np.ones((1, 1, 1, self.terms), np.int8)
        return {"queries": lowest * row, "keys": np.concatenate([lowest * row, highest * row], axis=1)}


def accumulators(integers: IntegerModel) -> dict[str, LayerSums | Scores]:
    """Those of every operation by its name."""
    templates, constants = integers.templates(), integers.constants()
    return {
        name: Scores(operation.terms, True, integers.bits)
        if operation.kind == "similarity"
        else LayerSums(templates[name], constants.get(name, 0), True, integers.bits, operation.geometry)
        for name, operation in integers.operations.items()
    }


def integer_only_accumulators(
    described: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> dict[str, LayerSums | Scores]:
    """Those of every layer of an `IntegerOnly`, and of the scores of every attention, by its name."""
    model = described["model"]
    found: dict[str, LayerSums | Scores] = {
        name: LayerSums(
            arrays[f"{name}/kernel"],
            arrays.get(f"{name}/constant", 0),
            *(entry[part] for part in ("adds", "bits", "geometry")),
        )
        for name, entry in described["layers"].items()
    }
    depth = model["embed_dim"] // model["num_heads"]
    return found | {
        name: Scores(depth, model["similarity"] == "l1", entry["query_bits"])
        for name, entry in described["attentions"].items()
    }


def vectors(integers: IntegerModel) -> dict[str, np.ndarray]:
    """Operands that take the accumulators to their ends and the sums that they give, without constants.

    They are named as those of `IntegerModel.vectors`, with `ACCUMULATORS` before.
    """
    found, templates = {}, integers.templates()
    for name, accumulator in accumulators(integers).items():
        operands, operation = accumulator.operands(), integers.operations[name]
        if operation.kind == "similarity":
            query, key = (jnp.asarray(operands[part]) for part in ("queries", "keys"))
            sums = adder_matmul(query.transpose(0, 2, 1, 3), key.transpose(0, 2, 3, 1))
        elif operation.kind == "dense":
            sums = adder_matmul(operands["inputs"], templates[name])
        else:
            sums = adder_conv(operands["inputs"], templates[name], **operation.geometry)
        found |= _named(name, operands | {"sums": np.asarray(sums)})
    return found


def integer_only_vectors(whole: IntegerOnly) -> dict[str, np.ndarray]:
    """The same of a model without floats: its layers' sums with their constants, and its scores."""
    operands: dict[str, np.ndarray] = {}
    for name, accumulator in integer_only_accumulators(whole.described, whole.arrays).items():
        operands |= _named(name, accumulator.operands())
    return operands | whole.trace_accumulators(operands)


def _named(operation: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of an operation by the names that they have in the files of an export."""
    return {f"{ACCUMULATORS}{operation}/{part}": array for part, array in arrays.items()}


def told(accumulator: LayerSums | Scores) -> dict[str, int]:
    """What the files of an export say of it: its ends, and the bits of a two's complement that holds both."""
    ends = accumulator.ends()
    return {
        "accumulator_lowest": ends.low,
        "accumulator_highest": ends.high,
        "accumulator_bits": ends.bits,
    }
