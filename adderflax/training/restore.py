"""A trained model from its workdir alone: no data set, no optimizer settings, any devices."""

from pathlib import Path
from typing import Any

from flax import linen as nn

from adderflax.data import DatasetInfo
from adderflax.models.families import build_model
from adderflax.training import sharding
from adderflax.training import workdir as workdir_lib
from adderflax.training.checkpoints import Checkpointer
from adderflax.training.config import RunConfig
from adderflax.training.optimizer import make_optimizer
from adderflax.training.state import abstract_state


def load_model(workdir: str | Path, *, best: bool = False) -> tuple[nn.Module, dict[str, Any], DatasetInfo]:
    """Loads what a run has trained.

    Args:
      workdir: the run's directory.
      best: take the checkpoint with the best validation accuracy instead of the newest.

    Returns:
      The Linen module; its variables, ready for ``model.apply(variables, images)``, which are the
      averages where the run keeps any; and the description of the data set.

    Raises:
      WorkdirError: the directory holds no run, or no checkpoint yet.
    """
    run = RunConfig.parse(workdir_lib.read_config(workdir))
    info = workdir_lib.read_info(workdir)
    model = build_model(run.model_config(info))
    # The optimizer's state is part of a checkpoint; its shape does not depend on the number of steps.
    optimizer, _ = make_optimizer(run.optimizer, total_steps=1)
    target = abstract_state(model, optimizer, with_ema=run.ema_decay > 0, mesh=sharding.make_mesh())
    with Checkpointer(workdir, read_only=True) as checkpointer:
        step = checkpointer.best_step if best else checkpointer.latest_step
        if step is None:
            raise workdir_lib.WorkdirError(
                f"{Path(workdir).absolute()} has no {'evaluated' if best else 'complete'} checkpoint yet:"
                f" train first, with train.py --workdir {workdir}."
            )
        state = checkpointer.restore_state(target, step)
    return model, state.evaluated_variables, info
