"""adder_attention against float64 NumPy, and its contract."""

import functools
import inspect
import math
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import operator_reference as reference
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adderflax.operators import adder_attention, adder_matmul, available_implementations

PAIRS = [("l1", "dot"), ("l1", "l1"), ("dot", "dot"), ("dot", "l1")]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expected_attention(
    query,
    key,
    value,
    mask=None,
    bias=None,
    identity=True,
    similarity="l1",
    aggregation="dot",
    scale=None,
):
    """[B, T, H, D] and [B, H, T, S] in float64, written from the definition."""
    q, k, v = (np.moveaxis(a.astype(np.float64), -2, -3) for a in (query, key, value))
    depth = q.shape[-1]
    if similarity == "l1":
        logits = -np.abs(q[..., :, None, :] - k[..., None, :, :]).sum(-1)
        scale = 1 / math.sqrt(2 * depth * (1 - 2 / math.pi)) if scale is None else scale
    else:
        logits = q @ np.swapaxes(k, -1, -2)
        scale = 1 / math.sqrt(depth) if scale is None else scale
    logits = logits * scale
    if bias is not None:
        logits = logits + bias.astype(np.float64)
    if mask is not None:
        logits = np.where(mask, logits, -1e38)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    if identity:
        weights = weights + np.eye(weights.shape[-1])
    if aggregation == "l1":
        differences = np.abs(v[..., None, :, :]) - np.abs(weights[..., :, :, None] - v[..., None, :, :])
        out = differences.sum(-2)
    else:
        out = weights @ v
    return np.moveaxis(out, -3, -2), weights


@pytest.mark.parametrize("tokens, heads, depth", [(17, 3, 16), (1, 1, 1)])
@pytest.mark.parametrize("similarity, aggregation", PAIRS)
@pytest.mark.parametrize("identity", [True, False])
def test_against_float64(tokens, heads, depth, similarity, aggregation, identity):
    options = dict(similarity=similarity, aggregation=aggregation, identity=identity)
    operands = [normal(i, 2, tokens, heads, depth) for i in range(3)]
    out, weights = adder_attention(*operands, return_weights=True, **options)
    expected, expected_weights = expected_attention(*operands, **options)
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(out, adder_attention(*operands, **options))


@pytest.mark.parametrize("similarity, aggregation", PAIRS)
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_queries_in_groups_share_a_key(batch, shared, similarity, aggregation):
    options = dict(similarity=similarity, aggregation=aggregation)
    query, *rest = (normal(i, *batch, 5, heads, 8) for i, heads in enumerate((6, shared, shared)))
    every = [np.repeat(array, 6 // shared, axis=-2) for array in rest]
    bias = normal(3, 6, 5, 5)
    out, weights = adder_attention(query, *rest, bias=bias, return_weights=True, **options)
    expected, expected_weights = expected_attention(query, *every, bias=bias, **options)
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-6, rtol=0)

    def gradients(*operands):
        loss = functools.partial(adder_attention, bias=bias, **options)
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(loss(*a))), (0, 1, 2)))(*operands)

    found, copies = gradients(query, *rest), gradients(query, *every)
    np.testing.assert_allclose(found[0], copies[0], atol=1e-5, rtol=0)
    for gradient, copy in zip(found[1:], copies[1:]):
        summed = np.asarray(copy).reshape(*batch, 5, shared, 6 // shared, 8).sum(-2)
        np.testing.assert_allclose(gradient, summed, atol=1e-5 * np.abs(summed).max(), rtol=0)


@pytest.mark.parametrize("similarity, aggregation", PAIRS)
def test_gradients_of_a_group_are_summed_before_rounding(similarity, aggregation):
    operands = [normal(i, 1, 5, heads, 8).astype(jnp.bfloat16) for i, heads in enumerate((64, 1, 1))]
    options = dict(similarity=similarity, aggregation=aggregation)

    def gradients(*operands):
        loss = lambda *a: jnp.sum(adder_attention(*a, **options).astype(jnp.float32))  # noqa: E731
        return jax.jit(jax.grad(loss, (1, 2)))(*operands)

    exact = gradients(*(array.astype(np.float32) for array in operands))
    for found, expected in zip(gradients(*operands), exact):
        assert found.dtype == jnp.bfloat16
        # A sum of 64 in bfloat16 is off by several times the 2^-9 of one rounding.
        error = np.abs(np.asarray(found, np.float32) - np.asarray(expected))
        assert error.max() < 2.0**-8 * np.abs(expected).max()


@pytest.mark.parametrize("spec", [P("d"), P(None, None, "d"), P()], ids=str)
def test_groups_on_an_explicit_mesh(spec):
    operands = [normal(i, 2, 5, heads, 8) for i, heads in enumerate((4, 2, 2))]
    gradients = jax.grad(lambda *a: jnp.sum(jnp.sin(adder_attention(*a))), (0, 1, 2))
    expected = jax.jit(gradients)(*operands)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array in operands]
        found = jax.jit(gradients)(*placed)
    for gradient, wanted, operand in zip(found, expected, placed):
        np.testing.assert_allclose(gradient, wanted, atol=1e-5, rtol=0)
        assert gradient.sharding.is_equivalent_to(operand.sharding, 4)


