"""The transformer's encoder block in adder, multiplying or mixed arithmetic."""

import math

import jax.numpy as jnp
from flax import linen as nn

from adderflax.attention import AdderSelfAttention
from adderflax.encoder_config import EncoderConfig, convolution, dense, require_tokens
from adderflax.fields import require_flag
from adderflax.layers import Array, Exponent, as_before, layer_norm, one_batch


class AdderMlp(nn.Module):
    """fc1, GELU, fc2 in the arithmetic of `config`, each followed by its normalization.

    With `mlp_kernel_size` a depthwise convolution over the image's tokens is added before the GELU.

    Attributes:
      config: of it, what concerns the MLP.
      kernel_init, out_kernel_init: initializers of fc1's kernel or templates and of fc2's, as in
        `AdderSelfAttention`.
    """

    config: EncoderConfig
    kernel_init: nn.initializers.Initializer | None = None
    out_kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x_BxTxD: Array, p: Exponent = 1.0) -> Array:
        """Applies the MLP to [..., embed_dim], with p as in `AdderDense`; returns the same shape.

        Raises:
          ValueError: the last axis is not embed_dim, or `mlp_kernel_size` is set and the input is not
            [..., side * side, embed_dim].
        """
        config = self.config
        require_tokens(config, x_BxTxD, "AdderMlp", axes=1)
        hidden = config.resolved().mlp_dim
        x = dense(config, config.linear, hidden, "fc1", kernel_init=self.kernel_init)(x_BxTxD, p)
        if config.mlp_kernel_size is not None:
            x = x + self._neighbors(x, p)
        fc2 = dense(config, config.linear, config.embed_dim, "fc2", kernel_init=self.out_kernel_init)
        return fc2(nn.gelu(x), p)

    def _neighbors(self, x_BxTxF: Array, p: Exponent) -> Array:
        config, shape = self.config, x_BxTxF.shape
        side = math.isqrt(shape[-2]) if len(shape) > 1 else 0
        if len(shape) < 2 or side * side != shape[-2]:
            raise ValueError(
                f"mlp_kernel_size={config.mlp_kernel_size} needs tokens of a square image, [..., side * side,"
                f" embed_dim], but the MLP sees {shape[:-1]} of them. Leave the class token out"
                " (pooling='mean'), or set mlp_kernel_size=None."
            )
        tokens = one_batch(x_BxTxF)
        image = tokens.reshape(tokens.shape[0], side, side, shape[-1])
        arithmetic = config.resolved().mlp_convolution
        size, groups = config.mlp_kernel_size, {"feature_group_count": shape[-1]}
        layer = convolution(config, arithmetic, shape[-1], size, "conv", **groups)
        return as_before(layer(image, p).reshape(tokens.shape), x_BxTxF)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block, [..., T, embed_dim]: ``x + Attention(LN(x))``, then ``x + MLP(LN(x))``.

    Attributes:
      config: what it computes.
      kernel_init, out_kernel_init: initializers of what enters attention and MLP, and of what leaves them, as
        in `AdderSelfAttention` and `AdderMlp`.
    """

    config: EncoderConfig
    kernel_init: nn.initializers.Initializer | None = None
    out_kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(
        self, x_BxTxD: Array, train: bool = False, p: Exponent = 1.0, mask: Array | None = None
    ) -> Array:
        """Applies the block.

        Args:
          x_BxTxD: tokens, [..., T, embed_dim].
          train: whether stochastic depth is drawn, from rng "drop_path", for each entry of the first axis, or
            once for tokens without a batch.
          p: exponent of the distance, as in `AdderDense`.
          mask: of the attention, as in `AdderSelfAttention`.

        Raises:
          ValueError: the tokens are not [..., T, embed_dim], or the mask does not fit them.
        """
        config = self.config
        require_tokens(config, x_BxTxD, "EncoderBlock")
        require_flag("train", train)
        inits = {"kernel_init": self.kernel_init, "out_kernel_init": self.out_kernel_init}

        def drop_path(branch: Array) -> Array:
            shared = tuple(range(1 if branch.ndim > 2 else 0, branch.ndim))
            dropout = nn.Dropout(config.drop_path_rate, broadcast_dims=shared, rng_collection="drop_path")
            return dropout(branch, deterministic=not train)

        def pre_norm(name: str) -> nn.LayerNorm:
            return layer_norm(config.layer_norm_epsilon, config.compute_dtype, jnp.float32, name)

        x = x_BxTxD
        attention = AdderSelfAttention(config, **inits, name="attention")
        mlp = AdderMlp(config, **inits, name="mlp")
        x = x + drop_path(attention(pre_norm("attention_norm")(x), mask, p))
        return x + drop_path(mlp(pre_norm("mlp_norm")(x), p))
