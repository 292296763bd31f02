"""Integer operands: exact sums, by the kernels for float32.

A float32 holds every whole number up to 2^24, and a sum of absolute differences never leaves the range
between zero and its end. So every kernel computes such sums of small integers exactly, in whatever order it
adds, and integers need no kernels of their own.
"""

import jax
import jax.numpy as jnp

DTYPES = ("int8", "uint8")
_EXACT = 2**24


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
      ValueError: there are more terms than are summed exactly.
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
    if not isinstance(p, (int, float)) or p != 1:
        raise TypeError(
            f"{function}: {described}; p other than 1 gives no whole numbers. Pass p=1, or floating operands."
        )
    limits = [jnp.iinfo(array.dtype) for array in operands.values()]
    furthest = int(max(limit.max for limit in limits)) - int(min(limit.min for limit in limits))
    if terms * furthest > _EXACT:
        raise ValueError(
            f"{function}: sums of {terms} terms of up to {furthest} can exceed 2^24, up to which they are"
            f" exact; {described}. At most {_EXACT // furthest} terms are allowed: cut the operands and add"
            " the parts."
        )
    return [array.astype(jnp.float32) for array in operands.values()]
