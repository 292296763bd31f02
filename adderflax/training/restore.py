"""A trained model from its workdir alone: no data set, no optimizer settings, any devices.

A workdir may hold one small file of weights in place of checkpoints, so that a trained model can be given
away: ``weights.npz`` beside ``config.json`` and ``dataset.json``.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from adderflax.data import DatasetInfo
from adderflax.models.families import build_model
from adderflax.training import sharding
from adderflax.training import workdir as workdir_lib
from adderflax.training.checkpoints import Checkpointer
from adderflax.training.config import RunConfig
from adderflax.training.optimizer import make_optimizer
from adderflax.training.state import abstract_state

WEIGHTS = "weights.npz"


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
    weights = Path(workdir) / WEIGHTS
    if weights.exists() and not workdir_lib.has_checkpoints(workdir):
        return model, _read_weights(weights), info
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


def write_weights(workdir: str | Path, file: str | Path, *, best: bool = False) -> None:
    """Writes the variables that `load_model` gives as one file, in float16: two bytes a parameter.

    Args:
      workdir: the run's directory.
      file: the .npz file; as ``weights.npz`` beside the run's config.json and dataset.json it makes a workdir
        that can predict, teach and start other runs.
      best: as for `load_model`.

    Raises:
      ValueError: a weight is too large for float16.
    """
    _, variables, _ = load_model(workdir, best=best)
    flat = traverse_util.flatten_dict(variables, sep="/")
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in flat.items()}
    largest = np.finfo(np.float16).max
    if wide := [name for name, array in arrays.items() if np.abs(array).max(initial=0.0) > largest]:
        raise ValueError(f"{', '.join(wide)} of {workdir} exceed {largest:.0f}, the largest float16.")
    np.savez(file, **{name: array.astype(np.float16) for name, array in arrays.items()})


def _read_weights(file: Path) -> dict[str, Any]:
    with np.load(file) as arrays:
        return traverse_util.unflatten_dict({n: jnp.float32(arrays[n]) for n in arrays.files}, sep="/")
