"""The model of docs/training.md that is none of the package's: trained, read again and analyzed."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from adderflax import VisionTransformerConfig, energy
from adderflax.data import DataConfig, load_dataset
from adderflax.models import families
from adderflax.training import config as config_lib
from adderflax.training import trainer
from adderflax.training.command_line import load_config
from adderflax.training.restore import load_model
from adderflax.training.sharding import make_mesh
from adderflax.training.state import training_loss
from adderflax.training.update import configured_update

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """The page's two files, which can be imported here; nothing of them is left behind."""
    for name in ("adder_mixer", "digits_adder_mixer"):
        after = PAGE.read_text().partition(f"`{name}.py`")[2]
        code = re.search(r"^```python\n(.*?)^```", after, flags=re.MULTILINE | re.DOTALL)[1]
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    forget(monkeypatch)
    yield str(tmp_path / "digits_adder_mixer.py")
    sys.modules.pop("adder_mixer", None)


def forget(monkeypatch):
    """Leaves the registry as it is in a process that has imported the package alone."""
    own = {name: found for name, found in families.CONFIG_CLASSES.items() if not families.is_registered(name)}
    known = {found: families.MODULES[found] for found in own.values()}
    monkeypatch.setattr(families, "CONFIG_CLASSES", own)
    monkeypatch.setattr(families, "MODULES", known)
    monkeypatch.setattr(config_lib, "MODULES", known)
    sys.modules.pop("adder_mixer", None)


@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def test_a_model_of_the_readers_own(config_file, tmp_path, monkeypatch, capsys):
    overrides = ("--config.total_steps=2", "--config.model.depth=1", "--config.ema_decay=0.9")
    config = load_config(config_file, overrides)
    workdir = tmp_path / "run"
    figures = trainer.train(config, workdir, progress=False)
    assert np.isfinite(figures["test_loss"])

    forget(monkeypatch)  # as another process begins
    model, variables, info = load_model(workdir)
    assert type(model).__name__ == "Mixer" and model.config.dropout_rate == 0.1
    assert (model.config.image_size, model.config.channels, model.config.num_classes) == (8, 1, 10)
    kernels = [path for path in traverse_util.flatten_dict(variables["params"]) if path[-1] == "adder_kernel"]
    assert len(kernels) == 4
    again = trainer.train(load_config(config_file, overrides), workdir, progress=False)
    assert again["test_loss"] == figures["test_loss"] and again["steps"] == 2

    capsys.readouterr()
    energy.main([str(workdir), "--json"])
    report = json.loads(capsys.readouterr().out)
    # 16 tokens mixed in 64 channels by 32 hidden ones, then 64 channels in 16 tokens by 128.
    assert report["counts"]["model"]["adder_terms"] == 64 * 2 * 16 * 32 + 16 * 2 * 64 * 128
    assert report["counts"]["twin"]["adder_terms"] == 0


@jax.numpy_dtype_promotion("standard")
@jax.numpy_rank_promotion("allow")
def test_dropout_is_drawn_anew_for_each_update(config_file):
    run = config_lib.RunConfig.parse(load_config(config_file, ("--config.model.depth=1",)))
    model = families.build_model(run.model_config(load_dataset(run.data).info))
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    variables = model.init(jax.random.key(1), x)
    targets = jax.nn.one_hot(np.arange(4), 10)
    losses = [
        float(training_loss(model, None, variables, None, {}, x, targets, jax.random.key(seed))[0])
        for seed in (2, 2, 3)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_model_that_takes_no_exponent_cannot_be_annealed():
    class Plain(nn.Module):
        config: VisionTransformerConfig = VisionTransformerConfig()

        @nn.compact
        def __call__(self, images, train=False):
            return images

    class Willing(Plain):
        @nn.compact
        def __call__(self, images, **others):
            return images

    info = load_dataset(DataConfig(name="digits")).info
    config = config_lib.default_config()
    config.anneal_fraction = 0.5
    with pytest.raises(config_lib.ConfigError, match="=0.5 .* and Plain takes none: let its __call__ take"):
        configured_update(config_lib.RunConfig.parse(config), Plain(), info, make_mesh(), 10)
    with pytest.raises(KeyError, match="params"):  # it comes to the model itself, which has no parameters
        configured_update(config_lib.RunConfig.parse(config), Willing(), info, make_mesh(), 10)
