"""Files of named arrays, as other frameworks publish their weights."""

import importlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def read_weight_file(file: str | Path) -> Mapping[str, Any]:
    """Reads names and arrays of a ``.pth``, ``.pt``, ``.safetensors`` or ``.npz`` file.

    Args:
      file: the file; PyTorch must be installed for the first two kinds, safetensors for the third.

    Returns:
      NumPy arrays, or CPU tensors of PyTorch, by name; a PyTorch file may hold them under a further key.

    Raises:
      FileNotFoundError: there is no such file.
      ModuleNotFoundError: the package that reads such files is not installed.
      ValueError: the file is of another kind, or damaged.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file. Give the .pth, .pt, .safetensors or .npz itself.")
    readers = {".pth": _pytorch, ".pt": _pytorch, ".safetensors": _safetensors, ".npz": _numpy}
    if file.suffix not in readers:
        raise ValueError(f"{file}: weights are read from .pth, .pt, .safetensors or .npz files only.")
    return readers[file.suffix](file)


def require_finite(arrays: Mapping[str, np.ndarray]) -> None:
    """Raises a ValueError that names the arrays with an infinite number or none at all, if there are any."""
    if broken := [name for name, array in arrays.items() if not np.all(np.isfinite(array))]:
        listed = ", ".join(broken[:8]) + " ..." * (len(broken) > 8)
        raise ValueError(
            f"Weights are not finite in {listed}: their training has diverged, or the file is damaged. Take"
            " an earlier or another one."
        )


def _pytorch(file: Path) -> Mapping[str, Any]:
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Reading {file} needs PyTorch: pip install torch. Or convert the file once where it is "
            "installed: numpy.savez('weights.npz', **{name: t.numpy() for name, t in state.items()})."
        ) from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{file} is not a PyTorch state dict that can be read safely: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{file} holds a {type(state).__name__}, not a state dict of names and tensors.")
    return state


def _safetensors(file: Path) -> Mapping[str, Any]:
    try:
        safetensors = importlib.import_module("safetensors.numpy")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"Reading {file} needs safetensors: pip install safetensors.") from error
    try:
        return safetensors.load_file(file)
    except Exception as error:
        raise ValueError(f"{file} is not a safetensors file that NumPy can hold: {error}") from error


def _numpy(file: Path) -> Mapping[str, Any]:
    try:
        with np.load(file) as archive:
            return dict(archive)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is not a NumPy archive of arrays: {error}") from error
