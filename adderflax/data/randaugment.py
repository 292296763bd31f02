"""RandAugment with the settings that DeiT trains with, on Pillow images.

Cubuk et al. 2019, "RandAugment: Practical automated data augmentation with a reduced search
space", in the form that DeiT (Touvron et al. 2021) uses, written down in its training recipe as
`rand-m9-mstd0.5-inc1`: operations whose strength grows with the magnitude, each applied with
probability 1/2, and the magnitude drawn anew for each from a normal distribution.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from adderflax.data.config import AugmentConfig, DatasetInfo

if TYPE_CHECKING:
    from PIL import Image

MAX_MAGNITUDE = 10.0
_APPLY_PROBABILITY = 0.5
# What each operation does at the largest magnitude.
_MAX_DEGREES = 30.0
_MAX_SHEAR = 0.3
_MAX_SHIFT = 0.45  # of the image's side
_MAX_ADDED = 110
_MAX_ENHANCEMENT = 0.9


@dataclasses.dataclass(frozen=True)
class _Call:
    """One operation about to be applied.

    Attributes:
      strength: 0..1.
      sign: +1 or -1, for operations that go either way.
      fill: what is seen beyond the image's edge: a brightness, or a color.
    """

    strength: float
    sign: int
    fill: int | tuple[int, ...]


def _auto_contrast(image: Image.Image, call: _Call) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, call: _Call) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.equalize(image)


def _invert(image: Image.Image, call: _Call) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.invert(image)


def _rotate(image: Image.Image, call: _Call) -> Image.Image:
    from PIL import Image

    degrees = call.sign * call.strength * _MAX_DEGREES
    return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=call.fill)


def _affine(image: Image.Image, call: _Call, matrix: tuple[float, ...]) -> Image.Image:
    from PIL import Image

    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BICUBIC,
        fillcolor=call.fill,
    )


def _shear_x(image: Image.Image, call: _Call) -> Image.Image:
    return _affine(image, call, (1, call.sign * call.strength * _MAX_SHEAR, 0, 0, 1, 0))


def _shear_y(image: Image.Image, call: _Call) -> Image.Image:
    return _affine(image, call, (1, 0, 0, call.sign * call.strength * _MAX_SHEAR, 1, 0))


def _translate_x(image: Image.Image, call: _Call) -> Image.Image:
    shift = call.sign * call.strength * _MAX_SHIFT * image.size[0]
    return _affine(image, call, (1, 0, shift, 0, 1, 0))


def _translate_y(image: Image.Image, call: _Call) -> Image.Image:
    shift = call.sign * call.strength * _MAX_SHIFT * image.size[1]
    return _affine(image, call, (1, 0, 0, 0, 1, shift))


def _posterize(image: Image.Image, call: _Call) -> Image.Image:
    from PIL import ImageOps

    # Of the 4 bits that are left at the smallest strength, 1 remains at the largest.
    bits = max(1, 4 - int(call.strength * 4))
    return ImageOps.posterize(image, bits)


def _solarize(image: Image.Image, call: _Call) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.solarize(image, 256 - int(call.strength * 256))


def _solarize_add(image: Image.Image, call: _Call) -> Image.Image:
    """Brightens the darker half of the scale."""
    added = int(call.strength * _MAX_ADDED)
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _enhance(image: Image.Image, call: _Call, kind: str) -> Image.Image:
    from PIL import ImageEnhance

    factor = max(0.1, 1.0 + call.sign * call.strength * _MAX_ENHANCEMENT)
    return getattr(ImageEnhance, kind)(image).enhance(factor)


def _color(image: Image.Image, call: _Call) -> Image.Image:
    return _enhance(image, call, "Color")


def _contrast(image: Image.Image, call: _Call) -> Image.Image:
    return _enhance(image, call, "Contrast")


def _brightness(image: Image.Image, call: _Call) -> Image.Image:
    return _enhance(image, call, "Brightness")


def _sharpness(image: Image.Image, call: _Call) -> Image.Image:
    return _enhance(image, call, "Sharpness")


OPERATIONS: dict[str, Callable[[Image.Image, _Call], Image.Image]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies `layers` operations, drawn with replacement, to a grey or RGB image.

    Attributes:
      layers: operations drawn for each image.
      magnitude: mean of their magnitudes, 0..10.
      std: standard deviation of their magnitudes, which are clipped to 0..10.
      fill: the set's mean color, seen where an operation moves the image's edge inwards.
    """

    layers: int
    magnitude: float
    std: float
    fill: int | tuple[int, ...]

    @classmethod
    def from_config(cls, augment: AugmentConfig, info: DatasetInfo) -> RandAugment:
        """Takes the settings from `augment` and the color from `info`."""
        color = tuple(round(255 * value) for value in info.mean)
        return cls(
            layers=augment.randaugment_layers,
            magnitude=augment.randaugment_magnitude,
            std=augment.randaugment_std,
            fill=color[0] if len(color) == 1 else color,
        )

    def __call__(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """Returns an image of the same size and mode."""
        operations = list(OPERATIONS.values())
        for choice in random.integers(0, len(operations), self.layers):
            if random.random() < _APPLY_PROBABILITY:
                image = operations[choice](image, self.draw(random))
        return image

    def draw(self, random: np.random.Generator) -> _Call:
        """Draws the strength and the sign of one operation."""
        magnitude = min(max(random.normal(self.magnitude, self.std), 0.0), MAX_MAGNITUDE)
        sign = 1 if random.random() < 0.5 else -1
        return _Call(magnitude / MAX_MAGNITUDE, sign, self.fill)
