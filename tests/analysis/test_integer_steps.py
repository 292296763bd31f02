"""Bits of the steps between sums: enough for what the page's formulas give, and no more than inputs take."""

import numpy as np
import pytest

from adderflax.analysis import integer_steps
from adderflax.analysis.integer_only_reference import (
    ATTENDED,
    LARGEST,
    ONE,
    SHARE,
    SOFTMAX,
    WIDE,
    bit_length,
    shifted,
    square_root,
)
from adderflax.analysis.ranges import Range

NOISE = np.random.default_rng(0)


def widths(operations, name):
    """The bits of each such operation that counts."""
    return [width for operation, width, n in operations if operation == name and n]


def bits(*values):
    low, high = (int(end(values)) for end in (np.min, np.max))
    return high.bit_length() if low >= 0 else max(high, ~low).bit_length() + 1


@pytest.mark.parametrize("ends", [(-2032, 0), (-130048, 131072), (-1, 0), (-8160, 0)])
@pytest.mark.parametrize(
    ("multiplier", "shift"), [(16384, 12), (32767, 9), (20011, 25), (17000, 0), (20011, -2)]
)
def test_exponentials_at_the_two_ends(ends, multiplier, shift):
    found = integer_steps.exponentials(Range(*ends), multiplier, shift, 3, 5)
    fall = ends[1] - ends[0]  # of a row with both
    product, half = fall * multiplier, 1 << shift >> 1 if shift > 0 else 0
    halvings = int(shifted(np.int64(product), shift)) >> SOFTMAX
    expected = [("compare", bits(*ends), 12), ("add", bits(fall), 15), ("multiply", (bits(fall), 15), 15)]
    expected += [("add", bits(product + half), 15)] * (shift > 0)
    expected += [("compare", bits(halvings), 15)] * (halvings > ONE + 1)
    expected += [("shift", 16, 15)] * (halvings > 0)
    assert [each for each in found if each[2]] == expected


@pytest.mark.parametrize("keys", [1, 2, 5, 16, 64, 65, 197])
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("value_bits", [4, 8])
def test_averages_hold_what_any_row_gives(keys, identity, value_bits):
    values, features = Range.of(value_bits), 7
    sums, heads, operations = integer_steps.averages(values, identity, keys, features)
    assert all(n == features for *_, n in operations)
    # Rows whose values are all the same are the farthest.
    total = NOISE.integers(1 << ONE, (keys << ONE) + 1, 200_000)
    total[:2] = 1 << ONE, keys << ONE
    places = bit_length(total)
    share = (1 << SHARE + places) // total
    most = {}
    for value in values:
        sum_ = total * value
        rounded = shifted(sum_, places - ATTENDED)
        product = rounded * share
        attended = shifted(product, SHARE) + (value << ATTENDED) * identity
        with_halves = sum_ + (1 << places - ATTENDED >> 1), product + (1 << SHARE >> 1)
        for name, found in zip(
            ("sums", "with half", "rounded", "product", "attended"),
            (sum_, with_halves[0], rounded, with_halves[1], attended),
        ):
            low, high = most.get(name, (0, 0))
            most[name] = Range(min(low, int(found.min())), max(high, int(found.max())))
    assert sums == most["sums"] and heads.low <= most["attended"].low and heads.high >= most["attended"].high
    few = keys < 5  # which never take a row below the least value
    assert heads.width - few <= most["attended"].width <= heads.width
    adds = widths(operations, "add")
    assert adds[0] == most["with half"].width and adds[2:] == [heads.width] * identity
    assert adds[1] - few <= most["product"].width <= adds[1]
    assert widths(operations, "shift") == [adds[0]]
    ((rounded, of_share),) = widths(operations, "multiply")
    assert of_share == 17 and rounded - few <= most["rounded"].width <= rounded


@pytest.mark.parametrize("keys", [1, 2, 5, 16, 65])
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("exponent", [-12, -3, 0])
def test_aggregations_that_add_hold_what_any_row_gives(keys, identity, exponent):
    values = Range.of(WIDE)
    weight, operations = integer_steps.weights(exponent, identity, 3, keys)
    sums, heads, made = integer_steps.distances(values, weight, keys, 7)
    rows = np.minimum(NOISE.integers(0, (1 << ONE) + 1, (20_000, keys)), 1 << ONE)
    rows[:, 0] = 1 << ONE  # the largest score
    rows[0], rows[1, 1:] = 1 << ONE, 0
    total = rows.sum(axis=1, keepdims=True)
    places = bit_length(total)
    share = (1 << SHARE + places) // total
    shift = SHARE + places + exponent
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift, 1) - 1, 0)
    one = 1 << -exponent
    found = shifted(rows * share, shift) + one * identity * (np.arange(keys) == 0)
    assert found.max() <= weight.high == one * (1 + identity)
    assert bits(found.max()) == weight.width or keys > 1  # a key that is alone has all of it
    expected = [(16, 17)], [bits((rows * share + half).max())]
    assert (widths(operations, "multiply"), widths(operations, "shift")) == expected
    assert widths(operations, "add") == expected[1] + [weight.width] * identity
    for value in (values.low, -1, 0, 1, values.high, *NOISE.integers(*values, 20)):
        distances = np.abs(found - value)
        gained = (abs(value) - distances).sum(axis=1)
        assert heads.low <= gained.min() and gained.max() <= heads.high
        assert sums.low <= -distances.sum(axis=1).max() and sums.high == 0
    # All keys with the greatest weight and the least value.
    assert sums.low == -keys * (weight.high - values.low)
    assert widths(made, "absolute") == [16] and widths(made, "add") == [bits(keys << 15), heads.width]
    assert bits(int(gained.max())) <= heads.width


