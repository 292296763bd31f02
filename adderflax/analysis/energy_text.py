"""A model's energy beside its multiplying twin's, as the tables that a command prints."""

from collections import Counter

from adderflax.analysis.energy_report import NORMALIZATION, SOFTMAX, Report, by_dtype, differences, ratio
from adderflax.analysis.ledger import width_name, widths
from adderflax.analysis.pricing import CONVENTIONS

# What leads from the convention "paper" to "full".
_STEPS = {
    "paper": "paper",
    "absolute_values": "+ |.| in products and adders",
    "additions_and_multiplications": "+ other additions, multiplications",
    "divisions_and_functions": "+ divisions, roots, exp, tanh, ...",
    "memory_of_products": "+ memory, products and adders",
    "other_memory": "+ memory, all else if nothing is fused",
    "full": "= full",
}
_FEW = 500  # operations: a table that counts millions, to three places, would show none


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
    twins = "twin" if report.twin_name else "multiplying twin"
    lines += [
        "",
        f"{convention}: {factor * model.total:.4g} {unit} an image, {twins} "
        f"{factor * twin.total:.4g} {unit}, "
        f"ratio {ratio(model.total, twin.total):.2f}",
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


def _difference_table(report: Report) -> list[str]:
    columns = differences(report)
    unit, factor = unit_of(report)
    lines = [f"{'what the difference is, ' + unit:55}{'model':>9}{'twin':>9}"]
    for name, title in _STEPS.items():
        lines.append(f"{title:55}" + "".join(f"{factor * column[name]:9.3f}" for column in columns))
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
    shares = (100 * value / column["full"] for value, column in zip(values, columns))
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
    columns = [by_dtype(ledger) for ledger in (report.model, report.twin)]
    # By operation, then from narrow to wide.
    keys = sorted({(key[0], *widths(key[1])) for column in columns for key in column if widths(key[1])})
    title = "by bits (of an addition's sum), millions an image"
    lines = [f"{title:49}{'model':>10}{'twin':>14}"] if keys else []
    rows: dict[str, list[int]] = {}
    for operation, *bits in keys:
        counts = [column.get((operation, width_name(*bits)), 0) for column in columns]
        name = f"{operation}, {' x '.join(map(str, bits))}" if max(counts) >= _FEW else "others"
        rows[name] = [sum(pair) for pair in zip(counts, rows.pop(name, (0, 0)))]
    few = rows.pop("others", None)
    for name, counts in (rows | ({"others": few} if few else {})).items():
        lines.append(f"{name:45}" + "".join(f"{count / 1e6:14,.3f}" for count in counts))
    return lines


def _remarks(report: Report) -> list[str]:
    lines = [
        f"unit energies: {report.table.name} ({report.table.source})",
        "paper: matrix products, convolutions and adder operators only; |.| costs nothing",
        "full: every operation; divisions, roots, exp, ... as modeled in energy_tables.py; each "
        f"operator reads and\n  writes its arrays in {report.memory} at "
        f"{report.table.memory[report.memory]:g} pJ a byte, which is too much where operators are "
        "fused",
    ]
    if report.twin_name:
        lines.append(f"twin: {report.twin_name}")
    elif _widths_table(report):
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


def _pair(model: float, twin: float) -> str:
    shown = f"{twin / model:8.2f}" if model and twin else f"{'-':>8}"
    return f"{model:9.3f}{twin:9.3f}{shown}"
