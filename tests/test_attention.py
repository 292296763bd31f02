"""Attention against its formula in float64, and what it does to batches, masks and contexts."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType
from layer_reference import MULTIPLY, SMALL, adder, layer_norm, random_params, tokens

from adderflax import AdderCrossAttention, AdderDense, AdderSelfAttention, EncoderBlock

VIT = dataclasses.replace(MULTIPLY, identity=False, normalization="none", use_bias=True)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("config", [SMALL, MULTIPLY, VIT], ids=["adder", "multiply", "vit"])
def test_attention_formula(config):
    x = np.asarray(tokens(), np.float64)
    module = AdderSelfAttention(config)
    variables = random_params(module, tokens())
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def project(x, name):
        layer = params[name]
        y = adder(x, layer["adder_kernel"]) if "adder_kernel" in layer else x @ layer["kernel"]
        y = y + layer.get("bias", 0.0)
        return layer_norm(y) * layer["norm"]["scale"] + layer["norm"]["bias"] if "norm" in layer else y

    q, k, v = (
        project(x, name).reshape(2, 5, 2, 4).transpose(0, 2, 1, 3) for name in ("query", "key", "value")
    )
    if config.similarity == "l1":
        logits = -np.abs(q[..., :, None, :] - k[..., None, :, :]).sum(-1) / np.sqrt(2 * 4 * (1 - 2 / np.pi))
    else:
        logits = q @ k.swapaxes(-1, -2) / np.sqrt(4)
    weights = softmax(logits) + (np.eye(5) if config.identity else 0)
    expected = project((weights @ v).transpose(0, 2, 1, 3).reshape(2, 5, 8), "out")
    out, captured = module.apply(variables, tokens(), mutable=["intermediates"])
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(captured["intermediates"]["attention_weights"][0], weights, atol=1e-5)
    np.testing.assert_allclose(module.apply(variables, tokens()), out, atol=1e-5)
    assert ("bias" in params["query"]) == config.use_bias
    assert ("norm" in params["out"]) == (config.normalization == "layer")


def test_attention_does_not_mix_samples():
    """A public adder ViT reshapes [B, S, E] to [1, E, B, S]: a token of one image then changes another."""
    block = EncoderBlock(SMALL)
    variables = random_params(block, tokens())
    out = block.apply(variables, tokens())
    changed = block.apply(variables, tokens().at[1].add(1.0))
    np.testing.assert_array_equal(out[0], changed[0])
    assert not np.allclose(out[1], changed[1])


def test_attention_is_equivariant_to_token_order():
    module = AdderSelfAttention(SMALL)
    variables = random_params(module, tokens())
    order = jnp.array([3, 1, 4, 0, 2])
    np.testing.assert_allclose(
        module.apply(variables, tokens()[:, order]),
        module.apply(variables, tokens())[:, order],
        atol=1e-5,
    )


def test_attention_mask_hides_keys():
    module = AdderSelfAttention(SMALL)
    variables = random_params(module, tokens())
    causal = jnp.tril(jnp.ones((5, 5), bool))[None, None]
    out = module.apply(variables, tokens(), causal)
    later = module.apply(variables, tokens().at[:, 3:].add(1.0), causal)
    np.testing.assert_array_equal(out[:, :3], later[:, :3])
    assert not np.allclose(out[:, 3:], later[:, 3:])


def test_flaxs_masks_are_taken_as_booleans():
    module = AdderSelfAttention(SMALL)
    variables = random_params(module, tokens())
    causal = jnp.tril(jnp.ones((5, 5), bool))[None, None]
    wanted = module.apply(variables, tokens(), causal)
    mask = nn.make_causal_mask(tokens()[..., 0], dtype=bool)
    np.testing.assert_array_equal(module.apply(variables, tokens(), mask), wanted)
    with pytest.raises(TypeError, match=r"mask: needs dtype bool.*got float32\. Flax's .* with dtype=bool"):
        module.apply(variables, tokens(), nn.make_causal_mask(tokens()[..., 0]))


@pytest.mark.parametrize("config", [SMALL, MULTIPLY], ids=["adder", "multiply"])
def test_cross_attention_of_tokens_to_themselves_is_self_attention(config):
    config = dataclasses.replace(config, implementation=None)  # the reference knows p = 1 alone
    both = AdderSelfAttention(config), AdderCrossAttention(config, identity=True)
    variables = random_params(both[0], tokens())
    mask = jnp.tril(jnp.ones((5, 5), bool))
    itself = both[0].apply(variables, tokens(), mask, 1.5)
    np.testing.assert_array_equal(both[1].apply(variables, tokens(), tokens(), mask, 1.5), itself)


def test_cross_attention_averages_what_it_sees():
    """Each token of one visible key gets that key's value, of a context of another width and length."""
    module, context = AdderCrossAttention(SMALL), jax.random.normal(jax.random.key(3), (2, 7, 3))
    variables = module.init(jax.random.key(0), tokens(), context)
    seen = jnp.array([6, 0, 3, 3, 5])
    mask = jnp.arange(7)[None, :] == seen[:, None]
    out, captured = module.apply(variables, tokens(), context, mask, mutable=["intermediates"])
    (weights,) = captured["intermediates"]["attention_weights"]
    np.testing.assert_allclose(weights, jnp.broadcast_to(mask, weights.shape), atol=1e-6)
    params = variables["params"]
    value, projected = (AdderDense(8).bind({"params": params[name]}) for name in ("value", "out"))
    np.testing.assert_allclose(out, projected(value(context)[:, seen]), atol=1e-5)


