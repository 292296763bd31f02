"""Learning from a trained model besides the labels: its logits, its attention maps, its block outputs.

The pure losses and their weights. Every one of them is a mean over the examples of a batch, so that the
average over equal parts of a batch is that of the whole. Teacher and student are to see the same augmented
images, and the teacher without its stochastic depth (Beyer et al. 2022, "Knowledge distillation: A good
teacher is patient and consistent").

Xu et al. 2020, "Kernel Based Progressive Distillation for Adder Neural Networks", also teach an adder network
with the logits and features of a multiplying one of the same architecture, but train the teacher along with
it and pass features through kernels and learned layers first. Here the teacher is ready and nothing is
learned besides the student.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import traverse_util

from adderflax.models.classifier import blank_image

# Added to every attention weight before its logarithm. A map with the identity resolves the weights on its
# diagonal to 6e-8, so far below this there is only rounding.
_MAP_FLOOR = 1e-6
# Added to the variance of a token's features.
_FEATURE_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Which trained model is the teacher, and how much each part of it counts.

    The loss is ``(1 - soft_labels) * cross_entropy + soft_labels * soft_label_loss
    + attention * attention_loss + features * feature_loss``, with the functions of this module.

    Attributes:
      teacher: workdir of a trained run; None trains on the labels alone.
      temperature: divides both models' logits in the soft-label loss, which is scaled to keep its gradient:
        above 1 the student also learns how the teacher ranks unlikely classes (Hinton et al. 2015). 1 is the
        default of DeiT's code.
      soft_labels: share of the soft labels in the loss, 0 to 1; the labels have the rest.
      attention: weight of matching every attention map, in nats. Student and teacher need the same depth,
        number of heads and number of tokens.
      features: weight of matching every block's output. Student and teacher need the same depth, width and
        number of tokens.

    Raises:
      ValueError: a field has a value that is not allowed, a teacher has no weight, or a weight no teacher;
        the message says which.
    """

    teacher: str | None = None
    temperature: float = 1.0
    soft_labels: float = 0.0
    attention: float = 0.0
    features: float = 0.0

    def __post_init__(self):
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(
                f"distillation.temperature={self.temperature} must be finite and greater than 0."
            )
        if not 0.0 <= self.soft_labels <= 1.0:
            raise ValueError(f"distillation.soft_labels={self.soft_labels} must lie in [0, 1].")
        for name in ("attention", "features"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"distillation.{name}={getattr(self, name)} must be finite and not negative."
                )
        weights = {name: getattr(self, name) for name in ("soft_labels", "attention", "features")}
        if self.teacher == "":
            raise ValueError(
                "distillation.teacher is an empty path. Name the workdir of a trained run, or leave it unset"
                " to train on the labels alone."
            )
        if self.teacher is not None and not any(weights.values()):
            raise ValueError(
                f"distillation.teacher={self.teacher!r} would teach nothing: all weights are 0. Set at least"
                f" one of {', '.join(f'distillation.{name}' for name in weights)}, or unset the teacher."
            )
        if self.teacher is None and any(weights.values()):
            given = ", ".join(f"distillation.{name}={weight}" for name, weight in weights.items() if weight)
            raise ValueError(
                f"{given} without a teacher. Set distillation.teacher to the workdir of a trained run, or the"
                " weights to 0."
            )

    @property
    def needs_intermediates(self) -> bool:
        """Whether both models must sow what is inside of them; then they compute T x T attention maps."""
        return self.attention > 0 or self.features > 0


class Outputs(NamedTuple):
    """What one of the two models computed for a batch.

    Attributes:
      logits: float32 [B, num_classes].
      intermediates: the collection that `adderflax.VisionTransformer` sows; needed for a config with
        `needs_intermediates`.
      identity: whether the sown attention maps include the identity, as the model's `config.identity` says;
        maps are compared without it.
    """

    logits: jax.Array
    intermediates: Mapping[str, Any] | None = None
    identity: bool = False


def outputs_of(model: nn.Module, logits: jax.Array, collected: Mapping[str, Any]) -> Outputs:
    """The outputs of a model's `apply` with mutable collections."""
    return Outputs(logits, collected.get("intermediates"), bool(getattr(model.config, "identity", False)))


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model to learn from.

    Attributes:
      model: its module.
      variables: its variables.
      config: how much each part of it counts.
    """

    model: nn.Module
    variables: Any
    config: DistillationConfig

    @property
    def collections(self) -> list[str]:
        """What both models must sow."""
        return ["intermediates"] if self.config.needs_intermediates else []

    def outputs(self, variables: Any, images: jax.Array) -> Outputs:
        """What the teacher computes for normalized images; `variables` may be traced."""
        return outputs_of(self.model, *self.model.apply(variables, images, mutable=self.collections))

    def require_fits(self, student: nn.Module) -> None:
        """Raises ValueError, computing nothing, where the student has not what is to be compared."""

        def compare(key, variables):
            images = blank_image(student.config)
            logits, sown = student.apply(student.init(key, images), images, mutable=self.collections)
            outputs = outputs_of(student, logits, sown)
            return distillation_loss(self.config, outputs, self.outputs(variables, images), logits)

        jax.eval_shape(compare, jax.random.key(0), self.variables)


def distillation_loss(
    config: DistillationConfig, student: Outputs, teacher: Outputs, targets: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss that `DistillationConfig` describes; its gradient reaches the student only.

    Args:
      config: the weights.
      student: of the model that learns.
      teacher: of the model that it learns from, on the same images.
      targets: [B, num_classes], the labels' distribution.

    Returns:
      The loss, float32 [], and its parts before they are weighted, float32 [] each: "label_loss" always, and
      "soft_label_loss", "attention_loss", "feature_loss" where their weight is not 0.

    Raises:
      ValueError: what is to be compared is missing or differs in shape.
    """
    parts = {"label_loss": jnp.mean(optax.softmax_cross_entropy(student.logits, targets))}
    loss = (1.0 - config.soft_labels) * parts["label_loss"]
    if config.soft_labels:
        parts["soft_label_loss"] = soft_label_loss(student.logits, teacher.logits, config.temperature)
        loss += config.soft_labels * parts["soft_label_loss"]
    if config.attention:
        parts["attention_loss"] = attention_loss(student, teacher)
        loss += config.attention * parts["attention_loss"]
    if config.features:
        parts["feature_loss"] = feature_loss(student, teacher)
        loss += config.features * parts["feature_loss"]
    return loss, parts


def soft_label_loss(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """``T^2 KL(softmax(teacher_logits / T) || softmax(logits / T))``, mean over the batch, in nats.

    T^2 undoes that the gradient shrinks by as much at high temperatures, so that the balance with the labels
    does not depend on T. Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Args:
      logits: float32 [B, num_classes].
      teacher_logits: float32 [B, num_classes], taken as constant.
      temperature: T.

    Raises:
      ValueError: the numbers of classes differ.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"distillation.soft_labels compares logits, [batch, classes]: the student's are {logits.shape},"
            f" the teacher's {teacher_logits.shape}. Choose a teacher trained on the same classes, or"
            " set distillation.soft_labels=0."
        )
    log_student = jax.nn.log_softmax(logits / temperature)
    log_teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    divergence = optax.losses.kl_divergence_with_log_targets(log_student, log_teacher)
    return temperature**2 * jnp.mean(divergence)


def attention_loss(student: Outputs, teacher: Outputs) -> jax.Array:
    """KL(teacher's || student's attention weights) over the keys, in nats, without the identity.

    Mean over blocks, examples, heads and queries; head h learns from head h. MiniLM (Wang et al. 2020)
    transfers the last block's maps so; here every block has its counterpart.

    Raises:
      ValueError: the maps are missing or differ in number or shape.
    """

    def log_weights(map_BxHxTxT, identity):
        if identity:
            eye = jnp.eye(map_BxHxTxT.shape[-1], dtype=map_BxHxTxT.dtype)
            map_BxHxTxT = map_BxHxTxT - jnp.broadcast_to(eye, map_BxHxTxT.shape)
        # The same floor under both keeps the divergence at least 0, and at 0 for equal maps alone.
        return jnp.log(map_BxHxTxT + _MAP_FLOOR)

    pairs = _pairs("attention", "attention_weights", "[batch, heads, queries, keys]", student, teacher)
    losses = [
        optax.losses.kl_divergence_with_log_targets(
            log_weights(mine, student.identity), log_weights(theirs, teacher.identity)
        )
        for mine, theirs in pairs
    ]
    return jnp.mean(jnp.stack([jnp.mean(loss) for loss in losses]))


def feature_loss(student: Outputs, teacher: Outputs) -> jax.Array:
    """Mean squared difference of the blocks' outputs, each token standardized over its features.

    Between 0 and 4: it is 2 (1 - correlation of student and teacher), mean over blocks, examples and tokens.
    The hint of FitNets (Romero et al. 2015) for every block, as in TinyBERT (Jiao et al. 2020), with a
    LayerNorm without parameters in place of a learned projection. Wei et al. 2022, "Contrastive Learning
    Rivals Masked Image Modeling in Fine-tuning via Feature Distillation", put one on the teacher; here both
    have one, because every layer that reads these outputs does so behind a LayerNorm: a token's mean and
    scale are the model's own business.

    Raises:
      ValueError: the outputs are missing or differ in number or shape.
    """

    def standardize(x_BxTxD):
        return jax.nn.standardize(x_BxTxD.astype(jnp.float32), epsilon=_FEATURE_EPSILON, algorithm="stable")

    pairs = _pairs("features", "block_outputs", "[batch, tokens, width]", student, teacher)
    losses = [jnp.mean(jnp.square(standardize(mine) - standardize(theirs))) for mine, theirs in pairs]
    return jnp.mean(jnp.stack(losses))


def _pairs(
    field: str, sown: str, axes: str, student: Outputs, teacher: Outputs
) -> list[tuple[jax.Array, jax.Array]]:
    """What both models have sown under a name, block by block, the teacher's as constants."""
    found = []
    for who, outputs in (("student", student), ("teacher", teacher)):
        flat = traverse_util.flatten_dict(outputs.intermediates or {})
        found.append({path: values for path, values in flat.items() if path[-1] == sown})
        if not found[-1]:
            raise ValueError(
                f"distillation.{field} compares {sown}, but the {who} has none: only a transformer sows them,"
                f" and only with mutable=['intermediates']. Set distillation.{field}=0, which leaves"
                " distillation.soft_labels for any pair of models."
            )
    mine, theirs = found
    advice = (
        "Choose a teacher with the same model.depth, model.embed_dim, model.num_heads and tokens, or set"
        f" distillation.{field}=0."
    )
    counts, their_counts = ({path: len(values) for path, values in flat.items()} for flat in found)
    if counts != their_counts:
        raise ValueError(
            f"distillation.{field} compares block by block, but the student has {sum(counts.values())} blocks"
            f" and the teacher {sum(their_counts.values())}. {advice}"
        )
    pairs = [pair for path in mine for pair in zip(mine[path], theirs[path])]
    for x, y in pairs:
        if x.shape != y.shape:
            raise ValueError(
                f"distillation.{field} compares {sown}, {axes}: the student's are {x.shape}, the teacher's"
                f" {y.shape}. {advice}"
            )
    return [(x, jax.lax.stop_gradient(y)) for x, y in pairs]
