"""Pallas kernels for TPUs (Mosaic).

Every product here is one sum over a depth axis,

    out[r, c] = sum_s term(columns[r, s], rows[s, c], own[r, c]),

with r along the sublanes of the vector registers and c along their lanes. The vector unit does
four operations a cycle and a term takes three (forward) or four (gradient), so a kernel is good
where nothing but these is left in its loop:

* A tile of the result stays in registers for 128 steps of the depth, unrolled in Python: the
  lane of `columns` that a step broadcasts must be static. 64 steps lose 5 % more to the latency
  with which the first broadcast arrives, and doubling them to 256 only doubles the code.
* Broadcasting along lanes is the cross-lane unit's work and takes it about 2.2 cycles for eight
  rows, as much as three tiles of 128 lanes take the vector unit. Hence the longer axis goes to
  the lanes: up to nine tiles share one broadcast. Either axis of the result can be that one,
  because operands and result can be stored transposed; the kernel turns them in VMEM.
* Broadcasting along sublanes comes free with the load of a row.
* A chunk of 128 steps of either operand is first copied to float32 scratch. That turns and
  converts it where needed, once for a whole block rather than for each of its tiles, and makes
  the addresses in the loop static. Arithmetic in bfloat16 would be slower.
* Magnitudes are added and the sum negated: subtracting them one by one is scheduled worse (32 x
  1024 tiles on a v5e: 86 instead of 93 % of the vector unit's slots).

The edges of ragged blocks hold garbage. It reaches results outside of the array only: steps of
the depth that do not exist are never taken.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from adderflax.operators._tpu_blocks import (
    CHUNK,
    Blocks,
    Problem,
    cheapest,
    choose_blocks,
    vmem_bytes,
)
from adderflax.operators._tpu_common import (
    LANES,
    ceil_div,
    clipped_rule,
    compiler_params,
    cost_estimate,
    out_struct,
    repeat,
    traced_ceil_div,
)
from adderflax.operators.rules import Rule


def forward(x: jax.Array, y: jax.Array, *, interpret: bool = False) -> jax.Array:
    """-sum_k |x[b, m, k] - y[b, k, n]| in float32."""
    problem = cheapest(forward_forms(x.shape, y.shape))
    if problem.out_turned:
        x, y = y, x
    return _run(problem, x, y, None, interpret)


def gradient_x(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule, *, interpret: bool = False) -> jax.Array:
    """sum_n rule(y[b, k, n] - x[b, m, k]) g[b, m, n] in float32."""
    problem = cheapest(gradient_x_forms(x.shape, y.shape, rule))
    if problem.out_turned:
        return _run(problem, y, g, x, interpret)
    return _run(problem, g, y, x, interpret)


def gradient_y(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule, *, interpret: bool = False) -> jax.Array:
    """sum_m rule(x[b, m, k] - y[b, k, n]) g[b, m, n] in float32."""
    problem = cheapest(gradient_y_forms(x.shape, y.shape, rule))
    if problem.out_turned:
        return _run(problem, g, x, y, interpret)
    return _run(problem, x, g, y, interpret)


def forward_forms(shape_x, shape_y) -> tuple[Problem, Problem]:
    """With n, or with m, in the lanes."""
    (batch, m, k), n = shape_x, shape_y[2]
    return (
        Problem(batch, m, n, k),
        Problem(batch, n, m, k, columns_turned=True, rows_turned=True, out_turned=True),
    )


def gradient_x_forms(shape_x, shape_y, rule: Rule) -> tuple[Problem, Problem]:
    """With k, or with m, in the lanes."""
    (batch, m, k), n = shape_x, shape_y[2]
    return (
        Problem(batch, m, k, n, rows_turned=True, rule=rule, other="rows"),
        Problem(batch, k, m, n, rows_turned=True, out_turned=True, rule=rule),
    )


def gradient_y_forms(shape_x, shape_y, rule: Rule) -> tuple[Problem, Problem]:
    """With n, or with k, in the lanes."""
    (batch, m, k), n = shape_x, shape_y[2]
    return (
        Problem(batch, k, n, m, columns_turned=True, rule=rule),
        Problem(batch, n, k, m, columns_turned=True, out_turned=True, rule=rule, other="rows"),
    )


# ---- the kernel ----


def _run(problem: Problem, columns, rows, own, interpret: bool) -> jax.Array:
    blocks = choose_blocks(problem)
    width = blocks.lane_tiles * LANES
    grid = (
        ceil_div(problem.batch, blocks.batch),
        ceil_div(problem.rows, blocks.rows),
        ceil_div(problem.lanes, width),
        ceil_div(problem.depth, blocks.depth),
    )

    def spec(turned, size_0, size_1, axis_0, axis_1):
        if turned:
            size_0, size_1, axis_0, axis_1 = size_1, size_0, axis_1, axis_0
        shape = (blocks.batch, size_0, size_1)
        return pl.BlockSpec(shape, lambda *index: (index[0], index[axis_0], index[axis_1]))

    out_spec = spec(problem.out_turned, blocks.rows, width, 1, 2)
    in_specs = [
        spec(problem.columns_turned, blocks.rows, blocks.depth, 1, 3),
        spec(problem.rows_turned, blocks.depth, width, 3, 2),
    ]
    scratch = [(blocks.rows, LANES), (blocks.lane_tiles, CHUNK, LANES)]
    scratch += [(blocks.lane_tiles, blocks.rows, LANES)]
    operands = [columns, rows]
    if own is not None:
        in_specs.append(out_spec)
        scratch.append(scratch[-1])
        operands.append(own)
    shape = [problem.rows, problem.lanes]
    shape = (problem.batch, *(shape[::-1] if problem.out_turned else shape))
    terms = problem.batch * problem.rows * problem.lanes * problem.depth
    return pl.pallas_call(
        functools.partial(_kernel, problem, blocks),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_spec,
        out_shape=out_struct(shape, *operands),
        scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in scratch],
        compiler_params=compiler_params(
            ("parallel", "parallel", "parallel", "arbitrary"), vmem_bytes(problem, blocks)
        ),
        cost_estimate=cost_estimate(terms, own is not None, shape, *operands),
        interpret=interpret,
        name="adder_forward" if own is None else "adder_gradient",
    )(*operands)


def _kernel(problem: Problem, blocks: Blocks, columns_ref, rows_ref, *refs):
    own_ref = None if problem.rule is None else refs[0]
    out_ref, columns_s, rows_s, total_s = refs[-4:] if own_ref is None else refs[1:5]
    own_s = None if own_ref is None else refs[-1]
    first_problem, first_row, _, step = (
        pl.program_id(axis) * size for axis, size in enumerate((blocks.batch, blocks.rows, 0, 1))
    )
    steps = ceil_div(problem.depth, blocks.depth)
    chunks, rest = divmod(problem.depth, CHUNK)
    single = chunks + (rest > 0) == 1
    term, scale = weighted_term(problem)
    row_squares = range(ceil_div(min(blocks.rows, problem.rows), LANES))
    squares = list(itertools.product(range(blocks.lane_tiles), row_squares))

    # Blocks at the end of an axis hold fewer problems and tiles.
    tiles = _smaller(blocks.rows, problem.rows - first_row, blocks.tile_rows)
    problems = _smaller(blocks.batch, problem.batch - first_problem, 1)

    def load_chunk(b, chunk):
        depth = pl.ds(pl.multiple_of(chunk * CHUNK, CHUNK), CHUNK)
        if problem.columns_turned:
            for i in row_squares:
                square = columns_ref[b, depth, _lanes(i)].astype(jnp.float32)
                columns_s[_lanes(i), :] = square.T
        else:
            columns_s[...] = columns_ref[b, :, depth].astype(jnp.float32)
        for t in range(blocks.lane_tiles):
            if problem.rows_turned:
                rows_s[t] = rows_ref[b, _lanes(t), depth].astype(jnp.float32).T
            else:
                rows_s[t] = rows_ref[b, depth, _lanes(t)].astype(jnp.float32)

    def load_own(b):
        if problem.out_turned:
            for t, i in squares:
                own_s[t, _lanes(i), :] = own_ref[b, _lanes(t), _lanes(i)].astype(jnp.float32).T
        else:
            for t in range(blocks.lane_tiles):
                own_s[t] = own_ref[b, :, _lanes(t)].astype(jnp.float32)

    def store_out(b):
        if problem.out_turned:
            for t, i in squares:
                out_ref[b, _lanes(t), _lanes(i)] = scale * total_s[t, _lanes(i), :].T
        else:
            for t in range(blocks.lane_tiles):
                out_ref[b, :, _lanes(t)] = scale * total_s[t]

    def add_chunk(b, chunk, length):
        load_chunk(b, chunk)
        repeat(tiles, functools.partial(add_tile, length))

    def add_tile(length, i):
        rows = pl.ds(pl.multiple_of(i * blocks.tile_rows, blocks.tile_rows), blocks.tile_rows)
        shape = (blocks.tile_rows, LANES)
        columns = columns_s[rows, :]
        width = range(blocks.lane_tiles)
        own = [None if own_s is None else own_s[t, rows, :] for t in width]
        total = [jnp.zeros(shape, jnp.float32) if single else total_s[t, rows, :] for t in width]
        for s in range(length):
            column = jnp.broadcast_to(columns[:, s : s + 1], shape)
            for t in width:
                total[t] = total[t] + term(column, rows_s[t, s : s + 1, :], own[t])
        for t in width:
            total_s[t, rows, :] = total[t]

    def add_block(b):
        @pl.when(step == 0)
        def _():
            if not single:
                total_s[...] = jnp.zeros_like(total_s)
            if own_s is not None:
                load_own(b)

        in_block = _smaller(blocks.depth, chunks * CHUNK - step * blocks.depth, CHUNK)
        if chunks:
            repeat(in_block, lambda chunk: add_chunk(b, chunk, CHUNK))

        @pl.when(step == steps - 1)
        def _():
            if rest:
                add_chunk(b, in_block, rest)
            store_out(b)

    repeat(problems, add_block)


def weighted_term(problem: Problem):
    """The term as a function of (column, row, own), and the factor of its sum."""
    if problem.rule is None:
        return lambda column, row, own: jnp.abs(column - row), -1.0
    clipped, scale = clipped_rule(problem.rule)

    def term(column, row, own):
        other, weight = (column, row) if problem.other == "columns" else (row, column)
        return clipped(other - own) * weight

    return term, scale


def _lanes(index: int) -> slice:
    return slice(index * LANES, (index + 1) * LANES)


def _smaller(block: int, left, unit: int):
    """Units of a block that are within what is left of the axis."""
    return traced_ceil_div(jnp.minimum(block, left), unit)
