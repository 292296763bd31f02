"""The definition, written directly: broadcasts the whole M x K x N product. For checks only."""

import jax
import jax.numpy as jnp

from adderflax.operators.rules import Rule, apply_rule


def forward(x: jax.Array, y: jax.Array) -> jax.Array:
    """-sum_k |x[..., m, k] - y[..., k, n]| in float32; x and y have equal batch dimensions."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return -jnp.sum(jnp.abs(x[..., :, :, None] - y[..., None, :, :]), axis=-2)


def gradient_x(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    """sum_n rule(y[..., k, n] - x[..., m, k]) g[..., m, n] in float32."""
    x, y, g = x.astype(jnp.float32), y.astype(jnp.float32), g.astype(jnp.float32)
    difference = y[..., None, :, :] - x[..., :, :, None]
    return jnp.sum(apply_rule(rule, difference) * g[..., :, None, :], axis=-1)


def gradient_y(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    """sum_m rule(x[..., m, k] - y[..., k, n]) g[..., m, n] in float32."""
    return gradient_x(y.mT, x.mT, g.mT, rule).mT
