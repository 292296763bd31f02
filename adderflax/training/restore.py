"""A trained model from its workdir alone: no data set, no optimizer settings, any devices.

A workdir may hold one small file of weights in place of checkpoints, so that a trained model can be given
away: ``weights.npz`` beside ``config.json`` and ``dataset.json``.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from adderflax.data import DatasetInfo
from adderflax.files import write_whole
from adderflax.models.classifier import abstract_variables
from adderflax.models.families import build_model
from adderflax.operators import available_implementations
from adderflax.operators._dispatch import unavailable
from adderflax.training import sharding
from adderflax.training import workdir as workdir_lib
from adderflax.training.checkpoints import Checkpointer
from adderflax.training.config import ConfigError, RunConfig
from adderflax.training.optimizer import make_optimizer
from adderflax.training.state import abstract_state

WEIGHTS = "weights.npz"


def require_implementation(run: RunConfig) -> None:
    """Raises a ConfigError if a run names an operator implementation that this machine does not have."""
    if (named := run.model.get("implementation")) is not None and (reason := _lacking(named)):
        raise ConfigError(
            f"model.implementation={named!r} {reason}; or leave it unset, to choose by platform."
        )


def _lacking(implementation: str) -> str | None:
    """Why this machine does not have an operator implementation, or None."""
    platform = jax.default_backend()
    if implementation not in (here := available_implementations(platform)):
        return f"does not run on this platform, {platform}: choose one of {', '.join(map(repr, here))}"
    reason = unavailable(implementation)
    return reason and f"cannot be built on this machine: {reason}"


def config_here(workdir: str | Path) -> dict[str, Any]:
    """The configuration that a workdir was begun with, without what belongs to the machine it was trained on.

    That is the mesh, and an operator implementation that this machine does not have.
    """
    saved = workdir_lib.read_config(workdir)
    if not isinstance(model := saved.get("model", {}), dict):
        raise ConfigError(f"model={model!r} in {Path(workdir) / 'config.json'} must hold named fields.")
    # What names none asks for no device.
    if (named := model.get("implementation")) is not None and _lacking(named):
        model = model | {"implementation": None}
    return saved | {"mesh": {}, "model": model}


def data_from(config: dict[str, Any], data_dir: str | None) -> dict[str, Any]:
    """A run's whole configuration with its data sets in `data_dir`; as it is where that is None."""
    return config if data_dir is None else config | {"data": config["data"] | {"data_dir": data_dir}}


def finished_summary(workdir: str | Path, run: RunConfig) -> dict[str, Any] | None:
    """The summary in a directory if it is that of all steps of `run`, whose data set is not needed."""
    workdir = Path(workdir)
    if not all((workdir / name).exists() for name in ("summary.json", "dataset.json")):
        return None
    return workdir_lib.read_summary(workdir, steps=run.num_steps(workdir_lib.read_info(workdir)))


def load_model(workdir: str | Path, *, best: bool = False) -> tuple[nn.Module, dict[str, Any], DatasetInfo]:
    """Loads what a run has trained.

    Args:
      workdir: the run's directory.
      best: take the checkpoint with the best validation accuracy instead of the newest.

    Returns:
      The Linen module; its variables, ready for ``model.apply(variables, images)``, which are the
      averages where the run keeps any; and the description of the data set.

    Raises:
      WorkdirError: the directory holds no run, no checkpoint yet, what does not fit its config.json, an
        export, or a file of weights where `best` asks for a checkpoint.
    """
    model, variables, info, _ = load_step(workdir, best=best)
    return model, variables, info


