"""Ranges of whole numbers, and the bits that they need."""

from typing import NamedTuple


class Range(NamedTuple):
    """Whole numbers from one end to the other.

    Attributes:
      low: the least.
      high: the greatest.
    """

    low: int
    high: int

    @classmethod
    def of(cls, bits: int) -> "Range":
        """What a two's complement of so many bits holds."""
        return cls(-(1 << bits - 1), (1 << bits - 1) - 1)

    @property
    def bits(self) -> int:
        """Bits of a two's complement that holds both ends."""
        return max((~end if end < 0 else end).bit_length() for end in self) + 1

    @property
    def width(self) -> int:
        """`bits`, without the one for the sign where nothing is negative."""
        return self.bits - (self.low >= 0)

    def times(self, factor: int) -> "Range":
        """Of products with a factor of at least 0, or of sums of so many."""
        return Range(factor * self.low, factor * self.high)

    def plus(self, low: int, high: int | None = None) -> "Range":
        """Of sums with a number, or with the numbers of a range."""
        return Range(self.low + low, self.high + (low if high is None else high))

    def with_half(self, places: int) -> "Range":
        """Of what a shift by so many places to the right, which rounds, takes."""
        return self.plus(1 << places >> 1) if places > 0 else self

    def shifted(self, places: int) -> "Range":
        """Of what that shift gives; to the left where places are negative."""
        if places <= 0:
            return self.times(1 << -places)
        return Range(*(end >> places for end in self.with_half(places)))

    def beyond(self, bits: int) -> int:
        """How many limits of a two's complement of so many bits are exceeded: 0, 1 or 2."""
        held = Range.of(bits)
        return (self.low < held.low) + (self.high > held.high)
