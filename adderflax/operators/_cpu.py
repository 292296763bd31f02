"""The operator on CPUs: C++ kernels, compiled once for the machine by its own compiler, called by XLA.

Only `implementation="cpu"` chooses them: they need a C++ compiler, and round otherwise than XLA's loops. What
they are for is what XLA does not vectorize well: gradients and, above all, int8, of which x86 has an
instruction that sums the differences of 64 pairs (AVX-512; 32 with AVX2). results/operators.md has the
speeds.

As with the CUDA kernels XLA's plain form takes their place in jax.export, which promises that programs
outlive versions, and in programs for several devices that XLA partitions, unless `jax.set_mesh` names the
mesh.
"""

import jax
import jax.numpy as jnp
import numpy as np

from adderflax.operators import _cpu_library, _xla
from adderflax.operators._primitives import MatmulPrimitive, result_shape
from adderflax.operators.rules import Rule

PLATFORMS = ("cpu",)
_FEW_COLUMNS = 8  # half of a vector: below this the rows are put in lanes instead
_SLOPES = (2.0**-20, 2.0**20)


def refuses(x: jax.Array, y: jax.Array) -> str | None:
    """Why the kernels cannot take the operands, or None."""
    if not all(isinstance(size, int) for size in (*x.shape, *y.shape)):
        return "the shapes must be known when the program is traced"
    return None


def unavailable() -> str | None:
    """Why there are no kernels on this machine, or None. Compiles them where that was never done."""
    return _cpu_library.unavailable()


def forward(x: jax.Array, y: jax.Array) -> jax.Array:
    """-sum_k |x[..., m, k] - y[..., k, n]| in float32.

    Args:
        x: [M, K] or [B, M, K], float32, bfloat16 or float16.
        y: [K, N], or [B, K, N] with x, likewise.
    """
    return _adder("forward", None, *_in_float32(x, y))


def byte_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """-sum_k |x[..., m, k] - y[..., k, n]| of uint8 in int32.

    Args:
        x: [M, K] or [B, M, K], uint8.
        y: [K, N], or [B, K, N] with x, likewise.
    """
    return _adder("forward", None, x, y)


def gradient_x(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    """sum_n rule(y[..., k, n] - x[..., m, k]) g[..., m, n] in float32, for hardtanh and sign."""
    return _adder("gradient_x", rule, *_in_float32(x, y, g))


def gradient_y(x: jax.Array, y: jax.Array, g: jax.Array, rule: Rule) -> jax.Array:
    """sum_m rule(x[..., m, k] - y[..., k, n]) g[..., m, n] in float32, for hardtanh and sign."""
    return _adder("gradient_y", rule, *_in_float32(x, y, g))


def _in_float32(*operands: jax.Array) -> list[jax.Array]:
    return [array.astype(jnp.float32) for array in operands]


def _run(method: str, rule: Rule | None, *operands: jax.Array) -> jax.Array:
    x, y = operands[:2]
    if method == "forward" and y.shape[-1] < _FEW_COLUMNS and y.shape[-1] < x.shape[-2]:
        return _run(method, rule, y.mT, x.mT).mT  # the distance is even
    name, dtype, attributes = method, np.float32, {}
    if x.dtype == jnp.uint8:
        name, dtype = "bytes", np.int32
    elif rule is not None:
        # slope * clip(d, -limit, limit) g, without the slope in the kernel; sign(d) g where the limit is 0.
        slope = rule.slope if rule.kind == "hardtanh" else 1.0
        # Here slope * g stays in float32's range for g of 2^-100 to 2^100, beyond it might not.
        if not _SLOPES[0] <= slope <= _SLOPES[1]:
            return _plain(method, rule, *operands)
        operands = (x, y, operands[2] * slope if slope != 1.0 else operands[2])
        attributes = {"limit": np.float32(1.0 / slope if rule.kind == "hardtanh" else 0.0)}
    result = jax.ShapeDtypeStruct(result_shape(method, x, y), dtype)
    return jax.ffi.ffi_call(_cpu_library.targets()[name], result)(*operands, **attributes)


def _plain(method: str, rule: Rule | None, *operands: jax.Array) -> jax.Array:
    """The same in XLA's own operations."""
    if operands[0].dtype == jnp.uint8:
        return _xla.forward(*_in_float32(*operands)).astype(jnp.int32)
    return getattr(_xla, method)(*operands, *(() if rule is None else (rule,)))


def _result_dtype(x, y) -> jnp.dtype:
    return jnp.dtype(jnp.int32 if x.dtype == jnp.uint8 else jnp.float32)


_adder = MatmulPrimitive("adder_cpu", "cpu", "cpu", "CPUs", _run, _plain, _result_dtype)
