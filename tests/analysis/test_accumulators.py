"""Accumulators: the range that is told is the one there is, and recorded operands reach both ends of it."""

import itertools

import jax
import numpy as np
import pytest
from integer_models import SMALL, dense_sums, layers, model_of

from adderflax.analysis import accumulators
from adderflax.analysis.accumulators import LayerSums, Scores, integer_only_accumulators, told
from adderflax.analysis.integer_only import integer_only_model
from adderflax.analysis.integer_reference import convolution, distances
from adderflax.analysis.integers import quantize
from adderflax.analysis.ranges import Range
from adderflax.data import DataConfig, load_dataset

PREFIX = "accumulators/"


@pytest.mark.parametrize(
    ("lowest", "highest", "bits"),
    [
        (-128, 127, 8),
        (-129, 0, 9),
        (0, 128, 9),
        (-1, 0, 1),
        (-32768, 18029, 16),
        (-16320, 0, 15),
        (0, 0, 1),
        (0, 3, 3),
        (-9, -5, 5),
    ],
)
def test_widths_are_those_of_twos_complement(lowest, highest, bits):
    assert Range(lowest, highest).bits == bits


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("constant", [0, np.array([9, -4, 30, 0])])
def test_accumulators_reach_their_ends_and_no_further(bits, adds, constant):
    """Against every input there is, and every order of the terms."""
    values = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    kernel = np.random.default_rng(bits).choice(values, (3, 4)).astype(np.int8)
    accumulator = LayerSums(kernel, constant, adds, bits, None)
    inputs = np.stack(np.meshgrid(*[values] * 3), axis=-1).reshape(-1, 3)
    differences = inputs[..., None] - kernel.astype(np.int64)
    terms = -np.abs(differences) if adds else inputs[..., None] * kernel.astype(np.int64)
    partial = [constant + np.zeros_like(terms[:, 0])]
    for order in itertools.permutations(range(3)):
        partial.extend(constant + np.cumsum(terms[:, order], axis=1)[:, i] for i in range(3))
    lowest, highest = accumulator.ends()
    assert (np.min(partial), np.max(partial)) == (lowest, highest)
    operands = accumulator.operands()["inputs"]
    assert operands.dtype == np.int8 and operands.shape == (2, 3)
    product = distances if adds else np.matmul
    sums = constant + product(operands.astype(np.int64), kernel.astype(np.int64))
    assert (sums[0].min(), sums[1].max()) == (lowest, highest)


GEOMETRIES = {
    "plain": {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "dilation": (1, 1)},
    "padded": {"strides": (1, 1), "padding": ((1, 1), (2, 0)), "dilation": (1, 1)},
    "strided": {"strides": (3, 2), "padding": ((1, 2), (2, 1)), "dilation": (1, 2)},
    "cropped": {"strides": (2, 1), "padding": ((-1, 0), (2, -2)), "dilation": (2, 1)},
}


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_windows_of_convolutions_reach_the_ends(geometry, groups, adds):
    noise = np.random.default_rng(groups)
    kernel = noise.integers(-128, 128, (3, 2, 6 // groups, 12), np.int8)
    constant = noise.integers(-500, 500, 12)
    window = GEOMETRIES[geometry] | {"feature_group_count": groups}
    accumulator = LayerSums(kernel, constant, adds, 8, window)
    images = accumulator.operands()["inputs"].astype(np.int64)
    product = distances if adds else np.matmul
    sums = constant + convolution(images, kernel.astype(np.int64), product, **window)
    weights = kernel.astype(np.int64)
    least = -np.maximum(weights + 128, 127 - weights) if adds else np.minimum(127 * weights, -128 * weights)
    greatest = np.zeros_like(weights) if adds else np.maximum(127 * weights, -128 * weights)
    least, greatest = (constant + terms.sum(axis=(0, 1, 2)) for terms in (least, greatest))
    assert accumulator.ends() == (least.min(), greatest.max())
    # Each group of outputs reaches its own ends.
    least, greatest = least.reshape(groups, -1).min(axis=1), greatest.reshape(groups, -1).max(axis=1)
    first, second = (image.reshape(-1, groups, 12 // groups) for image in sums)
    np.testing.assert_array_equal(first.min(axis=(0, 2)), least)
    np.testing.assert_array_equal(second.max(axis=(0, 2)), greatest)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("adds", [False, True])
def test_scores_reach_their_ends(adds, bits):
    accumulator = Scores(5, adds, bits)
    operands = accumulator.operands()
    query, key = (operands[part][0, :, 0].astype(np.int64) for part in ("queries", "keys"))
    scores = (distances if adds else np.matmul)(query, key.T)
    assert sorted(scores[0].tolist()) == list(accumulator.ends())
    extremes = [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1]
    terms = [-abs(q - k) if adds else q * k for q in extremes for k in extremes]
    assert accumulator.ends() == (5 * min(terms), 5 * max(terms))


@pytest.mark.parametrize("centered", [False, True])
def test_vectors_are_the_sums_of_the_layer(centered):
    dense, conv = layers(centered)
    for model, shape in ((dense, (4, 3)), (conv, (2, 5, 5, 6))):
        images = jax.random.normal(jax.random.key(0), shape)
        integers = quantize(model, model.init(jax.random.key(1), images), images)
        ((name, operation),) = integers.operations.items()
        found, templates = accumulators.vectors(integers), integers.templates()[name].astype(np.int64)
        inputs, sums = (found[f"{PREFIX}{name}/{part}"] for part in ("inputs", "sums"))
        if operation.kind == "dense":
            expected = dense_sums(inputs, templates)
        else:
            expected = convolution(inputs.astype(np.int64), templates, distances, **operation.geometry)
        np.testing.assert_array_equal(sums, expected)
        whole = sums + integers.constants().get(name, 0)
        (accumulator,) = accumulators.accumulators(integers).values()
        assert (whole.min(), whole.max()) == accumulator.ends()


@pytest.mark.parametrize("fields", [{}, {"arithmetic": "vit", "stem": "conv"}])
def test_a_bit_less_changes_what_is_recorded_of_every_operation(fields):
    """Accumulators that wrap, as those of a circuit, at the width that is told and at one bit less."""
    model, variables, images = model_of(**(SMALL | fields))
    info = load_dataset(DataConfig(name="digits")).info
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8)
    integers = quantize(model, variables, images)
    whole = integer_only_model(integers, pixels, info)
    recorded = accumulators.integer_only_vectors(whole)
    entries = whole.described["layers"] | whole.described["attentions"]
    assert integer_only_accumulators(whole.described, whole.arrays).keys() == entries.keys()
    for name, entry in entries.items():
        part = "sums" if name in whole.described["layers"] else "scores"
        sums = np.int64(recorded[f"{PREFIX}{name}/{part}"])
        for bits, holds in ((entry["accumulator_bits"], True), (entry["accumulator_bits"] - 1, False)):
            half = 1 << (bits - 1)
            assert np.array_equal((sums + half) % (2 * half) - half, sums) == holds, name
        assert (sums.min(), sums.max()) == (entry["accumulator_lowest"], entry["accumulator_highest"])
    for name, accumulator in accumulators.accumulators(integers).items():
        # The constant of a centered layer is part of both.
        assert told(accumulator)["accumulator_bits"] == entries[name]["accumulator_bits"], name
