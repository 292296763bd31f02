"""Models: a frozen dataclass describes one, a Linen module computes it."""

from adderflax.models.vit import VisionTransformer, VisionTransformerConfig

__all__ = ["VisionTransformer", "VisionTransformerConfig"]
