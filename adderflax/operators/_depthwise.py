"""Depthwise convolutions as elementwise sums over the kernel's positions, adding or multiplying.

An output has as few terms as its kernel has positions. As a matrix of patches each channel would be a product
of its own with one column, and no implementation of `adder_matmul` fills a vector or a tile with that.
"""

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from operator import add

import jax
import jax.numpy as jnp
from jax import lax

from adderflax.operators._windows import Window
from adderflax.operators.matmul import match_varying
from adderflax.operators.rules import Rule, apply_rule

# The program grows with the positions of the kernel.
_MOST_POSITIONS = 81


def applies(kernel_shape: tuple[int, ...], window: Window) -> bool:
    """Whether a kernel [height, width, C / groups, O] sees one channel at a time and is small enough."""
    height, width, channels, _ = kernel_shape
    return channels == 1 and window.groups > 1 and height * width <= _MOST_POSITIONS


def forward(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """-sum |x - kernel| over the positions: float32 [N, H', W', O]."""
    return _written_out(
        reduce(add, (-jnp.abs(taps - weights) for taps, weights in _positions(x, kernel, window)))
    )


def gradient_x(x: jax.Array, kernel: jax.Array, g: jax.Array, window: Window, rule: Rule) -> jax.Array:
    """sum over the windows of a pixel of rule(kernel - x) g, in the shape of x, float32."""
    _, to_x = jax.vjp(lambda x: _taps(x, kernel.shape, window), x.astype(jnp.float32))
    positions = _positions(x, kernel, window)
    return to_x([apply_rule(rule, weights - taps) * g for taps, weights in positions])[0]


def gradient_kernel(x: jax.Array, kernel: jax.Array, g: jax.Array, window: Window, rule: Rule) -> jax.Array:
    """sum over all windows of rule(x - kernel) g, in the shape of the kernel, float32."""
    terms = [apply_rule(rule, taps - weights) * g for taps, weights in _positions(x, kernel, window)]
    return _sums_over_pixels(terms).reshape(kernel.shape)


def depthwise_conv(
    x: jax.Array, kernel: jax.Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """The multiplying counterpart: `lax.conv_general_dilated` with as many groups as x has channels.

    On a CPU, and wherever a gradient is asked for, it is summed elementwise and differentiated as such:
    libraries are made for convolutions that mix channels. On two CPU cores, for 64 images of 8x8 pixels and
    512 channels, that function took 40 ms and the sums 0.8 ms.

    Args:
        x: [N, H, W, C].
        kernel: [height, width, 1, O] of the same dtype, O a multiple of C.
        strides: steps of the window in height and width.
        padding: ((top, bottom), (left, right)).

    Returns:
        [N, H', W', O] in the dtype of x, summed in float32 where a gradient is asked for.
    """
    padding = tuple((int(before), int(after)) for before, after in padding)
    x, kernel = match_varying(x, kernel)  # else no gradient of a replicated kernel under shard_map
    return _depthwise_conv(x, kernel, Window(tuple(strides), padding, (1, 1), x.shape[3]))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise_conv(x, kernel, window):
    def convolution(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            window.strides,
            window.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=window.groups,
        )

    return lax.platform_dependent(x, kernel, cpu=partial(_product, window=window), default=convolution)


def _product(x, kernel, window):
    terms = (taps * weights for taps, weights in _positions(x, kernel, window))
    return _written_out(reduce(add, terms)).astype(x.dtype)


def _written_out(sums: jax.Array) -> jax.Array:
    """The same float32 sums, kept out of what reduces them next.

    XLA for CPU fuses sums into a LayerNorm's mean behind them, all shifted images and broadcast weights first
    written out: 19 ms where both apart take 1.7. An optimization barrier does not keep it from that.
    """
    return lax.reduce_precision(sums, exponent_bits=8, mantissa_bits=23)


def _depthwise_conv_fwd(x, kernel, window):
    return _product(x, kernel, window), (x, kernel)


def _depthwise_conv_bwd(window, residuals, g):
    # What the forward pass shifted is shifted again rather than kept.
    x, kernel = residuals
    g = g.astype(jnp.float32)
    taps, to_x = jax.vjp(lambda x: _taps(x, kernel.shape, window), x.astype(jnp.float32))
    dx = to_x([weights * g for _, weights in _positions(x, kernel, window)])[0]
    dkernel = _sums_over_pixels([tap * g for tap in taps]).reshape(kernel.shape)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


_depthwise_conv.defvjp(_depthwise_conv_fwd, _depthwise_conv_bwd)


def _sums_over_pixels(terms: list[jax.Array]) -> jax.Array:
    """Sums arrays [N, H', W', O], one a position of the kernel, over all but O: [positions, O]."""
    return lax.platform_dependent(*terms, cpu=_summed_apart, default=_summed_together)


def _summed_apart(*terms: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sum(_folded(term), axis=(0, 1, 2)) for term in terms])


def _summed_together(*terms: jax.Array) -> jax.Array:
    # On a GPU as many sums would be as many kernels, each reading the images again.
    return jnp.sum(jnp.concatenate(terms, axis=3), axis=(0, 1, 2)).reshape(len(terms), -1)


def _folded(x: jax.Array) -> jax.Array:
    """[N, H, W, O] with up to eight rows of each image added to one another.

    Nine sums over whole images in one program make XLA for CPU write out what is summed: 19 ms, folded 4.
    """
    for _ in range(3):
        if x.shape[1] % 2:
            break
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x


def _positions(x: jax.Array, kernel: jax.Array, window: Window) -> Iterator[tuple[jax.Array, jax.Array]]:
    """For each position of the kernel what its filters meet, [N, H', W', O], and their weights."""
    weights = kernel.astype(jnp.float32).reshape(-1, 1, 1, 1, kernel.shape[3])
    return zip(_taps(x.astype(jnp.float32), kernel.shape, window), weights)


def _taps(x: jax.Array, kernel_shape: tuple[int, ...], window: Window) -> list[jax.Array]:
    """For each position of the kernel, row by row, the pixels that its filters meet: [N, H', W', O]."""
    (height, width), (step_h, step_w) = window.output_size(x.shape, kernel_shape), window.strides
    (top, bottom), (left, right) = window.padding
    x = jnp.repeat(x, kernel_shape[3] // window.groups, axis=3)  # the filters of a channel are neighbors
    padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (top, bottom, 0), (left, right, 0), (0, 0, 0)])
    taps = []
    for i in range(kernel_shape[0]):
        for j in range(kernel_shape[1]):
            h, w = i * window.dilation[0], j * window.dilation[1]
            rows = slice(h, h + (height - 1) * step_h + 1, step_h)
            taps.append(padded[:, rows, w : w + (width - 1) * step_w + 1 : step_w])
    return taps
