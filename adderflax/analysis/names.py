"""Module paths from the name stacks of equations."""

import re
from typing import Any

_TRANSFORM = re.compile(r"^\w+\((.*)\)$")
# Scopes that JAX adds, not the user's modules.
_ADDED = frozenset(("", "rematted_computation", "checkpoint"))


def scopes(name_stack: Any) -> list[tuple[str, bool]]:
    """The names in a name stack and whether a transformation was written around each.

    Differentiation writes "transpose(jvp(Model))/layer": the names are Model and layer.
    """
    found = []
    for part in str(name_stack).split("/"):
        name = part
        while match := _TRANSFORM.match(name):
            name = match.group(1)
        # jnp.einsum writes its equation, such as "mk,kn->mn".
        if name not in _ADDED and "->" not in name:
            found.append((name, name != part))
    return found


def join(path: str, names: list[tuple[str, bool]]) -> str:
    """A path with further names behind it.

    Each transformation starts the stack anew, so a transformed name that stands there already
    is not repeated.
    """
    parts = path.split("/") if path else []
    for name, transformed in names:
        if not (transformed and parts and parts[-1] == name):
            parts.append(name)
    return "/".join(parts)
