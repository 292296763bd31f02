"""Fused L1 attention on NVIDIA GPUs: no map of queries x keys in device memory.

The CUDA source is _gpu_attention.cu; `_gpu.py` says how it is compiled and called, and where XLA's
operations take its place: in exports, in programs for several devices that XLA partitions (unless
`jax.set_mesh` names the mesh, over whose axes batch and heads then stay cut), and for other
platforms. Those are the operations of _attention_xla.py around the adder_matmul of `_gpu.py`.

The forward pass costs one kernel, the backward pass two: one over blocks of queries and one over
blocks of keys. Each computes the scores again; nothing is summed with atomics, so that results
repeat bit by bit.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from adderflax.operators import _attention_xla, _gpu
from adderflax.operators import _gpu_kernels as kernels
from adderflax.operators._primitives import (
    batch_in_front,
    evaluate_compiled,
    is_local,
    knowing_mesh,
    lower_function,
    named_mesh,
)
from adderflax.operators.rules import Rule

DEEPEST = 128  # of queries, keys and values: a thread holds their gradients in registers
THREADS = 256
_LANES = 16
_PASSES = {"forward": 0, "query": 1, "key": 2}

_attention_p = Primitive("adder_attention_gpu")
_attention_p.multiple_results = True


def refuses(query, key, value, mask, bias, rule_query: Rule, rule_key: Rule) -> str | None:
    """Why the kernels cannot take the operands here, or None."""
    reason = _gpu.refuses(query, value) or _gpu.refuses(key, value)
    if reason is not None:
        return reason
    if mask is not None or bias is not None:
        return "they know no mask and no bias"
    if not {rule_query.kind, rule_key.kind} <= {"hardtanh", "sign"}:
        return "they know the rules hardtanh and sign"
    if max(query.shape[-1], value.shape[-1]) > DEEPEST:
        return f"no head may be deeper than {DEEPEST}"
    return "there is nothing to compute" if 0 in (*query.shape, *value.shape) else None


def forward(query, key, value, mask, bias, scale: float):
    """See `FusedAttention.forward`."""
    return tuple(_bind("forward", scale, None, query, key, value))


def backward(query, key, value, mask, bias, scale: float, maximum, sums, delta, g, rule_query, rule_key):
    """See `FusedAttention.backward`."""
    operands = query, key, value, maximum, sums, delta, g
    dquery, dkey, dvalue = _bind("backward", scale, (rule_query, rule_key), *operands)
    return dquery, dkey, dvalue, None, None


def _bind(method, scale, rules, *operands):
    return _attention_p.bind(*operands, method=method, scale=scale, rules=rules, partitioned=False)


def _plain(method, scale, rules, *operands):
    """The same in XLA's own operations."""
    # Not at the top: the choice of an implementation, which matmul makes, knows this module.
    from adderflax.operators.matmul import adder_matmul

    score = functools.partial(adder_matmul, implementation="gpu")
    if rules is not None:
        score = functools.partial(score, grad_x=rules[0], grad_y=rules[1])
    query, key, value, *rest = operands
    results = getattr(_attention_xla, method)(query, key, value, None, None, scale, *rest, score=score)
    return [array.astype(jnp.float32) for array in results[:3]]


# --- the kernels ---


class Problem(NamedTuple):
    """One kernel call.

    Attributes:
        part: "forward", "query" for the queries' gradient or "key" for those of keys and values.
        rule: of the gradient; None for the forward pass.
        groups: batch x heads.
        queries, keys, depth, value_depth: lengths.
        scale: of the scores.
        dtypes: names of the dtypes of query, key, value and, for gradients, of g.
    """

    part: str
    rule: Rule | None
    groups: int
    queries: int
    keys: int
    depth: int
    value_depth: int
    scale: float
    dtypes: tuple[str, ...]

    @property
    def own_lines(self) -> int:
        """Lines over which blocks are laid out; each goes through all of the others."""
        return self.keys if self.part == "key" else self.queries

    @property
    def other_lines(self) -> int:
        return self.queries if self.part == "key" else self.keys

    @property
    def micro(self) -> int:
        """Lines of a thread in a tile of 16 x 16 threads.

        Four are read as one vector, five one by one: for about a fifth more instructions, 65 lines
        fit into one tile.
        """

        def cost(micro: int) -> float:
            tile = _LANES * micro
            area = math.prod(math.ceil(lines / tile) * tile for lines in (self.queries, self.keys))
            return area * (1.0 if micro == 4 else 1.2)

        return min((4, 5), key=cost)

    @property
    def blocks_per_sm(self) -> int:
        """For how many blocks on a multiprocessor the registers must suffice."""
        return 2 if max(self.depth, self.value_depth) <= 64 else 1

    @property
    def blocks(self) -> int:
        return self.groups * math.ceil(self.own_lines / (_LANES * self.micro))


def source(problem: Problem) -> str:
    """The CUDA C++ of a problem."""
    types = [kernels.CPP_TYPES[dtype] for dtype in problem.dtypes]
    own, other, own_value, other_value = types[0], types[1], types[-1], types[2]
    if problem.part == "key":
        own, other, own_value, other_value = other, own, other_value, own_value
    return kernels.with_constants(
        "_gpu_attention.cu",
        PASS=_PASSES[problem.part],
        OWN_LINES=problem.own_lines,
        OTHER_LINES=problem.other_lines,
        DEPTH=problem.depth,
        VALUE_DEPTH=problem.value_depth,
        MICRO=problem.micro,
        BLOCKS_PER_SM=problem.blocks_per_sm,
        SCALE=f"{problem.scale:.9e}f",
        HALF_SLOPE=kernels.half_slope(problem.rule),
        IS_HARDTANH=str(problem.rule is not None and problem.rule.kind == "hardtanh").lower(),
        OWN_TYPE=own,
        OTHER_TYPE=other,
        OWN_VALUE_TYPE=own_value,
        OTHER_VALUE_TYPE=other_value,
    )


