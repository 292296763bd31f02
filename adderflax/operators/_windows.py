"""Windows of a convolution: the output rows cut into blocks, and the patches of a block as a matrix."""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_PADDINGS = ("SAME", "SAME_LOWER", "VALID")
_SYMBOLIC_BATCH = 32  # the batch for which blocks are cut where its size is not known


class Window(NamedTuple):
    """The geometry of a convolution, hashable.

    Attributes:
        strides: steps of the window in height and width.
        padding: (before, after) of the height and of the width; negative crops.
        dilation: distances between kernel positions in height and width.
        groups: number of feature groups.
    """

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]
    groups: int

    def reach(self, kernel_shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width that the dilated kernel [height, width, ...] spans."""
        height, width = ((n - 1) * step + 1 for n, step in zip(kernel_shape[:2], self.dilation))
        return height, width

    def output_size(self, x_shape: tuple[int, ...], kernel_shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of the result for x [N, H, W, C]."""
        height, width = (
            max(0, (size + sum(sides) - reach) // stride + 1)
            for size, sides, reach, stride in zip(
                x_shape[1:3], self.padding, self.reach(kernel_shape), self.strides
            )
        )
        return height, width

    def transposed(self, kernel: jax.Array) -> tuple[jax.Array, "Window"]:
        """The kernel and window with which a convolution of cotangents has the pixels of x as its result.

        Position (i, j) of the kernel, mirrored, is what pixel (h, w) meets in the window of the result's
        pixel (h - i, w - j), both counted in steps of the dilation and shifted by the padding.

        Args:
            kernel: [height, width, C / groups, O].

        Returns:
            The kernel as [height, width, O / groups, C], and a window of strides 1.

        Raises:
            ValueError: the strides are not 1: between the windows of a pixel there would be gaps.
        """
        if self.strides != (1, 1):
            raise ValueError(f"Only windows of strides (1, 1) are transposed, not {self.strides}.")
        height, width, channels, filters = kernel.shape
        padding = tuple(
            (reach - 1 - before, reach - 1 - after)
            for reach, (before, after) in zip(self.reach(kernel.shape), self.padding)
        )
        split = kernel.reshape(height, width, channels, self.groups, filters // self.groups)
        mirrored = jnp.flip(split.swapaxes(2, 4), (0, 1)).reshape(height, width, -1, channels * self.groups)
        return mirrored, self._replace(padding=padding)


def canonical_padding(padding: Any) -> str | tuple[tuple[int, int], tuple[int, int]]:
    """Padding as users write it as ((top, bottom), (left, right)); a known name stays as it is.

    Raises:
        ValueError: it is no known name, whole number, or two of whole numbers and pairs of them.
    """
    if isinstance(padding, str) and padding in _PADDINGS:
        return padding

    def two(value):
        return (value, value) if is_whole(value) else value

    try:
        if isinstance(padding, (set, frozenset)):
            raise TypeError("a set has no order")
        (top, bottom), (left, right) = map(two, two(padding))
    except (TypeError, ValueError):  # nothing that has two entries in order
        top = bottom = left = right = None
    if not all(map(is_whole, (top, bottom, left, right))):
        raise ValueError(
            f"padding={padding!r} must be {', '.join(map(repr, _PADDINGS))}, a whole number, or two entries,"
            " for height and width, each a whole number or a pair of them, one for each side, as (1, (0, 2))."
        )
    return (int(top), int(bottom)), (int(left), int(right))


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and 3.0 are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


class Blocks(NamedTuple):
    """Output rows cut into `count` blocks of `rows`; the last may reach beyond the output's height.

    A matrix of pixels and features is [M, F], or with groups [groups, M, F / groups], with
    M = N * rows * width.

    Attributes:
        count: number of blocks.
        rows: output rows of a block.
        height: output height.
        width: output width.
        kernel_shape: [height, width, C / groups, O].
        window: the geometry.
    """

    count: int
    rows: int
    height: int
    width: int
    kernel_shape: tuple[int, ...]
    window: Window

    @classmethod
    def cut(
        cls, x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], window: Window, budget: int
    ) -> "Blocks":
        """Blocks whose patches take at most `budget` bytes in float32, or one row each."""
        height, width = window.output_size(x_shape, kernel_shape)
        batch = x_shape[0] if isinstance(x_shape[0], int) else _SYMBOLIC_BATCH
        row_bytes = 4 * batch * width * math.prod(kernel_shape[:2]) * x_shape[3]
        rows = max(1, min(height, budget // max(1, row_bytes)))
        count = math.ceil(height / rows)
        return cls(count, math.ceil(height / max(1, count)), height, width, kernel_shape, window)

    def pad(self, x: jax.Array) -> jax.Array:
        """x with zeros around it, and exactly as many rows as all blocks touch."""
        (top, _), (left, right) = self.window.padding
        needed = (self.count * self.rows - 1) * self.window.strides[0] + self._reach[0]
        bottom = needed - x.shape[1] - top
        sides = [(0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)]
        return lax.pad(x, jnp.zeros((), x.dtype), sides)

    def pad_result(self, array: jax.Array) -> jax.Array:
        """An array of the result's shape with zero rows up to the end of the last block."""
        return jnp.pad(array, [(0, 0), (0, self.count * self.rows - self.height), (0, 0), (0, 0)])

    def input_of(self, padded: jax.Array, index: jax.Array) -> jax.Array:
        """The rows of the padded x that the patches of block `index` touch."""
        step = self.window.strides[0]
        size = (self.rows - 1) * step + self._reach[0]
        return lax.dynamic_slice_in_dim(padded, index * (self.rows * step), size, 1)

    def patches(self, rows: jax.Array) -> jax.Array:
        """The matrix of the patches of a block, from the input rows they touch."""
        (step_h, step_w), (apart_h, apart_w) = self.window.strides, self.window.dilation
        span_h, span_w = (self.rows - 1) * step_h + 1, (self.width - 1) * step_w + 1
        taps = []
        for i in range(self.kernel_shape[0]):
            for j in range(self.kernel_shape[1]):
                h, w = i * apart_h, j * apart_w
                taps.append(self._split(rows[:, h : h + span_h : step_h, w : w + span_w : step_w]))
        return self._grouped(jnp.concatenate(taps, axis=-1))

    def result_of(self, padded: jax.Array, index: jax.Array) -> jax.Array:
        """The matrix of block `index` of an array from `pad_result`."""
        rows = lax.dynamic_slice_in_dim(padded, index * self.rows, self.rows, 1)
        return self._grouped(self._split(rows))

    def image(self, matrix: jax.Array, batch: int) -> jax.Array:
        """A matrix of pixels and output features as [N, rows, width, O]."""
        return self._ungrouped(matrix).reshape(batch, self.rows, self.width, self.kernel_shape[3])

    def weights(self, kernel: jax.Array) -> jax.Array:
        """The kernel as [K, O], or [groups, K, O / groups], K as in the patches."""
        groups = self.window.groups
        return self._grouped(kernel.reshape(-1, groups, kernel.shape[3] // groups))

    def kernel(self, weights: jax.Array) -> jax.Array:
        """The inverse of `weights`."""
        return self._ungrouped(weights).reshape(self.kernel_shape)

    @property
    def _reach(self) -> tuple[int, int]:
        return self.window.reach(self.kernel_shape)

    def _split(self, image: jax.Array) -> jax.Array:
        """[N, h, w, F] -> [N h w, groups, F / groups]."""
        groups = self.window.groups
        return image.reshape(math.prod(image.shape[:3]), groups, image.shape[3] // groups)

    def _grouped(self, matrix: jax.Array) -> jax.Array:
        return matrix[:, 0] if self.window.groups == 1 else jnp.swapaxes(matrix, 0, 1)

    def _ungrouped(self, matrix: jax.Array) -> jax.Array:
        return matrix if self.window.groups == 1 else jnp.swapaxes(matrix, 0, 1)
