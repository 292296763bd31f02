"""Plain XLA forms that never hold the M x K x N product.

On a TPU the broadcast and the reduction fuse into one loop without a temporary, so the direct
form is right there. Elsewhere XLA writes that loop as a scalar reduction. What vectorises is a
loop of rank-1 updates of the result, 16 fused into one pass over it: in the generated code the
16 values of a row stay in registers while the lanes run along the columns, and the columns are
cut into blocks so that 16 rows of the other operand stay in the first-level cache.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from adderflax.operators import _reference
from adderflax.operators.rules import Rule, apply_rule

# Updates in one pass: fewer re-read the result more often, more spill registers.
_SMALLEST, _LARGEST = 12, 20
_GROUP = 4  # terms added to each other before they meet the result: breaks the chain of adds
_WIDEST = 256  # columns in a block: 16 rows of float32 are then half of a 32 KiB cache
_VECTOR = 8  # float32 lanes of the vectors that XLA prefers on x86


def forward(x: jax.Array, y: jax.Array) -> jax.Array:
    """-sum_k |x[..., m, k] - y[..., k, n]| in float32; x and y have equal batch dimensions."""
    if not _blockable(x, y):
        return _reference.forward(x, y)
    return lax.platform_dependent(x, y, tpu=_reference.forward, default=_blocked_forward)


def gradient_x(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    """sum_n rule(y[..., k, n] - x[..., m, k]) g[..., m, n] in float32."""
    direct = functools.partial(_reference.gradient_x, rule=rule)
    blocked = functools.partial(_blocked_gradient_x, rule=rule)
    if not _blockable(x, y):
        return direct(x, y, g)
    return lax.platform_dependent(x, y, g, tpu=direct, default=blocked)


def gradient_y(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    """sum_m rule(x[..., m, k] - y[..., k, n]) g[..., m, n] in float32."""

    def direct(x, y, g):
        flipped = _reference.gradient_x(*map(_transpose, (y, x, g)), rule)
        return _transpose(flipped)

    blocked = functools.partial(_blocked_gradient_y, rule=rule)
    if not (_blockable(x, y) and isinstance(x.shape[-2], int)):
        return direct(x, y, g)
    return lax.platform_dependent(x, y, g, tpu=direct, default=blocked)


def _blockable(x: jax.Array, y: jax.Array) -> bool:
    """Whether the axes that are cut into blocks have lengths known when tracing."""
    static = isinstance(x.shape[-1], int) and isinstance(y.shape[-1], int)
    return static and 0 not in (*x.shape, *y.shape)


def _blocked_forward(x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    rows, columns = x.shape[-2], y.shape[-1]
    if isinstance(rows, int) and columns * _passes(rows) < rows * _passes(columns) / 2:
        # Few columns: put the rows in lanes instead, since |x - y| is symmetric.
        transposed = _columns_in_lanes(_transpose(y), _transpose(x))
        return _transpose(transposed)
    return _columns_in_lanes(x, y)


def _passes(columns: int) -> int:
    """Relative time of one row: whole vectors, the remainder one by one, and the row's start."""
    return columns // _VECTOR + columns % _VECTOR + 1


def _columns_in_lanes(x: jax.Array, y: jax.Array) -> jax.Array:
    y_blocks = _split_columns(y)

    def term(k):
        return -jnp.abs(_for_blocks(_take(x, k, -1), y_blocks) - _take(y_blocks, k, -2))

    shape = (*y_blocks.shape[:-2], x.shape[-2], y_blocks.shape[-1])
    return _join_columns(_sum_terms(term, x.shape[-1], shape, x, y), y.shape[-1])


