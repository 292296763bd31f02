"""The table of implementations and the choice among them."""

import functools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from adderflax.operators import _cpu, _gpu, _gpu_attention, _reference, _tpu, _tpu_attention, _xla
from adderflax.operators.rules import Rule

LOG_VARIABLE = "ADDERFLAX_LOG_IMPLEMENTATION"
_logger = logging.getLogger("adderflax.operators")


class FusedAttention(NamedTuple):
    """L1 attention that keeps no map of queries x keys in device memory, forward and backward.

    Operands: query [B, H, T, D], key [B, H, S, D] and value [B, H, S, E], float32, bfloat16 or
    float16 each; mask (bool, True where a query attends) and bias (floating), each None or of rank 4
    and broadcastable to [B, H, T, S]; scale, a Python number. logits = scale * scores + bias, and
    where the mask hides `_attention_xla.MASKED`, so that a row without visible keys is uniform. The
    identity is no part of it: `adder_attention` adds the values itself.

    Attributes:
        forward: (query, key, value, mask, bias, scale) -> float32 (product [B, H, T, E], maximum
            [B, H, T, 1], sums [B, H, T, 1]): softmax(logits) @ value not rounded to value's dtype,
            and of each row of logits the maximum and the sum of exp(logits - maximum).
        backward: (query, key, value, mask, bias, scale, maximum, sums, delta, g, rule_query,
            rule_key) -> (dquery, dkey, dvalue, dbias, None), of the operands' shapes in any float
            dtype; dbias is None without bias. g [B, H, T, E] is the product's cotangent, float32
            with values of value's dtype, and delta [B, H, T, 1] the sum of g * product in each row.
        refuses: (query, key, value, mask, bias, rule_query, rule_key) -> the reason why it does not
            take these, or None. XLA's operations around `Implementation.forward` then do.
    """

    forward: Callable[..., tuple]
    backward: Callable[..., tuple]
    refuses: Callable[..., str | None]


class Implementation(NamedTuple):
    """One way to compute the operator.

    Operands are either x [M, K], y [K, N] or x [B, M, K], y [B, K, N], in float32, bfloat16 or
    float16 each; results are float32.

    Attributes:
        forward: (x, y) -> [..., M, N].
        gradient_x: (x, y, g, rule) -> [..., M, K], for every rule but "full", and rules that are
            functions only where it can be compiled for all platforms.
        gradient_y: (x, y, g, rule) -> [..., K, N], likewise.
        platforms: lowering platforms it can be compiled for; None means all.
        refuses: (x, y) -> the reason why it does not take these operands, or None.
        attention: the whole of attention, where the implementation has it.
        byte_distances: (x, y) of uint8 -> the forward method's sums in int32, where the implementation has
            kernels for them; without it integers are summed as float32.
        unavailable: () -> what this machine lacks to build it, or None.
    """

    forward: Callable[[jax.Array, jax.Array], jax.Array]
    gradient_x: Callable[[jax.Array, jax.Array, jax.Array, Rule], jax.Array]
    gradient_y: Callable[[jax.Array, jax.Array, jax.Array, Rule], jax.Array]
    platforms: tuple[str, ...] | None = None
    refuses: Callable[[jax.Array, jax.Array], str | None] = lambda x, y: None
    attention: FusedAttention | None = None
    byte_distances: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    unavailable: Callable[[], str | None] = lambda: None


IMPLEMENTATIONS = {
    "reference": Implementation(_reference.forward, _reference.gradient_x, _reference.gradient_y),
    "xla": Implementation(_xla.forward, _xla.gradient_x, _xla.gradient_y),
    "cpu": Implementation(
        *(_cpu.forward, _cpu.gradient_x, _cpu.gradient_y, _cpu.PLATFORMS, _cpu.refuses),
        byte_distances=_cpu.byte_distances,
        unavailable=_cpu.unavailable,
    ),
    "gpu": Implementation(
        _gpu.forward,
        _gpu.gradient_x,
        _gpu.gradient_y,
        _gpu.PLATFORMS,
        _gpu.refuses,
        FusedAttention(_gpu_attention.forward, _gpu_attention.backward, _gpu_attention.refuses),
        _gpu.byte_distances,
        _gpu.unavailable,
    ),
    "tpu": Implementation(
        *(_tpu.forward, _tpu.gradient_x, _tpu.gradient_y, _tpu.PLATFORMS, _tpu.refuses),
        FusedAttention(_tpu_attention.forward, _tpu_attention.backward, _tpu_attention.refuses),
    ),
}
# What implementation=None tries for each lowering platform before the fallback. "cpu" asks for a compiler,
# and only its name chooses it. "gpu" has run on an H200 (results/operators.md), but for its sums of bytes,
# which only its name chooses. "tpu" has never run on a TPU: interpret mode checked its numbers, the TPU's
# compiler its programs and their schedules.
_PREFERRED = {"tpu": "tpu", "cuda": "gpu"}
_FALLBACK = "xla"