@pytest.mark.parametrize(
    ("x", "context", "told"),
    [
        ((2, 5, 7), (2, 5, 8), "AdderCrossAttention takes tokens"),
        ((2, 5, 8), (2, 8), r"takes a context \[2, S, C\] for tokens .*got shape \(2, 8\)"),
        ((2, 3, 5, 8), (3, 5, 8), r"takes a context \[2, 3, S, C\] for tokens \(2, 3, 5, 8\)"),
        ((5, 8), (2, 5, 8), r"takes a context \[S, C\] for tokens \(5, 8\)"),
        ((2, 5, 8), (1, 5, 8), r"got shape \(1, 5, 8\)"),
        ((2, 5, 8), (2, 6, 8), "identity=False for cross-attention"),
    ],
)
def test_cross_attention_refuses_what_does_not_fit(x, context, told):
    with pytest.raises(ValueError, match=told):
        AdderCrossAttention(SMALL, identity=True).init(jax.random.key(0), jnp.zeros(x), jnp.zeros(context))


def test_tokens_of_another_sequence_have_no_identity():
    """However many they are: the description's is that of tokens with themselves."""
    assert SMALL.identity
    module, without = AdderCrossAttention(SMALL), dataclasses.replace(SMALL, identity=False)
    variables = random_params(module, tokens(), tokens(seed=3))
    out = module.apply(variables, tokens(), tokens(seed=3))
    np.testing.assert_array_equal(
        AdderCrossAttention(without).apply(variables, tokens(), tokens(seed=3)), out
    )
    with pytest.raises(ValueError, match="identity='no' must be True or False"):
        AdderCrossAttention(SMALL, identity="no").init(jax.random.key(0), tokens(), tokens())


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_bias_and_causality_are_those_of_the_operator(lead):
    module, x = AdderSelfAttention(SMALL), tokens((*lead, 5, 8))
    variables = random_params(module, tokens())
    np.testing.assert_allclose(
        module.apply(variables, x, is_causal=True),
        module.apply(variables, x, jnp.tri(5, dtype=bool)),
        atol=1e-6,
    )
    # What a large bias leaves is what a mask leaves, entry by entry.
    seen = jax.random.bernoulli(jax.random.key(7), 0.6, (*lead, 2, 5, 5))
    seen |= jnp.broadcast_to(jnp.eye(5, dtype=bool), seen.shape)
    biased = module.apply(variables, x, bias=jnp.where(seen, 0.0, -1e9))
    np.testing.assert_allclose(biased, module.apply(variables, x, seen), atol=1e-5)
    cross, context = AdderCrossAttention(SMALL), tokens((*lead, 7, 8), seed=3)
    earlier = jnp.tri(5, 7, dtype=bool)
    np.testing.assert_allclose(
        cross.apply(variables, x, context, is_causal=True),
        cross.apply(variables, x, context, bias=jnp.where(earlier, 0.0, -1e9)),
        atol=1e-5,
    )
    if lead == (2, 3):
        with pytest.raises(ValueError, match=r"bias: shape \(4, 5\) does not broadcast to \(2, 3, 2, 5, 5\)"):
            module.apply(variables, x, bias=jnp.zeros((4, 5)))


def test_kernels_may_have_names_of_axes():
    """What enters a block is split over features, what leaves it over inputs."""
    split = nn.initializers.normal(0.5)
    inits = {
        "kernel_init": nn.with_partitioning(split, (None, "model")),
        "out_kernel_init": nn.with_partitioning(split, ("model", None)),
    }
    for config in (SMALL, MULTIPLY):
        block = EncoderBlock(config, **inits)
        variables = block.init(jax.random.key(0), tokens())
        specs = nn.get_partition_spec(variables)["params"]
        name = "adder_kernel" if config.linear == "adder" else "kernel"
        found = {part: tuple(specs["attention"][part][name]) for part in ("query", "key", "value", "out")}
        found |= {part: tuple(specs["mlp"][part][name]) for part in ("fc1", "fc2")}
        entering, leaving = (None, "model"), ("model", None)
        assert found == dict.fromkeys(("query", "key", "value", "fc1"), entering) | dict.fromkeys(
            ("out", "fc2"), leaving
        )
        plain = nn.meta.unbox(variables)
        kernel = plain["params"]["mlp"]["fc1"][name]
        assert 0.3 < kernel.std() < 0.7  # drawn as it was asked for
        np.testing.assert_array_equal(
            block.apply(variables, tokens()), EncoderBlock(config).apply(plain, tokens())
        )
    cross = AdderCrossAttention(SMALL, **inits).init(jax.random.key(0), tokens(), tokens())
    assert tuple(nn.get_partition_spec(cross)["params"]["out"]["adder_kernel"]) == ("model", None)


