"""The transformer's encoder block in adder, multiplying or mixed arithmetic, and its description."""

import dataclasses
import math
from typing import Self

import jax.numpy as jnp
from flax import linen as nn

from adderflax.fields import (
    is_count,
    is_finite,
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
    Exponent,
    GradientRule,
    MultiplyConv,
    MultiplyDense,
    layer_norm,
    require_normalization,
)
from adderflax.operators import adder_attention, available_implementations
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
      drop_path_rate: stochastic depth, the probability that a sample skips a residual branch.
      layer_norm_epsilon: added to the variance in every LayerNorm.
      dtype: computation dtype, "float32" or "bfloat16", also as jnp.bfloat16; sums, softmax and LayerNorm
        stay in float32.
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
                " takes embed_dim / num_heads features. Choose a multiple of num_heads."
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
    """
    shared = {
        "features": features,
        "normalization": config.normalization if normalization is None else normalization,
        "dtype": config.compute_dtype,
        "epsilon": config.layer_norm_epsilon,
        "name": name,
    }
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


def _require_tokens(config: EncoderConfig, x: Array, module: str, *, batched: bool = True) -> None:
    if x.shape[-1:] != (config.embed_dim,) or (batched and x.ndim != 3):
        layout = "[B, T, embed_dim]" if batched else "[..., embed_dim]"
        raise ValueError(
            f"{module} takes tokens {layout} with embed_dim={config.embed_dim}, but got shape {x.shape}."
        )


class AdderSelfAttention(nn.Module):
    """Multi-head self-attention in the arithmetic of `config`, [B, T, embed_dim] -> [B, T, embed_dim].

    Queries, keys and values are normalized over the whole embedding before the heads are split. The
    attention map [B, num_heads, T, T], identity included, is sown as ``attention_weights`` whenever the
    ``intermediates`` collection is mutable.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BxTxD: Array, mask: Array | None = None, p: Exponent = 1.0) -> Array:
        """Applies attention.

        Args:
          x_BxTxD: input tokens.
          mask: boolean, True where a query may see a key, broadcastable to [B, num_heads, T, T], as
            ``nn.make_causal_mask(x_BxTxD[..., 0], dtype=bool)``.
          p: exponent of the distance in the adder projections. Similarity and aggregation have no templates
            to anneal and stay as configured: an L1 similarity is L1 at every p.

        Raises:
          ValueError: the tokens are not [B, T, embed_dim].
        """
        _require_tokens(self.config, x_BxTxD, "AdderSelfAttention")
        return _attend(self, x_BxTxD, x_BxTxD, mask, p)


class AdderCrossAttention(nn.Module):
    """Multi-head attention of tokens to a context, [B, T, embed_dim] -> [B, T, embed_dim].

    As `AdderSelfAttention`, with the same parameters, but keys and values are of the context, which may have
    another number and width of tokens. The identity needs as many: set ``identity=False`` where it has not.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: Array, context_BxSxC: Array, mask: Array | None = None, p: Exponent = 1.0
    ) -> Array:
        """Applies attention.

        Args:
          x_BxTxD: tokens that attend.
          context_BxSxC: tokens that are attended to.
          mask: boolean, True where a query may see a key, broadcastable to [B, num_heads, T, S].
          p: as in `AdderSelfAttention`.

        Raises:
          ValueError: the tokens are not [B, T, embed_dim], the context is not [B, S, C] with the same B, or
            the identity is added where S is not T.
        """
        _require_tokens(self.config, x_BxTxD, "AdderCrossAttention")
        if context_BxSxC.ndim != 3 or context_BxSxC.shape[0] != x_BxTxD.shape[0]:
            raise ValueError(
                f"AdderCrossAttention takes a context [B, S, C] with B={x_BxTxD.shape[0]}, that of the tokens"
                f" {x_BxTxD.shape}, but got shape {context_BxSxC.shape}."
            )
        return _attend(self, x_BxTxD, context_BxSxC, mask, p)


def _attend(
    module: AdderSelfAttention | AdderCrossAttention,
    x_BxTxD: Array,
    context_BxSxC: Array,
    mask: Array | None,
    p: Exponent,
) -> Array:
    """The attention of x to the context, with layers that belong to the module, in its compact call."""
    config = module.config
    width = config.embed_dim // config.num_heads

    def heads(name: str, tokens: Array) -> Array:
        projected = dense(config, config.linear, config.embed_dim, name)(tokens, p)
        return projected.reshape(*tokens.shape[:2], config.num_heads, width)

    query, key, value = (
        heads(name, tokens)
        for name, tokens in (("query", x_BxTxD), ("key", context_BxSxC), ("value", context_BxSxC))
    )
    capture = module.is_mutable_collection("intermediates")
    attended = adder_attention(
        query,
        key,
        value,
        mask=mask,
        identity=config.identity,
        similarity=config.similarity,
        aggregation=config.aggregation,
        scale=config.attention_scale,
        grad_query=config.grad_query,
        grad_key=config.grad_key,
        return_weights=capture,
        implementation=config.implementation,
    )
    if capture:
        attended, weights_BxHxTxS = attended
        module.sow("intermediates", "attention_weights", weights_BxHxTxS)
    attended = attended.astype(config.compute_dtype).reshape(x_BxTxD.shape)
    return dense(config, config.output_projection, config.embed_dim, "out")(attended, p)


class AdderMlp(nn.Module):
    """fc1, GELU, fc2 in the arithmetic of `config`, each followed by its normalization.

    With `mlp_kernel_size` a depthwise convolution over the image's tokens is added before the GELU.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, x_BxTxD: Array, p: Exponent = 1.0) -> Array:
        """Applies the MLP to [..., embed_dim], with p as in `AdderDense`; returns the same shape.

        Raises:
          ValueError: the last axis is not embed_dim, or `mlp_kernel_size` is set and the input is not
            [B, side * side, embed_dim].
        """
        config = self.config
        _require_tokens(config, x_BxTxD, "AdderMlp", batched=False)
        hidden = config.resolved().mlp_dim
        x = dense(config, config.linear, hidden, "fc1")(x_BxTxD, p)
        if config.mlp_kernel_size is not None:
            x = x + self._neighbors(x, p)
        return dense(config, config.linear, config.embed_dim, "fc2")(nn.gelu(x), p)

    def _neighbors(self, x_BxTxF: Array, p: Exponent) -> Array:
        config, shape = self.config, x_BxTxF.shape
        side = math.isqrt(shape[1]) if len(shape) == 3 else 0
        if len(shape) != 3 or side * side != shape[1]:
            raise ValueError(
                f"mlp_kernel_size={config.mlp_kernel_size} needs tokens of a square image, [B, side * side,"
                f" embed_dim], but the MLP sees {shape[:-1]} of them. Leave the class token out"
                " (pooling='mean'), or set mlp_kernel_size=None."
            )
        image = x_BxTxF.reshape(shape[0], side, side, shape[2])
        arithmetic = config.resolved().mlp_convolution
        size, groups = config.mlp_kernel_size, {"feature_group_count": shape[2]}
        layer = convolution(config, arithmetic, shape[2], size, "conv", **groups)
        return layer(image, p).reshape(shape)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: ``x + Attention(LN(x))``, then ``x + MLP(LN(x))``."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: Array, train: bool = False, p: Exponent = 1.0, mask: Array | None = None
    ) -> Array:
        """Applies the block.

        Args:
          x_BxTxD: tokens.
          train: whether stochastic depth is drawn, from rng "drop_path".
          p: exponent of the distance, as in `AdderDense`.
          mask: of the attention, as in `AdderSelfAttention`.

        Raises:
          ValueError: the tokens are not [B, T, embed_dim].
        """
        config = self.config
        _require_tokens(config, x_BxTxD, "EncoderBlock")

        def drop_path(branch: Array) -> Array:
            return nn.Dropout(config.drop_path_rate, broadcast_dims=(1, 2), rng_collection="drop_path")(
                branch, deterministic=not train
            )

        def pre_norm(name: str) -> nn.LayerNorm:
            return layer_norm(config.layer_norm_epsilon, config.compute_dtype, jnp.float32, name)

        x = x_BxTxD
        attention, mlp = AdderSelfAttention(config, name="attention"), AdderMlp(config, name="mlp")
        x = x + drop_path(attention(pre_norm("attention_norm")(x), mask, p))
        return x + drop_path(mlp(pre_norm("mlp_norm")(x), p))
