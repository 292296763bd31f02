"""The operation ledger: what a JAX program computes, counted from its jaxpr.

    from adderflax.analysis import count_operations

    ledger = count_operations(lambda x, w: jax.nn.relu(x @ w), x, w)
    ledger.operations  # {"multiply": ..., "add": ..., "compare": ...}

Nothing is computed: arguments may be `jax.ShapeDtypeStruct`s. What is counted is the program as
traced, without the parts of it whose results nobody uses:

* loops (`scan`, `fori_loop`, and `while_loop` where the number of turns can be read off the
  program) are multiplied out; a loop whose turns depend on data is counted for one turn and
  listed in `Ledger.open_loops`;
* of a `cond` the branch with the most operations counts, unless the program fixes the branch;
* `shard_map` counts the work of all its devices;
* adder operators count by their definition, two additions (x - w, and the sum) and one absolute
  value for each |x - w|, whichever implementation would run: see `adders.py`;
* what is computed from constant arguments alone (`constant_argnums`), such as a sum over trained templates,
  or from indices alone, such as an identity matrix, is computed once and stored, not for every image, and
  does not count;
* a primitive that `primitives.py` does not know is listed in `Ledger.unknown`, never taken for
  free.

Bytes follow a simple model: each operator reads its operands once and writes its results once.
Views (reshape, broadcast, ...) move nothing. Compilers fuse elementwise operators, which keeps
their intermediate arrays out of memory, so for these the model counts too much; and it knows of
no cache, so for large matrix products it may count too little.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from adderflax.analysis import adders, loops
from adderflax.analysis.names import join, scopes
from adderflax.analysis.primitives import (
    ADDER,
    PRODUCT,
    VIEWS,
    Cost,
    arithmetic,
    is_literal,
    size,
    traffic,
)

# Calls whose body runs once, in the one parameter that is a jaxpr.
_CALLS = frozenset(
    "jit closed_call call remat2 custom_jvp_call custom_vjp_call custom_vmap_call custom_lin "
    "linear_call composite shard_map".split()
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One operator of the program, all turns of the loops around it together.

    Attributes:
        path: names of the modules it belongs to, such as "VisionTransformer/block_0/mlp/fc1".
        operator: name of the primitive, or of the adder operator.
        kind: "product", "adder", "elementwise" or "movement".
        calls: how often it runs.
        elements: multiply-accumulates of a product, |x - w| terms of an adder, otherwise 0.
        operations: (operation, dtype) -> count.
        read: elements read, by dtype.
        written: elements written, by dtype.
        sums: dtype in which a product or an adder adds up, otherwise "".
        priced_as: the kind in whose number formats it is priced, where that is another one: a product of a
            twin that stands where the model adds, or an adder operator that an export leaves in float32.
    """

    path: str
    operator: str
    kind: str
    calls: int
    elements: int
    operations: Mapping[tuple[str, str], int]
    read: Mapping[str, int]
    written: Mapping[str, int]
    sums: str = ""
    priced_as: str = ""


