"""The Vision Transformer in adder, multiplying or mixed arithmetic."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp
from flax import linen as nn

from adderflax.encoder import EncoderBlock, EncoderConfig, dense
from adderflax.layers import ARITHMETICS, Exponent, layer_norm, require_choice

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
      patch_embedding: arithmetic of the patch embedding. "multiply" is a dense layer with bias, the
        laboratory's rule for first layers; "adder" is an `AdderDense`.
      head: arithmetic of the classifier. "multiply" is a dense layer with bias; "adder" an `AdderDense`
        whose LayerNorm spans the logits.
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000
    depth: int = 12
    patch_embedding: str = "multiply"
    head: str = "multiply"

    def __post_init__(self):
        super().__post_init__()
        for name in ("patch_embedding", "head"):
            require_choice(name, getattr(self, name), ARITHMETICS)
        for name in ("channels", "num_classes", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}: the image"
                " is cut into whole square patches. Choose another image size, or another variant:"
                f" {', '.join(VARIANTS)}."
            )

    @classmethod
    def from_variant(cls, variant: str, arithmetic: str = "adder", **fields) -> "VisionTransformerConfig":
        """A named size in a named arithmetic.

        Args:
          variant: one of "Ti/16", "S/16", "B/16", "Ti/4", "S/4", "digits".
          arithmetic: "adder"; "multiply", its twin, in which linear layers, output projection and
            similarity multiply and all else is the same; "vit", the standard pre-norm DeiT with biases and
            no identity; "custom", for which every preset field must be given.
          **fields: any field; a field that is given replaces the variant's or the preset's.

        Raises:
          ValueError: unknown variant, arithmetic, field or value.
        """
        require_choice("variant", variant, tuple(VARIANTS))
        require_choice("arithmetic", arithmetic, (*PRESETS, "custom"))
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(
                f"Unknown model field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}."
            )
        if arithmetic == "custom" and (missing := [f for f in PRESET_FIELDS if f not in fields]):
            raise ValueError(
                "arithmetic='custom' takes no preset, so every one of its fields must be set; missing:"
                f" {', '.join(missing)}. Set them, or change single fields of a preset instead:"
                f" {', '.join(PRESETS)}."
            )
        return cls(**(VARIANTS[variant] | PRESETS.get(arithmetic, {}) | fields))

    @property
    def num_tokens(self) -> int:
        """Number of tokens, the class token included."""
        return (self.image_size // self.patch_size) ** 2 + 1


class VisionTransformer(nn.Module):
    """ViT classifier, images [B, image_size, image_size, channels] -> float32 logits [B, num_classes].

    Token order, class token, learned position embedding and final LayerNorm are those of ViT and DeiT.
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
        expected = (config.image_size, config.image_size, config.channels)
        if images_BxHxWxC.ndim != 4 or images_BxHxWxC.shape[1:] != expected:
            raise ValueError(
                f"images have shape {images_BxHxWxC.shape}, but this model takes [batch, "
                f"{', '.join(map(str, expected))}]. Resize the images, or set image_size and channels."
            )
        B, D, P = images_BxHxWxC.shape[0], config.embed_dim, config.patch_size
        side = config.image_size // P
        patches_BxNxP = (
            images_BxHxWxC.astype(config.compute_dtype)
            .reshape(B, side, P, side, P, config.channels)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(B, side * side, P * P * config.channels)
        )
        # First and last layer carry a normalization only where they add: sums of differences need one.
        x = dense(
            config,
            config.patch_embedding,
            D,
            "patch_embedding",
            normalization="layer" if config.patch_embedding == "adder" else "none",
            use_bias=True,
        )(patches_BxNxP, p)

        token = self.param("class_token", nn.initializers.zeros_init(), (1, 1, D))
        position = self.param("position_embedding", nn.initializers.normal(0.02), (1, x.shape[1] + 1, D))
        x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (B, 1, D)), x], axis=1)
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

        x = layer_norm(config.layer_norm_epsilon, config.compute_dtype, jnp.float32, "norm")(x[:, 0])
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
