"""What a Vision Transformer without floats computes, by the bits of its operands.

integer_only.md of an export, integer_only_format.md here, defines every step. An addition counts with the
bits of its result, another operation with those of its operands. They are what the ends of a value's range
need, whatever the image: those of accumulators stand in their description, the others follow from step to
step, and what cannot be negative has no sign. "bits17" in place of a dtype is a number of 17 bits,
"bits16x8" two factors. Of the memory only what steps hand to each other counts, packed, so that a number of
17 bits takes 17/8 bytes. Of what the page says

* bringing a value to a coarser unit is one addition, of the half, and clipping it one comparison for each end
  that it can exceed; a shift by places that are known is a matter of wires and costs nothing;
* a shift by places that are computed, that of its half included, and `bit_length` are one "shift" each;
* what no value of its range can need is left out;
* a table costs what it takes to read an entry, and nothing where arithmetic alone is priced;
* `n * x` in a normalization multiplies unless n is a power of two.

A multiplying twin is the model of the same description with products: 8 bits in every layer and every score,
without what belongs to adder layers alone, and accumulators for any weights, because its own are not known
here. An export of the twin has narrower ones.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from adderflax.analysis import integer_steps
from adderflax.analysis.accumulators import Scores
from adderflax.analysis.integer_only_reference import ATTENDED, TABLE, WIDE, IntegerOnly
from adderflax.analysis.integer_steps import EXPONENTIAL, SHARES
from adderflax.analysis.ledger import Entry, Ledger, width_name
from adderflax.analysis.primitives import ADDER, ELEMENTWISE, MOVEMENT, PRODUCT
from adderflax.analysis.ranges import Range

_MULTIPLIED = 8  # bits of what a twin multiplies

_BIASED = ("patch_embedding", "head")  # in any arithmetic


def integer_only_ledger(whole: IntegerOnly, *, twin: bool = False) -> Ledger:
    """The operations of one image through a model without floats.

    Args:
      whole: the model, as `adderflax.analysis.integer_files.load_integer_only` gives it.
      twin: count its multiplying twin instead.

    Returns:
      The ledger, whose dtypes are widths; `adderflax.analysis.TABLES["integer_only"]` prices them.

    Raises:
      ValueError: an earlier version wrote the model, without the bits of its accumulators.
    """
    entries = (entry for kind in ("layers", "attentions") for entry in whole.described[kind].values())
    if not all("accumulator_bits" in entry for entry in entries):
        raise ValueError(
            "The bits of accumulators are not told, as an earlier version wrote it. Export the run again,"
            " with --integer_only."
        )
    return Ledger(tuple(_Counter(whole, twin).entries))


class _Values(NamedTuple):
    """n values in units of 2^exponent."""

    n: int
    range: Range
    exponent: int

    @property
    def width(self) -> int:
        """Their bits."""
        return self.range.width


class _Counter:
    """Goes through the steps of integer_only.md in its order.

    In its methods n is a number of values.
    """

    def __init__(self, whole: IntegerOnly, twin: bool):
        self._described, self._arrays, self._twin = whole.described, whole.arrays, twin
        self._model = model = whole.described["model"]
        # Any image takes the same steps.
        shape = (1, model["image_size"], model["image_size"], model["channels"])
        traced = whole.trace(np.zeros(shape, np.uint8))
        self._shapes = {name: integers.shape for name, integers in traced.items()}
        self.entries: list[Entry] = []
        self._count()

    def _count(self) -> None:
        layers, stream = self._described["layers"], self._described["stream"]["exponent"]
        first = next(iter(layers))
        n, bits = self._size(f"{first}/inputs"), self._bits(first)
        self._append("", "lookup", read=[(8, n), (bits, n)], written=[(bits, n)])
        x = _Values(n, Range.of(bits), self._unit(first))
        stems = [name for name in layers if name.startswith("stem_")]
        for name, following in zip(stems, [*stems[1:], "patch_embedding"]):
            x = self._table(f"{name}/gelu", "", self._layer(name, x), following)
        x = self._rescaled("patch_embedding", self._layer("patch_embedding", x), stream)
        x = x._replace(n=self._size("embedded"))
        self._add_to_stream("", x.n)
        for index in range(self._model["depth"]):
            block = f"block_{index}"
            for part, inside in (("attention", self._attention), ("mlp", self._mlp)):
                h = inside(f"{block}/{part}", self._norm(f"{block}/{part}_norm", x))
                x = self._rescaled(block, h, stream)
                self._add_to_stream(block, x.n)
        x = self._norm("norm", x._replace(n=self._size("norm")))
        if self._model["pooling"] == "mean":
            T, D = self._shapes["norm"][-2:]
            operations = integer_steps.mean(x.range, T, D)
            self._append("", "mean", operations, [(WIDE, T * D)], [(WIDE, D)])
            x = x._replace(n=D)
        self._layer("head", x)

    def _attention(self, name: str, x: _Values) -> _Values:
        entry, identity = self._described["attentions"][name], self._model["identity"]
        adds, aggregates = (self._model[part] == "l1" for part in ("similarity", "aggregation"))
        bits, value_bits = entry["query_bits"], entry["value_bits"]
        (_, H, T, S), d = self._shapes[f"{name}/scores"], self._shapes[f"{name}/queries"][-1]
        sums, falling = _ends(entry), entry["shift"]
        if self._twin:
            if adds:
                bits, sums = _MULTIPLIED, _of_any_weights(d)
                falling += sums.width - entry["accumulator_bits"]
            adds, aggregates, value_bits = False, False, _MULTIPLIED
        scores, rows, features = H * T * S, H * T, T * H * d
        for part, in_bits in (("query", bits), ("key", bits), ("value", value_bits)):
            unit = entry[part] - (in_bits - entry[f"{part}_bits"])  # the values' in the end
            self._rescaled(name, self._layer(f"{name}/{part}", x), unit, in_bits)
        factor, values = Range.of(bits), Range.of(value_bits)
        self._sums(name, adds, (factor, factor), sums, scores * d, (features, features), scores)
        exponentials, share = (EXPONENTIAL.width, scores), (SHARES.width, rows)
        operations = integer_steps.exponentials(sums, entry["multiplier"], falling, rows, S)
        self._append(name, "exponentials", operations, [(sums.width, scores), exponentials], [exponentials])
        self._append(name, "share", integer_steps.shares(rows, S), [exponentials], [share])
        if aggregates:
            weight, operations = integer_steps.weights(unit, identity, rows, S)
            self._append(name, "weights", operations, [exponentials, share], [(weight.width, scores)])
            sums, heads, operations = integer_steps.distances(values, weight, S, features)
            factor, also_read = weight, [(value_bits, features)]
        else:
            sums, heads, operations = integer_steps.averages(values, identity, S, features)
            factor, also_read = EXPONENTIAL, [share, (value_bits, identity * features)]
            unit -= ATTENDED
        self._sums(name, aggregates, (factor, values), sums, scores * d, (scores, features), features)
        read = [(sums.width, features), *also_read]
        self._append(name, "heads", operations, read, [(heads.width, features)])
        return self._layer(f"{name}/out", _Values(features, heads, unit))

    def _mlp(self, name: str, x: _Values) -> _Values:
        x = self._layer(f"{name}/fc1", x)
        if self._model["mlp_kernel_size"] is not None:
            y = self._layer(f"{name}/conv", x)
            unit = min(x.exponent, y.exponent)
            fine, other = (each.range.shifted(unit - each.exponent) for each in (x, y))
            found = _Values(x.n, fine.plus(*other), unit)
            moved = [(x.width, x.n), (y.width, y.n)]
            self._append(f"{name}/conv", "add", [("add", found.width, x.n)], moved, [(found.width, x.n)])
            x = found
        return self._layer(f"{name}/fc2", self._table(f"{name}/gelu", name, x, f"{name}/fc2"))

    def _layer(self, name: str, x: _Values) -> _Values:
        entry, kernel = self._described["layers"][name], self._arrays[f"{name}/kernel"]
        n, bits, terms = self._size(f"{name}/sums"), self._bits(name), kernel[..., 0].size
        adds, sums, unit = entry["adds"], _ends(entry), entry["sums"]
        multiplied = self._twin and adds
        if multiplied:
            adds, sums = False, _of_any_weights(terms)
            unit -= sums.width - entry["accumulator_bits"]
        x, factor = self._rescaled(name, x, self._unit(name), bits), Range.of(bits)
        self._sums(name, adds, (factor, factor), sums, n * terms, (x.n, kernel.size), n)
        x = _Values(n, sums, unit)
        # The first layer and the last have a normalization only where they add, no product has a power.
        if f"{name}/norm/gain" in self._arrays and not (multiplied and name in _BIASED):
            x = self._norm(f"{name}/norm", x)
        elif name != "head":  # logits stay as they are
            x = self._rescaled(name, x, entry["output"])
        if f"{name}/power" in self._arrays and not multiplied:
            x = self._table(f"{name}/power", name, x)
        return x

    def _norm(self, name: str, x: _Values) -> _Values:
        entry, gain = self._described["norms"][name], self._arrays[f"{name}/gain"]
        operations = integer_steps.normalization(
            x.range, gain, self._arrays[f"{name}/offset"], entry["shift"], entry["epsilon"], x.n // gain.size
        )
        self._append(name, "norm", operations, [(x.width, x.n), (WIDE, 2 * gain.size)], [(WIDE, x.n)])
        return _Values(x.n, Range.of(WIDE), entry["output"])

    def _table(self, name: str, path: str, x: _Values, follower: str | None = None) -> _Values:
        """A table, which gives what the layer that follows takes, or without one values of `WIDE` bits."""
        entry = self._described["tables"][name]
        bits, unit = WIDE, entry["output"]
        if follower is not None:
            bits, unit = self._bits(follower), self._unit(follower)
        self._rescaled(path, x, entry["input"], TABLE)
        self._append(path, "lookup", read=[(TABLE, x.n), (bits, x.n)], written=[(bits, x.n)])
        return _Values(x.n, Range.of(bits), unit)

    def _add_to_stream(self, path: str, n: int) -> None:
        """n values, which are in the stream's unit and bits."""
        sums = Range.of(WIDE).times(2)
        operations = [("add", sums.width, n), ("compare", sums.width, n * sums.beyond(WIDE))]
        self._append(path, "add", operations, [(WIDE, 2 * n)], [(WIDE, n)])

    def _rescaled(self, path: str, x: _Values, exponent: int, bits: int = WIDE) -> _Values:
        """The same values in another unit and so many bits."""
        places = exponent - x.exponent
        operations = integer_steps.rescaled(x.range, places, bits, x.n)
        if any(n for *_, n in operations):
            self._append(path, "rescale", operations, [(x.width, x.n)], [(bits, x.n)])
        return _Values(x.n, Range.of(bits), exponent)

    def _sums(
        self,
        path: str,
        adds: bool,
        factors: tuple[Range, Range],
        sums: Range,
        elements: int,
        read: tuple[int, int],
        written: int,
    ) -> None:
        """Sums of |x - w| or of x w; so many numbers are read of either."""
        x, w = factors
        terms = [("multiply", (x.width, w.width), elements)]
        if adds:
            difference = Range(x.low - w.high, x.high - w.low).width
            terms = [("add", difference, elements), ("absolute", difference, elements)]
        operations = [*terms, ("add", sums.width, elements)]
        operands = [(factor.width, n) for factor, n in zip(factors, read)]
        layer = self._described["layers"].get(path)
        if layer is not None and self._twin and layer["adds"]:
            biased = path in _BIASED or self._model["use_bias"]
            operands.append((32, self._arrays[f"{path}/kernel"].shape[-1] if biased else 0))
        elif f"{path}/constant" in self._arrays:
            operands.append((32, self._arrays[f"{path}/constant"].size))
        kind = ADDER if adds else PRODUCT
        self._append(path, "sums", operations, operands, [(sums.width, written)], kind, elements, sums.width)

    def _append(
        self,
        path: str,
        operator: str,
        operations: Iterable[tuple[str, int | tuple[int, int], int]] = (),
        read: Iterable[tuple[int, int]] = (),
        written: Iterable[tuple[int, int]] = (),
        kind: str = ELEMENTWISE,
        elements: int = 0,
        sums: int | None = None,
    ) -> None:
        """One entry; operations are names, widths and counts, what moves widths and counts."""
        operations = [
            ((name, width_name(*(width if isinstance(width, tuple) else (width,)))), count)
            for name, width, count in operations
            if count
        ]
        read, written = ([(width_name(width), n) for width, n in moved if n] for moved in (read, written))
        self.entries.append(
            Entry(
                path=f"VisionTransformer/{path}".rstrip("/"),
                operator=operator,
                kind=kind if operations else MOVEMENT,
                calls=1,
                elements=elements,
                operations=_added(operations),
                read=_added(read),
                written=_added(written),
                sums="" if sums is None else width_name(sums),
            )
        )

    def _size(self, name: str) -> int:
        return math.prod(self._shapes[name])

    def _bits(self, name: str) -> int:
        """Of the operands of a layer."""
        entry = self._described["layers"][name]
        return _MULTIPLIED if self._twin and entry["adds"] else entry["bits"]

    def _unit(self, name: str) -> int:
        """Of a layer's inputs; more bits, of a twin, have a finer one."""
        entry = self._described["layers"][name]
        return entry["input"] - (self._bits(name) - entry["bits"])


def _added(pairs: Iterable[tuple[Any, int]]) -> dict[Any, int]:
    counts: Counter[Any] = Counter()
    for name, count in pairs:
        counts[name] += count
    return dict(counts)


def _ends(entry: dict[str, Any]) -> Range:
    """Of accumulators."""
    return Range(entry["accumulator_lowest"], entry["accumulator_highest"])


def _of_any_weights(terms: int) -> Range:
    """Accumulators of so many products of `_MULTIPLIED` by `_MULTIPLIED` bits."""
    return Range(*Scores(terms, False, _MULTIPLIED).ends())
