"""What layers compute, in float64, and inputs and parameters for them."""

import dataclasses

import jax
import numpy as np

from adderflax import EncoderConfig

SMALL = EncoderConfig(embed_dim=8, num_heads=2, mlp_dim=12, implementation="reference")
MULTIPLY = dataclasses.replace(SMALL, linear="multiply", output_projection="multiply", similarity="dot")


def layer_norm(x, epsilon=1e-6):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + epsilon)


def adder(x, kernel):
    return -np.abs(x[..., :, None] - kernel).sum(-2)


def kernels(params, *path):
    node = params
    for name in path:
        node = node[name]
    return np.asarray(node["adder_kernel" if "adder_kernel" in node else "kernel"], np.float64)


def tokens(shape=(2, 5, 8), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def random_params(module, *inputs, seed=1):
    """Parameters that are all random, so that no bias or scale hides behind its initial value."""
    variables = jax.jit(module.init)(jax.random.key(seed), *inputs)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree,
        [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)],
    )
