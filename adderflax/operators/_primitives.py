"""How kernels enter programs as JAX primitives: what those for GPUs and for TPUs share."""

import functools

import jax
import jax.numpy as jnp
from jax.interpreters import mlir


def result_shape(method: str, x, y) -> tuple[int, ...]:
    """Shape of the method's result, as `Implementation` in _dispatch.py describes the methods."""
    if method == "forward":
        return (*x.shape[:-1], y.shape[-1])
    return x.shape if method == "gradient_x" else y.shape


def batch_in_front(operands, axes) -> list[jax.Array]:
    """vmap's operands with its axis, of the same size in all of them, in front."""
    size = next(array.shape[axis] for array, axis in zip(operands, axes) if axis is not None)
    return [
        jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)
        for array, axis in zip(operands, axes)
    ]


def is_local(axis_context) -> bool:
    """Whether a program sees only one device's share: a single device, or inside of shard_map."""
    if isinstance(axis_context, mlir.SPMDAxisContext):
        automatic = set(axis_context.mesh.axis_names) - set(axis_context.manual_axes)
        return all(axis_context.mesh.shape[name] == 1 for name in automatic)
    return getattr(axis_context, "num_devices", 1) == 1


def lower_function(ctx, function, *arguments, multiple_results: bool = False):
    """Lowers function(*static, *operands); the operands are ctx's."""
    static = arguments[: len(arguments) - len(ctx.avals_in)]
    run = functools.partial(function, *static)
    return mlir.lower_fun(run, multiple_results=multiple_results)(ctx, *arguments[len(static) :])


def require_other_platforms(ctx, name: str, devices: str) -> None:
    """Raises a NotImplementedError if a program is lowered for a platform alone that has not these kernels.

    A program for several platforms holds every branch for every platform, though the others never run it.
    """
    platforms = ctx.module_context.platforms
    if len(platforms) == 1:
        raise NotImplementedError(
            f"implementation: {name!r} runs on {devices}, but this program is being lowered for"
            f" {platforms[0]}. implementation=None chooses by platform."
        )
