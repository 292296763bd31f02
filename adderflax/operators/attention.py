"""adder_attention: attention whose similarity is a negative L1 distance."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from adderflax.operators._dispatch import check_implementation
from adderflax.operators.matmul import adder_matmul, check_float
from adderflax.operators.rules import GradientRule, canonical_rule

# As in jax.nn.dot_product_attention: finite, so that a fully masked row is uniform, not NaN.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def adder_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    identity: bool = True,
    similarity: str = "l1",
    aggregation: str = "dot",
    scale: float | None = None,
    grad_query: GradientRule = "hardtanh",
    grad_key: GradientRule = "hardtanh",
    return_weights: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Adder attention with the identity mapping (Shu et al., NeurIPS 2021).

    weights = softmax(scale * similarity(query, key) + bias) + I, over the keys and in float32,
    where similarity[t, s] = -sum_d |query[t, d] - key[s, d]| ("l1") or the dot product ("dot").
    The identity is added after the softmax without renormalising, also where the mask hides the
    diagonal. A row whose keys are all masked is uniform, as in `jax.nn.dot_product_attention`.

    Args:
        query: [B, T, H, D] or [T, H, D]; float32, bfloat16 or float16.
        key: [B, S, H, D] or [S, H, D], likewise.
        value: [B, S, H, D] or [S, H, D], likewise.
        mask: boolean, True where a query attends, broadcastable to [B, H, T, S] (rank-3
            operands: [H, T, S]).
        bias: floating, broadcastable likewise, added after the scale.
        identity: whether I is added; needs T == S.
        similarity: "l1" or "dot".
        aggregation: "dot" for weights @ value, "l1" for -sum_s |weights[t, s] - value[s, d]|,
            with the HardTanh gradient rule on both sides.
        scale: factor of the similarity; None means 1 / sqrt(2 D (1 - 2 / pi)) for "l1", which
            gives unit variance for standard normal operands, and 1 / sqrt(D) for "dot".
        grad_query: gradient rule of the query in the "l1" similarity (see `adder_matmul`).
        grad_key: gradient rule of the key, likewise.
        return_weights: also return the weights.
        implementation: as in `adder_matmul`.

    Returns:
        [B, T, H, D] (or [T, H, D]) in value's dtype for "dot" aggregation and in float32 for
        "l1"; with return_weights a pair with the float32 weights [B, H, T, S] (or [H, T, S]),
        the identity included.

    Raises:
        TypeError: an operand, mask or bias has a dtype that is not allowed.
        ValueError: shapes that do not fit, a scale that is no scalar, or an unknown name.
    """
    canonical_rule(grad_query, "grad_query")
    canonical_rule(grad_key, "grad_key")
    check_implementation(implementation)
    _check_name("similarity", similarity)
    _check_name("aggregation", aggregation)
    if jnp.ndim(scale if scale is not None else 0) != 0:
        raise ValueError(f"scale: needs a scalar, got shape {jnp.shape(scale)}.")
    query, key, value = (
        check_float(array, name, "adder_attention")
        for name, array in (("query", query), ("key", key), ("value", value))
    )
    _check_shapes(query, key, value, identity)
    single = query.ndim == 3
    if single:
        query, key, value = query[None], key[None], value[None]
    logits_shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    mask = _broadcastable(mask, "mask", logits_shape, single)
    bias = _broadcastable(bias, "bias", logits_shape, single)

    logits = _similarity(query, key, similarity, grad_query, grad_key, implementation)
    if scale is None:
        scale = _default_scale(similarity, query.shape[-1])
    logits = logits * jnp.asarray(scale, jnp.float32)
    if bias is not None:
        logits = logits + jnp.broadcast_to(bias.astype(jnp.float32), logits.shape)
    if mask is not None:
        logits = jnp.where(jnp.broadcast_to(mask, logits.shape), logits, _MASKED)

    maximum = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    unnormalized = jnp.exp(logits - maximum)
    sums = jnp.sum(unnormalized, axis=-1, keepdims=True)
    weights = None
    if return_weights or aggregation == "l1":
        weights = unnormalized / sums
        if identity:
            weights = weights + jnp.eye(weights.shape[-1], dtype=jnp.float32)[None, None]
    if aggregation == "l1":
        output = _aggregate_l1(weights, value, implementation)
    else:
        output = _aggregate(unnormalized, sums, value, identity)
    if single:
        output, weights = output[0], None if weights is None else weights[0]
    return (output, weights) if return_weights else output


