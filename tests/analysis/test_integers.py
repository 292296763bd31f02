"""Integer models: their sums are those of whole numbers, their grids the best, their files complete."""

import dataclasses
import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from adderflax import (
    AdderConv,
    AdderDense,
    AdderResNet,
    AdderResNetConfig,
    VisionTransformer,
    VisionTransformerConfig,
    export,
)
from adderflax.analysis.integer_files import export_workdir, holds_integers, load_integers, write_integers
from adderflax.analysis.integer_reference import Export
from adderflax.analysis.integers import in_float32, on_grid, quantize, width
from adderflax.data import DataConfig, load_dataset, normalize_batch
from adderflax.encoder import AdderSelfAttention
from adderflax.operators import adder_conv
from adderflax.predict import predict
from adderflax.training.config import default_config
from adderflax.training.restore import load_model
from adderflax.training.trainer import evaluate, train
from adderflax.training.workdir import WorkdirError


@dataclasses.dataclass(frozen=True)
class Description:
    dtype: str = "float32"


class RawSums(nn.Module):
    """An adder layer whose sums are the result."""

    layer: nn.Module
    config: Description = Description()

    def __call__(self, images):
        return self.layer(images)


def layers(centered):
    shared = {"normalization": "none", "centered": centered}
    yield RawSums(AdderDense(9, **shared))
    geometry = {"strides": (2, 1), "padding": ((1, 0), (2, 1)), "dilation": (1, 2)}
    yield RawSums(AdderConv(6, (3, 2), feature_group_count=3, **geometry, **shared))


def model_of(**fields):
    config = VisionTransformerConfig.from_variant("digits", **({"arithmetic": "adder"} | fields))
    images = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
    model = VisionTransformer(config)
    return model, jax.jit(model.init)(jax.random.key(1), images), images


SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 24, "centered": True, "pooling": "mean"}


def expected_integers(values, exponent, bits):
    scaled = np.round(np.asarray(values, np.float64) / 2.0**exponent)
    return np.clip(scaled, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int64)


def dense_sums(x, w):
    return -np.abs(x[..., :, None].astype(np.int64) - w.astype(np.int64)).sum(-2)


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
    norm = jax.device_get(variables["params"]["block_0"]["mlp"]["fc2"]["norm"])
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


def test_more_bits_come_closer():
    model, variables, images = model_of(**SMALL)
    own = model.apply(variables, images)
    error = {
        bits: np.abs(quantize(model, variables, images, bits=bits).apply(images) - own).max()
        for bits in (2, 4, 6, 8)
    }
    assert error[8] < error[6] < error[4] < error[2]
    assert error[8] < 0.2 * error[4]


def test_grids_are_chosen_by_what_they_do_to_the_outputs():
    images = jax.random.normal(jax.random.key(0), (64, 32))
    model = RawSums(AdderDense(16))
    variables = model.init(jax.random.key(1), images)
    layer = variables["params"]["layer"]
    own = np.asarray(model.apply(variables, images))

    def error(exponent, bits):
        params = {"layer": layer | {"adder_kernel": on_grid(layer["adder_kernel"], exponent, bits)}}
        return np.square(
            np.asarray(model.apply({"params": params}, on_grid(images, exponent, bits))) - own
        ).mean()

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


def test_the_share_that_is_cut_off():
    # One template of 1.0: at 8 bits 2^-6 holds it, and of the inputs 127 / 64 = 1.984 is the last.
    model = RawSums(AdderDense(1, normalization="none", kernel_init=nn.initializers.ones))
    images = jnp.asarray([[1.0], [0.5], [-1.25], [1.9921], [1.9922], [-2.0078], [-2.0079]])
    variables = model.init(jax.random.key(0), images)
    operation = quantize(model, variables, images).operations["layer"]
    beyond = {-6: 2, -5: 0}[operation.exponent]
    assert operation.clipped == pytest.approx(beyond / 8)


@pytest.mark.parametrize(
    ("lowest", "highest", "bits"),
    [(-128, 127, 8), (-129, 0, 9), (0, 128, 9), (-1, 0, 1), (-32768, 18029, 16), (-16320, 0, 15)],
)
def test_widths_are_those_of_twos_complement(lowest, highest, bits):
    assert width(lowest, highest) == bits


