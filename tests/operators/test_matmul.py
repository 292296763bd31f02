"""What adder_matmul promises besides its numbers: mistakes of others, memory, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adderflax.operators import adder_matmul, available_implementations

everywhere = pytest.mark.parametrize("implementation", (None, *available_implementations("cpu")))


def vjp(x, y, g, **options):
    return jax.vjp(functools.partial(adder_matmul, **options), x, y)[1](g)


@everywhere
def test_weight_gradient_is_not_transposed(implementation):
    # Square, so that a transposed gradient would have the right shape (a CUDA port's bug).
    x = jnp.asarray([[1.0, 2.0]])
    y = jnp.asarray([[0.0, 5.0], [4.0, 1.0]])
    g = jnp.asarray([[1.0, 10.0]])
    np.testing.assert_allclose(adder_matmul(x, y, implementation=implementation), [[-(1 + 2), -(4 + 1)]])
    dx, dy = vjp(x, y, g, implementation=implementation)
    np.testing.assert_allclose(dy, [[1.0, -40.0], [-2.0, 10.0]])
    np.testing.assert_allclose(dx, [[-1.0 + 10.0, 1.0 - 10.0]])


@everywhere
@pytest.mark.parametrize("slope", [None, 0.25, 1.0, 1e30])
def test_hardtanh_clips_at_one(implementation, slope):
    # Another port clips at 1 in one kernel and at 0.25 in its reference.
    grad_x = "hardtanh" if slope is None else ("hardtanh", slope)
    positive = np.asarray([0.0, 0.1, 0.25, 0.5, 1.0, 3.0], np.float32)
    differences = np.concatenate([-positive, positive])
    x, y = jnp.zeros((1, differences.size)), jnp.asarray(differences)[:, None]
    # A cotangent so large that slope * g would overflow.
    dx, _ = vjp(x, y, jnp.full((1, 1), 1e9), grad_x=grad_x, implementation=implementation)
    np.testing.assert_allclose(dx[0], 1e9 * np.clip((slope or 1.0) * differences, -1, 1), rtol=1e-6)


@everywhere
def test_products_are_parenthesised(implementation):
    # rule(a - b) * g, not rule(a) - b * g: two cotangents must scale the gradient.
    x, y = jnp.asarray([[0.3]]), jnp.asarray([[0.7]])
    one, _ = vjp(x, y, jnp.asarray([[1.0]]), implementation=implementation)
    three, _ = vjp(x, y, jnp.asarray([[3.0]]), implementation=implementation)
    np.testing.assert_allclose(one, [[0.4]], rtol=1e-6)
    np.testing.assert_allclose(three, [[1.2]], rtol=1e-6)


@everywhere
@pytest.mark.parametrize("depth", [1, 15, 16, 17, 31, 32, 33, 47, 100])
def test_last_terms_count_once(implementation, depth):
    # Ragged ends of K: a kernel that skips, doubles or zeroes the last tile shows here.
    x = np.zeros((3, depth), np.float32)
    y = np.zeros((depth, 5), np.float32)
    y[-1] = 2.0
    run = functools.partial(adder_matmul, implementation=implementation)
    np.testing.assert_array_equal(run(x, y), -2.0)
    np.testing.assert_array_equal(run(x + 1.0, y - y), -depth)


@everywhere
def test_batch_entries_do_not_mix(implementation):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(4, 6, 20)), jnp.float32)
    y = jnp.asarray(random.normal(size=(4, 20, 5)), jnp.float32)
    run = functools.partial(adder_matmul, grad_y="hardtanh", implementation=implementation)
    g = jnp.zeros((4, 6, 5)).at[2, 3].set(1.0)
    dx, dy = jax.vjp(run, x, y)[1](g)
    touched = np.zeros((4, 6, 20), bool)
    touched[2, 3] = True
    np.testing.assert_array_equal(np.asarray(dx) != 0, touched)
    assert (np.asarray(dy)[2] != 0).all() and not np.asarray(dy)[[0, 1, 3]].any()
    np.testing.assert_allclose(run(x, y)[1], run(x[1], y[1]), rtol=1e-6)


@everywhere
def test_gradients_have_the_primals_dtypes(implementation):
    x = jnp.ones((4, 8), jnp.bfloat16)
    y = jnp.zeros((8, 3), jnp.float16)
    assert adder_matmul(x, y, implementation=implementation).dtype == jnp.float32
    dx, dy = vjp(x, y, jnp.ones((4, 3)), implementation=implementation)
    assert (dx.dtype, dy.dtype) == (jnp.bfloat16, jnp.float16)


def test_bfloat16_is_accumulated_in_float32():
    # 4096 terms of 1: a bfloat16 sum would stop at 256.
    out = adder_matmul(jnp.ones((1, 4096), jnp.bfloat16), jnp.zeros((4096, 1), jnp.bfloat16))
    assert float(out[0, 0]) == -4096.0


def temporary(function, *arguments):
    """Bytes a compiled program needs besides its inputs and outputs, as a part of these."""
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    around = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return memory.temp_size_in_bytes / around


SHAPES = [(1024, 192, 768), (4096, 192, 192), (500, 197, 521)]


@pytest.mark.parametrize("shape", SHAPES)
def test_no_buffer_of_all_elements(shape):
    m, k, n = shape
    x, y, g = jnp.ones((m, k)), jnp.ones((k, n)), jnp.ones((m, n))
    assert temporary(adder_matmul, x, y) <= 3.0
    assert temporary(vjp, x, y, g) <= 3.0
    assert temporary(functools.partial(vjp, grad_x="sign", grad_y="hardtanh"), x, y, g) <= 3.0


def test_no_buffer_of_all_elements_in_scores():
    x, y, g = jnp.ones((48, 197, 64)), jnp.ones((48, 64, 197)), jnp.ones((48, 197, 197))
    assert temporary(adder_matmul, x, y) <= 3.0
    assert temporary(functools.partial(vjp, grad_y="hardtanh"), x, y, g) <= 3.0


def test_scores_are_not_computed_again_for_each_use():
    # XLA fuses what is not in a loop into every user: a softmax would compute its input thrice.
    def softmax_of_scores(x, y):
        return jax.nn.softmax(adder_matmul(x, y))

    x, y = jnp.ones((8, 17, 16)), jnp.ones((8, 16, 17))
    text = jax.jit(softmax_of_scores).lower(x, y).compile().as_text()
    assert text.count(" while(") == 1


BAD_CALLS = {
    "mismatched K": (
        ValueError, (np.ones((2, 3), np.float32), np.ones((4, 5), np.float32)), {},
        ["x", "(2, 3)", "y", "(4, 5)", "[..., 3, N]"],
    ),
    "rank of x": (
        ValueError, (np.ones(3, np.float32), np.ones((3, 5), np.float32)), {},
        ["x", "(3,)", "[..., M, K]"],
    ),
    "rank of y": (
        ValueError, (np.ones((2, 3), np.float32), np.ones(3, np.float32)), {},
        ["y", "(3,)", "[..., K, N]"],
    ),
    "batch": (
        ValueError, (np.ones((2, 4, 3), np.float32), np.ones((5, 3, 6), np.float32)), {},
        ["(2, 4, 3)", "(5, 3, 6)", "broadcast"],
    ),
    "integers": (
        TypeError, (np.ones((2, 3), np.int32), np.ones((3, 5), np.float32)), {},
        ["x", "int32", "float32, bfloat16, float16", "astype"],
    ),
    "float64": (
        TypeError, (np.ones((2, 3), np.float32), np.ones((3, 5), np.float64)), {},
        ["y", "float64", "astype"],
    ),
    "bool": (TypeError, (np.ones((2, 3), bool), np.ones((3, 5), np.float32)), {}, ["x", "bool"]),
    "complex": (
        TypeError, (np.ones((2, 3), np.complex64), np.ones((3, 5), np.float32)), {},
        ["x", "complex64"],
    ),
    "list": (TypeError, ([[1.0]], np.ones((1, 5), np.float32)), {}, ["x", "list", "jnp.asarray"]),
    "rule": (
        ValueError, (np.ones((2, 3), np.float32), np.ones((3, 5), np.float32)), {"grad_x": "tanh"},
        ["grad_x", "'tanh'", "full", "hardtanh", "sign"],
    ),
    "slope": (
        ValueError, (np.ones((2, 3), np.float32), np.ones((3, 5), np.float32)),
        {"grad_y": ("hardtanh", -1.0)}, ["grad_y", "slope", "-1.0"],
    ),
    "implementation": (
        ValueError, (np.ones((2, 3), np.float32), np.ones((3, 5), np.float32)),
        {"implementation": "cuda"}, ["implementation", "'cuda'", *available_implementations()],
    ),
    "implementation type": (
        ValueError, (np.ones((2, 3), np.float32), np.ones((3, 5), np.float32)),
        {"implementation": ["xla"]}, ["implementation", "['xla']", *available_implementations()],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name):
    error, operands, options, parts = BAD_CALLS[name]
    with pytest.raises(error) as raised:
        adder_matmul(*operands, **options)
    for part in parts:
        assert part in str(raised.value)


def test_available_implementations():
    assert available_implementations("cpu") == ("reference", "xla", "cpu")
    assert "gpu" in available_implementations() and "gpu" in available_implementations("cuda")
    assert available_implementations("gpu") == available_implementations("cuda")
    assert available_implementations("METAL") == ("reference", "xla")
