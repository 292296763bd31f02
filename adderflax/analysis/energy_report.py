"""A model's energy by part of the network, beside its multiplying twin."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from adderflax.analysis.energy_tables import SOFTWARE, EnergyTable
from adderflax.analysis.ledger import Entry, Ledger
from adderflax.analysis.pricing import CONVENTIONS, Energy, priced
from adderflax.analysis.primitives import ADDER, PRODUCT

SOFTMAX, NORMALIZATION, REST = "softmax, scale, identity", "normalization", "rest"
_AGGREGATION = "A V"
# Parts of a network by the last name of the module path, in the order in which they are shown.
_PARTS = {
    "patch_embedding": "patch embedding",
    "query": "q, k, v projections",
    "key": "q, k, v projections",
    "value": "q, k, v projections",
    "out": "output projection",
    "fc1": "fc1, fc2",
    "fc2": "fc1, fc2",
    "conv": "MLP convolution",
    "head": "head",
}
_ORDER = (
    "patch embedding",
    "q, k, v projections",
    "scores",
    _AGGREGATION,
    "output projection",
    "fc1, fc2",
    "MLP convolution",
    "head",
    SOFTMAX,
    NORMALIZATION,
    "GELU",
    REST,
)
_SPECIAL = ("divide", *(name for name in SOFTWARE if name != "divide"))


@dataclasses.dataclass(frozen=True)
class Part:
    """The energy of a part of the network.

    Attributes:
        name: what it is called.
        model: energy by convention.
        twin: energy of the multiplying twin's part, by convention.
    """

    name: str
    model: Mapping[str, Energy]
    twin: Mapping[str, Energy]


@dataclasses.dataclass(frozen=True)
class Report:
    """A model beside its multiplying twin.

    Attributes:
        model: operations of the model.
        twin: operations of the twin.
        table: the unit energies.
        memory: the level of memory in the convention "full".
        parts: energies by part of the network; they add up to the totals.
        twin_name: where the twin comes from if it is not derived from the model.
    """

    model: Ledger
    twin: Ledger
    table: EnergyTable
    memory: str
    parts: tuple[Part, ...]
    twin_name: str = ""

    def total(self, convention: str) -> tuple[Energy, Energy]:
        """Energies of the model and of the twin."""
        return (
            priced(self.model, convention, self.table, self.memory),
            priced(self.twin, convention, self.table, self.memory),
        )

    def product_memory(self) -> tuple[float, float]:
        """Memory traffic of products and adder operators alone, in millijoules, of both.

        A compiler that fused all other operators into these would leave no more than that.
        """
        found = []
        for ledger in (self.model, self.twin):
            entries = (entry for entry in ledger.entries if entry.kind in (PRODUCT, ADDER))
            products = Ledger(tuple(entries))
            found.append(priced(products, "full", self.table, self.memory).memory)
        return found[0], found[1]

    def as_json(self, convention: str) -> dict[str, Any]:
        """Energies of one image in millijoules and counts of its operations, as plain values.

        Counts are in whole operations, of the whole model, and of its products and adder operators by part of
        the network and by layer; they do not depend on the convention. Layers have the names of
        `adderflax.analysis.integers`, the paths of their parameters. "not_counted" names what a total lacks:
        primitives that are not known, and loops of unknown length, which count for one turn. "difference"
        leads from the total of the convention "paper" to that of "full". "operations_by_dtype" has names such
        as "add float32", or for a model without floats "add bits17", of a sum of 17 bits, and "multiply
        bits16x8", of factors of 16 and 8 bits (`adderflax.analysis.integer_ledger`).
        """
        model, twin = self.total(convention)
        (ours, theirs), parts = map(split_into_parts, (self.model, self.twin)), []
        for part in self.parts:
            entry: dict[str, Any] = {"part": part.name}
            for of, energies, ledgers in (("", part.model, ours), ("twin_", part.twin, theirs)):
                priced, ledger = energies[convention], ledgers.get(part.name, Ledger(()))
                entry |= {f"{of}total": priced.total, f"{of}memory": priced.memory}
                entry |= {f"{of}multiply_accumulates": ledger.macs, f"{of}adder_terms": ledger.adder_elements}
            if entry["total"] or entry["twin_total"]:
                parts.append(entry)
        return {
            "convention": convention,
            "table": self.table.name,
            "memory": self.memory,
            "unit": "mJ",
            "total": model.total,
            "twin_total": twin.total,
            "ratio": ratio(model.total, twin.total),
            "parts": parts,
            "difference": dict(zip(("model", "twin"), differences(self))),
            "counts": {"model": _counts(self.model), "twin": _counts(self.twin)},
        }


def _counts(ledger: Ledger) -> dict[str, Any]:
    layers = ledger.group(lambda entry: entry.path if entry.kind in (PRODUCT, ADDER) else "")
    terms = {
        layer_name(path): {"multiply_accumulates": part.macs, "adder_terms": part.adder_elements}
        for path, part in layers.items()
        if path
    }
    return {
        "multiply_accumulates": ledger.macs,
        "adder_terms": ledger.adder_elements,
        "operations": ledger.operations,
        "operations_by_dtype": {
            f"{operation} {dtype}": count for (operation, dtype), count in sorted(by_dtype(ledger).items())
        },
        "bytes_read": ledger.bytes_read,
        "bytes_written": ledger.bytes_written,
        "layers": terms,
        "not_counted": [
            {"primitive": primitive, "path": path, "calls": calls}
            for primitive, path, calls in (*ledger.unknown, *ledger.open_loops)
        ],
    }


def layer_name(path: str) -> str:
    """The path of a layer's parameters from its path in a ledger, which names the model and methods too."""
    _, *modules = path.split("/")
    return "/".join(module for module in modules if "." not in module) or path


