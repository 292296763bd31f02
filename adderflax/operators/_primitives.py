"""How kernels enter programs as JAX primitives: what those for several platforms share."""

import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from adderflax.operators.rules import Rule

_logger = logging.getLogger("adderflax.operators")


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


def evaluate_compiled(primitive: Primitive, static_argnames: tuple[str, ...]) -> None:
    """Has a primitive run eagerly as a compiled program, its only form, under `jax.disable_jit` too."""
    compiled = jax.jit(primitive.bind, static_argnames=static_argnames)

    def evaluate(*operands, **static):
        with jax.disable_jit(False):
            return compiled(*operands, **static)

    primitive.def_impl(evaluate)


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


class MatmulPrimitive:
    """The methods of `Implementation` in _dispatch.py by kernels that XLA cannot see into.

    The kernels run in programs for one device and under shard_map, and in programs that XLA partitions if
    `jax.set_mesh` names the mesh, by a partitioning of their own over batch, rows, columns and terms alike.
    XLA's operations take their place elsewhere, and in jax.export, which promises that programs outlive
    versions.

    Args:
        name: of the primitive.
        platform: the lowering platform of the kernels.
        implementation, devices: what messages call them, and what they run on.
        run: (method, rule, x, y, *g) -> the result, by kernels, in a program for one device. The operands are
            [M, K], [K, N] and [M, N], or all have a batch in front; none is empty.
        plain: (method, rule, x, y, *g) -> the same by XLA's operations, for any lengths.
        result_dtype: (x, y) -> the result's dtype.
    """

    def __init__(
        self,
        name: str,
        platform: str,
        implementation: str,
        devices: str,
        run: Callable[..., jax.Array],
        plain: Callable[..., jax.Array],
        result_dtype: Callable[..., jnp.dtype],
    ):
        self.platform, self.implementation, self.devices = platform, implementation, devices
        self.run, self.plain, self.result_dtype = run, plain, result_dtype
        self.primitive = Primitive(name)
        evaluate_compiled(self.primitive, ("method", "rule", "partitioned"))
        self.primitive.def_abstract_eval(self._abstract)
        batching.primitive_batchers[self.primitive] = self._batched
        mlir.register_lowering(self.primitive, self._lower_elsewhere)
        mlir.register_lowering(self.primitive, self.lower, platform=platform)
        self._partitioned = functools.cache(self._partitioned)

    def __call__(
        self, method: str, rule: Rule | None, x: jax.Array, y: jax.Array, *g: jax.Array
    ) -> jax.Array:
        """The method's result for x [M, K] or [B, M, K], y [K, N], or [B, K, N] with x, and g likewise."""
        if x.ndim == 3 and y.ndim == 2:
            # One y for the whole batch: its rows are those of one larger problem.
            folded = (array.reshape(array.shape[0] * array.shape[1], array.shape[2]) for array in (x, *g))
            x_rows, *g_rows = folded
            result = self(method, rule, x_rows, y, *g_rows)
            return result if method == "gradient_y" else result.reshape(*x.shape[:2], -1)
        if 0 in (*x.shape, *y.shape):
            return self.plain(method, rule, x, y, *g)
        return self.primitive.bind(x, y, *g, method=method, rule=rule, partitioned=False)

    def _abstract(self, x, y, *g, method, rule, partitioned):
        # From an operand, so that the result varies over the same mesh axes of a shard_map.
        return x.update(shape=result_shape(method, x, y), dtype=self.result_dtype(x, y), weak_type=False)

    def _batched(self, operands, axes, *, method, rule, partitioned):
        """vmap: the new axis joins the batch, or the rows where y has none."""
        moved = batch_in_front(operands, axes)
        if axes[1] is None and operands[1].ndim == 2 and method != "gradient_y":
            moved[1] = operands[1]
        if moved[0].ndim == 3:
            return self(method, rule, *moved), 0
        size = moved[0].shape[0]
        folded = (array.reshape(size * array.shape[1], *array.shape[2:]) for array in moved)
        result = self(method, rule, *folded)
        return result.reshape(size, -1, *result.shape[1:]), 0

    def _lower_elsewhere(self, ctx, *operands, method, rule, partitioned):
        require_other_platforms(ctx, self.implementation, self.devices)
        return lower_function(ctx, self.plain, method, rule, *operands)

    def lower(self, ctx, *operands, method, rule, partitioned):
        """The rule by which programs for the kernels' platform are lowered."""
        context = ctx.module_context
        if context.lowering_parameters.for_export:
            return lower_function(ctx, self.plain, method, rule, *operands)
        if partitioned or is_local(context.axis_context):
            return lower_function(ctx, self.run, method, rule, *operands)
        mesh = named_mesh(context.axis_context)
        if mesh is None:
            _logger.warning(
                "adder_matmul %s: in a program that XLA partitions, the 'xla' form runs instead of the "
                "kernels of %r; name the mesh with jax.set_mesh, or use shard_map over all of its axes.",
                *(method, self.implementation),
            )
            return lower_function(ctx, self.plain, method, rule, *operands)
        run = self._partitioned(method, rule, ctx.avals_in[0].ndim)
        return lower_function(knowing_mesh(ctx, mesh), run, *operands)

    def _partitioned(self, method: str, rule: Rule | None, rank: int):
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
                local = self.primitive.bind(*local_operands, method=method, rule=rule, partitioned=True)
                return jax.lax.psum(local, names[summed]) if summed in names else local

            return mesh, run, share(result_axes), tuple(map(share, operand_axes))

        @custom_partitioning
        def call(*operands):
            return self.primitive.bind(*operands, method=method, rule=rule, partitioned=True)

        call.def_partition(
            partition,
            sharding_rule=f"{', '.join(map(' '.join, operand_axes))} -> {' '.join(result_axes)}",
            reduction_factors=(summed,),
        )
        return call
