"""Batches: deterministic, resumable, complete, the same however they are made."""

import dataclasses
import itertools

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from adderflax.data import (
    AugmentConfig,
    DataConfig,
    evaluation_batches,
    load_dataset,
    train_iterator,
)

PLAIN = AugmentConfig(crop_padding=1, flip=True)
PER_IMAGE = AugmentConfig(random_resized_crop=True, randaugment_layers=2)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


def training(dataset, augment=PLAIN, data=None, **options):
    data = data or DataConfig()
    return train_iterator(dataset, data, augment, **({"batch_size": 8, "seed": 0} | options))


@pytest.fixture(scope="module", params=["in memory", "per image", "varying sizes"])
def case(request, digits, fixed_size_set, varying_size_set):
    """A set with the kind of pipeline that serves it."""
    if request.param == "in memory":
        return digits, PLAIN, DataConfig()
    if request.param == "per image":
        return load_dataset(fixed_size_set), PER_IMAGE, fixed_size_set
    return load_dataset(varying_size_set), PER_IMAGE, varying_size_set


def test_batches_have_the_promised_form(case):
    dataset, augment, data = case
    batch = next(training(dataset, augment, data))
    size, channels = dataset.info.image_size, dataset.info.channels
    assert batch.keys() == {"image", "label", "index"}
    assert batch["image"].shape == (8, size, size, channels)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].shape == batch["index"].shape == (8,)
    assert batch["label"].dtype == batch["index"].dtype == np.int32
    labels = [dataset.train[index]["label"] for index in batch["index"]]
    np.testing.assert_array_equal(batch["label"], labels)


def test_same_seed_same_batches(case):
    dataset, augment, data = case
    first, again, other = (take(training(dataset, augment, data, seed=seed), 4) for seed in (7, 7, 8))
    assert_same(first, again)
    assert not np.array_equal(first[0]["index"], other[0]["index"])


def test_resume_in_the_middle_of_an_epoch(case):
    dataset, augment, data = case
    iterator = training(dataset, augment, data)
    take(iterator, 3)
    state = iterator.get_state()
    expected = take(iterator, 6)
    resumed = training(dataset, augment, data)
    resumed.set_state(state)
    assert_same(take(resumed, 6), expected)


def test_resume_through_a_checkpoint(tmp_path, case):
    dataset, augment, data = case
    iterator = training(dataset, augment, data)
    take(iterator, 2)
    with ocp.CheckpointManager(tmp_path) as manager:
        args = ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator))
        manager.save(2, args=args)
        manager.wait_until_finished()
        expected = take(iterator, 2)
        resumed = training(dataset, augment, data)
        args = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed))
        manager.restore(2, args=args)
    assert_same(take(resumed, 2), expected)


def test_each_epoch_holds_each_image_once_in_a_new_order(case):
    dataset, augment, data = case
    count, batch_size = len(dataset.train), 7
    assert count % batch_size
    epochs = 3
    batches = take(training(dataset, augment, data, batch_size=batch_size), -(-epochs * count // batch_size))
    indices = np.concatenate([batch["index"] for batch in batches])[: epochs * count]
    orders = indices.reshape(epochs, count)
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(count))
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])


def test_images_come_with_their_labels(digits):
    for batch in take(training(digits), 3):
        for image, index in zip(batch["image"], batch["index"]):
            np.testing.assert_array_equal(image, digits.train[index]["image"])


def test_augmentation_differs_between_epochs(fixed_size_set):
    dataset = load_dataset(fixed_size_set)
    batches = take(training(dataset, PER_IMAGE, batch_size=37), 2)
    first, second = (batch["image"][np.argsort(batch["index"])] for batch in batches)
    assert (first != second).any((1, 2, 3)).mean() > 0.9


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batch(case, processes):
    dataset, augment, data = case
    whole = take(training(dataset, augment, data), 6)
    shares = [
        take(training(dataset, augment, data, process_index=index, process_count=processes), 6)
        for index in range(processes)
    ]
    for batch, *parts in zip(whole, *shares):
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([part[key] for part in parts]))


