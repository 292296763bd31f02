"""Warm start and teacher: a run that begins with, or learns from, the weights of another one."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from adderflax.data import evaluation_batches, normalize_batch
from adderflax.models import load_vit_weights, warm_start
from adderflax.models.vit_weights import _timm_leaves
from adderflax.training import sharding, trainer
from adderflax.training.config import ConfigError, WarmStartConfig, default_config
from adderflax.training.distillation import DistillationConfig, Outputs, distillation_loss
from adderflax.training.inheritance import inherited_params, load_teacher, require_pupil
from adderflax.training.restore import load_model
from adderflax.training.trainer import Trainer, train
from adderflax.training.workdir import WorkdirError, require_same_teacher


def small_config(arithmetic="adder", **fields):
    """One block of width 16 on 4-pixel patches of the digits, without augmentation."""
    config = default_config(arithmetic)
    config.update_from_flattened_dict(
        {
            "batch_size": 32,
            "total_steps": 2,
            "checkpoint_every": 1,
            "model.patch_size": 4,
            "model.embed_dim": 16,
            "model.num_heads": 2,
            "model.depth": 1,
            "model.implementation": "reference",
        }
        | fields
    )
    return config


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The workdir of a multiplying run."""
    workdir = tmp_path_factory.mktemp("twin")
    with jax.numpy_dtype_promotion("standard"):
        train(small_config("multiply"), workdir, progress=False)
    return workdir


def test_the_loss_is_the_one_of_the_teachers_outputs(twin):
    teaching = {"soft_labels": 0.5, "attention": 2.0, "features": 3.0}
    fields = {f"distillation.{name}": weight for name, weight in teaching.items()}
    run = Trainer(small_config(**fields, **{"distillation.teacher": str(twin), "accumulation_steps": 2}))
    state, batch = run.new_state(), next(run.train_batches())
    images = normalize_batch(batch["image"], run.dataset.info)
    targets = jax.nn.one_hot(batch["label"], 10)

    def outputs(model, variables):
        logits, sown = model.apply(variables, images, mutable=["intermediates"])
        return Outputs(logits, sown["intermediates"], identity=True)

    teacher_model, teacher_variables, _ = load_model(twin)
    expected, parts = distillation_loss(
        DistillationConfig(teacher="x", **teaching),
        outputs(run.model, state.evaluated_variables),
        outputs(teacher_model, teacher_variables),
        targets,
    )
    # The search for a divergence computes the same loss: of nothing that is not finite it finds nothing.
    assert run.find_culprit(state, batch).startswith("All activations and gradients are finite one by one")
    state, metrics = run.train_step(state, sharding.put_batch(batch, run.mesh))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    for name, part in parts.items():
        np.testing.assert_allclose(metrics[name], part, rtol=1e-4, err_msg=name)


def test_a_warm_start_is_the_converted_source(twin):
    source = {"warm_start.source": str(twin), "warm_start.images": 64}
    run, same = Trainer(small_config(**source, ema_decay=0.9)), Trainer(small_config("multiply", **source))
    _, trained, _ = load_model(twin)
    jax.tree.map(np.testing.assert_array_equal, same.new_state().params, trained["params"])

    state = run.new_state()
    cold = Trainer(small_config()).new_state()
    images = normalize_batch(next(run.train_batches())["image"], run.dataset.info)

    def agreement(params):
        logits = run.model.apply({"params": params}, images)
        wanted = same.model.apply(trained, images)
        return np.corrcoef(np.ravel(logits), np.ravel(wanted))[0, 1]

    assert agreement(state.params) > max(0.5, agreement(cold.params) + 0.3)
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema_params)


def test_a_run_starts_one_on_larger_images(twin):
    fields = {"warm_start.source": str(twin), "warm_start.images": 64, "data.image_size": 16}
    params, (_, trained, _) = Trainer(small_config(**fields)).new_state().params, load_model(twin)
    assert params["position_embedding"].shape == (1, 17, 16)
    assert trained["params"]["position_embedding"].shape == (1, 5, 16)
    jax.tree.map(np.testing.assert_array_equal, params["head"], trained["params"]["head"])


