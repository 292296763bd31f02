"""A model's energy by part of the network, beside its multiplying twin."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from adderflax.analysis.energy_tables import SOFTWARE, EnergyTable
from adderflax.analysis.ledger import Entry, Ledger, width_name, widths
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
    """

    model: Ledger
    twin: Ledger
    table: EnergyTable
    memory: str
    parts: tuple[Part, ...]

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
        leads from the total of the convention "paper" to that of "full".
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
            "ratio": _ratio(model.total, twin.total),
            "parts": parts,
            "difference": {
                of: {name.lstrip("+= "): value for name, value in column.items()}
                for of, column in zip(("model", "twin"), _differences(self))
            },
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
            f"{operation} {dtype}": count for (operation, dtype), count in sorted(_by_dtype(ledger).items())
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


def compare(model: Ledger, twin: Ledger, table: EnergyTable, memory: str) -> Report:
    """Prices both ledgers by part of the network.

    Args:
        model: operations of the model.
        twin: operations of its multiplying twin.
        table: the unit energies.
        memory: a level of the table's memory.
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
    return Report(model, twin, table, memory, tuple(parts))


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


def as_text(report: Report, convention: str) -> str:
    """The tables that the command prints.

    Args:
        report: what to print.
        convention: the one that the last line states.
    """
    lines = [*_parts_table(report), "", *_difference_table(report), "", *_counts_table(report)]
    if by_width := _widths_table(report):
        lines += ["", *by_width]
    lines += ["", *_remarks(report)]
    (unit, factor), (model, twin) = unit_of(report), report.total(convention)
    lines += [
        "",
        f"{convention}: {factor * model.total:.4g} {unit} an image, multiplying twin "
        f"{factor * twin.total:.4g} {unit}, "
        f"ratio {_ratio(model.total, twin.total):.2f}",
    ]
    return "\n".join(lines)


def unit_of(report: Report) -> tuple[str, float]:
    """The unit of the tables, and how many of it are a millijoule."""
    return ("mJ", 1.0) if min(part.total for part in report.total("paper")) >= 0.1 else ("uJ", 1e3)


def _parts_table(report: Report) -> list[str]:
    unit, factor = unit_of(report)
    lines = [
        f"{'':26}{'paper':^26} {'full':^26} {'of it memory':^18}",
        f"{unit + ' an image':26}" + f"{'model':>9}{'twin':>9}{'ratio':>8} " * 2 + f"{'model':>9}{'twin':>9}",
    ]
    rows = [(part.name, part.model, part.twin) for part in report.parts]
    totals = {name: report.total(name) for name in CONVENTIONS}
    rows.append(("total", *({name: pair[i] for name, pair in totals.items()} for i in range(2))))
    for name, model, twin in rows:
        cells = "".join(_pair(factor * model[c].total, factor * twin[c].total) + " " for c in CONVENTIONS)
        memory = f"{factor * model['full'].memory:9.3f}{factor * twin['full'].memory:9.3f}"
        lines.append(f"{name:26}{cells}{memory}")
    return lines


def _differences(report: Report) -> list[dict[str, float]]:
    """From the total of `paper` to that of `full`, step by step in millijoules, of the model and the twin."""
    columns = []
    totals = zip(report.total("paper"), report.total("full"), report.product_memory())
    for paper, full, at_products in totals:
        inside = full.operations.get(PRODUCT, 0.0) + full.operations.get(ADDER, 0.0)
        special = sum(full.operations.get(name, 0.0) for name in _SPECIAL)
        columns.append(
            {
                "paper": paper.total,
                "+ |.| in products and adders": inside - paper.total,
                "+ other additions, multiplications": full.arithmetic - inside - special,
                "+ divisions, roots, exp, tanh, ...": special,
                "+ memory, products and adders": at_products,
                "+ memory, all else if nothing is fused": full.memory - at_products,
                "= full": full.total,
            }
        )
    return columns


def _difference_table(report: Report) -> list[str]:
    columns = _differences(report)
    unit, factor = unit_of(report)
    lines = [f"{'what the difference is, ' + unit:55}{'model':>9}{'twin':>9}"]
    for name in columns[0]:
        lines.append(f"{name:55}{factor * columns[0][name]:9.3f}{factor * columns[1][name]:9.3f}")
    by_name = {part.name: part for part in report.parts}
    for name in (SOFTMAX, NORMALIZATION):
        if name in by_name:
            part = by_name[name]
            pair = (part.model["full"].arithmetic, part.twin["full"].arithmetic)
            lines.append(_share(f"share of full: arithmetic of {name}", pair, columns))
    memory = tuple(full.memory for full in report.total("full"))
    lines.append(_share("share of full: memory traffic", memory, columns))
    return lines


def _share(name: str, values: tuple[float, float], columns: list[dict[str, float]]) -> str:
    shares = (100 * value / column["= full"] for value, column in zip(values, columns))
    return f"{name:55}" + "".join(f"{share:7.1f} %" for share in shares)


def _counts_table(report: Report) -> list[str]:
    ours, theirs = report.model, report.twin
    rows = {
        "multiply-accumulates": (ours.macs, theirs.macs),
        "|x - w| terms of adder operators": (ours.adder_elements, theirs.adder_elements),
    }
    for name in dict.fromkeys((*ours.operations, *theirs.operations)):
        rows[name] = (ours.operations.get(name, 0), theirs.operations.get(name, 0))
    rows["bytes read, as traced"] = (ours.bytes_read, theirs.bytes_read)
    rows["bytes written, as traced"] = (ours.bytes_written, theirs.bytes_written)
    lines = [f"{'operations, millions an image':45}{'model':>14}{'twin':>14}"]
    for name, (model, twin) in rows.items():
        lines.append(f"{name:45}{model / 1e6:14,.3f}{twin / 1e6:14,.3f}")
    return lines


def _widths_table(report: Report) -> list[str]:
    """Operations by the bits of their operands, of models in whole numbers."""
    columns = [_by_dtype(ledger) for ledger in (report.model, report.twin)]
    # By operation, then from narrow to wide.
    keys = sorted({(key[0], *widths(key[1])) for column in columns for key in column if widths(key[1])})
    title = "by bits (of an addition's sum), millions an image"
    lines = [f"{title:49}{'model':>10}{'twin':>14}"] if keys else []
    for operation, *bits in keys:
        counts = [column.get((operation, width_name(*bits)), 0) for column in columns]
        name = f"{operation}, {' x '.join(map(str, bits))}"
        lines.append(f"{name:45}" + "".join(f"{count / 1e6:14,.3f}" for count in counts))
    return lines


def _by_dtype(ledger: Ledger) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for entry in ledger.entries:
        counts.update(entry.operations)
    return counts


def _remarks(report: Report) -> list[str]:
    lines = [
        f"unit energies: {report.table.name} ({report.table.source})",
        "paper: matrix products, convolutions and adder operators only; |.| costs nothing",
        "full: every operation; divisions, roots, exp, ... as modeled in energy_tables.py; each "
        f"operator reads and\n  writes its arrays in {report.memory} at "
        f"{report.table.memory[report.memory]:g} pJ a byte, which is too much where operators are "
        "fused",
    ]
    if _widths_table(report):
        lines.append("twin: its accumulators hold any weights, the model's its own; its export takes less")
    for name, ledger in (("model", report.model), ("twin", report.twin)):
        for what, found in (
            ("NOT COUNTED, primitives that are not known", ledger.unknown),
            ("COUNTED FOR ONE TURN, loops of unknown length", ledger.open_loops),
        ):
            if found:
                listed = Counter(f"{item.primitive} in {item.path or '/'}" for item in found)
                lines.append(f"{name}: {what}: {', '.join(sorted(listed))}")
    return lines


def _ratio(model: float, twin: float) -> float:
    return twin / model if model else 1.0


def _pair(model: float, twin: float) -> str:
    ratio = f"{twin / model:8.2f}" if model and twin else f"{'-':>8}"
    return f"{model:9.3f}{twin:9.3f}{ratio}"
