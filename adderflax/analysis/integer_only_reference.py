"""An exported Vision Transformer in whole numbers from its pixels to its logits, with NumPy alone.

    python integer_only.py [DIRECTORY]

`python -m adderflax.export --integer_only` puts this file into the directory that it writes, as
integer_only.py, beside reference.py, from which it takes the sums: it says in code what integer_only.md
there says in words. No value is a float, so every machine computes the same bits. The command computes the
recorded inputs again and compares each recorded value, down to the logits.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if __package__:
    from adderflax.analysis.integer_reference import ACCUMULATORS, command, convolution, distances
else:  # in an export, beside its other reference
    from reference import ACCUMULATORS, command, convolution, distances

WIDE = 16  # bits of what lies between operations
TABLE = 11  # bits of what a table is entered with
LARGEST = 15  # bits, without the sign, of a normalized row's largest value
ROOT = 16  # binary places of a value divided by the root of a row's sum of squares
SOFTMAX = 8  # binary places of an exponent of 2
ONE = 15  # log2 of the exponential of 0
SHARE = 15  # bits, without the first, of a reciprocal of a row's sum of exponentials
ATTENDED = 8  # further binary places of what attention gives
LIMITS = "limits/"  # before the names of what is recorded of inputs that no image gives
PLACES = 5  # binary places below a table's unit of what is looked up for the record


class Fixed(NamedTuple):
    """Real values `integers * 2^exponent`, the integers int64."""

    integers: np.ndarray
    exponent: int


class IntegerOnly:
    """The model of integer_only.json and integer_only.npz.

    Attributes:
      described: integer_only.json.
      arrays: integer_only.npz.
    """

    def __init__(
        self,
        described: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        distances: Callable[[np.ndarray, np.ndarray], np.ndarray] = distances,
        matmul: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.matmul,
    ):
        """Takes a description and its arrays, and how to compute sums of whole numbers.

        Args:
          described: integer_only.json.
          arrays: integer_only.npz.
          distances: [..., M, K], [..., K, N] -> [..., M, N], the exact -sum_k |x - y| of integers.
          matmul: likewise the exact sum_k x y.
        """
        self.described, self.arrays = described, arrays
        # A float would be refused.
        self._arrays = {name: array.astype(np.int64, casting="same_kind") for name, array in arrays.items()}
        self._distances, self._matmul = distances, matmul
        self._record: Callable[[str, np.ndarray], None] = _forget

    def trace(self, images_BxHxWxC: np.ndarray) -> dict[str, np.ndarray]:
        """The integers, int32, that every step gives, by the names of integer_only.md; images as `logits`."""
        return self._traced(lambda: self.logits(images_BxHxWxC))

    def trace_limits(
        self, tokens: np.ndarray, falls: np.ndarray, entered: np.ndarray
    ) -> dict[str, np.ndarray]:
        """What integer_only.md records of inputs that no image gives, with `LIMITS` before each name.

        Args:
          tokens: streams [B, T, D] in place of `embedded`.
          falls: [n], of scores below the largest, for the softmax of block 0.
          entered: [n], values for the GELU's table of block 0, `PLACES` binary places below its unit.
        """
        stream = Fixed(np.int64(tokens), self.described["stream"]["exponent"])
        found = self._traced(lambda: self._classified(stream))
        shift, gelu = self.described["attentions"]["block_0/attention"]["shift"], "block_0/mlp/gelu"
        x = Fixed(np.int64(entered), self.described["tables"][gelu]["input"] - PLACES)
        found["exponentials"] = two_to_the(np.int64(falls), shift, self._arrays["exponentials"])
        found["looked_up"] = self._looked_up(x, gelu).integers
        return {LIMITS + name: np.int32(integers) for name, integers in found.items()}

    def trace_accumulators(self, operands: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The sums of layers and the scores of attentions for operands of their own, int32.

        Args:
          operands: by the names "NAME/inputs", or "NAME/queries" and "NAME/keys", with `ACCUMULATORS` before.

        Returns:
          "NAME/sums" or "NAME/scores", with `ACCUMULATORS` before.
        """
        found = {}
        for name, integers in operands.items():
            layer, _, part = name.rpartition("/")
            if part == "inputs":
                found[f"{layer}/sums"] = self._sums(np.int64(integers), layer.removeprefix(ACCUMULATORS))
            elif part == "queries":
                found[f"{layer}/scores"] = self._scores(
                    *(np.int64(operands[f"{layer}/{part}"]) for part in ("queries", "keys"))
                )
        return {name: np.int32(integers) for name, integers in found.items()}

    def _traced(self, run: Callable[[], Any]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        self._record = lambda name, integers: found.update(
            {name: integers.astype(np.int32, casting="same_kind")}
        )
        try:
            run()
        finally:
            self._record = _forget
        return found

    def logits(self, images_BxHxWxC: np.ndarray) -> Fixed:
        """The logits [B, num_classes] of uint8 pixels [B, image_size, image_size, channels].

        Raises:
          ValueError: the images have another dtype or shape.
        """
        model, images = self.described["model"], images_BxHxWxC
        expected = (model["image_size"], model["image_size"], model["channels"])
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}, but this model takes uint8 pixels"
                f" [batch, {', '.join(map(str, expected))}]: resize them, and do not normalize them."
            )
        tokens = self._embedded(self._pixels(images))
        if model["pooling"] == "token":
            token = np.broadcast_to(self._arrays["class_token"], (len(images), 1, tokens.integers.shape[2]))
            tokens = tokens._replace(integers=np.concatenate([token, tokens.integers], axis=1))
        positions = Fixed(self._arrays["position_embedding"], tokens.exponent)
        return self._classified(self._stream("embedded", tokens, positions))

    def _classified(self, x: Fixed) -> Fixed:
        """The logits of a stream [B, T, D]."""
        model = self.described["model"]
        for index in range(model["depth"]):
            block = f"block_{index}"
            h = self._attention(self._norm(x, f"{block}/attention_norm"), f"{block}/attention")
            x = self._stream(f"{block}/attended", x, h)
            h = self._mlp(self._norm(x, f"{block}/mlp_norm"), f"{block}/mlp")
            x = self._stream(block, x, h)
        if model["pooling"] == "token":
            x = x._replace(integers=x.integers[:, 0])
        x = self._norm(x, "norm")
        if model["pooling"] == "mean":
            total, T = x.integers.sum(axis=1), x.integers.shape[1]
            x = x._replace(integers=(total + T // 2) // T)
        return self._layer(x, "head")

    def _pixels(self, images: np.ndarray) -> Fixed:
        table_Cx256, entry = self._arrays["pixels"], self.described["pixels"]
        return Fixed(table_Cx256[np.arange(len(table_Cx256)), images], entry["exponent"])

    def _embedded(self, x: Fixed) -> Fixed:
        """Tokens in units of the stream, patches in reading order."""
        model = self.described["model"]
        side = model["patch_size"]
        if model["stem"] == "conv":
            for index in range(side.bit_length() - 1):
                x = self._looked_up(self._layer(x, f"stem_{index}"), f"stem_{index}/gelu")
            side = 1
        B, H, W, C = x.integers.shape
        cut = x.integers.reshape(B, H // side, side, W // side, side, C).transpose(0, 1, 3, 2, 4, 5)
        patches = x._replace(integers=cut.reshape(B, -1, side * side * C))
        return rescaled(self._layer(patches, "patch_embedding"), self.described["stream"]["exponent"])

    def _attention(self, x: Fixed, name: str) -> Fixed:
        model, entry, (B, T, D) = (
            self.described["model"],
            self.described["attentions"][name],
            x.integers.shape,
        )
        heads = (B, T, model["num_heads"], D // model["num_heads"])
        query, key, value = (
            rescaled(self._layer(x, f"{name}/{part}"), entry[part], entry[f"{part}_bits"])
            for part in ("query", "key", "value")
        )
        query, key, value = (part.integers.reshape(heads) for part in (query, key, value))
        for part, integers in (("queries", query), ("keys", key), ("values", value)):
            self._record(f"{name}/{part}", integers)
        scores, value_BxHxTxd = self._scores(query, key), value.transpose(0, 2, 1, 3)
        self._record(f"{name}/scores", scores)
        falls = (scores.max(axis=-1, keepdims=True) - scores) * entry["multiplier"]
        exponentials = two_to_the(falls, entry["shift"], self._arrays["exponentials"])
        self._record(f"{name}/exponentials", exponentials)
        total = exponentials.sum(axis=-1, keepdims=True)
        places = bit_length(total)
        share = (1 << SHARE + places) // total  # the reciprocal, times 2^(SHARE + places)
        unit, identity = entry["value"], np.eye(T, dtype=np.int64) * model["identity"]
        if model["aggregation"] == "dot":
            sums = shifted(self._matmul(exponentials, value_BxHxTxd), places - ATTENDED)
            attended = shifted(sums * share, SHARE) + (value_BxHxTxd << ATTENDED) * model["identity"]
            unit -= ATTENDED
        else:
            weights = shifted(exponentials * share, SHARE + places + unit) + shifted(identity, unit)
            attended = self._distances(weights, value_BxHxTxd)
            attended = attended + np.abs(value_BxHxTxd).sum(axis=2, keepdims=True)
        self._record(f"{name}/heads", attended)
        return self._layer(Fixed(attended.transpose(0, 2, 1, 3).reshape(B, T, D), unit), f"{name}/out")

    def _mlp(self, x: Fixed, name: str) -> Fixed:
        x = self._layer(x, f"{name}/fc1")
        if self.described["model"]["mlp_kernel_size"] is not None:
            B, T, F = x.integers.shape
            image = x._replace(integers=x.integers.reshape(B, math.isqrt(T), -1, F))
            neighbors = self._layer(image, f"{name}/conv")
            x = added(x, neighbors._replace(integers=neighbors.integers.reshape(B, T, F)))
        return self._layer(self._looked_up(x, f"{name}/gelu"), f"{name}/fc2")

    def _layer(self, x: Fixed, name: str) -> Fixed:
        """A linear layer with what belongs to it: bias or constant, normalization, power."""
        entry = self.described["layers"][name]
        inputs = rescaled(x, entry["input"], entry["bits"]).integers
        self._record(f"{name}/inputs", inputs)
        x = Fixed(self._sums(inputs, name), entry["sums"])
        self._record(f"{name}/sums", x.integers)
        if f"{name}/norm/gain" in self._arrays:
            x = self._norm(x, f"{name}/norm")
        elif entry["output"] is not None:
            x = rescaled(x, entry["output"])
        if f"{name}/power" in self._arrays:
            x = self._looked_up(x, f"{name}/power")
        self._record(name, x.integers)
        return x

    def _sums(self, inputs: np.ndarray, name: str) -> np.ndarray:
        """The sums of a layer, with its constant."""
        entry, kernel = self.described["layers"][name], self._arrays[f"{name}/kernel"]
        product = self._distances if entry["adds"] else self._matmul
        if entry["geometry"] is None:
            sums = product(inputs.reshape(-1, inputs.shape[-1]), kernel).reshape(*inputs.shape[:-1], -1)
        else:
            sums = convolution(inputs, kernel, product, **entry["geometry"])
        return sums + self._arrays.get(f"{name}/constant", 0)

    def _scores(self, query_BxTxHxd: np.ndarray, key_BxTxHxd: np.ndarray) -> np.ndarray:
        """[B, heads, queries, keys]."""
        product = self._distances if self.described["model"]["similarity"] == "l1" else self._matmul
        return product(query_BxTxHxd.transpose(0, 2, 1, 3), key_BxTxHxd.transpose(0, 2, 3, 1))

    def _norm(self, x: Fixed, name: str) -> Fixed:
        entry = self.described["norms"][name]
        gain, offset = (self._arrays[f"{name}/{part}"] for part in ("gain", "offset"))
        found = layer_norm(x.integers, gain, offset, entry["shift"], entry["epsilon"])
        self._record(name, found)
        return Fixed(found, entry["output"])

    def _looked_up(self, x: Fixed, name: str) -> Fixed:
        entry = self.described["tables"][name]
        place = rescaled(x, entry["input"], TABLE).integers + (1 << TABLE >> 1)
        return Fixed(self._arrays[name][place], entry["output"])

    def _stream(self, name: str, x: Fixed, update: Fixed) -> Fixed:
        sums = x.integers + rescaled(update, x.exponent).integers
        x = x._replace(integers=clipped(sums, WIDE))
        self._record(name, x.integers)
        return x


def shifted(integers: np.ndarray, places: int | np.ndarray) -> np.ndarray:
    """integers / 2^places, halves rounded up."""
    left, right = np.maximum(-np.int64(places), 0), np.maximum(np.int64(places), 0)
    return ((integers << left) + (np.int64(1) << right >> 1)) >> right


def clipped(integers: np.ndarray, bits: int) -> np.ndarray:
    """The nearest of the two's complement integers of so many bits."""
    return np.clip(integers, -(1 << bits - 1), (1 << bits - 1) - 1)


def rescaled(x: Fixed, exponent: int, bits: int = WIDE) -> Fixed:
    """The same values in another unit, rounded and clipped."""
    return Fixed(clipped(shifted(x.integers, exponent - x.exponent), bits), exponent)


def added(x: Fixed, y: Fixed) -> Fixed:
    """The sum, exact, in the finer of the two units."""
    unit = min(x.exponent, y.exponent)
    return Fixed((x.integers << x.exponent - unit) + (y.integers << y.exponent - unit), unit)


def layer_norm(x: np.ndarray, gain: np.ndarray, offset: np.ndarray, shift: int, epsilon: int) -> np.ndarray:
    """LayerNorm over the last axis, [..., n] -> [..., n], `WIDE` bits.

    Args:
      x: integers; their unit does not matter but for epsilon.
      gain: [n], the scale times sqrt(n) in units of the result, times 2^(shift - ROOT).
      offset: [n], the bias in units of the result.
      shift: binary places of the gain.
      epsilon: n^3 times that of the layer, in units of the square of x's.
    """
    n = x.shape[-1]
    centered = n * x - x.sum(axis=-1, keepdims=True)
    surplus = np.maximum(bit_length(np.abs(centered).max(axis=-1, keepdims=True)) - LARGEST, 0)
    centered = shifted(centered, surplus)
    squares = np.square(centered).sum(axis=-1, keepdims=True) + (np.int64(epsilon) >> 2 * surplus)
    squares = np.maximum(squares, 1)
    # Brought to 31 or 32 bits by an even number of places, its root has 16.
    places = (32 - bit_length(squares)) // 2
    root = square_root((squares << np.maximum(2 * places, 0)) >> np.maximum(-2 * places, 0))
    reciprocal = (1 << 31) // root
    normalized = shifted(centered * reciprocal, 31 - ROOT - places)
    return clipped(shifted(normalized * gain, shift) + offset, WIDE)


def two_to_the(falls: np.ndarray, shift: int, table: np.ndarray) -> np.ndarray:
    """2^(ONE - falls / 2^(shift + SOFTMAX)), falls being at least 0, from a table of 2^SOFTMAX entries."""
    exponents = shifted(falls, shift)
    return table[exponents & (1 << SOFTMAX) - 1] >> np.minimum(exponents >> SOFTMAX, ONE + 1)


def square_root(values: np.ndarray) -> np.ndarray:
    """The integer part of the root of integers below 2^32, bit by bit."""
    root = np.zeros_like(values)
    for bit in reversed(range(16)):
        tried = root + (1 << bit)
        root = np.where(tried * tried <= values, tried, root)
    return root


def bit_length(values: np.ndarray) -> np.ndarray:
    """Bits of integers of at least 0; none of 0."""
    length = np.zeros_like(values)
    for step in (32, 16, 8, 4, 2, 1):
        over = values >= np.int64(1) << step
        length, values = length + step * over, np.where(over, values >> step, values)
    return length + (values > 0)


def _forget(name: str, integers: np.ndarray) -> None:
    """Records nothing."""


def check(directory: Path) -> int:
    """Prints what agrees; 1 where something does not, or is not recorded."""
    described = json.loads((directory / "integer_only.json").read_text())
    arrays, vectors = (dict(np.load(directory / f"integer_only{n}.npz")) for n in ("", "_vectors"))
    model = IntegerOnly(described, arrays)
    limits = (vectors.pop(LIMITS + name) for name in ("tokens", "falls", "entered"))
    found = model.trace(vectors.pop("images")) | model.trace_limits(*limits)
    parts = ("/inputs", "/queries", "/keys")
    given = [name for name in vectors if name.startswith(ACCUMULATORS) and name.endswith(parts)]
    found |= model.trace_accumulators({name: vectors.pop(name) for name in given})
    for kind in ("layers", "attentions"):
        for name, entry in described[kind].items():
            sums = found[f"{ACCUMULATORS}{name}/{'sums' if kind == 'layers' else 'scores'}"]
            found[f"{ACCUMULATORS}{name}/ends"] = np.array([sums.min(), sums.max()])
            vectors[f"{ACCUMULATORS}{name}/ends"] = np.array(
                [entry["accumulator_lowest"], entry["accumulator_highest"]]
            )
    names = found.keys() | vectors.keys()
    wrong = sorted(name for name in names if not np.array_equal(found.get(name), vectors.get(name)))
    print(
        f"{len(names) - len(wrong)} of {len(names)} values are the recorded ones"
        + ", not ".join(["", *wrong])
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(command(check, __doc__))
