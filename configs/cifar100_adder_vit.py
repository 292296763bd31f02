"""Adder ViT (7 blocks of width 256, a small stem, 3.9 M parameters) on CIFAR-100, from scratch, 50 epochs.

    python train.py --config configs/cifar100_adder_vit.py:multiply   # the twin
    python train.py --config configs/cifar100_adder_vit.py:taught     # the adder model that learns from it
    python train.py --config configs/cifar100_adder_vit.py:warm       # the same, from its weights, 2 epochs
    python train.py --config configs/cifar100_adder_vit.py            # the adder model alone

Other argument: ``:vit`` is the standard ViT. ``:taught`` and ``:warm`` read the finished twin from
runs/cifar100_adder_vit-multiply, or from ``--config.distillation.teacher=WORKDIR``, ``:warm`` its weights
from ``--config.warm_start.source=WORKDIR``.
Data: downloaded and prepared on first use, or ``--config.data.data_dir=DIR``.
Hardware: one accelerator; on a CPU use a short override such as ``--config.total_steps=100``.
Accuracy and time: not yet run in full.
"""

from ml_collections import ConfigDict

from adderflax.training.recipes import cifar


def get_config(arithmetic: str = "adder") -> ConfigDict:
    """The configuration, in the given arithmetic, or "taught" or "warm"."""
    return cifar("cifar100", arithmetic)
