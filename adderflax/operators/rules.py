"""Surrogate gradient rules of the L1 distance.

The derivative of -|x - w| is a sign, which says nothing about how far apart x and w are.
Adder networks therefore replace it by a function of the difference d:

* "full": d, the gradient of the squared distance (half of it), AdderNet's rule for weights;
* "hardtanh": clip(d, -1, 1), AdderNet's rule for inputs;
* ("hardtanh", slope), or "hardtanh:SLOPE": clip(slope * d, -1, 1);
* "sign": sign(d), the true derivative;
* a function of d, elementwise: a rule of your own, which XLA's operations compute; or its name,
  "MODULE:FUNCTION", for a configuration.
"""

import functools
import importlib
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GradientRule = str | tuple[Literal["hardtanh"], float] | Callable[[jax.Array], jax.Array]

ALLOWED_RULES = (
    '"full", "hardtanh", "sign", with a slope ("hardtanh", 4.0) or "hardtanh:4", and a function of the'
    ' difference, elementwise, or its name "MODULE:FUNCTION"'
)
_SEVERAL, _ONE = ((2, 3), jnp.dtype("float32")), ((1, 1), jnp.dtype("float32"))  # differences to try
_SLOPES = (1e-30, 1e30)  # both a slope and its inverse are normal float32 numbers


class Rule(NamedTuple):
    """A gradient rule in canonical, hashable form.

    Attributes:
        kind: "full", "hardtanh", "sign", or a function of the difference.
        slope: factor before the clip of "hardtanh"; 1.0 for the other kinds.
    """

    kind: str | Callable[[jax.Array], jax.Array]
    slope: float = 1.0


def canonical_rule(rule: GradientRule, argument: str) -> Rule:
    """Checks a rule as users write it and returns its canonical form.

    Args:
        rule: "full", "hardtanh", "sign", ("hardtanh", slope), "hardtanh:SLOPE", a function, or
            "MODULE:FUNCTION" for one that is imported.
        argument: name of the argument that carried it, for the error message.

    Raises:
        ValueError: the rule is none of those, its slope is not a number from 1e-30 to 1e30, or the
            function cannot be imported, is not hashable or, tried on a few numbers, not elementwise on
            float32.
    """
    if isinstance(rule, Rule):
        rule = rule.kind if rule.slope == 1.0 else (rule.kind, rule.slope)
    if isinstance(rule, str) and ":" in rule and not rule.startswith("hardtanh:"):
        rule = _imported(rule, argument)
    if callable(rule):
        _check_function(rule, argument)
        return Rule(rule)
    if isinstance(rule, str):
        if rule in ("full", "hardtanh", "sign"):
            return Rule(rule)
        kind, colon, slope = rule.partition(":")
        if kind == "hardtanh" and colon:
            rule = (kind, _number(slope))
    if isinstance(rule, (tuple, list)) and len(rule) == 2 and rule[0] == "hardtanh":
        slope = rule[1]
        if isinstance(slope, numbers.Real) and not isinstance(slope, bool):
            if _SLOPES[0] <= slope <= _SLOPES[1]:
                return Rule("hardtanh", float(slope))
        raise ValueError(
            f'{argument}: the slope of ("hardtanh", slope) must be a number from '
            f"{_SLOPES[0]:g} to {_SLOPES[1]:g}, got {slope!r}."
        )
    raise ValueError(f"{argument}: unknown gradient rule {rule!r}; allowed are {ALLOWED_RULES}.")


def _imported(name: str, argument: str) -> Callable[[jax.Array], jax.Array]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # of a module that is not ours
        raise ValueError(
            f"{argument}: the gradient rule {name!r} cannot be imported, {type(error).__name__}: {error}. It"
            " names a function in a Python module; put the module's directory on PYTHONPATH. Allowed are"
            f" {ALLOWED_RULES}."
        ) from error
    if not callable(found):
        raise ValueError(f"{argument}: the gradient rule {name!r} is no function, but {found!r}.")
    return found


def _check_function(rule: Callable[[jax.Array], jax.Array], argument: str) -> None:
    try:
        traced, found, alone = _tried(rule)
    except Exception as error:  # of a function that is not ours
        raise ValueError(
            f"{argument}: the gradient rule {rule!r} is to be a hashable function of an array of differences,"
            f" elementwise, by JAX's operations, which can be traced as NumPy's cannot; it failed with"
            f" {type(error).__name__}: {error}"
        ) from error
    if getattr(found, "shape", None) == _SEVERAL[0] and found.dtype == jnp.float64:
        raise ValueError(
            f"{argument}: the gradient rule {rule!r} gave float64 of differences float32, as a NumPy number"
            " does under jax_enable_x64. Use Python's numbers, or return its result with .astype(d.dtype)."
        )
    for differences, result in ((_SEVERAL, traced), (_SEVERAL, found), *((_ONE, one) for one in alone)):
        if (getattr(result, "shape", None), getattr(result, "dtype", None)) != differences:
            gave = f"{result.dtype} {list(result.shape)}" if hasattr(result, "dtype") else repr(result)
            raise ValueError(
                f"{argument}: the gradient rule {rule!r} is to be elementwise: of differences float32"
                f" {list(differences[0])} it gave {gave}. Return an array of their shape and dtype."
            )
    found, alone = np.ravel(found), np.ravel(alone)
    if not np.allclose(found, alone, rtol=1e-4, atol=1e-6, equal_nan=True):
        raise ValueError(
            f"{argument}: the gradient rule {rule!r} is to be elementwise: of each difference alone it gave"
            f" {alone}, of the same ones together {found}."
        )


@functools.lru_cache(maxsize=256)
def _tried(rule: Callable[[jax.Array], jax.Array]) -> tuple[Any, Any, list]:
    """The rule of six differences traced, of the same together, and of each alone."""
    traced = jax.eval_shape(lambda difference: rule(difference), jax.ShapeDtypeStruct(*_SEVERAL))
    with jax.ensure_compile_time_eval():
        differences = jnp.linspace(-1.7, 2.1, 6, dtype=jnp.float32).reshape(2, 3)
        found = rule(differences)
        alone = [rule(differences[i : i + 1, k : k + 1]) for i in range(2) for k in range(3)]
    return traced, found, alone


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def apply_rule(rule: Rule, difference: jax.Array) -> jax.Array:
    """Applies a rule elementwise to a difference of two operands."""
    if rule.kind == "full":
        return difference
    if rule.kind == "sign":
        return jnp.sign(difference)
    if callable(rule.kind):
        return rule.kind(difference)
    if rule.slope != 1.0:
        difference = difference * jnp.asarray(rule.slope, difference.dtype)
    return jnp.clip(difference, -1.0, 1.0)