@pytest.mark.parametrize("bits", [2, 5])
@pytest.mark.parametrize("centered", [False, True])
def test_accumulators_reach_their_ends_and_no_further(centered, bits):
    for model in layers(centered):
        if isinstance(model.layer, AdderConv):
            continue
        images = jax.random.normal(jax.random.key(0), (4, 3))
        integers = quantize(model, model.init(jax.random.key(1), images), images, bits=bits)
        (templates,), ((lowest, highest),) = integers.templates().values(), integers.accumulators().values()
        half = 2 ** (bits - 1)
        operands = np.stack(np.meshgrid(*[np.arange(-half, half)] * 3), axis=-1).reshape(-1, 3)
        constants = np.abs(templates.astype(np.int64)).sum(axis=0) if centered else 0
        sums = constants + dense_sums(operands, templates)
        # The templates themselves are among the operands: nothing is taken off the constant there.
        assert (sums.min(), sums.max()) == (lowest, highest)


def test_accumulators_of_convolutions_and_similarities():
    *_, model = layers(True)
    images = jax.random.normal(jax.random.key(0), (2, 5, 5, 6))
    integers = quantize(model, model.init(jax.random.key(1), images), images)
    (templates,), ((lowest, highest),) = integers.templates().values(), integers.accumulators().values()
    flat = templates.reshape(-1, 6).astype(np.int64)
    furthest = np.maximum(np.abs(flat + 128), np.abs(flat - 127)).sum(axis=0)
    assert (lowest, highest) == ((np.abs(flat).sum(0) - furthest).min(), np.abs(flat).sum(0).max())
    model, variables, images = model_of(**SMALL)
    assert quantize(model, variables, images, bits=4).accumulators()["block_0/attention"] == (-8 * 15, 0)