@pytest.mark.parametrize("shared", [1, 2, 6])
def test_groups_are_those_of_jax(shared):
    query, *rest = (normal(i, 2, 5, heads, 8) for i, heads in enumerate((6, shared, shared)))
    expected = jax.nn.dot_product_attention(query, *rest, is_causal=True)
    found = adder_attention(query, *rest, is_causal=True, similarity="dot", identity=False)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


MASKS = {
    "causal": np.tril(np.ones((1, 1, 6, 6), bool)),
    "padding": np.arange(6)[None, None, None, :] < np.asarray([4, 6])[:, None, None, None],
    "diagonal hidden": ~np.eye(6, dtype=bool)[None, None],
    "by head": np.random.default_rng(0).random((2, 3, 6, 6)) < 0.7,
    "rank 2": np.tril(np.ones((6, 6), bool)),
}


@pytest.mark.parametrize(
    "similarity, implementation",
    [("dot", None), *(("l1", name) for name in available_implementations("cpu"))],
)
@pytest.mark.parametrize("name", MASKS)
def test_masks_and_biases(name, similarity, implementation):
    operands = [normal(i, 2, 6, 3, 8) for i in range(3)]
    bias = normal(3, 1, 3, 6, 6) if name != "causal" else normal(3, 6)
    options = dict(mask=MASKS[name], bias=bias, similarity=similarity, scale=0.7)
    out, weights = adder_attention(*operands, return_weights=True, implementation=implementation, **options)
    expected, expected_weights = expected_attention(*operands, **options)
    np.testing.assert_allclose(out, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-6, rtol=0)
    if name == "diagonal hidden":
        np.testing.assert_allclose(np.diagonal(weights, axis1=-2, axis2=-1), 1.0, atol=1e-7)


def test_fully_masked_rows_are_uniform():
    operands = [normal(i, 1, 4, 2, 8) for i in range(3)]
    mask = jnp.ones((1, 1, 4, 4), bool).at[:, :, 1].set(False)
    run = functools.partial(adder_attention, mask=mask, bias=jnp.full((1, 1, 4, 4), -1e30))
    _, weights = run(*operands, return_weights=True)
    np.testing.assert_allclose(weights[0, :, 1], np.full((2, 4), 0.25) + np.eye(4)[1], atol=1e-6)
    grads = jax.jit(jax.grad(lambda *a: jnp.sum(run(*a)), (0, 1, 2)))(*operands)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("similarity, aggregation", PAIRS)
def test_rank_three_is_one_entry_of_rank_four(similarity, aggregation):
    options = dict(similarity=similarity, aggregation=aggregation, return_weights=True)
    operands = [normal(i, 2, 5, 3, 4) for i in range(3)]
    mask, bias = np.random.default_rng(0).random((3, 5, 5)) < 0.8, normal(4, 3, 1, 5)
    whole = adder_attention(*operands, mask=mask[None], bias=bias[None], **options)
    single = adder_attention(*(a[1] for a in operands), mask=mask, bias=bias, **options)
    for batched, one in zip(whole, single):
        np.testing.assert_allclose(one, batched[1], atol=1e-6)


def test_cross_attention_without_identity():
    query, key, value = normal(0, 2, 3, 2, 8), normal(1, 2, 7, 2, 8), normal(2, 2, 7, 2, 5)
    out = adder_attention(query, key, value, identity=False)
    expected, _ = expected_attention(query, key, value, identity=False)
    assert out.shape == (2, 3, 2, 5)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_dot_without_identity_is_jax_attention():
    operands = [normal(i, 2, 5, 3, 8) for i in range(3)]
    mask = np.random.default_rng(0).random((2, 1, 5, 5)) < 0.6
    actual = adder_attention(*operands, mask=mask, similarity="dot", identity=False)
    expected = jax.nn.dot_product_attention(*operands, mask=mask)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("similarity, aggregation", PAIRS)
