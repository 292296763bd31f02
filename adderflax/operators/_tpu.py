"""The operator on TPUs: Pallas kernels, and which of them, or XLA's plain form, takes a call.

No TPU was at hand when these were written: interpret mode checked the numbers, the schedules of
the TPU compiler the speed (tests/operators/test_tpu.py has both). Figures in cycles are counted
in such schedules, for a v5e unless said otherwise.

The compiler cannot partition a Mosaic kernel, and custom_partitioning does not reach it (jax
issue 38196). In a program for several devices the kernels therefore run where it is known what
each device holds: under shard_map over all axes of the mesh, or where `jax.set_mesh` names the
mesh and its axes together divide the batch or the rows of x, which are then cut so. Where they
were cut otherwise, by output features for example, XLA moves them. Its own form takes the
kernels' place elsewhere.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import PartitionSpec

from adderflax.operators import _tpu_batch, _tpu_blocks, _tpu_matrix, _xla
from adderflax.operators._primitives import (
    batch_in_front,
    evaluate_compiled,
    is_local,
    lower_function,
    require_other_platforms,
    result_shape,
)
from adderflax.operators._tpu_common import named_mesh, warn_of_plain_form
from adderflax.operators.rules import Rule

PLATFORMS = ("tpu",)
# Estimated cycles for 1024 terms above which calls are refused; 0.75 is the limit of the vector
# unit. XLA's own loop takes 1.5 on large shapes, and on those that fill registers badly it is
# slower too: 2 at 197 tokens, 3.7 for 12 heads of 65 tokens, 5.7 for one row.
_MOST_CYCLES = 3.0

_adder_p = Primitive("adder_tpu")


def forward(x: jax.Array, y: jax.Array, *, interpret: bool = False) -> jax.Array:
    """-sum_k |x[..., m, k] - y[..., k, n]| in float32.

    Args:
        x: [M, K] or [B, M, K]; float32, bfloat16 or float16; all lengths static and not 0.
        y: [K, N] or [B, K, N], likewise; without B it is the same for the whole batch.
        interpret: emulate the kernel on any platform, for tests.
    """
    return _call("forward", None, interpret, x, y)


def gradient_x(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule, *, interpret: bool = False) -> jax.Array:
    """sum_n rule(y[..., k, n] - x[..., m, k]) g[..., m, n] in float32, for any rule but "full".

    Args:
        x: as in `forward`.
        y: as in `forward`.
        g: [M, N] or [B, M, N], likewise.
        rule: "hardtanh" with any slope, or "sign".
        interpret: as in `forward`.
    """
    return _call("gradient_x", rule, interpret, x, y, g)


def gradient_y(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule, *, interpret: bool = False) -> jax.Array:
    """sum_m rule(x[..., m, k] - y[..., k, n]) g[..., m, n] in float32, as in `gradient_x`.

    It has y's shape: where y has no batch dimension, the sum runs over x's as well.
    """
    return _call("gradient_y", rule, interpret, x, y, g)


def refuses(x: jax.Array, y: jax.Array) -> str | None:
    """Why the kernels do not take these operands, or None if they do."""
    if not all(isinstance(size, int) for size in (*x.shape, *y.shape)):
        return "the kernels are cut for lengths known when tracing, and one of these is symbolic"
    if 0 in (*x.shape, *y.shape):
        return "an operand is empty"
    batch, m, k, n = _sizes(x, y)
    forms = _tpu_matrix.forward_forms((batch, m, k), (batch, k, n))
    estimate = min(_cycles(forms, x, y)) * 1024 / (batch * m * k * n)
    if estimate > _MOST_CYCLES:
        return (
            f"these lengths fill the vector registers badly: an estimated {estimate:.1f} cycles "
            f"for 1024 terms, and above {_MOST_CYCLES:g} the compiler's own loop is as fast"
        )
    return None


# ---- which kernel ----


def _sizes(x, y) -> tuple[int, int, int, int]:
    """(B, M, K, N) of any batch dimensions that broadcast.

    A side that is the same for the whole batch meets the other's batch as rows or columns.
    """
    (m, k), n = x.shape[-2:], y.shape[-1]
    batch = math.prod(jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2]))
    if math.prod(y.shape[:-2]) == 1:
        return 1, batch * m, k, n
    if math.prod(x.shape[:-2]) == 1:
        return 1, m, k, batch * n
    return batch, m, k, n


def _cycles(forms, x, y) -> tuple[float, float]:
    """Estimated cycles for one problem after the other, and for 128 of them at a time."""
    batch, m, k, n = _sizes(x, y)
    single = batch * min(_tpu_blocks.choose_tile(form) for form in forms)[0]
    itemsize = max(4 if array.dtype == jnp.float16 else array.dtype.itemsize for array in (x, y))
    groups = -(-batch // _tpu_batch.LANES)
    gradient = forms[0].rule is not None
    return single, groups * _tpu_batch.cycles(m, k, n, itemsize, gradient)


def _run_kernel(method: str, rule: Rule | None, interpret: bool, *operands: jax.Array) -> jax.Array:
    """The kernels on what one device holds."""
    shape = result_shape(method, *operands[:2])
    # Mosaic converts bfloat16 itself, float16 not.
    operands = [a.astype(jnp.float32) if a.dtype == jnp.float16 else a for a in operands]
    operands = [array.reshape(-1, *array.shape[-2:]) for array in operands]
    x, y = operands[:2]
    static = () if rule is None else (rule,)
    forms = getattr(_tpu_matrix, f"{method}_forms")(x.shape, y.shape, *static)
    single, together = _cycles(forms, x, y)
    kernels = _tpu_matrix if single <= together else _tpu_batch
    return getattr(kernels, method)(*operands, *static, interpret=interpret).reshape(shape)


# ---- how it enters a program ----


def _call(method: str, rule: Rule | None, interpret: bool, x, y, *g) -> jax.Array:
    if x.ndim == 3 and y.ndim == 2:
        # One y for the whole batch: its rows are those of one larger problem.
        x_rows, *g_rows = (array.reshape(-1, array.shape[-1]) for array in (x, *g))
        result = _call(method, rule, interpret, x_rows, y, *g_rows)
        return result.reshape(result_shape(method, x, y))
    return _adder_p.bind(x, y, *g, method=method, rule=rule, interpret=interpret)


@_adder_p.def_abstract_eval
def _abstract(x, y, *g, method, rule, interpret):
    # From an operand, so that the result varies over the same mesh axes of a shard_map.
    return x.update(shape=result_shape(method, x, y), dtype=jnp.dtype("float32"), weak_type=False)


evaluate_compiled(_adder_p, ("method", "rule", "interpret"))


def _batched(operands, axes, *, method, rule, interpret):
    """vmap: the new axis joins the batch, or x's rows if y is the same along it."""
    shared_y = axes[1] is None and operands[1].ndim == 2 and method != "gradient_y"
    moved = batch_in_front(operands, axes)
    batch = moved[0].shape[:-2]
    x, y, *g = (array.reshape(-1, *array.shape[-2:]) for array in moved)
    result = _call(method, rule, interpret, x, operands[1] if shared_y else y, *g)
    return result.reshape(*batch, *result.shape[-2:]), 0


