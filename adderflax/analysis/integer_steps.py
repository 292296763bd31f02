"""Operations of what integer_only.md does between sums, by the ranges of what goes in.

Each function counts n values, or rows of so many keys or features: names of operations, the bits of their
operands or of an addition's result, and how many. `adderflax.analysis.integer_ledger` says what counts.
"""

import numpy as np

from adderflax.analysis.integer_only_reference import ATTENDED, LARGEST, ONE, ROOT, SHARE, SOFTMAX, WIDE
from adderflax.analysis.ranges import Range

Operations = list[tuple[str, int | tuple[int, int], int]]

EXPONENTIAL = Range(0, 1 << ONE)
SHARES = Range(1 << SHARE, 1 << SHARE + 1)
# Divided by the root of their sum of squares values are at most 1, but the root, 2^15 or more, is rounded.
NORMALIZED = Range(-(1 << ROOT) - 2, (1 << ROOT) + 2)

_ROOT_BITS = 16  # of an integer square root, the first of them set
_RECIPROCAL = Range(1 << _ROOT_BITS - 1, 1 << _ROOT_BITS)  # 2^31 / root


def rescaled(x: Range, places: int, bits: int, n: int) -> Operations:
    """x / 2^places in so many bits."""
    found = x.shifted(places)
    return [
        ("add", x.with_half(places).width, n * (places > 0)),
        ("compare", found.width, n * found.beyond(bits)),
    ]


def exponentials(scores: Range, multiplier: int, shift: int, rows: int, keys: int) -> Operations:
    """2 to the power of how far scores lie below their row's largest."""
    fall, n = Range(0, scores.high - scores.low), rows * keys
    product = fall.times(multiplier)
    halvings = product.shifted(shift).high >> SOFTMAX
    return [
        ("compare", scores.width, rows * (keys - 1)),
        ("add", fall.width, n),
        ("multiply", (fall.width, multiplier.bit_length()), n),
        ("add", product.with_half(shift).width, n * (shift > 0)),
        ("compare", halvings.bit_length(), n * (halvings > ONE + 1)),
        ("shift", EXPONENTIAL.width, n * (halvings > 0)),
    ]


def shares(rows: int, keys: int) -> Operations:
    """Reciprocals of the rows' sums of exponentials."""
    total = _total_bits(keys)
    # What is divided is 2^(SHARE + bits of the sum).
    return [
        ("add", total, rows * (keys - 1)),
        ("shift", total, rows),
        ("divide", SHARE + total + 1, rows),
    ]


def averages(values: Range, identity: bool, keys: int, n: int) -> tuple[Range, Range, Operations]:
    """Values of so many keys, weighted: their sums with exponentials, what is made of these, and by what."""
    sums = values.times(EXPONENTIAL.high * keys).with_half(_total_bits(keys) - ATTENDED)
    # A row's exponentials have fewer than 2^p for their sum: shifted by p - 8 places their products do not
    # exceed the values, and with the share, rounded down, they do so by what rounding before it added.
    attended = values.times(1 << ATTENDED)
    product = attended.times(1 << SHARE).plus(-(1 << SHARE), 1 << SHARE)
    heads = product.shifted(SHARE)
    operations = [
        ("add", sums.width, n),
        ("shift", sums.width, n),
        ("multiply", (attended.width, SHARES.width), n),
        ("add", product.with_half(SHARE).width, n),
    ]
    if identity:
        heads = heads.plus(*attended)
        operations.append(("add", heads.width, n))
    return values.times(EXPONENTIAL.high * keys), heads, operations


def weights(exponent: int, identity: bool, rows: int, keys: int) -> tuple[Range, Operations]:
    """The weights of an aggregation that adds, in units of 2^exponent, and what they take."""
    largest = Range(0, 1).shifted(exponent).times(1 + identity)
    places = SHARE + _total_bits(keys) + exponent
    product = Range(0, EXPONENTIAL.high * SHARES.high).with_half(places).width
    return largest, [
        ("multiply", (EXPONENTIAL.width, SHARES.width), rows * keys),
        ("add", product, rows * keys * (places > 0)),
        ("shift", product, rows * keys),
        ("add", largest.width, rows * identity),
    ]


def distances(values: Range, weight: Range, keys: int, n: int) -> tuple[Range, Range, Operations]:
    """An aggregation that adds: sums of -|weight - value|, what is made of these, and by what."""
    farthest = max(weight.high - values.low, values.high)
    # |v| - |w - v| is between -w and w. A row's weights have for their sum that of one which is alone, but
    # for rounding each.
    most = weight.high + keys
    heads = Range(-most, most)
    operations = [
        ("absolute", values.width, n),
        ("add", Range(0, -keys * values.low).width, n),
        ("add", heads.width, n),
    ]
    return Range(-keys * farthest, 0), heads, operations


def normalization(
    x: Range, gain: np.ndarray, offset: np.ndarray, shift: int, epsilon: int, rows: int
) -> Operations:
    """A LayerNorm of rows of as many features as there are gains, which gives `WIDE` bits."""
    features = gain.size
    n, others = rows * features, rows * (features - 1)
    most = (features - 1) * (x.high - x.low)
    centered, surplus = Range(-most, most), max(most.bit_length() - LARGEST, 0)
    largest = min(most, 1 << LARGEST)
    row = Range(-largest, largest)
    squares = (features * largest**2 + epsilon).bit_length()
    divided = row.times(_RECIPROCAL.high).with_half(31 - ROOT - (32 - squares) // 2)
    scaled = [NORMALIZED.times(abs(int(g))) for g in gain]
    ends = [end + int(o) for each, o in zip(scaled, offset) for end in each.shifted(shift)]
    result = Range(min(ends), max(ends))
    operations = [
        ("multiply", (x.width, features.bit_length()), n * (features.bit_count() > 1)),
        ("add", x.times(features).width, others),
        ("add", centered.width, n),
    ]
    if surplus:
        rounded = centered.with_half(surplus).width
        operations += [
            ("absolute", centered.width, n),
            ("compare", most.bit_length(), others),
            ("shift", most.bit_length(), rows),  # its bits
            ("add", rounded, n),
            ("shift", rounded, n),
            ("shift", epsilon.bit_length(), rows * (epsilon > 0)),
        ]
    return operations + [
        ("multiply", (row.width, row.width), n),
        ("add", squares, others + rows * (epsilon > 0)),
        ("compare", squares, rows),
        ("shift", squares, 2 * rows),  # their bits, and the radicand
        ("square_root", 2 * _ROOT_BITS, rows),
        ("divide", 2 * _ROOT_BITS, rows),
        ("multiply", (row.width, _RECIPROCAL.width), n),
        ("add", divided.width, n),
        ("shift", divided.width, n),
        ("multiply", (NORMALIZED.width, WIDE), n),
        ("add", max(each.with_half(shift).width for each in scaled), n * (shift > 0)),
        ("add", result.width, n),
        ("compare", result.width, n * result.beyond(WIDE)),
    ]


def mean(x: Range, tokens: int, features: int) -> Operations:
    """Means over tokens."""
    total = x.times(tokens).plus(tokens // 2).width
    return [
        ("add", total, tokens * features),  # one of them of the half
        ("divide", total, features * (tokens.bit_count() > 1)),
    ]


def _total_bits(keys: int) -> int:
    """Of a row's sum of exponentials."""
    return EXPONENTIAL.times(keys).width
