"""Adder operators: L1 counterparts of the matrix product, the convolution and attention.

    from adderflax.operators import adder_matmul, adder_conv, adder_attention

Importing this package needs jax only. Set the environment variable
ADDERFLAX_LOG_IMPLEMENTATION=1 before tracing to log which implementation runs.
"""

from adderflax.operators._dispatch import available_implementations
from adderflax.operators.attention import adder_attention
from adderflax.operators.conv import adder_conv
from adderflax.operators.matmul import adder_matmul
from adderflax.operators.rules import GradientRule

__all__ = ["GradientRule", "adder_attention", "adder_conv", "adder_matmul", "available_implementations"]
