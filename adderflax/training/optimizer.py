"""AdamW or SGD with what adder templates need, as one optax transformation."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adderflax.fields import is_count

OPTIMIZERS = ("adamw", "sgd")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer, schedule and the treatment of adder templates.

    Attributes:
      name: "adamw" or "sgd".
      learning_rate: peak learning rate, reached at the end of the warm-up.
      warmup_fraction: share of all steps over which the rate rises linearly from 0.
      final_fraction: the cosine ends at this share of `learning_rate`.
      weight_decay: decoupled from the gradient for "adamw", added to it for "sgd".
      decay_adder: whether weight decay also pulls adder templates towards zero.
      decay_rest: whether it pulls everything that is neither dense kernel nor template as well: scales,
        biases, embeddings. `torch.optim` does so unless told otherwise.
      beta1: AdamW's decay of the first moment.
      beta2: AdamW's decay of the second moment.
      epsilon: AdamW's floor under the root of the second moment.
      momentum: SGD's momentum.
      nesterov: whether SGD's momentum is Nesterov's.
      clip_norm: bound on the gradient's global L2 norm; 0 does not clip. It acts first, so it does not bound
        what adder_local_rate makes of the templates' gradients.
      adder_multiplier: learning-rate multiplier of adder templates. None derives it. Adam moves every weight
        by about the learning rate whatever the gradient's scale, so a weight's relative step is the rate
        over the weight's deviation: 1/sqrt(fan_in) in a dense layer, 1 in N(0, 1) templates. The multiplier
        sqrt(fan_in) of each template restores the dense layer's relative step. For SGD, None means 1.
      adder_local_rate: AdderNet's adaptive local rate eta (0.2 in its code); 0 leaves it out. Applied to the
        averaged gradient of each template tensor before momentum and weight decay. It sets the gradient's
        scale itself, so it belongs with "sgd": Adam divides any constant scale out again.

    Raises:
      ValueError: a field has a value that is not allowed; the message names it.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.1
    final_fraction: float = 0.0
    weight_decay: float = 0.05
    decay_adder: bool = False
    decay_rest: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False
    clip_norm: float = 0.0
    adder_multiplier: float | None = None
    adder_local_rate: float = 0.0

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(
                f"optimizer.name={self.name!r} is not known; choose one of {', '.join(OPTIMIZERS)}."
            )
        for name in ("warmup_fraction", "final_fraction", "momentum"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1].")
        for name in ("beta1", "beta2"):  # at 1 Adam's correction of the first updates divides by 0
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1).")
        for name in ("learning_rate", "weight_decay", "clip_norm", "adder_local_rate", "epsilon"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be finite and not negative.")
        if self.adder_multiplier is not None and not 0.0 <= self.adder_multiplier < math.inf:
            raise ValueError(
                f"optimizer.adder_multiplier={self.adder_multiplier} must be finite and not negative, or"
                " unset for sqrt(fan_in)."
            )


def make_optimizer(
    config: OptimizerConfig, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Builds the optimizer for a run of `total_steps` updates.

    Args:
      config: the optimizer's configuration.
      total_steps: number of updates; warm-up and cosine are fractions of it.

    Returns:
      The transformation, to be fed gradients that are already averaged over the whole batch, and the
      schedule, a function of the update's index.
    """
    # At least one step is left for the cosine.
    warmup_steps = min(round(config.warmup_fraction * total_steps), total_steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
        end_value=config.final_fraction * config.learning_rate,
    )
    steps = []
    if config.clip_norm:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    if config.adder_local_rate:
        steps.append(adaptive_local_rate(config.adder_local_rate))
    decay = optax.add_decayed_weights(
        config.weight_decay,
        mask=lambda params: decay_mask(params, config.decay_adder, config.decay_rest),
    )
    multiply = scale_adder_updates(config.adder_multiplier)
    if config.name == "adamw":
        steps.append(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
        # The multiplier corrects Adam's step; decay is a rate per step and needs no such correction.
        steps += [multiply, decay]
    else:
        steps += [decay, optax.trace(config.momentum, nesterov=config.nesterov)]
        if config.adder_multiplier is not None:
            steps.append(multiply)
    return optax.chain(*steps, optax.scale_by_learning_rate(schedule)), schedule


def adaptive_local_rate(eta: float, *, stacked_axes: int = 0) -> optax.GradientTransformation:
    """AdderNet's adaptive local learning rate: ``g <- eta sqrt(numel) g / max(||g||_2, 1e-12)``.

    Applied to each adder template tensor, in float32 whatever its dtype; everything else passes unchanged.
    The official code does this inside the backward pass, hence per device, before the gradients are averaged;
    here it sees the averaged gradient, so the result does not depend on the number of devices or of
    accumulated parts.

    Args:
      eta: the rate, 0.2 in the official code.
      stacked_axes: of layers that share one array, as `scale_adder_updates` takes it.

    Raises:
      ValueError: `stacked_axes` is no whole number from 0 on; or, when the transformation is used, templates
        have another rank.
    """
    _require_axes(stacked_axes)

    def rescale(path, gradient):
        if not is_adder_parameter(path):
            return gradient
        axes = tuple(range(gradient.ndim))[-len(_template_shape(path, gradient, stacked_axes)) :]
        size = math.prod(gradient.shape[axis] for axis in axes)
        # In units of the largest element squares neither overflow nor vanish; 1e-12 is 0 in float16.
        in_full = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
        smallest = jnp.finfo(jnp.float32).tiny
        largest = jnp.max(jnp.abs(in_full), axes, keepdims=True, initial=smallest)
        direction = in_full / largest
        norm = jnp.sqrt(jnp.sum(jnp.square(direction), axes, keepdims=True))
        updates = direction * (eta * math.sqrt(size) / jnp.maximum(norm, 1e-12 / largest))
        return updates.astype(gradient.dtype)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(rescale, updates))


