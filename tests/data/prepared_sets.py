"""Writes small sets as tensorflow-datasets prepares them; array_record files without TensorFlow."""

import io
import json
from pathlib import Path

import numpy as np


def encode(pixels: np.ndarray, kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, kind)
    return buffer.getvalue()


def write_set(
    directory: Path,
    splits: dict[str, list[tuple[bytes, int]]],
    *,
    shape: tuple[int | None, int | None, int],
    name: str = "written",
    version: str = "1.0.0",
    num_classes: int = 10,
    file_format: str = "array_record",
    shards: int = 1,
) -> Path:
    """Writes a prepared set as tensorflow-datasets lays it out, and returns its directory."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.proto import tf_example_pb2

    home = directory / name / version
    home.mkdir(parents=True)
    names = [f"class {label}" for label in range(num_classes)]
    kind = "png" if shape[0] else "jpeg"
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=shape, encoding_format=kind),
            "label": tfds.features.ClassLabel(names=names),
        }
    )
    features.save_config(str(home))
    described = []
    for split, examples in splits.items():
        parts = [
            examples[len(examples) * n // shards : len(examples) * (n + 1) // shards] for n in range(shards)
        ]
        for number, part in enumerate(parts):
            path = home / f"{name}-{split}.{file_format}-{number:05d}-of-{shards:05d}"
            writer = _writer(path, file_format)
            for encoded, label in part:
                example = tf_example_pb2.Example()
                example.features.feature["image"].bytes_list.value.append(encoded)
                example.features.feature["label"].int64_list.value.append(label)
                writer.write(example.SerializeToString())
            writer.close()
        described.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "1000",
                "shardLengths": [str(len(part)) for part in parts],
            }
        )
    (home / "dataset_info.json").write_text(
        json.dumps(
            {
                "fileFormat": file_format,
                "name": name,
                "splits": described,
                "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
                "version": version,
            }
        )
    )
    return home


def _writer(path: Path, file_format: str):
    if file_format == "array_record":
        from array_record.python.array_record_module import ArrayRecordWriter

        return ArrayRecordWriter(str(path), "group_size:1")
    import tensorflow as tf

    return tf.io.TFRecordWriter(str(path))


def pictures(count: int, shape: tuple[int, int, int], kind: str, seed: int = 0):
    """Smooth random pictures, so that JPEG keeps them, with labels 0, 1, 2, ... in turn."""
    from PIL import Image

    random = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        coarse = random.integers(0, 256, (4, 4, 3), np.uint8)
        image = Image.fromarray(coarse).resize(shape[1::-1], Image.Resampling.BICUBIC)
        pixels = np.asarray(image)[..., : shape[2]]
        examples.append((encode(pixels, kind), number % 10))
    return examples