def test_a_published_source_computes_as_it_was_published(tmp_path):
    """Whatever the model that it starts computes, which takes the published weights as they are."""
    vit = Trainer(small_config("vit")).model.config
    random, file = np.random.default_rng(0), tmp_path / "vit.npz"
    leaves = {leaf.name: leaf.shape for leaf in _timm_leaves(vit, vit.num_tokens, vit.num_classes)}
    np.savez(file, **{name: random.normal(size=shape) for name, shape in leaves.items()})
    fields = {"warm_start.source": str(file), "warm_start.images": 64, "model.attention_scale": 0.05}
    fields |= {"model.power_activation": True, "model.centered": True, "model.layer_norm_epsilon": 1e-3}
    run = Trainer(small_config(**fields))
    batch = next(evaluation_batches(run.dataset, "train", run.config.data, batch_size=64))
    images = normalize_batch(batch["image"], run.dataset.info)
    expected = warm_start(load_vit_weights(file, vit), vit, run.model.config, images)
    jax.tree.map(np.testing.assert_array_equal, run.new_state().params, expected)


def test_a_source_whose_package_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    (tmp_path / "vit.safetensors").write_bytes(b"")
    run = Trainer(small_config(**{"warm_start.source": str(tmp_path / "vit.safetensors")}))
    with pytest.raises(ConfigError, match="warm_start.source=.* cannot be used: .*pip install safetensors"):
        run.new_state()


@pytest.mark.slow
def test_an_inherited_run_goes_on_without_its_source(twin, tmp_path):
    (tmp_path / "source").symlink_to(twin)
    # Parameters and average are given away with every update, so they must lie in different buffers.
    fields = {"warm_start.source": str(tmp_path / "source"), "ema_decay": 0.9}
    config = small_config(**fields, total_steps=1)
    train(config, tmp_path / "run", progress=False)
    (tmp_path / "source").unlink()
    config.total_steps = 2
    assert train(config, tmp_path / "run", extend=True, progress=False)["steps"] == 2
    with pytest.raises(ConfigError, match="warm_start.source='.*source' cannot be used: it does not exist"):
        train(config, tmp_path / "other", progress=False)


