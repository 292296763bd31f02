"""The training state and the two compiled functions of a run: one update and one evaluation batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from adderflax.models.classifier import blank_image
from adderflax.training import sharding
from adderflax.training.distillation import Teacher, distillation_loss, outputs_of

Batch = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """Everything an update reads and writes.

    Attributes:
      step: int32 [], number of updates done, those left out included.
      params: parameters, float32.
      batch_stats: running statistics of a model with BatchNorm, else None.
      opt_state: the optimizer's state.
      ema_params: exponential moving average of `params`, or None where it is off.
      ema_batch_stats: the same of `batch_stats`.
      key: typed PRNG key of the run; the update at step t uses ``fold_in(key, t)``.
      skipped: int32 [], updates that were left out because they were not finite.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema_params: Any
    ema_batch_stats: Any
    key: jax.Array
    skipped: jax.Array

    @property
    def evaluated_variables(self) -> dict[str, Any]:
        """The model's variables for evaluation and prediction: the averages where there are any."""
        if self.ema_params is None:
            return model_variables(self.params, self.batch_stats)
        return model_variables(self.ema_params, self.ema_batch_stats)


def model_variables(params: Any, batch_stats: Any) -> dict[str, Any]:
    """What ``model.apply`` takes."""
    return {"params": params} if batch_stats is None else {"params": params, "batch_stats": batch_stats}


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    with_ema: bool,
    mesh: Mesh,
    params: Any = None,
) -> TrainState:
    """Initializes the state on the mesh, cut as it rests there.

    Args:
      model: an image classifier with a `config` of image_size and channels.
      optimizer: the optimizer.
      seed: seed of the initialization and of everything random in the run.
      with_ema: whether an average of the parameters is kept.
      mesh: the devices.
      params: parameters to begin with, on the host; None draws them at random.
    """

    def new_state(params):
        return _new_state(model, optimizer, seed, with_ema, params)

    shardings = sharding.resting(jax.eval_shape(new_state, params), mesh)
    return jax.jit(new_state, out_shardings=shardings)(params)


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    with_ema: bool,
    mesh: Mesh,
) -> TrainState:
    """Shapes, dtypes and shardings of `init_state`, without computing it: a target for restoring."""
    shapes = jax.eval_shape(lambda: _new_state(model, optimizer, 0, with_ema))

    def place(leaf, placement):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

    return jax.tree.map(place, shapes, sharding.resting(shapes, mesh))


def _new_state(model, optimizer, seed, with_ema, params=None) -> TrainState:
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, blank_image(model.config))
    params = variables["params"] if params is None else params
    batch_stats = variables.get("batch_stats")
    averages = jax.tree.map(jnp.copy, (params, batch_stats)) if with_ema else (None, None)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        ema_params=averages[0],
        ema_batch_stats=averages[1],
        key=key,
        skipped=jnp.zeros((), jnp.int32),
    )


