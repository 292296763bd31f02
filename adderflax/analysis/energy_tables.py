"""Energies of operations, and the two conventions by which a ledger is priced.

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

What the sources have no figure for is modeled, and matters in the convention "full" only:

* a comparison, a rounding and a bit operation cost an addition, a bit operation an integer one;
* the sign bit of a floating-point number is cleared or flipped for nothing, |.| and negation of
  an integer cost an addition;
* a division, a square root and the special functions are evaluated in software, with as many
  multiplications and additions as `SOFTWARE` says.
"""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Mapping

from adderflax.analysis.ledger import Entry, Ledger, item_size
from adderflax.analysis.primitives import ADDER, ELEMENTWISE, MOVEMENT, PRODUCT

CONVENTIONS = ("paper", "full")
MEMORY_DEFAULT = "sram_1mb"
_MILLIJOULE = 1e-9  # of a picojoule


@dataclasses.dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """Energies of one operation in one number format.

    Attributes:
        add: picojoules of an addition or subtraction.
        multiply: picojoules of a multiplication.
        sign: picojoules of |.| or a negation.
        bytes: bytes of one number.
    """

    add: float
    multiply: float
    sign: float
    bytes: int


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
    """

    name: str
    source: str
    formats: Mapping[str, NumberFormat]
    products: str | None
    sums: str | None
    elsewhere: str | None
    memory: Mapping[str, float]
    adders: tuple[str, str] | None = None

    def number_format(self, dtype: str, kind: str, *, sums: bool = False) -> NumberFormat:
        """The format in which numbers of a dtype are priced.

        Args:
            dtype: as traced.
            kind: kind of the operator, as in `Entry`.
            sums: whether it is for the sums of a product or adder operator.

        Raises:
            ValueError: the table has no figures for it.
        """
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
        if name not in self.formats:
            raise ValueError(
                f"The energy table {self.name!r} has no figures for {name}, only for "
                f"{', '.join(self.formats)}. Take a table that prices everything in one format, "
                f"such as 'fp32', or an EnergyTable of your own with {name} among its formats."
            )
        return self.formats[name]


def _tables(name: str, products: str | None, elsewhere: str | None, note: str, sums=None, adders=None):
    """The same assumptions priced in each technology."""
    return [
        EnergyTable(
            name=name + suffix,
            source=f"{technology.source}; {note}",
            formats=technology.formats,
            products=products,
            sums=sums,
            adders=adders,
            elsewhere=elsewhere,
            memory={level: value / 8 for level, value in technology.memory_64.items()},
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
    )
}


@dataclasses.dataclass(frozen=True)
class Energy:
    """The energy of a ledger.

    Attributes:
        operations: millijoules by operation; in products and adder operators the names are
            "product" and "adder".
        memory: millijoules of memory traffic.
    """

    operations: Mapping[str, float]
    memory: float

    @property
    def arithmetic(self) -> float:
        """Millijoules of all operations."""
        return sum(self.operations.values())

    @property
    def total(self) -> float:
        """Millijoules of operations and memory."""
        return self.arithmetic + self.memory


def energy(
    ledger: Ledger,
    convention: str = "paper",
    table: EnergyTable | str = "fp32",
    memory: str = MEMORY_DEFAULT,
) -> Energy:
    """The energy of a program.

    Args:
        ledger: its operations.
        convention: "paper" prices the additions and multiplications of matrix products,
            convolutions and adder operators, and nothing else: a multiply-accumulate is one
            multiplication and one addition, an |x - w| term two additions, with |.| for
            nothing. "full" prices every operation and the memory traffic.
        table: the name of a table in `TABLES`, or your own.
        memory: the level of the table's memory that holds all arrays, or "none"; "paper" has no
            memory traffic.

    Returns:
        The energy in millijoules. A warning names what it leaves out.

    Raises:
        ValueError: an unknown convention, table or memory level, or a number format for which
            the table has no figures.
    """
    if names := sorted({found.primitive for found in (*ledger.unknown, *ledger.open_loops)}):
        warnings.warn(
            f"Energy does not cover all of this program: {', '.join(names)}. A primitive that is not known is"
            " left out, and a loop of unknown length is counted for one turn; `Ledger.unknown` and"
            " `Ledger.open_loops` say where.",
            stacklevel=2,
        )
    return priced(ledger, convention, table, memory)


def priced(
    ledger: Ledger,
    convention: str = "paper",
    table: EnergyTable | str = "fp32",
    memory: str = MEMORY_DEFAULT,
) -> Energy:
    """`energy`, with its arguments and errors, for a caller that tells itself what is left out."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is not known; {_choices(CONVENTIONS)}.")
    if isinstance(table, str):
        if table not in TABLES:
            raise ValueError(f"table={table!r} is not known; {_choices(TABLES)}.")
        table = TABLES[table]
    if memory not in table.memory:
        raise ValueError(
            f"memory={memory!r} is not known to the energy table {table.name!r}; {_choices(table.memory)}."
        )
    full = convention == "full"
    picojoules: Counter[str] = Counter()
    moved = 0
    for entry in ledger.entries:
        if entry.kind in (PRODUCT, ADDER):
            picojoules[entry.kind] += _product_energy(entry, table, full)
        elif entry.kind == ELEMENTWISE and full:
            for (operation, dtype), count in entry.operations.items():
                number = table.number_format(dtype, entry.kind)
                picojoules[operation] += count * _unit(operation, number, table)
        if full:
            moved += _bytes(entry, table)
    return Energy(
        {name: value * _MILLIJOULE for name, value in picojoules.items()},
        moved * table.memory[memory] * _MILLIJOULE,
    )


def _product_energy(entry: Entry, table: EnergyTable, full: bool) -> float:
    """Picojoules of a product or adder operator."""
    total, kind = 0.0, _priced_as(entry)
    for (operation, dtype), count in entry.operations.items():
        number = table.number_format(dtype, kind)
        if operation == "add":
            # One addition of each element goes into the sum.
            added = entry.elements if dtype == entry.sums else 0
            sums = table.number_format(dtype, kind, sums=True)
            total += added * sums.add + (count - added) * number.add
        elif operation == "multiply" or full:
            total += count * _unit(operation, number, table)
    return total


def _unit(operation: str, number: NumberFormat, table: EnergyTable) -> float:
    """Picojoules of one operation."""
    if operation in SOFTWARE:
        multiplications, additions = SOFTWARE[operation]
        return multiplications * number.multiply + additions * number.add
    if operation == "multiply":
        return number.multiply
    if operation in ("absolute", "negate"):
        return number.sign
    return table.formats["int32"].add if operation == "bitwise" else number.add


def _bytes(entry: Entry, table: EnergyTable) -> int:
    """Bytes that an operator moves in the formats in which it is priced.

    What moves between operators is kept in the format of the arithmetic around it, so with a
    table that has one format for all, conversions between floating-point formats move nothing.
    """
    if entry.operator == "convert_element_type" and table.elsewhere is not None:
        if all("float" in dtype for dtype in (*entry.read, *entry.written)):
            return 0
    total = 0
    for elements, written in ((entry.read, False), (entry.written, True)):
        for dtype, count in elements.items():
            if "float" in dtype:
                kind = ELEMENTWISE if entry.kind == MOVEMENT else _priced_as(entry)
                sums = written and kind in (PRODUCT, ADDER)
                total += count * table.number_format(dtype, kind, sums=sums).bytes
            else:
                total += count * item_size(dtype)
    return total


def _priced_as(entry: Entry) -> str:
    return entry.priced_as or entry.kind


def _choices(names) -> str:
    return f"choose one of {', '.join(map(repr, names))}"