def test_what_cannot_be_inherited_is_named(twin, tmp_path):
    run = Trainer(small_config())
    info = run.dataset.info
    with pytest.raises(
        ValueError, match="distillation.teacher='.*' cannot be loaded: train the teacher first.*config.json"
    ):
        load_teacher(DistillationConfig(teacher=str(tmp_path), soft_labels=1.0))
    summary = twin / "summary.json"
    with pytest.raises(ValueError, match="is not finished: it has checkpoints but no summary.json"):
        summary.rename(twin / "moved.json")
        try:
            load_teacher(DistillationConfig(teacher=str(twin), soft_labels=1.0))
        finally:
            (twin / "moved.json").rename(summary)
    config = (twin / "config.json").read_text()
    with pytest.raises(ValueError, match="is not finished: .* no summary.json of all its steps"):
        # As the run that has been extended has it.
        (twin / "config.json").write_text(json.dumps(json.loads(config) | {"total_steps": 4000}))
        try:
            load_teacher(DistillationConfig(teacher=str(twin), soft_labels=1.0))
        finally:
            (twin / "config.json").write_text(config)
    other = dataclasses.replace(info, mean=(0.25,))
    teacher = load_teacher(DistillationConfig(teacher=str(twin), soft_labels=1.0))
    with pytest.raises(ValueError, match="trained on 'digits', whose mean differs"):
        require_pupil(teacher, other, run.model)
    deeper = {"model.depth": 2, "distillation.teacher": str(twin), "distillation.features": 1.0}
    with pytest.raises(ConfigError, match="the student has 2 blocks and the teacher 1"):
        Trainer(small_config(**deeper))
    with pytest.raises(ConfigError, match="distillation.soft_labels=1.0 without a teacher"):
        Trainer(small_config(**{"distillation.soft_labels": 1.0}))
    wide = dataclasses.replace(run.model.config, embed_dim=32)
    source = WarmStartConfig(source=str(twin))
    with pytest.raises(ValueError, match="warm_start.source='.*' cannot be used: .*embed_dim"):
        inherited_params(source, wide, run.dataset, run.config.data)
    with pytest.raises(ValueError, match="warm_start.images=0 must be at least 1"):
        WarmStartConfig(images=0)
    assert inherited_params(WarmStartConfig(), wide, run.dataset, run.config.data) is None
    assert load_teacher(DistillationConfig()) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"distillation.teacher": "no/such/run", "distillation.soft_labels": 1.0},
        {"warm_start.source": "no/such/run"},
        {"warm_start.source": "docs"},
        {"warm_start.source": "README.md"},
    ],
)
def test_what_is_not_there_is_told_before_data_is_read(tmp_path, monkeypatch, root, fields):
    """Reading data may mean downloading it."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(trainer.data_lib, "load_dataset", lambda config: pytest.fail("data was read"))
    (told,) = (field for field, value in fields.items() if isinstance(value, str))
    with pytest.raises(ConfigError, match=f"{told}='.*' cannot be"):
        train(small_config(**fields), tmp_path / "run", progress=False)


def test_a_run_that_has_ended_needs_its_teacher_and_its_data_no_more(twin, tmp_path, monkeypatch, capsys):
    (tmp_path / "teacher").symlink_to(twin)
    teacher = {"distillation.teacher": str(tmp_path / "teacher"), "distillation.soft_labels": 1.0}
    summary = train(small_config(**teacher, total_steps=1), tmp_path / "run", progress=False)
    (tmp_path / "teacher").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(trainer.data_lib, "load_dataset", lambda config: pytest.fail("data was read"))
        again = train(small_config(**teacher, total_steps=1), tmp_path / "run", progress=False)
    assert again["test_loss"] == summary["test_loss"]
    assert "Finished at step 1, nothing left to do" in capsys.readouterr().out
    # What is left to do is still done with it.
    with pytest.raises(ConfigError, match="distillation.teacher=.* cannot be loaded"):
        train(small_config(**teacher, total_steps=2), tmp_path / "run", extend=True, progress=False)


@jax.numpy_dtype_promotion("standard")
def test_a_teacher_may_move_but_not_change(twin, tmp_path):
    """By what it knows, not by where it lies."""
    taught, moved, other = tmp_path / "run", tmp_path / "moved", tmp_path / "other"
    shutil.copytree(twin, moved)
    train(small_config("multiply", seed=1), other, progress=False)

    def run(teacher, **fields):
        config = small_config(
            **{"distillation.soft_labels": 0.5, "distillation.teacher": str(teacher)} | fields
        )
        return train(config, taught, extend=True, progress=False)

    run(twin)
    with pytest.raises(
        WorkdirError, match="was taught by another model than distillation.teacher names today"
    ):
        run(other, total_steps=3)
    assert run(moved, total_steps=3)["steps"] == 3
    assert json.loads((taught / "config.json").read_text())["distillation"]["teacher"] == str(moved)
    # Where weights cannot be told apart, as in a run of an earlier version, the path does.
    require_same_teacher(taught, str(moved), None)
    with pytest.raises(WorkdirError, match="names today, '.*other'. Put the teacher back"):
        require_same_teacher(taught, str(other), None)
    (taught / "teacher.json").unlink()
    require_same_teacher(taught, str(moved), "anything")
    with pytest.raises(WorkdirError, match="names today, '.*twin.*'. Put the teacher back"):
        run(twin, total_steps=4)
