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

from adderflax.operators import _gpu, _reference, _xla
from adderflax.operators.rules import Rule

LOG_VARIABLE = "ADDERFLAX_LOG_IMPLEMENTATION"
_logger = logging.getLogger("adderflax.operators")


class Implementation(NamedTuple):
    """One way to compute the operator.

    Operands are either x [M, K], y [K, N] or x [B, M, K], y [B, K, N], in float32, bfloat16 or
    float16 each; results are float32.

    Attributes:
        forward: (x, y) -> [..., M, N].
        gradient_x: (x, y, g, rule) -> [..., M, K], for every rule but "full".
        gradient_y: (x, y, g, rule) -> [..., K, N], likewise; None derives it from gradient_x of
            the transposed problem.
        platforms: lowering platforms it can be compiled for; None means all.
        refuses: (x, y) -> the reason why it does not take these operands, or None.
    """

    forward: Callable[[jax.Array, jax.Array], jax.Array]
    gradient_x: Callable[[jax.Array, jax.Array, jax.Array, Rule], jax.Array]
    gradient_y: Callable[[jax.Array, jax.Array, jax.Array, Rule], jax.Array] | None = None
    platforms: tuple[str, ...] | None = None
    refuses: Callable[[jax.Array, jax.Array], str | None] = lambda x, y: None


IMPLEMENTATIONS = {
    "reference": Implementation(_reference.forward, _reference.gradient_x),
    "xla": Implementation(_xla.forward, _xla.gradient_x, _xla.gradient_y),
    "gpu": Implementation(_gpu.forward, _gpu.gradient_x, _gpu.gradient_y, _gpu.PLATFORMS, _gpu.refuses),
}
# What implementation=None tries for each lowering platform before the fallback. A kernel enters here
# when it has run on its device: "gpu" is compiled and emulated so far, and is used where it is named.
_PREFERRED: dict[str, str] = {}
_FALLBACK = "xla"


def available_implementations(platform: str | None = None) -> tuple[str, ...]:
    """Names that the keyword `implementation` takes, besides None.

    Args:
        platform: "cpu", "cuda", "rocm" or "tpu" for the names that can be compiled for it alone.
    """
    return tuple(
        name
        for name, implementation in IMPLEMENTATIONS.items()
        if platform is None or implementation.platforms is None or platform in implementation.platforms
    )


def check_implementation(name: str | None) -> str | None:
    """Returns the name, or raises a ValueError that lists the allowed ones."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: unknown name {name!r}; allowed are None (choose by platform) and "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}."
        )
    return name


def check_accepts(name: str | None, x: jax.Array, y: jax.Array) -> None:
    """Raises a ValueError if an explicitly named implementation does not take the operands."""
    reason = None if name is None else IMPLEMENTATIONS[name].refuses(x, y)
    if reason is not None:
        raise ValueError(
            f"implementation: {name!r} does not take x {x.shape} {x.dtype} and y {y.shape} "
            f"{y.dtype}: {reason}. implementation=None falls back by itself."
        )


def logging_enabled() -> bool:
    """Whether programs traced now log the implementation each time they run it."""
    return os.environ.get(LOG_VARIABLE, "") not in ("", "0")


def dispatch(method: str, operands, static, implementation: str | None, log: bool) -> jax.Array:
    """Runs a method of the named implementation, or of the best one for each platform.

    Args:
        method: "forward", "gradient_x" or "gradient_y".
        operands: the arrays.
        static: further arguments.
        implementation: a name of the table, or None to choose when the program is lowered.
        log: whether the program says which implementation it runs, whenever it runs it.
    """

    def runner(name):
        run = _method(IMPLEMENTATIONS[name], method)
        message = f"adder_matmul {method} of {[a.shape for a in operands]} runs {name!r}"

        def logged(*operands):
            if log:
                jax.debug.callback(lambda: _logger.warning(message))
            return run(*operands, *static)

        return logged

    if implementation is not None:
        return runner(implementation)(*operands)
    special = {
        platform: runner(name)
        for platform, name in _PREFERRED.items()
        if IMPLEMENTATIONS[name].refuses(*operands[:2]) is None
    }
    if not special:
        return runner(_FALLBACK)(*operands)
    return lax.platform_dependent(*operands, **special, default=runner(_FALLBACK))


def _method(implementation: Implementation, method: str) -> Callable:
    run = getattr(implementation, method)
    if run is not None:
        return run

    def transposed(x, y, g, rule):
        flipped = (jnp.swapaxes(array, -1, -2) for array in (y, x, g))
        return jnp.swapaxes(implementation.gradient_x(*flipped, rule), -1, -2)

    return transposed


def with_automatic_axes(function: Callable, result_spec: Callable) -> Callable:
    """Runs a function under automatic sharding where the mesh has Explicit axes.

    Blocked forms reshape and loop in ways whose shardings Explicit mode refuses to guess, while
    the sharding of the result follows from the operands'.

    Args:
        function: of arrays and static keywords.
        result_spec: from the operands' PartitionSpecs to the result's.
    """

    @functools.wraps(function)
    def wrapped(*operands, **static):
        axes = jax.sharding.get_abstract_mesh().explicit_axes
        if not axes:
            return function(*operands, **static)
        run = functools.partial(function, **static)
        spec = result_spec(*(jax.typeof(operand).sharding.spec for operand in operands))
        return jax.sharding.auto_axes(run, axes=axes, out_sharding=spec)(*operands)

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
