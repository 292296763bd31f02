"""Weights of AdderNet's official PyTorch code, read into `AdderResNet`.

The official state dict names an adder kernel ``layer1.0.conv1.adder`` [O, I, height, width], a multiplying
one ``conv1.weight``, and a BatchNorm ``bn1.weight``, ``bn1.bias``, ``bn1.running_mean`` and
``bn1.running_var``; a model saved from `DataParallel` has ``module.`` before every name.

Images must be normalized as that code does: in 0..1, less (0.4914, 0.4822, 0.4465), divided by
(0.2023, 0.1994, 0.2010). `adderflax.data` divides by other deviations.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adderflax.models.classifier import abstract_variables
from adderflax.models.resnet import AdderResNet, AdderResNetConfig
from adderflax.models.weight_files import read_weight_file, require_finite

_PREFIX = "module."
_COUNTER = "num_batches_tracked"  # newer PyTorch counts steps; nothing here depends on it
_LEAVES = {
    "adder_kernel": "adder",
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def load_addernet_weights(file: str | Path, config: AdderResNetConfig | None = None) -> dict[str, Any]:
    """Reads weights of the official AdderNet code.

    Args:
      file: a state dict as ``.pth``, ``.pt`` (PyTorch must be installed) or ``.safetensors`` (safetensors
        must be), or an ``.npz`` with the same names.
      config: the network; None means the official ResNet-20.

    Returns:
      ``{"params": ..., "batch_stats": ...}`` in float32, ready for
      ``AdderResNet(config).apply(variables, images)``.

    Raises:
      ValueError: the file is of another kind, names or shapes do not fit the network, or numbers are not
        finite; the message lists them.
      FileNotFoundError: there is no such file.
      ModuleNotFoundError: the package that reads such files is not installed.
    """
    return convert_addernet_weights(read_weight_file(file), config)


def convert_addernet_weights(
    state: Mapping[str, Any], config: AdderResNetConfig | None = None
) -> dict[str, Any]:
    """The same for a state dict of arrays or CPU tensors, by official name.

    Args:
      state: name -> array.
      config: the network; None means the official ResNet-20.

    Raises:
      ValueError: as in `load_addernet_weights`.
    """
    config = config or AdderResNetConfig()
    found = {name.removeprefix(_PREFIX): array for name, array in state.items()}
    found = {name: array for name, array in found.items() if not name.endswith(_COUNTER)}
    wanted, tree = _official_names(config)
    missing = sorted(set(wanted) - set(found))
    extra = sorted(set(found) - set(wanted))
    misshapen = [
        f"{name} has {np.shape(found[name])} and needs {shape}"
        for name, shape in wanted.items()
        if name in found and np.shape(found[name]) != shape
    ]
    problems = [
        f"{what}: {'; '.join(names)}."
        for what, names in (("missing", missing), ("not in the network", extra), ("other shapes", misshapen))
        if names
    ]
    if problems:
        raise ValueError(
            f"These weights do not fit {config.blocks} blocks a stage with {config.num_classes} classes, "
            f"convolution={config.convolution!r} and shortcut={config.shortcut!r}. " + " ".join(problems)
        )
    arrays = {name: np.asarray(found[name], np.float32) for name in wanted}
    require_finite(arrays)
    return jax.tree.unflatten(tree, [_native(array) for array in arrays.values()])


def _official_names(config: AdderResNetConfig) -> tuple[dict[str, tuple[int, ...]], Any]:
    """Official name -> shape for every variable, in the order of the variables' tree, and that tree."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_variables(AdderResNet(config)))
    names = {}
    for path, leaf in leaves:
        _, *modules, name = (key.key for key in path)
        # "layer1_0" is "layer1.0" there, "downsample_1" is "downsample.1".
        official = ".".join(module.replace("_", ".") for module in modules)
        shape = leaf.shape if len(leaf.shape) == 1 else tuple(leaf.shape[axis] for axis in (3, 2, 0, 1))
        names[f"{official}.{_LEAVES[name]}"] = shape
    return names, tree


def _native(array: np.ndarray) -> jax.Array:
    """[O, I, height, width] -> [height, width, I, O]; vectors as they are."""
    return jnp.asarray(array if array.ndim == 1 else array.transpose(2, 3, 1, 0))
