"""Augmentation on the accelerator: pure functions of a key and a batch, made to run under jit.

Every image is drawn for by itself and only neighbors are mixed, so with the batch sharded over
a mesh axis the work stays where the images are; what crosses devices is one image at each
shard's edge, for Mixup and CutMix.
"""

import math

import jax
import jax.numpy as jnp
import optax

from adderflax.data.config import AugmentConfig, DatasetInfo

# Random erasing as DeiT configures it: bounds on the erased area as a fraction of the image, and
# on its aspect ratio, height over width.
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_ASPECT = (0.3, 1 / 0.3)
_ERASE_ATTEMPTS = 10


def normalize_batch(images_BxHxWxC: jax.Array, info: DatasetInfo) -> jax.Array:
    """Brings images to mean 0 and deviation 1 per channel, by the set's figures.

    Args:
      images_BxHxWxC: uint8 in 0..255.
      info: carries `mean` and `std` in units of 0..1.

    Returns:
      float32 [B, H, W, C], (images / 255 - mean) / std.

    Raises:
      ValueError: if the images are not uint8 [B, H, W, C] with the set's channels.
    """
    _check_images(images_BxHxWxC, info)
    mean = jnp.asarray(info.mean, jnp.float32).reshape(1, 1, 1, -1)
    std = jnp.asarray(info.std, jnp.float32).reshape(1, 1, 1, -1)
    return (images_BxHxWxC.astype(jnp.float32) / 255.0 - mean) / std


def augment_batch(
    key: jax.Array,
    images_BxHxWxC: jax.Array,
    labels_B: jax.Array,
    *,
    config: AugmentConfig,
    info: DatasetInfo,
) -> tuple[jax.Array, jax.Array]:
    """Applies the device's part of the training augmentation, and normalizes.

    In this order, each as `config` says: padded random crop, flip, normalization, random
    erasing, Mixup or CutMix with label smoothing. With all of them off the result is
    `normalize_batch` and the one-hot labels, exactly.

    Args:
      key: one PRNG key for the batch, a different one for each step.
      images_BxHxWxC: uint8 in 0..255.
      labels_B: whole numbers in 0..num_classes-1.
      config: which augmentations; static under jit.
      info: the set's classes, mean and deviation; static under jit.

    Returns:
      float32 images [B, H, W, C] and float32 targets [B, num_classes] that sum to one.

    Raises:
      ValueError: if the images are not uint8 [B, H, W, C] with the set's channels.
    """
    _check_images(images_BxHxWxC, info)
    crop_key, flip_key, erase_key, mix_key = jax.random.split(key, 4)
    if config.crop_padding:
        images_BxHxWxC = _padded_crop(crop_key, images_BxHxWxC, config.crop_padding)
    if config.flip:
        images_BxHxWxC = _flip(flip_key, images_BxHxWxC)
    x_BxHxWxC = normalize_batch(images_BxHxWxC, info)
    if config.erasing_probability > 0.0:
        x_BxHxWxC = _erase(erase_key, x_BxHxWxC, config.erasing_probability)
    targets_BxN = jax.nn.one_hot(labels_B, info.num_classes, dtype=jnp.float32)
    if config.label_smoothing > 0.0:
        targets_BxN = optax.smooth_labels(targets_BxN, config.label_smoothing)
    return _mix(mix_key, x_BxHxWxC, targets_BxN, config)


def _check_images(images: jax.Array, info: DatasetInfo) -> None:
    if images.ndim != 4 or images.dtype != jnp.uint8 or images.shape[-1] != info.channels:
        raise ValueError(
            f"A batch of {info.name} images must be uint8 of shape [batch, height, width, "
            f"{info.channels}], as the iterators of adderflax.data give it; this one is "
            f"{images.dtype} of shape {list(images.shape)}."
        )


def _padded_crop(key: jax.Array, images_BxHxWxC: jax.Array, padding: int) -> jax.Array:
    """Shifts each image by up to `padding` pixels each way; zeros move in at the edges."""
    batch, height, width, channels = images_BxHxWxC.shape
    corner_Bx2 = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)
    edges = (padding, padding)
    padded = jnp.pad(images_BxHxWxC, ((0, 0), edges, edges, (0, 0)))

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(crop)(padded, corner_Bx2)


def _flip(key: jax.Array, images_BxHxWxC: jax.Array) -> jax.Array:
    mirrored_B = jax.random.bernoulli(key, 0.5, images_BxHxWxC.shape[:1])
    return jnp.where(mirrored_B[:, None, None, None], images_BxHxWxC[:, :, ::-1, :], images_BxHxWxC)


def _inside(
    top: jax.Array, left: jax.Array, bottom: jax.Array, right: jax.Array, height: int, width: int
) -> jax.Array:
    """Marks the pixels of one rectangle for each image: bounds [B] -> bool [B, H, W, 1]."""
    rows = jnp.arange(height)[None, :]
    columns = jnp.arange(width)[None, :]
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    return in_rows[:, :, None, None] & in_columns[:, None, :, None]


