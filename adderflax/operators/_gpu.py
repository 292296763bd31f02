"""The operator on NVIDIA GPUs: CUDA kernels, compiled when a program is lowered for one.

The source, _gpu_kernels.cu, goes through NVRTC, which jax[cuda13] brings, to PTX, and the PTX
into XLA's custom call `__gpu$xla.gpu.ptx`: pure Python to install, no host code between
launches, part of CUDA graphs, and compiled ahead of time without a GPU. Why not

* Pallas on Mosaic GPU: its documentation calls it a backend for the H100 whose interfaces "can
  change weekly"; Pallas on Triton: deprecated since jax 0.11.0, to be removed, and its blocks
  are powers of two, which 192, 197 and 65 are not. Both leave the registers of a thread, on
  which everything here depends, to their compilers;
* NVIDIA Warp: one more package, whose bridge, experimental by its documentation, launches
  through a callback into Python; CuTe DSL: wants a driver as new as its toolkit; a compiled XLA
  FFI handler: a C++ toolchain to install.

The price is that the target is internal to XLA. So its versions are listed (see `refuses`), and
XLA's plain form takes the kernels' place in jax.export, which promises that programs outlive
versions, and in programs for several devices that XLA partitions, unless `jax.set_mesh` names
the mesh, which the kernels' own partitioning needs. Under shard_map they run as on one device.

Sums of int8 and uint8 have kernels of their own, the same text with four terms a word: VABSDIFF4 adds
four differences of bytes in one instruction.

Differences from the reference: a NaN in x or y does not reach the gradients ("hardtanh" and
"sign" see it as -1 times the cotangent), only the result and thereby, in training, the
cotangent; differences below 2^-127 count only in part for "sign".
"""

import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from adderflax.operators import _gpu_kernels as kernels
from adderflax.operators import _xla
from adderflax.operators._primitives import (
    batch_in_front,
    is_local,
    lower_function,
    require_other_platforms,
    result_shape,
)
from adderflax.operators.rules import Rule

PLATFORMS = ("cuda",)
_TARGET = "__gpu$xla.gpu.ptx"
_LARGEST = 2**30  # lengths of axes: 32-bit indices may overshoot by a tile
_logger = logging.getLogger("adderflax.operators")

_adder_p = Primitive("adder_gpu")


def refuses(x: jax.Array, y: jax.Array) -> str | None:
    """Why the kernels cannot take the operands here, or None. Looks for NVRTC, once."""
    if not all(isinstance(size, int) for size in (*x.shape, *y.shape)):
        return "the shapes must be known when the program is traced"
    if max((*x.shape, *y.shape)) > _LARGEST:
        return f"no axis may be longer than {_LARGEST}"
    return kernels.unavailable()


def forward(x: jax.Array, y: jax.Array) -> jax.Array:
    """-sum_k |x[..., m, k] - y[..., k, n]| in float32.

    Args:
        x: [M, K] or [B, M, K], float32, bfloat16 or float16.
        y: [K, N], or [B, K, N] with x, likewise.
    """
    return _call("forward", None, x, y)


def byte_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """-sum_k |x[..., m, k] - y[..., k, n]| of uint8 in int32, four terms an instruction.

    Args:
        x: [M, K] or [B, M, K], uint8.
        y: [K, N], or [B, K, N] with x, likewise.
    """
    if 0 in (*x.shape, *y.shape):
        return _xla.forward(x, y).astype(jnp.int32)
    return _call("forward", None, *packed(x, y))


