"""Layers against hand-computed cases and float64 references of their formulas."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from layer_reference import adder, kernels, layer_norm, random_params, tokens

from adderflax import AdderConv, AdderDense
from adderflax.layers import MultiplyConv, signed_power


def test_dense_by_hand():
    layer = AdderDense(2, normalization="none")
    params = {"params": {"adder_kernel": jnp.array([[1.0, -1.0], [0.5, 2.0]])}}
    # -(|0 - 1| + |2 - 0.5|) and -(|0 + 1| + |2 - 2|)
    np.testing.assert_array_equal(layer.apply(params, jnp.array([[0.0, 2.0]])), [[-2.5, -1.0]])
    np.testing.assert_array_equal(layer.apply(params, jnp.array([0.0, 2.0])), [-2.5, -1.0])


def test_convolution_by_hand():
    layer = AdderConv(2, (1, 2), strides=(1, 2), padding=((0, 0), (1, 0)), normalization="none")
    kernel = jnp.array([[[[1.0, -1.0]], [[0.5, 2.0]]]])
    # Windows (padding, 0) and (2, 4); then -(|0 - 1| + |0 - 0.5|), -(|0 + 1| + |0 - 2|) and so on.
    row = jnp.array([0.0, 2.0, 4.0]).reshape(1, 1, 3, 1)
    out = layer.apply({"params": {"adder_kernel": kernel}}, row)
    np.testing.assert_array_equal(out, [[[[-1.5, -3.0], [-4.5, -5.0]]]])


def test_convolution_of_one_pixel_is_a_dense_layer():
    pixels = tokens((2, 3, 3, 8))
    dense, convolution = AdderDense(6, grad_kernel="sign"), AdderConv(6, (1, 1), grad_kernel="sign")
    params = random_params(dense, pixels)["params"]
    kernel = {"adder_kernel": params["adder_kernel"].reshape(1, 1, 8, 6)}

    @functools.partial(jax.jit, static_argnums=0)
    def step(layer, params):
        return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(layer.apply({"params": p}, pixels))))(params)

    value, gradient = step(dense, params)
    like_value, like_gradient = step(convolution, params | kernel)
    np.testing.assert_allclose(like_value, value, rtol=1e-5)
    like = like_gradient["adder_kernel"].reshape(8, 6)
    np.testing.assert_allclose(like, gradient["adder_kernel"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        like_gradient["norm"]["scale"], gradient["norm"]["scale"], rtol=1e-4, atol=1e-4
    )


def test_convolution_in_groups_and_bfloat16():
    layer = AdderConv(6, (3, 3), feature_group_count=2, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        out, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), tokens((2, 3, 3, 8)))
    assert variables["params"]["adder_kernel"].shape == (3, 3, 4, 6)
    assert (out.shape, out.dtype) == ((2, 3, 3, 6), jnp.bfloat16)


def test_dense_normalizes_the_sums():
    x = np.asarray(tokens(), np.float64)
    layer = AdderDense(6)
    variables = random_params(layer, tokens())
    norm = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["norm"])
    expected = layer_norm(adder(x, kernels(variables, "params"))) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(layer.apply(variables, tokens()), expected, atol=1e-5)


def test_dense_templates_are_unit_normal():
    kernel = AdderDense(400).init(jax.random.key(0), jnp.zeros((1, 400)))["params"]["adder_kernel"]
    assert abs(float(kernel.std()) - 1.0) < 0.01 and abs(float(kernel.mean())) < 0.01


def test_dense_statistics_keep_their_digits_far_from_zero():
    # Sums near -1e4 with a deviation near 1: E[x^2] - E[x]^2 has no digit left in float32.
    x = jnp.full((1, 8), 1000.0)
    kernel = jax.random.normal(jax.random.key(0), (8, 512)) * 0.3
    out = AdderDense(512).apply(
        {
            "params": {
                "adder_kernel": kernel,
                "norm": {"scale": jnp.ones(512), "bias": jnp.zeros(512)},
            }
        },
        x,
    )
    expected = layer_norm(adder(np.asarray(x, np.float64), np.asarray(kernel, np.float64)))
    np.testing.assert_allclose(out, expected, atol=5e-3)


def test_dense_gradient_rules_reach_the_operator():
    x, kernel = jnp.array([[3.0, 0.2]]), jnp.array([[0.5], [0.0]])

    def gradients(**rules):
        layer = AdderDense(1, normalization="none", **rules)
        apply = lambda x, kernel: layer.apply({"params": {"adder_kernel": kernel}}, x).sum()  # noqa: E731
        dx, dk = jax.grad(apply, argnums=(0, 1))(x, kernel)
        return dx[0].tolist(), dk[:, 0].tolist()

    dx, dk = gradients()
    np.testing.assert_allclose(dx, [-1.0, -0.2], rtol=1e-6)
    np.testing.assert_allclose(dk, [2.5, 0.2], rtol=1e-6)
    dx, dk = gradients(grad_x=("hardtanh", 4.0), grad_kernel="sign")
    np.testing.assert_allclose(dx, [-1.0, -0.8], rtol=1e-6)
    np.testing.assert_allclose(dk, [1.0, 1.0], rtol=1e-6)


@jax.numpy_dtype_promotion("standard")  # flax's LayerNorm itself promotes bfloat16 to float32
def test_dense_bfloat16():
    x = tokens().astype(jnp.bfloat16)
    layer = AdderDense(6, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)
    assert variables["params"]["adder_kernel"].dtype == jnp.float32
    assert layer.apply(variables, x).dtype == jnp.bfloat16
    raw = AdderDense(6, dtype=jnp.bfloat16, normalization="none")
    assert (
        raw.apply({"params": {"adder_kernel": variables["params"]["adder_kernel"]}}, x).dtype == jnp.float32
    )


@pytest.mark.parametrize("layer", [AdderDense(6), AdderConv(6, (2, 2))], ids=["dense", "convolution"])
def test_power_activation_follows_the_normalization(layer):
    x = tokens((2, 3, 3, 8))
    powered = layer.clone(power_activation=True)
    variables = jax.jit(powered.init)(jax.random.key(0), x)
    params = dict(variables["params"])
    assert params.pop("power").shape == ()
    y = layer.apply({"params": params}, x)
    np.testing.assert_array_equal(powered.apply(variables, x), y)  # alpha starts at 1
    y = np.asarray(y, np.float64)
    out = powered.apply({"params": params | {"power": jnp.log(1.7)}}, x)
    np.testing.assert_allclose(out, np.sign(y) * np.abs(y) ** 1.7, rtol=1e-5, atol=1e-5)


def test_a_depthwise_twin_has_a_gradient_under_shard_map():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = MultiplyConv(8, (3, 3), (1, 1), ((1, 1), (1, 1)), jnp.float32, 1e-6, feature_group_count=8)
    x = tokens((4, 3, 3, 8))
    variables = layer.init(jax.random.key(0), x)
    spec = jax.sharding.PartitionSpec

    def gradient(variables, x):
        return jax.grad(lambda variables: jnp.sum(jnp.square(layer.apply(variables, x)[..., 0])))(variables)

    cut = jax.shard_map(gradient, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec())
    for found, wanted in zip(
        jax.tree.leaves(jax.jit(cut)(variables, x)), jax.tree.leaves(gradient(variables, x))
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [AdderDense, lambda n: AdderConv(n, (1, 1))], ids=["dense", "convolution"])
@pytest.mark.parametrize("features", [0, -3, 2.5, True])
def test_features_are_at_least_one(layer, features):
    with pytest.raises(ValueError, match=f"features={features} must be a whole number"):
        layer(features).init(jax.random.key(0), tokens((2, 3, 3, 8)))


@pytest.mark.parametrize(
    "layer", [AdderDense, lambda n, **k: AdderConv(n, (1, 1), **k)], ids=["dense", "conv"]
)
def test_what_a_layer_norm_leaves_nothing_of_is_refused(layer):
    x = tokens((2, 3, 3, 8))
    for features in (1, 2):
        with pytest.raises(ValueError, match=f"features={features} are too few for normalization='layer'"):
            layer(features).init(jax.random.key(0), x)
        assert (
            layer(features, normalization="none").init_with_output(jax.random.key(0), x)[0].shape[3]
            == features
        )
    model = layer(3)
    variables = model.init(jax.random.key(0), x)
    gradients = jax.grad(lambda variables: jnp.sum(jnp.sin(model.apply(variables, x))))(variables)
    assert np.abs(gradients["params"]["adder_kernel"]).max() > 1e-3


@pytest.mark.parametrize("inputs", [[[1.0, 2.0]], 1.0, jnp.ones(())], ids=["list", "number", "scalar"])
def test_inputs_are_arrays_with_features(inputs):
    with pytest.raises(ValueError, match=r"AdderDense takes an array of inputs \[\.\.\., in\], .*1\."):
        AdderDense(3).init(jax.random.key(0), inputs)


@pytest.mark.parametrize("inputs", [[[1.0, 2.0]], jnp.ones((6, 3))], ids=["list", "a row"])
def test_images_are_an_array(inputs):
    with pytest.raises(ValueError, match=r"AdderConv takes an array of images \[\.\.\., H, W, C\], but got "):
        AdderConv(3, (3, 3)).init(jax.random.key(0), inputs)


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("normalization", ["layer", "none"])
def test_any_axes_may_stand_before_an_image(lead, normalization):
    layer = AdderConv(4, (2, 3), strides=(2, 1), normalization=normalization, centered=True)
    images = tokens((*lead, 5, 6, 3))
    variables = random_params(layer, tokens((1, 5, 6, 3)))
    one_by_one = layer.apply(variables, images.reshape(-1, 5, 6, 3))
    out = layer.apply(variables, images)
    assert out.shape == (*lead, 3, 6, 4)
    np.testing.assert_array_equal(out.reshape(one_by_one.shape), one_by_one)


@pytest.mark.parametrize("layer", [AdderDense, functools.partial(AdderConv, kernel_size=(1, 1))])
def test_every_parameter_has_an_initializer(layer):
    axes = {"kernel_init": (None,) * 3 + ("model",), "scale_init": ("model",), "bias_init": ("model",)}
    if layer is AdderDense:
        axes["kernel_init"] = (None, "model")
    inits = {name: nn.with_partitioning(nn.initializers.constant(0.5), axis) for name, axis in axes.items()}
    module, x = layer(4, **inits), tokens((1, 2, 2, 8))
    variables = module.init(jax.random.key(0), x)
    specs = nn.get_partition_spec(variables)["params"]
    assert tuple(specs["adder_kernel"])[-1] == "model"
    assert [tuple(specs["norm"][name]) for name in ("scale", "bias")] == [("model",)] * 2
    assert all(np.all(leaf == 0.5) for leaf in jax.tree.leaves(variables))
    plain = nn.meta.unbox(variables)
    np.testing.assert_array_equal(module.apply(variables, x), layer(4).apply(plain, x))


@pytest.mark.parametrize("layer", [AdderDense(4), AdderConv(4, (1, 1))])
def test_float64_is_told_by_the_layer(layer):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x = jnp.ones((1, 2, 2, 8), jnp.float64)
        with pytest.raises(ValueError, match=f"{type(layer).__name__} computes in .* dtype=jnp.float32"):
            layer.init(jax.random.key(0), x)
        out, _ = layer.clone(dtype=jnp.float32).init_with_output(jax.random.key(0), x)
        assert out.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["bf16", jnp.int8, 3, jnp.float64])
def test_the_dtype_is_one_of_an_adder_layer(dtype):
    for layer in (AdderDense(4, dtype=dtype), AdderConv(4, (1, 1), dtype=dtype)):
        with pytest.raises(ValueError, match=r"dtype=.* is no dtype of an adder layer; choose .*, as"):
            layer.init(jax.random.key(0), tokens((1, 2, 2, 8)))


@pytest.mark.parametrize("layer", [AdderDense(4, centered="no"), AdderConv(4, (1, 1), power_activation="no")])
def test_flags_are_true_or_false(layer):
    with pytest.raises(ValueError, match="='no' must be True or False"):
        layer.init(jax.random.key(0), tokens((1, 4, 4, 8)))


@pytest.mark.parametrize("name", ["kernel_size", "strides", "dilation"])
@pytest.mark.parametrize("value", [0, (3,), (3, 0), (3.0, 3), (True, 3), "33"], ids=repr)
def test_the_window_of_a_convolution_is_given_in_pairs(name, value):
    layer = AdderConv(**{"features": 8, "kernel_size": (3, 3)} | {name: value})
    told = (
        "a pair of whole numbers, 1 or more,"
        if name == "kernel_size"
        else "a whole number, .* or a pair of them"
    )
    with pytest.raises(ValueError, match=rf"^{name}=.* must be {told}.*, as \(3, 3\)\."):
        layer.init(jax.random.key(0), tokens((1, 4, 4, 8)))


@pytest.mark.parametrize(
    "value",
    [None, 1.0, True, {1, 2}, (1,), (1, None), (1, (2,)), (1, (0, 2.0)), (1, (0, True)), ("1", "2")],
    ids=repr,
)
def test_paddings_are_names_or_whole_numbers(value):
    layer = AdderConv(8, (3, 3), padding=value)
    with pytest.raises(
        ValueError, match=rf"^padding={re.escape(repr(value))} must be 'SAME', .*, as \(1, \("
    ):
        layer.init(jax.random.key(0), tokens((1, 4, 4, 8)))


@pytest.mark.parametrize(
    ("short", "pairs"),
    [
        ({"strides": 2}, {"strides": (2, 2)}),
        ({"dilation": 2}, {"dilation": (2, 2)}),
        ({"padding": 1}, {"padding": ((1, 1), (1, 1))}),
        ({"padding": (2, 0)}, {"padding": ((2, 2), (0, 0))}),
        ({"padding": (1, (0, 2))}, {"padding": ((1, 1), (0, 2))}),
        ({"padding": [(0, 2), 1]}, {"padding": ((0, 2), (1, 1))}),
    ],
    ids=str,
)
def test_one_number_stands_for_two(short, pairs):
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    layers = [AdderConv(4, (3, 3), **fields) for fields in (short, pairs)]
    variables = layers[0].init(jax.random.key(1), x)
    np.testing.assert_array_equal(*(layer.apply(variables, x) for layer in layers))


def test_a_wrong_rule_is_told_by_the_layers_name_for_it():
    with pytest.raises(ValueError, match="grad_kernel: unknown gradient rule 'fulll'.*'?hardtanh:4"):
        AdderDense(3, grad_kernel="fulll").init(jax.random.key(0), tokens())
    with pytest.raises(ValueError, match="grad_kernel: the slope"):
        AdderDense(3, grad_kernel="hardtanh:steep").init(jax.random.key(0), tokens())
    x = tokens()
    variables = AdderDense(3).init(jax.random.key(0), x)
    gradients = [
        jax.grad(lambda x, rule=rule: AdderDense(3, grad_x=rule).apply(variables, x)[..., 0].sum())(x)
        for rule in ("hardtanh:4", ("hardtanh", 4.0), "hardtanh")
    ]
    np.testing.assert_array_equal(*gradients[:2])
    assert not np.array_equal(*gradients[1:])


@pytest.mark.parametrize("layer", [AdderDense(6), AdderConv(6, (3, 3))], ids=["dense", "convolution"])
@pytest.mark.parametrize("p", [1.0, 1.5])
def test_centered_sums_are_zero_for_zero_inputs(layer, p):
    x = tokens((2, 3, 3, 8))
    raw = layer.clone(normalization="none")
    variables = raw.init(jax.random.key(0), x)
    sums, centered = (np.asarray(each.apply(variables, x, p)) for each in (raw, raw.clone(centered=True)))
    kernel = np.asarray(variables["params"]["adder_kernel"], np.float64).reshape(-1, 6)
    np.testing.assert_allclose(centered, sums + (np.abs(kernel) ** p).sum(0), rtol=1e-5, atol=1e-4)
    zeros = raw.clone(centered=True).apply(variables, jnp.zeros_like(x), p)
    np.testing.assert_allclose(zeros, 0.0, atol=1e-4)
    # The normalization follows.
    normalized = layer.clone(centered=True)
    params = jax.jit(normalized.init)(jax.random.key(0), x)
    np.testing.assert_allclose(normalized.apply(params, x, p), layer_norm(centered), atol=1e-4)


def test_centered_templates_keep_their_gradient_rule():
    x, kernel = jnp.zeros((1, 1)), jnp.array([[0.25]])

    def slope(**fields):
        layer = AdderDense(1, normalization="none", **fields)
        apply = lambda kernel: layer.apply({"params": {"adder_kernel": kernel}}, x).sum()  # noqa: E731
        return jax.grad(apply)(kernel).item()

    assert slope(grad_kernel="sign") == -1.0
    assert slope(grad_kernel="sign", centered=True) == 0.0


@pytest.mark.parametrize("alpha", [1e-6, 0.3, 1.0, 4.0])
def test_power_activation_has_bounded_slopes(alpha):
    y, power = jnp.array([-2.0, -1e-3, -1e-9, -0.0, 0.0, 1e-40, 0.5]), jnp.log(alpha)
    slopes, to_power = jax.jacobian(signed_power, argnums=(0, 1))(y, power)
    assert np.isfinite(to_power).all() and (np.abs(np.diag(slopes)) <= 1001).all()
    values = np.asarray(signed_power(y, power))
    assert (np.diff(values) >= 0).all() and (values[3:5] == 0).all()


def test_dense_exponent():
    x = np.asarray(tokens(), np.float64)
    layer = AdderDense(6)
    variables = random_params(layer, tokens())
    norm = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"]["norm"])
    sums = -(np.abs(x[..., None] - kernels(variables, "params")) ** 1.5).sum(-2)
    out = jax.jit(layer.apply)(variables, tokens(), jnp.float32(1.5))
    np.testing.assert_allclose(out, layer_norm(sums) * norm["scale"] + norm["bias"], atol=1e-5)


def test_dense_rejects_an_unknown_normalization():
    with pytest.raises(ValueError, match="normalization='batch'.*'layer', 'none'"):
        AdderDense(3, normalization="batch").init(jax.random.key(0), jnp.zeros((1, 2)))


def test_groups_are_counted():
    for groups in (0, 2.0):
        with pytest.raises(ValueError, match=f"feature_group_count={groups} must be a whole number"):
            AdderConv(4, (3, 3), feature_group_count=groups).init(jax.random.key(0), jnp.ones((1, 4, 4, 2)))


@pytest.mark.parametrize(("channels", "features", "stride"), [(6, 6, 1), (3, 6, 2)])
def test_depthwise_twin_is_the_convolution_of_lax(channels, features, stride):
    layer = MultiplyConv(features, (3, 3), (stride, stride), ((1, 1), (1, 1)), jnp.float32, 1e-6, channels)
    x = jax.random.normal(jax.random.key(0), (2, 6, 5, channels))
    variables = random_params(layer, x)

    def plain(variables, x):
        params = variables["params"]
        y = jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            (stride, stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
        )
        return nn.LayerNorm(epsilon=1e-6).apply({"params": params["norm"]}, y)

    weights = jax.random.normal(jax.random.key(3), layer.apply(variables, x).shape)
    found, wanted = (
        jax.value_and_grad(lambda variables, x, f=f: jnp.sum(weights * f(variables, x)), (0, 1))(variables, x)
        for f in (layer.apply, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)
    np.testing.assert_allclose(layer.apply(variables, x), plain(variables, x), atol=1e-5)
