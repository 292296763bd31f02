"""How well adder templates follow a dense kernel: the evidence behind the rule of `models.warm_start`.

    python -m benchmarks.templates

For random kernels [K, 192] and 1,500 random inputs [1500, K] it prints the correlation of an adder layer's
outputs, after a LayerNorm without parameters, with those of the dense layer, mean over the outputs. The
templates are `mu + sigma t`, where mu and sigma are the inputs' moments, or `t` alone; t is proportional to
the kernel and has the deviation at the head of the column.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from adderflax import adder_matmul, pipes
from adderflax.models.conversion import dense_templates

DEVIATIONS = (0.1, 0.3, 0.7, 1.0, 1.4, 2.0, 4.0)
OUTPUTS, EXAMPLES = 192, 1500


def inputs(kind: str, features: int, random: np.random.Generator) -> jax.Array:
    """Inputs [EXAMPLES, features]: "normal", of "unequal" moments, or the GELU of such."""
    x = random.normal(size=(EXAMPLES, features))
    if kind == "unequal":
        x = x * np.exp(0.7 * random.normal(size=features)) + random.normal(size=features)
    if kind == "gelu":
        x = x * np.exp(0.5 * random.normal(size=features)) + 0.5 * random.normal(size=features) - 0.5
        return jax.nn.gelu(jnp.float32(x))
    return jnp.float32(x)


@jax.jit
def agreement(x_NxK: jax.Array, templates_KxO: jax.Array, kernel_KxO: jax.Array) -> jax.Array:
    """Correlation over the inputs of adder and dense outputs, mean over the outputs."""
    added = jax.nn.standardize(adder_matmul(x_NxK, templates_KxO), axis=1)
    pairs = jax.nn.standardize(added, axis=0) * jax.nn.standardize(x_NxK @ kernel_KxO, axis=0)
    return jnp.mean(pairs)


@pipes.reader_may_leave()
def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.templates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    random = np.random.default_rng(0)
    print(f"{'inputs':10s}{'K':>5s}  {'rule':14s}" + "".join(f"{deviation:7.1f}" for deviation in DEVIATIONS))
    for kind, features in (
        ("normal", 64),
        ("normal", 192),
        ("normal", 768),
        ("unequal", 192),
        ("gelu", 192),
    ):
        x = inputs(kind, features, random)
        # Kernels whose outputs differ in scale, as trained ones do.
        kernel = random.normal(size=(features, OUTPUTS)) * np.exp(0.4 * random.normal(size=OUTPUTS))
        kernel = jnp.float32(kernel)
        mean = jnp.mean(x, axis=0)[:, None]
        relative = kernel / jnp.sqrt(jnp.mean(jnp.square(kernel), axis=0))
        spread = dense_templates(kernel, x) - mean
        for rule, offset, step in (("mu + sigma t", mean, spread), ("t alone", 0.0, relative)):
            found = [float(agreement(x, offset + deviation * step, kernel)) for deviation in DEVIATIONS]
            print(f"{kind:10s}{features:5d}  {rule:14s}" + "".join(f"{value:7.3f}" for value in found))


if __name__ == "__main__":
    main()
