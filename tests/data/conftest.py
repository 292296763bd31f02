"""Small sets for the data tests."""

from pathlib import Path

import prepared_sets
import pytest

from adderflax.data import DataConfig, DatasetInfo, load_dataset


@pytest.fixture(scope="session")
def digits():
    return load_dataset(DataConfig())


@pytest.fixture
def make_info():
    """Describes a set whose normalization only divides by 255."""

    def make(size=8, channels=3, num_classes=10, **overrides):
        fields = {
            "name": "made up",
            "num_classes": num_classes,
            "class_names": tuple(str(label) for label in range(num_classes)),
            "image_size": size,
            "channels": channels,
            "mean": (0.0,) * channels,
            "std": (1.0,) * channels,
            "eval_resize": None,
            "train_examples": 1,
            "validation_examples": 1,
            "test_examples": 1,
        }
        return DatasetInfo(**(fields | overrides))

    return make


@pytest.fixture(scope="session")
def fixed_size_set(tmp_path_factory):
    """A PNG set of 8 x 8 color images: 37 to train on, 13 to test on."""
    directory = tmp_path_factory.mktemp("fixed")
    splits = {
        "train": prepared_sets.pictures(37, (8, 8, 3), "png"),
        "test": prepared_sets.pictures(13, (8, 8, 3), "png", seed=1),
    }
    prepared_sets.write_set(directory, splits, shape=(8, 8, 3))
    return DataConfig(name="written", data_dir=str(directory), validation_fraction=0.0)


@pytest.fixture(scope="session")
def varying_size_set(tmp_path_factory):
    """A JPEG set of images of many sizes, evaluated on its validation split."""
    directory = tmp_path_factory.mktemp("varying")
    train = [
        prepared_sets.pictures(1, (20 + 3 * number, 60 - 2 * number, 3), "jpeg", seed=number)[0]
        for number in range(20)
    ]
    splits = {"train": train, "validation": prepared_sets.pictures(7, (50, 40, 3), "jpeg", seed=1)}
    prepared_sets.write_set(directory, splits, shape=(None, None, 3))
    return DataConfig(name="written", data_dir=str(directory), image_size=16, validation_fraction=0.0)


@pytest.fixture(scope="session")
def real_sets():
    """The directory of the prepared real sets, where there is one."""
    directory = Path(__file__).resolve().parents[3] / "shared" / "tfds"
    if not directory.is_dir():
        pytest.skip(f"no prepared real sets at {directory}")
    return str(directory)
