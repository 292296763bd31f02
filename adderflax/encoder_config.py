"""What an encoder block is made of: its description, and the linear layers and convolutions that it means."""

import dataclasses
from typing import Self

import jax.numpy as jnp
from flax import linen as nn

from adderflax.fields import (
    is_count,
    is_finite,
    require_array,
    require_choice,
    require_count,
    require_flag,
    settle_dtype,
    settle_rules,
)
from adderflax.layers import (
    ARITHMETICS,
    DTYPES,
    AdderConv,
    AdderDense,
    Array,
    GradientRule,
    MultiplyConv,
    MultiplyDense,
    require_normalization,
)
from adderflax.operators import available_implementations
from adderflax.operators.attention import default_attention_scale

SIMILARITIES = ("l1", "dot")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What one encoder block computes and with which arithmetic.

    The defaults are the adder block of "Adder Attention for Vision Transformer" as independent readers
    report it; axis of the normalization and arithmetic of the output projection are our choice.

    Attributes:
      embed_dim: width of the residual stream.
      num_heads: attention heads; divides `embed_dim`.
      mlp_dim: hidden width of the MLP; None means ``4 * embed_dim``.
      mlp_kernel_size: side of a depthwise convolution in the MLP, whose result is added to fc1's before the
        GELU, an odd number of positions; None has no convolution. It makes neighbors known to each other, as
        in LocalViT (Li et al. 2021, "LocalViT: Bringing Locality to Vision Transformers"). The tokens must be
        those of a square image in reading order, without a class token.
      mlp_convolution: arithmetic of that convolution, "adder" or "multiply"; None means that of `linear`.
        Without a convolution it must be None.
      linear: arithmetic of the query, key, value, fc1 and fc2 projections, "adder" or "multiply".
      output_projection: arithmetic of the attention's output projection.
      similarity: "l1" for ``-sum_c |q_c - k_c|`` or "dot" for ``q . k``.
      aggregation: "dot" for the product ``A V`` or "l1" for its adder form (see `adder_attention`).
      identity: whether I is added to the attention map (the paper's eq. 20, as two readers report it).
      attention_scale: factor on the similarity; None means ``1/sqrt(2 d (1 - 2/pi))`` for "l1" and
        ``1/sqrt(d)`` for "dot", d the head width.
      normalization: "layer" puts a LayerNorm over the features after every linear layer of the block,
        "none" leaves it out.
      power_activation: whether `signed_power` with an exponent of its own follows the normalization of
        every adder linear layer, an adder classifier excepted. Multiplying layers never have it.
      centered: whether every adder linear layer and convolution, of embedding and adder classifier too,
        adds the distance of each template from the origin, ``sum_i |w_io|``, to its sums. Zero inputs then
        give zeros, but for the rounding of two float32 sums, and with grad_kernel="full" templates get the
        dense layer's gradient, ``x^T g``. It is one constant an output, which hardware stores beside the
        templates. Our choice, for what results/gap_cifar10.md shows.
      use_bias: whether multiplying layers of the block have a bias. Adder layers have none.
      grad_inputs: gradient rule of adder layers towards their input (see `adderflax.adder_matmul`).
      grad_kernel: gradient rule of adder layers towards their templates.
      grad_query: gradient rule of the L1 similarity towards the queries.
      grad_key: gradient rule of the L1 similarity towards the keys.
      drop_path_rate: stochastic depth, the probability that a sample skips a residual branch; drawn from the
        rng "drop_path".
      layer_norm_epsilon: added to the variance in every LayerNorm.
      dtype: computation dtype, "float32" or "bfloat16", also as jnp.bfloat16; sums, softmax and LayerNorm
        stay in float32, and so do parameters.
      remat: recompute each block's activations in the backward pass instead of storing them; what stacks the
        blocks does it, as `VisionTransformer`, and a single `EncoderBlock` takes `nn.remat`.
      implementation: operator implementation (see `adderflax.adder_matmul`); None picks by platform.

    Raises:
      ValueError: a field has a value that is not allowed; the message names it.
    """

    embed_dim: int = 192
    num_heads: int = 3
    mlp_dim: int | None = None
    mlp_kernel_size: int | None = None
    mlp_convolution: str | None = None
    linear: str = "adder"
    output_projection: str = "adder"
    similarity: str = "l1"
    aggregation: str = "dot"
    identity: bool = True
    attention_scale: float | None = None
    normalization: str = "layer"
    power_activation: bool = False
    centered: bool = False
    use_bias: bool = False
    grad_inputs: GradientRule = "hardtanh"
    grad_kernel: GradientRule = "full"
    grad_query: GradientRule = "hardtanh"
    grad_key: GradientRule = "hardtanh"
    drop_path_rate: float = 0.0
    layer_norm_epsilon: float = 1e-6
    dtype: str = "float32"
    remat: bool = False
    implementation: str | None = None

    def __post_init__(self):
        for name in ("linear", "output_projection"):
            require_choice(name, getattr(self, name), ARITHMETICS)
        for name in ("similarity", "aggregation"):
            require_choice(name, getattr(self, name), SIMILARITIES)
        require_normalization(self.normalization, self.power_activation)
        require_choice("mlp_convolution", self.mlp_convolution, (None, *ARITHMETICS))
        settle_dtype(self, DTYPES)
        for name in ("embed_dim", "num_heads"):
            require_count(name, getattr(self, name))
        for name in ("identity", "power_activation", "centered", "use_bias", "remat"):
            require_flag(name, getattr(self, name))
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim={self.embed_dim} is not divisible by num_heads={self.num_heads}: every head"
                " takes embed_dim / num_heads features. Choose a multiple of num_heads, or other num_heads."
            )
        if self.mlp_dim is not None and not is_count(self.mlp_dim):
            raise ValueError(
                f"mlp_dim={self.mlp_dim!r} must be a whole number, at least 1, or None for 4 * embed_dim."
            )
        size = self.mlp_kernel_size
        if size is not None and not (is_count(size) and size % 2):
            raise ValueError(
                f"mlp_kernel_size={size!r} must be an odd whole number, as 3 or 5, or None, which has no"
                " convolution."
            )
        if size is None and self.mlp_convolution is not None:
            raise ValueError(
                f"mlp_convolution={self.mlp_convolution!r} is of a convolution that is not there: set"
                " mlp_kernel_size, as 3, or leave mlp_convolution unset."
            )
        if not (is_finite(self.drop_path_rate) and 0.0 <= self.drop_path_rate < 1.0):
            raise ValueError(f"drop_path_rate={self.drop_path_rate!r} must be a number in [0, 1).")
        if not (is_finite(self.layer_norm_epsilon) and self.layer_norm_epsilon > 0):
            raise ValueError(
                f"layer_norm_epsilon={self.layer_norm_epsilon!r} must be a number greater than 0."
            )
        if self.attention_scale is not None and not is_finite(self.attention_scale):
            raise ValueError(
                f"attention_scale={self.attention_scale!r} must be a finite number, or None for its default."
            )
        settle_rules(self, "grad_inputs", "grad_kernel", "grad_query", "grad_key")
        require_choice("implementation", self.implementation, (None, *available_implementations()))

    def resolved(self) -> Self:
        """The same description with what its unset fields stand for: no None but where nothing is meant."""
        unset = {"mlp_dim": 4 * self.embed_dim}
        unset["attention_scale"] = default_attention_scale(self.similarity, self.embed_dim // self.num_heads)
        if self.mlp_kernel_size is not None:
            unset["mlp_convolution"] = self.linear
        given = {name: getattr(self, name) for name in unset}
        return dataclasses.replace(
            self, **{name: unset[name] if value is None else value for name, value in given.items()}
        )

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a NumPy dtype."""
        return jnp.dtype(self.dtype)


def dense(
    config: EncoderConfig,
    arithmetic: str,
    features: int,
    name: str | None = None,
    *,
    normalization: str | None = None,
    power_activation: bool | None = None,
    use_bias: bool | None = None,
    kernel_init: nn.initializers.Initializer | None = None,
) -> nn.Module:
    """The linear layer that `config` describes, in the given arithmetic.

    Args:
      config: the block's configuration.
      arithmetic: "adder" or "multiply".
      features: number of output features.
      name: Linen name of the layer.
      normalization: overrides `config.normalization`.
      power_activation: overrides `config.power_activation`; multiplying layers have none either way.
      use_bias: overrides `config.use_bias`; adder layers have no bias either way.
      kernel_init: initializer of templates or kernel; None means the layer's own.
    """
    shared = {
        "features": features,
        "normalization": config.normalization if normalization is None else normalization,
        "dtype": config.compute_dtype,
        "epsilon": config.layer_norm_epsilon,
        "name": name,
    } | ({} if kernel_init is None else {"kernel_init": kernel_init})
    if arithmetic == "multiply":
        return MultiplyDense(use_bias=config.use_bias if use_bias is None else use_bias, **shared)
    return AdderDense(
        power_activation=config.power_activation if power_activation is None else power_activation,
        centered=config.centered,
        grad_x=config.grad_inputs,
        grad_kernel=config.grad_kernel,
        implementation=config.implementation,
        **shared,
    )


def convolution(
    config: EncoderConfig,
    arithmetic: str,
    features: int,
    kernel_size: int,
    name: str,
    *,
    stride: int = 1,
    feature_group_count: int = 1,
) -> nn.Module:
    """A square convolution that `config` describes, in the given arithmetic; it ends in a LayerNorm.

    Args:
      config: the block's configuration.
      arithmetic: "adder" or "multiply".
      features: number of output features.
      kernel_size: its side, odd; the image is padded by half of it.
      name: Linen name of the layer.
      stride: steps of the window.
      feature_group_count: groups of channels.
    """
    half = kernel_size // 2
    shared = {
        "features": features,
        "kernel_size": (kernel_size, kernel_size),
        "strides": (stride, stride),
        "padding": ((half, half), (half, half)),
        "feature_group_count": feature_group_count,
        "dtype": config.compute_dtype,
        "epsilon": config.layer_norm_epsilon,
        "name": name,
    }
    if arithmetic == "multiply":
        return MultiplyConv(**shared)
    return AdderConv(
        power_activation=config.power_activation,
        centered=config.centered,
        grad_x=config.grad_inputs,
        grad_kernel=config.grad_kernel,
        implementation=config.implementation,
        **shared,
    )


def require_tokens(config: EncoderConfig, x: Array, module: str, *, axes: int = 2) -> None:
    """Raises where config is none, or x is not [..., T, embed_dim], or with axes=1 [..., embed_dim]."""
    if not isinstance(config, EncoderConfig):
        raise TypeError(
            f"{module} takes an EncoderConfig, as {module}(EncoderConfig(embed_dim=64, num_heads=4)), but its"
            f" config is {config!r}."
        )
    require_array(module, "tokens", x)
    if x.ndim < axes or x.shape[-1] != config.embed_dim:
        layout = "[..., T, embed_dim]" if axes == 2 else "[..., embed_dim]"
        raise ValueError(
            f"{module} takes tokens {layout} with embed_dim={config.embed_dim}, but got shape {x.shape}."
        )
