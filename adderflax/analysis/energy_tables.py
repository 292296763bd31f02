"""Energies of operations, by number format.

Tables whose names end in `_7nm` have the figures of Jouppi et al., "Ten lessons from three
generations shaped Google's TPUv4i", ISCA 2021, table 2; the others those of Horowitz, "Computing's
energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9: 45 nm, 0.9 V, which
published comparisons of adder networks use. In picojoules:

| | int8 | int32 | bf16 | fp16 | fp32 |
|---|---|---|---|---|---|
| add, 45 nm | 0.03 | 0.1 | as fp16 | 0.4 | 0.9 |
| multiply, 45 nm | 0.2 | 3.1 | as fp16 | 1.1 | 3.7 |
| add, 7 nm | 0.007 | 0.03 | 0.11 | 0.16 | 0.38 |
| multiply, 7 nm | 0.07 | 1.48 | 0.21 | 0.34 | 1.31 |

| memory, 64 bits at a time | 8 KB | 32 KB | 1 MB | DRAM | HBM2 |
|---|---|---|---|---|---|
| 45 nm | 10 | 20 | 100 | 1300 to 2600 | - |
| 7 nm | 7.5 | 8.5 | 14 | 1300 | 250 to 450 |

The lower figure of a range is used.

What the sources have no figure for is modeled. Whole numbers of other widths, which only a model without
floats has: an addition's energy grows by the same amount with every bit from 8 on, through both figures, and
is in proportion to its bits below; a multiplication's grows as a power of the product of its factors' bits,
through both figures (at 45 nm the power is 0.99). The others matter in the convention "full" only:

* a comparison, a rounding, a shift and a bit operation cost an addition, a bit operation an integer one;
* the sign bit of a floating-point number is cleared or flipped for nothing, |.| and negation of
  an integer cost an addition;
* a division, a square root and the special functions are evaluated in software, with as many
  multiplications and additions as `SOFTWARE` says.
"""

import dataclasses
import math
from collections.abc import Mapping

from adderflax.analysis.ledger import widths
from adderflax.analysis.primitives import ADDER, PRODUCT


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """Energies of one operation in one number format.

    Attributes:
        add: picojoules of an addition or subtraction.
        multiply: picojoules of a multiplication.
        sign: picojoules of |.| or a negation.
        bytes: bytes of one number; fractions of one where numbers are packed.
    """

    add: float
    multiply: float
    sign: float
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Technology:
    """What a source says: its name, number formats, and picojoules of moving 64 bits."""

    source: str
    formats: Mapping[str, NumberFormat]
    memory_64: Mapping[str, float]


_45NM = _Technology(
    source="Horowitz, ISSCC 2014, 45 nm, bfloat16 as fp16",
    formats={
        "int8": NumberFormat(add=0.03, multiply=0.2, sign=0.03, bytes=1),
        "int32": NumberFormat(add=0.1, multiply=3.1, sign=0.1, bytes=4),
        "float16": NumberFormat(add=0.4, multiply=1.1, sign=0.0, bytes=2),
        "bfloat16": NumberFormat(add=0.4, multiply=1.1, sign=0.0, bytes=2),
        "float32": NumberFormat(add=0.9, multiply=3.7, sign=0.0, bytes=4),
    },
    memory_64={"none": 0.0, "sram_8kb": 10.0, "sram_32kb": 20.0, "sram_1mb": 100.0, "dram": 1300.0},
)
_7NM = _Technology(
    source="Jouppi et al., ISCA 2021, 7 nm",
    formats={
        "int8": NumberFormat(add=0.007, multiply=0.07, sign=0.007, bytes=1),
        "int32": NumberFormat(add=0.03, multiply=1.48, sign=0.03, bytes=4),
        "float16": NumberFormat(add=0.16, multiply=0.34, sign=0.0, bytes=2),
        "bfloat16": NumberFormat(add=0.11, multiply=0.21, sign=0.0, bytes=2),
        "float32": NumberFormat(add=0.38, multiply=1.31, sign=0.0, bytes=4),
    },
    memory_64={
        "none": 0.0,
        "sram_8kb": 7.5,
        "sram_32kb": 8.5,
        "sram_1mb": 14.0,
        "dram": 1300.0,
        "hbm2": 250.0,
    },
)

