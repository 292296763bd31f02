"""Every implementation against the float64 definition, over generated cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import operator_reference as reference
import pytest

from adderflax.operators import adder_matmul, available_implementations

# None is what users run; it chooses among the rest.
IMPLEMENTATIONS = (None, *available_implementations("cpu"))
CASES = reference.generate(reference.BUCKETS, rules_per_shape=1, scales_per_program=4)


@functools.cache
def program(grad_x, grad_y, implementation):
    @jax.jit
    def run(x, y, g):
        options = dict(grad_x=grad_x, grad_y=grad_y, implementation=implementation)
        out, vjp = jax.vjp(functools.partial(adder_matmul, **options), x, y)
        return out, *vjp(g)

    return run


def check(case, implementation):
    x, y, g = case.operands()
    arguments = [jnp.asarray(array) for array in (x, y, g)]
    out, dx, dy = program(case.grad_x, case.grad_y, implementation)(*arguments)
    assert out.dtype == jnp.float32
    assert (dx.dtype, dy.dtype) == (x.dtype, y.dtype)
    reference.assert_within(np.asarray(out), *reference.forward(x, y), "forward")
    expected = reference.gradients(x, y, g, case.grad_x, case.grad_y)
    reference.assert_within(np.asarray(dx), *expected[0], "gradient of x")
    reference.assert_within(np.asarray(dy), *expected[1], "gradient of y")


def test_there_are_enough_cases():
    assert len(CASES) >= 60
    assert {case.grad_x for case in CASES} == {rules[0] for rules in reference.RULES}
    assert {(case.dtype_x, case.dtype_y) for case in CASES} == set(reference.DTYPE_PAIRS)
    assert {(case.scale_x, case.scale_y) for case in CASES} == set(reference.SCALES)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", available_implementations("cpu"))
def test_conformance(case, implementation):
    check(case, implementation)


LONG = reference.generate(
    reference.BUCKETS + reference.random_shapes(60, seed=1), rules_per_shape=2, scales_per_program=4
)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_conformance_at_length(implementation):
    assert len(LONG) >= 500
    for case in LONG:
        try:
            check(case, implementation)
        except AssertionError as error:
            raise AssertionError(str(case)) from error
    print(f"{len(LONG)} cases agree for implementation={implementation!r}")


@pytest.mark.parametrize("implementation", available_implementations("cpu"))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operand", ["x", "y", "both"])
def test_non_finite_inputs_stay_visible(implementation, value, operand):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(9, 35)), random.normal(size=(35, 21))
    if operand != "y":
        x[4, 17] = value
    if operand != "x":
        y[17, 11] = value
    x, y = x.astype(np.float32), y.astype(np.float32)
    with np.errstate(invalid="ignore"):
        expected, _ = reference.forward(x, y)
    out = np.asarray(adder_matmul(x, y, implementation=implementation))
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(expected))
    assert (~np.isfinite(expected)).any()


@pytest.mark.parametrize("implementation", available_implementations("cpu"))
def test_float16_operands(implementation):
    case = reference.Case((5, 20), (20, 7), "float16", "float16", "hardtanh", "full", 1.0, 1.0, seed=0)
    check(case, implementation)
