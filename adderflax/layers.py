"""Linear and convolutional adder layers, built on :mod:`adderflax.operators`.

An adder layer is ``Y = -sum_i |X_i - W_i|`` followed by a LayerNorm: the sums are large and negative
(about ``-1.13 * fan_in`` for unit-normal input and templates), so the normalization belongs to the layer
and runs on the float32 sums before anything is rounded to the layer's ``dtype``.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from adderflax.fields import (
    is_count,
    require_choice,
    require_count,
    require_flag,
    require_floating,
    require_pair,
)
from adderflax.operators import GradientRule, adder_conv, adder_matmul
from adderflax.operators._depthwise import depthwise_conv
from adderflax.operators._dispatch import with_automatic_axes
from adderflax.operators._origin import distance_from_origin
from adderflax.operators._windows import canonical_padding
from adderflax.operators.rules import canonical_rule

Array = jax.Array
Exponent = float | jax.Array  # of the distance; a Python 1.0 selects the kernels of the L1 distance

ARITHMETICS = ("adder", "multiply")
NORMALIZATIONS = ("layer", "none")
DTYPES = ("float32", "bfloat16")
_LINEAR_BELOW = 1e-3  # where the power activation is a line instead; normalized outputs are of order 1


def require_normalization(normalization: str, power_activation: bool) -> None:
    """Raises a ValueError unless the normalization is known and there is one where the power needs it."""
    require_choice("normalization", normalization, NORMALIZATIONS)
    if power_activation and normalization == "none":
        raise ValueError(
            "power_activation=True acts on normalized outputs, but normalization='none' leaves raw sums,"
            " far from 1 and all negative. Choose normalization='layer', or power_activation=False."
        )


class AdderDense(nn.Module):
    """Adder linear layer, [..., in] -> [..., features]: ``LayerNorm(-sum_i |x_i - w_io|)``.

    The templates are the parameter ``adder_kernel`` [in, features], drawn from N(0, 1) as in AdderNet's
    official code; the name tells optimizers which parameters are adder templates. There is no bias: the
    LayerNorm that follows has one.

    Attributes:
      features: number of output features.
      normalization: "layer" normalizes the sums over the features, 3 or more, with scale and bias; "none"
        returns the raw sums, always in float32, because they are too large for a half-precision type to
        resolve.
      dtype: computation and output dtype; None takes the common dtype of input and templates.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the templates.
      scale_init, bias_init: initializers of the LayerNorm's scale and bias [features].
      epsilon: added to the variance in the LayerNorm.
      grad_x: gradient rule towards the input: "hardtanh", ("hardtanh", slope), "sign", "full" or a function
        of the difference (see `adderflax.adder_matmul`).
      grad_kernel: gradient rule towards the templates; "full" is AdderNet's.
      implementation: operator implementation; None picks by platform.
      power_activation: whether `signed_power` follows the normalization, with the parameter ``power``.
      centered: whether each output is shifted by ``sum_i |w_io|``, so that zero inputs give zero, but for
        the rounding of two float32 sums.
    """

    features: int
    normalization: str = "layer"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(1.0)
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    epsilon: float = 1e-6
    grad_x: GradientRule = "hardtanh"
    grad_kernel: GradientRule = "full"
    implementation: str | None = None
    power_activation: bool = False
    centered: bool = False

    @nn.compact
    def __call__(self, inputs: Array, p: Exponent = 1.0) -> Array:
        """Applies the layer to `inputs` of shape [..., in]; returns [..., features].

        With `p` the sums are of ``|x - w|^p``, for training that anneals p from 2 to 1 (Chen et al.,
        Universal Adder Neural Networks, 2021). Their scale grows with p; the normalization takes it out.
        A transformed layer, as of `nn.remat` or `nn.jit`, traces a p that it is given, also 1.0, and then
        runs the slower form for any p: leave p out there, or name it in ``static_argnums``.
        """
        _require_layer(self)
        canonical_rule(self.grad_kernel, "grad_kernel")  # the operator calls it grad_y
        if not getattr(inputs, "ndim", 0):
            raise ValueError(
                "AdderDense takes an array of inputs [..., in], whose last axis is summed, but got"
                f" {inputs!r}."
            )
        shape = (inputs.shape[-1], self.features)
        kernel = self.param("adder_kernel", self.kernel_init, shape, self.param_dtype)
        inputs, kernel = _promoted(self, inputs, kernel)
        rows = inputs if inputs.ndim > 1 else inputs[None]
        rules = {"grad_x": self.grad_x, "grad_y": self.grad_kernel}
        distances = functools.partial(adder_matmul, p=p, **rules, implementation=self.implementation)
        sums = _computed(self, distances, rows, kernel)
        sums = _centered(self, sums if inputs.ndim > 1 else sums[0], kernel, p)
        return _normalized(self, sums, inputs.dtype)


class AdderConv(nn.Module):
    """Adder convolution, [..., H, W, C] -> [..., H', W', features]: ``-sum |patch - w|``, then LayerNorm.

    As in `flax.linen.Conv` any axes may stand before the image, or none. The templates are the parameter
    ``adder_kernel`` [height, width, C / feature_group_count, features], drawn from N(0, 1) as in AdderNet's
    official code. There is no bias: the normalization has one.

    Attributes:
      features: number of output features.
      kernel_size: height and width of the templates.
      strides: steps of the window in height and width, or one number for both.
      padding: "SAME", "SAME_LOWER", "VALID", ((top, bottom), (left, right)), where one number may stand for a
        pair, or one for all; zeros, which cost -|w|, and nothing where `centered`.
      dilation: distances between the positions of a template, likewise; `flax.linen.Conv` calls them
        kernel_dilation.
      feature_group_count: groups of channels; C makes it depthwise.
      normalization: "layer" normalizes the sums over the features, 3 or more, with scale and bias; "none"
        returns the raw sums, always in float32, as a BatchNorm wants them.
      dtype: computation and output dtype; None takes the common dtype of input and templates.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the templates.
      scale_init, bias_init: initializers of the LayerNorm's scale and bias [features].
      epsilon: added to the variance in the LayerNorm.
      grad_x: gradient rule towards the input: "hardtanh", ("hardtanh", slope), "sign", "full" or a function
        of the difference (see `adderflax.adder_matmul`).
      grad_kernel: gradient rule towards the templates; "full" is AdderNet's.
      implementation: operator implementation; None picks by platform.
      power_activation: whether `signed_power` follows the normalization, with the parameter ``power``.
      centered: whether each output is shifted by ``sum_i |w_io|``, so that zero inputs give zero, but for
        the rounding of two float32 sums.
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = (1, 1)
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME"
    dilation: int | Sequence[int] = (1, 1)
    feature_group_count: int = 1
    normalization: str = "layer"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(1.0)
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    epsilon: float = 1e-6
    grad_x: GradientRule = "hardtanh"
    grad_kernel: GradientRule = "full"
    implementation: str | None = None
    power_activation: bool = False
    centered: bool = False

    @nn.compact
    def __call__(self, inputs: Array, p: Exponent = 1.0) -> Array:
        """Applies the layer to `inputs` [..., H, W, C], p as in `AdderDense`; [..., H', W', features]."""
        _require_layer(self)
        require_pair("kernel_size", self.kernel_size)
        window = geometry(self)
        if getattr(inputs, "ndim", 0) < 3:
            given = f"shape {inputs.shape}" if hasattr(inputs, "shape") else repr(inputs)
            raise ValueError(f"AdderConv takes an array of images [..., H, W, C], but got {given}.")
        channels = inputs.shape[-1] // self.feature_group_count
        shape = (*self.kernel_size, channels, self.features)
        kernel = self.param("adder_kernel", self.kernel_init, shape, self.param_dtype)
        images, kernel = _promoted(self, inputs, kernel)
        rules = {"grad_x": self.grad_x, "grad_kernel": self.grad_kernel}
        distances = functools.partial(adder_conv, **window, p=p, **rules, implementation=self.implementation)
        sums = _computed(self, distances, one_batch(images, axes=3), kernel)
        return as_before(_normalized(self, _centered(self, sums, kernel, p), images.dtype), inputs, axes=3)


