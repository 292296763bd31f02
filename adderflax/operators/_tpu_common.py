"""What the Pallas kernels for TPUs share."""

import logging
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.interpreters import mlir

from adderflax.operators.rules import Rule

_logger = logging.getLogger("adderflax.operators")

LANES, SUBLANES = 128, 8  # of a vector register: 1024 numbers of 32 bits


def ceil_div(length: int, unit: int) -> int:
    """How many units cover the length."""
    return -(-length // unit)


def traced_ceil_div(length, unit: int):
    """The same of a traced length, whose // needs jnp.sign (see `clipped_rule`)."""
    return lax.div(length + (unit - 1), unit)


def repeat(count, body) -> None:
    """Runs body(0), body(1), ... for their effects; the count may be traced."""

    def step(index, _):
        body(index)

    lax.fori_loop(jnp.int32(0), count, step, None)


def clipped_rule(rule: Rule):
    """A rule as a function of the difference, in as few operations as can be, and a factor.

    clip(s d, -1, 1) = s clip(d, -1 / s, 1 / s) saves a multiplication. It is not used for
    slopes whose factor could take a sum out of float32's range. sign is the steepest slope:
    differences below 2^-126 are zero to a TPU. jnp.sign asks which TPU is attached when it is
    lowered, so a program could not be compiled where none is.
    """
    slope = 2.0**126 if rule.kind == "sign" else rule.slope
    if 2.0**-20 <= slope <= 2.0**20:
        return lambda difference: jnp.clip(difference, -1.0 / slope, 1.0 / slope), slope
    return lambda difference: jnp.clip(difference * slope, -1.0, 1.0), 1.0


def out_struct(shape, *operands: jax.Array) -> jax.ShapeDtypeStruct:
    """A float32 result that varies over the shard_map axes of the operands."""
    varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in operands))
    axis_type = jax.sharding.ManualAxisType(varying=varying)
    return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=axis_type)


def compiler_params(dimension_semantics: tuple[str, ...], vmem_bytes: int) -> pltpu.CompilerParams:
    """Room for what a kernel holds and what the compiler spills, and no less than is the default."""
    limit = max(vmem_bytes + 4 * 2**20, 16 * 2**20)
    return pltpu.CompilerParams(dimension_semantics=dimension_semantics, vmem_limit_bytes=limit)


def cost_estimate(terms: int, gradient: bool, shape, *operands: jax.Array) -> pl.CostEstimate:
    """What XLA's scheduler is told."""
    loaded = sum(operand.size * operand.dtype.itemsize for operand in operands)
    return pl.CostEstimate(
        flops=terms * (4 if gradient else 3),
        transcendentals=0,
        bytes_accessed=loaded + 4 * math.prod(shape),
    )


def named_mesh(axis_context):
    """The mesh of jax.set_mesh, if XLA partitions the whole program over it, or None."""
    if isinstance(axis_context, mlir.SPMDAxisContext):
        return None
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.size == axis_context.num_devices else None


def warn_of_plain_form(what: str, x, y) -> None:
    """Says that XLA's own form is used, and what would let the kernels be used."""
    _logger.warning(
        "%s of %s and %s: XLA's own loop, at about half the speed, takes the place of the TPU kernel, "
        "which the compiler cannot partition. Name the mesh with jax.set_mesh, and let its size divide "
        "the batch, or use shard_map over all of its axes.",
        *(what, x.shape, y.shape),
    )