def step_inputs(
    state: TrainState,
    batch: Batch,
    augment: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The images, targets and model's key of the update that follows `state` on a batch."""
    augment_key, model_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    return *augment(augment_key, batch["image"], batch["label"]), model_key


def annealed_exponent(step: jax.Array, anneal_steps: int) -> jax.Array:
    """The exponent p of the update that follows `step` updates: from 2 down to 1, and 1 from there on."""
    return optax.linear_schedule(2.0, 1.0, anneal_steps)(step)


def training_loss(
    model: nn.Module,
    teacher: Teacher | None,
    variables: dict[str, Any],
    taught: Any,
    exponent: dict[str, jax.Array],
    images: jax.Array,
    targets: jax.Array,
    key: jax.Array,
    *,
    apply: Callable[..., Any] | None = None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    """The mean loss over a batch, in nats; with its parts and the accuracy, and the new BatchNorm statistics.

    Args:
      model: as `make_train_step` takes it.
      teacher: the same.
      variables: the model's.
      taught: the teacher's.
      exponent: {"p": p}, or {} where p is 1.
      images: augmented, float32 [B, height, width, channels].
      targets: [B, num_classes].
      key: of the model's randomness.
      apply: in place of `model.apply`.
    """
    collections = ["batch_stats", *(teacher.collections if teacher else [])]
    rngs = {"drop_path": key, "dropout": jax.random.fold_in(key, 1)}
    options = {"train": True, "rngs": rngs, "mutable": collections}
    logits, collected = (apply or model.apply)(variables, images, **options, **exponent)
    if teacher is None:
        loss, parts = jnp.mean(optax.softmax_cross_entropy(logits, targets)), {}
    else:
        student = outputs_of(model, logits, collected)
        loss, parts = distillation_loss(teacher.config, student, teacher.outputs(taught, images), targets)
    hits = jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)
    parts["accuracy"] = jnp.mean(hits.astype(jnp.float32))
    return loss, (parts, collected.get("batch_stats"))


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    augment: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    *,
    schedule: optax.Schedule,
    ema_decay: float = 0.0,
    accumulation_steps: int = 1,
    skip_nonfinite_steps: int = 0,
    anneal_steps: int = 0,
    teacher: Teacher | None = None,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles one update over a whole batch; the state is donated.

    Args:
      model: an image classifier, called as ``model.apply(variables, images, train=True, rngs=...)``; with
        `anneal_steps` also with ``p=``.
      optimizer: fed the gradient of the mean loss over the whole batch.
      augment: ``(key, images uint8, labels) -> (images float32, targets [B, num_classes])``.
      schedule: the optimizer's learning rate by the number of updates that were made, for the figures.
      ema_decay: decay of the parameters' average; 0 keeps none. It starts smaller, at
        ``(1 + t) / (10 + t)``, so that the average forgets the initialization.
      accumulation_steps: the batch is cut into this many parts whose gradients are averaged, to save
        memory; the update is that of the whole batch. A BatchNorm normalizes each part by itself.
      skip_nonfinite_steps: an update whose loss, gradient, new parameters or statistics are not finite
        changes nothing but the state's `step` and `skipped`. After more than so many of them not even `step`
        changes any more: the state stays what it was before the last one.
      teacher: a trained model whose outputs on the same images count in the loss.
      anneal_steps: updates over which the exponent p of the adder layers' ``-sum |x - w|^p`` falls linearly
        from 2 to 1 (Universal Adder Neural Networks, Chen et al. 2021).
      mesh: the devices.

    Returns:
      ``(state, batch) -> (state, metrics)`` with the float32 scalars loss, accuracy, gradient_norm,
      parameter_norm, which is of the new parameters, and learning_rate; with a teacher also the parts of the
      loss (`adderflax.training.distillation.distillation_loss`), with `anneal_steps` the exponent; and
      finite, bool, whether the update was made, and skipped, int32.
    """

    def loss_and_more(params, batch_stats, *rest):
        return training_loss(model, teacher, model_variables(params, batch_stats), *rest)

    def value_and_grad(params, *part):
        value, gradients = jax.value_and_grad(loss_and_more, has_aux=True)(params, *part)
        # Each device keeps the part of the sum whose parameters it updates.
        return value, sharding.constrain(gradients, sharding.resting, mesh)

    def whole_batch(state, taught, exponent, images, targets, model_key):
        params = sharding.constrain(state.params, sharding.computing, mesh)
        one_part = partial(value_and_grad, params, state.batch_stats, taught, exponent)
        if accumulation_steps == 1:
            return one_part(images, targets, model_key)

        def accumulate(total, part):
            return jax.tree.map(jnp.add, total, one_part(*part)), None

        parts = (split(images), split(targets), jax.random.split(model_key, accumulation_steps))
        shapes = jax.eval_shape(one_part, *jax.tree.map(lambda leaf: leaf[0], parts))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(accumulate, zeros, parts)
        return jax.tree.map(lambda leaf: leaf / accumulation_steps, total)

    def split(leaf):
        # Part p takes rows p, p + parts, ...: a share of every device's rows, so nothing moves between them.
        parts = leaf.reshape(-1, accumulation_steps, *leaf.shape[1:])
        return jnp.swapaxes(parts, 0, 1)

    def train_step(state: TrainState, batch: Batch, taught: Any = None):
        inputs = step_inputs(state, batch, augment)
        if anneal_steps:
            exponent = {"p": annealed_exponent(state.step, anneal_steps)}
            # Once p has arrived at 1, the kernels of the L1 distance take over.
            (loss, (parts, batch_stats)), gradients = jax.lax.cond(
                state.step < anneal_steps,
                lambda: whole_batch(state, taught, exponent, *inputs),
                lambda: whole_batch(state, taught, {}, *inputs),
            )
        else:
            (loss, (parts, batch_stats)), gradients = whole_batch(state, taught, {}, *inputs)

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averages = (state.ema_params, state.ema_batch_stats)
        if state.ema_params is not None:
            t = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1.0 + t) / (10.0 + t))
            averages = jax.tree.map(
                lambda old, new: old + (1.0 - decay) * (new - old), averages, (params, batch_stats)
            )
        gradient_norm, parameter_norm = _norm(gradients, mesh), _norm(params, mesh)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(parameter_norm)
        if batch_stats is not None:
            finite &= jnp.isfinite(_norm(batch_stats, mesh))
        skipped = state.skipped + jnp.where(finite, 0, 1)
        over = skipped > skip_nonfinite_steps
        learning_rate = schedule(state.step - state.skipped)
        learned = state.replace(
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema_params=averages[0],
            ema_batch_stats=averages[1],
        )
        state = jax.tree.map(partial(jnp.where, finite & ~over), learned, state)
        state = state.replace(step=state.step + jnp.where(over, 0, 1), skipped=skipped)
        metrics = {
            "loss": loss,
            **parts,
            "gradient_norm": gradient_norm,
            "parameter_norm": parameter_norm,
            "learning_rate": jnp.asarray(learning_rate, jnp.float32),
            "finite": finite,
            "skipped": skipped,
        }
        if anneal_steps:
            metrics["exponent"] = exponent["p"]
        return state, metrics

    shapes = jax.eval_shape(lambda: _new_state(model, optimizer, 0, ema_decay > 0))
    state, rows = sharding.resting(shapes, mesh), sharding.batch_sharding(mesh)
    everywhere = sharding.replicated(mesh)
    compiled = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state, rows, everywhere) if teacher else (state, rows),
        out_shardings=(state, everywhere),
    )
    if teacher is None:
        return compiled
    # An argument, not a constant: constants would be compiled into the program.
    taught = jax.device_put(teacher.variables, everywhere)
    return lambda state, batch: compiled(state, batch, taught)


def _norm(tree: Any, mesh: Mesh) -> jax.Array:
    """The L2 norm of all leaves together."""
    if mesh.size > 1:  # joining them would gather what is cut
        return optax.tree.norm(tree)
    # One sum rather than one a leaf: on a GPU each is a kernel of its own, hundreds for a transformer.
    return jnp.linalg.norm(
        jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(tree)])
    )


def make_eval_step(
    model: nn.Module, normalize: Callable[[jax.Array], jax.Array], *, mesh: Mesh
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Compiles the evaluation of one batch.

    Args:
      model: an image classifier.
      normalize: ``images uint8 -> images float32``.
      mesh: the devices.

    Returns:
      ``(variables, batch) -> sums`` over the rows, each weighted by the batch's "weight": "loss", "correct",
      "correct_top5" and "examples".
    """

    def eval_step(variables, batch: Batch):
        variables = sharding.constrain(variables, sharding.computing, mesh)
        logits = model.apply(variables, normalize(batch["image"]))
        labels, weight = batch["label"], batch["weight"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        # Strictly larger logits only: the label's rank, 0 for a correct prediction.
        rank = jnp.sum((logits > own).astype(jnp.int32), axis=-1)
        # A tie between the label and an earlier class is argmax's call, as in every framework's top-1.
        correct = jnp.argmax(logits, axis=-1) == labels
        return {
            "loss": jnp.sum(losses * weight),
            "correct": jnp.sum(correct.astype(jnp.float32) * weight),
            "correct_top5": jnp.sum(jnp.where(jnp.isnan(own[:, 0]), 0.0, rank < 5) * weight),
            "examples": jnp.sum(weight),
        }

    # The variables come as they rest.
    shardings = (None, sharding.batch_sharding(mesh))
    return jax.jit(eval_step, in_shardings=shardings, out_shardings=sharding.replicated(mesh))
