"""Where the numbers ended: which layer went first on a batch whose update was not finite."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils

from adderflax.files import write_whole
from adderflax.training.distillation import Teacher
from adderflax.training.state import (
    Batch,
    TrainState,
    annealed_exponent,
    model_variables,
    step_inputs,
    training_loss,
)
from adderflax.training.steplog import DivergenceError
from adderflax.training.workdir import first_line


def explain(
    error: DivergenceError, workdir: Path, find: Callable[[dict[str, np.ndarray]], str]
) -> DivergenceError:
    """Completes an error with its examples, its first layer and what to do; writes ``divergence.json``.

    Args:
      error: as `adderflax.training.steplog.StepLog` raised it.
      workdir: the run's directory.
      find: `find_culprit` for a host batch.
    """
    report = {"step": error.step, "figures": str(error)}
    details = ""
    if error.batch is not None:
        indices = _of_all_processes(error.batch["index"])
        try:
            culprit = find(error.batch)
        except Exception as failure:  # without rematerialization there may be no memory for the search
            culprit = f"Which layer went first could not be found out ({first_line(failure)})."
        report |= {"culprit": culprit, "indices": indices}
        shown = ", ".join(map(str, indices[:8])) + (f" and {len(indices) - 8} more" * (len(indices) > 8))
        details = f" {report['culprit']} It was computed on training examples {shown}."
    file = workdir / "divergence.json"
    if jax.process_index() == 0:
        write_whole(file, json.dumps(report, indent=1) + "\n")
    return DivergenceError(
        f"{error}{details} The whole account is in {file}. The run stops; the checkpoints in its workdir are"
        " from earlier updates and intact. Lower optimizer.learning_rate, raise optimizer.warmup_fraction or"
        " clip with optimizer.clip_norm, in another workdir; or go on in this one and leave out a few such"
        " updates with --config.skip_nonfinite_steps.",
        step=error.step,
        batch=error.batch,
    )


def _of_all_processes(indices: np.ndarray) -> list[int]:
    """The whole batch's: each process holds its own part of it, or the same one as its neighbors."""
    if jax.process_count() > 1:
        indices = multihost_utils.process_allgather(indices)
    return list(dict.fromkeys(indices.reshape(-1).tolist()))


def find_culprit(
    model: nn.Module,
    state: TrainState,
    batch: Batch,
    augment: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    *,
    accumulation_steps: int = 1,
    anneal_steps: int = 0,
    teacher: Teacher | None = None,
) -> str:
    """Repeats an update's forward and backward pass and looks at every layer's outputs and gradients.

    Args:
      model: the run's model.
      state: the state that the update was computed from.
      batch: the batch that it was computed on.
      augment: as `adderflax.training.state.make_train_step` takes it.
      accumulation_steps: parts that the batch is cut into.
      anneal_steps: as `adderflax.training.state.make_train_step` takes it.
      teacher: the same.

    Returns:
      A sentence that names the first layer, in the order of execution, whose output is not finite; where all
      are finite, the first one in the order of the backward pass whose gradient is not.
    """
    # Values inside of a rematerialized block cannot be looked at from outside; the computation is the same.
    if getattr(model.config, "remat", False):
        model = type(model)(dataclasses.replace(model.config, remat=False))
    # As in the update: once p has arrived at 1, the L1 distance itself.
    anneals = int(state.step) < anneal_steps
    names: list[str] = []

    def loss_and_flags(params, taught, exponent, images, targets, key):
        names.clear()
        flags = []

        def look(method, arguments, keywords, context):
            output = method(*arguments, **keywords)
            if context.method_name == "__call__":
                names.append("/".join(context.module.path))
                flags.append(_finite(output))
            return output

        def watched(*arguments, **keywords):  # the model, and not its teacher
            with nn.intercept_methods(look):
                return model.apply(*arguments, **keywords)

        variables = model_variables(params, state.batch_stats)
        given = variables, taught, exponent, images, targets, key
        loss, _ = training_loss(model, teacher, *given, apply=watched)
        return loss, (flags, jnp.isfinite(loss))

    @jax.jit
    def examine(state, batch, taught):
        images, targets, key = step_inputs(state, batch, augment)
        given = taught, {"p": annealed_exponent(state.step, anneal_steps)} if anneals else {}
        keys = [key] if accumulation_steps == 1 else jax.random.split(key, accumulation_steps)
        reports = []
        for part, part_key in enumerate(keys):
            rows = slice(part, None, accumulation_steps)
            gradient = jax.grad(loss_and_flags, has_aux=True)
            gradients, (flags, loss) = gradient(state.params, *given, images[rows], targets[rows], part_key)
            reports.append((_finite(images[rows]), flags, loss, jax.tree.map(_finite, gradients)))
        return jax.tree.map(_finite, state.params), reports

    # An argument: arrays of several processes cannot be constants.
    taught = jax.device_put(teacher.variables, state.step.sharding) if teacher else None
    params, reports = jax.device_get(examine(state, batch, taught))
    if broken := _broken(params):
        return f"Parameters are not finite, among them {broken[0]}."
    for images, flags, loss, _ in reports:
        if not images:
            return "The augmented images themselves are not finite."
        if not all(flags):
            name = names[flags.index(False)] or "the classifier as a whole"
            return f"The first layer whose activations are not finite is {name}."
        if not loss:
            return "All activations are finite, but they are too large for a finite loss."
    order = {name: position for position, name in enumerate(names) if name}
    for *_, gradients in reports:
        if broken := _broken(gradients):
            last = max(broken, key=lambda name: order.get(name.rpartition("/")[0], -1))
            return f"All activations are finite; the first parameter whose gradient is not is {last}."
    return (
        "All activations and gradients are finite one by one: their norm, or what the optimizer or a"
        " BatchNorm's statistics made of them, is not."
    )


def _finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _broken(finite: Any) -> list[str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(finite)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, flag in leaves if not flag]
