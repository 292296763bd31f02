"""The gradient of adder_attention that keeps no weights: exact, small, and under transformations."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import operator_reference as reference
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_operator_attention import expected_attention, normal

from adderflax.operators import _attention_xla, _dispatch, adder_attention, adder_matmul
from adderflax.operators.rules import Rule


def expected_gradients(query, key, value, g, mask, bias, scale, identity, rules):
    """{name: (value, sum of the magnitudes of its terms)} in float64, of the aggregation "dot".

    g is the cotangent or a function of the output that returns it; rules are None for the similarity "dot".
    """
    options = dict(mask=mask, bias=bias, scale=scale, identity=identity)
    out, weights = expected_attention(query, key, value, similarity="l1" if rules else "dot", **options)
    g = g(out) if callable(g) else g
    q, k, v, g = (np.moveaxis(a.astype(np.float64), -2, -3) for a in (query, key, value, g))
    passed = np.eye(weights.shape[-1]) if identity else 0.0
    softmax = weights - passed
    d_weights, magnitudes = g @ np.swapaxes(v, -1, -2), np.abs(g) @ np.swapaxes(np.abs(v), -1, -2)
    delta = (softmax * d_weights).sum(-1, keepdims=True)
    d_logits = softmax * (d_weights - delta)
    # The algorithm subtracts in each row what it has added.
    terms = softmax * (magnitudes + (softmax * magnitudes).sum(-1, keepdims=True))
    if mask is not None:
        d_logits, terms = np.where(mask, d_logits, 0), np.where(mask, terms, 0)
    found = {
        "out": (out, np.moveaxis(weights @ np.abs(v), -3, -2)),
        "value": (np.swapaxes(weights, -1, -2) @ g, np.swapaxes(weights, -1, -2) @ np.abs(g)),
    }
    if bias is not None:
        found["bias"] = tuple(reference.unbroadcast(a, bias.shape) for a in (d_logits, terms))
    to_key, to_query = k[..., None, :, :], q[..., :, None, :]
    difference, both = to_key - to_query, np.abs(to_key) + np.abs(to_query)
    for name, sign, axis, other in (("query", 1, -2, to_key), ("key", -1, -3, to_query)):
        rule = rules[axis == -3] if rules else None
        factors = reference.rule(rule, sign * difference) if rules else other
        sizes = np.abs(other) if rule is None else both if rule == "full" else np.ones_like(difference)
        found[name] = tuple(
            scale * (a[..., None] * f).sum(axis) for a, f in ((d_logits, factors), (terms, sizes))
        )
    for name in ("query", "key", "value"):
        found[name] = tuple(np.moveaxis(a, -3, -2) for a in found[name])
    return found


CAUSAL = np.tril(np.ones((65, 65), bool))[None, None]
RULES = {
    "default": ("hardtanh", "hardtanh"),
    "slopes": (("hardtanh", 4.0), ("hardtanh", 0.25)),
    "true": ("sign", "sign"),
    "full": ("full", "full"),
    "mixed": ("sign", "full"),
}
# Shape of query, keys, depth of value; rules, mask, shape of bias, dtype, scale.
GRADIENTS = {
    "65 tokens": ((2, 65, 2, 64), 65, 64, "default", None, None, "float32", 0.15),
    "197 tokens": ((1, 197, 2, 64), 197, 64, "default", None, None, "float32", 0.15),
    "1 wide, causal": ((2, 65, 3, 1), 65, 1, "true", CAUSAL, (1, 3, 65, 65), "float32", 1.0),
    "33 wide": ((2, 17, 2, 33), 17, 16, "slopes", None, (17,), "float32", 0.3),
    "cross": ((2, 5, 2, 16), 70, 33, "full", None, (2, 1, 1, 70), "float32", 0.2),
    "blocks": ((1, 260, 2, 16), 260, 16, "default", None, (1, 2, 1, 260), "float32", 0.3),
    "ragged blocks, cross": (
        (2, 131, 2, 8), 70, 4, "mixed", np.arange(131)[:, None] % 7 != 3, (2, 1, 131, 1), "float32", 0.5,
    ),
    "bfloat16 in blocks": ((1, 260, 1, 8), 260, 8, "default", None, (1, 1, 260), "bfloat16", 0.3),
    "1025 tokens": ((1, 1025, 1, 64), 1025, 64, "default", None, None, "float32", 0.15),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n.startswith("1025") else ()) for n in GRADIENTS]
)
def test_gradients_against_float64(name):
    shape, keys, value_depth, rules, mask, bias_shape, dtype, scale = GRADIENTS[name]
    rules, (batch, _, heads, depth) = RULES[rules], shape
    wanted = reference.DTYPES[dtype]
    query, key = normal(0, *shape).astype(wanted), normal(1, batch, keys, heads, depth).astype(wanted)
    value = normal(2, batch, keys, heads, value_depth).astype(wanted)
    g = normal(3, *shape[:3], value_depth).astype(wanted)
    bias = None if bias_shape is None else normal(4, *bias_shape)
    identity = shape[1] == keys
    options = dict(mask=mask, scale=scale, identity=identity, grad_query=rules[0], grad_key=rules[1])

    def run(query, key, value, bias, g):
        attend = functools.partial(adder_attention, **options)
        out, pull = jax.vjp(lambda *a: attend(*a[:3], bias=a[3]), query, key, value, bias)
        return dict(zip(("out", "query", "key", "value", "bias"), (out, *pull(g))))

    actual = jax.jit(run)(query, key, value, bias, g)
    expected = expected_gradients(query, key, value, g, mask, bias, scale, identity, rules)
    for what, (exact, terms) in expected.items():
        # Weights meet bfloat16 values in bfloat16.
        rounding = 0 if dtype == "float32" else 2.0**-9 / 1e-6
        reference.assert_within(np.asarray(actual[what]), exact, (1 + rounding) * terms, what)


def test_scale_and_mask_may_be_traced():
    query, key, value = (normal(i, 1, 140, 1, 4) for i in range(3))
    mask = np.random.default_rng(0).random((140, 140)) < 0.8

    def loss(scale, mask=mask, **options):
        out = adder_attention(query, key, value, mask=mask, scale=scale, **options)
        return jnp.sum(jnp.sin(out[0] if options else out))

    derivative = jax.jit(jax.grad(loss))(jnp.float32(0.4), jnp.asarray(mask))
    # Through the weights, which autodiff differentiates.
    expected = jax.grad(functools.partial(loss, return_weights=True))(jnp.float32(0.4))
    np.testing.assert_allclose(derivative, expected, rtol=1e-4)


# Shape of query, key and value; rules, mask, whether there is a bias, options.
SECOND = {
    "blocks, kernels' branches": ((1, 130, 2, 16), "default", None, False, {}),
    "xla": ((1, 9, 2, 5), "slopes", None, True, {"implementation": "xla"}),
    "reference": ((2, 9, 2, 5), "default", CAUSAL[..., :9, :9], True, {"implementation": "reference"}),
    "true derivative": ((1, 9, 2, 5), "true", None, True, {}),
    "full, causal": ((2, 9, 2, 5), "full", None, True, {"is_causal": True}),
    "mixed, masked": ((2, 9, 2, 5), "mixed", CAUSAL[..., :9, :9], False, {"identity": False}),
    "traced scale": ((1, 9, 2, 5), "default", None, True, {"scale": jnp.float32(0.4)}),
    "dot": ((1, 9, 2, 5), None, CAUSAL[..., :9, :9], True, {"similarity": "dot"}),
    "weights kept": ((1, 9, 2, 5), "default", CAUSAL[..., :9, :9], True, {"return_weights": True}),
}


@pytest.mark.parametrize("name", SECOND)
def test_derivatives_of_the_gradients_of_attention(name):
    """They are the Jacobian of the documented gradients: of float64 formulas by finite differences."""
    shape, rules, mask, biased, options = SECOND[name]
    rules, options = RULES.get(rules), {"scale": 0.4} | options
    if rules:
        options |= {"grad_query": rules[0], "grad_key": rules[1]}
    operands = [normal(seed, *shape) for seed in range(3)]
    operands += [normal(3, shape[2], shape[1], shape[1])] if biased else []
    names = ("query", "key", "value", "bias")[: len(operands)]
    directions, cotangents = ([normal(seed + i, *a.shape) for i, a in enumerate(operands)] for seed in (4, 8))

    def gradients(query, key, value, bias=None):
        def loss(query, key, value, bias):
            out = adder_attention(query, key, value, mask=mask, bias=bias, **options)
            return jnp.sum(jnp.sin(out[0] if options.get("return_weights") else out))

        argnums = tuple(range(len(operands)))
        return jax.grad(loss, argnums)(query, key, value, bias)

    @jax.jit
    def derivatives(operands, directions, cotangents):
        forward = jax.jvp(gradients, operands, directions)[1]
        return forward, jax.vjp(gradients, *operands)[1](cotangents)

    def formulas(step):
        moved = [a.astype(np.float64) + step * d for a, d in zip(operands, directions)]
        seen = CAUSAL[..., : shape[1], : shape[1]] if options.get("is_causal") else mask
        found = expected_gradients(
            *moved[:3], np.cos, seen, moved[3] if biased else None, float(options["scale"]),
            options.get("identity", True), rules,
        )  # fmt: skip
        return [found[name][0] for name in names]

    step = 1e-6  # so short that no difference passes a bend of its rule
    expected = [(ahead - behind) / (2 * step) for ahead, behind in zip(formulas(step), formulas(-step))]
    forward, backward = derivatives(*map(tuple, (operands, directions, cotangents)))
    for what, found, exact in zip(names, forward, expected):
        np.testing.assert_allclose(found, exact, atol=1e-4 * np.abs(exact).max(), rtol=0, err_msg=what)
    found, exact = (
        sum(np.sum(np.asarray(a, np.float64) * b) for a, b in zip(*pair))
        for pair in ((backward, directions), (expected, cotangents))
    )
    size = math.sqrt(sum(np.sum(np.square(a)) for a in expected))  # of the terms, which have random signs
    np.testing.assert_allclose(found, exact, atol=1e-4 * size, rtol=0)


def test_derivatives_of_the_gradient_of_masked_values_that_are_added():
    """Aggregation "l1"; queries of zeros make the weights uniform over what is seen."""
    zeros, value, direction = (
        np.zeros((1, 5, 1, 4), np.float32),
        2 * normal(0, 1, 5, 1, 3),
        normal(1, 1, 5, 1, 3),
    )
    seen = np.tril(np.ones((5, 5)))[:, :, None]
    options = dict(mask=seen[..., 0] > 0, aggregation="l1", identity=False)
    gradient = jax.grad(lambda value: jnp.sum(jnp.sin(adder_attention(zeros, zeros, value, **options))))

    def formula(step):
        moved = (value.astype(np.float64) + step * direction)[:, None, :, 0]
        difference = seen / seen.sum(1, keepdims=True) - moved  # [1, t, s, d]
        g = np.cos((seen * (np.abs(moved) - np.abs(difference))).sum(2, keepdims=True))
        return (seen * (np.clip(difference, -1, 1) + np.clip(moved, -1, 1)) * g).sum(1)[:, :, None]

    expected = (formula(1e-6) - formula(-1e-6)) / 2e-6
    np.testing.assert_allclose(gradient(value), formula(0.0), atol=1e-5)
    found = jax.jvp(gradient, (value,), (direction,))[1]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_products_are_not_rounded_by_default():
    """On a CPU float32 products are exact anyway; TPUs and GPUs must be told."""
    operands = [jax.ShapeDtypeStruct((1, 5, 2, 4), jnp.float32)] * 3
    gradients = jax.grad(lambda *a: jnp.sum(adder_attention(*a)), (0, 1, 2))
    program = str(jax.make_jaxpr(gradients)(*operands))
    assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST") >= 3


@pytest.mark.parametrize("what", ["forward", "three layers"])
def test_long_attention_holds_no_map(what):
    """No program holds a queries x keys buffer, in whatever layout; layers add no parts of it."""
    tokens, depth = 1025, 16
    operands = [jax.ShapeDtypeStruct((1, tokens, 1, depth), jnp.float32)] * 3
    layers = 3 if what == "three layers" else 1

    def network(query, key, value):
        for _ in range(layers):
            query = adder_attention(query, key, value)
        return jnp.sum(query**2)

    run = network if what == "forward" else jax.grad(network, (0, 1, 2))
    compiled = jax.jit(run).lower(*operands).compile()
    sizes = [math.prod(map(int, s.split(","))) for s in re.findall(r"f32\[([0-9,]+)\]", compiled.as_text())]
    assert max(sizes) < tokens * tokens / 3
    # A block's map has 114 x 1025 numbers; scores, their exponentials and gradients live at once.
    allowed = 4 * (8 * 114 * tokens + layers * 12 * tokens * depth)
    assert compiled.memory_analysis().temp_size_in_bytes < allowed


def test_sharded_batch_and_heads():
    """In blocks; a cut batch is gathered nowhere."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    operands = [normal(i, 2, 260, 2, 8) for i in range(3)]
    gradients = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(adder_attention(*a))), (0, 1, 2)))
    expected = gradients(*operands)
    for spec in (PartitionSpec("d"), PartitionSpec(None, None, "d")):
        placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a in operands]
        compiled = gradients.lower(*placed).compile()
        if spec[0]:
            assert not re.search("all-gather|all-to-all|all-reduce", compiled.as_text())
        for a, e in zip(compiled(*placed), expected):
            np.testing.assert_allclose(a, e, atol=1e-5)


