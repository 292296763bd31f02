"""The models that a configuration or a workdir describes, without their data and without weights."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from adderflax.analysis.integers import in_float32
from adderflax.analysis.ledger import Ledger, count_operations
from adderflax.data import DataConfig, DatasetInfo
from adderflax.models.classifier import abstract_variables, image_shape
from adderflax.models.families import ModelConfig, build_model
from adderflax.training.config import ConfigDict, ConfigError, RunConfig
from adderflax.training.restore import config_here
from adderflax.training.workdir import holds_integers, read_info

# (image size, channels, classes). Sets whose images vary in size are trained at 224.
KNOWN_SETS = {
    "imagenet2012": (224, 3, 1000),
    "imagenette": (224, 3, 10),
    "cifar10": (32, 3, 10),
    "cifar100": (32, 3, 100),
    "mnist": (28, 1, 10),
    "digits": (8, 1, 10),
}
# What a model multiplies with, wherever it has such a field.
_MULTIPLYING = {
    "linear": "multiply",
    "output_projection": "multiply",
    "similarity": "dot",
    "aggregation": "dot",
    "patch_embedding": "multiply",
    "head": "multiply",
    "mlp_convolution": "multiply",
    "convolution": "multiply",
    "shortcut": "multiply",
}


def image_set(data: DataConfig) -> DatasetInfo:
    """Size, channels and classes of a set's images, without looking at the set.

    A set that is not in `KNOWN_SETS` is taken to have 3 channels and 1000 classes.

    Args:
        data: names the set; its `image_size` overrides the set's own.

    Raises:
        ConfigError: the set is not known and `image_size` is not given.
    """
    known = KNOWN_SETS.get(data.name.partition("/")[0].partition(":")[0])
    if known is None and data.image_size is None:
        raise ConfigError(
            f"The size of the images of {data.name!r} is not known here, and the data set is not "
            "opened to count operations: say it with --config.data.image_size=N. Channels are "
            f"then taken to be 3 and classes 1000. Known sets are {', '.join(KNOWN_SETS)}."
        )
    size, channels, classes = known or (data.image_size, 3, 1000)
    return DatasetInfo(
        name=data.name,
        num_classes=classes,
        class_names=tuple(map(str, range(classes))),
        image_size=data.image_size or size,
        channels=channels,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        eval_resize=None,
        train_examples=0,
        validation_examples=0,
        test_examples=0,
    )


def configured_model(config: ConfigDict) -> ModelConfig:
    """The model that a run of the configuration trains.

    Raises:
        ConfigError: the configuration cannot be run, or its set is not known.
    """
    run = RunConfig.parse(config)
    return run.model_config(image_set(run.data))


def trained_model(directory: str | Path) -> tuple[str, ModelConfig, bool]:
    """The model of a run's workdir, of a file of weights or of an export, from its description alone.

    Args:
        directory: where its config.json and dataset.json are.

    Returns:
        The name of its variant, the model, and whether it is an export: one that computes with integers, and
        all else in float32.

    Raises:
        ConfigError: the configuration cannot be run.
        WorkdirError: there is no such description, or it cannot be read.
    """
    run = RunConfig.parse(config_here(directory))
    model, exported = run.model_config(read_info(directory)), holds_integers(directory)
    return run.model["variant"], in_float32(build_model(model)).config if exported else model, exported


def multiplying_twin(model: ModelConfig) -> ModelConfig:
    """The same model with multiplications everywhere and all else equal."""
    # One that is None follows `linear`, or belongs to a convolution that is not there.
    chosen = (name for name in _MULTIPLYING if getattr(model, name, None) is not None)
    return dataclasses.replace(model, **{name: _MULTIPLYING[name] for name in chosen})


@functools.lru_cache(maxsize=16)
def inference_ledger(model: ModelConfig) -> Ledger:
    """The operations of classifying one image, from shapes alone."""
    module = build_model(model)
    image = jax.ShapeDtypeStruct((1, *image_shape(model)), jnp.float32)
    return count_operations(module.apply, abstract_variables(module), image, constant_argnums=(0,))
