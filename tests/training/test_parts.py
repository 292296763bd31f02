"""Checkpoints, metrics, the workdir and the mesh, each on its own."""

import errno
import json
import shutil
import struct

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from adderflax.training import checkpoints, divergence, environment, sharding, workdir
from adderflax.training.checkpoints import Checkpointer
from adderflax.training.config import ConfigError
from adderflax.training.metrics import MetricsWriter, read_metrics
from adderflax.training.restore import config_here
from adderflax.training.steplog import DivergenceError
from adderflax.training.workdir import WorkdirError


def batches():
    return iter(grain.MapDataset.range(100).shuffle(seed=3).repeat().to_iter_dataset())


def kept(path):
    return sorted(int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdigit())


def test_the_newest_and_the_best_are_kept(tmp_path):
    accuracies = {2: 0.1, 4: 0.9, 6: 0.3, 8: 0.5}
    with Checkpointer(tmp_path, keep_latest=2) as checkpointer:
        assert checkpointer.latest_step is None and checkpointer.best_step is None
        for step in range(1, 9):
            metrics = {"validation_accuracy": accuracies[step]} if step in accuracies else None
            checkpointer.save(step, {"w": jnp.full(3, step)}, batches(), metrics)
        checkpointer.wait()
        assert (checkpointer.latest_step, checkpointer.best_step) == (8, 4)
    assert kept(tmp_path) == [4, 7, 8]
    # The next process knows it from the checkpoints.
    with Checkpointer(tmp_path, keep_latest=2) as checkpointer:
        assert (checkpointer.latest_step, checkpointer.best_step) == (8, 4)
        checkpointer.save(9, {"w": jnp.zeros(3)}, batches(), {"validation_accuracy": 0.6})
    assert kept(tmp_path) == [4, 8, 9]


def test_a_checkpoint_older_than_a_field_of_the_state(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.arange(3), "average": None}, batches(), None)
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        state = {"w": jnp.zeros(3, jnp.int32), "average": None}
        restored = checkpointer.restore_state(state | {"younger": None})
        assert restored.pop("younger") is None and restored.pop("average") is None
        np.testing.assert_array_equal(restored["w"], jnp.arange(3))
        with pytest.raises(WorkdirError, match="does not fit the model that config.json .* younger"):
            checkpointer.restore_state(state | {"younger": jnp.zeros(3)})


def test_a_reader_warns_of_nothing_and_leaves_the_verbosity(tmp_path, caplog):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.zeros(3)}, batches(), None)
    caplog.clear()
    logging.set_verbosity(logging.WARNING)  # absl's default, which commands change
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        checkpointer.restore_state({"w": jnp.zeros(3)})
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []
    assert logging.get_verbosity() == logging.WARNING


def test_without_validation_the_newest_are_kept(tmp_path):
    with Checkpointer(tmp_path, keep_latest=2) as checkpointer:
        for step in range(1, 5):
            checkpointer.save(step, {"w": jnp.zeros(1)}, batches(), None)
    assert kept(tmp_path) == [3, 4]


def test_state_and_iterator_come_back_together(tmp_path):
    data, key = batches(), jax.random.key(7)
    state = {"w": jnp.arange(3.0), "key": key, "none": None}
    for _ in range(5):
        next(data)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, state, data, None)
        upcoming = [int(next(data)) for _ in range(3)]
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    again = batches()
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        restored = checkpointer.restore(target, again)
    np.testing.assert_array_equal(restored["w"], state["w"])
    assert restored["none"] is None
    assert jax.random.bits(restored["key"]) == jax.random.bits(key)
    assert [int(next(again)) for _ in range(3)] == upcoming


def test_a_checkpoint_that_is_removed_meanwhile_is_told(tmp_path, monkeypatch):
    state = {"w": jnp.arange(3)}
    with Checkpointer(tmp_path, keep_latest=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, batches(), None)
    # While the second one is looked at, the run that goes on removes it.
    looked = checkpoints.find_damage

    def look(checkpoint):
        if checkpoint.name == "2":
            shutil.rmtree(checkpoint)
        return looked(checkpoint)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "find_damage", look)
        with Checkpointer(tmp_path, read_only=True) as checkpointer:
            assert checkpointer.latest_step == 1
            shutil.rmtree(tmp_path / "checkpoints" / "1")
            with pytest.raises(WorkdirError, match="Checkpoint 1 .* is not whole any more: .* again takes a"):
                checkpointer.restore_state(state)


