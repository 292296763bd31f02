"""One update as a run's configuration describes it: optimizer, augmentation and compiled step."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from flax import linen as nn
from jax.sharding import Mesh

from adderflax.data import DatasetInfo, augment_batch
from adderflax.training.config import ConfigError, RunConfig
from adderflax.training.distillation import Teacher
from adderflax.training.optimizer import make_optimizer
from adderflax.training.state import make_train_step


class Update(NamedTuple):
    """One update, as a run's configuration describes it.

    Attributes:
      step: ``(state, batch) -> (state, metrics)``, compiled (`make_train_step`).
      optimizer: of its state.
      augment: (key, images, labels) -> (images, targets).
      anneal_steps: updates over which the exponent of the distance falls.
    """

    step: Callable[..., Any]
    optimizer: optax.GradientTransformation
    augment: Callable[..., Any]
    anneal_steps: int


def configured_update(
    run: RunConfig,
    model: nn.Module,
    info: DatasetInfo,
    mesh: Mesh,
    total_steps: int,
    *,
    teacher: Teacher | None = None,
) -> Update:
    """The update of a run of so many steps, on images that `info` describes.

    Raises:
      ConfigError: `anneal_fraction` is set, and the model takes no exponent.
    """
    optimizer, schedule = make_optimizer(run.optimizer, total_steps)
    augment = functools.partial(augment_batch, config=run.augment, info=info)
    if run.anneal_fraction:
        _require_exponent(model, run.anneal_fraction)
    anneal_steps = math.ceil(run.anneal_fraction * total_steps)
    step = make_train_step(
        model,
        optimizer,
        augment,
        schedule=schedule,
        ema_decay=run.ema_decay,
        accumulation_steps=run.accumulation_steps,
        skip_nonfinite_steps=run.skip_nonfinite_steps,
        anneal_steps=anneal_steps,
        teacher=teacher,
        mesh=mesh,
    )
    return Update(step, optimizer, augment, anneal_steps)


def _require_exponent(model: nn.Module, anneal_fraction: float) -> None:
    takes = inspect.signature(type(model).__call__).parameters
    if "p" not in takes and not any(found.kind is found.VAR_KEYWORD for found in takes.values()):
        raise ConfigError(
            f"anneal_fraction={anneal_fraction} gives the model an exponent, p, and {type(model).__name__}"
            " takes none: let its __call__ take p=1.0, for its adder layers, or set anneal_fraction=0."
        )
