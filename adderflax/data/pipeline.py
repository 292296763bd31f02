"""Batches for training and evaluation, as grain pipelines.

A training batch is a function of (seed, number of the batch) and of nothing else: not of the
number of threads, workers or processes, and not of what was read before. That is what makes a
resumed run see the batches it would have seen.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from adderflax.data import images as images_lib
from adderflax.data.config import AugmentConfig, DataConfig, DatasetInfo
from adderflax.data.randaugment import RandAugment
from adderflax.data.sources import Dataset, ImageSource, naming_damage

if TYPE_CHECKING:
    import grain

# Batches waiting for the trainer may take this much memory, where single images are decoded.
_PREFETCH_BYTES = 1 << 30
_MAX_THREADS = 16


@dataclasses.dataclass(frozen=True)
class _Gather:
    """Looks up a batch of indices in a part that is held in memory."""

    source: ImageSource

    def __call__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        images, labels = self.source.gather(indices)
        return {"image": images, "label": labels, "index": indices.astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class _LoadForTraining:
    """Reads, decodes and augments one image with the record's own random numbers."""

    source: ImageSource
    augment: AugmentConfig
    info: DatasetInfo

    def __call__(self, index: int, random: np.random.Generator) -> dict[str, Any]:
        return self.example(index, *self.source.stored(index), random)

    def example(
        self, index: int, stored: bytes | np.ndarray, label: int, random: np.random.Generator
    ) -> dict[str, Any]:
        """Decodes and augments an image that was read already."""
        with naming_damage(f"Image {index} of the training part of {self.info.name}"):
            pixels = self._pixels(stored, random)
        return {"image": pixels, "label": np.int32(label), "index": np.int32(index)}

    def _pixels(self, stored: bytes | np.ndarray, random: np.random.Generator) -> np.ndarray:
        image = images_lib.open_image(stored)
        info, augment = self.info, self.augment
        if augment.random_resized_crop:
            image = images_lib.random_resized_crop(
                image, info.image_size, info.channels, augment.crop_scale, random
            )
        else:
            image = images_lib.open_image(self.source.view(image))
        if augment.randaugment_layers:
            image = RandAugment.from_config(augment, info)(image, random)
        return images_lib.to_array(image)


@dataclasses.dataclass(frozen=True)
class _LoadForEvaluation:
    """Reads one image as evaluation sees it, or a blank one behind the end."""

    source: ImageSource
    info: DatasetInfo

    def __call__(self, index: int) -> dict[str, Any]:
        return self._example(self.source[index] if index < len(self.source) else None)

    def stored(self, item: Any | None) -> dict[str, Any]:
        """The same for an image that was read already (`streams.Item`), or None behind the end."""
        if item is None:
            return self._example(None)
        with naming_damage(f"Image {item.position} of the split"):
            image = self.source.view(images_lib.open_image(item.stored))
        return self._example({"image": image, "label": item.label})

    def _example(self, example: dict[str, Any] | None) -> dict[str, Any]:
        if example is not None:
            image, label, weight = example["image"], example["label"], 1.0
        else:
            shape = (self.info.image_size, self.info.image_size, self.info.channels)
            image, label, weight = np.zeros(shape, np.uint8), 0, 0.0
        return {"image": image, "label": np.int32(label), "weight": np.float32(weight)}


@dataclasses.dataclass(frozen=True)
class _GatherForEvaluation:
    """Looks up a batch of indices; those behind the end give blank images of weight 0."""

    source: ImageSource

    def __call__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        real = indices < len(self.source)
        images, labels = self.source.gather(np.where(real, indices, 0))
        images[~real], labels[~real] = 0, 0
        return {"image": images, "label": labels, "weight": real.astype(np.float32)}