def load_step(
    workdir: str | Path, *, best: bool = False
) -> tuple[nn.Module, dict[str, Any], DatasetInfo, int | None]:
    """What `load_model` gives, and the checkpoint's step, or None where it is a file of weights."""
    if workdir_lib.holds_integers(workdir):
        raise workdir_lib.WorkdirError(
            f"{workdir} holds an export, integers that python -m adderflax.predict and"
            " adderflax.analysis.integer_files.load_integers read. Give the directory of the run that it was"
            " made from."
        )
    run = RunConfig.parse(config_here(workdir))
    info = workdir_lib.read_info(workdir)
    model = build_model(run.model_config(info))
    weights = Path(workdir) / WEIGHTS
    if weights.exists() and not workdir_lib.has_checkpoints(workdir):
        if best:
            raise workdir_lib.WorkdirError(
                f"{workdir} holds one model, {WEIGHTS}, and no checkpoints to choose the best of: leave"
                " --best out."
            )
        return model, _read_weights(weights, model), info, None
    # The optimizer's state is part of a checkpoint; its shape does not depend on the number of steps.
    optimizer, _ = make_optimizer(run.optimizer, total_steps=1)
    target = abstract_state(model, optimizer, with_ema=run.ema_decay > 0, mesh=sharding.make_mesh())
    with Checkpointer(workdir, read_only=True) as checkpointer:
        step = _step(checkpointer, workdir, best)
        state = checkpointer.restore_state(target, step)
    return model, state.evaluated_variables, info, step


def _step(checkpointer: Checkpointer, workdir: str | Path, best: bool) -> int:
    step = checkpointer.best_step if best else checkpointer.latest_step
    if step is None and checkpointer.latest_step is not None:
        raise workdir_lib.WorkdirError(
            f"{Path(workdir).absolute()} has checkpoints, but none of them was validated, so none is the"
            " best: its run has no validation part (data.validation_fraction=0), or has not come to it"
            " yet. Leave --best out."
        )
    if step is None:
        raise workdir_lib.WorkdirError(
            f"{Path(workdir).absolute()} has no complete checkpoint yet: train first, by the train.py"
            " command that began the run."
        )
    return step


def write_weights(workdir: str | Path, file: str | Path, *, best: bool = False) -> None:
    """Writes the variables that `load_model` gives as one file: parameters in float16, two bytes each.

    Running statistics stay in float32: they are few, and those of adder sums large beside their deviation.

    Args:
      workdir: the run's directory.
      file: the .npz file; as ``weights.npz`` beside the run's config.json and dataset.json it makes a workdir
        that can predict, teach and start other runs.
      best: as for `load_model`.

    Raises:
      ValueError: the file's name does not end in .npz, or a parameter is too large for float16.
    """
    if Path(file).suffix != ".npz":
        raise ValueError(f"{file} must end in .npz, as weights.npz, the name that a workdir's file has.")
    _, variables, _ = load_model(workdir, best=best)
    flat = traverse_util.flatten_dict(variables, sep="/")
    arrays = {name: np.asarray(leaf, np.float32) for name, leaf in flat.items()}
    largest = np.finfo(np.float16).max
    narrow = [name for name in arrays if name.startswith("params/")]
    if wide := [name for name in narrow if np.abs(arrays[name]).max(initial=0.0) > largest]:
        raise ValueError(f"{', '.join(wide)} of {workdir} exceed {largest:.0f}, the largest float16.")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    archive = io.BytesIO()
    np.savez(archive, **arrays | {name: arrays[name].astype(np.float16) for name in narrow})
    write_whole(Path(file), archive.getvalue())


def unflatten_variables(arrays: Mapping[str, jax.Array], model: nn.Module, file: Path) -> dict[str, Any]:
    """A model's variables from arrays named "collection/.../name", as a file of weights has them.

    Raises:
      WorkdirError: names or shapes are not those of the model; the message names them, and the file.
    """
    wanted = traverse_util.flatten_dict(abstract_variables(model), sep="/")
    wanted, shapes = ({name: leaf.shape for name, leaf in flat.items()} for flat in (wanted, arrays))
    names = wanted.keys() | arrays.keys()
    if wrong := sorted(name for name in names if wanted.get(name) != shapes.get(name)):
        raise workdir_lib.WorkdirError(
            f"{file} does not belong to the model that config.json beside it describes:"
            f" {', '.join(wrong[:8])}{' ...' if len(wrong) > 8 else ''} differ. Put back the config.json that"
            " came with it."
        )
    return traverse_util.unflatten_dict(dict(arrays), sep="/")


def _read_weights(file: Path, model: nn.Module) -> dict[str, Any]:
    try:
        with np.load(file) as archive:
            found = {name: jnp.float32(archive[name]) for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise workdir_lib.WorkdirError(f"{file} cannot be read: {error}. Put back a copy of it.") from error
    return unflatten_variables(found, model, file)
