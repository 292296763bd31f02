"""The embedded set: fixed for good."""

import hashlib

import numpy as np
import pytest

from adderflax.data import DataConfig, load_dataset
from adderflax.data import digits as digits_lib


def checksum(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def everything(part):
    return part.gather(np.arange(len(part)))


def test_golden_parts(digits):
    assert checksum(*everything(digits.test)) == "338fe45b549a5715"
    assert checksum(*everything(digits.validation)) == "2ffeb63c6b017113"
    assert checksum(*everything(digits.train)) == "99ef62ccd70dbb93"


def test_held_out_fifth_is_stratified():
    images, labels = digits_lib.load_digits()
    test = digits_lib.test_indices(labels)
    assert len(np.unique(test)) == len(test) == 359
    for label in range(10):
        count = np.sum(labels == label)
        assert abs(np.sum(labels[test] == label) - count / 5) <= 0.5
    rest = np.delete(images, test, axis=0) / 255.0
    np.testing.assert_allclose(rest.mean(), digits_lib.MEAN[0], atol=5e-5)
    np.testing.assert_allclose(rest.std(), digits_lib.STD[0], atol=5e-5)


def test_info_and_examples(digits):
    info = digits.info
    assert (info.num_classes, info.image_size, info.channels) == (10, 8, 1)
    assert info.class_names == tuple("0123456789")
    sizes = (info.train_examples, info.validation_examples, info.test_examples)
    assert sizes == (1294, 144, 359) and sum(sizes) == 1797
    example = digits.test[5]
    assert example["image"].shape == (8, 8, 1) and example["image"].dtype == np.uint8
    assert isinstance(example["label"], int)
    images, _ = everything(digits.train)
    assert images.min() == 0 and images.max() == 255


def test_parts_share_no_image(digits):
    held = [np.sort(part._positions) for part in (digits.train, digits.validation, digits.test)]
    assert np.array_equal(np.sort(np.concatenate(held)), np.arange(1797))


def test_a_larger_validation_part_contains_the_smaller(digits):
    larger = load_dataset(DataConfig(validation_fraction=0.3)).validation
    assert np.array_equal(larger._positions[: len(digits.validation)], digits.validation._positions)


def test_no_validation_part():
    dataset = load_dataset(DataConfig(validation_fraction=0.0))
    assert dataset.validation is None and dataset.info.validation_examples == 0
    assert len(dataset.train) == 1438
    with pytest.raises(ValueError, match="validation_fraction is 0"):
        dataset.part("validation")
    with pytest.raises(ValueError, match="'train', 'validation' or 'test'"):
        dataset.part("eval")


def test_train_examples_takes_the_first(digits):
    subset = load_dataset(DataConfig(train_examples=100))
    assert len(subset.train) == subset.info.train_examples == 100
    assert np.array_equal(subset.train._positions, digits.train._positions[:100])
    assert np.array_equal(subset.validation._positions, digits.validation._positions)
    with pytest.raises(ValueError, match="1294 in the training part"):
        load_dataset(DataConfig(train_examples=1295))


def test_other_image_sizes():
    dataset = load_dataset(DataConfig(image_size=12))
    assert dataset.info.image_size == 12
    assert dataset.test[0]["image"].shape == (12, 12, 1)
    with pytest.raises(ValueError, match="smaller than the image size 8 of digits"):
        load_dataset(DataConfig(eval_resize=6))
