"""adder_attention: attention whose similarity is a negative L1 distance."""

import functools
import math
import numbers
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from adderflax.operators import _attention_xla
from adderflax.operators._dispatch import (
    check_accepts,
    check_implementation,
    dispatch_attention,
    forward_spec,
    logging_enabled,
    with_automatic_axes,
)
from adderflax.operators.matmul import adder_matmul, calls, check_array, match_varying
from adderflax.operators.rules import GradientRule, Rule, canonical_rule


@overload
def adder_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    is_causal: bool = False,
    identity: bool = True,
    similarity: str = "l1",
    aggregation: str = "dot",
    scale: float | None = None,
    grad_query: GradientRule = "hardtanh",
    grad_key: GradientRule = "hardtanh",
    return_weights: Literal[False] = False,
    implementation: str | None = None,
) -> jax.Array: ...


@overload
def adder_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    is_causal: bool = False,
    identity: bool = True,
    similarity: str = "l1",
    aggregation: str = "dot",
    scale: float | None = None,
    grad_query: GradientRule = "hardtanh",
    grad_key: GradientRule = "hardtanh",
    return_weights: Literal[True],
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def adder_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    is_causal: bool = False,
    identity: bool = True,
    similarity: str = "l1",
    aggregation: str = "dot",
    scale: float | None = None,
    grad_query: GradientRule = "hardtanh",
    grad_key: GradientRule = "hardtanh",
    return_weights: bool,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...


