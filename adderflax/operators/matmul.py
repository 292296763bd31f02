"""adder_matmul: the L1 counterpart of a matrix product, with surrogate gradients."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from adderflax.operators import _integer, _power
from adderflax.operators._dispatch import (
    announce,
    check_accepts,
    check_implementation,
    dispatch,
    forward_spec,
    logging_enabled,
    sums_bytes,
    with_automatic_axes,
)
from adderflax.operators.rules import GradientRule, Rule, canonical_rule

FLOATS = ("float32", "bfloat16", "float16")
NUMBERS = (*FLOATS, *_integer.DTYPES)


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
    p: float | jax.Array = 1.0,
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

    With p other than 1 the sum is of |x[m, k] - y[k, n]|^p: training may anneal p from 2, where the
    layer is a matrix product in disguise, down to 1 (Chen et al., Universal Adder Neural Networks,
    2021). The rule at p blends the surrogate with the derivative of |d|^p,

        rule_p(d) = (2 - p) rule(d) + (p - 1) p |d|^(p - 1) sign(d)

    so that p = 2 trains by the true gradient 2 d, the trained layer at p = 1 by today's rules, and
    nothing jumps in between. "sign" stands for the true derivative, so at p it is that of |d|^p alone,
    p |d|^(p - 1) sign(d), whose end is sign(d). The blend is this project's choice. p itself gets
    no gradient.

    Derivatives of the gradients, as in a gradient penalty, are those of these formulas, by XLA's
    operations on every platform; their Jacobian is not symmetric, as a Hessian is. They need reverse
    mode first, `jax.grad` inside `jax.jvp` or `jax.grad`: a surrogate gradient has no forward mode, and
    `jax.jvp` of the operator raises.

    Integers, as hardware has them, are summed exactly, by the same kernels, and have no gradient.
    Two implementations sum int8, or uint8, by kernels of their own: "cpu", and "gpu", four terms an
    instruction, which have been emulated and compiled, but have not run on a GPU yet. None chooses neither.

    implementation="cpu" is C++, which the machine's own compiler builds at the first use, in some seconds;
    it is kept in the user's folder of caches, or in that named in the environment variable
    ADDERFLAX_CACHE_DIR.

    Args:
        x: [..., M, K], float32, bfloat16 or float16; or int8 or uint8, where both operands are.
        y: [..., K, N], likewise; batch dimensions broadcast as in `jnp.matmul`.
        p: exponent of the distance, from 1 to 2. The Python number 1 selects the kernels for the L1
            distance. Any other number or a scalar array, which may be traced and is clipped to 1..2,
            selects a slower XLA form, one compiled program for all p.
        grad_x: rule for x: "full", "hardtanh", ("hardtanh", slope), "sign", or a function of the
            difference, elementwise, for which XLA's operations compute the gradient on every platform.
            Functions are compared by identity: a new lambda at each call compiles anew.
        grad_y: rule for y, likewise.
        implementation: a name in `available_implementations()`, used as given, but for the gradient of a
            rule that is a function; or None to choose by the platform for which the program is lowered.

    Returns:
        float32 [..., M, N], int32 for integers. Gradients have the dtypes of x and y.

    Raises:
        TypeError: an operand is not an array or has another dtype, or integers meet floating operands
            or a p other than 1.
        ValueError: rank below 2, mismatched K or batch dimensions, an unknown rule or
            implementation, one that cannot be built here or does not take these operands, a number p
            outside of 1..2, or K beyond 65,793 for int8 or uint8, 43,804 where both meet.
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
    integers = _integer.take("adder_matmul", {"x": x, "y": y}, x.shape[-1], p)
    if integers and not (sums_bytes(implementation) and x.dtype == y.dtype):
        x, y = integers
    check_accepts(implementation, x, y)
    if integers:
        sums = calls(()).forward(*match_varying(x, y), implementation=plan.implementation, log=plan.log)
        return sums.astype(jnp.int32)
    x, y, *p = match_varying(x, y, *_power.canonical_power(p, implementation))
    return _adder_matmul(x, y, tuple(p), plan)


def check_array(
    array: jax.Array, argument: str, function: str, dtypes: tuple[str, ...] = FLOATS
) -> jax.Array:
    """Returns the argument as a JAX array, or raises a TypeError that names it."""
    if not hasattr(array, "dtype") or not hasattr(array, "shape"):
        raise TypeError(
            f"{function}: {argument} must be an array, got {type(array).__name__}; convert it "
            f"with jnp.asarray({argument}, jnp.float32)."
        )
    if str(array.dtype) not in dtypes:
        raise TypeError(
            f"{function}: {argument} has dtype {array.dtype}; allowed are {', '.join(dtypes)}. "
            f"Cast it first: {argument}.astype(jnp.float32)."
        )
    return jnp.asarray(array)


def _check_operand(operand: jax.Array, argument: str) -> jax.Array:
    operand = check_array(operand, argument, "adder_matmul", NUMBERS)
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


def match_varying(*arrays: jax.Array) -> list[jax.Array]:
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _adder_matmul(x: jax.Array, y: jax.Array, p: tuple[jax.Array, ...], plan: _Plan) -> jax.Array:
    return calls(p).forward(x, y, *p, implementation=plan.implementation, log=plan.log)


def _adder_matmul_fwd(x, y, p, plan):
    out = calls(p).forward(x, y, *p, implementation=plan.implementation, log=plan.log)
    return out, (x, y, p)


def _adder_matmul_bwd(plan, residuals, g):
    x, y, p = residuals
    static = {"implementation": plan.implementation, "log": plan.log}
    dx = calls(p).gradient_x(x, y, g, *p, rule=plan.rule_x, **static)
    dy = calls(p).gradient_y(x, y, g, *p, rule=plan.rule_y, **static)
    return dx, dy, None


_adder_matmul.defvjp(_adder_matmul_fwd, _adder_matmul_bwd)


def _run(method, operands, p, static, implementation, log):
    """Runs a method for the L1 distance, p = (), or for |x - y|^p, p = (p,)."""
    if str(operands[0].dtype) in _integer.DTYPES:
        method, operands = "byte_distances", _integer.as_bytes(*operands)
    if not p:
        return dispatch(method, operands, static, implementation, log)
    announce(log, f"adder_matmul {method} of {[a.shape for a in operands]} runs 'xla', for any p")
    return getattr(_power, method)(*operands, *p, *static)


def _forward(x, y, *p, implementation, log):
    """[..., M, N] in float32."""
    batch = jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    shape = (*batch, x.shape[-2], y.shape[-1])
    x, y = _expand(x, y)
    if x.ndim == 2 and y.ndim > 2:
        # The same rows meet every entry of the batch: these are rows of the transposed problem.
        flipped = _run("forward", (_fold_rows(y.mT), x.mT), p, (), implementation, log)
        return flipped.reshape(*batch, shape[-1], shape[-2]).mT
    x = _fold_rows(x) if y.ndim == 2 else _fold_batch(x)
    return _run("forward", (x, _fold_batch(y)), p, (), implementation, log).reshape(shape)


def _gradient_x(x, y, g, *p, rule, implementation, log):
    """sum_n rule(y - x) g in the shape and dtype of x."""
    shape, dtype = x.shape, x.dtype
    x, y = _expand(x, y)
    expanded = x.shape
    if y.ndim == 2:
        x, g = _fold_rows(x), _fold_rows(g)
    elif x.ndim == 2:
        y, g = _fold_columns(y), _fold_columns(g)
    if rule.kind == "full" and not p:
        dx = _full_gradient(x, y.mT, g)
    else:
        operands = tuple(_fold_batch(array) for array in (x, y, g))
        dx = _run("gradient_x", operands, p, (rule,), implementation, log)
    return _unbroadcast(dx.reshape(expanded), shape).astype(dtype)


def _gradient_y(x, y, g, *p, rule, implementation, log):
    """sum_m rule(x - y) g in the shape and dtype of y."""
    shape, dtype = y.shape, y.dtype
    x, y = _expand(x, y)
    expanded = y.shape
    if x.ndim == 2 and y.ndim > 2:
        flipped = (array.mT for array in (y, x, g))
        dy = _gradient_x(*flipped, *p, rule=rule, implementation=implementation, log=log)
        return dy.mT.reshape(shape)
    if y.ndim == 2:
        x, g = _fold_rows(x), _fold_rows(g)
    if rule.kind == "full" and not p:
        dy = _full_gradient(y.mT, x, g.mT).mT
    else:
        operands = tuple(_fold_batch(array) for array in (x, y, g))
        dy = _run("gradient_y", operands, p, (rule,), implementation, log)
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


def _fold_rows(array):
    """[..., R, C] -> [prod(...) R, C]."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def _fold_columns(array):
    """[..., R, C] -> [R, prod(...) C]."""
    return _fold_rows(array.mT).mT


