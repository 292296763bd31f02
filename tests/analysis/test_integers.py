"""Integer models: their sums are those of whole numbers, their grids the best."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from integer_models import (
    SMALL,
    Description,
    RawSums,
    dense_sums,
    expected_integers,
    layers,
    model_of,
)

from adderflax import (
    AdderConv,
    AdderDense,
    AdderResNet,
    AdderResNetConfig,
    VisionTransformer,
    VisionTransformerConfig,
)
from adderflax.analysis.integers import quantize
from adderflax.attention import AdderCrossAttention, AdderSelfAttention
from adderflax.operators import adder_conv


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bits", [8, 5, 2])
def test_outputs_are_the_unit_times_the_integer_sums(bits, centered):
    images = jax.random.normal(jax.random.key(0), (3, 7, 8, 6)) * 1.7
    for model in layers(centered):
        variables = model.init(jax.random.key(1), images)
        integers = quantize(model, variables, images, bits=bits)
        found, (name,) = integers.vectors(images), integers.operations
        operation, kernel = integers.operations[name], variables["params"]["layer"]["adder_kernel"]
        assert found[f"{name}/inputs"].dtype == np.int8 and found[f"{name}/sums"].dtype == np.int32
        inputs = expected_integers(images, operation.exponent, bits)
        np.testing.assert_array_equal(found[f"{name}/inputs"], inputs)
        templates = expected_integers(kernel, operation.exponent, bits)
        np.testing.assert_array_equal(integers.templates()[name], templates)
        if operation.kind == "dense":
            np.testing.assert_array_equal(found[f"{name}/sums"], dense_sums(inputs, templates))
        else:
            sums = adder_conv(jnp.int8(inputs), jnp.int8(templates), **operation.geometry)
            np.testing.assert_array_equal(found[f"{name}/sums"], sums)
        constant = integers.constants().get(name, 0)
        np.testing.assert_array_equal(
            constant, np.abs(templates).reshape(-1, kernel.shape[-1]).sum(0) * centered
        )
        outputs = np.asarray(jax.jit(integers.apply)(images))
        np.testing.assert_array_equal(outputs, (found[f"{name}/sums"] + constant) * 2.0**operation.exponent)
        by_integers = functools.partial(integers.apply, implementation="reference")
        np.testing.assert_array_equal(jax.jit(by_integers)(images), outputs)
        # And they are close to the model's own where the grid is fine.
        if bits == 8:
            own = np.asarray(model.apply(variables, images))
            assert np.abs(outputs - own).max() < 0.02 * np.abs(own).max()


def test_every_operation_of_a_transformer():
    model, variables, images = model_of(
        **SMALL,
        mlp_kernel_size=3,
        mlp_convolution="adder",
        patch_embedding="adder",
        head="adder",
        stem="conv",
    )
    integers = quantize(model, variables, images)
    block = [f"block_0/{name}" for name in ("attention/query", "attention/key", "attention/value")]
    block += [f"block_0/{name}" for name in ("attention", "attention/out", "mlp/fc1", "mlp/conv", "mlp/fc2")]
    assert set(block) < set(integers.operations)
    adding = {path[:-1] for path in map(tuple, _paths(variables["params"])) if path[-1] == "adder_kernel"}
    assert {"/".join(path) for path in adding} | {"block_0/attention"} == set(integers.operations)
    found = integers.vectors(images)
    for name, operation in integers.operations.items():
        if operation.kind == "dense":
            sums = dense_sums(found[f"{name}/inputs"], integers.templates()[name])
        elif operation.kind == "similarity":
            q, k = (found[f"{name}/{part}"].astype(np.int64) for part in ("queries", "keys"))
            sums = -np.abs(q[:, :, None] - k[:, None]).sum(-1).transpose(0, 3, 1, 2)
            assert operation.terms == 8
        else:
            assert operation.terms == integers.templates()[name][..., 0].size
            continue
        np.testing.assert_array_equal(found[f"{name}/sums"], sums)
        assert found[f"{name}/sums"].min() < 0


def test_the_integers_are_what_the_model_computes_with():
    # fc2 by hand, from its traced integers to the block's output: s (A + constant), then the LayerNorm.
    model, variables, images = model_of(**SMALL)
    integers = quantize(model, variables, images, bits=4)
    found, name = integers.vectors(images), "block_0/mlp/fc2"
    sums = (found[f"{name}/sums"] + integers.constants()[name]) * 2.0 ** integers.operations[name].exponent
    centered = sums - sums.mean(-1, keepdims=True)
    norm = jax.device_get(integers.variables["params"]["block_0"]["mlp"]["fc2"]["norm"])
    expected = (
        centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + 1e-6) * norm["scale"] + norm["bias"]
    )
    outputs = {}

    def record(next_function, arguments, keywords, context):
        result = next_function(*arguments, **keywords)
        outputs["/".join(context.module.path)] = result
        return result

    with nn.intercept_methods(record):
        integers.apply(images)
    np.testing.assert_allclose(outputs[name], expected, atol=1e-5)
    # And so do queries and keys meet each other.
    unit = 2.0 ** integers.operations["block_0/attention"].exponent
    for layer, part in (("query", "queries"), ("key", "keys")):
        traced = found[f"block_0/attention/{part}"]
        met = np.asarray(outputs[f"block_0/attention/{layer}"]).reshape(traced.shape)
        np.testing.assert_array_equal(met, traced * unit)


def _paths(tree):
    return [[key.key for key in path] for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_padding_is_exported_in_numbers():
    layer = AdderConv(3, (3, 3), strides=(2, 2), dilation=(1, 2), padding="SAME", normalization="none")
    images = jax.random.normal(jax.random.key(0), (1, 8, 9, 2))
    model = RawSums(layer)
    (operation,) = quantize(model, model.init(jax.random.key(1), images), images).operations.values()
    assert operation.geometry["padding"] == ((0, 1), (2, 2))


def test_a_residual_network():
    config = AdderResNetConfig(blocks=1, image_size=8)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    model = AdderResNet(config)
    variables = jax.jit(model.init)(jax.random.key(1), images)
    # A fresh network ends in zeros.
    variables = jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim else leaf, variables)
    integers = quantize(model, variables, images)
    assert {operation.kind for operation in integers.operations.values()} == {"convolution"}
    own = model.apply(variables, images)
    assert np.abs(integers.apply(images) - own).max() < 0.1 * np.abs(own).max()


def test_rematerialization_and_bfloat16_are_left_out():
    model, variables, images = model_of(**SMALL)
    plain = quantize(model, variables, images)
    other = VisionTransformer(dataclasses.replace(model.config, remat=True, dtype="bfloat16"))
    np.testing.assert_array_equal(quantize(other, variables, images).apply(images), plain.apply(images))


def test_what_cannot_be_made_of_integers():
    model, variables, images = model_of(**SMALL)
    for bits in (1, 9, True, 8.5):
        with pytest.raises(ValueError, match="bits=.* is not known; choose one of 2, 3, 4, 5, 6, 7, 8"):
            quantize(model, variables, images, bits=bits)
    twin, variables, images = model_of(**(SMALL | {"arithmetic": "multiply"}))
    assert not quantize(twin, variables, images).operations


def test_sums_beyond_what_float32_holds_are_refused():
    model, images = RawSums(AdderDense(1, normalization="none")), jnp.ones((1, 70000))
    variables = model.init(jax.random.key(0), images)
    for bits in (8, 2):
        with pytest.raises(ValueError, match="layer sums 70000 terms, and 65793 are the most"):
            quantize(model, variables, images, bits=bits)
    images = images[:, :65793]
    variables = model.init(jax.random.key(0), images)
    integers = quantize(model, variables, images)
    assert integers.vectors(images)["layer/sums"].shape == (1, 1)


def test_templates_that_nothing_calls_are_refused():
    model, images = RawSums(AdderDense(3)), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), images)
    variables["params"]["other"] = {"adder_kernel": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match="templates that it does not call: other. Nothing"):
        quantize(model, variables, images)


def test_a_model_says_in_which_dtype_it_computes():
    layer, images = AdderDense(3), jnp.ones((2, 4))
    with pytest.raises(TypeError, match="AdderDense has no field `config`, a dataclass with the dtype"):
        quantize(layer, layer.init(jax.random.key(0), images), images)


class Called(nn.Module):
    """A layer called as `call` does it."""

    call: object
    config: Description = Description()

    @nn.compact
    def __call__(self, images):
        return self.call(AdderDense(4, normalization="none", name="layer"), images)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda f, x: f(f(x)), "layer is called twice: its integers"),
        (lambda f, x: f(x, 2.0), "layer is not called as layer"),
        (lambda f, x: f(inputs=x), "layer is not called as layer"),
        (lambda f, x: nn.remat(lambda f, x: f(x))(f, x), "layer is called inside a transformation of JAX"),
    ],
)
def test_calls_whose_integers_would_be_others_are_refused(call, told):
    images, model = jnp.ones((2, 4)), Called(call)
    with pytest.raises(ValueError, match=told):
        quantize(model, model.init(jax.random.key(0), images), images)


def test_p_may_be_any_number_1():
    images, model = jnp.ones((2, 4)), Called(lambda f, x: f(x, np.float32(1)))
    assert quantize(model, model.init(jax.random.key(0), images), images).operations


class CalledAttention(nn.Module):
    """An attention whose linear layers multiply, called as `call` does it."""

    call: object
    config: VisionTransformerConfig

    @nn.compact
    def __call__(self, images):
        return self.call(AdderSelfAttention(self.config, name="attention"), images)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda f, x: f(f(x)), "attention is called twice"),
        (lambda f, x: nn.remat(lambda f, x: f(x))(f, x), "attention is called inside a transformation"),
    ],
)
def test_similarities_whose_integers_would_be_others_are_refused(call, told):
    config = VisionTransformerConfig.from_variant("digits", **(SMALL | {"linear": "multiply"}))
    images, model = jnp.ones((2, 5, 16)), CalledAttention(call, config)
    with pytest.raises(ValueError, match=told):
        quantize(model, model.init(jax.random.key(0), images), images)


class Attends(nn.Module):
    """An attention of two tokens of an image to all of its tokens."""

    config: VisionTransformerConfig

    @nn.compact
    def __call__(self, images):
        return AdderCrossAttention(self.config, name="attention")(images[:, :2], images)


def test_cross_attention_computes_with_integers():
    config = VisionTransformerConfig.from_variant("digits", **(SMALL | {"identity": False}))
    images, model = jax.random.normal(jax.random.key(1), (3, 5, config.embed_dim)), Attends(config)
    variables = model.init(jax.random.key(0), images)
    integers = quantize(model, variables, images)
    found = integers.vectors(images)
    queries, keys = (found[f"attention/{part}"].astype(int) for part in ("queries", "keys"))
    differences = queries[:, :, None] - keys[:, None, :]
    np.testing.assert_array_equal(found["attention/sums"], -np.abs(differences).sum(-1).transpose(0, 3, 1, 2))
    assert queries.shape[1] == 2 and keys.shape[1] == 5
    outputs = integers.apply(images)
    wanted = model.apply(variables, images)
    assert 0 < float(jnp.max(jnp.abs(outputs - wanted))) < 0.1 * float(jnp.max(jnp.abs(wanted)))


def test_no_images_are_refused():
    model, variables, images = model_of(**SMALL)
    with pytest.raises(ValueError, match="There are no calibration images"):
        quantize(model, variables, images[:0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_model_is_refused(value):
    model, images = RawSums(AdderDense(3)), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), images)
    variables["params"]["layer"]["adder_kernel"] = jnp.full((4, 3), value)
    with pytest.raises(ValueError, match="not finite, so no grid holds them"):
        quantize(model, variables, images)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_sums_of_int8_give_the_same_bits(implementation):
    model, variables, images = model_of(**SMALL, patch_embedding="adder", head="adder")
    integers = quantize(model, variables, images)
    expected = jax.jit(integers.apply)(images)
    program = jax.jit(functools.partial(integers.apply, implementation=implementation))
    np.testing.assert_array_equal(program(images), expected)
    assert ("adderflax_bytes" in program.lower(images).as_text()) == (implementation == "cpu")
    assert "i8>" not in jax.jit(integers.apply).lower(images).as_text()


def test_an_unknown_implementation_is_refused():
    model, variables, images = model_of(**SMALL)
    with pytest.raises(ValueError, match="unknown name 'fast'"):
        quantize(model, variables, images).apply(images, implementation="fast")
