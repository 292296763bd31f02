"""TFRecord data read front to back with TensorFlow, for sets that lie in a bucket.

Single records of such files cannot be reached, so an epoch's order is that of shuffled files whose records
go through a shuffling buffer, and not one permutation of all images. Each batch is still a function of (seed,
number of the batch, number of processes). To resume, an epoch is read again, without decoding, up to where it
was.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import pool
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import numpy as np

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# Files read at a time, and encoded images among which the next one is drawn: about 0.5 GiB of ImageNet.
_FILES = 16
_SHUFFLED = 4096
_THREADS = min(16, os.cpu_count() or 1)


class Item(NamedTuple):
    """An image as it is stored.

    Attributes:
      epoch: how often the images before it were all read.
      position: in the split.
      stored: the encoded file.
      label: its class.
    """

    epoch: int
    position: int
    stored: bytes
    label: int


class TfrecordSplit:
    """A split of a set that tensorflow-datasets prepared as TFRecord files."""

    def __init__(self, builder: tfds.core.DatasetBuilder, name: str, image_key: str, label_key: str):
        """Reads nothing yet.

        Args:
          builder: of the set, set to read TFRecord files.
          name: of the split.
          image_key: the feature that is the image.
          label_key: the feature that is its class.
        """
        self._builder = builder
        self._name = name
        self._keys = image_key, label_key
        self._starts = np.cumsum([0, *builder.info.splits[name].shard_lengths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def stored(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        """Encoded images and labels; a run of neighbors is read in one go, and each run opens files anew."""
        found = []
        for _, run in itertools.groupby(enumerate(positions), lambda pair: pair[1] - pair[0]):
            run = [int(position) for _, position in run]
            found += [(item.stored, item.label) for item in self.read(run[0], run[-1] + 1)]
        return found

    def read(self, start: int, stop: int, epoch: int = 0, seed: int | None = None) -> Iterator[Item]:
        """Reads the images at `start` to `stop`.

        Args:
          start: first position.
          stop: behind the last position.
          epoch: is written into the items, and changes the order.
          seed: of the order; None gives the order of the split.

        Yields:
          Every image once.
        """
        if start >= stop:
            return
        tf, tfds = _tensorflow(), _tensorflow_datasets()
        image_key, label_key = self._keys
        order = (
            None if seed is None else int(np.random.SeedSequence([seed, epoch, start]).generate_state(1)[0])
        )
        examples = self._builder.as_dataset(
            split=f"{self._name}[{start}:{stop}]",
            shuffle_files=order is not None,
            decoders={image_key: tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(
                add_tfds_id=True,
                shuffle_seed=order,
                interleave_cycle_length=1 if order is None else _FILES,
                try_autocache=False,
            ),
        )
        if order is not None:
            examples = examples.shuffle(_SHUFFLED, seed=order)
        for example in tfds.as_numpy(examples.prefetch(tf.data.AUTOTUNE)):
            # "train.tfrecord-00002-of-01024__57": file 2, its record 57.
            shard, record = map(int, re.search(rb"-(\d+)-of-\d+__(\d+)$", example["tfds_id"]).groups())
            position = int(self._starts[shard]) + record
            yield Item(epoch, position, example[image_key], int(example[label_key]))


class Endless(grain.IterDataset):
    """The images from `start` to `stop`, again and again, each time in another order."""

    def __init__(self, split: TfrecordSplit, start: int, stop: int, seed: int):
        super().__init__()
        self._arguments = split, start, stop, seed

    def __iter__(self) -> grain.DatasetIterator:
        return _EndlessIterator(*self._arguments)


class _EndlessIterator(grain.DatasetIterator):
    """Its state is the epoch, and how many of its images were taken."""

    def __init__(self, split: TfrecordSplit, start: int, stop: int, seed: int):
        super().__init__()
        self._count = stop - start
        self._read = functools.partial(split.read, start, stop, seed=seed)
        self.set_state({"epoch": 0, "taken": 0})

    def __next__(self) -> Item:
        if self._taken == self._count:
            self.set_state({"epoch": self._epoch + 1, "taken": 0})
        if self._items is None:
            self._items = itertools.islice(self._read(epoch=self._epoch), self._taken, None)
        item = next(self._items)
        self._taken += 1
        return item

    def get_state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._epoch, self._taken = state["epoch"], state["taken"]
        self._items: Iterator[Item] | None = None


def endless_batches(items: Endless, batch_size: int, load: Callable[[Item], dict]) -> grain.DatasetIterator:
    """Batches of what `load` makes of each item, loaded in threads and ahead of time."""
    loaded = items.batch(batch_size, batch_fn=list).map(_InThreads(load))
    return iter(grain.experimental.ThreadPrefetchIterDataset(loaded, prefetch_buffer_size=2))


def padded_batches(
    items: Iterator[Item], batch_size: int, count: int, load: Callable[[Item | None], dict]
) -> Iterator[dict[str, np.ndarray]]:
    """So many batches of what `load` makes of each item, and of None behind the end."""
    load = _InThreads(load)
    items = itertools.chain(items, itertools.repeat(None))
    for _ in range(count):
        yield load(list(itertools.islice(items, batch_size)))


class _InThreads:
    """Makes a batch of a list, one example in a thread; Pillow decodes without the interpreter's lock."""

    def __init__(self, load: Callable[[Any], dict]):
        self._load = load
        # Not an executor of concurrent.futures, all of which share a lock: an iterator that is forgotten is
        # closed by the garbage collector, perhaps while another executor holds that lock, and closing waits
        # for the thread that waits here.
        self._pool = pool.ThreadPool(_THREADS)

    def __call__(self, items: list) -> dict[str, np.ndarray]:
        examples = self._pool.map(self._load, items)
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _tensorflow_datasets() -> Any:
    import tensorflow_datasets

    return tensorflow_datasets


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    # It only reads here; the memory of the accelerators is for JAX.
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf
