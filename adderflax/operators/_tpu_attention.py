"""L1 attention on TPUs, fused: one Pallas kernel for each direction holds a block of the map in VMEM.

A step of the grid takes a block of queries of one head, or several heads that are short, with all
of its keys and values, in three phases over the map of queries x keys:

* distances, tile by tile in registers as in _tpu_matrix: a lane of the queries is broadcast along
  the lanes, a row of the turned keys along the sublanes, once for each step of the depth;
* softmax and products with the values, for the whole block at once, so that the matrix unit
  loads its weights once a block;
* backward, the gradients of queries and keys, tile by tile again. Rules are odd, so where both
  gradients have the same rule one term rule(key - query) dscore serves both: it is summed along the lanes
  for the queries, and down the rows, eight of which stay apart until the last block, for the keys.

Operands are turned, padded and converted to float32 outside, where XLA fuses that with the copies
that bring heads before tokens. As in _tpu, no TPU was at hand.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import PartitionSpec

from adderflax.operators import _attention_xla
from adderflax.operators._primitives import (
    batch_in_front,
    evaluate_compiled,
    is_local,
    lower_function,
    require_other_platforms,
)
from adderflax.operators._tpu_common import (
    LANES,
    SUBLANES,
    ceil_div,
    clipped_rule,
    compiler_params,
    named_mesh,
    out_struct,
    repeat,
    warn_of_plain_form,
)
from adderflax.operators.rules import Rule

_DEPTHS = (8, 128)  # the loops over the depth are unrolled; below, broadcasts outweigh arithmetic
_MOST_KEYS = 9 * LANES  # all of whose gradients, eight rows each, are held in VMEM
_TILE = 20  # registers of a tile of the map
_MAP = 2**18  # numbers of a block of the map, several of which are alive at once
_LATENCY = 65  # cycles before the first broadcast of a loop body arrives
_STEP_CYCLES = 20_000  # work that hides what one step of the grid costs
_GROUP_BYTES = 6 * 2**20  # of operands and results of the heads that share a step

_attention_p = Primitive("adder_attention_tpu")
_attention_p.multiple_results = True


def forward(query, key, value, mask, bias, scale, *, interpret: bool = False):
    """(product, maximum, sums) as in `FusedAttention.forward`; interpret emulates it anywhere."""
    product, stats = _call("forward", scale, None, interpret, query, key, value)
    return product, stats[..., :1], stats[..., 1:]


def backward(
    query, key, value, mask, bias, scale, maximum, sums, delta, g, rule_query, rule_key, *, interpret=False
):
    """(dquery, dkey, dvalue, None, None) as in `FusedAttention.backward`."""
    stats = jnp.concatenate([maximum, sums, delta], axis=-1)
    rules = rule_query, rule_key
    return (*_call("backward", scale, rules, interpret, query, key, value, stats, g), None, None)


def refuses(query, key, value, mask, bias, rule_query: Rule, rule_key: Rule) -> str | None:
    """Why the kernels do not take these operands, or None if they do."""
    sizes = (*query.shape, *key.shape, *value.shape)
    if not all(isinstance(size, int) for size in sizes):
        return "the kernels are cut for lengths known when tracing, and one of these is symbolic"
    if 0 in sizes:
        return "an operand is empty"
    if mask is not None or bias is not None:
        return "the kernels add no bias and apply no mask"
    if not {rule_query.kind, rule_key.kind} <= {"hardtanh", "sign"}:
        return 'they know hardtanh and sign; the rule "full" is a matrix product, which XLA does as well'
    least, most = _DEPTHS
    if not all(least <= array.shape[-1] <= most for array in (query, value)):
        return f"heads need a depth from {least} to {most}"
    if key.shape[-2] <= LANES:
        return (
            f"up to {LANES} keys leave too little work between sums along the lanes: by the compiler's "
            f"schedules, 65 tokens of depth 64 take four times as long backward as the composed form"
        )
    if key.shape[-2] > _MOST_KEYS:
        return f"more than {_MOST_KEYS} keys do not fit in VMEM with their gradients"
    return None


# ---- how it enters a program: leading axes are folded into one, that of the heads ----


def _call(method, scale, rules, interpret, *operands):
    leading = operands[0].shape[:-2]
    folded = [array.reshape(-1, *array.shape[-2:]) for array in operands]
    results = _attention_p.bind(*folded, method=method, scale=scale, rules=rules, interpret=interpret)
    return [array.reshape(*leading, *array.shape[1:]) for array in results]


@_attention_p.def_abstract_eval
def _abstract(query, key, value, *rest, method, scale, rules, interpret):
    rows = query.shape[:-1]
    shapes = (query.shape, key.shape, value.shape)
    if method == "forward":
        shapes = ((*rows, value.shape[-1]), (*rows, 2))
    return [query.update(shape=s, dtype=jnp.dtype("float32"), weak_type=False) for s in shapes]


evaluate_compiled(_attention_p, ("method", "scale", "rules", "interpret"))


def _batched(operands, axes, **static):
    moved = batch_in_front(operands, axes)
    results = _call(static["method"], static["scale"], static["rules"], static["interpret"], *moved)
    return results, [0] * len(results)


batching.primitive_batchers[_attention_p] = _batched


def _lower_elsewhere(ctx, *operands, method, scale, rules, interpret):
    if not interpret:
        require_other_platforms(ctx, "tpu", "TPUs")
    run = functools.partial(_run_kernel, interpret=True) if interpret else _run_plain
    return lower_function(ctx, run, method, scale, rules, *operands, multiple_results=True)


def _lower(ctx, *operands, method, scale, rules, interpret):
    axis_context = ctx.module_context.axis_context
    static, run = (method, scale, rules), _run_plain
    mesh = named_mesh(axis_context)
    if interpret or is_local(axis_context):
        run = functools.partial(_run_kernel, interpret=interpret)
    elif mesh is not None and ctx.avals_in[0].shape[0] % mesh.size == 0:
        run = functools.partial(_run_split, mesh)
    else:
        warn_of_plain_form(f"adder_attention {method}", *ctx.avals_in[:2])
    return lower_function(ctx, run, *static, *operands, multiple_results=True)


mlir.register_lowering(_attention_p, _lower_elsewhere)
mlir.register_lowering(_attention_p, _lower, platform="tpu")


def _run_plain(method, scale, rules, *operands):
    """The same in XLA's own operations."""
    from adderflax.operators.matmul import adder_matmul  # which stands on the table that holds this

    query, key, value, *rest = (array[:, None] for array in operands)
    if method == "forward":
        score = functools.partial(adder_matmul, implementation="xla")
        results = _attention_xla.forward(query, key, value, None, None, scale, score=score)
        results = results[0], jnp.concatenate(results[1:], axis=-1)
    else:
        (stats, g), (grad_x, grad_y) = rest, rules
        score = functools.partial(adder_matmul, grad_x=grad_x, grad_y=grad_y, implementation="xla")
        stats = jnp.split(stats, 3, axis=-1)
        results = _attention_xla.backward(query, key, value, None, None, scale, *stats, g, score=score)[:3]
    return [array[:, 0].astype(jnp.float32) for array in results]


