"""Adder ViT (7 blocks of width 256, a small stem, 3.8 M parameters) on CIFAR-10, from scratch, 100 epochs.

    python train.py --config configs/cifar10_adder_vit.py:multiply   # the twin
    python train.py --config configs/cifar10_adder_vit.py:taught     # the adder model that learns from it
    python train.py --config configs/cifar10_adder_vit.py            # the adder model alone

Other argument: ``:vit`` is the standard ViT. ``:taught`` reads the finished twin from
runs/cifar10_adder_vit-multiply, or from ``--config.distillation.teacher=WORKDIR``.
Data: downloaded and prepared on first use, or ``--config.data.data_dir=DIR``.
Hardware: one accelerator; on a CPU use a short override such as ``--config.total_steps=100``.
Accuracy and time: measured on an H200, 60 epochs in place of 100 and one seed, results/cifar10.md. The twin:
82.0 % of the test images, 2.6 s an epoch. ``:taught`` was stopped by the end of the lease after 26 of its 60
epochs, at 79.7 %, ahead of the twin at the same update; 4.8 s an epoch. ``:vit`` and the adder alone: not
yet run in full. Small models on a subset: results/gap_cifar10.md.
"""

from ml_collections import ConfigDict

from adderflax.training.recipes import cifar


def get_config(arithmetic: str = "adder") -> ConfigDict:
    """The configuration, in the given arithmetic, or "taught"."""
    return cifar("cifar10", arithmetic)