@pytest.mark.parametrize("config", [SMALL, MULTIPLY], ids=["adder", "multiply"])
def test_features_split_over_devices_give_the_same(config):
    config = dataclasses.replace(config, implementation=None, centered=True)
    split = nn.initializers.normal(1.0)
    inits = {
        "kernel_init": nn.with_partitioning(split, (None, "model")),
        "out_kernel_init": nn.with_partitioning(split, ("model", None)),
    }
    block, key = EncoderBlock(config, **inits), jax.random.key(0)
    plain = nn.meta.unbox(block.init(key, tokens()))
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    shardings = nn.get_sharding(jax.eval_shape(block.init, key, tokens()), mesh)
    variables = jax.device_put(plain, shardings)

    @jax.jit
    def step(variables):
        return jax.value_and_grad(lambda v: jnp.sum(jnp.sin(block.apply(v, tokens()))))(variables)

    (value, gradient), (wanted, expected) = step(variables), step(plain)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient, expected)
    name = "adder_kernel" if config.linear == "adder" else "kernel"
    local = {
        part: kernel[name].addressable_shards[0].data.shape
        for part, kernel in variables["params"]["mlp"].items()
    }
    assert local == {"fc1": (8, 6), "fc2": (6, 8)}


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: AdderSelfAttention(4).init(jax.random.key(0), tokens()), "takes an EncoderConfig, .* is 4"),
        (lambda: EncoderBlock(None).init(jax.random.key(0), tokens()), "EncoderBlock takes an EncoderConfig"),
        (
            lambda: AdderSelfAttention(SMALL).init(jax.random.key(0), [1]),
            r"array of tokens, but got \[1\]",
        ),
        (
            lambda: AdderSelfAttention(SMALL).init(jax.random.key(0), tokens(), tokens(), tokens()),
            "got a second sequence. Attention to another one is AdderCrossAttention",
        ),
        (
            lambda: AdderCrossAttention(SMALL).init(jax.random.key(0), tokens(), None),
            "AdderCrossAttention takes an array of a context's tokens, but got None",
        ),
    ],
    ids=["number", "none", "list", "three sequences", "no context"],
)
def test_what_is_no_array_or_description_is_told(call, told):
    with pytest.raises(TypeError, match=told):
        call()


def test_a_mask_in_the_place_of_train_is_told():
    with pytest.raises(ValueError, match="(?s)train=.* must be True or False"):
        EncoderBlock(SMALL).init(jax.random.key(0), tokens(), jnp.tri(5, dtype=bool))


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 3)], ids=str)
def test_any_axes_may_stand_before_the_tokens(lead):
    module, x, context = AdderCrossAttention(SMALL), tokens((*lead, 5, 8)), tokens((*lead, 7, 3), seed=3)
    variables = random_params(module, tokens((1, 5, 8)), tokens((1, 7, 3)))
    masks = [jax.random.bernoulli(jax.random.key(7), 0.6, (*lead, 2, 5, 7)), jnp.arange(7) < 4]
    masks += [masks[0][..., :1, :, :], masks[0][..., :, :1, :]]
    masks += [masks[0][:, :1]] if len(lead) > 1 else []
    for mask in masks:
        out, captured = module.apply(variables, x, context, mask, mutable=["intermediates"])
        (weights,) = captured["intermediates"]["attention_weights"]
        assert (out.shape, weights.shape) == ((*lead, 5, 8), (*lead, 2, 5, 7))
        full = jnp.broadcast_to(mask, weights.shape)
        for entry in np.ndindex(*lead):
            one, seen = module.apply(
                variables, x[entry], context[entry], full[entry], mutable=["intermediates"]
            )
            np.testing.assert_allclose(out[entry], one, atol=1e-5)
            np.testing.assert_allclose(
                weights[entry], seen["intermediates"]["attention_weights"][0], atol=1e-6
            )


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_a_mask_with_axes_of_one_fits_any(lead):
    module, x = AdderSelfAttention(SMALL), tokens((*lead, 5, 8))
    variables, causal = random_params(module, tokens()), jnp.tri(5, dtype=bool)
    expected = module.apply(variables, x, causal)
    for axes in range(3, len(lead) + 3):
        np.testing.assert_array_equal(module.apply(variables, x, causal[(None,) * (axes - 2)]), expected)
    np.testing.assert_array_equal(module.apply(variables, x, causal[(None,) * 2]), expected)


@pytest.mark.parametrize(
    "shape", [(4, 3, 2, 5, 5), (2, 3, 2, 5, 4), (2, 2, 3, 2, 5, 5), (5, 4), (3, 5, 5)], ids=str
)
def test_a_mask_that_fits_no_axes_is_refused(shape):
    told = rf"mask: shape {re.escape(str(shape))} does not broadcast to \(2, 3, 2, 5, 5\)"
    with pytest.raises(ValueError, match=told):
        AdderSelfAttention(SMALL).init(jax.random.key(0), jnp.zeros((2, 3, 5, 8)), jnp.ones(shape, bool))
