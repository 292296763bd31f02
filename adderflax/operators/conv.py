"""adder_conv: the L1 counterpart of a convolution, with surrogate gradients.

The patches of a block of output rows are laid out as a matrix, [pixels, kernel positions * channels],
and meet the kernel in `adder_matmul`'s calls, so that every implementation serves convolutions too.
Only one block exists at a time. On two CPU cores and the shapes of ResNet-20 at batch 128 that was 1.7
to 7 times faster than laying out all patches, and no slower than one product for each kernel position;
and it works for a batch that is symbolic or sharded. On a CPU the gradient for x lays out patches of the
cotangent instead, where that is faster (`_gathers`). A depthwise convolution has no matrix worth laying out:
it is summed elementwise (`_depthwise.py`) unless an implementation other than "xla" and "cpu" is named.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from adderflax.operators import _depthwise, _integer, _power
from adderflax.operators._dispatch import (
    announce,
    check_accepts,
    check_implementation,
    logging_enabled,
    sums_bytes,
)
from adderflax.operators._windows import Blocks, Window, canonical_padding, is_whole
from adderflax.operators._xla import zeros
from adderflax.operators.matmul import NUMBERS, Calls, calls, check_array, match_varying, named_call
from adderflax.operators.rules import GradientRule, Rule, canonical_rule

# Bytes of patches in float32 that a block may take. On a CPU a block stays in the second-level cache;
# elsewhere it is large enough to fill the device.
_CPU_BLOCK = 4 * 2**20
_DEVICE_BLOCK = 64 * 2**20
_MANY_CHANNELS = 16  # a vector of AVX-512, two of AVX2


class _Plan(NamedTuple):
    """The static part of a call: hashable, so that jit keys its cache on it."""

    window: Window
    rule_x: Rule
    rule_kernel: Rule
    implementation: str | None
    log: bool


def adder_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Sequence[int] = (1, 1),
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = (1, 1),
    feature_group_count: int = 1,
    p: float | jax.Array = 1.0,
    grad_x: GradientRule = "hardtanh",
    grad_kernel: GradientRule = "full",
    implementation: str | None = None,
) -> jax.Array:
    """Negative L1 distances between the patches of an image and the filters of a kernel.

    out[n, h, w, o] = -sum_{i, j, c} |patch[n, h, w, i, j, c] - kernel[i, j, c, o]|, accumulated in
    float32, with the patches of `lax.conv_general_dilated`: AdderNet's layer (Chen et al., CVPR 2020).
    As in its official operator padding is zeros, not absent: a padded pixel costs -|kernel|. The
    gradient rules are those of `adder_matmul`; a "full" gradient is a plain convolution, for the
    kernel conv(x, g) - kernel * sum g, and a transposed one for x. p is as in `adder_matmul`.

    Besides operands and result it needs memory for a padded copy of x, or of a cotangent no larger, for a
    second float32 copy of the result or of a gradient, and for the patches of one block of output rows,
    in the backward pass with their gradients: 4 MiB of patches on a CPU, 64 MiB elsewhere, or one row
    where that is more.

    Args:
        x: [N, H, W, C], float32, bfloat16 or float16; or int8 or uint8, where both operands are, summed
            exactly and without a gradient. N may be symbolic.
        kernel: [height, width, C / feature_group_count, O], likewise.
        strides: steps of the window in height and width, or one number for both.
        padding: "SAME", "SAME_LOWER", "VALID", or ((top, bottom), (left, right)), where one number may
            stand for a pair, or one for all; negative ones crop. "SAME" pads the bottom and right more
            where the total is odd, which differs from PyTorch's padding=1 at stride 2.
        dilation: distances between the kernel's positions, as strides.
        feature_group_count: groups of channels; the o-th of equally many groups of filters sees the
            o-th group of channels alone. C makes it depthwise.
        p: exponent of the distance, from 1 to 2 (see `adder_matmul`).
        grad_x: rule for x: "full", "hardtanh", ("hardtanh", slope), "sign" or a function.
        grad_kernel: rule for the kernel, likewise.
        implementation: as in `adder_matmul`.

    Returns:
        float32 [N, H', W', O], int32 for integers. Gradients have the dtypes of x and kernel.

    Raises:
        TypeError: an operand is not an array or has another dtype, or an argument another type.
        ValueError: shapes that do not fit, an unknown name, an implementation that does not take
            these operands, or more terms of integers than `adder_matmul` allows.
    """
    x, kernel = (
        check_array(array, name, "adder_conv", NUMBERS) for name, array in (("x", x), ("kernel", kernel))
    )
    window = _check_window(x, kernel, strides, padding, dilation, feature_group_count)
    plan = _Plan(
        window,
        canonical_rule(grad_x, "grad_x"),
        canonical_rule(grad_kernel, "grad_kernel"),
        check_implementation(implementation),
        logging_enabled(),
    )
    integers = _integer.take("adder_conv", {"x": x, "kernel": kernel}, math.prod(kernel.shape[:3]), p)
    by_bytes = sums_bytes(implementation) and not _depthwise.applies(kernel.shape, window)
    if integers and not (by_bytes and x.dtype == kernel.dtype):
        x, kernel = integers
    _check_accepts(implementation, x, kernel, window)
    if integers:
        return _calls(()).forward(*match_varying(x, kernel), plan=plan).astype(jnp.int32)
    x, kernel, *p = match_varying(x, kernel, *_power.canonical_power(p, implementation))
    return _adder_conv(x, kernel, tuple(p), plan)


def _check_window(x, kernel, strides, padding, dilation, groups) -> Window:
    for argument, array, layout in (("x", x, "[N, H, W, C]"), ("kernel", kernel, "[height, width, C, O]")):
        if array.ndim != 4:
            raise ValueError(f"adder_conv: {argument} has shape {array.shape}; it needs four axes, {layout}.")
    if not all(isinstance(size, int) for size in (*x.shape[1:], *kernel.shape)):
        raise ValueError(
            f"adder_conv: x has shape {x.shape} and kernel {kernel.shape}; only the batch may be symbolic."
        )
    strides, dilation = _pair(strides, "strides"), _pair(dilation, "dilation")
    if not is_whole(groups) or groups < 1:
        raise ValueError(f"feature_group_count={groups!r} must be a positive integer.")
    channels, filters = x.shape[3], kernel.shape[3]
    if channels % groups or filters % groups:
        raise ValueError(
            f"feature_group_count={groups} must divide the channels of x, {channels} in {x.shape}, and the "
            f"filters of kernel, {filters} in {kernel.shape}."
        )
    if kernel.shape[2] != channels // groups or 0 in kernel.shape[:2]:
        raise ValueError(
            f"adder_conv: x has shape {x.shape} and kernel has shape {kernel.shape}; with "
            f"feature_group_count={groups} the kernel needs the shape "
            f"[height >= 1, width >= 1, {channels // groups}, O]."
        )
    padding = canonical_padding(padding)
    if isinstance(padding, str):
        reach = Window(strides, ((0, 0), (0, 0)), dilation, groups).reach(kernel.shape)
        padding = tuple(lax.padtype_to_pads(x.shape[1:3], reach, strides, padding))
    if any(size + sum(sides) < 0 for size, sides in zip(x.shape[1:3], padding)):
        raise ValueError(f"padding={padding} crops more pixels than x of shape {x.shape} has.")
    return Window(strides, padding, dilation, int(groups))


def _pair(values, argument) -> tuple[int, int]:
    two = (values, values) if is_whole(values) else values
    listed = isinstance(two, Sequence) and not isinstance(two, str) or getattr(two, "ndim", 0) == 1
    if not listed or len(two) != 2:
        raise ValueError(f"{argument}={values!r} needs a whole number, or two, for height and width.")
    for value in two:
        if not is_whole(value):
            raise TypeError(f"{argument}={values!r} needs whole numbers, got {type(value).__name__}.")
        if value < 1:
            raise ValueError(f"{argument}={values!r} needs whole numbers of at least 1.")
    return int(two[0]), int(two[1])


def _check_accepts(implementation, x, kernel, window) -> None:
    blocks = Blocks.cut(x.shape, kernel.shape, window, _DEVICE_BLOCK)
    m, k, groups = x.shape[0] * blocks.rows * blocks.width, math.prod(kernel.shape[:3]), window.groups
    batch = () if groups == 1 else (groups,)
    check_accepts(
        implementation,
        jax.ShapeDtypeStruct((*batch, m, k), x.dtype),
        jax.ShapeDtypeStruct((*batch, k, kernel.shape[3] // groups), kernel.dtype),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _adder_conv(x: jax.Array, kernel: jax.Array, p: tuple[jax.Array, ...], plan: _Plan) -> jax.Array:
    return _calls(p).forward(x, kernel, *p, plan=plan)


def _adder_conv_fwd(x, kernel, p, plan):
    return _calls(p).forward(x, kernel, *p, plan=plan), (x, kernel, p)


def _adder_conv_bwd(plan, residuals, g):
    x, kernel, p = residuals
    dx = _calls(p).gradient_x(x, kernel, g, *p, plan=plan)
    dkernel = _calls(p).gradient_y(x, kernel, g, *p, plan=plan)
    return dx, dkernel, None


_adder_conv.defvjp(_adder_conv_fwd, _adder_conv_bwd)


def _forward(x, kernel, *p, plan):
    """[N, H', W', O] in float32."""

    def run(x, kernel, *p, budget):
        blocks = Blocks.cut(x.shape, kernel.shape, plan.window, budget)
        padded, weights = blocks.pad(x), blocks.weights(kernel)

        def step(index, out):
            patches = blocks.patches(blocks.input_of(padded, index))
            sums = calls(p).forward(patches, weights, *p, **_static(plan))
            # Sums of integers too: float32 holds them exactly.
            image = blocks.image(sums.astype(jnp.float32), x.shape[0])
            return _set_rows(out, image, index * blocks.rows)

        rows = blocks.count * blocks.rows
        out = zeros((x.shape[0], rows, blocks.width, kernel.shape[3]), x, kernel)
        return lax.fori_loop(0, blocks.count, step, out)[:, : blocks.height]

    shape = (x.shape[0], *plan.window.output_size(x.shape, kernel.shape), kernel.shape[3])
    if _no_terms(x, kernel, shape):
        return zeros(shape, x, kernel)
    if _is_depthwise(kernel, p, plan, "forward"):
        return _depthwise.forward(x, kernel, plan.window)
    return _by_platform(run, x, kernel, *p)


def _gradient_x(x, kernel, g, *p, plan):
    """sum over all windows of a pixel of rule(kernel - x) g, in the shape and dtype of x."""

    def gathered(x, kernel, g, *, budget):
        # Each pixel meets the cotangents of its windows, as in a transposed convolution.
        mirrored, window = plan.window.transposed(kernel)
        blocks = Blocks.cut(g.shape, mirrored.shape, window, budget)
        padded, weights, pixels = blocks.pad(g), blocks.weights(mirrored).mT, blocks.pad_result(x)

        def step(index, dx):
            cotangents = blocks.patches(blocks.input_of(padded, index))
            rows = blocks.result_of(pixels, index)
            sums = calls(()).gradient_x(rows, weights, cotangents, rule=plan.rule_x, **_static(plan))
            return _set_rows(dx, blocks.image(sums, x.shape[0]), index * blocks.rows)

        dx = lax.fori_loop(0, blocks.count, step, zeros(pixels.shape, x, kernel, g))
        return dx[:, : blocks.height]

    def scattered(x, kernel, g, *p, budget):
        blocks = Blocks.cut(x.shape, kernel.shape, plan.window, budget)
        padded, unpad = jax.vjp(blocks.pad, x)
        weights, g = blocks.weights(kernel), blocks.pad_result(g)

        def step(index, dpadded):
            patches, to_rows = jax.vjp(blocks.patches, blocks.input_of(padded, index))
            cotangents = blocks.result_of(g, index)
            dpatches = calls(p).gradient_x(
                patches, weights, cotangents, *p, rule=plan.rule_x, **_static(plan)
            )
            # Windows of neighboring blocks overlap.
            drows = blocks.input_of(dpadded, index) + to_rows(dpatches)[0]
            return _set_rows(dpadded, drows, index * (blocks.rows * plan.window.strides[0]))

        dpadded = lax.fori_loop(0, blocks.count, step, zeros(padded.shape, x, kernel, g))
        return unpad(dpadded)[0]

    dtype, x = x.dtype, x.astype(jnp.float32)  # several windows are summed before rounding
    if _no_terms(x, kernel, g.shape):
        return zeros(x.shape, x, kernel, g).astype(dtype)
    if _is_depthwise(kernel, p, plan, "gradient_x"):
        return _depthwise.gradient_x(x, kernel, g, plan.window, plan.rule_x).astype(dtype)
    if plan.rule_x.kind == "full" and not p:
        return _full_gradient_x(x, kernel.astype(jnp.float32), g, plan.window).astype(dtype)
    on_cpu = gathered if _gathers(x, kernel, g, p, plan) else None
    return _by_platform(scattered, x, kernel, g, *p, on_cpu=on_cpu).astype(dtype)


def _gradient_kernel(x, kernel, g, *p, plan):
    """sum over all patches of rule(patch - kernel) g, in the shape and dtype of the kernel."""

    def run(x, kernel, g, *p, budget):
        blocks = Blocks.cut(x.shape, kernel.shape, plan.window, budget)
        padded, weights, g = blocks.pad(x), blocks.weights(kernel), blocks.pad_result(g)

        def step(index, dweights):
            patches = blocks.patches(blocks.input_of(padded, index))
            cotangents = blocks.result_of(g, index)
            return dweights + calls(p).gradient_y(
                patches, weights, cotangents, *p, rule=plan.rule_kernel, **_static(plan)
            )

        return blocks.kernel(lax.fori_loop(0, blocks.count, step, zeros(weights.shape, x, kernel, g)))

    dtype, kernel = kernel.dtype, kernel.astype(jnp.float32)  # blocks are summed before rounding
    if _no_terms(x, kernel, g.shape):
        return zeros(kernel.shape, x, kernel, g).astype(dtype)
    if _is_depthwise(kernel, p, plan, "gradient_y"):
        return _depthwise.gradient_kernel(x, kernel, g, plan.window, plan.rule_kernel).astype(dtype)
    # With groups, XLA's convolution for it is wrong on some meshes of two axes (jax 0.10.2, on CPUs).
    if plan.rule_kernel.kind == "full" and not p and plan.window.groups == 1:
        return _full_gradient_kernel(x.astype(jnp.float32), kernel, g, plan.window).astype(dtype)
    return _by_platform(run, x, kernel, g, *p).astype(dtype)


def _full_gradient_x(x, kernel, g, window):
    """sum (kernel - x) g = the transposed convolution of g, minus x times the sum of g that meets it."""
    groups = window.groups
    ones = jnp.ones((*kernel.shape[:2], 1, groups), jnp.float32)
    g_sums = jnp.sum(g.reshape(*g.shape[:3], groups, g.shape[3] // groups), axis=-1)
    met = jax.vjp(lambda x: _convolution(x, ones, window), x[..., :groups])[1](g_sums)[0]
    product = jax.vjp(lambda x: _convolution(x, kernel, window), x)[1](g)[0]
    return product - x * jnp.repeat(met, x.shape[3] // groups, axis=-1)


def _full_gradient_kernel(x, kernel, g, window):
    """sum (patch - kernel) g = the convolution of x with g, minus the kernel times the sum of g."""
    product = jax.vjp(lambda kernel: _convolution(x, kernel, window), kernel)[1](g)[0]
    return product - kernel * jnp.sum(g, axis=(0, 1, 2)).reshape(1, 1, 1, -1)


def _convolution(x, kernel, window):
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=window.groups,
        precision=lax.Precision.HIGHEST,
    )


def _by_platform(run, *operands, on_cpu=None):
    """Runs with blocks of the size that suits the platform for which the program is lowered.

    On a CPU, `on_cpu` where it is given.
    """
    cpu = functools.partial(on_cpu or run, budget=_CPU_BLOCK)
    default = functools.partial(run, budget=_DEVICE_BLOCK)
    return lax.platform_dependent(*operands, cpu=cpu, default=default)


def _no_terms(x, kernel, shape) -> bool:
    """Whether the sums are empty, so that results and gradients are zeros or have no elements."""
    sizes = (x.shape[0], *kernel.shape, *shape)
    return any(isinstance(size, int) and size == 0 for size in sizes)


def _is_depthwise(kernel, p, plan, method) -> bool:
    """Whether a call is summed elementwise, which the program then says."""
    if p or not _runs_on_cpus(plan) or not _depthwise.applies(kernel.shape, plan.window):
        return False
    announce(plan.log, f"adder_conv {method} of a kernel {kernel.shape} runs 'xla', summed elementwise")
    return True


def _gathers(x, kernel, g, p, plan) -> bool:
    """Whether a CPU computes the gradient for x by gathering cotangents, without patches of x.

    Those patches and their gradients, as many times as large as x as the kernel has positions, are not
    written then. Cotangents are laid out instead, which pays where they have no more channels than x and
    about as many pixels, and where x has channels enough to fill the lanes, of which XLA's loops take 8 at a
    time and what is left one by one: 1.0 to 6.7 times as fast on two cores. Between windows that step by
    more than one, most of what would be gathered is zeros, and kernels of other platforms put the channels of
    x in wider blocks. What a pixel does not meet, at the image's edge, meets zeros here: a NaN or an infinity
    in the kernel can reach pixels that would not have seen it.
    """
    height, width, channels, filters = kernel.shape
    smaller = filters <= x.shape[3] and 4 * math.prod(g.shape[1:3]) >= 3 * math.prod(x.shape[1:3])
    lanes = channels >= _MANY_CHANNELS and (channels % 8 == 0 or plan.implementation == "cpu")
    worth = smaller and lanes and height * width > 1 and not p
    return worth and plan.window.strides == (1, 1) and _runs_on_cpus(plan)


def _runs_on_cpus(plan) -> bool:
    """Whether no implementation is named that is made for other devices, or for comparison."""
    return plan.implementation in (None, "xla", "cpu")


def _set_rows(image, rows, start):
    return lax.dynamic_update_slice_in_dim(image, rows, start, 1)


def _static(plan):
    return {"implementation": plan.implementation, "log": plan.log}


def _named_calls(name: str) -> Calls:
    def spec(x, kernel, *p):
        batch, filters = x[0], kernel[3]
        names = [set(entry if isinstance(entry, tuple) else (entry,)) - {None} for entry in (batch, filters)]
        return PartitionSpec(batch, None, None, None if names[0] & names[1] else filters)

    return Calls(
        named_call(_forward, name, ("plan",), spec),
        named_call(_gradient_x, f"{name}_gradient_x", ("plan",), lambda x, *others: x),
        named_call(_gradient_kernel, f"{name}_gradient_kernel", ("plan",), lambda x, kernel, *others: kernel),
    )


# As in matmul.py: a walker of jaxprs knows the operator by these names and does not look inside.
_L1_CALLS = _named_calls("adder_conv")
_POWER_CALLS = _named_calls("adder_conv_power")


def _calls(p: tuple[jax.Array, ...]) -> Calls:
    return _POWER_CALLS if p else _L1_CALLS
