"""The exponent p of adder_matmul and adder_conv: values and gradients between L1 and squared distance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import operator_reference as reference
import pytest

from adderflax.analysis import count_operations
from adderflax.operators import adder_conv, adder_matmul

RULES = ["hardtanh", ("hardtanh", 4.0), "full", "sign"]


def normal(seed, *shape, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def power_rule(name, difference, p):
    """The documented rule, in float64."""
    derivative = p * np.abs(difference) ** (p - 1) * np.sign(difference)
    if name == "sign":
        return derivative
    return (2 - p) * reference.rule(name, difference) + (p - 1) * derivative


def expected(x, y, g, p, grad_x, grad_y):
    """[(value, S)] of the result, dx and dy in float64, S without cancellation."""
    x, y, g = (array.astype(np.float64) for array in (x, y, g))
    difference = y[..., None, :, :] - x[..., :, :, None]
    values = np.abs(difference) ** p
    to_x = power_rule(grad_x, difference, p) * g[..., :, None, :]
    to_y = power_rule(grad_y, -difference, p) * g[..., :, None, :]
    return [
        (-values.sum(-2), values.sum(-2)),
        (to_x.sum(-1), np.abs(to_x).sum(-1)),
        (to_y.sum(-3), np.abs(to_y).sum(-3)),
    ]


@functools.cache
def program(grad_x, grad_y):
    @jax.jit
    def run(x, y, g, p):
        function = functools.partial(adder_matmul, p=p, grad_x=grad_x, grad_y=grad_y)
        out, vjp = jax.vjp(function, x, y)
        return out, *vjp(g)

    return run


@pytest.mark.parametrize("rules", list(zip(RULES, RULES[::-1])), ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4])
def test_traced_p_against_float64(rules, scale):
    x, y, g = normal(0, 2, 9, 37, scale=scale), normal(1, 2, 37, 21, scale=scale), normal(2, 2, 9, 21)
    for p in (1.0, 1.25, 1.5, 2.0):
        actual = program(*rules)(x, y, g, jnp.float32(p))
        for value, (wanted, terms), what in zip(actual, expected(x, y, g, p, *rules), "out dx dy".split()):
            reference.assert_within(np.asarray(value), wanted, terms, f"{what} at p={p}")
    assert program(*rules)._cache_size() == 1  # annealing compiles once


@pytest.mark.parametrize("rules", list(zip(RULES, RULES[::-1])), ids=str)
def test_ends(rules):
    x, y, g = normal(0, 9, 37), normal(1, 37, 21), normal(2, 9, 21)
    at_one = program(*rules)(x, y, g, jnp.float32(1.0))
    out, vjp = jax.vjp(functools.partial(adder_matmul, grad_x=rules[0], grad_y=rules[1]), x, y)
    for value, wanted in zip(at_one, (out, *vjp(jnp.asarray(g)))):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)
    at_two = program(*rules)(x, y, g, jnp.float32(2.0))
    square = lambda x, y: -jnp.sum((x[:, :, None] - y[None]) ** 2, 1)  # noqa: E731
    out, vjp = jax.vjp(square, jnp.asarray(x), jnp.asarray(y))
    for value, wanted in zip(at_two, (out, *vjp(jnp.asarray(g)))):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)


def test_nothing_bad_happens_where_operands_meet():
    x = jnp.asarray([[0.0, -0.0, 1e-38, 1e-20, 3.0]])
    y = jnp.concatenate([x.T, x.T], axis=1)
    for rules in zip(RULES, RULES):
        for p in (1.0, 1.0001, 1.5, 2.0):
            for value in program(*rules)(x, y, jnp.ones((1, 2)), jnp.float32(p)):
                np.testing.assert_allclose(value, 0.0, atol=1e-6)


@pytest.mark.parametrize("rules", list(zip(RULES, RULES[::-1])), ids=str)
def test_an_infinite_operand_at_a_traced_one(rules):
    """As the number 1 has it, which the kernels for the L1 distance compute."""
    x, y, g = jnp.asarray([[np.inf, 1.0], [0.5, -np.inf]]), jnp.asarray([[0.0], [0.25]]), jnp.ones((2, 1))
    found = program(*rules)(x, y, g, jnp.float32(1.0))
    out, vjp = jax.vjp(functools.partial(adder_matmul, grad_x=rules[0], grad_y=rules[1]), x, y)
    np.testing.assert_array_equal(found[0], out)
    assert np.isneginf(out).all()
    for value, wanted in zip(found[1:], vjp(g)):
        # But for the sign of the infinite gradients that "full" has: blocks are filled with 0 times them.
        finite = np.isfinite(wanted)
        np.testing.assert_allclose(value[finite], wanted[finite], rtol=1e-6)
        assert not np.isfinite(value[~finite]).any()


def test_the_number_one_is_the_l1_operator():
    x, y = normal(0, 4, 8), normal(1, 8, 3)
    assert str(jax.make_jaxpr(lambda x, y: adder_matmul(x, y, p=1))(x, y)) == str(
        jax.make_jaxpr(lambda x, y: adder_matmul(x, y))(x, y)
    )


def test_p_has_no_gradient_and_is_clipped():
    x, y = normal(0, 4, 8), normal(1, 8, 3)
    dp = jax.grad(lambda p: jnp.sum(adder_matmul(x, y, p=p)))(jnp.float32(1.5))
    assert dp == 0.0
    run = jax.jit(lambda p: adder_matmul(x, y, p=p))
    np.testing.assert_array_equal(run(jnp.float32(0.2)), run(jnp.float32(1.0)))
    np.testing.assert_array_equal(run(jnp.float32(7.0)), run(jnp.float32(2.0)))


def test_convolution_and_vmap_over_p():
    x, kernel = jnp.asarray(normal(0, 2, 5, 5, 4)), jnp.asarray(normal(1, 3, 3, 2, 6))

    def convolution(x, kernel, p):
        return adder_conv(x, kernel, strides=(2, 2), feature_group_count=2, grad_kernel="hardtanh", p=p)

    def patches_and_matmul(x, kernel, p):
        padded = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        taps = [padded[:, i : i + 5 : 2, j : j + 5 : 2] for i in range(3) for j in range(3)]
        parts = [
            adder_matmul(
                jnp.concatenate([tap[..., 2 * group : 2 * group + 2] for tap in taps], -1).reshape(18, 18),
                kernel[..., 3 * group : 3 * group + 3].reshape(18, 3),
                grad_y="hardtanh",
                p=p,
            )
            for group in range(2)
        ]
        return jnp.concatenate(parts, -1).reshape(2, 3, 3, 6)

    def results(function):
        def run(p):
            out, vjp = jax.vjp(lambda x, kernel: function(x, kernel, p), x, kernel)
            return out, *vjp(jnp.cos(out))

        return jax.jit(jax.vmap(run))(jnp.asarray([1.0, 1.5, 2.0], jnp.float32))

    for value, wanted in zip(results(convolution), results(patches_and_matmul)):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)


def test_never_the_whole_product():
    x, y, g = jnp.ones((500, 197)), jnp.ones((197, 521)), jnp.ones((500, 521))
    memory = program("hardtanh", "full").lower(x, y, g, jnp.float32(1.5)).compile().memory_analysis()
    around = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.temp_size_in_bytes <= 3 * around


def test_a_symbolic_batch():
    # Rows that are not known are not cut into blocks.
    (rows,) = jax.export.symbolic_shape("rows")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 8), (8, 3), (rows, 3), ())]
    x, y, g = normal(0, 5, 8), normal(1, 8, 3), normal(2, 5, 3)
    actual = jax.export.export(program("sign", "full"))(*shapes).call(x, y, g, jnp.float32(1.5))
    for value, (wanted, terms) in zip(actual, expected(x, y, g, 1.5, "sign", "full")):
        reference.assert_within(np.asarray(value), wanted, terms, "symbolic rows")


def test_the_ledger_does_not_call_it_an_adder():
    x, y = jax.ShapeDtypeStruct((6, 64), jnp.float32), jax.ShapeDtypeStruct((64, 10), jnp.float32)
    image, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 4, 4, 8), (1, 1, 8, 5)))
    for function, arguments, terms in (
        (adder_matmul, (x, y), 6 * 64 * 10),
        (adder_conv, (image, kernel), 16 * 8 * 5),
    ):
        ledger = count_operations(functools.partial(function, p=1.5), *arguments)
        assert ledger.adder_elements == 0
        for operation in ("exponential", "logarithm"):
            assert terms <= ledger.operations[operation] <= 1.3 * terms
        assert count_operations(function, *arguments).adder_elements == terms


def test_a_traced_integer_is_an_exponent():
    x, y = (
        np.random.default_rng(i).normal(size=shape).astype(np.float32)
        for i, shape in enumerate(((2, 3), (3, 4)))
    )
    for p in (1, 2):
        found = jax.jit(lambda p: adder_matmul(x, y, p=p))(p)
        np.testing.assert_allclose(found, adder_matmul(x, y, p=p), rtol=1e-6)


@pytest.mark.parametrize(
    "p, options, error, parts",
    [
        (0.5, {}, ValueError, ["p=0.5", "from 1"]),
        (float("nan"), {}, ValueError, ["p=nan"]),
        (True, {}, TypeError, ["p must be"]),
        ("2", {}, TypeError, ["p must be"]),
        (np.ones(2, np.float32), {}, ValueError, ["p has shape (2,)", "()"]),
        (1.5, {"implementation": "reference"}, ValueError, ["implementation", "'reference'", "'xla'"]),
    ],
)
@pytest.mark.parametrize("function", [adder_matmul, adder_conv])
def test_bad_p(function, p, options, error, parts):
    shapes = [(2, 3), (3, 4)] if function is adder_matmul else [(1, 2, 2, 3), (1, 1, 3, 4)]
    with pytest.raises(error) as raised:
        function(*(np.ones(shape, np.float32) for shape in shapes), p=p, **options)
    for part in parts:
        assert part in str(raised.value)