def _fold_batch(array):
    """Rank 2 as it is, otherwise [..., R, C] -> [prod(...), R, C]."""
    if array.ndim == 2:
        return array
    return array.reshape(math.prod(array.shape[:-2]), *array.shape[-2:])


class Calls(NamedTuple):
    """The jitted forms of one operator, (x, y, *p) -> result and (x, y, g, *p) -> gradient."""

    forward: Callable[..., jax.Array]
    gradient_x: Callable[..., jax.Array]
    gradient_y: Callable[..., jax.Array]


def named_call(function: Callable, name: str, static: tuple[str, ...], result_spec: Callable) -> Callable:
    """Jits a function under a name, also for meshes with Explicit axes (see `with_automatic_axes`)."""
    wrapped = with_automatic_axes(function, result_spec)
    wrapped.__name__ = wrapped.__qualname__ = name
    return jax.jit(wrapped, static_argnames=static)


def _named_calls(name: str) -> Calls:
    static = ("implementation", "log")
    return Calls(
        named_call(_forward, name, static, lambda x, y, *p: forward_spec(x, y)),
        named_call(_gradient_x, f"{name}_gradient_x", ("rule", *static), lambda x, y, g, *p: x),
        named_call(_gradient_y, f"{name}_gradient_y", ("rule", *static), lambda x, y, g, *p: y),
    )


# A walker of jaxprs recognises the operator by the names of these calls, whichever
# implementation runs; operands and results are the public ones.
_L1_CALLS = _named_calls("adder_matmul")
_POWER_CALLS = _named_calls("adder_matmul_power")


def calls(p: tuple[jax.Array, ...]) -> Calls:
    """The calls for the L1 distance, p = (), or for |x - y|^p, p = (p,)."""
    return _POWER_CALLS if p else _L1_CALLS
