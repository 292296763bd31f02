"""The Vision Transformer: variants, presets, shapes, and what its pieces do."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adderflax import VisionTransformer, VisionTransformerConfig, adder_attention, adder_matmul, layers
from adderflax.models.vit import PRESET_FIELDS, PRESETS, VARIANTS

TINY = VisionTransformerConfig(
    image_size=8,
    patch_size=4,
    channels=1,
    num_classes=3,
    embed_dim=8,
    num_heads=2,
    depth=2,
    implementation="reference",  # compiles in a fraction of the time; the operators have tests of their own
)


def images(config, batch=2, seed=0):
    return jax.random.normal(
        jax.random.key(seed), (batch, config.image_size, config.image_size, config.channels)
    )


def init(model, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), images(model.config))


def count(config):
    model = VisionTransformer(config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images(config, 1)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


# DeiT's published sizes in millions: Touvron et al. 2021, table 1.
@pytest.mark.parametrize(("variant", "millions"), [("Ti/16", 5.7), ("S/16", 22.1), ("B/16", 86.6)])
def test_vit_preset_has_deit_size(variant, millions):
    assert abs(count(VisionTransformerConfig.from_variant(variant, "vit")) / 1e6 - millions) < 0.06


@pytest.mark.parametrize("variant", VARIANTS)
def test_adder_and_twin_have_the_same_parameters(variant):
    size = {"image_size": 16}
    adder = VisionTransformerConfig.from_variant(variant, "adder", **size)
    assert count(adder) == count(VisionTransformerConfig.from_variant(variant, "multiply", **size))


@pytest.mark.parametrize(
    "fields", [PRESETS["vit"], {"stem": "conv", "pooling": "mean", "mlp_kernel_size": 3}]
)
def test_parameters_are_float32_under_x64(fields):
    model = VisionTransformer(dataclasses.replace(TINY, **fields))
    with jax.enable_x64(True):
        shapes = jax.eval_shape(model.init, jax.random.key(0), images(TINY))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_presets_differ_where_they_should():
    adder, twin, vit = (VisionTransformerConfig.from_variant("Ti/16", name) for name in PRESETS)
    changed = {f.name for f in dataclasses.fields(adder) if getattr(adder, f.name) != getattr(twin, f.name)}
    assert changed == {"linear", "output_projection", "similarity"}
    changed = {f.name for f in dataclasses.fields(vit) if getattr(vit, f.name) != getattr(twin, f.name)}
    assert changed == {"identity", "normalization", "use_bias"}


def test_variants_have_the_size_of_their_images():
    sizes = {
        name: (c.image_size, c.channels, c.num_classes, c.num_tokens)
        for name in VARIANTS
        for c in [VisionTransformerConfig.from_variant(name)]
    }
    assert sizes["B/16"] == (224, 3, 1000, 197)
    assert sizes["Ti/4"] == sizes["S/4"] == (32, 3, 10, 65)
    assert sizes["digits"] == (8, 1, 10, 17)


def test_stochastic_depth_grows_with_depth():
    config = dataclasses.replace(TINY, depth=3, drop_path_rate=0.6)
    model, rates = VisionTransformer(config), []

    def record(next_function, arguments, keywords, context):
        if isinstance(context.module, nn.Dropout):
            rates.append(context.module.rate)
        return next_function(*arguments, **keywords)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: model.init(jax.random.key(0), images(config)))
    np.testing.assert_allclose(rates, [0, 0, 0.3, 0.3, 0.6, 0.6])


def test_a_given_field_replaces_the_preset():
    config = VisionTransformerConfig.from_variant("Ti/4", "adder", similarity="dot", depth=3)
    assert (config.similarity, config.linear, config.depth, config.num_tokens) == (
        "dot",
        "adder",
        3,
        65,
    )


def test_custom_needs_every_preset_field():
    with pytest.raises(ValueError, match="missing: .*similarity.*use_bias"):
        VisionTransformerConfig.from_variant("Ti/16", "custom", linear="adder")
    given = PRESETS["adder"] | {"aggregation": "l1"}
    assert set(given) == set(PRESET_FIELDS)
    assert VisionTransformerConfig.from_variant("Ti/16", "custom", **given).aggregation == "l1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("Ti/8",),
            "variant='Ti/8' is not known; choose one of 'Ti/16', 'S/16', 'B/16', 'Ti/4', 'S/4', "
            "'compact/4', 'digits'",
        ),
        (
            ("Ti/16", "add"),
            "arithmetic='add' is not known; choose one of 'adder', 'multiply', 'vit', 'custom'",
        ),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformerConfig.from_variant(*arguments)
    with pytest.raises(ValueError, match="Unknown model field width; the fields are"):
        VisionTransformerConfig.from_variant("Ti/16", width=3)


def test_image_size_must_fit():
    with pytest.raises(ValueError, match="image_size=30 is not a multiple of patch_size=4"):
        VisionTransformerConfig.from_variant("Ti/4", image_size=30)
    model = VisionTransformer(TINY)
    with pytest.raises(ValueError, match=r"images have shape \(2, 9, 8, 1\).*\[batch, 8, 8, 1\]"):
        model.init(jax.random.key(0), jnp.zeros((2, 9, 8, 1)))


EVERYTHING_ADDS = {"patch_embedding": "adder", "head": "adder", "aggregation": "l1"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        EVERYTHING_ADDS,
        PRESETS["multiply"],
        PRESETS["vit"],
        {"remat": True, "power_activation": True},
        {"dtype": "bfloat16"},
        {"centered": True, "stem": "conv", "pooling": "mean", "mlp_kernel_size": 3, "dtype": "bfloat16"},
        {"stem": "conv", "pooling": "mean"},
        # Of fewer features the stem's first LayerNorm would leave nothing.
        {"stem": "conv", "pooling": "mean", "mlp_kernel_size": 3, "embed_dim": 16} | EVERYTHING_ADDS,
    ],
    ids=["adder", "all-adder", "multiply", "vit", "remat", "bfloat16", "centered", "stem", "adder-stem"],
)
@jax.numpy_dtype_promotion("standard")  # flax's LayerNorm itself promotes bfloat16 to float32
def test_forward_and_gradients_are_finite_and_reach_every_parameter(fields):
    config = dataclasses.replace(TINY, **fields)
    model = VisionTransformer(config)
    params = init(model)

    def loss(params):
        logits = model.apply(params, images(config), True, rngs={"drop_path": jax.random.key(1)})
        assert logits.shape == (2, 3) and logits.dtype == jnp.float32
        return jnp.sum(logits * jnp.broadcast_to(jnp.array([1.0, -2.0, 0.5]), logits.shape))

    gradients = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all(), name
        # What moves every key moves all logits of a row of dot products alike, which the softmax ignores.
        if config.similarity == "l1" or "key" not in name or "bias" not in name:
            assert np.abs(leaf).max() > 1e-4, name  # rounding alone reaches 1e-6


@pytest.mark.parametrize("aggregation", ["dot", "l1"])
def test_the_class_token_sees_the_image(aggregation):
    config = VisionTransformerConfig.from_variant("Ti/4", depth=2, aggregation=aggregation)
    model = VisionTransformer(config)
    variables = jax.jit(model.init)(jax.random.key(0), images(config))
    logits = jax.jit(model.apply)(variables, jax.random.normal(jax.random.key(1), (8, 32, 32, 3)))
    assert jnp.std(logits, axis=0).max() > 0.05


def test_remat_changes_nothing():
    config = dataclasses.replace(TINY, depth=1)
    model, again = (
        VisionTransformer(config),
        VisionTransformer(dataclasses.replace(config, remat=True)),
    )
    params = init(model)
    gradients = [
        jax.jit(jax.grad(lambda p, m=m: m.apply(p, images(TINY)).sum()))(params) for m in (model, again)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *gradients)


@pytest.mark.parametrize("remat", [False, True])
def test_the_exponent_reaches_every_adder_layer(monkeypatch, remat):
    config = dataclasses.replace(TINY, **EVERYTHING_ADDS, remat=remat, implementation=None)
    model, exponents = VisionTransformer(config), []

    def record(*operands, p, **options):
        exponents.append(p)
        return adder_matmul(*operands, p=p, **options)

    def loss(params, **options):
        return jnp.sum(model.apply(params, images(config), **options))

    params = jax.eval_shape(model.init, jax.random.key(0), images(config))
    monkeypatch.setattr(layers, "adder_matmul", record)
    jax.eval_shape(jax.grad(lambda params, p: loss(params, p=p)), params, jnp.float32(1.5))
    assert len(exponents) == 6 * config.depth + 2 and all(isinstance(p, jax.core.Tracer) for p in exponents)
    exponents.clear()
    jax.eval_shape(jax.grad(loss), params)
    assert exponents == [1.0] * (6 * config.depth + 2)  # a number still: the kernels of the L1 distance


def test_power_activation_is_in_every_adder_layer_but_the_head():
    def powers(**fields):
        model = VisionTransformer(dataclasses.replace(TINY, depth=1, power_activation=True, **fields))
        params = jax.eval_shape(model.init, jax.random.key(0), images(TINY))["params"]
        names = (jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
        return {name.split("'")[-4] for name in names if name.endswith("['power']")}

    linear = {"query", "key", "value", "out", "fc1", "fc2"}
    assert powers() == linear
    assert powers(**EVERYTHING_ADDS) == linear | {"patch_embedding"}
    assert powers(**PRESETS["multiply"]) == set()


def test_centered_reaches_every_adder_layer(monkeypatch):
    config = dataclasses.replace(TINY, depth=1, pooling="mean", mlp_kernel_size=3, **EVERYTHING_ADDS)
    seen = []

    def record(kernel, p, rule):
        seen.append((kernel.shape, rule))
        return jnp.zeros(kernel.shape[-1])

    monkeypatch.setattr(layers, "distance_from_origin", record)
    for centered, expected in ((False, 0), (True, 6 + 1 + 2)):  # linear, convolution, embedding and head
        model = VisionTransformer(dataclasses.replace(config, centered=centered, grad_kernel="sign"))
        jax.eval_shape(model.init, jax.random.key(0), images(TINY))
        assert len(seen) == expected and all(rule == "sign" for _, rule in seen)


def test_patches_are_cut_row_by_row():
    config = dataclasses.replace(TINY, embed_dim=16, num_heads=2, depth=1)
    model = VisionTransformer(config)
    params = init(model)["params"]
    # A kernel that is the identity shows each patch as its token.
    params["patch_embedding"] = {"kernel": jnp.eye(16), "bias": jnp.zeros(16)}
    numbered = jnp.arange(64.0).reshape(1, 8, 8, 1)
    captured = {}

    def record(next_function, arguments, keywords, context):
        out = next_function(*arguments, **keywords)
        if context.module.name == "patch_embedding":
            captured["patches"] = out
        return out

    with nn.intercept_methods(record):
        model.apply({"params": params}, numbered)
    grid = np.arange(64).reshape(8, 8)
    expected = [grid[r : r + 4, c : c + 4].ravel() for r in (0, 4) for c in (0, 4)]
    np.testing.assert_array_equal(captured["patches"][0], expected)


COMPACT = dataclasses.replace(TINY, stem="conv", pooling="mean")


@pytest.mark.parametrize("is_set", [True, False], ids=["set", "not set"])
@pytest.mark.parametrize("preset", ["adder", "multiply"])
@pytest.mark.parametrize(
    "fields", [{}, {"stem": "conv", "pooling": "mean", "mlp_kernel_size": 3}, {"centered": True}], ids=str
)
def test_explicit_meshes(preset, fields, is_set):
    config = dataclasses.replace(TINY, implementation=None, **PRESETS[preset], **fields)
    model = VisionTransformer(config)
    params = init(model)

    def gradient(params, x):
        return jax.grad(lambda params: jnp.sum(jnp.square(model.apply(params, x))))(params)

    expected = jax.jit(gradient)(params, images(config))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    rows = jax.device_put(images(config), NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        found = jax.jit(gradient)(whole, rows)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, wanted), leaf in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found)):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-5 * largest, err_msg=str(path))


@pytest.mark.parametrize("arithmetic", ["adder", "multiply"])
def test_a_stem_halves_the_image_until_a_patch_is_one_position(arithmetic):
    config = dataclasses.replace(COMPACT, embed_dim=32, patch_embedding=arithmetic)
    model = VisionTransformer(config)
    params = init(model)["params"]
    name = "adder_kernel" if arithmetic == "adder" else "kernel"
    assert [params[f"stem_{i}"][name].shape for i in (0, 1)] == [(3, 3, 1, 8), (3, 3, 8, 16)]
    assert params["patch_embedding"][name].shape == (16, 32) and "stem_2" not in params
    # What a token sees: moving one pixel changes the tokens whose windows hold it, no others.
    found = []

    def record(next_function, arguments, keywords, context):
        out = next_function(*arguments, **keywords)
        if context.module.name == "patch_embedding":
            found.append(np.asarray(out))
        return out

    with nn.intercept_methods(record):
        model.apply({"params": params}, images(config))
        model.apply({"params": params}, images(config).at[:, 7, 7].add(1.0))
    np.testing.assert_array_equal(found[0][:, :3], found[1][:, :3])
    assert found[0].shape == (2, 4, 32) and not np.allclose(found[0][:, 3], found[1][:, 3])


def test_pooling_by_the_mean_has_no_class_token():
    params = init(VisionTransformer(COMPACT))["params"]
    assert "class_token" not in params and params["position_embedding"].shape == (1, 4, 8)
    assert (COMPACT.num_tokens, TINY.num_tokens) == (4, 5)
    # Without positions nothing tells the patches apart: their order cannot matter.
    config = dataclasses.replace(TINY, pooling="mean")
    params = init(VisionTransformer(config))["params"]
    params["position_embedding"] = jnp.zeros_like(params["position_embedding"])
    left, right = jnp.split(images(config), 2, axis=2)
    logits = [
        VisionTransformer(config).apply({"params": params}, jnp.concatenate(halves, axis=2))
        for halves in ((left, right), (right, left))
    ]
    np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stem": "cnn"}, "stem='cnn' is not known; choose one of 'patch', 'conv'"),
        ({"pooling": "max"}, "pooling='max' is not known; choose one of 'token', 'mean'"),
        ({"mlp_kernel_size": 3}, "mlp_kernel_size=3 .*set pooling='mean'"),
        ({"head": "adder", "num_classes": 2}, "num_classes=2 with head='adder'.*or head='multiply'"),
        ({"stem": "conv", "image_size": 9, "patch_size": 3}, "patch_size=3 with stem='conv'.*choose 2, 4, 8"),
        ({"stem": "conv", "embed_dim": 10, "num_heads": 1}, "embed_dim=10 .*choose a multiple of 4"),
    ],
)
def test_stem_pooling_and_head_mistakes(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


def test_intermediates_are_captured_on_request():
    model = VisionTransformer(TINY)
    params = init(model)
    assert set(params) == {"params"}
    _, captured = model.apply(params, images(TINY), mutable=["intermediates"])
    captured = captured["intermediates"]
    assert len(captured["block_outputs"]) == TINY.depth
    weights = captured["block_1"]["attention"]["attention_weights"][0]
    assert weights.shape == (2, 2, 5, 5)
    # softmax + I: every row sums to two
    np.testing.assert_allclose(weights.sum(-1), 2.0, atol=1e-5)


def test_default_scale_of_l1_logits():
    """For q, k ~ N(0, 1) the scaled logits deviate by 1; within a row by 0.88, the query's term cancels."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 500, 1, 64))
    _, weights = adder_attention(q, k, k, identity=False, return_weights=True)
    logits = np.log(np.asarray(weights[0, 0], np.float64))
    within = logits - logits.mean(-1, keepdims=True)
    assert abs(within.std() - 0.88) < 0.03
