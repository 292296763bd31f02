"""Models: a frozen dataclass describes one, a Linen module computes it."""

from adderflax.models.addernet_weights import load_addernet_weights
from adderflax.models.resnet import AdderResNet, AdderResNetConfig
from adderflax.models.vit import VisionTransformer, VisionTransformerConfig

__all__ = [
    "AdderResNet",
    "AdderResNetConfig",
    "VisionTransformer",
    "VisionTransformerConfig",
    "load_addernet_weights",
]
