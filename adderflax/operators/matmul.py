"""adder_matmul: the L1 counterpart of a matrix product, with surrogate gradients."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adderflax.operators._dispatch import (
    check_accepts,
    check_implementation,
    dispatch,
    forward_spec,
    logging_enabled,
    with_automatic_axes,
)
from adderflax.operators.rules import GradientRule, Rule, canonical_rule

_DTYPES = ("float32", "bfloat16", "float16")


class _Plan(NamedTuple):
    """The static part of a call: hashable, so that jit keys its cache on it."""

    rule_x: Rule
    rule_y: Rule
    implementation: str | None
    log: bool


def adder_matmul(
    x: jax.Array,
    y: jax.Array,
    *,
    grad_x: GradientRule = "hardtanh",
    grad_y: GradientRule = "full",
    implementation: str | None = None,
) -> jax.Array:
    """Negative L1 distances between the rows of x and the columns of y.

    out[..., m, n] = -sum_k |x[..., m, k] - y[..., k, n]|, accumulated in float32: the adder
    layer of AdderNet (Chen et al., CVPR 2020) as a matrix product. The backward pass replaces
    the derivative by surrogate rules of the difference; with g the cotangent,

        dx[m, k] = sum_n rule(y[k, n] - x[m, k]) g[m, n]
        dy[k, n] = sum_m rule(x[m, k] - y[k, n]) g[m, n]

    A "full" gradient is a plain matrix product, dy = x^T g - y * sum_m g, and likewise dx.

    Args:
        x: [..., M, K], float32, bfloat16 or float16.
        y: [..., K, N], likewise; batch dimensions broadcast as in `jnp.matmul`.
        grad_x: rule for x: "full", "hardtanh", ("hardtanh", slope) or "sign".
        grad_y: rule for y, likewise.
        implementation: a name in `available_implementations()`, used as given, or None to
            choose by the platform for which the program is lowered.

    Returns:
        float32 [..., M, N]. Gradients have the dtypes of x and y.

    Raises:
        TypeError: an operand is not an array or has another dtype.
        ValueError: rank below 2, mismatched K or batch dimensions, an unknown rule or
            implementation, or an implementation that does not take these operands.
    """
    x, y = _check_operand(x, "x"), _check_operand(y, "y")
    if x.shape[-1] != y.shape[-2]:
        raise ValueError(
            f"adder_matmul: x has shape {x.shape} and y has shape {y.shape}, but the last axis of "
            f"x and the second last of y must have equal length: y needs the shape "
            f"[..., {x.shape[-1]}, N], or x the shape [..., M, {y.shape[-2]}]."
        )
    rule_x, rule_y = canonical_rule(grad_x, "grad_x"), canonical_rule(grad_y, "grad_y")
    plan = _Plan(rule_x, rule_y, check_implementation(implementation), logging_enabled())
    _check_batch(x, y)
    check_accepts(implementation, x, y)
    return _adder_matmul(*_match_varying(x, y), plan)


def check_float(array: jax.Array, argument: str, function: str) -> jax.Array:
    """Returns the argument as a JAX array, or raises a TypeError that names it."""
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        raise TypeError(
            f"{function}: {argument} must be an array, got {type(array).__name__}; convert it "
            f"with jnp.asarray({argument}, jnp.float32)."
        )
    if str(array.dtype) not in _DTYPES:
        raise TypeError(
            f"{function}: {argument} has dtype {array.dtype}; allowed are {', '.join(_DTYPES)}. "
            f"Cast it first: {argument}.astype(jnp.float32)."
        )
    return jnp.asarray(array)


def _check_operand(operand: jax.Array, argument: str) -> jax.Array:
    operand = check_float(operand, argument, "adder_matmul")
    if operand.ndim < 2:
        layout, remedy = {"x": ("M, K", "None, :"), "y": ("K, N", ":, None")}[argument]
        raise ValueError(
            f"adder_matmul: {argument} has shape {operand.shape}; it needs at least two axes, "
            f"[..., {layout}]. Add one, for example with {argument}[{remedy}]."
        )
    return operand


def _check_batch(x: jax.Array, y: jax.Array) -> None:
    try:
        jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except ValueError as error:
        raise ValueError(
            f"adder_matmul: the batch dimensions of x {x.shape} and y {y.shape} do not broadcast: "
            f"{x.shape[:-2]} and {y.shape[:-2]} must be equal or 1, axis by axis from the right."
        ) from error


def _match_varying(*arrays: jax.Array) -> list[jax.Array]:
    """Makes all arrays vary over the same shard_map axes.

    Outside of the custom gradient, so that autodiff adds the psum over the axes on which an
    operand, typically a weight, is replicated.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset().union(*varying)
    return [
        lax.pcast(array, tuple(sorted(union - axes)), to="varying") if union - axes else array
        for array, axes in zip(arrays, varying)
    ]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _adder_matmul(x: jax.Array, y: jax.Array, plan: _Plan) -> jax.Array:
    return _forward_call(x, y, implementation=plan.implementation, log=plan.log)


def _adder_matmul_fwd(x, y, plan):
    return _forward_call(x, y, implementation=plan.implementation, log=plan.log), (x, y)


def _adder_matmul_bwd(plan, residuals, g):
    static = {"implementation": plan.implementation, "log": plan.log}
    dx = _gradient_x_call(*residuals, g, rule=plan.rule_x, **static)
    dy = _gradient_y_call(*residuals, g, rule=plan.rule_y, **static)
    return dx, dy


