"""Integer operands: exact sums, by the kernels for float32.

A float32 holds every whole number up to 2^24, and a sum of absolute differences never leaves the range
between zero and its end, nor does a CPU's sum of maxima leave 2^24, beyond which differences are summed. So
every kernel computes such sums of small integers exactly, in whatever order it adds, and integers need no
kernels of their own. GPUs and CPUs have instructions for bytes, so there are some.
"""

import numbers

import jax
import jax.numpy as jnp

DTYPES = ("int8", "uint8")
# Up to here float32 holds every whole number.
EXACT = 2**24


def take(
    function: str, operands: dict[str, jax.Array], terms: int, p: float | jax.Array
) -> list[jax.Array] | None:
    """The operands in float32 where they are integers, None where they are floating.

    Args:
      function: the public function, for messages.
      operands: the two, by the names of their arguments, in allowed dtypes.
      terms: in one sum.
      p: the exponent as it was given.

    Raises:
      TypeError: only one of them is an integer, or p is not 1.
      ValueError: there are more terms than are summed exactly, or nobody knows how many.
    """
    integer = {name: str(array.dtype) in DTYPES for name, array in operands.items()}
    if not any(integer.values()):
        return None
    described = " and ".join(f"{name} has dtype {array.dtype}" for name, array in operands.items())
    if not all(integer.values()):
        raise TypeError(
            f"{function}: {described}; integers meet integers only. Cast both to {' or '.join(DTYPES)}, on"
            " the same grid, or both to a floating dtype."
        )
    if not isinstance(p, numbers.Real) or isinstance(p, bool) or p != 1:
        raise TypeError(
            f"{function}: {described}; p other than 1 gives no whole numbers. Pass the Python number p=1, or"
            " floating operands."
        )
    limits = [jnp.iinfo(array.dtype) for array in operands.values()]
    furthest = int(max(limit.max for limit in limits)) - int(min(limit.min for limit in limits))
    allowed = f"{described}. At most {EXACT // furthest} terms are allowed"
    try:
        exact = terms * furthest <= EXACT
    except jax.errors.InconclusiveDimensionOperation as error:
        raise ValueError(
            f"{function}: sums of {terms} terms, a symbolic number, may be inexact: {allowed}. Bound it by a"
            f" constraint of jax.export.symbolic_shape, such as '{terms} <= 1024'."
        ) from error
    if not exact:
        raise ValueError(
            f"{function}: sums of {terms} terms of up to {furthest} can exceed 2^24, up to which they are"
            f" exact; {allowed}: cut the operands and add the parts."
        )
    return [array.astype(jnp.float32) for array in operands.values()]


def as_bytes(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both, of one dtype, as uint8 with the same differences: int8 is moved up by 128."""
    if x.dtype == jnp.uint8:
        return x, y
    x, y = (jax.lax.bitcast_convert_type(array, jnp.uint8) ^ jnp.uint8(128) for array in (x, y))
    return x, y
