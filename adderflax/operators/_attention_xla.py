"""L1 attention composed of adder_matmul and XLA's operations, one block of queries at a time.

The map of queries x keys exists for one block only. The backward pass computes it again, from
the maximum and the sum of each row: what a network keeps for it are rows of numbers, not maps.
Blocks cut the queries and nothing else, so that batch and heads may be sharded.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

# As in jax.nn.dot_product_attention: finite, so that a fully masked row is uniform, not NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
_FEWEST_QUERIES = 128  # in a block: with fewer, passes over keys and values outweigh the map


def _logits(scores, mask, bias, scale):
    """scale * scores + bias, MASKED where the mask hides; float32 [B, H, T, S]."""
    result = scores * scale
    if bias is not None:
        result = result + jnp.broadcast_to(bias.astype(jnp.float32), result.shape)
    return result if mask is None else jnp.where(jnp.broadcast_to(mask, result.shape), result, MASKED)


def softmax(scores, mask, bias, scale):
    """(exp(logits - maximum) [B, H, T, S], maximum [B, H, T, 1], its sums [B, H, T, 1])."""
    logits = _logits(scores, mask, bias, scale)
    maximum = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    unnormalized = jnp.exp(logits - maximum)
    return unnormalized, maximum, jnp.sum(unnormalized, axis=-1, keepdims=True)


def weighted_sum(weights, value):
    """weights @ value in value's dtype, summed in float32."""
    # As a batched matmul over [B, H, ...] operands several times faster on a CPU than as an
    # einsum that transposes its result.
    return _matmul(weights.astype(value.dtype), value)


def forward(query, key, value, mask, bias, scale, *, score):
    """softmax(logits) @ value, and what the backward pass needs of the softmax.

    Args:
        query, key, value, mask, bias: as `FusedAttention.forward` takes them.
        scale: a Python number or a float32 scalar.
        score: (query [B, H, T, D], transposed key [B, H, D, S]) -> float32 [B, H, T, S], here with its own
            derivative.

    Returns:
        float32 (product [B, H, T, E], maximum [B, H, T, 1], sums [B, H, T, 1]).
    """

    def attend(query, mask, bias):
        unnormalized, maximum, sums = softmax(score(query, key.mT), mask, bias, scale)
        # Dividing the T x E product by the sums instead of the T x S map saves a pass over it.
        return (weighted_sum(unnormalized, value) / sums, maximum, sums), ()

    return _by_blocks(attend, (query, mask, bias), (), _block_length(query, key, value))[0]


def backward(query, key, value, mask, bias, scale, maximum, sums, delta, g, *, score):
    """Gradients of `forward`'s product for its cotangent g.

    Args:
        maximum, sums: of `forward`.
        delta: sum of g * product over the last axis, [B, H, T, 1].
        g: float32 [B, H, T, E].
        score: as for `forward`, here with the gradient rules for its derivative.

    Returns:
        (dquery, dkey, dvalue, dbias, dscale), of the operands' shapes; None for a bias that is
        None and for a number.
    """
    length = _block_length(query, key, value)
    key_transposed = key.mT
    if length != query.shape[2]:
        # Gradients have their operand's dtype: this one is summed over the blocks.
        key_transposed = key_transposed.astype(jnp.float32)
    bias_by_query = bias is not None and bias.shape[2] != 1

    def differentiate(query, mask, bias, maximum, sums, delta, g):
        scores, pull = jax.vjp(score, query, key_transposed)
        weights = jnp.exp(_logits(scores, mask, bias, scale) - maximum) * (1.0 / sums)
        dlogits = weights * (_matmul(g, value.mT) - delta)
        if mask is not None:
            dlogits = jnp.where(mask, dlogits, 0.0)
        dquery, dkey = pull(dlogits * scale)
        dvalue = weighted_sum(weights.mT, g)
        dbias = None if bias is None else _sum_to(dlogits, bias.shape)
        dscale = jnp.sum(dlogits * scores) if isinstance(scale, jax.Array) else None
        totals = (dkey, dvalue, None if bias_by_query else dbias, dscale)
        return (dquery, dbias if bias_by_query else None), totals

    # Exact: attention returns value's dtype, in which this cotangent was before it was cast.
    cotangents = (delta, g.astype(value.dtype))
    by_query, totals = _by_blocks(differentiate, (query, mask, bias, maximum, sums), cotangents, length)
    (dquery, dbias), (dkey, dvalue, dbias_total, dscale) = by_query, totals
    return dquery, dkey.mT, dvalue, dbias if bias_by_query else dbias_total, dscale


def _block_length(query, key, value) -> int:
    """Queries in a block: its map is no larger than the operands and results of all queries."""
    length, depth = query.shape[2:]
    keys, value_depth = value.shape[2:]
    if not all(isinstance(size, int) for size in (length, keys)):
        return length
    fitting = (length + keys) * (depth + value_depth) // max(keys, 1)
    fewest = math.ceil(length / max(fitting, _FEWEST_QUERIES))
    # A number of blocks that divides the queries needs no padding.
    counts = range(max(fewest, 1), 2 * fewest)
    return math.ceil(length / next((count for count in counts if length % count == 0), max(fewest, 1)))


def _by_blocks(function, operands, cotangents, length):
    """Calls function on blocks of `length` rows of axis 2, in a loop if there are several.

    Always a loop: what the forward and the backward pass compute alike outside of one, XLA
    computes once and keeps, the map among it. For a map small enough for one block that is as
    fast as if it were a residual, and no larger.

    Args:
        function: (*operands, *cotangents) of a block -> (results by row, float32 totals); the
            former are joined, the latter added.
        operands: None and arrays with one row for all blocks are passed on whole.
        cotangents: likewise, but zero in the rows that fill the last block.
        length: rows in a block.
    """
    rows = operands[0].shape[2]
    if length == rows:
        return function(*operands, *cotangents)
    count = math.ceil(rows / length)

    def pad(array, mode):
        if array is None or array.shape[2] == 1:
            return array
        return jnp.pad(array, ((0, 0), (0, 0), (0, count * length - rows), (0, 0)), mode)

    padded = [pad(array, "edge") for array in operands] + [pad(array, "constant") for array in cotangents]

    def call(start):
        return function(
            *(
                array
                if array is None or array.shape[2] == 1
                else lax.dynamic_slice_in_dim(array, start, length, axis=2)
                for array in padded
            )
        )

    def step(totals, start):
        results, terms = call(start)
        return jax.tree.map(jnp.add, totals, terms), results

    starts = jnp.arange(0, rows, length)
    zeros = jax.tree.map(
        # Like an operand, so as to vary over the same axes of a shard_map.
        lambda total: jnp.zeros_like(operands[0], jnp.float32, total.shape),
        jax.eval_shape(call, starts[0])[1],
    )
    totals, blocks = lax.scan(step, zeros, starts)

    def join(blocks):
        joined = jnp.moveaxis(blocks, 0, 2)
        return joined.reshape(*joined.shape[:2], count * length, joined.shape[4])[:, :, :rows]

    return jax.tree.map(join, blocks), totals


def _sum_to(array, shape):
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and array.shape[axis] != 1)
    return jnp.sum(array, axes, keepdims=True)


def _matmul(x, y):
    # By default a TPU rounds float32 operands to bfloat16, and a GPU to TF32.
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