_STAND_IN: contextvars.ContextVar[Callable | None] = contextvars.ContextVar("stand_in", default=None)


@contextlib.contextmanager
def distances_computed_by(function: Callable[..., Array | None]) -> Iterator[None]:
    """Has adder layers that are called inside of it take their sums from a function, as of integers.

    Args:
      function: (layer, inputs, kernel) -> the sums ``-sum |x - w|`` that the layer centers and normalizes,
        float32, or None where the layer's own operator is to compute them. For an `AdderDense` inputs are
        [..., M, in], the kernel [in, features] and the sums [..., M, features]; for an `AdderConv` they are
        [N, H, W, C], [height, width, C / feature_group_count, features] and [N, H', W', features].
    """
    token = _STAND_IN.set(function)
    try:
        yield
    finally:
        _STAND_IN.reset(token)


def _computed(layer: nn.Module, distances: Callable, inputs: Array, kernel: Array) -> Array:
    stand_in = _STAND_IN.get()
    sums = None if stand_in is None else stand_in(layer, inputs, kernel)
    return distances(inputs, kernel) if sums is None else sums


def geometry(layer: AdderConv) -> dict[str, Any]:
    """The window of a convolution as `adderflax.adder_conv` takes it.

    Raises:
      ValueError: a field has a value that is not allowed; the message names it.
    """
    require_count("feature_group_count", layer.feature_group_count)
    pairs = {name: getattr(layer, name) for name in ("strides", "dilation")}
    pairs = {name: (value, value) if is_count(value) else value for name, value in pairs.items()}
    for name, value in pairs.items():
        require_pair(name, value, "a whole number, 1 or more, or a pair of them")
    return pairs | {
        "padding": canonical_padding(layer.padding),
        "feature_group_count": layer.feature_group_count,
    }


