"""Checkpoints, metrics, the workdir and the mesh, each on its own."""

import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adderflax.training import sharding, workdir
from adderflax.training.checkpoints import Checkpointer
from adderflax.training.metrics import MetricsWriter, read_metrics
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


CONFIG = {"seed": 0, "log_every": 5, "total_steps": 10, "data": {"name": "digits", "data_dir": None}}


def begin(path, config):
    """A workdir with a checkpoint."""
    workdir.open_workdir(path, config)
    (path / "checkpoints" / "2").mkdir(parents=True)


def test_workdir_without_a_checkpoint_takes_any_run(tmp_path):
    """A first command with a mistake in it can be corrected."""
    workdir.open_workdir(tmp_path, CONFIG)
    (tmp_path / "checkpoints").mkdir()
    workdir.open_workdir(tmp_path, CONFIG | {"seed": 1})
    assert workdir.read_config(tmp_path)["seed"] == 1


def test_workdir_accepts_its_own_run_with_other_paths(tmp_path):
    begin(tmp_path, CONFIG)
    moved = CONFIG | {"log_every": 7, "data": {"name": "digits", "data_dir": "/elsewhere"}}
    workdir.open_workdir(tmp_path, moved)
    assert workdir.read_config(tmp_path) == moved


def test_workdir_names_every_differing_field(tmp_path):
    begin(tmp_path, CONFIG)
    other = CONFIG | {"seed": 1, "data": {"name": "mnist", "data_dir": None}}
    message = r"data.name \('digits' there, 'mnist' now\); seed \(0 there, 1 now\)"
    with pytest.raises(WorkdirError, match=message) as caught:
        workdir.open_workdir(tmp_path, other)
    assert "--extend" not in str(caught.value)
    assert workdir.read_config(tmp_path) == CONFIG


def test_workdir_is_extended_on_request_only(tmp_path):
    begin(tmp_path, CONFIG)
    longer = CONFIG | {"total_steps": 20}
    with pytest.raises(WorkdirError, match=r"total_steps \(10 there, 20 now\).*add --extend"):
        workdir.open_workdir(tmp_path, longer)
    workdir.open_workdir(tmp_path, longer, extend=True)
    with pytest.raises(WorkdirError, match="seed"):
        workdir.open_workdir(tmp_path, longer | {"seed": 4}, extend=True)


def test_checkpoints_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(WorkdirError, match="has checkpoints but no config.json"):
        begin(tmp_path, CONFIG)


def test_damaged_config_is_named(tmp_path):
    begin(tmp_path, CONFIG)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WorkdirError, match="config.json cannot be read"):
        begin(tmp_path, CONFIG)


def test_batches_are_split_over_the_devices():
    mesh = sharding.make_mesh()
    batch = sharding.put_batch({"image": np.arange(8).reshape(4, 2)}, mesh)["image"]
    assert [shard.data.shape for shard in batch.addressable_shards] == [(2, 2), (2, 2)]


@pytest.mark.parametrize(("batch_size", "parts", "proposal"), [(9, 1, 8), (6, 2, 8), (1, 1, 2), (0, 1, 2)])
def test_a_batch_that_does_not_divide(batch_size, parts, proposal):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} .*--config.batch_size={proposal}"):
        sharding.require_divisible(batch_size, sharding.make_mesh(), parts)
    sharding.require_divisible(proposal, sharding.make_mesh(), parts)
