"""Models: a frozen dataclass describes one, a Linen module computes it."""

from adderflax.models.addernet_weights import load_addernet_weights
from adderflax.models.conversion import warm_start, warm_start_layer
from adderflax.models.families import register_model
from adderflax.models.resnet import AdderResNet, AdderResNetConfig
from adderflax.models.vit import VisionTransformer, VisionTransformerConfig
from adderflax.models.vit_weights import load_vit_weights

__all__ = [
    "AdderResNet",
    "AdderResNetConfig",
    "VisionTransformer",
    "VisionTransformerConfig",
    "load_addernet_weights",
    "load_vit_weights",
    "register_model",
    "warm_start",
    "warm_start_layer",
]
