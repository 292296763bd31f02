import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_power import power_rule

from adderflax import adder_matmul
from adderflax.operators._origin import distance_from_origin

RULES = ["full", "hardtanh", ("hardtanh", 4.0), "sign"]


def templates(shape, dtype=jnp.float32):
    return (2.0 * jax.random.normal(jax.random.key(0), shape)).astype(dtype)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (769, 33), (3, 3, 2, 4)])
@pytest.mark.parametrize("p", [1.0, 1.4, 2.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_distance_from_origin(shape, p, dtype):
    w = templates(shape, dtype)
    out = distance_from_origin(w, p)
    assert out.dtype == jnp.float32
    expected = (np.abs(np.asarray(w, np.float64)) ** p).reshape(-1, shape[-1]).sum(0)
    np.testing.assert_allclose(out, expected, rtol=2e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("p", [1.0, 1.4])
def test_gradient_is_the_operators_for_a_row_of_zeros(rule, p):
    w, g = templates((6, 4)), jnp.arange(1.0, 5.0)
    found = jax.grad(lambda w: distance_from_origin(w, p, rule) @ g)(w)
    zeros = jnp.zeros((1, 6))
    expected = jax.grad(lambda w: -adder_matmul(zeros, w, p=p, grad_y=rule)[0] @ g)(w)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert jnp.any(found)


def test_with_the_operator_the_gradient_is_the_dense_layers():
    x, w = jax.random.normal(jax.random.key(1), (9, 6)), templates((6, 4))
    g = jax.random.normal(jax.random.key(2), (9, 4))
    centered = lambda w: jnp.sum(g * (adder_matmul(x, w) + distance_from_origin(w)[None]))  # noqa: E731
    np.testing.assert_allclose(jax.grad(centered)(w), x.T @ g, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("p", [1.0, 1.4])
def test_derivatives_of_the_gradient(rule, p):
    """They are the Jacobian of the gradient's formula: in float64, by finite differences."""
    w, direction = templates((6, 4)), jax.random.normal(jax.random.key(1), (6, 4))
    gradient = jax.grad(lambda w: jnp.sum(jnp.sin(distance_from_origin(w, p, rule))))

    def formula(step):
        moved = np.asarray(w, np.float64) + step * np.asarray(direction, np.float64)
        return np.cos((np.abs(moved) ** p).sum(0)) * power_rule(rule, moved, p)

    expected = (formula(1e-6) - formula(-1e-6)) / 2e-6
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(jax.jvp(gradient, (w,), (direction,))[1], expected, atol=bound)
    jacobian = jax.jacrev(gradient)(w)
    np.testing.assert_allclose(jnp.tensordot(jacobian, direction, 2), expected, atol=bound)


def test_traced_exponent_has_no_gradient():
    assert jax.grad(lambda p: distance_from_origin(templates((3, 2)), p).sum())(jnp.float32(1.5)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3.0,), r"p=3\.0 must lie from 1"), ((1.0, "half"), "grad_kernel: unknown gradient rule 'half'")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        distance_from_origin(templates((3, 2)), *arguments)
