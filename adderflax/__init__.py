"""Multiplication-free vision transformers in JAX and Flax: adder operators, layers and models.

Importing this needs jax, flax and numpy, and so does `adderflax.training.optimizer`, for a loop of your own.
Data, the trainer and analysis live in submodules too and need the ``train`` extra.
"""

from adderflax.attention import AdderCrossAttention, AdderSelfAttention
from adderflax.encoder import AdderMlp, EncoderBlock
from adderflax.encoder_config import EncoderConfig
from adderflax.layers import AdderConv, AdderDense
from adderflax.models import AdderResNet, AdderResNetConfig, VisionTransformer, VisionTransformerConfig
from adderflax.operators import adder_attention, adder_conv, adder_matmul

__version__ = "0.1.0"

__all__ = [
    "AdderConv",
    "AdderCrossAttention",
    "AdderDense",
    "AdderMlp",
    "AdderResNet",
    "AdderResNetConfig",
    "AdderSelfAttention",
    "EncoderBlock",
    "EncoderConfig",
    "VisionTransformer",
    "VisionTransformerConfig",
    "adder_attention",
    "adder_conv",
    "adder_matmul",
]