class Unknown(NamedTuple):
    """A primitive that was not counted, or a loop that was counted for one turn.

    Attributes:
        primitive: its name.
        path: names of the modules it belongs to.
        calls: how often it runs, as far as is known.
    """

    primitive: str
    path: str
    calls: int


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The operations of a program, in the order in which it was traced.

    Attributes:
        entries: one for each operator.
        unknown: primitives that were not counted.
        open_loops: loops of unknown length, counted for one turn.
    """

    entries: tuple[Entry, ...]
    unknown: tuple[Unknown, ...] = ()
    open_loops: tuple[Unknown, ...] = ()

    @property
    def operations(self) -> dict[str, int]:
        """Counts by operation (`adderflax.analysis.primitives` explains the names)."""
        counts: Counter[str] = Counter()
        for entry in self.entries:
            for (operation, _), count in entry.operations.items():
                counts[operation] += count
        return {operation: count for operation, count in counts.items() if count}

    @property
    def macs(self) -> int:
        """Multiply-accumulates of matrix products and convolutions."""
        return sum(entry.elements for entry in self.entries if entry.kind == PRODUCT)

    @property
    def adder_elements(self) -> int:
        """|x - w| terms of adder operators."""
        return sum(entry.elements for entry in self.entries if entry.kind == ADDER)

    @property
    def bytes_read(self) -> int:
        """Bytes read, by the model of the module's docstring."""
        return sum(_bytes(entry.read) for entry in self.entries)

    @property
    def bytes_written(self) -> int:
        """Bytes written, likewise."""
        return sum(_bytes(entry.written) for entry in self.entries)

    def group(self, key: Callable[[Entry], str]) -> dict[str, "Ledger"]:
        """Parts of the ledger by a function of its entries, in the order of appearance.

        What was not counted stays with the whole ledger.
        """
        groups: dict[str, list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault(key(entry), []).append(entry)
        return {name: Ledger(tuple(entries)) for name, entries in groups.items()}

    def by_path(self, depth: int | None = None) -> dict[str, "Ledger"]:
        """Parts of the ledger by module path, cut to so many names."""
        return self.group(lambda entry: "/".join(entry.path.split("/")[:depth]))


def count_operations(
    function: Callable, *args: Any, constant_argnums: tuple[int, ...] = (), **kwargs: Any
) -> Ledger:
    """Counts the operations of a function, which is traced and not run.

    Args:
        function: any function that `jax.make_jaxpr` can trace.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`s in any nesting. Values that the
            function needs in Python, such as flags, belong into a closure instead.
        constant_argnums: indices of those `args` that never change, as trained weights: operations on
            these alone do not count, except inside of a loop that also sees others.
        **kwargs: likewise arguments of the function.

    Returns:
        The ledger.

    Raises:
        ValueError: the program has arrays of symbolic shape, or an index is none of `args`.
    """
    if wrong := [index for index in constant_argnums if index not in range(len(args))]:
        raise ValueError(
            f"constant_argnums: {wrong} are no indices of {len(args)} arguments, 0 to {len(args) - 1}."
        )
    leaves = (
        (index in constant_argnums,) * len(jax.tree.leaves(argument)) for index, argument in enumerate(args)
    )
    return count_jaxpr(jax.make_jaxpr(function)(*args, **kwargs), tuple(itertools.chain(*leaves)))


def count_jaxpr(jaxpr: Any, constant: tuple[bool, ...] = ()) -> Ledger:
    """Counts the operations of a jaxpr, such as `jax.make_jaxpr` returns.

    Args:
        jaxpr: the program.
        constant: for each of its arguments whether it never changes; missing ones may.
    """
    walk = _Walk()
    walk.jaxpr(jaxpr, _Frame(constant=constant))
    return Ledger(tuple(walk.entries), tuple(walk.unknown), tuple(walk.open_loops))


class _Frame(NamedTuple):
    """Where the walk is.

    Attributes:
        path: module names outside of the jaxpr.
        calls: how often the jaxpr runs.
        axis_sizes: named axes of the surrounding shard_maps.
        known: values of the jaxpr's arguments, None where they are not known.
        live: whether each result is used; None means all are.
        constant: whether each argument never changes; missing ones may.
    """

    path: str = ""
    calls: int = 1
    axis_sizes: Mapping[str, int] = {}
    known: tuple[int | None, ...] = ()
    live: tuple[bool, ...] | None = None
    constant: tuple[bool, ...] = ()


class _Walk:
    """Collects entries while it descends through a program."""

    def __init__(self):
        self.entries: list[Entry] = []
        self.unknown: list[Unknown] = []
        self.open_loops: list[Unknown] = []

    def jaxpr(self, jaxpr: Any, frame: _Frame) -> None:
        known = loops.known_arguments(jaxpr, frame.known)
        jaxpr = loops.opened(jaxpr)
        stored: dict[Any, int] = {}
        constant = {variable for variable, never in zip(jaxpr.invars, frame.constant) if never}
        for eqn, live in _live_equations(jaxpr, frame.live):
            path = join(frame.path, scopes(eqn.source_info.name_stack))
            inner = frame._replace(path=path, known=(), live=None, constant=())
            name = eqn.primitive.name
            operands = [variable for variable in eqn.invars if not is_literal(variable)]
            from_constants = bool(operands) and constant.issuperset(operands)
            never_changes = not eqn.effects and (from_constants or name == "iota")
            if never_changes:
                constant.update(eqn.outvars)
            if name in VIEWS:
                self._view(eqn, stored)
            elif never_changes:
                continue
            elif cost := adders.recognize(eqn):
                self._add(eqn, adders.name_of(eqn), cost, inner, stored)
            elif name in _CALLS and (body := _body(eqn)) is not None:
                values = tuple(loops.value(operand, known) for operand in eqn.invars)
                inside = _in_call(eqn, inner)._replace(known=values, live=live)
                self.jaxpr(body, inside._replace(constant=_constant(eqn.invars, constant)))
            elif name == "scan":
                turns = inner.calls * int(eqn.params["length"])
                self.jaxpr(eqn.params["jaxpr"], inner._replace(calls=turns))
            elif name == "while":
                self._while(eqn, inner, known)
            elif name == "cond":
                inside = inner._replace(constant=_constant(eqn.invars[1:], constant))
                self._cond(eqn, inside, known, live)
            elif (cost := arithmetic(eqn, frame.axis_sizes)) is not None:
                self._add(eqn, name, cost, inner, stored)
            else:
                self.unknown.append(Unknown(name, path, inner.calls))

    def _view(self, eqn: Any, stored: dict[Any, int]) -> None:
        sources = [v for v in eqn.invars if not is_literal(v)]
        behind = stored.get(sources[0], size(sources[0].aval)) if sources else 0
        for variable in eqn.outvars:
            stored[variable] = min(behind, size(variable.aval))

    def _add(self, eqn: Any, name: str, cost: Cost, frame: _Frame, stored: dict) -> None:
        calls = frame.calls
        read, written = traffic(eqn, stored)
        self.entries.append(
            Entry(
                path=frame.path,
                operator=name,
                kind=cost.kind,
                calls=calls,
                elements=cost.elements * calls,
                operations={key: count * calls for key, count in cost.operations.items()},
                read={dtype: count * calls for dtype, count in read.items()},
                written={dtype: count * calls for dtype, count in written.items()},
                sums=cost.sums,
            )
        )

    def _while(self, eqn: Any, frame: _Frame, known: Mapping) -> None:
        turns = loops.while_turns(eqn, known)
        if turns is None:
            self.open_loops.append(Unknown("while", frame.path, frame.calls))
            turns = 1
        self.jaxpr(eqn.params["cond_jaxpr"], frame._replace(calls=frame.calls * (turns + 1)))
        self.jaxpr(eqn.params["body_jaxpr"], frame._replace(calls=frame.calls * turns))

    def _cond(self, eqn: Any, frame: _Frame, known: Mapping, live: tuple[bool, ...]) -> None:
        index, *operands = eqn.invars
        values = tuple(loops.value(operand, known) for operand in operands)
        branches, chosen = eqn.params["branches"], loops.value(index, known)
        platforms = eqn.params.get("branches_platforms")
        if platforms is not None and platforms[-1] is None:
            # All platforms compute the same; what any of them can run is what can be counted.
            branches = branches[-1:]
        elif chosen is not None:
            branches = (branches[min(max(chosen, 0), len(branches) - 1)],)
        walks = []
        for branch in branches:
            walk = _Walk()
            walk.jaxpr(branch, frame._replace(known=values, live=live))
            walks.append(walk)
        heaviest = max(walks, key=lambda walk: _operation_count(walk.entries))
        self.entries += heaviest.entries
        # A branch may only look light because it could not be counted.
        for walk in walks:
            self.unknown += walk.unknown
            self.open_loops += walk.open_loops


def _live_equations(jaxpr: Any, live: tuple[bool, ...] | None) -> list[tuple[Any, tuple]]:
    """Equations whose results are used, each with which of its results are."""
    live = (True,) * len(jaxpr.outvars) if live is None else live
    results = (variable for variable, used in zip(jaxpr.outvars, live) if used)
    wanted = {variable for variable in results if not is_literal(variable)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        used = tuple(variable in wanted for variable in eqn.outvars)
        if any(used) or eqn.effects:
            kept.append((eqn, used))
            wanted.update(variable for variable in eqn.invars if not is_literal(variable))
    return kept[::-1]


def _constant(operands: Iterable[Any], constant: set) -> tuple[bool, ...]:
    return tuple(not is_literal(variable) and variable in constant for variable in operands)


def _body(eqn: Any) -> Any:
    """The inner jaxpr of a call, or None where it has none or several."""
    found = [value for value in eqn.params.values() if hasattr(value, "eqns")]
    return found[0] if len(found) == 1 else None


def _in_call(eqn: Any, frame: _Frame) -> _Frame:
    if eqn.primitive.name != "shard_map":
        return frame
    sizes = dict(eqn.params["mesh"].shape)
    manual = {axis: sizes[axis] for axis in eqn.params["newly_manual_axes"]}
    return frame._replace(
        calls=frame.calls * math.prod(manual.values()), axis_sizes=frame.axis_sizes | manual
    )


def _operation_count(entries: Iterable[Entry]) -> int:
    return sum(sum(entry.operations.values()) for entry in entries)


def _bytes(elements: Mapping[str, int]) -> int:
    return math.ceil(sum(count * item_size(dtype) for dtype, count in elements.items()))


def width_name(*bits: int) -> str:
    """In place of a dtype, for whole numbers of so many bits, or for two factors of a multiplication."""
    return "bits" + "x".join(map(str, bits))


def widths(dtype: str) -> tuple[int, ...]:
    """The bits that such a name tells, of one number or two; none where it is that of a dtype."""
    return tuple(map(int, dtype[4:].split("x"))) if dtype.startswith("bits") else ()


def item_size(dtype: str) -> float:
    """Bytes of one element; a PRNG key counts as its two 32-bit words, and bits are packed."""
    if bits := widths(dtype):
        return bits[0] / 8
    return 8 if dtype.startswith("key<") else np.dtype(dtype).itemsize
