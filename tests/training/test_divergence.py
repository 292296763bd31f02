"""Updates that are not finite: left out as often as allowed, then explained, and nothing of them is saved."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_trainer import small_config

from adderflax.training import divergence, sharding, update
from adderflax.training.metrics import read_metrics
from adderflax.training.optimizer import make_optimizer
from adderflax.training.steplog import DivergenceError
from adderflax.training.trainer import Trainer, evaluate, train
from adderflax.training.workdir import WorkdirError


@pytest.fixture
def poisoned(monkeypatch):
    """Batches 3 and 5 of `small_config` have an image that is not finite."""
    batches = Trainer(small_config()).train_batches()
    sums = [int(next(batches)["image"].astype(int).sum()) for _ in range(6)]
    batches.close()
    augment = update.augment_batch

    def augment_batch(key, images, labels, **keywords):
        total = jnp.sum(images.astype(jnp.int32))
        bad = (total == sums[2]) | (total == sums[4])
        images, targets = augment(key, images, labels, **keywords)
        return images.at[7].multiply(jnp.where(bad, jnp.inf, 1.0)), targets

    monkeypatch.setattr(update, "augment_batch", augment_batch)


def state_of(run, steps):
    """The state after so many updates, and the figures of the last one."""
    batches = run.train_batches()
    state = run.new_state()
    for _ in range(steps):
        state, metrics = run.train_step(state, sharding.put_batch(next(batches), run.mesh))
    batches.close()
    return jax.device_get((state, metrics))


def test_an_update_that_is_not_finite_changes_nothing(poisoned):
    run = Trainer(small_config(skip_nonfinite_steps=1))
    before, _ = state_of(run, 2)
    after, metrics = state_of(run, 3)
    assert not np.isfinite(metrics["loss"]) and metrics["skipped"] == after.skipped == 1
    assert (before.step, after.step) == (2, 3)
    for part in ("params", "opt_state", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, part), getattr(after, part))
    going_on, figures = state_of(run, 4)
    # The schedule counts the updates that were made: this is the third of them.
    rate = make_optimizer(run.config.optimizer, run.total_steps)[1]
    np.testing.assert_allclose(figures["learning_rate"], rate(2), rtol=1e-6)
    assert rate(2) != rate(3)
    assert going_on.step == 4 and not jax.tree.all(
        jax.tree.map(np.array_equal, going_on.params, after.params)
    )
    # One more than allowed: the state stays as it was before that update, whatever follows.
    stopped, metrics = state_of(run, 6)
    assert stopped.step == 4 and metrics["skipped"] == 2
    jax.tree.map(np.testing.assert_array_equal, stopped.params, going_on.params)


def test_parameters_that_an_update_would_break_are_left_as_they_are():
    rate = {"optimizer.learning_rate": 1e38, "optimizer.warmup_fraction": 0.0}
    run = Trainer(small_config(skip_nonfinite_steps=1, **rate))
    after, metrics = state_of(run, 1)
    assert np.isfinite(metrics["loss"] + metrics["gradient_norm"]) and not np.isfinite(
        metrics["parameter_norm"]
    )
    assert not metrics["finite"] and metrics["skipped"] == after.skipped == 1 and after.step == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, jax.device_get(run.new_state().params))


def test_stops_explains_and_keeps_the_last_good_checkpoint(poisoned, tmp_path, capsys):
    message = (
        "Update 3 is not finite: .*loss nan.* The augmented images themselves are not finite. It was computed"
        " on training examples .* and 24 more.*skip_nonfinite_steps"
    )
    with pytest.raises(DivergenceError, match=message):
        train(small_config(), tmp_path, progress=False)
    report = json.loads((tmp_path / "divergence.json").read_text())
    assert report["step"] == 3 and len(report["indices"]) == 32
    assert evaluate(tmp_path)["steps"] == 2

    # The same directory goes on where one such update is allowed, and counts over the interruption.
    with pytest.raises(DivergenceError, match="Update 5 is not finite"):
        train(small_config(skip_nonfinite_steps=1), tmp_path, progress=False)
    assert evaluate(tmp_path)["steps"] == 4
    # Nor does it go on where fewer are allowed than were left out: it would leave out all that follow.
    with pytest.raises(
        WorkdirError, match="left out 1 updates .* Go on with --config.skip_nonfinite_steps=1"
    ):
        train(small_config(), tmp_path, progress=False)
    assert "Update 3 is not finite" in capsys.readouterr().out
    assert train(small_config(skip_nonfinite_steps=2), tmp_path, progress=False)["steps"] == 6
    log = [line for line in read_metrics(tmp_path) if "skipped_updates" in line]
    assert log == [{"step": 3, "skipped_updates": 1}, {"step": 5, "skipped_updates": 2}]
    losses = [line["step"] for line in read_metrics(tmp_path) if "train_loss" in line]
    assert losses == [1, 2, 4, 6]


@pytest.mark.parametrize("index", [0, 1])
def test_the_account_names_the_whole_batch(tmp_path, monkeypatch, index):
    """Of all processes, and also where the search itself fails; the first process writes it."""

    def search(batch):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    parts = np.array([[4, 2], [9, 7]])
    monkeypatch.setattr(divergence.multihost_utils, "process_allgather", lambda own: parts)
    error = DivergenceError("Update 3 is not finite.", step=3, batch={"index": parts[index]})
    message = str(divergence.explain(error, tmp_path, search))
    assert "could not be found out (RESOURCE_EXHAUSTED" in message and "examples 4, 2, 9, 7." in message
    assert (tmp_path / "divergence.json").exists() == (index == 0)


@pytest.fixture(scope="module")
def deep():
    """Two blocks whose insides are recomputed, two parts a batch: what the search has to see through."""
    run = Trainer(small_config(accumulation_steps=2, **{"model.depth": 2, "model.remat": True}))
    with jax.numpy_dtype_promotion("standard"):
        return run, run.new_state(), next(run.train_batches())


@pytest.mark.parametrize(
    ("layer", "parameter", "factor", "expected"),
    [
        ("block_1/mlp/fc1", "adder_kernel", 3e38, "whose activations are not finite is block_1/mlp/fc1/norm"),
        ("head", "kernel", 1e25, "one by one: their norm, or what the optimizer"),
        ("head", "kernel", 2e37, "too large for a finite loss"),
    ],
)
def test_what_went_first_is_named(deep, layer, parameter, factor, expected):
    """Parameters that are finite, but so large that something after them is not."""
    run, state, batch = deep
    params = jax.tree.map(jnp.copy, state.params)
    place = params
    for name in layer.split("/"):
        place = place[name]
    place[parameter] *= factor / jnp.max(jnp.abs(place[parameter]))
    assert expected in run.find_culprit(state.replace(params=params), batch)


def test_a_gradient_that_went_first_is_named(deep, monkeypatch):
    run, state, batch = deep
    loss = optax.softmax_cross_entropy
    # The derivative of the root at 0 is infinite, and zero times that is not a number.
    monkeypatch.setattr(optax, "softmax_cross_entropy", lambda y, t: loss(y, t) + jnp.sqrt(jnp.sum(0 * y)))
    found = run.find_culprit(state, batch)
    assert found.startswith("All activations are finite; the first parameter whose gradient is not is head/")
