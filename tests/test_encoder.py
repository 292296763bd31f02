"""The encoder's parts against float64 references of their formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layer_reference import SMALL, adder, kernels, layer_norm, random_params, tokens

from adderflax import AdderMlp, AdderSelfAttention, EncoderBlock


def test_block_passes_the_mask_on():
    block, mask = EncoderBlock(SMALL), jnp.tril(jnp.ones((5, 5), bool))
    variables = random_params(block, tokens())
    changed = tokens().at[:, -1].set(0.5)
    for apply, last_is_seen in (
        (block.apply, True),
        (lambda variables, x: block.apply(variables, x, mask=mask), False),
    ):
        before, after = (apply(variables, x)[:, :-1] for x in (tokens(), changed))
        assert np.allclose(before, after, atol=1e-6) != last_is_seen


@pytest.mark.parametrize("module", [EncoderBlock, AdderSelfAttention, AdderMlp])
@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 1), (1,)])
def test_tokens_of_another_width_are_refused(module, shape):
    message = rf"{module.__name__} takes tokens \[.*embed_dim\] with embed_dim=8, but got shape \({shape[0]},"
    with pytest.raises(ValueError, match=message):
        module(SMALL).init(jax.random.key(0), jnp.ones(shape))


@pytest.mark.parametrize("lead", [(), (2, 3), (1, 2, 2)], ids=str)
def test_any_axes_may_stand_before_the_tokens(lead):
    block = EncoderBlock(dataclasses.replace(SMALL, mlp_kernel_size=3, drop_path_rate=0.5))
    x, mask = tokens((*lead, 9, 8)), jnp.tril(jnp.ones((9, 9), bool))
    variables = random_params(block, tokens((2, 9, 8)))
    batch = x.reshape(-1, 9, 8)
    out, expected = (block.apply(variables, given, mask=mask) for given in (x, batch))
    assert out.shape == x.shape
    np.testing.assert_allclose(out.reshape(batch.shape), expected, atol=1e-6)


@pytest.mark.parametrize("spec", [P("d"), P(None, "d"), P()], ids=str)
@pytest.mark.parametrize("module", [EncoderBlock, AdderSelfAttention])
def test_axes_before_the_tokens_of_an_explicit_mesh(module, spec):
    layer = module(dataclasses.replace(SMALL, implementation=None, mlp_kernel_size=3))
    x = tokens((2, 4, 9, 8))
    variables = random_params(layer, x)
    mask = jnp.ones((2, 4, 1, 9, 9), bool)

    def results(variables, x, mask):
        out, captured = layer.apply(variables, x, mask=mask, mutable=["intermediates"])
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(layer.apply(variables, x, mask=mask))))(x)
        return out, gradient, jax.tree.leaves(captured)

    expected = jax.jit(results)(variables, x, mask)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array in (x, mask)]
        found = jax.jit(results)(jax.device_put(variables, NamedSharding(mesh, P())), *placed)
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)
        assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), a.ndim)


def test_only_the_last_two_axes_are_needed():
    for shape in ((8,), ()):
        with pytest.raises(ValueError, match=r"EncoderBlock takes tokens \[\.\.\., T, embed_dim\]"):
            EncoderBlock(SMALL).init(jax.random.key(0), jnp.ones(shape))


def test_mlp_formula():
    x = np.asarray(tokens(), np.float64)
    module = AdderMlp(SMALL)
    variables = module.init(jax.random.key(0), tokens())
    hidden = layer_norm(adder(x, kernels(variables, "params", "fc1")))
    assert hidden.shape[-1] == 12
    gelu = np.asarray(nn.gelu(jnp.asarray(hidden, jnp.float32)), np.float64)
    expected = layer_norm(adder(gelu, kernels(variables, "params", "fc2")))
    np.testing.assert_allclose(module.apply(variables, tokens()), expected, atol=1e-4)


@pytest.mark.parametrize("linear", ["adder", "multiply"])
def test_mlp_convolution_formula(linear):
    config = dataclasses.replace(SMALL, linear=linear, mlp_kernel_size=3)
    x, module = tokens((2, 9, 8)), AdderMlp(config)
    variables = random_params(module, x)
    params, without = variables["params"], dataclasses.replace(config, mlp_kernel_size=None)

    def normalized(x, norm):
        return layer_norm(x) * np.asarray(norm["scale"], np.float64) + np.asarray(norm["bias"], np.float64)

    def linear_layer(x, name):
        kernel = kernels(params, name)
        return normalized(adder(x, kernel) if linear == "adder" else x @ kernel, params[name]["norm"])

    hidden = linear_layer(np.asarray(x, np.float64), "fc1")
    image = np.pad(hidden.reshape(2, 3, 3, 12), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel, seen = kernels(params, "conv"), np.zeros((2, 3, 3, 12))
    assert kernel.shape == (3, 3, 1, 12)
    for h, w in np.ndindex(3, 3):
        pixels, weights = image[:, h : h + 3, w : w + 3], kernel[h, w, 0]
        seen += -np.abs(pixels - weights) if linear == "adder" else pixels * weights
    hidden = hidden + normalized(seen, params["conv"]["norm"]).reshape(2, 9, 12)
    gelu = np.asarray(nn.gelu(jnp.asarray(hidden, jnp.float32)), np.float64)
    np.testing.assert_allclose(module.apply(variables, x), linear_layer(gelu, "fc2"), atol=1e-4)
    assert "conv" not in AdderMlp(without).init(jax.random.key(0), x)["params"]


@pytest.mark.parametrize("shape", [(2, 5, 8), (9, 5, 8), (8,)])
def test_mlp_convolution_needs_a_square_image(shape):
    module = AdderMlp(dataclasses.replace(SMALL, mlp_kernel_size=3))
    with pytest.raises(ValueError, match="mlp_kernel_size=3 needs tokens of a square image"):
        module.init(jax.random.key(0), tokens(shape))


def test_block_adds_both_residuals():
    block = EncoderBlock(SMALL)
    variables = random_params(block, tokens())
    norm = nn.LayerNorm(epsilon=1e-6)

    def part(name):
        return {"params": variables["params"][name]}

    x = tokens()
    x = x + AdderSelfAttention(SMALL).apply(part("attention"), norm.apply(part("attention_norm"), x))
    x = x + AdderMlp(SMALL).apply(part("mlp"), norm.apply(part("mlp_norm"), x))
    np.testing.assert_allclose(block.apply(variables, tokens()), x, atol=1e-5)


def test_stochastic_depth_drops_whole_branches_and_rescales():
    config = dataclasses.replace(SMALL, drop_path_rate=0.5)
    block, x = EncoderBlock(config), tokens((64, 5, 8))
    variables = random_params(block, x)
    out = block.apply(variables, x, True, rngs={"drop_path": jax.random.key(3)})
    untouched = np.isclose(out, x, atol=1e-6).all(axis=(1, 2))
    assert 4 <= untouched.sum() <= 30  # both branches dropped: a quarter of 64
    np.testing.assert_array_equal(
        block.apply(variables, x), EncoderBlock(SMALL).apply(variables, x)
    )  # evaluation drops nothing

    attention = AdderSelfAttention(config).apply(
        {"params": variables["params"]["attention"]},
        nn.LayerNorm(epsilon=1e-6).apply({"params": variables["params"]["attention_norm"]}, x),
    )
    mlp_dropped = np.isclose(out, x + 2 * attention, atol=1e-4).all(axis=(1, 2)) & ~untouched
    assert mlp_dropped.any()


def test_stochastic_depth_is_drawn_for_the_first_axis():
    block, x = EncoderBlock(dataclasses.replace(SMALL, drop_path_rate=0.5)), tokens((64, 3, 5, 8))
    variables = random_params(block, x)
    for given, batched in ((x, True), (x[0, 0], False)):
        apply = jax.jit(lambda key, given=given: block.apply(variables, given, True, rngs={"drop_path": key}))
        kept = [~np.isclose(apply(jax.random.key(i)), given, atol=1e-6) for i in range(1 if batched else 16)]
        # Whole entries are as they were, or nothing of them.
        kept = np.stack(kept).reshape(64 if batched else 16, -1)
        assert (kept.mean(1) > 0.9).sum() + (~kept).all(1).sum() == len(kept)
        assert 0 < (~kept).all(1).sum() < len(kept) / 2
