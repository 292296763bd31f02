"""The optimizer: AdderNet's local rate, the template multiplier, decay masks, schedule, order of parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adderflax.training.optimizer import (
    OptimizerConfig,
    adaptive_local_rate,
    decay_mask,
    idle_fields,
    make_optimizer,
    scale_adder_updates,
)

PARAMS = {
    "query": {"adder_kernel": jnp.ones((16, 4)), "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)}},
    "head": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    "class_token": jnp.ones((1, 1, 4)),
}


def gradients(seed=0):
    leaves, tree = jax.tree.flatten(PARAMS)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)])


def first_update(config, grads, total_steps=10):
    optimizer, _ = make_optimizer(config, total_steps)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    return updates


def test_local_rate_is_addernets_formula():
    grads = gradients()
    scaled, _ = adaptive_local_rate(0.2).update(grads, optax.EmptyState())
    g = np.asarray(grads["query"]["adder_kernel"], np.float64)
    expected = g / np.linalg.norm(g) * np.sqrt(g.size) / 5
    np.testing.assert_allclose(scaled["query"]["adder_kernel"], expected, rtol=1e-6)
    np.testing.assert_array_equal(scaled["head"]["kernel"], grads["head"]["kernel"])


def test_local_rate_of_a_vanished_gradient_is_zero():
    """A public port has no floor under the norm: 0/0 = NaN."""
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    scaled, _ = adaptive_local_rate(0.2).update(zeros, optax.EmptyState())
    np.testing.assert_array_equal(scaled["query"]["adder_kernel"], 0.0)


def test_local_rate_ignores_the_loss_scale():
    """AdderNet normalizes in the backward pass, where a scaled loss cannot be unscaled again."""
    a, _ = adaptive_local_rate(0.2).update(gradients(), optax.EmptyState())
    b, _ = adaptive_local_rate(0.2).update(
        jax.tree.map(lambda g: 1024.0 * g, gradients()), optax.EmptyState()
    )
    np.testing.assert_allclose(a["query"]["adder_kernel"], b["query"]["adder_kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *((dtype, size) for dtype in ("float32", "bfloat16") for size in (1e-6, 1.0, 1e36)),
        *(("float16", size) for size in (1e-6, 1e-4, 1.0, 1e4)),
    ],
)
def test_local_rate_of_gradients_of_any_size_and_precision(dtype, size):
    """Squares of float16 overflow from 256 on, those of float32 from 2e19 on."""
    gradient = (size * np.asarray(gradients()["query"]["adder_kernel"])).astype(dtype)
    scaled, _ = adaptive_local_rate(0.2).update({"adder_kernel": jnp.asarray(gradient)}, optax.EmptyState())
    assert scaled["adder_kernel"].dtype == dtype
    g = gradient.astype(np.float64)
    expected = g / np.linalg.norm(g) * np.sqrt(g.size) / 5
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(scaled["adder_kernel"].astype(np.float32), expected, rtol=2 * eps, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_local_rate_below_its_floor(dtype):
    """Gradients whose norm is below 1e-12 are multiplied by a constant, zeros stay zeros."""
    tiny = jnp.full((16, 4), 1e-20)
    scaled, _ = adaptive_local_rate(0.2).update({"adder_kernel": tiny}, optax.EmptyState())
    np.testing.assert_allclose(scaled["adder_kernel"], 1e-20 * 0.2 * 8.0 / 1e-12, rtol=1e-5)
    for shape in ((16, 4), (0, 4)):
        zeros = {"adder_kernel": jnp.zeros(shape, dtype)}
        scaled, _ = adaptive_local_rate(0.2).update(zeros, optax.EmptyState())
        np.testing.assert_array_equal(scaled["adder_kernel"], zeros["adder_kernel"])


def test_multiplier_defaults_to_the_root_of_fan_in():
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    derived, _ = scale_adder_updates(None).update(ones, optax.EmptyState())
    np.testing.assert_array_equal(derived["query"]["adder_kernel"], 4.0)
    np.testing.assert_array_equal(derived["head"]["kernel"], 1.0)
    given, _ = scale_adder_updates(10.0).update(ones, optax.EmptyState())
    np.testing.assert_array_equal(given["query"]["adder_kernel"], 10.0)
    np.testing.assert_array_equal(given["query"]["norm"]["scale"], 1.0)


@pytest.mark.parametrize(
    "rescale", [lambda **k: scale_adder_updates(None, **k), lambda **k: adaptive_local_rate(0.2, **k)]
)
@pytest.mark.parametrize("shape", [(16, 4), (3, 3, 2, 4)])
def test_stacked_layers_are_rescaled_one_by_one(rescale, shape):
    """As `nn.scan` stores them, of which the parameters' names say nothing."""
    layers = jnp.stack([size * jax.random.normal(jax.random.key(size), shape) for size in range(1, 6)])

    def rescaled(gradient, **options):
        updates, _ = rescale(**options).update({"adder_kernel": gradient}, optax.EmptyState())
        return updates["adder_kernel"]

    alone = jnp.stack([rescaled(layer) for layer in layers])
    np.testing.assert_allclose(rescaled(layers, stacked_axes=1), alone, rtol=1e-6)
    twice = rescaled(layers[None], stacked_axes=2)
    np.testing.assert_allclose(twice[0], alone, rtol=1e-6)
    with pytest.raises(ValueError, match=r"adder_kernel has shape \(5, .*nn.scan .* pass stacked_axes=1"):
        rescaled(layers)
    with pytest.raises(ValueError, match="some layers are stacked and others are not.* optax.masked"):
        rescaled(layers[0], stacked_axes=1)
    for wrong in (-1, 1.5, "1"):
        with pytest.raises(ValueError, match="stacked_axes=.* must be a whole number"):
            rescale(stacked_axes=wrong)