@pytest.mark.parametrize("resized", [{}, {"image_size": 16}, {"image_size": 6, "eval_resize": 8}])
def test_held_in_memory_or_not_makes_no_difference(fixed_size_set, resized):
    fixed_size_set = dataclasses.replace(fixed_size_set, **resized)
    held = load_dataset(fixed_size_set)
    read = load_dataset(dataclasses.replace(fixed_size_set, cache=False))
    assert held.train.in_memory and not read.train.in_memory
    for augment in (PLAIN, PER_IMAGE):
        assert_same(take(training(held, augment), 6), take(training(read, augment), 6))
    assert_same(
        list(evaluation_batches(held, "test", fixed_size_set, batch_size=4)),
        list(evaluation_batches(read, "test", fixed_size_set, batch_size=4)),
    )


def test_workers_make_the_same_batches_and_the_same_state(varying_size_set):
    dataset = load_dataset(varying_size_set)
    expected = take(training(dataset, PER_IMAGE), 5)
    working = dataclasses.replace(varying_size_set, workers=1)
    iterator = training(dataset, PER_IMAGE, working)
    try:
        assert_same(take(iterator, 2), expected[:2])
        # The state fits any number of workers: here it goes on with none.
        resumed = training(dataset, PER_IMAGE)
        resumed.set_state(iterator.get_state())
        assert_same(take(resumed, 3), expected[2:])
        iterator.set_state({"next_index": 4})
        assert_same(take(iterator, 1), expected[4:])
    finally:
        iterator.close()


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_evaluation_sees_every_image_once(case, part, batch_size):
    dataset, _, data = case
    source = dataset.part(part)
    batches = list(evaluation_batches(dataset, part, data, batch_size=batch_size))
    assert len(batches) == -(-len(source) // batch_size)
    size, channels = dataset.info.image_size, dataset.info.channels
    for batch in batches:
        assert batch["image"].shape == (batch_size, size, size, channels)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32 and batch["weight"].dtype == np.float32
    images, labels, weights = (
        np.concatenate([batch[key] for batch in batches]) for key in ("image", "label", "weight")
    )
    count = len(source)
    np.testing.assert_array_equal(weights, np.arange(len(weights)) < count)
    assert not images[count:].any() and not labels[count:].any()
    for index in range(count):
        np.testing.assert_array_equal(images[index], source[index]["image"])
        assert labels[index] == source[index]["label"]


def test_evaluation_is_shared_by_processes(case):
    dataset, _, data = case
    whole = list(evaluation_batches(dataset, "test", data, batch_size=8))
    halves = [
        list(evaluation_batches(dataset, "test", data, batch_size=8, process_index=index, process_count=2))
        for index in range(2)
    ]
    for batch, *parts in zip(whole, *halves, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([part[key] for part in parts]))


def test_evaluation_does_not_spoil_the_images_in_memory(digits):
    before = digits.test.gather(np.arange(len(digits.test)))[0].copy()
    list(evaluation_batches(digits, "test", DataConfig(), batch_size=64))
    np.testing.assert_array_equal(digits.test.gather(np.arange(len(digits.test)))[0], before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 1295}, "larger than the training part of digits, which has 1294"),
        ({"batch_size": 0}, "at least one image"),
        ({"process_count": 3}, "choose a multiple of 3"),
        ({"process_index": 2, "process_count": 2}, "one of the processes"),
        ({"seed": -1}, "0 to 2"),
        ({"seed": 2**32}, "0 to 2"),
    ],
)
def test_impossible_batches_are_refused(digits, options, message):
    with pytest.raises(ValueError, match=message):
        training(digits, **options)


def test_impossible_evaluations_are_refused_at_once(digits):
    with pytest.raises(ValueError, match="no part"):
        evaluation_batches(digits, "eval", DataConfig(), batch_size=8)
    with pytest.raises(ValueError, match="multiple of 3"):
        evaluation_batches(digits, "test", DataConfig(), batch_size=8, process_count=3)


def test_a_batch_may_be_the_whole_training_part():
    one = load_dataset(DataConfig(train_examples=1))
    assert [batch["index"].tolist() for batch in take(training(one, batch_size=1), 3)] == [[0]] * 3
