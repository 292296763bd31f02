"""Settings of every test: two CPU devices, strict promotion rules, no accelerator."""

import os
import tempfile

# Before jax is imported. Two devices make every jitted step a sharded one.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from absl import flags

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Programs that several tests compile alike are compiled once a session, those of commands included.
_cache = tempfile.TemporaryDirectory(prefix="adderflax-test-cache-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
# So are the CPU's kernels, by all workers together: these inherit the first process's folder.
os.environ.setdefault("ADDERFLAX_CACHE_DIR", _cache.name)
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# grain's worker processes read absl flags, which pytest does not parse.
flags.FLAGS.mark_as_parsed()


def pytest_configure(config):
    # Most of the ordinary tests' time is XLA's; the slow ones run as the users' programs do.
    if config.option.markexpr == "not slow":
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
        if jax.__version_info__ < (0, 11):  # an XLA that does not know a flag aborts
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


def pytest_runtest_setup(item):
    """Skips what runs the CPU's kernels where nothing compiles them."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "cpu" in (str(parameters.get(name)) for name in ("implementation", "kernels")):
        from adderflax.operators import _cpu

        if reason := _cpu.unavailable():
            pytest.skip(reason)


@pytest.fixture
def root() -> "os.PathLike[str]":
    """The checkout."""
    from pathlib import Path

    return Path(__file__).parent.parent
