"""Multi-head attention in adder, multiplying or mixed arithmetic, of tokens to themselves or to a context."""

import jax.numpy as jnp
from flax import linen as nn

from adderflax.encoder_config import EncoderConfig, dense, require_tokens
from adderflax.fields import require_array, require_flag
from adderflax.layers import Array, Exponent, as_before, one_batch
from adderflax.operators import adder_attention
from adderflax.operators.attention import check_mask


class AdderSelfAttention(nn.Module):
    """Multi-head self-attention in the arithmetic of `config`, [..., T, embed_dim] -> [..., T, embed_dim].

    As in ``nn.MultiHeadDotProductAttention`` any axes may stand before the tokens, as [B] or [B, windows], or
    none. Queries, keys and values are normalized over the whole embedding before the heads are split. The
    attention map [..., num_heads, T, T], identity included, is sown as ``attention_weights`` whenever the
    ``intermediates`` collection is mutable. There is no dropout of weights and no cache for decoding.

    Attributes:
      config: of it, what concerns attention.
      kernel_init: initializer of the kernels or templates of query, key and value, which may carry names of
        axes, as ``nn.with_partitioning(nn.initializers.normal(1.0), (None, "model"))``; None is the layers'
        own.
      out_kernel_init: likewise of the output projection.
    """

    config: EncoderConfig
    kernel_init: nn.initializers.Initializer | None = None
    out_kernel_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(
        self,
        x_BxTxD: Array,
        mask: Array | None = None,
        p: Exponent = 1.0,
        *,
        bias: Array | None = None,
        is_causal: bool = False,
    ) -> Array:
        """Applies attention.

        Args:
          x_BxTxD: input tokens, [..., T, embed_dim].
          mask: boolean, True where a query may see a key, broadcastable to [..., num_heads, T, T], as
            ``nn.make_causal_mask(x_BxTxD[..., 0], dtype=bool)``.
          p: exponent of the distance in the adder projections. Similarity and aggregation have no templates
            to anneal and stay as configured: an L1 similarity is L1 at every p.
          bias: floating, broadcastable likewise, added to the scaled similarity.
          is_causal: whether a token attends to those up to itself alone, of those that the mask leaves.

        Raises:
          TypeError: config, tokens, mask, bias or flag have a type that is not allowed.
          ValueError: the tokens are not [..., T, embed_dim], or mask or bias do not fit them.
        """
        require_tokens(self.config, x_BxTxD, "AdderSelfAttention")
        if getattr(mask, "shape", None) == x_BxTxD.shape and mask.dtype != bool:
            raise TypeError(
                "AdderSelfAttention takes one sequence and a mask, but got a second sequence. Attention to"
                " another one is AdderCrossAttention."
            )
        return _attend(self, x_BxTxD, x_BxTxD, mask, p, bias, is_causal, self.config.identity)


class AdderCrossAttention(nn.Module):
    """Multi-head attention of tokens to a context, [..., T, embed_dim] -> [..., T, embed_dim].

    As `AdderSelfAttention`, with the same parameters, but keys and values are of the context, which may have
    another number and width of tokens.

    Attributes:
      config: of it, what concerns attention, but for `identity`.
      kernel_init, out_kernel_init: as in `AdderSelfAttention`.
      identity: whether I is added to the attention map, by which token i attends to token i of the context
        besides: only of sequences that belong together one by one.
    """

    config: EncoderConfig
    kernel_init: nn.initializers.Initializer | None = None
    out_kernel_init: nn.initializers.Initializer | None = None
    identity: bool = False

    @nn.compact
    def __call__(
        self,
        x_BxTxD: Array,
        context_BxSxC: Array,
        mask: Array | None = None,
        p: Exponent = 1.0,
        *,
        bias: Array | None = None,
        is_causal: bool = False,
    ) -> Array:
        """Applies attention.

        Args:
          x_BxTxD: tokens that attend, [..., T, embed_dim].
          context_BxSxC: tokens that are attended to, [..., S, C], with the same axes before them.
          mask: boolean, True where a query may see a key, broadcastable to [..., num_heads, T, S].
          p, bias, is_causal: as in `AdderSelfAttention`.

        Raises:
          TypeError: config, tokens, mask, bias or flag have a type that is not allowed.
          ValueError: the tokens are not [..., T, embed_dim], the context is not [..., S, C] with the same
            axes before, mask or bias do not fit them, or the identity is added where S is not T.
        """
        require_tokens(self.config, x_BxTxD, "AdderCrossAttention")
        require_array("AdderCrossAttention", "a context's tokens", context_BxSxC)
        require_flag("identity", self.identity)
        if context_BxSxC.ndim != x_BxTxD.ndim or context_BxSxC.shape[:-2] != x_BxTxD.shape[:-2]:
            layout = ", ".join(map(str, (*x_BxTxD.shape[:-2], "S", "C")))
            raise ValueError(
                f"AdderCrossAttention takes a context [{layout}] for tokens {x_BxTxD.shape}, but got shape"
                f" {context_BxSxC.shape}."
            )
        return _attend(self, x_BxTxD, context_BxSxC, mask, p, bias, is_causal, self.identity)


def _attend(
    module: AdderSelfAttention | AdderCrossAttention,
    x: Array,
    context: Array,
    mask: Array | None,
    p: Exponent,
    bias: Array | None,
    is_causal: bool,
    identity: bool,
) -> Array:
    """The attention of x to the context, with layers that belong to the module, in its compact call."""
    config = module.config
    width = config.embed_dim // config.num_heads
    shape = (*x.shape[:-2], config.num_heads, x.shape[-2], context.shape[-2])
    if mask is not None:
        check_mask(mask)
        mask = _of_one_batch("mask", mask, shape)
    if bias is not None:
        bias = _of_one_batch("bias", bias, shape)
    x_BxTxD, context_BxSxC = one_batch(x), one_batch(context)

    def heads(name: str, tokens: Array) -> Array:
        layer = dense(config, config.linear, config.embed_dim, name, kernel_init=module.kernel_init)
        projected = layer(tokens, p)
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
        bias=bias,
        is_causal=is_causal,
        identity=identity,
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
        module.sow("intermediates", "attention_weights", as_before(weights_BxHxTxS, x))
    attended = attended.astype(config.compute_dtype).reshape(x_BxTxD.shape)
    layer = dense(
        config, config.output_projection, config.embed_dim, "out", kernel_init=module.out_kernel_init
    )
    return as_before(layer(attended, p), x)


def _of_one_batch(name: str, mask: Array, shape: tuple[int, ...]) -> Array:
    """A mask or bias for [..., H, T, S] as one for [B, H, T, S]; `adder_attention` checks its dtype."""
    if getattr(mask, "ndim", 0) > 3 and all(size == 1 for size in mask.shape[:-3]):
        mask = mask.reshape(mask.shape[-3:])
    if not getattr(mask, "ndim", 0) or len(shape) == 4:
        return mask
    try:
        fits = jnp.broadcast_shapes(mask.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name}: shape {mask.shape} does not broadcast to {shape} ([..., heads, queries, keys])."
        )
    if mask.ndim <= 3:
        return mask
    return one_batch(jnp.broadcast_to(mask, (*shape[:-3], *mask.shape[-3:])), axes=3)