def attend_with_shared_bias(query, key, value, bias, scale):
    mask = np.tril(np.ones((131, 131), bool))
    return adder_attention(query, key, value, bias=bias, mask=mask, scale=scale)


def all_gradients(function, *operands):
    return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), range(5)))(*operands)


@pytest.fixture(scope="module")
def plain():
    """Operands and their gradients without any transformation."""
    operands = (*(normal(i, 2, 131, 2, 4) for i in range(3)), normal(3, 1, 2, 1, 131), jnp.float32(0.4))
    return operands, all_gradients(attend_with_shared_bias, *operands)


@pytest.mark.parametrize("where", ["shard_map", "explicit mesh", "vmap", "remat in scan"])
def test_gradients_under_transformations(where, plain):
    (*operands, bias, scale), expected = plain
    attend = attend_with_shared_bias
    cut, whole = PartitionSpec("d"), PartitionSpec()

    def transformed(query, key, value, bias, scale):
        if where == "vmap":
            return jax.vmap(attend, (0, 0, 0, None, None))(query, key, value, bias[0], scale)
        if where == "remat in scan":
            layer = jax.checkpoint(lambda carry, _: (attend(carry, key, value, bias, scale), None))
            return jax.lax.scan(layer, query, length=1)[0]
        if where == "shard_map":
            mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
            run = jax.shard_map(attend, mesh=mesh, in_specs=(cut, cut, cut, whole, whole), out_specs=cut)
            return run(query, key, value, bias, scale)
        return attend(query, key, value, bias, scale)

    if where == "explicit mesh":
        with jax.set_mesh(jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))):
            placed = [jax.device_put(a, cut) for a in operands]
            actual = all_gradients(transformed, *placed, bias, scale)
            assert jax.typeof(actual[0]).sharding.spec[0] == "d"
    else:
        actual = all_gradients(transformed, *operands, bias, scale)
    for a, e in zip(actual, expected):
        np.testing.assert_allclose(a, e, atol=2e-5 * max(1.0, np.abs(e).max()))