# (multiplications, additions). A division: an 8-bit estimate of the reciprocal, two Newton steps
# x + x (1 - d x), the product and one correction of it. A square root: an 8-bit estimate of its
# reciprocal, two Newton steps y (1.5 - x/2 y y), and the product with x. The exponential, the
# logarithm, sine and cosine: range reduction and polynomial of the single-precision Cephes
# library. tanh = 1 - 2 / (exp(2 x) + 1), logistic = 1 / (1 + exp(-x)), power = exp(y log x), and
# erf by Abramowitz and Stegun 7.1.26, each with those parts.
SOFTWARE: Mapping[str, tuple[int, int]] = {
    "divide": (7, 6),
    "square_root": (8, 2),
    "exponential": (10, 12),
    "logarithm": (14, 14),
    "sine": (9, 7),
    "cosine": (9, 7),
    "tanh": (18, 20),
    "logistic": (17, 19),
    "power": (25, 26),
    "erf": (25, 24),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyTable:
    """Unit energies, and the number formats that a program is priced in.

    Attributes:
        name: how the table is called.
        source: where the figures come from, and what is assumed.
        formats: number formats by dtype.
        products: format of all floating-point numbers in matrix products, convolutions and
            adder operators; None prices each as it was traced.
        sums: format in which those accumulate, and write their results; None means the same one.
        elsewhere: format of all other floating-point arithmetic, likewise.
        memory: picojoules of moving a byte, by level of memory.
        adders: formats of the numbers and of the sums of adder operators, and of products that stand in
            their place in a twin (`Entry.priced_as`); None means those of all products.
        by_bits: whether it prices whole numbers of any width (`adderflax.analysis.ledger.width_name`), by
            its formats int8 and int32, and nothing else.
    """

    name: str
    source: str
    formats: Mapping[str, NumberFormat]
    products: str | None
    sums: str | None
    elsewhere: str | None
    memory: Mapping[str, float]
    adders: tuple[str, str] | None = None
    by_bits: bool = False

    def number_format(self, dtype: str, kind: str, *, sums: bool = False) -> NumberFormat:
        """The format in which numbers of a dtype are priced.

        Args:
            dtype: as traced.
            kind: kind of the operator, as in `Entry`.
            sums: whether it is for the sums of a product or adder operator.

        Raises:
            ValueError: the table has no figures for it.
        """
        bits = widths(dtype)
        if bool(bits) != self.by_bits:
            takes = "the bits of whole numbers" if self.by_bits else "dtypes"
            fitting = "integer_only" if bits else "fp32"
            raise ValueError(
                f"The energy table {self.name!r} prices operations by {takes}, and the ledger has some of"
                f" {dtype}. Take a table that does, such as {fitting!r}."
            )
        if bits:
            return _between(*(self._format(name) for name in ("int8", "int32")), bits)
        if "float" in dtype:
            if kind == ADDER and self.adders is not None:
                assumed = self.adders[sums]
            elif sums and self.sums is not None:
                assumed = self.sums
            else:
                assumed = self.products if kind in (PRODUCT, ADDER) else self.elsewhere
            name = assumed or dtype
        else:
            name = "int8" if dtype.removeprefix("u") in ("int8", "int4", "int2") else "int32"
        return self._format(name)

    def _format(self, name: str) -> NumberFormat:
        if name not in self.formats:
            raise ValueError(
                f"The energy table {self.name!r} has no figures for {name}, only for "
                f"{', '.join(self.formats)}. Take a table that prices everything in one format, "
                f"such as 'fp32', or an EnergyTable of your own with {name} among its formats."
            )
        return self.formats[name]


def _between(narrow: NumberFormat, wide: NumberFormat, bits: tuple[int, ...]) -> NumberFormat:
    """The format of whole numbers of so many bits, or of two factors, from those of 8 and of 32."""
    product = bits[0] * bits[-1]
    power = math.log(wide.multiply / narrow.multiply) / math.log(32 * 32 / (8 * 8))

    def linear(low: float, high: float) -> float:
        if max(bits) < 8:
            return low * max(bits) / 8
        return low + (high - low) * (max(bits) - 8) / (32 - 8)

    return NumberFormat(
        add=linear(narrow.add, wide.add),
        multiply=narrow.multiply * (product / (8 * 8)) ** power,
        sign=linear(narrow.sign, wide.sign),
        bytes=max(bits) / 8,
    )


def _tables(
    name: str,
    products: str | None,
    elsewhere: str | None,
    note: str,
    sums: str | None = None,
    adders: tuple[str, str] | None = None,
    formats: tuple[str, ...] = tuple(_45NM.formats),
    by_bits: bool = False,
) -> list[EnergyTable]:
    """The same assumptions priced in each technology."""
    return [
        EnergyTable(
            name=name + suffix,
            source=f"{technology.source}; {note}",
            formats={name: technology.formats[name] for name in formats},
            products=products,
            sums=sums,
            adders=adders,
            elsewhere=elsewhere,
            memory={level: value / 8 for level, value in technology.memory_64.items()},
            by_bits=by_bits,
        )
        for suffix, technology in (("", _45NM), ("_7nm", _7NM))
    ]


TABLES: Mapping[str, EnergyTable] = {
    table.name: table
    for table in (
        *_tables("fp32", "float32", "float32", "everything in fp32"),
        *_tables("fp16", "float16", "float16", "everything in fp16, sums included"),
        *_tables(
            "int8",
            "int8",
            "float32",
            "products and adder operators in int8 with sums in int8 too, as published "
            "comparisons have it, the rest in fp32",
        ),
        *_tables(
            "int8_int32",
            "int8",
            "float32",
            "products and adder operators in int8 with sums in int32, the rest in fp32",
            sums="int32",
        ),
        *_tables(
            "exported",
            "float32",
            "float32",
            "what python -m adderflax.export writes without --integer_only: adder operators but for A V, "
            "and the products in their place in the twin, in int8 with sums in int32, all else in fp32; "
            "rounding to int8 is not counted",
            adders=("int8", "int32"),
        ),
        *_tables(
            "traced",
            None,
            None,
            "each number in the format in which the program has it; products and adder operators sum in fp32",
        ),
        *_tables(
            "integer_only",
            None,
            None,
            "what python -m adderflax.export --integer_only writes: whole numbers, each with its own bits",
            formats=("int8", "int32"),
            by_bits=True,
        ),
    )
}