@pytest.mark.parametrize("index", [0, 1])
def test_processes_use_the_checkpoints_that_the_first_one_sees(tmp_path, monkeypatch, index):
    """Another host may not see the newest one yet, or still see one that was removed."""
    with Checkpointer(tmp_path, keep_latest=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": jnp.arange(3)}, batches(), None)
    told = iter([2, [2, 1], 0, 1, [2]] if index else [])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    shapes = []

    def broadcast(own):
        shapes.append(np.shape(own))
        return np.asarray(next(told)) if index else np.asarray(own)

    monkeypatch.setattr(checkpoints.multihost_utils, "broadcast_one_to_all", broadcast)
    monkeypatch.setattr(checkpoints.multihost_utils, "sync_global_devices", lambda name: None)
    opened = object.__new__(Checkpointer)
    opened._workdir, opened._directory = tmp_path, tmp_path / "checkpoints"
    if index:
        shutil.rmtree(tmp_path / "checkpoints" / "1")
    found = opened._usable_steps(read_only=True)
    assert found == ([2] if index else [2, 1])
    # Of equal shapes in both, or a collective would wait forever.
    assert shapes == ([(), (2,), (), (), (1,)] if index else [(), (2,), (), (), (2,)])


def test_reading_leaves_a_save_in_progress_alone(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.zeros(1)}, batches(), None)
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-0"
    unfinished.mkdir()
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert checkpointer.latest_step == 1
    assert unfinished.exists()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, {"w": jnp.zeros(1)}, batches(), None)
    assert not unfinished.exists() and kept(tmp_path) == [1, 2]


def test_log_is_cut_back_to_the_restored_step(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        for step in (10, 20, 30):
            writer.write(step, train_loss=1.0 / step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "train_lo')  # killed while writing
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30]
    with MetricsWriter(tmp_path, 20) as writer:
        writer.write(30, train_loss=0.5)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 10, "train_loss": 0.1},
        {"step": 20, "train_loss": 0.05},
        {"step": 30, "train_loss": 0.5},
    ]


def events(path):
    """What TensorBoard would read: (step, figures) of each event with figures."""
    (file,) = (path / "tensorboard").iterdir()
    content, found = file.read_bytes(), []
    while content:
        size = struct.unpack_from("Q", content)[0]
        event = Event.FromString(content[12 : 12 + size])
        found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
        content = content[16 + size :]
    return [(step, figures) for step, figures in found if figures]


