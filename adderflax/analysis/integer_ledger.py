"""What a Vision Transformer without floats computes, by the bits of its operands.

integer_only.md defines every step. A step counts here with the bits of a two's complement that holds what it
can meet, whatever the image: accumulators have the `accumulator_bits` of their description, the rest follows
from the page. "bits17" in place of a dtype is a number of 17 bits, "bits16x8" two factors; arrays are packed,
so that one of 17 bits takes 17/8 bytes. Of what the page says

* bringing a value to another unit is one addition, of the half, and clipping it two comparisons; a shift by
  places that are known is a matter of wires and costs nothing;
* a shift by places that are computed, and `bit_length`, are one "shift" each;
* a table costs what it takes to read an entry, and nothing where arithmetic alone is priced;
* `n * x` in a normalization multiplies unless n is a power of two.

A multiplying twin is what the same export would write of it: 8 bits in every layer and every score, and
accumulators for any weights, because its own are not known here.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from adderflax.analysis.accumulators import Scores, told
from adderflax.analysis.integer_only_reference import (
    ATTENDED,
    LARGEST,
    ONE,
    ROOT,
    SHARE,
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

_Width = int | tuple[int, int]


def integer_only_ledger(whole: IntegerOnly, *, twin: bool = False) -> Ledger:
    """The operations of one image through a model without floats.

    Args:
      whole: the model, as `adderflax.analysis.integer_files.load_integer_only` gives it.
      twin: count its multiplying twin instead.

    Returns:
      The ledger, whose dtypes are widths; `adderflax.analysis.TABLES["integer_only"]` prices them.
    """
    return Ledger(tuple(_Counter(whole, twin).entries))


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
        layers = self._described["layers"]
        first, n = next(iter(layers)), self._size(f"{next(iter(layers))}/inputs")
        self._append("", "lookup", read=[(8, n), (self._bits(first), n)], written=[(self._bits(first), n)])
        # Pixels, and what a table gives, are as the next layer takes them.
        stems = [name for name in layers if name.startswith("stem_")]
        for name, following in zip(stems, [*stems[1:], "patch_embedding"]):
            self._layer(name)
            self._table("", self._size(name), WIDE, self._bits(following))
        self._layer("patch_embedding")
        self._stream("embedded", "", "patch_embedding")
        for index in range(self._model["depth"]):
            block = f"block_{index}"
            self._norm(f"{block}/attention_norm", WIDE)
            self._attention(f"{block}/attention")
            self._stream(f"{block}/attended", block, block)
            self._norm(f"{block}/mlp_norm", WIDE)
            self._mlp(f"{block}/mlp")
            self._stream(block, block, block)
        self._norm("norm", WIDE)
        if self._model["pooling"] == "mean":
            T, D = self._shapes["norm"][-2:]
            width = WIDE + _more(T)
            divided = [] if _is_power_of_two(T) else [("divide", width, D)]
            operations = [("add", width, T * D), *divided]  # with the half
            self._append("", "mean", operations, [(WIDE, T * D)], [(WIDE, D)])
        self._layer("head", WIDE)

    def _attention(self, name: str) -> None:
        entry, identity = self._described["attentions"][name], self._model["identity"]
        adds, aggregates = (self._model[part] == "l1" for part in ("similarity", "aggregation"))
        (_, H, T, S), d = self._shapes[f"{name}/scores"], self._shapes[f"{name}/queries"][-1]
        bits, value_bits, sums = entry["query_bits"], entry["value_bits"], entry["accumulator_bits"]
        if self._twin:
            if adds:
                bits, sums = _MULTIPLIED, _of_any_weights(d)
            adds, aggregates, value_bits = False, False, _MULTIPLIED
        for part in ("query", "key", "value"):
            self._layer(f"{name}/{part}", WIDE)
        scores, rows, features = H * T * S, H * T, T * H * d
        for width in (bits, bits, value_bits):
            self._rescaled(name, features, WIDE, width)
        self._sums(name, adds, (bits, bits), sums, scores * d, (features, features), scores)

        exponentials = (_EXPONENTIAL, scores)
        product = sums + _FALL
        operations = [
            ("compare", sums, rows * (S - 1)),
            ("add", sums, scores),
            ("multiply", (sums, _FALL), scores),
            ("add", product, scores),
            ("compare", product, scores),
            ("shift", _EXPONENTIAL, scores),
        ]
        self._append(name, "exponentials", operations, [(sums, scores), exponentials], [exponentials])
        total = _EXPONENTIAL + _more(S)
        operations = [("add", total, rows * (S - 1)), ("shift", total, rows), ("divide", _RADICAND, rows)]
        self._append(name, "share", operations, [exponentials], [(_RECIPROCAL, rows)])

        if not aggregates:
            # What rounding adds can exceed the largest value.
            width, summed = value_bits + ATTENDED + 1, _EXPONENTIAL + value_bits + _more(S)
            factors, read = (_EXPONENTIAL, value_bits), (scores, features)
            self._sums(name, False, factors, summed, scores * d, read, features)
            product = width + _RECIPROCAL
            operations = [
                ("add", summed, features),
                ("shift", summed, features),
                ("multiply", (width, _RECIPROCAL), features),
                ("add", product, features),
                ("add", width + 1, identity * features),
            ]
            read = [(summed, features), (_RECIPROCAL, rows), (value_bits, identity * features)]
            width += identity
        else:
            product = _EXPONENTIAL + _RECIPROCAL
            operations = [
                ("multiply", (_EXPONENTIAL, _RECIPROCAL), scores),
                ("add", product, scores),
                ("shift", product, scores),
                ("add", WIDE, identity * rows),
            ]
            weights = (
                2 + identity - entry["value"]
            )  # of 0 to 1, or to 2 with the identity, in units of values
            self._append(
                name, "weights", operations, [exponentials, (_RECIPROCAL, rows)], [(weights, scores)]
            )
            term = max(weights, WIDE)
            width = term + 1 + _more(S)
            self._sums(name, True, (term, term), width, scores * d, (scores, features), features)
            operations = [("absolute", WIDE, features), ("add", width, 2 * features)]
            read = [(width, features), (WIDE, features)]
        self._append(name, "heads", operations, read, [(width, features)])
        self._layer(f"{name}/out", width)

    def _mlp(self, name: str) -> None:
        self._layer(f"{name}/fc1", WIDE)
        n, width = self._size(f"{name}/fc1"), WIDE
        if self._model["mlp_kernel_size"] is not None:
            self._layer(f"{name}/conv", WIDE)
            units = (self._described["layers"][f"{name}/{part}"]["output"] for part in ("fc1", "conv"))
            width += abs(int(np.subtract(*units))) + 1
            self._append(f"{name}/conv", "add", [("add", width, n)], [(WIDE, 2 * n)], [(width, n)])
        self._table(name, n, width, self._bits(f"{name}/fc2"))
        self._layer(f"{name}/fc2")

    def _layer(self, name: str, width: int | None = None) -> None:
        """A layer; `width` is that of its input where that has another unit."""
        entry, kernel = self._described["layers"][name], self._arrays[f"{name}/kernel"]
        inputs, n, bits = self._size(f"{name}/inputs"), self._size(f"{name}/sums"), self._bits(name)
        terms = kernel[..., 0].size
        adds, sums = entry["adds"], entry["accumulator_bits"]
        if self._twin and adds:
            adds, sums = False, _of_any_weights(terms)
        if width is not None:
            self._rescaled(name, inputs, width, bits)
        self._sums(name, adds, (bits, bits), sums, n * terms, (inputs, kernel.size), n)
        if f"{name}/norm/gain" in self._arrays:
            self._norm(f"{name}/norm", sums)
        elif entry["output"] is not None:
            self._rescaled(name, n, sums)
        if f"{name}/power" in self._arrays:
            self._table(name, n, WIDE, WIDE)

    def _norm(self, name: str, width: int) -> None:
        """A normalization of values of so many bits."""
        n, values = self._arrays[f"{name}/gain"].size, self._size(name)
        rows = values // n
        total, squares = width + _more(n), 2 * LARGEST + 2 + _more(n)
        centered, divided, scaled = total + 1, _ROW + _RECIPROCAL, _NORMALIZED + WIDE
        scaling = [] if _is_power_of_two(n) else [("multiply", (width, n.bit_length()), values)]
        operations = [
            *scaling,
            ("add", total, rows * (n - 1)),
            ("add", centered, 2 * values),  # the difference, and a half before the shift
            ("absolute", centered, values),
            ("compare", centered, rows * (n - 1)),
            ("shift", centered, rows + values),
            ("multiply", (_ROW, _ROW), values),
            ("add", squares, values),  # the last is of epsilon
            ("compare", squares, rows),
            ("shift", squares, 3 * rows),  # epsilon's shift, bits of the sum, the radicand
            ("square_root", _RADICAND, rows),
            ("divide", _RADICAND, rows),
            ("multiply", (_ROW, _RECIPROCAL), values),
            ("add", divided, values),
            ("shift", divided, values),
            ("multiply", (_NORMALIZED, WIDE), values),
            ("add", scaled, 2 * values),
            ("compare", scaled, 2 * values),
        ]
        self._append(name, "norm", operations, [(width, values), (WIDE, 2 * n)], [(WIDE, values)])

    def _table(self, path: str, n: int, width: int, bits: int) -> None:
        """A table, entered with values of so many bits, which gives values of `bits`."""
        self._rescaled(path, n, width, TABLE)
        self._append(path, "lookup", read=[(TABLE, n), (bits, n)], written=[(bits, n)])

    def _stream(self, name: str, path: str, update: str) -> None:
        """The stream after an update, which comes from the module `update`."""
        n = self._size(name)
        self._rescaled(update, n, WIDE)
        operations = [("add", WIDE + 1, n), ("compare", WIDE + 1, 2 * n)]
        self._append(path, "add", operations, [(WIDE, 2 * n)], [(WIDE, n)])

    def _rescaled(self, path: str, n: int, width: int, bits: int = WIDE) -> None:
        """Values of `width` bits in another unit and `bits`."""
        operations = [("add", width, n), ("compare", width, 2 * n)]
        self._append(path, "rescale", operations, [(width, n)], [(bits, n)])

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
        terms = [("add", x, elements), ("absolute", x + 1, elements)]
        terms = terms if adds else [("multiply", factors, elements)]
        operations = [*terms, ("add", width, elements)]
        operands = [*zip(factors, read)]
        if f"{path}/constant" in self._arrays:
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
