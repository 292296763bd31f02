"""An exported model computed with NumPy alone, held against the test vectors beside it.

    python reference.py [DIRECTORY]

`python -m adderflax.export` puts this file into every directory that it writes, as reference.py: it says in
code what README.md there says in words, and imports nothing of adderflax. The command computes the sums of
every operation from the integers recorded in vectors.npz and compares all of them; then, for a Vision
Transformer, the logits: once with each operation's recorded integers in place of the computed ones, which
are held against them, and once without. Values between the operations are equal up to float32 rounding, so
that a computed integer may lie beside the recorded one, where its value lies between the two.
"""

import argparse
import json
import math
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ACCUMULATORS = "accumulators/"  # before the names of operands that take accumulators to their ends
_ROWS_AT_ONCE = 64  # of a product: bounds the memory of its differences
# float32 rounding moves logits by some 1e-6 of them, and a few in a million of the integers, each by one.
_LOGIT_TOLERANCE = 1e-3
_MOST_MOVED = 1e-2


class Export:
    """A directory of `python -m adderflax.export`.

    Attributes:
      described: integers.json.
      arrays: integers.npz.
      vectors: vectors.npz.
      operations: the entries of integers.json by their names.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        self.described = json.loads((directory / "integers.json").read_text())
        self.operations = {entry["name"]: entry for entry in self.described["operations"]}
        self.arrays, self.vectors = (dict(np.load(directory / f"{n}.npz")) for n in ("integers", "vectors"))
        images = json.loads((directory / "dataset.json").read_text())
        self._mean, self._deviation = (np.float32(images[name]) for name in ("mean", "std"))

    def quantized(self, values: np.ndarray, name: str) -> np.ndarray:
        """The integers, int64, of an operation's float32 operands, in their shape."""
        limits, unit = self.described["operands"], np.float32(2.0 ** self.operations[name]["exponent"])
        rounded = np.rint(np.float32(values) / unit)  # np.rint takes halves to even
        return np.clip(rounded, limits["lowest"], limits["highest"]).astype(np.int64)

    def sums(self, name: str, *operands: np.ndarray) -> np.ndarray:
        """The integer sums of an operation, int64, without the constant.

        Args:
          name: of the operation.
          *operands: integers: inputs [B, ..., in] or [B, H, W, in], or queries and keys [B, T, heads, d].

        Returns:
          [B, ..., out], [B, H', W', out] or [B, heads, T, T].
        """
        kind = self.operations[name]["kind"]
        if kind == "similarity":
            query_BxHxTxd, key_BxHxTxd = (x.astype(np.int64).transpose(0, 2, 1, 3) for x in operands)
            return distances(query_BxHxTxd, key_BxHxTxd.swapaxes(2, 3))
        inputs, templates = operands[0].astype(np.int64), self.arrays[f"params/{name}/adder_kernel"]
        if kind == "dense":
            sums = distances(inputs.reshape(-1, inputs.shape[-1]), templates.astype(np.int64))
            return sums.reshape(*inputs.shape[:-1], -1)
        return convolution(inputs, templates.astype(np.int64), distances, **self.operations[name]["geometry"])

    def wrong_operations(self) -> list[str]:
        """Names of the operations whose recorded sums are not those of their recorded operands.

        Or whose accumulators leave the range that is told of them, or do not reach its ends where meant to.
        """
        return [name for name in self.operations if not self._agrees(name)]

    def _agrees(self, name: str) -> bool:
        entry = self.operations[name]
        parts = ("queries", "keys") if entry["kind"] == "similarity" else ("inputs",)
        ends = []
        for recorded in (name, ACCUMULATORS + name):
            found = self.sums(name, *(self.vectors[f"{recorded}/{part}"] for part in parts))
            if not np.array_equal(found, self.vectors[f"{recorded}/sums"]):
                return False
            whole = found + self.arrays.get(f"constants/{name}", 0)
            ends.append((int(whole.min()), int(whole.max())))
        (least, greatest), reached = ends
        told = entry["accumulator_lowest"], entry["accumulator_highest"]
        return told[0] <= least and greatest <= told[1] and reached == told

    def logits(self, *, recorded: bool) -> np.ndarray:
        """Logits of the recorded images, float32 [B, num_classes], of a Vision Transformer.

        Args:
          recorded: whether each operation takes the integers that were recorded for it.
        """
        return self.computed(recorded=recorded)[0]

    def computed(self, *, recorded: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The same logits, and how far every computed operand lies from its record.

        Returns:
          The logits, and the distances |computed - recorded|, int64 in the operands' shapes, by their names
          in vectors.npz.
        """
        model = _Transformer(self, recorded)
        return model.logits(self.normalized(self.vectors["images"])), model.distances

    def normalized(self, images: np.ndarray) -> np.ndarray:
        """What the model takes, float32 [B, H, W, C], from uint8 pixels."""
        return (np.float32(images) / np.float32(255) - self._mean) / self._deviation


def distances(x_xMxK: np.ndarray, y_xKxN: np.ndarray) -> np.ndarray:
    """-sum_k |x - y|, [..., M, N], of stacks of matrices, as np.matmul takes them."""
    starts = range(0, x_xMxK.shape[-2], _ROWS_AT_ONCE)
    blocks = (x_xMxK[..., start : start + _ROWS_AT_ONCE, :, None] for start in starts)
    return np.concatenate(
        [-np.abs(block - y_xKxN[..., None, :, :]).sum(axis=-2) for block in blocks], axis=-2
    )


def convolution(
    x_BxHxWxC: np.ndarray, kernel: np.ndarray, product, *, strides, padding, dilation, feature_group_count
) -> np.ndarray:
    """A convolution: `product`, `distances` or `np.matmul`, of patches and kernel [h, w, C / groups, O].

    x is [B, H, W, C], the result [B, H', W', O]. Zeros are added around the image, (before, after) in
    height and width, or cropped where these are negative; the o-th of equally many groups of filters sees
    the o-th group of channels alone.
    """
    crop = [slice(max(-before, 0), -max(-after, 0) or None) for before, after in padding]
    zeros = [(max(before, 0), max(after, 0)) for before, after in padding]
    x = np.pad(x_BxHxWxC[:, crop[0], crop[1]], ((0, 0), *zeros, (0, 0)))
    groups, (height, width, inside, filters) = feature_group_count, kernel.shape
    (step_h, step_w), (reach_h, reach_w) = strides, dilation
    rows = (x.shape[1] - (height - 1) * reach_h - 1) // step_h + 1
    columns = (x.shape[2] - (width - 1) * reach_w - 1) // step_w + 1
    total = 0
    for i in range(height):
        for j in range(width):
            top, left = i * reach_h, j * reach_w
            seen = x[:, top : top + (rows - 1) * step_h + 1 : step_h]
            seen = seen[:, :, left : left + (columns - 1) * step_w + 1 : step_w].reshape(-1, groups, inside)
            weights = kernel[i, j].reshape(inside, groups, filters // groups)
            total = total + product(seen.swapaxes(0, 1), weights.swapaxes(0, 1))
    return total.swapaxes(0, 1).reshape(len(x), rows, columns, filters)


def gelu(x: np.ndarray) -> np.ndarray:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    cubic = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    return x * np.float32(0.5) * (np.float32(1) + np.tanh(cubic))


class _Transformer:
    """The float32 steps of a Vision Transformer around its integer sums."""

    def __init__(self, export: Export, recorded: bool):
        self._export, self._recorded = export, recorded
        self.distances: dict[str, np.ndarray] = {}
        self._model: Mapping[str, Any] = export.described["model"]

    def logits(self, x: np.ndarray) -> np.ndarray:
        model = self._model
        x = self._embedded(x)
        if model["pooling"] == "token":
            token = np.broadcast_to(self._weight("class_token"), (len(x), 1, x.shape[2]))
            x = np.concatenate([token, x], axis=1)
        x = x + self._weight("position_embedding")
        for index in range(model["depth"]):
            x = x + self._attention(
                self._norm(x, f"block_{index}/attention_norm"), f"block_{index}/attention"
            )
            x = x + self._mlp(self._norm(x, f"block_{index}/mlp_norm"), f"block_{index}/mlp")
        x = self._norm(x[:, 0] if model["pooling"] == "token" else x, "norm")
        return self._layer(x.mean(axis=1) if model["pooling"] == "mean" else x, "head")

    def _embedded(self, x: np.ndarray) -> np.ndarray:
        """Patches in reading order, each row by row with its channels last."""
        side = self._model["patch_size"]
        if self._model["stem"] == "conv":
            for index in range(side.bit_length() - 1):
                x = gelu(self._convolution(x, f"stem_{index}", stride=2, groups=1))
            side = 1
        B, H, W, C = x.shape
        x = x.reshape(B, H // side, side, W // side, side, C).transpose(0, 1, 3, 2, 4, 5)
        return self._layer(x.reshape(B, -1, side * side * C), "patch_embedding")

    def _attention(self, x: np.ndarray, name: str) -> np.ndarray:
        model, (B, T, D) = self._model, x.shape
        heads = (B, T, model["num_heads"], D // model["num_heads"])
        query, key, value = (
            self._layer(x, f"{name}/{part}").reshape(heads) for part in ("query", "key", "value")
        )
        if model["similarity"] == "l1":
            scores = self._sums(name, queries=query, keys=key)
        else:
            scores = np.einsum("bthd,bshd->bhts", query, key)
        scores = scores * np.float32(model["attention_scale"])
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        if model["identity"]:
            weights = weights + np.eye(T, dtype=np.float32)
        if model["aggregation"] == "dot":
            attended = np.einsum("bhts,bshd->bthd", weights, value)
        else:
            value = value.transpose(0, 2, 1, 3)[:, :, None]
            terms = np.abs(value) - np.abs(weights[:, :, :, :, None] - value)
            attended = terms.sum(axis=3).transpose(0, 2, 1, 3)
        return self._layer(attended.reshape(B, T, D), f"{name}/out")

    def _mlp(self, x: np.ndarray, name: str) -> np.ndarray:
        x = self._layer(x, f"{name}/fc1")
        if self._model["mlp_kernel_size"] is not None:
            side, features = math.isqrt(x.shape[1]), x.shape[2]
            image = x.reshape(-1, side, side, features)
            x = x + self._convolution(image, f"{name}/conv", stride=1, groups=features).reshape(x.shape)
        return self._layer(gelu(x), f"{name}/fc2")

    def _layer(self, x: np.ndarray, name: str) -> np.ndarray:
        """A linear layer with what belongs to it: bias or constant, normalization, power."""
        if name in self._export.operations:
            return self._finished(self._sums(name, inputs=x), name)
        x = x @ self._weight(f"{name}/kernel")
        bias = self._export.arrays.get(f"params/{name}/bias")
        return self._finished(x if bias is None else x + bias, name)

    def _convolution(self, x: np.ndarray, name: str, *, stride: int, groups: int) -> np.ndarray:
        if name in self._export.operations:
            return self._finished(self._sums(name, inputs=x), name)
        kernel = self._weight(f"{name}/kernel")
        half = kernel.shape[0] // 2
        geometry = {"strides": (stride, stride), "padding": ((half, half),) * 2, "dilation": (1, 1)}
        return self._finished(convolution(x, kernel, np.matmul, **geometry, feature_group_count=groups), name)

    def _sums(self, name: str, **operands: np.ndarray) -> np.ndarray:
        """The unit times the integer sums and their constant, float32."""
        export = self._export
        integers = []
        for part, values in operands.items():
            computed, there = export.quantized(values, name), export.vectors[f"{name}/{part}"]
            self.distances[f"{name}/{part}"] = np.abs(computed - there)
            integers.append(there if self._recorded else computed)
        sums = export.sums(name, *integers) + export.arrays.get(f"constants/{name}", 0)
        return np.float32(sums) * np.float32(2.0 ** export.operations[name]["exponent"])

    def _finished(self, x: np.ndarray, name: str) -> np.ndarray:
        if f"params/{name}/norm/scale" in self._export.arrays:
            x = self._norm(x, f"{name}/norm")
        power = self._export.arrays.get(f"params/{name}/power")
        if power is None:
            return x
        # sign(x) |x|^exp(power), but for a line through 0 where |x| is below 1e-3.
        magnitude = np.maximum(np.abs(x), np.float32(1e-3))
        return x * np.exp(np.expm1(power) * np.log(magnitude))

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """LayerNorm over the last axis."""
        centered = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centered).mean(axis=-1, keepdims=True)
        scale = self._weight(f"{name}/scale") / np.sqrt(
            variance + np.float32(self._model["layer_norm_epsilon"])
        )
        return centered * scale + self._weight(f"{name}/bias")

    def _weight(self, name: str) -> np.ndarray:
        return self._export.arrays[f"params/{name}"]


def command(check: Callable[[Path], int], description: str) -> int:
    """Checks the directory that the command line names, or this file's; 2 where it cannot be read."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directory", nargs="?", type=Path, default=Path(__file__).parent, help="default: that of this file"
    )
    directory = parser.parse_args().directory
    try:
        return check(directory)
    except (OSError, EOFError, KeyError, json.JSONDecodeError, zipfile.BadZipFile) as error:
        told = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        print(f"error: {directory} {told}. Export the run again.", file=sys.stderr)
        return 2


