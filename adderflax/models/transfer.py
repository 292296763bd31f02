"""Parameters of a trained Vision Transformer for images of another size and for other classes."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adderflax.models.vit import VisionTransformerConfig


def transfer(
    params: Mapping[str, Any], config: VisionTransformerConfig, to: VisionTransformerConfig
) -> tuple[dict[str, Any], VisionTransformerConfig]:
    """The parameters and their description with the image size and the number of classes of another model.

    Position embeddings are resized; a classifier of another number of classes, which multiplies, starts at
    zero. What cannot be transferred so stays as it is: patches of another size, a classifier that adds.

    Args:
      params: of ``VisionTransformer(config)``.
      config: of the trained model.
      to: the model whose images and classes are wanted.

    Returns:
      The parameters, position_embedding [1, T, D] and head [D, num_classes] of the new sizes and all else as
      given, which stays unchanged; and the description of the model whose they are.
    """
    params, sizes = dict(params), {}
    if to.image_size != config.image_size and to.patch_size == config.patch_size:
        sizes["image_size"] = to.image_size
        resized = dataclasses.replace(config, image_size=to.image_size)
        params["position_embedding"] = resize_position_embedding(params["position_embedding"], resized)
    if to.num_classes != config.num_classes and config.head == "multiply":
        sizes["num_classes"] = to.num_classes
        params["head"] = jax.tree.map(
            lambda leaf: jnp.zeros((*leaf.shape[:-1], to.num_classes), leaf.dtype), dict(params["head"])
        )
    return params, dataclasses.replace(config, **sizes)


def resize_position_embedding(position_1xTxD: jax.Array, config: VisionTransformerConfig) -> jax.Array:
    """Position embeddings on the model's grid, bicubic and antialiased as timm's `resample_abs_pos_embed`.

    Args:
      position_1xTxD: those of another square grid, behind that of the class token where the model has one.
      config: the model.

    Returns:
      [1, num_tokens, D], the class token's unchanged.
    """
    if position_1xTxD.shape[1] == config.num_tokens:
        return position_1xTxD
    first, D = int(config.pooling == "token"), position_1xTxD.shape[2]
    old, new = math.isqrt(position_1xTxD.shape[1] - first), config.image_size // config.patch_size
    grid = position_1xTxD[:, first:].reshape(1, old, old, D)
    grid = jax.image.resize(grid, (1, new, new, D), "cubic").reshape(1, new * new, D)
    return jnp.concatenate([position_1xTxD[:, :first], grid], axis=1)
