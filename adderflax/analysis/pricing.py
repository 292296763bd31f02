"""The energy of a ledger, in the two conventions."""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Mapping

from adderflax.analysis.energy_tables import SOFTWARE, TABLES, EnergyTable, NumberFormat
from adderflax.analysis.ledger import Entry, Ledger, item_size
from adderflax.analysis.primitives import ADDER, ELEMENTWISE, MOVEMENT, PRODUCT

CONVENTIONS = ("paper", "full")
MEMORY_DEFAULT = "sram_1mb"
_MILLIJOULE = 1e-9  # of a picojoule


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


def _bytes(entry: Entry, table: EnergyTable) -> float:
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
