"""Fused attention for TPUs without a TPU: interpreted, lowered, and compiled by the TPU's compiler."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import operator_reference as reference
import pytest
import tpu_compiler
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from adderflax.operators import _tpu_attention, adder_attention
from adderflax.operators.rules import Rule, canonical_rule

HARDTANH, SLOPES, SIGN = ("hardtanh",) * 2, (("hardtanh", 4.0), ("hardtanh", 0.25)), ("sign", "hardtanh")
# (heads, T, S, D, E), rules, dtype, magnitude.
QUICK = [
    ((3, 17, 17, 8, 16), HARDTANH, "float32", 1.0),  # heads share a step
    ((1, 20, 130, 9, 8), SIGN, "bfloat16", 1e-3),  # two tiles of keys
    ((2, 50, 130, 8, 8), HARDTANH, "float32", 1.0),  # blocks of queries
    ((2, 1, 5, 8, 33), SLOPES, "float32", 1e3),
]
LONG = [
    ((1, 300, 1030, 8, 8), HARDTANH, "float32", 1.0),
    ((1, 1, 1, 16, 16), HARDTANH, "float32", 1.0),
    ((2, 65, 65, 64, 64), HARDTANH, "float32", 1.0),
    ((1, 197, 197, 64, 64), HARDTANH, "bfloat16", 1.0),
    ((1, 197, 65, 128, 128), SLOPES, "float32", 1e-3),
    ((1, 17, 197, 33, 64), SIGN, "float32", 30.0),
]


def make(lengths, dtype="float32", magnitude=1.0):
    heads, queries, keys, depth, value_depth = lengths
    random = np.random.default_rng(0)
    shapes = (queries, depth), (keys, depth), (keys, value_depth), (queries, value_depth)
    query, key, value, g = (random.normal(size=(1, heads, *shape)) for shape in shapes)
    query, key, value = (
        a.astype(reference.DTYPES[dtype]) for a in (query * magnitude, key * magnitude, value)
    )
    return query, key, value, g.astype(reference.DTYPES[dtype]).astype(np.float32)


def expected(query, key, value, g, scale, rules):
    """Each result in float64 and the sum of the magnitudes that it adds."""
    query, key, value, g = (array.astype(np.float64) for array in (query, key, value, g))
    difference = key[..., None, :, :] - query[..., :, None, :]
    logits = -scale * np.abs(difference).sum(-1)
    maximum = logits.max(-1, keepdims=True)
    sums = np.exp(logits - maximum).sum(-1, keepdims=True)
    weights = np.exp(logits - maximum) / sums
    # An error e of a logit is a relative error e of its weight.
    weight_terms = weights * (1.0 + np.abs(logits))
    product, turned = weights @ value, weights.swapaxes(-1, -2)
    delta = (g * product).sum(-1, keepdims=True)
    dscore = scale * weights * (g @ value.swapaxes(-1, -2) - delta)
    product_terms = weight_terms @ np.abs(value)
    score_terms = np.abs(g) @ np.abs(value).swapaxes(-1, -2)
    score_terms = scale * weight_terms * (score_terms + (np.abs(g) * product_terms).sum(-1, keepdims=True))
    dquery = (reference.rule(rules[0], difference) * dscore[..., None]).sum(-2)
    dkey = (reference.rule(rules[1], -difference) * dscore[..., None]).sum(-3)
    forward = (product, product_terms), (maximum, np.abs(maximum)), (sums, sums * (1.0 + np.abs(maximum)))
    backward = (
        (dquery, score_terms.sum(-1, keepdims=True)),
        (dkey, score_terms.sum(-2)[..., None]),
        (turned @ g, weight_terms.swapaxes(-1, -2) @ np.abs(g)),
    )
    return forward, backward, delta.astype(np.float32)


def check(lengths, rules, dtype, magnitude):
    operands = make(lengths, dtype, magnitude)
    scale = 0.2 / magnitude
    results, gradients, delta = expected(*operands, scale, rules)
    query, key, value, g = map(jnp.asarray, operands)
    rules = [canonical_rule(rule, "rule") for rule in rules]
    inputs = query, key, value, None, None, scale
    found = _tpu_attention.forward(*inputs, interpret=True)
    found += _tpu_attention.backward(*inputs, *found[1:], delta, g, *rules, interpret=True)[:3]
    names = ("product", "maximum", "sums", "dquery", "dkey", "dvalue")
    for name, actual, (exact, terms) in zip(names, found, (*results, *gradients), strict=True):
        assert actual.dtype == jnp.float32
        reference.assert_within(np.asarray(actual), exact, terms, name)


@pytest.mark.parametrize(("lengths", "rules", "dtype", "magnitude"), QUICK, ids=str)
def test_interpreted_kernels_are_within_the_bound(lengths, rules, dtype, magnitude, monkeypatch):
    if lengths[1] == 50:
        monkeypatch.setattr(_tpu_attention, "_MAP", 2**12)
    check(lengths, rules, dtype, magnitude)


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "rules", "dtype", "magnitude"), LONG, ids=str)
def test_interpreted_kernels_at_length(lengths, rules, dtype, magnitude):
    check(lengths, rules, dtype, magnitude)


def test_refusals():
    def reason(query=(2, 197, 64), keys=197, rules=("hardtanh", "hardtanh"), mask=None, value_depth=64):
        shapes = query, (query[0], keys, query[2]), (query[0], keys, value_depth)
        arrays = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in shapes)
        return _tpu_attention.refuses(*arrays, mask, None, *map(Rule, rules))

    assert reason() is None
    (tokens,) = jax.export.symbolic_shape("t")
    assert "symbolic" in reason((2, tokens, 64))
    assert "empty" in reason((0, 197, 64))
    assert "mask" in reason(mask=np.ones((1, 1, 197, 197), bool))
    assert "full" in reason(rules=("hardtanh", "full"))
    assert "depth" in reason((2, 197, 4)) and "depth" in reason(value_depth=129)
    assert "do not fit" in reason(keys=1153) and "too little work" in reason(keys=128)


def gradients(query, key, value, **options):
    attend = functools.partial(adder_attention, **options)
    return jax.grad(lambda *a: jnp.sum(jnp.sin(attend(*a))), (0, 1, 2))(query, key, value)


def test_how_it_enters_programs():
    operands = [jax.ShapeDtypeStruct((2, 140, 2, 8), jnp.float32)] * 3
    for transformed in (gradients, lambda *a: jax.vmap(gradients)(*(array[None] for array in a))):
        text = jax.jit(transformed).trace(*operands).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("@tpu_custom_call(") == 2
    with pytest.raises(NotImplementedError, match="runs on TPUs"):
        jax.jit(functools.partial(gradients, implementation="tpu")).lower(*operands)
    # What a program for several platforms holds for the others is the composed form.
    exported = jax.export.export(jax.jit(gradients), platforms=["cpu", "cuda", "tpu"])(*operands)
    values = [np.random.default_rng(i).normal(size=(2, 140, 2, 8)).astype(np.float32) for i in range(3)]
    for a, e in zip(
        exported.call(*values), jax.jit(functools.partial(gradients, implementation="xla"))(*values)
    ):
        np.testing.assert_allclose(a, e, atol=1e-5)


def test_on_several_devices():
    def text(spec, named, batch=2):
        mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
        place = jax.sharding.NamedSharding(mesh, spec)
        operands = [jax.ShapeDtypeStruct((batch, 140, 1, 8), jnp.float32, sharding=place)] * 3
        with jax.set_mesh(mesh) if named else contextlib.nullcontext():
            return jax.jit(gradients).trace(*operands).lower(lowering_platforms=("tpu",)).as_text()

    assert text(P("d"), named=True).count("@tpu_custom_call(") == 2
    # XLA takes over where the shares are unknown, or unequal.
    assert "adder_attention" not in text(P("d"), named=False)
    assert "adder_attention" not in text(P(), named=True, batch=3)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_programs_compile_without_a_map(topology):
    if tpu_compiler.unavailable():
        pytest.skip(tpu_compiler.unavailable())
    fused = {"adder_attention_forward": 1, "adder_attention_backward": 1, "map": False}
    names = ("attention 197", "attention 1025", "composed attention 65")
    found = tpu_compiler.results(topology, *names)
    assert found.pop(names[-1])["map"]
    assert found == dict.fromkeys(names[:-1], fused)