def test_adam_steps_are_of_equal_relative_size():
    """The reason for the multiplier: step over deviation is the same for N(0, 1) and 1/sqrt(fan_in)."""
    config = OptimizerConfig(learning_rate=0.01, warmup_fraction=0.0, weight_decay=0.0)
    params = {"a": {"adder_kernel": jnp.ones((64, 8))}, "d": {"kernel": jnp.ones((64, 8))}}
    optimizer, _ = make_optimizer(config, 10)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    relative_adder = np.abs(updates["a"]["adder_kernel"]).mean() / 1.0
    relative_dense = np.abs(updates["d"]["kernel"]).mean() / (1 / np.sqrt(64))
    np.testing.assert_allclose(relative_adder, relative_dense, rtol=1e-5)


def test_fields_that_have_nothing_to_act_on_are_named():
    idle = OptimizerConfig(name="sgd", adder_local_rate=0.2, decay_adder=True, adder_multiplier=2.0)
    named = ["optimizer.adder_multiplier", "optimizer.adder_local_rate", "optimizer.decay_adder"]
    params = {name: PARAMS[name] for name in ("head", "class_token")}
    assert idle_fields(idle, params) == named
    assert idle_fields(OptimizerConfig(), params) == []
    assert idle_fields(OptimizerConfig(adder_multiplier=0.0), params) == named[:1]
    assert idle_fields(idle, PARAMS) == []
    decays = OptimizerConfig(weight_decay=0.0, decay_adder=True, decay_rest=True)
    assert idle_fields(decays, PARAMS) == ["optimizer.decay_adder", "optimizer.decay_rest"]
    assert idle_fields(decays, params) == ["optimizer.decay_adder", "optimizer.decay_rest"]
    assert idle_fields(OptimizerConfig(nesterov=True, beta1=0.8), PARAMS) == ["optimizer.nesterov"]
    assert idle_fields(OptimizerConfig(name="sgd", nesterov=True, beta1=0.8), PARAMS) == ["optimizer.beta1"]


