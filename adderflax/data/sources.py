"""Random access to the parts of a set: training, validation, test."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np

from adderflax.data.config import DatasetInfo
from adderflax.data.images import EvaluationView, open_image


@contextlib.contextmanager
def naming_damage(image: str) -> Iterator[None]:
    """Turns an error of the image decoder into one that says which image is damaged.

    Args:
      image: names it.

    Raises:
      ValueError: where the decoder failed.
    """
    try:
        yield
    except (OSError, SyntaxError) as error:  # Pillow raises both for damaged files.
        raise ValueError(
            f"{image} cannot be decoded ({error}): the prepared set is damaged. Delete its "
            f"directory and prepare it again."
        ) from error


# Images read in one go when a split is decoded: reading one by one costs more than decoding.
_CHUNK = 256


class Split(Protocol):
    """A split as it is stored."""

    def __len__(self) -> int:
        """Number of images."""

    def stored(self, positions: Sequence[int]) -> list[tuple[bytes | np.ndarray, int]]:
        """For each position the encoded file or uint8 pixels [H, W, C], and the label."""


@dataclasses.dataclass(frozen=True)
class RawDataset:
    """What a set holds before it is parted.

    Attributes:
      class_names: in label order.
      channels: 1 or 3.
      native_size: side of the images in pixels, or None where there is no one square size.
      mean: per channel, in units of 0..1.
      std: per channel, in units of 0..1.
      train: the training split.
      test: the labelled evaluation split.
      train_positions: which images of `train` may be trained or validated on.
      test_positions: which images of `test` are the test part.
      sequential: whether splits can only be read front to back with reasonable speed.
    """

    class_names: tuple[str, ...]
    channels: int
    native_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    test: Split
    train_positions: np.ndarray
    test_positions: np.ndarray
    sequential: bool = False


class ArraySplit:
    """A split that is in memory already.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: int32 [N].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def stored(self, positions: Sequence[int]) -> list[tuple[np.ndarray, int]]:
        """For each position the pixels and the label."""
        return [(self.images[position], int(self.labels[position])) for position in positions]


class DecodedSplit:
    """Decodes a whole split on first use, once, and holds it in memory as evaluation sees it.

    Attributes:
      untouched: whether evaluation sees the images just as they are stored.
    """

    def __init__(self, split: Split, view: EvaluationView, untouched: bool):
        """Decodes nothing yet.

        Args:
          split: where the images are stored.
          view: how evaluation looks at an image.
          untouched: whether that leaves the images of this split as they are.
        """
        self._split = split
        self._view = view
        self.untouched = untouched
        self._lock = threading.Lock()
        self._arrays: tuple[np.ndarray, np.ndarray] | None = None

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns uint8 images [N, size, size, C] and int32 labels [N]."""
        with self._lock:
            if self._arrays is None:
                self._arrays = self._decode()
            return self._arrays

    def _decode(self) -> tuple[np.ndarray, np.ndarray]:
        size, channels = self._view.size, self._view.channels
        images = np.empty((len(self._split), size, size, channels), np.uint8)
        labels = np.empty((len(self._split),), np.int32)

        def decode(start: int) -> None:
            positions = range(start, min(start + _CHUNK, len(images)))
            for position, (stored, label) in zip(positions, self._split.stored(positions)):
                with naming_damage(f"Image {position} of the split"):
                    images[position] = self._view(open_image(stored))
                labels[position] = label

        with futures.ThreadPoolExecutor() as pool:
            for _ in pool.map(decode, range(0, len(images), _CHUNK)):
                pass
        return images, labels

    def __getstate__(self) -> dict[str, Any]:
        own = {"split": self._split, "view": self._view, "untouched": self.untouched}
        return own | {"arrays": self.arrays()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = state.pop("arrays")
        self.__init__(**state)
        self._arrays = arrays


class ImageSource:
    """One part of a set, with random access: `len(source)`, `source[i]`.

    `source[i]` is {"image": uint8 [image_size, image_size, C], "label": int}, the image as
    evaluation sees it.
    """

    def __init__(
        self,
        split: Split,
        positions: np.ndarray,
        view: EvaluationView,
        decoded: DecodedSplit | None = None,
        sequential: bool = False,
    ):
        """Makes a part of a split.

        Args:
          split: where the images are stored.
          positions: which images of the split belong to this part, in this order.
          view: how evaluation looks at an image.
          decoded: the split in memory, shared by the parts of one split; None to read and
            decode each image when it is asked for.
          sequential: whether the split is read front to back, and `positions` are neighbors.
        """
        self._split = split
        self._positions = positions
        self._decoded = decoded
        self.view = view
        self.sequential = sequential

    @property
    def in_memory(self) -> bool:
        """Whether `gather` serves whole batches at once."""
        return self._decoded is not None

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._decoded is not None:
            images, labels = self.gather(np.asarray([index]))
            return {"image": images[0], "label": int(labels[0])}
        stored, label = self.stored(index)
        with naming_damage(f"Image {self._positions[index]} of the split"):
            return {"image": self.view(open_image(stored)), "label": label}

    def span(self) -> tuple[Split, int, int]:
        """Returns the split of a sequential part, its first position, and the one behind its last."""
        return self._split, int(self._positions[0]), int(self._positions[-1]) + 1

    def stored(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """Returns one image before any resizing, encoded or as pixels, and its label."""
        position = int(self._positions[index])
        if self._decoded is not None and self._decoded.untouched:
            images, labels = self._decoded.arrays()
            return images[position], int(labels[position])
        return self._split.stored([position])[0]

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns images uint8 [B, H, W, C] and labels int32 [B] of a part held in memory."""
        images, labels = self._decoded.arrays()
        positions = self._positions[indices]
        return images[positions], labels[positions]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A set, parted for training.

    Attributes:
      info: its description.
      train: the training part.
      validation: the part for model selection, or None where `validation_fraction` is 0.
      test: the labelled evaluation split of the set.
    """

    info: DatasetInfo
    train: ImageSource
    validation: ImageSource | None
    test: ImageSource

    def part(self, name: str) -> ImageSource:
        """Returns "train", "validation" or "test".

        Raises:
          ValueError: if there is no such part.
        """
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        if name not in parts:
            raise ValueError(f"{name!r} is no part of a data set: choose 'train', 'validation' or 'test'.")
        if parts[name] is None:
            raise ValueError(
                f"{self.info.name} was loaded without a validation part, because "
                f"data.validation_fraction is 0: give it a positive fraction, or evaluate "
                f"'train' or 'test'."
            )
        return parts[name]
