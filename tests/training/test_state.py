"""One update: running statistics, the annealed exponent, and what a model has to have for each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from adderflax import adder_matmul
from adderflax.training import sharding
from adderflax.training.config import ConfigError, RunConfig, default_config
from adderflax.training.restore import load_model
from adderflax.training.state import annealed_exponent, init_state, make_train_step, training_loss
from adderflax.training.trainer import Trainer, evaluate, train


def resnet_config(**fields):
    """AdderNet's network with one block a stage, on the digits."""
    fields = {"batch_size": 32, "total_steps": 4, "checkpoint_every": 2, "log_every": 1} | fields
    small = {"model.variant": "ResNet-20", "model.blocks": 1, "model.implementation": "reference"}
    config = default_config()
    config.update_from_flattened_dict(small | fields)
    return config


class Normed(nn.Module):
    """The least model with running statistics."""

    @nn.compact
    def __call__(self, images, train=False):
        rows = nn.BatchNorm(use_running_average=not train, momentum=0.9)(images.reshape(len(images), -1))
        return nn.Dense(3)(rows)


def sized(model):
    """Four-pixel images, which is all that a state asks of a model's configuration."""
    object.__setattr__(model, "config", type("Size", (), {"image_size": 2, "channels": 1}))
    return model


def targets_of(key, images, labels):
    return images, jax.nn.one_hot(labels, 3)


class Echo(nn.Module):
    """The images are the logits."""

    config: object = None

    @nn.compact
    def __call__(self, images, train=False):
        return images + self.param("shift", nn.initializers.zeros_init(), (1, 3))


def options(mesh):
    return {"schedule": optax.constant_schedule(0.1), "mesh": mesh}


def test_loss_and_accuracy_are_those_of_the_batch():
    logits = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    given = {"params": {"shift": jnp.zeros((1, 3))}}, None, {}, logits, jax.nn.one_hot(labels, 3)
    loss, (found, _) = training_loss(Echo(), None, *given, jax.random.key(0))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(loss, -np.log(probabilities[np.arange(8), labels]).mean(), rtol=1e-5)
    hits = np.mean(logits.argmax(-1) == labels)
    assert 0 < hits < 1
    np.testing.assert_allclose(found["accuracy"], hits)


