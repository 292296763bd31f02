"""Adder ViT (0.2 M parameters) on scikit-learn's 8x8 handwritten digits, which need no network.

    python train.py --config configs/digits_adder_vit.py

Arguments: ``:multiply`` is the multiplying twin, ``:vit`` the standard ViT.
Hardware: 2 CPU cores.
Accuracy and time: on the 359 test images, means of seeds 0, 1, 2: 0.9758 (adder), 0.9814 (multiply),
0.9805 (vit); 109 s for the adder model, from start to exit.
"""

from ml_collections import ConfigDict

from adderflax.training.config import default_config


def get_config(arithmetic: str = "adder") -> ConfigDict:
    """The configuration, in the given arithmetic."""
    config = default_config(arithmetic)
    config.data.name = "digits"
    config.model.variant = "digits"

    config.batch_size = 128
    config.epochs = 80.0
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_fraction = 0.1
    config.optimizer.weight_decay = 0.05
    config.ema_decay = 0.99

    # Eight pixels leave no room for crops and flips; mixing images is what regularizes here.
    config.augment.mixup_alpha = 0.4
    config.augment.label_smoothing = 0.1

    config.eval_every = 200
    config.checkpoint_every = 200
    config.log_every = 20
    return config