def _require_layer(layer: AdderDense | AdderConv) -> None:
    for name in ("power_activation", "centered"):
        require_flag(name, getattr(layer, name))
    require_floating("dtype", layer.dtype)
    require_normalization(layer.normalization, layer.power_activation)
    if not is_count(layer.features):
        raise ValueError(f"features={layer.features!r} must be a whole number, 1 or more, of outputs.")
    if layer.normalization == "layer" and layer.features < 3:
        raise ValueError(
            f"features={layer.features} are too few for normalization='layer': of one output a LayerNorm"
            " leaves nothing, of two which is the larger, and no gradient passes it. Choose 3 or more, or"
            " normalization='none'."
        )


def _promoted(layer: AdderDense | AdderConv, inputs: Array, kernel: Array) -> tuple[Array, Array]:
    """Inputs and kernel in the dtype in which the layer computes."""
    inputs, kernel = nn.dtypes.promote_dtype(inputs, kernel, dtype=layer.dtype)
    if inputs.dtype == jnp.float64:
        raise ValueError(
            f"{type(layer).__name__} computes in float32, bfloat16 or float16, but inputs or templates are"
            " float64, which they are by default under jax_enable_x64. Give the layer dtype=jnp.float32."
        )
    return inputs, kernel


def _centered(layer: AdderDense | AdderConv, sums: Array, kernel: Array, p: Exponent) -> Array:
    if not layer.centered:
        return sums
    return sums + jnp.broadcast_to(distance_from_origin(kernel, p, layer.grad_kernel), sums.shape)


def _normalized(layer: AdderDense | AdderConv, sums: Array, dtype: Any) -> Array:
    if layer.normalization == "none":
        return sums
    inits = {"scale_init": layer.scale_init, "bias_init": layer.bias_init}
    y = layer_norm(layer.epsilon, dtype, layer.param_dtype, "norm", **inits)(sums)
    if not layer.power_activation:
        return y
    return signed_power(y, layer.param("power", nn.initializers.zeros_init(), (), layer.param_dtype))