def compare(model: Ledger, twin: Ledger, table: EnergyTable, memory: str, twin_name: str = "") -> Report:
    """Prices both ledgers by part of the network.

    Args:
        model: operations of the model.
        twin: operations of its multiplying twin.
        table: the unit energies.
        memory: a level of the table's memory.
        twin_name: where the twin comes from if it is not derived from the model.
    """
    model, twin = map(_aggregations_as_products, (model, twin))
    twin = _beside_adders(model, twin)
    ours, theirs = split_into_parts(model), split_into_parts(twin)
    names = dict.fromkeys((*ours, *theirs))
    # Parts of other architectures follow those of transformers, before the rest.
    position = {name: index for index, name in enumerate(_ORDER)}
    ordered = sorted(names, key=lambda name: position.get(name, position["head"] + 0.5))

    def by_convention(ledger: Ledger) -> dict[str, Energy]:
        return {name: priced(ledger, name, table, memory) for name in CONVENTIONS}

    empty = Ledger(())
    parts = (Part(n, by_convention(ours.get(n, empty)), by_convention(theirs.get(n, empty))) for n in ordered)
    return Report(model, twin, table, memory, tuple(parts), twin_name)


def _aggregations_as_products(ledger: Ledger) -> Ledger:
    """The ledger with aggregations that add priced as products: an export has either in float32."""
    aggregations = split_into_parts(ledger).get(_AGGREGATION, Ledger(())).entries
    adding = {id(entry) for entry in aggregations if entry.kind == ADDER}
    entries = (
        dataclasses.replace(entry, priced_as=PRODUCT) if id(entry) in adding else entry
        for entry in ledger.entries
    )
    return dataclasses.replace(ledger, entries=tuple(entries))


def _beside_adders(model: Ledger, twin: Ledger) -> Ledger:
    """The twin's ledger, its products marked that stand where the model has adder operators.

    Within a module they stand in the same order; one that has another number of them is left alone.
    """
    ours, theirs = ({}, {})
    for ledger, found in ((model, ours), (twin, theirs)):
        for index, entry in enumerate(ledger.entries):
            if entry.kind in (PRODUCT, ADDER):
                found.setdefault(entry.path, []).append(index)
    entries = list(twin.entries)
    for path, indices in theirs.items():
        for own, index in zip(ours[path], indices) if len(ours.get(path, ())) == len(indices) else ():
            if entries[index].kind == PRODUCT and model.entries[own].kind == ADDER:
                kind = model.entries[own].priced_as or ADDER
                entries[index] = dataclasses.replace(entries[index], priced_as=kind)
    return dataclasses.replace(twin, entries=tuple(entries))


def split_into_parts(ledger: Ledger) -> dict[str, Ledger]:
    """Splits the ledger of an inference by part of the network.

    The similarity of queries and keys and the product with the values belong to the same
    module, "attention": of its products and adder operators the first is the similarity. What follows an
    aggregation that adds there, the sum of its values' magnitudes, is of that.
    """
    seen: Counter[str] = Counter()
    adding: set[str] = set()

    def part(entry: Entry) -> str:
        name = entry.path.rpartition("/")[2]
        multiplies = entry.kind in (PRODUCT, ADDER)
        if "norm" in name.lower():
            return NORMALIZATION
        name = "patch_embedding" if name.startswith("stem_") else name
        if name in _PARTS:
            return _PARTS[name]
        if name == "attention":
            seen[entry.path] += multiplies
            if multiplies and seen[entry.path] > 1 and entry.kind == ADDER:
                adding.add(entry.path)
            if entry.path in adding:
                return _AGGREGATION
            return ("scores", _AGGREGATION)[seen[entry.path] > 1] if multiplies else SOFTMAX
        if name == "mlp":
            return "GELU"
        return re.sub(r"_\d+$", "", name) or REST if multiplies else REST

    return ledger.group(part)


def differences(report: Report) -> list[dict[str, float]]:
    """From the total of `paper` to that of `full`, step by step in millijoules, of the model and the twin."""
    columns = []
    totals = zip(report.total("paper"), report.total("full"), report.product_memory())
    for paper, full, at_products in totals:
        inside = full.operations.get(PRODUCT, 0.0) + full.operations.get(ADDER, 0.0)
        special = sum(full.operations.get(name, 0.0) for name in _SPECIAL)
        columns.append(
            {
                "paper": paper.total,
                "absolute_values": inside - paper.total,
                "additions_and_multiplications": full.arithmetic - inside - special,
                "divisions_and_functions": special,
                "memory_of_products": at_products,
                "other_memory": full.memory - at_products,
                "full": full.total,
            }
        )
    return columns


def by_dtype(ledger: Ledger) -> Counter[tuple[str, str]]:
    """Operations by name and dtype."""
    counts: Counter[tuple[str, str]] = Counter()
    for entry in ledger.entries:
        counts.update(entry.operations)
    return counts


def ratio(model: float, twin: float) -> float:
    """How many times as much the twin takes."""
    return twin / model if model else 1.0
