"""From a variant's name to its configuration's class, and from a configuration to its module."""

from flax import linen as nn

from adderflax.fields import require_choice
from adderflax.models import resnet, vit
from adderflax.models.resnet import AdderResNet, AdderResNetConfig
from adderflax.models.vit import VisionTransformer, VisionTransformerConfig

ModelConfig = VisionTransformerConfig | AdderResNetConfig
MODULES = {VisionTransformerConfig: VisionTransformer, AdderResNetConfig: AdderResNet}
CONFIG_CLASSES = dict.fromkeys(vit.VARIANTS, VisionTransformerConfig) | dict.fromkeys(
    resnet.VARIANTS, AdderResNetConfig
)


def config_class(variant: str) -> type[ModelConfig]:
    """The class whose `from_variant` takes a variant.

    Raises:
      ValueError: no model has such a variant; the message lists all.
    """
    require_choice("variant", variant, tuple(CONFIG_CLASSES))
    return CONFIG_CLASSES[variant]


def build_model(config: ModelConfig) -> nn.Module:
    """The Linen module that computes what `config` describes."""
    return MODULES[type(config)](config)