def test_exported_gradients_with_a_symbolic_batch():
    pytest.importorskip("flatbuffers", reason="serialising an exported program needs flatbuffers")
    (batch,) = jax.export.symbolic_shape("b")
    gradients = jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(adder_attention(*a))), (0, 1, 2)))
    symbolic = [jax.ShapeDtypeStruct((batch, 130, 1, 4), jnp.float32)] * 3
    exported = jax.export.export(gradients, platforms=("cpu", "tpu", "cuda"))(*symbolic)
    operands = [normal(i, 2, 130, 1, 4) for i in range(3)]
    for a, e in zip(exported.call(*operands), gradients(*operands)):
        np.testing.assert_allclose(a, e, atol=1e-5)


def test_a_fused_kernel_runs_where_it_takes_the_operands(monkeypatch):
    """What FusedAttention says, from its side: operands, results, and whom a refusal leaves it to."""
    seen = []
    rules = Rule("sign"), Rule("hardtanh", 4.0)
    compose = dict(score=functools.partial(adder_matmul, grad_x=rules[0], grad_y=rules[1]))

    def forward(*operands):
        seen.append("forward")
        return _attention_xla.forward(*operands, **compose)

    def backward(*operands):
        seen.append("backward")
        assert operands[-2:] == rules
        return _attention_xla.backward(*operands[:-2], **compose)

    def refuses(query, key, value, mask, bias, rule_query, rule_key):
        assert (rule_query, rule_key) == rules
        return "no masks" if mask is not None else None

    fused = _dispatch.FusedAttention(forward, backward, refuses)
    row = _dispatch.IMPLEMENTATIONS["xla"]._replace(attention=fused)
    operands = [normal(i, 1, 5, 2, 4) for i in range(3)]

    def gradients(mask=None, **options):
        attend = functools.partial(
            adder_attention, mask=mask, grad_query="sign", grad_key=("hardtanh", 4.0), **options
        )
        return jax.vjp(attend, *operands)[1](normal(3, 1, 5, 2, 4))

    expected = gradients()
    monkeypatch.setitem(_dispatch.IMPLEMENTATIONS, "fused", row)
    monkeypatch.setitem(_dispatch._PREFERRED, "cpu", "fused")
    for options, calls in (
        ({}, ["forward", "backward"]),
        ({"implementation": "fused"}, ["forward", "backward"]),
        ({"implementation": "xla"}, []),
        ({"mask": np.ones((5, 5), bool)}, []),
        ({"scale": jnp.float32(1 / math.sqrt(8 * (1 - 2 / math.pi)))}, []),
    ):
        seen.clear()
        actual = gradients(**options)
        assert list(dict.fromkeys(seen)) == calls, options
        for a, e in zip(actual, expected):
            np.testing.assert_allclose(a, e, atol=1e-6)


def test_half_precision_gradients_with_a_branch_for_another_platform():
    """From 129 keys on a fused TPU kernel is one branch of the program, whose dtypes must be the other's."""
    operands = jax.random.normal(jax.random.key(0), (3, 1, 130, 1, 8)).astype(jnp.bfloat16)

    def total(query, key, value):
        return jnp.sum(adder_attention(query, key, value).astype(jnp.float32))

    default = jax.grad(total, argnums=(0, 1, 2))(*operands)
    named = jax.grad(
        lambda *arrays: jnp.sum(adder_attention(*arrays, implementation="xla").astype(jnp.float32)), (0, 1, 2)
    )(*operands)
    for got, expected in zip(default, named):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got.astype(jnp.float32), expected.astype(jnp.float32))
