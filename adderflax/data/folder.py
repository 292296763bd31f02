"""A folder of images by class, stored as a set of tensorflow-datasets.

    FOLDER/CLASS/*.jpg                                 a fixed fifth becomes the test part when it is read
    FOLDER/train/CLASS/*.jpg, FOLDER/test/CLASS/*.jpg  or validation, or val, in place of test

What is stored is read by its name as every other set is, without TensorFlow; storing needs it
(`python -m adderflax.data.prepare NAME --folder=FOLDER`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adderflax.data.images import to_array, to_mode, upright

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# Split by the name of its directory.
_SPLITS = {"train": "train", "test": "test", "validation": "validation", "val": "validation"}
_VERSION = "1.0.0"
# Of files with these endings everything must be an image; other files are no part of the set.
_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# What is stored as it is; the rest becomes a PNG.
_KEPT_FORMATS = {"JPEG", "PNG"}


class FolderError(ValueError):
    """A folder that cannot be stored as a set, with what is wrong."""


@dataclasses.dataclass(frozen=True)
class FolderSet:
    """Images by class, each of them opened once.

    Attributes:
      root: the folder.
      class_names: in label order, which is that of their names.
      channels: 1 where all images are gray, else 3.
      shape: (height, width) where all have the same, else None.
      splits: files and labels by split.
      mean: per channel over all pixels of "train", in units of 0..1.
      std: standard deviation, likewise.
    """

    root: Path
    class_names: tuple[str, ...]
    channels: int
    shape: tuple[int, int] | None
    splits: Mapping[str, tuple[tuple[Path, int], ...]]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_folder(folder: str | Path) -> FolderSet:
    """Finds the images of a folder and opens each.

    Raises:
      FolderError: it is no such folder, a split lacks images or has a class that training does not
        have, or a file is no image; the message names it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FolderError(f"{root.absolute()} is no directory: give one with a directory for each class")
    if not (root / "train").is_dir():
        found = {"train": _by_class(root)}
    else:
        found = {split: _by_class(root / name) for name, split in _SPLITS.items() if (root / name).is_dir()}
    names = tuple(found["train"])
    for split, files in found.items():
        if unknown := sorted(set(files) - set(names)):
            raise FolderError(
                f"its {split} split has the classes {', '.join(unknown)}, of which {root / 'train'} has none"
            )
    label = {name: number for number, name in enumerate(names)}
    splits = {
        split: tuple((file, label[name]) for name, listed in files.items() for file in listed)
        for split, files in found.items()
    }
    shapes, grays = set(), set()
    total, squares, pixels = np.zeros(3), np.zeros(3), 0
    for split, listed in splits.items():
        for file, _ in listed:
            image = _opened(file)
            shapes.add(image.size[::-1])
            grays.add(image.mode in ("1", "L"))
            if split == "train":
                values = to_array(to_mode(image, 3)).reshape(-1, 3) / 255
                total, squares = total + values.sum(axis=0), squares + np.square(values).sum(axis=0)
                pixels += len(values)
    channels = 1 if grays == {True} else 3
    mean = total / pixels
    std = np.sqrt(np.maximum(squares / pixels - np.square(mean), 0.0))
    return FolderSet(
        root=root,
        class_names=names,
        channels=channels,
        shape=shapes.pop() if len(shapes) == 1 else None,
        splits=splits,
        mean=tuple(round(float(value), 4) for value in mean[:channels]),
        std=tuple(round(float(value), 4) for value in std[:channels]),
    )


def store(found: FolderSet, name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Stores the images as the set NAME, version 1.0.0.

    Raises:
      FolderError: the name is not one of a set, one of this name is there already, or it is one of
        tensorflow-datasets' own.
    """
    import tensorflow_datasets as tfds

    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise FolderError(f"the name {name!r} must be small letters, digits and _ and begin with a letter")
    if name == "digits" or name in tfds.list_builders(with_community_datasets=False):
        raise FolderError(f"{name!r} is a set that there is already: choose another name")
    image = tfds.features.Image(shape=(*(found.shape or (None, None)), found.channels))
    try:
        return tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version=_VERSION,
            features=tfds.features.FeaturesDict(
                {"image": image, "label": tfds.features.ClassLabel(names=list(found.class_names))}
            ),
            split_datasets={split: _examples(found, split) for split in found.splits},
            data_dir=data_dir,
            description="Images by class, stored by python -m adderflax.data.prepare --folder.",
            file_format="array_record",
        )
    except RuntimeError as error:
        if "already prepared" not in str(error):
            raise
        raise FolderError(f"a set {name!r} is there already: choose another name, or delete it") from error


def _examples(found: FolderSet, split: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Examples by keys, of which the order of what is stored follows."""
    for file, label in found.splits[split]:
        key = file.relative_to(found.root).as_posix()
        yield key, {"image": _encoded(file, found.channels), "label": label}


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """Image files below each class's directory, classes and files in the order of their names."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {
        path.name: sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in _ENDINGS
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        for path in classes
    }
    if not classes or (empty := [name for name, files in found.items() if not files]):
        what = f"has no images in {', '.join(empty)}" if classes else "holds no directories of classes"
        raise FolderError(
            f"{folder.absolute()} {what}: images lie in FOLDER/CLASS or FOLDER/train/CLASS, and end in"
            f" {', '.join(sorted(_ENDINGS))}"
        )
    return found


def _opened(file: Path):
    """The image as it is seen, of 8 bits a channel."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return upright(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FolderError(f"{file} cannot be read as an image: {error}") from error


def _encoded(file: Path, channels: int) -> str | np.ndarray:
    """The file where training reads from it what `_opened` sees, else the pixels."""
    from PIL import Image

    with Image.open(file) as image:
        turned = image.getexif().get(0x0112, 1) != 1  # EXIF's orientation
        plain = image.mode == ("L" if channels == 1 else "RGB")
        if image.format in _KEPT_FORMATS and plain and not turned:
            return str(file)
    return to_array(to_mode(_opened(file), channels))