def available_implementations(platform: str | None = None) -> tuple[str, ...]:
    """Names that the keyword `implementation` takes, besides None.

    Args:
        platform: "cpu", "cuda", "rocm" or "tpu" for the names that can be compiled for it alone; "gpu", as
            `jax.default_backend()` has it, is taken as "cuda", and any other has those that run everywhere.
    """
    platform = "cuda" if platform == "gpu" else platform
    return tuple(
        name
        for name, implementation in IMPLEMENTATIONS.items()
        if platform is None or implementation.platforms is None or platform in implementation.platforms
    )


def check_implementation(name: str | None) -> str | None:
    """Returns the name, or raises a ValueError that lists the allowed ones."""
    if name is not None and not (isinstance(name, str) and name in IMPLEMENTATIONS):
        raise ValueError(
            f"implementation: unknown name {name!r}; allowed are None (choose by platform) and "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}."
        )
    return name


def check_accepts(name: str | None, x: jax.Array, y: jax.Array) -> None:
    """Raises a ValueError if an explicitly named implementation is not here or does not take the operands."""
    if name is None:
        return
    if (lacking := unavailable(name)) is not None:
        raise ValueError(
            f"implementation: {name!r} cannot be built on this machine: {lacking}. implementation=None"
            " chooses by platform."
        )
    if (reason := IMPLEMENTATIONS[name].refuses(x, y)) is not None:
        raise ValueError(
            f"implementation: {name!r} does not take x {x.shape} {x.dtype} and y {y.shape} "
            f"{y.dtype}: {reason}. implementation=None falls back by itself."
        )


def unavailable(name: str) -> str | None:
    """What this machine lacks to build an implementation of the table, or None. It may take seconds."""
    return IMPLEMENTATIONS[name].unavailable()


def sums_bytes(name: str | None) -> bool:
    """Whether an explicitly named implementation has kernels for sums of uint8."""
    return name is not None and IMPLEMENTATIONS[name].byte_distances is not None


def logging_enabled() -> bool:
    """Whether programs traced now log the implementation each time they run it."""
    return os.environ.get(LOG_VARIABLE, "") not in ("", "0")


def announce(log: bool, message: str) -> None:
    """Has the program that is being traced log a message each time it runs."""
    if log:
        jax.debug.callback(lambda: _logger.warning(message))


def dispatch(method: str, operands, static, implementation: str | None, log: bool) -> jax.Array:
    """Runs a method of the named implementation, or of the best one for each platform.

    Args:
        method: "forward", "byte_distances", "gradient_x" or "gradient_y".
        operands: the arrays.
        static: further arguments.
        implementation: a name of the table, or None to choose when the program is lowered.
        log: whether the program says which implementation it runs, whenever it runs it.
    """

    def runner(name):
        run = getattr(IMPLEMENTATIONS[name], method)
        message = f"adder_matmul {method} of {[a.shape for a in operands]} runs {name!r}"

        def logged(*operands):
            announce(log, message)
            return run(*operands, *static)

        return logged

    # Kernels are written for the named rules.
    by_kernels = not any(isinstance(item, Rule) and callable(item.kind) for item in static)
    if implementation is not None:
        named = by_kernels or IMPLEMENTATIONS[implementation].platforms is None
        return _differentiable(runner(implementation if named else _FALLBACK), runner(_FALLBACK))(*operands)
    special = {
        platform: runner(name)
        for platform, name in _PREFERRED.items()
        if by_kernels and not (unavailable(name) or IMPLEMENTATIONS[name].refuses(*operands[:2]))
    }
    if not special:
        return runner(_FALLBACK)(*operands)
    chosen = functools.partial(lax.platform_dependent, **special, default=runner(_FALLBACK))
    return _differentiable(chosen, runner(_FALLBACK))(*operands)