def check(directory: Path) -> int:
    """Prints what agrees; 1 where a sum does not, or an operand or logit by more than float32 rounding."""
    export = Export(directory)
    wrong, count = export.wrong_operations(), len(export.operations)
    print(f"{count - len(wrong)} of {count} operations have the recorded sums" + ", not ".join(["", *wrong]))
    if "patch_size" not in export.described["model"]:
        return 1 if wrong else 0
    expected = export.vectors["logits"]
    found, distances = export.computed(recorded=True)
    moved = sum(int(np.count_nonzero(distance)) for distance in distances.values())
    far = [name for name, distance in distances.items() if not _is_rounding(distance)]
    print(
        f"{len(distances) - len(far)} of {len(distances)} operands are computed as recorded, {moved} of"
        f" {sum(distance.size for distance in distances.values())} integers one beside it or more"
        + ", not ".join(["", *far])
    )
    differ = not np.allclose(found, expected, rtol=0.0, atol=_LOGIT_TOLERANCE * np.abs(expected).max())
    for logits, told in (
        (found, "with the recorded integers"),
        (export.logits(recorded=False), "from the pixels"),
    ):
        same = int(np.sum(logits.argmax(axis=1) == expected.argmax(axis=1)))
        print(
            f"logits {told}: at most {np.abs(logits - expected).max():.2g} apart,"
            f" {same} of {len(logits)} images in the same class"
        )
    return 1 if wrong or far or differ else 0


def _is_rounding(distance: np.ndarray) -> bool:
    return distance.max(initial=0) <= 1 and np.count_nonzero(distance) <= max(1, _MOST_MOVED * distance.size)


if __name__ == "__main__":
    sys.exit(command(check, __doc__))
