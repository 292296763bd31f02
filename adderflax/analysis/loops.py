"""How often a `while_loop` turns, where the program itself says so."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adderflax.analysis.primitives import is_literal

_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "ne": "ne"}


def opened(jaxpr: Any) -> Any:
    """The jaxpr without its constants: inner jaxprs come closed or open, by version of JAX."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def known_arguments(jaxpr: Any, values: tuple[int | None, ...]) -> dict[Any, int]:
    """Variables of a jaxpr whose values are known integers.

    Args:
        jaxpr: closed or open.
        values: what is known of its arguments; may be shorter.
    """
    inner = opened(jaxpr)
    pairs = [*zip(inner.invars, values), *zip(inner.constvars, getattr(jaxpr, "consts", ()))]
    known = {variable: _integer(value) for variable, value in pairs}
    return {variable: value for variable, value in known.items() if value is not None}


def value(operand: Any, known: Mapping[Any, int]) -> int | None:
    """The value of an operand of an equation, where it is a known integer."""
    return _integer(operand.val) if is_literal(operand) else known.get(operand)


def while_turns(eqn: Any, known: Mapping[Any, int]) -> int | None:
    """The number of turns of a `while` equation, or None.

    Known are loops whose condition compares an integer counter, to which the body adds a fixed
    step, with a fixed bound.
    """
    cond, body = opened(eqn.params["cond_jaxpr"]), opened(eqn.params["body_jaxpr"])
    cond_consts, body_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    start = eqn.invars[cond_consts + body_consts :]
    test = _definition(cond, cond.outvars[0])
    if test is None or test.primitive.name not in _MIRRORED:
        return None

    def carried(operand):
        """(position in the carry, or None; fixed value, or None) of an operand of the test."""
        if is_literal(operand):
            return None, _integer(operand.val)
        if operand not in cond.invars:
            return None, None
        position = cond.invars.index(operand)
        if position < cond_consts:
            return None, value(eqn.invars[position], known)
        position -= cond_consts
        unchanged = body.outvars[position] is body.invars[body_consts + position]
        return position, value(start[position], known) if unchanged else None

    comparison = test.primitive.name
    (position, fixed), (other_position, bound) = map(carried, test.invars)
    if fixed is not None:
        position, bound, comparison = other_position, fixed, _MIRRORED[comparison]
    if position is None or bound is None:
        return None
    first = value(start[position], known)
    step = _step(body, body.outvars[position], body.invars[body_consts + position])
    if first is None or step is None:
        return None
    return _turns(comparison, first, bound, step)


def _turns(comparison: str, first: int, bound: int, step: int) -> int | None:
    if comparison in ("gt", "ge"):
        first, bound, step, comparison = -first, -bound, -step, _MIRRORED[comparison]
    if comparison == "ne":
        exact = step != 0 and (bound - first) % step == 0 and (bound - first) // step >= 0
        return (bound - first) // step if exact else None
    bound += comparison == "le"
    if first >= bound:
        return 0
    return -((first - bound) // step) if step > 0 else None


def _step(body: Any, result: Any, argument: Any) -> int | None:
    eqn = _definition(body, result)
    if eqn is None or eqn.primitive.name not in ("add", "sub"):
        return None
    left, right = eqn.invars
    if left is argument and is_literal(right):
        step = _integer(right.val)
        return step if step is None or eqn.primitive.name == "add" else -step
    if right is argument and is_literal(left) and eqn.primitive.name == "add":
        return _integer(left.val)
    return None


def _definition(jaxpr: Any, variable: Any) -> Any:
    return next((eqn for eqn in jaxpr.eqns if any(v is variable for v in eqn.outvars)), None)


def _integer(number: Any) -> int | None:
    if number is None or np.ndim(number) != 0:
        return None
    dtype = getattr(number, "dtype", None) or np.asarray(number).dtype
    return int(number) if np.issubdtype(dtype, np.integer) else None
