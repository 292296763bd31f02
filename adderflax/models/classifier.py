"""What every classifier of square images has in common: a `config` with image_size and channels."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def image_shape(config: Any) -> tuple[int, int, int]:
    """(height, width, channels) of the images that a model of this description takes."""
    return config.image_size, config.image_size, config.channels


def require_images(config: Any, images_BxHxWxC: jax.Array) -> None:
    """Raises a ValueError unless these are images that a model of this description takes."""
    expected = image_shape(config)
    if images_BxHxWxC.ndim != 4 or images_BxHxWxC.shape[1:] != expected:
        raise ValueError(
            f"images have shape {images_BxHxWxC.shape}, but this model takes [batch, "
            f"{', '.join(map(str, expected))}]. Resize the images, or set image_size and channels."
        )


def blank_image(config: Any) -> jax.Array:
    """One image of zeros, float32 [1, height, width, channels], to initialize a model with."""
    return jnp.zeros((1, *image_shape(config)))


def abstract_variables(model: nn.Module) -> Any:
    """Shapes and dtypes of a model's variables; nothing is computed, and no device needed."""
    image = jax.ShapeDtypeStruct((1, *image_shape(model.config)), jnp.float32)
    return jax.eval_shape(lambda image: model.init(jax.random.key(0), image), image)
