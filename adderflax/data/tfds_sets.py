"""Image classification sets of tensorflow-datasets, read without TensorFlow."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from adderflax.data.config import DataConfig
from adderflax.data.prepare import command, is_prepared, not_ready, place_of, prepare_in_child
from adderflax.data.sources import RawDataset, Split

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# Mean and standard deviation per channel over the training split, in units of 0..1. Those of
# cifar10 were computed from the set itself; cifar100, mnist and ImageNet's are the figures in
# general use.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
}
_RGB_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GREY_STATISTICS = ((0.5,), (0.5,))

# Imagenette labels its ten ImageNet classes by WordNet numbers.
_WORDNET_NAMES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}

# Sets that come without an evaluation split lose a fixed fifth of their training split to one.
_TEST_SEED = 1
_TEST_FRACTION = 0.2


class TfdsSplit:
    """A prepared split whose images stay encoded until they are needed."""

    def __init__(self, records: Any, image_key: str, label_key: str):
        self._records = records
        self._image_key = image_key
        self._label_key = label_key

    def __len__(self) -> int:
        return len(self._records)

    def stored(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        """Reads encoded images and labels, several in one go."""
        positions = [int(position) for position in positions]
        if len(positions) == 1:
            # Reading several starts threads, which takes longer than reading one.
            examples = [self._records[positions[0]]]
        else:
            examples = self._records.__getitems__(positions)
        return [(example[self._image_key], int(example[self._label_key])) for example in examples]


def open_tfds(config: DataConfig) -> RawDataset:
    """Opens a set by its name in tensorflow-datasets, preparing it first if it is not there.

    Args:
      config: names the set and the directory.

    Returns:
      The set, not yet parted.

    Raises:
      DatasetNotReadyError: if the set is not prepared here and could not be prepared now.
      ValueError: if the name is unknown, the directory does not exist, or the set is not one
        of images with one label each.
    """
    if config.data_dir is not None:
        config = dataclasses.replace(config, data_dir=os.path.expanduser(config.data_dir))
        _check_directory(config)
    builder = _builder(config)
    image_key, label_key = _keys(config, builder)
    if config.backend == "tfrecord":
        _check_tfrecord(config, builder)
    else:
        if not is_prepared(builder):
            prepare_in_child(config.name, config.data_dir)
            builder = _builder(config)
        _check_files(config, builder)

    image, label = builder.info.features[image_key], builder.info.features[label_key]
    channels = image.shape[-1] or 3
    default = _RGB_STATISTICS if channels == 3 else _GREY_STATISTICS
    mean, std = _STATISTICS.get(builder.name, default)
    names = label.names or [str(number) for number in range(label.num_classes)]
    train, test = _splits(config, builder, image_key, label_key)
    train_positions, test_positions = np.arange(len(train)), np.arange(len(test))
    if test is train:
        # RandomState, not Generator: NumPy keeps its streams the same for all versions.
        order = np.random.RandomState(_TEST_SEED).permutation(len(train))
        if config.backend == "tfrecord":
            order = np.arange(len(train))  # neighbors stay together, as in the validation part
        held_out = round(_TEST_FRACTION * len(train))
        test_positions, train_positions = np.sort(order[:held_out]), np.sort(order[held_out:])
    height, width, _ = image.shape
    return RawDataset(
        class_names=tuple(_WORDNET_NAMES.get(name, name) for name in names),
        channels=channels,
        native_size=height if height == width else None,
        mean=mean,
        std=std,
        train=train,
        test=test,
        train_positions=train_positions,
        test_positions=test_positions,
        sequential=config.backend == "tfrecord",
    )


def _check_directory(config: DataConfig) -> None:
    if "://" in config.data_dir and config.backend == "tfrecord":
        return
    if "://" in config.data_dir:
        raise ValueError(
            f"data.data_dir={config.data_dir!r} is a bucket, and single images cannot be read "
            f"from one: copy the prepared set to a disk, or mount the bucket (gcsfuse), and give "
            f"that path; TFRecord files are read from a bucket by --config.data.backend=tfrecord."
        )
    if not os.path.isdir(config.data_dir):
        raise ValueError(
            f"data.data_dir={config.data_dir!r} does not exist (seen from {os.getcwd()}): "
            f"correct the path, or make the directory with `mkdir -p {config.data_dir}` to have "
            f"{config.name} downloaded and prepared there."
        )


def _builder(config: DataConfig) -> tfds.core.DatasetBuilder:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        not_ready(
            config.name,
            config.data_dir,
            f"reading it needs tensorflow-datasets, which cannot be imported here ({error})",
            "In the checkout `pip install '.[train]'` or `pip install -r requirements.txt` installs it.",
        )
    if config.name.startswith(("/", ".", "~")):
        _is_a_path(config)
    try:
        return tfds.builder(config.name, data_dir=config.data_dir)
    except tfds.core.DatasetNotFoundError:
        if os.path.isdir(config.name):
            _is_a_path(config)
        _unknown(config, tfds.list_builders(with_community_datasets=False))
    except ImportError as error:
        not_ready(
            config.name,
            config.data_dir,
            f"its description in tensorflow-datasets cannot be imported here ({error})",
        )
    except (ValueError, AssertionError) as error:
        first = " ".join(str(error).split())[:400]
        raise ValueError(
            f"tensorflow-datasets has the set that data.name={config.name!r} asks for, but not in "
            f"that configuration or version: {first}"
        ) from error


def _is_a_path(config: DataConfig) -> NoReturn:
    raise ValueError(
        f"data.name={config.name!r} is a path, and the name of a set belongs there. A folder of images "
        f"by class becomes one by `{command('NAME', config.data_dir)} --folder={config.name}`; then give "
        f"data.name=NAME."
    )


def _unknown(config: DataConfig, known: list[str]) -> NoReturn:
    base = config.name.split("/")[0].split(":")[0]
    place = place_of(config.data_dir)
    there = _prepared_in(place)
    close = difflib.get_close_matches(base, ["digits", *there, *known], n=3, cutoff=0.6)
    did_you_mean = f" Did you mean {' or '.join(close)}?" if close else ""
    held = f"holds {', '.join(there)}" if there else "holds none"
    raise ValueError(
        f"There is no image set called {config.name!r}.{did_you_mean} data.name is 'digits', the name "
        f"of an image classification set of tensorflow-datasets, such as cifar10, cifar100, "
        f"mnist, imagenette/160px-v2 or imagenet2012 "
        f"(https://www.tensorflow.org/datasets/catalog lists them), or that of a set of your own which "
        f"lies prepared in data.data_dir; {place} {held}."
    )


def _prepared_in(place: str) -> list[str]:
    """Sets, with their configuration, that lie in a directory."""
    if "://" in place:
        return []
    root = pathlib.Path(place).expanduser()
    found = root.glob("*/**/dataset_info.json")
    return sorted({file.parent.parent.relative_to(root).as_posix() for file in found})


def _keys(config: DataConfig, builder: tfds.core.DatasetBuilder) -> tuple[str, str]:
    """Finds the features that hold the image and its one label."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    supervised = builder.info.supervised_keys
    names = list(features) if hasattr(features, "keys") else []
    if supervised and len(supervised) == 2 and set(supervised) <= set(names):
        names = list(supervised)
    images = [name for name in names if type(features[name]) is tfds.features.Image]
    labels = [name for name in names if type(features[name]) is tfds.features.ClassLabel]
    if not images or not labels:
        missing = "no images" if not images else "no class label for each image"
        raise ValueError(
            f"{config.name} cannot be trained on: it is in tensorflow-datasets, but it has "
            f"{missing} (its features: {', '.join(names) or 'not a dictionary'}). Choose an image "
            f"classification set, such as cifar10."
        )
    image = features[images[0]]
    # `dtype` in place of `np_dtype` would import TensorFlow.
    if image.np_dtype != np.uint8 or image.shape[-1] not in (1, 3, None):
        raise ValueError(
            f"{config.name} cannot be trained on: its images are {np.dtype(image.np_dtype).name} "
            f"with {image.shape[-1]} channels, and only uint8 images with 1 or 3 channels are "
            f"read here."
        )
    return images[0], labels[0]