def packed(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Four terms a word: [..., M, ceil(K / 4)] and [..., ceil(K / 4), N], uint32, of uint8."""
    missing = (0, -x.shape[-1] % 4)  # filled up by terms that are equal on both sides
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [missing])
    y = jnp.pad(y, [(0, 0)] * (y.ndim - 2) + [missing, (0, 0)])
    x = x.reshape(*x.shape[:-1], -1, 4)
    y = jnp.moveaxis(y.reshape(*y.shape[:-2], -1, 4, y.shape[-1]), -2, -1)
    return jax.lax.bitcast_convert_type(x, jnp.uint32), jax.lax.bitcast_convert_type(y, jnp.uint32)


def unpacked(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `packed` was made of, with the terms that fill up the last word."""
    x, y = (jax.lax.bitcast_convert_type(words, jnp.uint8) for words in (x, y))  # [..., 4]
    return x.reshape(*x.shape[:-2], -1), jnp.moveaxis(y, -1, -2).reshape(*y.shape[:-3], -1, y.shape[-2])


def gradient_x(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    """sum_n rule(y[..., k, n] - x[..., m, k]) g[..., m, n] in float32, for hardtanh and sign."""
    return _call("gradient_x", rule, x, y, g)


def gradient_y(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    """sum_m rule(x[..., m, k] - y[..., k, n]) g[..., m, n] in float32, for hardtanh and sign."""
    return _call("gradient_y", rule, x, y, g)


def _call(method: str, rule: Rule | None, x: jax.Array, y: jax.Array, *g: jax.Array) -> jax.Array:
    if x.ndim == 3 and y.ndim == 2:
        # One y for the whole batch: its rows are those of one larger problem.
        folded = (array.reshape(array.shape[0] * array.shape[1], array.shape[2]) for array in (x, *g))
        x_rows, *g_rows = folded
        result = _call(method, rule, x_rows, y, *g_rows)
        return result if method == "gradient_y" else result.reshape(*x.shape[:2], -1)
    if 0 in (*x.shape, *y.shape):
        return _plain(method, rule, x, y, *g)
    return _adder_p.bind(x, y, *g, method=method, rule=rule, partitioned=False)


def _plain(method: str, rule: Rule | None, *operands: jax.Array) -> jax.Array:
    """The same in XLA's own operations."""
    if operands[0].dtype == jnp.uint32:
        return _xla.forward(*unpacked(*operands)).astype(jnp.int32)
    return getattr(_xla, method)(*operands, *(() if rule is None else (rule,)))


def problem_of(method: str, rule: Rule | None, x, y, *g) -> kernels.Problem:
    """The kernel's view of a call, from anything with shapes and dtypes."""
    rows, columns, terms = x.shape[-2], y.shape[-1], x.shape[-1]
    by_role = (x, y)
    if method == "gradient_x":
        rows, columns, terms, by_role = x.shape[-2], x.shape[-1], y.shape[-1], (*g, y, x)
    elif method == "gradient_y":
        rows, columns, terms, by_role = x.shape[-1], y.shape[-1], x.shape[-2], (x, *g, y)
    batch = math.prod(x.shape[:-2])
    dtypes = tuple(str(array.dtype) for array in by_role)
    return kernels.Problem(method, rule, batch, rows, columns, terms, dtypes)


@_adder_p.def_abstract_eval
def _abstract(x, y, *g, method, rule, partitioned):
    # From an operand, so that the result varies over the same mesh axes of a shard_map.
    dtype = jnp.dtype(problem_of(method, rule, x, y, *g).result_dtype)
    return x.update(shape=result_shape(method, x, y), dtype=dtype, weak_type=False)


_adder_p.def_impl(jax.jit(_adder_p.bind, static_argnames=("method", "rule", "partitioned")))


def _batched(operands, axes, *, method, rule, partitioned):
    """vmap: the new axis joins the batch, or the rows where y has none."""
    moved = batch_in_front(operands, axes)
    if axes[1] is None and operands[1].ndim == 2 and method != "gradient_y":
        moved[1] = operands[1]
    if moved[0].ndim == 3:
        return _call(method, rule, *moved), 0
    size = moved[0].shape[0]
    folded = (array.reshape(size * array.shape[1], *array.shape[2:]) for array in moved)
    result = _call(method, rule, *folded)
    return result.reshape(size, -1, *result.shape[1:]), 0


batching.primitive_batchers[_adder_p] = _batched


def _lower_elsewhere(ctx, *operands, method, rule, partitioned):
    require_other_platforms(ctx, "gpu", "NVIDIA GPUs")
    return lower_function(ctx, _plain, method, rule, *operands)


def _lower(ctx, *operands, method, rule, partitioned):
    context = ctx.module_context
    if context.lowering_parameters.for_export:
        return lower_function(ctx, _plain, method, rule, *operands)
    if partitioned or is_local(context.axis_context):
        return _lower_kernel(ctx, *operands, method=method, rule=rule)
    mesh = named_mesh(context.axis_context)
    if mesh is None:
        _logger.warning(
            "adder_matmul %s: in a program that XLA partitions, the 'xla' form runs instead of the "
            "CUDA kernels; name the mesh with jax.set_mesh, or use shard_map over all of its axes.",
            method,
        )
        return lower_function(ctx, _plain, method, rule, *operands)
    run = _partitioned(method, rule, ctx.avals_in[0].ndim)
    return lower_function(knowing_mesh(ctx, mesh), run, *operands)


mlir.register_lowering(_adder_p, _lower_elsewhere)
mlir.register_lowering(_adder_p, _lower, platform="cuda")


def named_mesh(axis_context):
    """The mesh of jax.set_mesh, if XLA partitions the whole program over it, or None."""
    if isinstance(axis_context, mlir.SPMDAxisContext):
        return None
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # while something else is traced
        return None
    return mesh if mesh.size == axis_context.num_devices else None


def knowing_mesh(ctx, mesh):
    """The context with devices and mesh, which custom_partitioning wants and jit hides."""
    axis_context = mlir.ShardingContext(mesh.size, tuple(mesh.devices.flat), mesh.abstract_mesh)
    return ctx.replace(module_context=ctx.module_context.replace(axis_context=axis_context))


def _lower_kernel(ctx, *operands, method, rule):
    problem = problem_of(method, rule, *ctx.avals_in)
    tile = kernels.choose_tile(problem)
    if tile.blocks(problem) >= 2**31:  # more than a grid can hold
        return lower_function(ctx, _plain, method, rule, *operands)
    return lower_function(ctx, launch, problem, tile, *operands)


@functools.cache
def _partitioned(method: str, rule: Rule | None, rank: int):
    """The kernel with its own partitioning: over batch, rows, columns and terms alike."""
    operand_axes = [("b" if rank == 3 else "") + axes for axes in ("mk", "kn", "mn")]
    result_axes = operand_axes[{"forward": 2, "gradient_x": 0, "gradient_y": 1}[method]]
    if method == "forward":
        operand_axes.pop()
    (summed,) = set("mkn") - set(result_axes)

    def partition(mesh, operands, result):
        names = {}  # mesh axes over which each axis of the problem is cut
        for axes, operand in zip(operand_axes, operands):
            for axis, size, entry in zip(axes, operand.shape, operand.sharding.spec):
                entry = entry if isinstance(entry, tuple) else (entry,) if entry else ()
                unused = not set(entry) & {name for group in names.values() for name in group}
                # An uneven cut would bring padding into the sum.
                even = size % math.prod(mesh.shape[name] for name in entry) == 0
                if entry and axis not in names and unused and even:
                    names[axis] = entry

        def share(axes):
            return NamedSharding(mesh, PartitionSpec(*(names.get(axis) for axis in axes)))

        def run(*local_operands):
            local = _adder_p.bind(*local_operands, method=method, rule=rule, partitioned=True)
            return jax.lax.psum(local, names[summed]) if summed in names else local

        return mesh, run, share(result_axes), tuple(map(share, operand_axes))

    @custom_partitioning
    def call(*operands):
        return _adder_p.bind(*operands, method=method, rule=rule, partitioned=True)

    call.def_partition(
        partition,
        sharding_rule=f"{', '.join(map(' '.join, operand_axes))} -> {' '.join(result_axes)}",
        reduction_factors=(summed,),
    )
    return call


def launch(problem: kernels.Problem, tile: kernels.Tile, x, y, *g) -> jax.Array:
    """The kernel's call in a program for one CUDA device."""
    by_role = {"forward": (x, y), "gradient_x": (*g, y, x), "gradient_y": (x, *g, y)}[problem.method]
    shape = result_shape(problem.method, x, y)
    parts = shape if tile.splits == 1 else (tile.splits, *shape)
    result = jax.ShapeDtypeStruct(parts, problem.result_dtype)
    (result,) = run_cuda(kernels.source(problem, tile), tile.blocks(problem), tile.threads, by_role, [result])
    return result if tile.splits == 1 else jnp.sum(result, axis=0)


def run_cuda(source: str, blocks: int, threads: int, operands, results) -> list[jax.Array]:
    """A call of the kernel in a CUDA source, on the operands and then the results.

    Args:
        blocks, threads: of the grid and of a block, both with one axis.
        results: their shapes and dtypes.
    """
    ptx = kernels.compile_ptx(source)
    quoted = ptx.replace("\\", "\\5C").replace('"', "\\22").replace("\n", "\\0A").replace("\t", "\\09")
    indices = range(len(operands), len(operands) + len(results))
    config = {
        "name": f'"{kernels.KERNEL_NAME}"',
        "kernel_type": '"ptx"',
        "kernel_data": f'"{quoted}"',
        "grid_x": f"{blocks} : i32",
        "grid_y": "1 : i32",
        "grid_z": "1 : i32",
        "block_x": f"{threads} : i32",
        "block_y": "1 : i32",
        "block_z": "1 : i32",
        "shared_mem_bytes": "0 : i32",
        "output_indices": f"[{', '.join(f'{index} : i32' for index in indices)}]",
    }
    call = jax.ffi.ffi_call(
        _TARGET,
        results,
        custom_call_api_version=1,
        legacy_backend_config="{" + ", ".join(f"{key} = {value}" for key, value in config.items()) + "}",
    )
    return call(*operands)
