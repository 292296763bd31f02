"""What a Vision Transformer without floats computes, by the bits of its operands.

integer_only.md of an export, integer_only_format.md here, defines every step. An addition counts with the
bits of its result, another operation with those of its operands, enough for whatever the image: accumulators
have the `accumulator_bits` of their description, the rest follows from the page, and what cannot be negative
has no sign. "bits17" in place of a dtype is a number of 17 bits, "bits16x8" two factors. Of the memory only
what steps hand to each other counts, packed, so that a number of 17 bits takes 17/8 bytes. Of what the page
says

* bringing a value to a coarser unit is one addition, of the half, and clipping it two comparisons where it
  can exceed; a shift by places that are known is a matter of wires and costs nothing;
* a shift by places that are computed, that of its half included, and `bit_length` are one "shift" each;
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

from adderflax.analysis.accumulators import Scores, told
from adderflax.analysis.integer_only_reference import (
    ATTENDED,
    LARGEST,
    ONE,
    ROOT,
    SHARE,
    SOFTMAX,
    TABLE,
    WIDE,
    IntegerOnly,
)
from adderflax.analysis.ledger import Entry, Ledger, width_name
from adderflax.analysis.primitives import ADDER, ELEMENTWISE, MOVEMENT, PRODUCT

_MULTIPLIED = 8  # bits of what a twin multiplies
_ROW = LARGEST + 2  # of -2^LARGEST to 2^LARGEST, both included
_NORMALIZED = ROOT + 2
# Without a sign:
_RADICAND = 32
_RECIPROCAL = SHARE + 2  # of 2^31 / root and of a share, 2^15 to 2^16
_EXPONENTIAL = ONE + 1  # of 0 to 2^ONE
_FALL = 15  # of what falls are multiplied by

_BIASED = ("patch_embedding", "head")  # in any arithmetic

_Width = int | tuple[int, int]


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
    """n values of `width` bits, in units of 2^exponent."""

    n: int
    width: int
    exponent: int


class _Counter:
    """Goes through the steps of integer_only.md in its order.

    In its methods n is a number of values and a width one of bits, or of two factors.
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
        x = _Values(n, bits, self._unit(first))
        stems = [name for name in layers if name.startswith("stem_")]
        for name, following in zip(stems, [*stems[1:], "patch_embedding"]):
            x = self._table(f"{name}/gelu", "", self._layer(name, x), following)
        x = self._rescaled("patch_embedding", self._layer("patch_embedding", x), stream)
        x = self._added_to_stream("", x._replace(n=self._size("embedded")))
        for index in range(self._model["depth"]):
            block = f"block_{index}"
            for part, inside in (("attention", self._attention), ("mlp", self._mlp)):
                h = inside(f"{block}/{part}", self._norm(f"{block}/{part}_norm", x))
                x = self._added_to_stream(block, self._rescaled(block, h, stream))
        x = self._norm("norm", x._replace(n=self._size("norm")))
        if self._model["pooling"] == "mean":
            T, D = self._shapes["norm"][-2:]
            total = WIDE + _more(T)
            operations = [("add", total, T * D)]  # with the half
            if not _is_power_of_two(T):
                operations.append(("divide", total, D))
            self._append("", "mean", operations, [(WIDE, T * D)], [(WIDE, D)])
            x = x._replace(n=D)
        self._layer("head", x)

    def _attention(self, name: str, x: _Values) -> _Values:
        entry, identity = self._described["attentions"][name], self._model["identity"]
        adds, aggregates = (self._model[part] == "l1" for part in ("similarity", "aggregation"))
        bits, value_bits, sums = entry["query_bits"], entry["value_bits"], entry["accumulator_bits"]
        (_, H, T, S), d = self._shapes[f"{name}/scores"], self._shapes[f"{name}/queries"][-1]
        falling = entry["shift"]
        if self._twin:
            if adds:
                falling += _of_any_weights(d) - sums
                bits, sums = _MULTIPLIED, _of_any_weights(d)
            adds, aggregates, value_bits = False, False, _MULTIPLIED
        scores, rows, features = H * T * S, H * T, T * H * d
        for part, width in (("query", bits), ("key", bits), ("value", value_bits)):
            unit = entry[part] - (width - entry[f"{part}_bits"])  # the values' in the end
            self._rescaled(name, self._layer(f"{name}/{part}", x), unit, width)
        self._sums(name, adds, (bits, bits), sums, scores * d, (features, features), scores)

        exponentials = (_EXPONENTIAL, scores)
        product = sums + _FALL
        # f, and f / 256.
        fall = max(product - falling + (falling > 0), 1)
        places = max(fall - SOFTMAX, 1)
        operations = [
            ("compare", sums, rows * (S - 1)),
            ("add", sums, scores),
            ("multiply", (sums, _FALL), scores),
            ("add", product, scores * (falling > 0)),
            ("compare", places, scores),
            ("shift", _EXPONENTIAL, scores),
        ]
        self._append(name, "exponentials", operations, [(sums, scores), exponentials], [exponentials])
        total = _EXPONENTIAL + _more(S)
        divided = SHARE + total + 1  # 2^(SHARE + p)
        operations = [("add", total, rows * (S - 1)), ("shift", total, rows), ("divide", divided, rows)]
        self._append(name, "share", operations, [exponentials], [(_RECIPROCAL, rows)])

        share = (_RECIPROCAL, rows)
        if not aggregates:
            # What rounding adds can exceed the largest value.
            width, summed = value_bits + ATTENDED + 1, _EXPONENTIAL + value_bits + _more(S)
            factors, read = (_EXPONENTIAL, value_bits), (scores, features)
            self._sums(name, False, factors, summed, scores * d, read, features)
            operations = [
                ("add", summed, features),
                ("shift", summed, features),
                ("multiply", (width, _RECIPROCAL), features),
                ("add", width + _RECIPROCAL, features),
                ("add", width + 1, identity * features),
            ]
            read = [(summed, features), share, (value_bits, identity * features)]
            width, unit = width + identity, unit - ATTENDED
        else:
            product = _EXPONENTIAL + _RECIPROCAL
            # Of 0 to 1, or to 2 with the identity, in units of values.
            weight = 2 + identity - unit
            operations = [
                ("multiply", (_EXPONENTIAL, _RECIPROCAL), scores),
                ("add", product, scores),
                ("shift", product, scores),
                ("add", weight, identity * rows),
            ]
            self._append(name, "weights", operations, [exponentials, share], [(weight, scores)])
            term = max(weight, WIDE)
            width = term + 1 + _more(S)
            self._sums(name, True, (term, term), width, scores * d, (scores, features), features)
            operations = [("absolute", WIDE, features), ("add", width, 2 * features)]
            read = [(width, features), (WIDE, features)]
        self._append(name, "heads", operations, read, [(width, features)])
        return self._layer(f"{name}/out", _Values(features, width, unit))

    def _mlp(self, name: str, x: _Values) -> _Values:
        x = self._layer(f"{name}/fc1", x)
        if self._model["mlp_kernel_size"] is not None:
            y = self._layer(f"{name}/conv", x)
            unit = min(x.exponent, y.exponent)
            width = max(each.width + each.exponent - unit for each in (x, y)) + 1
            moved = [(x.width, x.n), (y.width, y.n)]
            self._append(f"{name}/conv", "add", [("add", width, x.n)], moved, [(width, x.n)])
            x = _Values(x.n, width, unit)
        return self._layer(f"{name}/fc2", self._table(f"{name}/gelu", name, x, f"{name}/fc2"))

    def _layer(self, name: str, x: _Values) -> _Values:
        entry, kernel = self._described["layers"][name], self._arrays[f"{name}/kernel"]
        n, bits, terms = self._size(f"{name}/sums"), self._bits(name), kernel[..., 0].size
        adds, sums, unit = entry["adds"], entry["accumulator_bits"], entry["sums"]
        if self._twin and adds:
            adds, sums = False, _of_any_weights(terms)
            unit -= sums - entry["accumulator_bits"]
        x = self._rescaled(name, x, self._unit(name), bits)
        self._sums(name, adds, (bits, bits), sums, n * terms, (x.n, kernel.size), n)
        x = _Values(n, sums, unit)
        multiplied = self._twin and entry["adds"]
        # The first layer and the last have a normalization only where they add, no product has a power.
        if f"{name}/norm/gain" in self._arrays and not (multiplied and name in _BIASED):
            x = self._norm(f"{name}/norm", x)
        elif name != "head":  # logits stay as they are
            x = self._rescaled(name, x, entry["output"])
        if f"{name}/power" in self._arrays and not multiplied:
            x = self._table(f"{name}/power", name, x)
        return x

    def _norm(self, name: str, x: _Values) -> _Values:
        n, entry = self._arrays[f"{name}/gain"].size, self._described["norms"][name]
        rows = x.n // n
        total, row = x.width + _more(n), 2 * LARGEST + 1 + _more(n)
        squares = max(row, entry["epsilon"].bit_length()) + 1
        centered, divided, scaled = total + 1, _ROW + _RECIPROCAL, _NORMALIZED + WIDE
        result = max(scaled - entry["shift"], WIDE) + 1
        scaling = [] if _is_power_of_two(n) else [("multiply", (x.width, n.bit_length()), x.n)]
        operations = [
            *scaling,
            ("add", total, rows * (n - 1)),
            ("add", centered, 2 * x.n),  # the difference, and a half before the shift
            ("absolute", centered, x.n),
            ("compare", centered, rows * (n - 1)),
            ("shift", centered, rows + x.n),
            ("multiply", (_ROW, _ROW), x.n),
            ("add", squares, x.n),  # the last is of epsilon
            ("compare", squares, rows),
            ("shift", squares, 3 * rows),  # epsilon's shift, bits of the sum, the radicand
            ("square_root", _RADICAND, rows),
            ("divide", _RADICAND, rows),
            ("multiply", (_ROW, _RECIPROCAL), x.n),
            ("add", divided, x.n),
            ("shift", divided, x.n),
            ("multiply", (_NORMALIZED, WIDE), x.n),
            ("add", scaled, x.n * (entry["shift"] > 0)),
            ("add", result, x.n),
            ("compare", result, 2 * x.n),
        ]
        self._append(name, "norm", operations, [(x.width, x.n), (WIDE, 2 * n)], [(WIDE, x.n)])
        return _Values(x.n, WIDE, entry["output"])

    def _table(self, name: str, path: str, x: _Values, follower: str | None = None) -> _Values:
        """A table, which gives what the layer that follows takes, or without one values of `WIDE` bits."""
        entry = self._described["tables"][name]
        bits, unit = WIDE, entry["output"]
        if follower is not None:
            bits, unit = self._bits(follower), self._unit(follower)
        self._rescaled(path, x, entry["input"], TABLE)
        self._append(path, "lookup", read=[(TABLE, x.n), (bits, x.n)], written=[(bits, x.n)])
        return _Values(x.n, bits, unit)

    def _added_to_stream(self, path: str, update: _Values) -> _Values:
        """The stream after an update that is in its unit and `WIDE` bits, as the stream is."""
        n = update.n
        operations = [("add", WIDE + 1, n), ("compare", WIDE + 1, 2 * n)]
        self._append(path, "add", operations, [(WIDE, 2 * n)], [(WIDE, n)])
        return update

    def _rescaled(self, path: str, x: _Values, exponent: int, bits: int = WIDE) -> _Values:
        """The same values in another unit and so many bits."""
        places = exponent - x.exponent
        left = x.width - places + (places > 0)  # the half can carry
        operations = [("add", x.width + 1, x.n)] if places > 0 else []
        if left > bits:
            operations.append(("compare", left, 2 * x.n))
        if operations:
            self._append(path, "rescale", operations, [(x.width, x.n)], [(bits, x.n)])
        return _Values(x.n, bits, exponent)

    def _sums(
        self,
        path: str,
        adds: bool,
        factors: tuple[int, int],
        width: int,
        elements: int,
        read: tuple[int, int],
        written: int,
    ) -> None:
        """Sums of so many bits, of |x - w| or of x w; so many numbers are read of either."""
        x, w = factors
        terms = [("add", x + 1, elements), ("absolute", x + 1, elements)]
        terms = terms if adds else [("multiply", factors, elements)]
        operations = [*terms, ("add", width, elements)]
        operands = [*zip(factors, read)]
        layer = self._described["layers"].get(path)
        if layer is not None and self._twin and layer["adds"]:
            biased = path in _BIASED or self._model["use_bias"]
            operands.append((32, self._arrays[f"{path}/kernel"].shape[-1] if biased else 0))
        elif f"{path}/constant" in self._arrays:
            operands.append((32, self._arrays[f"{path}/constant"].size))
        kind = ADDER if adds else PRODUCT
        self._append(path, "sums", operations, operands, [(width, written)], kind, elements, width)

    def _append(
        self,
        path: str,
        operator: str,
        operations: Iterable[tuple[str, _Width, int]] = (),
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


def _of_any_weights(terms: int) -> int:
    """Bits of the accumulators of so many products of `_MULTIPLIED` by `_MULTIPLIED` bits."""
    return told(Scores(terms, False, _MULTIPLIED))["accumulator_bits"]


def _more(n: int) -> int:
    """Bits that a sum of n numbers has more than each of them."""
    return (n - 1).bit_length()


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0