def normalized(x, gain, offset, shift, epsilon):
    """What each step of the page gives."""
    n = x.shape[-1]
    c = n * x - x.sum(axis=-1, keepdims=True)
    surplus = np.maximum(bit_length(np.abs(c).max(axis=-1, keepdims=True)) - LARGEST, 0)
    rounded = c + (np.int64(1) << surplus >> 1)
    d = rounded >> surplus
    squares = (d * d).sum(axis=-1, keepdims=True) + (np.int64(epsilon) >> 2 * surplus)
    places = (32 - bit_length(np.maximum(squares, 1))) >> 1
    radicand = (np.maximum(squares, 1) << np.maximum(2 * places, 0)) >> np.maximum(-2 * places, 0)
    divided = d * ((1 << 31) // square_root(radicand)) + (np.int64(1) << 15 - places >> 1)
    e = divided >> 15 - places
    scaled = e * gain + (1 << shift >> 1 if shift > 0 else 0)
    return {
        "sum": n * x,
        "centered": c,
        "rounded": rounded,
        "row": d,
        "squares": squares,
        "divided": divided,
        "normalized": e,
        "scaled": scaled,
        "result": shifted(e * gain, shift) + offset,
    }


@pytest.mark.parametrize("features", [1, 2, 3, 16, 17, 64, 257])
@pytest.mark.parametrize("ends", [(-32768, 32767), (-255 * 40, 0), (-3, 4)])
@pytest.mark.parametrize(("gain", "shift", "epsilon"), [(30000, 14, 5), (-3000, 3, 0), (100, 0, 1 << 20)])
def test_normalizations_hold_what_any_row_gives(features, ends, gain, shift, epsilon):
    low, high = ends
    rows = NOISE.integers(low, high + 1, (300, features))
    rows[:60] = np.where(NOISE.random((60, features)) < 0.5, low, high)
    rows[60:90] = low
    rows[60:90, 0] = np.linspace(low, high, 30).astype(int)
    rows[90:120] = np.where(np.arange(features) % 2, low, high)
    rows[120:150] = high
    rows[120:150, -1] = np.linspace(low, high, 30).astype(int)
    # Distances from the mean, times the features, that are just below a power of two.
    even = features + features % 2
    apart = [(2 * 2**k - 1) // even for k in range(14, 26) if 2 * 2**k <= even * (high - low)]
    for row, difference in zip(rows[150:], apart):
        row[:] = low + difference * (np.arange(features) % 2)
    gains, offsets = np.full(features, gain), np.full(features, 9)
    found = normalized(rows, gains, offsets, shift, epsilon)
    operations = integer_steps.normalization(Range(*ends), gains, offsets, shift, epsilon, 300)
    have = {name: bits(values.min(), values.max()) for name, values in found.items()}
    adds, n, others = widths(operations, "add"), 300 * features, 300 * (features - 1)
    coarser = have["centered"] > LARGEST + 1
    steps = ["sum"] * (others > 0) + ["centered"] + ["rounded"] * coarser
    steps += ["squares"] * (others > 0 or epsilon > 0) + ["divided"] + ["scaled"] * (shift > 0) + ["result"]
    assert len(adds) == len(steps)
    for width, step in zip(adds, steps):
        assert have[step] <= width, step
        if features > 2 and ends != (-3, 4):
            # Ranges know nothing of how numbers depend on each other.
            assert width <= have[step] + (step in ("squares", "divided", "scaled", "result")), step
    low, high = integer_steps.NORMALIZED
    assert low <= found["normalized"].min() and found["normalized"].max() <= high
    products = widths(operations, "multiply")
    assert products[-1][0] >= have["normalized"] and products[-1][1] == 16
    assert products[-2][0] == products[-3][0] >= have["row"] and products[-2][1] == 17
    assert (len(products) == 4) == (features in (3, 17, 257))
    result = found["result"]
    met = int(result.min() < -(1 << 15)) + int(result.max() >= 1 << 15)
    compared = operations[-1][2] // n
    assert operations[-1][0] == "compare" and (met == compared or features < 3)
    if abs(gain) << 16 < 32000 << shift:
        assert compared == 0


def test_clipping_is_counted_where_it_can_happen():
    assert integer_steps.rescaled(Range(-300, 0), 1, 8, 5) == [("add", 10, 5), ("compare", 9, 5)]
    assert integer_steps.rescaled(Range(-300, 300), 1, 8, 5) == [("add", 10, 5), ("compare", 9, 10)]
    assert integer_steps.rescaled(Range(-256, 254), 1, 8, 5)[1][2] == 0
    assert integer_steps.rescaled(Range(-3, 3), -6, 8, 5) == [("add", 3, 0), ("compare", 9, 10)]


def test_means_over_tokens():
    assert integer_steps.mean(Range.of(16), 16, 3) == [("add", 20, 48), ("divide", 20, 0)]
    assert integer_steps.mean(Range.of(16), 9, 3) == [("add", 20, 27), ("divide", 20, 3)]
    # All tokens the greatest, and 32 for the half.
    assert integer_steps.mean(Range.of(16), 65, 1)[0] == ("add", bits(-65 << 15, 65 * 32767 + 32), 65)