def scale_adder_updates(multiplier: float | None, *, stacked_axes: int = 0) -> optax.GradientTransformation:
    """Multiplies the updates of adder templates, by sqrt(fan_in) of each template tensor where None.

    Args:
      multiplier: a factor for all adder templates, or None.
      stacked_axes: leading axes along which `nn.scan` or `nn.vmap` has stacked all layers, whose templates
        are [in, out] or [height, width, in, out] behind them. Where only some are stacked, apply one
        transformation to these and another to the others, each by `optax.masked`. With 0, dense templates
        that are stacked twice cannot be told from a convolution's.

    Raises:
      ValueError: `stacked_axes` is no whole number from 0 on; or, when the transformation is used without a
        multiplier, templates have another rank.
    """
    _require_axes(stacked_axes)

    def rescale(path, update):
        if not is_adder_parameter(path):
            return update
        if multiplier is not None:
            return update * multiplier
        # Every axis but the last is summed over.
        return update * math.sqrt(math.prod(_template_shape(path, update, stacked_axes)[:-1]))

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(rescale, updates))


def _require_axes(stacked_axes: int) -> None:
    if stacked_axes != 0 and not is_count(stacked_axes):
        raise ValueError(f"stacked_axes={stacked_axes!r} must be a whole number, 0 or more.")


def _template_shape(path: tuple, array: jax.Array, stacked_axes: int) -> tuple[int, ...]:
    """The shape of one layer's templates."""
    shape = array.shape[stacked_axes:]
    if len(shape) not in (2, 4):
        raise ValueError(
            f"{jax.tree_util.keystr(path, simple=True, separator='/')} has shape {array.shape}; behind"
            f" stacked_axes={stacked_axes} an adder layer's templates are [in, out] or [height, width, in,"
            " out]. "
            + (
                "Where some layers are stacked and others are not, apply one transformation to each by"
                " optax.masked."
                if stacked_axes
                else "For layers that nn.scan or nn.vmap has stacked, pass stacked_axes=1."
            )
        )
    return shape


def decay_mask(params: Any, decay_adder: bool, decay_rest: bool = False) -> Any:
    """True for what weight decay applies to: dense kernels and, if asked, adder templates and the rest."""

    def decays(path, _):
        if is_adder_parameter(path):
            return decay_adder
        return decay_rest or _has_name(path, "kernel")

    return jax.tree_util.tree_map_with_path(decays, params)


def has_templates(params: Any) -> bool:
    """Whether adder templates are among the parameters."""
    return any(is_adder_parameter(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))


def idle_fields(config: OptimizerConfig, params: Any) -> list[str]:
    """Fields that are set, and have no effect with this optimizer on these parameters."""
    idle = {"adamw": ["momentum", "nesterov"], "sgd": ["beta1", "beta2", "epsilon"]}[config.name]
    if not has_templates(params):
        idle += ["adder_multiplier", "adder_local_rate", "decay_adder"]
    elif not config.weight_decay:
        idle += ["decay_adder"]
    if not config.weight_decay:
        idle += ["decay_rest"]
    unset = OptimizerConfig()
    return [f"optimizer.{name}" for name in idle if getattr(config, name) != getattr(unset, name)]


def is_adder_parameter(path: tuple) -> bool:
    """Whether a parameter's key path is that of adder templates, which are named ``adder_kernel``."""
    return _has_name(path, "adder_kernel")


def _has_name(path: tuple, name: str) -> bool:
    # Any entry counts: some libraries put the array itself one level below its name.
    return any(getattr(entry, "key", getattr(entry, "name", None)) == name for entry in path)