def _erase(key: jax.Array, x_BxHxWxC: jax.Array, probability: float) -> jax.Array:
    """Random erasing with normal noise in each pixel (Zhong et al. 2017; DeiT's settings).

    Rectangles that do not fit the image are drawn again, up to ten times, as the published
    procedure does; here all attempts are drawn at once and the first that fits is taken.
    """
    batch, height, width, _ = x_BxHxWxC.shape
    draw_key, noise_key = jax.random.split(key)
    # One draw for all that is uniform: each call of jax.random costs compile time of its own.
    uniform = jax.random.uniform(draw_key, (batch, 3 + 2 * _ERASE_ATTEMPTS))
    apply_B, place_Bx2, rest = uniform[:, 0], uniform[:, 1:3], uniform[:, 3:]
    area, aspect = jnp.split(rest, 2, axis=1)
    low, high = _ERASE_AREA
    area = (low + (high - low) * area) * (height * width)
    low, high = (math.log(bound) for bound in _ERASE_ASPECT)
    aspect = jnp.exp(low + (high - low) * aspect)
    heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jax.nn.one_hot(jnp.argmax(fits, axis=1), _ERASE_ATTEMPTS, dtype=jnp.int32)
    erase_height = jnp.sum(heights * first, axis=1)
    erase_width = jnp.sum(widths * first, axis=1)
    chosen = (apply_B < probability) & jnp.any(fits, axis=1)

    top = jnp.floor(place_Bx2[:, 0] * (height - erase_height + 1).astype(jnp.float32))
    left = jnp.floor(place_Bx2[:, 1] * (width - erase_width + 1).astype(jnp.float32))
    top, left = top.astype(jnp.int32), left.astype(jnp.int32)
    erased = _inside(top, left, top + erase_height, left + erase_width, height, width)
    noise = jax.random.normal(noise_key, x_BxHxWxC.shape, jnp.float32)
    return jnp.where(erased & chosen[:, None, None, None], noise, x_BxHxWxC)


def _mix(
    key: jax.Array, x_BxHxWxC: jax.Array, targets_BxN: jax.Array, config: AugmentConfig
) -> tuple[jax.Array, jax.Array]:
    """Mixup (Zhang et al. 2017), CutMix (Yun et al. 2019), or one of them for each batch.

    One lambda serves the batch, as in DeiT. Each image's partner is its neighbor: batches are
    shuffled, so this is as random as a permutation, and a sharded batch moves one image for
    each device rather than all of them.
    """
    if config.mixup_alpha == 0.0 and config.cutmix_alpha == 0.0:
        return x_BxHxWxC, targets_BxN
    _, height, width, _ = x_BxHxWxC.shape
    which_key, mixup_key, cutmix_key, place_key = jax.random.split(key, 4)
    partner_BxHxWxC = jnp.roll(x_BxHxWxC, 1, axis=0)
    mixed = []
    if config.mixup_alpha > 0.0:
        lam = _symmetric_beta(mixup_key, config.mixup_alpha)
        mixed.append((lam * x_BxHxWxC + (1.0 - lam) * partner_BxHxWxC, lam))
    if config.cutmix_alpha > 0.0:
        lam = _symmetric_beta(cutmix_key, config.cutmix_alpha)
        pasted, lam = _cutmix_box(place_key, lam, height, width)
        mixed.append((jnp.where(pasted, partner_BxHxWxC, x_BxHxWxC), lam))
    if len(mixed) == 2:
        use_cutmix = jax.random.bernoulli(which_key, 0.5)
        x_BxHxWxC = jnp.where(use_cutmix, mixed[1][0], mixed[0][0])
        lam = jnp.where(use_cutmix, mixed[1][1], mixed[0][1])
    else:
        x_BxHxWxC, lam = mixed[0]
    return x_BxHxWxC, lam * targets_BxN + (1.0 - lam) * jnp.roll(targets_BxN, 1, axis=0)


def _symmetric_beta(key: jax.Array, alpha: float) -> jax.Array:
    # Beta(1, 1), the usual setting of CutMix, is uniform; the general sampler compiles for long.
    return jax.random.uniform(key) if alpha == 1.0 else jax.random.beta(key, alpha, alpha)


def _cutmix_box(key: jax.Array, lam: jax.Array, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Draws CutMix's rectangle: bool [1, H, W, 1], and lambda as its area really is.

    The center is uniform over the image and the rectangle is cut off at the image's edge, so
    the pasted area can be smaller than 1 - lambda; the targets follow the area.
    """
    side = jnp.sqrt(1.0 - lam)
    center_2 = jax.random.uniform(key, (2,))
    bounds = []
    for axis, length in enumerate((height, width)):
        center = jnp.floor(center_2[axis] * length).astype(jnp.int32)
        half = jnp.floor(side * length).astype(jnp.int32) // 2
        bounds.append((jnp.maximum(center - half, 0), jnp.minimum(center + half, length)))
    (top, bottom), (left, right) = bounds
    box = _inside(*(edge[None] for edge in (top, left, bottom, right)), height, width)
    area = ((bottom - top) * (right - left)).astype(jnp.float32)
    return box, 1.0 - area / (height * width)
