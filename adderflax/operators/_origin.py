"""How far templates lie from the origin: what an adder layer adds to its outputs so that zero gives zero.

``sum_i |w_io|^p - sum_i |x_i - w_io|^p`` tells a token from the zero token. The first sum is one number an
output, the same for every token; without it each step that a template takes moves the output of all tokens
at once, by as much as the tokens differ from each other. Our choice, from no paper; what it does is measured
in results/gap_cifar10.md.
"""

from functools import partial

import jax
import jax.numpy as jnp

from adderflax.operators._power import apply_power_rule, canonical_power, magnitude_to
from adderflax.operators.rules import GradientRule, Rule, apply_rule, canonical_rule


def distance_from_origin(
    kernel: jax.Array, p: float | jax.Array = 1.0, grad_kernel: GradientRule = "full"
) -> jax.Array:
    """``sum_i |w_io|^p``, the templates' part of ``-sum_i |x_i - w_io|^p`` at x = 0 with the sign turned.

    The gradient is ``rule(w_io) g_o``, that of the operators for a row of zeros. With "full" it takes from
    the operator's ``dw = x^T g - w sum_m g`` the second part: what is left is the dense layer's gradient.

    Args:
      kernel: templates [..., features], of any floating dtype; every axis but the last is summed over.
      p: exponent of the distance, as in `adderflax.adder_matmul`.
      grad_kernel: gradient rule.

    Returns:
      float32 [features].

    Raises:
      ValueError: p or the rule is not allowed; the message names it.
      TypeError: p is no real number.
    """
    return _distance(kernel, canonical_power(p, None), canonical_rule(grad_kernel, "grad_kernel"))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _distance(kernel: jax.Array, exponent: tuple[jax.Array, ...], rule: Rule) -> jax.Array:
    return _sums(kernel, exponent)


def _sums(kernel, exponent):
    magnitude = jnp.abs(kernel.astype(jnp.float32))
    if exponent:
        magnitude = magnitude_to(magnitude, *exponent)
    return jnp.sum(magnitude, axis=tuple(range(kernel.ndim - 1)))


def _forward(kernel, exponent, rule):
    # Not `_distance`: in a derivative of the gradient this value has its own derivative, not the rule's.
    return _sums(kernel, exponent), (kernel, exponent)


def _backward(rule, residuals, g):
    kernel, exponent = residuals
    difference = kernel.astype(jnp.float32)
    slope = apply_power_rule(rule, difference, *exponent) if exponent else apply_rule(rule, difference)
    return (slope * jnp.broadcast_to(g, slope.shape)).astype(kernel.dtype), None


_distance.defvjp(_forward, _backward)