ALL_ADD = {"patch_embedding": "adder", "head": "adder", "aggregation": "l1"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        ALL_ADD | {"pooling": "token", "centered": False, "power_activation": True, "identity": False},
        ALL_ADD | {"stem": "conv", "mlp_kernel_size": 3, "power_activation": True},
        {"stem": "conv", "mlp_kernel_size": 3, "mlp_convolution": "multiply", "mlp_dim": None},
        {"arithmetic": "vit", "similarity": "l1", "pooling": "token", "attention_scale": 0.2},
        {"similarity": "dot", "output_projection": "multiply"},
    ],
    ids=["plain", "all-add", "all-add-stem", "stem", "vit", "dot"],
)
def test_the_reference_in_numpy_computes_the_model(tmp_path, fields):
    model, variables, images = model_of(**(SMALL | fields))
    # What is 0 or 1 in a fresh model would hide what is left out.
    noise = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: leaf + jnp.float32(0.1 * noise.normal(size=leaf.shape)), variables)
    info = load_dataset(DataConfig(name="digits")).info
    pixels = noise.integers(0, 256, (3, 8, 8, 1), np.uint8)
    integers = quantize(model, variables, normalize_batch(pixels, info), bits=6)
    write_integers(tmp_path, integers, pixels, info)
    (tmp_path / "dataset.json").write_text(json.dumps(dataclasses.asdict(info)))
    export = Export(tmp_path)
    assert export.wrong_operations() == [] and len(export.operations) == len(integers.operations)
    expected = np.load(tmp_path / "vectors.npz")["logits"]
    np.testing.assert_allclose(export.logits(recorded=True), expected, atol=1e-5)
    assert np.abs(export.logits(recorded=False) - expected).max() < 0.2


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
    with pytest.raises(ValueError, match="no adder layer and no L1 similarity"):
        quantize(twin, variables, images)


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


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps on the digits, in bfloat16."""
    config = default_config()
    config.update_from_flattened_dict(
        {"batch_size": 32, "total_steps": 2, "log_every": 1, "eval_every": 2, "checkpoint_every": 2}
        | {f"model.{name}": value for name, value in SMALL.items()}
        | {"model.dtype": "bfloat16"}
    )
    path = tmp_path_factory.mktemp("integers") / "run"
    with jax.numpy_dtype_promotion("standard"):
        train(config, path, progress=False)
    return path


def test_files(workdir, tmp_path, capsys):
    directory = tmp_path / "int8"
    export.main([str(workdir), str(directory), "--calibration=40", "--vectors=3", "--evaluate", "--json"])
    description = json.loads(capsys.readouterr().out)
    assert description == json.loads((directory / "integers.json").read_text())
    assert (description["bits"], description["test_examples"]) == (8, 359)
    arrays, vectors = (dict(np.load(directory / f"{name}.npz")) for name in ("integers", "vectors"))
    assert {array.dtype.name for name, array in arrays.items() if name.endswith("adder_kernel")} == {"int8"}
    assert arrays["constants/block_0/mlp/fc2"].dtype == np.int32
    entry = next(entry for entry in description["operations"] if entry["name"] == "block_0/mlp/fc2")
    assert (entry["kind"], entry["terms"], entry["accumulator_bits"], entry["centered"]) == (
        "dense",
        24,
        width(entry["accumulator_lowest"], entry["accumulator_highest"]),
        True,
    )
    assert entry["accumulator_lowest"] >= -24 * 128  # what the constant leaves of 24 * 255
    assert description["operands"] == {"lowest": -128, "highest": 127}
    assert description["model"]["attention_scale"] == pytest.approx(1 / np.sqrt(2 * 8 * (1 - 2 / np.pi)))
    # The files check themselves, without this library.
    reference = [sys.executable, "-I", directory / "reference.py"]
    told = subprocess.run(reference, capture_output=True, text=True, cwd="/")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("7 of 7 operations have the recorded sums\nlogits with the recorded")
    wrong = vectors | {"block_0/mlp/fc1/sums": vectors["block_0/mlp/fc1/sums"] + 1}
    shutil.copytree(directory, tmp_path / "wrong")
    np.savez(tmp_path / "wrong" / "vectors.npz", **wrong)
    told = subprocess.run([*reference, tmp_path / "wrong"], capture_output=True, text=True, cwd="/")
    assert told.returncode == 1
    assert told.stdout.startswith("6 of 7 operations have the recorded sums, not block_0/mlp/fc1\n")
    sums = dense_sums(vectors["block_0/mlp/fc2/inputs"], arrays["params/block_0/mlp/fc2/adder_kernel"])
    np.testing.assert_array_equal(vectors["block_0/mlp/fc2/sums"], sums)
    # What is read again has the same bits, and the command for predictions takes it.
    integers, info = load_integers(directory)
    images = (vectors["images"] / 255.0 - np.asarray(info.mean)) / np.asarray(info.std)
    np.testing.assert_allclose(integers.apply(jnp.float32(images)), vectors["logits"], atol=1e-4)
    (probabilities,) = predict(directory, vectors["images"][:1])
    exponentials = np.exp(vectors["logits"][0] - vectors["logits"][0].max())
    expected = dict(zip(info.class_names, exponentials / exponentials.sum()))
    assert probabilities == pytest.approx(expected, abs=1e-4)
    # The grids are those of the first training images.
    model, variables, _ = load_model(workdir)
    data = load_dataset(DataConfig(name="digits"))
    pixels = np.stack([data.train[i]["image"] for i in range(40)])
    normalized = jnp.float32((pixels / 255.0 - np.asarray(info.mean)) / np.asarray(info.std))
    for name, operation in quantize(model, variables, normalized).operations.items():
        assert integers.operations[name].exponent == operation.exponent
        assert integers.operations[name].clipped == pytest.approx(operation.clipped, abs=3e-4)
    own = quantize(model, variables, jnp.float32(images)).model.apply(variables, jnp.float32(images))
    assert np.abs(np.asarray(own) - vectors["logits"]).max() < 0.3


def test_reported_accuracies(workdir, tmp_path):
    # At 2 bits the two models differ in far more images than a rounding can move.
    description = export_workdir(workdir, tmp_path, bits=2, calibration=40, vectors=1, evaluate=True)
    integers, info = load_integers(tmp_path)
    model, variables, _ = load_model(workdir)
    test = load_dataset(DataConfig(name="digits")).test
    pixels, labels = (np.stack([test[i][field] for i in range(len(test))]) for field in ("image", "label"))
    normalized = jnp.float32((pixels / 255.0 - np.asarray(info.mean)) / np.asarray(info.std))
    logits = {"integer": integers.apply(normalized), "float": in_float32(model).apply(variables, normalized)}
    right = {kind: np.mean(np.argmax(found, axis=-1) == labels) for kind, found in logits.items()}
    assert abs(right["integer"] - right["float"]) > 5 / 359
    for kind, accuracy in right.items():
        assert abs(description[f"test_accuracy_{kind}"] - accuracy) < 1.5 / 359


def test_the_table(workdir, tmp_path, capsys):
    export.main([str(workdir), str(tmp_path / "int4"), "--bits=4", "--calibration=8", "--vectors=1"])
    printed = capsys.readouterr().out
    assert "block_0/attention               similarity" in printed
    assert "test images" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits=9"], "bits=9 is not known"),
        (["--calibration=0"], "calibration=0 images cannot be taken from the train part of digits"),
        (["--vectors=360"], "vectors=360 images cannot be taken from the test part of digits, which has 359"),
    ],
)
def test_mistakes(workdir, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        export.main([str(workdir), str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(workdir):
    before = (Path(workdir) / "config.json").read_text()
    with pytest.raises(SystemExit, match="is not an empty directory; choose another"):
        export.main([str(workdir), str(workdir)])
    assert (Path(workdir) / "config.json").read_text() == before


def test_no_run_begins_where_integers_are(tmp_path):
    (tmp_path / "integers.json").write_text("{}")
    with pytest.raises(WorkdirError, match="exported as integers"):
        train(default_config(), tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir() if path.name != "lock"] == ["integers.json"]


def test_damaged_files(workdir, tmp_path):
    export_workdir(workdir, tmp_path, calibration=8, vectors=1)
    description = json.loads((tmp_path / "integers.json").read_text())
    (tmp_path / "integers.json").write_text(json.dumps(description | {"format": 2}))
    with pytest.raises(WorkdirError, match="its format is 2, and this version reads 1"):
        load_integers(tmp_path)
    operations = description["operations"]
    for damage, told in (
        ({"bits": "8"}, "bits='8' is not one of 2, 3"),
        ({"operations": operations[1:]}, "attention/query/adder_kernel are in one of its two files"),
        ({"operations": [operations[0] | {"exponent": 10**6}, *operations[1:]]}, "OverflowError"),
    ):
        (tmp_path / "integers.json").write_text(json.dumps(description | damage))
        with pytest.raises(WorkdirError, match=told):
            load_integers(tmp_path)
    (tmp_path / "integers.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(WorkdirError, match="KeyError"):
        load_integers(tmp_path)
    (tmp_path / "integers.json").write_text(json.dumps(description))
    config = json.loads((tmp_path / "config.json").read_text())
    wider = config | {"model": config["model"] | {"mlp_dim": 48}}
    (tmp_path / "config.json").write_text(json.dumps(wider))
    with pytest.raises(WorkdirError, match="does not belong to the model that config.json beside it"):
        load_integers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "integers.npz").write_bytes((tmp_path / "integers.npz").read_bytes()[:100])
    with pytest.raises(WorkdirError, match="cannot be read as an integer model"):
        load_integers(tmp_path)


def test_an_export_that_fails_leaves_nothing(workdir, tmp_path, monkeypatch):
    save = np.savez

    def full_disk(file, **arrays):
        if "vectors" in Path(file).name:
            raise OSError(28, "No space left on device", str(file))
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(WorkdirError, match="out cannot be written: No space left on device. Mend that"):
        export_workdir(workdir, tmp_path / "out", calibration=8, vectors=1)
    with pytest.raises(WorkdirError, match="No space left"):
        export_workdir(workdir, tmp_path / "a" / "b" / "out", calibration=8, vectors=1)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match="file/out cannot be written: Not a directory. Mend that"):
        export_workdir(workdir, tmp_path / "file" / "out", calibration=8, vectors=1)


def test_an_empty_directory_is_filled_and_stays_itself(workdir, tmp_path, monkeypatch):
    target = tmp_path / "private"
    target.mkdir(mode=0o700)
    monkeypatch.chdir(target)
    export_workdir(workdir, ".", calibration=8, vectors=1)
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    assert {path.name for path in target.iterdir()} == {
        *("integers.json", "integers.npz", "vectors.npz", "config.json", "dataset.json"),
        *("README.md", "reference.py"),
    }
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    export_workdir(workdir, tmp_path / "link", calibration=8, vectors=1)
    assert holds_integers(tmp_path / "elsewhere")


def test_an_export_is_no_run(workdir, tmp_path):
    export_workdir(workdir, tmp_path, calibration=8, vectors=1)
    for read in (load_model, evaluate, lambda directory: export_workdir(directory, directory / "again")):
        with pytest.raises(
            WorkdirError, match="holds an export, integers that .* Give the directory of the run"
        ):
            read(tmp_path)
    with pytest.raises(WorkdirError, match="no checkpoints to choose the best of: leave --best out"):
        predict(tmp_path, [], best=True)