def adder_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    is_causal: bool = False,
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

    For the gradient of the defaults, "l1" and "dot" without weights, a network keeps operands,
    results and two numbers a row, no weights: the backward pass computes them again, for long
    sequences one block of queries at a time.

    Args:
        query: [B, T, H, D] or [T, H, D]; float32, bfloat16 or float16.
        key: [B, S, H, D] or [S, H, D], likewise; or fewer heads than the query has, as many as divide its: of
            H / G, head h of the query meets head h // G, as in `jax.nn.dot_product_attention` ("grouped
            queries"; the G copies exist in memory).
        value: as key, of any depth.
        mask: boolean, True where a query attends, broadcastable to [B, H, T, S] (rank-3
            operands: [H, T, S]).
        bias: floating, broadcastable likewise, added after the scale.
        is_causal: whether query t attends to the keys 0 to t alone, of those that the mask leaves.
        identity: whether I is added; needs T == S.
        similarity: "l1" or "dot".
        aggregation: "dot" for weights @ value, "l1" for sum_s |value[s, d]| - |weights[t, s] - value[s, d]|,
            with the HardTanh gradient rule on both sides: an adder product of weights and value, less what
            it is where all weights are 0. A key without weight adds nothing then; without the first part its
            -|value| would be in every sum, and far larger than what the weights tell.
        scale: factor of the similarity; None means 1 / sqrt(2 D (1 - 2 / pi)) for "l1", which
            gives unit variance for standard normal operands, and 1 / sqrt(D) for "dot".
        grad_query: gradient rule of the query in the "l1" similarity (see `adder_matmul`).
        grad_key: gradient rule of the key, likewise.
        return_weights: also return the weights.
        implementation: as in `adder_matmul`.

    Returns:
        [B, T, H, D] (or [T, H, D]), H the query's heads and D the value's depth, in value's dtype for "dot"
        aggregation and in float32 for "l1"; with return_weights a pair with the float32 weights
        [B, H, T, S] (or [H, T, S]), the identity included.

    Raises:
        TypeError: an operand, mask, bias, scale or flag has a type or dtype that is not allowed.
        ValueError: shapes that do not fit, no keys, a scale that is no scalar or a number that is not
            finite, or an unknown name.
    """
    rules = canonical_rule(grad_query, "grad_query"), canonical_rule(grad_key, "grad_key")
    check_implementation(implementation)
    flags = {"is_causal": is_causal, "identity": identity, "return_weights": return_weights}
    for name, flag in flags.items():
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"{name}: needs True or False, got {flag!r}.")
    _check_name("similarity", similarity)
    _check_name("aggregation", aggregation)
    _check_scale(scale)
    query, key, value = (
        check_array(array, name, "adder_attention")
        for name, array in (("query", query), ("key", key), ("value", value))
    )
    _check_shapes(query, key, value, identity)
    single = query.ndim == 3
    if single:
        query, key, value = query[None], key[None], value[None]
    logits_shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    mask = _broadcastable(mask, "mask", logits_shape, single)
    if is_causal:
        earlier = jnp.tri(*logits_shape[2:], dtype=bool)[None, None]
        mask = earlier if mask is None else mask & earlier
    bias = _broadcastable(bias, "bias", logits_shape, single)

    query, key, value = (jnp.transpose(array, (0, 2, 1, 3)) for array in (query, key, value))
    if key.shape[1] != query.shape[1]:
        key, value = (_for_groups(array, query.shape[1] // key.shape[1]) for array in (key, value))
    if scale is None:
        scale = default_attention_scale(similarity, query.shape[-1])
    number = float(scale) if isinstance(scale, numbers.Real) else None
    plan = _Plan(*rules, number, implementation, logging_enabled())
    scale = jnp.asarray(scale, jnp.float32) if plan.scale is None else None
    weights = None
    if similarity == "l1" and aggregation == "dot" and not return_weights:
        operands, tree = jax.tree.flatten((query, key, value, mask, bias, scale))
        product = _attend(*jax.tree.unflatten(tree, match_varying(*operands)), plan)
    else:
        product, weights = _attend_with_weights(
            query, key, value, mask, bias, scale, plan, similarity, aggregation, identity
        )
    if aggregation == "dot":
        # Rather than (softmax + I) @ V: the value passes without rounding.
        product = product + value.astype(jnp.float32) if identity else product
        product = product.astype(value.dtype)
    output = jnp.transpose(product, (0, 2, 1, 3))
    if single:
        output, weights = output[0], None if weights is None else weights[0]
    return (output, weights) if return_weights else output


class _Plan(NamedTuple):
    """The static part of a call.

    Attributes:
        rule_query, rule_key: of the gradients.
        scale: None where it is an array, traced perhaps, and so an operand.
        implementation: as users name it.
        log: whether the program says which implementation it runs.
    """

    rule_query: Rule
    rule_key: Rule
    scale: float | None
    implementation: str | None
    log: bool

    def score(self, query, key_transposed):
        """float32 [B, H, T, S] from [B, H, T, D] and [B, H, D, S]."""
        rules = {"grad_x": self.rule_query, "grad_y": self.rule_key}
        return adder_matmul(query, key_transposed, **rules, implementation=self.implementation)

    def distances(self, query, key_transposed):
        """The scores, whose derivative is the distance's own where that of `score` is the rules'."""
        check_accepts(self.implementation, query, key_transposed)
        return calls(()).forward(query, key_transposed, implementation=self.implementation, log=self.log)


# Its backward pass computes the weights again instead of keeping them: see _attention_xla.py for
# the form made of XLA's operations, and FusedAttention in _dispatch.py for what a kernel provides.
@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(query, key, value, mask, bias, scale, plan):
    """softmax(scale * scores + bias) @ value, float32 [B, H, T, E], from [B, H, ...] operands."""
    return _run("forward", query, key, value, mask, bias, scale, plan=plan)[0]


def _attend_fwd(query, key, value, mask, bias, scale, plan):
    operands = query, key, value, mask, bias, scale
    product, maximum, sums = _run("forward", *operands, plan=plan)
    return product, (*operands, product, maximum, sums)


def _attend_bwd(plan, residuals, g):
    *operands, product, maximum, sums = residuals
    delta = jnp.sum(g * product, axis=-1, keepdims=True)
    dquery, dkey, dvalue, dbias, dscale = _run("backward", *operands, maximum, sums, delta, g, plan=plan)
    gradients = dquery, dkey, dvalue, None, dbias, dscale
    return tuple(
        None if gradient is None else gradient.astype(operand.dtype)
        for gradient, operand in zip(gradients, operands)
    )


_attend.defvjp(_attend_fwd, _attend_bwd)


def _run(method, *operands, plan):
    """Forward or backward pass, under automatic sharding where the mesh has Explicit axes."""
    arrays, tree = jax.tree.flatten(operands)

    def run(*arrays):
        query, key, value, mask, bias, scale, *rest = jax.tree.unflatten(tree, arrays)
        # What the forward pass keeps is a value in the gradients' formulas: differentiated again, it has
        # its own derivative. The rules are what the backward pass computes.
        score = plan.distances if method == "forward" else plan.score
        composed = functools.partial(getattr(_attention_xla, method), score=score)
        if plan.scale is None:
            return composed(query, key, value, mask, bias, scale, *rest)
        operands = query, key, value, mask, bias, plan.scale, *rest
        return dispatch_attention(method, operands, plan, composed)

    def specs(*specs):
        query, key, value, _, bias, scale, *_ = jax.tree.unflatten(tree, specs)
        if method == "backward":
            return query, key, value, bias, scale
        product = forward_spec(query, value)
        row = PartitionSpec(*product[:3], None)
        return product, row, row

    return with_automatic_axes(run, specs)(*arrays)


def _attend_with_weights(query, key, value, mask, bias, scale, plan, similarity, aggregation, identity):
    """(aggregate [B, H, T, E], weights [B, H, T, S]), by autodiff, which keeps the weights."""
    if similarity == "l1":
        scores = plan.score(query, key.mT)
    else:
        query, key = _common_dtype(query, key)
        scores = jnp.matmul(query, key.mT, preferred_element_type=jnp.float32)
    scale = plan.scale if scale is None else scale
    unnormalized, _, sums = _attention_xla.softmax(scores, mask, bias, scale)
    weights = unnormalized / sums
    if identity:
        weights = weights + jnp.eye(weights.shape[-1], dtype=jnp.float32)[None, None]
    if aggregation == "dot":
        return _attention_xla.weighted_sum(unnormalized, value) / sums, weights
    value = _bounded(value.astype(jnp.float32))
    rules = {"grad_x": "hardtanh", "grad_y": "hardtanh"}
    aggregate = adder_matmul(weights, value, **rules, implementation=plan.implementation)
    return aggregate + jnp.sum(_magnitude(value), axis=-2, keepdims=True), weights


@jax.custom_jvp
def _bounded(value):
    """The value that adds the same to an L1 aggregate, and has the same gradients, but is not large.

    Weights lie in [0, 2]. Beyond them |value| - |weight - value| is weight or -weight, and beyond [-1, 3] the
    HardTanh rules are at their ends, where a derivative of them has no edge. Large values would cost the
    others their last digits.
    """
    return jnp.clip(value, -2.0, 4.0)


_bounded.defjvps(lambda tangent, result, value: tangent)


@jax.custom_vjp
def _magnitude(value):
    """|value|, whose gradient is that of the HardTanh rule of -|0 - value|, with the sign turned."""
    return jnp.abs(value)


_magnitude.defvjp(lambda value: (jnp.abs(value), value), lambda value, g: (jnp.clip(value, -1.0, 1.0) * g,))


def _for_groups(array: jax.Array, copies: int) -> jax.Array:
    """[B, H, T, S] with each head `copies` times, [B, H copies, T, S]."""
    B, H, *rest = array.shape
    # Through float32, in which the gradients of the copies are summed. Explicit meshes refuse jnp.repeat.
    every = jnp.broadcast_to(array.astype(jnp.float32)[:, :, None], (B, H, copies, *rest))
    return every.reshape(B, H * copies, *rest).astype(array.dtype)


def default_attention_scale(similarity: str, depth: int) -> float:
    """The scale with which logits of standard normal queries and keys of `depth` features have variance 1.

    |q - k| of two standard normal numbers has the variance 2 (1 - 2 / pi), their product 1.
    """
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


def _check_scale(scale) -> None:
    if scale is None:
        return
    if isinstance(scale, numbers.Real) and not isinstance(scale, bool):
        if not abs(scale) <= float(jnp.finfo(jnp.float32).max):  # NaN is not
            raise ValueError(f"scale: needs a number that is finite in float32, got {scale!r}.")
    elif not jnp.issubdtype(getattr(scale, "dtype", bool), jnp.floating):
        raise TypeError(f"scale: needs a Python number or a floating scalar array, got {scale!r}.")
    elif jnp.ndim(scale) != 0:
        raise ValueError(f"scale: needs a scalar, got shape {jnp.shape(scale)}.")


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
    heads, shared = query.shape[-2], key.shape[-2]
    grouped = 0 < shared < heads and heads % shared == 0
    if query.shape[:-3] != key.shape[:-3] or heads != shared and not grouped:
        raise ValueError(
            f"adder_attention: query and key need the same batch and heads, or the key fewer heads, of which"
            f" the query's are a multiple; got {shapes}."
        )
    if key.shape[-3] == 0:
        raise ValueError(f"adder_attention: key needs at least one token to attend to, got {shapes}.")
    if identity and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"identity: adding I needs as many queries as keys, got {query.shape[-3]} queries and "
            f"{key.shape[-3]} keys ({shapes}). Pass identity=False for cross-attention."
        )


def check_mask(mask: jax.Array) -> None:
    """Raises a TypeError unless the mask is boolean."""
    dtype = getattr(mask, "dtype", None)
    if dtype != jnp.bool_:
        raise TypeError(
            f"mask: needs dtype bool, True where a query attends, got {dtype or type(mask)}. Flax's "
            f"make_causal_mask and make_attention_mask give it with dtype=bool; additive masks are a bias."
        )


def _broadcastable(array, argument, shape, single):
    """Checks mask or bias and returns it with rank 4, or None."""
    if array is None:
        return None
    if argument == "mask":
        check_mask(array)
    if argument == "bias":
        array = check_array(array, argument, "adder_attention")
    array = jnp.asarray(array)
    wanted = shape[1:] if single else shape
    fits = array.ndim <= len(wanted) and all(
        size in (1, target) for size, target in zip(array.shape[::-1], wanted[::-1])
    )
    if not fits:
        layout = "[heads, queries, keys]" if single else "[batch, heads, queries, keys]"
        raise ValueError(f"{argument}: shape {array.shape} does not broadcast to {wanted} ({layout}).")
    return array.reshape((1,) * (4 - array.ndim) + array.shape)
