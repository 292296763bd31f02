"""Ranges of whole numbers against all the numbers in them."""

import itertools

import numpy as np
import pytest

from adderflax.analysis.integer_only_reference import clipped, shifted
from adderflax.analysis.ranges import Range

ENDS = [*itertools.combinations_with_replacement((-33, -32, -17, -16, -1, 0, 1, 2, 15, 16, 31, 32), 2)]


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_a_range_is_that_of_its_numbers(ends):
    each, numbers = Range(*ends), np.arange(ends[0], ends[1] + 1)
    for places in (-3, -1, 0, 1, 2, 5, 9):
        found = shifted(numbers, places)
        assert each.shifted(places) == (found.min(), found.max())
        half = 1 << places >> 1 if places > 0 else 0
        assert each.with_half(places) == (ends[0] + half, ends[1] + half)
    for other in ENDS:
        sums = np.add.outer(numbers, np.arange(other[0], other[1] + 1))
        assert each.plus(*other) == (sums.min(), sums.max())
    assert each.plus(7) == (ends[0] + 7, ends[1] + 7) and each.times(3) == (3 * ends[0], 3 * ends[1])
    for bits in (1, 2, 5, 6):
        held = clipped(numbers, bits)
        assert each.beyond(bits) == int((held > numbers).any()) + int((held < numbers).any())
        assert (each.bits <= bits) == (each.beyond(bits) == 0)
    if ends[0] < 0:
        assert each.width == each.bits
    else:
        assert each.width == each.bits - 1 == len(f"{ends[1]:b}") * (ends[1] > 0)


def test_numbers_that_numpy_cannot_hold():
    assert Range(-(1 << 70), 1 << 69).width == 71 and Range(0, 1 << 80).shifted(79) == (0, 2)
    assert Range.of(8) == (-128, 127) and Range.of(1) == (-1, 0)
