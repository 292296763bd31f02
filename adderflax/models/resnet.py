"""AdderNet's residual network for 32 x 32 images, in adder or multiplying arithmetic."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from adderflax.fields import require_choice, require_count, require_known, settle_dtype, settle_rules
from adderflax.layers import (
    ARITHMETICS,
    DTYPES,
    AdderConv,
    Exponent,
    GradientRule,
)
from adderflax.models.classifier import require_images
from adderflax.operators import available_implementations

VARIANTS = {"ResNet-20": 3, "ResNet-32": 5}  # blocks of each of the three stages
PRESETS = {
    "adder": {"convolution": "adder", "shortcut": "adder"},
    "multiply": {"convolution": "multiply", "shortcut": "multiply"},
}
_WIDTHS = (16, 32, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdderResNetConfig:
    """A residual network of three stages, 16, 32 and 64 channels wide.

    The defaults are the ResNet-20 of AdderNet's official code (Chen et al., CVPR 2020).

    Attributes:
      image_size: height and width of the input in pixels; a multiple of 4.
      channels: channels of the input.
      num_classes: number of logits.
      blocks: residual blocks of each stage: 3 for ResNet-20, 5 for ResNet-32.
      convolution: arithmetic of the blocks' 3 x 3 convolutions, "adder" or "multiply".
      shortcut: arithmetic of the 1 x 1 convolutions where a stage widens.
      grad_inputs: gradient rule of adder layers towards their input (see `adderflax.adder_conv`).
      grad_kernel: gradient rule of adder layers towards their templates.
      batch_norm_momentum: part of the running statistics that a step keeps; PyTorch's 0.1 is 0.9 here.
      batch_norm_epsilon: added to the variance in every BatchNorm.
      dtype: computation dtype, "float32" or "bfloat16"; sums and BatchNorm stay in float32.
      implementation: operator implementation; None picks by platform.

    Raises:
      ValueError: a field has a value that is not allowed; the message names it.
    """

    image_size: int = 32
    channels: int = 3
    num_classes: int = 10
    blocks: int = 3
    convolution: str = "adder"
    shortcut: str = "adder"
    grad_inputs: GradientRule = "hardtanh"
    grad_kernel: GradientRule = "full"
    batch_norm_momentum: float = 0.9
    batch_norm_epsilon: float = 1e-5
    dtype: str = "float32"
    implementation: str | None = None

    def __post_init__(self):
        for name in ("convolution", "shortcut"):
            require_choice(name, getattr(self, name), ARITHMETICS)
        settle_dtype(self, DTYPES)
        for name in ("channels", "num_classes", "blocks", "image_size"):
            require_count(name, getattr(self, name))
        if self.image_size % 4:
            raise ValueError(f"image_size={self.image_size} must be a multiple of 4: two stages halve it.")
        if not 0.0 <= self.batch_norm_momentum < 1.0:
            raise ValueError(f"batch_norm_momentum={self.batch_norm_momentum} must lie in [0, 1).")
        settle_rules(self, "grad_inputs", "grad_kernel")
        require_choice("implementation", self.implementation, (None, *available_implementations()))

    @classmethod
    def from_variant(cls, variant: str, arithmetic: str = "adder", **fields) -> "AdderResNetConfig":
        """A named depth in a named arithmetic.

        Args:
          variant: "ResNet-20" or "ResNet-32".
          arithmetic: "adder", or "multiply" for the twin in which every convolution multiplies.
          **fields: any field; a field that is given replaces the variant's or the preset's.

        Raises:
          ValueError: unknown variant, arithmetic, field or value.
        """
        require_choice("variant", variant, tuple(VARIANTS))
        require_choice("arithmetic", arithmetic, tuple(PRESETS))
        require_known(cls, fields)
        return cls(**({"blocks": VARIANTS[variant]} | PRESETS[arithmetic] | fields))


class AdderResNet(nn.Module):
    """Classifier, images [B, image_size, image_size, channels] -> float32 logits [B, num_classes].

    A multiplying 3 x 3 convolution, three stages of residual blocks, the mean over all pixels, and a
    multiplying 1 x 1 convolution as classifier, each convolution followed by a BatchNorm, the classifier
    too. No convolution has a bias. The statistics are the collection ``batch_stats``; names follow the
    official code, so that its weights can be loaded (`load_addernet_weights`).
    """

    config: AdderResNetConfig

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, train: bool = False, p: Exponent = 1.0) -> jax.Array:
        """Computes the logits.

        Args:
          images_BxHxWxC: normalized images in a floating dtype.
          train: whether BatchNorm uses the statistics of this batch, and updates the running ones, for
            which ``batch_stats`` must be mutable.
          p: exponent of the distance in every adder convolution, a Python number or a scalar array, traced
            perhaps, from 1 to 2 (see `adder_matmul`). Running statistics are those of the p they saw.

        Raises:
          ValueError: the images do not have the configured size.
        """
        config = self.config
        require_images(config, images_BxHxWxC)
        norm = functools.partial(_batch_norm, config, train)
        x = _convolution(config, "multiply", _WIDTHS[0], 3, 1, "conv1", p)(images_BxHxWxC)
        x = nn.relu(norm("bn1")(x))
        for stage, features in enumerate(_WIDTHS, start=1):
            for index in range(config.blocks):
                stride = 2 if stage > 1 and index == 0 else 1
                x = _BasicBlock(config, features, stride, name=f"layer{stage}_{index}")(x, train, p)
        x = jnp.mean(x, axis=(1, 2), keepdims=True)
        x = norm("bn2")(_convolution(config, "multiply", config.num_classes, 1, 1, "fc", p)(x))
        return x[:, 0, 0].astype(jnp.float32)


class _BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside the identity, or beside a 1 x 1 convolution where the shape changes."""

    config: AdderResNetConfig
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, p: Exponent) -> jax.Array:
        config, features = self.config, self.features
        norm = functools.partial(_batch_norm, config, train)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != features:
            shortcut = _convolution(config, config.shortcut, features, 1, self.stride, "downsample_0", p)(x)
            shortcut = norm("downsample_1")(shortcut)
        x = _convolution(config, config.convolution, features, 3, self.stride, "conv1", p)(x)
        x = nn.relu(norm("bn1")(x))
        x = norm("bn2")(_convolution(config, config.convolution, features, 3, 1, "conv2", p)(x))
        return nn.relu(x + shortcut)


def _convolution(config, arithmetic, features, size, stride, name, p) -> Callable[[jax.Array], jax.Array]:
    # Not "SAME", which would pad an even image on one side only at stride 2.
    padding = ((size // 2, size // 2),) * 2
    shared = dict(kernel_size=(size, size), strides=(stride, stride), padding=padding, name=name)
    if arithmetic == "adder":
        layer = AdderConv(
            features=features,
            normalization="none",
            dtype=jnp.dtype(config.dtype),
            grad_x=config.grad_inputs,
            grad_kernel=config.grad_kernel,
            implementation=config.implementation,
            **shared,
        )
        return functools.partial(layer, p=p)
    init = nn.initializers.he_normal()
    return nn.Conv(features, use_bias=False, dtype=jnp.dtype(config.dtype), kernel_init=init, **shared)


def _batch_norm(config, train, name) -> nn.BatchNorm:
    # E[x^2] - E[x]^2 loses digits on adder sums, whose mean is many times their deviation.
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=config.batch_norm_momentum,
        epsilon=config.batch_norm_epsilon,
        dtype=jnp.dtype(config.dtype),
        use_fast_variance=False,
        name=name,
    )