@pytest.mark.parametrize("keys", [6, 9])
def test_causal_attention_sees_earlier_keys(similarity, aggregation, keys):
    query, key, value = normal(0, 2, 6, 3, 8), normal(1, 2, keys, 3, 8), normal(2, 2, keys, 3, 8)
    earlier = np.arange(keys) <= np.arange(6)[:, None]
    options = dict(similarity=similarity, aggregation=aggregation, identity=keys == 6)
    out = adder_attention(query, key, value, is_causal=True, **options)
    np.testing.assert_allclose(
        out, expected_attention(query, key, value, mask=earlier, **options)[0], atol=1e-5
    )
    mask = np.random.default_rng(0).random((2, 1, 6, keys)) < 0.7
    out = adder_attention(query, key, value, is_causal=True, mask=mask, **options)
    wanted, _ = expected_attention(query, key, value, mask=mask & earlier, **options)
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    single = adder_attention(query[1], key[1], value[1], is_causal=True, mask=mask[1], **options)
    np.testing.assert_allclose(single, wanted[1], atol=1e-5)
    if (similarity, aggregation, keys) == ("dot", "dot", 9):
        other = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True)
        np.testing.assert_allclose(out, other, atol=1e-5)


@pytest.mark.parametrize("similarity, aggregation", PAIRS)
def test_nothing_comes_from_hidden_keys(similarity, aggregation):
    """Neither forward nor backward: of queries 0 to 2, which see the keys 0 to 2."""
    run = functools.partial(
        adder_attention, is_causal=True, similarity=similarity, aggregation=aggregation, identity=False
    )
    operands = [normal(i, 1, 6, 2, 8) for i in range(3)]
    changed = [array + 3.0 * (np.arange(6) > 2)[:, None, None].astype(np.float32) for array in operands]
    np.testing.assert_allclose(run(*changed)[:, :3], run(*operands)[:, :3], atol=2e-5)
    assert not np.allclose(run(*changed)[:, 3:], run(*operands)[:, 3:], atol=0.1)
    gradients = jax.grad(lambda *a: jnp.sum(run(*a)[:, :3] ** 2), (1, 2))(*operands)
    for gradient in gradients:
        np.testing.assert_allclose(gradient[:, 3:], 0.0, atol=2e-5)
        assert np.abs(gradient[:, :3]).max() > 0.1


@pytest.mark.parametrize("large", [1e4, -1e8, np.inf])
def test_large_values_cost_an_l1_aggregate_nothing(large):
    """Neither where they are hidden nor where they are seen, which adds the weight or takes it off."""
    queries, value = [normal(i, 6, 1, 4) for i in range(2)], normal(2, 6, 1, 3)
    run = functools.partial(adder_attention, *queries, aggregation="l1", identity=False, return_weights=True)
    out, weights = run(value, mask=jnp.arange(6) < 5)
    other = value.copy()
    other[5] = large
    np.testing.assert_allclose(run(other, mask=jnp.arange(6) < 5)[0], out, atol=1e-6)
    out, weights = run(other)
    seen = np.abs(value[:5, 0]) - np.abs(weights[0, :, :5, None] - value[None, :5, 0])
    expected = seen.sum(1) + np.sign(large) * weights[0, :, 5:]
    np.testing.assert_allclose(out[:, 0], expected, atol=1e-5)
    # And its gradients are those of the rules at the values themselves.
    g = normal(3, 6, 1, 3)
    found = jax.vjp(lambda v: run(v)[0], other)[1](g)[0]
    rule = np.clip(weights[0, :, :, None] - other[None, :, 0], -1, 1) + np.clip(other[None, :, 0], -1, 1)
    np.testing.assert_allclose(found[:, 0], (rule * g[:, :1]).sum(0), atol=1e-5)
    queried = jax.grad(lambda q: jnp.sum(adder_attention(q, queries[1], other, aggregation="l1") * g))
    by_rule = jax.grad(
        lambda q: jnp.sum(
            adder_attention(q, queries[1], other, aggregation="l1", return_weights=True)[1][0]
            * (
                jnp.clip(other[None, :, 0] - np.eye(6)[..., None] - weights[0, ..., None], -1, 1) * g[:, :1]
            ).sum(-1)
        )
    )
    np.testing.assert_allclose(queried(queries[0]), by_rule(queries[0]), atol=1e-5)


