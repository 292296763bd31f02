"""Adder DeiT-Ti on Imagenette, ten ImageNet classes at 224 pixels: ImageNet's path on a small set.

    python train.py --config configs/imagenette_adder_deit_ti.py

Arguments: ``:multiply`` is the multiplying twin, ``:vit`` the standard DeiT-Ti.
Data: downloaded and prepared on first use, or ``--config.data.data_dir=DIR``.
Hardware: one accelerator; on a CPU use a short override such as
``--config.total_steps=10 --config.batch_size=8``.
Accuracy and time: not yet run in full.
"""

from ml_collections import ConfigDict

from adderflax.training.recipes import deit


def get_config(arithmetic: str = "adder") -> ConfigDict:
    """The configuration, in the given arithmetic."""
    config = deit("Ti/16", arithmetic)
    config.data.name = "imagenette/160px-v2"
    config.data.validation_fraction = 0.1
    config.data.workers = 0
    config.model.dtype = "float32"
    config.batch_size = 128
    config.epochs = 100.0
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_fraction = 0.05
    config.eval_every = 660
    config.checkpoint_every = 330
    return config