def dispatch_attention(method: str, operands, plan, composed: Callable):
    """Runs a fused attention where the implementation has one that takes the operands.

    Args:
        method: "forward" or "backward".
        operands: what the method of `FusedAttention` takes, but for the rules.
        plan: rule_query, rule_key, implementation and log of the call.
        composed: (*operands) -> the same results, for everywhere else.
    """
    arrays, scale, rest = operands[:5], operands[5], operands[6:]
    rules = (plan.rule_query, plan.rule_key)

    def runner(name):
        fused = IMPLEMENTATIONS[name].attention
        if fused is None or unavailable(name) or fused.refuses(*arrays, *rules):
            return None
        message = f"adder_attention {method} of {arrays[0].shape} runs {name!r}, fused"

        def run(*operands):
            announce(plan.log, message)
            static = rules if method == "backward" else ()
            return getattr(fused, method)(*operands[:5], scale, *operands[5:], *static)

        return run

    def fallback(*operands):
        return composed(*operands[:5], scale, *operands[5:])

    if plan.implementation is not None:
        chosen = runner(plan.implementation)
        return (_differentiable(chosen, fallback) if chosen else fallback)(*arrays, *rest)
    special = {platform: runner(name) for platform, name in _PREFERRED.items() if runner(name)}
    if not special:
        return fallback(*arrays, *rest)

    def in_float32(run):
        # Gradients may come in any float dtype, but in the same one from every platform's branch.
        return lambda *operands: jax.tree.map(lambda array: array.astype(jnp.float32), run(*operands))

    branches = {platform: in_float32(run) for platform, run in special.items()}
    chosen = functools.partial(lax.platform_dependent, **branches, default=in_float32(fallback))
    return _differentiable(chosen, in_float32(fallback))(*arrays, *rest)


def _differentiable(run: Callable, composed: Callable) -> Callable:
    """`run` with the derivatives of `composed`, which computes the same by XLA's operations.

    A kernel has none of its own, and a derivative of a gradient, as in a Hessian, passes every platform's
    branch, those that will not run included.
    """
    wrapped = jax.custom_jvp(run)

    @wrapped.defjvp
    def _(operands, tangents):
        return jax.jvp(composed, operands, tangents)

    return wrapped


def with_automatic_axes(function: Callable, result_spec: Callable) -> Callable:
    """Runs a function under automatic sharding where the mesh of an operand has Explicit axes.

    That mesh need not be the one that `jax.set_mesh` has set: arrays bring their own. Blocked forms
    reshape and loop in ways whose shardings Explicit mode refuses to guess, while the sharding of
    the result follows from the operands'.

    Args:
        function: of arrays and static keywords.
        result_spec: from the operands' PartitionSpecs to the result's.
    """

    @functools.wraps(function)
    def wrapped(*operands, **static):
        shardings = [jax.typeof(operand).sharding for operand in operands]
        meshes = [sharding.mesh for sharding in shardings if sharding.mesh.explicit_axes]
        if not meshes:
            return function(*operands, **static)
        if len(set(meshes)) > 1:
            told = " and ".join(map(str, dict.fromkeys(meshes)))
            raise ValueError(
                f"The operands are on different meshes, {told}: put all on one by jax.device_put."
            )
        run = functools.partial(function, **static)
        spec = result_spec(*(sharding.spec for sharding in shardings))
        with jax.sharding.use_abstract_mesh(meshes[0]):
            return jax.sharding.auto_axes(run, axes=meshes[0].explicit_axes, out_sharding=spec)(*operands)

    return wrapped


def forward_spec(x: PartitionSpec, y: PartitionSpec) -> PartitionSpec:
    """Sharding of the product: batch as in either, rows as in x, columns as in y.

    Mesh axes that this would use twice are left out of the later place.
    """
    batch_x, batch_y = tuple(x[:-2]), tuple(y[:-2])
    rank = max(len(batch_x), len(batch_y))
    batch_x = (None,) * (rank - len(batch_x)) + batch_x
    batch_y = (None,) * (rank - len(batch_y)) + batch_y
    entries, used = [], set()
    for entry in (*(a or b for a, b in zip(batch_x, batch_y)), x[-2], y[-1]):
        names = set(entry if isinstance(entry, tuple) else (entry,)) - {None}
        entries.append(None if names & used else entry)
        used |= names
    return PartitionSpec(*entries)
