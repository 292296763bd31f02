"""Images a second that the input gives, on this machine's processor.

    python -m benchmarks.input --data_dir ../shared/tfds

CIFAR-10 (prepared by tensorflow-datasets) goes through the training iterator of `train.py`, with what the
configuration leaves to the device done by JAX on this machine's device. Photographs of 500x375 pixels, the
usual size in ImageNet, are decoded and cropped at random to 224x224 in one thread, beside TensorFlow's own
decoder on the same bytes and boxes. Writes results/input.json and results/input.md.
"""

import argparse
import contextlib
import io
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adderflax import pipes
from adderflax.data import (
    AugmentConfig,
    DataConfig,
    Dataset,
    DatasetNotReadyError,
    augment_batch,
    load_dataset,
    train_iterator,
)
from adderflax.data.images import open_image, random_crop_box, random_resized_crop, to_array
from benchmarks.timing import alternate, machine

_BATCH = 256
_PHOTOS, _PHOTO_SIZE, _SIZE = 64, (500, 375), 224
_CROP = AugmentConfig(crop_padding=4, flip=True)
_RANDAUGMENT = AugmentConfig(crop_padding=4, flip=True, randaugment_layers=2)
_PHOTO = AugmentConfig(random_resized_crop=True, flip=True)


@pipes.reader_may_leave()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.input",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data_dir", help="where cifar10 and imagenette/160px-v2 are prepared")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement (default 5)")
    parser.add_argument("--output", default="results/input", help="files to write, without their ending")
    arguments = parser.parse_args()
    place = machine()  # now: later the load is this program's own
    try:
        figures = measure(arguments.data_dir, arguments.seconds)
    except (DatasetNotReadyError, ValueError) as error:
        sys.exit(f"error: {error}")
    command = f"python -m benchmarks.input --data_dir {arguments.data_dir} --seconds {arguments.seconds:g}"
    result = {"command": command, "machine": place, "images_per_second": figures}
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    page = as_markdown(result)
    output.with_suffix(".md").write_text(page)
    print(page)


def measure(data_dir: str | None, seconds: float) -> dict[str, float]:
    """All figures, in images a second, by what was done."""
    figures = {}
    config = DataConfig("cifar10", data_dir)
    dataset = load_dataset(config)
    figures["cifar10, iterator alone"] = _iterate(dataset, config, _CROP, seconds)
    figures["cifar10, and crop, flip, normalization"] = _iterate(dataset, config, _CROP, seconds, device=True)
    for workers, place in ((0, "threads"), (2, "2 worker processes")):
        config = DataConfig("cifar10", data_dir, workers=workers)
        name = f"cifar10, RandAugment in {place}, and the same"
        figures[name] = _iterate(dataset, config, _RANDAUGMENT, seconds, device=True)
    config = DataConfig("imagenette/160px-v2", data_dir)
    photos = load_dataset(config)
    figures["imagenette 160px, random-resized crop to 224"] = _iterate(photos, config, _PHOTO, seconds)
    return figures | _decoders(photos)


def _iterate(
    dataset: Dataset, config: DataConfig, augment: AugmentConfig, seconds: float, device: bool = False
) -> float:
    """Images a second through the training iterator, and through the device's part of the augmentation."""
    step = jax.jit(
        lambda key, images, labels: augment_batch(key, images, labels, config=augment, info=dataset.info)
    )
    keys = map(jax.random.key, itertools.count())

    def take(batch: dict[str, np.ndarray]) -> Any:
        return step(next(keys), batch["image"], batch["label"]) if device else batch["image"]

    batches = train_iterator(dataset, config, augment, batch_size=_BATCH, seed=0)
    with contextlib.closing(batches):
        # Decoding the set into memory, starting workers, compiling, and what was made ahead meanwhile.
        for _ in range(12):
            jax.block_until_ready(take(next(batches)))
        return _rate(batches, take, seconds)


