"""The Vision Transformer in adder, multiplying or mixed arithmetic."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp
from flax import linen as nn

from adderflax.encoder import EncoderBlock
from adderflax.encoder_config import EncoderConfig, convolution, dense
from adderflax.fields import require_choice, require_count, require_known
from adderflax.layers import ARITHMETICS, Exponent, layer_norm
from adderflax.models.classifier import require_images

STEMS = ("patch", "conv")
POOLINGS = ("token", "mean")

# Sizes of DeiT (Touvron et al., 2021, table 1) for ImageNet; /4 are the same encoders on 4-pixel patches,
# for CIFAR-10.
VARIANTS = {
    "Ti/16": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "S/16": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "B/16": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
}
for _variant in ("Ti", "S"):
    VARIANTS[f"{_variant}/4"] = VARIANTS[f"{_variant}/16"] | {
        "patch_size": 4,
        "image_size": 32,
        "num_classes": 10,
    }
# As deep and wide as CCT-7 (Hassani et al. 2021, "Escaping the Big Data Paradigm with Compact Transformers"),
# for images of 32 pixels.
VARIANTS["compact/4"] = {
    "patch_size": 4,
    "embed_dim": 256,
    "depth": 7,
    "num_heads": 4,
    "mlp_dim": 512,
    "stem": "conv",
    "pooling": "mean",
    "image_size": 32,
    "num_classes": 10,
}
VARIANTS["digits"] = {
    "patch_size": 2,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "image_size": 8,
    "channels": 1,
    "num_classes": 10,
}

# A preset is a complete choice of these fields; "custom" leaves each of them to the caller.
_ADDER = {
    "linear": "adder",
    "output_projection": "adder",
    "similarity": "l1",
    "aggregation": "dot",
    "patch_embedding": "multiply",
    "head": "multiply",
    "identity": True,
    "normalization": "layer",
    "use_bias": False,
}
_MULTIPLY = _ADDER | {"linear": "multiply", "output_projection": "multiply", "similarity": "dot"}
PRESETS = {
    "adder": _ADDER,
    "multiply": _MULTIPLY,
    "vit": _MULTIPLY | {"identity": False, "normalization": "none", "use_bias": True},
}
PRESET_FIELDS = tuple(_ADDER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionTransformerConfig(EncoderConfig):
    """A whole Vision Transformer; adds these to the fields of `EncoderConfig`.

    Attributes:
      image_size: height and width of the input in pixels; a multiple of `patch_size`.
      patch_size: height and width of a patch in pixels.
      channels: channels of the input.
      num_classes: number of logits.
      depth: number of encoder blocks.
      stem: "patch" embeds the patches themselves. "conv" embeds what 3x3 convolutions of stride 2 leave of
        them, one for each halving of `patch_size` (a power of two), each normalized and followed by a GELU,
        of widths embed_dim / 4, embed_dim / 2 for 4-pixel patches (after Xiao et al. 2021, "Early
        Convolutions Help Transformers See Better").
      pooling: "token" classifies by a class token; "mean" by the mean of the normalized tokens, and there
        is no class token.
      patch_embedding: arithmetic of the patch embedding, the convolutions of its stem included. "multiply"
        is a dense layer with bias, the laboratory's rule for first layers; "adder" is an `AdderDense`. The
        convolutions have a LayerNorm and no bias in either.
      head: arithmetic of the classifier. "multiply" is a dense layer with bias; "adder" an `AdderDense`
        whose LayerNorm spans the logits.
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000
    depth: int = 12
    stem: str = "patch"
    pooling: str = "token"
    patch_embedding: str = "multiply"
    head: str = "multiply"

    def __post_init__(self):
        super().__post_init__()
        for name in ("patch_embedding", "head"):
            require_choice(name, getattr(self, name), ARITHMETICS)
        require_choice("stem", self.stem, STEMS)
        require_choice("pooling", self.pooling, POOLINGS)
        for name in ("channels", "num_classes", "depth", "image_size", "patch_size"):
            require_count(name, getattr(self, name))
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}: the image"
                " is cut into whole square patches. Choose another of the two, or another variant:"
                f" {', '.join(VARIANTS)}."
            )
        if self.mlp_kernel_size is not None and self.pooling == "token":
            raise ValueError(
                f"mlp_kernel_size={self.mlp_kernel_size} convolves an image of tokens, among which the class"
                " token has no place: set pooling='mean', or mlp_kernel_size=None."
            )
        if self.head == "adder" and self.num_classes < 3:
            raise ValueError(
                f"num_classes={self.num_classes} with head='adder', whose LayerNorm leaves of two logits"
                " which is the larger, and of one nothing: choose 3 or more, or head='multiply'."
            )
        halvings = self.patch_size.bit_length() - 1
        if self.stem == "conv" and (halvings < 1 or 2**halvings != self.patch_size):
            raise ValueError(
                f"patch_size={self.patch_size} with stem='conv', which halves the image until a patch is one"
                " position: choose 2, 4, 8, ..., or stem='patch'."
            )
        if self.stem == "conv" and self.embed_dim % self.patch_size:
            raise ValueError(
                f"embed_dim={self.embed_dim} with stem='conv', whose first width is embed_dim / patch_size:"
                f" choose a multiple of {self.patch_size}, or stem='patch'."
            )

    @classmethod
    def from_variant(cls, variant: str, arithmetic: str = "adder", **fields) -> "VisionTransformerConfig":
        """A named size in a named arithmetic.

        Args:
          variant: one of "Ti/16", "S/16", "B/16", "Ti/4", "S/4", "compact/4", "digits".
          arithmetic: "adder"; "multiply", its twin, in which linear layers, output projection and
            similarity multiply and all else is the same; "vit", the standard pre-norm DeiT with biases and
            no identity; "custom", for which every preset field must be given.
          **fields: any field; a field that is given replaces the variant's or the preset's.

        Raises:
          ValueError: unknown variant, arithmetic, field or value.
        """
        require_choice("variant", variant, tuple(VARIANTS))
        require_choice("arithmetic", arithmetic, (*PRESETS, "custom"))
        require_known(cls, fields)
        if arithmetic == "custom" and (missing := [f for f in PRESET_FIELDS if f not in fields]):
            raise ValueError(
                "arithmetic='custom' takes no preset, so every one of its fields must be set; missing:"
                f" {', '.join(missing)}. Set them, or change single fields of a preset instead:"
                f" {', '.join(PRESETS)}."
            )
        return cls(**(VARIANTS[variant] | PRESETS.get(arithmetic, {}) | fields))

    @property
    def num_tokens(self) -> int:
        """Number of tokens, the class token included where there is one."""
        return (self.image_size // self.patch_size) ** 2 + (self.pooling == "token")


class VisionTransformer(nn.Module):
    """ViT classifier, images [B, image_size, image_size, channels] -> float32 logits [B, num_classes].

    Token order, class token, learned position embedding and final LayerNorm are those of ViT and DeiT.
    `config.stem` and `config.pooling` put other things in place of the patches and of the class token.
    Attention maps and the output of every block are sown as intermediates when that collection is mutable.
    """

    config: VisionTransformerConfig

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool = False, p: Exponent = 1.0) -> jax.Array:
        """Computes the logits.

        Args:
          images_BxHxWxC: normalized images in a floating dtype.
          train: whether stochastic depth is active; it draws from the rng stream "drop_path".
          p: exponent of the distance in every adder linear layer, a Python number or a scalar array, traced
            perhaps, from 1 to 2 (see `AdderDense`). An L1 similarity stays L1. With a Python number the
            whole program is that number's, for 1.0 the one with the kernels of the L1 distance.

        Raises:
          ValueError: the images do not have the configured size.
        """
        config = self.config
        require_images(config, images_BxHxWxC)
        x = self._embedded(images_BxHxWxC.astype(config.compute_dtype), p)
        D = x.shape[2]
        if config.pooling == "token":
            token = self.param("class_token", nn.initializers.zeros_init(), (1, 1, D), jnp.float32)
            # Added to zeros rather than broadcast: so it lies on the devices as the images do.
            x = jnp.concatenate([token.astype(x.dtype) + jnp.zeros_like(x[:, :1]), x], axis=1)
        shape = (1, x.shape[1], D)
        position = self.param("position_embedding", nn.initializers.normal(0.02), shape, jnp.float32)
        x = x + jnp.broadcast_to(position.astype(x.dtype), x.shape)

        # Where remat does not take p as static it traces it, and a traced p has no kernels.
        static = (2, 3) if isinstance(p, numbers.Real) else (2,)
        block_class = nn.remat(EncoderBlock, static_argnums=static) if config.remat else EncoderBlock
        for index in range(config.depth):
            # Linear in depth, as in DeiT: the first block is never dropped, the last one at the full rate.
            rate = config.drop_path_rate * index / max(config.depth - 1, 1)
            block_config = dataclasses.replace(config, drop_path_rate=rate)
            x = block_class(block_config, name=f"block_{index}")(x, train, p)
            self.sow("intermediates", "block_outputs", x)

        # The normalization is token by token: all others are left out before it.
        x = x[:, 0] if config.pooling == "token" else x
        x = layer_norm(config.layer_norm_epsilon, config.compute_dtype, jnp.float32, "norm")(x)
        if config.pooling == "mean":
            x = jnp.mean(x, axis=1, dtype=jnp.float32).astype(x.dtype)
        logits = dense(
            config,
            config.head,
            config.num_classes,
            "head",
            normalization="layer" if config.head == "adder" else "none",
            power_activation=False,
            use_bias=True,
        )(x, p)
        return logits.astype(jnp.float32)

    def _embedded(self, images_BxHxWxC: jax.Array, p: Exponent) -> jax.Array:
        """What stands for the patches, in reading order: [B, patches, embed_dim]."""
        config = self.config
        x, P = images_BxHxWxC, config.patch_size
        if config.stem == "conv":
            for index in range(P.bit_length() - 1):
                width = config.embed_dim * 2**index // P
                layer = convolution(config, config.patch_embedding, width, 3, f"stem_{index}", stride=2)
                x = nn.gelu(layer(x, p))
            P = 1
        B, H, W, C = x.shape
        # One axis at a time: on a mesh with Explicit axes a reshape can cut or join no more.
        x = x.reshape(B, H // P, P, W, C).reshape(B, H // P, P, W // P, P, C).transpose(0, 1, 3, 2, 4, 5)
        x_BxNxP = x.reshape(B, (H // P) * (W // P), P, P, C).reshape(B, (H // P) * (W // P), P * P * C)
        # This layer and the last carry a normalization only where they add: sums of differences need one.
        return dense(
            config,
            config.patch_embedding,
            config.embed_dim,
            "patch_embedding",
            normalization="layer" if config.patch_embedding == "adder" else "none",
            use_bias=True,
        )(x_BxNxP, p)