@pytest.mark.parametrize("parts", [1, 2])
def test_running_statistics_move_are_averaged_and_evaluated(parts):
    mesh, model, optimizer = sharding.make_mesh(), sized(Normed()), optax.sgd(0.0)
    images = np.random.default_rng(0).normal(3.0, 2.0, size=(8, 2, 2, 1)).astype(np.float32)
    batch = sharding.put_batch({"image": images, "label": np.arange(8, dtype=np.int32) % 3}, mesh)
    update = make_train_step(
        model, optimizer, targets_of, ema_decay=0.5, accumulation_steps=parts, **options(mesh)
    )
    state, _ = update(init_state(model, optimizer, seed=0, with_ema=True, mesh=mesh), batch)
    rows = images.reshape(8, -1).astype(np.float64)
    mean = 0.1 * rows.mean(0)
    within = np.mean([rows[part::parts].var(0) for part in range(parts)], axis=0)
    stats = state.batch_stats["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * within, rtol=1e-4)
    # After the first update the decay is min(0.5, 1/10).
    evaluated = state.evaluated_variables["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(evaluated["mean"], 0.9 * mean, rtol=1e-4)

    # An update that is left out leaves them, too.
    broken = sharding.put_batch({"image": images * np.nan, "label": np.asarray(batch["label"])}, mesh)
    state, metrics = update(state, broken)
    assert int(metrics["skipped"]) == 1
    np.testing.assert_allclose(state.batch_stats["BatchNorm_0"]["mean"], mean, rtol=1e-4)


@pytest.mark.slow
def test_the_residual_network_trains_and_evaluates(tmp_path):
    config = resnet_config(ema_decay=0.5)
    whole = train(config, tmp_path / "whole", progress=False)
    model, variables, _ = load_model(tmp_path / "whole")
    assert float(jnp.abs(variables["batch_stats"]["bn1"]["mean"]).max()) > 0
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    # In evaluation an image's logits do not depend on those beside it.
    alone, together = model.apply(variables, images[:1]), model.apply(variables, images)
    np.testing.assert_allclose(alone[0], together[0], atol=1e-4)
    assert evaluate(tmp_path / "whole")["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-6)


def test_a_tensor_mesh_needs_a_transformer():
    with pytest.raises(ConfigError, match=r"mesh.tensor=2 cuts the heads .* has none. Cut with mesh.fsdp"):
        Trainer(resnet_config(**{"mesh.tensor": 2}))


def test_fields_of_another_model_are_refused():
    with pytest.raises(ConfigError, match="Unknown model field identity; the fields are .*shortcut"):
        RunConfig.parse(resnet_config(**{"model.identity": True}))
    with pytest.raises(ConfigError, match="variant='ResNet-21' is not known; choose one of .*'ResNet-20'"):
        RunConfig.parse(resnet_config(**{"model.variant": "ResNet-21"}))
    with pytest.raises(ConfigError, match="model.implementation='reference' computes the L1 distance only"):
        RunConfig.parse(resnet_config(anneal_fraction=0.5))


class OneLayer(nn.Module):
    """The least model with an exponent."""

    @nn.compact
    def __call__(self, images, train=False, p=1.0):
        rows = images.reshape(len(images), -1)
        kernel = self.param("adder_kernel", nn.initializers.normal(1.0), (rows.shape[1], 3))
        return adder_matmul(rows, kernel, p=p)


def test_the_exponent_falls_from_two_to_one():
    steps = jnp.arange(6)
    np.testing.assert_allclose(annealed_exponent(steps, 4), [2, 1.75, 1.5, 1.25, 1, 1])
    mesh, model, optimizer = sharding.make_mesh(), sized(OneLayer()), optax.sgd(0.01)
    images = np.random.default_rng(0).normal(size=(4, 2, 2, 1)).astype(np.float32)
    batch = sharding.put_batch({"image": images, "label": np.array([0, 1, 2, 0], np.int32)}, mesh)
    update = make_train_step(model, optimizer, targets_of, anneal_steps=2, **options(mesh))
    state = init_state(model, optimizer, seed=0, with_ema=False, mesh=mesh)
    for p in (2.0, 1.5, 1.0, 1.0):
        kernel = np.asarray(state.params["adder_kernel"], np.float64)
        state, metrics = update(state, batch)
        logits = -(np.abs(images.reshape(4, -1)[..., None] - kernel) ** p).sum(1)
        picked = logits[np.arange(4), [0, 1, 2, 0]]
        expected = np.mean(np.log(np.exp(logits).sum(-1)) - picked)
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5, err_msg=f"p={p}")


def test_the_norms_are_those_of_all_leaves_together():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            return nn.Dense(3)(nn.Dense(4)(images.reshape(len(images), -1)))

    mesh, model, optimizer = sharding.make_mesh(), sized(Two()), optax.sgd(0.1)
    images = np.random.default_rng(0).normal(size=(6, 2, 2, 1)).astype(np.float32)
    batch = sharding.put_batch({"image": images, "label": np.arange(6, dtype=np.int32) % 3}, mesh)
    state = init_state(model, optimizer, seed=0, with_ema=False, mesh=mesh)
    before = jax.device_get(state.params)
    update = make_train_step(model, optimizer, targets_of, **options(mesh))
    state, metrics = update(state, batch)
    moved = jax.tree.map(lambda a, b: (a - b) / 0.1, before, jax.device_get(state.params))
    for name, tree in (("gradient_norm", moved), ("parameter_norm", state.params)):
        expected = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-4, err_msg=name)
