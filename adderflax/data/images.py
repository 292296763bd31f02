"""One image at a time, on the host: decoding, resizing and cropping with Pillow."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from adderflax.data.config import DatasetInfo

if TYPE_CHECKING:
    from PIL import Image

# Bounds on the aspect ratio of a random-resized crop, width over height, and how many boxes are
# drawn before the centre is taken instead (Szegedy et al. 2015; Inception preprocessing).
_CROP_ASPECT = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10


def open_image(stored: bytes | np.ndarray) -> Image.Image:
    """Opens an image as a set stores it; encoded pixels are decoded when first needed.

    Args:
      stored: an encoded file (JPEG, PNG, ...), or decoded uint8 pixels [H, W, 1 or 3].

    Returns:
      A Pillow image.
    """
    from PIL import Image

    if isinstance(stored, bytes):
        return Image.open(io.BytesIO(stored))
    return Image.fromarray(stored[..., 0] if stored.shape[-1] == 1 else stored)


def upright(image: Image.Image) -> Image.Image:
    """The image as it is meant to be seen: turned as its EXIF says, and of 8 bits a channel.

    Raises:
      ValueError: if its mode does not say what its brightest value is.
    """
    from PIL import Image, ImageOps

    if image.mode in ("I", "F"):
        raise ValueError(
            f"An image of mode {image.mode!r} does not say what its brightest value is: "
            f"scale it to 0..255 and pass it as uint8."
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow would clip at 255 rather than scale.
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Converts to grey (1 channel) or RGB (3 channels)."""
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def to_array(image: Image.Image) -> np.ndarray:
    """Gives the pixels of a grey or RGB image as uint8 [H, W, C]."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


@dataclasses.dataclass(frozen=True)
class EvaluationView:
    """How evaluation looks at an image: the short side resized, the centre cropped.

    Attributes:
      size: side of the result in pixels.
      resize: length of the short side before the crop; None means `size`.
      channels: 1 or 3.
    """

    size: int
    resize: int | None
    channels: int

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Returns uint8 [size, size, channels]; an image of that very size is left as it is."""
        from PIL import Image

        image = to_mode(image, self.channels)
        short = self.resize or self.size
        width, height = image.size
        scale = short / min(width, height)
        target = (max(short, round(width * scale)), max(short, round(height * scale)))
        if target != (width, height):
            image = image.resize(target, Image.Resampling.BICUBIC)
        left = round((target[0] - self.size) / 2)
        top = round((target[1] - self.size) / 2)
        if target != (self.size, self.size):
            image = image.crop((left, top, left + self.size, top + self.size))
        return to_array(image)


def random_crop_box(
    width: int, height: int, area: tuple[float, float], random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws the box of a random-resized crop.

    Args:
      width: of the image, in pixels.
      height: of the image, in pixels.
      area: smallest and largest area as fractions of the image's.
      random: the record's own generator.

    Returns:
      (left, top, right, bottom), inside the image. Where ten draws do not fit, the largest
      centred box of an allowed aspect ratio.
    """
    low, high = math.log(_CROP_ASPECT[0]), math.log(_CROP_ASPECT[1])
    for _ in range(_CROP_ATTEMPTS):
        pixels = width * height * random.uniform(*area)
        aspect = math.exp(random.uniform(low, high))
        box_width = round(math.sqrt(pixels * aspect))
        box_height = round(math.sqrt(pixels / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(random.integers(0, width - box_width + 1))
            top = int(random.integers(0, height - box_height + 1))
            return left, top, left + box_width, top + box_height
    aspect = min(max(width / height, _CROP_ASPECT[0]), _CROP_ASPECT[1])
    box_width = min(width, max(1, round(height * aspect)))
    box_height = min(height, max(1, round(width / aspect)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def random_resized_crop(
    image: Image.Image,
    size: int,
    channels: int,
    area: tuple[float, float],
    random: np.random.Generator,
) -> Image.Image:
    """Crops a random box and resizes it to a square, in one bicubic pass.

    A JPEG that has not been decoded yet is decoded at a half, a quarter or an eighth of its
    size where the box still has `size` pixels each way then: the decoder skips the frequencies
    that the resizing would average away.

    Args:
      image: as opened.
      size: side of the result in pixels.
      channels: 1 or 3.
      area: smallest and largest area of the box as fractions of the image's.
      random: the record's own generator.

    Returns:
      A grey or RGB image of `size` x `size`.
    """
    from PIL import Image

    width, height = image.size
    box = random_crop_box(width, height, area, random)
    needed = (
        math.ceil(width * size / (box[2] - box[0])),
        math.ceil(height * size / (box[3] - box[1])),
    )
    drafted = image.draft("L" if channels == 1 else "RGB", needed)
    if drafted is not None:
        # The decoded size is rounded up to whole pixels; the scale is exactly 1, 1/2, 1/4, 1/8.
        scale = drafted[1][2] / width
        box = tuple(edge * scale for edge in box)
    image = to_mode(image, channels)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def preprocess_image(image: Any, info: DatasetInfo) -> np.ndarray:
    """Brings any picture to what a model of this set is evaluated on.

    Args:
      image: a Pillow image, or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
      info: the set the model was trained on.

    Returns:
      uint8 [image_size, image_size, channels]: turned upright as the file's EXIF data says,
      converted to grey or RGB, resized and cropped at the centre as in evaluation.

    Raises:
      ValueError: if the array or the image's mode is none of those.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        image = upright(image)
    else:
        array = np.asarray(image)
        if array.ndim == 3 and array.shape[-1] == 1:
            array = array[..., 0]
        shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
        if array.dtype != np.uint8 or not shaped or 0 in array.shape:
            raise ValueError(
                f"An image must be a Pillow image or a uint8 array of shape [height, width], "
                f"[height, width, 1], [height, width, 3] or [height, width, 4], not "
                f"{array.dtype} of shape {list(array.shape)}."
            )
        image = Image.fromarray(array)
    return EvaluationView(info.image_size, info.eval_resize, info.channels)(image)