def test_masked_values_get_the_hardtanh_gradient_of_what_is_seen():
    value, g = 2 * normal(0, 1, 5, 1, 3), normal(1, 1, 5, 1, 3)
    mask = np.tril(np.ones((5, 5), bool))
    queries = np.zeros((1, 5, 1, 4), np.float32)  # so that weights are uniform over what is seen
    run = functools.partial(adder_attention, queries, queries, mask=mask, aggregation="l1", identity=False)
    (found,) = jax.vjp(lambda v: run(v), value)[1](g)
    weights = mask / mask.sum(-1, keepdims=True)
    v = value[0, :, 0][None]
    rule = np.clip(weights[:, :, None] - v, -1, 1) + np.clip(v, -1, 1)  # [t, s, d]
    expected = (mask[:, :, None] * rule * g[0, :, 0][:, None]).sum(0)
    np.testing.assert_allclose(found[0, :, 0], expected, atol=1e-5)


def test_causal_attention_with_a_symbolic_number_of_tokens():
    (tokens,) = jax.export.symbolic_shape("t")
    shape = jax.ShapeDtypeStruct((2, tokens, 3, 8), jnp.float32)
    run = jax.jit(functools.partial(adder_attention, is_causal=True))
    operands = [normal(i, 2, 6, 3, 8) for i in range(3)]
    exported = jax.export.export(run)(shape, shape, shape)
    np.testing.assert_allclose(exported.call(*operands), run(*operands), atol=1e-6)


def test_l1_aggregation_uses_hardtanh_on_both_sides():
    weights, value = normal(0, 2, 3, 6, 6), normal(1, 2, 3, 6, 8)
    g = normal(2, 2, 3, 6, 8)
    (_, _), (expected, _) = reference.gradients(weights, value, g, "hardtanh", "hardtanh")
    run = functools.partial(adder_matmul, grad_y="hardtanh")
    np.testing.assert_allclose(jax.vjp(run, weights, value)[1](g)[1], expected, atol=1e-5)
    # In attention: zero queries and keys make the weights 1/T + I, whatever they are.
    zeros = jnp.zeros((2, 6, 3, 8))
    value_BxTxHxD = jnp.asarray(np.moveaxis(value, -3, -2))
    attend = functools.partial(adder_attention, zeros, zeros, aggregation="l1")
    dv = jax.vjp(attend, value_BxTxHxD)[1](jnp.asarray(np.moveaxis(g, -3, -2)))[0]
    uniform = np.broadcast_to(np.full((6, 6), 1 / 6) + np.eye(6), weights.shape)
    (_, _), (expected, _) = reference.gradients(uniform, value, g, "hardtanh", "hardtanh")
    expected = expected + np.clip(value, -1, 1) * g.sum(-2, keepdims=True)
    np.testing.assert_allclose(dv, np.moveaxis(expected, -3, -2), atol=1e-5)


@pytest.mark.parametrize("aggregation", ["dot", "l1"])
def test_dtypes(aggregation):
    query, key, value = (jnp.asarray(normal(i, 1, 4, 2, 8)) for i in range(3))
    query, value = query.astype(jnp.bfloat16), value.astype(jnp.bfloat16)
    out, weights = adder_attention(query, key, value, aggregation=aggregation, return_weights=True)
    assert out.dtype == (jnp.bfloat16 if aggregation == "dot" else jnp.float32)
    assert weights.dtype == jnp.float32
    expected, _ = expected_attention(*map(np.asarray, (query, key, value)), aggregation=aggregation)
    tolerance = 0.02 if aggregation == "dot" else 1e-4
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance)


def test_weights_come_only_where_asked_for():
    # What is not asked for is not in the program, so that a ledger of operations is right.
    operands = [normal(i, 1, 4, 2, 8) for i in range(3)]
    program = str(jax.make_jaxpr(adder_attention)(*operands))
    assert re.findall(r"f32\[([0-9,]+)\] = div ", program) == ["1,2,4,8"]


def test_value_passes_the_identity_without_rounding():
    # One token: the softmax is 1, and 1 * V + V = 2 V exactly, in bfloat16 too.
    value = jnp.asarray(normal(0, 3, 1, 2, 8), jnp.bfloat16)
    np.testing.assert_array_equal(adder_attention(value, value, value), 2 * value)


