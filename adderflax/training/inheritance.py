"""What a run takes over from models that are trained already: first weights, and a teacher."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from adderflax.data import DataConfig, Dataset, DatasetInfo, evaluation_batches, normalize_batch
from adderflax.models import VisionTransformer, VisionTransformerConfig, load_vit_weights, warm_start
from adderflax.models.families import ModelConfig
from adderflax.models.transfer import transfer
from adderflax.models.vit import PRESETS
from adderflax.models.weight_files import read_weight_file
from adderflax.training.config import RunConfig, WarmStartConfig
from adderflax.training.distillation import DistillationConfig, Teacher
from adderflax.training.restore import config_here, finished_summary, load_model
from adderflax.training.workdir import WorkdirError, differing_info, has_checkpoints, read_info

# What a published ViT computes, whatever the model that it starts computes.
_PUBLISHED = PRESETS["vit"] | {
    "attention_scale": None,
    "layer_norm_epsilon": 1e-6,
    "power_activation": False,
    "centered": False,
}


def load_teacher(config: DistillationConfig) -> Teacher | None:
    """The teacher of a run, or None where the configuration names none.

    Raises:
      ValueError: there is no trained run, or it is not finished; the message names it.
    """
    if config.teacher is None:
        return None
    # A teacher that trains on would be another one after every restart.
    try:
        if has_checkpoints(config.teacher):
            run = RunConfig.parse(config_here(config.teacher))
            if finished_summary(config.teacher, run) is None:
                raise ValueError(
                    f"distillation.teacher={config.teacher!r} is not finished: it has checkpoints but no"
                    " summary.json of all its steps. Let its training end first; the same command goes on."
                )
        model, variables, _ = load_model(config.teacher)
    except WorkdirError as error:
        raise ValueError(
            f"distillation.teacher={config.teacher!r} cannot be loaded: train the teacher first, or name"
            f" another run. {error}"
        ) from error
    return Teacher(model, variables, config)


def digest(teacher: Teacher | None) -> str | None:
    """What tells a teacher's weights from others', or None without a teacher.

    None also where this process does not hold all of them, as where several hosts share them.
    """
    if teacher is None:
        return None
    leaves = jax.tree_util.tree_leaves_with_path(teacher.variables)
    if not all(leaf.is_fully_addressable or leaf.is_fully_replicated for _, leaf in leaves):
        return None
    found = hashlib.sha256()
    for path, leaf in leaves:
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def require_pupil(teacher: Teacher | None, info: DatasetInfo, student: nn.Module) -> None:
    """Raises ValueError where a model of a data set cannot learn from a teacher, if there is one.

    That is where the teacher saw other images or classes, or what is to be compared differs between the two;
    the message names it.
    """
    if teacher is None:
        return
    seen = read_info(teacher.config.teacher)
    if differing := differing_info(seen, info, ("image_size", "channels", "class_names", "mean", "std")):
        raise ValueError(
            f"distillation.teacher={teacher.config.teacher!r} was trained on {seen.name!r}, whose"
            f" {differing[0]} differs from that of {info.name!r}: teacher and student see the same images and"
            " name the same classes. Choose a teacher trained on this data set at this data.image_size."
        )
    teacher.require_fits(student)


def require_source(config: WarmStartConfig) -> None:
    """Raises ValueError where the source of a warm start, if there is one, cannot be read.

    Whether it fits the run's model is known once the data set is; `inherited_params` tells.
    """
    if config.source is None:
        return
    with _naming(config) as source:
        # Seconds, against hours of a download that would be for nothing.
        (load_model if source.is_dir() else read_weight_file)(source)


def inherited_params(
    config: WarmStartConfig, model: ModelConfig, dataset: Dataset, data: DataConfig
) -> dict[str, Any] | None:
    """The parameters that a run of `model` begins with, on the host, or None where none are inherited.

    Args:
      config: the source.
      model: the model to start.
      dataset: its images, for the calibration.
      data: the data set's configuration.

    Raises:
      ValueError: the source cannot be read, or does not fit the model; the message names it.
    """
    if config.source is None:
        return None
    if not isinstance(model, VisionTransformerConfig):
        raise ValueError(
            f"warm_start.source={config.source!r} cannot start this model: only Vision Transformers are"
            " converted. For AdderNet's residual network see `adderflax.models.load_addernet_weights`."
        )
    with _naming(config) as source:
        if source.is_dir():
            module, variables, _ = load_model(source)
            if not isinstance(module, VisionTransformer):
                raise ValueError("it holds no Vision Transformer, and no other model can be converted.")
            params, model_from = transfer(variables["params"], module.config, model)
        else:
            model_from = dataclasses.replace(model, **_PUBLISHED)
            params = load_vit_weights(source, model_from)
        # The first images of the training part, whose order is random; every process takes the same.
        count = min(config.images, len(dataset.train))
        batch = next(evaluation_batches(dataset, "train", data, batch_size=count))
        images = normalize_batch(batch["image"], dataset.info)
        return jax.device_get(warm_start(jax.device_get(params), model_from, model, images))


@contextlib.contextmanager
def _naming(config: WarmStartConfig) -> Iterator[Path]:
    """Gives the source, and names it in what goes wrong with it."""
    source = Path(config.source)
    try:
        if not source.exists():
            raise ValueError(
                "it does not exist. Give a trained run's workdir, or a .pth, .pt, .safetensors or .npz file."
            )
        yield source
    except (ModuleNotFoundError, OSError, ValueError, WorkdirError) as error:
        raise ValueError(f"warm_start.source={config.source!r} cannot be used: {error}") from error
