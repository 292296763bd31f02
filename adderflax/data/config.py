"""Configuration and description of image sets: plain values, no file is touched here."""

import dataclasses
import math
import numbers
from typing import Any


class DatasetNotReadyError(RuntimeError):
    """The set is not prepared on this machine and could not be prepared now."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_whole(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: Any, low: float, high: float) -> bool:
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return numeric and low <= value <= high


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images are read, how large they are, and how they are parted.

    Attributes:
      name: "digits", or any tensorflow-datasets image classification set, with its
        configuration and version if wanted ("cifar10", "imagenette/160px-v2", "mnist:3.0.1").
      data_dir: where tensorflow-datasets keeps prepared sets; None means its own default,
        `$TFDS_DATA_DIR` or `~/tensorflow_datasets`. Not used by "digits".
      backend: "array_record" reads single images in any order, without TensorFlow. "tfrecord"
        reads TFRecord files front to back with TensorFlow; `data_dir` may then be a bucket
        (gs://...). A set that is not held in memory then has a weaker shuffle, a slower resume
        (the epoch is read again up to where it was), batches that also depend on the number of
        processes, and the first images of the training split as its validation part. `workers`
        is not used.
      image_size: side in pixels of the square images that the model sees. None means the
        set's own size, and 224 for sets whose images have no one square size.
      validation_fraction: the part of the training split held out for model selection, cut
        by a fixed permutation that does not depend on the run's seed. 0 means no such part.
      eval_resize: for evaluation the short side is resized to this before the centre is
        cropped. None means `round(image_size * 256 / 224)` for sets of varying image size,
        and no enlargement for sets of one size.
      workers: processes that decode and augment single images; 0 means threads of this process.
        A set held in memory is copied to each of them, and only goes through them where
        single images are augmented.
      cache: hold the decoded set in memory. None means yes where all images have one size
        and the decoded training split is below 1 GiB.
      train_examples: use only the first so many images of the training part, after the fixed
        permutation; None means all. For studies on a subset.
      mean: per channel, in units of 0..1, which is subtracted from pixels. None means the set's
        own of cifar10, cifar100, mnist and digits, ImageNet's of other color and 0.5 of other grey sets.
      std: per channel, by which pixels are divided then, likewise.
    """

    name: str = "digits"
    data_dir: str | None = None
    backend: str = "array_record"
    image_size: int | None = None
    validation_fraction: float = 0.1
    eval_resize: int | None = None
    workers: int = 0
    cache: bool | None = None
    train_examples: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("mean", 0.0), ("std", 1e-6)):
            if (value := getattr(self, name)) is not None:
                _require(
                    isinstance(value, (tuple, list))
                    and len(value) in (1, 3)
                    and all(_is_number(item, least, 1.0) for item in value),
                    f"data.{name} must be a number for each channel, 1 or 3 of them, from {least:g} to 1, or "
                    f"None for the set's, not {value!r}: pixels are taken as 0..1.",
                )
                object.__setattr__(self, name, tuple(value))
        _require(
            isinstance(self.name, str) and bool(self.name.strip()),
            f"data.name must name an image set, such as 'digits' or 'cifar10', not {self.name!r}.",
        )
        _require(
            self.backend in ("array_record", "tfrecord"),
            f"data.backend must be 'array_record' or 'tfrecord', not {self.backend!r}.",
        )
        _require(
            self.image_size is None or _is_whole(self.image_size, 1),
            f"data.image_size must be a positive number of pixels, or None for the set's own "
            f"size, not {self.image_size!r}.",
        )
        _require(
            _is_number(self.validation_fraction, 0.0, 1.0) and self.validation_fraction < 1.0,
            f"data.validation_fraction must be at least 0 and below 1, not "
            f"{self.validation_fraction!r}: it is the part of the training split that is held "
            f"out, and something must be left to train on.",
        )
        _require(
            self.eval_resize is None or _is_whole(self.eval_resize, 1),
            f"data.eval_resize must be a positive number of pixels, or None for the default, "
            f"not {self.eval_resize!r}.",
        )
        if self.eval_resize is not None and self.image_size is not None:
            _require(
                self.eval_resize >= self.image_size,
                f"data.eval_resize={self.eval_resize} is smaller than "
                f"data.image_size={self.image_size}: the short side is resized to eval_resize "
                f"before image_size pixels are cropped from its centre, so it cannot be smaller.",
            )
        _require(
            _is_whole(self.workers, 0),
            f"data.workers must be a number of processes, 0 or more, not {self.workers!r}.",
        )
        _require(
            self.cache is None or isinstance(self.cache, bool),
            f"data.cache must be True, False or None (decide by size), not {self.cache!r}.",
        )
        _require(
            self.train_examples is None or _is_whole(self.train_examples, 1),
            f"data.train_examples must be a positive number of images, or None for all, not "
            f"{self.train_examples!r}.",
        )


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation; every piece is off by default.

    Random-resized crop and RandAugment run on the host, one image at a time; all the rest
    runs on the device, in `augment_batch`.

    Attributes:
      crop_padding: pad by so many zero pixels on each side, then crop back at random.
      random_resized_crop: crop a random area at a random aspect ratio in 3/4..4/3 and resize
        it to the image size (Szegedy et al. 2015, as in DeiT).
      crop_scale: smallest and largest area of that crop, as fractions of the image.
      flip: mirror left to right with probability 1/2.
      randaugment_layers: RandAugment operations for each image (Cubuk et al. 2019); 0 is off.
      randaugment_magnitude: their strength, 0..10.
      randaugment_std: standard deviation of that strength over operations.
      mixup_alpha: lambda ~ Beta(alpha, alpha) mixes pairs of images (Zhang et al. 2017).
      cutmix_alpha: lambda ~ Beta(alpha, alpha) sets the area of a pasted rectangle (Yun et al.
        2019). With both alphas positive each batch draws one of the two, as DeiT does.
      erasing_probability: replace a random rectangle by normal noise (Zhong et al. 2017).
      label_smoothing: this much of each target is spread evenly over all classes.
    """

    crop_padding: int = 0
    random_resized_crop: bool = False
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = False
    randaugment_layers: int = 0
    randaugment_magnitude: int = 9
    randaugment_std: float = 0.5
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    erasing_probability: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        # A list (from JSON or a config file) would make the config unhashable, and jit needs
        # it hashable.
        object.__setattr__(self, "crop_scale", tuple(self.crop_scale))
        for name in ("crop_padding", "randaugment_layers"):
            value = getattr(self, name)
            _require(_is_whole(value, 0), f"augment.{name} must be a whole number, 0 or more, not {value!r}.")
        for name in ("random_resized_crop", "flip"):
            value = getattr(self, name)
            _require(isinstance(value, bool), f"augment.{name} must be True or False, not {value!r}.")
        _require(
            not (self.random_resized_crop and self.crop_padding),
            "augment.random_resized_crop and augment.crop_padding are two ways to crop, and a "
            "run uses one of them: set crop_padding=0 or random_resized_crop=False.",
        )
        _require(
            len(self.crop_scale) == 2
            and all(_is_number(value, 0.0, 1.0) for value in self.crop_scale)
            and 0.0 < self.crop_scale[0] <= self.crop_scale[1],
            f"augment.crop_scale must be two fractions of the image's area, (smallest, largest), "
            f"with 0 < smallest <= largest <= 1, not {self.crop_scale!r}.",
        )
        _require(
            _is_number(self.randaugment_magnitude, 0, 10),
            f"augment.randaugment_magnitude must lie in 0..10, not "
            f"{self.randaugment_magnitude!r}; DeiT uses 9.",
        )
        for name in ("randaugment_std", "mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            _require(
                _is_number(value, 0.0, math.inf) and math.isfinite(value),
                f"augment.{name} must be a finite number, 0 or more, not {value!r}.",
            )
        _require(
            _is_number(self.erasing_probability, 0.0, 1.0),
            f"augment.erasing_probability must lie in 0..1, not {self.erasing_probability!r}.",
        )
        _require(
            _is_number(self.label_smoothing, 0.0, 1.0) and self.label_smoothing < 1.0,
            f"augment.label_smoothing must be at least 0 and below 1, not {self.label_smoothing!r}.",
        )

    @property
    def per_image_on_host(self) -> bool:
        """Whether single images must be worked on before they are batched."""
        return self.random_resized_crop or self.randaugment_layers > 0


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a model and its user need to know about a set.

    `dataclasses.asdict` gives plain JSON, and `DatasetInfo(**json)` takes it back.

    Attributes:
      name: as asked for.
      num_classes: number of classes.
      class_names: one name for each class, in label order.
      image_size: side of the square images in pixels.
      channels: 1 or 3.
      mean: per channel, in units of 0..1.
      std: standard deviation per channel, in units of 0..1.
      eval_resize: length to which evaluation resizes the short side before it crops the
        centre; None where images only are brought to `image_size`.
      train_examples: images in the training part.
      validation_examples: images in the validation part, 0 where there is none.
      test_examples: images in the test part.

    Raises:
      ValueError: a value is none of these; the message names the field.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_resize: int | None
    train_examples: int
    validation_examples: int
    test_examples: int

    def __post_init__(self) -> None:
        lengths = {"class_names": "num_classes", "mean": "channels", "std": "channels"}
        resize = {} if self.eval_resize is None else {"eval_resize": 1}
        parts = dict.fromkeys(("train_examples", "validation_examples", "test_examples"), 0)
        for name, least in {"num_classes": 1, "image_size": 1, "channels": 1, **resize, **parts}.items():
            value = getattr(self, name)
            _require(_is_whole(value, least), f"{name}={value!r} must be a whole number of at least {least}.")
        for name, count in lengths.items():
            value, kind = getattr(self, name), str if name == "class_names" else numbers.Real
            listed = isinstance(value, (list, tuple)) and all(isinstance(entry, kind) for entry in value)
            _require(
                listed and len(value) == getattr(self, count),
                f"{name}={value!r} must have {count}={getattr(self, count)} entries.",
            )
            object.__setattr__(self, name, tuple(value))
