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
    if not blockable(x, y):
        return _reference.forward(x, y)
    return lax.platform_dependent(x, y, tpu=_reference.forward, default=blocked_forward)


def gradient_x(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    """sum_n rule(y[..., k, n] - x[..., m, k]) g[..., m, n] in float32."""
    direct = functools.partial(_reference.gradient_x, rule=rule)
    blocked = functools.partial(blocked_gradient_x, weighting=functools.partial(_weighting, rule))
    if not blockable(x, y):
        return direct(x, y, g)
    return lax.platform_dependent(x, y, g, tpu=direct, default=blocked)


def gradient_y(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    """sum_m rule(x[..., m, k] - y[..., k, n]) g[..., m, n] in float32."""
    direct = functools.partial(_reference.gradient_y, rule=rule)
    blocked = functools.partial(_blocked_gradient_y, rule=rule)
    if not (blockable(x, y) and isinstance(x.shape[-2], int)):
        return direct(x, y, g)
    return lax.platform_dependent(x, y, g, tpu=direct, default=blocked)


def blockable(x: jax.Array, y: jax.Array) -> bool:
    """Whether the axes that are cut into blocks have lengths known when tracing."""
    static = isinstance(x.shape[-1], int) and isinstance(y.shape[-1], int)
    return static and 0 not in (*x.shape, *y.shape)


def blocked_forward(x: jax.Array, y: jax.Array, distance=jnp.abs) -> jax.Array:
    """-sum_k distance(x[..., m, k] - y[..., k, n]) in float32.

    The distance is an even function, elementwise, and 0 at 0.
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    rows, columns = x.shape[-2], y.shape[-1]
    if isinstance(rows, int) and columns * _passes(rows) < rows * _passes(columns) / 2:
        # Few columns: put the rows in lanes instead, since the distance is even.
        return _columns_in_lanes(y.mT, x.mT, distance).mT
    return _columns_in_lanes(x, y, distance)


def _passes(columns: int) -> int:
    """Relative time of one row: whole vectors, the remainder one by one, and the row's start."""
    return columns // _VECTOR + columns % _VECTOR + 1


def _columns_in_lanes(x: jax.Array, y: jax.Array, distance) -> jax.Array:
    x_chunks = _chunk(x, -1)
    y_chunks = _chunk(_split_columns(y), -2)
    blocked = y_chunks.ndim > x_chunks.ndim

    def term(step, offset):
        values = _take(x_chunks, step, offset, -1)
        return -distance(_for_blocks(values, blocked) - _take(y_chunks, step, offset, -2))

    shape = (*y_chunks.shape[:-3], x.shape[-2], y_chunks.shape[-1])
    total = _sum_terms(term, x_chunks.shape[-2:], shape, x, y)
    return _join_columns(total, y.shape[-1])


def blocked_gradient_x(x: jax.Array, y: jax.Array, g: jax.Array, weighting) -> jax.Array:
    """sum_n rule(y[..., k, n] - x[..., m, k]) g[..., m, n] in float32.

    The weighting maps g to (a function (difference, g) -> rule(difference) * g, and the g for it).
    """
    x_blocks = _split_columns(x.astype(jnp.float32))
    y_chunks = _chunk(_split_columns(y.astype(jnp.float32).mT), -2)
    weighted, g = weighting(g.astype(jnp.float32))
    g_chunks = _chunk(g, -1)
    blocked = x_blocks.ndim > x.ndim

    def term(step, offset):
        g_values = _for_blocks(_take(g_chunks, step, offset, -1), blocked)
        return weighted(_take(y_chunks, step, offset, -2) - x_blocks, g_values)

    total = _sum_terms(term, g_chunks.shape[-2:], x_blocks.shape, x, y, g)
    return _join_columns(total, x.shape[-1])


def _blocked_gradient_y(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    x_chunks = _chunk(x.astype(jnp.float32).mT, -1)
    y_blocks = _split_columns(y.astype(jnp.float32))
    weighted, g = _weighting(rule, g.astype(jnp.float32))
    g_chunks = _chunk(_split_columns(g), -2)
    blocked = y_blocks.ndim > y.ndim

    def term(step, offset):
        x_values = _for_blocks(_take(x_chunks, step, offset, -1), blocked)
        return weighted(x_values - y_blocks, _take(g_chunks, step, offset, -2))

    total = _sum_terms(term, x_chunks.shape[-2:], y_blocks.shape, x, y, g)
    return _join_columns(total, y.shape[-1])


def _weighting(rule: Rule, g: jax.Array):
    """A function (difference, g) -> rule(difference) * g, and g scaled for it."""
    if rule.kind != "hardtanh" or not 2.0**-20 <= rule.slope <= 2.0**20:
        return lambda difference, g: apply_rule(rule, difference) * g, g
    # clip(s d, -1, 1) g = clip(d, -1 / s, 1 / s) (s g): no multiplication by s in the loop. Not for
    # slopes that could take s g out of float32's range.
    limit = jnp.float32(1.0 / rule.slope)
    return lambda difference, g: lax.clamp(-limit, difference, limit) * g, g * rule.slope


def _sum_terms(term, chunks, shape, *varying: jax.Array) -> jax.Array:
    """Sum of term(step, offset) over all steps and offsets below (steps, size) = chunks.

    Each step is one pass over the result that adds `size` terms. Always a loop: without one XLA
    on a CPU fuses the whole sum into whatever uses it, a softmax for example, and computes it
    once for each use.
    """
    steps, size = chunks

    def add_chunk(step, total):
        for group in range(0, size, _GROUP):
            partial = term(step, group)
            for offset in range(group + 1, min(group + _GROUP, size)):
                partial = partial + term(step, offset)
            total = total + partial
        return total

    return lax.fori_loop(0, steps, add_chunk, zeros(shape, *varying))


def _chunk_sizes(length: int) -> tuple[int, int]:
    """(steps, size) with steps * size >= length, at least two steps, and little excess."""
    steps = range(max(2, math.ceil(length / _LARGEST)), max(2, length // _SMALLEST) + 1)
    return min(((s, math.ceil(length / s)) for s in steps), key=math.prod)


def _chunk(array: jax.Array, axis: int) -> jax.Array:
    """[..., L, ...] -> [..., steps, size, ...], with zeros where L does not divide.

    A term of two zeros adds nothing.
    """
    axis = array.ndim + axis
    length = array.shape[axis]
    steps, size = _chunk_sizes(length)
    if steps * size > length:
        padding = [(0, 0)] * array.ndim
        padding[axis] = (0, steps * size - length)
        array = jnp.pad(array, padding)
    return array.reshape(*array.shape[:axis], steps, size, *array.shape[axis + 1 :])


def _take(chunks: jax.Array, step, offset: int, axis: int) -> jax.Array:
    """Term (step, offset) of an array chunked along the axis, which keeps length one.

    A slice of one is fused into its user, where a slice of a chunk would be copied; and since
    the traced index is the same for all offsets, their addresses differ by constants.
    """
    axis = chunks.ndim + axis
    start, sizes = [0] * chunks.ndim, list(chunks.shape)
    start[axis - 1 : axis + 1] = step, offset
    sizes[axis - 1 : axis + 1] = 1, 1
    return lax.squeeze(lax.dynamic_slice(chunks, start, sizes, allow_negative_indices=False), (axis - 1,))


def zeros(shape, *like: jax.Array) -> jax.Array:
    """float32 zeros that vary over the same shard_map axes as the arrays they are added to."""
    array = jnp.zeros(shape, jnp.float32)
    axes = frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in like))
    return lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array


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


def _for_blocks(values: jax.Array, blocked: bool) -> jax.Array:
    """Gives [..., R, 1] the blocks axis where the array it meets has one."""
    return values[..., None, :, :] if blocked else values


def _join_columns(blocks: jax.Array, columns: int) -> jax.Array:
    """The inverse of _split_columns."""
    if _block_width(columns) == columns:
        return blocks
    joined = jnp.moveaxis(blocks, -3, -2)
    padded = joined.shape[-2] * joined.shape[-1]
    return joined.reshape(*joined.shape[:-2], padded)[..., :columns]
