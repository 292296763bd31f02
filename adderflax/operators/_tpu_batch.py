"""Pallas kernels for TPUs that put a batch of small problems into the lanes.

Attention scores are many small products. One at a time (_tpu_matrix) they fill the lanes badly,
65 keys of 128, and have too few columns to pay for the cross-lane broadcasts: at 65 tokens and
64-wide heads 15 % of the vector unit does useful work. Here each lane belongs to a problem of its
own, 128 at a time, so that nothing is ever broadcast along lanes; what is broadcast along
sublanes comes free with a load. That leaves 94 % to the loop, in a tenth of the code, and costs
turning every operand and result from [problem, row, column] to [row, column, problem] in VMEM:
about four cycles for 1024 numbers, against 48 for computing as many results of 64-wide heads.
Turning them in XLA instead would move the largest array, queries x keys, through HBM twice more.

Names: b is the problem within the block, in lanes; m, k and n as in `adder_matmul`. Edges of
blocks hold garbage, which reaches results outside of the array only.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adderflax.operators._tpu_common import (
    LANES,
    SUBLANES,
    ceil_div,
    clipped_rule,
    compiler_params,
    cost_estimate,
    out_struct,
    repeat,
    traced_ceil_div,
)
from adderflax.operators.rules import Rule

_UNROLL = 16  # terms in one loop body: 8 lose 4 % to the loop, 64 spill registers
_TILE = 32  # registers, out of 64, for the sums (forward) or the sums and own operand (gradient)
_BLOCK_ROWS = 24
_TURN_CYCLES = 3.4  # for 8 x 128 numbers, padding included
_VMEM_BYTES = 56 * 2**20  # of 128 MiB on v5e and v6e, 64 MiB on a v7x


class Sizes(NamedTuple):
    """Lengths of a block: rows of x, of k and of n padded to whole registers, and the tile.

    Attributes:
        m: rows of x in a block.
        k: contracted length, padded.
        n: columns of y, padded.
        tile_rows: rows of x (of y's columns in gradient_y) that a tile spans.
        tile_depth: registers that a tile spans for each of them.
    """

    m: int
    k: int
    n: int
    tile_rows: int
    tile_depth: int


def forward(x: jax.Array, y: jax.Array, *, interpret: bool = False) -> jax.Array:
    """-sum_k |x[b, m, k] - y[b, k, n]| in float32."""
    _, m, k = x.shape
    sizes = forward_sizes(m, k, y.shape[2])
    kernel = functools.partial(_forward_kernel, m, k, sizes)
    scratch = ["mk", "kn", "mn"]
    return _call(kernel, "adder_batch_forward", sizes, (x, y), "mn", scratch, interpret)


def gradient_x(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule, *, interpret: bool = False) -> jax.Array:
    """sum_n rule(y[b, k, n] - x[b, m, k]) g[b, m, n] in float32."""
    _, m, k = x.shape
    sizes = gradient_sizes(m, k, y.shape[2])
    kernel = functools.partial(_gradient_x_kernel, m, y.shape[2], sizes, rule)
    scratch = ["mk", "nk", "mn", "mk"]
    return _call(kernel, "adder_batch_gradient_x", sizes, (x, y, g), "mk", scratch, interpret)


def gradient_y(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule, *, interpret: bool = False) -> jax.Array:
    """sum_m rule(x[b, m, k] - y[b, k, n]) g[b, m, n] in float32."""
    _, m, k = x.shape
    sizes = gradient_sizes(m, k, y.shape[2])
    kernel = functools.partial(_gradient_y_kernel, m, y.shape[2], sizes, rule)
    scratch = ["mk", "nk", "mn", "nk"]
    return _call(kernel, "adder_batch_gradient_y", sizes, (x, y, g), "kn", scratch, interpret)


# ---- how a batch is cut ----


def forward_sizes(m: int, k: int, n: int) -> Sizes:
    """The tile of rows of x times registers of n that wastes least."""

    def cost(tile):
        rows, depth = tile
        bundles = max(0.75 * rows * depth, (rows + depth) / 3 + 1) + 1.3
        return ceil_div(n, SUBLANES * depth) * ceil_div(m, rows) * bundles, -rows * depth

    block = _block_rows(m)
    tiles = [(r, d) for r in range(1, 9) for d in range(1, 10) if r * d <= _TILE and block % r == 0]
    tile_rows, tile_depth = min(tiles, key=cost)
    n = ceil_div(n, SUBLANES * tile_depth) * SUBLANES * tile_depth
    return Sizes(block, _whole(k), n, tile_rows, tile_depth)


def gradient_sizes(m: int, k: int, n: int) -> Sizes:
    """Tiles of up to eight registers of k, and as many rows as fit."""
    depth = ceil_div(k, SUBLANES)
    tile_depth = ceil_div(depth, ceil_div(depth, 8))
    tile_rows = max(r for r in (1, 2, 4, 8) if 2 * r * tile_depth <= _TILE)
    k = ceil_div(depth, tile_depth) * tile_depth * SUBLANES
    return Sizes(_block_rows(m), k, _whole(n), tile_rows, tile_depth)


def _block_rows(m: int) -> int:
    """Rows of a block, at most 24, which 1, 2, 3, 4, 6 and 8 divide."""
    return min(_whole(m), _BLOCK_ROWS)


def cycles(m: int, k: int, n: int, itemsize: int, gradient: bool) -> float:
    """Estimated cycles of 128 problems; infinite where they do not fit into VMEM."""
    sizes = gradient_sizes(m, k, n) if gradient else forward_sizes(m, k, n)
    if vmem_bytes(sizes, itemsize, gradient) > _VMEM_BYTES:
        return math.inf
    wide_k, wide_n = (ceil_div(length, LANES) * LANES for length in (sizes.k, sizes.n))
    turned = sizes.k * wide_n + m * (wide_k + wide_n)
    if gradient:
        turned += m * wide_k
        loop = ceil_div(m, sizes.tile_rows) * sizes.tile_rows * n * sizes.k
    else:
        loop = 0.75 * ceil_div(m, sizes.tile_rows) * sizes.tile_rows * k * sizes.n
    return (loop / 0.94 + _TURN_CYCLES * turned) / SUBLANES


def vmem_bytes(sizes: Sizes, itemsize: int, gradient: bool) -> int:
    """What forward, or the larger of the gradients, holds: most blocks twice, scratch once."""
    k, n = (ceil_div(length, LANES) * LANES for length in (sizes.k, sizes.n))
    x, y, g = sizes.m * k, sizes.k * n, sizes.m * n
    scratch = 4 * (sizes.m * (sizes.k + sizes.n) + sizes.k * sizes.n)
    if not gradient:
        return LANES * (2 * (itemsize * (x + y) + 4 * g) + scratch)
    # gradient_y, whose result is as large as y.
    scratch += 4 * sizes.k * sizes.n
    return LANES * (itemsize * (2 * x + y) + 4 * 2 * (g + y) + scratch)


def _whole(length: int) -> int:
    return ceil_div(length, SUBLANES) * SUBLANES


# ---- the kernels ----


def _call(kernel, name: str, sizes: Sizes, operands, out: str, scratch, interpret: bool):
    """Runs a kernel over blocks of problems and of rows of x.

    Args:
        kernel: takes the refs of operands, result and scratch.
        name: of the kernel in profiles.
        sizes: of the blocks.
        operands: x, y and, of a gradient, g.
        out: axes of the result: "mn", "mk" or "kn".
        scratch: axes of each float32 scratch array, which has the problems in its lanes.
        interpret: as in forward.
    """
    gradient = len(operands) == 3
    (batch, m, k), n = operands[0].shape, operands[1].shape[2]
    lengths = {"m": m, "k": k, "n": n}
    padded = {"m": sizes.m, "k": sizes.k, "n": sizes.n}

    def spec(axes, buffers=None):
        rows, columns = (padded[axis] for axis in axes)
        shape = (LANES, rows, ceil_div(columns, LANES) * LANES)
        if axes[0] == "m":
            return pl.BlockSpec(shape, lambda b, block: (b, block, 0))
        return pl.BlockSpec(shape, lambda b, block: (b, 0, 0), pipeline_mode=buffers)

    # y is loaded once for 128 problems. Next to a result of the same size, its second buffer
    # (8 MiB for 197 keys) would not fit.
    in_specs = [spec("mk"), spec("kn", pl.Buffered(1) if out == "kn" else None), spec("mn")]
    shape = (batch, *(lengths[axis] for axis in out))
    itemsize = max(operand.dtype.itemsize for operand in operands[:2])
    return pl.pallas_call(
        kernel,
        grid=(ceil_div(batch, LANES), ceil_div(m, sizes.m)),
        in_specs=in_specs[: len(operands)],
        out_specs=spec(out),
        out_shape=out_struct(shape, *operands),
        scratch_shapes=[
            pltpu.VMEM((*(padded[axis] for axis in axes), LANES), jnp.float32) for axes in scratch
        ],
        # Along the rows y's turned block is kept, and gradient_y sums.
        compiler_params=compiler_params(("parallel", "arbitrary"), vmem_bytes(sizes, itemsize, gradient)),
        cost_estimate=cost_estimate(batch * m * k * n, gradient, shape, *operands),
        interpret=interpret,
        name=name,
    )(*operands)


def _forward_kernel(m, k, sizes, x_ref, y_ref, out_ref, x_s, y_s, total_s):
    block = pl.program_id(1)
    rows = jnp.minimum(m - block * sizes.m, sizes.m)
    _turn_in(x_ref, x_s, rows)
    pl.when(block == 0)(lambda: _turn_in(y_ref, y_s, sizes.k))
    depth = sizes.tile_depth * SUBLANES

    def add_tile(tile_n, tile_m):
        first = tile_m * sizes.tile_rows
        columns = pl.ds(pl.multiple_of(tile_n * depth, depth), depth)

        def add(step, totals):
            y = y_s[step, columns, :]
            return [total + jnp.abs(y - x_s[first + i, pl.ds(step, 1), :]) for i, total in enumerate(totals)]

        zeros = [jnp.zeros((depth, LANES), jnp.float32)] * sizes.tile_rows
        for i, total in enumerate(_sum(k, add, zeros)):
            total_s[first + i, columns, :] = -total

    tiles = traced_ceil_div(rows, sizes.tile_rows)
    repeat(sizes.n // depth, lambda n: repeat(tiles, functools.partial(add_tile, n)))
    _turn_out(total_s, out_ref, rows)


def _gradient_x_kernel(m, n, sizes, rule, x_ref, y_ref, g_ref, out_ref, x_s, y_s, g_s, total_s):
    block = pl.program_id(1)
    rows = jnp.minimum(m - block * sizes.m, sizes.m)
    _turn_in(x_ref, x_s, rows)
    _turn_in(g_ref, g_s, rows)
    pl.when(block == 0)(lambda: _turn_in_swapped(y_ref, y_s))
    clipped, scale = clipped_rule(rule)

    def add_tile(depth, tile_m):
        first = tile_m * sizes.tile_rows
        own = [x_s[first + i, depth, :] for i in range(sizes.tile_rows)]

        def add(step, totals):
            y = y_s[step, depth, :]
            return [
                total + clipped(y - x) * g_s[first + i, pl.ds(step, 1), :]
                for i, (x, total) in enumerate(zip(own, totals))
            ]

        for i, total in enumerate(_sum(n, add, [jnp.zeros_like(x) for x in own])):
            total_s[first + i, depth, :] = scale * total

    tiles = traced_ceil_div(rows, sizes.tile_rows)
    for depth in _depths(sizes):
        repeat(tiles, functools.partial(add_tile, depth))
    _turn_out(total_s, out_ref, rows)


def _gradient_y_kernel(m, n, sizes, rule, x_ref, y_ref, g_ref, out_ref, x_s, y_s, g_s, total_s):
    block = pl.program_id(1)
    rows = jnp.minimum(m - block * sizes.m, sizes.m)
    _turn_in(x_ref, x_s, rows)
    _turn_in(g_ref, g_s, rows)

    @pl.when(block == 0)
    def _():
        _turn_in_swapped(y_ref, y_s)
        total_s[...] = jnp.zeros_like(total_s)

    def clear(row):
        x_s[rows + row] = jnp.zeros_like(x_s[0])
        g_s[rows + row] = jnp.zeros_like(g_s[0])

    # Rows that do not exist add nothing.
    repeat(sizes.m - rows, clear)

    clipped, scale = clipped_rule(rule)

    def add_tile(depth, tile_n):
        first = tile_n * sizes.tile_rows
        own = [y_s[first + i, depth, :] for i in range(sizes.tile_rows)]

        def add(step, totals):
            x = x_s[step, depth, :]
            return [
                total + clipped(x - y) * g_s[step, pl.ds(first + i, 1), :]
                for i, (y, total) in enumerate(zip(own, totals))
            ]

        totals = [total_s[first + i, depth, :] for i in range(sizes.tile_rows)]
        for i, total in enumerate(_sum(sizes.m, add, totals)):
            total_s[first + i, depth, :] = total

    columns = ceil_div(n, sizes.tile_rows)
    for depth in _depths(sizes):
        repeat(columns, functools.partial(add_tile, depth))

    @pl.when(block == pl.num_programs(1) - 1)
    def _():
        _turn_out_swapped(total_s, out_ref, scale)


def _depths(sizes: Sizes) -> list[slice]:
    """The slices of k that the tiles of a gradient span, one after the other."""
    depth = sizes.tile_depth * SUBLANES
    return [slice(start, start + depth) for start in range(0, sizes.k, depth)]


def _sum(count: int, add, totals):
    """Adds `count` terms to the totals, which stay in registers."""

    def add_some(group, totals):
        for offset in range(_UNROLL):
            totals = add(group * _UNROLL + offset, totals)
        return totals

    groups = count // _UNROLL
    if groups:
        totals = lax.fori_loop(jnp.int32(0), groups, add_some, totals)
    for step in range(groups * _UNROLL, count):
        totals = add(step, totals)
    return totals


def _rows(ref, group: int, columns: int) -> list[jax.Array]:
    """Eight rows of a block [b, rows, columns], each turned to [columns, b]."""
    rows = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
    block = jnp.swapaxes(ref[:, rows, :columns].astype(jnp.float32), 0, 1)
    return [block[i].T for i in range(SUBLANES)]


def _turn_in(ref, target, rows) -> None:
    """[b, rows, columns] to [rows, columns, b], as many rows as exist."""

    def turn(group):
        for i, row in enumerate(_rows(ref, group, target.shape[1])):
            target[group * SUBLANES + i] = row

    repeat(traced_ceil_div(rows, SUBLANES), turn)


def _turn_in_swapped(ref, target) -> None:
    """[b, rows, columns] to [columns, rows, b]."""

    def turn(group):
        rows = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
        turned = jnp.stack(_rows(ref, group, target.shape[0]))
        target[:, rows, :] = jnp.swapaxes(turned, 0, 1)

    repeat(ref.shape[1] // SUBLANES, turn)


def _turn_out(source, ref, rows) -> None:
    """[rows, columns, b] to [b, rows, columns], as many rows as exist."""

    def turn(group):
        group_rows = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
        turned = jnp.stack([source[group * SUBLANES + i].T for i in range(SUBLANES)])
        ref[:, group_rows, : source.shape[1]] = jnp.swapaxes(turned, 0, 1)

    repeat(traced_ceil_div(rows, SUBLANES), turn)


def _turn_out_swapped(source, ref, scale: float) -> None:
    """[columns, rows, b] to [b, rows, columns], scaled."""

    def turn(group):
        rows = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
        block = jnp.swapaxes(scale * source[:, rows, :], 0, 1)
        turned = jnp.stack([block[i].T for i in range(SUBLANES)])
        ref[:, rows, : source.shape[0]] = jnp.swapaxes(turned, 0, 1)

    repeat(ref.shape[1] // SUBLANES, turn)