def signed_power(y: Array, power: Array) -> Array:
    """``sign(y) |y|^alpha`` with ``alpha = exp(power)``, a scalar; y itself, to the bit, at power = 0.

    The power activation of AdderSR (Song et al., CVPR 2021), whose alpha is learned. Learning its logarithm
    instead, which is our choice, keeps alpha positive without a bound at which its gradient would vanish.
    Below 1e-3 in magnitude it is a line through 0, so that no slope exceeds 1000 where alpha < 1.
    """
    magnitude = jnp.maximum(jnp.abs(y.astype(jnp.float32)), _LINEAR_BELOW)
    factor = jnp.exp(jnp.expm1(power.astype(jnp.float32)) * jnp.log(magnitude))
    return (y.astype(jnp.float32) * factor).astype(y.dtype)


class MultiplyDense(nn.Module):
    """The multiplying twin of `AdderDense`: ``x @ kernel (+ bias)``, then the same normalization; no p."""

    features: int
    normalization: str
    use_bias: bool
    dtype: Any
    epsilon: float
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, inputs: Array, p: Exponent = 1.0) -> Array:
        shape = (inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        inputs, kernel = nn.dtypes.promote_dtype(inputs, kernel, dtype=self.dtype)
        outputs = jnp.matmul(inputs, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
            outputs = outputs + jnp.broadcast_to(bias.astype(outputs.dtype), outputs.shape)
        if self.normalization == "none":
            return outputs
        return layer_norm(self.epsilon, self.dtype, jnp.float32, name="norm")(outputs)


class MultiplyConv(nn.Module):
    """The multiplying twin of `AdderConv`, [N, H, W, C] -> [N, H', W', features], then LayerNorm; no p.

    Attributes: those of `AdderConv` with the same names; `dtype` must be given. The kernel is [height, width,
    C / feature_group_count, features]; there is no bias, because the LayerNorm has one.
    """

    features: int
    kernel_size: Sequence[int]
    strides: Sequence[int]
    padding: Sequence[tuple[int, int]]
    dtype: Any
    epsilon: float
    feature_group_count: int = 1

    @nn.compact
    def __call__(self, inputs: Array, p: Exponent = 1.0) -> Array:
        groups = self.feature_group_count
        shape = (*self.kernel_size, inputs.shape[-1] // groups, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        inputs, kernel = nn.dtypes.promote_dtype(inputs, kernel, dtype=self.dtype)
        window = {"strides": self.strides, "padding": self.padding}
        if inputs.shape[-1] == groups > 1:
            outputs = depthwise_conv(inputs, kernel, **window)
        else:
            outputs = jax.lax.conv_general_dilated(
                inputs,
                kernel,
                self.strides,
                self.padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
        return layer_norm(self.epsilon, self.dtype, jnp.float32, name="norm")(outputs)


def layer_norm(
    epsilon: float, dtype: Any, param_dtype: Any, name: str | None = None, **inits: Any
) -> nn.LayerNorm:
    """The LayerNorm used throughout: over the last axis, with scale and bias, statistics in float32."""
    # E[x^2] - E[x]^2 loses four digits on adder sums, whose mean is some 50 times their deviation.
    return nn.LayerNorm(
        epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name=name, **inits
    )


def one_batch(x: Array, axes: int = 2) -> Array:
    """[..., T, F] as [B, T, F]; with axes=3 [..., H, T, S] as [B, H, T, S], or an image [..., H, W, C]."""
    if x.ndim == axes + 1:
        return x

    def spec(before: PartitionSpec) -> PartitionSpec:
        split = [
            name for entry in before[:-axes] for name in (entry if isinstance(entry, tuple) else (entry,))
        ]
        return PartitionSpec(tuple(name for name in split if name is not None), *before[-axes:])

    def merge(x: Array) -> Array:
        return x.reshape(math.prod(x.shape[:-axes]), *x.shape[-axes:])

    return with_automatic_axes(merge, spec)(x)


def as_before(y: Array, x: Array, axes: int = 2) -> Array:
    """What was computed of `one_batch(x, axes)`, [B, ...], with x's axes before its last in place of B."""
    if x.ndim == axes + 1:
        return y

    def split(y: Array, x: Array) -> Array:
        return y.reshape(*x.shape[:-axes], *y.shape[1:])

    return with_automatic_axes(split, lambda y, x: PartitionSpec(*x[:-axes], *y[1:]))(y, x)
