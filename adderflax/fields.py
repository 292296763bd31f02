"""Checks of the fields with which layers and models are described."""

import dataclasses
import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from adderflax.operators.matmul import FLOATS
from adderflax.operators.rules import canonical_rule


def require_choice(name: str, value: Any, allowed: tuple) -> None:
    """Raises a ValueError that names the field and what is allowed, unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}.")


def require_flag(name: str, value: Any) -> None:
    """Raises a ValueError that names the field, unless `value` is True or False, of Python or of NumPy."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={value!r} must be True or False.")


def require_array(taker: str, name: str, value: Any) -> None:
    """Raises a TypeError that names both, unless `value` is an array."""
    if not (hasattr(value, "ndim") and hasattr(value, "dtype")):
        raise TypeError(f"{taker} takes an array of {name}, but got {value!r}.")


def require_floating(name: str, value: Any) -> None:
    """Raises a ValueError that names the field, unless `value` is None or one of an adder layer's dtypes."""
    try:
        known = value is None or jnp.dtype(value).name in FLOATS
    except TypeError:
        known = False
    if not known:
        raise ValueError(
            f"{name}={value!r} is no dtype of an adder layer; choose one of {', '.join(FLOATS)}, as"
            f" {name}=jnp.bfloat16."
        )


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number, 1 or more; True and 3.0 are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1


def require_count(name: str, value: Any) -> None:
    """Raises a ValueError that names the field, unless `value` is a whole number, 1 or more."""
    if not is_count(value):
        raise ValueError(f"{name}={value!r} must be a whole number, at least 1.")


def settle_rules(description: Any, *names: str) -> None:
    """Raises a ValueError unless these fields of a frozen dataclass are gradient rules; makes them hashable.

    A file has lists where code has tuples.
    """
    for name in names:
        canonical_rule(getattr(description, name), name)
        if isinstance(getattr(description, name), list):
            object.__setattr__(description, name, tuple(getattr(description, name)))


def settle_dtype(description: Any, allowed: tuple[str, ...]) -> None:
    """Raises a ValueError unless `dtype` of a frozen dataclass is allowed; gives `jnp.bfloat16` its name."""
    if not isinstance(description.dtype, (str, type(None))):
        try:
            object.__setattr__(description, "dtype", np.dtype(description.dtype).name)
        except TypeError:
            pass  # it is no dtype at all, and told as it was given
    require_choice("dtype", description.dtype, allowed)


def require_pair(name: str, value: Any, allowed: str = "a pair of whole numbers, 1 or more") -> None:
    """Raises a ValueError that names the field, unless `value` is two whole numbers, each 1 or more."""
    if not hasattr(value, "__len__") or len(value) != 2 or not all(map(is_count, value)):
        raise ValueError(f"{name}={value!r} must be {allowed}, for height and width, as (3, 3).")


def is_finite(value: Any) -> bool:
    """Whether `value` is a real number, neither infinite nor NaN; True is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def require_known(described: type, names: Iterable[str]) -> None:
    """Raises a ValueError that lists the fields of a dataclass, unless all of these names are among them."""
    known = {field.name for field in dataclasses.fields(described)}
    if unknown := sorted(set(names) - known):
        raise ValueError(
            f"Unknown model field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}."
        )
