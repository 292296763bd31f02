"""Optax and flax promote dtypes implicitly, so strict promotion ends where the operators and layers do."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield
