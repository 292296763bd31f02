"""Models without floats: each step is what the page says, and the whole is the model, in every bit."""

import ast
import copy
import dataclasses
import inspect
import json
import math
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer_models import ALL_ADD, INFO, MODELS, STEM, made, trained

from adderflax import export
from adderflax.analysis import integer_only_reference as reference
from adderflax.analysis.integer_files import export_workdir, load_integer_only, write_integer_only
from adderflax.analysis.integer_only import at_the_limits, integer_only_model
from adderflax.data import DataConfig, load_dataset, normalize_batch
from adderflax.models import AdderResNet, AdderResNetConfig
from adderflax.training.workdir import WorkdirError


@pytest.fixture(scope="module", params=MODELS, ids=MODELS)
def models(request):
    return made(**MODELS[request.param])


def test_the_model_is_the_one_with_floats(models):
    integers, whole, pixels = models
    expected = np.asarray(integers.apply(normalize_batch(pixels, INFO)))
    logits = whole.logits(pixels)
    found = logits.integers * 2.0**logits.exponent
    # Of random models, whose logits follow every rounding; trained ones have margins.
    assert np.sqrt(np.mean(np.square(found - expected))) < 0.06 * np.std(expected)


def test_numpy_has_every_bit(models):
    _, whole, pixels = models
    fast = whole.trace(pixels[:3])
    slow = reference.IntegerOnly(whole.described, whole.arrays).trace(pixels[:3])
    assert fast.keys() == slow.keys()
    for name, integers in slow.items():
        np.testing.assert_array_equal(fast[name], integers, err_msg=name)


def test_units_use_the_bits_that_there_are(models):
    _, whole, pixels = models
    traced = whole.trace(pixels)
    norms = {name: integers for name, integers in traced.items() if name in whole.described["norms"]}
    # Of the last block a model with a class token uses that one alone.
    seen = 1 if whole.described["model"]["pooling"] == "token" else None
    stream = [traced["embedded"], traced["block_0/attended"], traced["block_0"][:, :seen]]
    for name, integers in (norms | {"stream": np.concatenate(stream, axis=1)}).items():
        # Half of the range is kept for images that go beyond what was seen.
        assert 2**13 <= np.abs(integers).max() <= 2**14 + 2**10, name


def test_attention_is_that_of_its_scores(models):
    _, whole, pixels = models
    described, traced, name = whole.described["model"], whole.trace(pixels), "block_0/attention"
    entry = whole.described["attentions"][name]
    value = reference.Fixed(
        np.int64(traced[f"{name}/value"]), whole.described["layers"][f"{name}/value"]["output"]
    )
    if value.exponent is None or f"{name}/value/norm" in whole.described["norms"]:
        value = value._replace(exponent=whole.described["norms"][f"{name}/value/norm"]["output"])
    if f"{name}/value/power" in whole.described["tables"]:
        value = value._replace(exponent=whole.described["tables"][f"{name}/value/power"]["output"])
    integers = reference.rescaled(value, entry["value"], entry["value_bits"]).integers
    heads = traced[f"{name}/scores"].shape[1]
    B, T, D = integers.shape
    value_BxHxTxd = (integers * 2.0 ** entry["value"]).reshape(B, T, heads, D // heads).transpose(0, 2, 1, 3)
    l1 = described["similarity"] == "l1"
    unit = entry["query"] if l1 else entry["query"] + entry["key"]
    weights = jax.nn.softmax(traced[f"{name}/scores"] * 2.0**unit * described["attention_scale"], axis=-1)
    weights = np.asarray(weights, np.float64) + np.eye(T) * described["identity"]
    if described["aggregation"] == "dot":
        expected, exponent = weights @ value_BxHxTxd, entry["value"] - reference.ATTENDED
    else:
        terms = np.abs(value_BxHxTxd[:, :, None]) - np.abs(weights[..., None] - value_BxHxTxd[:, :, None])
        expected = terms.sum(axis=3)
        exponent = entry["value"]
    found = traced[f"{name}/heads"] * 2.0**exponent
    # Exponents of 2 have 8 binary places, weights of an L1 aggregation the unit of the values.
    np.testing.assert_allclose(
        found, expected, atol=T * 2.0 ** (exponent - 1) + 0.002 * np.abs(value_BxHxTxd).max()
    )


@pytest.mark.parametrize("fields", [{}, ALL_ADD | {"pooling": "token"}], ids=["mean", "token"])
def test_the_head_sees_the_pooled_tokens(fields):
    _, whole, pixels = made(**fields)
    traced, entry = whole.trace(pixels), whole.described["layers"]["head"]
    tokens = np.int64(traced["norm"])
    if not fields:  # halves of the mean rounded up
        tokens = (tokens.sum(axis=1) * 2 + tokens.shape[1]) // (2 * tokens.shape[1])
    pooled = reference.Fixed(tokens, whole.described["norms"]["norm"]["output"])
    inputs = reference.rescaled(pooled, entry["input"], 8).integers
    product = reference.distances if entry["adds"] else np.matmul
    sums = product(inputs, np.int64(whole.arrays["head/kernel"])) + whole.arrays["head/constant"]
    np.testing.assert_array_equal(traced["head/sums"], sums)


def test_few_bits_are_those_of_the_adder_layers():
    integers, whole, pixels = made(bits=3, **STEM, mlp_convolution="multiply")
    layers = whole.described["layers"]
    assert {name: entry["bits"] for name, entry in layers.items() if entry["adds"]} == {
        name: 3 for name, operation in integers.operations.items() if operation.kind != "similarity"
    }
    assert {entry["bits"] for entry in layers.values() if not entry["adds"]} == {8}
    adds = [name for name, entry in layers.items() if entry["adds"]]
    assert max(np.abs(whole.arrays[f"{name}/kernel"]).max() for name in adds) <= 4
    assert np.abs(whole.arrays["block_0/mlp/gelu"]).max() <= 4  # what fc2 takes


def test_no_float_is_in_the_reference():
    tree = ast.parse(inspect.getsource(reference))
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "check"]  # it divides paths
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Div), "a division that gives floats"
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float)), node.value
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {(m, f) for m in ("np", "math") for f in ("sqrt", "exp")}
            assert not node.attr.startswith("float")


def test_arrays_are_integers(models):
    _, whole, _ = models
    assert {array.dtype.name for array in whole.arrays.values()} <= {"int8", "int16", "int32"}
    with pytest.raises(TypeError, match="Cannot cast"):
        arrays = whole.arrays | {"exponentials": np.float64(whole.arrays["exponentials"])}
        reference.IntegerOnly(whole.described, arrays)


def test_shifts_round_halves_up():
    values = np.array([-7, -6, -5, -2, -1, 0, 1, 2, 5, 6, 7])
    assert reference.shifted(values, 2).tolist() == [-2, -1, -1, 0, 0, 0, 0, 1, 1, 2, 2]
    assert reference.shifted(values, 0).tolist() == values.tolist()
    assert reference.shifted(values, -3).tolist() == (8 * values).tolist()
    places = np.array([[1], [-1]])
    assert reference.shifted(np.array([[3, -3], [3, -3]]), places).tolist() == [[2, -1], [6, -6]]


def test_other_units_round_and_clip():
    x = reference.Fixed(np.array([-400, -6, -5, 5, 6, 400]), -3)
    assert reference.rescaled(x, -1, 4).integers.tolist() == [-8, -1, -1, 1, 2, 7]
    assert reference.rescaled(x, -5).integers.tolist() == [-1600, -24, -20, 20, 24, 1600]
    total = reference.added(x, reference.Fixed(np.array([1, 1, 1, 1, 1, 1]), -1))
    assert (total.exponent, total.integers.tolist()) == (-3, [-396, -2, -1, 9, 10, 404])


def test_roots_and_lengths_are_exact():
    random = np.random.default_rng(0)
    values = np.concatenate([np.arange(70), random.integers(0, 2**32, 1000), [2**32 - 1, 2**30, 2**30 - 1]])
    assert reference.square_root(values).tolist() == [math.isqrt(value) for value in values.tolist()]
    wide = np.concatenate([values, random.integers(0, 2**62, 1000), 2 ** np.arange(62), [2**63 - 1]])
    assert reference.bit_length(wide).tolist() == [value.bit_length() for value in wide.tolist()]


@pytest.mark.parametrize("n", [1, 2, 10, 17, 256, 768, 3072])
@pytest.mark.parametrize(
    ("mean", "deviation", "unit"),
    [
        (0, 40, -5),
        (-9_000, 300, -5),
        (60_000, 5_000, -8),
        (3, 2, -2),
        (0, 30_000, -18),
    ],  # the last like epsilon
)
def test_normalization(n, mean, deviation, unit):
    random = np.random.default_rng(n)
    x = np.rint(random.normal(mean, deviation, (5, n))).astype(np.int64)
    scale, bias = random.normal(1, 0.5, n), random.normal(0, 0.5, n)
    output, shift = -11, 24
    epsilon = round(n**3 * 1e-3 * 4.0**-unit)
    found = reference.layer_norm(
        x,
        np.int64(np.rint(scale * math.sqrt(n) * 2.0 ** (shift - reference.ROOT - output))),
        np.int64(np.rint(bias * 2.0**-output)),
        shift,
        epsilon,
    )
    real = x * 2.0**unit
    centered = real - real.mean(axis=-1, keepdims=True)
    variance = np.square(centered).mean(axis=-1, keepdims=True) + epsilon / n**3 * 4.0**unit
    expected = scale * centered / np.sqrt(np.maximum(variance, 1e-30)) + bias
    expected = np.clip(expected, -(2**15) * 2.0**output, (2**15 - 1) * 2.0**output)
    # A unit for roundings; 2^-13 of what is normalized, or of 1, for the root, its reciprocal and 15 bits;
    # and the sixteen places of a value divided by the root.
    most = np.abs(expected - bias) + np.abs(scale)
    bound = 2.0**output + most * 2.0**-13 + np.abs(scale) * math.sqrt(n) * 2.0**-17
    assert np.all(np.abs(found * 2.0**output - expected) <= bound)


def test_a_row_of_equals_normalizes_to_its_bias():
    x = np.full((2, 8), [[-70_000], [5]])
    offset = np.arange(8)
    found = reference.layer_norm(x, np.full(8, 2**14), offset, 20, 0)
    assert found.tolist() == [offset.tolist()] * 2


def test_exponentials():
    table = made()[1].arrays["exponentials"]
    falls = np.concatenate([np.arange(3000), np.arange(3000, 400_000, 97)])
    found = reference.two_to_the(falls, 6, table)
    expected = 2.0 ** (reference.ONE - falls / 2.0 ** (6 + reference.SOFTMAX))
    # Half of the exponent's last place, and one that is cut off.
    assert np.all(np.abs(found - expected) <= expected * (2.0 ** (0.5 / 2**reference.SOFTMAX) - 1) + 1)
    assert reference.two_to_the(np.array([0, 2**62]), 6, table).tolist() == [2**15, 0]


def test_numpy_has_every_bit_at_the_limits(models):
    _, whole, _ = models
    limits = at_the_limits(whole)
    fast = whole.trace_limits(**limits)
    slow = reference.IntegerOnly(whole.described, whole.arrays).trace_limits(**limits)
    assert fast.keys() == slow.keys() > {"limits/block_0", "limits/exponentials", "limits/looked_up"}
    for name, integers in slow.items():
        np.testing.assert_array_equal(fast[name], integers, err_msg=name)
    # What is recorded has 32 bits.
    largest = {}
    whole._record = lambda name, integers: largest.update({name: np.abs(integers).max()})
    stream = reference.Fixed(np.int64(limits["tokens"]), whole.described["stream"]["exponent"])
    whole._classified(stream)
    whole._record = reference._forget
    assert 2**15 in largest.values() and max(largest.values()) < 2**31


WRONG = {
    "a stream that wraps": ("clipped", lambda x, bits: x if bits == 16 else _clipped(x, bits)),
    "bytes that wrap": ("clipped", lambda x, bits: np.int8(x) if bits == 8 else _clipped(x, bits)),
    "a table that wraps": (
        "clipped",
        lambda x, bits: (x + 1024) % 2048 - 1024 if bits == 11 else _clipped(x, bits),
    ),
    "ends that differ by their sign": ("clipped", lambda x, bits: np.maximum(_clipped(x, bits), 1 - 2**15)),
    "a softmax of 15 powers": ("two_to_the", lambda x, shift, table: _exponentials(x, shift, table, 15)),
    "shifts that wrap": ("two_to_the", lambda x, shift, table: _exponentials(x % 2**17, shift, table, 16)),
}
_clipped = reference.clipped


def _exponentials(falls, shift, table, most):
    exponents = reference.shifted(falls, shift)
    return table[exponents & 255] >> np.minimum(exponents >> 8, most)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_limits_tell_what_images_do_not(wrong, monkeypatch):
    """Mistakes that the record of an ordinary image may not show."""
    _, whole, _ = made(**STEM)
    limits = at_the_limits(whole)
    right = whole.trace_limits(**limits)
    monkeypatch.setattr(reference, *WRONG[wrong])
    found = whole.trace_limits(**limits)
    assert not all(np.array_equal(found[name], integers) for name, integers in right.items())


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 8, 8, 1), np.float32),
        np.zeros((1, 8, 8, 1), np.int32),
        np.zeros((1, 2, 2, 1), np.uint8),
        np.zeros((1, 4, 16, 1), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
    ],
)
def test_images_are_pixels_of_the_size(images):
    with pytest.raises(ValueError, match=r"but this model takes uint8 pixels \[batch, 8, 8, 1\]: resize"):
        made()[1].logits(images)


def test_weights_that_are_not_finite_are_refused():
    integers, _, pixels = made(arithmetic="multiply")
    integers.variables["params"]["head"]["bias"] = jnp.full(10, jnp.nan)
    with pytest.raises(ValueError, match="Weights are not finite, so no integers stand for them"):
        integer_only_model(integers, pixels, INFO)


