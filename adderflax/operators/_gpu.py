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

import math

import jax
import jax.numpy as jnp

from adderflax.operators import _gpu_kernels as kernels
from adderflax.operators import _xla
from adderflax.operators._primitives import MatmulPrimitive, result_shape
from adderflax.operators.rules import Rule

PLATFORMS = ("cuda",)
_TARGET = "__gpu$xla.gpu.ptx"
_LARGEST = 2**30  # lengths of axes: 32-bit indices may overshoot by a tile


def refuses(x: jax.Array, y: jax.Array) -> str | None:
    """Why the kernels cannot take the operands, or None."""
    if not all(isinstance(size, int) for size in (*x.shape, *y.shape)):
        return "the shapes must be known when the program is traced"
    if max((*x.shape, *y.shape)) > _LARGEST:
        return f"no axis may be longer than {_LARGEST}"
    return None


def unavailable() -> str | None:
    """Why no kernel can be compiled on this machine, or None. Looks for NVRTC, once."""
    return kernels.unavailable()


def forward(x: jax.Array, y: jax.Array) -> jax.Array:
    """-sum_k |x[..., m, k] - y[..., k, n]| in float32.

    Args:
        x: [M, K] or [B, M, K], float32, bfloat16 or float16.
        y: [K, N], or [B, K, N] with x, likewise.
    """
    return _adder("forward", None, x, y)


def byte_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """-sum_k |x[..., m, k] - y[..., k, n]| of uint8 in int32, four terms an instruction.

    Args:
        x: [M, K] or [B, M, K], uint8.
        y: [K, N], or [B, K, N] with x, likewise.
    """
    if 0 in (*x.shape, *y.shape):
        return _xla.forward(x, y).astype(jnp.int32)
    return _adder("forward", None, *packed(x, y))


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
    return _adder("gradient_x", rule, x, y, g)


def gradient_y(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    """sum_m rule(x[..., m, k] - y[..., k, n]) g[..., m, n] in float32, for hardtanh and sign."""
    return _adder("gradient_y", rule, x, y, g)


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


def _run(method: str, rule: Rule | None, *operands: jax.Array) -> jax.Array:
    problem = problem_of(method, rule, *operands)
    tile = kernels.choose_tile(problem)
    if tile.blocks(problem) >= 2**31:  # more than a grid can hold
        return _plain(method, rule, *operands)
    return launch(problem, tile, *operands)


def _result_dtype(x, y) -> jnp.dtype:
    return jnp.dtype(jnp.int32 if x.dtype == jnp.uint32 else jnp.float32)


_adder = MatmulPrimitive("adder_gpu", "cuda", "gpu", "NVIDIA GPUs", _run, _plain, _result_dtype)


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