def _rate(batches: Iterator[dict], take: Callable[[dict], Any], seconds: float) -> float:
    begun, count, previous = time.perf_counter(), 0, None
    while (passed := time.perf_counter() - begun) < seconds or not count:
        result = take(next(batches))
        # As in training: the device works on one batch while the next is gathered.
        jax.block_until_ready(previous)
        previous, count = result, count + _BATCH
    jax.block_until_ready(previous)
    return count / passed


def _decoders(photos: Dataset) -> dict[str, float]:
    """Decoding and random-resized crop of the same photographs and boxes in one thread, by two libraries."""
    random = np.random.default_rng(0)
    encoded = [_enlarged(photos.train.stored(number)[0]) for number in range(_PHOTOS)]
    # `random_resized_crop` below draws these very boxes, from a generator in the same state.
    boxes = [random_crop_box(*_PHOTO_SIZE, _PHOTO.crop_scale, random) for _ in encoded]

    def pillow() -> None:
        draws = np.random.default_rng(0)
        for photo in encoded:
            to_array(random_resized_crop(open_image(photo), _SIZE, 3, _PHOTO.crop_scale, draws))

    functions = {"500x375 JPEG, random-resized crop to 224, one thread: ours, Pillow": pillow}
    if tensorflow := _tensorflow_decoder(encoded, boxes):
        functions["the same: TensorFlow, decode_and_crop_jpeg and resize"] = tensorflow
    return {name: _PHOTOS / taken for name, taken in alternate(functions, sample_seconds=1.0).items()}


def _tensorflow_decoder(encoded: list[bytes], boxes: list[tuple]) -> Callable[[], None] | None:
    """TensorFlow's on the same photographs and boxes, in one thread; None where it is not installed."""
    try:
        import tensorflow as tf
    except ImportError:
        print("TensorFlow is not installed: its decoder is not measured.", file=sys.stderr)
        return None
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    @tf.function
    def decode(photo: tf.Tensor, window: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_and_crop_jpeg(photo, window, channels=3)
        image = tf.image.resize(image, (_SIZE, _SIZE), tf.image.ResizeMethod.BICUBIC)
        return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)

    # top, left, height, width
    windows = [(top, left, bottom - top, right - left) for left, top, right, bottom in boxes]
    inputs = [(tf.constant(photo), tf.constant(window)) for photo, window in zip(encoded, windows)]

    def run() -> None:
        for photo, window in inputs:
            decode(photo, window).numpy()

    return run


def _enlarged(stored: bytes) -> bytes:
    """A photograph at ImageNet's usual size in pixels; 64 kB on average, as ours have little fine detail."""
    from PIL import Image

    buffer = io.BytesIO()
    image = open_image(stored).convert("RGB").resize(_PHOTO_SIZE, Image.Resampling.BICUBIC)
    image.save(buffer, "jpeg", quality=96)
    return buffer.getvalue()


def as_markdown(result: dict[str, Any]) -> str:
    """The page."""
    place = result["machine"]
    rows = "\n".join(f"| {name} | {figure:,.0f} |" for name, figure in result["images_per_second"].items())
    load = f"load average {place['load_average']} before it began"
    if place["load_average"] > 1:
        load += ": measured under load, so the figures are too low"
    return (
        f"# Input, images a second\n\n`{result['command']}`\n\n{place['device']}, {place['cores']} cores, jax"
        f" {place['jax']}, Python {place['python']}; {load}.\n\n"
        f"| what | images/s |\n|---|---:|\n{rows}\n\n"
        "The first rows use all cores: the training iterator in batches of 256 and, where it says so, the"
        " device's part of the augmentation, computed on the same cores; with an accelerator that part is"
        " not theirs. The last two rows use one thread: multiply by the cores of a host. Their photographs"
        " are enlarged from imagenette's, 64 kB on average; those of ImageNet have about 110 kB. Pillow"
        " decodes a JPEG at a half or a quarter of its size where the crop allows it, TensorFlow decodes the"
        " crop alone.\n"
    )


if __name__ == "__main__":
    main()
