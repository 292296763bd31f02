"""Models that the tests of integers share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from adderflax import AdderConv, AdderDense, VisionTransformer, VisionTransformerConfig
from adderflax.analysis.integer_only import integer_only_model
from adderflax.analysis.integers import quantize
from adderflax.data import DataConfig, load_dataset, normalize_batch
from adderflax.training.config import default_config
from adderflax.training.trainer import train


@dataclasses.dataclass(frozen=True)
class Description:
    dtype: str = "float32"


class RawSums(nn.Module):
    """An adder layer whose sums are the result."""

    layer: nn.Module
    config: Description = Description()

    def __call__(self, images):
        return self.layer(images)


def layers(centered):
    shared = {"normalization": "none", "centered": centered}
    yield RawSums(AdderDense(9, **shared))
    geometry = {"strides": (2, 1), "padding": ((1, 0), (2, 1)), "dilation": (1, 2)}
    yield RawSums(AdderConv(6, (3, 2), feature_group_count=3, **geometry, **shared))


def model_of(**fields):
    config = VisionTransformerConfig.from_variant("digits", **({"arithmetic": "adder"} | fields))
    images = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
    model = VisionTransformer(config)
    return model, jax.jit(model.init)(jax.random.key(1), images), images


SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 24, "centered": True, "pooling": "mean"}


ALL_ADD = {"patch_embedding": "adder", "head": "adder", "aggregation": "l1"}
STEM = {"stem": "conv", "mlp_kernel_size": 3}
INFO = load_dataset(DataConfig(name="digits")).info
MODELS = {
    "plain": {},
    "token": {"pooling": "token", "centered": False, "identity": False},
    "all-add": ALL_ADD | {"pooling": "token", "power_activation": True},
    "all-add-stem": ALL_ADD | STEM | {"centered": False},
    "stem": STEM | {"mlp_convolution": "multiply", "power_activation": True},
    "twin": STEM | {"arithmetic": "multiply"},
    "vit": {"arithmetic": "vit", "pooling": "token"},
    "no-norms": {"normalization": "none", "attention_scale": 0.05, "layer_norm_epsilon": 0.05},
}


def made(bits: int = 8, **fields):
    """A model with every parameter moved from where it begins, its integers, and pixels."""
    model, variables, _ = model_of(**(SMALL | fields))
    noise = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: leaf + jnp.float32(0.1 * noise.normal(size=leaf.shape)), variables)
    pixels = noise.integers(0, 256, (24, 8, 8, 1), np.uint8)
    integers = quantize(model, variables, normalize_batch(pixels, INFO), bits=bits)
    return integers, integer_only_model(integers, pixels, INFO), pixels


def trained(path, **fields):
    """The workdir of a run of two steps on the digits, of a model that is SMALL but for these fields."""
    config = default_config()
    config.update_from_flattened_dict(
        {"batch_size": 32, "total_steps": 2, "log_every": 1, "eval_every": 2, "checkpoint_every": 2}
        | {f"model.{name}": value for name, value in (SMALL | fields).items()}
    )
    with jax.numpy_dtype_promotion("standard"):
        train(config, path, progress=False)
    return path


def expected_integers(values, exponent, bits):
    scaled = np.round(np.asarray(values, np.float64) / 2.0**exponent)
    return np.clip(scaled, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int64)


def dense_sums(x, w):
    return -np.abs(x[..., :, None].astype(np.int64) - w.astype(np.int64)).sum(-2)