Q, K, V = [np.ones((2, 4, 3, 8), np.float32)] * 3
NAMES = ["l1", "dot"]
# What is wrong: the error, the operands, the options, and what the message must name.
BAD_CALLS = {
    "identity": (ValueError, (Q[:, :2], K, V), {}, ["identity", "2 queries", "4 keys"]),
    "similarity": (ValueError, (Q, K, V), {"similarity": "cosine"}, ["similarity", *NAMES]),
    "aggregation": (ValueError, (Q, K, V), {"aggregation": "max"}, ["aggregation", *NAMES]),
    "rule": (ValueError, (Q, K, V), {"grad_key": "x"}, ["grad_key", "'x'"]),
    "unused rule": (ValueError, (Q, K, V), {"grad_query": 3, "similarity": "dot"}, ["grad_query"]),
    "implementation": (
        ValueError, (Q, K, V), {"implementation": "fast", "similarity": "dot"},
        ["implementation", "'fast'", "'xla'"],
    ),
    "ranks": (ValueError, (Q[0], K, V), {}, ["rank", "(4, 3, 8)"]),
    "depth": (ValueError, (Q[..., :4], K, V), {}, ["query", "key", "depth", "(2, 4, 3, 4)"]),
    "value": (ValueError, (Q, K, V[:, :2]), {}, ["value", "(2, 2, 3, 8)", "(2, 4, 3, 8)"]),
    "heads": (ValueError, (Q[:, :, :1], K, V), {}, ["heads", "(2, 4, 1, 8)"]),
    "grouped heads": (ValueError, (Q, K[:, :, :2], V[:, :, :2]), {}, ["multiple", "(2, 4, 2, 8)"]),
    "no heads": (ValueError, (Q, K[:, :, :0], V[:, :, :0]), {}, ["multiple", "(2, 4, 0, 8)"]),
    "mask dtype": (TypeError, (Q, K, V), {"mask": np.ones((4, 4), np.float32)}, ["mask", "bool"]),
    "mask shape": (
        ValueError, (Q, K, V), {"mask": np.ones((2, 4, 4), bool)}, ["mask", "(2, 4, 4)"],
    ),
    "bias shape": (
        ValueError, (Q, K, V), {"bias": np.ones((1, 1, 1, 1, 4), np.float32)},
        ["bias", "(2, 3, 4, 4)"],
    ),
    "bias dtype": (TypeError, (Q, K, V), {"bias": np.ones((4, 4), np.int32)}, ["bias", "int32"]),
    "scale": (ValueError, (Q, K, V), {"scale": np.ones(3, np.float32)}, ["scale", "(3,)"]),
    "scale type": (TypeError, (Q, K, V), {"scale": "1"}, ["scale", "'1'", "scalar array"]),
    "scale True": (TypeError, (Q, K, V), {"scale": True}, ["scale", "True", "a Python number"]),
    "scale nan": (ValueError, (Q, K, V), {"scale": math.nan}, ["scale", "nan", "finite"]),
    "scale inf": (ValueError, (Q, K, V), {"scale": -math.inf}, ["scale", "-inf", "finite"]),
    "scale too large": (ValueError, (Q, K, V), {"scale": 1e39}, ["scale", "finite in float32"]),
    "is_causal": (TypeError, (Q, K, V), {"is_causal": "yes"}, ["is_causal", "'yes'", "True or False"]),
    "identity type": (TypeError, (Q, K, V), {"identity": "no"}, ["identity", "'no'", "True or False"]),
    "weights": (TypeError, (Q, K, V), {"return_weights": 1}, ["return_weights", "got 1"]),
    "no keys": (ValueError, (Q, K[:, :0], V[:, :0]), {"identity": False}, ["key", "(2, 0, 3, 8)"]),
    "dtype": (TypeError, (Q, K, V.astype(np.float64)), {}, ["value", "float64"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    error, operands, options, parts = BAD_CALLS[name]
    with pytest.raises(error) as raised:
        adder_attention(*operands, **options)
    for part in parts:
        assert part in str(raised.value)


def test_types_tell_of_weights_and_nothing_else():
    """Without them an array, with them a pair; all else is as the function itself has it."""
    own, found = inspect.signature(adder_attention), []
    for overload in typing.get_overloads(adder_attention):
        signature = inspect.signature(overload)
        parameters = dict(signature.parameters)
        weights = parameters.pop("return_weights")
        found.append((weights.annotation, weights.default, signature.return_annotation))
        assert parameters == {n: p for n, p in own.parameters.items() if n != "return_weights"}
    pair = tuple[jax.Array, jax.Array]
    assert found == [
        (typing.Literal[False], False, jax.Array),
        (typing.Literal[True], inspect.Parameter.empty, pair),
        (bool, inspect.Parameter.empty, jax.Array | pair),
    ]