batching.primitive_batchers[_adder_p] = _batched


def _lower_elsewhere(ctx, *operands, method, rule, interpret):
    if interpret:
        return lower_function(ctx, _run_kernel, method, rule, True, *operands)
    require_other_platforms(ctx, "tpu", "TPUs")
    return lower_function(ctx, _run_plain, method, rule, *operands)


def _lower(ctx, *operands, method, rule, interpret):
    axis_context = ctx.module_context.axis_context
    if interpret or is_local(axis_context):
        return lower_function(ctx, _run_kernel, method, rule, interpret, *operands)
    x, y = ctx.avals_in[:2]
    mesh = named_mesh(axis_context)
    if mesh is not None and x.shape[0] % mesh.size == 0:
        return lower_function(ctx, _run_split, mesh, method, rule, *operands)
    warn_of_plain_form(f"adder_matmul {method}", x, y)
    return lower_function(ctx, _run_plain, method, rule, *operands)


mlir.register_lowering(_adder_p, _lower_elsewhere)
mlir.register_lowering(_adder_p, _lower, platform="tpu")


def _run_plain(method: str, rule: Rule | None, *operands: jax.Array) -> jax.Array:
    """The same in XLA's own operations."""
    return getattr(_xla, method)(*operands, *(() if rule is None else (rule,)))


def _run_split(mesh, method: str, rule: Rule | None, *operands: jax.Array) -> jax.Array:
    """The kernel on each device's part of the batch, or of the rows of x."""
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    shared_y = operands[1].ndim == 2
    summed = shared_y and method == "gradient_y"

    def run(*local):
        result = _run_kernel(method, rule, False, *local)
        return lax.psum(result, mesh.axis_names) if summed else result

    in_specs = (split, whole if shared_y else split, split)[: len(operands)]
    out_specs = whole if summed else split
    # Replication is not checked: y is the same on all devices on purpose.
    mapped = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(*operands)