def train_iterator(
    dataset: Dataset,
    data: DataConfig,
    augment: AugmentConfig,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Gives shuffled training batches without end.

    Each epoch has its own order and holds each image exactly once; batches run across the
    border between epochs, so nothing is dropped. The iterator's state is the number of batches
    taken: `get_state`/`set_state`, or `grain.checkpoint.CheckpointSave`/`CheckpointRestore`.

    Args:
      dataset: as loaded with `data`.
      data: its configuration.
      augment: what the host does to single images is done here, the rest is for
        `augment_batch`.
      batch_size: images in a batch of all processes together.
      seed: of the order and of the host's augmentation, 0 to 2**32 - 1.
      process_index: which process this is.
      process_count: how many processes share each batch; this one gets images
        `process_index * b` to `(process_index + 1) * b` of it, b = batch_size / process_count.

    Returns:
      An iterator of {"image": uint8 [b, H, W, C], "label": int32 [b], "index": int32 [b]}, in
      which index is the position in the training part.

    Raises:
      ValueError: if the batch is larger than the training part, is not divisible by the
        number of processes, or the seed is out of range.
    """
    import grain

    _check_batch(batch_size, process_index, process_count)
    if batch_size > len(dataset.train):
        raise ValueError(
            f"batch_size={batch_size} is larger than the training part of {dataset.info.name}, "
            f"which has {len(dataset.train)} images: choose at most that many."
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"The seed must be a whole number from 0 to 2**32 - 1, not {seed}.")
    share = (batch_size, process_index, process_count)
    if dataset.train.sequential:
        return _stream_for_training(dataset, augment, batch_size // process_count, seed, *share[1:])
    order = grain.MapDataset.range(len(dataset.train)).seed(seed).shuffle().repeat(None)
    if dataset.train.in_memory and not augment.per_image_on_host:
        return _in_background(_share_of(order, *share).map(_Gather(dataset.train)))
    load = _LoadForTraining(dataset.train, augment, dataset.info)
    batches = _share_of(order.random_map(load), *share)
    return _decoding(batches, data, dataset.info, batch_size // process_count)


def evaluation_batches(
    dataset: Dataset,
    part: str,
    data: DataConfig,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Gives every image of a part exactly once, in a fixed order, in batches of one shape.

    The last batch is filled up with blank images of weight 0.

    Args:
      dataset: as loaded with `data`.
      part: "train", "validation" or "test"; the training part too is shown without
        augmentation.
      data: its configuration.
      batch_size: images in a batch of all processes together.
      process_index: which process this is.
      process_count: how many processes share each batch, as in `train_iterator`; all of them
        get the same number of batches.

    Returns:
      An iterator of {"image": uint8 [b, H, W, C], "label": int32 [b], "weight": float32 [b]}.

    Raises:
      ValueError: if there is no such part, or the batch is not divisible by the number of
        processes.
    """
    import grain

    _check_batch(batch_size, process_index, process_count)
    source = dataset.part(part)
    share = (batch_size, process_index, process_count)
    if source.sequential:
        return _stream_for_evaluation(source, dataset.info, *share)
    padded = -(-len(source) // batch_size) * batch_size
    order = grain.MapDataset.range(padded)
    if source.in_memory:
        batches = _in_background(_share_of(order, *share).map(_GatherForEvaluation(source)))
    else:
        batches = _share_of(order.map(_LoadForEvaluation(source, dataset.info)), *share)
        batches = _decoding(batches, data, dataset.info, batch_size // process_count)
    return _until_the_end(batches)


def _stream_for_training(
    dataset: Dataset,
    augment: AugmentConfig,
    images: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> grain.DatasetIterator:
    """Gives this process an even part of the positions, read front to back in shuffled order."""
    from adderflax.data import streams

    split, first, end = dataset.train.span()
    start, stop = (
        first + (end - first) * number // process_count for number in (process_index, process_index + 1)
    )
    load = _LoadForTraining(dataset.train, augment, dataset.info)

    def example(item: streams.Item) -> dict[str, Any]:
        random = np.random.default_rng((seed, item.epoch, item.position))
        return load.example(item.position - first, item.stored, item.label, random)

    return streams.endless_batches(streams.Endless(split, start, stop, seed), images, example)


def _stream_for_evaluation(
    source: ImageSource, info: DatasetInfo, batch_size: int, process_index: int, process_count: int
) -> Iterator[dict[str, np.ndarray]]:
    """Gives this process its even part of the positions; all get the same number of batches."""
    from adderflax.data import streams

    split, first, end = source.span()
    images = batch_size // process_count
    count = -(-len(source) // batch_size)
    start = min(first + process_index * count * images, end)
    load = _LoadForEvaluation(source, info)
    items = split.read(start, min(start + count * images, end))
    return streams.padded_batches(items, images, count, load.stored)


def _until_the_end(batches: grain.DatasetIterator) -> Iterator[dict[str, np.ndarray]]:
    try:
        yield from batches
    finally:
        # Ends worker processes now rather than when the garbage is collected.
        batches.close()


def _check_batch(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1 or process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"A batch needs at least one image and a process that is one of the "
            f"processes; got batch_size={batch_size}, process_index={process_index}, "
            f"process_count={process_count}."
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared evenly by {process_count} processes: "
            f"choose a multiple of {process_count}."
        )


def _share_of(
    records: grain.MapDataset, batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset:
    """Batches one process's share; records of other processes are never looked at."""
    # Here, not above: importing grain takes longer than all the rest of this package.
    from adderflax.data.ordering import Share, ShareDataset

    if process_count > 1:
        records = ShareDataset(records, Share(batch_size, process_index, process_count))
    # Nothing is ever left over; but for the length of an endless pipeline in batches of one,
    # grain rounds up to more than an integer holds.
    return records.batch(batch_size // process_count, drop_remainder=True)


def _in_background(batches: grain.MapDataset) -> grain.DatasetIterator:
    """Gathers the next batches in one thread while the trainer works on this one."""
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(batches.to_iter_dataset(options))


def _decoding(
    batches: grain.MapDataset, data: DataConfig, info: DatasetInfo, images: int
) -> grain.DatasetIterator:
    """Makes whole batches in parallel, in threads or in worker processes.

    The order does not depend on either: each batch is asked for by its number.
    """
    import grain

    from adderflax.data.ordering import WorkerIterator

    ahead = max(2, _PREFETCH_BYTES // (images * info.image_size**2 * info.channels))
    if data.workers:
        each = max(1, min(4, ahead // data.workers))
        return WorkerIterator(
            batches,
            grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=each),
        )
    threads = min(_MAX_THREADS, os.cpu_count() or 1, ahead)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=min(ahead, 2 * threads))
    return iter(batches.to_iter_dataset(options))
