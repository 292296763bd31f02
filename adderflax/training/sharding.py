"""Placing a run on its devices: the mesh data x fsdp x tensor, and what is cut along which axis.

The batch is cut over data and fsdp. Parameters, optimizer state and averages rest cut over fsdp and
tensor. For an update the parameters are gathered over fsdp, once, and the gradients scattered again;
over tensor they stay cut, as in Megatron (Shoeybi et al. 2019): a block's wide layers by output
features, the layers behind them by contracted features, whose partial sums meet in one all-reduce. An
adder layer is a sum over its contracted features as a matrix product is, so the same cuts serve both.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
# The axes over which a batch is cut.
_BATCH_AXES = ("data", "fsdp")
# The end of a parameter's path, and its axes over "tensor"; what is not listed is whole there.
_TENSOR_RULES = (
    (r"(query|key|value|fc1)/(adder_)?kernel", (None, "tensor")),
    (r"(query|key|value|fc1)/(norm/)?(scale|bias)", ("tensor",)),
    (r"(out|fc2)/(adder_)?kernel", ("tensor", None)),
    (r"mlp/conv/(adder_)?kernel", (None, None, None, "tensor")),
    (r"mlp/conv/norm/(scale|bias)", ("tensor",)),
)
# Elements below which a gather costs more than a copy on every device.
_SMALLEST_CUT = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh; the product is the number of devices.

    Attributes:
      data: copies of the parameters; each computes on its own part of the batch. -1 takes all devices
        that the other axes leave.
      fsdp: parts into which parameters, optimizer state and averages are cut at rest; the batch is cut
        over them as well.
      tensor: parts into which heads and hidden features are cut. Divides the model's num_heads and
        mlp_dim.

    Raises:
      ValueError: a field has a value that is not allowed; the message names it.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and (name, size) != ("data", -1):
                rest = ", or -1 for all devices that the other axes leave" if name == "data" else ""
                raise ValueError(f"mesh.{name}={size} must be at least 1{rest}.")


def make_mesh(devices: list[jax.Device] | None = None, config: MeshConfig | None = None) -> Mesh:
    """A mesh with the axes "data", "fsdp" and "tensor" over `devices` (default: all, of all processes).

    Axis types are Auto: the compiler places the collectives, and Linen modules need no annotations.

    Raises:
      ValueError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    config = MeshConfig() if config is None else config
    inner = config.fsdp * config.tensor
    data = len(devices) // inner if config.data == -1 else config.data
    if data * inner != len(devices):
        asked = " x ".join(f"mesh.{name}={getattr(config, name)}" for name in AXES)
        raise ValueError(
            f"{asked} does not fit {len(devices)} devices: the product must be their number"
            f"{', with mesh.data=-1 standing for what the others leave' * (config.data == -1)}. Choose sizes"
            f" whose product divides {len(devices)}, such as --config.mesh.fsdp={len(devices)}"
            " --config.mesh.tensor=1 --config.mesh.data=-1."
        )
    shape, types = (data, config.fsdp, config.tensor), (AxisType.Auto,) * len(AXES)
    if len({device.process_index for device in devices}) == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    # Process by process, rather than as make_mesh follows the torus: then every process holds one
    # range of the batch's rows, in the order in which one process alone would read them.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(shape), AXES, axis_types=types)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of values that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis cut over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(_BATCH_AXES))


def resting(tree: Any, mesh: Mesh) -> Any:
    """The shardings in which a state lies between updates: cut over fsdp and tensor.

    Args:
      tree: parameters, or anything that holds leaves of their shapes under their names, such as an
        optimizer's state; leaves need a shape only.
      mesh: the devices.
    """
    return _shardings(tree, mesh, mesh.shape["fsdp"])


def computing(tree: Any, mesh: Mesh) -> Any:
    """The shardings in which parameters are used: as `resting`, but whole along fsdp."""
    return _shardings(tree, mesh, 1)


def constrain(tree: Any, placement: Callable[[Any, Mesh], Any], mesh: Mesh) -> Any:
    """Within a compiled function: brings values into the shardings of `resting` or `computing`."""
    return jax.lax.with_sharding_constraint(tree, placement(tree, mesh))


def _shardings(tree, mesh, fsdp) -> Any:
    def place(path, leaf):
        axes = _tensor_axes(path, leaf.shape) if mesh.shape["tensor"] > 1 else [None] * len(leaf.shape)
        if fsdp > 1 and math.prod(leaf.shape) >= _SMALLEST_CUT:
            free = [i for i, axis in enumerate(axes) if axis is None and leaf.shape[i] % fsdp == 0]
            if free:
                axes[max(free, key=lambda i: leaf.shape[i])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*axes) if any(axes) else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def _tensor_axes(path, shape) -> list[str | None]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, axes in _TENSOR_RULES:
        if len(axes) == len(shape) and re.search(f"/{pattern}$", name):
            return list(axes)
    return [None] * len(shape)


def require_divisible(batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises ValueError unless every device gets the same share of every accumulated part of the batch."""
    shares = batch_shares(mesh)
    parts = shares * accumulation_steps
    if batch_size < 1 or batch_size % parts:
        raise ValueError(
            f"batch_size={batch_size} does not divide over {shares} devices (data x fsdp of the mesh) and"
            f" accumulation_steps={accumulation_steps}: each device needs an equal share of each accumulated"
            f" part. Use a multiple of {parts}, such as"
            f" --config.batch_size={max(round(batch_size / parts), 1) * parts}."
        )


def require_tensor_fits(mesh: Mesh, num_heads: int | None, mlp_dim: int | None) -> None:
    """Raises ValueError unless the tensor axis cuts heads and hidden features, None where none, evenly."""
    size = mesh.shape["tensor"]
    for name, count in (("num_heads", num_heads), ("mlp_dim", mlp_dim)):
        if count is None and size > 1:
            raise ValueError(
                f"mesh.tensor={size} cuts the heads and hidden features of a transformer, and this model has"
                " none. Cut with mesh.fsdp, which fits any model, or with mesh.data."
            )
        if count is not None and count % size:
            raise ValueError(
                f"mesh.tensor={size} does not divide the model's {name}={count}: each device computes whole"
                " heads and an equal share of the hidden features. Choose a mesh.tensor that divides both"
                f" num_heads={num_heads} and mlp_dim={mlp_dim}, or cut with mesh.fsdp, which fits any model."
            )


def batch_shares(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in _BATCH_AXES)


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads: (index, count).

    Processes that a tensor axis spans read the same part.

    Raises:
      ValueError: the devices of a process hold no whole part.
    """
    shares = batch_shares(mesh)
    parts = mesh.devices.reshape(shares, -1)
    own = [i for i in range(shares) if any(d.process_index == jax.process_index() for d in parts[i])]
    if shares % len(own) or own[0] % len(own) or own[-1] - own[0] + 1 != len(own):
        raise ValueError(
            f"mesh.tensor={mesh.shape['tensor']} does not fit {jax.local_device_count()} devices of each"
            " process: one must be a multiple of the other, so that each process reads a part of the batch"
            " of its own. Choose another --config.mesh.tensor."
        )
    return own[0] // len(own), shares // len(own)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """Transfers this process's part of a batch to its devices: one global array for each entry."""
    placement = batch_sharding(mesh)
    _, count = process_share(mesh)

    def put(rows):
        return jax.make_array_from_process_local_data(placement, rows, (len(rows) * count, *rows.shape[1:]))

    return jax.tree.map(put, batch)
