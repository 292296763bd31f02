"""Integer operands: every implementation gives the exact sums, and nothing but integers is let through."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from adderflax.operators import adder_conv, adder_matmul, available_implementations

IMPLEMENTATIONS = (None, *available_implementations("cpu"))
DTYPES = (np.int8, np.uint8)
SHAPES = [
    ((5, 3), (3, 7)),
    ((1, 1), (1, 1)),
    ((2, 33, 65), (65, 17)),
    ((3, 4, 19), (3, 19, 130)),
    ((4, 0), (0, 5)),
]


def integers(shape, dtype, seed):
    limits = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(limits.min, limits.max, shape, dtype, endpoint=True)


def exact(x, y):
    x, y = x.astype(np.int64), y.astype(np.int64)
    return -np.abs(x[..., :, :, None] - y[..., None, :, :]).sum(-2)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=2)), ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums_are_exact(implementation, shapes, dtypes):
    x, y = (integers(shape, dtype, i) for i, (shape, dtype) in enumerate(zip(shapes, dtypes)))
    out = jax.jit(lambda x, y: adder_matmul(x, y, implementation=implementation))(x, y)
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(out), exact(x, y))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_longest_sums_are_exact(implementation):
    # All terms but one are the largest, so that the sum is odd and next to 2^24.
    x, y = np.full((1, 65793), -128, np.int8), np.full((65793, 1), 127, np.int8)
    y[1234] = 126
    out = adder_matmul(x, y, implementation=implementation)
    assert int(out[0, 0]) == -(65793 * 255 - 1)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_convolutions_are_exact(implementation, groups):
    x, kernel = integers((2, 7, 6, 6), np.int8, 0), integers((3, 2, 6 // groups, 12), np.int8, 1)
    options = dict(strides=(2, 1), padding=((1, 0), (2, 1)), feature_group_count=groups)
    out = adder_conv(x, kernel, **options, implementation=implementation)
    padded = np.pad(x.astype(np.int64), ((0, 0), (1, 0), (2, 1), (0, 0)))
    expected = np.zeros((2, 3, 8, 12), np.int64)
    for h, w, o in np.ndindex(3, 8, 12):
        first = o // (12 // groups) * (6 // groups)
        patch = padded[:, 2 * h : 2 * h + 3, w : w + 2, first : first + 6 // groups]
        expected[:, h, w, o] = -np.abs(patch - kernel[..., o].astype(np.int64)).sum((1, 2, 3))
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(out), expected)


def test_too_many_terms_are_refused():
    longest = {(np.int8, np.int8): 65793, (np.uint8, np.uint8): 65793, (np.int8, np.uint8): 43804}
    for (dtype_x, dtype_y), terms in longest.items():
        shaped = [jax.ShapeDtypeStruct(s, d) for s, d in (((1, terms), dtype_x), ((terms, 1), dtype_y))]
        assert jax.eval_shape(adder_matmul, *shaped).dtype == jnp.int32
        with pytest.raises(ValueError, match=f"At most {terms} terms are allowed"):
            adder_matmul(jnp.zeros((1, terms + 1), dtype_x), jnp.zeros((terms + 1, 1), dtype_y))
    with pytest.raises(ValueError, match="At most 65793 terms are allowed"):
        adder_conv(jnp.zeros((1, 1, 1, 65794), jnp.int8), jnp.zeros((1, 1, 65794, 1), jnp.int8))


def test_a_symbolic_number_of_terms_needs_a_bound():
    def exported(*constraints):
        (k,) = export.symbolic_shape("k", constraints=constraints)
        shaped = [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in ((2, k), (k, 3))]
        return export.export(jax.jit(adder_matmul))(*shaped)

    assert exported("k <= 65793").out_avals[0].dtype == jnp.int32
    for constraints in ((), ("k <= 65794",)):
        with pytest.raises(ValueError, match="sums of k terms, a symbolic number, .*such as 'k <= 1024'"):
            exported(*constraints)


def test_integers_meet_integers_at_p_1_only():
    x, y = jnp.zeros((2, 3), jnp.int8), jnp.zeros((3, 4), jnp.int8)
    with pytest.raises(TypeError, match="x has dtype int8 and y has dtype float32; integers meet integers"):
        adder_matmul(x, y.astype(jnp.float32))
    assert adder_matmul(x, y, p=np.float32(1)).dtype == jnp.int32
    for p in (2.0, True, jnp.ones(())):
        with pytest.raises(TypeError, match="no whole numbers. Pass the Python number p=1"):
            adder_matmul(x, y, p=p)
    with pytest.raises(TypeError, match="allowed are float32, bfloat16, float16, int8, uint8"):
        adder_matmul(x.astype(jnp.int32), y)
    with pytest.raises(TypeError, match="kernel has dtype float32; integers meet integers"):
        adder_conv(x.reshape(1, 2, 1, 3), jnp.zeros((1, 1, 3, 1)))