def _run_split(mesh, method, scale, rules, *operands):
    """The kernel on each device's part of the heads."""
    split = PartitionSpec(mesh.axis_names)
    run = functools.partial(_run_kernel, method, scale, rules)
    return jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)(*operands)


# ---- the kernels ----


class _Cut(NamedTuple):
    """How the heads are cut.

    Attributes:
        keys: that exist.
        tile: queries of a tile of the map.
        rows: queries of a block, a multiple of that.
        blocks: of queries.
        heads: that share a step of the grid; 1 unless there is one block of queries.
    """

    keys: int
    tile: int
    rows: int
    blocks: int
    heads: int


def _cut(count: int, queries: int, keys: int, depth: int, value_depth: int) -> _Cut:
    width = ceil_div(keys, LANES)

    def cycles(height):
        # Of the distances; the cross-lane unit takes 2.2 for each broadcast.
        step = height * max(2.2, 0.75 * width)
        return ceil_div(queries, height * SUBLANES) * (_LATENCY + depth * step)

    height = min(range(min(8, _TILE // width), 0, -1), key=cycles)
    tile = height * SUBLANES
    tiles = ceil_div(queries, tile)
    blocks = ceil_div(tiles, max(1, _MAP // (width * LANES * tile)))
    rows = ceil_div(tiles, blocks) * tile
    # Of operands and results backward, depths filled up to whole registers.
    head = 4 * LANES * (4 * rows + 2 * width * LANES) + 8 * width * LANES * (depth + value_depth)
    heads = min(count, max(1, min(round(_STEP_CYCLES / cycles(height)), _GROUP_BYTES // head)))
    return _Cut(keys, tile, rows, blocks, heads if blocks == 1 else 1)


def _run_kernel(method, scale, rules, *operands, interpret: bool = False):
    """The kernels on what one device holds: (product, stats) or (dquery, dkey, dvalue)."""
    query, key, value, *rest = (array.astype(jnp.float32) for array in operands)
    (count, queries, depth), (_, keys, value_depth) = query.shape, value.shape
    cut = _cut(count, queries, keys, depth, value_depth)
    width = ceil_div(keys, LANES) * LANES
    padded = cut.blocks * cut.rows

    def fill(array, length, with_=0.0):
        return jnp.pad(
            array, ((0, 0), (0, length - array.shape[1]), (0, 0)), constant_values=jnp.float32(with_)
        )

    def by_query(last):
        return pl.BlockSpec((cut.heads, cut.rows, last), lambda n, i: (n, i, 0))

    def whole(*shape):
        return pl.BlockSpec((cut.heads, *shape), lambda n, i: (n, 0, 0))

    turned = jnp.swapaxes(fill(key, width), 1, 2)
    arrays = [fill(query, padded), turned, fill(value, width)]
    in_specs = [by_query(depth), whole(depth, width), whole(width, value_depth)]
    scratch = [(cut.rows, width)]
    if method == "forward":
        kernel = functools.partial(_forward_kernel, cut, count, scale)
        results = [((count, padded, value_depth), by_query(value_depth)), ((count, padded, 2), by_query(2))]
    else:
        kernel = functools.partial(_backward_kernel, cut, count, scale, rules)
        stats, g = rest
        # exp(anything - inf) = 0: queries that do not exist weigh nothing.
        maximum = fill(stats[..., :1], padded, jnp.inf)
        arrays += [jnp.concatenate([maximum, fill(stats[..., 1:], padded, 1.0)], axis=-1), fill(g, padded)]
        in_specs += [by_query(3), by_query(value_depth)]
        scratch += [(depth, SUBLANES, width)]
        results = [
            ((count, padded, depth), by_query(depth)),
            ((count, depth, width), whole(depth, width)),
            ((count, width, value_depth), whole(width, value_depth)),
        ]
    blocks = sum(
        math.prod((*spec.block_shape[:-1], max(LANES, spec.block_shape[-1])))
        for spec in (*in_specs, *(spec for _, spec in results))
    )
    held = sum(map(math.prod, scratch)) + 4 * cut.rows * width
    found = pl.pallas_call(
        kernel,
        grid=(ceil_div(count, cut.heads), cut.blocks),
        in_specs=in_specs,
        out_specs=[spec for _, spec in results],
        out_shape=[out_struct(shape, *arrays) for shape, _ in results],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=compiler_params(("parallel", "arbitrary"), 4 * (2 * blocks + held)),
        interpret=interpret,
        name=f"adder_attention_{method}",
    )(*arrays)
    if method == "forward":
        return [array[:, :queries] for array in found]
    dquery, dkey, dvalue = found
    return [dquery[:, :queries], jnp.swapaxes(dkey, 1, 2)[:, :keys], dvalue[:, :keys]]


def _forward_kernel(cut, count, scale, query_ref, key_ref, value_ref, out_ref, stats_ref, map_s):
    def head(b):
        _distances(cut, query_ref.at[b], key_ref.at[b], map_s)
        logits = jnp.where(_exists(cut, map_s), map_s[...] * -scale, -jnp.inf)
        maximum = jnp.max(logits, axis=1, keepdims=True)
        weights = jnp.exp(logits - maximum)
        sums = jnp.sum(weights, axis=1, keepdims=True)
        out_ref[b] = _dot(weights, value_ref[b], (1, 0)) / sums
        stats_ref[b, :, 0:1] = maximum
        stats_ref[b, :, 1:2] = sums

    _each_head(cut, count, head)


def _backward_kernel(
    cut, count, scale, rules, query_ref, key_ref, value_ref, stats_ref, g_ref, *results_and_scratch
):
    dquery_ref, dkey_ref, dvalue_ref, map_s, dkey_s = results_and_scratch
    step = pl.program_id(1)

    def head(b):
        @pl.when(step == 0)
        def _():
            dkey_s[...] = jnp.zeros_like(dkey_s)
            dvalue_ref[b] = jnp.zeros(dvalue_ref.shape[1:], jnp.float32)

        _distances(cut, query_ref.at[b], key_ref.at[b], map_s)
        maximum, sums, delta = (stats_ref[b, :, i : i + 1] for i in range(3))
        g = g_ref[b]
        weights = jnp.exp(map_s[...] * -scale - maximum) * (1.0 / sums)
        weights = jnp.where(_exists(cut, map_s), weights, 0.0)
        dvalue_ref[b] += _dot(weights, g, (0, 0))
        map_s[...] = weights * (_dot(g, value_ref[b], (1, 1)) - delta) * scale
        _gradients(cut, rules, query_ref.at[b], key_ref.at[b], map_s, dquery_ref.at[b], dkey_s)

        @pl.when(step == cut.blocks - 1)
        def _():
            dkey_ref[b] = -clipped_rule(rules[1])[1] * jnp.sum(dkey_s[...], axis=1)

    _each_head(cut, count, head)


def _each_head(cut, count, head):
    """Of those that exist: the last step of the grid may have fewer."""
    if cut.heads == 1:
        head(0)
    else:
        repeat(jnp.minimum(cut.heads, count - pl.program_id(0) * cut.heads), head)


def _exists(cut, map_s):
    return lax.broadcasted_iota(jnp.int32, map_s.shape, 1) < cut.keys


def _dot(x, y, contracted):
    """float32 product over one axis of each; the unit's default would round it to bfloat16."""
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision="highest", preferred_element_type=jnp.float32)


def _each_tile(cut, body):
    repeat(cut.rows // cut.tile, lambda i: body(pl.ds(pl.multiple_of(i * cut.tile, cut.tile), cut.tile)))


def _lane_tiles(map_s):
    return [slice(start, start + LANES) for start in range(0, map_s.shape[1], LANES)]


def _distances(cut, query_ref, key_ref, map_s):
    """map[t, s] = sum_d |query[t, d] - key[d, s]|."""

    def tile(rows):
        query, width = query_ref[rows, :], _lane_tiles(map_s)
        total = [jnp.zeros((cut.tile, LANES), jnp.float32) for _ in width]
        for d in range(query.shape[1]):
            column = jnp.broadcast_to(query[:, d : d + 1], total[0].shape)
            for t, lanes in enumerate(width):
                total[t] = total[t] + jnp.abs(column - key_ref[d : d + 1, lanes])
        for t, lanes in enumerate(width):
            map_s[rows, lanes] = total[t]

    _each_tile(cut, tile)


def _gradients(cut, rules, query_ref, key_ref, map_s, dquery_ref, dkey_s):
    """The queries' gradients, and minus the keys', added up in eight rows without their factor."""
    (rule_query, factor), (rule_key, _) = map(clipped_rule, rules)

    def tile(rows):
        query, width = query_ref[rows, :], _lane_tiles(map_s)
        dscore = [map_s[rows, lanes] for lanes in width]
        dquery = jnp.zeros(query.shape, jnp.float32)
        lane = lax.broadcasted_iota(jnp.int32, query.shape, 1)
        for d in range(query.shape[1]):
            column = jnp.broadcast_to(query[:, d : d + 1], dscore[0].shape)
            total = jnp.zeros(column.shape, jnp.float32)
            for t, lanes in enumerate(width):
                difference = key_ref[d : d + 1, lanes] - column
                term = rule_query(difference) * dscore[t]
                total = total + term
                if rules[0] != rules[1]:
                    term = rule_key(difference) * dscore[t]
                dkey_s[d, :, lanes] += jnp.sum(term.reshape(-1, SUBLANES, LANES), axis=0)
            dquery = jnp.where(lane == d, jnp.sum(total, axis=1, keepdims=True), dquery)
        dquery_ref[rows, :] = factor * dquery

    _each_tile(cut, tile)
