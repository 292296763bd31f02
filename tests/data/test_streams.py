"""TFRecord data: read front to back, every image once an epoch, resumed where it was."""

import concurrent.futures.thread
import dataclasses
import json
import threading

import numpy as np
import pytest
from prepared_sets import pictures, write_set

from adderflax.data import AugmentConfig, DataConfig, DatasetNotReadyError, load_dataset
from adderflax.data import evaluation_batches as evaluation
from adderflax.data import train_iterator as training

pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """One set of images of many sizes in both formats, in four files each: 23 to train on, 7 to test on."""
    shapes = [(20 + 3 * number, 60 - 2 * number, 3) for number in range(23)]
    train = [(pictures(1, shape, "jpeg", seed=n)[0][0], n % 10) for n, shape in enumerate(shapes)]
    splits = {"train": train, "validation": pictures(7, (50, 40, 3), "jpeg", seed=1)}
    found = {}
    for backend in ("array_record", "tfrecord"):
        directory = tmp_path_factory.mktemp(backend)
        write_set(directory, splits, shape=(None, None, 3), file_format=backend, shards=4)
        found[backend] = DataConfig(
            "written", str(directory), backend, image_size=16, validation_fraction=0.0
        )
    return found


_opened = []


@pytest.fixture(autouse=True)
def closed():
    """Ends the threads of what a test has opened."""
    yield
    while _opened:
        _opened.pop().close()


def batches(data, seed=0, size=5, state=None, augment=None, **process):
    iterator = training(
        load_dataset(data), data, augment or AugmentConfig(), batch_size=size, seed=seed, **process
    )
    _opened.append(iterator)
    if state:
        iterator.set_state(state)
    return iterator


def indices(iterator, count):
    return np.concatenate([next(iterator)["index"] for _ in range(count)])


def test_every_image_once_an_epoch_in_another_order(sets):
    order = indices(batches(sets["tfrecord"]), 23)  # five epochs of 23 in batches of five
    epochs = order.reshape(5, 23)
    assert (np.sort(epochs, axis=1) == np.arange(23)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 5 and (epochs[0] != np.arange(23)).any()
    assert (indices(batches(sets["tfrecord"], seed=1), 4) != order[:20]).any()
    batch = next(batches(sets["tfrecord"]))
    # The position is that in the split, whichever file it came from.
    assert (batch["label"] == batch["index"] % 10).all() and (batch["index"] == order[:5]).all()


@pytest.mark.parametrize("taken", [3, 7])  # in the first epoch, and in the second
def test_resume_gives_the_batches_that_would_have_come(sets, taken):
    augment = AugmentConfig(random_resized_crop=True, randaugment_layers=1)
    whole = batches(sets["tfrecord"], augment=augment)
    for _ in range(taken):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))
    resumed = batches(sets["tfrecord"], augment=augment, state=state)
    for _ in range(6):
        expected, found = next(whole), next(resumed)
        for name in expected:
            np.testing.assert_array_equal(expected[name], found[name])
    assert whole.get_state() == resumed.get_state()


def test_batches_do_not_wait_for_the_lock_of_executors(sets):
    """A forgotten iterator is closed by the garbage collector, perhaps while that lock is held."""
    iterator = batches(sets["tfrecord"], size=5)
    next(iterator)  # whatever starts threads of its own has started them

    def take_and_close():
        indices(iterator, 6)  # more than are prepared ahead
        iterator.close()

    with concurrent.futures.thread._global_shutdown_lock:
        taker = threading.Thread(target=take_and_close, daemon=True)
        taker.start()
        taker.join(30.0)
        assert not taker.is_alive()


def test_processes_share_the_images(sets):
    data = dataclasses.replace(sets["tfrecord"], train_examples=22)
    parts = [indices(batches(data, size=22, process_index=n, process_count=2), 2) for n in (0, 1)]
    assert [len(part) for part in parts] == [22, 22]
    assert sorted(parts[0][:11]) == list(range(11)) and sorted(parts[1][11:]) == list(range(11, 22))


@pytest.mark.parametrize("part", ["test", "validation"])
def test_evaluation_shows_every_image_once(sets, part):
    data = dataclasses.replace(sets["tfrecord"], validation_fraction=0.3)
    dataset = load_dataset(data)
    assert len(dataset.part(part)) == 7 and len(dataset.train) == 16
    alone = list(evaluation(dataset, part, data, batch_size=4))
    assert [batch["weight"].tolist() for batch in alone] == [[1] * 4, [1, 1, 1, 0]]
    shared = [
        list(evaluation(dataset, part, data, batch_size=4, process_index=n, process_count=2)) for n in (0, 1)
    ]
    assert [len(batches) for batches in shared] == [2, 2]
    real = {
        name: np.concatenate([batch[name][batch["weight"] > 0] for batch in [*shared[0], *shared[1]]])
        for name in ("image", "label")
    }
    for name, values in real.items():
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in alone])[:7], values)
    for number in (0, 6):  # by random access, which reads the files up to there
        example = dataset.part(part)[number]
        assert example["label"] == real["label"][number]
        np.testing.assert_array_equal(example["image"], real["image"][number])


def test_a_set_in_memory_is_as_with_array_record(tmp_path):
    examples = pictures(30, (8, 8, 3), "png")
    found = []
    for backend in ("array_record", "tfrecord"):
        splits = {"train": examples, "test": examples[:9]}
        write_set(tmp_path / backend, splits, shape=(8, 8, 3), file_format=backend, shards=2)
        data = DataConfig("written", str(tmp_path / backend), backend, validation_fraction=0.2)
        found.append(next(batches(data, size=24)))
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name])


def test_what_is_not_there_is_said(sets, tmp_path):
    other = dataclasses.replace(sets["array_record"], backend="tfrecord")
    with pytest.raises(DatasetNotReadyError, match="no TFRecord files are in .*leave data.backend"):
        load_dataset(other)
    with pytest.raises(DatasetNotReadyError, match="no TFRecord files are in .*tfds build mnist --data_dir"):
        load_dataset(DataConfig("mnist", str(tmp_path), "tfrecord"))
    with pytest.raises(ValueError, match="data.backend must be 'array_record' or 'tfrecord', not 'TFRecord'"):
        DataConfig(backend="TFRecord")