def _blocked_gradient_x(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    x_blocks = _split_columns(x.astype(jnp.float32))
    y_blocks = _split_columns(_transpose(y.astype(jnp.float32)))
    weighted, g = _weighting(rule, g.astype(jnp.float32))

    def term(n):
        return weighted(_take(y_blocks, n, -2) - x_blocks, _for_blocks(_take(g, n, -1), x_blocks))

    total = _sum_terms(term, y.shape[-1], x_blocks.shape, x, y, g)
    return _join_columns(total, x.shape[-1])


def _blocked_gradient_y(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    x_columns = _transpose(x.astype(jnp.float32))
    y_blocks = _split_columns(y.astype(jnp.float32))
    weighted, g_blocks = _weighting(rule, _split_columns(g.astype(jnp.float32)))

    def term(m):
        x_values = _for_blocks(_take(x_columns, m, -1), y_blocks)
        return weighted(x_values - y_blocks, _take(g_blocks, m, -2))

    total = _sum_terms(term, x.shape[-2], y_blocks.shape, x, y, g)
    return _join_columns(total, y.shape[-1])


def _weighting(rule: Rule, g: jax.Array):
    """A function (difference, g) -> rule(difference) * g, and g scaled for it."""
    if rule.kind != "hardtanh":
        return lambda difference, g: apply_rule(rule, difference) * g, g
    # clip(s d, -1, 1) g = clip(d, -1 / s, 1 / s) (s g): no multiplication by s in the loop.
    limit = jnp.float32(1.0 / rule.slope)
    return lambda difference, g: lax.clamp(-limit, difference, limit) * g, g * rule.slope


def _sum_terms(term, length: int, shape, *varying: jax.Array) -> jax.Array:
    """Sum of term(i) for i < length, in passes over the result that add about 16 terms each.

    Always a loop: without one XLA on a CPU fuses the whole sum into whatever uses it, a softmax
    for example, and computes it once for each use.
    """
    size, steps = _chunks(length)

    def add_terms(total, start, count):
        for group in range(0, count, _GROUP):
            partial = term(start + group)
            for offset in range(group + 1, min(group + _GROUP, count)):
                partial = partial + term(start + offset)
            total = total + partial
        return total

    ragged = length - size * steps
    return lax.fori_loop(
        0,
        steps,
        lambda step, total: add_terms(total, ragged + step * size, size),
        add_terms(_zeros(shape, *varying), 0, ragged),
    )


def _chunks(length: int) -> tuple[int, int]:
    """(size, steps): at least two steps, and few terms left over, which precede the loop."""
    if length < 2 * _SMALLEST:
        return length // 2, 2
    sizes = range(_SMALLEST, min(_LARGEST, length // 2) + 1)
    size = min(sizes, key=lambda size: (length % size, abs(size - 16)))
    return size, length // size


def _zeros(shape, *like: jax.Array) -> jax.Array:
    """float32 zeros that vary over the same shard_map axes as the arrays they are added to."""
    zeros = jnp.zeros(shape, jnp.float32)
    axes = frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in like))
    return lax.pcast(zeros, tuple(sorted(axes)), to="varying") if axes else zeros


def _transpose(array: jax.Array) -> jax.Array:
    return jnp.swapaxes(array, -1, -2)


def _take(array: jax.Array, index, axis: int) -> jax.Array:
    """array[..., index:index + 1, ...]: fused into its user, where a block of 16 is copied."""
    axis = array.ndim + axis
    start = [0] * array.ndim
    start[axis] = index
    sizes = list(array.shape)
    sizes[axis] = 1
    return lax.dynamic_slice(array, start, sizes, allow_negative_indices=False)


def _block_width(columns: int) -> int:
    """Length of the blocks into which the columns are cut, with as little padding as can be."""
    if columns <= _WIDEST:
        return columns
    for width in range(_WIDEST, _WIDEST // 3, -_VECTOR):
        if columns % width == 0:
            return width
    count = math.ceil(columns / _WIDEST)
    return math.ceil(columns / count / _VECTOR) * _VECTOR


def _split_columns(array: jax.Array) -> jax.Array:
    """[..., R, C] -> [..., blocks, R, width]; unchanged where one block holds all columns.

    No axis of length one is made: XLA would give it a layout that costs copies.
    """
    columns = array.shape[-1]
    width = _block_width(columns)
    if width == columns:
        return array
    blocks = math.ceil(columns / width)
    padding = [(0, 0)] * (array.ndim - 1) + [(0, blocks * width - columns)]
    array = jnp.pad(array, padding)
    return jnp.moveaxis(array.reshape(*array.shape[:-1], blocks, width), -2, -3)


def _for_blocks(values: jax.Array, blocks: jax.Array) -> jax.Array:
    """Gives a column of values [..., R, 1] the blocks axis if the blocked array has one."""
    return values[..., None, :, :] if blocks.ndim > values.ndim else values


def _join_columns(blocks: jax.Array, columns: int) -> jax.Array:
    """The inverse of _split_columns."""
    if _block_width(columns) == columns:
        return blocks
    joined = jnp.moveaxis(blocks, -3, -2)
    padded = joined.shape[-2] * joined.shape[-1]
    return joined.reshape(*joined.shape[:-2], padded)[..., :columns]
