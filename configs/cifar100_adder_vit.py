"""Adder ViT (DeiT-Ti on 4-pixel patches, 5.4 M parameters) on CIFAR-100, from scratch, 200 epochs.

    python train.py --config configs/cifar100_adder_vit.py

Arguments: ``:multiply`` is the multiplying twin, ``:vit`` the standard ViT.
Data: downloaded and prepared on first use, or ``--config.data.data_dir=DIR``.
Hardware: one accelerator; on a CPU use a short override such as ``--config.total_steps=100``.
Accuracy and time: not yet run in full.
"""

from ml_collections import ConfigDict

from adderflax.training.recipes import cifar


def get_config(arithmetic: str = "adder") -> ConfigDict:
    """The configuration, in the given arithmetic."""
    return cifar("cifar100", arithmetic)