_adder_matmul.defvjp(_adder_matmul_fwd, _adder_matmul_bwd)


def _forward(x, y, *, implementation, log):
    """[..., M, N] in float32."""
    batch = jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    shape = (*batch, x.shape[-2], y.shape[-1])
    x, y = _expand(x, y)
    if x.ndim == 2 and y.ndim > 2:
        # The same rows meet every entry of the batch: these are rows of the transposed problem.
        flipped = dispatch("forward", (_fold_rows(_transpose(y)), _transpose(x)), (), implementation, log)
        return _transpose(flipped.reshape(*batch, shape[-1], shape[-2]))
    x = _fold_rows(x) if y.ndim == 2 else _fold_batch(x)
    return dispatch("forward", (x, _fold_batch(y)), (), implementation, log).reshape(shape)


def _gradient_x(x, y, g, *, rule, implementation, log):
    """sum_n rule(y - x) g in the shape and dtype of x."""
    shape, dtype = x.shape, x.dtype
    x, y = _expand(x, y)
    expanded = x.shape
    if y.ndim == 2:
        x, g = _fold_rows(x), _fold_rows(g)
    elif x.ndim == 2:
        y, g = _fold_columns(y), _fold_columns(g)
    if rule.kind == "full":
        dx = _full_gradient(x, _transpose(y), g)
    else:
        operands = tuple(_fold_batch(array) for array in (x, y, g))
        dx = dispatch("gradient_x", operands, (rule,), implementation, log)
    return _unbroadcast(dx.reshape(expanded), shape).astype(dtype)


def _gradient_y(x, y, g, *, rule, implementation, log):
    """sum_m rule(x - y) g in the shape and dtype of y."""
    shape, dtype = y.shape, y.dtype
    x, y = _expand(x, y)
    expanded = y.shape
    if x.ndim == 2 and y.ndim > 2:
        flipped = (_transpose(array) for array in (y, x, g))
        dy = _gradient_x(*flipped, rule=rule, implementation=implementation, log=log)
        return _transpose(dy).reshape(shape)
    if y.ndim == 2:
        x, g = _fold_rows(x), _fold_rows(g)
    if rule.kind == "full":
        dy = _transpose(_full_gradient(_transpose(y), x, _transpose(g)))
    else:
        operands = tuple(_fold_batch(array) for array in (x, y, g))
        dy = dispatch("gradient_y", operands, (rule,), implementation, log)
    return _unbroadcast(dy.reshape(expanded), shape).astype(dtype)


def _full_gradient(rows, other_rows, g):
    """sum_n (other_rows[n] - rows[m]) g[m, n] as a product: g @ other_rows - rows * sum_n g."""
    rows, other_rows = rows.astype(jnp.float32), other_rows.astype(jnp.float32)
    product = jnp.matmul(g, other_rows, precision=lax.Precision.HIGHEST)
    return product - rows * jnp.sum(g, axis=-1, keepdims=True)


def _expand(x, y):
    """Brings both to equal batch dimensions, or leaves one of them without any.

    A side that is the same for the whole batch is not copied: the other side's batch is folded
    into its rows or columns.
    """
    batch = jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])

    def constant(array):
        return array.shape[:-2] != batch and all(size == 1 for size in array.shape[:-2])

    def full(array):
        return jnp.broadcast_to(array, batch + array.shape[-2:])

    if constant(y):
        return full(x), y.reshape(y.shape[-2:])
    return x.reshape(x.shape[-2:]) if constant(x) else full(x), full(y)


def _unbroadcast(gradient, shape):
    """Sums over the batch dimensions along which an operand of this shape was broadcast."""
    extra = gradient.ndim - len(shape)
    axes = [i for i, size in enumerate(shape) if extra >= 0 and size != gradient.shape[extra + i]]
    axes = (*range(extra), *(extra + axis for axis in axes))
    return jnp.sum(gradient, axes).reshape(shape)


def _transpose(array):
    return jnp.swapaxes(array, -1, -2)


def _fold_rows(array):
    """[..., R, C] -> [prod(...) R, C]."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def _fold_columns(array):
    """[..., R, C] -> [R, prod(...) C]."""
    return _transpose(_fold_rows(_transpose(array)))


def _fold_batch(array):
    """Rank 2 as it is, otherwise [..., R, C] -> [prod(...), R, C]."""
    if array.ndim == 2:
        return array
    return array.reshape(math.prod(array.shape[:-2]), *array.shape[-2:])


def _named_call(function, name, static, result_spec):
    wrapped = with_automatic_axes(function, result_spec)
    wrapped.__name__ = wrapped.__qualname__ = name
    return jax.jit(wrapped, static_argnames=static)


# A walker of jaxprs recognises the operator by the names of these calls, whichever
# implementation runs; operands and results are the public ones.
_STATIC = ("implementation", "log")
_forward_call = _named_call(_forward, "adder_matmul", _STATIC, forward_spec)
_gradient_x_call = _named_call(_gradient_x, "adder_matmul_gradient_x", ("rule", *_STATIC), lambda x, y, g: x)
_gradient_y_call = _named_call(_gradient_y, "adder_matmul_gradient_y", ("rule", *_STATIC), lambda x, y, g: y)
