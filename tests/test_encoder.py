"""The encoder's parts against float64 references of their formulas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from layer_reference import adder, kernels, layer_norm, random_params, tokens

from adderflax import (
    AdderCrossAttention,
    AdderDense,
    AdderMlp,
    AdderResNetConfig,
    AdderSelfAttention,
    EncoderBlock,
    EncoderConfig,
)
from adderflax.encoder import convolution

SMALL = EncoderConfig(embed_dim=8, num_heads=2, mlp_dim=12, implementation="reference")
MULTIPLY = dataclasses.replace(SMALL, linear="multiply", output_projection="multiply", similarity="dot")
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


@pytest.mark.parametrize("shape", [(5, 8), (2, 2, 5, 8)])
def test_a_block_takes_batches_of_tokens(shape):
    with pytest.raises(ValueError, match=r"EncoderBlock takes tokens \[B, T, embed_dim\]"):
        EncoderBlock(SMALL).init(jax.random.key(0), jnp.ones(shape))


def test_what_unset_fields_stand_for():
    found = EncoderConfig(embed_dim=24, num_heads=3, mlp_kernel_size=3, linear="multiply").resolved()
    assert (found.mlp_dim, found.mlp_convolution) == (96, "multiply")
    assert found.attention_scale == pytest.approx(1 / np.sqrt(2 * 8 * (1 - 2 / np.pi)))
    assert EncoderConfig(similarity="dot", embed_dim=32, num_heads=2).resolved().attention_scale == 0.25
    given = EncoderConfig(mlp_dim=5, attention_scale=0.5, mlp_kernel_size=3, mlp_convolution="multiply")
    assert given.resolved() == given
    assert EncoderConfig().resolved().mlp_convolution is None


@pytest.mark.parametrize("describe", [EncoderConfig, AdderResNetConfig])
def test_a_dtype_may_be_jaxs_own(describe):
    for dtype in (jnp.bfloat16, jnp.dtype("bfloat16"), np.float32):
        described = describe(dtype=dtype)
        assert described == describe(dtype=jnp.dtype(dtype).name) and isinstance(described.dtype, str)
    for wrong in (jnp.float16, "bf16", None, 3.0):
        with pytest.raises(ValueError, match="dtype=.* is not known; choose one of 'float32', 'bfloat16'"):
            describe(dtype=wrong)


def test_a_description_with_a_rule_of_a_file_is_hashable():
    config = EncoderConfig(grad_inputs=["hardtanh", 4.0])
    assert hash(config) == hash(EncoderConfig(grad_inputs=("hardtanh", 4.0)))


@pytest.mark.parametrize("flag", [True, False])
def test_flags_may_be_those_of_numpy(flag):
    tokens = jnp.ones((1, 5, 8))
    config = dataclasses.replace(SMALL, identity=np.bool_(flag), centered=np.bool_(flag))
    found, expected = (
        AdderSelfAttention(given).init_with_output(jax.random.key(0), tokens)[0]
        for given in (config, dataclasses.replace(SMALL, identity=flag, centered=flag))
    )
    np.testing.assert_array_equal(found, expected)


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


@pytest.mark.parametrize("arithmetic", ["adder", "multiply"])
def test_a_convolution_is_what_the_configuration_describes(arithmetic):
    fields = {"power_activation": True, "centered": True, "implementation": "xla", "grad_kernel": "sign"}
    config = dataclasses.replace(
        SMALL, **fields, grad_inputs="full", layer_norm_epsilon=1e-3, dtype="bfloat16"
    )
    layer = convolution(config, arithmetic, 6, 5, "conv", stride=2, feature_group_count=3)
    fields |= {"grad_x": "full", "normalization": "layer"}
    expected = {"epsilon": 1e-3, "dtype": jnp.bfloat16, "features": 6, "name": "conv", "strides": (2, 2)}
    expected |= {"kernel_size": (5, 5), "padding": ((2, 2), (2, 2)), "feature_group_count": 3}
    expected |= fields if arithmetic == "adder" else {}
    assert {name: getattr(layer, name) for name in expected} == expected


@pytest.mark.parametrize("shape", [(2, 5, 8), (9, 8), (8,)])
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dim": 10, "num_heads": 4}, "embed_dim=10 is not divisible by num_heads=4"),
        ({"linear": "add"}, "linear='add' is not known; choose one of 'adder', 'multiply'"),
        ({"power_activation": True, "normalization": "none"}, "power_activation=True.*'layer'"),
        ({"similarity": "l2"}, "similarity='l2' is not known; choose one of 'l1', 'dot'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate='0.1' must be a number"),
        ({"drop_path_rate": None}, "drop_path_rate=None must be a number"),
        *(
            ({name: value}, f"{name}={value!r} must be True or False")
            for value in ("no", 1)
            for name in ("identity", "power_activation", "centered", "use_bias", "remat")
        ),
        ({"mlp_dim": 0}, "mlp_dim=0 must be a whole number, at least 1, or None"),
        ({"embed_dim": 8.0}, "embed_dim=8.0 must be a whole number, at least 1"),
        ({"num_heads": True}, "num_heads=True must be a whole number"),
        ({"layer_norm_epsilon": -1e-6}, "layer_norm_epsilon=-1e-06 must be a number greater than 0"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon=inf must be a number"),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon='x' must be a number"),
        ({"attention_scale": "x"}, "attention_scale='x' must be a finite number, or None"),
        ({"attention_scale": True}, "attention_scale=True must be a finite number, or None"),
        ({"attention_scale": float("inf")}, "attention_scale=inf must be a finite number, or None"),
        ({"mlp_kernel_size": 2}, "mlp_kernel_size=2 must be an odd whole number"),
        ({"mlp_kernel_size": True}, "mlp_kernel_size=True must be an odd whole number"),
        ({"mlp_kernel_size": 3.0}, "mlp_kernel_size=3.0 must be an odd whole number, as 3 or 5, or None"),
        ({"mlp_convolution": "adder"}, "mlp_convolution='adder' .* set mlp_kernel_size, as 3, or leave"),
        ({"grad_inputs": "hardtahn"}, "grad_inputs.*hardtahn"),
        ({"grad_key": ("hardtanh", -1.0)}, "grad_key"),
        ({"implementation": "fast"}, "implementation='fast' is not known; choose one of None, 'reference'"),
        ({"dtype": "float64"}, "dtype='float64' is not known; choose one of 'float32', 'bfloat16'"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**fields)


@pytest.mark.parametrize("config", [SMALL, MULTIPLY], ids=["adder", "multiply"])
def test_cross_attention_of_tokens_to_themselves_is_self_attention(config):
    config = dataclasses.replace(config, implementation=None)  # the reference knows p = 1 alone
    both = AdderSelfAttention(config), AdderCrossAttention(config)
    variables = random_params(both[0], tokens())
    mask = jnp.tril(jnp.ones((5, 5), bool))
    itself = both[0].apply(variables, tokens(), mask, 1.5)
    np.testing.assert_array_equal(both[1].apply(variables, tokens(), tokens(), mask, 1.5), itself)


def test_cross_attention_averages_what_it_sees():
    """Each token of one visible key gets that key's value, of a context of another width and length."""
    config = dataclasses.replace(SMALL, identity=False)
    module, context = AdderCrossAttention(config), jax.random.normal(jax.random.key(3), (2, 7, 3))
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
        ((2, 5, 8), (2, 8), r"takes a context \[B, S, C\] with B=2.*got shape \(2, 8\)"),
        ((2, 5, 8), (1, 5, 8), r"got shape \(1, 5, 8\)"),
        ((2, 5, 8), (2, 6, 8), "identity=False for cross-attention"),
    ],
)
def test_cross_attention_refuses_what_does_not_fit(x, context, told):
    with pytest.raises(ValueError, match=told):
        AdderCrossAttention(SMALL).init(jax.random.key(0), jnp.zeros(x), jnp.zeros(context))
