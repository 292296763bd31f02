"""Operands of kernels, what they should make of them, and CUDA's kernels replaced by what does."""

import contextlib

import jax.numpy as jnp
import numpy as np
import operator_reference as reference
from jax.interpreters import mlir

from adderflax.operators import _gpu, _gpu_kernels, _reference


def operands(method, batch, rows, columns, terms, dtype, kind, seed=0):
    """x [B, M, K], y [B, K, N], g [B, M, N] of the problem that the kernel sees so."""
    lengths = {
        "forward": (rows, terms, columns),
        "gradient_x": (rows, columns, terms),
        "gradient_y": (terms, rows, columns),
    }
    m, k, n = lengths[method]
    random = np.random.default_rng(seed)
    x, y, g = (random.normal(size=(batch, *shape)) for shape in ((m, k), (k, n), (m, n)))
    scale_x, scale_y = {"small": (1e-6, 1e-6), "large": (1e6, 1e6), "mixed": (1e-6, 1e6)}.get(kind, (1, 1))
    x, y = x * scale_x, y * scale_y
    if kind == "offset":  # differences far smaller than the operands
        x, y = x + 1000, y + 1000
    if kind == "ties":
        x, y = np.round(x), np.round(y)
    if kind == "not finite":
        x[..., 2, 0], x[..., 3, 1], y[..., 1, 5] = np.nan, np.inf, np.inf
    if kind == "one sign":  # the gradient is far smaller than the sum of its terms
        x, y, g = x * 1e-3, np.sign(y) * 0.5, np.abs(g)
    dtype = reference.DTYPES[dtype]
    return x.astype(dtype), y.astype(dtype), g.astype(np.float32)


def expectation(method, rule, x, y, g):
    """(value, sum of the magnitudes of its terms) in float64."""
    if method == "forward":
        with np.errstate(invalid="ignore"):
            return reference.forward(x, y)
    return reference.gradients(x, y, g, rule, rule)[method == "gradient_y"]


def exact_sums(x, y):
    return -np.abs(x[..., :, None, :].astype(int) - y.mT[..., None, :, :].astype(int)).sum(-1)


def _launch_reference(problem, tile, *arrays):
    if problem.operation == "bytes":
        return _reference.forward(*_gpu.unpacked(*arrays)).astype(jnp.int32)
    rule = () if problem.rule is None else (problem.rule,)
    if problem.method == "gradient_y":
        x, y, g = (jnp.swapaxes(array, -1, -2) for array in arrays)
        return jnp.swapaxes(_reference.gradient_x(y, x, g, *rule), -1, -2)
    return getattr(_reference, problem.method)(*arrays, *rule)


@contextlib.contextmanager
def cuda_lowered_for_cpu(monkeypatch):
    """The primitive of CUDA's kernels in programs for the CPU, with the reference in the kernels' place."""
    monkeypatch.setattr(_gpu_kernels, "unavailable", lambda: None)
    monkeypatch.setattr(_gpu, "launch", _launch_reference)
    mlir.register_lowering(_gpu._adder.primitive, _gpu._adder.lower, platform="cpu")
    yield
    del mlir._platform_specific_lowerings["cpu"][_gpu._adder.primitive]
