"""The generalized distance -sum |x - y|^p for p from 1 to 2, in blocks, and its gradient rules.

Operands are as for the L1 implementations: x [M, K], y [K, N] or x [B, M, K], y [B, K, N]; p is a
float32 scalar. Results are float32.
"""

import numbers

import jax
import jax.numpy as jnp

from adderflax.operators import _xla
from adderflax.operators.rules import Rule, apply_rule

IMPLEMENTATION = "xla"


def canonical_power(p: float | jax.Array, implementation: str | None) -> tuple[jax.Array, ...]:
    """Checks the argument p; returns () for the Python number 1, otherwise (p,) as float32.

    A Python number other than 1 becomes an array too, so that one program serves all of them.

    Args:
        p: a Python number from 1 to 2, or a scalar array of any real type, which is clipped to that range.
        implementation: the implementation asked for.

    Raises:
        TypeError: p is not a real number.
        ValueError: p is a number out of range or not a scalar, or the implementation is one that
            only computes p = 1.
    """
    if isinstance(p, numbers.Real) and not isinstance(p, bool):
        if not 1.0 <= p <= 2.0:
            raise ValueError(f"p={p!r} must lie from 1, the L1 distance, to 2, the squared distance.")
        if p == 1.0:
            return ()
    elif not any(jnp.issubdtype(getattr(p, "dtype", bool), kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"p must be a Python number or a scalar array of numbers, got {p!r}.")
    if jnp.shape(p) != ():
        raise ValueError(f"p has shape {jnp.shape(p)}; it needs the shape (), one exponent for all.")
    if implementation not in (None, IMPLEMENTATION):
        raise ValueError(
            f"implementation: {implementation!r} computes p=1.0 only; with another p choose None or "
            f"{IMPLEMENTATION!r}."
        )
    return (jnp.clip(jnp.asarray(p, jnp.float32), 1.0, 2.0),)


def _excess(magnitude: jax.Array, p: jax.Array) -> jax.Array:
    """magnitude^(p - 1), finite at 0; exactly 1 at p = 1, of an infinite magnitude too.

    Through exp and log, which XLA vectorizes on a CPU, where `pow` takes 3 to 4 times as long.
    """
    float32 = jnp.finfo(jnp.float32)
    return jnp.exp((p - 1.0) * jnp.log(jnp.clip(magnitude, float32.tiny, float32.max)))


def magnitude_to(magnitude: jax.Array, p: jax.Array) -> jax.Array:
    """magnitude^p, exactly the magnitude at p = 1."""
    return magnitude * _excess(magnitude, p)


def apply_power_rule(rule: Rule, difference: jax.Array, p: jax.Array) -> jax.Array:
    """The gradient rule at p: see `adderflax.adder_matmul`."""
    derivative = p * jnp.sign(difference) * _excess(jnp.abs(difference), p)
    if rule.kind == "sign":
        return derivative
    return (2.0 - p) * apply_rule(rule, difference) + (p - 1.0) * derivative


def forward(x: jax.Array, y: jax.Array, p: jax.Array) -> jax.Array:
    """-sum_k |x[..., m, k] - y[..., k, n]|^p."""

    def distance(difference):
        return magnitude_to(jnp.abs(difference), p)

    if _xla.blockable(x, y):
        return _xla.blocked_forward(x, y, distance)
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return -jnp.sum(distance(x[..., :, :, None] - y[..., None, :, :]), axis=-2)


def gradient_x(x: jax.Array, y: jax.Array, g: jax.Array, p: jax.Array, rule: Rule) -> jax.Array:
    """sum_n rule_p(y[..., k, n] - x[..., m, k]) g[..., m, n]."""

    def weighted(difference, g):
        return apply_power_rule(rule, difference, p) * g

    if _xla.blockable(x, y):
        return _xla.blocked_gradient_x(x, y, g, lambda g: (weighted, g))
    x, y, g = x.astype(jnp.float32), y.astype(jnp.float32), g.astype(jnp.float32)
    difference = y[..., None, :, :] - x[..., :, :, None]
    return jnp.sum(weighted(difference, g[..., :, None, :]), axis=-1)


def gradient_y(x: jax.Array, y: jax.Array, g: jax.Array, p: jax.Array, rule: Rule) -> jax.Array:
    """sum_m rule_p(x[..., m, k] - y[..., k, n]) g[..., m, n]."""
    return gradient_x(y.mT, x.mT, g.mT, p, rule).mT
