"""Adder operators, recognized by the stable names of their calls.

`adderflax.operators` runs every operator inside a call named after it, with the public operands.
Its cost follows from the definition, -sum |x - w|, whatever is inside: for each term one
subtraction and one absolute value in the operands' type, and one addition to the sum in the
result's.

A backward call computes sum rule(difference) g: for each term one subtraction, two comparisons
(a clip to -1..1, or a sign), one multiplication by g, and one addition. The slope of a
HardTanh rule multiplies g once beforehand, for all terms, and is left out. The rule "full" is a
matrix product in every implementation, so its body is counted as it is.
"""

import math
from collections import Counter
from typing import Any

from adderflax.analysis.loops import opened
from adderflax.analysis.primitives import ADDER, Cost, size

# What one term costs, by whose type it is in; the addition in the result's type is the one to the sum.
_TERM = {"operands": (("add", 1), ("absolute", 1)), "result": (("add", 1),)}
_GRADIENT_TERM = {"operands": (("add", 1), ("compare", 2)), "result": (("multiply", 1), ("add", 1))}
_GRADIENT = "_gradient"


def name_of(eqn: Any) -> str:
    """The name of a call, or an empty string."""
    return str(eqn.params.get("name", ""))


def recognize(eqn: Any) -> Cost | None:
    """The cost of an adder operator's call, or None where the equation is something else."""
    operator, gradient, _ = name_of(eqn).partition(_GRADIENT)
    if operator not in _TERMS_OF_ONE or "jaxpr" not in eqn.params:
        return None
    if len(eqn.invars) != (3 if gradient else 2) or len(eqn.outvars) != 1:
        return None
    if gradient and _contains(eqn.params["jaxpr"], ("dot_general", "conv_general_dilated")):
        return None
    x, w = (operand.aval for operand in eqn.invars[:2])
    # The cotangent has the shape of the operator's result.
    result = eqn.invars[2].aval if gradient else eqn.outvars[0].aval
    terms = _TERMS_OF_ONE[operator](x.shape, w.shape, result.shape)
    if terms is None:
        return None
    elements = size(result) * terms
    unit = _GRADIENT_TERM if gradient else _TERM
    wider = max(x.dtype, w.dtype, key=lambda dtype: dtype.itemsize)
    types = {"operands": str(wider), "result": str(result.dtype)}
    counts = Counter()
    for where, operations in unit.items():
        counts.update({(name, types[where]): number * elements for name, number in operations})
    return Cost(ADDER, dict(counts), elements, types["result"])


def _matmul_terms(x: tuple, y: tuple, result: tuple) -> int | None:
    """K of x [..., M, K], y [..., K, N] and result [..., M, N].

    `vmap` may have put its axis anywhere, so K is a length for which all three fit together. More
    than one does only in odd cases; the public layout is tried first.
    """
    if len(x) < 2 or len(y) < 2:
        return None
    if x[-1] == y[-2] and _fits(x, y, result, x[-1]):
        return x[-1]
    return next((length for length in x if _fits(x, y, result, length)), None)


def _fits(x: tuple, y: tuple, result: tuple, length: int) -> bool:
    """Whether x and y without an axis of this length can give the result: a batch, M and N."""
    if length not in x or length not in y:
        return False
    rest_x, rest_y = Counter(x) - Counter([length]), Counter(y) - Counter([length])
    for m in rest_x:
        for n in rest_y:
            if Counter((m, n)) - Counter(result):
                continue
            batch = Counter(result) - Counter((m, n))
            batches = [rest - Counter([one]) for rest, one in ((rest_x, m), (rest_y, n))]
            # An operand's batch is part of the result's, but for axes of length 1.
            if all(not _long_axes(part - batch) for part in batches) and not _long_axes(
                batch - (batches[0] | batches[1])
            ):
                return True
    return False


def _long_axes(axes: Counter) -> int:
    """Number of axes longer than 1."""
    return sum(count for length, count in axes.items() if length != 1)


def _conv_terms(x: tuple, kernel: tuple, result: tuple) -> int | None:
    """Kernel positions times input channels of a group: kernel [height, width, in, out].

    A kernel with an axis from `vmap` is not recognized; the `adder_matmul` calls inside are.
    """
    return math.prod(kernel[:-1]) if len(kernel) == 4 else None


_TERMS_OF_ONE = {"adder_matmul": _matmul_terms, "adder_conv": _conv_terms}


def _contains(jaxpr: Any, names: tuple[str, ...]) -> bool:
    for eqn in opened(jaxpr).eqns:
        if eqn.primitive.name in names:
            return True
        for parameter in eqn.params.values():
            inner = parameter if isinstance(parameter, (tuple, list)) else (parameter,)
            if any(hasattr(part, "eqns") and _contains(part, names) for part in inner):
                return True
    return False