def test_other_models_are_refused():
    model = AdderResNet(AdderResNetConfig())
    with pytest.raises(ValueError, match="A AdderResNet has no form in whole numbers alone"):
        integer_only_model(
            dataclasses.replace(made()[0], model=model), np.zeros((1, 8, 8, 1), np.uint8), INFO
        )
    with pytest.raises(ValueError, match="attention_scale=-0.5 is below 0, and a softmax in whole numbers"):
        made(attention_scale=-0.5)
    with pytest.raises(ValueError, match="no calibration images"):
        integer_only_model(made()[0], np.zeros((0, 8, 8, 1), np.uint8), INFO)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A multiplying run of two steps on the digits."""
    return trained(tmp_path_factory.mktemp("integer_only") / "run", arithmetic="multiply")


def test_files(workdir, tmp_path, capsys):
    directory = tmp_path / "whole"
    arguments = ["--calibration=40", "--vectors=3", "--evaluate"]
    export.main([str(workdir), str(directory), *arguments, "--integer_only"])
    told = capsys.readouterr().out
    description = json.loads((directory / "integers.json").read_text())
    accuracy = description["test_accuracy_integer_only"]
    exact = description["test_accuracy_float"]
    assert f"images: {exact:.4f} in float32, {accuracy:.4f} with nothing but integers\n" in told
    assert "The model without floats: integer_only.py" in told
    whole, info = load_integer_only(directory)
    test = load_dataset(DataConfig(name="digits")).test
    pixels, labels = (np.stack([test[i][field] for i in range(len(test))]) for field in ("image", "label"))
    assert np.mean(whole.logits(pixels).integers.argmax(axis=-1) == labels) == accuracy
    vectors = dict(np.load(directory / "integer_only_vectors.npz"))
    np.testing.assert_array_equal(vectors["images"], pixels[:3])
    np.testing.assert_array_equal(vectors["head"], whole.logits(pixels[:3]).integers)
    # The files check themselves, without this library.
    code = (
        "import runpy, sys; sys.modules |= {'jax': None, 'adderflax': None};"
        "script = sys.argv.pop(1); sys.path.insert(0, script.rpartition('/')[0]);"
        "runpy.run_path(script, run_name='__main__')"
    )
    checks = [sys.executable, "-E", "-c", code, str(directory / "integer_only.py")]
    checked = subprocess.run(checks, capture_output=True, text=True, cwd="/")
    assert checked.returncode == 0, checked.stderr
    operands = [name for name in vectors if name.startswith("accumulators/")]
    operands = [name for name in operands if name.endswith(("/inputs", "/queries", "/keys"))]
    # The ends of each accumulator are held against what is told of them.
    ends = [
        f"accumulators/{name}"
        for kind in ("layers", "attentions")
        for name in json.loads((directory / "integer_only.json").read_text())[kind]
    ]
    count = len(vectors) - 4 - len(operands) + len(ends)
    assert checked.stdout == f"{count} of {count} values are the recorded ones\n"
    shutil.copytree(directory, tmp_path / "wrong")
    vectors["block_0/mlp/fc1"][0, 0, 0] += 1
    np.savez(tmp_path / "wrong" / "integer_only_vectors.npz", **vectors)
    checked = subprocess.run([*checks, tmp_path / "wrong"], capture_output=True, text=True, cwd="/")
    assert checked.returncode == 1
    assert checked.stdout == f"{count - 1} of {count} values are the recorded ones, not block_0/mlp/fc1\n"
    # What is not recorded any more is not checked, and so it is wrong.
    vectors.pop("block_0/mlp/fc1")
    np.savez(tmp_path / "wrong" / "integer_only_vectors.npz", **vectors)
    told = json.loads((directory / "integer_only.json").read_text())
    told["layers"]["head"]["accumulator_highest"] += 1
    (tmp_path / "wrong" / "integer_only.json").write_text(json.dumps(told))
    checked = subprocess.run([*checks, tmp_path / "wrong"], capture_output=True, text=True, cwd="/")
    assert checked.returncode == 1
    expected = "values are the recorded ones, not accumulators/head/ends, not block_0/mlp/fc1\n"
    assert checked.stdout == f"{count - 2} of {count} {expected}"
    (tmp_path / "wrong" / "integer_only.npz").unlink()
    checked = subprocess.run([*checks, tmp_path / "wrong"], capture_output=True, text=True, cwd="/")
    assert checked.returncode == 2 and "wrong cannot be read: [Errno 2]" in checked.stderr


def test_a_model_that_adds_nowhere_has_no_other_export(workdir, tmp_path):
    with pytest.raises(
        ValueError, match="no adder layer and no L1 similarity, so .* or for a VisionTransformer integer_only"
    ):
        export_workdir(workdir, tmp_path / "out", calibration=8, vectors=1)
    with pytest.raises(ValueError, match="bits=4 is that of adder layers and L1 similarities, and the model"):
        export_workdir(workdir, tmp_path / "out", calibration=8, vectors=1, bits=4, integer_only=True)
    assert not (tmp_path / "out").exists()


def test_damaged_files(workdir, tmp_path):
    _, whole, pixels = made()
    write_integer_only(tmp_path, whole, pixels[:1])
    shutil.copy(workdir / "dataset.json", tmp_path)
    load_integer_only(tmp_path)
    (tmp_path / "integer_only.json").write_text(json.dumps(whole.described | {"format": 2}))
    with pytest.raises(WorkdirError, match="its format is 2, and this version reads 1"):
        load_integer_only(tmp_path)
    (tmp_path / "integer_only.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(WorkdirError, match="KeyError"):
        load_integer_only(tmp_path)
    layer, attention = "block_0/mlp/fc1", "block_0/attention"
    for part, name, field, value, told in (
        ("layers", layer, "bits", "8", "TypeError"),
        ("layers", layer, "accumulator_bits", -5, f"accumulator_bits of {layer} is -5, and 1[0-9] by its w"),
        ("layers", layer, "accumulator_lowest", 7, f"accumulator_lowest of {layer} is 7, and -[0-9]+ by"),
        ("layers", layer, "bits", 7, f"accumulator_lowest of {layer} is .* by its weights and bits"),
        ("attentions", attention, "query_bits", 4, f"accumulator_lowest of {attention} is -2040, and -120"),
        ("model", "image_size", None, 16, "model.image_size is 16, and 8 in dataset.json"),
        ("model", "num_classes", None, 7, "model.num_classes is 7, and 10 in dataset.json"),
    ):
        damaged = copy.deepcopy(whole.described)
        if field is None:
            damaged[part][name] = value
        else:
            damaged[part][name][field] = value
        (tmp_path / "integer_only.json").write_text(json.dumps(damaged))
        with pytest.raises(WorkdirError, match=told):
            load_integer_only(tmp_path)
    earlier = copy.deepcopy(whole.described)
    for entry in [*earlier["layers"].values(), *earlier["attentions"].values()]:
        for field in ("lowest", "highest", "bits"):
            del entry[f"accumulator_{field}"]
    (tmp_path / "integer_only.json").write_text(json.dumps(earlier))
    load_integer_only(tmp_path)  # it did not tell them
    (tmp_path / "integer_only.json").write_text(json.dumps(whole.described))
    for lost in ("head/kernel", "norm/offset", "block_0/mlp/gelu", "pixels"):
        arrays = {name: array for name, array in whole.arrays.items() if name != lost}
        np.savez(tmp_path / "integer_only.npz", **arrays)
        with pytest.raises(WorkdirError, match=f"{lost} are not in integer_only.npz"):
            load_integer_only(tmp_path)
    (tmp_path / "integer_only.json").unlink()
    with pytest.raises(WorkdirError, match="Export the run again, with --integer_only"):
        load_integer_only(tmp_path)
