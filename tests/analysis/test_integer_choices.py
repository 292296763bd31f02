"""What an integer model chooses on its calibration images: grids, and normalizations for their sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from integer_models import SMALL, RawSums, expected_integers, model_of

from adderflax import AdderDense
from adderflax.analysis.grids import on_grid
from adderflax.analysis.integers import _matching, _similarity_operation, quantize


def test_more_bits_come_closer():
    model, variables, images = model_of(**SMALL)
    own = model.apply(variables, images)
    error = {
        bits: np.abs(quantize(model, variables, images, bits=bits).apply(images) - own).max()
        for bits in (2, 4, 6, 8)
    }
    assert error[8] < error[6] < error[4] < error[2]
    assert error[8] < 0.2 * error[4]


@pytest.mark.parametrize("power", [False, True])
def test_features_keep_mean_and_deviation(power):
    images = jax.random.normal(jax.random.key(0), (64, 5, 32))
    model = RawSums(AdderDense(16, power_activation=power))
    variables = jax.tree.map(lambda leaf: 1.3 * leaf + 0.2, model.init(jax.random.key(1), images))
    before = RawSums(AdderDense(16))  # of the power, which acts on what was normalized

    def moments(params):
        outputs = np.float64(before.apply({"params": params}, images))
        return outputs.mean((0, 1)), outputs.std((0, 1))

    for bits in (3, 8):
        integers = quantize(model, variables, images, bits=bits)
        layer = integers.variables["params"]["layer"]
        inputs = on_grid(images, integers.operations["layer"].exponent, bits)
        found = np.float64(before.apply({"params": {"layer": layer}}, inputs))
        wanted = moments(variables["params"])
        np.testing.assert_allclose((found.mean((0, 1)), found.std((0, 1))), wanted, atol=1e-5)
        own = variables["params"]["layer"]["norm"]["scale"]
        assert (np.abs(layer["norm"]["scale"] - own).max() > 0.05) == (bits == 3)


def test_what_hardly_varies_is_not_made_large():
    wanted = jax.random.normal(jax.random.key(0), (64, 3))
    found = wanted * jnp.array([[0.5, 0.01, 0.0]]) + 3.0
    gain, offset = _matching(found, wanted)
    np.testing.assert_allclose(gain, [[2.0, 4.0, 1.0]], rtol=1e-4)
    np.testing.assert_allclose(jnp.mean(gain * found + offset, axis=0), jnp.mean(wanted, axis=0), atol=1e-5)
    model = RawSums(AdderDense(3))
    variables = model.init(jax.random.key(1), jnp.ones((1, 4)))
    images = jnp.ones((8, 4))
    norm = quantize(model, variables, images, bits=2).variables["params"]["layer"]["norm"]
    np.testing.assert_array_equal(norm["scale"], 1.0)


def test_grids_are_chosen_by_what_they_do_to_the_outputs():
    images = jax.random.normal(jax.random.key(0), (64, 32))
    model = RawSums(AdderDense(16))
    variables = model.init(jax.random.key(1), images)
    layer = variables["params"]["layer"]
    own = np.asarray(model.apply(variables, images))

    def error(exponent, bits):
        params = {"layer": layer | {"adder_kernel": on_grid(layer["adder_kernel"], exponent, bits)}}
        found = np.asarray(model.apply({"params": params}, on_grid(images, exponent, bits)))
        deviation = np.maximum(found.std(axis=0), own.std(axis=0) / 4)  # a gain of 4 is the most
        found = (found - found.mean(axis=0)) * (own.std(axis=0) / deviation) + own.mean(axis=0)
        return np.square(found - own).mean()

    for bits in (2, 3, 4, 8):
        chosen = quantize(model, variables, images, bits=bits).operations["layer"].exponent
        # All that could be meant, from one level to nothing but the ends.
        assert chosen == min(range(-8, 4), key=lambda exponent: error(exponent, bits))


def test_the_grid_of_a_similarity_is_chosen_by_its_logits():
    model, variables, images = model_of(**SMALL)
    outputs = {}

    def record(next_function, arguments, keywords, context):
        result = next_function(*arguments, **keywords)
        if (name := context.module.name) in ("query", "key"):
            outputs[name] = np.asarray(result, np.float64).reshape(5, -1, 2, 8)
        return result

    def logits(exponent=None, bits=None):
        query, key = (outputs[name] for name in ("query", "key"))
        if exponent is not None:
            query, key = (expected_integers(a, exponent, bits) * 2.0**exponent for a in (query, key))
        scores = -np.abs(query[:, :, None] - key[:, None]).sum(-1)
        return scores - scores.mean(axis=2, keepdims=True)  # over the keys

    with nn.intercept_methods(record):
        model.apply(variables, images)
    for bits in (2, 3, 4, 5, 6):
        chosen = quantize(model, variables, images, bits=bits).operations["block_0/attention"].exponent
        errors = {e: np.square(logits(e, bits) - logits()).mean() for e in range(-8, 4)}
        assert chosen == min(errors, key=errors.get)


@pytest.mark.parametrize(("bits", "over_keys", "over_queries"), [(4, -2, 0), (8, -5, -4)])
def test_what_shifts_all_logits_of_a_query_does_not_choose_the_grid(bits, over_keys, over_queries):
    # One query lies far from every key: a fine grid cuts it off, which takes the same off all logits of its
    # row, and the softmax ignores that. Without the mean over the queries instead it would count.
    query, key = np.random.default_rng(0).normal(size=(2, 5, 2, 4))
    query[0] += 6.0

    def logits(axis, exponent=None):
        q, k = query, key
        if exponent is not None:
            q, k = (expected_integers(a, exponent, bits) * 2.0**exponent for a in (q, k))
        scores = -np.abs(q[:, None] - k[None]).sum(-1)  # [queries, keys, heads]
        return scores - scores.mean(axis, keepdims=True)

    best = {}
    for axis in (0, 1):
        errors = {e: np.square(logits(axis, e) - logits(axis)).mean() for e in range(-8, 4)}
        best[axis] = min(errors, key=errors.get)
    assert (best[1], best[0]) == (over_keys, over_queries)
    operands = (jnp.float32(array.reshape(1, 5, 8)) for array in (query, key))
    assert _similarity_operation(*operands, heads=2, bits=bits).exponent == over_keys


def test_the_share_that_is_cut_off():
    # One template of 1.0: at 8 bits 2^-6 holds it, and of the inputs 127 / 64 = 1.984 is the last.
    model = RawSums(AdderDense(1, normalization="none", kernel_init=nn.initializers.ones))
    images = jnp.asarray([[1.0], [0.5], [-1.25], [1.9921], [1.9922], [-2.0078], [-2.0079]])
    variables = model.init(jax.random.key(0), images)
    operation = quantize(model, variables, images).operations["layer"]
    beyond = {-6: 2, -5: 0}[operation.exponent]
    assert operation.clipped == pytest.approx(beyond / 8)