def _similarity(query, key, similarity, grad_query, grad_key, implementation):
    """float32 [B, H, T, S]."""
    if similarity == "dot":
        query, key = _common_dtype(query, key)
        return jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32)
    return adder_matmul(
        jnp.transpose(query, (0, 2, 1, 3)),
        jnp.transpose(key, (0, 2, 3, 1)),
        grad_x=grad_query,
        grad_y=grad_key,
        implementation=implementation,
    )


def _aggregate(unnormalized, sums, value, identity):
    """softmax @ V, or softmax @ V + V: [B, T, H, D] in value's dtype."""
    # Dividing the T x D output by the sums instead of the T x S map saves a pass over the map,
    # and as a batched matmul over [B, H, ...] operands the product is several times faster on a
    # CPU than as an einsum that transposes its result.
    product = jnp.matmul(
        unnormalized.astype(value.dtype),
        jnp.transpose(value, (0, 2, 1, 3)),
        preferred_element_type=jnp.float32,
    )
    output = jnp.transpose(product / sums, (0, 2, 1, 3))
    if identity:
        # Rather than (softmax + I) @ V: the value passes without rounding.
        output = output + value.astype(jnp.float32)
    return output.astype(value.dtype)


def _aggregate_l1(weights, value, implementation):
    """-sum_s |weights[t, s] - value[s, d]|: [B, T, H, D] in float32."""
    output = adder_matmul(
        weights,
        jnp.transpose(value, (0, 2, 1, 3)),
        grad_x="hardtanh",
        grad_y="hardtanh",
        implementation=implementation,
    )
    return jnp.transpose(output, (0, 2, 1, 3))


def _default_scale(similarity: str, depth: int) -> float:
    if depth == 0:
        return 1.0
    return 1.0 / math.sqrt(depth if similarity == "dot" else 2.0 * depth * (1.0 - 2.0 / math.pi))


def _common_dtype(*arrays):
    dtype = arrays[0].dtype
    if any(array.dtype != dtype for array in arrays):
        dtype = jnp.float32
    return [array.astype(dtype) for array in arrays]


def _check_name(argument: str, name: str) -> None:
    if name not in ("l1", "dot"):
        raise ValueError(f'{argument}: unknown name {name!r}; allowed are "l1" and "dot".')


def _check_shapes(query, key, value, identity) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if query.ndim not in (3, 4) or not query.ndim == key.ndim == value.ndim:
        raise ValueError(
            f"adder_attention: got {shapes}; all three need the same rank, 4 ([batch, tokens, "
            f"heads, depth]) or 3 (without batch)."
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"adder_attention: query and key need the same depth, got {shapes}.")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"adder_attention: key and value may differ in depth only, got {shapes}; value needs "
            f"the shape {(*key.shape[:-1], value.shape[-1])}."
        )
    if query.shape[:-3] != key.shape[:-3] or query.shape[-2] != key.shape[-2]:
        raise ValueError(f"adder_attention: query and key need the same batch and heads, got {shapes}.")
    if identity and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"identity: adding I needs as many queries as keys, got {query.shape[-3]} queries and "
            f"{key.shape[-3]} keys ({shapes}). Pass identity=False for cross-attention."
        )


def _broadcastable(array, argument, shape, single):
    """Checks mask or bias and returns it with rank 4, or None."""
    if array is None:
        return None
    dtype = getattr(array, "dtype", None)
    if argument == "mask" and dtype != jnp.bool_:
        raise TypeError(
            f"mask: needs dtype bool, True where a query attends, got {dtype or type(array)}; for "
            f"additive masks use bias."
        )
    if argument == "bias":
        array = check_float(array, argument, "adder_attention")
    array = jnp.asarray(array)
    wanted = shape[1:] if single else shape
    fits = array.ndim <= len(wanted) and all(
        size in (1, target) for size, target in zip(array.shape[::-1], wanted[::-1])
    )
    if not fits:
        layout = "[heads, queries, keys]" if single else "[batch, heads, queries, keys]"
        raise ValueError(f"{argument}: shape {array.shape} does not broadcast to {wanted} ({layout}).")
    return array.reshape((1,) * (4 - array.ndim) + array.shape)