def test_a_byte_that_is_no_text_costs_a_line_at_most(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, loss=2.0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "x\xff')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    (tmp_path / "environment.json").write_bytes(b"[\xff]")
    assert environment.read_starts(tmp_path) == []
    environment.record_start(tmp_path, 1)
    assert [entry["step"] for entry in environment.read_starts(tmp_path)] == [1]


def test_an_error_without_a_word_has_a_name():
    assert workdir.first_line(AssertionError()) == "AssertionError"
    assert workdir.first_line(ValueError("one\ntwo")) == "one"


def test_figures_are_in_both_files_before_a_kill_can_come(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, train_loss=0.5, train_accuracy=0.25)
    assert events(tmp_path) == [(1, {"train_loss": 0.5, "train_accuracy": 0.25})]
    assert read_metrics(tmp_path) == [{"step": 1, "train_loss": 0.5, "train_accuracy": 0.25}]


def test_events_that_find_no_room_stop_the_run(tmp_path, monkeypatch):
    """On a full disk a short line may still find room where an event does not."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WorkdirError, match="No space left.*same command"), workdir.writing(tmp_path):
        writer = MetricsWriter(tmp_path, 0)
        monkeypatch.setattr(RecordWriter, "flush", full)
        writer.write(1, train_loss=0.5)


def test_the_first_process_writes_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    environment.record_start(tmp_path, 0)
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, train_loss=0.5)
    divergence.explain(DivergenceError("Update 1 is not finite.", step=1), tmp_path, lambda batch: "")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_without_a_word_is_named(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)

    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr(checkpointer._manager, "save", fail)
    with pytest.raises(WorkdirError, match="Checkpoint 1 could not be written .*: AssertionError. The run"):
        checkpointer.save(1, {"w": jnp.zeros(1)}, batches(), None)


CONFIG = {"seed": 0, "log_every": 5, "total_steps": 10, "data": {"name": "digits", "data_dir": None}}


def begin(path, config):
    """A workdir with a checkpoint."""
    workdir.open_workdir(path, config)
    (path / "checkpoints" / "2").mkdir(parents=True)
    workdir.write_config(path, config)


def test_workdir_without_a_checkpoint_takes_any_run(tmp_path):
    """A first command with a mistake in it can be corrected."""
    workdir.write_config(tmp_path, CONFIG)
    (tmp_path / "checkpoints").mkdir()
    workdir.open_workdir(tmp_path, CONFIG | {"seed": 1})
    # What may still be refused, for its data set, changes nothing.
    assert workdir.read_config(tmp_path) == CONFIG


def test_workdir_accepts_its_own_run_with_other_paths(tmp_path):
    begin(tmp_path, CONFIG)
    moved = CONFIG | {"log_every": 7, "data": {"name": "digits", "data_dir": "/elsewhere"}}
    workdir.open_workdir(tmp_path, moved)
    # What may still be refused, for its number of steps, changes nothing.
    assert workdir.read_config(tmp_path) == CONFIG
    workdir.write_config(tmp_path, moved)
    assert workdir.read_config(tmp_path) == moved


def test_workdir_names_every_differing_field(tmp_path):
    begin(tmp_path, CONFIG)
    other = CONFIG | {"seed": 1, "data": {"name": "mnist", "data_dir": None}}
    message = r"data.name \('digits' there, 'mnist' now\); seed \(0 there, 1 now\)"
    with pytest.raises(WorkdirError, match=message) as caught:
        workdir.open_workdir(tmp_path, other)
    assert "--extend" not in str(caught.value)
    assert workdir.read_config(tmp_path) == CONFIG


def test_fields_younger_than_the_workdir_had_their_defaults(tmp_path):
    begin(tmp_path, CONFIG)
    younger = CONFIG | {"clip": 1.0, "data": CONFIG["data"] | {"sizes": (8, 9)}}
    defaults = {"seed": 5, "clip": 1.0, "data": {"name": "mnist", "sizes": (8, 9)}}
    with pytest.raises(WorkdirError, match=r"configuration: clip \(no such field there, 1.0 now\)"):
        workdir.open_workdir(tmp_path, younger)
    with pytest.raises(WorkdirError, match=r"configuration: clip \(1.0 there, 2.0 now\)\. "):
        workdir.open_workdir(tmp_path, younger | {"clip": 2.0}, defaults=defaults)
    workdir.write_config(workdir.open_workdir(tmp_path, younger, defaults=defaults), younger)
    with pytest.raises(
        WorkdirError, match=r"configuration: clip \(1.0 there, no such field now\); data.sizes"
    ):
        workdir.open_workdir(tmp_path, CONFIG, defaults=defaults)
    gone = {name: value for name, value in younger.items() if name != "seed"}
    # A field that exists no more, neither here nor there, is not filled in from the defaults.
    begin(tmp_path / "other", gone)
    workdir.open_workdir(tmp_path / "other", gone, defaults=defaults)


def test_the_cache_decides_the_order_of_tfrecord_files(tmp_path):
    data = CONFIG["data"] | {"cache": None}
    begin(tmp_path / "array_record", CONFIG | {"data": data})
    workdir.open_workdir(tmp_path / "array_record", CONFIG | {"data": data | {"cache": False}})
    data |= {"backend": "tfrecord"}
    begin(tmp_path / "tfrecord", CONFIG | {"data": data})
    with pytest.raises(WorkdirError, match=r"data.cache \(None there, False now\)"):
        workdir.open_workdir(tmp_path / "tfrecord", CONFIG | {"data": data | {"cache": False}})


def test_a_second_writer_in_the_same_process_is_refused(tmp_path):
    """Locks of a process do not stop itself, and end where it closes the file once."""
    (tmp_path / "link").symlink_to(tmp_path)
    with workdir.writing(tmp_path):
        with pytest.raises(WorkdirError, match="being written by this process.*--workdir"):
            with workdir.writing(tmp_path / "link"):
                pass
    with workdir.writing(tmp_path):
        pass


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for path in (tmp_path, tmp_path / "runs" / "new"):
        with pytest.raises(KeyboardInterrupt), workdir.writing(path):
            raise KeyboardInterrupt
        assert [entry.name for entry in tmp_path.iterdir()] == ["notes"]
    with pytest.raises(KeyboardInterrupt), workdir.writing(tmp_path / "runs" / "new") as path:
        workdir.write_config(path, CONFIG)
        raise KeyboardInterrupt
    assert [entry.name for entry in path.iterdir()] == ["config.json"]
    (path / "lock").touch()  # what was there before the writer stays
    with pytest.raises(KeyboardInterrupt), workdir.writing(path):
        raise KeyboardInterrupt
    assert sorted(entry.name for entry in path.iterdir()) == ["config.json", "lock"]


def test_a_lock_that_was_removed_locks_nothing(tmp_path, monkeypatch):
    def lock(file, how):
        (tmp_path / "lock").unlink()  # as a writer does that fails between the opening and the locking

    monkeypatch.setattr(workdir.fcntl, "lockf", lock)
    with pytest.raises(WorkdirError, match="being written by another process"):
        with workdir.writing(tmp_path):
            pass


def test_workdir_is_extended_on_request_only(tmp_path):
    begin(tmp_path, CONFIG)
    longer = CONFIG | {"total_steps": 20}
    with pytest.raises(WorkdirError, match=r"total_steps \(10 there, 20 now\).*add --extend"):
        workdir.open_workdir(tmp_path, longer)
    workdir.write_config(workdir.open_workdir(tmp_path, longer, extend=True), longer)
    with pytest.raises(WorkdirError, match="seed"):
        workdir.open_workdir(tmp_path, longer | {"seed": 4}, extend=True)
    with pytest.raises(WorkdirError, match=r"seed \(0 there, 4 now\); total_steps") as caught:
        workdir.open_workdir(tmp_path, longer | {"seed": 4, "total_steps": 30})
    assert "--extend" not in str(caught.value)  # which would not help


def test_checkpoints_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(WorkdirError, match="has checkpoints but no config.json"):
        begin(tmp_path, CONFIG)


def test_damaged_config_is_named(tmp_path):
    begin(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WorkdirError, match="config.json cannot be read.*Put back a copy"):
        begin(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("[3]")
    with pytest.raises(WorkdirError, match="config.json cannot be read: it holds a list where named values"):
        workdir.read_config(tmp_path)
    for text, told in (
        ("null", "it holds a NoneType"),
        ('{"shape": 3}', "unexpected keyword argument 'shape'"),
    ):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(WorkdirError, match=f"dataset.json cannot be read: .*{told}.*Put back a copy"):
            workdir.read_info(tmp_path)
    (tmp_path / "config.json").write_text('{"model": null}')
    with pytest.raises(ConfigError, match="model=None in .*config.json must hold named fields"):
        config_here(tmp_path)


def test_batches_are_split_over_the_devices():
    mesh = sharding.make_mesh()
    batch = sharding.put_batch({"image": np.arange(8).reshape(4, 2)}, mesh)["image"]
    assert [shard.data.shape for shard in batch.addressable_shards] == [(2, 2), (2, 2)]


@pytest.mark.parametrize(("batch_size", "parts", "proposal"), [(9, 1, 8), (6, 2, 8), (1, 1, 2), (0, 1, 2)])
def test_a_batch_that_does_not_divide(batch_size, parts, proposal):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} .*--config.batch_size={proposal}"):
        sharding.require_divisible(batch_size, sharding.make_mesh(), parts)
    sharding.require_divisible(proposal, sharding.make_mesh(), parts)
