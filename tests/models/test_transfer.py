"""A trained Vision Transformer's parameters for images of another size and for other classes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adderflax import VisionTransformer, VisionTransformerConfig
from adderflax.models.transfer import resize_position_embedding, transfer

SIZES = {"image_size": 12, "patch_size": 4, "channels": 2, "num_classes": 5, "embed_dim": 8, "num_heads": 2}


def described(arithmetic="adder", **fields):
    return VisionTransformerConfig.from_variant("Ti/16", arithmetic, **(SIZES | {"depth": 1} | fields))


def parameters(config):
    images = jnp.zeros((1, config.image_size, config.image_size, config.channels))
    return VisionTransformer(config).init(jax.random.key(0), images)["params"]


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_what_is_transferred_computes(pooling):
    config = described(pooling=pooling)
    to = described(pooling=pooling, image_size=20, num_classes=3, linear="multiply")
    params, found = transfer(parameters(config), config, to)
    assert found == dataclasses.replace(config, image_size=20, num_classes=3)
    logits = VisionTransformer(found).apply({"params": params}, jnp.ones((2, 20, 20, 2)))
    np.testing.assert_array_equal(logits, jnp.zeros((2, 3)))  # of a classifier that knows nothing yet
    before = parameters(config)
    for name in before.keys() - {"position_embedding", "head"}:
        jax.tree.map(np.testing.assert_array_equal, params[name], before[name])


def test_equal_sizes_are_left_alone():
    config = described()
    params, found = transfer(parameters(config), config, described("multiply"))
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, params, parameters(config))


def keys_kernel(distance):
    """The cubic kernel of Keys (1981) with a = -1/2, which timm's bicubic interpolation uses too."""
    x = np.abs(distance)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@pytest.mark.parametrize(("old", "new"), [(3, 5), (5, 3), (3, 6), (6, 2), (4, 1)])
def test_positions_are_resized_by_the_cubic_kernel_with_antialiasing(old, new):
    """Outputs average over as many inputs as lie under the kernel, which is wider where there are fewer."""
    scale = old / new
    centers = (np.arange(new) + 0.5) * scale - 0.5
    weights = keys_kernel((np.arange(old) - centers[:, None]) / max(scale, 1.0))
    weights /= weights.sum(axis=1, keepdims=True)
    position = np.random.default_rng(0).normal(size=(1, old * old, 8)).astype(np.float32)
    expected = np.einsum("ia,jb,abd->ijd", weights, weights, position.reshape(old, old, 8).astype(np.float64))
    found = resize_position_embedding(position, described(pooling="mean", image_size=4 * new))
    np.testing.assert_allclose(found, expected.reshape(1, new * new, 8), atol=5e-6)


def test_the_parameters_given_are_left_as_they_are():
    config = described()
    given = parameters(config)
    before = jax.tree.map(np.array, given)
    transfer(given, config, described(image_size=20, num_classes=3))
    jax.tree.map(np.testing.assert_array_equal, given, before)


def test_what_has_no_counterpart_stays():
    config = described(head="adder")
    params, found = transfer(
        parameters(config), config, described(num_classes=3, image_size=16, patch_size=2)
    )
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, params, parameters(config))


def test_positions_keep_their_order_and_the_class_token_its_own():
    """A ramp over the rows stays one: resized, every position is still below the one above it."""
    ramp = jnp.broadcast_to(jnp.arange(3.0)[:, None, None], (3, 3, 8)).reshape(1, 9, 8)
    small = described(pooling="mean", image_size=24)
    resized = resize_position_embedding(ramp, small).reshape(6, 6, 8)
    assert jnp.all(jnp.diff(resized, axis=0) > 0)
    np.testing.assert_allclose(jnp.diff(resized, axis=1), 0.0, atol=1e-6)
    np.testing.assert_allclose(resized.mean(), 1.0, atol=1e-6)
    token = jnp.full((1, 1, 8), 7.0)
    both = resize_position_embedding(jnp.concatenate([token, ramp], 1), described(image_size=24))
    np.testing.assert_array_equal(both[:, :1], token)
    np.testing.assert_array_equal(both[:, 1:].reshape(6, 6, 8), resized)
