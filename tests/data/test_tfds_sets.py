"""Sets of tensorflow-datasets: reading prepared ones, and what is said about the others."""

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest
from prepared_sets import encode, pictures, write_set

from adderflax.data import (
    AugmentConfig,
    DataConfig,
    DatasetNotReadyError,
    evaluation_batches,
    load_dataset,
    train_iterator,
)


def config(directory, **fields):
    return DataConfig(**({"name": "written", "data_dir": str(directory)} | fields))


def message(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_fixed_size_set(fixed_size_set):
    dataset = load_dataset(fixed_size_set)
    info = dataset.info
    assert (info.num_classes, info.image_size, info.channels) == (10, 8, 3)
    assert info.class_names[3] == "class 3" and info.eval_resize is None
    assert (info.train_examples, info.validation_examples, info.test_examples) == (37, 0, 13)
    assert info.mean == (0.485, 0.456, 0.406) and info.std == (0.229, 0.224, 0.225)
    examples = pictures(13, (8, 8, 3), "png", seed=1)
    for index, (encoded, label) in enumerate(examples):
        seen = dataset.test[index]
        assert encode(seen["image"], "png") == encoded and seen["label"] == label


def test_varying_size_set(varying_size_set):
    info = load_dataset(varying_size_set).info
    assert (info.image_size, info.eval_resize) == (16, round(16 * 256 / 224))
    default = load_dataset(dataclasses.replace(varying_size_set, image_size=None)).info
    assert (default.image_size, default.eval_resize) == (224, 256)
    # The validation split is the evaluation split where there is no other.
    assert info.test_examples == 7
    with pytest.raises(ValueError, match="no one size"):
        load_dataset(dataclasses.replace(varying_size_set, cache=True))


def test_grey_set_of_another_size(tmp_path):
    examples = pictures(12, (6, 6, 1), "png")
    write_set(tmp_path, {"train": examples, "test": examples}, shape=(6, 6, 1))
    dataset = load_dataset(config(tmp_path, image_size=9))
    assert dataset.info.mean == (0.5,) and dataset.info.std == (0.5,)
    assert dataset.test[0]["image"].shape == (9, 9, 1)


@pytest.mark.parametrize("name, mean", [("cifar10", 0.4914), ("mnist", 0.1307)])
def test_known_sets_have_their_own_figures(tmp_path, name, mean):
    channels = 1 if name == "mnist" else 3
    examples = pictures(12, (8, 8, channels), "png")
    version = {"cifar10": "3.0.2", "mnist": "3.0.1"}[name]
    write_set(
        tmp_path,
        {"train": examples, "test": examples},
        shape=(8, 8, channels),
        name=name,
        version=version,
    )
    assert load_dataset(config(tmp_path, name=name)).info.mean[0] == mean


def test_a_test_split_without_labels_is_passed_over(tmp_path):
    examples = pictures(12, (8, 8, 3), "png")
    splits = {
        "train": examples,
        "validation": examples[:5],
        "test": [(encoded, -1) for encoded, _ in examples],
    }
    write_set(tmp_path, splits, shape=(8, 8, 3))
    assert load_dataset(config(tmp_path)).info.test_examples == 5


def test_a_set_with_one_split_gives_a_fixed_fifth(tmp_path):
    write_set(tmp_path, {"train": pictures(50, (8, 8, 3), "png")}, shape=(8, 8, 3))
    first, again = (load_dataset(config(tmp_path)) for _ in range(2))
    assert (len(first.train), len(first.validation), len(first.test)) == (36, 4, 10)
    held = [part._positions for part in (first.train, first.validation, first.test)]
    assert np.array_equal(np.sort(np.concatenate(held)), np.arange(50))
    assert np.array_equal(first.test._positions, again.test._positions)


def test_prepared_sets_are_read_without_tensorflow(varying_size_set, root):
    code = f"""
import sys
from adderflax.data import AugmentConfig, DataConfig, load_dataset
from adderflax.data import evaluation_batches, train_iterator
data = {varying_size_set!r}
dataset = load_dataset(data)
augment = AugmentConfig(random_resized_crop=True)
next(train_iterator(dataset, data, augment, batch_size=4, seed=0))
batches = evaluation_batches(dataset, "test", data, batch_size=4)
assert sum(batch["weight"].sum() for batch in batches) == 7
assert "tensorflow_datasets" in sys.modules
print("tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_unknown_name_is_answered_with_close_ones(tmp_path):
    with pytest.raises(ValueError) as error:
        load_dataset(config(tmp_path, name="cifar11"))
    assert "Did you mean" in message(error) and "cifar10" in message(error)
    with pytest.raises(ValueError) as error:
        load_dataset(config(tmp_path, name="digit"))
    assert "Did you mean digits" in message(error)


def test_unknown_configuration(tmp_path):
    with pytest.raises(ValueError, match="not in that configuration or version"):
        load_dataset(config(tmp_path, name="imagenette/99px"))


def test_a_set_without_labels(tmp_path):
    with pytest.raises(ValueError, match="no class label for each image") as error:
        load_dataset(config(tmp_path, name="celeb_a"))
    message(error)


def test_a_directory_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match="does not exist") as error:
        load_dataset(config(tmp_path / "typo"))
    assert "mkdir -p" in message(error)
    with pytest.raises(ValueError, match="is a bucket"):
        load_dataset(config("gs://bucket/sets"))


def test_tfrecord_data_is_refused_with_the_way_out(tmp_path):
    pytest.importorskip("tensorflow")  # writes the files
    examples = pictures(5, (8, 8, 3), "png")
    write_set(tmp_path, {"train": examples}, shape=(8, 8, 3), file_format="tfrecord")
    with pytest.raises(DatasetNotReadyError, match="prepared there as tfrecord") as error:
        load_dataset(config(tmp_path))
    assert "python -m adderflax.data.prepare written --data_dir=OTHER" in message(error)
    assert "configs/digits_adder_vit.py" in message(error)


def test_missing_files_are_named(tmp_path):
    examples = pictures(5, (8, 8, 3), "png")
    home = write_set(tmp_path, {"train": examples, "test": examples}, shape=(8, 8, 3))
    lost = next(home.glob("*test*"))
    shutil.move(lost, tmp_path / "elsewhere")
    with pytest.raises(DatasetNotReadyError, match="files are missing") as error:
        load_dataset(config(tmp_path))
    assert str(lost) in message(error)


@pytest.mark.parametrize("shape", [(8, 8, 3), (None, None, 3)])
def test_damaged_images_are_named(tmp_path, shape):
    kind = "png" if shape[0] else "jpeg"
    examples = pictures(10, (8, 8, 3), kind)
    examples[6] = (examples[6][0][:60], 6)
    write_set(tmp_path, {"train": examples, "test": examples[:5]}, shape=shape)
    data = config(tmp_path, validation_fraction=0.0, image_size=8)
    dataset = load_dataset(data)
    with pytest.raises(ValueError, match="cannot be decoded .* is damaged"):
        next(train_iterator(dataset, data, AugmentConfig(), batch_size=10, seed=0))
    with pytest.raises(ValueError, match="^Image 6 of the split cannot be decoded"):
        list(evaluation_batches(dataset, "train", data, batch_size=10))


def test_real_cifar10(real_sets):
    data = DataConfig(name="cifar10", data_dir=real_sets)
    dataset = load_dataset(data)
    info = dataset.info
    assert (info.train_examples, info.validation_examples, info.test_examples) == (
        45_000,
        5_000,
        10_000,
    )
    assert info.class_names[0] == "airplane" and info.image_size == 32
    labels, count = np.zeros(10, int), 0
    for batch in evaluation_batches(dataset, "test", data, batch_size=384):
        labels += np.bincount(batch["label"], batch["weight"], minlength=10).astype(int)
        count += batch["weight"].sum()
    assert count == 10_000 and (labels == 1000).all()


def test_real_imagenette(real_sets):
    data = DataConfig(name="imagenette/160px-v2", data_dir=real_sets)
    dataset = load_dataset(data)
    assert (dataset.info.image_size, dataset.info.eval_resize) == (224, 256)
    assert dataset.info.class_names[-1] == "parachute"
    batches = list(evaluation_batches(dataset, "test", data, batch_size=100))
    assert sum(batch["weight"].sum() for batch in batches) == 393
    augment = AugmentConfig(random_resized_crop=True, randaugment_layers=2)
    batch = next(train_iterator(dataset, data, augment, batch_size=16, seed=0))
    assert batch["image"].shape == (16, 224, 224, 3) and batch["image"].std() > 30
