"""A folder of images by class, stored as a set of tensorflow-datasets.

    FOLDER/CLASS/*.jpg                                 a fixed fifth becomes the test part when it is read
    FOLDER/train/CLASS/*.jpg, FOLDER/test/CLASS/*.jpg  or validation, valid or val in place of test

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
import tqdm

from adderflax.data.images import to_array, to_mode, upright

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# Split by the name of its directory, in small letters.
_SPLITS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
}
_VERSION = "1.0.0"
_LEAST_STD = 1e-3  # of images of one color
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
      channels: 1 where all images are gray without transparency, else 3.
      shape: (height, width) where all have the same, else None.
      splits: files and labels by split.
      mean: per channel over all pixels of "train", in units of 0..1.
      std: standard deviation, likewise, at least 0.001.
      left_out: number of files in the classes' directories that no image format ends in.
    """

    root: Path
    class_names: tuple[str, ...]
    channels: int
    shape: tuple[int, int] | None
    splits: Mapping[str, tuple[tuple[Path, int], ...]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    left_out: int


def read_folder(folder: str | Path) -> FolderSet:
    """Finds the images of a folder and opens each.

    Raises:
      FolderError: it is no such folder, has one class, directories beside those of splits, a class without
        images or one that training does not have, or a file is no image; the message names it.
    """
    root = Path(folder).expanduser()
    if not folder or not root.is_dir():
        told = folder or "an empty name"
        raise FolderError(f"{told} is no directory: give one with a directory for each class")
    split_of = {path: _SPLITS.get(path.name.lower()) for path in _directories(root)}
    if any(split_of.values()):
        found = _by_split(root, split_of)
    else:
        found = {"train": _by_class(root)}
    names = tuple(found["train"])
    if len(names) < 2:
        raise FolderError(
            f"{root.absolute()} has one class, {names[0]}, and a classifier needs two: images lie in"
            " FOLDER/CLASS or FOLDER/train/CLASS"
        )
    for split, files in found.items():
        if unknown := sorted(set(files) - set(names)):
            raise FolderError(
                f"its {split} split has the classes {', '.join(unknown)}, of which its train split has none"
            )
    label = {name: number for number, name in enumerate(names)}
    endings, left_out, splits = _endings(), 0, {}
    for split, classes in found.items():
        listed = [(file, label[name]) for name, files in classes.items() for file in files]
        splits[split] = tuple(pair for pair in listed if pair[0].suffix.lower() in endings)
        left_out += len(listed) - len(splits[split])
        filled = {names[number] for _, number in splits[split]}
        if empty := [name for name in classes if name not in filled]:
            told = ", ".join(empty)
            raise FolderError(f"its {split} split has no images in {told}, only other files or none")
    shapes, grays = set(), set()
    total, squares, pixels = np.zeros(3), np.zeros(3), 0
    for split, listed in splits.items():
        for file, _ in tqdm.tqdm(listed, desc=f"Reading {split} images", unit="image"):
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
        std=tuple(round(max(float(value), _LEAST_STD), 4) for value in std[:channels]),
        left_out=left_out,
    )


def require_new(name: str, place: str) -> None:
    """Raises FolderError unless NAME can be that of a new set in the directory of prepared sets."""
    import tensorflow_datasets as tfds

    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise FolderError(f"the name {name!r} must be small letters, digits and _ and begin with a letter")
    if name == "digits" or name in tfds.list_builders(with_community_datasets=False):
        raise FolderError(f"{name!r} is a set that there is already: choose another name")
    if (there := Path(place).expanduser() / name / _VERSION).exists():
        raise FolderError(f"a set {name!r} is there already: choose another name, or delete {there}")


def store(found: FolderSet, name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """Stores the images as the set NAME, version 1.0.0, in `data_dir` or tfds's own directory."""
    import tensorflow_datasets as tfds

    image = tfds.features.Image(shape=(*(found.shape or (None, None)), found.channels))
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


def _examples(found: FolderSet, split: str) -> Iterator[tuple[bytes, dict[str, object]]]:
    """Examples by keys, of which the order of what is stored follows."""
    for file, label in found.splits[split]:
        key = file.relative_to(found.root).as_posix().encode(errors="surrogateescape")
        yield key, {"image": _encoded(file, found.channels), "label": label}


def _directories(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _by_split(root: Path, split_of: Mapping[Path, str | None]) -> dict[str, dict[str, list[Path]]]:
    """Files by split and class."""
    held = f"{root.absolute()} holds {', '.join(path.name for path in split_of)}"
    allowed = f"{', '.join(_SPLITS)} are the names of splits"
    if other := [path.name for path, split in split_of.items() if split is None]:
        raise FolderError(f"{held}: {allowed}, {', '.join(other)} not, and all must be splits or none")
    splits = list(split_of.values())
    if len(set(splits)) < len(splits) or "train" not in splits:
        raise FolderError(f"{held}: {allowed}, of which train must be there, and each once")
    return {split: _by_class(path) for path, split in split_of.items()}


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """Files below each class's directory, but hidden ones, classes and files in the order of their names."""
    classes = _directories(folder)
    if not classes:
        raise FolderError(
            f"{folder.absolute()} holds no directories of classes: images lie in FOLDER/CLASS or"
            " FOLDER/train/CLASS"
        )
    found = {}
    for path in classes:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        hidden = [any(part.startswith(".") for part in file.relative_to(path).parts) for file in files]
        found[path.name] = [file for file, is_hidden in zip(files, hidden) if not is_hidden]
    return found


def _endings() -> set[str]:
    """Those of all formats that Pillow reads."""
    from PIL import Image

    return {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}


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