def _check_files(config: DataConfig, builder: tfds.core.DatasetBuilder) -> None:
    """Checks that what claims to be prepared can be read image by image, and is all there."""
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        not_ready(
            config.name,
            config.data_dir,
            f"it is prepared there as {' and '.join(sorted(formats)) or 'no known format'}, which "
            f"cannot be read image by image; array_record can",
            f"Prepare it in another directory, `python -m adderflax.data.prepare {config.name} "
            f"--data_dir=OTHER`, and train with --config.data.data_dir=OTHER; or read TFRecord files "
            f"front to back with --config.data.backend=tfrecord.",
        )
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    missing = [
        str(path)
        for split in builder.info.splits.values()
        for path in split.filepaths
        if not os.path.isfile(path)
    ]
    if missing:
        not_ready(
            config.name,
            config.data_dir,
            f"{len(missing)} of its files are missing, the first of them {missing[0]}",
            f"Copy them there, or delete {builder.data_path} and prepare the set again.",
        )


def _check_tfrecord(config: DataConfig, builder: tfds.core.DatasetBuilder) -> None:
    """Checks that TFRecord files and TensorFlow are there, and that files hold images in a random order."""
    from etils import epath

    if importlib.util.find_spec("tensorflow") is None:
        not_ready(
            config.name,
            config.data_dir,
            "data.backend='tfrecord' needs TensorFlow, which is not installed here",
            "`pip install tensorflow-cpu` installs it; array_record files need none.",
        )
    prepared = (epath.Path(builder.data_path) / "dataset_info.json").exists()
    formats = {file_format.value for file_format in builder.info.available_file_formats()} if prepared else ()
    if "tfrecord" not in formats:
        not_ready(
            config.name,
            config.data_dir,
            f"no TFRecord files are in {builder.data_path}",
            f"`tfds build {config.name} --data_dir=DIR` writes them; where the set is there as "
            f"array_record, leave data.backend at its default.",
        )
    if builder.info.disable_shuffling:
        raise ValueError(
            f"{config.name} cannot be read with data.backend='tfrecord': tensorflow-datasets stores it in "
            f"its original order, and reading front to back would hardly shuffle it. Prepare it as "
            f"array_record: `python -m adderflax.data.prepare {config.name} --data_dir=OTHER`."
        )
    builder.info.set_file_format("tfrecord", override=True, override_if_initialized=True)


def _splits(
    config: DataConfig, builder: tfds.core.DatasetBuilder, image_key: str, label_key: str
) -> tuple[Split, Split]:
    """Opens the training split and the labelled evaluation split, which may be the same."""
    import tensorflow_datasets as tfds

    filled = [name for name, split in builder.info.splits.items() if split.num_examples]
    if "train" not in filled:
        raise ValueError(
            f"{config.name} cannot be trained on: it has no split called 'train' (it has "
            f"{', '.join(filled) or 'none'})."
        )

    def opened(name: str) -> Split:
        if config.backend == "tfrecord":
            from adderflax.data.streams import TfrecordSplit

            return TfrecordSplit(builder, name, image_key, label_key)
        decoders = {image_key: tfds.decode.SkipDecoding()}
        return TfdsSplit(builder.as_data_source(name, decoders=decoders), image_key, label_key)

    train = opened("train")
    for name in ("test", "validation"):
        if name in filled:
            split = opened(name)
            # A split without labels marks them all -1, as the test split of ImageNet does.
            if split.stored([0])[0][1] >= 0:
                return train, split
    return train, train
