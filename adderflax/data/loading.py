"""`load_dataset`: finds a set by name and cuts it into its parts."""

import numpy as np

from adderflax.data import digits
from adderflax.data.config import DataConfig, DatasetInfo
from adderflax.data.images import EvaluationView
from adderflax.data.sources import ArraySplit, Dataset, DecodedSplit, ImageSource, RawDataset

# The validation part is the same for every run of a set, whatever the run's seed.
_VALIDATION_SEED = 20211
_CACHE_LIMIT_BYTES = 1 << 30
# Sets whose images have no one square size are shown at this side, resized as DeiT does.
_DEFAULT_SIZE = 224


def load_dataset(config: DataConfig) -> Dataset:
    """Opens a set, preparing it first where that is needed and possible.

    Args:
      config: which set, and how it is parted.

    Returns:
      The set. Images of a set held in memory are decoded when a part is first used.

    Raises:
      DatasetNotReadyError: if the set is not prepared here and could not be prepared now.
      ValueError: if the name is unknown, the set has no labels, or a size does not fit.
    """
    if config.name == "digits":
        raw = _digits()
    else:
        from adderflax.data.tfds_sets import open_tfds

        raw = open_tfds(config)
    return _part(config, raw)


def _digits() -> RawDataset:
    images, labels = digits.load_digits()
    split = ArraySplit(images, labels)
    test = digits.test_indices(labels)
    return RawDataset(
        class_names=tuple(str(label) for label in range(digits.NUM_CLASSES)),
        channels=1,
        native_size=digits.SIZE,
        mean=digits.MEAN,
        std=digits.STD,
        train=split,
        test=split,
        train_positions=np.setdiff1d(np.arange(len(labels)), test),
        test_positions=test,
    )


def _part(config: DataConfig, raw: RawDataset) -> Dataset:
    size = config.image_size or raw.native_size or _DEFAULT_SIZE
    resize = config.eval_resize
    if resize is None and raw.native_size is None:
        resize = round(size * 256 / 224)
    if resize is not None and resize < size:
        raise ValueError(
            f"data.eval_resize={resize} is smaller than the image size {size} of {config.name}: "
            f"the short side is resized to eval_resize before {size} pixels are cropped from "
            f"its centre. Choose at least {size}, or None for the default."
        )
    view = EvaluationView(size, resize, raw.channels)
    in_memory = _held_in_memory(config, raw, size)
    sequential = raw.sequential and not in_memory
    train_positions, validation_positions = _split_off(config, raw.train_positions, sequential)
    decoded_train = decoded_test = None
    if in_memory:
        untouched = raw.native_size == size and resize in (None, size)
        decoded_train = DecodedSplit(raw.train, view, untouched)
        shared = raw.test is raw.train
        decoded_test = decoded_train if shared else DecodedSplit(raw.test, view, untouched)
    validation = None
    if len(validation_positions):
        validation = ImageSource(raw.train, validation_positions, view, decoded_train, sequential)
    info = DatasetInfo(
        name=config.name,
        num_classes=len(raw.class_names),
        class_names=raw.class_names,
        image_size=size,
        channels=raw.channels,
        mean=_per_channel(config, "mean", raw),
        std=_per_channel(config, "std", raw),
        eval_resize=resize,
        train_examples=len(train_positions),
        validation_examples=len(validation_positions),
        test_examples=len(raw.test_positions),
    )
    return Dataset(
        info=info,
        train=ImageSource(raw.train, train_positions, view, decoded_train, sequential),
        validation=validation,
        test=ImageSource(raw.test, raw.test_positions, view, decoded_test, sequential),
    )


def _per_channel(config: DataConfig, name: str, raw: RawDataset) -> tuple[float, ...]:
    given = getattr(config, name)
    if given is not None and len(given) != raw.channels:
        raise ValueError(
            f"data.{name}={given!r} has {len(given)} numbers, and the images of {config.name} have "
            f"{raw.channels} channels: give as many."
        )
    return getattr(raw, name) if given is None else given


def _split_off(config: DataConfig, positions: np.ndarray, sequential: bool) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the training split into training and validation positions."""
    # RandomState, not Generator: NumPy keeps its streams the same for all versions to come.
    order = np.random.RandomState(_VALIDATION_SEED).permutation(len(positions))
    if sequential:
        # Neighbors stay together; tensorflow-datasets has stored them in a random order.
        order = np.arange(len(positions))
    held_out = 0
    if config.validation_fraction > 0.0:
        held_out = max(1, round(config.validation_fraction * len(positions)))
    train = positions[order[held_out:]]
    if not len(train):
        raise ValueError(
            f"data.validation_fraction={config.validation_fraction} of the {len(positions)} "
            f"training images of {config.name} leaves none to train on: choose a smaller one."
        )
    if config.train_examples is not None:
        if config.train_examples > len(train):
            raise ValueError(
                f"data.train_examples={config.train_examples} asks for more images than the "
                f"{len(train)} in the training part of {config.name} (after "
                f"{held_out} for validation): choose at most {len(train)}, or None for all."
            )
        train = train[: config.train_examples]
    return train, positions[order[:held_out]]


def _held_in_memory(config: DataConfig, raw: RawDataset, size: int) -> bool:
    if raw.native_size is None:
        if config.cache:
            raise ValueError(
                f"data.cache=True holds decoded images of one size in memory, and those of "
                f"{config.name} have no one size: leave data.cache at None."
            )
        return False
    if config.cache is not None:
        return config.cache
    return len(raw.train) * size * size * raw.channels < _CACHE_LIMIT_BYTES
