"""Every configuration file: it parses in every arithmetic and its docstring tells how to run it."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from adderflax.data import DatasetInfo
from adderflax.models import resnet, vit
from adderflax.models.classifier import abstract_variables
from adderflax.models.families import build_model
from adderflax.training.config import ConfigError, RunConfig, default_config

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
# What each set's images look like, so that no data is needed here.
SETS = {"digits": (8, 1, 10), "cifar10": (32, 3, 10), "cifar100": (32, 3, 100)}


def load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe(name):
    size, channels, classes = SETS.get(name, (224, 3, 1000))
    return DatasetInfo(
        name=name,
        num_classes=classes,
        class_names=tuple(map(str, range(classes))),
        image_size=size,
        channels=channels,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        eval_resize=None,
        train_examples=1000,
        validation_examples=100,
        test_examples=100,
    )


def arithmetics(file):
    presets = resnet.PRESETS if "resnet" in file.stem else vit.PRESETS
    return [pytest.param(file, name, preset, id=f"{file.stem}-{name}") for name, preset in presets.items()]


@pytest.mark.parametrize(("file", "arithmetic", "preset"), [p for file in FILES for p in arithmetics(file)])
@jax.numpy_dtype_promotion("standard")  # some compute in bfloat16
def test_config_describes_a_run(file, arithmetic, preset):
    module = load(file)
    run = RunConfig.parse(module.get_config(arithmetic))
    model = run.model_config(describe(run.data.name))
    assert all(getattr(model, name) == value for name, value in preset.items())
    # The recipe for CIFAR is one for all of its models.
    alike = file.stem in ("cifar10_adder_vit", "cifar100_adder_vit") and arithmetic in ("multiply", "vit")
    # The recipe for CIFAR is one for all of its models.
    alike = file.stem in ("cifar10_adder_vit", "cifar100_adder_vit") and arithmetic in ("multiply", "vit")
    shared = ["model.centered"] if alike else []
    assert run.idle_fields(model, abstract_variables(build_model(model))["params"]) == shared
    assert f"python train.py --config configs/{file.name}" in module.__doc__
    for word in ("Hardware:", "Accuracy and time:"):
        assert word in module.__doc__
    assert arithmetic == "adder" or f":{arithmetic}" in module.__doc__
    told = module.__doc__.split("Accuracy and time:")[1]
    assert "not yet run" in told or re.search(r"\d", told)
    assert module.get_config().model.arithmetic == "adder"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_taught_model_is_the_adder_model_with_a_lesson(name):
    (file,) = (file for file in FILES if file.stem == f"{name}_adder_vit")
    adder, taught = (load(file).get_config(argument).to_dict() for argument in ("adder", "taught"))
    lesson = taught.pop("distillation")
    assert adder.pop("distillation")["teacher"] is None and adder == taught
    # Where the command that the docstring gives for the twin leaves it.
    assert lesson["teacher"] == f"runs/{file.stem}-multiply" and lesson["features"] == 1.0
    assert f"configs/{file.name}:taught" in load(file).__doc__


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_warm_model_is_the_taught_one_from_its_teachers_weights(name):
    (file,) = (file for file in FILES if file.stem == f"{name}_adder_vit")
    taught, warm = (load(file).get_config(argument) for argument in ("taught", "warm"))
    assert (
        warm.model == taught.model and warm.distillation == taught.distillation and warm.data == taught.data
    )
    assert warm.warm_start.source == warm.distillation.teacher and taught.warm_start.source is None
    assert (warm.epochs, warm.batch_size, warm.optimizer.learning_rate) == (2.0, 64, 5e-4)
    assert warm.augment.flip and not warm.augment.cutmix_alpha and not warm.augment.label_smoothing
    assert f"configs/{file.name}:warm" in load(file).__doc__


@pytest.mark.parametrize(
    ("changed", "idle"),
    [
        ({}, []),
        ({"model.grad_inputs": "sign", "model.centered": True}, ["model.grad_inputs", "model.centered"]),
        ({"model.grad_query": "sign", "anneal_fraction": 0.5}, ["anneal_fraction", "model.grad_query"]),
        ({"augment.crop_scale": (0.5, 1.0)}, ["augment.crop_scale"]),
        ({"augment.crop_scale": (0.5, 1.0), "augment.random_resized_crop": True}, []),
        (
            {"augment.randaugment_magnitude": 5, "augment.randaugment_std": 1.0},
            ["augment.randaugment_magnitude", "augment.randaugment_std"],
        ),
        ({"augment.randaugment_magnitude": 5, "augment.randaugment_layers": 2}, []),
        ({"warm_start.images": 10}, ["warm_start.images"]),
        ({"warm_start.images": 10, "warm_start.source": "runs/twin"}, []),
        ({"distillation.temperature": 4.0}, ["distillation.temperature"]),
        (
            {"distillation.temperature": 4.0, "distillation.teacher": "t", "distillation.soft_labels": 0.5},
            [],
        ),
        ({"eval_every": 100, "data.validation_fraction": 0.0}, ["eval_every"]),
        ({"eval_every": 100}, []),
    ],
)
def test_fields_that_do_nothing_are_named(changed, idle):
    config = default_config("multiply")
    config.update_from_flattened_dict(changed)
    run = RunConfig.parse(config)
    model = run.model_config(describe("digits"))
    assert run.idle_fields(model, {"fc1": {"kernel": np.ones((2, 2))}}) == idle
    adder = dataclasses.replace(model, similarity="l1")
    templates = {"fc1": {"adder_kernel": np.ones((2, 2))}}
    of_templates = ("model.", "anneal")
    assert run.idle_fields(adder, templates) == [name for name in idle if not name.startswith(of_templates)]


def test_a_bias_of_layers_that_have_none_is_named():
    config = default_config("adder")
    config.model.use_bias = True
    for changed, idle in (({}, ["model.use_bias"]), ({"output_projection": "multiply"}, [])):
        config.model.update(changed)
        run = RunConfig.parse(config)
        model = run.model_config(describe("digits"))
        assert run.idle_fields(model, {"fc1": {"adder_kernel": np.ones((2, 2))}}) == idle


def test_no_figure_is_left_open():
    root = FILES[0].parent.parent
    for file in (*FILES, root / "README.md"):
        assert not re.search(r"@[A-Z]+@|TODO|TBD", file.read_text()), file


def test_the_fixed_fields_are_there():
    config = default_config()
    for name in (
        "seed batch_size epochs total_steps eval_every checkpoint_every log_every data.name data.data_dir"
        " model.variant model.arithmetic model.similarity model.identity"
    ).split():
        node = config
        for part in name.split("."):
            assert part in node, name
            node = node[part]


def test_unset_fields_take_the_type_of_their_first_value():
    config = default_config()
    config.total_steps = 5
    config.model.identity = False
    config.model.similarity = "dot"
    run = RunConfig.parse(config)
    assert run.num_steps(describe("digits")) == 5
    assert run.model == {
        "variant": "digits",
        "arithmetic": "adder",
        "identity": False,
        "similarity": "dot",
    }
    with pytest.raises(TypeError):
        config.total_steps = "many"


def test_steps_follow_from_epochs():
    config = default_config()
    config.epochs, config.batch_size = 3.0, 100
    assert RunConfig.parse(config).num_steps(describe("digits")) == 30


def test_custom_names_what_is_missing():
    config = default_config("custom")
    with pytest.raises(ConfigError, match="arithmetic='custom'.*missing: linear"):
        RunConfig.parse(config)


def test_unknown_fields_in_a_saved_configuration():
    saved = default_config().to_dict() | {"momentum": 1}
    with pytest.raises(ConfigError, match="Unknown configuration field momentum"):
        RunConfig.parse(saved)