def test_decay_mask():
    mask = decay_mask(PARAMS, decay_adder=False)
    assert mask["head"] == {"kernel": True, "bias": False}
    assert mask["query"] == {"adder_kernel": False, "norm": {"scale": False, "bias": False}}
    assert mask["class_token"] is False
    assert decay_mask(PARAMS, decay_adder=True)["query"]["adder_kernel"] is True
    mask = decay_mask(PARAMS, decay_adder=False, decay_rest=True)
    assert mask.pop("query") == {"adder_kernel": False, "norm": {"scale": True, "bias": True}}
    assert all(jax.tree.leaves(mask))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_decay_is_not_multiplied(name):
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    config = OptimizerConfig(
        name=name, learning_rate=0.1, warmup_fraction=0.0, weight_decay=0.5, decay_adder=True
    )
    updates = first_update(config, zeros)
    np.testing.assert_allclose(updates["query"]["adder_kernel"], -0.1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["head"]["bias"], 0.0)


def test_sgd_with_local_rate_is_the_official_step():
    config = OptimizerConfig(
        name="sgd",
        learning_rate=0.1,
        warmup_fraction=0.0,
        weight_decay=5e-4,
        decay_adder=True,
        adder_local_rate=0.2,
    )
    optimizer, _ = make_optimizer(config, 10**9)  # so long that the cosine stands still
    state, params = optimizer.init(PARAMS), PARAMS
    w, velocity = np.ones((16, 4)), 0.0
    for seed in range(3):
        grads = gradients(seed)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        g = np.asarray(grads["query"]["adder_kernel"], np.float64)
        g = g / np.linalg.norm(g) * np.sqrt(g.size) / 5 + 5e-4 * w
        velocity = 0.9 * velocity + g
        w = w - 0.1 * velocity
    np.testing.assert_allclose(params["query"]["adder_kernel"], w, rtol=1e-5)


def test_clipping_bounds_the_global_norm():
    config = OptimizerConfig(
        name="sgd", learning_rate=1.0, warmup_fraction=0.0, weight_decay=0.0, momentum=0.0, clip_norm=0.5
    )
    np.testing.assert_allclose(optax.tree.norm(first_update(config, gradients())), 0.5, rtol=1e-5)


def test_schedule_warms_up_then_falls():
    _, schedule = make_optimizer(
        OptimizerConfig(learning_rate=2.0, warmup_fraction=0.1, final_fraction=0.25), total_steps=100
    )
    assert float(schedule(0)) == 0.0
    np.testing.assert_allclose([schedule(5), schedule(10), schedule(100)], [1.0, 2.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(schedule(55), 0.5 * (2.0 + 0.5), rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    _, schedule = make_optimizer(OptimizerConfig(learning_rate=2.0, warmup_fraction=0.0), total_steps=1)
    assert float(schedule(0)) == 2.0


@pytest.mark.parametrize("total_steps", [1, 2, 10])
def test_warmup_leaves_a_step_for_the_cosine(total_steps):
    config = OptimizerConfig(learning_rate=2.0, warmup_fraction=1.0)
    _, schedule = make_optimizer(config, total_steps)
    assert float(schedule(total_steps - 1)) == 2.0 and float(schedule(total_steps)) == 0.0


def test_templates_are_found_below_their_name():
    """nnx.State puts the array one level below its name."""
    nested, _ = scale_adder_updates(None).update(
        {"adder_kernel": {"value": jnp.ones((16, 4))}}, optax.EmptyState()
    )
    np.testing.assert_array_equal(nested["adder_kernel"]["value"], 4.0)


def test_nesterov_looks_ahead():
    fields = {"name": "sgd", "learning_rate": 1.0, "warmup_fraction": 0.0, "weight_decay": 0.0}
    plain = first_update(OptimizerConfig(**fields), gradients())
    ahead = first_update(OptimizerConfig(**fields, nesterov=True), gradients())
    np.testing.assert_allclose(ahead["head"]["kernel"], 1.9 * plain["head"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "optimizer.name='adam' is not known; choose one of adamw, sgd"),
        ({"warmup_fraction": 1.5}, r"optimizer.warmup_fraction=1.5 must lie in \[0, 1\]"),
        ({"learning_rate": -1.0}, "optimizer.learning_rate=-1.0"),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
        ({"adder_multiplier": -2.0}, "optimizer.adder_multiplier=-2.0"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)
