"""Grids whose unit is a power of two, and the choice of one."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Grids that are tried: the finest that cuts nothing off, and this many finer ones.
_FINER = 4


def on_grid(values: jax.Array, exponent: int, bits: int) -> jax.Array:
    """Values of the grid 2^exponent * {-2^(bits - 1), ..., 2^(bits - 1) - 1} nearest to these.

    float32, in the shape of the values, which are of any floating dtype.
    """
    return rounded(values, exponent, bits) * 2.0**exponent


def rounded(values: jax.Array, exponent: int, bits: int) -> jax.Array:
    """The integers of these values, as `on_grid` takes and gives them: halves to even, and clipped."""
    largest = 2.0 ** (bits - 1)
    return jnp.clip(jnp.round(values.astype(jnp.float32) * 2.0**-exponent), -largest, largest - 1)


def best_exponent(bits: int, error: Callable[[int], float], *operands: jax.Array) -> tuple[int, float]:
    """The exponent with the least error, and the share of the operands that its grid cuts off.

    Args:
      bits: of the grid.
      error: what an exponent costs; asked of the coarsest that cuts nothing off and some finer ones.
      *operands: floating arrays of any shape that share the grid.

    Returns:
      The exponent, and a share from 0 to 1.

    Raises:
      ValueError: an operand is not finite.
    """
    if not all(bool(jnp.all(jnp.isfinite(array))) for array in operands):
        raise ValueError(
            "Weights or what meets them are not finite, so no grid holds them: the run has diverged. Export"
            " an earlier checkpoint, with --best."
        )
    largest = max(float(jnp.max(jnp.abs(array))) for array in operands)
    # Nothing but zeros is on every grid.
    coarsest = math.ceil(math.log2(largest / (2 ** (bits - 1) - 1))) if largest > 0 else 0
    exponent = min((coarsest - finer for finer in range(_FINER + 1)), key=error)
    end = (2 ** (bits - 1) - 0.5) * 2.0**exponent
    beyond = sum(float(jnp.sum((array >= end) | (array < -end - 2.0**exponent))) for array in operands)
    return exponent, beyond / sum(array.size for array in operands)
