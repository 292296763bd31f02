"""Placing a run on the local devices: one mesh, a sharded batch, replicated state."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis "data" over `devices` (default: all of them).

    Axis types are Auto: the compiler places the collectives, and Linen modules need no annotations.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of values that every device holds whole: parameters and optimizer state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis split over "data"."""
    return NamedSharding(mesh, PartitionSpec("data"))


def require_divisible(batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises ValueError unless every device gets the same share of every accumulated part of the batch."""
    parts = mesh.size * accumulation_steps
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"batch_size={batch_size} does not divide over {mesh.size} devices and accumulation_steps="
            f"{accumulation_steps}: each device needs an equal share of each accumulated part. Use a multiple"
            f" of {parts}, such as --config.batch_size={max(round(batch_size / parts), 1) * parts}."
        )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Transfers a host batch to the devices, split along its leading axis."""
    return jax.device_put(batch, batch_sharding(mesh))
