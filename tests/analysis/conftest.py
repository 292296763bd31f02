"""The command runs under JAX's own promotion rules; Flax's bfloat16 layers rely on them."""

import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield
