"""Times of functions that alternate in one process, and the limit of the device that they ran on."""

import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adderflax.training.environment import processor

# Elements/s that the vector units allow: forward (subtract, and add the magnitude) and input gradient.
# Multiprocessors x lanes x clock, or vector slots x lanes x clock, over the instructions of an element.
_LIMITS = {
    "NVIDIA H200": (16.7e12, 16.7e12),
    "NVIDIA H100 80GB HBM3": (16.7e12, 16.7e12),
    "TPU v5 lite": (2.05e12, 1.54e12),
    "TPU v6 lite": (2.39e12, 1.79e12),
    "TPU v5": (4.78e12, 3.58e12),
}
_LOOP_ROWS, _LOOP_COLUMNS = 6, 48  # the tile of cpu_limit.cpp


def alternate(
    functions: dict[str, Callable[[], Any]], *, rounds: int = 9, sample_seconds: float = 0.03
) -> dict[str, float]:
    """Median seconds of a call of each function; one sample of each in turn, `rounds` times.

    Args:
      functions: each runs to its end before it returns, or returns JAX arrays.
      rounds: samples of a function; fewer, but at least three, where a call takes over a second.
      sample_seconds: a sample repeats calls for about so long.
    """
    repeats, samples = {}, {name: [] for name in functions}
    for name, function in functions.items():
        jax.block_until_ready(function())
        repeats[name] = max(1, min(200, int(sample_seconds / _seconds(function, 1))))
    for index in range(rounds):
        for name, function in functions.items():
            if index < 3 or sum(samples[name]) * repeats[name] < 1.0 + 0.2 * rounds:
                samples[name].append(_seconds(function, repeats[name]))
    return {name: statistics.median(values) for name, values in samples.items()}


def _seconds(function: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def machine() -> dict[str, Any]:
    """What a figure needs beside it: device, versions, load."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else processor(),
        "platform": device.platform,
        "devices": len(jax.devices()),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def device_limits() -> tuple[float, float] | None:
    """(forward, input gradient): elements/s that the device's arithmetic allows, or None if unknown.

    On a CPU the limit is measured: a hand-written AVX-512 loop for the forward, and three quarters of it
    for the gradient, which takes four instructions (subtract, clip twice, multiply and add) instead of three.
    """
    if jax.devices()[0].platform != "cpu":
        return _LIMITS.get(jax.devices()[0].device_kind)
    loop = limit_loop(1572, 384, 1536)
    if loop is None:
        return None
    rate = 1572 * 384 * 1536 / alternate({"loop": loop})["loop"]
    return rate, 0.75 * rate


def whole_rows(rows: int) -> int:
    """The rows that `limit_loop` takes: it works on six at a time."""
    return rows // _LOOP_ROWS * _LOOP_ROWS


def limit_loop(rows: int, depth: int, columns: int) -> Callable[[], Any] | None:
    """The hand-written loop on random operands; None if rows or columns do not fit or it does not build."""
    library = _limit_library()
    if library is None or not rows or rows % _LOOP_ROWS or columns % _LOOP_COLUMNS:
        return None
    random = np.random.default_rng(0)
    x, y = (random.standard_normal(shape, np.float32) for shape in ((rows, depth), (depth, columns)))
    out = np.empty((rows, columns), np.float32)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, y, out)]

    def run():
        library.adder_forward(*pointers, rows, depth, columns, os.cpu_count())
        return out, x, y  # The loop reads them: they must live as long as it does.

    return run


def _limit_library() -> ctypes.CDLL | None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512f" not in flags or shutil.which("g++") is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limit.so"
        source = Path(__file__).with_name("cpu_limit.cpp")
        command = ["g++", "-O3", "-march=native", "-pthread", "-shared", "-fPIC", source, "-o", library]
        subprocess.run(list(map(str, command)), check=True)
        return ctypes.CDLL(str(library))