def problems_of(method, scale, rules, query, key, value, *rest) -> list[Problem]:
    """The kernels of a call, from anything with shapes and dtypes."""
    used = (query, key, value, *rest[3:])
    batch, heads, queries, depth = query.shape
    lengths = batch * heads, queries, key.shape[2], depth, value.shape[3]
    parts = [("forward", None)] if method == "forward" else zip(("query", "key"), rules)
    dtypes = tuple(str(array.dtype) for array in used)
    return [Problem(part, rule, *lengths, scale, dtypes) for part, rule in parts]


def by_role(part: str, query, key, value, *rest) -> tuple:
    """The operands in the order of a kernel's arguments."""
    if part == "forward":
        return query, key, value
    maximum, sums, delta, g = rest
    ends = (query, key, g, value) if part == "query" else (key, query, value, g)
    return *ends, maximum, sums, delta


def launch(problem: Problem, results, *operands) -> list[jax.Array]:
    """The kernel's call in a program for one CUDA device."""
    ordered = by_role(problem.part, *operands)
    return _gpu.run_cuda(source(problem), problem.blocks, THREADS, ordered, results)


# --- as a JAX primitive ---


def result_shapes(method, query, key, value):
    if method == "backward":
        return query.shape, key.shape, value.shape
    rows = query.shape[:-1]
    return (*rows, value.shape[-1]), (*rows, 1), (*rows, 1)


@_attention_p.def_abstract_eval
def _abstract(query, key, value, *rest, method, **static):
    # From an operand, so that the result varies over the same mesh axes of a shard_map.
    shapes = result_shapes(method, query, key, value)
    return [query.update(shape=shape, dtype=jnp.dtype("float32"), weak_type=False) for shape in shapes]


evaluate_compiled(_attention_p, ("method", "scale", "rules", "partitioned"))


def _batched(operands, axes, **static):
    """vmap: the new axis joins the batch."""
    moved = batch_in_front(operands, axes)
    size = moved[0].shape[0]
    folded = [array.reshape(size * array.shape[1], *array.shape[2:]) for array in moved]
    results = _attention_p.bind(*folded, **static)
    return [array.reshape(size, -1, *array.shape[1:]) for array in results], [0] * len(results)


batching.primitive_batchers[_attention_p] = _batched


def _lower_plain(ctx, *operands, method, scale, rules, partitioned):
    return lower_function(ctx, _plain, method, scale, rules, *operands, multiple_results=True)


def _lower(ctx, *operands, **static):
    context = ctx.module_context
    local = static["partitioned"] or is_local(context.axis_context)
    mesh = None if local else named_mesh(context.axis_context)
    problems = problems_of(static["method"], static["scale"], static["rules"], *ctx.avals_in)
    if (
        context.lowering_parameters.for_export
        or not (local or mesh)
        or not np.isfinite(np.float32(static["scale"]))
        or max(problem.blocks for problem in problems) >= 2**31  # more than a grid can hold
    ):
        return _lower_plain(ctx, *operands, **static)
    if mesh:
        run = _partitioned(static["method"], static["scale"], static["rules"])
        return lower_function(knowing_mesh(ctx, mesh), run, *operands, multiple_results=True)
    return lower_function(ctx, _run, static["method"], problems, *operands, multiple_results=True)


mlir.register_lowering(_attention_p, _lower_plain)
mlir.register_lowering(_attention_p, _lower, platform="cuda")


def _run(method, problems, *operands):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in result_shapes(method, *operands[:3])]
    if method == "forward":
        return launch(problems[0], shapes, *operands)
    (dquery,) = launch(problems[0], shapes[:1], *operands)
    dvalue, dkey = launch(problems[1], shapes[:0:-1], *operands)
    return [dquery, dkey, dvalue]


@functools.cache
def _partitioned(method, scale, rules):
    """The kernels with their own partitioning: over batch and heads."""
    # Lengths of queries, keys, depths and of the axis of one number a row: never cut.
    results = ("tv", "to", "to") if method == "forward" else ("td", "sd", "sv")
    operands = ("td", "sd", "sv", *(() if method == "forward" else ("to", "to", "to", "tv")))
    static = {"method": method, "scale": scale, "rules": rules, "partitioned": True}

    def partition(mesh, arrays, _):
        cut = tuple(arrays[0].sharding.spec)[:2]
        sharding = NamedSharding(mesh, PartitionSpec(*cut))

        def run(*local):
            return tuple(_attention_p.bind(*local, **static))

        return mesh, run, (sharding,) * len(results), (sharding,) * len(operands)

    @custom_partitioning
    def call(*arrays):
        return tuple(_attention_p.bind(*arrays, **static))

    def rule_of(groups):
        return ", ".join(f"b h {axes[0]} {axes[1]}" for axes in groups)

    call.def_partition(
        partition,
        sharding_rule=f"{rule_of(operands)} -> {rule_of(results)}",
        need_replication_factors=tuple("tdsvo"),
    )
    return call
